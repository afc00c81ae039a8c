"""The 4-bit product of one or two rows in whole numbers: its assembly run by Python, how it compiles, and what a GPU computes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from ptx_machine import run_ptx
from strategies import normal, seeds

triton = pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")
from kernel_cases import assembled, drawn, printed_by

from gracekit.quant import _gluon_vector, _int4_launch
from gracekit.quant._int4_choices import _VECTOR
from gracekit.quant._int4_launch import Schedule
from gracekit.quant._int4_layout import pack_codes

AMPERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
groups = st.sampled_from([32, 64, 128])


def signed_bytes(word: int) -> list[int]:
    return np.array([word], np.uint32).view(np.int8).tolist()


@given(seeds, groups)
def test_unpacked_words_are_the_codes_of_the_inputs_that_digits_are_made_of(seed, group_size):
    codes = torch.randint(-8, 8, (1, 128), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = [int(word) & 0xFFFFFFFF for word in pack_codes(codes)[0, 0, 0]]
    seen = []
    for quad in range(4):
        given_ = {f"${8 + i}": words[4 * quad + i] for i in range(4)}
        for plane, word in enumerate(run_ptx(_gluon_vector.UNPACKING[group_size], given_, 8)):
            first = _gluon_vector._first_input.fn(16 * (plane // 4) + 4 * quad + plane % 4, group_size)
            # What `_digits` does with two pairs, the second of which is so far on.
            inputs = [first + i for i in range(4)] if group_size == 32 else [first, first + 32, first + 1, first + 33]
            assert signed_bytes(word) == [16 * int(codes[0, k]) for k in inputs]
            assert {k // group_size for k in inputs} == {16 * plane // group_size}
            seen += inputs
    assert sorted(seen) == list(range(128))


values = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0, 2.0**-13, 255 / 256, -255 / 256])


@given(st.tuples(values, values, values, values), st.integers(-60, 60))
@example((1.0, -1.0, 0.5, -0.5), 0)
def test_digits_are_bytes_that_stand_for_the_input_within_half_of_the_last(inputs, exponent):
    x = np.ldexp(np.array(inputs, np.float32), exponent).astype(np.float32)
    up = np.float32(2.0 ** (20 - exponent))  # as for a largest input of at least 2^exponent, and below twice that
    bits = {f"${3 + i}": int(number.view(np.uint32)) for i, number in enumerate((*x, up))}
    d0, d1, d2 = (np.array(signed_bytes(word)) for word in run_ptx(_gluon_vector.DIGITS, bits, 3))
    whole = d0 + 256 * d1 + 65536 * d2
    assert np.abs(whole - x.astype(np.float64) * float(up)).max() <= 0.5
    assert np.abs(whole).max() <= 2**20


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from gracekit.quant._gluon_vector import vector_kernel as kernel

for capability, group_size, tokens, masked, dtype in CASES:
    kinds = {"x": f"*{dtype}", "packed": "*i32", "scale": "*fp32", "y": f"*{dtype}"}
    kinds |= dict.fromkeys(["N", "K", "stride", "chunks", "padded"], "i32")
    constants = {"STEPS": 4, "G": group_size, "ROWS": 32, "TOKENS": tokens, "PARTS": 8, "DEPTH": 2, "MASKED": masked}
    early = capability >= 90
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in kinds if name != "chunks"}
    source = GluonASTSource(kernel, signature, constants | {"EARLY": early}, aligned)
    options = {"num_warps": 8} | ({"launch_pdl": True} if early else {})
    print(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"] + "END OF A CASE")
"""
CASES = [(90, 128, 1, False, "bf16"), (90, 32, 2, True, "fp16"), (80, 64, 1, True, "bf16")]


def test_each_product_of_bytes_is_one_of_the_tensor_cores(tmp_path):
    script = COMPILE.replace("CASES", repr(CASES))
    *assembly, _ = printed_by(script).split("END OF A CASE")
    assert len(assembly) == len(CASES)
    for (capability, *_), ptx in zip(CASES, assembly, strict=True):
        # Two blocks of 16 outputs, 4 steps, 4 times 32 inputs.
        assert len(re.findall(r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32", ptx)) == 32
        assert ("griddepcontrol" in ptx) == (capability >= 90)
        said = assembled(ptx, f"sm_{capability}{'a' * (capability == 90)}", tmp_path)
        assert " 0 bytes spill stores" in said


def product(x, packed, scale, outputs, rows=32, parts=8, steps=2):
    counters = torch.zeros(0, dtype=torch.int32, device="cuda")
    schedule = Schedule(rows, len(x), parts, 1, parts, steps, scaled=False)
    return _int4_launch.linear(x, packed, scale, counters, outputs, schedule)


@pytest.mark.gpu
@pytest.mark.skipif(not AMPERE, reason="needs a CUDA device of compute capability 8.0")
class TestOnCuda:
    """What the kernel computes."""

    @pytest.mark.parametrize("tokens", [1, 2])
    @pytest.mark.parametrize("outlier", [1.0, 1e3])
    @pytest.mark.parametrize(
        ("outputs", "inputs", "group_size", "dtype"),
        [
            (64, 128, 128, torch.bfloat16),
            (200, 256, 64, torch.bfloat16),
            (136, 384, 32, torch.float16),
            (1000, 1152, 64, torch.float16),  # nine chunks
            (72, 224, 32, torch.bfloat16),  # inputs that no chunk divides
            (4096, 4096, 128, torch.bfloat16),
            (1001, 11008, 32, torch.bfloat16),
            (64, 8160, 32, torch.float16),
        ],
    )
    def test_every_schedule_multiplies_within_the_bound_and_the_same_again(
        self, outputs, inputs, group_size, dtype, outlier, tokens
    ):
        weight, packed, scale = drawn(outputs, inputs, group_size, dtype)
        x = normal(tokens, tokens, inputs + 2, scale=0.1)
        x[:, ::97] *= outlier
        x = x.to(dtype).cuda()[:, :inputs]
        exact = x.double() @ weight.t()
        chunks = torch.nn.functional.pad(x.double().abs(), (0, -inputs % 128)).view(tokens, -1, 128)
        largest = chunks.amax(2, keepdim=True).expand_as(chunks).reshape(tokens, -1)[:, :inputs]
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-20 * (largest @ weight.abs().t())
        for way in _VECTOR:
            y = product(x, packed, scale, outputs, *way)
            assert y.shape == (tokens, outputs)
            assert bool(((y.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()), way
            assert torch.equal(y, product(x, packed, scale, outputs, *way)), way

    @pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e30])
    def test_inputs_of_any_size_are_multiplied_as_well(self, size):
        weight, packed, scale = drawn(128, 1024, 128, torch.bfloat16)
        x = normal(3, 1, 1024, scale=size).to(torch.bfloat16).cuda()
        x[:, 512:] = 0
        y, exact = product(x, packed, scale, 128).double(), x.double() @ weight.t()
        assert torch.allclose(y, exact, rtol=2**-8, atol=2**-18 * float(exact.abs().max()))

    @pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
    def test_a_row_with_an_input_that_is_not_finite_has_no_number(self, wrong):
        _, packed, scale = drawn(128, 1024, 64, torch.bfloat16)
        x = normal(4, 2, 1024, dtype=torch.bfloat16).cuda()
        expected = product(x, packed, scale, 128)
        x[1, 700] = wrong
        y = product(x, packed, scale, 128)
        assert bool(y[1].isnan().all())
        assert torch.equal(y[0], expected[0])

    @pytest.mark.parametrize("shift", [0, 1, 2, 3])
    def test_rows_that_cannot_be_read_in_pairs_are_copied(self, shift):
        _, packed, scale = drawn(256, 384, 128, torch.bfloat16)
        x = normal(2, 2, 389, dtype=torch.bfloat16).cuda()[:, shift : shift + 384]
        assert torch.equal(product(x, packed, scale, 256), product(x.contiguous(), packed, scale, 256))
