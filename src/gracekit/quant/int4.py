"""Quantised weights as torchao's tensors, and back: the plain forms and the kernels' packed ones.

Each form is built straight from codes and scales and can be read back exactly. torchao's own conversions estimate scales
anew, which is why none of them is called here. Its classes move between releases; this module is the only one that knows
where they are.

    reference  IntxUnpackedToInt8Tensor  a byte per code, 2 to 8 bits, computes anywhere by dequantising
    portable   Int4Tensor                two codes a byte, the form for files; its own matmul needs the mslk package
               Int8Tensor                the same for 8 bits; computes anywhere by dequantising
    cpu        Int4OpaqueTensor          tinygemm for CPUs; its bytes depend on the machine, never write them to a file
    cuda       Int4TilePackedTo4dTensor  tinygemm for CUDA, bfloat16
    triton     Int4TritonTensor          our kernel for CUDA, bfloat16 or float16; elsewhere it dequantises
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Int4TilePackedTo4dTensor, Int8Tensor, IntxUnpackedToInt8Tensor
from torchao.quantization.qat import FakeQuantizedLinear
from torchao.quantization.quantize_.workflows import Int4Tensor
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros
from torchao.utils import TorchAOBaseTensor

from gracekit.quant.lsq import LSQFakeQuantizer
from gracekit.quant.scheme import QuantizedWeight, deployed_scale, quantize
from gracekit.quant.triton_tensor import Int4TritonTensor

# O out_features, I in_features, S groups per row, G group size

KERNEL_GROUPS = (32, 64, 128, 256)
_INNER_TILES = 8
_CODE_OFFSET = 8
_UNPACK_ROWS = 512
_ACTIVATION_PARTS = ("act_mapping_type", "activation_quantization", "act_quant_kwargs", "act_quant_scale")


def is_quantized(module: nn.Module) -> bool:
    """Whether :func:`read_weight` has something to read from ``module``."""
    if isinstance(module, FakeQuantizedLinear):
        return isinstance(module.weight_fake_quantizer, LSQFakeQuantizer)
    return isinstance(module, nn.Linear) and isinstance(module.weight, tuple(_READERS))


def is_foreign(module: nn.Module) -> bool:
    """Whether ``module`` is a torchao layer of a kind that cannot be read here."""
    if is_quantized(module) or not isinstance(module, nn.Linear):
        return False
    return isinstance(module, FakeQuantizedLinear) or isinstance(module.weight, TorchAOBaseTensor)


def form_of(module: nn.Linear) -> str | None:
    """Return the target of ``convert`` that a layer is in; None while it is in training or plain."""
    return _FORMS.get(type(module.weight))


def read_scale(module: nn.Linear) -> Tensor:
    """Return the deployed scales (O, S) of a quantised layer."""
    if isinstance(module, FakeQuantizedLinear):
        fake: LSQFakeQuantizer = module.weight_fake_quantizer
        return deployed_scale(fake.log_scale.detach(), fake.config.scale_dtype)
    weight: Any = module.weight
    if isinstance(weight, IntxUnpackedToInt8Tensor | Int8Tensor):
        scale: Tensor = weight.scale
    elif isinstance(weight, Int4Tensor):
        scale = weight.scale.t()
    elif isinstance(weight, Int4TritonTensor):
        scale = weight.scales()
    else:
        groups = weight.shape[1] // weight.block_size[1]
        scale = weight.scale_and_zero[:groups, : weight.shape[0], 0].t()
    return scale


def read_bits(module: nn.Linear) -> int:
    """Return the width of a quantised layer's codes."""
    if isinstance(module, FakeQuantizedLinear):
        return int(module.weight_fake_quantizer.config.bits)
    if isinstance(module.weight, Int8Tensor):
        return 8
    return int(str(getattr(module.weight, "target_dtype", "torch.int4")).removeprefix("torch.int"))


def read_weight(module: nn.Linear) -> QuantizedWeight:
    """Return the codes and scales of a quantised layer, exactly as they are computed with."""
    scale = read_scale(module)
    if isinstance(module, FakeQuantizedLinear):
        return quantize(module.weight, scale, module.weight_fake_quantizer.config.bits)
    weight = module.weight
    read_codes = next(reader for kind, reader in _READERS.items() if isinstance(weight, kind))
    return QuantizedWeight(codes=read_codes(weight), scale=scale, bits=read_bits(module), dtype=weight.dtype)


def foreign_parts(module: nn.Linear) -> str | None:
    """Name what a torchao weight has beyond codes and scales (zero points, activation quantisation), or None."""
    weight: Any = module.weight
    if getattr(weight, "act_pre_scale", None) is not None:
        return "a scale of the activations"
    if any(getattr(weight, name, None) is not None for name in _ACTIVATION_PARTS):
        return "quantised activations"
    zero = getattr(weight, "zero_point", None)
    if zero is None and isinstance(weight, Int4OpaqueTensor | Int4TilePackedTo4dTensor):
        zero = weight.scale_and_zero[..., 1]
    if zero is not None and bool((zero != 0).any()):
        return "zero points"
    return None


def to_reference(weight: QuantizedWeight) -> Tensor:
    """Build the exact reference form: one byte per code."""
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        qdata=weight.codes,
        scale=weight.scale.contiguous(),
        zero_point=torch.zeros_like(weight.scale, dtype=torch.int8, memory_format=torch.contiguous_format),
        target_dtype=getattr(torch, f"int{weight.bits}"),
        block_size=(1, weight.group_size),
        dtype=weight.dtype,
        activation_quantization=None,
    )
    return tensor


def to_portable(weight: QuantizedWeight) -> Tensor:
    """Build the plain form for files: bytes, or of 4 bits the even column in the low nibble, two's complement."""
    if weight.bits == 8:
        eight: Tensor = Int8Tensor(weight.codes, weight.scale.contiguous(), [1, weight.group_size], weight.dtype)
        return eight
    low, high = weight.codes[:, ::2], weight.codes[:, 1::2]
    scale_SO = weight.scale.to(weight.dtype).t().contiguous()
    tensor: Tensor = Int4Tensor(
        qdata=(high << 4) | (low & 15),
        scale=scale_SO,
        zero_point=torch.zeros_like(scale_SO),
        block_size=[1, weight.group_size],
        shape=weight.codes.shape,
    )
    return tensor


def to_cpu(weight: QuantizedWeight) -> Tensor:
    """Build the form of the CPU kernel."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((weight.codes + _CODE_OFFSET).to(torch.int32), 1)
    scale = weight.scale.to(weight.dtype)
    tensor: Tensor = Int4OpaqueTensor(
        qdata=packed,
        scale_and_zero=pack_tinygemm_scales_and_zeros(scale, torch.zeros_like(scale), scale.dtype),
        block_size=[1, weight.group_size],
        shape=weight.codes.shape,
    )
    return tensor


def to_cuda(weight: QuantizedWeight) -> Tensor:
    """Build the form of the CUDA kernel: inputs padded to a multiple of 1024, outputs to one of 8."""
    outputs, inputs = weight.codes.shape
    pad_inputs, pad_outputs = -inputs % 1024, -outputs % 8
    unsigned = F.pad((weight.codes + _CODE_OFFSET).to(torch.uint8), (0, pad_inputs, 0, pad_outputs), value=_CODE_OFFSET)
    scale = F.pad(weight.scale.to(torch.bfloat16), (0, pad_inputs // weight.group_size, 0, pad_outputs), value=1.0)
    packed = torch.ops.aten._convert_weight_to_int4pack((unsigned[:, ::2] << 4) | unsigned[:, 1::2], _INNER_TILES)
    tensor: Tensor = Int4TilePackedTo4dTensor(
        qdata=packed,
        scale_and_zero=pack_tinygemm_scales_and_zeros(scale, torch.zeros_like(scale)),
        block_size=[1, weight.group_size],
        shape=weight.codes.shape,
    )
    return tensor


def _codes_of_portable(weight: Int4Tensor) -> Tensor:
    packed: Tensor = weight.qdata.view(torch.int8)
    # Arithmetic shifts of a signed byte extend the sign of each nibble.
    return torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1).flatten(-2)


def _codes_of_cpu(weight: Int4OpaqueTensor) -> Tensor:
    groups, outputs, _ = weight.scale_and_zero.shape
    ones = weight.scale_and_zero.new_ones(outputs, groups, dtype=torch.bfloat16)
    unit = pack_tinygemm_scales_and_zeros(ones, torch.zeros_like(ones))
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _codes_by_identity(weight, lambda rows: product(rows, weight.qdata, weight.block_size[1], unit))


def _codes_of_cuda(weight: Int4TilePackedTo4dTensor) -> Tensor:
    groups, outputs, _ = weight.scale_and_zero.shape
    ones = weight.scale_and_zero.new_ones(outputs, groups)
    unit = pack_tinygemm_scales_and_zeros(ones, torch.zeros_like(ones))
    pad = -weight.shape[1] % 1024
    product = torch.ops.aten._weight_int4pack_mm
    return _codes_by_identity(
        weight, lambda rows: product(F.pad(rows, (0, pad)), weight.qdata, weight.block_size[1], unit)
    )


def _codes_by_identity(weight: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    # The packed bytes are the machine's affair, but unit vectors times unit scales give the codes, exactly.
    outputs, inputs = weight.shape
    identity = torch.eye(inputs, dtype=torch.bfloat16, device=weight.device)
    columns = [product(rows)[:, :outputs] for rows in torch.split(identity, _UNPACK_ROWS)]
    return torch.cat(columns).t().to(torch.int8).contiguous()


_READERS: dict[type[Tensor], Callable[[Any], Tensor]] = {
    IntxUnpackedToInt8Tensor: lambda weight: weight.qdata,
    Int8Tensor: lambda weight: weight.qdata,
    Int4Tensor: _codes_of_portable,
    Int4OpaqueTensor: _codes_of_cpu,
    Int4TilePackedTo4dTensor: _codes_of_cuda,
    Int4TritonTensor: lambda weight: weight.codes(),
}
BUILDERS: dict[str, Callable[[QuantizedWeight], Tensor]] = {
    "reference": to_reference,
    "portable": to_portable,
    "cpu": to_cpu,
    "cuda": to_cuda,
    "triton": Int4TritonTensor.from_weight,
}
_FORMS: dict[type[Tensor], str] = {
    IntxUnpackedToInt8Tensor: "reference",
    Int8Tensor: "portable",
    Int4Tensor: "portable",
    Int4OpaqueTensor: "cpu",
    Int4TilePackedTo4dTensor: "cuda",
    Int4TritonTensor: "triton",
}
