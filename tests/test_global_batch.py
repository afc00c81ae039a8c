"""k micro-batches on r ranks give the loss and the gradient of one big batch."""

import torch
import torch.distributed as dist
from ranks import run_ranks
from strategies import labels, normal

from gracekit import GraceObjective, linear_gated_dkd

TOKENS, LENGTHS = 24, [4, 6, 2, 5]
# One rank sees two micro-batches, of unequal numbers of supervised tokens and images; the other one.
PARTS = {0: [(slice(0, 5), slice(0, 1)), (slice(5, 13), slice(1, 2))], 1: [(slice(13, 24), slice(2, 4))]}


def batch():
    student = normal(1, TOKENS, 19, dtype=torch.float32).requires_grad_()
    visual = normal(4, sum(LENGTHS), 5, dtype=torch.float32).requires_grad_()
    return (
        student,
        normal(2, TOKENS, 19, dtype=torch.float32),
        labels(3, TOKENS, 19),
        visual,
        normal(5, sum(LENGTHS), 6, dtype=torch.float32),
    )


def images(tokens, part):
    return torch.cat(tokens.split(LENGTHS)[part])


def objective_on_a_rank(rank: int, world: int) -> None:
    objective = GraceObjective(relational_weight=2.0)
    student, teacher, target, visual, teacher_visual = batch()
    whole = objective(student, teacher, target, student_tokens=visual, teacher_tokens=teacher_visual, lengths=LENGTHS)
    expected = torch.autograd.grad(whole.total, (student, visual))

    # A rank with fewer micro-batches takes part with an empty one, as in every collective.
    parts = PARTS[rank] + [(slice(0, 0), slice(0, 0))] * (2 - len(PARTS[rank]))
    counts = [objective.global_counts(teacher[rows], target[rows], LENGTHS[part]) for rows, part in parts]
    total_counts = {name: sum(count[name] for count in counts) for name in counts[0]}
    torch.testing.assert_close(total_counts["gate_sum"], whole.gate_sum)
    assert total_counts["token_count"] == (target != -100).sum()
    assert total_counts["image_count"] == 3

    losses = [
        objective(
            student[rows],
            teacher[rows],
            target[rows],
            student_tokens=images(visual, part),
            teacher_tokens=images(teacher_visual, part),
            lengths=LENGTHS[part],
            **total_counts,
        )
        for rows, part in PARTS[rank]
    ]
    mine = sum(loss.total for loss in losses)
    gradients = torch.autograd.grad(mine, (student, visual))
    for got, want in zip((mine.detach(), *gradients), (whole.total.detach(), *expected), strict=True):
        dist.all_reduce(got)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)

    objective.controller.step(sum(loss.gated_dkd for loss in losses), reduce="sum")
    torch.testing.assert_close(objective.controller.ema, whole.gated_dkd, rtol=1e-6, atol=1e-6)


def hidden_states_on_a_rank(rank: int, world: int) -> None:
    hidden, head = (
        normal(seed, size, 8, dtype=torch.float32).requires_grad_() for seed, size in ((1, TOKENS), (2, 19))
    )
    teacher_hidden, teacher_head = (normal(seed, size, 6, dtype=torch.float32) for seed, size in ((3, TOKENS), (4, 19)))
    target = labels(5, TOKENS, 19)
    whole = linear_gated_dkd(hidden, head, teacher_hidden, teacher_head, target)
    expected = torch.autograd.grad(whole.total, (hidden, head))
    mine = sum(
        linear_gated_dkd(
            hidden[rows],
            head,
            teacher_hidden[rows],
            teacher_head,
            target[rows],
            gate_sum=whole.gate_sum,
            token_count=whole.token_count,
        ).total
        for rows, _ in PARTS[rank]
    )
    gradients = torch.autograd.grad(mine, (hidden, head))
    for got, want in zip((mine.detach(), *gradients), (whole.total.detach(), *expected), strict=True):
        dist.all_reduce(got)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_objective_is_that_of_one_big_batch():
    run_ranks(objective_on_a_rank)


def test_losses_from_hidden_states_are_those_of_one_big_batch():
    run_ranks(hidden_states_on_a_rank)
