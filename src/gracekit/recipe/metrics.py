"""What an answer is worth: exact match, the VQA score, and the option that a free text chooses.

- exact: normalised as the VQA evaluation does (Antol et al., ICCV 2015; https://visualqa.org/evaluation.html), then compared.
- vqa: the VQA score (Goyal et al., CVPR 2017) over several people's answers.
- choice: multiple choice as in ScienceQA (Lu et al., NeurIPS 2022) and MMBench (Liu et al., ECCV 2024), whose models answer with a
  letter, with an option's text, or with a sentence around either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_DROPPED = re.compile(r"['\u2019`]|(?<!\d)\.|\.(?!\d)")
_SPACED = re.compile(r"[;/\[\]\"{}()=+\\_\-><@,?!:]")
_OPTION_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_OPTION_INLINE = re.compile(r"\(([A-Z])\)\s*(.*?)\s*(?=\([A-Z]\)|$)", re.MULTILINE)
# A small letter counts at the end alone: in "the answer is a dog" it is an article.
_LETTER = r"(?:[A-Z]|[a-z](?=\W*$))(?![\w'])"
_STATED = re.compile(rf"(?i:answer|option|choice)(?i:\s+is)?\s*:?[\s*]*\(?({_LETTER})")
_LEADING = re.compile(r"^\W*([A-Za-z])(?:[.):](?!\w)|\W*$)")
_ALONE = re.compile(r"(?<![\w'])(?!A (?!(?:and|or)\b)[a-z])([A-Z])(?![\w'])")

_CONTRACTED = re.compile(r"(?i:n['\u2019]t|(?<=\bcan)not)\b")
_NEGATION = r"\b(?i:not|neither|nor|never)\s+"
# What may stand between a negation and what it is about: "not the right answer", "don't think that it is".
_BETWEEN = r"(?:(?:an?|(?i:think|believe|that|it|this|is|be|the|correct|right|best|answer|option|choice))[\s:]+)*"
_NOT_THE_ANSWER = r"\s+\w+\s+(?i:not\s+(?:be\s+)?(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:answer|option|choice))\b"


def normalise(text: str) -> str:
    """Return an answer in the form in which the VQA evaluation compares: lower case, no articles, punctuation or number words.

    Two things are simpler than in the published script. Its table of contractions ("dont" to "don't") is replaced by dropping
    apostrophes, and a punctuation mark always becomes a space (there: nothing, where a space is beside it anywhere in the answer).

    Args:
        text: an answer.

    Returns:
        Words with single spaces between; applying it again changes nothing.

    Example:
        >>> normalise("The two-wheeled bikes, don't!"), normalise("1,000.5")
        ('2 wheeled bikes dont', '1000.5')
    """
    text = _COMMA_IN_NUMBER.sub("", text.lower())
    text = _SPACED.sub(" ", text)
    text = _DROPPED.sub("", text)
    return " ".join(NUMBERS.get(word, word) for word in text.split() if word not in ARTICLES)


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """Return 1.0 if a normalised answer is one of the normalised truths, else 0.0.

    Raises:
        ValueError: no truth is given.

    Example:
        >>> exact_match("A circle.", ["circle"])
        1.0
    """
    if not truths:
        raise ValueError("truths must hold at least one answer, got none")
    return float(_compared(answer) in map(_compared, truths))


def _compared(text: str) -> str:
    """Normalised, but for what nothing would be left of: articles ("A", an option) and signs."""
    return normalise(text) or text.lower().strip(" .,:;!?()[]\"'") or text.strip()


def vqa_score(answer: str, truths: Sequence[str]) -> float:
    """Return the VQA score: the mean over all subsets that leave one person out of min(people who agree / 3, 1).

    Args:
        answer: of the model.
        truths: ten people's answers; at least four, or a single one, which is compared exactly.

    Returns:
        A score in [0, 1]; with ten people and k who agree 0, 0.3, 0.6, 0.9, 1, 1, ...

    Raises:
        ValueError: no truth, or two or three, with which no answer could score 1.

    Example:
        >>> round(vqa_score("red", ["red"] * 3 + ["dark red"] * 7), 2)
        0.9
    """
    if len(truths) in (2, 3):
        raise ValueError(f"truths must be one, or at least four for the VQA score, got {len(truths)}")
    if len(truths) < 2:
        return exact_match(answer, truths)
    given = normalise(answer)
    agree = [normalise(truth) == given for truth in truths]
    return sum(min((sum(agree) - own) / 3, 1.0) for own in agree) / len(agree)


def options_in(question: str) -> dict[str, str]:
    r"""Return the options that a question lists, by letter: lines "A. text", "(A) text", "A) text", or "(A) text (B) text" in one.

    Example:
        >>> options_in("What is it?\nA. a cat\nB. a dog"), options_in("Options: (A) iron (B) wood")
        ({'A': 'a cat', 'B': 'a dog'}, {'A': 'iron', 'B': 'wood'})
    """
    inline = dict(_OPTION_INLINE.findall(question))
    found = inline if len(inline) > 1 else dict(_OPTION_LINE.findall(question))
    # Options are lettered from A without a gap; a line "E. coli is ..." is none.
    options: dict[str, str] = {}
    while (letter := chr(ord("A") + len(options))) in found:
        options[letter] = found[letter]
    return options if len(options) > 1 else {}


def chosen_option(text: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option that a free text chooses, or None where that is not clear.

    In this order: the whole text is an option's; it says "the answer is B", "option (B)", "Answer: B" (the last one counts);
    it begins with a letter by itself ("B", "(B)", "B. ..."); it contains exactly one option's text; it contains exactly one capital
    letter of an option by itself, where "A" before a small letter is an article. Letters and texts that it negates do not count
    ("not B", "isn't a dog", "neither A nor B", "B is not the answer"). "B is not correct" and "B is wrong" choose B: to a
    question for the wrong option they do.

    Args:
        text: of the model.
        options: text by letter.

    Example:
        >>> options = {"A": "a cat", "B": "a dog"}
        >>> chosen_option("The answer is (B).", options), chosen_option("It is a dog", options), chosen_option("Both", options)
        ('B', 'B', None)
        >>> chosen_option("The answer is not B", options), chosen_option("Not a dog but a cat", options)
        (None, 'A')
    """
    text = _CONTRACTED.sub(" not", text)
    texts = {letter: normalise(_CONTRACTED.sub(" not", option)) for letter, option in options.items()}
    same = [letter for letter, option in texts.items() if option and option == normalise(text)]
    if len(same) == 1:
        return same[0]
    text = _without_negated(text, rf"[(*]*\b{_LETTER}[)*]*")
    plain = normalise(text)
    if not any(re.search(_NEGATION, option) for option in texts.values()):  # "not a mammal" may be what is chosen
        longest_first = sorted(filter(None, texts.values()), key=len, reverse=True)
        plain = _without_negated(plain, rf"(?<!\S)(?:{'|'.join(map(re.escape, longest_first))})(?!\S)")
    stated = [str(letter).upper() for letter in _STATED.findall(text) if letter.upper() in options]
    if stated:
        return stated[-1]
    leading = _LEADING.match(text.strip())
    if leading and leading[1].upper() in options:
        return leading[1].upper()
    contained = [letter for letter, option in texts.items() if option and f" {option} " in f" {plain} "]
    # "red wine" names the option "red wine" and not "red".
    longest = [
        letter
        for letter in contained
        if not any(letter != other and f" {texts[letter]} " in f" {texts[other]} " for other in contained)
    ]
    if len(longest) == 1:
        return longest[0]
    alone = set(_ALONE.findall(text)) & set(options)
    return str(*alone) if len(alone) == 1 else None


def _without_negated(text: str, choice: str) -> str:
    """Return a text without the choices that it says are not the answer; ``choice`` is the pattern of one."""
    several = rf"{choice}(?:(?:[\s,]+{choice})*[\s,]+(?i:or|nor|and)\s+{choice})?"
    return re.sub(rf"{_NEGATION}{_BETWEEN}{several}|{choice}{_NOT_THE_ANSWER}", " ", text)


def choice_score(answer: str, truths: Sequence[str], question: str) -> float:
    r"""Return 1.0 if an answer chooses the option of the truth, else 0.0.

    Args:
        answer: of the model; no clear choice is wrong.
        truths: the first is the true answer: a letter, an option's text, or a sentence with either.
        question: with its options, see :func:`options_in`.

    Raises:
        ValueError: the question lists no options, or the true answer is none of them.

    Example:
        >>> choice_score("B", ["a dog"], "What is it?\nA. a cat\nB. a dog")
        1.0
    """
    options = options_in(question)
    if not options:
        raise ValueError(f"question must list its options (A. ..., B. ...), got {question!r}")
    true = chosen_option(truths[0], options) if truths else None
    if true is None:
        raise ValueError(f"the true answer must be one of the options {options}, got {list(truths)!r}")
    return float(chosen_option(answer, options) == true)
