"""How a teacher's entropy and its errors go together, on data made so that the answer is known."""

import math

import pytest
import reference
import torch

from gracekit.losses import entropy_gate
from gracekit.recipe.gate_ground import gate_ground, rest_share, token_entropy


def test_entropy_is_the_one_that_the_gate_is_made_of():
    logits = 3 * torch.randn(50, 11, dtype=torch.float64)
    gates = entropy_gate(logits, torch.zeros(50, dtype=torch.long))
    torch.testing.assert_close((-token_entropy(logits) / math.log(11)).exp(), gates, check_dtype=False)


def test_entropy_is_log_v_for_equal_logits_and_none_for_a_certain_class_even_in_bfloat16():
    certain = torch.full((1, 8), -torch.inf, dtype=torch.bfloat16).index_fill(1, torch.tensor([2]), 0.0)
    assert token_entropy(certain).item() == 0.0
    assert token_entropy(torch.zeros(1, 8, dtype=torch.bfloat16)).item() == pytest.approx(math.log(8))


def test_pearson_is_that_of_numpy():
    entropy, wrong = torch.rand(200), torch.rand(200) < 0.3
    expected = torch.corrcoef(torch.stack([entropy.double(), wrong.double()]))[0, 1]
    assert gate_ground(entropy, wrong).pearson == pytest.approx(expected.item())


def test_an_error_rate_that_rises_with_entropy_is_a_line_through_the_bins():
    entropy = torch.linspace(0, 1, 20_000)
    found = gate_ground(entropy, torch.rand(20_000) < entropy, bins=10)
    assert found.binned_r2 > 0.99
    # Of y ~ Bernoulli(x), x uniform: sd(x) / sd(y) = sqrt(1/12) / (1/2).
    assert found.pearson == pytest.approx(math.sqrt(1 / 3), abs=0.02)
    assert found.error_rate == pytest.approx(0.5, abs=0.02)


def test_errors_that_know_nothing_of_entropy_give_none():
    found = gate_ground(torch.rand(20_000), torch.rand(20_000) < 0.3)
    assert abs(found.pearson) < 0.03


def test_bins_hold_equally_many_by_rising_entropy_and_all_errors_are_in_them():
    entropy, wrong = torch.rand(103), torch.rand(103) < 0.4
    found = gate_ground(entropy, wrong, bins=10)
    means, rates, sizes = zip(*found.bins, strict=True)
    assert sorted(means) == list(means)
    assert sum(sizes) == found.count == 103
    assert max(sizes) - min(sizes) <= 1
    assert sum(r * n for r, n in zip(rates, sizes, strict=True)) == pytest.approx(wrong.sum().item())


def test_what_is_left_beside_the_answer_is_the_weight_of_its_part_in_a_plain_divergence():
    student, teacher = 3 * torch.randn(2, 40, 9, dtype=torch.float64)
    label, temperature = 4, 2.0
    parts = torch.stack(
        [torch.stack(reference.dkd_parts(student[row], teacher[row], label, temperature)) for row in range(40)]
    )
    whole = torch.nn.functional.kl_div(
        (student / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
        log_target=True,
        reduction="none",
    ).sum(1)
    shares = torch.tensor([rest_share(row[None], torch.tensor([label]), temperature) for row in teacher])
    torch.testing.assert_close(parts[:, 0] + shares * parts[:, 1], whole, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert rest_share(teacher, torch.full((40,), label), temperature) == pytest.approx(shares.mean().item())


def test_a_certain_teacher_leaves_what_its_logits_say():
    logits = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert rest_share(logits, torch.tensor([0]), 1.0) == pytest.approx(2 * math.exp(-60), rel=1e-4)


def test_the_order_of_the_answers_changes_nothing():
    entropy, wrong, mixed = torch.rand(300), torch.rand(300) < 0.4, torch.randperm(300)
    one, other = gate_ground(entropy, wrong), gate_ground(entropy[mixed], wrong[mixed])
    assert one.pearson == pytest.approx(other.pearson)
    assert one.binned_r2 == pytest.approx(other.binned_r2)


def test_a_teacher_that_is_never_wrong_has_no_correlation():
    found = gate_ground(torch.rand(40), torch.zeros(40, dtype=torch.bool))
    assert math.isnan(found.pearson)
    assert math.isnan(found.binned_r2)


@pytest.mark.parametrize(
    ("entropy", "wrong", "bins", "message"),
    [
        (torch.rand(4), torch.zeros(5), 2, "entropy and wrong must be .T,. alike"),
        (torch.rand(2, 2), torch.zeros(2, 2), 2, "entropy and wrong must be .T,. alike"),
        (torch.rand(4), torch.zeros(4), 1, "bins must be at least 2"),
        (torch.rand(4), torch.zeros(4), 5, "bins must be at least 2 and at most 4"),
        (torch.rand(1), torch.zeros(1), 2, "at least one value for each bin"),
    ],
)
def test_bad_arguments_are_named(entropy, wrong, bins, message):
    with pytest.raises(ValueError, match=message):
        gate_ground(entropy, wrong, bins=bins)
