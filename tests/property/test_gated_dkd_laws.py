"""Laws of the gated distillation loss, whatever the input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, labels, normal, scales, seeds

from gracekit import entropy_gate, gated_dkd

sizes = st.tuples(st.integers(1, 12), st.integers(2, 40))
temperatures = st.sampled_from([0.5, 1.0, 2.0, 5.0])


def problem(seed, size, scale, **options):
    count, classes = size
    student, teacher = normal(seed, *size, scale=scale), normal(seed + 1, *size, scale=scale)
    return student, teacher, labels(seed + 2, count, classes, **options)


@given(seeds, sizes, scales, temperatures)
def test_every_token_loss_is_at_least_zero(seed, size, scale, temperature):
    student, teacher, target = problem(seed, size, scale)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        loss = gated_dkd(student.to(dtype), teacher.to(dtype), target, temperature=temperature, reduction="none")
        assert (loss >= 0).all()


@given(seeds, sizes, scales, st.floats(-50, 50))
def test_loss_is_zero_where_logits_differ_by_a_constant_per_token(seed, size, scale, constant):
    student, _, target = problem(seed, size, scale)
    shift = constant * normal(seed + 3, size[0], 1)
    loss = gated_dkd(student, student + shift, target)
    assert loss.item() == pytest.approx(0.0, abs=1e-9)


@given(seeds, sizes, scales, temperatures)
def test_parts_add_up_to_the_kl_divergence(seed, size, scale, temperature):
    student, teacher, target = problem(seed, size, scale, ignored=0.0)
    options = {"temperature": temperature, "reduction": "none"}
    tckd = gated_dkd(student, teacher, target, alpha=1.0, beta=0.0, **options) / temperature**2
    nckd = gated_dkd(student, teacher, target, alpha=0.0, beta=1.0, **options) / temperature**2
    log_teacher = F.log_softmax(teacher / temperature, 1)
    kl = F.kl_div(F.log_softmax(student / temperature, 1), log_teacher, reduction="none", log_target=True).sum(1)
    outside = -torch.expm1(log_teacher.gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(tckd + outside * nckd, kl, rtol=1e-8, atol=1e-9)


@given(seeds, st.tuples(st.integers(2, 12), st.integers(2, 40)), scales)
def test_gated_mean_is_the_mean_plus_a_covariance(seed, size, scale):
    student, teacher, target = problem(seed, size, scale, ignored=0.0)
    loss = gated_dkd(student, teacher, target, reduction="none")
    gate = entropy_gate(teacher, target)
    weight = gate / gate.sum()
    covariance = ((weight - weight.mean()) * (loss - loss.mean())).mean()
    expected = loss.mean() + len(loss) * covariance
    torch.testing.assert_close(gated_dkd(student, teacher, target), expected, rtol=1e-9, atol=1e-12)


@given(seeds, sizes, scales)
def test_a_constant_added_to_a_tokens_logits_changes_nothing(seed, size, scale):
    student, teacher, target = problem(seed, size, scale)
    moved = student + normal(seed + 3, size[0], 1), teacher + normal(seed + 4, size[0], 1)
    torch.testing.assert_close(gated_dkd(*moved, target), gated_dkd(student, teacher, target), rtol=1e-8, atol=1e-9)


@given(seeds, sizes, scales)
def test_permuting_tokens_changes_nothing(seed, size, scale):
    student, teacher, target = problem(seed, size, scale)
    order = torch.randperm(size[0], generator=generator(seed))
    shuffled = gated_dkd(student[order], teacher[order], target[order])
    torch.testing.assert_close(shuffled, gated_dkd(student, teacher, target), rtol=1e-10, atol=1e-12)


@given(seeds, sizes, scales)
def test_permuting_classes_and_labels_changes_nothing(seed, size, scale):
    student, teacher, target = problem(seed, size, scale)
    order = torch.randperm(size[1], generator=generator(seed))
    place = torch.argsort(order)
    moved = torch.where(target == -100, -100, place[target.clamp_min(0)])
    shuffled = gated_dkd(student[:, order], teacher[:, order], moved)
    torch.testing.assert_close(shuffled, gated_dkd(student, teacher, target), rtol=1e-9, atol=1e-11)


@given(seeds, st.integers(2, 5000))
def test_a_uniform_teacher_has_the_least_gate_and_a_one_hot_teacher_gate_one(seed, classes):
    target = labels(seed, 3, classes, ignored=0.0)
    uniform = entropy_gate(torch.full((3, classes), 7.0), target)
    torch.testing.assert_close(uniform, torch.full((3,), math.exp(-1)), rtol=1e-5, atol=0)
    for low in (-1e4, -math.inf):
        one_hot = torch.full((3, classes), low).scatter(1, target[:, None], 0.0)
        assert (entropy_gate(one_hot, target) == 1.0).all()


@given(seeds, sizes, scales)
def test_the_gate_lies_between_one_over_e_and_one(seed, size, scale):
    _, teacher, target = problem(seed, size, scale, ignored=0.0)
    for dtype in (torch.float64, torch.float32, torch.float16):
        gate = entropy_gate(teacher.to(dtype), target)
        assert ((gate >= math.exp(-1) * (1 - 1e-6)) & (gate <= 1.0)).all()


@given(seeds, st.tuples(st.integers(2, 12), st.integers(2, 40)), scales, st.integers(1, 5))
def test_parts_with_the_global_gate_sum_add_up_to_the_whole(seed, size, scale, parts):
    student, teacher, target = problem(seed, size, scale)
    student.requires_grad_()
    whole = gated_dkd(student, teacher, target)
    (expected,) = torch.autograd.grad(whole, student)
    gate_sum = entropy_gate(teacher, target).sum()
    pieces = [
        gated_dkd(*part, gate_sum=gate_sum)
        for part in zip(*(tensor.chunk(parts) for tensor in (student, teacher, target)), strict=True)
    ]
    total = torch.stack(pieces).sum()
    (gradient,) = torch.autograd.grad(total, student)
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@given(seeds, sizes, st.sampled_from([1e-30, 1e-12]), st.booleans(), st.booleans())
def test_value_and_gradient_stay_finite_at_extreme_target_probabilities(
    seed, size, distance, student_sure, teacher_sure
):
    count, classes = size
    target = labels(seed, count, classes, ignored=0.0)
    odds = -math.log(distance)
    base = [normal(seed + side, count, classes, dtype=torch.float32) for side in (1, 2)]
    sides = [
        logits.scatter_add(1, target[:, None], torch.full((count, 1), odds if sure else -odds))
        for logits, sure in zip(base, (student_sure, teacher_sure), strict=True)
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        student = sides[0].to(dtype, copy=True).requires_grad_()
        loss = gated_dkd(student, sides[1].to(dtype), target, temperature=1.0)
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


@given(seeds, sizes, st.floats(0.1, 1.0))
def test_a_class_that_both_sides_mask_drops_out(seed, size, share):
    """Wherever it stands; two classes at least stay, and the labels are among those."""
    count, classes = size
    student, teacher, target = problem(seed, (count, classes + 3), 1.0, ignored=0.0)
    order = torch.randperm(classes + 3, generator=generator(seed + 5))
    kept = order[: max(2, round(share * classes))].sort().values
    target = target % len(kept)
    student.requires_grad_()
    hidden = torch.ones(classes + 3, dtype=torch.bool)
    hidden[kept] = False
    masked = [side.masked_fill(hidden, -math.inf) for side in (student, teacher)]
    with_mask = gated_dkd(*masked, kept[target], gate=None)
    without = gated_dkd(student[:, kept], teacher[:, kept], target, gate=None)
    torch.testing.assert_close(with_mask, without, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (with_mask, without)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@given(seeds, sizes, scales)
def test_nan_in_an_ignored_row_reaches_neither_value_nor_gradient(seed, size, scale):
    student, teacher, target = problem(seed, size, scale)
    poisoned = student.masked_fill((target == -100)[:, None], math.nan).requires_grad_()
    loss = gated_dkd(poisoned, teacher.masked_fill((target == -100)[:, None], math.nan), target)
    loss.backward()
    torch.testing.assert_close(loss.detach(), gated_dkd(student, teacher, target))
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[target == -100] == 0).all()


@given(seeds, sizes, temperatures)
def test_a_teacher_that_masks_all_but_the_target_teaches_the_target_alone(seed, size, temperature):
    """The one-hot teacher: no dark knowledge, so beta matters neither to the value nor to the gradient."""
    student, _, target = problem(seed, size, 1.0, ignored=0.0)
    student.requires_grad_()
    one_hot = torch.full_like(student, -math.inf).scatter(1, target[:, None], 0.0)
    losses = [gated_dkd(student, one_hot, target, temperature=temperature, beta=beta) for beta in (0.0, 4.0)]
    gradients = [torch.autograd.grad(loss, student)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    expected = temperature**2 * F.cross_entropy(student / temperature, target)
    torch.testing.assert_close(losses[0], expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradients[0], torch.autograd.grad(expected, student)[0], rtol=1e-9, atol=1e-11)


@given(seeds, sizes, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_value_and_gradient_are_finite_for_logits_of_magnitude_1e4(seed, size, dtype):
    student, teacher, target = problem(seed, size, 1.0)
    student, teacher = (side / side.abs().max() * 1e4 for side in (student, teacher))
    student = student.to(dtype).requires_grad_()
    loss = gated_dkd(student, teacher.to(dtype), target)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
