"""The tables of guide/visual_tokens.rst, made at every build: what the conformance suite found, and what the tap costs."""

from __future__ import annotations

import json
from pathlib import Path

from _results import GENERATED, machine, newest

COSTS = """What it costs
-------------

Forward and backward of one training step, random weights, no optimiser:

"""
SUPPORT = Path(__file__).parent / "guide" / "vlm_support.json"


def list_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", "   :stub-columns: 1", ""]
    for row in [header, *rows]:
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
    return "\n".join(lines) + "\n"


def support() -> str:
    """The families, a column for each thing they were held to, and the reasons of what was not run under it."""
    found = json.loads(SUPPORT.read_text())
    reasons: list[str] = []

    def shown(cell: str) -> str:
        if not cell.startswith("not run: "):
            return cell
        reason = cell.removeprefix("not run: ")
        if reason not in reasons:
            reasons.append(reason)
        return f"not run ({reasons.index(reason) + 1})"

    rows = [
        [f"``{name}``", *(shown(cells.get(column, "")) for column in found["columns"])]
        for name, cells in found["families"].items()
    ]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if name != "gracekit")
    notes = "".join(f"\n({i + 1}) {reason}.\n" for i, reason in enumerate(reasons))
    return f"{list_table(['Family', *found['columns']], rows)}{notes}\nRun on {found['date']} with {versions}.\n"


def costs(device: str) -> str:
    """Time and memory of a training step with the tap and without, on one kind of machine; empty where none was measured."""
    result = newest("visual_tap", device)
    if result is None:
        return ""
    header = ["Model", "Captured by", "Checkpointing", "Median ms", "Least ms", "Peak MiB", "MiB over none"]
    rows = [
        [
            row["model"], row["variant"].replace("output_hidden_states", "``output_hidden_states=True``"),
            "yes" if row["checkpointing"] else "no", f"{row['median_ms']:.1f}", f"{row['min_ms']:.1f}",
            f"{row['peak_mib']:.0f}", f"{row['mib_over_none']:.0f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return f"{list_table(header, rows)}\nMeasured on {machine(result)}.\n\n"


def build() -> None:
    GENERATED.mkdir(exist_ok=True)
    (GENERATED / "vlm_support.rst").write_text(support())
    tables = costs("nvidia") + costs("cpu")
    (GENERATED / "visual_tap.rst").write_text(COSTS + tables if tables else "")
