"""Scores of answers: published examples, and the laws that exact match, the VQA score and the choice of an option keep."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gracekit.recipe.metrics import choice_score, chosen_option, exact_match, normalise, options_in, vqa_score

NEGATED = [
    "not {}", "Not ({}).", "The answer is not {}", "The answer isn't **{}**.", "It cannot be {}", "it can\u2019t be option {}",
    "I don't think that it is {}", "{} is not the answer", "Option ({}) isn't the right choice", "It is never {}.",
]  # fmt: skip
WORDS = ["red", "wine glass", "metal", "frog", "olive", "3 apples", "north of it", "climate"]
TEMPLATES = [
    "{}", "({})", "{}.", "{})", "({}).", "{}:", " {}\n", "**{}**", "The answer is {}", "The answer is ({}).", "Answer: {}",
    "The correct answer is: {}", "Option {}", "option ({}) is right", "I think it must be {}, because of the colour.",
    "Both are close. So the answer is **{}**.",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes.", "yes"),
        ("The  Red\tcar\n", "red car"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("black/white", "black white"),
        ("it's", "its"),
        ("an apple, a pear", "apple pear"),
        ("", ""),
    ],
)
def test_answers_are_normalised_as_the_vqa_evaluation_does(text, normal):
    assert normalise(text) == normal


@given(st.text(max_size=40))
def test_normalising_again_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4), st.integers(0, 2**32))
def test_case_articles_and_punctuation_around_words_change_no_answer(words, seed):
    pick = random.Random(seed)
    dressed = " ".join(pick.choice(["", "the ", "a ", "An "]) + pick.choice([str.upper, str.title])(w) for w in words)
    assert exact_match(pick.choice(["", "'", "("]) + dressed + pick.choice(["", ".", "!", "?", ")"]), [" ".join(words)])


def test_an_answer_that_normalising_leaves_nothing_of_is_compared_as_it_is():
    for answer, truth in (("", "A"), ("the", "A"), ("-", "+"), (">", "<"), ("an", "a")):
        assert exact_match(answer, [truth]) == 0.0
    for answer, truth in (("A", "A"), ("a.", "A"), ("(A)", "a"), ("+", "+"), (" - ", "-")):
        assert exact_match(answer, [truth]) == 1.0


def test_exact_match_takes_any_of_the_truths_and_no_part_of_one():
    assert exact_match("Two", ["1", "2"]) == 1.0
    assert exact_match("red", ["dark red"]) == 0.0


@pytest.mark.parametrize(("agree", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_the_vqa_score_of_ten_people_has_its_published_values(agree, score):
    truths = ["Red"] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa_score("red.", truths) == pytest.approx(score, abs=1e-12)


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=4, max_size=12), st.integers(0, 2**32))
def test_the_vqa_score_is_that_of_all_subsets_without_one_person_in_any_order(truths, seed):
    subsets = [truths[:i] + truths[i + 1 :] for i in range(len(truths))]
    expected = sum(min(1.0, subset.count("red") / 3) for subset in subsets) / len(subsets)
    mixed = random.Random(seed).sample(truths, len(truths))
    assert vqa_score("red", mixed) == pytest.approx(expected, abs=1e-12)
    assert vqa_score("red", ["red", *truths]) >= vqa_score("red", truths) - 1e-12


@given(st.sampled_from(WORDS), st.sampled_from(WORDS))
def test_the_vqa_score_of_a_single_truth_is_exact_match(answer, truth):
    assert vqa_score(answer, [truth]) == exact_match(answer, [truth])


def options(count):
    return dict(zip("ABCDEFGH", WORDS[:count], strict=False))


@given(st.integers(2, 8), st.data())
def test_a_letter_is_found_in_whatever_is_said_around_it(count, data):
    letter = data.draw(st.sampled_from(sorted(options(count))))
    text = data.draw(st.sampled_from(TEMPLATES)).format(letter)
    assert chosen_option(text, options(count)) == letter


@given(st.integers(2, 8), st.data())
def test_an_options_text_is_found_alone_in_a_sentence_and_after_its_letter(count, data):
    listed = options(count)
    letter = data.draw(st.sampled_from(sorted(listed)))
    form = data.draw(
        st.sampled_from(["{1}", "{1}.", "It is the {1}, I think", "the answer is a {1}", "{0}. {1}", "({0}) {1}"])
    )
    assert chosen_option(form.format(letter, listed[letter]), listed) == letter


@given(st.sampled_from(NEGATED), st.booleans(), st.data())
def test_what_an_answer_negates_is_not_what_it_chooses(form, by_text, data):
    listed = options(6)
    out, chosen = data.draw(st.lists(st.sampled_from(sorted(listed)), min_size=2, max_size=2, unique=True))
    negated = form.format(listed[out] if by_text else out)
    assert chosen_option(negated, listed) is None
    for both in (f"{negated}. The answer is {chosen}.", f"It is the {listed[chosen]}, {negated}"):
        assert chosen_option(both, listed) == chosen


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C, not B", "C"),
        ("It's B, not A.", "B"),
        ("The correct answer is not B, it is C.", "C"),
        ("It is not A, B or C", None),
        ("It is neither A nor B, so the answer is C", "C"),
        ("It isn't a cat or a dog", None),
        ("Not a dog but a cat", "A"),
        ("the answer is not b", None),
        ("not A and B", None),
    ],
)
def test_several_choices_may_be_negated_and_one_left(text, letter):
    assert chosen_option(text, {"A": "a cat", "B": "a dog", "C": "a bird"}) == letter


@pytest.mark.parametrize(
    "text",
    [
        "B is not a mammal",
        "The one that is not a mammal is B",
        "B is not correct",
        "B, because the others are not magnetic",
        "I'm not sure, but B",
        "I do not know. B",
        "The answer is B, not because it barks",
        "not only B",
    ],
)
def test_a_negation_of_something_else_leaves_the_choice(text):
    assert chosen_option(text, {"A": "a cat", "B": "a dog", "C": "a bird"}) == "B"


def test_an_option_may_be_a_negation_itself():
    listed = {"A": "a mammal", "B": "not a mammal", "C": "It can't fly."}
    for text, letter in (
        ("It is not a mammal", "B"),
        ("not a mammal", "B"),
        ("a mammal", "A"),
        ("it cannot fly", None),
    ):
        assert chosen_option(text, listed) == letter


@given(st.integers(2, 8), st.sampled_from(["{0}. {1}", "({0}) {1}", "{0}) {1}", "{0}: {1}"]), st.booleans())
def test_options_are_read_from_a_question_in_any_of_their_forms(count, form, more):
    lines = [form.format(letter, text) for letter, text in options(count).items()]
    tail = ["Answer with the option's letter from the given choices directly."] if more else []
    assert options_in("\n".join(["What is it?", *lines, *tail])) == options(count)


@pytest.mark.parametrize(
    "text", ["", "I cannot say.", "A and B", "red or metal", "Z", "A red frog of metal", "a nice one"]
)
def test_an_unclear_choice_is_none(text):
    assert chosen_option(text, {"A": "red", "B": "metal", "C": "frog"}) is None


def test_the_last_stated_answer_counts_and_the_longer_of_two_options_that_overlap():
    assert chosen_option("Option A looks right, but the answer is C.", {"A": "x1", "B": "x2", "C": "x3"}) == "C"
    assert chosen_option("some red wine", {"A": "red", "B": "red wine"}) == "B"
    assert chosen_option("the answer is a dog", {"A": "a cat", "B": "a dog"}) == "B"
    assert chosen_option("the answer is b", {"A": "a cat", "B": "a dog"}) == "B"


def test_a_choice_is_scored_against_a_letter_a_text_or_a_sentence():
    question = "Context: E. coli.\nE. coli is what?\nOptions: (A) an animal (B) a bacterium"
    for truth in ("B", "(B)", "a bacterium", "The answer is B."):
        assert choice_score("The answer is (B).", [truth], question) == 1.0
        assert choice_score("A", [truth], question) == 0.0
        assert choice_score("no idea", [truth], question) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_match("x", []), "at least one answer"),
        (lambda: vqa_score("x", ["a", "b"]), "truths must be one, or at least four"),
        (lambda: choice_score("A", ["A"], "What is it?"), "question must list its options"),
        (lambda: choice_score("A", ["C"], "(A) x1 (B) x2"), "must be one of the options"),
        (lambda: choice_score("A", [], "(A) x1 (B) x2"), "must be one of the options"),
    ],
)
def test_what_cannot_be_scored_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
