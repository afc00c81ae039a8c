"""RelationalCKA against the paper's loop over images: time, memory and their ratios, forward and backward.

python benchmarks/bench_relational_cka.py                  # on CUDA: 64 images of 576 tokens, one of 16,384; d=4096 and 5120
python benchmarks/bench_relational_cka.py --device cpu     # float32, sizes for two cores
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import _harness
import reference

import gracekit


def problem(lengths, student, teacher, device, dtype):
    torch.manual_seed(0)
    total = sum(lengths)
    shared = torch.randn(total, 32, device=device)
    sides = [
        shared @ torch.randn(32, d, device=device) / 6 + torch.randn(total, d, device=device)
        for d in (student, teacher)
    ]
    return sides[0].to(dtype).requires_grad_(), sides[1].to(dtype)


def variants(lengths, compiled: bool) -> dict:
    criterion = gracekit.RelationalCKA()

    def paper(x, y):
        return reference.paper_relational(list(x.split(lengths)), list(y.split(lengths)))

    found = {"paper": paper}
    if compiled:
        found["paper, torch.compile"] = torch.compile(paper)
    return found | {"gracekit": lambda x, y: criterion(x, y, lengths)}


def bench(lengths, widths, device, dtype, runs, compiled):
    inputs = problem(lengths, *widths, device, dtype)
    rows, values = [], {}
    for name, loss in variants(lengths, compiled).items():
        values[name] = loss(*inputs).item()
        row = {
            "variant": name,
            "images": len(lengths),
            "tokens": sum(lengths),
            "longest": max(lengths),
            "dtype": str(dtype),
        }
        row["value"] = round(values[name], 6)

        def step(loss=loss):
            return torch.autograd.grad(loss(*inputs), inputs[0])

        row |= _harness.measure(step, device, runs=runs)
        if rows:
            row["times_faster_than_paper"] = round(rows[0]["median_ms"] / row["median_ms"], 2)
        _harness.show(row)
        rows.append(row)
    assert abs(values["gracekit"] - values["paper"]) < 5e-3, f"the variants disagree: {values}"
    return rows


def main() -> None:
    options = _harness.parser(__doc__.splitlines()[0]).parse_args()
    cuda = options.device == "cuda"
    widths = (4096, 5120) if cuda else (256, 320)
    dtype = torch.bfloat16 if cuda else torch.float32
    shapes = {"equal": [64] * 8, "mixed": [36, 144, 256, 75] * 4, "large": [1024]}
    if cuda:
        shapes = {"equal": [576] * 64, "mixed": [144, 576, 1024, 300] * 16, "large": [16_384]}
    rows = []
    for name, lengths in shapes.items():
        found = bench(lengths, widths, options.device, dtype, options.runs, compiled=cuda and name == "large")
        rows += [{"case": name, **row} for row in found]
    _harness.write(
        "relational_cka", options.device, {"d_student": widths[0], "d_teacher": widths[1], "rows": rows}, options.output
    )


if __name__ == "__main__":
    main()
