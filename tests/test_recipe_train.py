"""`gracekit train` on tiny pairs saved to disk: what it learns, what it refuses, and that an interruption changes nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conversation_cases import save_pair, write_llava
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llava
from transformers import AutoConfig, AutoModelForImageTextToText

from gracekit.quant import LSQConfig, load_qat, prepare_qat
from gracekit.quant.formats.trained import SCALES_FILE
from gracekit.recipe.callbacks import latest_checkpoint
from gracekit.recipe.cli import main
from gracekit.recipe.pairs import Pair, check_memory, memory_needed, scales_folder
from gracekit.recipe.progress import Bars
from gracekit.recipe.train import finish

FAMILIES = ("llava", "qwen2_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    for family in FAMILIES:
        save_pair(folder / f"{family}-student", family, seed=1, vocab_size=304)
        size = {"width": 64} if family == "llava" else {"layers": 4}
        save_pair(folder / f"{family}-teacher", family, seed=2, vocab_size=320, **size)
    write_llava(folder / "data", 10)
    write_llava(folder / "data", 10, name="train.jsonl")
    return folder


def arguments(home, output, *more, family="llava"):
    options = {
        "student": home / f"{family}-student", "teacher": home / f"{family}-teacher",
        "data": home / "data" / "train.json", "output_dir": output, "preset": "small", "use_cpu": "true",
        "group_size": 16, "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1,
        "max_length": 400,
    }  # fmt: skip
    return ["train", *(part for name, value in options.items() for part in (f"--{name}", str(value))), *map(str, more)]


def streaming(home, *more, name="train.jsonl"):
    return ["--data", home / "data" / name, "--streaming", "true", *more]


def history(output):
    return json.loads((output / "training.json").read_text())["history"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_of_each_family_trains_and_what_was_trained_loads(home, tmp_path, family):
    output = tmp_path / "run"
    assert main(arguments(home, output, "--gradient_accumulation_steps", 2, family=family)) == 0
    log = history(output)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all(entry[name] > 0 for entry in log for name in ("ce", "gdkd", "rcka", "beta", "gate_mean", "scale_mean"))
    model = AutoModelForImageTextToText.from_pretrained(output / "model")
    names = load_qat(model, output / "model")
    assert len(names) == 21
    plain = AutoModelForImageTextToText.from_pretrained(home / f"{family}-student")
    name = names[0]
    assert not torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert not list(output.glob("checkpoint-*"))
    assert list(output.rglob("events.out.tfevents.*"))
    assert list((output / "model").glob("*tokenizer*"))
    # It ends in a real INT4 file.
    assert main(["export", str(output), "--format", "torchao", "--output", str(tmp_path / "int4")]) == 0


def test_a_teacher_teaches_the_same_wherever_it_is(home, tmp_path):
    logs = {}
    for mode in ("online", "offload", "precomputed"):
        assert main(arguments(home, tmp_path / mode, "--teacher_mode", mode, "--dataloader_num_workers", "1")) == 0
        logs[mode] = [(entry["loss"], entry["gdkd"], entry["rcka"]) for entry in history(tmp_path / mode)]
    assert logs["offload"] == logs["online"]
    # Answers beforehand are those of one sample at a time, without padding, in the teacher's bfloat16.
    for ours, theirs in zip(logs["precomputed"], logs["online"], strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


def answered(home, folder, *more):
    """Let a teacher answer for all the data, and give the options that name the answers."""
    states = ["--teacher_mode", "precomputed", "--teacher_states", folder / "states"]
    assert main(arguments(home, folder / "first", *states, *more)) == 0
    return states


def test_further_students_learn_from_the_same_answers_without_the_teachers_weights(home, tmp_path, monkeypatch):
    """Another student, with losses that take less; the first answers are left as they are."""
    states = answered(home, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()}
    other = save_pair(tmp_path / "other", "llava", seed=5, vocab_size=304, layers=4)
    loaded, load = [], AutoModelForImageTextToText.from_pretrained
    monkeypatch.setattr(
        AutoModelForImageTextToText,
        "from_pretrained",
        lambda name, **options: loaded.append(str(name)) or load(name, **options),
    )
    for losses in ("gdkd", "grace"):
        assert main(arguments(home, tmp_path / losses, *states, "--student", other, "--losses", losses)) == 0
    assert loaded == [other, other]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()} == before
    monkeypatch.undo()
    assert main(arguments(home, tmp_path / "online", "--student", other)) == 0
    for ours, theirs in zip(history(tmp_path / "grace"), history(tmp_path / "online"), strict=True):
        assert (ours["gdkd"], ours["rcka"]) == pytest.approx((theirs["gdkd"], theirs["rcka"]), rel=0.02)


def test_answers_that_are_stale_are_refused_with_what_differs(home, tmp_path, capsys):
    for part in ("llava-student", "llava-teacher", "data"):
        shutil.copytree(home / part, tmp_path / part)
    states = answered(tmp_path, tmp_path)
    capsys.readouterr()

    def differing(*more):
        assert main(arguments(tmp_path, tmp_path / "second", *states, *more)) == 2
        text = capsys.readouterr().err
        assert "(there -> asked for)" in text
        return {part.split(":")[0] for part in text.partition("asked for): ")[2].split("; ")}

    assert differing("--teacher", home / "llava-student") == {"teacher_weights"}
    records = (tmp_path / "data" / "train.json").read_text()
    (tmp_path / "data" / "train.json").write_text(records.replace("red", "blue"))
    assert differing() == {"data_sha256"}
    (tmp_path / "data" / "train.json").write_text(records)
    shutil.copytree(tmp_path / "data" / "images", tmp_path / "elsewhere" / "images")
    assert differing("--image_folder", tmp_path / "elsewhere") >= {"image_folder"}
    picture = tmp_path / "data" / "images" / "0.png"
    shutil.move(picture, tmp_path / "kept.png")
    shutil.copy(tmp_path / "data" / "images" / "1.png", picture)
    assert differing() == {"pictures"}
    picture.unlink()
    assert differing("--on_bad_record", "skip") == {"kept_records", "pictures"}
    shutil.move(tmp_path / "kept.png", picture)
    weights = tmp_path / "llava-teacher" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value + 1 for name, value in tensors.items()}, weights, {"format": "pt"})
    assert differing() == {"teacher_weights"}


def test_plain_weights_and_cross_entropy_alone_need_no_teacher(home, tmp_path):
    output = tmp_path / "run"
    assert main(arguments(home, output, "--losses", "ce", "--precision", "bf16", "--teacher", "")) == 0
    assert not (output / "model" / SCALES_FILE).exists()
    assert set(history(output)[0]) & {"gdkd", "rcka", "beta"} == set()
    AutoModelForImageTextToText.from_pretrained(output / "model")


def test_what_is_not_known_yet_is_left_out_of_what_was_measured(home, tmp_path):
    """The moving average of L_GDKD, before the controller has its target."""
    assert main(arguments(home, tmp_path / "run", "--tau", "auto", "--tau_steps", "2")) == 0
    constants = []
    done = json.loads((tmp_path / "run" / "training.json").read_text(), parse_constant=constants.append)
    assert constants == []
    assert not {"ema", "tau"} & set(done["history"][0])
    assert {"ema", "tau"} <= set(done["history"][-1])


def test_a_run_takes_up_what_another_has_learned(home, tmp_path, capsys):
    """BF16 first, INT4 from there, and INT4 again with the scales that were learned."""
    plain, first, second = (tmp_path / name for name in ("plain", "first", "second"))
    assert main(arguments(home, plain, "--precision", "bf16")) == 0
    assert main(arguments(home, first, "--student", plain / "model")) == 0
    assert (
        main(arguments(home, second, "--student", first / "model", "--learning_rate", "0", "--weight_decay", "0")) == 0
    )
    learned, kept = (load_file(folder / "model" / SCALES_FILE) for folder in (first, second))
    assert learned.keys() == kept.keys()
    assert all(torch.equal(learned[name], kept[name]) for name in learned)
    for wrong, message in (
        (["--precision", "bf16"], "int4 or int8"),
        (["--group_size", "32"], "those of the student's"),
    ):
        assert main(arguments(home, tmp_path / "wrong", "--student", first / "model", *wrong)) == 2
        assert message in capsys.readouterr().err  # a folder that holds nothing yet takes other settings


def test_learned_scales_are_found_by_a_hub_name_too(home, tmp_path, monkeypatch):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    asked = []

    def cached_file(name, file, **options):
        asked.append((name, file))
        return str(folder / file) if (folder / file).is_file() else None

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    assert scales_folder("me/qat") is None
    (folder / SCALES_FILE).touch()
    assert scales_folder("me/qat") == folder
    assert asked == [("me/qat", SCALES_FILE)] * 2
    assert scales_folder(str(home / "llava-student")) is None


def test_a_teacher_with_learned_scales_is_refused(home, tmp_path, capsys):
    assert main(arguments(home, tmp_path / "first")) == 0
    message = refused(home, tmp_path, capsys, "--teacher", tmp_path / "first" / "model")
    assert "teacher must be a model in plain weights, got learned scales" in message


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_a_run_that_diverges_stops_at_once(home, tmp_path, capsys, precision):
    wild = [
        "--learning_rate",
        "1e30",
        "--max_grad_norm",
        "0",
        "--losses",
        "ce",
        "--precision",
        precision,
        "--max_steps",
        "40",
    ]
    assert main(arguments(home, tmp_path / "run", *wild)) == 2
    assert "the cross-entropy must stay finite, got nan up to step" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--save_only_model", "true"), "save_only_model must be left at False"),
        (("--save_total_limit", "1"), "save_total_limit must be at least 2"),
    ],
)
def test_what_a_killed_run_could_not_go_on_from_is_refused(home, tmp_path, capsys, option, message):
    assert message in refused(home, tmp_path, capsys, *option)


def test_an_optimiser_whose_package_is_missing_is_one_line(home, tmp_path, capsys, monkeypatch):
    def missing(*args, **options):
        raise ImportError("needs bitsandbytes")

    monkeypatch.setattr("gracekit.recipe.trainer.GraceTrainer.get_optimizer_cls_and_kwargs", missing)
    assert "error: needs bitsandbytes" in refused(home, tmp_path, capsys)


def test_a_finished_run_stays_and_other_settings_are_refused(home, tmp_path, capsys):
    output = tmp_path / "run"
    assert main(arguments(home, output)) == 0
    before = (output / "model" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert main(arguments(home, output)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("This run is finished; nothing was done. Its model: ")
    assert (output / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert main(arguments(home, output, "--omega", "7")) == 2
    assert "omega: 3.0 -> 7.0" in capsys.readouterr().err


def refused(home, tmp_path, capsys, *more, family="llava"):
    assert main(arguments(home, tmp_path / "run", *more, family=family)) == 2
    assert not list(tmp_path.glob("run/checkpoint-*"))
    return capsys.readouterr().err


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
    assert f"{side} must have whole files of weights" in refused(home, tmp_path, capsys, f"--{side}", other)
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


def with_a_bad_record(home):
    """Write the lines with the fourth one's answer missing, and give the file's name."""
    records = [json.loads(line) for line in (home / "data" / "train.jsonl").read_text().splitlines()]
    records[3]["conversations"][1]["value"] = ""
    path = home / "data" / "one_bad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path.name


def test_a_streamed_run_reads_records_in_their_order_and_says_what_it_has_not_looked_at(home, tmp_path, capsys):
    """Its first pass is that of indexed data in sequence."""
    options = ["--max_steps", "5"]
    assert main(arguments(home, tmp_path / "stream", *options, *streaming(home))) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Streaming: the first 10 good records were looked at" in said
    assert "a bad one stops the run" in said
    assert main(arguments(home, tmp_path / "whole", *options, "--train_sampling_strategy", "sequential")) == 0
    for ours, theirs in zip(history(tmp_path / "stream"), history(tmp_path / "whole"), strict=True):
        assert [ours[name] for name in ("loss", "gdkd", "beta")] == [theirs[name] for name in ("loss", "gdkd", "beta")]
    assert not (tmp_path / "stream" / "bad_records.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_streamed_run_stops_at_a_bad_record_or_counts_what_it_leaves_out(
    home, tmp_path, capsys, monkeypatch, workers
):
    """The bad record lies behind those that are looked at beforehand."""
    monkeypatch.setattr("gracekit.recipe.train_data.LOOKED_AT", 2)
    options = streaming(home, "--dataloader_num_workers", workers, name=with_a_bad_record(home))
    message = refused(home, tmp_path, capsys, *options)
    assert message.splitlines()[-1] == (
        "gracekit train: error: data must hold good records only, or be read with on_bad_record='skip', "
        "got record 3 ('r3'): empty answer"
    )
    assert len((tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()) == 1
    assert main(arguments(home, tmp_path / "run", *options, "--on_bad_record", "skip", "--max_steps", "6")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Streaming: the first 2 good records were looked at" in said
    assert f"1 records left out (1 empty answer), listed in {tmp_path / 'run' / 'bad_records.jsonl'}" in said


def test_a_stream_that_has_stopped_at_a_bad_record_goes_on_without_it(home, tmp_path, capsys, monkeypatch):
    """From its checkpoint, to the weights of a run that has left bad records out from the beginning."""
    monkeypatch.setattr("gracekit.recipe.train_data.LOOKED_AT", 2)
    steps = ["--per_device_train_batch_size", "1", "--save_steps", "1", "--max_steps", "5"]
    options, skip = streaming(home, *steps, name=with_a_bad_record(home)), ["--on_bad_record", "skip"]
    assert main(arguments(home, tmp_path / "cut", *options)) == 2
    assert latest_checkpoint(tmp_path / "cut")
    capsys.readouterr()
    assert main(arguments(home, tmp_path / "cut", *options, *skip)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Going on from" in said
    assert "1 records left out (1 empty answer)" in said
    assert main(arguments(home, tmp_path / "whole", *options, *skip)) == 0
    cut, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(cut[name], weight) for name, weight in whole.items())


def test_a_streamed_run_checks_its_pair_beforehand(home, tmp_path, capsys):
    other = ["--teacher", home / "qwen2_vl-teacher"]
    assert "tokenizers must give every token one id" in refused(home, tmp_path, capsys, *streaming(home), *other)
    bad = "must be a .jsonl file or a saved data set"
    assert bad in refused(home, tmp_path, capsys, *streaming(home, name="train.json"))


# Dies before the last file of its second checkpoint is written, without a chance to clean up.
KILLED_WHILE_SAVING = """
import os, signal, sys
from gracekit.recipe import callbacks
from gracekit.recipe.cli import main

def save(controller, path, calibration):
    if path.parent.name == "checkpoint-4":
        os.kill(os.getpid(), signal.SIGKILL)
    whole(controller, path, calibration)

whole, callbacks.save_controller = callbacks.save_controller, save
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["indexed", "streamed"])
def test_a_run_killed_at_a_random_step_ends_with_the_weights_of_one_that_was_not(home, tmp_path, streamed):
    """In processes of their own: killed once inside a checkpoint, and once from outside as soon as a later one appears.

    What is streamed goes round the data ten times, comes from two workers and has a bad record, which is written once.
    """
    steps = ["--max_steps", "24", "--gradient_accumulation_steps", "2", "--tau", "auto"]
    if streamed:
        name = with_a_bad_record(home)
        steps += streaming(home, "--on_bad_record", "skip", "--dataloader_num_workers", "2", name=name)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(output, program=("-m", "gracekit.recipe.cli")):
        command = [sys.executable, *program, *arguments(home, output, *steps)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(whole).wait() == 0
    assert start(cut, ("-c", KILLED_WHILE_SAVING)).wait() == -signal.SIGKILL
    assert (cut / "checkpoint-4").is_dir()
    assert latest_checkpoint(cut).name == "checkpoint-2"

    process = start(cut)
    wanted = random.choice(range(6, 16, 2))
    while not (cut / f"checkpoint-{wanted}").is_dir() and process.poll() is None:
        time.sleep(0.001)
    process.kill()  # a run that has ended by now was a resumed one all the same
    if process.wait() != 0:
        assert not (cut / "training.json").is_file()
        assert start(cut).wait() == 0
    for name in ("model.safetensors", SCALES_FILE):
        ours, theirs = load_file(cut / "model" / name), load_file(whole / "model" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for output in (whole, cut) if streamed else ():
        assert [json.loads(line)["id"] for line in (output / "bad_records.jsonl").read_text().splitlines()] == ["r3"]
    kept = ("loss", "beta", "ema", "tau")
    assert [[entry.get(name) for name in kept] for entry in history(cut)] == [
        [entry.get(name) for name in kept] for entry in history(whole)
    ]


# A rank that fails where threads of gloo outlive its command: at the interpreter's end they may abort it.
NOTHING_LEFT = """
import contextlib, pathlib, sys
from gracekit.recipe.cli import main

status, left = main(sys.argv[1:]), set()
for thread in pathlib.Path("/proc/self/task").iterdir():
    with contextlib.suppress(OSError):  # of another kind, which ends just now
        left.add((thread / "comm").read_text())
assert not any("gloo" in name for name in left), left
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["indexed", "streamed"])
def test_two_processes_train_one_model(home, tmp_path, streamed):
    """As torchrun starts them; every step sees all ten records, so it is the step of one process."""
    (tmp_path / "rank.py").write_text(NOTHING_LEFT)
    output = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--per_device_train_batch_size", "5", "--max_steps", "2"]  # all ten records a step
    if streamed:
        options += map(str, streaming(home))
    command = [*launcher, str(tmp_path / "rank.py"), *arguments(home, output, *options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = tmp_path / "alone"
    assert main(arguments(home, alone, "--per_device_train_batch_size", "10", "--max_steps", "2")) == 0
    for ours, theirs in zip(history(output), history(alone), strict=True):
        for name in ("loss", "ce", "gdkd", "rcka", "beta", "gate_mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
