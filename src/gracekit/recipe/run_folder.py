"""The folder of a `gracekit train` run: new, taken up again, or finished; a folder of anything else is left alone.

What makes it a run's is its settings file. Everything else in it may be replaced or removed when the run ends, so nothing but a
file with that name and these sections will do: output_dir may be where a user keeps data, or models of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gracekit.recipe.callbacks import latest_checkpoint
from gracekit.recipe.digests import data_digest, data_stamp
from gracekit.recipe.output_folder import own_settings
from gracekit.recipe.stages import write_json
from gracekit.recipe.teacher_states import ABOUT
from gracekit.recipe.train_config import TrainConfig

SETTINGS, DONE = "gracekit-train.json", "training.json"
STATES = "teacher_states"
_RUN = "run"


def open_run(config: TrainConfig, folder: Path) -> bool:
    """Make the run's folder ready; False if it holds a finished run of these settings.

    Raises:
        FileExistsError: it holds something else, or a run with other settings.
    """
    with config.training.main_process_first():  # the others find its settings file
        return _open(config, folder)


def _open(config: TrainConfig, folder: Path) -> bool:
    path = folder / SETTINGS
    settings: dict[str, Any] = config.as_dict()
    # Batches are dealt out over the ranks, and an edited file has other records behind the same path.
    digest = data_stamp(config.data.data) if config.data.streaming else data_digest(config.data.data)
    run = {"world_size": config.training.world_size, "data_sha256": digest}
    settings[_RUN] = run
    there = own_settings(path, settings, "gracekit train", name="output_dir", sections=True)
    if there is not None:
        differences = config.differences(there)
        differences += [
            f"{name}: {there[_RUN].get(name)!r} -> {value!r}"
            for name, value in run.items()
            if there[_RUN].get(name) != value
        ]
        if differences and _begun(folder):
            raise FileExistsError(
                f"output_dir must be a new folder or a run with the same settings, got {str(folder)!r} with other ones "
                f"(there -> asked for): {'; '.join(differences)}"
            )
        if differences:
            write_json(path, settings)  # of a run that was refused or left before it kept anything
        return not (folder / DONE).is_file()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return True


def _begun(folder: Path) -> bool:
    kept = (folder / DONE, folder / STATES / ABOUT)
    return latest_checkpoint(folder) is not None or any(path.is_file() for path in kept)
