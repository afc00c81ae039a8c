"""A step of GraceTrainer on k micro-batches and r ranks has the gradient of one batch, whatever falls into which of them."""

import functools
import os
import weakref

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_models import LLAVA_TOKENS, tiny_llava
from transformers import TrainerCallback, TrainingArguments

from gracekit import ConfidenceGatedDKD, GraceObjective, LagrangianController, RelationalCKA
from gracekit.quant import LSQConfig, fully_shard_qat, prepare_qat
from gracekit.recipe import distillation
from gracekit.recipe.distillation import (
    Output,
    Reader,
    Teacher,
    TeacherSignal,
    has_plain_head,
    head_weight,
    supervised_rows,
)
from gracekit.recipe.step_losses import Share, counts_of, global_counts, losses_of
from gracekit.recipe.trainer import GraceTrainer

LENGTH = 16
# Of eight samples two have no image; the numbers of supervised tokens are far from equal.
SUPERVISED = [1, 6, 2, 0, 5, 3, 1, 4]
WITHOUT_IMAGE = (2, 5)
PARTS = [[(0, 2), (5, 3)], [(1, 4), (6, 7)]]  # by rank and micro-batch


def sample(index):
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(1, 100, (LENGTH,), generator=generator)
    labels = torch.full((LENGTH,), -100)
    if SUPERVISED[index]:
        labels[-SUPERVISED[index] :] = ids[-SUPERVISED[index] :]
    pixels = torch.zeros(0, 3, 12, 12)
    if index not in WITHOUT_IMAGE:
        ids[1 : 1 + LLAVA_TOKENS] = 120
        pixels = torch.randn(1, 3, 12, 12, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def collate(samples):
    batch = {name: torch.stack([s[name] for s in samples]) for name in ("input_ids", "labels")}
    pixels = torch.cat([s["pixel_values"] for s in samples])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


def objective():
    controller = LagrangianController(target=0.1, lr=0.01)
    return GraceObjective(ConfidenceGatedDKD(vocab_size=128), RelationalCKA(), controller, relational_weight=2.0)


def pair():
    student, teacher = tiny_llava(seed=1), tiny_llava(seed=2, width=48, vocab_size=144, image_token_id=130)
    prepare_qat(student, LSQConfig(group_size=16))
    return student, teacher


class Catch(TrainerCallback):
    """Keeps the gradients of the first optimiser step."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
            self.gradients = {name: g.clone() for name, g in grads.items() if g is not None}


def training_arguments(folder, *, batch_size, accumulate, steps=1, **options):
    """Of a few steps on the CPU that leave nothing behind; ``options`` are added, or take the place of these."""
    settings = {
        "output_dir": str(folder), "use_cpu": True, "max_steps": steps, "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.0, "learning_rate": 1e-3, "remove_unused_columns": False,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1,
    }  # fmt: skip
    return TrainingArguments(**settings | options)


class CountingTrainer(GraceTrainer):
    """Keeps what transformers counts in an optimiser step, and what the losses of that step are divided by."""

    counted = ()

    def get_batch_samples(self, *args):
        batches, items = super().get_batch_samples(*args)
        self.counted = items, batches[0]["grace_share"].counts["token_count"]
        return batches, items


def one_step(
    folder, *, losses, batch_size, accumulate, from_hidden, samples=range(8), kind=GraceTrainer, collate=collate
):
    torch.manual_seed(0)
    student, teacher = pair()
    catch = Catch()
    trainer = kind(
        losses=losses,
        objective=objective(),
        teacher=Teacher(teacher, student, from_hidden=from_hidden, visual=True),
        from_hidden=from_hidden,
        model=student,
        train_dataset=[sample(i) for i in samples],
        data_collator=collate,
        callbacks=[catch],
        args=training_arguments(folder, batch_size=batch_size, accumulate=accumulate),
    )
    trainer.train()
    return catch.gradients, trainer


def assert_equal_gradients(found, expected):
    """To 1e-5 of each parameter's gradient; some (biases of keys) are rounding around 0, hence the share of the whole."""
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, name


@pytest.mark.parametrize("losses", ["ce", "kl", "gdkd", "grace"])
@pytest.mark.parametrize("from_hidden", [True, False], ids=["hidden", "logits"])
def test_micro_batches_have_the_gradient_of_one_batch(tmp_path, losses, from_hidden):
    options = {"losses": losses, "from_hidden": from_hidden}
    expected, whole = one_step(tmp_path / "whole", batch_size=8, accumulate=1, **options)
    found, parts = one_step(tmp_path / "parts", batch_size=2, accumulate=4, **options)
    assert_equal_gradients(found, expected)
    for name in ("loss", "ce", "kl", "gdkd", "rcka", "gate_mean"):
        entries = [trainer.state.log_history[0].get(name, 0.0) for trainer in (whole, parts)]
        assert entries[0] == pytest.approx(entries[1], rel=1e-5), name
    controllers = [t.objective.controller.state_dict() for t in (whole, parts)]
    torch.testing.assert_close(*controllers, rtol=1e-6, atol=1e-6, equal_nan=True)


def collate_first_token_supervised(samples):
    batch = collate(samples)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    return batch


def test_the_tokens_of_a_step_are_as_many_as_transformers_counts(tmp_path):
    """A first token is never predicted, and neither side counts it."""
    options = {"losses": "ce", "batch_size": 2, "accumulate": 4, "from_hidden": True, "kind": CountingTrainer}
    for number, collator in enumerate((collate, collate_first_token_supervised)):
        _, trainer = one_step(tmp_path / str(number), **options, collate=collator)
        assert trainer.counted == (sum(SUPERVISED), sum(SUPERVISED))


@pytest.mark.parametrize("losses", ["ce", "kl", "grace"])
def test_a_part_of_a_batch_without_counts_has_its_share_of_the_tokens_that_a_caller_names(tmp_path, losses):
    """Cross-entropy and divergence add up to those of the whole batch; all else is a mean over parts by tokens."""
    _, trainer = one_step(tmp_path, losses=losses, batch_size=8, accumulate=1, from_hidden=True)
    parts, total = [range(2), range(2, 5), range(5, 8)], sum(SUPERVISED)

    def loss(part, **options):
        return trainer.compute_loss(trainer.model, collate([sample(i) for i in part]), **options)

    named = [loss(part, num_items_in_batch=total) for part in parts]
    torch.testing.assert_close(loss(parts[0], num_items_in_batch=torch.tensor(total)), named[0])
    for part, found in zip(parts, named, strict=True):
        torch.testing.assert_close(found, loss(part) * sum(SUPERVISED[i] for i in part) / total)
    if losses != "grace":
        torch.testing.assert_close(sum(named), loss(range(8)))
    assert loss([3], num_items_in_batch=0).isfinite()  # a batch without a supervised token, counted alone


def test_hidden_states_and_logits_give_one_gradient(tmp_path):
    expected, _ = one_step(tmp_path / "a", losses="grace", batch_size=4, accumulate=2, from_hidden=False)
    found, _ = one_step(tmp_path / "b", losses="grace", batch_size=4, accumulate=2, from_hidden=True)
    assert_equal_gradients(found, expected)


def test_the_loss_of_a_step_is_the_objective_of_plain_forwards(tmp_path):
    """Against transformers' own logits and hidden states, not the taps."""
    _, trainer = one_step(tmp_path, losses="grace", batch_size=4, accumulate=2, from_hidden=True)
    student, teacher = pair()
    batch = collate([sample(i) for i in range(8)])
    labels = batch.pop("labels")
    taught = batch | {"input_ids": torch.where(batch["input_ids"] == 120, 130, batch["input_ids"])}
    ours, theirs = (m(**b, output_hidden_states=True) for m, b in ((student, batch), (teacher, taught)))
    visual = batch["input_ids"] == 120
    keep = labels[:, 1:] != -100
    expected = objective()(
        ours.logits[:, :-1][keep],
        theirs.logits[:, :-1][keep],
        labels[:, 1:][keep],
        student_tokens=ours.hidden_states[-2][visual],
        teacher_tokens=theirs.hidden_states[-2][visual],
        lengths=[LLAVA_TOKENS] * 6,
    )
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(expected.total.item(), rel=1e-4)
    assert entry["rcka"] == pytest.approx(expected.relational.item(), rel=1e-4)
    assert entry["gate_mean"] == pytest.approx(expected.gate_sum.item() / keep.sum().item(), rel=1e-4)
    assert 0 < entry["rcka_gradient_share"] < 1.5


def test_of_text_alone_the_relational_part_has_no_share_to_warn_of(tmp_path):
    _, trainer = one_step(tmp_path, losses="grace", batch_size=2, accumulate=1, from_hidden=True, samples=WITHOUT_IMAGE)
    assert trainer.state.log_history[0]["rcka"] == 0
    assert "rcka_gradient_share" not in trainer.state.log_history[0]


def test_the_device_holds_one_micro_batch_at_a_time(tmp_path, monkeypatch):
    """A move to the device is a copy here; of the copies only the one whose turn it is may be alive."""
    moved, alive = [], []
    prepare, loss = GraceTrainer._prepare_inputs, GraceTrainer.compute_loss

    def move(self, batch):
        found = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in prepare(self, batch).items()}
        moved.append(weakref.ref(found["input_ids"]))
        return found

    def count(self, *args, **kwargs):
        alive.append(sum(reference() is not None for reference in moved))
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(GraceTrainer, "_prepare_inputs", move)
    monkeypatch.setattr(GraceTrainer, "compute_loss", count)
    _, trainer = one_step(tmp_path, losses="grace", batch_size=2, accumulate=4, from_hidden=True)
    assert alive == [1, 1, 1, 1]
    assert trainer.get_train_dataloader().device is None
    assert trainer.accelerator.device_placement


@pytest.mark.parametrize("losses", ["ce", "kl", "rcka"])
def test_from_hidden_states_no_logits_are_kept(losses, monkeypatch):
    """Seven rows of logits in slabs of two, and what the graph keeps of them."""
    monkeypatch.setattr(distillation, "SLAB_ELEMENTS", 2 * 128)
    hidden, weight = torch.randn(7, 32, requires_grad=True), torch.randn(128, 32, requires_grad=True)
    tokens = torch.randn(9, 32, requires_grad=True)
    signal = TeacherSignal(hidden=torch.randn(7, 48), head=torch.randn(144, 48), tokens=torch.randn(9, 48))
    targets, share = torch.arange(7), Share(signal=signal, counts={})
    kept = []
    seen = Output(hidden, None, tokens, [9], None)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        found = losses_of(losses, seen, weight, targets, share, objective())
    assert not [shape for shape in kept if shape[-1:] == (128,) and len(shape) == 2]
    ours = torch.autograd.grad(found.total, (hidden, weight))
    whole = Output(None, hidden @ weight.T, tokens, [9], None)
    expected = losses_of(losses, whole, None, targets, share, objective())
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(ours, torch.autograd.grad(expected.total, (hidden, weight)))


def test_a_head_is_tried_out_on_a_few_words():
    seen = []
    for model, plain in ((tiny_llava(image_token_id=2), True), (tiny_llava(image_token_id=2), False)):
        if not plain:
            model.lm_head.register_forward_hook(lambda module, args, output: 5 * torch.tanh(output))
            torch.nn.init.normal_(model.lm_head.weight, std=3.0)
        model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
        assert has_plain_head(model) is plain
    assert len(seen) == 4
    assert all(given["input_ids"].tolist() == [[0, 1, 3, 4, 5, 6, 7, 8]] for given in seen)


def ddp_rank(rank, world, folder, expected):
    # As torchrun sets it; the group itself stands already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    options = {"losses": "grace", "batch_size": 2, "accumulate": 2, "from_hidden": True}
    found, trainer = one_step(folder, **options, kind=CountingTrainer)
    assert trainer.counted == (sum(SUPERVISED), sum(SUPERVISED))
    assert trainer.args.world_size == world
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    assert_equal_gradients(found, expected["gradients"])
    controller = trainer.objective.controller
    torch.testing.assert_close(controller.ema, expected["ema"], rtol=1e-5, atol=1e-5)
    every = [torch.zeros(()) for _ in range(world)]
    dist.all_gather(every, controller.multiplier)
    assert torch.equal(*every)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    # A rank's part of a batch that comes without counts: the mean over ranks, which DDP takes, is the loss of all.
    part = collate([sample(i) for i in range(4 * rank, 4 * rank + 4)])
    trainer.losses = "ce"
    with torch.no_grad():
        mean = trainer.compute_loss(trainer.model, dict(part), num_items_in_batch=sum(SUPERVISED))
        dist.all_reduce(mean)
        whole = trainer.compute_loss(trainer.model, collate([sample(i) for i in range(8)]))
    torch.testing.assert_close(mean / world, whole)


def fsdp_rank(rank, world, expected):
    """The trainer's parts on a sharded model, two micro-batches on each rank."""
    student, teacher = pair()
    teach = Teacher(teacher, student, from_hidden=True, visual=True)
    fully_shard_qat(student, mesh=dist.init_device_mesh("cpu", (world,)))
    reader, method = Reader(student, from_hidden=True, visual=True), objective()
    batches = [collate([sample(i) for i in part]) for part in PARTS[rank]]
    labels = [batch.pop("labels") for batch in batches]
    rows = [supervised_rows(label) for label in labels]
    targets = [label.roll(-1, 1).flatten()[row] for label, row in zip(labels, rows, strict=True)]
    signals = [teach(batch, row) for batch, row in zip(batches, rows, strict=True)]
    counts = global_counts([counts_of(s, t, method) for s, t in zip(signals, targets, strict=True)])
    for number, (batch, row, signal, target) in enumerate(zip(batches, rows, signals, targets, strict=True)):
        student.set_requires_gradient_sync(number == 1)
        seen, _ = reader(student, batch, row)
        share = Share(signal=signal, counts=counts)
        found = losses_of("grace", seen, head_weight(student), target, share, method)
        (found.total * world).backward()
    found = {name: p.grad.full_tensor() for name, p in student.named_parameters() if p.grad is not None}
    assert_equal_gradients(found, expected)


@pytest.mark.slow
def test_two_ranks_of_ddp_and_of_fsdp2_have_the_gradient_of_one_batch(tmp_path):
    expected, whole = one_step(tmp_path / "whole", losses="grace", batch_size=8, accumulate=1, from_hidden=True)
    kept = {
        "gradients": expected,
        "ema": whole.objective.controller.ema,
        "loss": whole.state.log_history[0]["loss"],
    }
    run_ranks(functools.partial(both, folder=str(tmp_path / "parts"), expected=kept))


def both(rank, world, folder, expected):
    ddp_rank(rank, world, folder, expected)
    fsdp_rank(rank, world, expected["gradients"])
