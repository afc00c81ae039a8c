"""A quantised weight in the layout of our own kernel, as a torchao tensor: W4A16 products that read four bits a weight.

torchao's CUDA kernel loses to bfloat16 above four rows of x; this one is for every number of rows. How a product is computed is
looked up in a table that is measured on the machine (:mod:`gracekit.quant._int4_choices`): one of the kernels that unpack in
registers, launched in one way or another, or the whole weight written once as training's forward has it, and the dense product.
Away from CUDA, where Triton is missing, and while a CUDA graph is captured before there was a measurement, it is the latter:
exact, and slower.

Both stay within the bounds that :func:`~gracekit.quant.convert` states.
"""

# M rows of x, N out_features, K in_features, S groups per row, G group size, T tiles, C chunks

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from gracekit._kernels import has_triton
from gracekit.quant import _int4_layout as layout
from gracekit.quant._int4_workspace import Workspace, workspace_of
from gracekit.quant.scheme import QuantizedWeight, computing_dtype, times_scale


class Int4TritonTensor(TorchAOBaseTensor):  # type: ignore[misc]
    """A weight (N, K) of symmetric 4-bit codes for the Triton kernel; bfloat16 or float16 activations.

    Its bytes are the kernel's affair: save the portable form.

    Args:
        packed: words (T, C, 64, 16) int32.
        scale: (C * 128 / G, T * 64) float32, values of the activations' dtype: the kernel copies four bytes at a time.
        counters: (T, 32) int32, zeros: the kernels', one use at a time.
        block_size: [1, G].
        shape: (N, K).
        dtype: of the activations.
        workspace: the kernels', too; of all weights of a model, of which two must not be multiplied at once: they may wait for
            each other for ever.
    """

    tensor_data_names = ["packed", "scale", "counters"]  # noqa: RUF012  torchao's base class reads lists
    tensor_attribute_names = ["block_size", "shape", "dtype", "workspace"]  # noqa: RUF012

    def __new__(
        cls,
        packed: Tensor,
        scale: Tensor,
        counters: Tensor,
        block_size: list[int],
        shape: torch.Size,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> Int4TritonTensor:
        """Make the tensor that stands for the weight; it holds no data of its own."""
        made: Int4TritonTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=packed.device, requires_grad=False
        )
        return made

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        counters: Tensor,
        block_size: list[int],
        _shape: torch.Size,
        _dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        super().__init__()
        self.packed, self.scale, self.counters = packed, scale, counters
        self.block_size, self.workspace = block_size, workspace

    def _quantization_type(self) -> str:
        return f"shape={tuple(self.shape)}, block_size={self.block_size}, device={self.device}"

    @classmethod
    def from_weight(cls, weight: QuantizedWeight) -> Int4TritonTensor:
        """Pack codes and scales."""
        packed = layout.pack_codes(weight.codes)
        scale = layout.pack_scales(weight.scale.to(weight.dtype).float(), weight.group_size, weight.codes.shape[1])
        counters = torch.zeros(len(packed), _COUNTERS_A_TILE, dtype=torch.int32, device=packed.device)
        return cls(packed, scale, counters, [1, weight.group_size], weight.codes.shape, weight.dtype, Workspace())

    def codes(self) -> Tensor:
        """Return the codes (N, K) int8."""
        return layout.unpack_codes(self.packed, *self.shape)

    def scales(self) -> Tensor:
        """Return the scales (N, S) in the tensor's dtype."""
        return layout.unpack_scales(self.scale, self.shape[0], self.shape[1] // self.block_size[1]).to(self.dtype)

    def dequantize(self) -> Tensor:
        """Return W_q (N, K), bit for bit that of training's forward in this dtype."""
        values: Tensor = torch.ops.gracekit.int4_values(self.packed, self.scale, list(self.shape), self.dtype)
        return values


# Blocks of rows of x that a split product may have. Nine tiles have two for each of Hopper's multiprocessors, which it takes there.
_COUNTERS_A_TILE = 32


def share_workspace(model: nn.Module) -> None:
    """Let all weights of a model use one workspace, and have it ready."""
    weights: list[Any] = [
        layer.weight for layer in model.modules() if isinstance(getattr(layer, "weight", None), Int4TritonTensor)
    ]
    for weight in weights[1:]:
        weight.workspace = weights[0].workspace
    for device in {weight.device for weight in weights if _runs_triton(weight.packed)}:
        weights[0].workspace.on(device)


@Int4TritonTensor.implements(torch.ops.aten.linear.default)  # type: ignore[untyped-decorator]
@Int4TritonTensor.implements_torch_function(F.linear)  # type: ignore[untyped-decorator]
def _linear(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, weight = args[:2]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if x.dtype != weight.dtype:
        raise TypeError(f"x must have the dtype {weight.dtype} that the weight was converted for, got {x.dtype}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must have in_features={weight.shape[1]} columns, got shape {tuple(x.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    # The operator is for compilers, and says on the way back that it has no gradient; it takes the host longer than the product.
    is_traced = torch.compiler.is_compiling() or type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled())
    multiply: Any = torch.ops.gracekit.int4_linear if is_traced else _product
    y: Tensor = multiply(rows, weight.packed, weight.scale, weight.counters, weight.workspace.number, weight.shape[0])
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def _product(x: Tensor, packed: Tensor, scale: Tensor, counters: Tensor, workspace: int, outputs: int) -> Tensor:
    # The counters are written to, but stand at zero again afterwards: to a compiler they are not changed.
    if _runs_triton(packed) and len(x):
        from gracekit.quant import _int4_choices, _int4_launch

        zeros = _int4_launch.Zeros(counters, workspace_of(workspace, packed.device))
        schedule = _int4_choices.choose(x, packed, scale, zeros, outputs)
        if schedule is not None:
            return _int4_launch.linear(x, packed, scale, zeros.of(schedule), outputs, schedule)
    return F.linear(x, _dense(packed, scale, (outputs, x.shape[1]), x.dtype))


_int4_linear = torch.library.custom_op("gracekit::int4_linear", _product, mutates_args=())


@_int4_linear.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, counters: Tensor, workspace: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


@torch.library.custom_op("gracekit::int4_values", mutates_args=())
def _int4_values(packed: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return _dense(packed, scale, (shape[0], shape[1]), dtype)


@_int4_values.register_fake
def _(packed: Tensor, scale: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return scale.new_empty(shape, dtype=dtype)


def _dense(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """W_q (N, K), in memory that the allocator hands from layer to layer."""
    if _runs_triton(packed):
        from gracekit.quant import _int4_launch

        return _int4_launch.values(packed, scale, shape, dtype)
    codes = layout.unpack_codes(packed, *shape).to(computing_dtype(dtype))
    group_size = packed.shape[1] * layout.CHUNK // scale.shape[0]
    return times_scale(codes, layout.unpack_scales(scale, shape[0], shape[1] // group_size), dtype)


def _runs_triton(packed: Tensor) -> bool:
    return packed.is_cuda and has_triton()
