"""A saved model in the precision it is to run in, and its greedy answers to questions of conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig

from gracekit._structure import decoder_linears
from gracekit.quant import LSQConfig, convert, load_qat, quantize_rtn
from gracekit.quant.deploy import check_plain, quantized_layers, resolve_target
from gracekit.quant.formats.trained import SCALES_FILE, learned_widths
from gracekit.quant.int4 import read_scale
from gracekit.quant.qat import check_groups
from gracekit.quant.scheme import holds_scale
from gracekit.recipe.batches import ConversationCollator
from gracekit.recipe.inspect_model import build_on_meta
from gracekit.recipe.processors import ConversationProcessor, load_processor
from gracekit.recipe.quantize import class_of, load
from gracekit.recipe.questions import Asked
from gracekit.recipe.weights import read_model

PRECISIONS = ("bf16", "fp32", "fake", "int4-rtn", "int4", "int8")
ENGINES = ("transformers", "gracekit")
_PLAIN = ("bf16", "fp32", "int4-rtn")
_ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
_WINDOW = 16  # batches encoded at a time, and sorted by length


def precision_of(folder: Path, *, int4: bool = False) -> str:
    """Return what a folder is to be run in: "int4" or "int8" where it holds codes or learned scales, else "bf16".

    Args:
        folder: the model's.
        int4: round a plain model: "int4-rtn" instead of "bf16".

    Raises:
        ValueError: it holds no model of transformers, or one that another library quantised.
    """
    settings = class_of(folder)[1].get("quantization_config")
    if settings is not None and settings.get("quant_method") != "torchao":
        raise ValueError(
            f"MODEL_DIR must hold a plain model, learned scales or torchao's tensors, got {settings.get('quant_method')!r} "
            f"in {folder}"
        )
    if settings is not None:
        return f"int{_packed_width(settings, folder)}"
    if (folder / SCALES_FILE).is_file():
        return "int" + "+".join(map(str, learned_widths(folder)))
    return "int4-rtn" if int4 else "bf16"


def _packed_width(settings: dict[str, Any], folder: Path) -> str:
    """Return the bits of torchao's tensors, by what config.json says of their kind."""
    kind = settings.get("quant_type", {}).get("default", {})
    found = re.findall(r"int(\d+)", f"{kind.get('_type')} {kind.get('_data', {}).get('weight_dtype')}", re.IGNORECASE)
    if len(found) != 1:
        raise ValueError(f"MODEL_DIR must hold torchao's tensors of one width, got {kind.get('_type')} in {folder}")
    return str(found[0])


def check_precision(folder: Path, precision: str, device: torch.device, *, group_size: int) -> None:
    """Raise ValueError unless a folder can be run as :func:`load_model` is asked to; no weight is read."""
    there = precision_of(folder)
    learned = (folder / SCALES_FILE).is_file()
    if precision in _PLAIN and there != "bf16":
        kind = "learned scales, without which its weights are another model" if learned else "packed codes"
        raise ValueError(f"precision must be {there} for {folder}, which has {kind}, got {precision!r}")
    if precision == "fake" and not learned:
        raise ValueError(f"precision fake needs learned scales, got no {SCALES_FILE} in {folder}")
    if precision not in (*_PLAIN, "fake", there):
        has = "a plain model (int4-rtn rounds one)" if there == "bf16" else f"one of {there}"
        raise ValueError(f"precision {precision} needs learned scales or packed codes of it, got {has} in {folder}")
    if precision == "int4-rtn":
        config = LSQConfig(group_size=group_size)
        target = resolve_target("auto", config.bits, device)
        for name, linear in decoder_linears(build_on_meta(folder)).items():
            check_groups(linear, config, name)
            check_plain(target, name, linear, config, device=device, dtype=torch.bfloat16)


def load_model(folder: Path, precision: str, device: torch.device, *, group_size: int = 128) -> Any:
    """Return a saved model, ready to answer in a precision.

    Args:
        folder: what ``save_pretrained``, :func:`gracekit.quant.save_qat` or ``gracekit export --format torchao`` wrote.
        precision: "bf16" or "fp32": plain weights; "fake": the training forward of a folder of save_qat; "int4-rtn": plain weights
            rounded to nearest, on the INT4 kernel of the device; "int4", "int8": learned or packed codes on that kernel.
        device: where to answer.
        group_size: of "int4-rtn".

    Raises:
        ValueError: the folder has not what the precision needs, or a layer does not fit the kernel.
    """
    check_precision(folder, precision, device, group_size=group_size)
    model: Any
    if precision not in (*_PLAIN, "fake") and not (folder / SCALES_FILE).is_file():
        model = read_model(class_of(folder)[0], folder, dtype="auto").eval().to(device)
        return _deployed(model)
    model = load(folder)
    if precision in _PLAIN:
        model.to(device, torch.float32 if precision == "fp32" else torch.bfloat16)
        return quantize_rtn(model, LSQConfig(group_size=group_size)) if precision == "int4-rtn" else model
    load_qat(model, folder)
    model.to(device)
    # Codes come from the trained weights; everything else is cast afterwards.
    return model if precision == "fake" else _deployed(model)


def _deployed(model: Any) -> Any:
    """Convert for the device's kernel, in bfloat16 or, where that does not hold the scales, in the next dtype that does."""
    scales = [read_scale(layer) for layer in quantized_layers(model).values()]
    exact = (d for d in _ACTIVATIONS if all(holds_scale(d, scale) for scale in scales))
    dtype = next(exact, torch.float32)
    target = "auto"
    if dtype != torch.bfloat16 and scales[0].is_cuda:  # torchao's kernel there has bfloat16 alone
        target = "triton" if dtype == torch.float16 else "reference"
    return convert(model, target, dtype=dtype).to(dtype)


def processor_of(folder: Path, given: Path | None) -> ConversationProcessor:
    """Return the processor of a model's folder, or of the folder that was given for it.

    Raises:
        ValueError: that is not there, or its parts cannot be used.
        OSError: a part is missing.
    """
    if given is not None and not given.is_dir():
        raise ValueError(f"processor must be a folder that is there, got {str(given)!r}")
    return load_processor(given or folder)


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
        window = [(asked.encode(processor), asked) for asked in questions[first : first + batch_size * _WINDOW]]
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


def _ends(model: Any, processor: ConversationProcessor) -> list[int]:
    """Tokens that end an answer: the model's own, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or [])
    return sorted({*own, processor.tokenizer.eos_token_id} - {None})
