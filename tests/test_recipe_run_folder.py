"""A run's folder is taken up only where it is a run's, of the same settings, data and ranks; anything else is left as it is."""

import json

import pytest

from gracekit.recipe.callbacks import CONTROLLER_FILE
from gracekit.recipe.run_folder import DONE, SETTINGS, open_run
from gracekit.recipe.train import main
from gracekit.recipe.train_config import parse

NEEDED = ["--student", "s", "--teacher", "t", "--use_cpu", "true"]


def configured(home, *more):
    data = home / "train.json"
    if not data.exists():
        data.write_text("[1]")
    return parse([*NEEDED, "--data", str(data), *more])


def begin(config, folder):
    assert open_run(config, folder)
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / CONTROLLER_FILE).touch()


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["train.json", SETTINGS])
@pytest.mark.parametrize("text", ["[]", "{}", "{", '"text"', '{"pair": {}, "data": {}, "method": {}, "training": []}'])
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_something_else_is_refused_and_keeps_every_file(tmp_path, capsys, name, text, finished):
    folder = tmp_path / "mine"
    for kept in ("model/model.safetensors", "checkpoint-5/optimizer.pt", f"checkpoint-5/{CONTROLLER_FILE}"):
        (folder / kept).parent.mkdir(parents=True, exist_ok=True)
        (folder / kept).write_text("weeks of work")
    (folder / name).write_text(text)
    if finished:
        (folder / DONE).write_text("{}")
    before = files(folder)
    data = tmp_path / "data.json"
    data.write_text("[]")
    assert main([*NEEDED, "--data", str(data), "--output_dir", str(folder)]) == 2
    assert f"got {str(folder)!r}, which holds something else" in capsys.readouterr().err
    assert files(folder) == before


def test_an_unfinished_run_is_taken_up_and_a_finished_one_is_not(tmp_path):
    config, folder = configured(tmp_path), tmp_path / "run"
    begin(config, folder)
    assert open_run(config, folder)
    (folder / DONE).touch()
    assert not open_run(config, folder)


def test_an_edited_data_file_is_refused(tmp_path):
    config, folder = configured(tmp_path), tmp_path / "run"
    begin(config, folder)
    (tmp_path / "train.json").write_text("[2]")
    with pytest.raises(FileExistsError, match=r"with other ones .*: data_sha256: '\w{16}' -> '\w{16}'$"):
        open_run(config, folder)
    (tmp_path / "train.json").write_text("[1]")
    assert open_run(config, folder)


def test_streamed_data_are_known_without_being_read(tmp_path, monkeypatch):
    options = ("--streaming", "true", "--max_steps", "9")
    config, folder = configured(tmp_path, *options), tmp_path / "run"
    monkeypatch.setattr("gracekit.recipe.digests._content", lambda path: pytest.fail("read"))
    begin(config, folder)
    assert open_run(config, folder)
    (tmp_path / "train.json").write_text("[2, 3]")
    with pytest.raises(FileExistsError, match=r"with other ones .*: data_sha256: '\w{16}' -> '\w{16}'$"):
        open_run(config, folder)


def test_another_number_of_ranks_is_refused(tmp_path):
    config, folder = configured(tmp_path), tmp_path / "run"
    begin(config, folder)
    there = json.loads((folder / SETTINGS).read_text())
    there["run"]["world_size"] = 2
    (folder / SETTINGS).write_text(json.dumps(there))
    with pytest.raises(FileExistsError, match=r"world_size: 2 -> 1$"):
        open_run(config, folder)


def test_a_run_that_kept_nothing_yet_takes_other_settings(tmp_path):
    folder = tmp_path / "run"
    assert open_run(configured(tmp_path), folder)
    (tmp_path / "train.json").write_text("[2]")
    config = configured(tmp_path, "--omega", "7")
    assert open_run(config, folder)
    there = json.loads((folder / SETTINGS).read_text())
    assert there["method"]["omega"] == 7.0
