"""What the tests of `gracekit train` share: tiny pairs and records on disk, and how the command is called on them."""

import json

from conversation_cases import save_pair, write_llava

from gracekit.recipe.cli import main

FAMILIES = ("llava", "qwen2_vl", "qwen3_vl")


def write_home(folder):
    """Write a student and a teacher of each family, and ten records as one list and as lines."""
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


def refused(home, tmp_path, capsys, *more, family="llava"):
    assert main(arguments(home, tmp_path / "run", *more, family=family)) == 2
    assert not list(tmp_path.glob("run/checkpoint-*"))
    return capsys.readouterr().err


def with_a_bad_record(home):
    """Write the lines with the fourth one's answer missing, and give the file's name."""
    records = [json.loads(line) for line in (home / "data" / "train.jsonl").read_text().splitlines()]
    records[3]["conversations"][1]["value"] = ""
    path = home / "data" / "one_bad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path.name
