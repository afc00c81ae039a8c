"""gated_dkd against a float64 oracle, at its edges, under torch's transformations, and with bad input."""

import math
from fractions import Fraction

import numpy
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import labels, normal, seeds
from tolerances import GRADIENT, VALUE
from torch.utils.checkpoint import checkpoint

from gracekit import ConfidenceGatedDKD, entropy_gate, gated_dkd, shift_labels
from gracekit.losses import _rows, _token_values

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def oracle(student, teacher, target, **options):
    student = student.detach().double().requires_grad_()
    loss = reference.gated_dkd(student, teacher, target, **options)
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "alpha": 3.0, "beta": 0.5}, {"temperature": 3.7, "alpha": 0.0}]
)
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_value_and_gradient_equal_the_oracle(dtype, options, scale):
    student = normal(1, 13, 57, dtype=dtype, scale=scale).requires_grad_()
    teacher, target = normal(2, 13, 57, dtype=dtype, scale=scale), labels(3, 13, 57)
    loss = gated_dkd(student, teacher, target, **options)
    loss.backward()
    value, gradient = oracle(student, teacher, target, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(loss.detach().double(), value, **VALUE[dtype])
    torch.testing.assert_close(student.grad.double(), gradient, **GRADIENT[dtype])


@pytest.mark.parametrize("student_odds", [-69.0, 0.0, 69.0])
@pytest.mark.parametrize("teacher_odds", [-69.0, 0.0, 69.0])
def test_float32_equals_the_oracle_at_probabilities_within_1e_30_of_the_ends(student_odds, teacher_odds):
    target = torch.tensor([2, 0, 6])
    student, teacher = normal(1, 3, 7, dtype=torch.float32), normal(2, 3, 7, dtype=torch.float32)
    student = student.scatter_add(1, target[:, None], torch.full((3, 1), student_odds)).requires_grad_()
    teacher = teacher.scatter_add(1, target[:, None], torch.full((3, 1), teacher_odds))
    loss = gated_dkd(student, teacher, target, temperature=1.0)
    loss.backward()
    value, gradient = oracle(student, teacher, target, temperature=1.0)
    torch.testing.assert_close(loss.detach().double(), value, **VALUE[torch.float32])
    torch.testing.assert_close(student.grad.double(), gradient, **GRADIENT[torch.float32])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_float32_equals_the_oracle_at_logits_of_1e4(temperature):
    """Also the small differences among classes far below the target count."""
    target = torch.tensor([0, 1, 2, 3])
    student = normal(1, 4, 9, dtype=torch.float32).requires_grad_()
    teacher = normal(2, 4, 9, dtype=torch.float32)
    size = torch.tensor([1e4, -1e4, 1e4, 0.0])[:, None]
    high_student = student + torch.zeros(4, 9).scatter(1, target[:, None], size)
    high_student = high_student.detach().requires_grad_()
    high_teacher = teacher + torch.zeros(4, 9).scatter(1, target[:, None], -size.flip(0)) + 1e4
    loss = gated_dkd(high_student, high_teacher, target, temperature=temperature)
    loss.backward()
    value, gradient = oracle(high_student, high_teacher, target, temperature=temperature)
    torch.testing.assert_close(loss.detach().double(), value, **VALUE[torch.float32])
    torch.testing.assert_close(high_student.grad.double(), gradient, **GRADIENT[torch.float32])


@given(seeds, st.floats(-4, 3))
def test_float32_errs_at_every_temperature_by_no_more_than_is_stated(seed, size):
    temperature, rounding = min(10**size, 1e3), torch.finfo(torch.float32).eps
    student = normal(seed, 4, 9, scale=3.0, dtype=torch.float32).requires_grad_()
    teacher, target = normal(seed + 1, 4, 9, scale=3.0, dtype=torch.float32), torch.tensor([0, 3, 8, 3])
    loss = gated_dkd(student, teacher, target, temperature=temperature)
    loss.backward()
    value, gradient = oracle(student, teacher, target, temperature=temperature)
    assert abs(loss.item() - value.item()) <= 8 * rounding * (value.item() + temperature**2)
    assert float((student.grad - gradient).abs().max()) <= 8 * rounding * max(1.0, temperature)


def test_a_confidently_wrong_student_gets_its_full_gradient():
    """With p_S^y = 1e-30 and p_T^y near 1 the target's gradient is T alpha (p_S - p_T) = -2: no clamp eats it."""
    target = torch.tensor([0])
    student = torch.tensor([[-138.0, 0.0, 0.0]], requires_grad=True)
    gated_dkd(student, torch.tensor([[138.0, 0.0, 0.0]]), target).backward()
    assert student.grad[0, 0].item() == pytest.approx(-2.0, rel=1e-6)


def test_small_target_gradients_keep_their_relative_precision():
    """Both sides sure of the target to 1e-30: the gradient is their tiny difference, not a rounding error."""
    odds = torch.tensor([[69.0, 0.0]])
    student = odds.clone().requires_grad_()
    gated_dkd(student, odds + torch.tensor([[1.0, 0.0]]), torch.tensor([0]), temperature=1.0, gate=None).backward()
    expected = math.exp(-70) - math.exp(-69)
    assert student.grad[0, 0].item() == pytest.approx(expected, rel=1e-4)


def test_gradcheck_in_float64():
    teacher, target = normal(2, 5, 7), torch.tensor([0, 6, -100, 3, 3])
    student = normal(1, 5, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: gated_dkd(logits, teacher, target), student)
    assert torch.autograd.gradcheck(lambda logits: gated_dkd(logits, teacher, target, reduction="none"), student)
    assert torch.autograd.gradcheck(lambda logits: gated_dkd(logits, teacher, target, vocab_size=7), student)


def test_reductions_agree():
    student, teacher, target = normal(1, 6, 9), normal(2, 6, 9), labels(3, 6, 9)
    loss, gate = gated_dkd(student, teacher, target, reduction="none"), entropy_gate(teacher, target)
    assert loss.shape == gate.shape == target.shape
    assert (loss[target == -100] == 0).all()
    assert (gate[target == -100] == 0).all()
    total = gated_dkd(student, teacher, target, reduction="sum")
    torch.testing.assert_close(total, (gate * loss).sum())
    torch.testing.assert_close(gated_dkd(student, teacher, target), total / gate.sum())


def test_without_a_gate_it_is_plain_dkd():
    student, teacher, target = normal(1, 6, 9), normal(2, 6, 9), labels(3, 6, 9)
    losses, _ = reference.gated_dkd_tokens(student, teacher, target)
    torch.testing.assert_close(gated_dkd(student, teacher, target, gate=None), losses.mean())


def test_no_supervised_token_gives_zero_attached_to_the_graph():
    student = normal(1, 4, 9).requires_grad_()
    for target in (torch.full((4,), -100), torch.full((4,), 7)):
        loss = gated_dkd(student, normal(2, 4, 9), target, ignore_index=int(target[0]))
        loss.backward()
        assert loss.item() == 0.0
        assert (student.grad == 0).all()


def test_no_token_at_all_gives_zero():
    student = torch.zeros(0, 9, requires_grad=True)
    loss = gated_dkd(student, torch.zeros(0, 9), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.shape == (0, 9)


def test_a_class_the_teacher_weighs_and_the_student_masks_makes_the_loss_infinite():
    student, teacher, target = normal(1, 3, 5), normal(2, 3, 5), torch.tensor([0, 1, 2])
    student[1, 4] = -math.inf
    assert gated_dkd(student, teacher, target).item() == math.inf
    assert gated_dkd(student, teacher, target, beta=0.0).isfinite()


def test_a_class_the_teacher_masks_alone_adds_nothing():
    student, teacher, target = normal(1, 3, 5), normal(2, 3, 5), torch.tensor([0, 1, 2])
    teacher[:, 4] = -math.inf
    far = teacher.clone()
    far[:, 4] = -1e6
    torch.testing.assert_close(
        gated_dkd(student, teacher, target), gated_dkd(student, far, target), rtol=1e-12, atol=1e-12
    )


def test_every_class_but_the_target_masked_on_both_sides_gives_zero():
    logits = torch.full((2, 5), -math.inf).scatter(1, torch.tensor([[1], [3]]), 2.0).requires_grad_()
    loss = gated_dkd(logits, logits.detach(), torch.tensor([1, 3]))
    loss.backward()
    assert loss.item() == 0.0
    assert (logits.grad == 0).all()


def test_vocab_size_compares_padded_vocabularies():
    student, teacher, target = normal(1, 6, 20), normal(2, 6, 32), labels(3, 6, 17)
    student.requires_grad_()
    loss = gated_dkd(student, teacher, target, vocab_size=17)
    loss.backward()
    value, gradient = oracle(student[:, :17], teacher[:, :17], target)
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(student.grad[:, :17], gradient)
    assert (student.grad[:, 17:] == 0).all()
    torch.testing.assert_close(
        entropy_gate(teacher, target, vocab_size=17), entropy_gate(teacher[:, :17], target), rtol=0, atol=0
    )


def test_leading_dimensions_and_strides_do_not_matter():
    student, teacher, target = normal(1, 2, 3, 11), normal(2, 2, 3, 11), labels(3, 6, 11).reshape(2, 3)
    flat = gated_dkd(student.reshape(6, 11), teacher.reshape(6, 11), target.reshape(6))
    strided = student.transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    torch.testing.assert_close(gated_dkd(strided, teacher, target), flat, rtol=0, atol=0)
    assert gated_dkd(student, teacher, target, reduction="none").shape == (2, 3)


def test_no_gradient_reaches_the_teacher():
    student, teacher = (normal(seed, 3, 5).requires_grad_() for seed in (1, 2))
    gated_dkd(student, teacher, torch.tensor([0, 1, 2])).backward()
    assert teacher.grad is None


def test_a_teacher_may_have_run_in_inference_mode():
    with torch.inference_mode():
        teacher, target = normal(2, 3, 5), torch.tensor([0, 1, 2])
    gradients = []
    for teacher_logits, targets in ((teacher, target), (normal(2, 3, 5), torch.tensor([0, 1, 2]))):
        student = normal(1, 3, 5).requires_grad_()
        gradients += torch.autograd.grad(gated_dkd(student, teacher_logits, targets), student)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant):
    hidden, head = normal(1, 4, 6).requires_grad_(), normal(2, 5, 6)

    def loss(hidden):
        return gated_dkd(hidden @ head.T, normal(3, 4, 5), torch.tensor([0, 1, 2, -100]))

    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    checkpoint(loss, hidden, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, expected)


def test_options_are_numbers_of_any_kind():
    arguments = normal(1, 3, 5), normal(2, 3, 5), torch.tensor([0, 1, 2])
    given = gated_dkd(*arguments, temperature=Fraction(3, 2), alpha=numpy.float32(0.5), beta=numpy.int64(3))
    assert torch.equal(given, gated_dkd(*arguments, temperature=1.5, alpha=0.5, beta=3.0))


def test_nothing_of_the_logits_size_is_kept_but_the_logits():
    student, teacher = (
        normal(1, 64, 1000, dtype=torch.bfloat16).requires_grad_(),
        normal(2, 64, 1000, dtype=torch.bfloat16),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gated_dkd(student, teacher, labels(3, 64, 1000)).backward()
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() >= 64 * 1000}
    assert large <= {student.data_ptr(), teacher.data_ptr()}
    assert kept


def test_blocks_of_rows_change_nothing(monkeypatch):
    student, teacher, target = normal(1, 10, 30).requires_grad_(), normal(2, 10, 30), labels(3, 10, 30)
    whole = gated_dkd(student, teacher, target)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setitem(_token_values._BLOCK_ELEMENTS, "cpu", 90)
    assert len(list(_token_values.row_blocks(10, 30, torch.device("cpu")))) == 4
    blocked = gated_dkd(student, teacher, target)
    (gradient,) = torch.autograd.grad(blocked, student)
    torch.testing.assert_close(blocked, whole, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_logits_that_keep_their_dtype_until_their_peak_is_taken_off_give_the_same(monkeypatch, dtype, other):
    """What accelerators do; also with masked classes, and where all but the target are masked."""
    student, teacher = normal(1, 4, 57, dtype=dtype, scale=5.0), normal(2, 4, 57, dtype=other, scale=5.0)
    target = torch.tensor([3, 0, 56, 7])
    for side in (student, teacher):
        side[1, 4:20] = -math.inf
        side[2, :56] = -math.inf
        side[3] += 1e4 if side.dtype != torch.float16 else 1e3
    given = [student.clone().requires_grad_() for _ in range(2)]
    losses = []
    for slow, one in zip((("cpu",), ()), given, strict=True):
        monkeypatch.setattr(_rows, "_SLOW_HALVES", slow)
        losses.append(gated_dkd(one, teacher, target))
        losses[-1].backward()
    assert losses[0].isfinite()
    assert torch.equal(*losses)
    assert torch.equal(given[0].grad, given[1].grad)


def test_numbers_that_change_from_call_to_call_do_not_break_the_graph():
    compiled = torch.compile(gated_dkd, fullgraph=True, backend="aot_eager")
    student, teacher, target = normal(1, 6, 9), normal(2, 6, 9), labels(3, 6, 9)
    for gate_sum, temperature in ((5.0, 2.0), (7.0, 2.0), (9.0, 1.5)):
        options = {"gate_sum": gate_sum, "temperature": temperature}
        torch.testing.assert_close(
            compiled(student, teacher, target, **options), gated_dkd(student, teacher, target, **options)
        )


def test_compiles_into_one_graph():
    compiled = torch.compile(gated_dkd, fullgraph=True, backend="aot_eager")
    student, teacher, target = normal(1, 6, 9).requires_grad_(), normal(2, 6, 9), labels(3, 6, 9)
    results = []
    for function in (gated_dkd, compiled):
        loss = function(student, teacher, target)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    torch.testing.assert_close(results[0], results[1])


def test_runs_under_autocast_in_full_precision():
    student, teacher, target = (
        normal(1, 6, 9, dtype=torch.float32),
        normal(2, 6, 9, dtype=torch.float32),
        labels(3, 6, 9),
    )
    outside = gated_dkd(student, teacher, target)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gated_dkd(student, teacher, target)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_runs_on_meta_tensors_so_nothing_reads_a_value():
    student = torch.zeros(6, 9, device="meta", requires_grad=True)
    loss = gated_dkd(student, torch.zeros(6, 9, device="meta"), torch.zeros(6, dtype=torch.long, device="meta"))
    loss.backward()
    assert student.grad.shape == (6, 9)


def test_a_second_derivative_is_refused():
    student = normal(1, 3, 5).requires_grad_()
    loss = gated_dkd(student, normal(2, 3, 5), torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="gated_dkd has a closed-form gradient and cannot be differentiated twice"):
        gradient.square().sum().backward()


def test_the_module_equals_the_function_and_prints_its_constructor():
    student, teacher, target = normal(1, 6, 9), normal(2, 6, 9), labels(3, 6, 9)
    module = ConfidenceGatedDKD(3.0, 0.5, 2.0, gate=None, reduction="sum", vocab_size=9)
    expected = gated_dkd(student, teacher, target, temperature=3.0, alpha=0.5, beta=2.0, gate=None, reduction="sum")
    target = target.clamp_max(8)
    torch.testing.assert_close(module(student, teacher, target), expected)
    again = eval(repr(module), {"ConfidenceGatedDKD": ConfidenceGatedDKD})
    assert again.config == module.config
    assert again.reduction == "sum"


def test_shift_labels_aligns_a_causal_model():
    target = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert shift_labels(target).tolist() == [[2, 3, -100], [5, 6, -100]]
    assert shift_labels(target, ignore_index=-1)[0, -1].item() == -1
    assert shift_labels(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)
    logits = normal(1, 2, 3, 9)
    shifted = gated_dkd(logits, normal(2, 2, 3, 9), shift_labels(target))
    torch.testing.assert_close(shifted, gated_dkd(logits[:, :-1], normal(2, 2, 3, 9)[:, :-1], target[:, 1:]))


LOGITS, TARGET = torch.zeros(3, 5), torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS.long(), LOGITS, TARGET), {}, TypeError, "student_logits must have a floating dtype, got torch.int64"),
        ((LOGITS, [[0.0]], TARGET), {}, TypeError, "teacher_logits must be a torch.Tensor, got list"),
        ((LOGITS, LOGITS, TARGET.float()), {}, TypeError, "labels must have an integer dtype, got torch.float32"),
        (
            (LOGITS, torch.zeros(3, 6), TARGET),
            {},
            ValueError,
            r"vocab_size.*5 \(student_logits\) and 6 \(teacher_logits\)",
        ),
        ((LOGITS, LOGITS, TARGET[:2]), {}, ValueError, r"student_logits must have shape .*\(3, 5\) and labels \(2,\)"),
        ((LOGITS, LOGITS, TARGET + 3), {}, ValueError, r"labels must be in \[0, 5\) or ignore_index, got 5"),
        ((LOGITS, LOGITS, TARGET - 1), {}, ValueError, r"labels must be in \[0, 5\) or ignore_index, got -1"),
        ((LOGITS, LOGITS, TARGET), {"vocab_size": 6}, ValueError, "vocab_size must be at most V, got vocab_size=6"),
        ((LOGITS, LOGITS, TARGET), {"vocab_size": 2}, ValueError, r"labels must be in \[0, 2\) or ignore_index, got 2"),
        ((LOGITS[:, :1], LOGITS[:, :1], TARGET * 0), {}, ValueError, "V must be at least 2 classes"),
        (
            (LOGITS, LOGITS, TARGET),
            {"temperature": 0.0},
            ValueError,
            r"temperature must be finite and in \[0.0001, 1000\].*0.0",
        ),
        ((LOGITS, LOGITS, TARGET), {"temperature": 1e30}, ValueError, r"in \[0.0001, 1000\], got temperature=1e\+30"),
        (
            (LOGITS, LOGITS, TARGET),
            {"temperature": "2"},
            TypeError,
            "temperature must be a number, got temperature='2'",
        ),
        ((LOGITS, LOGITS, TARGET), {"alpha": -1.0}, ValueError, "alpha must be"),
        ((LOGITS, LOGITS, TARGET), {"beta": math.nan}, ValueError, "beta must be"),
        (
            (LOGITS, LOGITS, TARGET),
            {"gate": "margin"},
            ValueError,
            "gate must be one of 'entropy', None, got gate='margin'",
        ),
        ((LOGITS, LOGITS, TARGET), {"reduction": "avg"}, ValueError, "reduction must be one of"),
        ((LOGITS, LOGITS, TARGET), {"backend": "cuda"}, ValueError, "backend must be one of"),
        ((LOGITS, LOGITS, TARGET), {"gate_sum": 1.0, "reduction": "sum"}, ValueError, "gate_sum .* reduction='sum'"),
        ((LOGITS, LOGITS, TARGET), {"gate_sum": -1.0}, ValueError, "gate_sum must be finite and in"),
        ((LOGITS, LOGITS, TARGET), {"gate_sum": torch.tensor(-2.0)}, ValueError, "be at least 0, got gate_sum=-2.0"),
        ((LOGITS, LOGITS, TARGET), {"gate_sum": torch.ones(2)}, ValueError, "gate_sum must be a number or hold one"),
        ((LOGITS, LOGITS, TARGET), {"ignore_index": 0.5}, TypeError, "ignore_index must be an integer"),
        ((LOGITS.index_fill(1, TARGET, -math.inf), LOGITS, TARGET), {}, ValueError, "student_logits must not be -inf"),
        ((LOGITS, LOGITS.index_fill(1, TARGET, -math.inf), TARGET), {}, ValueError, "teacher_logits must not be -inf"),
        ((LOGITS, LOGITS.to("meta"), TARGET), {}, ValueError, "must be on one device"),
    ],
)
def test_bad_input_names_argument_rule_and_value(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gated_dkd(*arguments, **options)


def test_the_module_checks_its_options_when_made():
    with pytest.raises(ValueError, match="temperature must be"):
        ConfidenceGatedDKD(temperature=-1.0)
    with pytest.raises(ValueError, match="reduction must be one of"):
        ConfidenceGatedDKD(reduction="median")


def test_bad_labels_and_gates_are_refused():
    with pytest.raises(TypeError, match="labels must have an integer dtype"):
        shift_labels(torch.zeros(3))
    with pytest.raises(ValueError, match="labels must have shape"):
        shift_labels(torch.tensor(3))
    with pytest.raises(ValueError, match="teacher_logits must have shape"):
        entropy_gate(LOGITS, TARGET[:1])
    with pytest.raises(ValueError, match="vocab_size must be at most V"):
        entropy_gate(LOGITS, TARGET, vocab_size=9)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\) or ignore_index, got 97"):
        entropy_gate(LOGITS, TARGET + 97)
    with pytest.raises(ValueError, match="ignore_index must be at least 0 and at most 255, got ignore_index=-100"):
        shift_labels(TARGET.to(torch.uint8))
    with pytest.raises(TypeError, match="student_logits must have a floating dtype of at least 16 bits"):
        gated_dkd(LOGITS.to(torch.float8_e4m3fn), LOGITS, TARGET)


@pytest.mark.parametrize(("dtype", "classes"), [(torch.uint8, 200), (torch.int8, 200), (torch.int16, 40_000)])
def test_labels_of_a_narrow_dtype_are_the_numbers_they_hold(dtype, classes):
    student, teacher = normal(0, 4, classes), normal(1, 4, classes)
    target = torch.tensor([156, 3, 0, 1] if dtype == torch.uint8 else [5, 3, -100, 1])
    expected = gated_dkd(student, teacher, target)
    assert torch.equal(gated_dkd(student, teacher, target.to(dtype)), expected)
    assert torch.equal(entropy_gate(teacher, target.to(dtype)), entropy_gate(teacher, target))
