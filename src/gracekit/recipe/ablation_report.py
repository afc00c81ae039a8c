"""What an ablation shows: means with their intervals, paired tests, tables in Markdown and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from gracekit.recipe.ablation_cells import METHODS
from gracekit.recipe.comparisons import Cell, cells, precisions_of
from gracekit.recipe.experiment import FULL
from gracekit.recipe.paired_tests import mean_interval
from gracekit.recipe.report import COLOURS
from gracekit.recipe.stages import write_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LABELS = {
    "ce": "CE",
    "gdkd-fixed": "CE + GDKD, fixed beta",
    "rcka": "CE + RCKA",
    "gdkd": "CE + GDKD, controller",
    "grace": "GRACE (all)",
    "kl": "CE + KL (naive)",
}
LEVEL = 0.05


def label(cell: Cell) -> str:
    """Return a cell's name as people read it.

    Example:
        >>> label(("grace", "int4-qat"))
        'GRACE (all), INT4 QAT'
    """
    return f"{LABELS[cell[0]]}, {cell[1].replace('-', ' ').upper()}"


def heading(results: dict[str, Any]) -> str:
    """Return one line on what the accuracies are of."""
    teacher = next(variant for variant in results["variants"] if variant["name"] == "teacher")
    return (
        f"Accuracy in per cent on {results['questions']:,} questions about unseen images: mean over the seeds "
        f"{', '.join(map(str, results['config']['ablation']['seeds']))} ± the 95 % interval of Student's t. Teacher: "
        f"{_percent(teacher['accuracy'])} of {teacher['questions']:,} questions."
    )


def tables(results: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Return the tables of a report as text, titles first: "accuracy", "comparisons", "training" and "ground"."""
    by_cell = cells(results)
    precisions = precisions_of(by_cell)
    methods = [method for method in METHODS if (method, FULL) in by_cell]
    ends = {method: [variant["end"] for variant in by_cell[method, FULL].values()] for method in methods}
    return {
        "accuracy": [
            ["Student", *(precision.replace("-", " ").upper() for precision in precisions)],
            *(
                [LABELS[method], *(_mean(by_cell.get((method, precision))) for precision in precisions)]
                for method in methods
            ),
        ],
        "comparisons": [
            ["Difference", "Points", "t test", "Sign flips", "McNemar"],
            *(
                [
                    f"{label(tuple(row['first']))} - {label(tuple(row['second']))}",
                    _interval(row["mean"], row["low"]),
                    *(f"{_p(row[test])} ({_p(row[f'{test}_holm'])})" for test in ("t", "sign_flip")),
                    f"{sum(p < LEVEL for p in row['mcnemar_holm'])} of {len(row['mcnemar_holm'])}",
                ]
                for row in results["comparisons"]
            ),
        ],
        "training": [
            ["Student", "Cross-entropy", "KL", "L_GDKD", "L_RCKA", "beta", "On a bound, %"],
            *(
                [
                    LABELS[method],
                    *(_average(ends[method], part) for part in ("ce", "kl", "gdkd", "rcka", "beta")),
                    _average(ends[method], "saturated_share", 100, ".0f"),
                ]
                for method in methods
            ),
        ],
        "ground": [
            ["By", "Count", "Wrong, %", "Pearson", "Binned R²"],
            *(
                [
                    name,
                    f"{found['count']:,}",
                    _percent(found["error_rate"]),
                    _number(found["pearson"]),
                    _number(found["binned_r2"]),
                ]
                for name, found in results["gate_ground"].items()
            ),
        ],
    }


CAPTIONS = {
    "comparisons": "Paired differences in points (p over the seeds; in brackets after Holm's correction over this table), and in "
    "how many seeds McNemar's exact test over the questions is below 0.05 after Holm's correction:",
    "training": "Losses and multiplier at the end of the BF16 finish, means over the seeds, and the share of steps in which the "
    "multiplier sat on a bound:",
    "ground": "The teacher's entropy against its errors on the test questions, in bins of equally many:",
}


def markdown(results: dict[str, Any]) -> str:
    """Return the report of an ablation as Markdown."""
    parts = [heading(results)]
    for name, (titles, *rows) in tables(results).items():
        parts += [CAPTIONS[name]] if name in CAPTIONS else []
        parts.append(table(titles, rows))
    return "\n\n".join(parts) + "\n"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write ablation.md and ablation.png."""
    write_text(folder / "ablation.md", markdown(results))
    figure = plot(results)
    figure.savefig(folder / "ablation.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot(results: dict[str, Any]) -> Any:
    """Return the figure: losses in BF16, precisions of the quantised students, and the teacher's entropy against its errors."""
    by_cell = cells(results)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    methods = [method for method in METHODS if (method, FULL) in by_cell]
    for place, method in enumerate(methods):
        _mark(left, place, by_cell[method, FULL], _colour(method))
    left.set_xticks(range(len(methods)), [LABELS[method].replace(", ", "\n") for method in methods], fontsize=7)
    left.set(title="Losses, BF16", ylabel="accuracy, %")
    trained = [method for method in methods if METHODS[method][1]]
    shown = precisions_of(by_cell)
    for shift, method in zip((-0.15, 0.0, 0.15), trained, strict=False):
        for place, precision in enumerate(shown):
            name = LABELS[method] if not place else None
            _mark(middle, place + shift, by_cell[method, precision], _colour(method), name)
    middle.set_xticks(range(len(shown)), [precision.replace("-", "\n").upper() for precision in shown], fontsize=7)
    middle.set(title="Precisions", ylabel="accuracy, %")
    middle.legend(fontsize=7)
    ground = results["gate_ground"]["answers"]
    entropy, errors, _ = zip(*ground["bins"], strict=True)
    right.plot(entropy, [100 * error for error in errors], "o", color="black")
    right.set(
        title=f"Teacher: Pearson {_number(ground['pearson'])}, binned R² {_number(ground['binned_r2'])}",
        xlabel="entropy of its answers, nats (mean of a bin)",
        ylabel="wrong, %",
    )
    return figure


def _mark(axis: Any, place: float, by_seed: dict[int, dict[str, Any]], colour: str, name: str | None = None) -> None:
    values = [100 * variant["accuracy"] for variant in by_seed.values()]
    mean, low, _ = mean_interval(values)
    axis.plot([place] * len(values), values, ".", color=colour, alpha=0.4, ms=5)
    half = 0.0 if math.isnan(low) else mean - low
    axis.errorbar([place], [mean], yerr=[half], fmt="_", color=colour, capsize=3, ms=11, label=name)


def _colour(method: str) -> str:
    return COLOURS[METHODS[method][0]]


def _mean(by_seed: dict[int, dict[str, Any]] | None) -> str:
    if by_seed is None:
        return ""
    mean, low, _ = mean_interval([variant["accuracy"] for variant in by_seed.values()])
    return _interval(mean, low, sign="")


def _interval(mean: float, low: float | None, sign: str = "+") -> str:
    known = low is not None and not math.isnan(low)
    return f"{100 * mean:{sign}.2f}" + (f" ± {100 * (mean - low):.2f}" if known else "")  # type: ignore[operator]


def _average(ends: list[dict[str, float | None]], name: str, scale: float = 1.0, form: str = ".3f") -> str:
    if name not in ends[0]:
        return ""
    values = [value for end in ends if (value := end[name]) is not None]
    return format(scale * sum(values) / len(values), form) if len(values) == len(ends) else "-"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
