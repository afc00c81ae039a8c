"""`gracekit train` on records that are read as they come."""

import pytest
import torch
from safetensors.torch import load_file
from train_cases import arguments, history, refused, streaming, with_a_bad_record, write_home

from gracekit.recipe.callbacks import latest_checkpoint
from gracekit.recipe.cli import main


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("train"))


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
