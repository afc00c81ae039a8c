"""The Triton kernels against the formula and the float64 oracle: on a GPU where there is one, else in Triton's interpreter."""

import math
import sys

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import labels, normal, seeds
from tolerances import GRADIENT, VALUE

from gracekit import ConfidenceGatedDKD, GraceObjective, entropy_gate, gated_dkd, linear_gated_dkd
from gracekit.losses import _inputs, _token_values, _triton_gated_dkd
from gracekit.losses._rows import DKDParameters, Rows, backward_rows, forward_rows

triton = pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LANE_BLOCK = _triton_gated_dkd._LANES * _triton_gated_dkd._PER_LANE


def on_device(*tensors):
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def rows_of(seed, count, width, teacher_width, classes, dtype, scale=3.0):
    student = normal(seed, count, width, dtype=dtype, scale=scale)
    teacher = normal(seed + 1, count, teacher_width, dtype=dtype, scale=scale)
    target = labels(seed + 2, count, classes, ignored=0.0)
    keep = labels(seed + 3, count, 2, ignored=0.25) != -100
    return Rows(*on_device(student, teacher, target, keep))


def assert_equal_to_the_formula(rows, parameters, *, with_cross_entropy, parts=None):
    dtype = rows.student_NV.dtype
    values, statistics = _triton_gated_dkd.forward(rows, parameters, with_cross_entropy=with_cross_entropy, parts=parts)
    exact = Rows(rows.student_NV.double(), rows.teacher_NV.double(), rows.target_N, rows.keep_N)
    expected, exact_statistics = forward_rows(exact, parameters, with_cross_entropy=with_cross_entropy)
    for name in ("dkd_N", "gate_N") + (("cross_entropy_N",) if with_cross_entropy else ()):
        torch.testing.assert_close(getattr(values, name).double(), getattr(expected, name), rtol=2e-5, atol=2e-5)
    weights = [normal(seed, len(rows.target_N), dtype=torch.float32).to(DEVICE) for seed in (7, 8)]
    gradient = torch.full_like(rows.student_NV, math.nan)
    _triton_gated_dkd.backward(
        rows, statistics, *weights, parameters, out_NV=gradient, with_cross_entropy=with_cross_entropy
    )
    expected_gradient = backward_rows(
        exact,
        exact_statistics,
        *(weight.double() for weight in weights),
        parameters,
        with_cross_entropy=with_cross_entropy,
    )
    expected_gradient.masked_fill_(~rows.keep_N[:, None], 0.0)
    torch.testing.assert_close(gradient.double(), expected_gradient, **GRADIENT[dtype])


@settings(max_examples=25)
@given(
    seeds,
    st.integers(1, 4),
    st.one_of(st.integers(2, 40), st.integers(LANE_BLOCK - 3, 2 * LANE_BLOCK + 3)),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1.0, 2.0, 3.3]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
)
def test_kernels_equal_the_formula(
    seed, count, classes, student_padding, teacher_padding, dtype, temperature, gated, with_cross_entropy, parts
):
    rows = rows_of(seed, count, classes + student_padding, classes + teacher_padding, classes, dtype)
    parameters = DKDParameters(temperature, 1.0, 4.0, gated, classes)
    assert_equal_to_the_formula(rows, parameters, with_cross_entropy=with_cross_entropy, parts=parts)


@pytest.mark.parametrize("odds", [69.0, -69.0, 1e4, -1e4])
@pytest.mark.parametrize("teacher_odds", [69.0, -69.0, 1e4, -1e4, 0.0])
def test_kernels_equal_the_formula_at_extreme_probabilities(odds, teacher_odds):
    rows = rows_of(1, 3, 50, 50, 50, torch.float32, scale=1.0)
    index = torch.arange(3, device=DEVICE)
    rows.student_NV[index, rows.target_N] = odds
    rows.teacher_NV[index, rows.target_N] = teacher_odds
    assert_equal_to_the_formula(rows, DKDParameters(2.0, 1.0, 4.0, True, 50), with_cross_entropy=True)


def test_kernels_keep_small_differences_far_below_the_target():
    rows = rows_of(1, 3, 50, 50, 50, torch.float32, scale=1.0)
    index = torch.arange(3, device=DEVICE)
    rows.student_NV[index, rows.target_N] += 1e4
    rows.teacher_NV.sub_(1e4)
    assert_equal_to_the_formula(rows, DKDParameters(1.0, 1.0, 4.0, True, 50), with_cross_entropy=True)


@pytest.mark.parametrize("masked", [slice(3, 40), slice(0, 50)])
def test_kernels_drop_classes_that_both_sides_mask(masked):
    rows = rows_of(1, 4, 50, 50, 50, torch.float32)
    index = torch.arange(4, device=DEVICE)
    for side in (rows.student_NV, rows.teacher_NV):
        kept = side[index, rows.target_N].clone()
        side[:, masked] = -math.inf
        side[index, rows.target_N] = kept
    assert_equal_to_the_formula(rows, DKDParameters(2.0, 1.0, 4.0, True, 50), with_cross_entropy=True)


def test_a_class_the_teacher_weighs_and_the_student_masks_makes_the_loss_infinite():
    student, teacher, target = on_device(*(normal(s, 2, 9, dtype=torch.float32) for s in (1, 2)), torch.tensor([0, 1]))
    student[1, 5] = -math.inf
    loss = gated_dkd(student, teacher, target, reduction="none", backend="triton")
    assert loss.isfinite().tolist() == [True, False]
    assert loss[1].item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "alpha": 0.0}, {"gate": None, "beta": 0.0, "alpha": 2.0}])
def test_the_public_loss_equals_the_oracle(dtype, options):
    student, teacher = (normal(seed, 7, 57, dtype=dtype) for seed in (1, 2))
    target = labels(3, 7, 57)
    given = student.to(DEVICE, copy=True).requires_grad_()
    loss = gated_dkd(given, teacher.to(DEVICE), target.to(DEVICE), backend="triton", **options)
    loss.backward()
    exact = student.double().requires_grad_()
    numbers = {name: value for name, value in options.items() if name != "gate"}
    losses, gates = reference.gated_dkd_tokens(exact, teacher, target, **numbers)
    weights = torch.ones_like(gates) if "gate" in options else gates
    expected = (weights * losses).sum() / weights.sum()
    expected.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), expected.detach(), **VALUE[dtype])
    torch.testing.assert_close(given.grad.cpu().double(), exact.grad, **GRADIENT[dtype])


def test_rows_may_have_any_stride():
    whole = normal(1, 6, 64, dtype=torch.float32).to(DEVICE)
    teacher, target = on_device(normal(2, 6, 31, dtype=torch.float32), labels(3, 6, 31))
    teachers = (teacher, teacher.T.contiguous().T)
    expected = loss_and_gradient(whole[:, 5:36].contiguous(), teacher, target, backend="torch")
    for student in (whole[:, 5:36], whole[:, 5:36].T.contiguous().T):
        assert not student.is_contiguous()
        for side in teachers:
            torch.testing.assert_close(loss_and_gradient(student, side, target, backend="triton"), expected)


def loss_and_gradient(student, teacher, target, **options):
    student = student.detach().requires_grad_()
    loss = gated_dkd(student, teacher, target, **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def test_a_teacher_that_masks_all_but_the_target_teaches_nothing_about_the_rest():
    student, target = on_device(normal(1, 4, 31, dtype=torch.float32), labels(3, 4, 31, ignored=0.0))
    one_hot = torch.full_like(student, -math.inf).scatter(1, target[:, None], 0.0)
    results = [loss_and_gradient(student, one_hot, target, backend=backend) for backend in ("torch", "triton")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(results[0][1].sum(1), torch.zeros(4, device=DEVICE), rtol=0, atol=1e-6)


def test_parts_with_the_global_gate_sum_add_up_to_the_whole():
    student, teacher, target = on_device(*(normal(s, 6, 31, dtype=torch.float32) for s in (1, 2)), labels(3, 6, 31))
    whole = gated_dkd(student, teacher, target, backend="triton")
    gate_sum = entropy_gate(teacher, target).sum()
    parts = [
        gated_dkd(student[i], teacher[i], target[i], gate_sum=gate_sum, backend="triton")
        for i in ([0, 1], [2, 3, 4, 5])
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_no_supervised_token_and_no_token_at_all_give_zero():
    for count in (0, 3):
        student = torch.zeros(count, 9, device=DEVICE, requires_grad=True)
        target = torch.full((count,), -100, device=DEVICE)
        loss = gated_dkd(student, torch.zeros(count, 9, device=DEVICE), target, backend="triton")
        loss.backward()
        assert loss.item() == 0.0
        assert (student.grad == 0).all()


def test_the_objective_uses_the_kernels():
    student, teacher, target = on_device(*(normal(s, 6, 31, dtype=torch.float32) for s in (1, 2)), labels(3, 6, 31))
    student.requires_grad_()
    results = []
    for backend in ("torch", "triton"):
        loss = GraceObjective(ConfidenceGatedDKD(backend=backend))(student, teacher, target)
        results.append((*loss[:3], *torch.autograd.grad(loss.total, student)))
    torch.testing.assert_close(*results)


def test_hidden_states_use_the_kernels(monkeypatch):
    hidden, head, teacher_hidden, teacher_head = on_device(
        normal(1, 9, 8, dtype=torch.float32),
        normal(2, 40, 8, dtype=torch.float32),
        normal(3, 9, 12, dtype=torch.float32),
        normal(4, 43, 12, dtype=torch.float32),
    )
    target = labels(5, 9, 38).to(DEVICE)
    hidden.requires_grad_(), head.requires_grad_()
    results = []
    for kernels in (False, True):
        monkeypatch.setattr(sys.modules["gracekit.losses.linear_gated_dkd"], "use_triton", lambda *_, on=kernels: on)
        loss = linear_gated_dkd(hidden, head, teacher_hidden, teacher_head, target, vocab_size=38)
        results.append((*loss, *torch.autograd.grad(loss.total, (hidden, head))))
    torch.testing.assert_close(*results)


def test_the_gradient_may_take_the_memory_of_either_side():
    for place in (0, 1):
        rows = rows_of(1, 3, 70, 70, 70, torch.float32)
        parameters = DKDParameters(2.0, 1.0, 4.0, True, 70)
        _, statistics = _triton_gated_dkd.forward(rows, parameters, with_cross_entropy=False)
        ones = torch.ones(3, device=DEVICE)
        results = []
        for out in (torch.empty_like(rows.student_NV), rows[place]):
            _triton_gated_dkd.backward(rows, statistics, ones, ones, parameters, out_NV=out, with_cross_entropy=False)
            results.append(out)
        torch.testing.assert_close(*results, rtol=0, atol=0)


def test_what_the_kernels_cannot_do_is_refused_by_name(monkeypatch):
    logits, target = torch.zeros(2, 5), torch.tensor([0, 1])
    with pytest.raises(
        ValueError, match=r"backend='triton' is not available: the kernels compute in float32, got float64"
    ):
        gated_dkd(logits.double(), logits.double(), target, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend='triton' is not available: the kernels need CUDA tensors, got cpu"):
        gated_dkd(logits, logits, target, backend="triton")
    monkeypatch.setattr(_inputs, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="backend='triton' is not available: triton is not installed"):
        gated_dkd(logits, logits, target, backend="triton")
    assert _token_values.use_triton("auto", logits) is False
