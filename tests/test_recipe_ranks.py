"""GraceTrainer on two ranks, as its arguments start DDP and FSDP2: the weights of one process, whatever a rank's batch holds."""

import functools

import pytest
import torch
from conversation_cases import save_pair, write_llava
from fsdp_on_cpu import offer_fsdp, set_rank
from ranks import run_ranks
from safetensors.torch import load_file
from test_recipe_global_batch import assert_equal_gradients, collate, objective, pair, sample, training_arguments
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText, TrainerCallback

from gracekit.quant import load_qat
from gracekit.quant.lsq import LSQFakeQuantizer
from gracekit.recipe import train
from gracekit.recipe.distillation import Teacher
from gracekit.recipe.train_config import parse
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


def steps(folder, *, batch_size, accumulate=1, count=1, order=tuple(range(8)), learned=True, blank=True, **options):
    """Train a pair; the gradients of each step, and the trainer."""
    torch.manual_seed(0)
    student, teacher = pair() if learned else (tiny_llava(seed=1), pair()[1])
    catch = Catch()
    trainer = GraceTrainer(
        losses="grace",
        objective=objective(),
        teacher=Teacher(teacher, student, from_hidden=True, visual=True),
        from_hidden=True,
        blank_picture={"pixel_values": sample(0)["pixel_values"]} if blank else None,
        model=student,
        train_dataset=[sample(i) for i in order],
        data_collator=collate,
        callbacks=[catch],
        args=training_arguments(
            folder,
            batch_size=batch_size,
            accumulate=accumulate,
            steps=count,
            train_sampling_strategy="sequential",
            **options,
        ),
    )
    trainer.train()
    return catch.steps, trainer


def fsdp_rank(rank, world, folder, expected, **options):
    offer_fsdp(rank, world)
    found, trainer = steps(folder, batch_size=2, accumulate=2, count=2, fsdp=True, **options)
    assert trainer.is_fsdp_enabled
    for ours, theirs in zip(found, expected, strict=True):
        assert_equal_gradients(ours, theirs)


# Two ranks draw two samples each in turn; samples 2 and 5 have no picture, and here one rank has both.
TEXT_ON_ONE_RANK = (2, 5, 0, 1, 3, 4, 6, 7)


@pytest.mark.parametrize("order", [tuple(range(8)), TEXT_ON_ONE_RANK], ids=["mixed", "text-on-one-rank"])
@pytest.mark.parametrize("learned", [True, False], ids=["int4", "plain"])
def test_fsdp_as_the_arguments_start_it_has_the_gradients_of_one_process(tmp_path, learned, order):
    """With nothing said about wrapping; the second step sees the weights that the first has left."""
    options = {"learned": learned, "order": order}
    expected, _ = steps(tmp_path / "one", batch_size=8, count=2, **options)
    run_ranks(functools.partial(fsdp_rank, folder=str(tmp_path / "two"), expected=expected, **options))


def fsdp_without_blank_rank(rank, world, folder):
    offer_fsdp(rank, world)
    with pytest.raises(ValueError, match="3 with one and 1 without: give GraceTrainer a blank_picture"):
        steps(folder, batch_size=2, accumulate=2, fsdp=True, order=TEXT_ON_ONE_RANK, blank=None)


def test_fsdp_stops_where_ranks_would_wait_for_each_other_for_ever(tmp_path):
    run_ranks(functools.partial(fsdp_without_blank_rank, folder=str(tmp_path)))


def ddp_rank(rank, world, folder, expected):
    set_rank(rank, world)
    for number, options in enumerate(({}, {"gradient_checkpointing": True})):
        found, trainer = steps(
            f"{folder}/{number}", batch_size=2, accumulate=2, count=2, **options, order=TEXT_ON_ONE_RANK
        )
        assert trainer.model_wrapped.find_unused_parameters
        for ours, theirs in zip(found, expected, strict=True):
            assert_equal_gradients(ours, theirs)
    _, trainer = steps(f"{folder}/asked", batch_size=2, count=0, ddp_find_unused_parameters=False)
    assert trainer.args.ddp_find_unused_parameters is False


def test_ddp_bears_checkpointing_and_a_vision_tower_whose_last_layer_is_unused(tmp_path):
    expected, _ = steps(tmp_path / "one", batch_size=8, count=2, order=TEXT_ON_ONE_RANK)
    run_ranks(functools.partial(ddp_rank, folder=str(tmp_path / "two"), expected=expected))


def bf16_rank(rank, world, settings):
    """Keep what the last forward made of every weight, and compare what the saved folder makes of its own."""
    offer_fsdp(rank, world)
    made, forward, finish = {}, LSQFakeQuantizer.forward, train.finish

    def keep(self, weight, x, bias):
        made[self] = forward(self, weight)
        product = forward(self, weight, x, bias)
        assert torch.equal(product, torch.nn.functional.linear(x, made[self], bias))
        return product

    def compare(trainer, config, pair, folder):
        finish(trainer, config, pair, folder)
        LSQFakeQuantizer.forward = forward
        if rank:
            return
        model = AutoModelForImageTextToText.from_pretrained(folder / "model")
        assert len(load_qat(model, folder / "model")) == 21
        ending = ".weight_fake_quantizer"
        named = {n.removesuffix(ending): made[m] for n, m in trainer.model.named_modules() if m in made}
        assert len(named) == 21
        for name, weight in named.items():
            assert weight.dtype == torch.bfloat16
            layer = model.get_submodule(name)
            assert torch.equal(layer.weight_fake_quantizer(layer.weight), weight), name

    LSQFakeQuantizer.forward, train.finish = keep, compare
    train.train(parse(settings))


def small_run(folder, **options):
    """Arguments of a training of a tiny pair on ten records."""
    for side, size in (("student", {"vocab_size": 304}), ("teacher", {"vocab_size": 320, "width": 64})):
        save_pair(folder / side, "llava", **size)
    write_llava(folder / "data", 10)
    settings = {
        "student": folder / "student", "teacher": folder / "teacher", "data": folder / "data" / "train.json", "preset": "small",
        "use_cpu": "true", "group_size": 16, "per_device_train_batch_size": 2, "max_length": 400, "fsdp": "full_shard",
        "report_to": "none", "dataloader_pin_memory": "false", **options,
    }  # fmt: skip
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_what_fsdp_saves_under_bf16_is_what_its_forwards_computed_with(tmp_path):
    settings = small_run(
        tmp_path, output_dir=tmp_path / "run", max_steps=2, bf16="true", learning_rate=0, weight_decay=0
    )
    run_ranks(functools.partial(bf16_rank, settings=settings))


class KilledError(Exception):
    """Stands for the end of a process."""


class KillAfterThreeSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KilledError


def resuming_rank(rank, world, settings, folder):
    """A run as it is, and one that is killed a step after its checkpoint and begun again."""
    offer_fsdp(rank, world)
    train.train(parse([*settings, "--output_dir", f"{folder}/whole"]))
    killed, make_trainer = [*settings, "--output_dir", f"{folder}/killed"], train.make_trainer

    def mortal(*args):
        trainer = make_trainer(*args)
        trainer.add_callback(KillAfterThreeSteps())
        return trainer

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(train, "make_trainer", mortal)
        train.train(parse(killed))
    train.train(parse(killed))


def test_a_killed_run_under_fsdp_goes_on_to_the_weights_of_one_that_was_not(tmp_path):
    settings = small_run(tmp_path, max_steps=4, save_steps=2, learning_rate=1e-3)
    run_ranks(functools.partial(resuming_rank, settings=settings, folder=tmp_path))
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert all(torch.equal(killed[name], weight) for name, weight in whole.items())
