"""The Lagrangian controller: its laws, its state, and bad input."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from gracekit import LagrangianController

values = st.floats(-1e6, 1e6)
any_value = st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def settings(draw):
    low = draw(st.floats(0.0, 10.0))
    high = draw(st.floats(low, 20.0))
    return {
        "target": draw(st.floats(-5, 5)),
        "lr": draw(st.floats(0, 10)),
        "bounds": (low, high),
        "initial": draw(st.floats(low, high)),
        "ema_decay": draw(st.floats(0, 0.999)),
    }


@given(settings(), st.lists(any_value, max_size=20))
def test_the_multiplier_never_leaves_its_bounds(options, sequence):
    controller = LagrangianController(**options)
    low, high = options["bounds"]
    # Bounds so close that no float32 lies between them hold to the rounding of one.
    slack = 0.0 if high - low > 1e-5 * max(high, 1e-30) else 1e-6 * high
    for value in sequence:
        multiplier = controller.step(value).item()
        assert low - slack <= multiplier <= high + slack


@given(settings(), st.lists(values, min_size=1, max_size=8), st.floats(0, 100))
def test_a_larger_gap_never_gives_a_smaller_multiplier(options, sequence, more):
    below, above = LagrangianController(**options), LagrangianController(**options)
    for value in sequence:
        assert above.step(value + more) >= below.step(value)


@given(st.floats(-3, 3), st.integers(1, 20))
def test_an_ema_at_the_target_is_a_fixed_point(target, steps):
    controller = LagrangianController(target=target, lr=1.0, initial=1.5)
    for _ in range(steps):
        controller.step(target)
    assert controller.multiplier.item() == pytest.approx(1.5, abs=1e-5)


def test_steps_follow_the_formula():
    controller = LagrangianController(target=0.5, lr=0.1, initial=1.0, bounds=(0.0, 10.0), ema_decay=0.9)
    ema = beta = None
    for value in [3.0, 1.0, -2.0, 0.25]:
        ema = value if ema is None else 0.9 * ema + 0.1 * value
        beta = (1.0 if beta is None else beta) + 0.1 * (ema - 0.5)
        assert controller.step(torch.tensor(value)).item() == pytest.approx(beta, rel=1e-6)
        assert controller.ema.item() == pytest.approx(ema, rel=1e-6)


def test_without_smoothing_it_is_coopers_projected_multiplier_ascent():
    """cooper keeps an inequality multiplier in [0, inf) by the same projection."""
    cooper = pytest.importorskip("cooper")
    multiplier = cooper.multipliers.DenseMultiplier(init=torch.tensor([1.0]))
    multiplier.set_constraint_type(cooper.ConstraintType.INEQUALITY)
    optimizer = torch.optim.SGD(multiplier.parameters(), lr=0.25, maximize=True)
    controller = LagrangianController(target=0.5, lr=0.25, initial=1.0, bounds=(0.0, 1e6), ema_decay=0.0)
    for value in [0.9, -4.0, -3.0, 2.0, 2.5, 0.5]:
        optimizer.zero_grad()
        (multiplier() * (value - 0.5)).sum().backward()
        optimizer.step()
        multiplier.post_step_()
        assert controller.step(value).item() == pytest.approx(multiplier().item(), rel=1e-6)


@given(settings(), st.lists(values, min_size=2, max_size=10), st.integers(1, 9))
def test_state_survives_saving_and_loading_bit_for_bit(options, sequence, cut):
    straight, first = LagrangianController(**options), LagrangianController(**options)
    for value in sequence:
        straight.step(value)
    for value in sequence[:cut]:
        first.step(value)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = LagrangianController(**options)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for value in sequence[cut:]:
        second.step(value)
    for name, expected in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], expected)


def test_a_multiplier_from_under_other_bounds_is_brought_within_its_own():
    far = LagrangianController(initial=4.0)
    near = LagrangianController(initial=0.5, bounds=(0.1, 0.7))
    near.load_state_dict(far.state_dict())
    assert near.multiplier.item() <= 0.7
    assert near.multiplier.item() == pytest.approx(0.7)
    with pytest.raises(AttributeError, match="bounds"):
        near.bounds = (0.1, 9.0)


def test_a_controller_can_be_made_under_another_default_device():
    with torch.device("meta"):
        controller = LagrangianController()
    assert controller.multiplier.is_meta
    assert controller.bounds == (0.1, 5.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_skipped_and_counted(bad):
    controller = LagrangianController()
    controller.step(bad)
    assert controller.ema.isnan()
    controller.step(2.0)
    before = controller.multiplier.clone(), controller.ema.clone()
    controller.step(torch.tensor(bad))
    assert (controller.multiplier, controller.ema) == before
    assert controller.skipped.item() == 2


def test_steps_that_end_on_a_bound_are_counted():
    controller = LagrangianController(target=0.0, lr=1.0, initial=4.5, bounds=(0.1, 5.0), ema_decay=0.0)
    for value, saturated in [(0.2, 0), (1.0, 1), (1.0, 2), (-1.0, 2), (-9.0, 3), (math.nan, 3)]:
        controller.step(value)
        assert controller.saturated_steps.item() == saturated


def test_a_learning_rate_of_zero_is_a_fixed_multiplier():
    controller = LagrangianController(lr=0.0, initial=0.7)
    for value in (100.0, -100.0):
        assert controller.step(value).item() == pytest.approx(0.7)


@pytest.mark.parametrize("weight", [math.nan, torch.tensor(math.nan)])
def test_a_weight_that_is_no_number_skips_the_step(weight):
    controller = LagrangianController(lr=1.0)
    controller.step(9.0, weight=weight)
    assert controller.multiplier.item() == 1.0
    assert controller.skipped.item() == 1


@pytest.mark.parametrize("lr", [0.0, 3e38])
def test_a_multiplier_that_would_be_no_number_is_skipped(lr):
    controller = LagrangianController(target=0.5, lr=lr, ema_decay=0.0)
    for value in (3e38, -3e38, 0.5):
        controller.step(value)
        assert controller.bounds[0] <= controller.multiplier.item() <= controller.bounds[1]


def test_a_value_that_weighs_nothing_is_skipped():
    controller = LagrangianController(lr=1.0)
    controller.step(9.0, weight=0.0)
    assert controller.multiplier.item() == 1.0
    assert controller.skipped.item() == 1


def test_the_result_is_a_copy():
    controller = LagrangianController(lr=1.0)
    first = controller.step(1.0)
    kept = first.clone()
    controller.step(2.0)
    assert torch.equal(first, kept)
    assert not torch.equal(first, controller.multiplier)


def test_casting_the_module_keeps_the_precision_of_the_state():
    controller = LagrangianController(lr=0.0015, target=0.0)
    around = torch.nn.Sequential(controller, torch.nn.Linear(2, 2)).to(torch.bfloat16)
    assert around[1].weight.dtype == torch.bfloat16
    assert controller.multiplier.dtype == torch.float32
    assert controller.step(1.0).item() == pytest.approx(1.0015)
    assert around.to("meta")[0].multiplier.is_meta


def test_prints_its_constructor():
    controller = LagrangianController(1.0, lr=0.1, initial=0.3, bounds=(0.2, 0.4), ema_decay=0.5)
    assert repr(eval(repr(controller), {"LagrangianController": LagrangianController})) == repr(controller)


def _two_ranks(rank: int, world: int) -> None:
    options = {"target": 0.0, "lr": 1.0, "initial": 0.0, "bounds": (0.0, 100.0), "ema_decay": 0.0}
    weighted = LagrangianController(**options)
    weighted.step([1.0, 4.0][rank], weight=[3.0, 1.0][rank])
    assert weighted.multiplier.item() == pytest.approx(1.75)
    plain = LagrangianController(**options)
    plain.step(torch.tensor([1.0, 4.0][rank]))
    assert plain.multiplier.item() == pytest.approx(2.5)
    summed = LagrangianController(**options)
    summed.step([1.0, 4.0][rank], reduce="sum")
    assert summed.multiplier.item() == pytest.approx(5.0)
    poisoned = LagrangianController(**options)
    poisoned.step([math.nan, 4.0][rank])
    assert poisoned.skipped.item() == 1
    idle = LagrangianController(**options)
    idle.step([math.nan, 4.0][rank], weight=[0.0, 2.0][rank])
    assert idle.multiplier.item() == pytest.approx(4.0)


def test_the_multiplier_is_the_same_on_every_rank():
    run_ranks(_two_ranks)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": math.nan}, ValueError, "target must be finite"),
        ({"lr": -0.1}, ValueError, "lr must be finite and in .*lr=-0.1"),
        ({"bounds": (2.0, 1.0)}, ValueError, r"bounds\[1\] must be finite and in \[2, inf\]"),
        ({"bounds": (1.0, 2.0, 3.0)}, ValueError, "bounds must be"),
        ({"initial": 6.0}, ValueError, r"initial must be finite and in \[0.1, 5\], got initial=6.0"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay must be below 1"),
        ({"ema_decay": True}, TypeError, "ema_decay must be a number"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        LagrangianController(**options)


def test_bad_arguments_of_a_step_are_refused():
    controller = LagrangianController()
    with pytest.raises(ValueError, match=r"value must hold one element, got shape \(2,\)"):
        controller.step(torch.ones(2))
    with pytest.raises(TypeError, match="value must be a real number, got torch.complex64"):
        controller.step(torch.tensor(1j))
    with pytest.raises(ValueError, match="reduce must be one of 'mean', 'sum'"):
        controller.step(1.0, reduce="max")
    with pytest.raises(ValueError, match="weight belongs to reduce='mean'"):
        controller.step(1.0, 2.0, reduce="sum")
