"""gated_dkd against the formula as the paper writes it: time, memory and their ratios, forward and backward.

python benchmarks/bench_gated_dkd.py                       # on CUDA: N=4096, V=151,936, bfloat16, and curves in N and V
python benchmarks/bench_gated_dkd.py --device cpu          # float32, a size for two cores
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import _harness
import reference

import gracekit


def step(loss, student, teacher, labels):
    """Forward and backward to the student's logits."""

    def run():
        (gradient,) = torch.autograd.grad(loss(student, teacher, labels), student)
        return gradient

    return run


def variants(device: str, compiled: bool) -> dict:
    found = {"paper": reference.paper_gated_dkd, "paper, line by line": reference.paper_gated_dkd_line_by_line}
    if compiled:
        found["paper, torch.compile"] = torch.compile(reference.paper_gated_dkd)
    found["gracekit torch"] = lambda *inputs: gracekit.gated_dkd(*inputs, backend="torch")
    if device == "cuda":
        found["gracekit triton"] = lambda *inputs: gracekit.gated_dkd(*inputs, backend="triton")
    return found


def problem(count: int, classes: int, device: str, dtype: torch.dtype):
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(count, classes, device=device, dtype=dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(classes, (count,), device=device)


def bench(
    count: int, classes: int, device: str, dtype: torch.dtype, runs: int, names: dict, bandwidth: float
) -> list[dict]:
    inputs = problem(count, classes, device, dtype)
    values, rows = {}, []
    for name, loss in names.items():
        row = {"variant": name, "N": count, "V": classes, "dtype": str(dtype)}
        try:
            values[name] = loss(*inputs).item()
            row |= {"value": round(values[name], 6), **_harness.measure(step(loss, *inputs), device, runs=runs)}
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
            torch.cuda.empty_cache()
            rows.append(row)
            continue
        if rows and "failed" not in rows[0]:
            row["times_faster_than_paper"] = round(rows[0]["median_ms"] / row["median_ms"], 2)
            row["memory_of_paper"] = round(row["peak_mib"] / rows[0]["peak_mib"], 4)
        if len(rows) > 1 and rows[1]["variant"] == "paper, line by line" and "failed" not in rows[1]:
            row["times_faster_than_line_by_line"] = round(rows[1]["median_ms"] / row["median_ms"], 2)
        if device == "cuda":
            limit = 5 * count * classes * inputs[0].element_size() / bandwidth * 1e3
            row |= {"traffic_limit_ms": round(limit, 4), "times_traffic_limit": round(row["median_ms"] / limit, 3)}
            row["gradient_mib"] = round(inputs[0].numel() * inputs[0].element_size() / 2**20, 1)
        _harness.show(row)
        rows.append(row)
    first = next(iter(values.values()))
    assert all(abs(value - first) < 2e-3 * abs(first) for value in values.values()), f"the variants disagree: {values}"
    return rows


def main() -> None:
    parser = _harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="N (default 4096 on CUDA, 256 on the CPU)")
    parser.add_argument("--classes", type=int, help="V (default 151,936 on CUDA, 32,000 on the CPU)")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    count, classes = options.rows or (4096 if cuda else 256), options.classes or (151_936 if cuda else 32_000)
    dtype = torch.bfloat16 if cuda else torch.float32
    bandwidth = _harness.copy_bandwidth(options.device)
    names = variants(options.device, compiled=cuda)
    rows = bench(count, classes, options.device, dtype, options.runs, names, bandwidth)
    curves = []
    if cuda:
        few = {name: names[name] for name in ("paper", "gracekit triton")}
        for n in (256, 1024, 16_384):
            curves += bench(n, classes, "cuda", dtype, 5, few, bandwidth)
        for v in (32_000, 50_257, 256_000):
            curves += bench(count, v, "cuda", dtype, 5, few, bandwidth)
    payload = {"copy_bandwidth_gb_s": round(bandwidth / 1e9, 1), "rows": rows, "curves": curves}
    _harness.write("gated_dkd", options.device, payload, options.output)


if __name__ == "__main__":
    main()
