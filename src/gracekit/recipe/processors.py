"""Conversations as a model's input: token ids, pixels, and labels for what the assistant says and nothing else.

A model's chat template writes the conversation, its processor expands the images, and both are left to do so. What is found out
here is which of the tokens an assistant's turn became: the template is rendered for growing prefixes of the conversation, so a turn
begins where the prompt for it ends, and characters lead to tokens by the tokenizer's own offsets.
"""

# L tokens of one conversation, n images

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor

from gracekit.recipe.answer_spans import answer_spans
from gracekit.recipe.paired_processor import PairedProcessor, load_image_processor, model_settings
from gracekit.recipe.record_format import IMAGE_MARK, Turn, open_image

IGNORE_INDEX = -100
# "USER: <image>\nWhat is it? ASSISTANT: A boat.</s>", for models that have no template of their own.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' }}{% endif %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ 'IMAGE_TOKEN\n' }}{% else %}{{ content['text'] }}{% endif %}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


class ConversationProcessor:
    """A model's processor, for conversations with labels.

    Args:
        processor: a processor of transformers with a fast tokenizer.
        name: of the model, for messages.

    Attributes:
        tokenizer: of the model.
        image_processor: of the model.
        image_token: what the template writes for an image.
        chat_template: of the model, or LLaVA-1.5's where it has none.

    Raises:
        ValueError: the tokenizer has no offsets (it is not a fast one), or no token stands for an image.
    """

    def __init__(self, processor: Any, name: str = "") -> None:
        self.processor, self.name = processor, name
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer must be a fast one, for its offsets, got {type(self.tokenizer).__name__} ({name})"
            )
        # Gemma's processor looks for the token that begins an image, the others for the placeholder.
        self.image_token: str = getattr(processor, "boi_token", None) or processor.image_token
        self._mark = self.tokenizer.convert_tokens_to_ids(self.image_token)
        if self._mark is None or self._mark == self.tokenizer.unk_token_id:
            raise ValueError(f"tokenizer must have the image token {self.image_token!r}, got none ({name})")
        template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        self.chat_template: str = template or LLAVA_TEMPLATE.replace("IMAGE_TOKEN", self.image_token)
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.tokenizer("")  # settles padding and truncation, which threads must not do at the same time

    def encode(
        self,
        turns: Sequence[Turn],
        images: Sequence[Image.Image | Path],
        *,
        add_generation_prompt: bool = False,
        device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        """Return the input and labels of one conversation.

        Args:
            turns: what is said, with the marker ``<image>`` for each image; line breaks beside a marker are dropped, because
                templates write their own.
            images: pictures or their files, in the order of their markers.
            add_generation_prompt: end with what stands before an answer; the last turn is then the user's.
            device: where the tensors go. None: the CPU.

        Returns:
            ``input_ids`` and ``labels`` (L,), the latter -100 but for the assistant's words and the token that ends each turn
            of theirs; and whatever else the model takes: pixels by image or by patch, ``image_grid_thw``, ``image_sizes``,
            ``mm_token_type_ids`` (L,). A template that ends no turn of the assistant's gets the tokenizer's end-of-sequence
            token there.

        Raises:
            ValueError: markers and images are not as many, an image cannot be decoded, a turn holds a special token of the
                tokenizer, or the template cannot be followed.
        """
        text, spans = self._write(turns, len(images), add_generation_prompt)
        add_special = not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))
        plain = self.tokenizer(text, add_special_tokens=add_special, return_offsets_mapping=True)
        supervised = _within(plain["offset_mapping"], spans)
        inputs = dict(
            self.processor(
                images=[open_image(image) for image in images] or None,
                text=[text],
                return_tensors="pt",
                add_special_tokens=add_special,
            )
        )
        inputs.pop("attention_mask", None)
        found = {name: value[0] if _by_token(value, inputs) else value for name, value in inputs.items()}
        ids = found["input_ids"].tolist()
        answers = _lay_out(plain["input_ids"], supervised, ids, self._mark)
        labels = [token if answered else IGNORE_INDEX for token, answered in zip(ids, answers, strict=True)]
        found["labels"] = torch.tensor(labels, dtype=torch.long)
        if device is not None:
            found = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in found.items()}
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Save all parts, with the chat template that was used, so that :func:`load_processor` finds them again."""
        self.processor.chat_template = self.tokenizer.chat_template = self.chat_template
        self.processor.save_pretrained(folder)

    def _write(
        self, turns: Sequence[Turn], images: int, add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation as the model reads it, images unexpanded, and where in it the answers are."""
        marks = sum(turn.text.count(IMAGE_MARK) for turn in turns)
        if marks != images:
            raise ValueError(f"turns must have a marker {IMAGE_MARK} for each image, got {marks} for {images} images")
        for turn in turns:
            inside = self._special.search(turn.text.replace(IMAGE_MARK, "") if turn.role == "user" else turn.text)
            if inside:
                raise ValueError(f"turns must not hold special tokens of the tokenizer, got {inside.group()!r}")
        messages = [{"role": turn.role, "content": _content(turn)} for turn in turns]
        try:
            text, spans = answer_spans(
                self.tokenizer, self.chat_template, messages, self._special, add_generation_prompt=add_generation_prompt
            )
        except (ValueError, jinja2.TemplateError) as error:  # the latter where a template refuses a conversation
            raise ValueError(f"the chat template of {self.name or 'the model'} cannot be used: {error}") from error
        written = text.count(self.image_token)
        if written != images:
            raise ValueError(
                f"the chat template of {self.name or 'the model'} must write {self.image_token!r} for each image, got "
                f"{written} for {images} images"
            )
        return text, spans

    def __repr__(self) -> str:
        return f"ConversationProcessor({type(self.processor).__name__}, {self.name!r})"


def load_processor(name: str | Path) -> ConversationProcessor:
    """Load what turns conversations into a model's input.

    AutoProcessor where it loads; where it wants torchvision (the Qwen-VL line's do, for videos) and there is none, the image
    processor that works with Pillow, paired with the tokenizer.

    Args:
        name: directory or hub name of a model.

    Raises:
        OSError: there is no such model.
        ValueError: its parts cannot be used, see :class:`ConversationProcessor`.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    # OSError: a file of the part for videos is missing, or one of those that are asked for again below.
    with contextlib.suppress(ImportError, OSError):
        processor = AutoProcessor.from_pretrained(name)
        if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer"):
            return ConversationProcessor(processor, str(name))
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = model_settings(name, "chat_template.json").get("chat_template")
    placeholder = getattr(AutoConfig.from_pretrained(name), "image_token_id", None)
    if placeholder is None:
        raise ValueError(f"a model must have an image_token_id in its config.json, got none in {str(name)!r}")
    token = tokenizer.convert_ids_to_tokens(placeholder)
    return ConversationProcessor(PairedProcessor(load_image_processor(name), tokenizer, token), str(name))


def _content(turn: Turn) -> list[dict[str, str]]:
    """Return a turn's text and images as the parts that chat templates take."""
    if turn.role != "user":
        return [{"type": "text", "text": turn.text}]
    pieces = turn.text.split(IMAGE_MARK)
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number > 0:
            parts.append({"type": "image"})
            piece = piece.lstrip("\n")
        if number < len(pieces) - 1:
            piece = piece.rstrip("\n")
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _by_token(value: Any, inputs: dict[str, Any]) -> bool:
    """Whether a tensor has an entry for each token, not for each image or patch."""
    return isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape


def _within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    return [any(start < high and end > low for low, high in spans) for start, end in offsets]


def _lay_out(plain: Sequence[int], supervised: Sequence[bool], ids: list[int], mark: int) -> list[bool]:
    """Return which of ``ids``, the tokens with images expanded, are supervised, knowing it of those with one mark for an image.

    What stands between two marks stands between the two expansions as well, and an expansion is at least one token.
    """
    cuts = [-1, *(i for i, token in enumerate(plain) if token == mark), len(plain)]
    found, position = [False] * len(ids), 0
    for number, (before, after) in enumerate(itertools.pairwise(cuts)):
        segment, flags = list(plain[before + 1 : after]), supervised[before + 1 : after]
        earliest = position + (number > 0)
        last = number == len(cuts) - 2
        starts = [len(ids) - len(segment)] if last else range(earliest, len(ids)) if number else [0]
        start = next((s for s in starts if s >= earliest and ids[s : s + len(segment)] == segment), None)
        if start is None or (last and number == 0 and start > 0):
            raise ValueError("the processor must leave the text between images as the tokenizer writes it")
        found[start : start + len(segment)] = flags
        position = start + len(segment)
    return found
