"""Which ways to spread a training over GPUs keep its learned scales exact, and how FSDP2 shards a student."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import TrainingArguments

from gracekit.quant import fully_shard_qat
from gracekit.quant.lsq import LSQFakeQuantizer
from gracekit.vlm.families import require_decoder


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
        if zero_stage(training) == 3:
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
        if version != 2:
            problems.append(
                "fsdp_config's version must be 2, because FSDP1 flattens weights and learned scales into one tensor, got "
                f"version={version}"
            )
        if checkpointed:
            problems.append(
                "fsdp_config's activation_checkpointing must be false (take --gradient_checkpointing true), got "
                "activation_checkpointing=true"
            )
        if _true(given.get("cpu_ram_efficient_loading")):
            problems.append(
                "fsdp_config's cpu_ram_efficient_loading must be false, because the teacher is not sharded and every rank needs "
                "its weights, got cpu_ram_efficient_loading=true"
            )
    return problems


def zero_stage(training: Any) -> int:
    """Return the stage of ZeRO that these arguments' DeepSpeed is to run; 0 without DeepSpeed."""
    plugin = getattr(training, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.hf_ds_config.get_value("zero_optimization.stage", 0))


def shard_student(model: nn.Module, plugin: Any) -> None:
    """Shard a model as accelerate's FSDP2 plugin says: each decoder block, learned scales by themselves, and the rest.

    ``plugin`` wraps nothing afterwards. Sharding has renamed the classes that it would look for, and among the classes that
    transformers names for a vision-language model are some that it does not have.
    """
    # Left out where true: fully_shard's own default keeps the output head whole between forward and backward.
    options: dict[str, Any] = {} if plugin.reshard_after_forward else {"reshard_after_forward": False}
    if plugin.cpu_offload:
        options["offload_policy"] = plugin.cpu_offload
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    if has_learned_scales(model):
        fully_shard_qat(model, mp_policy=policy, **options)
    else:
        decoder: Any = require_decoder(model)
        for block in [*decoder.layers, model]:
            fully_shard(block, mp_policy=policy, **options)
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


def complete_states(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that no gradient has reached yet the state of a step that changed nothing.

    A vision tower's last layer is often unused, and what FSDP saves of an optimiser without a state for a parameter cannot be
    loaded.
    """
    groups = optimizer.param_groups
    missing = [p for group in groups for p in group["params"] if p.requires_grad and not optimizer.state.get(p)]
    if not missing:
        return
    rates = [group["lr"] for group in groups]
    held = [(p, p.grad) for group in groups for p in group["params"]]
    for parameter, _ in held:
        parameter.grad = None
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    for group in groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in held:
        parameter.grad = gradient
