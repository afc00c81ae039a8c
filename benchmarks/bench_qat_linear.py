"""A linear layer that trains with learned 4-bit weights: its time and memory beside a plain one, and what it learns.

python benchmarks/bench_qat_linear.py                   # on CUDA: 4096 -> 11008, 2048 tokens, bfloat16
python benchmarks/bench_qat_linear.py --device cpu      # float32, a size for two cores

The peers are torchao's range learning, LSQ written with plain operations, and nvidia-modelopt's LSQ where it is installed. The
task: each takes over the weights of a trained network of two layers and learns, with 4-bit or 3-bit weights, to answer as it does.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import _harness
import reference_quant
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, initialize_fake_quantizers

from gracekit.quant import LSQConfig, prepare_qat, quantize_rtn
from gracekit.quant.scheme import search_scale

GROUP = 128
PLAIN = "plain nn.Linear"
RUNS_A_TURN = 5
SEEDS = (0, 1, 2)
SCALE_RATES = (1e-4, 1e-3, 1e-2, 3e-2)
INTEGERS = {3: torch.int3, 4: torch.int4}
Prepare = Callable[[nn.Module, int, Tensor], None]


class NaiveLinear(nn.Linear):
    """The layer of :func:`reference_quant.naive_fake_quantize`, from the same initial scales as ours."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bits = layer.weight, bits
        self.log_scale = nn.Parameter(search_scale(layer.weight, bits, GROUP).log())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, reference_quant.naive_fake_quantize(self.weight, self.log_scale, self.bits))


def plain(model: nn.Module, bits: int, example: Tensor) -> None:
    pass


def ours(model: nn.Module, bits: int, example: Tensor) -> None:
    prepare_qat(model, LSQConfig(bits=bits, group_size=GROUP))


def torchao(model: nn.Module, bits: int, example: Tensor) -> None:
    weights = IntxFakeQuantizeConfig(INTEGERS[bits], group_size=GROUP, is_dynamic=False, range_learning=True)
    quantize_(model, QATConfig(weight_config=weights, step="prepare"))
    initialize_fake_quantizers(model, (example,))


def naive(model: nn.Module, bits: int, example: Tensor) -> None:
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(model, name, NaiveLinear(layer, bits))


def modelopt(model: nn.Module, bits: int, example: Tensor) -> None:
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"] = {"num_bits": bits, "block_sizes": {-1: GROUP, "type": "static"}}
    config["algorithm"] = {"method": "lsq", "learnable_amax": ["pre", "post"], "tied_amax": True}
    mtq.quantize(model, config)


def learned(wanted: list[str] | None) -> dict[str, Prepare]:
    found: dict[str, Prepare] = {"gracekit": ours, "torchao range learning": torchao, "naive LSQ": naive}
    if importlib.util.find_spec("modelopt") is not None:
        found["nvidia-modelopt LSQ"] = modelopt
    return {name: prepare for name, prepare in found.items() if wanted is None or name in wanted}


def cost(device: str, runs: int, prepared: dict[str, Prepare], sizes: tuple[int, int, int], bandwidth: float) -> list:
    """Forward and backward to input, weight and scales, at (inputs, outputs, tokens).

    The variants take turns, a few runs each, and a ratio is the median over the turns: a machine that others use as well is
    then as slow for one as for the next. On CUDA the time of the device alone stands beside it, which a host that is slow to
    launch, or busy, does not change.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    steps = {name: step(prepare, device, dtype, sizes) for name, prepare in ({PLAIN: plain} | prepared).items()}
    if device == "cuda" and "naive LSQ" in prepared:
        steps["naive LSQ, torch.compile"] = step(naive, device, dtype, sizes, compiled=True)
    turns: dict[str, list[dict]] = {name: [] for name in steps}
    for _ in range(max(1, runs // RUNS_A_TURN)):
        for name, run in steps.items():
            turns[name].append(_harness.measure(run, device, runs=RUNS_A_TURN, warmup=2))
            if device == "cuda":
                turns[name][-1]["device_ms"] = _harness.device_ms(run, RUNS_A_TURN)
    rows = []
    for name, measured in turns.items():
        row = {
            "variant": name,
            "in": sizes[0],
            "out": sizes[1],
            "tokens": sizes[2],
            "group": GROUP,
            "dtype": str(dtype),
        }
        row |= {"median_ms": middle(measured, "median_ms"), "min_ms": min(turn["min_ms"] for turn in measured)}
        row |= {"max_ms": max(turn["max_ms"] for turn in measured), "runs": RUNS_A_TURN * len(measured)}
        row["peak_mib"] = middle(measured, "peak_mib")
        row["times_plain"] = ratio(measured, turns[PLAIN], "median_ms")
        if device == "cuda":
            row["device_ms"] = middle(measured, "device_ms")
            row["times_plain_on_device"] = ratio(measured, turns[PLAIN], "device_ms")
        row["mib_beyond_plain"] = round(row["peak_mib"] - middle(turns[PLAIN], "peak_mib"), 1)
        row["bytes_per_weight_beyond_plain"] = round(row["mib_beyond_plain"] * 2**20 / (sizes[0] * sizes[1]), 2)
        rows.append(row)
        _harness.show(row)
    # The least that passes beside the products move: weight, W_q; gradient of W_q, weight. The gradient of the weight is made of
    # that of W_q in place, by writing the zeros of clipped weights, which are as few as clipped_share says and not counted here.
    traffic = 4 * sizes[0] * sizes[1] * dtype.itemsize / bandwidth * 1e3
    rows[0]["times_plain_by_traffic_alone"] = round(1 + traffic / rows[0]["median_ms"], 3)
    rows[0]["clipped_share"] = clipped_share(device, dtype, sizes)
    return rows


def ratio(turns: list[dict], base: list[dict], key: str) -> float:
    return round(statistics.median(own[key] / other[key] for own, other in zip(turns, base, strict=True)), 3)


def middle(turns: list[dict], key: str) -> float:
    return round(statistics.median(turn[key] for turn in turns), 4)


def step(
    prepare: Prepare, device: str, dtype: torch.dtype, sizes: tuple[int, int, int], *, compiled: bool = False
) -> Callable[[], object]:
    inputs, outputs, tokens = sizes
    model = untrained(device, dtype, sizes)
    x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
    slope = torch.randn(tokens, outputs, device=device, dtype=dtype)
    prepare(model, 4, x.detach())
    leaves = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
    call = torch.compile(model) if compiled else model
    return lambda: torch.autograd.grad(call(x), leaves, slope)


def untrained(device: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(sizes[0], sizes[1], bias=False, device=device, dtype=dtype))


def clipped_share(device: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> float:
    """Share of the weights of our layer that are clipped: those that a gradient of ones does not pass."""
    model = untrained(device, dtype, sizes)
    prepare_qat(model, LSQConfig(bits=4, group_size=GROUP))
    (gradient,) = torch.autograd.grad(model[0].weight_fake_quantizer(model[0].weight).sum(), model[0].weight)
    return round(1 - int(gradient.count_nonzero()) / gradient.numel(), 6)


@functools.cache
def network(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of two layers, trained in float32 on a random function, with inputs for training and for the test."""
    torch.manual_seed(seed)
    spread = torch.logspace(0, -1.5, 128)  # inputs of unequal size, so that some weights matter more than others
    x, test = (spread * torch.randn(count, 128) for count in (4096, 1024))
    target = nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 32))
    model = nn.Sequential(nn.Linear(128, 256, bias=False), nn.GELU(), nn.Linear(256, 32, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with torch.no_grad():
        wanted = 4 * target(x)
    for step in range(300):
        at = torch.arange(step * 256, step * 256 + 256) % len(x)
        optimizer.zero_grad()
        F.mse_loss(model(x[at]), wanted[at]).backward()
        optimizer.step()
    return model, x, test


def relative_error(model: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted = teacher(x)
        return float((model(x) - wanted).square().mean() / wanted.square().mean())


def train(prepare: Prepare, bits: int, seed: int, scale_rate: float, steps: int) -> float:
    """Relative squared error on the test inputs after training with the teacher's answers."""
    teacher, x, test = network(seed)
    with torch.no_grad():
        wanted = teacher(x)
    model = copy.deepcopy(teacher)
    prepare(model, bits, x[:8])
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = [p for name, p in named.items() if name.endswith("weight")]
    scales = [p for name, p in named.items() if not name.endswith("weight")]
    groups = [{"params": weights, "lr": 1e-3}, {"params": scales, "lr": scale_rate}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for step in range(steps):
        at = torch.arange(step * 256, step * 256 + 256) % len(x)
        optimizer.zero_grad()
        F.mse_loss(model(x[at]), wanted[at]).backward()
        optimizer.step()
        schedule.step()
    return relative_error(model, teacher, test)


def learning(prepared: dict[str, Prepare], steps: int) -> list:
    """Each method at the best of four learning rates of its scales: some learn the scale, ours its logarithm."""
    rows = []
    for bits in (4, 3):
        start = []
        for seed in SEEDS:
            teacher, _, test = network(seed)
            config = LSQConfig(bits=bits, group_size=GROUP)
            rounded = quantize_rtn(copy.deepcopy(teacher), config, target="reference")
            start.append(relative_error(rounded, teacher, test))
        rows.append(
            {"variant": "round to nearest, no training", "bits": bits, "error": round(statistics.mean(start), 6)}
        )
        _harness.show(rows[-1])
        for name, prepare in prepared.items():
            tried = {rate: [train(prepare, bits, seed, rate, steps) for seed in SEEDS] for rate in SCALE_RATES}
            best = min(tried, key=lambda rate: statistics.mean(tried[rate]))
            errors = tried[best]
            row = {"variant": name, "bits": bits, "error": round(statistics.mean(errors), 6)}
            row |= {"least": round(min(errors), 6), "greatest": round(max(errors), 6), "seeds": len(SEEDS)}
            row |= {"steps": steps, "scale_rate": best}
            row["by_scale_rate"] = {rate: round(statistics.mean(values), 6) for rate, values in tried.items()}
            rows.append(row)
            _harness.show(row)
    return rows


def main() -> None:
    parser = _harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="default 2048 on CUDA, 256 on the CPU")
    parser.add_argument(
        "--steps", type=int, default=200, help="of the small task, which runs on the CPU; 0 leaves it out"
    )
    parser.add_argument("--variants", nargs="*", help="names of the variants beside the plain layer; default all")
    parser.set_defaults(runs=50)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    sizes = (4096, 11008, options.tokens or 2048) if cuda else (1024, 2816, options.tokens or 256)
    prepared = learned(options.variants)
    bandwidth = _harness.copy_bandwidth(options.device, 1024 if cuda else 64)
    payload = {
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "cost": cost(options.device, options.runs, prepared, sizes, bandwidth),
        "learning": learning(prepared, options.steps) if options.steps else [],
    }
    _harness.write("qat_linear", options.device, payload, options.output)


if __name__ == "__main__":
    main()
