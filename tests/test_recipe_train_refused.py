"""What `gracekit train` refuses, with the reason, before anything is trained."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llava
from train_cases import arguments, refused, write_home
from transformers import AutoConfig

from gracekit.quant import LSQConfig, prepare_qat
from gracekit.recipe.cli import main
from gracekit.recipe.pairs import Pair, check_memory, memory_needed
from gracekit.recipe.progress import Bars
from gracekit.recipe.train import finish


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("train"))


def test_bad_records_are_all_listed_and_written_before_anything_is_trained(home, tmp_path, capsys):
    records = json.loads((home / "data" / "train.json").read_text())
    records[1]["image"] = "images/missing.png"
    records[2]["conversations"][1]["value"] = ""
    records[0]["conversations"][0]["value"] += "</s>"
    path = home / "data" / "bad.json"
    path.write_text(json.dumps(records))
    message = refused(home, tmp_path, capsys, "--data", path)
    assert "got 3 bad of 10" in message
    assert all(word in message for word in ("record 0 ('r0')", "missing.png", "record 2 ('r2')"))
    assert str(tmp_path / "run" / "bad_records.jsonl") in message
    left_out = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert [bad["index"] for bad in left_out] == [0, 1, 2]
    output = tmp_path / "skipped"
    assert main(arguments(home, output, "--data", path, "--on_bad_record", "skip")) == 0
    assert len((output / "bad_records.jsonl").read_text().splitlines()) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert "3 of 10 records left out (1 cannot be encoded, 1 missing image, 1 empty answer), listed in" in said
    assert "bad_records.jsonl" in said


def test_both_passes_over_the_records_show_how_much_of_them_is_left(home, tmp_path, monkeypatch):
    """The second has fewer to do where the first has found bad ones."""
    records = json.loads((home / "data" / "train.json").read_text())
    records[2]["conversations"][1]["value"] = ""
    path = home / "data" / "one_bad.json"
    path.write_text(json.dumps(records))
    shown = []

    class Kept(Bars):
        def stop(self):
            shown.extend((task.description, task.completed, task.total, task.visible) for task in self.tasks)
            super().stop()

    monkeypatch.setattr("gracekit.recipe.progress.Bars", Kept)
    assert main(arguments(home, tmp_path / "run", "--data", path, "--on_bad_record", "skip", "--losses", "ce")) == 0
    assert shown[:2] == [("data: look at every record", 10, 10, True), ("data: encode every record", 9, 9, True)]


def test_records_that_are_too_long_are_bad_ones(home, tmp_path, capsys):
    assert "too long" in refused(home, tmp_path, capsys, "--max_length", "30")


def test_a_pair_that_does_not_fit_is_refused_with_the_reason(home, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(home / "llava-teacher", other)
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    (other / "processor_config.json").write_text(json.dumps(settings))
    assert "same pixel_values" in refused(home, tmp_path, capsys, "--teacher", other)
    assert "tokenizers must give every token one id" in refused(
        home, tmp_path, capsys, "--teacher", home / "qwen2_vl-teacher"
    )


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_name_that_is_no_model_is_refused_with_the_side_it_was_given_for(home, tmp_path, capsys, side, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", load_config_of_folders)
    for name in (tmp_path / "none", home / "data"):
        message = refused(home, tmp_path, capsys, f"--{side}", name)
        assert f"error: {side} must be a model that transformers reads, with its processor, got '{name}': " in message
        assert message.count("\n") == 1


def load_config_of_folders(name, *, load=AutoConfig.from_pretrained, **options):
    return load(name, **options | {"local_files_only": True})


def test_a_group_size_that_does_not_fit_is_refused_before_the_records_are_looked_at(
    home, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("gracekit.recipe.train.checked_data", None)
    assert "group_size must divide in_features, got group_size=48" in refused(
        home, tmp_path, capsys, "--group_size", 48
    )


def test_data_that_are_not_there_are_refused_before_a_model_is_loaded(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gracekit.recipe.train.load_pair", None)
    assert "which is not there" in refused(home, tmp_path, capsys, "--data", tmp_path / "none.json")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_model_whose_weights_are_not_whole_and_plain_is_refused(home, tmp_path, capsys, side):
    other = tmp_path / "other"
    shutil.copytree(home / f"llava-{side}", other)
    weights = (other / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    message = refused(home, tmp_path, capsys, f"--{side}", other)
    assert (
        f"{side} must be a model that transformers reads, with its processor, got '{other}': files of weights"
        in message
    )
    tensors = load_file(home / f"llava-{side}" / "model.safetensors")
    name = min(tensors)
    for damaged, said in (
        ({key: value for key, value in tensors.items() if key != name}, "without 1 ("),
        (tensors | {name: tensors[name][:-1].contiguous()}, "must have the shape"),
    ):
        save_file(damaged, other / "model.safetensors", metadata={"format": "pt"})
        assert said in refused(home, tmp_path, capsys, f"--{side}", other)
    settings = json.loads((other / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "torchao"}
    (other / "config.json").write_text(json.dumps(settings))
    message = refused(home, tmp_path, capsys, f"--{side}", other)
    assert f"{side} must be a model in plain weights, got a quantization_config (torchao) in {str(other)!r}" in message


def test_a_template_that_writes_something_else_is_refused(home, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(home / "llava-teacher", other)
    for path in other.iterdir():
        if path.suffix in (".jinja", ".json"):
            path.write_text(path.read_text().replace("upper()", "lower()").replace("ASSISTANT:", "assistant:"))
    assert "chat templates differ?" in refused(home, tmp_path, capsys, "--teacher", other)


def test_too_little_memory_is_said_with_figures():
    needed = {"student": 2.0**50, "its gradients": 2.0**50}
    (reason,) = check_memory(needed, torch.device("cpu"))
    assert "its gradients 1048576.0" in reason
    assert "--teacher_mode precomputed" in reason
    assert check_memory({"student": 2.0**50, "its gradients": 1.0}, torch.device("cpu")) == []


def test_a_teacher_that_is_not_online_still_needs_room_for_its_head():
    pair = Pair(student=tiny_llava(), teacher=tiny_llava(width=48), processor=None, teacher_processor=None)
    for mode, name, size in (("precomputed", "teacher's output head", 4 * 128 * 48), ("online", "teacher", None)):
        training = SimpleNamespace(fsdp=False, optim="adamw_torch")
        config = SimpleNamespace(training=training, pair=SimpleNamespace(teacher_mode=mode))
        needed = memory_needed(pair, config, ranks=1)
        assert len(needed) == 4
        assert needed[name] == (size or sum(4 * p.numel() for p in pair.teacher.parameters()))


@pytest.mark.parametrize("quantiser", [None, LSQConfig(group_size=16)], ids=["bf16", "int4"])
def test_weights_that_are_no_numbers_are_not_written_wherever_they_are(tmp_path, quantiser):
    model = tiny_llava()
    if quantiser is not None:
        prepare_qat(model, quantiser)
    name, norm = next((name, p) for name, p in model.named_parameters() if name.endswith("input_layernorm.weight"))
    norm.data[0] = torch.nan
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_world_process_zero=lambda: True, model=model)
    config = SimpleNamespace(pair=SimpleNamespace(quantiser=lambda: quantiser))
    with pytest.raises(ValueError, match=f"must be finite, got NaN or infinity in 1 .{name}"):
        finish(trainer, config, None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("optim", "bytes_a_weight"),
    [("adamw_torch", 8), ("adamw_8bit", 2), ("paged_lion_8bit", 1), ("adafactor", 0), ("sgd", 0), ("some_other", 0)],
)
def test_the_memory_of_the_optimiser_is_that_of_the_one_asked_for(optim, bytes_a_weight):
    pair = Pair(student=tiny_llava(), teacher=None, processor=None, teacher_processor=None)
    training = SimpleNamespace(fsdp=False, optim=optim)
    needed = memory_needed(pair, SimpleNamespace(training=training, pair=None), ranks=1)
    weights = sum(parameter.numel() for parameter in pair.student.parameters())
    assert needed["the optimiser's moments"] == bytes_a_weight * weights
