"""The objective is the sum of its parts, and only its owner steps the controller."""

import pytest
import torch
import torch.nn.functional as F
from strategies import labels, normal

from gracekit import (
    ConfidenceGatedDKD,
    GraceObjective,
    LagrangianController,
    LinearGatedDKD,
    RelationalCKA,
    entropy_gate,
    gated_dkd,
    linear_gated_dkd,
)


def logits(classes=9, dtype=torch.float64):
    return normal(1, 7, classes, dtype=dtype).requires_grad_(), normal(2, 7, classes, dtype=dtype), labels(3, 7, 9)


def visual():
    return {
        "student_tokens": normal(4, 11, 5).requires_grad_(),
        "teacher_tokens": normal(5, 11, 6),
        "lengths": [5, 6],
    }


def test_total_is_the_weighted_sum_of_independently_computed_parts():
    objective = GraceObjective(controller=LagrangianController(initial=2.5), relational_weight=3.0)
    student, teacher, target = logits()
    tokens = visual()
    loss = objective(student, teacher, target, **tokens)
    cross_entropy = F.cross_entropy(student, target)
    distillation = gated_dkd(student, teacher, target)
    relational = RelationalCKA()(*tokens.values())
    total = cross_entropy + 2.5 * distillation + 3.0 * relational
    for got, want in zip(
        loss,
        (total, cross_entropy, distillation, relational, torch.tensor(2.5), entropy_gate(teacher, target).sum()),
        strict=True,
    ):
        torch.testing.assert_close(got, want.detach() if got is not loss.total else want, check_dtype=False)
    wanted = (student, tokens["student_tokens"])
    for got, want in zip(torch.autograd.grad(loss.total, wanted), torch.autograd.grad(total, wanted), strict=True):
        torch.testing.assert_close(got, want)
    assert not any(part.requires_grad for part in loss[1:])


def test_without_tokens_there_is_no_relational_part():
    student, teacher, target = logits()
    loss = GraceObjective(relational_weight=100.0)(student, teacher, target)
    assert loss.relational.item() == 0.0
    torch.testing.assert_close(loss.total, loss.cross_entropy + loss.gated_dkd)


def test_nothing_but_its_owner_steps_the_controller():
    objective = GraceObjective(controller=LagrangianController(lr=1.0))
    loss = objective(*logits())
    assert objective.controller.multiplier.item() == 1.0
    objective.controller.step(loss.gated_dkd, loss.gate_sum)
    assert objective.controller.multiplier.item() != 1.0
    assert loss.multiplier.item() == 1.0


def test_micro_batches_with_global_counts_add_up_to_the_whole():
    objective = GraceObjective()
    student, teacher, target = logits()
    tokens = visual()
    whole = objective(student, teacher, target, **tokens)
    wanted = (student, tokens["student_tokens"])
    expected = torch.autograd.grad(whole.total, wanted)
    counts = {"gate_sum": whole.gate_sum, "token_count": (target != -100).sum(), "image_count": 2}
    total = 0.0
    for rows, image in ((slice(0, 3), slice(0, 5)), (slice(3, 7), slice(5, 11))):
        part = objective(
            student[rows],
            teacher[rows],
            target[rows],
            student_tokens=tokens["student_tokens"][image],
            teacher_tokens=tokens["teacher_tokens"][image],
            **counts,
        )
        total = total + part.total
    torch.testing.assert_close(total, whole.total)
    for got, want in zip(torch.autograd.grad(total, wanted), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_combine_takes_losses_computed_from_hidden_states():
    objective = GraceObjective(controller=LagrangianController(initial=2.0), relational_weight=0.5)
    hidden, weight = normal(1, 7, 4).requires_grad_(), normal(2, 9, 4)
    teacher_hidden, teacher_weight, target = normal(3, 7, 6), normal(4, 9, 6), labels(3, 7, 9)
    parts = LinearGatedDKD()(
        hidden, weight, teacher_hidden, teacher_weight, target, dkd_weight=objective.controller.multiplier
    )
    relational = RelationalCKA()(*visual().values())
    loss = objective.combine(parts, relational)
    direct = objective(hidden @ weight.T, teacher_hidden @ teacher_weight.T, target, **visual())
    for got, want in zip(loss, direct, strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(one.total, hidden)[0] for one in (loss, direct)))


def test_padded_vocabularies_keep_the_models_own_cross_entropy():
    student, teacher, target = normal(1, 7, 12), normal(2, 7, 16), labels(3, 7, 9)
    loss = GraceObjective(ConfidenceGatedDKD(vocab_size=10))(student, teacher, target)
    torch.testing.assert_close(loss.cross_entropy, F.cross_entropy(student, target))
    torch.testing.assert_close(loss.gated_dkd, gated_dkd(student, teacher, target, vocab_size=10))


def test_bf16_logits_give_float32_losses_and_bf16_gradients():
    student, teacher, target = logits(dtype=torch.bfloat16)
    loss = GraceObjective()(student, teacher, target)
    loss.total.backward()
    assert loss.total.dtype == loss.cross_entropy.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.cross_entropy, F.cross_entropy(student.detach().float(), target))


def test_compiles_into_one_graph_and_sees_a_stepped_controller():
    objective = GraceObjective(controller=LagrangianController(lr=1.0))
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    student, teacher, target = logits()
    for _ in range(2):
        for got, want in zip(
            compiled(student, teacher, target, **visual()), objective(student, teacher, target, **visual()), strict=True
        ):
            torch.testing.assert_close(got, want)
        objective.controller.step(9.0)


def test_the_controller_is_in_the_state():
    state = GraceObjective().state_dict()
    assert set(state) == {f"controller.{name}" for name in ("multiplier", "ema", "skipped", "saturated_steps")}


def test_bad_parts_are_refused():
    with pytest.raises(TypeError, match="distillation must be a ConfidenceGatedDKD or None, got RelationalCKA"):
        GraceObjective(RelationalCKA())
    with pytest.raises(TypeError, match="controller must be a LagrangianController or None, got float"):
        GraceObjective(controller=1.0)
    with pytest.raises(ValueError, match="distillation must have reduction='mean', got 'sum'"):
        GraceObjective(ConfidenceGatedDKD(reduction="sum"))
    with pytest.raises(ValueError, match="relational_weight must be"):
        GraceObjective(relational_weight=-1.0)
    with pytest.raises(ValueError, match="must be given together, got teacher_tokens=None"):
        GraceObjective()(*logits(), student_tokens=normal(1, 5, 5))
    with pytest.raises(ValueError, match="lengths and mask describe student_tokens and teacher_tokens"):
        GraceObjective()(*logits(), lengths=[3])


def test_a_padded_batch_of_images_is_counted_by_its_mask():
    objective = GraceObjective()
    student, teacher, target = logits()
    mask = torch.tensor([[True] * 5, [True] * 4 + [False], [True] * 3 + [False] * 2])
    tokens = {"student_tokens": normal(4, 3, 5, 6), "teacher_tokens": normal(5, 3, 5, 7), "mask": mask}
    counts = objective.global_counts(teacher, target, mask=mask)
    assert counts["image_count"] == 2
    whole, part = objective(student, teacher, target, **tokens), objective(student, teacher, target, **tokens, **counts)
    torch.testing.assert_close(part.total, whole.total, rtol=1e-6, atol=0)


def test_counts_say_nothing_of_images_that_were_not_described():
    objective = GraceObjective()
    _, teacher, target = logits()
    assert set(objective.global_counts(teacher, target)) == {"gate_sum", "token_count"}
    assert objective.global_counts(teacher, target, [])["image_count"] == 0
    for lengths in ([5, 3, 6], torch.tensor([5, 3, 6])):
        assert objective.global_counts(teacher, target, lengths, reduce=False)["image_count"] == 2
    with pytest.raises(ValueError, match="describe images in two ways"):
        objective.global_counts(teacher, target, [5], mask=torch.ones(1, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"labels": [1, 2]}, TypeError, "labels must be a torch.Tensor, got list"),
        ({"labels": torch.ones(7)}, TypeError, "labels must have an integer dtype, got torch.float32"),
        ({"labels": torch.ones(6, dtype=torch.long)}, ValueError, r"got \(7, 9\) and labels \(6,\)"),
        ({"labels": torch.full((7,), 9)}, ValueError, r"labels must be in \[0, 9\) or ignore_index, got 9"),
        ({"teacher_logits": [1.0]}, TypeError, "teacher_logits must be a torch.Tensor, got list"),
        ({"lengths": 5}, TypeError, "lengths must be a sequence of integers or a tensor, got int"),
        ({"lengths": [4, 5.0]}, TypeError, r"lengths\[1\] must be an integer, got lengths\[1\]=5.0"),
        ({"lengths": [-4]}, ValueError, r"lengths\[0\] must be at least 0, got lengths\[0\]=-4"),
        ({"lengths": torch.tensor([[4, 5]])}, ValueError, r"lengths must have shape \(B,\), got \(1, 2\)"),
        ({"mask": torch.ones(2, 5)}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ({"mask": [[True]]}, TypeError, "mask must be a bool tensor, got list"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must have shape \(B, n\), got \(5,\)"),
    ],
)
@pytest.mark.parametrize("gate", ["entropy", None])
def test_counts_refuse_what_the_losses_refuse(gate, changed, error, said):
    _, teacher, target = logits()
    objective = GraceObjective(ConfidenceGatedDKD(gate=gate))
    with pytest.raises(error, match=said):
        objective.global_counts(**({"teacher_logits": teacher, "labels": target} | changed))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_teacher_that_gives_no_number_makes_a_loss_that_is_none_and_a_step_that_is_skipped(wrong):
    """An error of a check would name an argument that nobody gave, and on CUDA end the process."""
    objective = GraceObjective()
    student, teacher, target = logits()
    row = int((target >= 0).nonzero()[0])
    teacher[row, (target[row] + 1) % 9] = wrong
    head = torch.eye(9, dtype=torch.float64)
    counts = objective.global_counts(teacher, target)
    assert counts["gate_sum"].isnan()
    for loss in (
        objective(student, teacher, target),
        objective(student, teacher, target, **counts),
        objective.combine(linear_gated_dkd(student, head, teacher, head, target)),
    ):
        assert loss.total.isnan()
        assert loss.cross_entropy.isfinite()
        objective.controller.step(loss.gated_dkd, loss.gate_sum)
    assert gated_dkd(student, teacher, target).isnan()
    assert objective.controller.skipped == 3


def test_counts_take_lengths_in_the_forms_that_the_loss_takes():
    _, teacher, target = logits()
    for lengths in ((5, 3, 6), torch.tensor([5, 3, 6]), torch.tensor([5, 3, 6]).numpy(), iter([5, 3, 6])):
        assert GraceObjective().global_counts(teacher, target, lengths)["image_count"] == 2


def test_a_multiplier_of_zero_lets_an_infinite_distillation_go():
    student, teacher, target = logits()
    student = student.detach().index_fill(1, torch.tensor([8]), -torch.inf).requires_grad_()
    target = target.clamp_max(7)
    controller = LagrangianController(initial=0.0, bounds=(0.0, 5.0))
    loss = GraceObjective(controller=controller)(student, teacher, target)
    assert loss.gated_dkd == torch.inf
    torch.testing.assert_close(loss.total, loss.cross_entropy)
    loss.total.backward()
    assert student.grad.isfinite().all()
