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
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gracekit._checks import check_int
from gracekit.recipe.answering import ENGINES, PRECISIONS, answer, load_model
from gracekit.recipe.config import RunConfig
from gracekit.recipe.environment import environment
from gracekit.recipe.experiment import kernel_name
from gracekit.recipe.processors import load_processor
from gracekit.recipe.progress import progress_bars, quiet, say
from gracekit.recipe.questions import METRICS, Asked, read_questions
from gracekit.recipe.stages import write_json


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
    written = kept.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    os.truncate(kept, len(whole))
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
        settings: "precision", "group_size", "batch_size", "max_new_tokens", "engine", and whatever else must be the same to go on.
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
            sizes = {name: settings[name] for name in ("batch_size", "max_new_tokens", "engine")}
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
    names = ("precision", "group_size", "batch_size", "max_new_tokens", "engine")
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
    parser.add_argument(
        "--engine", choices=ENGINES, default="transformers", help="what generates (default transformers)"
    )
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
