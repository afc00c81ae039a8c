"""Where the time of one decode step goes: every kernel (or operator, on a CPU) of our loop, and the limit by memory traffic.

What one step takes is the difference of two profiled generations, of 1 and of 33 tokens, over 32.

python benchmarks/bench_decode_profile.py                  # on CUDA: LLaVA-1.5-7B's shapes, INT4 with our kernel, compiled
python benchmarks/bench_decode_profile.py --device cpu     # a LLaVA of eight layers, INT4 with torchao's kernel
"""

from __future__ import annotations

from typing import Any

import _harness
import torch
from _models import llava_batch
from bench_generate import SETUPS, VARIANTS, prepared, resident
from torch.profiler import ProfilerActivity, profile

from gracekit.inference import Generator

STEPS = 32
SHOWN = 20
CHOSEN = {"cuda": "INT4 gracekit, compiled", "cpu": "INT4 torchao, gracekit, fused"}


def totals(generator: Generator, batch: dict, new: int, device: str) -> dict[str, tuple[float, int]]:
    """Microseconds of its own, and calls, of every kernel or operator."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        generator.generate(batch, max_new_tokens=new)
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    return {event.key: (getattr(event, own), event.count) for event in found.key_averages()}


def step_of(generator: Generator, batch: dict, device: str) -> list[dict[str, Any]]:
    """The longest parts of a step first."""
    for new in (1, STEPS + 1, 1):
        generator.generate(batch, max_new_tokens=new)  # compiles, measures, captures
    first, all_ = (totals(generator, batch, new, device) for new in (1, STEPS + 1))
    rows = []
    for name, (time, calls) in all_.items():
        before, already = first.get(name, (0.0, 0))
        rows.append(
            {"name": name[:110], "us": round((time - before) / STEPS, 2), "calls": round((calls - already) / STEPS, 2)}
        )
    return sorted(rows, key=lambda row: -row["us"])


def main() -> None:
    given = _harness.parser(__doc__).parse_args()
    variant = next(v for v in VARIANTS[given.device] if v.name == CHOSEN[given.device])
    make, side, text, _, _ = SETUPS[given.device]
    bandwidth = _harness.copy_bandwidth(given.device, 1024 if given.device == "cuda" else 256)
    with torch.inference_mode():
        model = prepared(variant, make, given.device)
        batch = llava_batch(model, 1, text, side)
        generator = Generator(model, 1, batch["input_ids"].shape[1] + STEPS + 1, compile=variant.compiled)
        rows = step_of(generator, batch, given.device)
        made = generator.generate(batch, max_new_tokens=STEPS + 1)
    step = 1e6 * made.decode_seconds / STEPS
    # The vision tower and the input embeddings are not read in a step.
    unread = resident(model.model.vision_tower) + resident(model.get_input_embeddings())
    read = (resident(model) - unread) * 2**20 + generator.cache_bytes
    about = {
        "variant": variant.name,
        "prompt": batch["input_ids"].shape[1],
        "step_us": round(step, 1),
        "profiled_us": round(sum(row["us"] for row in rows), 1),
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "bytes_read": int(read),
        "traffic_limit_us": round(read / bandwidth * 1e6, 1),
        "rows": rows[:SHOWN],
    }
    for row in about["rows"]:
        _harness.show(row)
    _harness.write("decode_profile", given.device, about, given.output)


if __name__ == "__main__":
    main()
