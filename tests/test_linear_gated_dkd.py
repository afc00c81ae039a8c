"""linear_gated_dkd against cross-entropy and gated_dkd of full logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strategies import labels, normal, seeds

from gracekit import LinearGatedDKD, entropy_gate, gated_dkd, linear_gated_dkd


def problem(seed=0, tokens=11, classes=37, student=8, teacher=12, teacher_classes=None, dtype=torch.float64):
    return (
        normal(seed, tokens, student, dtype=dtype).requires_grad_(),
        normal(seed + 1, classes, student, dtype=dtype).requires_grad_(),
        normal(seed + 2, tokens, teacher, dtype=dtype),
        normal(seed + 3, teacher_classes or classes, teacher, dtype=dtype),
        labels(seed + 4, tokens, classes),
    )


def from_logits(student_hidden, student_weight, teacher_hidden, teacher_weight, target, ce_weight=1.0, dkd_weight=1.0):
    logits = F.linear(student_hidden, student_weight)
    cross_entropy = F.cross_entropy(logits, target)
    distillation = gated_dkd(logits, F.linear(teacher_hidden, teacher_weight), target)
    return ce_weight * cross_entropy + dkd_weight * distillation, cross_entropy, distillation


@given(seeds, st.integers(2, 20), st.integers(2, 60), st.integers(1, 9), st.floats(0, 3), st.floats(0, 3))
def test_equals_the_losses_of_full_logits_in_values_and_gradients(seed, tokens, classes, hidden, ce_weight, dkd_weight):
    inputs = problem(seed, tokens, classes, hidden, hidden + 1)
    inputs[-1][0] = 0
    loss = linear_gated_dkd(*inputs, ce_weight=ce_weight, dkd_weight=torch.tensor(dkd_weight, dtype=torch.float64))
    total, cross_entropy, distillation = from_logits(*inputs, ce_weight, dkd_weight)
    torch.testing.assert_close(loss.total, total, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(loss.cross_entropy, cross_entropy.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(loss.gated_dkd, distillation.detach(), rtol=1e-9, atol=1e-10)
    for got, want in zip(
        torch.autograd.grad(loss.total, inputs[:2]), torch.autograd.grad(total, inputs[:2]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_gradcheck_in_float64():
    inputs = problem(tokens=5, classes=7, student=3, teacher=2)
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_gated_dkd(hidden, weight, *inputs[2:]).total, inputs[:2]
    )


def test_only_total_has_a_gradient_and_the_counts_are_those_of_the_call():
    inputs = problem()
    loss = linear_gated_dkd(*inputs, gate_sum=50.0, token_count=100)
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in loss[1:])
    teacher_logits = F.linear(inputs[2], inputs[3])
    torch.testing.assert_close(loss.gate_sum, entropy_gate(teacher_logits, inputs[4]).sum())
    assert loss.token_count.item() == (inputs[4] != -100).sum()


@given(seeds, st.integers(1, 5))
def test_parts_with_global_counts_add_up_to_the_whole(seed, parts):
    inputs = problem(seed)
    whole = linear_gated_dkd(*inputs)
    expected = torch.autograd.grad(whole.total, inputs[:2])
    pieces = []
    for index in torch.arange(11).chunk(parts):
        hidden, weight, teacher_hidden, teacher_weight, target = inputs
        pieces.append(
            linear_gated_dkd(
                hidden[index],
                weight,
                teacher_hidden[index],
                teacher_weight,
                target[index],
                gate_sum=whole.gate_sum,
                token_count=whole.token_count,
            )
        )
    total = torch.stack([piece.total for piece in pieces]).sum()
    torch.testing.assert_close(total, whole.total)
    for got, want in zip(torch.autograd.grad(total, inputs[:2]), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_padded_vocabularies_distil_on_the_common_classes_and_keep_the_models_own_cross_entropy():
    inputs = problem(classes=37, teacher_classes=48)
    inputs[-1].clamp_(max=29)
    loss = linear_gated_dkd(*inputs, vocab_size=30)
    logits, teacher_logits = F.linear(*inputs[:2]), F.linear(*inputs[2:4])
    distillation = gated_dkd(logits, teacher_logits, inputs[4], vocab_size=30)
    total = F.cross_entropy(logits, inputs[4]) + distillation
    torch.testing.assert_close(loss.total, total)
    for got, want in zip(
        torch.autograd.grad(loss.total, inputs[:2]), torch.autograd.grad(total, inputs[:2]), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_nothing_of_the_logits_size_is_kept():
    inputs = problem(tokens=300, classes=500, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        loss = linear_gated_dkd(*inputs)
        loss.total.backward()
    assert kept
    assert max(kept) < 300 * 500 // 4


def test_a_frozen_head_gets_no_gradient_and_a_frozen_student_none_at_all():
    hidden, weight, *rest = problem()
    weight = weight.detach()
    linear_gated_dkd(hidden, weight, *rest).total.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert not linear_gated_dkd(hidden.detach(), weight, *rest).total.requires_grad


def test_bf16_head_gradient_sums_its_blocks_in_float32():
    inputs = problem(tokens=2048, classes=64, student=4, dtype=torch.bfloat16)
    blocks = linear_gated_dkd(*inputs)
    (gradient,) = torch.autograd.grad(blocks.total, inputs[1])
    assert gradient.dtype == torch.bfloat16
    assert blocks.total.dtype == torch.float32
    double = [tensor.detach().double() for tensor in inputs[:4]]
    double[1].requires_grad_()
    (expected,) = torch.autograd.grad(linear_gated_dkd(*double, inputs[4]).total, double[1])
    error = (gradient.double() - expected).norm() / expected.norm()
    assert error < 0.02


def test_under_autocast_products_run_as_a_linear_layer_would():
    inputs = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_gated_dkd(*inputs)
        logits, teacher_logits = F.linear(*inputs[:2]), F.linear(*inputs[2:4])
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float(), inputs[4]) + gated_dkd(logits, teacher_logits, inputs[4])
    torch.testing.assert_close(loss.total, expected)
    loss.total.backward()
    assert inputs[0].grad.dtype == inputs[1].grad.dtype == torch.float32


def test_compiles_into_one_graph():
    inputs = problem()
    compiled = torch.compile(lambda *tensors: linear_gated_dkd(*tensors).total, fullgraph=True, backend="aot_eager")
    total, expected = compiled(*inputs), linear_gated_dkd(*inputs).total
    torch.testing.assert_close(total, expected)
    for got, want in zip(
        torch.autograd.grad(total, inputs[:2]), torch.autograd.grad(expected, inputs[:2]), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_runs_on_meta_tensors_so_nothing_reads_a_value():
    inputs = [tensor.detach().to("meta") for tensor in problem()]
    inputs[0].requires_grad_()
    linear_gated_dkd(*inputs).total.backward()
    assert inputs[0].grad.shape == (11, 8)


def test_a_second_derivative_is_refused():
    inputs = problem()
    (gradient,) = torch.autograd.grad(linear_gated_dkd(*inputs).total, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_gated_dkd .* cannot be differentiated twice"):
        gradient.sum().backward()


def test_no_supervised_token_gives_zero_attached_to_the_graph():
    inputs = problem()
    inputs[-1].fill_(-100)
    loss = linear_gated_dkd(*inputs)
    loss.total.backward()
    assert loss.total.item() == loss.gate_sum.item() == 0.0
    assert (inputs[0].grad == 0).all()
    assert (inputs[1].grad == 0).all()


def test_the_module_equals_the_function():
    inputs = problem()
    module = LinearGatedDKD(3.0, 0.5, gate=None, vocab_size=37)
    options = {"temperature": 3.0, "alpha": 0.5, "gate": None}
    for got, want in zip(
        module(*inputs, ce_weight=2.0), linear_gated_dkd(*inputs, ce_weight=2.0, **options), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert eval(repr(module), {"LinearGatedDKD": LinearGatedDKD}).config == module.config


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.zeros(11, 9), ValueError, "student_weight must have as many columns as student_hidden"),
        (1, torch.zeros(37, 8, 1), ValueError, r"student_weight must have shape \(V, d\), got \(37, 8, 1\)"),
        (1, torch.zeros(38, 8), ValueError, r"vocab_size.*38 \(student_weight\) and 37 \(teacher_weight\)"),
        (
            1,
            torch.zeros(37, 8, dtype=torch.bfloat16),
            TypeError,
            "student_weight must have the dtype of student_hidden",
        ),
        (2, torch.zeros(10, 12), ValueError, "teacher_hidden must have shape"),
        (3, torch.zeros(37, 12).long(), TypeError, "teacher_weight must have a floating dtype"),
        (4, torch.full((11,), 37), ValueError, r"labels must be in \[0, 37\) or ignore_index, got 37"),
    ],
)
def test_bad_input_names_argument_rule_and_value(place, value, error, message):
    inputs = list(problem(dtype=torch.float32))
    inputs[place] = value
    with pytest.raises(error, match=message):
        linear_gated_dkd(*inputs)


@pytest.mark.parametrize("name", ["ce_weight", "dkd_weight", "token_count", "gate_sum"])
def test_negative_weights_and_counts_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        linear_gated_dkd(*problem(), **{name: -1.0})
    with pytest.raises(ValueError, match=f"{name} must be"):
        linear_gated_dkd(*problem(), **{name: torch.tensor(-1.0)})
