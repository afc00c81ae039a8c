"""`--teacher_mode precomputed`: the answers that a run's students learn from, and what tells them from others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gracekit.recipe.batches import ConversationDataset
from gracekit.recipe.digests import data_digest, processor_digest, records_digests, weights_digest
from gracekit.recipe.distillation import Teacher, has_plain_head
from gracekit.recipe.pairs import Pair
from gracekit.recipe.progress import progress_bars
from gracekit.recipe.run_folder import STATES
from gracekit.recipe.teacher_states import TeacherStates, compute_states, is_complete, read_about
from gracekit.recipe.train_config import TrainConfig
from gracekit.vlm.families import placeholder_id


def states_folder(config: TrainConfig, folder: Path) -> Path:
    """Return where a run's teacher keeps its answers."""
    return Path(config.pair.teacher_states) if config.pair.teacher_states else folder / STATES


def is_answered(config: TrainConfig, folder: Path) -> bool:
    """Whether a run's teacher has nothing left to answer, so that its weights are not needed."""
    return config.pair.teacher_mode == "precomputed" and is_complete(states_folder(config, folder))


def about_states(config: TrainConfig, pair: Pair, dataset: ConversationDataset) -> dict[str, Any]:
    """Return what the answers depend on. The student is none of it: others learn from the same answers.

    Names and paths are not compared but for the images': a teacher or data that were moved are what they were.
    """
    data, images = Path(config.data.data), config.data.image_folder
    home = Path(images) if images else data if data.is_dir() else data.parent
    kinds = ("image", "video")
    return {
        "teacher_weights": weights_digest(config.pair.teacher),
        "processor": processor_digest(pair.processor),
        "placeholders": [[placeholder_id(model, kind) for kind in kinds] for model in (pair.student, pair.teacher)],
        "data_sha256": data_digest(data),
        "image_folder": str(home.resolve()),
        **records_digests(dataset.records),
    }


def precompute(
    config: TrainConfig, pair: Pair, dataset: ConversationDataset, collate: Any, folder: Path
) -> TeacherStates:
    """Return the teacher's answers for a data set, computed where they are missing.

    Args:
        config: the settings.
        pair: both models, the teacher without weights where it has answered.
        dataset: what to answer for.
        collate: makes a batch of it.
        folder: of the run.

    Raises:
        ValueError: the folder holds the answers to something else, with what differs.
    """
    where = states_folder(config, folder)
    about = about_states(config, pair, dataset)
    visual = config.method.losses in ("rcka", "grace")
    if not next(pair.teacher.parameters()).is_meta:
        # An interrupted computation goes on as it began.
        there = read_about(where)
        _compute(config, pair, dataset, collate, where, about, visual or bool(there and there["visual"]))
    if config.training.world_size > 1:
        config.training.distributed_state.wait_for_everyone()
    return TeacherStates(where, about, visual=visual)


def _compute(
    config: TrainConfig,
    pair: Pair,
    dataset: ConversationDataset,
    collate: Any,
    where: Path,
    about: dict[str, Any],
    visual: bool,
) -> None:
    training = config.training
    teacher = Teacher(pair.teacher, pair.student, from_hidden=False, visual=visual)
    if has_plain_head(pair.teacher):
        teacher = Teacher(pair.teacher, pair.student, from_hidden=True, visual=visual)
    teacher.to(training.device)
    with progress_bars() as bars:
        task = bars.add_task("teacher: answer", total=len(dataset)) if training.process_index == 0 else None
        compute_states(
            teacher,
            dataset,
            collate,
            where,
            about,
            device=training.device,
            rank=training.process_index,
            advance=lambda count: bars.advance(task, count) if task is not None else None,
        )
    teacher.model.to("cpu")
