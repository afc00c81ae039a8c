"""What every benchmark shares: timing with spread, peak memory, the environment, and results that are never half written."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_LAUNCHING_CYCLES = 100_000_000  # some 50 ms
PACKAGES = ("torch", "triton", "transformers", "torchao", "liger-kernel", "trl", "nvidia-modelopt", "gracekit")


def environment(device: str) -> dict[str, Any]:
    """Date, machine and versions."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    machine = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        machine["cuda"] = torch.version.cuda
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": machine,
        "versions": found,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.machine()


def measure(run: Callable[[], object], device: str, *, runs: int = 10, warmup: int = 3) -> dict[str, float]:
    """Milliseconds of ``run`` (median, least, greatest) and the most memory in MiB it held beyond what was there before."""
    for _ in range(warmup):
        run()
    times = _cuda_times(run, runs) if device == "cuda" else _cpu_times(run, runs)
    return {
        "median_ms": round(statistics.median(times), 4),
        "min_ms": round(min(times), 4),
        "max_ms": round(max(times), 4),
        "runs": runs,
        "peak_mib": round(peak_mib(run, device), 1),
    }


def device_ms(run: Callable[[], object], runs: int) -> float:
    """Median milliseconds of the CUDA device alone, which waits until the host has launched all runs."""
    torch.cuda.synchronize()
    torch.cuda._sleep(_LAUNCHING_CYCLES)
    return round(statistics.median(_cuda_times(run, runs)), 4)


def _cuda_times(run: Callable[[], object], runs: int) -> list[float]:
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in marks]


def _cpu_times(run: Callable[[], object], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def peak_mib(run: Callable[[], object], device: str) -> float:
    """Most memory that ``run`` held beyond what was there before: the allocator's count, or the process's resident peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    _give_back_freed_memory()
    reset.write_text("5")  # sets the resident peak back to what is resident now
    before = _status("VmRSS")
    run()
    return max(0.0, (_status("VmHWM") - before) / 2**10)


def _give_back_freed_memory() -> None:
    """Without it, what earlier runs freed is resident still and hides what this one takes."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def copy_bandwidth(device: str, mib: int = 1024) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (measure(lambda: target.copy_(source), device)["median_ms"] * 1e-3)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options all benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--runs", type=int, default=10, help="timed runs of each variant")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    return made


def result_path(name: str, device: str, folder: Path) -> Path:
    """NAME-DEVICE-DATE.json."""
    label = "cpu" if device == "cpu" else torch.cuda.get_device_name(0).replace(" ", "-").lower()
    return folder / f"{name}-{label}-{datetime.date.today().isoformat()}.json"


def write(name: str, device: str, payload: dict[str, Any], folder: Path) -> Path:
    """Write a result with the environment in front, beside its place and then renamed."""
    record = {"benchmark": name, "environment": environment(device), **payload}
    path = result_path(name, device, folder)
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".json.part")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)
    print(path)
    return path


def merged(rows: list[dict], made: list[dict], key: Callable[[dict], object], held: Path | None) -> list[dict]:
    """Rows, or those of the file ``held`` if it is there, without those that share a key with what was made, and that.

    Called when something has been made, so that runs on several GPUs at once can share a file.
    """
    if held is not None and held.is_file():
        rows = json.loads(held.read_text())["rows"]
    anew = {key(row) for row in made}
    return [row for row in rows if key(row) not in anew] + made


def show(row: dict[str, Any]) -> None:
    """Print a row as it is measured."""
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
