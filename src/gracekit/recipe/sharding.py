"""Which ways to spread a training over GPUs keep its learned scales exact, and how FSDP2 shards a student."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainingArguments

from gracekit.quant import fully_shard_qat
from gracekit.quant.lsq import LSQFakeQuantizer


def check_launch(training: TrainingArguments, *, learned: bool) -> list[str]:
    """Return why a model cannot be trained under these arguments' DeepSpeed or FSDP, a line a reason.

    Args:
        training: the arguments.
        learned: whether the model has learned scales.
    """
    problems = []
    plugin = getattr(training, "deepspeed_plugin", None)
    if plugin is not None:
        config = plugin.hf_ds_config
        if config.is_zero3():
            problems.append(
                "deepspeed must not partition weights, because output heads and quantised weights that ZeRO-3 has partitioned "
                "cannot be read, got zero_optimization.stage=3: take stage 2, or --fsdp"
            )
        for name in ("bf16", "fp16"):
            enabled = config.get_value(f"{name}.enabled", False)
            if learned and (getattr(training, name) if enabled == "auto" else enabled):
                problems.append(
                    f"deepspeed must leave learned scales in float32, and with {name} it casts the whole model, got "
                    f"{name}.enabled={str(enabled).lower()} with learned scales: train in float32, or with --fsdp"
                )
    if training.fsdp:
        given = training.fsdp_config or {}
        version, checkpointed = int(given.get("version", 2)), _true(given.get("activation_checkpointing"))
        if learned and version != 2:
            problems.append(f"fsdp_config's version must be 2 for a model with learned scales, got version={version}")
        if learned and checkpointed:
            problems.append(
                "fsdp_config's activation_checkpointing must be false for a model with learned scales (take "
                "--gradient_checkpointing true), got activation_checkpointing=true"
            )
        if _true(given.get("cpu_ram_efficient_loading")):
            problems.append(
                "fsdp_config's cpu_ram_efficient_loading must be false, because the teacher is not sharded and every rank needs "
                "its weights, got cpu_ram_efficient_loading=true"
            )
    return problems


def shard_student(model: nn.Module, plugin: Any) -> None:
    """Shard a prepared model as accelerate's FSDP2 plugin says, its scales in groups of their own.

    ``plugin`` wraps nothing afterwards: the classes that it would look for have been renamed by sharding.
    """
    # Left out where true: fully_shard's own default keeps the output head whole between forward and backward.
    options = {} if plugin.reshard_after_forward else {"reshard_after_forward": False}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    fully_shard_qat(model, mp_policy=plugin.mixed_precision_policy, **options)
    plugin.auto_wrap_policy = None


def has_learned_scales(model: nn.Module) -> bool:
    """Whether a model has been prepared."""
    return any(isinstance(module, LSQFakeQuantizer) for module in model.modules())


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded a model."""
    return isinstance(model, FSDPModule)


def forward_dtype(plugin: Any) -> torch.dtype | None:
    """Return what FSDP2 casts weights to before a forward; None: they are used as they are."""
    dtype: torch.dtype | None = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    return dtype


def _true(value: object) -> bool:
    return str(value).lower() == "true"
