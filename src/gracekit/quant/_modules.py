"""Finding layers by name, and putting others in their place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_backward_pre_hooks",
)


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Return, by id of a parameter, the full names of the places where distinct modules hold it."""
    owners: dict[int, list[str]] = defaultdict(list)
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append(f"{prefix}.{name}" if prefix else name)
    return owners


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put the replacements into every place that holds one of the keys."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def like_linear(module: nn.Linear, weight: Tensor, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """Return a ``kind`` of layer with ``weight`` and the bias, mode and hooks of ``module``."""
    # On the meta device nothing is allocated, and no random numbers are drawn for an initialisation that is thrown away.
    layer = kind(
        module.in_features, module.out_features, module.bias is not None, device="meta", dtype=module.weight.dtype
    )
    layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
    layer.bias = module.bias
    layer.train(module.training)
    # The same dictionaries, so that a handle someone keeps still removes its hook.
    for hooks in HOOKS:
        setattr(layer, hooks, getattr(module, hooks))
    return layer
