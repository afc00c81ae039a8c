"""What of DeepSpeed and FSDP is refused before training, and why."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from tiny_models import tiny_llava
from transformers import TrainingArguments

from gracekit.recipe.pairs import Pair, memory_needed
from gracekit.recipe.sharding import check_launch, complete_states, zero_stage


def deepspeed(stage, **dtypes):
    """Arguments as transformers makes them of a DeepSpeed configuration, where that package is installed."""
    given = {"zero_optimization": {"stage": stage}} | {name: {"enabled": value} for name, value in dtypes.items()}
    plugin = SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(given))
    return SimpleNamespace(deepspeed_plugin=plugin, fsdp=False, bf16=bool(dtypes.get("bf16")), fp16=False)


def test_deepspeed_is_refused_where_it_would_round_scales_or_hide_weights():
    assert check_launch(deepspeed(2), learned=True) == []
    assert check_launch(deepspeed(2, bf16=True), learned=False) == []
    (rounded,) = check_launch(deepspeed(2, bf16=True), learned=True)
    assert "learned scales in float32" in rounded
    assert "bf16.enabled=true" in rounded
    (automatic,) = check_launch(deepspeed(2, bf16="auto"), learned=True)
    assert "bf16.enabled=auto" in automatic
    for learned in (True, False):
        (hidden,) = check_launch(deepspeed(3), learned=learned)
        assert "ZeRO-3 has partitioned cannot be read" in hidden
        assert "stage=3" in hidden


def test_the_stage_of_zero_is_that_of_the_arguments():
    assert [zero_stage(deepspeed(stage)) for stage in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assert zero_stage(SimpleNamespace(deepspeed_plugin=SimpleNamespace(hf_ds_config=HfDeepSpeedConfig({})))) == 0
    assert zero_stage(SimpleNamespace()) == 0


@pytest.mark.parametrize(
    ("training", "shares"),
    [
        (deepspeed(0), (1, 1, 1)),
        (deepspeed(1), (1, 1, 8)),
        (deepspeed(2), (1, 8, 8)),
        (SimpleNamespace(fsdp=True), (8, 8, 8)),
        (SimpleNamespace(fsdp=False), (1, 1, 1)),
    ],
    ids=["deepspeed-0", "zero-1", "zero-2", "fsdp", "ddp"],
)
def test_the_memory_of_a_rank_is_what_its_sharding_leaves_there(training, shares):
    """Weights, gradients and Adam's two moments on eight ranks."""
    training.optim = "adamw_torch"
    pair = Pair(student=tiny_llava(), teacher=None, processor=None, teacher_processor=None)
    needed = memory_needed(pair, SimpleNamespace(training=training, pair=None), ranks=8)
    size = 4 * sum(parameter.numel() for parameter in pair.student.parameters())
    assert list(needed.values()) == [size / shares[0], size / shares[1], 2 * size / shares[2]]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"version": 1}, "version must be 2.* got version=1"),
        ({"activation_checkpointing": True}, "take --gradient_checkpointing true"),
        ({"cpu_ram_efficient_loading": True}, "cpu_ram_efficient_loading must be false"),
    ],
)
def test_fsdp_settings_that_scales_or_the_teacher_do_not_bear_are_refused(tmp_path, config, reason):
    (problem,) = check_launch(SimpleNamespace(fsdp=True, fsdp_config=config), learned=True)
    assert re.search(reason, problem)
    assert check_launch(SimpleNamespace(fsdp=True, fsdp_config=None), learned=True) == []
    assert check_launch(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), learned=True) == []


def test_parameters_without_a_gradient_get_a_state_and_keep_their_values():
    used, unused, frozen = (torch.nn.Parameter(torch.randn(3)) for _ in range(3))
    optimizer = torch.optim.AdamW([{"params": [used, unused]}, {"params": [frozen.requires_grad_(False)], "lr": 0.5}])
    used.grad = torch.ones(3)
    optimizer.step()
    before = {p: (p.detach().clone(), p.grad) for p in (used, unused)}
    state = {name: value.clone() for name, value in optimizer.state[used].items()}
    complete_states(optimizer)
    assert optimizer.state.keys() == {used, unused}
    assert not bool(optimizer.state[unused]["exp_avg"].any())
    assert all(torch.equal(optimizer.state[used][name], value) for name, value in state.items())
    for parameter, (value, gradient) in before.items():
        assert torch.equal(parameter, value)
        assert parameter.grad is gradient
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5]
