"""Quantisation-aware training of a model's linear layers: prepare them in place, and group their parameters.

A prepared layer is a torchao FakeQuantizedLinear with an :class:`~gracekit.quant.lsq.LSQFakeQuantizer`: its state holds ``weight``,
``bias`` and ``weight_fake_quantizer.log_scale`` from the start, so a checkpoint loads into a freshly prepared model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.qat import FakeQuantizedLinear
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

from gracekit._checks import check_module, check_real
from gracekit._coverage import EXPECTED_SHARE
from gracekit._structure import decoder_linears, find_decoder
from gracekit.quant._modules import like_linear, parameter_owners, swap_modules
from gracekit.quant.coverage import coverage
from gracekit.quant.lsq import LSQFakeQuantizer
from gracekit.quant.scheme import WEIGHT_DTYPES, LSQConfig, round_scale, search_scale

LayerFilter = Callable[[nn.Module, str], bool]
DEFAULT_CONFIG = LSQConfig()


def prepare_qat(
    model: nn.Module, config: LSQConfig = DEFAULT_CONFIG, *, filter_fn: LayerFilter | None = None
) -> list[str]:
    """Make linear layers train with learned group-wise integer weights, in place.

    Each selected layer computes with :func:`lsq_fake_quantize` of its weight from now on. Initial scales: of 20 candidates evenly
    in [0.3, 1.2] * max|W| / (2^(b-1) - 1) per group the one with the least squared error (GRACE, arXiv 2601.22709); a group of
    zeros gets 1. Weights, biases, forward and backward hooks and the training mode stay. Prepare before sharding or compiling.

    Args:
        model: any module that contains nn.Linear layers.
        config: width, group size and scale dtype.
        filter_fn: ``filter_fn(module, full_name) -> bool``, asked about every nn.Linear. None selects the linears of
            ``get_decoder()``'s blocks where the model has that, else every nn.Linear but ``get_output_embeddings()``.

    Returns:
        Full names of the prepared layers, in module order. Each has a parameter ``NAME.weight_fake_quantizer.log_scale``,
        float32, of shape (out, in // group_size).

    Warns:
        UserWarning: the default selection covers less than 95 % of the parameters of the decoder's blocks, as in a mixture of
            experts (see :func:`coverage`).

    Raises:
        TypeError: ``config`` is no LSQConfig.
        ValueError: nothing was selected, or a selected layer cannot be prepared: group_size does not divide its inputs, its
            weight is shared or read by another module, on the meta device, not finite or already quantised, or it is no plain
            nn.Linear. The model is unchanged then.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> prepare_qat(model, LSQConfig(group_size=32), filter_fn=lambda module, name: module.in_features == 64)
        ['0']
        >>> model[0].weight_fake_quantizer.log_scale.shape
        torch.Size([32, 2])
    """
    if not isinstance(config, LSQConfig):
        raise TypeError(f"config must be an LSQConfig, got {type(config).__name__}")
    layers = select_layers(model, config, filter_fn)
    swap_modules(model, {layer: prepare_layer(layer, config) for layer in layers.values()})
    if filter_fn is None and find_decoder(model) is not None:
        covered = coverage(model)
        if covered.share < EXPECTED_SHARE:
            warnings.warn(f"only {covered}", stacklevel=2)
    return list(layers)


def qat_parameter_groups(
    model: nn.Module, *, lr: float, scale_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return optimiser groups for a prepared model: weights, vectors without decay, and scales at their own rate.

    The scales live on a logarithmic axis, where decay would pull every scale towards 1 and a step of the weights' rate moves
    too little: no weight decay, ten times the rate (GRACE, arXiv 2601.22709). Straight-through weights decay as any weight of
    the model does; parameters of one dimension (biases, norms) do not.

    Args:
        model: a model after :func:`prepare_qat`.
        lr: learning rate of everything but the scales, at least 0.
        scale_lr: learning rate of the scales; None means 10 * lr.
        weight_decay: of parameters with two or more dimensions, at least 0.

    Returns:
        Up to three groups (weights; vectors; scales) of those parameters that require a gradient; none is empty.

    Raises:
        TypeError: ``model`` is no nn.Module, or a number is none.
        ValueError: the model has no learned scales, nothing in it requires a gradient, or a number is negative.

    Example:
        >>> model = nn.Sequential(nn.Linear(128, 16))
        >>> _ = prepare_qat(model)
        >>> groups = qat_parameter_groups(model, lr=1e-5, weight_decay=0.1)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(1, 1e-05, 0.1), (1, 1e-05, 0.0), (1, 0.0001, 0.0)]
    """
    check_module("model", model)
    lr = check_real("lr", lr, low=0.0)
    scale_lr = 10 * lr if scale_lr is None else check_real("scale_lr", scale_lr, low=0.0)
    weight_decay = check_real("weight_decay", weight_decay, low=0.0)
    scales = {id(module.log_scale) for module in model.modules() if isinstance(module, LSQFakeQuantizer)}
    if not scales:
        raise ValueError("model must have learned scales (call prepare_qat first), got none")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model must have a parameter that requires a gradient, got none")
    others = [parameter for parameter in trained if id(parameter) not in scales]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in scales], "lr": scale_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def select_layers(model: nn.Module, config: LSQConfig, filter_fn: LayerFilter | None) -> dict[str, nn.Linear]:
    """Return the layers to quantise by full name, each checked, or raise."""
    check_module("model", model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of a module and its name, got {filter_fn!r}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model must contain the layers to replace, got an nn.Linear itself (put it into nn.Sequential)"
        )
    if filter_fn is None:
        layers = decoder_linears(model)
    else:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        layers = {name: module for name, module in linears.items() if filter_fn(module, name)}
    if not layers:
        chosen = "the default selection" if filter_fn is None else "filter_fn"
        raise ValueError(f"model must have an nn.Linear that {chosen} takes, got none in {type(model).__name__}")
    for name, layer in layers.items():
        check_layer(layer, config, name)
    check_alone(model, layers)
    return layers


def check_layer(layer: nn.Linear, config: LSQConfig, name: str) -> None:
    """Raise unless a layer can be prepared."""
    weight = layer.weight
    if isinstance(layer, FakeQuantizedLinear) or isinstance(weight, TorchAOBaseTensor):
        raise ValueError(f"a layer must not be quantised already, got {_kind(layer)} with {_kind(weight)} ({name})")
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        own = "with a forward of its own" if type(layer) is nn.Linear else _kind(layer)
        raise ValueError(f"a layer must be a plain nn.Linear, whose forward can be replaced, got {own} ({name})")
    if type(weight) is not nn.Parameter or weight.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"a weight must be an unsharded floating nn.Parameter, got {_kind(weight)} of {weight.dtype} ({name})"
        )
    check_groups(layer, config, name)
    if weight.is_meta:
        raise ValueError(f"a weight must have values to choose its scales from, got one on the meta device ({name})")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"a weight must be finite, got NaN or infinity ({name})")


def check_groups(layer: nn.Linear, config: LSQConfig, name: str) -> None:
    """Raise unless a layer's inputs are whole groups."""
    if not layer.out_features:
        raise ValueError(f"a layer must have outputs, got out_features=0 ({name})")
    if layer.in_features % config.group_size or not layer.in_features:
        raise ValueError(
            f"group_size must divide in_features, got group_size={config.group_size} and in_features={layer.in_features} ({name})"
        )


def check_alone(model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Raise where another module reads a layer's weight, too, and would go on without the codes."""
    owners = parameter_owners(model)
    passed_by = {
        linear
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
        for linear in (module.linear1, module.linear2)
    }
    for name, layer in layers.items():
        if layer in passed_by:
            raise ValueError(
                "a layer must be called wherever its weight is used, got one of an nn.TransformerEncoderLayer, which takes the "
                f"weight itself in its fast path ({name})"
            )
        holders = owners[id(layer.weight)]
        if len(holders) > 1:
            raise ValueError(
                f"a quantised weight must belong to one layer alone, got one shared by {' and '.join(holders)}"
            )


class LSQLinear(FakeQuantizedLinear):  # type: ignore[misc]
    """A layer that computes with :func:`lsq_fake_quantize` of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (..., out) for ``x`` (..., in)."""
        fake = self.weight_fake_quantizer
        if self.activation_fake_quantizer is not None or not isinstance(fake, LSQFakeQuantizer) or x is None:
            return super().forward(x)  # type: ignore[no-any-return]
        # The whole product through the quantiser's own call, because FSDP2 gathers the scales by hooks on it.
        return fake(self.weight, x, self.bias)  # type: ignore[no-any-return]

    def to_linear(self) -> nn.Linear:
        """Refuse torchao's convert step: it would drop the learned scales, or estimate others in their place."""
        raise ValueError(
            "learned scales are converted by gracekit.quant.convert(model, target), got torchao's convert step"
        )


def prepare_layer(layer: nn.Linear, config: LSQConfig, log_scale: Tensor | None = None) -> nn.Linear:
    """Return the trainable counterpart of a checked layer; it shares weight, bias and hooks with it."""
    if log_scale is None:
        scale = search_scale(layer.weight, config.bits, config.group_size)
        # Within the range of its dtype, so that training starts from a scale that it can move.
        log_scale = round_scale(scale, torch.float32).log()
    prepared = like_linear(layer, layer.weight, LSQLinear)
    prepared.weight_fake_quantizer = LSQFakeQuantizer(config, log_scale)
    prepared.weight_fake_quantizer.train(layer.training)
    return prepared


@register_quantize_module_handler(LSQConfig)  # type: ignore[untyped-decorator]
def _prepare_for_torchao(module: nn.Module, config: LSQConfig) -> nn.Module:
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"LSQConfig applies to nn.Linear, got {_kind(module)}; choose layers with quantize_'s filter_fn"
        )
    check_layer(module, config, "the name is known to prepare_qat only")
    return prepare_layer(module, config)


def _kind(thing: object) -> str:
    return type(thing).__name__
