"""What an ablation shows: means with their intervals, paired tests, a table in Markdown and a plot."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from gracekit.recipe.ablate import METHODS, unpack
from gracekit.recipe.experiment import FULL
from gracekit.recipe.paired_tests import holm, mcnemar, mean_interval, paired_t, sign_flip
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
Cell = tuple[str, str]


def label(cell: Cell) -> str:
    """Return a cell's name as people read it.

    Example:
        >>> label(("grace", "int4-qat"))
        'GRACE (all), INT4 QAT'
    """
    return f"{LABELS[cell[0]]}, {cell[1].replace('-', ' ').upper()}"


def pairs(found: Collection[Cell]) -> list[tuple[Cell, Cell]]:
    """Return the comparisons that are made of some cells: what each part adds, and what quantisation costs.

    Which they are does not depend on results, so that none can be picked for its p value.
    """
    made: list[tuple[Cell, Cell]] = [
        ((first, FULL), (second, FULL))
        for first, second in (
            ("gdkd-fixed", "ce"), ("rcka", "ce"), ("gdkd", "gdkd-fixed"), ("grace", "gdkd"), ("grace", "ce"),
            ("kl", "ce"), ("grace", "kl"),
        )
    ]  # fmt: skip
    for qat in reversed([precision for precision in precisions_of(found) if precision.endswith("-qat")]):
        rtn = qat.replace("-qat", "-rtn")
        made += [
            (("ce", rtn), ("ce", FULL)),
            (("ce", qat), ("ce", rtn)),
            (("kl", qat), ("ce", qat)),
            (("grace", qat), ("kl", qat)),
            (("grace", qat), ("ce", qat)),
            (("grace", qat), ("ce", FULL)),
            (("grace", rtn), ("grace", FULL)),
            (("grace", qat), ("grace", rtn)),
            (("grace", qat), ("grace", FULL)),
        ]
    return [pair for pair in made if set(pair) <= set(found)]


def cells(results: dict[str, Any]) -> dict[Cell, dict[int, dict[str, Any]]]:
    """Return the variants of the students by method and precision, then by seed."""
    found: dict[Cell, dict[int, dict[str, Any]]] = {}
    for variant in results["variants"]:
        if "method" in variant:
            found.setdefault((variant["method"], variant["precision"]), {})[variant["seed"]] = variant
    return found


def precisions_of(found: Iterable[Cell]) -> list[str]:
    """Return the precisions of some cells, from BF16 to the fewest bits."""
    quantised = {precision for _, precision in found} - {FULL}
    return [FULL, *sorted(quantised, key=lambda precision: (-int(precision[3]), precision))]


def compare(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each comparison: difference, interval, and p values, with Holm's correction over the comparisons.

    McNemar's test is made within each seed, and corrected over the comparisons of that seed.
    """
    by_cell, count = cells(results), results["questions"]
    rows: list[dict[str, Any]] = []
    for first, second in pairs(by_cell):
        one, other = by_cell[first], by_cell[second]
        differences = [one[seed]["accuracy"] - other[seed]["accuracy"] for seed in sorted(one)]
        interval = mean_interval(differences)
        within = [mcnemar(*(unpack(side[seed]["right"], count) for side in (one, other))) for seed in sorted(one)]
        rows.append(
            {
                "first": list(first),
                "second": list(second),
                "differences": differences,
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "t": paired_t(differences),
                "sign_flip": sign_flip(differences),
                "mcnemar": within,
            }
        )
    for test in ("t", "sign_flip"):
        for row, adjusted in zip(rows, holm([row[test] for row in rows]), strict=True):
            row[f"{test}_holm"] = adjusted
    of_seed = [holm(values) for values in zip(*(row["mcnemar"] for row in rows), strict=True)]
    for index, row in enumerate(rows):
        row["mcnemar_holm"] = [values[index] for values in of_seed]
    return rows


def markdown(results: dict[str, Any]) -> str:
    """Return the report of an ablation as Markdown."""
    by_cell = cells(results)
    options = results["config"]["ablation"]
    teacher = next(variant for variant in results["variants"] if variant["name"] == "teacher")
    precisions = precisions_of(by_cell)
    methods = [method for method in METHODS if (method, FULL) in by_cell]
    head = (
        f"Accuracy in per cent on {results['questions']:,} questions about unseen images: mean over the seeds "
        f"{', '.join(map(str, options['seeds']))} ± the 95 % interval of Student's t. Teacher: "
        f"{_percent(teacher['accuracy'])} of {teacher['questions']:,} questions."
    )
    accuracy = [
        [LABELS[method], *(_mean(by_cell.get((method, precision))) for precision in precisions)] for method in methods
    ]
    titles = ["Student", *(precision.replace("-", " ").upper() for precision in precisions)]
    tests = [
        [
            f"{label(tuple(row['first']))} - {label(tuple(row['second']))}",
            _interval(row["mean"], row["low"]),
            *(f"{_p(row[test])} ({_p(row[f'{test}_holm'])})" for test in ("t", "sign_flip")),
            f"{sum(p < LEVEL for p in row['mcnemar_holm'])} of {len(row['mcnemar_holm'])}",
        ]
        for row in results["comparisons"]
    ]
    beta = [
        [LABELS[method], f"{_average(ends, 'beta'):.2f}", f"{100 * _average(ends, 'saturated_share'):.0f}"]
        for method in methods
        if "beta" in (ends := [variant["end"] for variant in by_cell[method, FULL].values()])[0]
    ]
    ground = [
        [
            name,
            f"{found['count']:,}",
            _percent(found["error_rate"]),
            _number(found["pearson"]),
            _number(found["binned_r2"]),
        ]
        for name, found in results["gate_ground"].items()
    ]
    parts = [
        head,
        table(titles, accuracy),
        "Paired differences in points (p over the seeds; in brackets after Holm's correction over this table), and in how many "
        "seeds McNemar's exact test over the questions is below 0.05 after Holm's correction:",
        table(["Difference", "Points", "t test", "Sign flips", "McNemar"], tests),
        *(
            ["The multiplier at the end of the BF16 finish, and the share of steps in which it sat on a bound:"]
            if beta
            else []
        ),
        *([table(["Student", "beta", "On a bound, %"], beta)] if beta else []),
        f"The teacher's entropy against its errors on the test questions ({len(results['gate_ground']['answers']['bins'])} bins):",
        table(["By", "Count", "Wrong, %", "Pearson", "Binned R²"], ground),
    ]
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


def _average(ends: list[dict[str, float]], name: str) -> float:
    return sum(end[name] for end in ends) / len(ends)


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
