"""From trained or plain weights to a form that a kernel computes with: convert and round-to-nearest."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchao.quantization.qat import FakeQuantizedLinear

from gracekit._checks import check_choice, check_module
from gracekit.quant._int4_layout import GROUPS as TRITON_GROUPS
from gracekit.quant._modules import like_linear, swap_modules
from gracekit.quant.int4 import (
    BUILDERS,
    KERNEL_GROUPS,
    foreign_parts,
    form_of,
    is_foreign,
    is_quantized,
    read_bits,
    read_scale,
    read_weight,
)
from gracekit.quant.qat import DEFAULT_CONFIG, LayerFilter, check_alone, select_layers
from gracekit.quant.scheme import LSQConfig, QuantizedWeight, absmax_scale, holds_scale, quantize, round_scale
from gracekit.quant.triton_tensor import share_workspace

TARGETS = ("auto", "cpu", "cuda", "triton", "portable", "reference")
DEPLOYED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def convert(model: nn.Module, target: str = "auto", *, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace trained layers by nn.Linear layers whose weight is a quantised torchao tensor, in place.

    Codes q and scales s are, bit for bit, those of the training forward. The kernels of "cpu" and "triton" multiply by q * s as it
    is and round once: ``|y - x @ (q * s)^T| <= eps / 2 * |y| + 2**-20 * |x| @ |q * s|^T`` before the bias, eps of the activations'
    dtype. (Of one or two rows, "triton" takes x as fixed-point numbers: the second ``|x|`` is then the largest of each 128 inputs.)
    Training, "cuda" and "reference" round q * s to that dtype first, where it does not fit, so any two differ by at most
    ``eps * |y| + (eps + 2**-20) * |x| @ |q * s|^T``.

    Args:
        model: a model after :func:`prepare_qat`, or one already converted (say, loaded in the portable form).
        target: "cpu" (torchao's INT4 kernel for CPUs), "cuda" (torchao's tinygemm; bfloat16), "triton" (our kernel for CUDA;
            bfloat16 or float16, groups of 32, 64 or 128; the first product of each shape and number of rows times it, once a
            machine), "portable" (Int4Tensor or Int8Tensor, to save), "reference" (IntxUnpackedToInt8Tensor, 2 to 8 bits,
            dequantises on the fly), or "auto": for 4 bits torchao's kernel of the device each layer is on, for other widths
            "reference".
        dtype: dtype of the activations the layers will see, torch.bfloat16, torch.float16 or torch.float32. None means
            each weight's own. A model that was trained with float32 weights and will run in bfloat16 is converted with
            ``dtype=torch.bfloat16`` first and cast as a whole after; cast before, its codes would be those of cast weights.

    Returns:
        ``model``. Converted weights need no gradient. A transformers model in the "portable" or "reference" form saves with
        ``save_pretrained`` and loads with plain ``from_pretrained``, without this library: "reference" computes anywhere,
        "portable" of 4 bits takes a fourth of bfloat16's room and computes after :func:`convert`, or where torchao's mslk
        kernels are.

    Raises:
        ValueError: no layer is quantised, or one cannot be held by the target (out_features no multiple of 16 for the CPU
            kernel, a group size without a kernel, scales that ``dtype`` cannot hold exactly, another device, ...). Layer and
            rule are named, and the model is unchanged.

    Example:
        >>> from gracekit.quant import prepare_qat
        >>> model = nn.Sequential(nn.Linear(128, 16))
        >>> names = prepare_qat(model)
        >>> trained = model(torch.ones(1, 128))
        >>> type(convert(model, "cpu")[0].weight).__name__
        'Int4OpaqueTensor'
        >>> torch.allclose(model(torch.ones(1, 128)), trained, atol=1e-5)
        True
    """
    check_choice("target", target, TARGETS)
    if dtype is not None:
        check_choice("dtype", dtype, DEPLOYED_DTYPES)
    layers = quantized_layers(model)
    targets = {}
    for name, layer in layers.items():
        scale = read_scale(layer)
        bits = read_bits(layer)
        targets[name] = resolve_target(target, bits, scale.device)
        shape = (layer.out_features, layer.in_features)
        check_target(targets[name], name, shape=shape, scale=scale, bits=bits, dtype=dtype or layer.weight.dtype)
        check_cast(targets[name], name, scale, dtype)
    _put_in_place(
        model, {layer: _deployed(layer, read_weight(layer), targets[name], dtype) for name, layer in layers.items()}
    )
    return model


def quantize_rtn(
    model: nn.Module,
    config: LSQConfig = DEFAULT_CONFIG,
    *,
    filter_fn: LayerFilter | None = None,
    target: str = "auto",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Quantise plain linear layers by rounding to nearest, in place: the baseline without any training.

    s = max|W| / (2^(b-1) - 1) per group, rounded to ``config.scale_dtype``, without a search: the absmax quantisation of
    LLM.int8() (Dettmers et al., NeurIPS 2022, arXiv 2208.07339), with a scale for each group of inputs instead of each tensor. A
    group of zeros gets s = 1.

    Args:
        model: any module that contains nn.Linear layers.
        config: width, group size and scale dtype.
        filter_fn: which layers, as in :func:`prepare_qat`.
        target: the form, as in :func:`convert`.
        dtype: dtype of the activations, as in :func:`convert`.

    Returns:
        ``model``.

    Raises:
        TypeError: ``config`` is no LSQConfig.
        ValueError: as :func:`prepare_qat` and :func:`convert`; the model is unchanged then.

    Example:
        >>> model = quantize_rtn(nn.Sequential(nn.Linear(64, 8)), LSQConfig(bits=3, group_size=64), target="reference")
        >>> int(model[0].weight.qdata.abs().max())
        3
    """
    if not isinstance(config, LSQConfig):
        raise TypeError(f"config must be an LSQConfig, got {type(config).__name__}")
    check_choice("target", target, TARGETS)
    if dtype is not None:
        check_choice("dtype", dtype, DEPLOYED_DTYPES)
    layers = select_layers(model, config, filter_fn)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        scale = round_scale(absmax_scale(layer.weight, config.bits, config.group_size), config.scale_dtype)
        chosen = resolve_target(target, config.bits, scale.device)
        shape = (layer.out_features, layer.in_features)
        check_target(chosen, name, shape=shape, scale=scale, bits=config.bits, dtype=dtype or layer.weight.dtype)
        check_cast(chosen, name, scale, dtype)
        replacements[layer] = _deployed(layer, quantize(layer.weight, scale, config.bits), chosen, dtype)
    _put_in_place(model, replacements)
    return model


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the quantised layers of a model by full name, each with finite values and nothing but codes and scales."""
    check_module("model", model)
    layers = {}
    for name, module in model.named_modules():
        if is_foreign(module):
            raise ValueError(
                f"a quantised layer must have been made by prepare_qat or convert, got {_describe(module)} ({name})"
            )
        if is_quantized(module):
            layers[name] = module
    if not layers:
        raise ValueError(
            f"model must have a quantised layer (call prepare_qat or quantize_rtn), got none in {_kind(model)}"
        )
    for name, layer in layers.items():
        if not name:
            raise ValueError(
                f"model must contain the layers to replace, got {_kind(layer)} itself (put it into nn.Sequential)"
            )
        extra = foreign_parts(layer)
        if extra is not None:
            raise ValueError(
                f"a weight must be symmetric codes and scales alone, got {extra} in {_describe(layer)} ({name})"
            )
        if isinstance(layer, FakeQuantizedLinear):
            _check_trained(layer, name)
    check_alone(model, {name: layer for name, layer in layers.items() if isinstance(layer, FakeQuantizedLinear)})
    return layers


def resolve_target(target: str, bits: int, device: torch.device) -> str:
    """Return the form that "auto" stands for."""
    if target != "auto":
        return target
    return device.type if bits == 4 and device.type in ("cpu", "cuda") else "reference"


def check_target(
    target: str, name: str, *, shape: tuple[int, int], scale: Tensor, bits: int, dtype: torch.dtype
) -> None:
    """Raise, naming rule and layer, unless ``target`` can hold the layer."""
    outputs, inputs = shape
    group_size = inputs // scale.shape[1]

    def demand(held: bool, rule: str) -> None:
        if not held:
            raise ValueError(f"target={target!r} needs {rule} ({name})")

    demand(dtype in DEPLOYED_DTYPES, f"bfloat16, float16 or float32 activations, got {dtype}")
    if target == "reference":
        return
    if target == "portable":
        demand(bits in (4, 8), f"bits=4 or bits=8, got bits={bits}")
        if bits == 8:
            return
    demand(bits == 4, f"bits=4, got bits={bits}")
    if target == "portable":
        demand(inputs % 2 == 0, f"an even in_features, got in_features={inputs}")
    else:
        groups = TRITON_GROUPS if target == "triton" else KERNEL_GROUPS
        demand(group_size in groups, f"group_size in {groups}, got group_size={group_size}")
    if target in ("cpu", "cuda"):
        demand(scale.device.type == target, f"the layer on a {target} device, got {scale.device}")
    if target == "cpu":
        demand(outputs % 16 == 0, f"out_features that 16 divides, got out_features={outputs}")
    if target == "triton":
        demand(
            dtype in (torch.bfloat16, torch.float16),
            f"bfloat16 or float16 activations (pass dtype=torch.bfloat16), got {dtype}",
        )
    if target == "cuda":
        demand(dtype == torch.bfloat16, f"bfloat16 activations (pass dtype=torch.bfloat16), got {dtype}")
    check_cast(target, name, scale, dtype)


def check_plain(
    target: str, name: str, layer: nn.Linear, config: LSQConfig, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Do :func:`check_target` for a layer on ``device`` that is not quantised yet; its values are not looked at."""
    scale = torch.ones(1, layer.in_features // config.group_size, dtype=config.scale_dtype, device=device)
    shape = (layer.out_features, layer.in_features)
    check_target(target, name, shape=shape, scale=scale, bits=config.bits, dtype=dtype)


def check_cast(target: str, name: str, scale: Tensor, dtype: torch.dtype | None) -> None:
    """Raise, naming the layer, where scales cannot go into ``dtype``, which the model is to be cast to, unchanged."""
    if dtype is not None and not holds_scale(dtype, scale):
        raise ValueError(f"target={target!r} needs scales that {dtype} holds exactly, got {scale.dtype} ones ({name})")


def _deployed(layer: nn.Linear, weight: QuantizedWeight, target: str, dtype: torch.dtype | None) -> nn.Linear:
    dtype = dtype or weight.dtype
    weight = QuantizedWeight(codes=weight.codes, scale=weight.scale, bits=weight.bits, dtype=dtype)
    deployed = like_linear(layer, BUILDERS[target](weight))
    if layer.bias is not None and layer.bias.dtype != dtype:
        deployed.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
    return deployed


def _put_in_place(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    swap_modules(model, replacements)
    share_workspace(model)
    _let_transformers_know(model)


def _let_transformers_know(model: nn.Module) -> None:
    # A transformers model exists only where transformers has been imported; it is an optional extra.
    if "transformers" not in sys.modules or not hasattr(model, "save_pretrained"):
        return
    from gracekit.quant.formats.hf import describe_to_transformers

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantized = [module for module in linears.values() if is_quantized(module)]
    describe_to_transformers(
        model,
        plain=[name for name, module in linears.items() if not is_quantized(module)],
        bits=read_bits(quantized[0]),
        group_size=quantized[0].in_features // read_scale(quantized[0]).shape[1],
        reference=form_of(quantized[0]) == "reference",
    )


def _check_trained(layer: FakeQuantizedLinear, name: str) -> None:
    log_scale = layer.weight_fake_quantizer.log_scale
    if log_scale.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log_scale must be float32, as it was trained, got {log_scale.dtype} ({name})")
    if type(layer.weight) is not nn.Parameter or layer.weight.is_meta:
        where = "on the meta device" if layer.weight.is_meta else f"sharded, a {_kind(layer.weight)}"
        raise ValueError(f"a weight must be whole and have values, got one {where} ({name})")
    if not bool(layer.weight.isfinite().all()) or not bool(log_scale.isfinite().all()):
        raise ValueError(f"weight and log_scale must be finite, got NaN or infinity ({name})")


def _describe(layer: nn.Module) -> str:
    return f"{_kind(layer)} with {_kind(layer.weight)}"


def _kind(thing: object) -> str:
    return type(thing).__name__
