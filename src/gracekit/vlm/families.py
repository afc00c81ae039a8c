"""What a model says of itself: its decoder, its placeholder ids, and which layers GRACE quantises.

There is no list of model classes here. transformers gives every model ``get_decoder()`` and a configuration with the id
of the image placeholder, and these are all that is asked for.
"""

from __future__ import annotations

import warnings

from torch import nn

from gracekit._checks import check_module
from gracekit._coverage import EXPECTED_SHARE, Coverage, coverage_of
from gracekit._structure import decoder_linears, find_decoder, unwrap


def require_decoder(model: nn.Module) -> nn.Module:
    """Return the decoder, a module with a ``layers`` ModuleList, or raise."""
    check_module("model", model)
    decoder = find_decoder(model)
    if decoder is None:
        raise ValueError(
            f"model must have a decoder: get_decoder() that returns a module with a ModuleList `layers`, as transformers' "
            f"language models do; got {type(unwrap(model)).__name__} without one"
        )
    return decoder


def placeholder_id(model: nn.Module, kind: str) -> int | None:
    """Return ``config.<kind>_token_id`` (older families: ``<kind>_token_index``), ``kind`` being image or video, or None."""
    config = getattr(unwrap(model), "config", None)
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def require_image_token_id(model: nn.Module) -> int:
    """Return the id of the image placeholder, or raise."""
    image_token_id = placeholder_id(model, "image")
    if image_token_id is None:
        raise ValueError(
            f"model must be a vision-language model whose config has an integer image_token_id, got "
            f"{type(unwrap(model)).__name__} without one"
        )
    return image_token_id


def language_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers that GRACE quantises: the linears of the language model's blocks, by full name.

    These are q, k, v, o, gate, up and down of every block, or whatever a family has in their place. Vision tower,
    projector, embeddings, output head and norms stay as they are, and so do low-rank adapters (``lora_*``) and gates with
    one output per head or expert. The rule is structural; ``coverage(model)`` tells what it leaves out.

    Args:
        model: a model with ``get_decoder()``: any language or vision-language model of transformers, also wrapped by
            DistributedDataParallel, torch.compile or PEFT.

    Returns:
        Module by its name in ``model.named_modules()``, in module order.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: ``model`` has no decoder, or its decoder has no nn.Linear.

    Warns:
        UserWarning: these linears hold less than 95 % of the blocks' parameters, as where experts are stacked in 3-D
            parameters, which would stay unquantised.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2,
        ...                      num_hidden_layers=1)
        >>> [name.rpartition(".")[2] for name in language_linears(LlamaForCausalLM(config))]
        ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
    """
    require_decoder(model)
    linears = decoder_linears(model)
    if not linears:
        raise ValueError(f"model's decoder must have nn.Linear layers, got none in {type(unwrap(model)).__name__}")
    report = coverage(model)
    if report.share < EXPECTED_SHARE:
        warnings.warn(
            f"the rest of {type(unwrap(model)).__name__} would stay unquantised: only {report}",
            stacklevel=2,
        )
    return linears


def coverage(model: nn.Module) -> Coverage:
    """Report which share of the decoder's blocks ``language_linears`` covers, and what it leaves out.

    Args:
        model: as for ``language_linears``.

    Returns:
        The report; its ``share`` is well below 1 where experts are stacked in 3-D parameters.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: ``model`` has no decoder.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2,
        ...                      num_hidden_layers=1)
        >>> report = coverage(LlamaForCausalLM(config))
        >>> round(report.share, 3), list(report.left_out)
        (0.988, ['model.layers.0.input_layernorm.weight', 'model.layers.0.post_attention_layernorm.weight'])
    """
    require_decoder(model)
    covered = {id(linear) for linear in decoder_linears(model).values()}
    return coverage_of(model, lambda module: id(module) in covered)
