"""Let transformers save a converted model and load it again by itself, without this library.

transformers writes torchao tensors when a model carries a torchao quantiser, and reads them back by what config.json says of
it: the kind of tensor and the linears that stay as they are, by full name. The plain forms can be written; a kernel's packed
bytes depend on the machine, and transformers refuses those.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer


def describe_to_transformers(
    model: nn.Module, *, plain: Sequence[str], bits: int, group_size: int, reference: bool
) -> None:
    """Attach torchao's configuration to a converted transformers model, so that ``save_pretrained`` works as ever."""
    if not isinstance(model, PreTrainedModel):
        return
    if reference:
        kind: AOBaseConfig = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group_size)
        )
    elif bits == 8:
        kind = Int8WeightOnlyConfig(granularity=PerGroup(group_size))
    else:
        kind = Int4WeightOnlyConfig(group_size=group_size)
    config = TorchAoConfig(kind, modules_to_not_convert=list(plain))
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
