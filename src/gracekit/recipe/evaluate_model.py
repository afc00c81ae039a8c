"""`gracekit evaluate`: how many questions of a held-out set a saved model answers right, in the precision it is to run in.

The set is in the LLaVA conversation format. Every answer in it is a question of its own: the model is given all that stands before
that answer, the true earlier answers included. Answers are kept as they come, so an interrupted evaluation goes on where it was,
and another metric of the same answers costs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from gracekit._checks import check_int
from gracekit.quant import LSQConfig, convert, load_qat, quantize_rtn
from gracekit.recipe.batches import ConversationCollator
from gracekit.recipe.config import RunConfig
from gracekit.recipe.environment import environment
from gracekit.recipe.experiment import kernel_name
from gracekit.recipe.processors import ConversationProcessor, load_processor
from gracekit.recipe.progress import progress_bars, quiet, say
from gracekit.recipe.quantize import class_of, load
from gracekit.recipe.questions import METRICS, Asked, read_questions
from gracekit.recipe.record_format import IMAGE_MARK
from gracekit.recipe.stages import write_json

PRECISIONS = ("bf16", "fp32", "fake", "int4-rtn", "int4")
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
) -> Iterator[tuple[Asked, str]]:
    """Give a model's answers by greedy ``generate``, as each batch is done.

    Questions of similar length go together, padded on the left; so they come in another order than they are given.

    Args:
        model: as :func:`load_model` returns it.
        processor: of the model.
        questions: to ask.
        batch_size: at a time.
        max_new_tokens: an answer's length at most.
    """
    model.eval()
    parameter = next(model.parameters())
    collate = ConversationCollator(processor, "left")
    ends = _ends(model, processor)
    pad = processor.tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=pad if pad is not None else ends[0],
    )
    for first in range(0, len(questions), batch_size * _WINDOW):
        window = [(_encode(processor, asked), asked) for asked in questions[first : first + batch_size * _WINDOW]]
        window.sort(key=lambda pair: len(pair[0]["input_ids"]))
        for start in range(0, len(window), batch_size):
            part = window[start : start + batch_size]
            batch = collate([encoded for encoded, _ in part])
            del batch["labels"]
            for name, value in batch.items():
                batch[name] = value.to(parameter.device, model.dtype if value.is_floating_point() else None)
            made = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(made, skip_special_tokens=True)
            yield from ((asked, text.strip()) for (_, asked), text in zip(part, texts, strict=True))


def _encode(processor: ConversationProcessor, asked: Asked) -> dict[str, torch.Tensor]:
    turns = asked.record.turns[: asked.turn]
    seen = sum(turn.text.count(IMAGE_MARK) for turn in turns)
    return processor.encode(turns, asked.record.images[:seen], add_generation_prompt=True)


def _ends(model: Any, processor: ConversationProcessor) -> list[int]:
    """Tokens that end an answer: the model's own, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = [own] if isinstance(own, int) else list(own or [])
    return sorted({*own, processor.tokenizer.eos_token_id} - {None})


def open_answers(output: Path, settings: dict[str, Any]) -> dict[tuple[int, int], str]:
    """Return the answers that an interrupted evaluation has left in its folder, which is made if absent.

    Raises:
        FileExistsError: the folder holds something else, or answers of another model or to another set.
    """
    described, kept = output / "settings.json", output / "answers.jsonl"
    if not described.is_file():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(f"output must be a new or empty folder, got {str(output)!r}, which holds something")
        output.mkdir(parents=True, exist_ok=True)
        write_json(described, settings)
    there = json.loads(described.read_text(encoding="utf-8"))
    if there != (asked := json.loads(json.dumps(settings))):
        different = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
        raise FileExistsError(
            f"output must be a new folder or an evaluation of the same, got {str(output)!r} with another {', '.join(different)}"
        )
    if not kept.is_file():
        return {}
    # What follows the last line break was being written when the run ended.
    whole, _, rest = kept.read_bytes().rpartition(b"\n")
    if rest:
        kept.write_bytes(whole + b"\n" if whole else b"")
    lines = [json.loads(line) for line in whole.splitlines()]
    return {(line["record"], line["turn"]): line["answer"] for line in lines}


def evaluate(
    folder: Path,
    questions: Sequence[Asked],
    output: Path,
    settings: dict[str, Any],
    *,
    metric: str,
    device: torch.device,
    processor: Path | None = None,
) -> dict[str, Any]:
    """Ask what has not been asked yet, and return, and write, the result.

    Args:
        folder: the model's.
        questions: of the set.
        output: folder of answers.jsonl and result.json.
        settings: "precision", "group_size", "batch_size", "max_new_tokens", and whatever else must be the same to go on.
        metric: one of METRICS.
        device: where to answer.
        processor: folder of the processor; None: the model's.
    """
    done = open_answers(output, settings)
    missing = [asked for asked in questions if asked.key not in done]
    if missing:
        reader = load_processor(processor or folder)
        model = load_model(folder, settings["precision"], device, group_size=settings["group_size"])
        write_json(output / "kernel.json", {"kernel": kernel_name(model)})
        with progress_bars() as bars, (output / "answers.jsonl").open("a", encoding="utf-8") as file:
            task = bars.add_task("answer", total=len(questions), completed=len(done))
            sizes = {name: settings[name] for name in ("batch_size", "max_new_tokens")}
            for asked, text in answer(model, reader, missing, **sizes):
                done[asked.key] = text
                line = {"record": asked.record.index, "turn": asked.turn, "id": asked.record.id, "answer": text}
                file.write(json.dumps(line) + "\n")
                file.flush()
                bars.advance(task)
    scores = [asked.score(metric, done[asked.key]) for asked in questions]
    mean = math.fsum(scores) / len(scores)
    result = {
        "environment": environment(device),
        "settings": settings,
        "kernel": json.loads((output / "kernel.json").read_text(encoding="utf-8"))["kernel"],
        "metric": metric,
        "accuracy": mean,
        "standard_error": math.sqrt(math.fsum((score - mean) ** 2 for score in scores)) / len(scores),
        "questions": len(scores),
        "scores": scores,
    }
    write_json(output / "result.json", result)
    return result


def describe(given: argparse.Namespace) -> dict[str, Any]:
    """Return what must be the same for an evaluation to go on: model, data and how it is asked."""
    weights = sorted(given.folder.glob("*.safetensors"))
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights]
    with given.data.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    names = ("precision", "group_size", "batch_size", "max_new_tokens")
    return {"model": str(given.folder), "weights": stamps, "data": str(given.data), "data_sha256": digest} | {
        name: getattr(given, name) for name in names
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask a saved model the questions of a held-out set, and say how many answers are right."""
    quiet()
    parser = argparse.ArgumentParser(prog="gracekit evaluate", description=main.__doc__)
    parser.add_argument(
        "folder", metavar="MODEL_DIR", type=Path, help="of save_pretrained, save_qat or gracekit export"
    )
    parser.add_argument("--data", required=True, type=Path, help="JSON or JSONL in the LLaVA conversation format")
    parser.add_argument("--images", type=Path, help="where relative paths of images start (default: the data's folder)")
    parser.add_argument("--metric", choices=METRICS, default="exact", help="what an answer is worth (default exact)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="what to answer with (default bf16)")
    parser.add_argument("--output", type=Path, default=Path("runs/evaluate"), help="folder; resumed if unfinished")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at a time (default 8)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer, at most (default 32)")
    parser.add_argument("--group-size", type=int, default=128, help="of int4-rtn (default 128)")
    parser.add_argument("--processor", type=Path, help="folder of the processor (default: the model's)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to answer")
    parser.add_argument(
        "--on-bad-record", choices=["stop", "skip"], default="stop", help="default: stop, with all listed"
    )
    given = parser.parse_args(arguments)
    try:
        for name in ("batch_size", "max_new_tokens", "group_size"):
            check_int(name, getattr(given, name), low=1)
        device = RunConfig(device=given.device).torch_device()
        questions = read_questions(given.data, given.images, given.on_bad_record)
        for asked in questions:  # before any work: can the metric be had of every question?
            asked.score(given.metric, "")
        result = evaluate(
            given.folder,
            questions,
            given.output,
            describe(given),
            metric=given.metric,
            device=device,
            processor=given.processor,
        )
    except (ValueError, OSError) as error:
        print(f"gracekit evaluate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("Interrupted; the same command goes on with the questions that are left.")
        return 130
    say(
        f"{100 * result['accuracy']:.2f} % ({given.metric}) of {result['questions']:,} questions, standard error "
        f"{100 * result['standard_error']:.2f}; {given.precision}, {result['kernel']}. Written: {given.output / 'result.json'}"
    )
    return 0
