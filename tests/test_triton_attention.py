"""Attention of one token over a static cache: the kernel against float64, and which calls of transformers' layers go to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import generator, normal, seeds
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gracekit.inference.attention import attend, decode_attention

pytest.importorskip("triton")
from gracekit.quant import _triton_attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter rounds to bfloat16 wrongly.
halves = st.sampled_from([torch.bfloat16, torch.float16]) if CUDA else st.just(torch.float16)


def drawn(seed, samples, heads, group, width, places, dtype, *, spread=1.0, masked=0.5):
    """(query, keys, values, mask), with the last place of every row seen."""
    shapes = ((samples, heads * group, 1, width), *[(samples, heads, places, width)] * 2)
    tensors = [(spread * normal(seed + i, *shape)).to(dtype) for i, shape in enumerate(shapes)]
    hidden = torch.rand(samples, places, generator=generator(seed + 3)) < masked
    hidden[:, -1] = False
    mask = torch.zeros(samples, 1, 1, places, dtype=dtype).masked_fill_(hidden[:, None, None], torch.finfo(dtype).min)
    return [tensor.to(DEVICE) for tensor in (*tensors, mask)]


def oracle(query, keys, values, mask, scale):
    """Attention in float64, and that of the values' sizes."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (rows.double().repeat_interleave(group, 1) for rows in (keys, values))
    score = query.double() @ keys.transpose(2, 3) * scale
    weight = score.masked_fill(mask < 0, -torch.inf).softmax(-1)
    return [(weight @ rows).transpose(1, 2) for rows in (values, values.abs())], score.abs().max()


@settings(max_examples=25 if CUDA else 12)
@given(
    seeds,
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([16, 64, 128]),
    st.integers(1, 300),
    halves,
    st.sampled_from([0.1, 1.0, 8.0]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_kernel_is_within_rounding_of_float64(seed, samples, heads, group, width, places, dtype, spread, masked):
    query, keys, values, mask = drawn(seed, samples, heads, group, width, places, dtype, spread=spread, masked=masked)
    scale = width**-0.5
    (expected, sizes), steepest = oracle(query, keys, values, mask, scale)
    unit = torch.finfo(dtype).eps / 2
    # Weights are rounded to halves for their product with the values, and so is the result; the rest is float32's.
    bound = unit * (sizes + expected.abs()) + 4e-6 * (1 + steepest) * sizes + places * 2.0**-24 * values.abs().max()
    found = _triton_attention.attend(query, keys, values, mask, scale)
    assert found.dtype == dtype
    assert bool(((found.double() - expected).abs() <= bound).all())


def test_shares_cover_all_places_and_fill_the_device():
    for heads in (1, 2, 32, 512):
        for places in (1, 64, 65, 736, 4096):
            shares, steps = _triton_attention._shares(heads, places, 132)
            assert (shares - 1) * steps * 64 < places <= shares * steps * 64
    assert _triton_attention._shares(32, 736, 132) == (12, 1)
    assert _triton_attention._shares(2048, 736, 132) == (1, 12)


class Layer(nn.Module):
    num_key_value_groups, is_causal = 2, True


OTHER = {
    "several tokens": lambda q, k, v, m: ((q.expand(-1, -1, 3, -1), k, v, m.expand(-1, -1, 3, -1)), {}),
    "no mask": lambda q, k, v, m: ((q, k, v, None), {}),
    "a mask of bools": lambda q, k, v, m: ((q, k, v, m == 0), {}),
    "float32": lambda q, k, v, m: ((q.float(), k.float(), v.float(), m.float()), {}),
    "places that do not follow one another": lambda q, k, v, m: (
        (q, k.transpose(1, 2).contiguous().transpose(1, 2), v, m),
        {},
    ),
    "a mask for each head": lambda q, k, v, m: ((q, k, v, m.expand(-1, 4, -1, -1)), {}),
    "a window": lambda q, k, v, m: ((q, k, v, m), {"sliding_window": 8}),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_the_kernel_does_not_know_goes_to_transformers(name, monkeypatch):
    monkeypatch.setattr(_triton_attention, "attend", lambda *_: pytest.fail("went to the kernel"))
    inputs, options = OTHER[name](*drawn(0, 2, 2, 2, 16, 20, torch.float16))
    expected, _ = sdpa_attention_forward(Layer(), *inputs, scaling=0.25, **options)
    found, weights = attend(Layer(), *inputs, scaling=0.25, **options)
    assert weights is None
    assert torch.equal(found, expected)


def test_one_token_goes_to_the_kernel(monkeypatch):
    inputs = drawn(0, 2, 2, 2, 16, 20, torch.float16)
    expected, _ = sdpa_attention_forward(Layer(), *inputs, scaling=0.25)
    torch.testing.assert_close(attend(Layer(), *inputs, scaling=0.25)[0], expected, rtol=2e-3, atol=2e-3)
    marked = torch.full_like(expected, 7.0)
    monkeypatch.setattr(_triton_attention, "attend", lambda *_: marked)
    assert torch.equal(attend(Layer(), *inputs, scaling=0.25)[0], marked)


class Config:
    def __init__(self, name):
        self._attn_implementation = name


@pytest.mark.parametrize(("name", "device"), [("eager", "cuda"), ("sdpa", "cpu"), ("sdpa", "cuda")])
def test_a_step_attends_by_the_kernel_on_cuda_where_the_model_does_by_sdpa(name, device):
    config = Config(name)
    with pytest.raises(KeyError), decode_attention(config, torch.device(device)):
        assert config._attn_implementation == ("gracekit_decode" if (name, device) == ("sdpa", "cuda") else name)
        raise KeyError
    assert config._attn_implementation == name
