import contextlib
import json
import pathlib
import tempfile

import pytest
import reference_quant as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_cases import dtypes, kinds, prepared, weights
from safetensors.torch import load_file, safe_open
from strategies import generator, normal, seeds
from torch import nn

from gracekit.quant import (
    LSQConfig,
    convert,
    export_awq,
    export_compressed_tensors,
    import_grace_sidecar,
    prepare_qat,
    quantize_rtn,
)
from gracekit.quant.int4 import read_weight

EXPORTS = [export_awq, export_compressed_tensors]


def model_of_two(config=None, second=(32, 16)):
    model = nn.Sequential(nn.Linear(64, second[0]), nn.Linear(*second), nn.Linear(second[1], 4))
    prepare_qat(model, config or LSQConfig(group_size=32), filter_fn=lambda module, name: name != "2")
    return model


def loaded(directory):
    return load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("target", [None, "cpu", "portable", "reference"])
def test_awq_holds_the_trained_codes_and_scales(tmp_path, target):
    model = model_of_two()
    held = {name: read_weight(model[int(name)]) for name in ("0", "1")}
    if target:
        convert(model, target)
    export_awq(model, tmp_path / "out")
    tensors, config = loaded(tmp_path / "out")
    for name, weight in held.items():
        assert torch.equal(reference.unpack_awq(tensors[f"{name}.qweight"]).t() - 8, weight.codes.long())
        assert bool((reference.unpack_awq(tensors[f"{name}.qzeros"]) == 8).all())
        assert tensors[f"{name}.scales"].dtype == torch.float16
        assert torch.equal(tensors[f"{name}.scales"].t().double(), weight.scale.double())
        assert torch.equal(tensors[f"{name}.bias"], model[int(name)].bias)
    assert set(tensors) == {f"{n}.{part}" for n in "01" for part in ("qweight", "qzeros", "scales", "bias")} | {
        "2.weight",
        "2.bias",
    }
    assert torch.equal(tensors["2.weight"], model[2].weight)
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": ["2"],
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("target", [None, "reference"])
def test_compressed_tensors_hold_the_trained_codes_and_scales(tmp_path, bits, target):
    model = model_of_two(LSQConfig(bits=bits, group_size=32))
    held = {name: read_weight(model[int(name)]) for name in ("0", "1")}
    if target:
        convert(model, target)
    export_compressed_tensors(model, tmp_path)
    tensors, config = loaded(tmp_path)
    for name, weight in held.items():
        outputs, inputs = weight.codes.shape
        assert torch.equal(reference.unpack_int32(tensors[f"{name}.weight_packed"], bits, inputs), weight.codes.long())
        assert torch.equal(tensors[f"{name}.weight_scale"].double(), weight.scale.double())
        assert tensors[f"{name}.weight_scale"].dtype == torch.float32
        assert tensors[f"{name}.weight_shape"].tolist() == [outputs, inputs]
        assert f"{name}.weight" not in tensors
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["format"]) == ("compressed-tensors", "pack-quantized")
    assert quantization["config_groups"]["group_0"]["weights"]["num_bits"] == bits
    assert quantization["ignore"] == ["2"]


@pytest.mark.parametrize("export", EXPORTS)
def test_nothing_that_exists_is_overwritten(tmp_path, export):
    model = model_of_two()
    export(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"config.json", "model.safetensors"}
    with pytest.raises(FileExistsError, match=r"got model\.safetensors, config\.json in"):
        export(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("export", EXPORTS)
def test_a_tied_weight_is_written_once(tmp_path, export):
    model = model_of_two(second=(32, 32))
    model.append(nn.Embedding(4, 32))
    model[3].weight = model[2].weight
    export(model, tmp_path)
    assert "2.weight" in loaded(tmp_path)[0]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "3.weight": "2.weight"}


@pytest.mark.parametrize("export", EXPORTS)
def test_layers_of_unlike_groups_are_refused(tmp_path, export):
    model = model_of_two()
    prepare_qat(model, LSQConfig(group_size=8), filter_fn=lambda module, name: name == "2")
    with pytest.raises(
        ValueError, match=r"one \(bits, group_size\) for all layers, got \(4, 32\) \(0\) and \(4, 8\) \(2\)"
    ):
        export(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("export", "make", "match"),
    [
        (export_awq, lambda: model_of_two(LSQConfig(bits=8, group_size=32)), r"AWQ needs bits=4, got bits=8 \(0\)"),
        (
            export_awq,
            lambda: model_of_two(second=(32, 12)),
            r"AWQ needs out_features that 8 divides, got out_features=12 \(1\)",
        ),
        (
            export_awq,
            lambda: prepared(weights("tiny", 0, 16, 64, torch.bfloat16, 32)),
            r"AWQ needs scales that torch.float16 holds exactly, got .* \(layer\)",
        ),
        (
            export_compressed_tensors,
            lambda: prepared(weights("normal", 0, 16, 64, torch.bfloat16, 32), scale_dtype=torch.float32),
            r"needs scales that torch.bfloat16 holds exactly, got .* \(layer\)",
        ),
        (
            export_compressed_tensors,
            lambda: model_of_two(LSQConfig(bits=3, group_size=32)),
            r"needs bits in .*, got bits=3 \(0\)",
        ),
        (
            export_compressed_tensors,
            lambda: prepared(weights("normal", 0, 16, 12, torch.float32, 4), group_size=4),
            r"in_features of whole words, got in_features=12 \(layer\)",
        ),
        (export_awq, lambda: torch.compile(model_of_two()), "the one inside its wrapper, got OptimizedModule"),
        (export_compressed_tensors, lambda: nn.DataParallel(model_of_two()), "its wrapper, got DataParallel"),
        (export_awq, lambda: nn.Sequential(nn.Linear(8, 8)), "model must have a quantised layer"),
    ],
)
def test_what_a_format_cannot_hold_is_named_and_nothing_is_written(tmp_path, export, make, match):
    with pytest.raises(ValueError, match=match):
        export(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr("gracekit.quant.formats._files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_awq(model_of_two(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def sidecar_of(model, names, *, bits, group_size, dtype=torch.float32, spread=0.9):
    """A file's content as the authors write it: unrounded scales, weights on their grid, row-major scales in one dimension."""
    content = {}
    for name in names:
        layer = model.get_submodule(name)
        weight = layer.weight.detach().double()
        high = 2 ** (bits - 1) - 1
        scale = spread * weight.view(len(weight), -1, group_size).abs().amax(-1) / high
        log_scale = scale.log().float()
        content[f"{name}.weight"] = reference.fake_quantize(weight, log_scale.exp(), bits).to(dtype)
        content[f"{name}.log_scale"] = log_scale.reshape(-1)
        if layer.bias is not None:
            content[f"{name}.bias"] = torch.randn_like(layer.bias)
    return content


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_a_sidecar_gives_its_codes_biases_and_rounded_scales(tmp_path, bits, model_dtype):
    model = nn.Sequential(nn.Linear(64, 16), nn.Linear(64, 8, bias=False), nn.Linear(8, 4))
    content = sidecar_of(model, ["0", "1"], bits=bits, group_size=16)
    model.to(model_dtype)
    torch.save(content, tmp_path / "grace.pt")
    assert import_grace_sidecar(model, tmp_path / "grace.pt", bits=bits) == ["0", "1"]
    for name in ("0", "1"):
        layer = model.get_submodule(name)
        log_scale = content[f"{name}.log_scale"].view(layer.out_features, -1)
        held = read_weight(layer)
        assert torch.equal(layer.weight_fake_quantizer.log_scale, log_scale)
        assert torch.equal(held.codes.long(), reference.codes(content[f"{name}.weight"], log_scale.exp(), bits))
        assert torch.equal(held.scale, log_scale.exp().bfloat16())
        assert layer.weight.dtype == model_dtype
        # bfloat16 scales, values and weights: three roundings of at most 2^-9.
        torch.testing.assert_close(
            held.dequantize().double(), content[f"{name}.weight"].double(), rtol=2**-7, atol=0, check_dtype=False
        )
    assert torch.equal(model[0].bias, content["0.bias"].to(model_dtype))
    convert(model, "reference")


def test_four_bit_weights_of_a_sidecar_are_taken_as_they_are(tmp_path):
    model = nn.Sequential(nn.Linear(64, 16))
    content = sidecar_of(model, ["0"], bits=4, group_size=32)
    torch.save(content, tmp_path / "grace.pt")
    import_grace_sidecar(model, tmp_path / "grace.pt")
    assert torch.equal(model[0].weight, content["0.weight"])


class Anything:
    pass


def spoil(**changes):
    def change(content):
        return {key: value for key, value in (content | changes).items() if value is not None}

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: [1], "must hold a dict of tensors, got list"),
        (lambda content: {}, "must hold a dict of tensors"),
        (lambda content: content | {"0.extra": Anything()}, "weights_only=True"),
        (spoil(**{"0.extra": torch.ones(1)}), "got '0.extra'"),
        (spoil(**{"0.log_scale": None}), r"a weight and a log_scale, got bias and weight \(0\)"),
        (spoil(**{"0.weight": torch.ones(16, 32)}), r"layer's shape \(16, 64\), got \(16, 32\) \(0\)"),
        (spoil(**{"0.log_scale": torch.zeros(48)}), r"number per group of a \(16, 64\) weight, got 48 \(0\)"),
        (spoil(**{"0.log_scale": torch.full((32,), float("nan"))}), r"finite, got NaN or infinity \(0\)"),
        (spoil(**{"0.bias": torch.zeros(3)}), r"layer's shape \(16,\), got \(3,\) \(0\)"),
        (
            spoil(**{"0.log_scale": torch.full((32,), -9.0)}),
            r"bits=4 must hold the file's codes, -8 to 7, got .* \(0\)",
        ),
        (spoil(**{"5.weight": torch.ones(2, 2), "5.log_scale": torch.zeros(2)}), "none called '5'"),
        (spoil(**{"0.log_scale": torch.zeros(32).to(torch.float8_e4m3fn)}), "dense and of 16 bits at least"),
        (spoil(**{"0.weight": torch.zeros(16, 64).to_sparse()}), "dense and of 16 bits at least"),
    ],
)
def test_a_file_that_is_no_sidecar_of_this_model_is_refused(tmp_path, change, match):
    model = nn.Sequential(nn.Linear(64, 16))
    before = model[0].weight.detach().clone()
    torch.save(change(sidecar_of(model, ["0"], bits=4, group_size=32)), tmp_path / "grace.pt")
    with pytest.raises(ValueError, match=match):
        import_grace_sidecar(model, tmp_path / "grace.pt")
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, before)


def test_a_sidecar_goes_onto_plain_layers_only(tmp_path):
    model = nn.Sequential(nn.Linear(64, 16))
    torch.save(sidecar_of(model, ["0"], bits=4, group_size=32), tmp_path / "grace.pt")
    quantize_rtn(model, LSQConfig(group_size=32), target="reference")
    with pytest.raises(ValueError, match=r"quantised already, got Linear with IntxUnpackedToInt8Tensor \(0\)"):
        import_grace_sidecar(model, tmp_path / "grace.pt")


def test_parameters_in_a_sidecar_are_as_good_as_tensors(tmp_path):
    content = sidecar_of(nn.Sequential(nn.Linear(64, 16)), ["0"], bits=4, group_size=32)
    torch.save({key: nn.Parameter(value) for key, value in content.items()}, tmp_path / "grace.pt")
    model = nn.Sequential(nn.Linear(64, 16))
    assert import_grace_sidecar(model, tmp_path / "grace.pt") == ["0"]
    torch.testing.assert_close(model[0].weight_fake_quantizer.log_scale.flatten(), content["0.log_scale"].flatten())


def test_weights_that_the_model_s_dtype_cannot_hold_are_refused(tmp_path):
    content = {"0.weight": torch.full((4, 8), 7 * 15000.0), "0.log_scale": torch.full((8,), 15000.0).log()}
    torch.save(content, tmp_path / "grace.pt")
    model = nn.Sequential(nn.Linear(8, 4)).half()
    with pytest.raises(ValueError, match=r"weight must fit the layer's torch.float16, got values up to 105000 \(0\)"):
        import_grace_sidecar(model, tmp_path / "grace.pt")
    assert bool(model[0].weight.isfinite().all())


@pytest.mark.parametrize("damage", range(0, 1200, 37))
def test_a_sidecar_with_a_byte_changed_is_read_or_refused(tmp_path, damage):
    torch.save(sidecar_of(nn.Sequential(nn.Linear(64, 16)), ["0"], bits=4, group_size=32), tmp_path / "grace.pt")
    content = bytearray((tmp_path / "grace.pt").read_bytes())
    content[damage] ^= 0xFF
    (tmp_path / "grace.pt").write_bytes(content)
    with contextlib.suppress(ValueError):
        import_grace_sidecar(nn.Sequential(nn.Linear(64, 16)), tmp_path / "grace.pt")


@pytest.mark.parametrize("export", EXPORTS)
def test_a_layer_in_two_places_is_packed_under_both_names(tmp_path, export):
    layer = nn.Linear(64, 16)
    model = nn.ModuleDict({"x": nn.Sequential(layer), "y": nn.Sequential(layer)})
    prepare_qat(model, LSQConfig(group_size=32))
    export(model, tmp_path)
    tensors, _ = loaded(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        aliases = file.metadata()
    names = {*tensors, *aliases} - {"format"}
    assert not any(name.endswith(("0.weight", "log_scale")) for name in names)
    parts = {name.removeprefix("x.0.") for name in names if name.startswith("x.0.")}
    assert parts == {name.removeprefix("y.0.") for name in names if name.startswith("y.0.")}
    assert len(parts) >= 3


@pytest.mark.parametrize(
    ("weight", "log_scale", "match"),
    [
        (normal(1, 4, 8), torch.zeros(8), r"must be whole multiples of its scales, got .* times one \(0\)"),
        (torch.zeros(4, 8), torch.full((8,), -200.0), r"log_scale must be logarithms of float32 scales, got -200"),
        (torch.ones(4, 8), torch.full((8,), 100.0), r"log_scale must be logarithms of float32 scales, got 100"),
    ],
)
def test_a_sidecar_that_is_not_fake_quantised_is_refused(tmp_path, weight, log_scale, match):
    torch.save({"0.weight": weight, "0.log_scale": log_scale}, tmp_path / "side.pt")
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(ValueError, match=match):
        import_grace_sidecar(model, tmp_path / "side.pt")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("content", [b"", b"not a torch file", b"PK\x03\x04 a truncated archive"])
def test_a_file_that_torch_cannot_read_is_no_sidecar(tmp_path, content):
    (tmp_path / "side.pt").write_bytes(content)
    with pytest.raises(ValueError, match="path must be a torch file of tensors alone"):
        import_grace_sidecar(nn.Sequential(nn.Linear(8, 4)), tmp_path / "side.pt")


@settings(max_examples=25)
@given(seeds, kinds, dtypes, st.sampled_from(EXPORTS), st.booleans())
def test_an_export_holds_codes_and_scales_of_any_weight_or_names_the_layer(seed, kind, dtype, export, shift):
    model = prepared(weights(kind, seed, 16, 64, dtype, 32), shift=seed if shift else None)
    held = read_weight(model["layer"])
    written = torch.float16 if export is export_awq else dtype
    with tempfile.TemporaryDirectory() as folder:
        if not torch.equal(held.scale.to(written).double(), held.scale.double()):
            with pytest.raises(ValueError, match=r"holds exactly, .*\(layer\)$"):
                export(model, folder)
            return
        export(model, folder)
        tensors, _ = loaded(pathlib.Path(folder))
    if export is export_awq:
        codes, scale = reference.unpack_awq(tensors["layer.qweight"]).t() - 8, tensors["layer.scales"].t()
    else:
        codes, scale = reference.unpack_int32(tensors["layer.weight_packed"], 4, 64), tensors["layer.weight_scale"]
    assert torch.equal(codes.long(), held.codes.long())
    assert torch.equal(scale.double(), held.scale.double())


@settings(max_examples=20)
@given(seeds, st.sampled_from([torch.bfloat16, torch.float32]), st.integers(2, 8))
def test_a_sidecar_gives_back_any_codes_that_its_bits_hold(seed, dtype, bits):
    """What an author's training saves: codes times unrounded scales, in the model's dtype."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (8, 48), generator=generator(seed))
    log_scale = normal(seed + 1, 8 * 3, dtype=torch.float32, scale=0.5) - 4
    weight = (codes.unflatten(1, (3, 16)) * log_scale.exp().view(8, 3, 1)).flatten(1).to(dtype)
    model = nn.Sequential(nn.Linear(48, 8, dtype=dtype))
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"0.weight": weight, "0.log_scale": log_scale}, f"{folder}/side.pt")
        import_grace_sidecar(model, f"{folder}/side.pt", bits=bits)
    assert torch.equal(read_weight(model[0]).codes.long(), codes)
