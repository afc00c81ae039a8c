"""`gracekit teacher`: what it leaves behind is a teacher that the recipe takes."""

import json
from dataclasses import asdict

import pytest
import torch

from gracekit.recipe import cli, teacher
from gracekit.recipe.data import load_easy_vqa
from gracekit.recipe.evaluate import accuracy, generate_answers
from gracekit.recipe.models import ModelSize, image_tokens, load_teacher, teacher_folder


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "TEACHER", ModelSize(width=32, vision_layers=1, text_layers=2, patch_size=16))
    options = {
        "output": tmp_path / "it",
        "device": "cpu",
        "steps": 4,
        "batch_size": 4,
        "train_images": 40,
        "test_images": 2,
    }
    return ["teacher", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def test_a_trained_teacher_loads_and_answers_as_its_record_says(arguments, tmp_path):
    assert cli.main(arguments) == 0
    record = json.loads((tmp_path / "it" / "training.json").read_text())
    model, tokenizer = load_teacher(str(tmp_path / "it"))
    test = load_easy_vqa("test", 2)
    answers = generate_answers(model.to(torch.bfloat16), test, tokenizer, image_tokens=image_tokens(model))
    assert record["accuracy"] == accuracy(answers, test.questions)
    assert record["questions"] == len(test.questions)
    assert [entry["step"] for entry in record["log"]] == [1, 2, 3, 4]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "it" / "stages").exists()


def test_a_teacher_is_not_overwritten(arguments, tmp_path, capsys):
    assert cli.main(arguments) == 0
    before = (tmp_path / "it" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(arguments) == 2
    assert "output must be a new folder" in capsys.readouterr().err
    assert (tmp_path / "it" / "model.safetensors").stat().st_mtime_ns == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("settings", [None, "[]", "{}", "{", '{"output": "it", "steps": 4}'])
def test_a_folder_of_something_else_is_refused_and_keeps_every_file(arguments, tmp_path, capsys, settings):
    (tmp_path / "it" / "stages").mkdir(parents=True)
    for name in ("model.safetensors", "stages/mine.txt"):
        (tmp_path / "it" / name).write_text("weeks of work")
    if settings is not None:
        (tmp_path / "it" / teacher.SETTINGS).write_text(settings)
    before = contents(tmp_path)
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output must be a new or empty folder, or one of an interrupted gracekit teacher" in line
    assert f"got {str(tmp_path / 'it')!r}, which holds something else" in line
    assert contents(tmp_path) == before


def test_a_file_as_output_is_refused(arguments, tmp_path, capsys):
    (tmp_path / "it").write_text("a letter")
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"got {str(tmp_path / 'it')!r}, which holds something else" in line
    assert (tmp_path / "it").read_text() == "a letter"


def test_an_empty_folder_is_taken(arguments, tmp_path):
    (tmp_path / "it").mkdir()
    assert cli.main(arguments) == 0


@pytest.fixture
def interrupted(arguments, monkeypatch):
    """Arguments of a training that ended between its last step and its answers."""

    def interrupt(*given, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teacher, "generate_answers", interrupt)
        assert cli.main(arguments) == 130
    return arguments


def test_an_interrupted_training_goes_on_where_it_was(interrupted, tmp_path, monkeypatch):
    log = json.loads((tmp_path / "it" / "stages" / "teacher" / "log.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert cli.main([*interrupted, "--output", "it"]) == 0
    record = json.loads((tmp_path / "it" / "training.json").read_text())
    assert [entry["loss"] for entry in record["log"]] == [entry["loss"] for entry in log]


def test_an_interrupted_training_does_not_go_on_under_other_settings(interrupted, tmp_path, capsys):
    before = contents(tmp_path)
    assert cli.main([*interrupted, "--steps", "6", "--seed", "8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output must be a new folder or a training with the same settings" in line
    assert line.endswith("(there -> asked for): seed: 7 -> 8; steps: 4 -> 6")
    assert contents(tmp_path) == before
    assert cli.main(interrupted) == 0


def test_a_training_that_kept_nothing_does_not_block_its_folder(arguments, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "load_easy_vqa", lambda *given: pytest.fail("begun"))
        with pytest.raises(pytest.fail.Exception):
            cli.main([*arguments, "--steps", "6"])
    assert cli.main(arguments) == 0
    assert json.loads((tmp_path / "it" / "training.json").read_text())["config"]["steps"] == 4


def test_mirroring_changes_images_and_nothing_else():
    split = load_easy_vqa("train", 8)
    tokenizer = teacher.build_tokenizer(text for q in split.questions for text in (q.text, q.answer))
    plain = teacher.PackedVqa(split, tokenizer, image_tokens=16).collate(range(8))
    batch = teacher.MirroredVqa(split, tokenizer, image_tokens=16).collate(range(8))
    pixels, mirrored = plain.pop("pixel_values"), batch.pop("pixel_values")
    same = [torch.equal(one, other) for one, other in zip(mirrored, pixels, strict=True)]
    flipped = [torch.equal(one, other.flip(-1)) for one, other in zip(mirrored, pixels, strict=True)]
    assert all(a or b for a, b in zip(same, flipped, strict=True))
    assert any(same)
    assert any(flipped)
    assert all(torch.equal(batch[name], plain[name]) for name in plain)


def test_the_packaged_teacher_is_what_the_command_makes_by_default():
    folder = teacher_folder("")
    record = json.loads((folder / "training.json").read_text())
    chosen = {
        name: value for name, value in asdict(teacher.TeacherConfig()).items() if name not in ("output", "device")
    }
    assert {name: record["config"][name] for name in chosen} == chosen
    assert record["size"] | {"image_size": 64} == asdict(teacher.TEACHER)
    assert len(record["log"]) >= 100
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6


def test_the_packaged_teacher_answers_as_well_as_its_record_says():
    record = json.loads((teacher_folder("") / "training.json").read_text())
    model, tokenizer = load_teacher("")
    test = load_easy_vqa("test", 150)
    answers = generate_answers(model.to(torch.bfloat16), test, tokenizer, image_tokens=image_tokens(model))
    # Three standard errors of a share near 94 % over some 1,450 questions.
    assert abs(record["accuracy"] - accuracy(answers, test.questions)) < 0.02
