"""Where a model keeps its decoder and its output head, found by duck typing, without importing transformers."""

from __future__ import annotations

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and its like, which keep it as ``module`` and pass no method on."""
    while not hasattr(model, "get_decoder") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def find_decoder(model: nn.Module) -> nn.Module | None:
    """Return the language model's block stack as ``model.get_decoder()`` names it, or None.

    transformers answers ``get_decoder()`` on every model, with the model itself where there is nothing better; only a
    module with a ``layers`` ModuleList counts as a decoder.
    """
    getter = getattr(unwrap(model), "get_decoder", None)
    decoder = getter() if callable(getter) else None
    if isinstance(decoder, nn.Module) and isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        return decoder
    return None


def find_output_head(model: nn.Module) -> nn.Module | None:
    """Return the module behind ``model.get_output_embeddings()``, or None."""
    getter = getattr(unwrap(model), "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def is_adapter(name: str) -> bool:
    """Whether a full name is that of a low-rank adapter's module or parameter, as PEFT calls them."""
    return any(part.startswith("lora_") for part in name.split("."))


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the nn.Linear modules that GRACE quantises, by full name, in module order.

    A model with a decoder gives the linears of the decoder's blocks, except gates: those with one output per value head or
    per expert are tiny, and decide what is kept or which expert runs. Any other model gives every nn.Linear but its
    output head. Low-rank adapters (``lora_*``) are left out of both.
    """
    modules = dict(model.named_modules())
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear) and not is_adapter(name)}
    decoder = find_decoder(model)
    if decoder is None:
        head = find_output_head(model)
        return {name: linear for name, linear in linears.items() if linear is not head}
    inside = {id(module) for module in decoder.layers.modules()}  # type: ignore[union-attr]
    return {
        name: linear
        for name, linear in linears.items()
        if id(linear) in inside and not _is_gate(linear, modules[name.rpartition(".")[0]])
    }


def _is_gate(linear: nn.Linear, parent: nn.Module) -> bool:
    """Whether the parent says that it has as many value heads or experts as ``linear`` has outputs."""
    counts = (getattr(parent, name, None) for name in ("num_v_heads", "num_experts", "num_local_experts"))
    return linear.out_features in counts
