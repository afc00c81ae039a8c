"""What of DeepSpeed and FSDP is refused before training, and why."""

import re
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from gracekit.recipe.sharding import check_launch


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
