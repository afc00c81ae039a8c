"""Tokens a second of a LLaVA with random weights: transformers' generate and our loop, dense and with INT4 weights.

On CUDA LLaVA-1.5-7B's shapes, a prompt of 608 tokens (one picture of 576 and 32 of text), 128 new tokens, batches of 1, 16 and 64.
Each variant has the machine to itself: its model is made, timed and let go of. "prefill" is the time to the first token.

python benchmarks/bench_generate.py                 # on CUDA
python benchmarks/bench_generate.py --device cpu    # a LLaVA of eight layers, a prompt of 96 tokens, 32 new ones
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import _harness
import torch
from _models import built, llava_7b, llava_batch, llava_for_cpus

from gracekit.inference import Generator, fuse_projections
from gracekit.quant import LSQConfig, quantize_rtn


class Variant(NamedTuple):
    """``form``: a target of convert; None for dense weights. ``loop``: "transformers" or "gracekit"."""

    name: str
    form: str | None
    loop: str
    fused: bool = False
    compiled: bool = False
    dtype: torch.dtype = torch.bfloat16


BASELINE = "bf16, transformers"
VARIANTS = {
    "cuda": (
        Variant(BASELINE, None, "transformers", compiled=True),
        Variant("bf16, gracekit", None, "gracekit", fused=True),
        Variant("bf16, gracekit, compiled", None, "gracekit", fused=True, compiled=True),
        Variant("INT4 torchao, transformers", "cuda", "transformers", compiled=True),
        Variant("INT4 torchao, gracekit", "cuda", "gracekit", fused=True),
        Variant("INT4 gracekit", "triton", "gracekit", fused=True),
        Variant("INT4 gracekit, compiled", "triton", "gracekit", fused=True, compiled=True),
    ),
    "cpu": (
        Variant(BASELINE, None, "transformers"),
        Variant("fp32, transformers", None, "transformers", dtype=torch.float32),
        Variant("bf16, gracekit", None, "gracekit"),
        Variant("INT4 torchao, transformers", "cpu", "transformers"),
        Variant("INT4 torchao, gracekit", "cpu", "gracekit"),
        Variant("INT4 torchao, gracekit, fused", "cpu", "gracekit", fused=True),
    ),
}
# model, image side, text tokens, new tokens, batches
SETUPS = {"cuda": (llava_7b, 336, 32, 128, (1, 16, 64)), "cpu": (llava_for_cpus, 112, 32, 32, (1, 4))}


def prepared(variant: Variant, make: Callable[[], Any], device: str) -> Any:
    torch.manual_seed(0)
    model = built(make, device, variant.dtype).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    if variant.form is not None:
        quantize_rtn(model, LSQConfig(group_size=128), target=variant.form)
    if variant.fused:
        fuse_projections(model)
    return model


def runner(variant: Variant, model: Any, batch: dict, new: int) -> tuple[Callable[[int], object], Generator | None]:
    """What makes so many new tokens, and our generator where it is the one that does."""
    if variant.loop == "transformers":
        # At its best: a static cache and the decode step compiled, where that is possible.
        cache = {"cache_implementation": "static"} if variant.compiled else {}
        options = {"do_sample": False, "pad_token_id": 0, **cache}
        return lambda count: model.generate(**batch, max_new_tokens=count, min_new_tokens=count, **options), None
    rows, length = batch["input_ids"].shape
    generator = Generator(model, rows, length + new, compile=variant.compiled)
    return lambda count: generator.generate(batch, max_new_tokens=count), generator


def measured(variant: Variant, model: Any, batch: dict, new: int, device: str, runs: int) -> dict[str, Any]:
    run, generator = runner(variant, model, batch, new)
    for _ in range(2):  # compiles, measures what is not known yet, and captures: a prefill at its second time
        run(new)
    whole, first = seconds(lambda: run(new), device, runs), seconds(lambda: run(1), device, runs)
    count = len(batch["input_ids"])
    return {
        "prefill_ms": round(1e3 * first, 2),
        "whole_ms": round(1e3 * whole, 2),
        "tokens_per_second": round(count * new / whole, 2),
        "decode_tokens_per_second": round(count * (new - 1) / (whole - first), 2),
        "peak_beyond_weights_mib": round(_harness.peak_mib(lambda: run(new), device), 1),
        "weights_mib": round(resident(model), 1),
        "cache_mib": round(generator.cache_bytes / 2**20, 1) if generator else None,
    }


def seconds(run: Callable[[], object], device: str, runs: int) -> float:
    """Median of the wall time."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bench(variant: Variant, device: str, runs: int, chosen: list[int] | None) -> Iterator[dict]:
    """The row of one number of prompts after another."""
    make, side, text, new, batches = SETUPS[device]
    model = prepared(variant, make, device)
    for count in chosen or batches:
        batch = llava_batch(model, count, text, side)
        row: dict[str, Any] = {
            "variant": variant.name,
            "batch": count,
            "prompt": batch["input_ids"].shape[1],
            "new": new,
        }
        try:
            row |= measured(variant, model, batch, new, device, runs)
        except Exception as error:  # a peer that fails is a result
            if "gracekit" in variant.name:
                raise
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        _harness.show(row)
        yield row
        gc.collect()


def resident(model: Any) -> float:
    """MiB of all weights, of the tensors inside torchao's ones."""
    total = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        inner = [getattr(tensor, name) for name in getattr(type(tensor), "tensor_data_names", ())] or [tensor]
        total += sum(part.numel() * part.element_size() for part in inner)
    return total / 2**20


def main() -> None:
    parser = _harness.parser(__doc__)
    parser.add_argument("--variants", nargs="*", help="names of variants (default: all)")
    parser.add_argument("--batches", type=int, nargs="*", help="numbers of prompts (default: all)")
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep today's other rows, to run variants one by one, or at once on GPUs of one machine",
    )
    parser.set_defaults(runs=3)
    given = parser.parse_args()
    about: dict[str, Any] = {"rows": []}
    held = _harness.result_path("generate", given.device, given.output) if given.add else None
    for variant in VARIANTS[given.device]:
        if given.variants and variant.name not in given.variants:
            continue
        made: list[dict] = []
        with torch.inference_mode():
            for row in bench(variant, given.device, given.runs, given.batches):
                made.append(row)  # and is written: what is measured stays if a run is cut short
                about["rows"] = _harness.merged(about["rows"], made, lambda row: (row["variant"], row["batch"]), held)
                compare(about["rows"])
                _harness.write("generate", given.device, about, given.output)
        torch._dynamo.reset()
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()


def compare(rows: list[dict]) -> None:
    """Note how many times faster each row is than the baseline with as many prompts."""
    baselines = {row["batch"]: row for row in rows if row["variant"] == BASELINE}
    for row in rows:
        base = baselines.get(row["batch"], {}).get("tokens_per_second")
        if base and "tokens_per_second" in row:
            row["times_baseline"] = round(row["tokens_per_second"] / base, 3)


if __name__ == "__main__":
    main()
