"""The method inside transformers' Trainer: its losses, its parameter groups, and its controller once an optimiser step.

The losses are those of the whole optimiser step: gates, tokens and images are counted over all of its micro-batches and ranks
before the first of them runs, so k micro-batches on r ranks give the gradient of one batch. The teacher answers for all
micro-batches during that count; they and its answers wait on the CPU for their turn.
"""

# B batch, S sequence length, T supervised tokens, V vocabulary

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from gracekit._checks import check_choice, check_int
from gracekit._distributed import all_sum, world_size
from gracekit.losses import shift_labels
from gracekit.objective import GraceObjective
from gracekit.quant import qat_parameter_groups
from gracekit.recipe.blank_picture import BlankPicture, has_pictures
from gracekit.recipe.calibration import TauCalibration
from gracekit.recipe.callbacks import ControllerCallback
from gracekit.recipe.config import LOSSES
from gracekit.recipe.conversation_stream import deal_out
from gracekit.recipe.distillation import ROWS, Reader, Teacher, TeacherSignal, head_weight, supervised_rows
from gracekit.recipe.meters import Meters
from gracekit.recipe.sharding import check_launch, complete_states, has_learned_scales, is_sharded, shard_student
from gracekit.recipe.step_losses import Share, counts_of, global_counts, losses_of, weighted

_SHARE = "grace_share"
_TAUGHT = ("teacher_logits", "teacher_hidden", "teacher_tokens", "teacher_lengths")


class GraceTrainer(Trainer):  # type: ignore[misc]
    """Train a vision-language model with GRACE's losses.

    A batch is what the student takes, with ``labels`` (B, S). Unless ``losses`` is "ce" the teacher's side comes from ``teacher``,
    or with the batch: ``teacher_logits`` (T, V), or ``teacher_hidden`` (T, d) for the head in ``teacher_head``, for its
    supervised tokens in the order in which they stand; for "rcka" and "grace" also ``teacher_tokens``, the teacher's visual tokens
    packed image after image, and ``teacher_lengths``, a list of how many each image has.

    Gradient accumulation and data-parallel ranks (DDP, and FSDP2 where accelerate offers it) change nothing about the loss: it is
    that of the global batch.

    Args:
        losses: "ce", "kl" (plus a plain KL divergence to the teacher), "gdkd", "rcka" (plus the relational part alone) or
            "grace".
        objective: weights, gate and controller of the method; its controller is stepped once an optimiser step and is part
            of every checkpoint.
        teacher: a :class:`~gracekit.recipe.distillation.Teacher`, or None where batches hold its answers.
        teacher_head: (V, d), for batches with ``teacher_hidden``.
        from_hidden: compute the losses from hidden states and output heads, so that no logits are kept. Both heads must be plain
            products.
        relational_warmup: optimiser steps over which the relational part's weight rises from 0.
        calibration: finds tau from the first steps; None: the controller's target stands.
        blank_picture: what the vision tower takes of one picture, by name (``pixel_values`` and its like), for micro-batches
            without one on ranks that must all run it. None: under FSDP every micro-batch must have one, or none.
        **kwargs: as transformers' Trainer takes them.

    Raises:
        ValueError: unknown losses, several GPUs without a process for each, or a way of sharding that learned scales do not bear.
    """

    loss_is_scaled_for_ga = True  # transformers: nothing is to be divided by the number of micro-batches

    def __init__(
        self,
        *,
        losses: str,
        objective: GraceObjective,
        teacher: Teacher | None = None,
        teacher_head: Tensor | None = None,
        from_hidden: bool = False,
        relational_warmup: int = 0,
        calibration: TauCalibration | None = None,
        blank_picture: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("losses", losses, LOSSES)
        check_int("relational_warmup", relational_warmup, low=0)
        self.optimizer: torch.optim.Optimizer | None = None
        _find_unused(kwargs.get("args"))
        super().__init__(**kwargs)
        problems = check_launch(self.args, learned=has_learned_scales(self.model))
        if problems:
            raise ValueError("; ".join(problems))
        if self.args.n_gpu > 1:
            raise ValueError(
                "each GPU must have a process of its own (start with torchrun or accelerate launch), "
                f"got {self.args.n_gpu} GPUs in one"
            )
        # Before transformers 5.23 this is what keeps it from dividing by the number of micro-batches.
        self.model_accepts_loss_kwargs = True
        self.resumed_from: Path | None = None
        self.losses, self.objective = losses, objective.to(self.args.device)
        self.teacher, self.teacher_head, self.calibration = teacher, teacher_head, calibration
        self.from_hidden = from_hidden
        self.together = world_size() > 1 and (
            self.is_fsdp_enabled or self.is_deepspeed_enabled or not self.args.ddp_find_unused_parameters
        )
        blank = BlankPicture(self.model, blank_picture) if self.together and blank_picture is not None else None
        self.reader = Reader(self.model, from_hidden=from_hidden, visual=losses in ("rcka", "grace"), blank=blank)
        self.meters = Meters(self.args.device)
        self.data_collator: Any = RowsCollator(self.data_collator)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(ControllerCallback(self, relational_warmup=relational_warmup, calibration=calibration))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint: its folder, wherever it is, or True for the last one of ``output_dir``."""
        named = isinstance(resume_from_checkpoint, str | os.PathLike)
        self.resumed_from = Path(resume_from_checkpoint) if named else None  # type: ignore[arg-type]
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def tau_is_known(self) -> bool:
        """Whether the controller has its target; not so while it is still looked for."""
        return self.calibration is None or self.calibration.target is not None

    def get_train_dataloader(self) -> Any:
        """Return the loader; its batches stay on the CPU until their turn, and each rank reads its own."""
        placed = self.accelerator.device_placement
        self.accelerator.device_placement = False
        try:
            loader = super().get_train_dataloader()
        finally:
            self.accelerator.device_placement = placed
        deal_out(loader, self.args.process_index, self.args.world_size)
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Collect the micro-batches of an optimiser step, with the teacher's answers and the sums of all of them."""
        if 0 < self.state.max_steps <= self.state.global_step:
            # The checkpoint of the last step, from which transformers would train one more.
            self.control.should_training_stop = True
            return [], None
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._check_pictures(batches)
        signals, parts = [], []
        for number, batch in enumerate(batches):
            # The device holds one micro-batch and its answer at a time; the others wait on the CPU.
            moved = self._prepare_inputs(batch)
            signal = self._signal(moved)
            with torch.no_grad():
                parts.append(counts_of(signal, _targets(moved), self.objective))
            signals.append(signal if signal is None else signal.to(torch.device("cpu")))
            batches[number] = {name: value for name, value in batch.items() if name not in _TAUGHT}
        if parts:
            counts = global_counts(parts)
            batches = [
                batch | {_SHARE: Share(signal=signal, counts=counts)}
                for batch, signal in zip(batches, signals, strict=True)
            ]
        return batches, items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one micro-batch, as its part of the optimiser step; its parts are kept for log and controller.

        A batch of the training loop comes with the counts of its step, of which the token count is what transformers passes as
        ``num_items_in_batch``. One that comes without them is the whole batch, or, with ``num_items_in_batch``, that many
        supervised tokens' part of one: its losses have the weight of its own share of the tokens. So cross-entropy and KL
        divergence are sums over ``num_items_in_batch``, exactly those of the whole batch when they are added up; of gated
        distillation and the relational part, which have divisors of their own, that gives means over micro-batches by tokens.
        As in transformers, the tokens are those of all ranks under ``average_tokens_across_devices``.
        """
        inputs = dict(inputs)
        share = inputs.pop(_SHARE, None)
        if share is None:
            share = Share(signal=self._signal(inputs), counts={})
        elif share.signal is not None:
            share = replace(share, signal=share.signal.to(self.args.device))
        labels, rows = inputs.pop("labels"), inputs.pop(ROWS, None)
        rows = supervised_rows(labels) if rows is None else rows
        seen, outputs = self.reader(model, inputs, rows)
        head = head_weight(self.model) if self.from_hidden else None
        found = losses_of(self.losses, seen, head, shift_labels(labels).flatten()[rows], share, self.objective)
        part_of_tokens = not share.counts and num_items_in_batch is not None
        if part_of_tokens:
            found = weighted(found, len(rows) / torch.as_tensor(num_items_in_batch).clamp_min(1))
        if model.training:
            self.meters.add(found.parts, found.gate_sum, len(rows), inputs.get("attention_mask", labels))
            if seen.tokens is not None and seen.tapped is not None:
                self.meters.watch(seen.tokens, seen.tapped)
        # DDP and FSDP take the mean over ranks, and these are parts of a sum.
        of_all_ranks = share.counts or (part_of_tokens and self.args.average_tokens_across_devices)
        loss = found.total * world_size() if of_all_ranks else found.total
        if self.together and self.from_hidden:
            # FSDP2 begins a backward at the model's own output. Where only pictures' features led there, ranks with and without
            # them would gather blocks in different orders.
            loss = loss + 0 * outputs.logits.flatten()[0]
        return (loss, outputs) if return_outputs else loss

    def _check_pictures(self, batches: list[dict[str, Any]]) -> None:
        """Raise on all ranks where some of them would wait for ever for others to run the vision tower."""
        if not self.together or self.reader.blank is not None:
            return
        seen = sum(has_pictures(batch) for batch in batches)
        counts = all_sum(torch.tensor([seen, len(batches) - seen], device=self.args.device)).tolist()
        if all(counts):
            raise ValueError(
                "every micro-batch must have a picture, or none may, because all ranks run the vision tower together, got "
                f"{counts[0]} with one and {counts[1]} without: give GraceTrainer a blank_picture"
            )

    def _signal(self, batch: dict[str, Any]) -> TeacherSignal | None:
        given = {name.removeprefix("teacher_"): batch.pop(name, None) for name in _TAUGHT}
        if self.losses == "ce":
            return None
        if given["logits"] is not None or given["hidden"] is not None:
            head = self.teacher_head if given["hidden"] is not None else None
            return TeacherSignal(**given, head=head)
        if self.teacher is None:
            raise ValueError(
                f"losses={self.losses!r} needs a teacher, or teacher_logits or teacher_hidden in the batch, "
                f"got a batch with {sorted(batch)}"
            )
        inputs = {name: value for name, value in batch.items() if name not in ("labels", ROWS)}
        return self.teacher(inputs, batch[ROWS] if ROWS in batch else supervised_rows(batch["labels"]))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the arguments' optimiser over weights, vectors without decay, and learned scales at ten times the rate."""
        if self.optimizer is None:
            rate, decay = self.args.learning_rate, self.args.weight_decay
            if has_learned_scales(self.model):
                groups = qat_parameter_groups(self.model, lr=rate, weight_decay=decay)
            else:
                trained = [p for p in self.model.parameters() if p.requires_grad]
                groups = [
                    {"params": [p for p in trained if p.ndim >= 2], "lr": rate, "weight_decay": decay},
                    {"params": [p for p in trained if p.ndim < 2], "lr": rate, "weight_decay": 0.0},
                ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Shard the model the one way that keeps learned scales in float32, before accelerate would do it otherwise."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and not is_sharded(self.model):
            shard_student(self.model, plugin)
        return super()._prepare_for_training(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save them such that a sharded optimiser can be loaded again."""
        if self.is_fsdp_enabled:
            wrapped: Any = self.optimizer  # accelerate's
            complete_states(wrapped.optimizer)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save a checkpoint whose weights have the model's own names.

        By default the weights of a vision-language model are saved under the names of published checkpoints, which resuming looks
        up in vain and without a word: it would go on from the weights it finds in memory (transformers #43701).
        """
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            self.model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss since the last entry, and what the controller and the learned scales do."""
        if "loss" in logs:
            logs |= self.meters.read(self)
        super().log(logs, *args, **kwargs)


def _find_unused(args: TrainingArguments | None) -> None:
    """Let DDP look for parameters without a gradient: a vision tower's last layer is often unused, and text needs none of it.

    transformers does that but under gradient checkpointing, where only the reentrant kind does not bear it.
    """
    if args is None or args.ddp_find_unused_parameters is not None:
        return
    if not (args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")):
        args.ddp_find_unused_parameters = True


class RowsCollator:
    """A collator whose batches also say where supervised tokens are, so that the device is not asked."""

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Return the batch."""
        batch = dict(self.collate(examples))
        return batch | {ROWS: supervised_rows(batch["labels"])}


def _targets(batch: dict[str, Any]) -> Tensor:
    targets: Tensor = shift_labels(batch["labels"]).flatten()
    return targets[batch[ROWS] if ROWS in batch else supervised_rows(batch["labels"])]
