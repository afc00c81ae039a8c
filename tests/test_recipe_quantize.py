"""gracekit quantize and gracekit export, on folders of tiny models."""

import errno
import json

import pytest
import reference_quant as reference
import torch
from conversation_cases import save_pair
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import llava_batch, tiny_llava
from transformers import LlavaForConditionalGeneration

from gracekit.quant import LSQConfig, convert, prepare_qat, save_qat
from gracekit.quant.int4 import read_weight
from gracekit.recipe.cli import main


@pytest.fixture
def folder(tmp_path):
    tiny_llava().save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "model" / "notes.md").write_text("not for engines")
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path):
    model = tiny_llava(seed=1)
    prepare_qat(model, LSQConfig(group_size=32, scale_dtype=torch.float16))
    save_qat(model, tmp_path / "run")
    return model, tmp_path / "run"


def files(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["torchao", "torchao-reference", "compressed-tensors", "awq"])
def test_a_plain_model_is_rounded_and_written_in_each_format(folder, tmp_path, form, capsys):
    output = tmp_path / "out"
    assert main(["quantize", str(folder), "--format", form, "--group-size", "32", "--output", str(output)]) == 0
    assert "are quantised (layers: 21)" in capsys.readouterr().out
    assert files(output) >= {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"}
    assert not files(output) & {"notes.md", "learned_scales.safetensors"}
    described = json.loads((output / "config.json").read_text())
    method = described["quantization_config"]["quant_method"]
    assert method == ("torchao" if form.startswith("torchao") else form)
    assert described["architectures"] == ["LlavaForConditionalGeneration"]


@pytest.mark.parametrize("form", ["torchao", "torchao-reference"])
def test_an_exported_run_has_the_codes_of_training(run, tmp_path, form):
    model, trained = run
    output = tmp_path / "out"
    assert main(["export", str(trained), "--format", form, "--output", str(output)]) == 0
    loaded = LlavaForConditionalGeneration.from_pretrained(output, dtype="auto")
    for name, module in model.named_modules():
        if hasattr(module, "weight_fake_quantizer"):
            held, written = read_weight(module), read_weight(loaded.get_submodule(name))
            assert torch.equal(held.codes, written.codes)
            assert torch.equal(held.scale.double(), written.scale.double())
    if form == "torchao-reference":
        batch = llava_batch(model)
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_codes_of_a_float32_run_survive_a_change_of_dtype(run, tmp_path):
    model, trained = run
    output = tmp_path / "out"
    assert main(["export", str(trained), "--format", "awq", "--dtype", "float16", "--output", str(output)]) == 0
    convert(model, "reference")
    with safe_open(output / "model.safetensors", "pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert dtypes == {torch.int32, torch.float16}
        some = next(name for name in file.keys() if name.endswith("q_proj.scales"))  # noqa: SIM118
        layer = next(m for name, m in model.named_modules() if name.endswith(some.removesuffix(".scales")[-28:]))
        assert torch.equal(file.get_tensor(some), layer.weight.scale.t())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["quantize", "{folder}", "--group-size", "48"], "group_size must divide in_features"),
        (["quantize", "{folder}", "--bits", "9"], "bits must be at least 2 and at most 8, got bits=9"),
        (["quantize", "{folder}", "--bits", "3", "--group-size", "32"], "holds weights of 4 or 8 bits, got bits=3"),
        (["quantize", "{tmp}"], "got no config.json in"),
        (["export", "{folder}"], "must hold one model with learned scales, or be its folder, got none in"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_written(folder, tmp_path, arguments, match, capsys):
    output = tmp_path / "out"
    filled = [part.format(folder=folder, tmp=tmp_path) for part in arguments]
    assert main([*filled, "--format", "torchao", "--output", str(output)]) == 2
    assert match in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("form", "bits"), [("awq", 8), ("compressed-tensors", 3), ("torchao", 5), ("torchao-reference", 9)]
)
def test_a_width_that_a_format_cannot_hold_is_refused_before_the_model_is_loaded(
    folder, form, bits, capsys, monkeypatch
):
    monkeypatch.setattr("gracekit.recipe.quantize.load", None)
    assert main(["quantize", str(folder), "--format", form, "--bits", str(bits)]) == 2
    assert f"got bits={bits}" in capsys.readouterr().err


def test_a_trained_width_is_looked_at_first_too(tmp_path, capsys, monkeypatch):
    model = tiny_llava(seed=1)
    prepare_qat(model, LSQConfig(bits=8, group_size=32))
    save_qat(model, tmp_path / "run")
    monkeypatch.setattr("gracekit.recipe.quantize.load", None)
    assert main(["export", str(tmp_path / "run"), "--format", "awq"]) == 2
    assert "--format awq holds weights of 4 bits, got bits=8" in capsys.readouterr().err


def test_a_model_with_learned_scales_is_not_rounded_without_them(run, tmp_path, capsys):
    _, trained = run
    output = tmp_path / "out"
    command = ["quantize", str(trained), "--format", "torchao", "--group-size", "32", "--output", str(output)]
    assert main(command) == 2
    assert (
        "MODEL_DIR must hold a plain model, got learned scales (gracekit export writes them)" in capsys.readouterr().err
    )
    assert not output.exists()


def test_the_default_output_is_beside_the_folder_however_it_is_named(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert main(["quantize", ".", "--format", "torchao-reference", "--group-size", "32"]) == 0
    assert (folder.parent / "model-torchao-reference" / "model.safetensors").is_file()
    assert not any(path.is_dir() for path in folder.iterdir())
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert main(["quantize", str(link), "--format", "torchao-reference", "--group-size", "32"]) == 0
    assert (folder.parent / "link-torchao-reference" / "model.safetensors").is_file()


def test_an_output_where_nothing_can_be_written_is_refused_at_once(folder, capsys, monkeypatch):
    monkeypatch.setattr("gracekit.recipe.quantize.load", None)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    command = ["quantize", str(folder), "--format", "awq", "--output", str(folder.parent / "far" / "away")]
    assert main(command) == 2
    assert f"far/away' below '{folder.parent}'" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_line(folder, capsys):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["quantize", str(folder), "--format", "torchao", "--group-size", "32"]) == 2
    assert "gracekit quantize: error:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "generate"])
def test_a_checkpoint_that_lacks_a_weight_is_not_filled_up_with_random_numbers(tmp_path, capsys, command):
    folder = tmp_path / "model"
    options = {"quantize": ["--format", "awq", "--group-size", "32"], "generate": ["--prompt", "a"]}[command]
    save_pair(folder, "llava", seed=1, vocab_size=304)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight") and "language_model" in name)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert main([command, str(folder), *options]) == 2
    said = capsys.readouterr().err
    assert "files of weights must be whole, got" in said
    assert name.removesuffix(".weight").rpartition(".")[2] in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("form", ["torchao", "torchao-reference", "compressed-tensors"])
def test_a_writing_that_fails_or_is_cut_leaves_nothing_under_the_outputs_name(folder, tmp_path, form, monkeypatch):
    """Fails at the last files, those that lie beside the weights; what a killed process left behind is in nobody's way."""
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / ".out.gracekit-part").mkdir()
    (tmp_path / ".out.gracekit-part" / "config.json").write_text("{}")
    arguments = ["quantize", str(folder), "--format", form, "--group-size", "32", "--output", str(output)]

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gracekit.recipe.quantize.shutil.copyfile", full)
        assert main(arguments) == 2
    assert not files(output)
    assert main(arguments) == 0
    assert files(output) >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert files(tmp_path) == {"model", "out"}


def test_a_folder_in_use_and_a_quantised_model_are_refused(folder, tmp_path, capsys):
    command = ["quantize", str(folder), "--format", "torchao", "--group-size", "32", "--output"]
    assert main([*command, str(folder)]) == 2
    assert "output must be a new or empty folder" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out")]) == 0
    again = ["quantize", str(tmp_path / "out"), "--format", "awq", "--output", str(tmp_path / "again")]
    assert main(again) == 2
    assert "not quantised yet, got one of 'torchao'" in capsys.readouterr().err


def test_a_folder_of_an_unknown_class_is_refused(folder, tmp_path, capsys):
    described = json.loads((folder / "config.json").read_text()) | {"architectures": ["NoSuchModel"]}
    (folder / "config.json").write_text(json.dumps(described))
    assert main(["quantize", str(folder), "--format", "awq", "--output", str(tmp_path / "out")]) == 2
    assert "under architectures, got ['NoSuchModel']" in capsys.readouterr().err


def test_a_run_is_exported_by_its_own_folder_unless_it_holds_several_models(run, tmp_path, capsys):
    _, trained = run
    whole = tmp_path / "whole"
    (whole / "models").mkdir(parents=True)
    trained.rename(whole / "models" / "grace-int4-qat")
    output = ["--format", "torchao", "--output"]
    assert main(["export", str(whole), *output, str(tmp_path / "a")]) == 0
    assert "model.safetensors" in files(tmp_path / "a")
    model = tiny_llava(seed=2)
    prepare_qat(model, LSQConfig(group_size=32))
    save_qat(model, whole / "models" / "ce-int4-qat")
    assert main(["export", str(whole), *output, str(tmp_path / "b")]) == 2
    message = capsys.readouterr().err
    assert "must hold one model with learned scales" in message
    assert "ce-int4-qat" in message
    assert main(["export", str(tmp_path / "a"), *output, str(tmp_path / "c")]) == 2
    assert "got none in" in capsys.readouterr().err


def unpacked(folder, form, name):
    """Codes (out, in) and scales (out, groups) of a layer as written, read without the package."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys() if key.startswith(name + ".")}  # noqa: SIM118
    if form == "awq":
        return reference.unpack_awq(held[f"{name}.qweight"]).t() - 8, held[f"{name}.scales"].t()
    columns = int(held[f"{name}.weight_shape"][1])
    return reference.unpack_int32(held[f"{name}.weight_packed"], 4, columns), held[f"{name}.weight_scale"]


@pytest.mark.parametrize("form", ["awq", "compressed-tensors", "torchao", "torchao-reference"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_scales_are_written_as_they_were_trained_or_refused(tmp_path, form, dtype, scale_dtype, size, capsys):
    """Small weights have scales below float16's numbers; float32 ones have no place in half of the dtypes."""
    model = tiny_llava(seed=1, layers=1)
    name = "model.language_model.layers.0.mlp.down_proj"
    with torch.no_grad():
        model.get_submodule(name).weight.mul_(size)
    prepare_qat(model, LSQConfig(group_size=32, scale_dtype=scale_dtype))
    save_qat(model, tmp_path / "run")
    trained = read_weight(model.get_submodule(name))
    options = [] if dtype is None else ["--dtype", dtype]
    code = main(["export", str(tmp_path / "run"), "--format", form, "--output", str(tmp_path / "out"), *options])
    if code:
        assert "holds exactly" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        written = {"awq": torch.float16}.get(form, getattr(torch, dtype or "float32"))
        every = [read_weight(m).scale for _, m in model.named_modules() if hasattr(m, "weight_fake_quantizer")]
        assert any(bool((scale.to(written).double() != scale.double()).any()) for scale in every)
        return
    if form.startswith("torchao"):
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
        held = read_weight(loaded.get_submodule(name))
        codes, scale = held.codes, held.scale
    else:
        codes, scale = unpacked(tmp_path / "out", form, name)
    assert torch.equal(codes.long(), trained.codes.long())
    assert torch.equal(scale.double(), trained.scale.double())


def test_rounded_awq_scales_are_those_the_codes_were_made_for(folder, tmp_path):
    command = ["quantize", str(folder), "--format", "awq", "--group-size", "32", "--dtype", "bfloat16"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    name = "model.language_model.layers.0.self_attn.q_proj"
    codes, scale = unpacked(tmp_path / "out", "awq", name)
    weight = LlavaForConditionalGeneration.from_pretrained(folder).get_submodule(name).weight.detach()
    peak = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    assert torch.equal(scale, (peak / 7).half())
    expected = (weight.unflatten(1, (-1, 32)) / scale.float()[..., None]).round().clamp(-8, 7)
    assert torch.equal(codes.long(), expected.flatten(1).long())


def test_without_an_output_the_folder_is_named_after_the_format(folder):
    assert main(["quantize", str(folder), "--format", "awq", "--group-size", "32"]) == 0
    assert (folder.parent / "model-awq" / "config.json").is_file()
