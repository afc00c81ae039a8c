"""GraceTrainer on two ranks, as its arguments start DDP and FSDP2: the weights of one process, whatever a rank's batch holds."""

import functools
import os

import pytest
import torch
from fsdp_on_cpu import offer_fsdp
from ranks import run_ranks
from test_recipe_global_batch import assert_equal_gradients, collate, objective, pair, sample
from transformers import TrainerCallback, TrainingArguments

from gracekit.recipe.distillation import Teacher
from gracekit.recipe.trainer import GraceTrainer

pytestmark = pytest.mark.slow


class Catch(TrainerCallback):
    """Keeps the whole gradients of every optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
        whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for name, g in grads.items()}
        self.steps.append(whole)


def steps(folder, *, batch_size, accumulate=1, count=1, order=range(8), **options):
    """Train a pair; the gradients of each step, and the trainer."""
    torch.manual_seed(0)
    student, teacher = pair()
    catch = Catch()
    arguments = {"learning_rate": 1e-3, **options}
    trainer = GraceTrainer(
        losses="grace",
        objective=objective(),
        teacher=Teacher(teacher, student, from_hidden=True, visual=True),
        from_hidden=True,
        model=student,
        train_dataset=[sample(i) for i in order],
        data_collator=collate,
        callbacks=[catch],
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            max_steps=count,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            train_sampling_strategy="sequential",
            **arguments,
        ),
    )
    trainer.train()
    return catch.steps, trainer


def fsdp_rank(rank, world, folder, expected):
    offer_fsdp(rank, world)
    found, trainer = steps(folder, batch_size=2, accumulate=2, count=2, fsdp=True)
    assert trainer.is_fsdp_enabled
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal_gradients(ours, theirs)


def test_fsdp_as_the_arguments_start_it_has_the_gradients_of_one_process(tmp_path):
    """With nothing said about wrapping; the second step sees the weights that the first has left."""
    expected, _ = steps(tmp_path / "one", batch_size=8, count=2)
    run_ranks(functools.partial(fsdp_rank, folder=str(tmp_path / "two"), expected=expected))
