"""A saved model in the precision it is to run in, and its greedy answers to questions of conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig

from gracekit.quant import LSQConfig, convert, load_qat, quantize_rtn
from gracekit.recipe.batches import ConversationCollator
from gracekit.recipe.processors import ConversationProcessor
from gracekit.recipe.quantize import class_of, load
from gracekit.recipe.questions import Asked
from gracekit.recipe.record_format import IMAGE_MARK

PRECISIONS = ("bf16", "fp32", "fake", "int4-rtn", "int4")
ENGINES = ("transformers", "gracekit")
_WINDOW = 16  # batches encoded at a time, and sorted by length


def load_model(folder: Path, precision: str, device: torch.device, *, group_size: int = 128) -> Any:
    """Return a saved model, ready to answer in a precision.

    Args:
        folder: what ``save_pretrained``, :func:`gracekit.quant.save_qat` or ``gracekit export --format torchao`` wrote.
        precision: "bf16" or "fp32": plain weights; "fake": the training forward of a folder of save_qat; "int4-rtn": plain weights
            rounded to nearest, on the INT4 kernel of the device; "int4": learned or packed codes on that kernel.
        device: where to answer.
        group_size: of "int4-rtn".

    Raises:
        ValueError: the folder has not what the precision needs, or a layer does not fit the kernel.
    """
    if precision == "int4" and "quantization_config" in (found := class_of(folder))[1]:
        model = found[0].from_pretrained(folder, dtype="auto").eval().to(device)
        return convert(model, dtype=torch.bfloat16).to(torch.bfloat16)
    model = load(folder)
    if precision in ("fake", "int4"):
        try:
            load_qat(model, folder)
        except FileNotFoundError as error:
            raise ValueError(
                f"--precision {precision} needs learned scales or packed codes, got a plain model in {folder} (int4-rtn rounds one)"
            ) from error
        model.to(device)
        # Codes come from the trained weights; everything else is cast afterwards.
        return model if precision == "fake" else convert(model, dtype=torch.bfloat16).to(torch.bfloat16)
    model.to(device, torch.float32 if precision == "fp32" else torch.bfloat16)
    return quantize_rtn(model, LSQConfig(group_size=group_size)) if precision == "int4-rtn" else model


@torch.inference_mode()
def answer(
    model: Any,
    processor: ConversationProcessor,
    questions: Sequence[Asked],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    engine: str = "transformers",
) -> Iterator[tuple[Asked, str]]:
    """Give a model's greedy answers, as each batch is done.

    Questions of similar length go together, padded on the left; so they come in another order than they are given.

    Args:
        model: as :func:`load_model` returns it.
        processor: of the model.
        questions: to ask.
        batch_size: at a time.
        max_new_tokens: an answer's length at most.
        engine: "transformers" (``model.generate``) or "gracekit" (:class:`gracekit.inference.Generator`).
    """
    model.eval()
    device = next(model.parameters()).device
    collate = ConversationCollator(processor, "left")
    ends = _ends(model, processor)
    pad = processor.tokenizer.pad_token_id
    # Said in full, because what is left open would come from the model's own settings.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=ends or None,
        pad_token_id=pad if pad is not None else ends[0],
    )
    generate = _engine(engine, model, settings, batch_size)
    for first in range(0, len(questions), batch_size * _WINDOW):
        window = [(_encode(processor, asked), asked) for asked in questions[first : first + batch_size * _WINDOW]]
        window.sort(key=lambda pair: len(pair[0]["input_ids"]), reverse=True)  # what takes most memory comes first
        for start in range(0, len(window), batch_size):
            part = window[start : start + batch_size]
            batch = collate([encoded for encoded, _ in part])
            del batch["labels"]
            for name, value in batch.items():
                batch[name] = value.to(device, model.dtype if value.is_floating_point() else None)
            made = generate(batch)[:, batch["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(made, skip_special_tokens=True)
            yield from ((asked, text.strip()) for (_, asked), text in zip(part, texts, strict=True))


def _engine(
    name: str, model: Any, settings: GenerationConfig, batch_size: int
) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Return what continues a batch: ids of prompts and answers."""
    if name == "transformers":
        return lambda batch: cast(torch.Tensor, model.generate(**batch, generation_config=settings))
    from gracekit.inference import Generator

    held: list[Generator] = []

    def generate(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        length = batch["input_ids"].shape[1] + settings.max_new_tokens
        if not held or length > held[0].max_length:
            held[:] = [Generator(model, batch_size, length)]
        found = held[0].generate(batch, max_new_tokens=settings.max_new_tokens, generation_config=settings)
        return found.sequences

    return generate


def _encode(processor: ConversationProcessor, asked: Asked) -> dict[str, torch.Tensor]:
    turns = asked.record.turns[: asked.turn]
    seen = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    return processor.encode(turns, asked.record.images[:seen], add_generation_prompt=True)


def _ends(model: Any, processor: ConversationProcessor) -> list[int]:
    """Tokens that end an answer: the model's own, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or [])
    return sorted({*own, processor.tokenizer.eos_token_id} - {None})
