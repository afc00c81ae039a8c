"""Which way a 4-bit product is computed, by the number of rows of x: a table measured on this machine and kept in a file.

For each shape, group size, dtype and size class of the rows, the first product times some ways to launch the kernels and the dense
way, with the weight coming from memory: copies that together exceed the cache take turns inside a CUDA graph, as the layers of a
model do. What is fastest, of those whose product is the dense one's, is used from then on, in later processes too. The file is
``w4a16-GPU-VERSIONS-KERNELS.json`` in ``$GRACEKIT_CACHE``, by default in ``~/.cache/gracekit`` (``$XDG_CACHE_HOME`` is honoured);
delete it to measure anew. Nothing is measured while a graph is captured: a product not known by then is computed the dense way.
"""

# M rows of x, N out_features, K in_features, T tiles, C chunks

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from gracekit.quant import _int4_launch as kernel
from gracekit.quant._int4_launch import Schedule, Zeros, gluon
from gracekit.quant._int4_layout import TILE
from gracekit.quant._triton_int4 import LEAST_TOKENS

_FINE = 64
_LARGEST = 1 << 13  # rows beyond are as many as these
_COPIES = 64
_REPLAYS = 10
_FINALISTS = 3
_TURNS = 3
_STAGES = 3
_DEALT_OUT = (2, 3, 4)  # programs that one tile may be dealt out among
_ROUNDING = 2.0**-6  # two roundings of bfloat16, and sums in another order
_WAITING = 64  # rows of x, whose products wait for the memory
_MORE = (2, 3, 4)  # times as many programs their tiles may be dealt out among, where these are less than a round
_STEPS_AHEAD = (3, 4)  # stages of few_kernel
_MOST_A_TILE = 8  # programs of few_kernel
_MOST_A_PROCESSOR = 8  # likewise
_FULL = 0.8  # of their places in all rounds
# (output rows, parts, steps ahead) of vector_kernel.
_VECTOR = ((16, 8, 2), (16, 8, 4), (32, 4, 3), (32, 8, 2), (32, 8, 3))
# By rows of x in a program: (output rows, parts, warps) of narrow_kernel.
_NARROW = {
    8: ((16, 4, 4), (16, 8, 4), (32, 2, 2), (32, 4, 2), (32, 4, 4), (32, 8, 4), (64, 4, 4)),
    16: ((16, 2, 2), (16, 4, 4), (16, 8, 4), (32, 2, 2), (32, 4, 4), (32, 8, 4)),
    32: ((16, 4, 4), (16, 8, 4), (32, 4, 4), (32, 8, 4), (64, 4, 8)),
}
# Likewise: (output rows, warps, stages, whether rounded weights are multiplied, Schedule.launches) of wide_kernel.
_WIDE = {
    8: ((64, 4, 4, False, True), (128, 4, 4, False, True), (128, 4, 5, False, True)),
    16: ((64, 4, 4, False, False), (64, 4, 4, False, True), (128, 4, 4, False, True), (128, 4, 5, False, False)),
    32: ((64, 4, 4, False, False), (64, 4, 4, False, True), (128, 4, 4, False, False)),
    64: ((64, 4, 3, True, False), (128, 4, 3, True, False)),
    128: (
        (64, 4, 2, True, False),
        (64, 4, 3, True, False),
        (64, 4, 4, True, False),
        (128, 4, 3, True, False),
        (128, 8, 3, True, False),
    ),
    256: ((64, 4, 3, True, False), (128, 8, 3, True, False)),
}

_log = logging.getLogger(__name__)


def choose(x: Tensor, packed: Tensor, scale: Tensor, zeros: Zeros, outputs: int) -> Schedule | None:
    """Return the fastest schedule for x (M, K); None for the dense way, or where nothing is known and nothing can be timed."""
    table = _table(x.get_device())
    rows = size_class(len(x))
    key = f"{outputs}x{x.shape[1]} {scale.shape[0]} groups {x.dtype} {rows} rows"
    if not zeros.exchange.numel() and kernel.has_few(x, packed):
        key += ", nothing exchanged"
    if key not in table.entries:
        if torch.cuda.is_current_stream_capturing():
            return None
        table.add(key, _measure(rows, x, packed, scale, zeros, outputs))
    found = table.entries[key]["schedule"]
    return None if found is None else Schedule(*found)


def size_class(rows: int) -> int:
    """Return the number of rows that ``rows`` are measured as: a power of two up to 64, then four sizes to each power of two.

    How the last blocks of rows fill the device decides between two ways by more than half of their time.
    """
    if rows <= _FINE:
        return int(triton.next_power_of_2(rows))
    step = int(triton.next_power_of_2(rows)) // 8
    return min(-(-rows // step) * step, _LARGEST)


class Table:
    """Measured choices, in a file that several processes may add to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self._read()

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Keep an entry. A folder that cannot be written to costs a measurement in each process, and nothing else."""
        self._read()
        self.entries[key] = entry
        beside = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(self.entries, indent=1))
            beside.replace(self.path)
        except OSError as error:
            _log.warning(
                "%s cannot be written (%s): 4-bit products are measured anew in each process", self.path, error
            )

    def _read(self) -> None:
        # A file that is not ours to read, or is damaged, is measured anew and replaced.
        with contextlib.suppress(OSError, ValueError):
            held = json.loads(self.path.read_text())
            self.entries.update({key: entry for key, entry in held.items() if "schedule" in entry})


def cache_folder() -> Path:
    """Return the folder of measured tables."""
    if "GRACEKIT_CACHE" in os.environ:
        return Path(os.environ["GRACEKIT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gracekit"


@functools.cache
def _table(device: int) -> Table:
    name = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-").lower()
    versions = f"torch{torch.__version__}-triton{triton.__version__}"
    return Table(cache_folder() / f"w4a16-{name}-{versions}-{_kernels()}.json")


def _kernels() -> str:
    """Return what is another when the kernels, or what is tried of them, are others."""
    folder = Path(__file__).parent
    sources = [*folder.glob("_gluon_*.py"), *folder.glob("_int4_*.py"), folder / "_triton_int4.py"]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sorted(sources))).hexdigest()[:8]


def schedules(
    rows: int,
    outputs: int,
    chunks: int,
    processors: int,
    *,
    persistent: bool = False,
    vector: bool = False,
    few: bool = False,
) -> list[Schedule]:
    """Return what is worth timing for ``rows`` rows of x and ``outputs`` rows of W on that many multiprocessors.

    ``persistent``, ``vector``, ``few``: whether these kernels can be had.
    """
    tokens = max(LEAST_TOKENS, min(triton.next_power_of_2(rows), 256))
    found = [
        Schedule(tile, tokens, parts, split, warps, _STAGES, scaled=False, launches=tokens == LEAST_TOKENS)
        for tile, parts, warps in _NARROW.get(tokens, ())
        if parts <= max(4, chunks)
        for split in _splits(-(-outputs // TILE) * (TILE // tile), processors)
        if split == 1 or chunks >= 2 * parts * split
    ]
    found += [
        Schedule(tile, width, 0, split, warps, stages, scaled, launches=launches)
        for width in sorted({min(tokens, 64), min(tokens, 128), tokens})
        for tile, warps, stages, scaled, launches in _WIDE[width]
        for split in _splits(-(-outputs // tile) * -(-rows // width), processors, _MORE if rows <= _WAITING else ())
        if split == 1 or chunks >= 2 * split
    ]
    if vector or few:  # the simplest of the others remain, should none of these be right on a card
        found = [schedule for schedule in found if schedule.parts and schedule.split == 1]
    if vector:
        found += [
            Schedule(tile, rows, parts, 1, parts, steps, scaled=False)
            for tile, parts, steps in _VECTOR
            if parts <= max(4, chunks)
        ]
    elif few:
        found += [
            Schedule(TILE, tokens, 0, split, kernel.few.WARPS, stages, scaled=False, exchanges=True)
            for split in _even_splits(-(-outputs // TILE), chunks, processors)
            for stages in _STEPS_AHEAD
        ]
    if persistent and rows > _WAITING:
        found += [
            Schedule(gluon.ROWS, width, 0, split, gluon.WARPS, gluon.SLOTS[width], scaled=True, persistent=True)
            for width in gluon.WIDTHS
            for split in (1, 2)
        ]
    return found


def _splits(tiles: int, processors: int, more: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Return 1, and the number of programs for each of the last tiles that leaves the fullest multiprocessor the least to do.

    And so many times that number, where there is less than a tile for each multiprocessor.
    """
    left = tiles % processors
    if not left:
        return (1,)
    best = min(_DEALT_OUT, key=lambda split: -(-left * split // processors) / split)
    return (1, best, *(best * times for times in more if tiles < processors))


def _even_splits(tiles: int, chunks: int, processors: int) -> list[int]:
    """Return 1, and the numbers of programs for each tile with which all multiprocessors have about as many of them.

    None with which a program would have less than a chunk.
    """
    found = [1]
    for split in range(2, _MOST_A_TILE + 1):
        each = tiles * split / processors
        is_even = _FULL * math.ceil(each) <= each <= _MOST_A_PROCESSOR
        if is_even and chunks >= 2 * split and (split - 1) * -(-chunks // split) < chunks:
            found.append(split)
    return found


def _measure(rows: int, x: Tensor, packed: Tensor, scale: Tensor, zeros: Zeros, outputs: int) -> dict[str, Any]:
    """Time all ways for a shape and return the entry of the fastest, with the times in microseconds."""
    shape = (outputs, x.shape[1])
    properties = torch.cuda.get_device_properties(x.device)
    _log.info("measuring 4-bit products of %d rows with a %d x %d weight on %s", rows, *shape, properties.name)
    inputs = torch.randn(rows, shape[1], dtype=x.dtype, device=x.device)
    count = min(_COPIES, 1 + 2 * properties.L2_cache_size // (packed.numel() * packed.element_size()))
    weights = [packed, *(packed.clone() for _ in range(count - 1))]
    tried = [
        schedule
        for schedule in schedules(
            rows,
            outputs,
            packed.shape[1],
            properties.multi_processor_count,
            persistent=kernel.has_persistent(x, outputs),
            vector=kernel.has_vector(inputs),
            few=kernel.has_few(inputs, packed),
        )
        if schedule.words(len(packed) * TILE, rows, properties.multi_processor_count) <= zeros.of(schedule).numel()
    ]
    kernel.compile_ahead(inputs, packed, scale, zeros.counters, outputs, tried)

    def multiply(schedule: Schedule | None, weight: Tensor) -> Tensor:
        if schedule is None:
            return F.linear(inputs, kernel.values(weight, scale, shape, x.dtype))
        return kernel.linear(inputs, weight, scale, zeros.of(schedule), outputs, schedule)

    def microseconds(schedule: Schedule | None) -> float:
        return statistics.median(graph_times(functools.partial(multiply, schedule), weights))

    with torch.cuda.device(x.device):
        torch.cuda.synchronize()  # a product that still runs has its hands on the zeros
        times: dict[Schedule | None, float] = {}
        for schedule in (None, *tried):
            with contextlib.suppress(OutOfResources, CompilationError, PTXASError):  # more than this card has
                times[schedule] = microseconds(schedule)
        # What compiles is not believed to be right on a card, and with a Triton, that nobody here has seen.
        dense = multiply(None, packed).float()
        for schedule in tried:
            if schedule in times and not _agree(multiply(schedule, packed).float(), dense):
                _log.warning("%s computes a product of %d rows wrongly and is not used", schedule, rows)
                del times[schedule]
        # A device slows down as it warms up: the best of them take turns.
        ways = [None, *sorted(times, key=times.__getitem__)[:_FINALISTS]]
        turns = [{way: microseconds(way) for way in ways} for _ in range(_TURNS)]
    times = {way: statistics.median(turn[way] for turn in turns) for way in ways}
    best = min(times, key=times.__getitem__)
    return {
        "schedule": None if best is None else list(best),
        "microseconds": round(times[best], 2),
        "dense_microseconds": round(times[None], 2),
    }


def _agree(product: Tensor, dense: Tensor) -> bool:
    """Whether two products are equal within the rounding of their halves."""
    return bool(((product - dense).abs() <= _ROUNDING * (dense.abs() + dense.square().mean().sqrt())).all())


def graph_times(run: Callable[[Tensor], Tensor], weights: list[Tensor]) -> list[float]:
    """Return the microseconds of one product at each replay of a CUDA graph in which the weights take turns."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        run(weights[0])  # loads the kernel, which a capture does not allow
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()  # torch.cuda.graph would give all free memory back first
        for weight in weights:
            run(weight)
        graph.capture_end()
        marks: Any = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]  # type: ignore[no-untyped-call]
        graph.replay()
        for mark in marks[:-1]:
            mark.record()
            graph.replay()
        marks[-1].record()
        stream.synchronize()
    # While the next graph is captured, nothing can be given back: what this one held would add up.
    del graph
    torch.cuda.empty_cache()
    return [1e3 * float(start.elapsed_time(end)) / len(weights) for start, end in itertools.pairwise(marks)]
