"""The 4-bit product for many rows on Hopper: what can be seen without a GPU is how it compiles; a GPU shows the rest."""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import normal

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")
from kernel_cases import assembled, disassembled, drawn, printed_by
from machine_code import instructions, overwritten
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from gracekit.quant import _gluon_int4, _int4_choices, _int4_launch
from gracekit.quant._int4_launch import Schedule

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def compiled(width, rest, dealt, group_size, dtype):
    (tokens, more), (first, second) = _gluon_int4.BLOCKS[width], _gluon_int4.BLOCKS.get(rest, (0, 0))
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    widths = [tokens, *filter(None, (more, first, second)), tokens, tokens]
    kinds = {
        name + end: f"tensordesc<{dtype}[{rows}, 64],{layout!r}>"
        for rows, end in zip(widths, ("", "_other", "_third"), strict=False)
        for name in ("x", "y")
    }
    kinds |= {"packed": "*i32", "scale": "*fp32", "partial": "*fp32", "counters": "*i32"}
    kinds |= dict.fromkeys(["M", "chunks", "padded", "programs", "helpers", "each", "shares", "head"], "i32")
    kinds |= dict.fromkeys(["rest_helpers", "rest_each", "rest_shares", "rest_head"], "i32")
    constants = {
        "G": group_size,
        "DEALT": dealt,
        "BAND": 8,
        "TOKENS": tokens,
        "MORE": more,
        "REST": first,
        "REST_MORE": second,
    }
    constants |= {"SLOTS": _gluon_int4.SLOTS[width], "REST_SLOTS": _gluon_int4.SLOTS[rest or width]}
    kernel = _gluon_int4.persistent_kernel
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in ("packed", "scale", "partial", "padded")
    }
    source = GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": _gluon_int4.WARPS, "launch_pdl": True}
    )


CASES = [
    (256, 0, False, 128, "bf16"),
    (256, 64, True, 128, "bf16"),
    (256, 128, True, 32, "fp16"),
    (256, 192, True, 128, "bf16"),
    (160, 0, True, 128, "bf16"),
    (192, 0, False, 64, "bf16"),
    (192, 0, True, 32, "fp16"),
    (128, 0, False, 128, "fp16"),
    (128, 0, True, 128, "bf16"),
]


def make(folder):
    """Print, of each case, the shared memory in bytes, what the assembler says, and the machine code."""

    def make_one(case):
        kernel, own = compiled(*case), folder / "-".join(map(str, case))
        own.mkdir()
        said = assembled(kernel.asm["ptx"], "sm_90a", own)
        return kernel.metadata.shared, said, disassembled(kernel.asm["cubin"], own)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        print(json.dumps(list(threads.map(make_one, CASES))))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What ``make`` prints, by case."""
    folder = str(tmp_path_factory.mktemp("kernels"))
    printed = printed_by(f"import pathlib, test_gluon_int4; test_gluon_int4.make(pathlib.Path({folder!r}))")
    return dict(zip(CASES, json.loads(printed.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_tensor_cores_are_never_waited_for_more_than_is_written(made, case):
    shared, said, sass = made[case]
    assert shared <= 227 * 1024
    # Where the assembler cannot prove that an operand is left alone, it makes every product wait, and says so.
    assert "registers" in said
    assert "serialized" not in said
    assert " 0 bytes spill stores" in said
    # Nor are they waited for less.
    kernel = instructions(sass)
    width, rest = case[:2]
    pieces = sum(bool(rows) for rows in _gluon_int4.BLOCKS[width] + _gluon_int4.BLOCKS.get(rest, ()))
    assert sum("HGMMA" in instruction.text for instruction in kernel) == 16 * pieces  # both groups, eight of a chunk
    assert not overwritten(kernel)


def machine_code(*lines):
    return "\n".join(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */" for i, line in enumerate(lines))


def test_what_is_written_while_the_tensor_cores_read_it_is_found():
    first = "HGMMA.64x128x16.F32.BF16 R24, R100, gdesc[UR4], R24"
    last = "HGMMA.64x128x16.F32.BF16 R24, R104, gdesc[UR4], R24, gsb0"
    other = "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0"
    writes = ["IMAD.MOV.U32 R103, RZ, RZ, 0x1", "LDG.E.64 R102, desc[UR16][R6.64]", "@P1 IADD3 R105, P5, R2, R3, RZ"]
    for written in writes:
        assert overwritten(instructions(machine_code(first, last, written)))
        assert overwritten(instructions(machine_code(first, last, "WARPGROUP.DEPBAR.LE gsb0, 0x1", written)))
        assert not overwritten(instructions(machine_code(first, last, "WARPGROUP.DEPBAR.LE gsb0, 0x0", written)))
        assert not overwritten(instructions(machine_code(first, last, other, "WARPGROUP.DEPBAR.LE gsb0, 0x1", written)))
        # Around a loop, where the write comes before the products.
        assert overwritten(instructions(machine_code(written, first, last, "@P0 BRA 0x0", "EXIT")))
        around = [written, first, last, "WARPGROUP.DEPBAR.LE gsb0, 0x0", "@P0 BRA 0x0", "EXIT"]
        assert not overwritten(instructions(machine_code(*around)))
    assert not overwritten(instructions(machine_code(first, last, "STG.E desc[UR4][R2.64], R101", "IADD3 R99, R1, R2")))
    assert not overwritten(instructions(machine_code(first, last, "BRA 0x40", "MOV R100, RZ", "EXIT")))


@given(st.integers(1, 3000), st.integers(1, 160), st.integers(1, 120))
def test_tiles_are_dealt_out_whole_and_sooner_than_in_one_more_round(tiles, programs, chunks):
    deal, whole = (_int4_launch._deal(tiles, programs, chunks, way) for way in (True, False))
    rounds, left = divmod(tiles, deal.programs)
    assert deal.time <= whole.time
    assert 1 <= deal.programs <= programs
    if not deal.helpers:
        assert deal == whole
        return
    # What the kernel makes of these numbers: each share has one helper, and each tile another program.
    assert deal.slabs == left * deal.shares
    assert (deal.helpers - 1) * deal.each < deal.slabs <= deal.helpers * deal.each
    assert deal.helpers + left <= deal.programs
    assert deal.each == 1 or deal.shares == 1
    assert 1 <= deal.head <= chunks - deal.shares
    assert rounds == tiles // programs


@given(st.integers(1, 500), st.integers(1, 160), st.integers(1, 100), st.booleans())
@example(96, 132, 86, True)  # each helper has three tiles
@example(32, 132, 86, True)  # each tile has three helpers
@example(172, 132, 32, True)  # a round of whole tiles first
def test_every_chunk_of_every_tile_has_one_program(tiles, processors, chunks, dealt_out):
    # The kernel's own functions of whole numbers, run by Python.
    numbers = SimpleNamespace(minimum=min, maximum=max, where=lambda yes, first, second: first if yes else second)
    deal = _int4_launch._deal(tiles, processors, chunks, dealt_out)
    four = deal[1:5]
    done, left = Counter(), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gluon_int4, "gl", numbers)
        for program in range(deal.programs):
            parts = _gluon_int4._parts.fn(program, deal.programs, tiles, four, dealt_out)
            assert parts >= 1
            for part in range(parts):
                tile, first, after = _gluon_int4._part.fn(
                    part, parts, program, deal.programs, tiles, chunks, four, dealt_out
                )
                assert 0 <= tile < tiles
                assert 0 <= first < after <= chunks
                done.update((tile, chunk) for chunk in range(first, after))
                if first > 0:
                    share = program * deal.each + part - tiles // deal.programs
                    left[share] = tile, first, program
                elif after < chunks:
                    # It adds the shares of its number among the tiles dealt out, of programs that have begun before it.
                    number = program - deal.helpers
                    assert number == tile - tiles // deal.programs * deal.programs
                    shares = [left[number * deal.shares + share] for share in range(deal.shares)]
                    assert [found[0] for found in shares] == [tile] * deal.shares
                    assert [found[1] for found in shares] == sorted(found[1] for found in shares)
                    assert all(found[2] < program for found in shares)
    assert len(done) == tiles * chunks
    assert set(done.values()) == {1}
    assert sorted(left) == list(range(deal.slabs))


@given(st.integers(1, 100), st.integers(1, 8), st.integers(1, 120), st.integers(2, 160))
def test_a_smaller_last_block_is_begun_by_some_of_the_programs(row_tiles, blocks, chunks, programs):
    wide, rest = _int4_launch._deals(row_tiles * blocks, row_tiles, chunks, programs, True, 64)
    assert wide.programs >= 1
    assert rest.programs >= 1
    assert wide.programs + rest.programs <= programs
    alone, none = _int4_launch._deals(row_tiles * blocks, 0, chunks, programs, True, 0)
    assert alone.time <= wide.time
    assert none.programs == none.slabs == 0


@pytest.mark.parametrize(
    ("count", "tokens", "rest"),
    [
        (256, 256, 0),
        (257, 256, 64),
        (320, 256, 64),
        (321, 256, 128),
        (608, 256, 128),
        (641, 256, 192),
        (705, 256, 0),
        (300, 192, 0),
        (200, 128, 0),
        (64, 256, 0),
        (100, 256, 0),
    ],
)
def test_the_rows_behind_full_blocks_are_taken_in_the_smallest_block_that_holds_them(count, tokens, rest):
    assert _int4_launch._rest(count, tokens) == rest


def schedule(tokens, split):
    return Schedule(128, tokens, 0, split, _gluon_int4.WARPS, _gluon_int4.SLOTS[tokens], scaled=True, persistent=True)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
class TestOnHopper:
    """What the kernel computes."""

    @pytest.mark.parametrize("rows", [1, 7, 96, 128, 130, 192, 256, 300, 400, 430, 608, 1100])
    @pytest.mark.parametrize(
        ("outputs", "inputs", "group_size", "dtype"),
        [
            (128, 128, 128, torch.bfloat16),
            (200, 256, 64, torch.bfloat16),
            (136, 384, 32, torch.float16),
            (1000, 1152, 64, torch.float16),  # nine chunks: shares of unequal size
            (72, 224, 32, torch.bfloat16),  # inputs that no chunk divides
            (11008, 512, 32, torch.bfloat16),  # several tiles to a multiprocessor
            (11008, 2048, 128, torch.bfloat16),  # helpers with shares of one tile, or of several
            (4000, 4992, 64, torch.float16),
        ],
    )
    def test_every_schedule_multiplies_within_the_bound_and_the_same_again(
        self, outputs, inputs, group_size, dtype, rows
    ):
        _, packed, scale = drawn(outputs, inputs, group_size, dtype)
        values = _int4_launch.values(packed, scale, (outputs, inputs), dtype).double()
        counters = torch.zeros(1024, dtype=torch.int32, device="cuda")
        x = normal(rows, rows, inputs, dtype=dtype).cuda()
        exact, sizes = x.double() @ values.t(), x.double().abs() @ values.abs().t()
        for tokens in (128, 160, 192, 256):
            for split in (1, 2):
                way = schedule(tokens, split)
                y = _int4_launch.linear(x, packed, scale, counters, outputs, way)
                bound = torch.finfo(dtype).eps * (exact.abs() + sizes)
                assert bool(((y.double() - exact).abs() <= bound).all()), way
                assert torch.equal(y, _int4_launch.linear(x, packed, scale, counters, outputs, way)), way
                assert not counters.any()

    def test_a_row_has_the_same_product_in_whatever_block_it_is(self):
        _, packed, scale = drawn(4096, 4096, 128, torch.bfloat16)
        x = normal(1, 608, 4096, dtype=torch.bfloat16).cuda()
        counters = torch.zeros(0, dtype=torch.int32, device="cuda")
        for tokens in (160, 192, 256):
            way = schedule(tokens, 1)
            y = _int4_launch.linear(x, packed, scale, counters, 4096, way)
            for rows in (slice(0, 256), slice(300, 512), slice(352, 608)):
                assert torch.equal(_int4_launch.linear(x[rows], packed, scale, counters, 4096, way), y[rows])

    @pytest.mark.parametrize("shift", [0, 1, 3])
    def test_rows_that_the_copy_engine_cannot_read_are_copied(self, shift):
        _, packed, scale = drawn(256, 384, 128, torch.bfloat16)
        counters = torch.zeros(0, dtype=torch.int32, device="cuda")
        wide = normal(2, 200, 390, dtype=torch.bfloat16).cuda()
        x = wide[:, shift : shift + 384]
        y = _int4_launch.linear(x, packed, scale, counters, 256, schedule(128, 1))
        assert torch.equal(y, _int4_launch.linear(x.contiguous(), packed, scale, counters, 256, schedule(128, 1)))

    def test_a_way_that_computes_wrongly_is_not_chosen(self, monkeypatch, tmp_path, caplog):
        monkeypatch.setenv("GRACEKIT_CACHE", str(tmp_path))
        _int4_choices._table.cache_clear()
        _, packed, scale = drawn(256, 384, 128, torch.bfloat16)
        linear = _int4_launch.linear
        monkeypatch.setattr(_int4_launch, "linear", lambda *arguments: 1.1 * linear(*arguments))
        x = normal(3, 128, 384, dtype=torch.bfloat16).cuda()
        counters = torch.zeros(1024, dtype=torch.int32, device="cuda")
        assert _int4_choices.choose(x, packed, scale, _int4_launch.Zeros(counters, counters[:0]), 256) is None
        assert "wrongly" in caplog.text
        _int4_choices._table.cache_clear()
