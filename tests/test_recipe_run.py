"""The whole recipe in seconds: what it writes, that it goes on after a kill, and that it overwrites nothing."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from recipe_cases import save_tiny_teacher, tiny_arguments
from safetensors import SafetensorError
from safetensors.torch import save_file

from gracekit.recipe import cli
from gracekit.recipe.data import load_easy_vqa
from gracekit.recipe.stages import write_json

VARIANTS = ["teacher"] + [f"{losses}-{kind}" for losses in ("ce", "grace") for kind in ("bf16", "int4-rtn", "int4-qat")]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "one"
    assert cli.main(["recipe", *tiny_arguments(teacher, output)]) == 0
    return output


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_results_name_every_variant_with_the_kernel_that_answered(finished):
    results = read(finished)
    assert [variant["name"] for variant in results["variants"]] == VARIANTS
    for variant in results["variants"][1:]:
        assert variant["losses"] in ("ce", "grace")
        assert variant["seed"] == 0
        assert variant["steps"] == 12
        kernel = "torchao Int4OpaqueTensor (cpu)" if variant["precision"].startswith("int4") else "torch"
        assert variant["kernel"] == kernel
    assert results["environment"]["packages"]["torch"]
    assert results["config"]["train"]["steps"] == 8
    assert set(results["seconds"]) >= {"teacher", "ce-start", "grace-int4-qat", "grace-int4-qat-answers"}


def test_accuracy_is_the_share_of_answers_that_match(finished):
    questions = load_easy_vqa("test", 4).questions
    for variant in read(finished)["variants"][1:]:
        answers = json.loads((finished / "answers" / f"{variant['name']}.json").read_text())["answers"]
        right = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
        assert variant["accuracy"] == right / len(questions)
        assert variant["questions"] == len(questions)


def test_the_report_shows_images_with_question_truth_and_int4_answer(finished):
    page = (finished / "report.html").read_text()
    questions = load_easy_vqa("test", 4).questions
    answers = json.loads((finished / "answers" / "grace-int4-qat.json").read_text())["answers"]
    assert page.count('src="data:image/png;base64,') == 3 + 4  # three plots, four test images
    assert f"{questions[0].text}<br>true answer: <b>{questions[0].answer}</b>" in page
    shown = re.search(r"grace-int4-qat: <span class=\"(right|wrong)\">([^<]*)<", page)
    assert shown[2].removesuffix(" ✗") == (answers[0] or "(nothing)")
    assert (shown[1] == "right") == (answers[0] == questions[0].answer)
    for name in ("losses.png", "beta.png", "accuracy.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_what_is_not_known_yet_is_left_out_of_the_results_and_a_gap_in_the_plots(teacher, tmp_path):
    """The moving average of L_GDKD, before the controller has its target."""
    more = ("--losses", "grace", "--tau", "auto", "--tau_steps", "3")
    assert cli.main(["recipe", *tiny_arguments(teacher, tmp_path / "run", *more)]) == 0
    for path in (tmp_path / "run").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=no_constant)
    history = read(tmp_path / "run")["variants"][1]["history"]
    assert "ema" not in history[0]
    assert history[-1]["ema"] > 0
    assert (tmp_path / "run" / "beta.png").is_file()


def test_null_stands_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf, "d": "NaN"}})
    written = json.loads((tmp_path / "x.json").read_text(), parse_constant=no_constant)
    assert written == {"a": [None, 1.5, [None]], "b": {"c": None, "d": "NaN"}}


def test_a_finished_run_is_left_alone(teacher, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert cli.main(["recipe", *tiny_arguments(teacher, finished)]) == 0
    assert "finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_other_settings_in_the_same_folder_are_an_error_that_names_them(teacher, finished, capsys):
    assert cli.main(["recipe", *tiny_arguments(teacher, finished), "--seed", "3", "--tau", "0.5"]) == 2
    message = capsys.readouterr().err
    assert "run.seed: 0 -> 3" in message
    assert "grace.tau: '1.0' -> '0.5'" in message


def test_a_folder_with_something_else_in_it_is_refused(teacher, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert cli.main(["recipe", *tiny_arguments(teacher, tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("command", ["recipe", "ablate"])
@pytest.mark.parametrize(
    "text",
    ['{"model_type": "llava", "vision_config": {}}', '{"run": {}, "train": {}, "grace": 1}', "[]", '"x"', "3", "{"],
)
def test_a_folder_with_the_configuration_of_something_else_is_refused(teacher, tmp_path, capsys, command, text):
    (tmp_path / "config.json").write_text(text)
    assert cli.main([command, *tiny_arguments(teacher, tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"gracekit {command}: error: output must be a new or empty folder, got {str(tmp_path)!r}, which holds something else\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("command", ["recipe", "ablate"])
def test_a_folder_that_cannot_be_made_is_one_line(teacher, tmp_path, capsys, command):
    (tmp_path / "file").touch()
    assert cli.main([command, *tiny_arguments(teacher, tmp_path / "file" / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gracekit {command}: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be at least 2"),
        (["--group_size", "48"], "group_size must be one of 32, 64"),
        (["--losses", "grace", "hinge"], "losses must be one of"),
        (["--losses", "ce", "ce"], "losses must name one or more, each once"),
        (["--beta_initial", "9"], "beta_initial must be finite and in [0.1,"),
        (["--ema_decay", "1"], "ema_decay must be below 1"),
        (["--omega", "-1"], "omega must be finite and in"),
        (["--learning_rate", "nan"], "learning_rate must be finite"),
        (["--test_images", "1001"], "test_images must be at least 1 and at most 1000"),
        (["--stepz", "3"], "stepz"),
    ],
)
def test_a_bad_argument_ends_the_program_before_any_work(arguments, message, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as caught:
        cli.main(["recipe", "--output", str(tmp_path / "new"), *arguments])
    assert message in capsys.readouterr().err + str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_without_a_teacher_is_refused(tmp_path, capsys):
    assert cli.main(["recipe", "--teacher", str(tmp_path), "--output", str(tmp_path / "new")]) == 2
    assert "teacher must be a folder with a saved model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["recipe", "ablate"])
@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("model.safetensors", "no tensors", "got a broken one"),
        ("tokenizer.json", "{", "JSONDecodeError"),
        ("tokenizer.json", "{}", ""),
        ("config.json", "[]", ""),
        ("training.json", "{", "JSONDecodeError"),
        ("training.json", '{"accuracy": 1}', "KeyError: 'config'"),
    ],
)
def test_a_damaged_teacher_is_refused_before_any_work(teacher, tmp_path, capsys, command, name, text, error):
    damaged = shutil.copytree(teacher, tmp_path / "teacher")
    (damaged / name).write_text(text)
    assert cli.main([command, *tiny_arguments(damaged, tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gracekit {command}: error: teacher must be a folder ")
    assert str(damaged) in said
    assert error in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


each_with_its_work = pytest.mark.parametrize(
    ("command", "work"),
    [
        ("recipe", "gracekit.recipe.experiment.run_recipe"),
        ("ablate", "gracekit.recipe.ablate.run_ablation"),
        ("teacher", "gracekit.recipe.teacher.train_teacher"),
    ],
)


@each_with_its_work
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframe #0"),
    ],
)
def test_an_error_of_a_file_in_the_middle_of_the_work_is_one_line(
    teacher, tmp_path, monkeypatch, capsys, command, work, error
):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(work, fail)
    options = ["--output", str(tmp_path)] if command == "teacher" else tiny_arguments(teacher, tmp_path / "run")
    assert cli.main([command, *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gracekit {command}: error: {str(error).splitlines()[0]}")
    assert said.endswith("; the same command goes on from the last checkpoint\n")
    assert said.count("\n") == 1


def test_a_teacher_without_all_its_weights_is_refused(teacher, tmp_path, capsys):
    part = shutil.copytree(teacher, tmp_path / "teacher")
    save_file({"other": torch.zeros(1)}, part / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["recipe", *tiny_arguments(part, tmp_path / "run")]) == 2
    assert "teacher must be a folder with a saved model" in (said := capsys.readouterr().err)
    assert "files of weights must be whole" in said
    assert not (tmp_path / "run").exists()


def test_a_run_whose_disk_was_full_goes_on(teacher, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    with monkeypatch.context() as patch:

        def full(tensors, path):
            raise SafetensorError(f"No space left on device: {path}")

        patch.setattr("gracekit.recipe.stages.save_file", full)
        assert cli.main(["recipe", *tiny_arguments(teacher, output, "--losses", "ce")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert cli.main(["recipe", *tiny_arguments(teacher, output, "--losses", "ce")]) == 0
    assert len(read(output)["variants"]) == 4


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_as_if_nothing_had_been(teacher, finished, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "gracekit.recipe", *tiny_arguments(teacher, output)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
        try:
            limit = time.monotonic() + 120
            while not list(output.glob("stages/grace-start/checkpoint-*/grace_controller.safetensors")):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < limit
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not (output / "results.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ)
    assert again.returncode == 0, again.stderr
    assert "done already: ce-bf16, ce-int4-qat, ce-start" in again.stdout
    accuracies = [[v["accuracy"] for v in read(folder)["variants"]] for folder in (output, finished)]
    assert accuracies[0] == accuracies[1]
    for name in VARIANTS[1:]:
        assert (output / "answers" / f"{name}.json").read_text() == (finished / "answers" / f"{name}.json").read_text()


def test_the_command_line_lists_its_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "recipe" in capsys.readouterr().out
    assert cli.main(["nonsense"]) == 2


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_an_interruption_ends_any_command_with_one_line(command, monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, interrupt)
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == f"gracekit {command}: interrupted\n"


@each_with_its_work
def test_an_interrupted_training_says_that_it_goes_on(teacher, tmp_path, monkeypatch, capsys, command, work):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupt)
    options = ["--output", str(tmp_path)] if command == "teacher" else tiny_arguments(teacher, tmp_path / "run")
    assert cli.main([command, *options]) == 130
    printed = capsys.readouterr()
    assert "Interrupted; the same command goes on from the last checkpoint." in printed.out
    assert printed.err == ""


def test_a_trained_student_is_exported_from_the_run(finished, tmp_path):
    assert {path.name for path in (finished / "models").iterdir()} == {"ce-int4-qat", "grace-int4-qat"}
    output = tmp_path / "engine"
    trained = str(finished / "models" / "grace-int4-qat")
    assert cli.main(["export", trained, "--format", "torchao", "--output", str(output)]) == 0
    assert (output / "chat_template.jinja").is_file()
