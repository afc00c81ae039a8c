"""`gracekit train` on tiny pairs saved to disk: what it learns and takes up, and what a finished run stays."""

import json
import shutil

import pytest
import torch
from conversation_cases import save_pair
from safetensors.torch import load_file, save_file
from train_cases import FAMILIES, arguments, history, refused, write_home
from transformers import AutoModelForImageTextToText

from gracekit.quant import load_qat
from gracekit.quant.formats.trained import SCALES_FILE
from gracekit.recipe.cli import main
from gracekit.recipe.pairs import scales_folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("train"))


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
