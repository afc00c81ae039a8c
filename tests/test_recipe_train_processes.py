"""`gracekit train` in processes of its own: killed ones, whose runs end as if nothing had been, and two that train one model."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from train_cases import arguments, history, streaming, with_a_bad_record, write_home

from gracekit.quant.formats.trained import SCALES_FILE
from gracekit.recipe.callbacks import latest_checkpoint
from gracekit.recipe.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("train"))


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

    beside = start(whole)
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
    assert beside.wait() == 0
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
