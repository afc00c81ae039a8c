"""``gracekit generate``: the answer of a saved model to one prompt, how fast it came, and what it took in memory."""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import GenerationConfig

from gracekit._checks import check_int, check_real
from gracekit.inference import Generation
from gracekit.inference import generate as generate_tokens
from gracekit.recipe.answering import load_model, precision_of, processor_of
from gracekit.recipe.batches import ConversationCollator
from gracekit.recipe.config import RunConfig
from gracekit.recipe.experiment import kernel_name
from gracekit.recipe.processors import ConversationProcessor
from gracekit.recipe.progress import quiet, say
from gracekit.recipe.record_format import IMAGE_MARK, Turn, open_image

_SEEDS = (-(2**63), 2**64 - 1)  # what torch takes
_LEAST_TEMPERATURE = 1e-3  # logits divided by less may be no numbers


class Answer(NamedTuple):
    """What a model said.

    Attributes:
        text: of the answer, without special tokens.
        generation: tokens and times.
    """

    text: str
    generation: Generation


def answer(
    model: Any,
    processor: ConversationProcessor,
    prompt: str,
    images: Sequence[Image.Image | Path],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Answer:
    """Ask a model one question.

    Args:
        model: in evaluation mode.
        processor: of the model.
        prompt: what the user says; images without a marker ``<image>`` in it come first.
        images: pictures or their files.
        max_new_tokens: tokens of the answer at most.
        temperature: 0: the likeliest tokens; above: sampled from logits divided by it.
        seed: of the sampling.

    Raises:
        ValueError: markers and images are not as many, a picture cannot be read, or the model cannot be generated with.
    """
    text = prompt if IMAGE_MARK in prompt else f"{IMAGE_MARK}\n" * len(images) + prompt
    encoded = processor.encode([Turn(role="user", text=text)], images, add_generation_prompt=True)
    batch = ConversationCollator(processor, "left")([encoded])
    device = model.device
    batch = {
        name: value.to(device, model.dtype if value.is_floating_point() else None) for name, value in batch.items()
    }
    made = generate_tokens(
        model,
        batch,
        max_new_tokens=max_new_tokens,
        generation_config=_settings(model, processor, temperature),
        generator=torch.Generator(device).manual_seed(seed),
    )
    new = made.sequences[0, batch["input_ids"].shape[1] :]
    return Answer(processor.tokenizer.decode(new, skip_special_tokens=True).strip(), made)


def _settings(model: Any, processor: ConversationProcessor, temperature: float) -> GenerationConfig:
    """Ends are the model's and the tokenizer's; without a temperature nothing else of the model's settings counts."""
    own = model.generation_config.eos_token_id
    ends = {*([own] if isinstance(own, int) else own or []), processor.tokenizer.eos_token_id} - {None}
    chosen = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    return GenerationConfig(eos_token_id=sorted(ends) or None, repetition_penalty=1.0, no_repeat_ngram_size=0, **chosen)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are none; no tokenizer reads them
        raise ValueError(f"{name} must be Unicode text, got {text[error.start]!r} at {error.start}") from error


def report(made: Generation, kernel: str) -> str:
    """Return one line on what an answer took."""
    count = int(made.new_tokens[0])
    if made.peak_memory is None:
        held, whose = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "of the process"
    else:
        held, whose = made.peak_memory, "on the GPU"
    speed = f"{made.tokens_per_second:.1f} tokens/s" if count > 1 else "no rate"
    return (
        f"{count} tokens: {1e3 * made.prefill_seconds:.0f} ms to the first, then {speed}; "
        f"peak memory {held / 2**30:.2f} GiB {whose}; {kernel}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer a prompt about pictures with a saved model, and say how fast."""
    quiet()
    parser = argparse.ArgumentParser(prog="gracekit generate", description=main.__doc__)
    parser.add_argument(
        "folder",
        metavar="MODEL_DIR",
        type=Path,
        help="of save_pretrained, save_qat, or gracekit quantize or export in torchao's formats",
    )
    parser.add_argument("--prompt", required=True, help="what to ask; <image> in it says where a picture stands")
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of the answer, at most (default 128)")
    parser.add_argument("--int4", action="store_true", help="round a plain model's decoder to INT4 first")
    parser.add_argument("--group-size", type=int, default=128, help="of --int4 (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="above 0: sample (default: the likeliest tokens)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--processor", type=Path, help="folder of tokenizer and image processor (default: the model's)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to answer")
    given = parser.parse_args(arguments)
    try:
        check_int("max_new_tokens", given.max_new_tokens, low=1)
        check_int("group_size", given.group_size, low=1)
        check_int("seed", given.seed, low=_SEEDS[0], high=_SEEDS[1])
        if check_real("temperature", given.temperature, low=0.0) < _LEAST_TEMPERATURE and given.temperature:
            raise ValueError(f"temperature must be 0 or at least {_LEAST_TEMPERATURE:g}, got {given.temperature:g}")
        _check_text("prompt", given.prompt)
        pictures = [open_image(path) for path in given.image]
        device = RunConfig(device=given.device).torch_device()
        precision = precision_of(given.folder, int4=given.int4)
        processor = processor_of(given.folder, given.processor)
        model = load_model(given.folder, precision, device, group_size=given.group_size).eval()
        said = answer(
            model,
            processor,
            given.prompt,
            pictures,
            max_new_tokens=given.max_new_tokens,
            temperature=given.temperature,
            seed=given.seed,
        )
    except (ValueError, OSError) as error:
        print(f"gracekit generate: error: {error}", file=sys.stderr)
        return 2
    say(said.text)
    say(report(said.generation, kernel_name(model)))
    return 0
