"""gracekit ablate: which cells there are, that they are runs of the recipe, and that a killed or finished one is taken up."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipe_cases import save_tiny_teacher, tiny_arguments

from gracekit.recipe import cli
from gracekit.recipe.ablate import AblationConfig, AblationOptions
from gracekit.recipe.ablation_cells import METHODS, pack, unpack
from gracekit.recipe.ablation_report import markdown
from gracekit.recipe.comparisons import compare, pairs
from gracekit.recipe.config import LOSSES, GraceConfig, RunConfig
from gracekit.recipe.data import load_easy_vqa
from gracekit.recipe.paired_tests import holm, mcnemar, mean_interval, paired_t, sign_flip

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CELLS = ["ce-bf16", "ce-int4-rtn", "ce-int3-rtn", "ce-int4-qat"]
CELLS += [name.replace("ce-", "grace-") for name in CELLS]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"))


def arguments(teacher, output, *more):
    small = ["--students", "ce", "grace", "--bits", "4", "--rtn_bits", "3", "--bins", "4", "--steps", "2"]
    return tiny_arguments(teacher, output, *small, "--finish_steps", "1", *more)


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "one"
    assert cli.main(["ablate", *arguments(teacher, output, "--seeds", "0")]) == 0
    return output


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_the_students_are_those_of_the_papers_tables():
    students = {student.name: student for student in AblationConfig().students()}
    assert list(students) == list(METHODS)
    assert {student.losses for student in students.values()} == set(LOSSES)
    for name in ("ce", "kl", "grace"):
        assert students[name].precisions == ("bf16", "int8-rtn", "int4-rtn", "int8-qat", "int4-qat")
    for name in ("gdkd-fixed", "rcka", "gdkd"):
        assert students[name].precisions == ("bf16", "int8-rtn", "int4-rtn")


def test_a_fixed_beta_is_a_controller_that_does_not_move_and_all_else_is_the_same():
    students = {student.name: student.grace for student in AblationConfig(grace=GraceConfig(eta=0.02)).students()}
    assert students["gdkd-fixed"] == GraceConfig(eta=0.0)
    assert students["gdkd"] == students["grace"] == GraceConfig(eta=0.02)


def test_results_keep_the_recipes_contract_and_hold_what_is_right(finished):
    results = read(finished)
    teacher, *variants = results["variants"]
    assert teacher["name"] == "teacher"
    assert [variant["name"] for variant in variants] == CELLS
    questions = load_easy_vqa("test", 4).questions
    for variant in variants:
        assert variant["seed"] == 0
        assert variant["steps"] == 3
        kept = json.loads((finished / "seed-0" / "answers" / f"{variant['name']}.json").read_text())
        right = [given == question.answer for given, question in zip(kept["answers"], questions, strict=True)]
        assert unpack(variant["right"], len(questions)) == right
        assert variant["accuracy"] == sum(right) / len(right)
    kernels = {variant["precision"]: variant["kernel"] for variant in variants}
    assert kernels["bf16"] == "torch"
    assert kernels["int4-qat"] == kernels["int4-rtn"] == "torchao Int4OpaqueTensor (cpu)"
    assert "IntxUnpackedToInt8Tensor" in kernels["int3-rtn"]


def test_a_cell_is_what_the_recipe_itself_gives(teacher, finished, tmp_path):
    output = tmp_path / "recipe"
    options = tiny_arguments(teacher, output, "--losses", "grace", "--steps", "2", "--finish_steps", "1")
    assert cli.main(["recipe", *options]) == 0
    for name in ("grace-bf16", "grace-int4-rtn", "grace-int4-qat"):
        own, theirs = (folder / "answers" / f"{name}.json" for folder in (finished / "seed-0", output))
        assert own.read_text() == theirs.read_text()


def test_the_report_has_every_cell_every_comparison_and_the_gates_ground(finished):
    results, text = read(finished), (finished / "ablation.md").read_text()
    assert text == markdown(results)
    assert "| Student | BF16 | INT4 QAT | INT4 RTN | INT3 RTN |" in text
    for variant in results["variants"][1:]:
        assert f" {100 * variant['accuracy']:.2f} " in text
    assert "| GRACE (all), INT4 QAT - CE, BF16 |" in text
    assert (finished / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert results["gate_ground"]["answers"]["count"] == results["questions"]
    assert len(results["gate_ground"]["answers"]["bins"]) == 4
    assert 0 < results["rest_share"] < 1


def test_a_student_that_is_done_is_not_loaded_again(teacher, finished, tmp_path):
    output = tmp_path / "again"
    shutil.copytree(finished, output)
    (output / "results.json").unlink()
    shutil.rmtree(output / "seed-0" / "models")
    for weights in output.glob("seed-0/stages/*/model.safetensors"):
        weights.unlink()
    assert cli.main(["ablate", *arguments(teacher, output, "--seeds", "0")]) == 0
    assert not (output / "seed-0" / "models").exists()
    ours, theirs = read(output), read(finished)
    assert ours["variants"] == theirs["variants"]
    assert ours["comparisons"] == theirs["comparisons"]


def test_a_finished_ablation_is_left_alone_and_takes_more_seeds(teacher, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert cli.main(["ablate", *arguments(teacher, finished, "--seeds", "0")]) == 0
    assert "nothing was done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    old = {variant["name"]: variant["right"] for variant in read(finished)["variants"][1:]}
    assert cli.main(["ablate", *arguments(teacher, finished, "--seeds", "1")]) == 0
    results = read(finished)
    assert results["config"]["ablation"]["seeds"] == [0, 1]
    assert [variant["name"] for variant in results["variants"][1:]] == CELLS * 2
    assert {v["name"]: v["right"] for v in results["variants"][1:] if v["seed"] == 0} == old
    weights = finished / "seed-0" / "stages" / "ce-start" / "model.safetensors"
    assert weights.stat().st_mtime_ns == before[weights]


def test_other_settings_in_the_same_folder_are_an_error_that_names_them(teacher, finished, capsys):
    assert cli.main(["ablate", *arguments(teacher, finished, "--seeds", "0", "--rtn_bits", "2")]) == 2
    assert "ablation.rtn_bits: [3] -> [2]" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_ablation_goes_on_and_ends_as_if_nothing_had_been(teacher, finished, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "gracekit.recipe.cli", "ablate", *arguments(teacher, output, "--seeds", "0")]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ)
        try:
            limit = time.monotonic() + 120
            while not (output / "seed-0" / "answers" / "ce-int4-rtn.json").exists():
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < limit
                time.sleep(0.005)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert not (output / "results.json").exists()
    first = output / "seed-0" / "stages" / "ce-start" / "model.safetensors"
    written = first.stat().st_mtime_ns
    assert cli.main(["ablate", *arguments(teacher, output, "--seeds", "0")]) == 0
    assert first.stat().st_mtime_ns == written
    ours, theirs = ([v for v in read(folder)["variants"] if v["seed"] == 0] for folder in (output, finished))
    assert [(v["name"], v["right"], v["end"].get("ce")) for v in ours[1:]] == [
        (v["name"], v["right"], v["end"].get("ce")) for v in theirs[1:]
    ]


def constructed(rights):
    """Results of cells with given right and wrong answers: {(method, precision): {seed: right}}."""
    variants = [
        {
            "name": f"{method}-{precision}", "method": method, "precision": precision, "seed": seed,
            "accuracy": sum(right) / len(right), "right": pack(right), "end": {},
        }
        for (method, precision), seeds in rights.items()
        for seed, right in seeds.items()
    ]  # fmt: skip
    return {"variants": variants, "questions": 10}


def test_comparisons_are_paired_by_seed_and_by_question():
    ce = {seed: [True] * (4 + seed) + [False] * (6 - seed) for seed in range(3)}
    grace = {seed: [True] * (6 + seed) + [False] * (4 - seed) for seed in reversed(range(3))}
    kl = {0: [True] * 5 + [False] * 5, 1: [False] * 4 + [True] * 6, 2: [True] * 7 + [False] * 3}
    rows = compare(constructed({("ce", "bf16"): ce, ("grace", "bf16"): grace, ("kl", "bf16"): kl}))
    assert [(row["first"][0], row["second"][0]) for row in rows] == [("grace", "ce"), ("kl", "ce"), ("grace", "kl")]
    one = rows[1]
    differences = [sum(kl[seed]) / 10 - sum(ce[seed]) / 10 for seed in range(3)]
    assert one["differences"] == differences
    assert (one["mean"], one["low"], one["high"]) == mean_interval(differences)
    assert (one["t"], one["sign_flip"]) == (paired_t(differences), sign_flip(differences))
    assert one["mcnemar"] == [mcnemar(kl[seed], ce[seed]) for seed in range(3)]
    assert rows[0]["mean"] == pytest.approx(0.2)
    for test in ("t", "sign_flip"):
        assert [row[f"{test}_holm"] for row in rows] == holm([row[test] for row in rows])
    for seed in range(3):
        assert [row["mcnemar_holm"][seed] for row in rows] == holm([row["mcnemar"][seed] for row in rows])


def test_every_comparison_is_of_two_cells_that_there_are_and_none_is_made_twice():
    cells = [(student.name, precision) for student in AblationConfig().students() for precision in student.precisions]
    made = pairs(cells)
    assert len(made) == len({frozenset(pair) for pair in made}) == 25
    assert {cell for pair in made for cell in pair} <= set(cells)
    for wanted in (("int4-qat", "bf16"), ("int4-rtn", "bf16")):
        assert any((one[1], other[1]) == wanted for one, other in made)
    assert pairs([("ce", "bf16")]) == []


@pytest.mark.parametrize("path", sorted(RESULTS.glob("ablation-*.json")), ids=lambda path: path.name)
def test_published_accuracies_and_tests_follow_from_the_answers_beside_them(path):
    results = json.loads(path.read_text())
    for variant in results["variants"][1:]:
        assert variant["accuracy"] == sum(unpack(variant["right"], results["questions"])) / results["questions"]
    assert json.loads(json.dumps(compare(results))) == results["comparisons"]


@pytest.mark.parametrize("command", ["ablate", "evaluate", "recipe"])
def test_a_command_explains_its_options(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert "--output" in capsys.readouterr().out


@pytest.mark.parametrize("count", range(1, 10))
def test_right_and_wrong_survive_packing(count):
    right = [bool((count * 37 >> i) & 1) for i in range(count)]
    assert unpack(pack(right), count) == right


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AblationOptions(seeds=[]), "seeds must name at least one"),
        (lambda: AblationOptions(seeds=[1, 1]), "seeds must name each value once"),
        (lambda: AblationOptions(bits=[4], rtn_bits=[4]), "bits and rtn_bits must name each value once"),
        (lambda: AblationOptions(bits=[9]), "bits must be at least 2 and at most 8"),
        (lambda: AblationOptions(students=["ce", "hinge"]), "students must be one of"),
        (lambda: AblationOptions(bins=1), "bins must be at least 2"),
        (lambda: AblationConfig(run=RunConfig(seed=3)), "give --seeds"),
        (lambda: AblationConfig(run=RunConfig(losses=["ce"])), "losses is what an ablation goes through"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
