"""`gracekit train`: distil any vision-language model into a student that learns with INT4, INT8 or plain weights.

Everything that can be refused is refused before the first step: settings, bad records, a pair that does not fit, memory; of data
that are streamed, bad records are met on the way. A run's folder holds its settings, so the same command goes on after an
interruption from the last whole checkpoint, and a finished run is never trained again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import set_seed
from transformers.trainer_callback import ProgressCallback

from gracekit._distributed import leave_group
from gracekit.quant import coverage, load_qat, prepare_qat, save_qat
from gracekit.quant.formats.trained import SCALES_FILE
from gracekit.quant.lsq import LSQFakeQuantizer
from gracekit.recipe.bad_records import BAD_RECORDS, left_out, read_bad_records
from gracekit.recipe.batches import ConversationCollator, ConversationDataset
from gracekit.recipe.blank_picture import blank_picture
from gracekit.recipe.callbacks import StepCallback, latest_checkpoint
from gracekit.recipe.conversation_stream import ConversationStream
from gracekit.recipe.distillation import Teacher, has_plain_head
from gracekit.recipe.environment import environment
from gracekit.recipe.pairs import Pair, load_pair, load_student, scales_folder
from gracekit.recipe.precomputed import is_answered, precompute
from gracekit.recipe.progress import progress_bars, quiet, say
from gracekit.recipe.record_sources import existing
from gracekit.recipe.run_folder import DONE, open_run
from gracekit.recipe.sharding import check_launch, forward_dtype
from gracekit.recipe.stages import write_json
from gracekit.recipe.teacher_states import TaughtCollator, TaughtDataset
from gracekit.recipe.train_config import TrainConfig, parse
from gracekit.recipe.train_data import checked_data
from gracekit.recipe.trainer import GraceTrainer

_MODEL = "model"


def train(config: TrainConfig) -> Path:
    """Run, or go on with, a training, and return the folder of the trained model.

    Args:
        config: the settings.

    Returns:
        ``model`` in the run's folder: as ``save_qat`` writes it (``gracekit export`` takes it from there), or as
        ``save_pretrained`` does for ``precision="bf16"``, in both cases with the processor.

    Raises:
        ValueError: bad records, a pair that does not fit, or a launch that it cannot be trained under, with all reasons.
        FileExistsError: the run's folder holds something else.
    """
    existing(config.data.data)
    folder = Path(str(config.training.output_dir))
    if not open_run(config, folder):
        if config.training.process_index == 0:
            say(f"This run is finished; nothing was done. Its model: {folder / _MODEL}")
        return folder / _MODEL
    problems = check_launch(config.training, learned=config.pair.quantiser() is not None)
    if problems:
        raise ValueError("; ".join(problems))
    set_seed(config.training.seed)
    pair = load_pair(config, teacher_weights=not is_answered(config, folder))
    prepare_student(config, pair.student)  # before the passes over the data, which may take long
    checkpoint = latest_checkpoint(folder)
    dataset = checked_data(config, pair, folder, resumed=checkpoint is not None)
    trainer = make_trainer(config, pair, dataset, folder)
    size = f"{len(dataset):,} records" if isinstance(dataset, ConversationDataset) else "Records as they come"
    _say(trainer, f"{size}, {coverage(pair.student) if config.pair.quantiser() else 'no learned scales'}")
    for note in pair.notes:
        _say(trainer, note)
    if checkpoint is not None:
        _say(trainer, f"Going on from {checkpoint}")
    with progress_bars() as bars:
        if trainer.is_world_process_zero():
            task = bars.add_task("train", total=None)
            trainer.add_callback(
                StepCallback(
                    lambda step, text: bars.update(task, completed=step, total=trainer.state.max_steps, note=text)
                )
            )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if isinstance(dataset, ConversationStream) and (bad := read_bad_records(folder / BAD_RECORDS)):
        _say(trainer, left_out(bad, None, folder / BAD_RECORDS))
    finish(trainer, config, pair, folder)
    return folder / _MODEL


def make_trainer(
    config: TrainConfig, pair: Pair, dataset: ConversationDataset | ConversationStream, folder: Path
) -> GraceTrainer:
    """Return the trainer of a run, its teacher's answers computed where they are to be."""
    collate: Any = ConversationCollator(pair.processor, padding_side="right")
    from_hidden = has_plain_head(pair.student)
    teacher, head = None, None
    data: Any = dataset
    if pair.teacher is not None and config.pair.teacher_mode == "precomputed":
        assert isinstance(dataset, ConversationDataset)  # the settings say so
        states = precompute(config, pair, dataset, collate, folder)
        from_hidden = from_hidden and states.from_hidden
        head = states.head()
        head = head.to(config.training.device) if head is not None else None
        pair.teacher = None
        data, collate = TaughtDataset(dataset, states), TaughtCollator(collate)
    elif pair.teacher is not None:
        teacher, from_hidden = _teacher(config, pair, from_hidden)
    # Of a stream it is not known beforehand.
    pictured = config.training.world_size > 1 and (
        isinstance(dataset, ConversationStream) or any(record.images for record in dataset.records)
    )
    trainer = GraceTrainer(
        losses=config.method.losses,
        objective=config.method.objective(config.method.losses, vocab_size=pair.vocab_size),
        calibration=config.method.calibration(),
        relational_warmup=config.method.relational_warmup,
        teacher=teacher,
        teacher_head=head,
        from_hidden=from_hidden,
        blank_picture=blank_picture(pair.processor) if pictured else None,
        model=pair.student,
        args=config.training,
        train_dataset=data,
        data_collator=collate,
    )
    trainer.remove_callback(ProgressCallback)
    return trainer


def prepare_student(config: TrainConfig, student: nn.Module) -> None:
    """Give a student learned scales, where its precision asks for them: those of its folder, or new ones.

    Raises:
        ValueError: its folder has scales of another format, or the run is to train none.
    """
    quantiser, folder = config.pair.quantiser(), scales_folder(config.pair.student)
    if folder is not None and quantiser is None:
        raise ValueError(f"precision must be int4 or int8 for a student with learned scales, got 'bf16' for {folder}")
    if quantiser is None:
        return
    if folder is None:
        prepare_qat(student, quantiser)
        return
    load_qat(student, folder)
    there = {module.config for module in student.modules() if isinstance(module, LSQFakeQuantizer)}
    if there != {quantiser}:
        raise ValueError(f"precision and group_size must be those of the student's scales, {there}, got {quantiser}")


def _teacher(config: TrainConfig, pair: Pair, from_hidden: bool) -> tuple[Teacher, bool]:
    teacher = Teacher(pair.teacher, pair.student, from_hidden=False, visual=config.method.losses in ("rcka", "grace"))
    if from_hidden and has_plain_head(pair.teacher):
        teacher = Teacher(pair.teacher, pair.student, from_hidden=True, visual=teacher.reader.visual is not None)
    device = config.training.device
    if config.pair.teacher_mode == "offload":
        teacher.offload(device)
    else:
        teacher.to(device)
    return teacher, teacher.reader.from_hidden


def finish(trainer: GraceTrainer, config: TrainConfig, pair: Pair, folder: Path) -> None:
    """Write the trained model and what was measured, and remove the checkpoints: nothing is left to go on with."""
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return
    model: Any = trainer.model
    quantiser = config.pair.quantiser()
    if state is not None:
        # What trained are the codes of weights as the forwards saw them, not those of the optimiser's copy.
        dtype = forward_dtype(trainer.accelerator.state.fsdp_plugin) or config.pair.dtype()
        model = load_student(config, dtype)
        if quantiser is not None:
            prepare_qat(model, quantiser)
        model.load_state_dict(state)
    # save_qat looks at the layers with learned scales alone.
    broken = [name for name, value in model.named_parameters() if not bool(value.isfinite().all())]
    if broken:
        raise ValueError(f"the trained weights must be finite, got NaN or infinity in {len(broken)} ({broken[0]}, ...)")
    output = folder / _MODEL
    shutil.rmtree(output, ignore_errors=True)  # of an interrupted writing
    if quantiser is not None:
        save_qat(model, output)
    else:
        model.save_pretrained(output)
    pair.processor.save_pretrained(output)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    done = {"environment": environment(config.training.device), "steps": trainer.state.global_step, "history": log}
    write_json(folder / DONE, done)
    for left in folder.glob("checkpoint-*"):
        if left.name.removeprefix("checkpoint-").isdigit():
            shutil.rmtree(left)
    kind = f"with its learned scales ({SCALES_FILE})" if quantiser is not None else "in plain weights"
    _say(trainer, f"Trained: {output}, {kind}")


def _say(trainer: GraceTrainer, text: str) -> None:
    if trainer.is_world_process_zero():
        say(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Distil a vision-language model into a student with INT4, INT8 or plain weights."""
    quiet()
    try:
        config = parse(list(sys.argv[1:] if arguments is None else arguments))
        train(config)
    except (ValueError, TypeError, OSError, SafetensorError, ImportError) as error:  # the last: an optimiser's package
        print(f"gracekit train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("Interrupted; the same command goes on from the last checkpoint.")
        return 130
    leave_group()  # not after an error, which the other ranks may not have: they would be waited for
    return 0
