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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gracekit._checks import check_int
from gracekit.recipe.answering import (
    ENGINES,
    PRECISIONS,
    answer,
    check_precision,
    load_model,
    precision_of,
    processor_of,
)
from gracekit.recipe.bad_records import BAD_RECORDS, count_kinds, left_out
from gracekit.recipe.config import RunConfig
from gracekit.recipe.digests import model_files
from gracekit.recipe.environment import environment
from gracekit.recipe.experiment import kernel_name
from gracekit.recipe.kept_answers import open_answers, pictures_of
from gracekit.recipe.processors import ConversationProcessor
from gracekit.recipe.progress import progress_bars, quiet, say
from gracekit.recipe.questions import METRICS, Questions, read_questions
from gracekit.recipe.stages import write_json


def evaluate(
    folder: Path,
    questions: Questions,
    output: Path,
    settings: dict[str, Any],
    *,
    metric: str,
    device: torch.device,
    processor: ConversationProcessor,
) -> dict[str, Any]:
    """Ask what has not been asked yet, and return, and write, the result.

    Args:
        folder: the model's.
        questions: of the set.
        output: folder of answers.jsonl and result.json.
        settings: "precision", "group_size", "batch_size", "max_new_tokens", "engine", and whatever else must be the same to go on.
        metric: one of METRICS.
        device: where to answer.
        processor: of the model.

    Raises:
        FileExistsError: the folder holds something else, or answers of another model, to another set or about other pictures.
    """
    done = open_answers(output, settings)
    pictures = pictures_of(questions, done, output)
    kernel = output / "kernel.json"
    missing = [asked for asked in questions if asked.key not in done]
    if missing:
        model = load_model(folder, settings["precision"], device, group_size=settings["group_size"])
        write_json(kernel, {"kernel": kernel_name(model)})
        with progress_bars() as bars, (output / "answers.jsonl").open("a", encoding="utf-8") as file:
            task = bars.add_task("answer", total=len(questions), completed=len(questions) - len(missing))
            sizes = {name: settings[name] for name in ("batch_size", "max_new_tokens", "engine")}
            for asked, text in answer(model, processor, missing, **sizes):
                line = {
                    "record": asked.record.index,
                    "turn": asked.turn,
                    "id": asked.record.id,
                    "pictures": pictures[asked.record.index],
                    "answer": text,
                }
                done[asked.key] = line
                file.write(json.dumps(line) + "\n")
                file.flush()
                bars.advance(task)
    scores = [asked.score(metric, done[asked.key]["answer"]) for asked in questions]
    mean = math.fsum(scores) / len(scores)
    result = {
        "environment": environment(device),
        "settings": settings,
        # Without the file nobody knows: the model that would be loaded now may be on another device.
        "kernel": json.loads(kernel.read_text(encoding="utf-8"))["kernel"] if kernel.is_file() else None,
        "metric": metric,
        "accuracy": mean,
        "standard_error": math.sqrt(math.fsum((score - mean) ** 2 for score in scores)) / len(scores),
        "questions": len(scores),
        "scores": scores,
        "records": questions.total,
        "bad_records": {
            "count": len(questions.bad),
            "kinds": count_kinds(questions.bad),
            "file": BAD_RECORDS if questions.bad else None,
        },
    }
    write_json(output / "result.json", result)
    return result


def describe(given: argparse.Namespace) -> dict[str, Any]:
    """Return what must be the same for an evaluation to go on: model, data and how it is asked."""
    paths = {name: getattr(given, name) for name in ("images", "processor")}
    names = ("precision", "group_size", "batch_size", "max_new_tokens", "engine", "on_bad_record")
    described = {
        "model": str(given.folder.resolve()),
        "model_files": model_files(given.folder),
        "data": str(given.data.resolve()),
        "data_sha256": digest(given.data),
        **{name: None if path is None else str(path.resolve()) for name, path in paths.items()},
        "processor_files": {} if given.processor is None else model_files(given.processor, weights=False),
    }
    return described | {name: getattr(given, name) for name in names}


def digest(data: Path) -> str:
    """Return the SHA-256 of a file, or of all files of a data set that ``datasets`` saved.

    Raises:
        ValueError: there is no such file or folder.
    """
    if not data.exists():
        raise ValueError(f"data must be a file or a folder that is there, got {str(data)!r}")
    whole = hashlib.sha256()
    for path in sorted(data.glob("*.arrow")) if data.is_dir() else [data]:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask a saved model the questions of a held-out set, and say how many answers are right."""
    quiet()
    parser = argparse.ArgumentParser(prog="gracekit evaluate", description=main.__doc__)
    parser.add_argument(
        "folder",
        metavar="MODEL_DIR",
        type=Path,
        help="of save_pretrained, save_qat, or gracekit quantize or export in torchao's formats",
    )
    parser.add_argument(
        "--data", required=True, type=Path, help="conversations: JSON, JSONL, or a folder that `datasets` saved"
    )
    parser.add_argument("--images", type=Path, help="where relative paths of images start (default: the data's folder)")
    parser.add_argument("--metric", choices=METRICS, default="exact", help="what an answer is worth (default exact)")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="what to answer with (default: int4 or int8 where the folder has codes or learned scales, else bf16)",
    )
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
        "--on-bad-record",
        choices=["stop", "skip"],
        default="stop",
        help="default: stop; both write them to bad_records.jsonl in the output",
    )
    given = parser.parse_args(arguments)
    try:
        for name in ("batch_size", "max_new_tokens", "group_size"):
            check_int(name, getattr(given, name), low=1)
        device = RunConfig(device=given.device).torch_device()
        given.precision = given.precision or precision_of(given.folder)
        check_precision(given.folder, given.precision, device, group_size=given.group_size)
        settings = describe(given)
        open_answers(given.output, settings)  # before any work: may it be written to?
        processor = processor_of(given.folder, given.processor)
        with progress_bars() as bars:
            names, tasks = iter(("data: look at every record", "data: encode every question")), []
            questions = read_questions(
                given.data,
                given.images,
                given.on_bad_record,
                processor=processor,
                metric=given.metric,
                bad_records_file=given.output / BAD_RECORDS,
                begin=lambda count: tasks.append(bars.add_task(next(names), total=count)),
                advance=lambda count: bars.advance(tasks[-1], count),
            )
        if questions.bad:
            say(left_out(questions.bad, questions.total, given.output / BAD_RECORDS))
        result = evaluate(
            given.folder, questions, given.output, settings, metric=given.metric, device=device, processor=processor
        )
    except (ValueError, OSError) as error:
        print(f"gracekit evaluate: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("Interrupted; the same command goes on with the questions that are left.")
        return 130
    say(
        f"{100 * result['accuracy']:.2f} % ({given.metric}) of {result['questions']:,} questions, standard error "
        f"{100 * result['standard_error']:.2f}; {given.precision}, {result['kernel'] or 'kernel unknown'}. "
        f"Written: {given.output / 'result.json'}"
    )
    return 0
