"""Generation from a batch of prompts with images: one prefill, then a decode loop with fixed shapes.

What comes out is, token for token, what transformers' ``model.generate`` gives with the same settings (in half precision on CUDA up
to rounding: one token attends by the kernel of :mod:`gracekit.inference.attention`); what differs is the time between tokens. There
the host launches some thousand kernels for each token; here, on CUDA, one graph is replayed, with transformers' static cache inside
it, and whether all rows have ended is asked every few steps only. A prefill runs as it is; of one whose shape comes again, the
vision tower's and the decoder's parts are replayed from graphs as well (:mod:`gracekit.inference.prefill`).

This is no serving engine: a batch begins together and ends together. To serve, export the model to one.
"""

# B samples, L tokens of the padded prompt, n new tokens of the longest answer

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from gracekit._checks import check_int
from gracekit._structure import unwrap
from gracekit.inference.decoding import Decoding
from gracekit.inference.inputs import Choice, check_batch, check_model, resolve_choice

# Attention kernels want masks whose rows begin at multiples of 32 bytes.
_CACHE_MULTIPLE = 16
_SYNC_EVERY = {"cuda": 16}


class Generation(NamedTuple):
    """What was generated, and what it took.

    Attributes:
        sequences: ids (B, L + n) of prompts and answers; the padding token follows a row's end.
        new_tokens: (B,) tokens of each answer, its end included.
        prefill_seconds: for the prompts, up to the first token of each row.
        decode_seconds: for all further tokens. Neither holds the capture of the step or its compilation; the second prefill of
            a shape holds the capture of its own graph.
        peak_memory: most bytes of tensors on the CUDA device, weights included; None on a CPU.
    """

    sequences: Tensor
    new_tokens: Tensor
    prefill_seconds: float
    decode_seconds: float
    peak_memory: int | None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all rows after each row's first, over ``decode_seconds``; 0 where there are none."""
        count = int((self.new_tokens - 1).sum())
        return count / self.decode_seconds if count else 0.0


class Generator:
    """Generates for batches of one shape after another, keeping cache and captured step.

    Both belong to the number of rows: a batch with another number gets new ones, and the old ones are let go of first.

    Args:
        model: of transformers, in evaluation mode, plain or quantised; its decoder has full attention in all layers (the LLaVA
            line, the Qwen-VL line up to 3, InternVL, Idefics3, Mistral3, text models like Llama).
        max_batch: largest B.
        max_length: largest L + max_new_tokens, at most the model's positions.
        compile: compile the model's decode step with torch.compile; on CUDA alone.
        cuda_graph: capture the decode step where the model is on a CUDA device, and of prefills whose shape comes again (up to
            4,096 tokens) the decoder's part, which models must not select places by their values in, as Qwen3-VL does, and that
            of a CLIP or SigLIP tower (up to 4,096 patches).

    Raises:
        ValueError: the model has no decoder, fewer positions than ``max_length``, an attention implementation other than sdpa and
            eager, is in training mode, or is on a CPU and to be compiled.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **size)).eval()
        >>> generator = Generator(model, max_batch=2, max_length=16)
        >>> prompt = {"input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
        >>> ours = generator.generate(prompt, max_new_tokens=4).sequences
        >>> torch.equal(ours, model.generate(**prompt, max_new_tokens=4, do_sample=False))
        True
    """

    def __init__(
        self, model: nn.Module, max_batch: int, max_length: int, *, compile: bool = False, cuda_graph: bool = True
    ) -> None:
        self.max_batch = check_int("max_batch", max_batch, low=1)
        self.max_length = check_int("max_length", max_length, low=2)
        check_model(model, self.max_length)
        self.model: Any = unwrap(model)
        if compile and next(model.parameters()).device.type == "cpu":
            # With torch 2.13 such a step gives other tokens, or none, depending on the instruction set and the cache's length.
            raise ValueError(
                "compile must be False for a model on a CPU, whose compiled decode step is wrong, got compile=True"
            )
        self.compile, self.cuda_graph = compile, cuda_graph
        self._decoding: Decoding | None = None

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values held now."""
        return 0 if self._decoding is None else self._decoding.cache_bytes

    @torch.inference_mode(False)  # else cache and result could not be written to outside of it
    @torch.no_grad()
    def generate(
        self,
        batch: Mapping[str, Any],
        *,
        max_new_tokens: int,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generator: torch.Generator | None = None,
        sync_every: int | None = None,
    ) -> Generation:
        """Continue the prompts of a batch.

        Args:
            batch: what the processor made, on the model's device: ``input_ids`` (B, L), ``attention_mask`` (B, L) with padding on
                the left (may be absent where B is 1), and the model's own tensors (pixels, grids, token types). ``labels`` are
                left out.
            max_new_tokens: tokens of an answer at most, the end included.
            generation_config: transformers' settings; what it leaves open comes from ``model.generation_config``, as in
                ``model.generate``. None: that one, greedy. Searches over several continuations are refused.
            logits_processor: applied after those that the settings name.
            generator: random numbers for sampling. None: the device's default ones.
            sync_every: steps between two questions whether all rows have ended; the result does not depend on it. None: 16
                on CUDA, else 1.

        Returns:
            Sequences, their lengths, and what they took. On CUDA the device's peak memory statistics are reset at the start.

        Raises:
            ValueError: no input_ids, a tensor that the model does not take, padding on the right, a batch larger or longer than
                was said, max_new_tokens or sync_every below 1, settings that ask for more than greedy or sampled tokens, a layer
                with another cache than keys and values of all tokens.
            TypeError: an argument of the wrong type.
        """
        max_new_tokens = check_int("max_new_tokens", max_new_tokens, low=1)
        device = self.model.device
        every = check_int("sync_every", _SYNC_EVERY.get(device.type, 1) if sync_every is None else sync_every, low=1)
        prompt = check_batch(batch, self.model)
        rows, length = prompt.ids.shape
        if rows > self.max_batch:
            raise ValueError(f"batch must have at most max_batch={self.max_batch} rows, got {rows}")
        if length + max_new_tokens > self.max_length:
            raise ValueError(
                f"prompt and answer must fit into max_length={self.max_length} tokens, got {length} and "
                f"max_new_tokens={max_new_tokens}"
            )
        choice = resolve_choice(self.model, prompt, max_new_tokens, generation_config, logits_processor)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # The hook that families with positions of their own (in three dimensions, say) override; it sets the model's offsets too.
        positions = self.model._prepare_position_ids_for_generation(
            prompt.ids, {"attention_mask": prompt.mask, **prompt.rest}
        )
        decoding = self._for(positions)
        advance = _advance(decoding, choice, length, generator)

        start = _now(device)
        _choose(decoding, decoding.prefill(prompt, positions, choice.pad), choice, length, generator)
        middle = _now(device)
        made = 1
        while made < max_new_tokens:
            if choice.eos is not None and made % every == 0 and bool(decoding.finished.all()):
                break
            advance(length + made)
            made += 1
        end = _now(device)
        counts = _counts(decoding.sequences_BC[:, length : length + made], choice)
        return Generation(
            sequences=decoding.sequences_BC[:, : length + int(counts.max())].clone(),
            new_tokens=counts,
            prefill_seconds=middle - start,
            decode_seconds=end - middle,
            peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )

    def _for(self, positions: Tensor) -> Decoding:
        held = self._decoding
        if held is None or held.positions.shape != positions[..., :1].shape:
            self._decoding = held = None
            capacity = -(-self.max_length // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
            graphed = self.cuda_graph and positions.device.type == "cuda"
            self._decoding = held = Decoding(self.model, positions, capacity, compiled=self.compile, graphed=graphed)
        return held


def generate(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int,
    generation_config: GenerationConfig | None = None,
    logits_processor: LogitsProcessorList | None = None,
    generator: torch.Generator | None = None,
    compile: bool = False,
) -> Generation:
    """Continue the prompts of one batch; for several of one shape make a :class:`Generator` and keep it.

    Args:
        model: as for :class:`Generator`.
        batch: as for :meth:`Generator.generate`, like the arguments after it.
        max_new_tokens: tokens of an answer at most.
        generation_config: transformers' settings. None: the model's own, greedy.
        logits_processor: applied after those that the settings name.
        generator: random numbers for sampling.
        compile: compile the decode step; on CUDA alone.

    Returns:
        Sequences, their lengths, and what they took.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :class:`Generator` and :meth:`Generator.generate`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **size)).eval()
        >>> made = generate(model, {"input_ids": torch.tensor([[5, 6, 7]])}, max_new_tokens=4)
        >>> made.sequences.shape, made.new_tokens.tolist()
        (torch.Size([1, 7]), [4])
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    rows, length = ids.shape if isinstance(ids, Tensor) and ids.ndim == 2 else (1, 1)
    check_int("max_new_tokens", max_new_tokens, low=1)
    made = Generator(model, max(1, rows), length + max_new_tokens, compile=compile)
    return made.generate(
        batch,
        max_new_tokens=max_new_tokens,
        generation_config=generation_config,
        logits_processor=logits_processor,
        generator=generator,
    )


def _choose(decoding: Decoding, logits: Tensor, choice: Choice, length: int, generator: torch.Generator | None) -> None:
    """Take the next tokens by logits (B, V); ``length`` tokens stand before them."""
    scores = choice.processors(decoding.sequences_BC[:, :length], logits)
    if choice.sample:
        chosen = torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(1)
    else:
        chosen = scores.argmax(dim=-1)
    decoding.write(chosen, choice)


def _advance(
    decoding: Decoding, choice: Choice, length: int, generator: torch.Generator | None
) -> Callable[[int], None]:
    """Return what makes one token more, given how many stand before it.

    Greedy tokens are chosen within the captured step; processors and random numbers may look at anything, so they run outside.
    """
    if not choice.sample and not len(choice.processors):
        ends = None if choice.eos is None else tuple(choice.eos.tolist())
        replay = decoding.ready((ends, choice.pad), lambda: decoding.greedy_step(choice))
        return lambda count: replay()
    replay = decoding.ready(None, decoding.step)
    return lambda count: _choose(decoding, replay(), choice, count, generator)


def _counts(new: Tensor, choice: Choice) -> Tensor:
    """Return the tokens of each row (B, n) up to its end."""
    whole = torch.full((len(new),), new.shape[1], device=new.device)
    if choice.eos is None:
        return whole
    ends = torch.isin(new, choice.eos)
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, whole)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
