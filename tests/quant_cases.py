"""Weights and small models that several tests of quantisation draw."""

import torch
from hypothesis import strategies as st
from strategies import generator, normal
from torch import nn

from gracekit.quant import LSQConfig, prepare_qat

KINDS = ("normal", "ties", "huge", "tiny", "zero groups", "subnormal", "outliers", "all equal")
kinds = st.sampled_from(KINDS)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])

SMALL = LSQConfig(group_size=16)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, bias=False)) for _ in range(2))
        self.projection_outside_the_blocks = nn.Linear(32, 32)


class Pair(nn.Module):
    """A model with a vision part, a decoder and a head, found by duck typing."""

    def __init__(self):
        super().__init__()
        self.vision = nn.Linear(32, 32)
        self.decoder = Decoder()
        self.head = nn.Linear(32, 10)

    def get_decoder(self):
        return self.decoder

    def get_output_embeddings(self):
        return self.head


def weights(kind, seed, outputs, inputs, dtype, group_size):
    """Weights of one kind, finite in ``dtype``."""
    drawn = normal(seed, outputs, inputs, scale=0.02)
    largest = torch.finfo(dtype).max
    if kind == "ties":  # with a scale of 1/64 each quotient is a whole number and a half
        drawn = (torch.randint(-9, 9, (outputs, inputs), generator=generator(seed)) + 0.5).double() / 64
    elif kind == "huge":
        drawn = drawn / drawn.abs().max() * largest / 4
    elif kind == "tiny":
        drawn = drawn * torch.finfo(dtype).tiny * 1e3
    elif kind == "zero groups":
        drawn = drawn.view(outputs, -1, group_size) * (torch.rand(outputs, 1, 1, generator=generator(seed)) < 0.5)
        drawn = drawn.view(outputs, inputs)
    elif kind == "subnormal":
        drawn = drawn * torch.finfo(dtype).tiny
    elif kind == "outliers":
        drawn[:, ::17] *= 1e3
    elif kind == "all equal":
        drawn = torch.full_like(drawn, 0.03)
    return drawn.to(dtype)


def off_ties(weight, scale):
    """Move the weights whose quotient lies so close to a tie that float32 and float64 round it differently."""
    wide = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    ratio = weight.double() / wide
    near = (ratio - ratio.floor() - 0.5).abs() < 1e-4 * ratio.abs().clamp_min(1)
    return torch.where(near, (ratio.floor() * wide).to(weight.dtype), weight)


def prepared(weight, *, bits=4, group_size=32, scale_dtype=torch.bfloat16, shift=None, bias=True):
    """A prepared model of one layer (named "layer") with this weight, its scales moved as training moves them."""
    model = nn.ModuleDict({"layer": nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)})
    with torch.no_grad():
        model["layer"].weight.copy_(weight)
    prepare_qat(model, LSQConfig(bits=bits, group_size=group_size, scale_dtype=scale_dtype))
    if shift is not None:
        with torch.no_grad():
            log_scale = model["layer"].weight_fake_quantizer.log_scale
            log_scale.add_(normal(shift, *log_scale.shape, dtype=torch.float32, scale=0.3))
    return model


def trained_values(model):
    """(W_q of the training forward, scales as float64) of the layer, without the code that conversion uses."""
    layer = model["layer"]
    with torch.no_grad():
        values = layer.weight_fake_quantizer(layer.weight)
    config = layer.weight_fake_quantizer.config
    smallest = 2.0**-24 if config.scale_dtype == torch.float16 else 2.0**-126
    scale = layer.weight_fake_quantizer.log_scale.detach().double().exp().clamp_min(smallest)
    return values, scale.to(config.scale_dtype).double()
