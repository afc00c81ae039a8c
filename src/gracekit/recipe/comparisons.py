"""Which cells of an ablation are compared, and how: paired by seed, and by question within a seed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from gracekit.recipe.ablation_cells import unpack
from gracekit.recipe.experiment import FULL
from gracekit.recipe.paired_tests import holm, mcnemar, mean_interval, paired_t, sign_flip

Cell = tuple[str, str]  # a student of METHODS, and a precision


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
