"""A product with a 4-bit weight against the dense one, for many numbers of rows, with the weights coming from memory.

On CUDA: bfloat16 cuBLAS, torchao's tile-packed form (tinygemm), and our kernel as the machine's table has it launched; times
are of CUDA graphs in which copies of the weight that together exceed the cache take turns. On a CPU: float32 and bfloat16 dense
products and torchao's INT4 kernel, copies taking turns as well.

python benchmarks/bench_int4_linear.py                 # on CUDA
python benchmarks/bench_int4_linear.py --weights 4096x11008 --rows 8 16 --add
python benchmarks/bench_int4_linear.py --device cpu
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import _harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gracekit.quant import LSQConfig, convert, quantize_rtn

GROUP = 128
SHAPES = ((11008, 4096), (4096, 11008), (22016, 4096), (12288, 4096), (4096, 4096))
ROWS = {
    "cuda": (
        *(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512, 608, 640, 768, 896, 1024),
        *(1280, 1536, 2048, 4096, 8192),
    ),
    "cpu": (1, 2, 4, 8, 16, 32, 64, 256),
}
CPU_SHAPES = ((11008, 4096), (4096, 11008), (4096, 4096))
BASELINE = "bf16 dense"
TURNS = 2
FORMS = {
    "cuda": {BASELINE: None, "INT4 torchao tile-packed": "cuda", "INT4 gracekit": "triton"},
    "cpu": {BASELINE: None, "fp32 dense": None, "INT4 torchao": "cpu"},
}
CYCLED_BYTES = {"cuda": 0, "cpu": 1 << 29}  # on CUDA twice the cache


def weights(variant: str, form: str | None, shape: tuple[int, int], device: str) -> Iterator[Tensor]:
    """Copies of one random weight in a form, enough that none is found in the cache."""
    torch.manual_seed(0)
    dtype = dtype_of(variant)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype))
    bytes_each = shape[0] * shape[1] * dtype.itemsize
    if form is not None:
        model = convert(quantize_rtn(model, LSQConfig(group_size=GROUP), target="portable"), form)
        bytes_each = packed_bytes(shape)
    cycled = CYCLED_BYTES[device] or 2 * torch.cuda.get_device_properties(0).L2_cache_size
    weight = model[0].weight.detach()
    yield weight
    for _ in range(min(64, cycled // bytes_each)):
        yield weight.clone()


def dtype_of(variant: str) -> torch.dtype:
    """Of the weights and inputs of a variant."""
    return torch.float32 if variant.startswith("fp32") else torch.bfloat16


def packed_bytes(shape: tuple[int, int]) -> int:
    """Codes and scales."""
    return shape[0] * shape[1] // 2 + 2 * shape[0] * shape[1] // GROUP


def time_us(run: Callable[[Tensor], Tensor], copies: list[Tensor], device: str, runs: int) -> list[float]:
    """Microseconds of one product, ``runs`` times."""
    if device == "cpu":
        turn = itertools.cycle(copies)
        for _ in range(2):
            run(next(turn))
        return [1e3 * time for time in _harness._cpu_times(lambda: run(next(turn)), runs)]
    from gracekit.quant._int4_choices import graph_times  # the clock by which the table is made

    return graph_times(run, copies)


def bench(shape: tuple[int, int], counts: list[int], device: str, runs: int, bandwidth: float) -> Iterator[list[dict]]:
    """All variants of one weight, in turns: a device that has just worked hard is slower. For one number of rows after another."""
    limit = packed_bytes(shape) / bandwidth * 1e6
    copies = {name: list(weights(name, form, shape, device)) for name, form in FORMS[device].items()}
    for count in counts:
        times: dict[str, list[float]] = {name: [] for name in copies}
        inputs = {
            dtype: torch.randn(count, shape[1], device=device, dtype=dtype)
            for dtype in {dtype_of(name) for name in copies}
        }
        for turn in range(1 + TURNS):
            for name, weight in copies.items():
                x = inputs[dtype_of(name)]
                if turn == 0:
                    F.linear(x, weight[0])  # measures the machine's choice where that is not known yet
                else:
                    times[name] += time_us(lambda copy, x=x: F.linear(x, copy), weight, device, runs)
                    gc.collect()  # of what torchao's kernel returns, graphs keep the memory until then
        rows, dense = [], statistics.median(times[BASELINE])
        for name, found in times.items():
            row = {"out": shape[0], "in": shape[1], "rows": count, "variant": name}
            row |= {"median_us": round(statistics.median(found), 2), "min_us": round(min(found), 2)}
            row |= {"max_us": round(max(found), 2), "traffic_limit_us": round(limit, 2)}
            row["times_faster_than_bf16"] = round(dense / row["median_us"], 3)
            row["share_of_traffic_limit"] = round(limit / row["median_us"], 3)
            rows.append(row)
            _harness.show(row)
        yield rows


def main() -> None:
    parser = _harness.parser(__doc__)
    parser.add_argument("--weights", nargs="*", help="such as 4096x11008 (default: all)")
    parser.add_argument("--rows", nargs="*", type=int, help="of x (default: all)")
    parser.add_argument("--add", action="store_true", help="keep what was measured today with other weights or rows")
    given = parser.parse_args()
    bandwidth = _harness.copy_bandwidth(given.device, 1024 if given.device == "cuda" else 256)
    about: dict[str, Any] = {"group_size": GROUP, "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1), "rows": []}
    held = _harness.result_path("int4_linear", given.device, given.output) if given.add else None
    counts = [count for count in ROWS[given.device] if not given.rows or count in given.rows]
    shapes = SHAPES if given.device == "cuda" else CPU_SHAPES
    with torch.inference_mode():
        for shape in shapes:
            if given.weights and f"{shape[0]}x{shape[1]}" not in given.weights:
                continue
            made: list[dict] = []
            for rows in bench(shape, counts, given.device, given.runs, bandwidth):
                made += rows  # and is written: what is measured stays if a run is cut short
                about["rows"] = _harness.merged(
                    about["rows"], made, lambda row: (row["out"], row["in"], row["rows"]), held
                )
                about["rows"].sort(key=lambda row: (shapes.index((row["out"], row["in"])), row["rows"]))
                _harness.write("int4_linear", given.device, about, given.output)


if __name__ == "__main__":
    main()
