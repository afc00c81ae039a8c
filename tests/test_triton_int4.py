"""The W4A16 kernel, its layout and its tensor: on a GPU where there is one, else in Triton's interpreter and by dequantising."""

import copy
import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_cases import kinds, prepared, trained_values, weights
from strategies import generator, normal, seeds
from torch import nn
from torchao.utils import TorchAOBaseTensor

from gracekit.quant import LSQConfig, convert, quantize_rtn
from gracekit.quant import _int4_layout as layout
from gracekit.quant._int4_workspace import Workspace, workspace_of
from gracekit.quant.int4 import read_weight
from gracekit.quant.triton_tensor import Int4TritonTensor

pytest.importorskip("triton")
from kernel_cases import printed_by

from gracekit.quant import _int4_choices, _int4_launch
from gracekit.quant._int4_launch import Schedule
from gracekit.quant._triton_launch import processors

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
halves = st.sampled_from([torch.bfloat16, torch.float16])
# The interpreter rounds to bfloat16 wrongly: what is written in it is compared on a GPU alone.
written = halves if CUDA else st.just(torch.float16)
# Inputs that no chunk of 128 divides, outputs that no tile of 64 divides, one group, many.
sizes = st.sampled_from(
    [(1, 32, 32), (70, 160, 32), (64, 256, 64), (130, 384, 128), (65, 640, 128), (48, 192, 64)]
    # More tiles than a GPU has multiprocessors: some have a program each, others several.
    + [(2500, 640, 128)] * CUDA
)
narrow = st.builds(
    Schedule,
    rows=st.sampled_from([16, 32, 64]),
    tokens=st.sampled_from([8, 16, 32] if CUDA else [16, 32]),
    parts=st.sampled_from([2, 4]),
    split=st.sampled_from([1, 2, 3]),
    warps=st.just(4),
    stages=st.sampled_from([1, 3]),
    scaled=st.just(False),
    persistent=st.just(False),
    exchanges=st.just(False),
    launches=st.booleans(),
)
wide = st.builds(
    Schedule,
    rows=st.sampled_from([64, 128, 256]),
    tokens=st.sampled_from([8, 16, 32, 64, 128] if CUDA else [16, 32]),
    parts=st.just(0),
    split=st.sampled_from([1, 2, 4, 8]),
    warps=st.just(4),
    stages=st.sampled_from([1, 3]),
    scaled=st.booleans(),
    persistent=st.just(False),
    exchanges=st.just(False),
    launches=st.booleans(),
)


def drawn(seed, outputs, inputs, group_size, dtype):
    """(codes, scales, packed codes, packed scales)."""
    codes = torch.randint(-8, 8, (outputs, inputs), generator=generator(seed)).to(torch.int8)
    scale = (
        (torch.rand(outputs, inputs // group_size, generator=generator(seed + 1)) + 0.1).to(torch.bfloat16).to(dtype)
    )
    packed = layout.pack_codes(codes), layout.pack_scales(scale.float(), group_size, inputs)
    return (codes, scale, *(tensor.to(DEVICE) for tensor in packed))


def values_of(codes, scale):
    """W in float64, which holds every product exactly."""
    return codes.double() * scale.double().repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def assert_within_the_bound(y, x, weight):
    """The bound that convert states for a kernel that multiplies by q * s as it is."""
    x, weight, eps = x.cpu().double(), weight.cpu().double(), torch.finfo(y.dtype).eps
    exact, sizes = x @ weight.t(), x.abs() @ weight.abs().t()
    # The interpreter cuts bfloat16 off instead of rounding it.
    unit = eps if y.dtype == torch.bfloat16 and not CUDA else eps / 2
    tiny = torch.finfo(y.dtype).smallest_normal
    assert bool(((y.cpu().double() - exact).abs() <= unit * exact.abs() + 2**-20 * sizes + tiny).all())


@given(seeds, sizes)
def test_packed_codes_and_scales_can_be_read_back(seed, size):
    outputs, inputs, group_size = size
    codes, scale, packed, scales = drawn(seed, *size, torch.bfloat16)
    assert packed.shape == (-(-outputs // 64), -(-inputs // 128), 64, 16)
    assert torch.equal(layout.unpack_codes(packed, outputs, inputs).cpu(), codes)
    assert torch.equal(layout.unpack_scales(scales, outputs, inputs // group_size).cpu(), scale.float())


def test_the_layout_is_the_one_that_is_described():
    """Input 16 * plane + element is in word 2j or 2j + 1, half and place as the module says, found here one by one."""
    codes = torch.randint(-8, 8, (3, 256), generator=generator(0)).to(torch.int8)
    packed = layout.pack_codes(codes)
    for row, column in [(0, 0), (1, 17), (2, 130), (0, 255), (2, 100), (1, 63)]:
        chunk, (plane, element) = column // 128, divmod(column % 128, 16)
        word = int(packed[0, chunk, row, 2 * (element // 2) + plane // 4]) & 0xFFFFFFFF
        assert (word >> (16 * (element % 2) + 4 * (plane % 4)) & 15) - 8 == int(codes[row, column])


@settings(max_examples=25)
@given(seeds, sizes, written, st.sampled_from([1, 3, 17, 40]), narrow | wide)
def test_the_kernel_multiplies_within_the_bound_whatever_the_schedule(seed, size, dtype, rows, schedule):
    codes, scale, packed, scales = drawn(seed, *size, dtype)
    x = normal(seed + 2, rows, 2 * size[1], dtype=dtype).to(DEVICE)[:, : size[1]]  # rows that are not contiguous
    needed = schedule.words(len(packed) * 64, rows, processors(torch.device(DEVICE)))
    counters = torch.zeros(needed, dtype=torch.int32, device=DEVICE)
    y = _int4_launch.linear(x, packed, scales, counters, size[0], schedule)
    assert y.shape == (rows, size[0])
    assert y.dtype == dtype
    weight = values_of(codes, scale)
    assert_within_the_bound(y, x, weight.to(dtype) if schedule.scaled else weight)
    assert not bool(counters.any())
    assert torch.equal(_int4_launch.linear(x, packed, scales, counters, size[0], schedule), y)


def test_columns_that_are_not_contiguous_are_multiplied_too():
    codes, scale, packed, scales = drawn(0, 64, 128, 64, torch.float16)
    x = normal(1, 128, 5, dtype=torch.float16).to(DEVICE).t()
    counters = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    y = _int4_launch.linear(x, packed, scales, counters, 64, Schedule(64, 16, 4, 1, 4, 3, scaled=False))
    assert_within_the_bound(y, x, values_of(codes, scale))


@settings(max_examples=15)
@given(seeds, sizes, written)
def test_the_kernel_writes_the_values_that_the_products_stand_for(seed, size, dtype):
    codes, scale, packed, scales = drawn(seed, *size, dtype)
    values = _int4_launch.values(packed, scales, size[:2], dtype)
    assert torch.equal(values.cpu(), values_of(codes, scale).to(dtype))


@given(seeds, kinds, halves, st.sampled_from([32, 64, 128]))
def test_codes_scales_and_values_survive_the_triton_form(seed, kind, dtype, group_size):
    model = prepared(weights(kind, seed, 40, 2 * group_size, dtype, group_size), group_size=group_size, shift=seed)
    values, scale = trained_values(model)
    if not torch.equal(scale.to(dtype).double(), scale):
        with pytest.raises(ValueError, match=r"target='triton' needs scales that .* holds exactly"):
            convert(model, "triton")
        return
    before = read_weight(model["layer"])
    layer = convert(model, "triton")["layer"]
    assert isinstance(layer.weight, Int4TritonTensor)
    assert isinstance(layer.weight, TorchAOBaseTensor)
    assert torch.equal(layer.weight.dequantize(), values)
    after = read_weight(layer)
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.scale.double(), scale)
    assert torch.equal(read_weight(convert(model, "portable")["layer"]).codes, before.codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3), (300,)])
def test_a_converted_layer_multiplies_within_the_bound(rows, dtype):
    model = prepared(weights("outliers", 1, 200, 384, dtype, 64), group_size=64, shift=1).to(DEVICE)
    values, _ = trained_values(model)
    bias = model["layer"].bias.detach().double().cpu()
    layer = convert(model, "triton")["layer"]
    x = normal(2, *rows, 384, dtype=dtype).to(DEVICE)
    y = layer(x)
    assert y.shape == (*rows, 200)
    flat, values = x.reshape(-1, 384).double().cpu(), values.double().cpu()
    trained, sizes = flat @ values.t(), flat.abs() @ values.abs().t()
    error = (y.reshape(-1, 200).double().cpu() - (trained + bias)).abs()
    # The bound to training, and the rounding of the sum with the bias.
    eps = torch.finfo(dtype).eps
    assert bool((error <= eps * (trained.abs() + sizes) + eps * (trained + bias).abs()).all())


def test_a_compiled_layer_gives_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("GRACEKIT_CACHE", str(tmp_path))
    model = prepared(weights("normal", 1, 64, 128, torch.bfloat16, 64), group_size=64).to(DEVICE)
    layer = convert(model, "triton")["layer"]
    x = normal(2, 3, 128, dtype=torch.bfloat16).to(DEVICE)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_the_gradient_that_a_product_does_not_have_is_asked_for_in_vain(monkeypatch, tmp_path):
    monkeypatch.setenv("GRACEKIT_CACHE", str(tmp_path))
    layer = convert(prepared(weights("normal", 1, 64, 128, torch.float16, 64), group_size=64), "triton")["layer"]
    x = normal(2, 3, 128, dtype=torch.float16).requires_grad_()
    with pytest.raises(RuntimeError, match="int4_linear"):
        layer(x).sum().backward()
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_a_converted_layer_is_copied_moved_and_described():
    layer = convert(prepared(weights("normal", 1, 64, 128, torch.bfloat16, 64), group_size=64), "triton")["layer"]
    again = copy.deepcopy(layer).to(DEVICE)
    assert torch.equal(again.weight.dequantize().cpu(), layer.weight.dequantize())
    assert again.weight.packed.data_ptr() != layer.weight.packed.data_ptr()
    assert layer.weight._quantization_type() == "shape=(64, 128), block_size=[1, 64], device=cpu"  # what torchao prints


@pytest.mark.parametrize(
    ("dtype", "group_size", "said"),
    [
        (torch.float32, 64, r"needs bfloat16 or float16 activations \(pass dtype=torch.bfloat16\), got torch.float32"),
        (torch.bfloat16, 16, r"needs group_size in \(32, 64, 128\), got group_size=16 \(layer\)"),
        (torch.bfloat16, 256, r"needs group_size in \(32, 64, 128\), got group_size=256 \(layer\)"),
    ],
)
def test_what_the_kernel_cannot_hold_is_refused(dtype, group_size, said):
    model = prepared(weights("normal", 0, 16, 256, dtype, group_size), group_size=group_size)
    with pytest.raises(ValueError, match=said):
        convert(model, "triton")


def test_inputs_of_another_dtype_or_width_are_refused():
    layer = convert(prepared(weights("normal", 0, 16, 128, torch.bfloat16, 64), group_size=64), "triton")["layer"]
    with pytest.raises(TypeError, match=r"dtype torch.bfloat16 that the weight was converted for, got torch.float32"):
        layer(torch.ones(2, 128))
    with pytest.raises(ValueError, match=r"in_features=128 columns, got shape \(2, 64\)"):
        layer(torch.ones(2, 64, dtype=torch.bfloat16))


def test_rounding_to_nearest_goes_into_the_form_as_well():
    model = torch.nn.Sequential(torch.nn.Linear(128, 32, dtype=torch.bfloat16))
    reference = quantize_rtn(copy.deepcopy(model), LSQConfig(group_size=32), target="reference")
    assert torch.equal(
        quantize_rtn(model, LSQConfig(group_size=32), target="triton")[0].weight.dequantize(),
        reference[0].weight.dequantize(),
    )


def converted(sizes=(128, 256, 64)):
    layers = [nn.Linear(size, after, dtype=torch.bfloat16) for size, after in itertools.pairwise(sizes)]
    return quantize_rtn(nn.Sequential(*layers), LSQConfig(group_size=32), target="triton")


def workspaces(*models):
    return {layer.weight.workspace.number for model in models for layer in model}


def test_the_weights_of_a_model_have_one_workspace_and_those_of_a_copy_another(tmp_path):
    model, other = converted(), converted()
    assert len(workspaces(model)) == len(workspaces(other)) == 1
    assert workspaces(model) != workspaces(other)
    assert model[0].weight.clone().workspace is model[1].weight.workspace
    torch.save(model, tmp_path / "model.pt")
    for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert len(workspaces(copied)) == 1
        assert workspaces(copied) != workspaces(model)
    # It is no part of a weight, which another model's can be copied to.
    model.load_state_dict(other.state_dict())
    assert workspaces(model) != workspaces(other)
    assert torch.equal(model[0].weight.dequantize(), other[0].weight.dequantize())


def test_a_workspace_that_nobody_has_is_gone():
    number = Workspace().number
    with pytest.raises(KeyError):
        workspace_of(number, torch.device("cpu"))


def test_a_workspace_is_not_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    workspace = Workspace()
    assert workspace_of(workspace.number, torch.device("cpu")).numel() == 0
    assert not workspace._zeros


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gracekit.quant._triton_int4 import wide_kernel as kernel

kinds = {"x": "*bf16", "packed": "*i32", "scale": "*fp32", "y": "*bf16", "partial": "*fp32", "counters": "*i32"}
kinds |= dict.fromkeys(["M", "N", "K", "stride", "chunks", "padded", "whole"], "i32")
constants = dict(STEPS=32, G=128, SPLIT=2, ROWS=64, STAGES=3, MASKED=False, ASSEMBLY=True, EARLY=True, LAUNCHES=False, BAND=8)
for tokens, scaled in ((16, False), (64, True), (128, True)):
    given = constants | {"TOKENS": tokens, "SCALED": scaled}
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    whole = [kernel.arg_names.index(name) for name in (*list(kinds)[:6], "stride")]
    aligned = {(index,): [["tt.divisibility", 16]] for index in whole}
    source = ASTSource(kernel, signature, given, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "launch_pdl": True})
    print(made.asm["ptx"])
"""


def test_no_product_on_hopper_still_reads_operands_that_the_next_step_overwrites():
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", printed_by(COMPILE))
    assert len(waits) >= 3
    assert set(waits) == {"0"}


@given(
    st.integers(1, 8192),
    st.sampled_from([64, 4096, 11008, 151936]),
    st.integers(1, 120),
    st.sampled_from([16, 132]),
    st.booleans(),
    st.booleans(),
)
def test_schedules_worth_timing_fit_the_kernel(rows, outputs, chunks, processors, persistent, vector):
    vector &= rows <= 2
    found = _int4_choices.schedules(rows, outputs, chunks, processors, persistent=persistent, vector=vector)
    assert found
    assert len(set(found)) == len(found) <= 36
    assert any(schedule.persistent for schedule in found) == (persistent and rows > 64)
    assert any(schedule.is_vector for schedule in found) == vector
    assert not any(schedule.exchanges for schedule in found)
    for schedule in found:
        assert schedule.rows in (16, 32, 64, 128)
        if schedule.is_vector:
            assert schedule.tokens == rows
        else:
            assert schedule.tokens in ((128, 160, 192, 256) if schedule.persistent else _int4_choices._WIDE)
        assert schedule.split == 1 or schedule.persistent or schedule.split * 2 <= chunks
        assert not schedule.launches or (schedule.warps <= 4 and schedule.tokens <= 32)


@given(st.integers(1, 2000), st.sampled_from([8, 132]))
def test_the_last_tiles_are_dealt_out_so_that_no_multiprocessor_has_much_more_to_do(tiles, count):
    one, *dealt = _int4_choices._splits(tiles, count)
    assert one == 1
    for split in dealt:
        schedule = Schedule(16, 8, 4, split, 4, 3, scaled=False)
        whole = schedule.whole(16 * tiles, 8, count)
        assert whole % count == 0
        assert 0 <= tiles - whole < count
        fullest = whole // count + -(-(tiles - whole) * split // count) / split
        assert tiles / count <= fullest <= -(-tiles // count)
    assert bool(dealt) == bool(tiles % count)


@given(seeds, st.floats(-4, 4), st.integers(0, 63))
def test_products_agree_within_the_rounding_of_halves_and_no_further(seed, size, place):
    dense = normal(seed, 8, 8, scale=10**size).bfloat16().float()
    rounded = (dense * (1 + 2**-8)).bfloat16().float()
    assert _int4_choices._agree(rounded, dense)
    for wrong in (dense.abs().max(), torch.tensor(torch.nan), torch.tensor(torch.inf)):
        other = dense.clone()
        other.view(-1)[place] += wrong
        assert not _int4_choices._agree(other, dense)


@pytest.fixture
def table(tmp_path, monkeypatch):
    made = _int4_choices.Table(tmp_path / "sub" / "table.json")
    monkeypatch.setattr(_int4_choices, "_table", lambda device: made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def ask(rows, table):
    _, _, packed, scales = drawn(0, 64, 128, 64, torch.float16)
    x = torch.ones(rows, 128, dtype=torch.float16, device=DEVICE)
    zeros = _int4_launch.Zeros(torch.zeros(16, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    return _int4_choices.choose(x, packed, scales, zeros, 64)


@given(st.integers(1, 20_000))
def test_a_size_class_holds_its_rows_and_little_more(rows):
    found = _int4_choices.size_class(rows)
    assert found == _int4_choices.size_class(found) <= 8192
    assert found >= min(rows, 8192)
    assert found < rows * (2 if rows <= 64 else 1.25)


def test_a_choice_is_measured_once_for_each_size_class_and_kept_in_a_file(table, monkeypatch):
    asked = []
    entry = {"schedule": [64, 16, 4, 1, 4, 3, False], "microseconds": 1.0, "dense_microseconds": 2.0}
    monkeypatch.setattr(_int4_choices, "_measure", lambda rows, *rest: asked.append(rows) or entry)
    assert [ask(rows, table) for rows in (1, 3, 4, 5, 8)] == [Schedule(64, 16, 4, 1, 4, 3, scaled=False)] * 5
    assert asked == [1, 4, 8]
    assert ask(100_000, table) == Schedule(64, 16, 4, 1, 4, 3, scaled=False)
    assert asked[-1] == 8192
    again = _int4_choices.Table(table.path)
    assert again.entries == table.entries
    assert list(table.path.parent.iterdir()) == [table.path]


def test_tables_of_two_processes_are_put_together(table):
    other = _int4_choices.Table(table.path)
    other.add("a", {"schedule": None})
    table.add("b", {"schedule": [64, 16, 4, 1, 4, 3, False]})
    assert set(json.loads(table.path.read_text())) == {"a", "b"}


def test_nothing_is_measured_during_a_capture_and_the_dense_way_taken(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_int4_choices, "_measure", None)
    assert ask(1, table) is None


def test_a_product_without_a_workspace_is_measured_apart(table, monkeypatch):
    exchanging = Schedule(64, 8, 0, 2, 2, 3, scaled=False, exchanges=True)
    monkeypatch.setattr(_int4_choices.kernel, "has_few", lambda x, packed: len(x) <= 16)
    monkeypatch.setattr(_int4_choices, "_measure", lambda *_: {"schedule": list(exchanging)})
    assert [ask(rows, table) for rows in (4, 32)] == [exchanging, exchanging]
    assert [key.endswith("nothing exchanged") for key in table.entries] == [True, False]


def test_a_damaged_file_is_measured_anew_and_one_that_cannot_be_written_is_warned_of(tmp_path, caplog):
    path = tmp_path / "table.json"
    path.write_text("{")
    table = _int4_choices.Table(path)
    table.add("a", {"schedule": None})
    assert json.loads(path.read_text()) == {"a": {"schedule": None}}
    stuck = _int4_choices.Table(path / "below a file" / "table.json")
    stuck.add("b", {"schedule": None})
    assert "cannot be written" in caplog.text
    assert stuck.entries["b"] == {"schedule": None}


def test_the_folder_of_tables_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GRACEKIT_CACHE", str(tmp_path))
    assert _int4_choices.cache_folder() == tmp_path
    monkeypatch.delenv("GRACEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _int4_choices.cache_folder() == tmp_path / "gracekit"


class TestOnCuda:
    """What only a GPU can show: the assembly, the measured table, graphs."""

    pytestmark = needs_cuda

    @pytest.fixture(autouse=True)
    def _own_table(self, monkeypatch, tmp_path):
        monkeypatch.setenv("GRACEKIT_CACHE", str(tmp_path))
        _int4_choices._table.cache_clear()
        yield
        _int4_choices._table.cache_clear()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("rows", [1, 2, 8, 16, 33, 64, 1000])
    def test_the_measured_choice_multiplies_within_the_bound(self, rows, dtype):
        model = prepared(weights("normal", 1, 1000, 1152, dtype, 128), group_size=128, bias=False).cuda()
        values, _ = trained_values(model)
        layer = convert(model, "triton")["layer"]
        x = normal(2, rows, 1152, dtype=dtype).cuda()
        y, values = layer(x).double().cpu(), values.double().cpu()
        trained, sizes = x.double().cpu() @ values.t(), x.double().cpu().abs() @ values.abs().t()
        assert bool(((y - trained).abs() <= torch.finfo(dtype).eps * (trained.abs() + sizes)).all())

    @pytest.mark.parametrize("rows", [1, 8, 16, 32])
    def test_captured_products_that_need_each_other_are_the_eager_ones_at_every_replay(self, rows):
        model = prepared(weights("normal", 1, 1024, 1024, torch.bfloat16, 128), group_size=128, bias=False).cuda()
        layer = convert(model, "triton")["layer"]
        x = normal(2, rows, 1024, dtype=torch.bfloat16).cuda()
        expected = layer(layer(layer(x)))
        assert bool(expected.isfinite().all())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(layer(layer(x)))  # a kernel may be launched before the one in front has ended
        for _ in range(3):
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, expected)
