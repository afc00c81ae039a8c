"""What a teacher says about a batch, and a student's losses against it.

Only supervised tokens and images matter, so a teacher's answer is small: the hidden states its output head takes at supervised
tokens, and its visual tokens. That is why the teacher can run ahead of the student for all micro-batches of an optimiser step,
which is what the exact sum of gates needs, and why its answers for a whole data set fit on a disk. Where a head is more than one
product (a soft cap, a bias), the logits themselves take the place of the hidden states.
"""

# B batch, S sequence length, T supervised tokens, V vocabulary, n visual tokens of one image, d hidden size

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gracekit._structure import find_output_head, unwrap
from gracekit.capture import ActivationTap
from gracekit.losses import entropy_gate, shift_labels
from gracekit.objective import GraceObjective
from gracekit.recipe.blank_picture import BlankPicture, has_pictures
from gracekit.vlm import VisualTokenTap
from gracekit.vlm.families import placeholder_id, require_decoder

IGNORE_INDEX = -100
ROWS = "supervised_rows"
_TRIED = 8  # tokens
SLAB_ELEMENTS = 1 << 26  # logits of a slab of tokens: 128 MiB in bfloat16


@dataclass(frozen=True, kw_only=True)
class TeacherSignal:
    """What a teacher says about one batch.

    Attributes:
        hidden: (T, d), what its output head takes at the supervised tokens; None where ``logits`` are given.
        head: (V, d), its output head's weight, beside ``hidden``.
        logits: (T, V).
        tokens: (sum n, d), its visual tokens, packed image after image; None: not wanted.
        lengths: n of each image; None: the student's count.
    """

    hidden: Tensor | None = None
    head: Tensor | None = None
    logits: Tensor | None = None
    tokens: Tensor | None = None
    lengths: list[int] | None = None

    def to(self, device: torch.device) -> TeacherSignal:
        """Return the signal on a device, its head where it is: that is one tensor for all micro-batches."""
        hidden, logits, tokens = (
            None if value is None else value.to(device) for value in (self.hidden, self.logits, self.tokens)
        )
        return replace(self, hidden=hidden, logits=logits, tokens=tokens)

    def gate_sum(self, targets: Tensor, objective: GraceObjective) -> Tensor:
        """Return the sum of gates over the supervised tokens, a slab of logits at a time."""
        config = objective.distillation.config
        if config.gate is None:
            return torch.tensor(float(len(targets)), device=targets.device)
        rows = len(targets) if self.head is None else max(1, SLAB_ELEMENTS // len(self.head))
        total = torch.zeros((), dtype=torch.float64, device=targets.device)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            gates = entropy_gate(
                self.logits_of(part), targets[part], ignore_index=config.ignore_index, vocab_size=config.vocab_size
            )
            total += gates.sum(dtype=torch.float64)
        return total

    def logits_of(self, part: slice) -> Tensor:
        """Return the logits of some rows."""
        if self.logits is not None:
            return self.logits[part]
        assert self.hidden is not None
        assert self.head is not None
        return F.linear(self.hidden[part], self.head)


class Output(NamedTuple):
    """A model's side of the losses: hidden states (T, d) or logits (T, V) at supervised tokens, and its visual tokens.

    ``tapped`` (B, S, d) is what the visual tokens were taken from.
    """

    hidden: Tensor | None
    logits: Tensor | None
    tokens: Tensor | None
    lengths: list[int] | None
    tapped: Tensor | None


class Reader:
    """Runs a vision-language model and keeps what the losses need of its forward.

    Args:
        model: the model, unwrapped.
        from_hidden: keep what the output head takes, not its logits.
        visual: keep the visual tokens of the penultimate layer.
        blank: what lets the vision tower run in a forward without pictures; None: it does not.
    """

    def __init__(self, model: nn.Module, *, from_hidden: bool, visual: bool, blank: BlankPicture | None = None) -> None:
        self.model, self.from_hidden, self.blank = model, from_hidden, blank
        self.visual = VisualTokenTap(model, layer=-2) if visual else None
        self.last: ActivationTap | None = None
        if from_hidden:
            decoder = require_decoder(model)
            inner = unwrap(model)
            self.last = ActivationTap(inner, next(name for name, module in inner.named_modules() if module is decoder))

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], rows: Tensor) -> tuple[Output, Any]:
        """Return what the losses need, and the model's own output.

        Args:
            model: what to call: the reader's model, or a wrapper of it.
            inputs: of the model, without labels.
            rows: (T,) flat positions (of B * S) that predict a supervised token.
        """
        # One position, because with none at all some wrappers take the head for unused.
        options = {"logits_to_keep": 1} if self.from_hidden else {}
        blank = None if has_pictures(inputs) else self.blank
        with ExitStack() as stack:
            for hooks in (self.visual, self.last, blank):
                if hooks is not None:
                    stack.enter_context(hooks)
            outputs = model(**inputs, **options, use_cache=False)
            tapped = self.visual.hidden() if self.visual else None
            images: list[int] | None = None if blank is None else []  # the blank one has features and no place
            tokens, lengths = self.visual.tokens(inputs, lengths=images) if self.visual else (None, None)
            hidden = self.last.pop().flatten(0, 1)[rows] if self.last else None
        logits = outputs.logits.flatten(0, 1)[rows] if hidden is None else None
        return Output(hidden, logits, tokens, lengths, tapped), outputs


class Teacher:
    """A frozen teacher that answers for a batch of its student's.

    Student and teacher read the same tokens; only the ids of placeholders may differ, and are exchanged.

    Args:
        model: the teacher; frozen, and put into evaluation mode.
        student: whose batches it reads.
        from_hidden: answer with what its output head takes, not with logits.
        visual: give its visual tokens too.
    """

    def __init__(self, model: nn.Module, student: nn.Module, *, from_hidden: bool, visual: bool) -> None:
        self.model = model.eval().requires_grad_(False)
        self.reader = Reader(model, from_hidden=from_hidden, visual=visual)
        # Kept here, because offloading leaves placeholders in the model.
        self.head = head_weight(model).detach() if from_hidden else None
        ids = [(placeholder_id(student, kind), placeholder_id(model, kind)) for kind in ("image", "video")]
        self.exchanged = [(theirs, own) for theirs, own in ids if theirs is not None and own not in (None, theirs)]

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], rows: Tensor) -> TeacherSignal:
        """Return the teacher's signal for a batch of the student's inputs."""
        seen, _ = self.reader(self.model, self.inputs(inputs), rows)
        return TeacherSignal(
            hidden=seen.hidden, head=self.head, logits=seen.logits, tokens=seen.tokens, lengths=seen.lengths
        )

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch of the student's inputs as the teacher takes it: its placeholders, its dtype."""
        given = dict(inputs)
        for theirs, own in self.exchanged:
            ids = given["input_ids"]
            given["input_ids"] = torch.where(inputs["input_ids"] == theirs, ids.new_tensor(own), ids)
        dtype = next(self.model.parameters()).dtype
        for name, value in given.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                given[name] = value.to(dtype)
        return given

    def to(self, device: torch.device) -> None:
        """Move the model."""
        self.model.to(device)
        self.head = head_weight(self.model).detach() if self.head is not None else None

    def offload(self, device: torch.device) -> None:
        """Keep the model's weights on the CPU and bring them to ``device`` module by module as it runs."""
        from accelerate import cpu_offload

        self.head = self.head.to(device) if self.head is not None else None
        cpu_offload(self.model, execution_device=device)


def head_weight(model: nn.Module) -> Tensor:
    """Return the weight (V, d) of a model's output head.

    Raises:
        RuntimeError: FSDP2 has sharded it again after the forward.
    """
    head: Any = find_output_head(model)
    weight: Tensor = head.weight
    if isinstance(weight, DTensor):
        raise RuntimeError(
            "the output head must be whole between forward and backward, got a sharded one: leave "
            "reshard_after_forward of the root module at its default (False)"
        )
    return weight


@torch.no_grad()
def has_plain_head(model: nn.Module) -> bool:
    """Whether a model's logits are the decoder's output times the head's weight, and nothing else, tried out on a few words.

    A few, because models of many billion weights are tried out where they were loaded, on the CPU.
    """
    head = find_output_head(model)
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    inputs = {"input_ids": _words(model).to(head.weight.device)[None]}
    rows = torch.arange(_TRIED, device=head.weight.device)
    seen, _ = Reader(model, from_hidden=True, visual=False)(model, inputs, rows)
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    assert seen.hidden is not None
    found = F.linear(seen.hidden, head.weight)
    return logits.shape == found.shape and torch.allclose(
        logits, found, rtol=0.02, atol=0.02 * float(found.float().abs().max())
    )


def _words(model: nn.Module) -> Tensor:
    """Return the first ids that stand for no picture."""
    placeholders = [placeholder_id(model, kind) for kind in ("image", "video")]
    return torch.tensor([index for index in range(_TRIED + 2) if index not in placeholders][:_TRIED])


def supervised_rows(labels: Tensor) -> Tensor:
    """Return the flat positions (of B * S) whose logits predict a supervised token; (T,)."""
    return (shift_labels(labels).flatten() != IGNORE_INDEX).nonzero().squeeze(1)
