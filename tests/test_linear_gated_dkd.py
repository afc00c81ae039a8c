"""linear_gated_dkd against cross-entropy and gated_dkd of full logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import labels, normal, seeds

from gracekit import LinearGatedDKD, entropy_gate, gated_dkd, linear_gated_dkd
from gracekit.losses import _linear_distillation


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


def in_slabs(patch, rows=3):
    """Make slabs of three rows, so that small problems have several."""
    patch.setitem(_linear_distillation._SLAB_ELEMENTS, "cpu", 1)
    patch.setattr(_linear_distillation, "_BLOCK_ELEMENTS_ACCELERATOR", 1)
    patch.setattr(_linear_distillation, "_LEAST_ROWS", rows)


@settings(max_examples=20)
@given(seeds, st.integers(2, 14), st.booleans(), st.booleans())
def test_several_slabs_of_tokens_give_what_one_gives(seed, tokens, with_gates, frozen):
    inputs = problem(seed, tokens, teacher_classes=37)
    wanted = inputs[:1] if frozen else inputs[:2]
    whole = linear_gated_dkd(*inputs)
    expected = torch.autograd.grad(whole.total, wanted)
    counts = {"gate_sum": whole.gate_sum, "token_count": whole.token_count} if with_gates else {}
    with pytest.MonkeyPatch.context() as patch:
        in_slabs(patch)
        assert len(list(_linear_distillation._slabs(inputs[0], inputs[1], inputs[3]))) == -(-tokens // 3)
        hidden, weight, *rest = inputs
        parts = linear_gated_dkd(hidden, weight.detach() if frozen else weight, *rest, **counts)
        gradients = torch.autograd.grad(parts.total, wanted)
    for got, want in zip((*parts, *gradients), (*whole, *expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_the_head_gradient_of_bf16_slabs_is_summed_in_float32(monkeypatch):
    """512 slabs that each add little to a large sum: in bfloat16 the last ones would leave no trace."""
    inputs = problem(tokens=1536, classes=64, student=4, dtype=torch.bfloat16)
    in_slabs(monkeypatch)
    slabs = linear_gated_dkd(*inputs)
    (gradient,) = torch.autograd.grad(slabs.total, inputs[1])
    assert gradient.dtype == torch.bfloat16
    assert slabs.total.dtype == torch.float32
    double = [tensor.detach().double() for tensor in inputs[:4]]
    double[1].requires_grad_()
    (expected,) = torch.autograd.grad(linear_gated_dkd(*double, inputs[4]).total, double[1])
    # Logits, their gradients and the result are rounded to bfloat16, once each and independently.
    assert (gradient.double() - expected).norm() / expected.norm() < 2**-7


@pytest.mark.parametrize("loss_scale", [1024.0, 65536.0])
@pytest.mark.parametrize("global_batch", [False, True])
def test_float16_gradients_survive_many_tokens_and_a_loss_scale(loss_scale, global_batch):
    """1 / tokens, spread over many classes, is below float16's numbers; and a GradScaler's 65536 is above them."""
    tokens, classes = 1024, 2000
    head = normal(1, classes, 16, dtype=torch.float16, scale=0.2)
    hidden = normal(0, tokens, 16, dtype=torch.float16)
    teacher = (hidden.double() + normal(2, tokens, 16, scale=0.05)).half()
    target = labels(4, tokens, classes)
    counts = {"gate_sum": 3000.0, "token_count": torch.tensor(4000)} if global_batch else {}
    gradients = []
    for dtype in (torch.float16, torch.float64):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, head)]
        loss = linear_gated_dkd(*leaves, teacher.to(dtype), head.to(dtype), target, ce_weight=0.0, **counts)
        (loss_scale * loss.total).backward()
        gradients.append([leaf.grad.double() for leaf in leaves])
    for got, want in zip(*gradients, strict=True):
        # Logits and the gradient are rounded to float16; a step that loses what is below its numbers is off by 0.2 and more.
        assert (got - want).norm() <= 0.02 * want.norm()


def test_a_nan_in_an_ignored_row_reaches_no_gradient():
    inputs = problem(dtype=torch.float32)
    target = inputs[-1].index_fill(0, torch.tensor([5]), -100)
    expected = linear_gated_dkd(*inputs[:4], target)
    wanted = torch.autograd.grad(expected.total, inputs[:2])
    with torch.no_grad():
        inputs[0][5], inputs[2][5] = torch.nan, torch.nan
    loss = linear_gated_dkd(*inputs[:4], target)
    for got, want in zip((*loss, *torch.autograd.grad(loss.total, inputs[:2])), (*expected, *wanted), strict=True):
        torch.testing.assert_close(got, want)


def test_a_distillation_without_weight_does_not_spoil_the_cross_entropy():
    hidden, weight, teacher_hidden, teacher_weight, target = problem()
    with torch.no_grad():
        weight[3] = -torch.inf  # a class the student masks and the teacher weighs
        hidden.abs_()
    target[target == 3] = 4
    loss = linear_gated_dkd(
        hidden, weight, teacher_hidden, teacher_weight, target, dkd_weight=torch.zeros((), dtype=torch.float64)
    )
    assert loss.gated_dkd == torch.inf
    torch.testing.assert_close(loss.total, F.cross_entropy(F.linear(hidden, weight), target))


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
