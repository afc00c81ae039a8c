"""The 4-bit product of few rows: how its programs exchange sums, run by Python, how it compiles, and what a GPU computes."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ptx_machine import Machine, bits32
from strategies import normal, seeds
from torch import nn

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")
from kernel_cases import assembled, drawn, printed_by

from gracekit.quant import LSQConfig, _gluon_few, _int4_choices, _int4_launch, quantize_rtn
from gracekit.quant._int4_launch import Schedule
from gracekit.quant._int4_workspace import Workspace

AMPERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
OUTPUTS = 1 << 40  # where they begin, in the machine below


numbers = st.sampled_from([0.0, -0.0, 1.0, -3.5, 1e-40, float("inf"), float("nan")]) | st.floats(-10, 10, width=32)


@given(seeds, st.sampled_from([2, 3, 4, 5, 8]), st.sampled_from(_gluon_few.WIDTHS), st.data())
def test_programs_of_a_tile_add_each_others_sums_whoever_comes_first(seed, split, tokens, data):
    values, thread, slab = tokens, 37, 4096
    count = split * values
    sums = data.draw(st.lists(numbers, min_size=count, max_size=count).map(lambda drawn: np.array(drawn, np.float32)))
    sums = sums.reshape(split, values)
    missing = data.draw(st.integers(0, values - 1))  # an output that is not to be written
    ptx = _gluon_few.exchange(split, tokens, "bf16")["EXCHANGE"]
    memory: Counter[int] = Counter()
    written: dict[int, int] = {}
    machines = []
    for share in range(split):
        operands = {f"${values + place}": bits32(number) for place, number in enumerate(sums[share])}
        operands |= {f"${2 * values + place}": (OUTPUTS + 2 * place) * (place != missing) for place in range(values)}
        operands |= dict.fromkeys((f"${place}" for place in range(3 * values, 4 * values)), slab)
        operands |= dict.fromkeys((f"${place}" for place in range(4 * values, 5 * values)), share)
        machines.append(Machine(ptx, operands, thread, memory, written))
    turns = np.random.default_rng(seed)
    running = list(range(split))
    for _ in range(100):
        share = int(turns.choice(running))
        if machines[share].run():
            running.remove(share)
        if not running:
            break
    assert not running
    assert not any(memory.values())  # zeros again
    assert all(slab <= 4 * word < slab + 4 * _gluon_few.slab_words(split, tokens) for word in memory)
    for place in range(values):
        if place == missing:
            continue
        total = np.float32(0)
        with np.errstate(invalid="ignore"):
            for share in range(split):
                total += sums[share, place]
        found = torch.tensor(np.array(written.pop(OUTPUTS + 2 * place), np.uint16).view(np.int16)).view(torch.bfloat16)
        assert torch.equal(found.nan_to_num(7.0), torch.tensor(total).bfloat16().nan_to_num(7.0))
    assert not written


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from gracekit.quant._gluon_few import exchange, few_kernel as kernel

for capability, group_size, tokens, split, masked, dtype in CASES:
    kinds = {"x": f"*{dtype}", "packed": "*i32", "scale": "*fp32", "y": f"*{dtype}", "workspace": "*i32"}
    kinds |= dict.fromkeys(["M", "N", "K", "stride", "chunks", "padded"], "i32")
    constants = {"STEPS": 32, "G": group_size, "SPLIT": split, "TOKENS": tokens, "STAGES": 3, "MASKED": masked}
    constants |= exchange(split, tokens, "bf16" if dtype == "bf16" else "f16")
    early = capability >= 90
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in kinds if name not in ("M", "chunks")}
    source = GluonASTSource(kernel, signature, constants | {"EARLY": early}, aligned)
    options = {"num_warps": 2} | ({"launch_pdl": True} if early else {})
    print(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"] + "END OF A CASE")
"""
CASES = [
    (90, 128, 16, 3, False, "bf16"),
    (90, 128, 8, 8, False, "bf16"),
    (90, 32, 16, 1, True, "fp16"),
    (80, 64, 8, 2, True, "bf16"),
]


def test_a_chunk_is_multiplied_from_registers_as_it_is_unpacked(tmp_path):
    script = COMPILE.replace("CASES", repr(CASES))
    *assembly, _ = printed_by(script).split("END OF A CASE")
    assert len(assembly) == len(CASES)
    for (capability, _, tokens, split, *_), ptx in zip(CASES, assembly, strict=True):
        # Two blocks of 16 outputs to a warp, 8 planes, a block for every 8 rows of x.
        assert len(re.findall(r"mma\.sync\.aligned\.m16n8k16\S*\.f32", ptx)) == 2 * 8 * tokens // 8
        assert len(re.findall(r"ldmatrix\S*\.x[24]", ptx)) == 8
        assert ("griddepcontrol" in ptx) == (capability >= 90)
        assert ("nanosleep" in ptx) == (split > 1)
        said = assembled(ptx, f"sm_{capability}{'a' * (capability == 90)}", tmp_path)
        assert int(re.search(r"(\d+) bytes spill stores", said).group(1)) <= 8


@given(st.integers(1, 2400), st.integers(1, 300), st.sampled_from([4, 8, 16]))
def test_every_share_of_a_tile_has_chunks_and_all_multiprocessors_have_programs(tiles, chunks, rows):
    found = _int4_choices.schedules(rows, 64 * tiles, chunks, 132, few=True)
    exchanging = [schedule for schedule in found if schedule.exchanges]
    assert {schedule.split for schedule in exchanging} >= {1}
    assert any(not schedule.exchanges for schedule in found)  # what is used should the kernel be wrong on a card
    for schedule in exchanging:
        assert schedule.tokens == max(8, rows)
        if schedule.split > 1:
            assert (schedule.split - 1) * -(-chunks // schedule.split) < chunks
            assert 0.8 * 132 <= tiles * schedule.split <= 8 * 132


def product(x, packed, scale, outputs, split=2, stages=3, tokens=16):
    schedule = Schedule(64, tokens, 0, split, _gluon_few.WARPS, stages, scaled=False, exchanges=True)
    workspace = torch.zeros(schedule.words(64 * len(packed), len(x), 1), dtype=torch.int32, device="cuda")
    y = _int4_launch.linear(x, packed, scale, workspace, outputs, schedule)
    assert not workspace.any()
    return y


@pytest.mark.gpu
@pytest.mark.skipif(not AMPERE, reason="needs a CUDA device of compute capability 8.0")
class TestOnCuda:
    """What the kernel computes."""

    @pytest.mark.parametrize("rows", [1, 3, 8, 13, 16])
    @pytest.mark.parametrize(
        ("outputs", "inputs", "group_size", "dtype"),
        [
            (64, 256, 128, torch.bfloat16),
            (200, 416, 32, torch.bfloat16),  # inputs that no chunk divides
            (136, 1152, 64, torch.float16),  # nine chunks: shares of unequal size, and none
            (1001, 11008, 32, torch.bfloat16),
            (4096, 4096, 128, torch.bfloat16),
            (11008, 1024, 64, torch.float16),
        ],
    )
    def test_every_schedule_multiplies_within_the_bound_and_the_same_again(
        self, outputs, inputs, group_size, dtype, rows
    ):
        weight, packed, scale = drawn(outputs, inputs, group_size, dtype)
        x = normal(rows, rows, inputs, dtype=dtype).cuda()
        exact, sizes = x.double() @ weight.t(), x.double().abs() @ weight.abs().t()
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-20 * sizes + torch.finfo(dtype).smallest_normal
        for split, stages in ((1, 3), (2, 4), (3, 3), (8, 4)):
            way = (packed, scale, outputs, split, stages, 8 if rows <= 8 else 16)
            y = product(x, *way)
            assert bool(((y.double() - exact).abs() <= bound).all()), way[3:]
            assert torch.equal(y, product(x, *way)), way[3:]

    def test_sums_that_are_zero_are_exchanged_too(self):
        _, packed, scale = drawn(256, 1024, 128, torch.bfloat16)
        x = torch.zeros(16, 1024, dtype=torch.bfloat16, device="cuda")
        y = product(x, packed, scale, 256, split=4)
        assert not y.view(torch.int16).any()  # nor is any a minus zero

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
    def test_an_input_that_is_not_finite_leaves_the_other_rows_alone(self, wrong):
        _, packed, scale = drawn(128, 1024, 64, torch.bfloat16)
        x = normal(4, 16, 1024, dtype=torch.bfloat16).cuda()
        expected = product(x, packed, scale, 128, split=3)
        x[1, 700] = wrong
        y = product(x, packed, scale, 128, split=3)
        assert not bool(y[1].isfinite().any())
        assert torch.equal(y[[0, *range(2, 16)]], expected[[0, *range(2, 16)]])

    @pytest.mark.parametrize("shift", [0, 1, 8])
    def test_rows_that_16_bytes_cannot_be_copied_of_at_once_are_copied(self, shift):
        _, packed, scale = drawn(256, 384, 128, torch.bfloat16)
        for width in (392, 400, 416):
            x = normal(2, 16, width, dtype=torch.bfloat16).cuda()[:, shift : shift + 384]
            assert torch.equal(product(x, packed, scale, 256), product(x.contiguous(), packed, scale, 256))

    def test_a_graph_that_is_captured_before_there_is_a_workspace_takes_another_way(self):
        layer = nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16, device="cuda")
        (layer,) = quantize_rtn(nn.Sequential(layer), LSQConfig(group_size=128), target="triton")
        x = normal(5, 16, 2048, dtype=torch.bfloat16).cuda()
        with torch.inference_mode():
            expected = layer(x)
            layer.weight.workspace = Workspace()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            graph.replay()
        assert _int4_choices._agree(y.float(), expected.float())

    def test_products_follow_each_other_in_a_graph_and_beside_others(self):
        _, packed, scale = drawn(4096, 2048, 128, torch.bfloat16)
        schedule = Schedule(64, 16, 0, 8, _gluon_few.WARPS, 3, scaled=False, exchanges=True)
        workspaces = [torch.zeros(schedule.words(4096, 16, 1), dtype=torch.int32, device="cuda") for _ in range(2)]
        inputs = [normal(seed, 16, 2048, dtype=torch.bfloat16).cuda() for seed in range(2)]
        expected = [product(x, packed, scale, 4096, split=8) for x in inputs]
        graphs, outputs = [], []
        for x, workspace in zip(inputs, workspaces, strict=True):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs.append([_int4_launch.linear(x, packed, scale, workspace, 4096, schedule) for _ in range(20)])
            graphs.append(graph)
        streams = [torch.cuda.Stream() for _ in graphs]
        for _ in range(5):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for made, right in zip(outputs, expected, strict=True):
            assert all(torch.equal(y, right) for y in made)
