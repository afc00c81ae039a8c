"""What of DeepSpeed and FSDP is refused before training, and why."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from gracekit.recipe.sharding import check_launch, complete_states


def deepspeed(stage, **dtypes):
    """Arguments as transformers makes them of a DeepSpeed configuration, where that package is installed."""
    values = {f"{name}.enabled": value for name, value in dtypes.items()}
    config = SimpleNamespace(is_zero3=lambda: stage == 3, get_value=lambda name, default: values.get(name, default))
    plugin = SimpleNamespace(hf_ds_config=config)
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
