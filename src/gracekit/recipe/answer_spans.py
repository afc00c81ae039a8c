"""Where in a rendered conversation the assistant's words are.

A chat template is a program, so the answer is asked of it: the prompt for a turn (the conversation up to it, with what begins an
answer) and the conversation with the turn must both be beginnings of the whole, and what lies between is the turn. Templates that
rewrite earlier turns do not allow that; of these the ``{% generation %}`` marks are used, and those without marks are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def answer_spans(
    tokenizer: Any,
    chat_template: str,
    messages: Sequence[Mapping[str, Any]],
    special: re.Pattern[str],
    *,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation and find its answers.

    Args:
        tokenizer: of the model, for its special tokens.
        chat_template: Jinja.
        messages: as templates take them, each content a list of parts.
        special: matches any special token.
        add_generation_prompt: end with what stands before an answer.

    Returns:
        The text, and for each assistant's message (start, end) of its characters, what ends it included. Where the template
        writes nothing there, the tokenizer's end-of-sequence token is added behind the answer.

    Raises:
        ValueError: neither prefixes nor marks lead to the answers.
    """

    def render(count: int, prompt: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            list(messages[:count]), chat_template=chat_template, tokenize=False, add_generation_prompt=prompt
        )
        return text

    whole = render(len(messages), add_generation_prompt)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    bounds = []
    for turn in turns:
        prompt, answered = render(turn, True), render(turn + 1, False)
        if not (whole.startswith(prompt) and whole.startswith(answered) and len(prompt) < len(answered)):
            break
        bounds.append((len(prompt), len(answered)))
    else:
        return _close(whole, bounds, _answers(messages), special, tokenizer.eos_token)
    if not _MARKS.search(chat_template):
        raise ValueError(
            "it must write the beginning of a conversation as it writes it in the whole, or mark what the assistant says with "
            "{% generation %}"
        )
    whole, bounds = _marked(tokenizer, chat_template, messages, add_generation_prompt)
    return _close(whole, bounds, _answers(messages), special, tokenizer.eos_token)


def _marked(
    tokenizer: Any, chat_template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marked = render_jinja_template(
        conversations=[list(messages)],
        chat_template=chat_template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [(start, end) for start, end in marked[0]]


def _answers(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        "".join(part["text"] for part in message["content"]).strip()
        for message in messages
        if message["role"] == "assistant"
    ]


def _close(
    text: str, bounds: Sequence[tuple[int, int]], answers: Sequence[str], special: re.Pattern[str], eos: str | None
) -> tuple[str, list[tuple[int, int]]]:
    """Let each answer end with its end of turn: the special token or the text behind it, or ``eos`` put there."""
    if len(bounds) != len(answers):
        raise ValueError(f"it must mark each of {len(answers)} answers, got {len(bounds)} marks")
    pieces, spans, done, shift = [], [], 0, 0
    for (start, end), answer in zip(bounds, answers, strict=True):
        at = text.find(answer, start)
        if at < 0 or at > end:
            raise ValueError(f"it must write what the assistant says as it is, got {text[start:end]!r} for {answer!r}")
        stop = at + len(answer)
        closing = re.compile(rf"\s*(?:{special.pattern})").match(text, stop, max(end, stop)) or special.match(
            text, stop
        )
        rest = text[stop:end].rstrip()
        if closing or rest:
            spans.append((start + shift, (closing.end() if closing else stop + len(rest)) + shift))
            continue
        if eos is None:
            raise ValueError(
                "it must end an answer with a special token, or the tokenizer have an eos_token, got neither"
            )
        pieces += [text[done:stop], eos]
        spans.append((start + shift, stop + shift + len(eos)))
        done, shift = stop, shift + len(eos)
    return "".join([*pieces, text[done:]]), spans
