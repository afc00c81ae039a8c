"""What only a CUDA device can show of the losses and the controller: no step waits for the device. Skipped elsewhere."""

import contextlib
import warnings

import pytest
import torch
from strategies import labels, normal

from gracekit import (
    ConfidenceGatedDKD,
    GraceObjective,
    LagrangianController,
    LinearGatedDKD,
    RelationalCKA,
    entropy_gate,
    gated_dkd,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = [torch.bfloat16, torch.float32]


@contextlib.contextmanager
def no_sync():
    """Make every operation that waits for the device an error."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_cuda(seed, *shape, dtype):
    return normal(seed, *shape, dtype=dtype).cuda()


def twice(step):
    """Once to compile kernels and fill caches, which may wait; then without waiting."""
    step()
    torch.cuda.synchronize()
    with no_sync():
        step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gated_dkd_does_not_wait(dtype, backend):
    student, teacher = on_cuda(1, 20, 300, dtype=dtype).requires_grad_(), on_cuda(2, 20, 300, dtype=dtype)
    target = labels(3, 20, 300).cuda()

    def step():
        gate_sum = entropy_gate(teacher, target).sum()
        for options in ({}, {"gate_sum": gate_sum}, {"reduction": "none"}):
            loss = gated_dkd(student, teacher, target, backend=backend, **options)
            torch.autograd.grad(loss.sum(), student)

    twice(step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_from_hidden_states_do_not_wait(dtype):
    hidden, head = on_cuda(1, 20, 16, dtype=dtype).requires_grad_(), on_cuda(2, 300, 16, dtype=dtype).requires_grad_()
    teacher_hidden, teacher_head = on_cuda(3, 20, 24, dtype=dtype), on_cuda(4, 300, 24, dtype=dtype)
    target = labels(5, 20, 300).cuda()
    criterion, controller = LinearGatedDKD(), LagrangianController().cuda()

    def step():
        loss = criterion(hidden, head, teacher_hidden, teacher_head, target, dkd_weight=controller.multiplier)
        torch.autograd.grad(loss.total, (hidden, head))
        controller.step(loss.gated_dkd, loss.gate_sum)

    twice(step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[40, 40], [50, 3, 27], None])
def test_relational_alignment_does_not_wait(dtype, lengths):
    student, teacher = on_cuda(1, 80, 32, dtype=dtype).requires_grad_(), on_cuda(2, 80, 48, dtype=dtype)
    mask = (torch.arange(40) < torch.tensor([[40], [31]])).cuda()
    criterion = RelationalCKA()

    def step():
        torch.autograd.grad(criterion(student, teacher, lengths), student)
        padded = criterion(student.view(2, 40, 32), teacher.view(2, 40, 48), mask=mask)
        torch.autograd.grad(padded, student)

    twice(step)


def test_the_whole_objective_does_not_wait():
    student, teacher = (on_cuda(seed, 20, 300, dtype=torch.bfloat16).requires_grad_() for seed in (1, 2))
    target = labels(3, 20, 300).cuda()
    visual = {
        "student_tokens": on_cuda(4, 80, 32, dtype=torch.bfloat16).requires_grad_(),
        "teacher_tokens": on_cuda(5, 80, 48, dtype=torch.bfloat16),
        "lengths": [50, 30],
    }
    objective = GraceObjective(ConfidenceGatedDKD()).cuda()

    def step():
        counts = objective.global_counts(teacher, target, visual["lengths"])
        loss = objective(student, teacher, target, **visual, **counts)
        torch.autograd.grad(loss.total, (student, visual["student_tokens"]))
        objective.controller.step(loss.gated_dkd, loss.gate_sum)

    twice(step)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_of_hidden_states_are_those_of_the_cpu(dtype):
    """On CUDA the head's gradient of several slabs is summed by the product itself, into float32."""
    tensors = [normal(1, 700, 16), normal(2, 300, 16), normal(3, 700, 24), normal(4, 300, 24)]
    target = labels(5, 700, 300)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        hidden, head, teacher_hidden, teacher_head = (tensor.to(dtype).to(device, kind) for tensor in tensors)
        hidden.requires_grad_(), head.requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("_ONLY_SLAB_ELEMENTS_ACCELERATOR", "_SLAB_ELEMENTS_ACCELERATOR"):
                patch.setattr(f"gracekit.losses._linear_distillation.{name}", 1)
            loss = LinearGatedDKD()(hidden, head, teacher_hidden, teacher_head, target.to(device))
        gradients = torch.autograd.grad(loss.total, (hidden, head))
        results.append([tensor.detach().double().cpu() for tensor in (*loss[:3], *gradients)])
    # bfloat16 rounds the logits of 24 products and their gradient.
    bound = 2**-6 if dtype == torch.bfloat16 else 1e-4
    for want, got in zip(*results, strict=True):
        assert (got - want).norm() <= bound * want.norm()
