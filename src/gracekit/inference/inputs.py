"""What a prompt and its settings must be before any work is done."""

# B samples, L tokens of the padded prompt

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import GenerationMode

from gracekit._checks import check_integral, check_rank
from gracekit._structure import find_decoder, unwrap

# An additive mask is what these two take; others want lengths or blocks.
ATTENTION = ("sdpa", "eager")
# What transformers' generate would do besides choosing one token after the other.
_OTHER_MODES = {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1.0, "token_healing": False}
_UNREAD = ("stop_strings", "max_time", "prompt_lookup_num_tokens", "penalty_alpha", "prefill_chunk_size")
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# What is made here, from the ids and their mask.
_OWN = ("position_ids", "cache_position", "past_key_values", "use_cache", "inputs_embeds")


class Prompt(NamedTuple):
    """A checked batch.

    Attributes:
        ids: (B, L).
        mask: (B, L), 1 at tokens, 0 at the padding before them.
        rest: what else the model takes: pixels, grids, token types.
    """

    ids: Tensor
    mask: Tensor
    rest: dict[str, Any]


class Choice(NamedTuple):
    """How a token is chosen from logits.

    Attributes:
        processors: applied to the logits first, in order.
        sample: draw from the softmax; else the greatest.
        eos: ids (E,) that end a row; None where nothing does.
        pad: what follows an end.
    """

    processors: LogitsProcessorList
    sample: bool
    eos: Tensor | None
    pad: int


def check_model(model: nn.Module, max_length: int) -> None:
    """Raise unless ``model`` can be decoded with a static cache of ``max_length`` tokens."""
    decoder: Any = find_decoder(model)
    if decoder is None or not hasattr(unwrap(model), "prepare_inputs_for_generation"):
        raise ValueError(
            f"model must be a generating model of transformers with a decoder (get_decoder().layers), got {type(model).__name__}"
        )
    if model.training:
        raise ValueError("model must be in evaluation mode, got one in training mode (call model.eval())")
    positions = getattr(decoder.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"max_length must be at most the model's {positions} positions (max_position_embeddings), got {max_length} "
            "tokens of prompt and answer"
        )
    attention = decoder.config._attn_implementation
    if attention not in ATTENTION:
        raise ValueError(f"attn_implementation must be one of {', '.join(ATTENTION)}, got {attention!r}")


def check_batch(batch: Mapping[str, Any], model: Any) -> Prompt:
    """Return the parts of a batch; raise unless its rows are padded on the left, and it is the model's in content and device."""
    device = model.device
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping with input_ids, got {type(batch).__name__}")
    if "input_ids" not in batch:
        raise ValueError(f"batch must have input_ids, got {', '.join(batch) or 'nothing'}")
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask", "labels")}
    for name in _OWN:
        if name in rest:
            raise ValueError(f"batch must not have {name}, which follows from input_ids and attention_mask")
    try:
        model._validate_model_kwargs(dict(rest))
    except ValueError as error:
        raise ValueError(f"batch must hold what the model takes, got {', '.join(rest)}: {error}") from error
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    check_integral("input_ids", ids)
    check_rank("input_ids", ids, (2,), "(samples, tokens)")
    if ids.numel() == 0:
        raise ValueError(f"input_ids must hold a token, got shape {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"batch must be on the model's device, got {ids.device} and {device}")
    if mask is None:
        if len(ids) > 1:
            raise ValueError(f"batch must have an attention_mask when it has several rows, got {len(ids)} rows without")
        mask = torch.ones_like(ids)
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, got {tuple(mask.shape)} and {tuple(ids.shape)}"
        )
    kept = mask.bool()
    ragged = (~kept[:, -1]) | (kept[:, :-1] & ~kept[:, 1:]).any(dim=1)
    if bool(ragged.any()):
        raise ValueError(
            f"batch must be padded on the left only, got zeros after ones in row {int(ragged.int().argmax())}"
        )
    return Prompt(ids=ids, mask=mask, rest=rest)


def resolve_choice(
    model: Any,
    prompt: Prompt,
    max_new_tokens: int,
    config: GenerationConfig | None,
    processors: LogitsProcessorList | None,
) -> Choice:
    """Return how tokens are chosen, as ``model.generate`` would resolve the same settings.

    Raises:
        TypeError: the settings are no GenerationConfig.
        ValueError: the settings ask for more than one continuation of a row, or for another way to stop.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig or None, got {type(config).__name__}")
    asked = GenerationConfig(do_sample=False) if config is None else copy.deepcopy(config)
    asked.max_new_tokens = max_new_tokens
    resolved, _ = model._prepare_generation_config(asked)
    for name, plain in _OTHER_MODES.items():
        if (found := getattr(resolved, name, None)) not in (None, plain):
            raise ValueError(f"generation_config must have {name}={plain} (greedy or sampled tokens only), got {found}")
    for name in _UNREAD:
        if (found := getattr(resolved, name, None)) is not None:
            raise ValueError(f"generation_config must not set {name}, got {found!r}")
    if (mode := resolved.get_generation_mode()) not in _MODES:
        raise ValueError(f"generation_config must ask for greedy or sampled tokens, got {mode.value}")
    resolved.max_length = prompt.ids.shape[1] + max_new_tokens  # a forced end asks for it
    device = prompt.ids.device
    model._prepare_special_tokens(resolved, True, device=device)
    chosen = model._get_logits_processor(
        generation_config=resolved,
        input_ids_seq_length=prompt.ids.shape[1],
        encoder_input_ids=prompt.ids,
        logits_processor=LogitsProcessorList(processors or []),
        device=device,
        model_kwargs={"attention_mask": prompt.mask},  # tokens of the padding are not penalised as repetitions
    )
    pad = resolved._pad_token_tensor
    eos = resolved._eos_token_tensor
    return Choice(processors=chosen, sample=bool(resolved.do_sample), eos=eos, pad=0 if pad is None else int(pad))
