"""The decode step over tensors of fixed shape and place, so that it can be captured in a CUDA graph or compiled.

Everything that changes from token to token lives on the device and is written in place: the token, its positions, where it goes
in the cache, which places attention sees, the tokens so far, and which rows have ended. The host only counts steps.
"""

# B samples, L tokens of the padded prompt, C places of the cache, V vocabulary

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache, StaticLayer

from gracekit._structure import find_decoder
from gracekit.inference.attention import decode_attention
from gracekit.inference.graphs import captured
from gracekit.inference.inputs import Choice, Prompt
from gracekit.inference.prefill import Capture, DecoderGraphs, TowerGraphs, tower_of

_WARM_UP = 3
# Of the number of a model's experts, in transformers' configurations.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class _SharedLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values that are written to where a counter says that all layers share, and that whoever owns it moves on.

    Transformers' own have a counter each, and a kernel in each layer that adds one to it.
    """

    def __init__(self, capacity: int, slot: Tensor) -> None:
        super().__init__(max_cache_len=capacity)
        self.slot = slot

    def lazy_initialization(self, keys: Tensor, values: Tensor) -> None:
        """Allocate what belongs to tensors like these."""
        super().lazy_initialization(keys, values)
        self.cumulative_length = self.slot

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next keys and values (B, K, L, D) and return all of them (B, K, C, D)."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        length = keys.shape[2]
        places = self.slot if length == 1 else self.slot + torch.arange(length, device=self.slot.device)
        places = places.to(keys.device)  # of a model that is spread over several
        return self.keys.index_copy_(2, places, keys), self.values.index_copy_(2, places, values)


class Decoding:
    """Cache and buffers for batches of one size.

    Args:
        model: of transformers.
        positions: (..., B, L) of a prompt, as the model counts them: (B, L), or with leading axes for rotary positions in
            several dimensions.
        capacity: C.
        compiled: compile the model's call.
        graphed: capture the step, and prefills of a shape that comes again, in CUDA graphs.

    Raises:
        ValueError: the model needs another cache than keys and values of all tokens.
    """

    def __init__(self, model: Any, positions: Tensor, capacity: int, *, compiled: bool, graphed: bool) -> None:
        self.model, self.graphed, self.compiled = model, graphed, compiled
        self.slot = torch.zeros(1, dtype=torch.long, device=positions.device)
        self.cache = StaticCache(config=model.config, max_cache_len=capacity)
        kinds = {type(layer).__name__ for layer in self.cache.layers}
        if kinds != {"StaticLayer"}:
            raise ValueError(
                f"model must keep keys and values of all tokens in every layer, got {', '.join(sorted(kinds))} "
                f"({type(model).__name__})"
            )
        self.cache.layers = [_SharedLayer(capacity, self.slot) for _ in self.cache.layers]
        device, batch = positions.device, positions.shape[-2]
        self.hidden = torch.finfo(model.dtype).min
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(positions[..., :1])
        self.mask_B11C = torch.full((batch, 1, 1, capacity), self.hidden, dtype=model.dtype, device=device)
        self.sequences_BC = torch.zeros(batch, capacity, dtype=torch.long, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._decoder: Any = find_decoder(model)
        self._prefills: list[DecoderGraphs | TowerGraphs] = []
        if graphed:
            # The cache has room for one prefill at a time. No two graphs are replayed at once.
            self.graph_prefills(functools.partial(captured, warm_up=1, pool=torch.cuda.graph_pool_handle()))
        self._call = _compiled(self._forward, model.config.get_text_config()) if compiled else self._forward
        self._captured: tuple[object, Callable[[], Any]] | None = None

    def graph_prefills(self, capture: Capture) -> None:
        """Let ``capture`` make replays of the parts of prefills whose shape comes again."""
        self._prefills = [DecoderGraphs(self._decoder, self.cache, capture)]
        tower = tower_of(self.model)
        if tower is not None:
            self._prefills.append(TowerGraphs(tower, capture))

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values; 0 before the first token."""
        layers = [layer for layer in self.cache.layers if layer.is_initialized]
        return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))

    def prefill(self, prompt: Prompt, positions: Tensor, pad: int) -> Tensor:
        """Read a prompt into the empty cache and return the logits (B, V) after its last token, in float32."""
        length = prompt.ids.shape[1]
        self.cache.reset()
        keep = {"logits_to_keep": 1} if self.last_only else {}
        inputs = self.model.prepare_inputs_for_generation(
            prompt.ids,
            is_first_iteration=True,
            past_key_values=self.cache,
            attention_mask=prompt.mask,
            position_ids=positions,
            use_cache=True,
            **keep,
            **prompt.rest,
        )
        with ExitStack() as stack:
            for graphs in self._prefills:
                stack.enter_context(graphs.installed())
            logits: Tensor = self.model(**inputs, return_dict=True).logits[:, -1].float()
        self.sequences_BC.fill_(pad)
        self.sequences_BC[:, :length] = prompt.ids
        self.mask_B11C.fill_(self.hidden)
        self.mask_B11C[:, 0, 0, :length].masked_fill_(prompt.mask.bool(), 0.0)
        self.positions.copy_(positions[..., -1:] + 1)
        self.slot.fill_(length)
        self.finished.fill_(False)
        return logits

    def step(self) -> Tensor:
        """Read the last token and return the logits (B, V) after it, in float32."""
        self.mask_B11C.index_fill_(3, self.slot, 0.0)
        with decode_attention(self._decoder.config, self.token.device):
            logits = self._call(self.token, self.positions, self.mask_B11C)
        self.slot.add_(1)
        self.positions.add_(1)
        return logits

    def write(self, chosen: Tensor, choice: Choice) -> None:
        """Take tokens (B,) as the next ones, or the padding where a row has ended."""
        if choice.eos is not None:
            chosen = torch.where(self.finished, choice.pad, chosen)
            self.finished.logical_or_(torch.isin(chosen, choice.eos))
        self.token.copy_(chosen[:, None])
        self.sequences_BC.index_copy_(1, self.slot, self.token)

    def greedy_step(self, choice: Choice) -> None:
        """Read the last token and take the likeliest one."""
        self.write(self.step().argmax(dim=-1), choice)

    def ready(self, key: object, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return ``run`` as it is to be called again and again: captured, compiled, or as it is.

        Must be called before the prefill: warming up writes into cache and buffers. ``key`` says what ``run`` depends on besides
        the buffers; the last capture is kept.
        """
        if self._captured is None or self._captured[0] != key:
            self._captured = None
            if self.graphed or self.compiled:
                self.slot.zero_()
                self.positions.zero_()
                # The first call of all allocates the cache, which must be no part of what is compiled or captured.
                self._forward(self.token, self.positions, self.mask_B11C)
                self.cache.reset()
            if self.compiled:
                run()
            self._captured = (key, captured(run, warm_up=_WARM_UP) if self.graphed else run)
        return self._captured[1]

    def _forward(self, token: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        keep = {"logits_to_keep": 1} if self.last_only else {}
        out = self.model(
            input_ids=token,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **keep,
        )
        logits: Tensor = out.logits[:, -1].float()
        return logits


def _compiled(forward: Callable[..., Tensor], config: Any) -> Callable[..., Tensor]:
    """Compile a step of a decoder: addresses and shapes are static, so it is one graph, and never compiled anew."""
    from torch._inductor import list_options

    # On Hopper kernels can be launched while those before them end, as our own are. Torch knows how from 2.10 on, and has it off.
    # Its kernels wait for what the one in front writes, but not for each of several results, as a router of experts has them.
    early: dict[str, Any] = {"triton.enable_pdl": True}
    safe = early.keys() <= set(list_options()) and not any(getattr(config, name, None) for name in _EXPERTS)
    return torch.compile(forward, fullgraph=True, dynamic=False, options=early if safe else None)
