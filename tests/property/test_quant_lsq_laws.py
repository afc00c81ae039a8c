import pytest
import reference_quant as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import dtypes, kinds, off_ties, weights
from strategies import normal, scales, seeds
from tolerances import GRADIENT

from gracekit.quant import lsq_fake_quantize
from gracekit.quant.scheme import search_scale

widths = st.integers(2, 8)
scale_dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def drawn(seed, dtype, bits, scale_dtype, *, spread=1.0, outputs=3, groups=2, group_size=16):
    """Weights away from ties, learned scales, and the rounded scales they stand for."""
    weight = normal(seed, outputs, groups * group_size, dtype=dtype, scale=spread)
    log_scale = (
        normal(seed + 1, outputs, groups, scale=0.4) + torch.tensor(2.5 * spread / 2 ** (bits - 1)).log()
    ).float()
    scale = log_scale.exp().to(scale_dtype)
    return off_ties(weight, scale), log_scale, scale


@given(seeds, st.sampled_from([*GRADIENT]), widths, scale_dtypes, st.sampled_from([0.02, 1.0, 50.0]))
def test_values_are_the_nearest_codes_times_the_rounded_scale(seed, dtype, bits, scale_dtype, spread):
    weight, log_scale, scale = drawn(seed, dtype, bits, scale_dtype, spread=spread)
    result = lsq_fake_quantize(weight, log_scale, bits=bits, group_size=16, scale_dtype=scale_dtype)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(), reference.fake_quantize(weight, scale, bits), rtol=torch.finfo(dtype).eps, atol=1e-7
    )


@given(seeds, st.sampled_from([*GRADIENT]), widths, scale_dtypes)
def test_gradients_are_the_straight_through_estimator(seed, dtype, bits, scale_dtype):
    weight, log_scale, scale = drawn(seed, dtype, bits, scale_dtype)
    weight.requires_grad_()
    log_scale.requires_grad_()
    grad = normal(seed + 2, *weight.shape, dtype=dtype)
    lsq_fake_quantize(weight, log_scale, bits=bits, group_size=16, scale_dtype=scale_dtype).backward(grad)
    grad_weight, grad_theta = reference.gradients(weight.detach(), scale, grad, bits)
    assert weight.grad.dtype == dtype
    assert log_scale.grad.dtype == torch.float32
    assert torch.equal(weight.grad.double(), grad_weight)
    # The gradient of the scale has log_scale's own dtype, float32, whatever the weight's.
    torch.testing.assert_close(log_scale.grad.double(), grad_theta, **GRADIENT[torch.float32])


@given(seeds, widths)
def test_gradients_equal_torchs_own_learnable_fake_quantiser(seed, bits):
    weight, log_scale, scale = drawn(seed, torch.float32, bits, torch.float32)
    ours = weight.clone().requires_grad_()
    theta = log_scale.clone().requires_grad_()
    grad = normal(seed + 2, *weight.shape, dtype=torch.float32)
    mine = lsq_fake_quantize(ours, theta, bits=bits, group_size=16, scale_dtype=torch.float32)
    mine.backward(grad)

    theirs = weight.clone().view(-1, 16).requires_grad_()
    step = scale.clone().view(-1).requires_grad_()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    peer = torch._fake_quantize_learnable_per_channel_affine(theirs, step, torch.zeros_like(step), 0, low, high, 1.0)
    peer.backward(grad.view(-1, 16))
    torch.testing.assert_close(mine, peer.view_as(mine), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad.view_as(ours))
    torch.testing.assert_close(theta.grad.view(-1), step.grad * step.detach(), rtol=1e-4, atol=1e-5)


@given(seeds, dtypes, kinds, widths)
def test_fake_quantising_twice_changes_nothing_more(seed, dtype, kind, bits):
    weight = weights(kind, seed, 4, 64, dtype, 32)
    log_scale = search_scale(weight, bits, 32).clamp_min(2.0**-120).log()
    once = lsq_fake_quantize(weight, log_scale, bits=bits, group_size=32)
    twice = lsq_fake_quantize(once, log_scale, bits=bits, group_size=32)
    assert torch.equal(once, twice)


@given(seeds, scales, widths)
def test_no_weight_inside_moves_by_more_than_half_a_step(seed, spread, bits):
    weight = normal(seed, 4, 32, dtype=torch.float32, scale=spread)
    high = 2 ** (bits - 1) - 1
    log_scale = (weight.abs().amax(1, keepdim=True) / high).log()
    moved = lsq_fake_quantize(weight, log_scale, bits=bits, group_size=32, scale_dtype=torch.float32) - weight
    assert bool((moved.abs() <= 0.500001 * log_scale.exp()).all())


@given(seeds, st.integers(-90, 90), widths)
def test_a_power_of_two_on_weights_and_scales_is_one_on_the_result(seed, exponent, bits):
    weight, log_scale, _ = drawn(seed, torch.float64, bits, torch.float32)
    factor = 2.0**exponent
    wide = log_scale.double()
    plain = lsq_fake_quantize(weight, wide, bits=bits, group_size=16, scale_dtype=torch.float64)
    scaled = lsq_fake_quantize(
        weight * factor,
        wide + exponent * torch.tensor(2.0, dtype=torch.float64).log(),
        bits=bits,
        group_size=16,
        scale_dtype=torch.float64,
    )
    torch.testing.assert_close(scaled, plain * factor, rtol=1e-12, atol=0)


@given(seeds, widths, st.sampled_from([0.01, 1.0, 30.0]))
def test_initial_scales_are_the_candidates_of_least_squared_error(seed, bits, spread):
    weight = normal(seed, 3, 32, dtype=torch.float32, scale=spread)
    found = search_scale(weight, bits, 16)
    for row in range(3):
        for group in range(2):
            options, errors = reference.candidates(weight[row, group * 16 : group * 16 + 16].tolist(), bits)
            chosen = min(range(20), key=lambda index: abs(options[index] - float(found[row, group])))
            assert float(found[row, group]) == pytest.approx(options[chosen], rel=1e-6)
            # Two candidates may be equally good up to the rounding of float32.
            assert errors[chosen] <= min(errors) * (1 + 1e-4)


@given(seeds, widths, st.integers(-100, 100))
def test_the_initial_scale_search_commutes_with_powers_of_two(seed, bits, exponent):
    weight = normal(seed, 3, 32, dtype=torch.float32)
    assert torch.equal(search_scale(weight * 2.0**exponent, bits, 16), search_scale(weight, bits, 16) * 2.0**exponent)


@given(seeds, dtypes, kinds, widths)
def test_initial_scales_are_positive_and_finite_and_one_for_zeros(seed, dtype, kind, bits):
    weight = weights(kind, seed, 4, 64, dtype, 32)
    found = search_scale(weight, bits, 32)
    zeros = weight.view(4, 2, 32).abs().amax(-1) == 0
    assert bool((found[zeros] == 1).all())
    assert bool(found.isfinite().all())
    assert bool((found >= 0).all())
