"""`gracekit ablate`: the paper's ablations at the scale of the recipe, over several seeds, each cell a run of the recipe's stages.

Which losses help (the paper's table 3): cross-entropy, with GDKD at a fixed beta, with RCKA, with GDKD under the controller, with
all. What quantisation costs (table 4): QAT alone, with naive distillation, with GRACE, at several widths; and round-to-nearest
of every BF16 student. Students of one seed start from the same weights and see the same data in the same order, so their
differences are paired.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gracekit._checks import check_choice, check_int
from gracekit.recipe.ablation_cells import METHODS, pack
from gracekit.recipe.config import GraceConfig, RecipeConfig, RunConfig, TrainConfig, option
from gracekit.recipe.data import encode
from gracekit.recipe.environment import environment
from gracekit.recipe.experiment import FULL, Student, teacher_variant, train_student
from gracekit.recipe.gate_ground import gate_ground, rest_share, token_entropy
from gracekit.recipe.progress import progress_bars, quiet, say
from gracekit.recipe.runs import Clock, Run, attempt, open_folder, open_run
from gracekit.recipe.stages import only_finite, write_json

_KEPT = ("ce", "kl", "gdkd", "rcka", "beta", "ema", "tau", "saturated_share", "skipped", "rcka_gradient_share")


@dataclass(frozen=True, kw_only=True)
class AblationOptions:
    """What is compared.

    Args:
        seeds: a run each; more may be added to a folder later.
        students: names of METHODS.
        bits: widths of the weights, in the loop of training and rounded to nearest.
        rtn_bits: further widths, rounded to nearest alone.
        bins: of the teacher's entropy, with equally many answers each.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4], metadata={"help": "a run each"})
    students: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"what is trained, of: {' '.join(METHODS)}"}
    )
    bits: list[int] = field(
        default_factory=lambda: [4, 8], metadata={"help": "widths, trained in the loop and rounded"}
    )
    rtn_bits: list[int] = field(default_factory=list, metadata={"help": "further widths, rounded to nearest alone"})
    bins: int = option(15, "bins of the teacher's entropy")

    def __post_init__(self) -> None:
        for name in ("seeds", "students", "bits"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one, got {name}=[]")
        for name, low, high in (("seeds", 0, None), ("bits", 2, 8), ("rtn_bits", 2, 8)):
            for value in getattr(self, name):
                check_int(name, value, low=low, high=high)
        for name in self.students:
            check_choice("students", name, METHODS)
        widths = [*self.bits, *self.rtn_bits]
        named: dict[str, list[Any]] = {"seeds": self.seeds, "students": self.students, "bits and rtn_bits": widths}
        for name, values in named.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name} must name each value once, got {values}")
        check_int("bins", self.bins, low=2)


@dataclass(frozen=True, kw_only=True)
class AblationConfig(RecipeConfig):
    """A whole ablation: the settings of its runs, and what is compared."""

    ablation: AblationOptions = field(default_factory=AblationOptions)

    def __post_init__(self) -> None:
        for name, given in (("seed", self.run.seed), ("losses", self.run.losses)):
            if given != getattr(RunConfig(), name):
                raise ValueError(
                    f"{name} is what an ablation goes through (give --seeds and --students), got {name}={given!r}"
                )

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Return the settings that change results and differ; a folder may be given more seeds."""
        return [found for found in super().differences(other) if not found.startswith("ablation.seeds:")]

    def students(self) -> list[Student]:
        """Return the students of one seed."""
        options = self.ablation
        rounded = [f"int{bits}-rtn" for bits in sorted([*options.bits, *options.rtn_bits], reverse=True)]
        trained = [f"int{bits}-qat" for bits in sorted(options.bits, reverse=True)]
        return [
            Student(
                name=name,
                losses=losses,
                grace=replace(self.grace, eta=0.0) if name == "gdkd-fixed" else self.grace,
                precisions=(FULL, *rounded, *(trained if quantised else ())),
            )
            for name, (losses, quantised) in METHODS.items()
            if name in options.students
        ]


def parse(arguments: Sequence[str] | None) -> AblationConfig:
    """Return the settings of a command line; a bad one ends the program with a line that says why."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        (AblationOptions, RunConfig, TrainConfig, GraceConfig), prog="gracekit ablate", description=main.__doc__
    )
    parser.set_defaults(output="runs/ablation")
    try:
        ablation, run, train, grace = parser.parse_args_into_dataclasses(args=arguments)
        config = AblationConfig(ablation=ablation, run=run, train=train, grace=grace)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    return config


def run_ablation(config: AblationConfig, folder: Path) -> dict[str, Any]:
    """Run, or go on with, an ablation in its folder and return its results."""
    clock = Clock(folder / "seconds.json")
    with progress_bars() as bars, clock("teacher"):
        run = open_run(config, folder, bars, held_out=True)
    variants = [teacher_variant(run.teacher_path)]
    seconds = dict(clock.seconds)
    plan = [(seed, student) for seed in config.ablation.seeds for student in config.students()]
    for turn, (seed, student) in enumerate(plan, start=1):
        say(f"Seed {seed}, {student.name} ({turn} of {len(plan)})")
        home = folder / f"seed-{seed}"
        home.mkdir(exist_ok=True)
        own = Clock(home / "seconds.json")
        kept = home / "cells" / f"{student.name}.json"  # with them nothing of a student need be loaded again
        if not kept.is_file():
            with progress_bars() as bars:
                settings = RecipeConfig(run=replace(config.run, seed=seed), train=config.train, grace=student.grace)
                found = train_student(replace(run, config=settings, folder=home, bars=bars), student, own)
            kept.parent.mkdir(exist_ok=True)
            write_json(kept, [_cell(run, student, variant, home) for variant in found])
        variants += json.loads(kept.read_text(encoding="utf-8"))
        seconds[f"seed-{seed}"] = round(sum(own.seconds.values()), 2)
    results: dict[str, Any] = only_finite(
        {
            "environment": environment(run.device),
            "config": config.as_dict() | {"student": asdict(run.size), "finish_steps": config.train.finish},
            "variants": variants,
            "questions": len(run.test.questions),
            **teacher_ground(run, config.ablation.bins, config.grace.temperature),
            "seconds": seconds,
        }
    )
    return results


def _cell(run: Run, student: Student, variant: dict[str, Any], home: Path) -> dict[str, Any]:
    """Return a variant with the questions it has right, and the end of its history in place of all of it."""
    answers = json.loads((home / "answers" / f"{variant['name']}.json").read_text(encoding="utf-8"))["answers"]
    right = [given == question.answer for given, question in zip(answers, run.test.questions, strict=True)]
    last = variant.pop("history")[-1]
    end = {name: last[name] for name in _KEPT if name in last}
    return variant | {"method": student.name, "end": end, "right": pack(right)}


def teacher_ground(run: Run, bins: int, temperature: float) -> dict[str, Any]:
    """Return how the teacher's entropy and its errors on the test questions go together, by answer and by token.

    An answer's entropy is the sum over its tokens, its end included; it is wrong if the likeliest class of one of them is.
    ``rest_share`` is what the teacher leaves to other classes than the answer's at ``temperature``, in the mean over the tokens.
    """
    assert run.held_out is not None
    answered = encode(
        run.tokenizer,
        [question.answer for question in run.test.questions],
        open_vocabulary=run.test.open_vocabulary,
    )
    rows = [[*ids, run.tokenizer.eos_token_id] for ids in answered]
    targets = torch.tensor([token for row in rows for token in row])
    logits = run.held_out.logits
    entropy, wrong = token_entropy(logits), logits.argmax(-1) != targets
    answer = torch.tensor([index for index, row in enumerate(rows) for _ in row])
    by_answer = torch.zeros(len(rows)).index_add(0, answer, entropy)
    answer_wrong = torch.zeros(len(rows)).index_add(0, answer, wrong.float()) > 0
    return {
        "gate_ground": {
            "answers": asdict(gate_ground(by_answer, answer_wrong, bins=min(bins, len(rows)))),
            "tokens": asdict(gate_ground(entropy, wrong, bins=min(bins, len(rows)))),
        },
        "rest_share": rest_share(logits, targets, temperature),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the paper's ablations at the recipe's scale, over several seeds."""
    from gracekit.recipe.ablation_report import write_report
    from gracekit.recipe.comparisons import compare

    quiet()
    config = parse(arguments)
    output = Path(config.run.output)
    try:
        teacher_variant(config.run.teacher)
        finished = open_folder(config) is None
    except (ValueError, OSError) as error:
        print(f"gracekit ablate: error: {error}", file=sys.stderr)
        return 2
    if finished:
        done = json.loads((output / "results.json").read_text(encoding="utf-8"))["config"]["ablation"]["seeds"]
        if set(config.ablation.seeds) <= set(done):
            say(f"This ablation is finished; nothing was done. Its report: {output / 'ablation.md'}")
            return 0
        missing = [seed for seed in config.ablation.seeds if seed not in done]
        config = replace(config, ablation=replace(config.ablation, seeds=[*done, *missing]))

    def work() -> None:
        write_json(output / "config.json", config.as_dict())
        results = run_ablation(config, output)
        results |= {"comparisons": only_finite(compare(results))}
        write_report(output, results)
        # Last, because this file is what makes the ablation a finished one.
        write_json(output / "results.json", results)
        say(f"Report: {output / 'ablation.md'}, {output / 'ablation.png'}; results: {output / 'results.json'}")

    return attempt("ablate", work)
