"""The Triton kernels of the fake quantiser against the plain formula: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_cases import kinds, weights
from strategies import normal, seeds

from gracekit.quant import lsq_fake_quantize
from gracekit.quant.scheme import (
    code_range,
    deployed_scale,
    float_codes,
    in_groups,
    quotients,
    search_scale,
    times_scale,
)

pytest.importorskip("triton")
from gracekit.quant import _triton_lsq

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTEGERS = {2: torch.int16, 4: torch.int32}
widths = st.integers(2, 8)
halves = [torch.bfloat16, torch.float16]
dtypes = st.sampled_from([*halves, torch.float32])
# The interpreter rounds to bfloat16 wrongly, so values in it are compared on a GPU alone.
written = st.sampled_from([*halves, torch.float32] if CUDA else [torch.float16, torch.float32])
# Groups of one number, of no power of two, and of more than a tile.
groups = st.sampled_from([(3, 1), (5, 12), (40, 128), (2, 5000)])
any_groups = st.one_of(groups, st.tuples(st.integers(1, 9), st.integers(1, 70)))


def drawn(seed, kind, dtype, bits, sizes):
    """A weight with two groups a row, and the logarithms of its scales."""
    count, group_size = sizes
    weight = weights(kind, seed, count, 2 * group_size, dtype, group_size)
    log_scale = search_scale(weight, bits, group_size).clamp_min(2.0**-120).log()
    log_scale += normal(seed + 1, *log_scale.shape, dtype=torch.float32, scale=0.3)
    return weight.to(DEVICE), log_scale.to(DEVICE)


def formula_gradients(grad, weight, scale, bits):
    """The plain formula, written once more so that it computes on any device."""
    ratio, (low, high) = quotients(weight, scale), code_range(bits)
    inside = (ratio.round() >= low) & (ratio.round() <= high)
    grads = in_groups(grad.float(), ratio.shape[-1])
    slope = ratio.round().clamp(low, high) - ratio.masked_fill(~inside, 0)
    return (grads * inside).flatten(-2).to(weight.dtype), (slope * grads).double().sum(-1) * scale.double()


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    whole = INTEGERS[expected.dtype.itemsize]
    same = (actual.view(whole) == expected.view(whole)) | (actual.isnan() & expected.isnan())
    assert bool(same.all()), (actual[~same][:5], expected[~same][:5])


def assert_values_of_the_formula(weight, log_scale, bits, scale_dtype):
    scale = deployed_scale(log_scale, scale_dtype)
    expected = times_scale(float_codes(weight, scale, bits), scale, weight.dtype)
    assert_same_bits(_triton_lsq.forward(weight, log_scale, bits, scale_dtype), expected)


@settings(max_examples=30)
@given(seeds, kinds, written, dtypes, widths, groups)
def test_values_are_those_of_the_formula_bit_for_bit(seed, kind, dtype, scale_dtype, bits, sizes):
    weight, log_scale = drawn(seed, kind, dtype, bits, sizes)
    assert_values_of_the_formula(weight, log_scale, bits, scale_dtype)


@settings(max_examples=30)
@given(seeds, kinds, dtypes, dtypes, widths, groups)
def test_gradients_are_those_of_the_formula(seed, kind, dtype, scale_dtype, bits, sizes):
    weight, log_scale = drawn(seed, kind, dtype, bits, sizes)
    grad = normal(seed + 2, *weight.shape, dtype=dtype).to(DEVICE)
    given = (grad, weight, log_scale, bits, scale_dtype)
    both = _triton_lsq.backward(*given, needs_weight=True, needs_scale=True)
    expected_weight, expected_scale = formula_gradients(grad, weight, deployed_scale(log_scale, scale_dtype), bits)
    assert torch.equal(both[0], expected_weight)
    # Sums of up to 5,000 float32 numbers in another order.
    atol = 1e-5 * float(expected_scale.abs().max()) + 1e-36
    torch.testing.assert_close(both[1], expected_scale.float(), rtol=1e-4, atol=atol)  # beyond float32: infinite

    alone = _triton_lsq.backward(*given, needs_weight=True, needs_scale=False)
    assert torch.equal(alone[0], both[0])
    assert alone[1].numel() == 0
    alone = _triton_lsq.backward(*given, needs_weight=False, needs_scale=True)
    assert torch.equal(alone[1], both[1])
    assert alone[0].numel() == 0


# The interpreter's sums are numpy's, which warns where infinities cancel.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@settings(max_examples=30)
@given(seeds, kinds, dtypes, dtypes, widths, any_groups, st.sampled_from([0.0, 1.0]))
def test_gradients_in_place_are_those_out_of_place_bit_for_bit(seed, kind, dtype, scale_dtype, bits, sizes, finer):
    weight, log_scale = drawn(seed, kind, dtype, bits, sizes)
    weight.view(-1)[::11], log_scale = torch.nan, log_scale - finer
    grad = normal(seed + 2, *weight.shape, dtype=dtype).to(DEVICE)
    for start, value in enumerate((torch.nan, torch.inf, -torch.inf, -0.0)):
        grad.view(-1)[start::17] = value
    given = (weight, log_scale, bits, scale_dtype)
    for needs_scale in (True, False):
        expected = _triton_lsq.backward(grad, *given, needs_weight=True, needs_scale=needs_scale)
        own = grad.clone()
        found = _triton_lsq.backward(own, *given, needs_weight=True, needs_scale=needs_scale, in_place=True)
        assert found[0] is own
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("scale_dtype", [*halves, torch.float32])
def test_scales_are_rounded_as_they_are_deployed(scale_dtype):
    # Through a weight of ones of a tile's own scale: W_q of a float32 weight s is s itself, from the least scale to the greatest.
    log_scale = torch.cat([torch.linspace(-150, 150, 3001), torch.linspace(-12, 2, 3001), torch.tensor([torch.nan])])
    log_scale = log_scale[:, None].to(DEVICE)
    scale = deployed_scale(log_scale, scale_dtype).float()
    assert_same_bits(_triton_lsq.forward(scale, log_scale, 4, scale_dtype), scale)


def every(dtype, least):
    """All finite numbers of a half dtype from ``least`` on."""
    numbers = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite() & (numbers.float() >= least)]


@pytest.mark.parametrize("scale_dtype", halves)
@pytest.mark.parametrize("dtype", halves)
def test_codes_of_all_halves_are_those_of_the_division(dtype, scale_dtype):
    # On a GPU every weight meets every scale; the interpreter, which is slow, takes the scales of the ties near 1 alone.
    weight = every(dtype, -torch.inf)
    scales = every(scale_dtype, 2.0**-24 if scale_dtype == torch.float16 else 2.0**-126)
    for part in scales.split(1024) if CUDA else [scales[(scales >= 1) & (scales < 2)][::37]]:
        tiled, logs = weight.repeat(len(part), 1), part[:, None].double().log().float()
        assert torch.equal(deployed_scale(logs, scale_dtype), part[:, None])
        if CUDA or dtype == torch.float16:
            assert_values_of_the_formula(tiled, logs, 8, scale_dtype)
        inside, _ = _triton_lsq.backward(
            torch.ones_like(tiled), tiled, logs, 8, scale_dtype, needs_weight=True, needs_scale=False
        )
        codes = quotients(tiled, part[:, None]).flatten(-2).round_()
        assert torch.equal(inside, ((codes >= -128) & (codes <= 127)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_a_number_stays_so_and_infinity_is_clipped(dtype):
    weight = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0]], dtype=dtype, device=DEVICE)
    log_scale = torch.full((1, 1), 0.5, device=DEVICE).log()
    assert_same_bits(
        _triton_lsq.forward(weight, log_scale, 4, torch.bfloat16),
        torch.tensor([[torch.nan, 3.5, -4.0, -0.0]], dtype=dtype, device=DEVICE),
    )
    grad = torch.ones_like(weight)
    grad_weight, grad_log_scale = _triton_lsq.backward(
        grad, weight, log_scale, 4, torch.bfloat16, needs_weight=True, needs_scale=True
    )
    assert grad_weight.tolist() == [[0.0, 0.0, 0.0, 1.0]]
    assert bool(grad_log_scale.isnan())
    log_scale.fill_(torch.nan)
    assert bool(_triton_lsq.forward(weight, log_scale, 4, torch.bfloat16).isnan().all())


def test_any_strides_give_the_same_and_no_elements_give_none():
    weight, log_scale = drawn(0, "normal", torch.float32, 4, (5, 12))
    grad = normal(3, *weight.shape, dtype=torch.float32).to(DEVICE)
    strided = [tensor.t().contiguous().t() for tensor in (weight, log_scale, grad)]
    settings = (4, torch.bfloat16)
    assert torch.equal(_triton_lsq.forward(*strided[:2], *settings), _triton_lsq.forward(weight, log_scale, *settings))
    for a, b in zip(
        _triton_lsq.backward(strided[2], *strided[:2], *settings, needs_weight=True, needs_scale=True),
        _triton_lsq.backward(grad, weight, log_scale, *settings, needs_weight=True, needs_scale=True),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert _triton_lsq.forward(weight[:0], log_scale[:0], *settings).shape == (0, 24)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*halves, torch.float32, torch.float64])
def test_cuda_tensors_are_computed_by_the_kernels_except_float64(dtype, monkeypatch):
    called = []
    for name in ("forward", "backward"):
        real = getattr(_triton_lsq, name)
        monkeypatch.setattr(
            _triton_lsq, name, lambda *args, real=real, name=name, **kw: called.append(name) or real(*args, **kw)
        )
    weight = normal(0, 4, 32, dtype=dtype).cuda().requires_grad_()
    log_scale = torch.full((4, 2), -2.0, device="cuda", requires_grad=True)
    lsq_fake_quantize(weight, log_scale, group_size=16).sum().backward()
    assert called == ([] if dtype == torch.float64 else ["forward", "backward"])


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.gpu
def test_nothing_of_float32_is_made_beside_half_weights():
    weight = normal(0, 1024, 4096, dtype=torch.bfloat16).cuda().requires_grad_()
    log_scale = torch.full((1024, 32), -2.0, device="cuda", requires_grad=True)
    grad = torch.ones_like(weight)
    lsq_fake_quantize(weight, log_scale).backward(grad)  # Compiled and warm.
    weight.grad = log_scale.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    values = lsq_fake_quantize(weight, log_scale)
    values.backward(grad)
    # W_q and dW, both of two bytes a weight; scales and their gradient are a sixty-fourth of that.
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * (2 * weight.numel() * 2)
