"""Intervals and paired tests against published tables and examples, and the laws they keep."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracekit.recipe.paired_tests import holm, mcnemar, mean_interval, paired_t, sign_flip, t_quantile, t_two_sided

# Table of Student's t, two-sided 95 % and 99 %, as any textbook prints it.
TABLE = {
    1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 5: (2.571, 4.032),
    9: (2.262, 3.250), 10: (2.228, 3.169), 30: (2.042, 2.750), 120: (1.980, 2.617),
}  # fmt: skip
# Darwin's maize, crossed against self-fertilised, eighths of an inch; Fisher, The Design of Experiments (1935), 17 and 21.
MAIZE = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
# Student (1908), extra sleep by two drugs in ten patients.
SLEEP = ([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


@pytest.mark.parametrize("df", TABLE)
def test_quantiles_of_t_are_those_of_the_published_table(df):
    assert t_quantile(0.95, df) == pytest.approx(TABLE[df][0], abs=5.1e-4)
    assert t_quantile(0.99, df) == pytest.approx(TABLE[df][1], abs=5.1e-4)


def test_one_degree_of_freedom_is_cauchys_and_many_are_the_normal_distribution():
    for t in (0.1, 1.0, 7.0):
        assert t_two_sided(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-14)
        assert t_two_sided(t, 200_000) == pytest.approx(math.erfc(t / math.sqrt(2)), abs=1e-5)
    assert t_two_sided(math.inf, 4) == 0.0
    assert t_two_sided(0.0, 4) == 1.0


@given(st.integers(1, 60), st.floats(0.01, 0.999))
def test_the_quantile_is_the_inverse_of_the_distribution(df, confidence):
    assert t_two_sided(t_quantile(confidence, df), df) == pytest.approx(1 - confidence, abs=1e-9)


def test_students_sleep_data_give_his_result():
    differences = [b - a for a, b in zip(*SLEEP, strict=True)]
    assert paired_t(differences) == pytest.approx(0.002833, abs=5e-7)
    mean, low, high = mean_interval(differences)
    assert (mean, low, high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=5e-7)


def test_darwins_maize_gives_fishers_results():
    assert paired_t(MAIZE) == pytest.approx(0.0497, abs=5e-5)
    assert sign_flip(MAIZE) == 2 * 863 / 2**15


def test_mcnemars_exact_value_is_the_one_published_for_agrestis_approval_ratings():
    # Agresti, Categorical Data Analysis, table 10.1: 794 and 570 agree, 150 and 86 changed.
    first = [True] * 794 + [True] * 150 + [False] * 86 + [False] * 570
    second = [True] * 794 + [False] * 150 + [True] * 86 + [False] * 570
    assert mcnemar(first, second) == pytest.approx(3.716e-05, abs=5e-9)


def test_holm_corrects_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_never_lowers_a_value_nor_exceeds_bonferroni_nor_changes_the_order(values):
    adjusted = holm(values)
    for one, more in zip(values, adjusted, strict=True):
        assert one <= more <= min(1.0, one * len(values)) + 1e-15
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=9))
def test_swapping_the_two_sides_changes_no_test(differences):
    turned = [-value for value in differences]
    assert paired_t(differences) == pytest.approx(paired_t(turned), abs=1e-15)
    assert sign_flip(differences) == sign_flip(turned)
    assert 2 / 2 ** len(differences) <= sign_flip(differences) <= 1.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_mcnemar_looks_at_disagreements_alone_and_at_both_sides_alike(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    p = mcnemar(first, second)
    assert 0.0 <= p <= 1.0
    assert p == mcnemar(second, first)
    assert p == mcnemar([*first, True, False], [*second, True, False])


def test_samples_too_small_to_tell_say_so():
    assert paired_t([3.0]) == 1.0
    assert sign_flip([3.0]) == 1.0
    assert math.isnan(mean_interval([3.0]).low)
    assert paired_t([0.0, 0.0]) == 1.0
    assert paired_t([0.1 + 0.2, 0.3]) == 0.0
    assert mcnemar([True], [True]) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "at least one number"),
        (lambda: paired_t([]), "at least one number"),
        (lambda: sign_flip([1.0] * 21), "at most 20"),
        (lambda: mcnemar([True], []), "same questions, got 1 and 0"),
        (lambda: holm([1.5]), "p_values must be finite and in"),
        (lambda: t_quantile(1.0, 4), "confidence must be below 1"),
        (lambda: t_two_sided(1.0, 0), "df must be at least 1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
