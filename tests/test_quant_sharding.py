"""FSDP2 on two processes of one CPU."""

import functools

import pytest
import torch
from ranks import run_ranks
from strategies import normal
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from gracekit.quant import LSQConfig, fully_shard_qat, lsq_fake_quantize, prepare_qat


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Linear(16, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)) for _ in range(2))

    def get_decoder(self):
        return self

    def forward(self, x):
        x = self.start(x)
        for layer in self.layers:
            x = x + layer(x)
        return x


def build():
    torch.manual_seed(0)
    model = Blocks()
    assert len(prepare_qat(model, LSQConfig(group_size=16))) == 4
    return model


def on_a_rank(rank, world, part, expected):
    mesh = init_device_mesh("cpu", (world,))
    model = fully_shard_qat(build(), mesh=mesh)
    model(part[rank]).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-6)
        assert parameter.numel() == expected[name].numel()
        assert parameter.to_local().numel() == expected[name].numel() // 2

    seen = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mixed = fully_shard_qat(build(), mesh=mesh, mp_policy=policy)
    fake = mixed.layers[0][0].weight_fake_quantizer
    fake.register_forward_hook(
        lambda module, args, out: seen.append(tuple(tensor.clone() for tensor in (*args, module.log_scale, out)))
    )
    mixed(part[rank]).float().square().mean().backward()
    ((weight, x, bias, log_scale, product),) = seen
    assert {tensor.dtype for tensor in (weight, x, bias, product)} == {torch.bfloat16}
    assert log_scale.dtype == torch.float32
    # What is trained is what a prepared bfloat16 model with this state holds.
    plain = build().layers[0][0]
    held = lsq_fake_quantize(plain.weight.bfloat16(), plain.weight_fake_quantizer.log_scale, group_size=16)
    assert torch.equal(lsq_fake_quantize(weight, log_scale, group_size=16), held)
    assert torch.equal(product, nn.functional.linear(x, held, bias))


@pytest.mark.slow
def test_sharded_gradients_equal_those_of_one_process_and_scales_stay_float32():
    part = normal(3, 2, 5, 16, dtype=torch.float32)
    model = build()
    model(part.flatten(0, 1)).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    run_ranks(functools.partial(on_a_rank, part=part, expected=expected))


def test_a_model_without_scales_or_without_blocks_is_refused():
    with pytest.raises(ValueError, match="must have learned scales .* got none in Blocks"):
        fully_shard_qat(Blocks())
    model = nn.Sequential(nn.Linear(16, 16))
    prepare_qat(model, LSQConfig(group_size=16))
    with pytest.raises(ValueError, match="blocks must be given for a model without a decoder, got None and Sequential"):
        fully_shard_qat(model)
