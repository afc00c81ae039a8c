"""Visual tokens of a student and its teacher, side by side and matched image by image.

The relational loss compares token i of an image in the student with token i of the same image in the teacher. Models of
one family cut an image into the same tokens, whatever their width, depth or placeholder id; two resolutions do not, and
neither truncation nor reordering would make such tokens correspond. So the counts are compared image by image, and
pooling both to the coarser of their grids is something the caller asks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from gracekit._structure import unwrap
from gracekit.capture import HookContext
from gracekit.vlm.families import require_decoder
from gracekit.vlm.pooling import Grid, cells, check_grids, coarser, pool_tokens
from gracekit.vlm.tap import VisualTokenTap

Grids = Sequence[Sequence[int]]


class PairedTokens(NamedTuple):
    """Visual tokens of both models, packed alike.

    Attributes:
        student: (sum n, d_S), part of the student's graph.
        teacher: (sum n, d_T), detached, on the student's device.
        lengths: n of each image, the same for both.
    """

    student: Tensor
    teacher: Tensor
    lengths: list[int]


class VisualTokenPair(HookContext):
    """Capture the visual tokens of a student and of its teacher, for the relational loss.

    Two :class:`VisualTokenTap` in one, and the check that the tokens correspond. The models may differ in width, depth,
    placeholder ids and vocabulary, and each may have a batch of its own, with the same images in the same order.

    Args:
        student: a vision-language model, as for ``VisualTokenTap``.
        teacher: another one; run it under ``torch.no_grad()``.
        layer: the layer to tap, in both; in [-L, L-1] of each. -2 is the penultimate one whatever the depths.
        teacher_layer: the teacher's, where that is another one.
        pool: pool both sides to the coarser grid (:func:`pool_tokens`), with the smaller size along each axis, where the
            grids of an image differ. All grids must then be known.

    Raises:
        TypeError: a model is no nn.Module, or a layer no integer.
        ValueError: student and teacher are one module, or ``VisualTokenTap`` refuses one of them.

    Example:
        >>> from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
        >>> def llava(width, image_id):
        ...     size = dict(intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
        ...     vision = CLIPVisionConfig(**size, hidden_size=16, image_size=8, patch_size=4)
        ...     text = LlamaConfig(**size, hidden_size=width, vocab_size=32)
        ...     config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id)
        ...     return LlavaForConditionalGeneration(config)
        >>> student, teacher, pixels = llava(16, 9), llava(24, 8), torch.randn(1, 3, 8, 8)
        >>> batch = dict(input_ids=torch.tensor([[1, 9, 9, 9, 9, 2]]), pixel_values=pixels)
        >>> taught = dict(input_ids=torch.tensor([[1, 8, 8, 8, 8, 2]]), pixel_values=pixels)
        >>> with VisualTokenPair(student, teacher) as pair:
        ...     out = student(**batch)
        ...     with torch.no_grad():
        ...         reference = teacher(**taught)
        ...     tokens = pair.tokens(batch, taught)
        >>> tokens.student.shape, tokens.teacher.shape, tokens.lengths
        (torch.Size([4, 16]), torch.Size([4, 24]), [4])
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layer: int = -2,
        *,
        teacher_layer: int | None = None,
        pool: bool = False,
    ) -> None:
        super().__init__()
        self._models = {"student": student, "teacher": teacher}
        self._taps = {
            "student": VisualTokenTap(student, layer),
            "teacher": VisualTokenTap(teacher, layer if teacher_layer is None else teacher_layer),
        }
        if require_decoder(student) is require_decoder(teacher):  # also one model with and without its adapters
            raise ValueError(
                f"student and teacher must be two modules, got one {type(unwrap(student)).__name__} as both: the second "
                "forward would replace what the first one left"
            )
        self.pool = pool

    def tokens(
        self,
        student_batch: Mapping[str, Any],
        teacher_batch: Mapping[str, Any] | None = None,
        *,
        student_grids: Grids | None = None,
        teacher_grids: Grids | None = None,
        lengths: Sequence[int] | None = None,
    ) -> PairedTokens:
        """Return the visual tokens of the latest forward of both models, and forget them.

        Args:
            student_batch: what the student was called with; its ``input_ids`` say where visual tokens are.
            teacher_batch: what the teacher was called with. None: the same.
            student_grids: with ``pool``, the grid of the student's tokens for each image, (rows, columns) or (frames,
                rows, columns), in the order of the lengths. None: from ``image_grid_thw`` and ``video_grid_thw`` of the
                batch, which are read on the host, and the model's ``spatial_merge_size``.
            teacher_grids: the same of the teacher's.
            lengths: tokens of each image in both models, as ``VisualTokenTap.tokens`` takes them.

        Returns:
            ``PairedTokens``, ready for ``RelationalCKA()(*tokens)``.

        Raises:
            TypeError: a batch is no mapping.
            ValueError: the models saw different numbers of images, or of tokens for one image, without ``pool``; with
                it, a grid is not known or does not have as many cells as the image has tokens; a batch does not fit its
                forward.
            RuntimeError: a model was not run since the pair was entered or its tokens were last taken.
        """
        grids_given = {"student": student_grids, "teacher": teacher_grids}
        batches = {"student": student_batch, "teacher": student_batch if teacher_batch is None else teacher_batch}
        student, counts = self._taps["student"].tokens(batches["student"], lengths=lengths)
        teacher, taught = self._taps["teacher"].tokens(batches["teacher"], lengths=lengths)
        teacher = teacher.detach().to(student.device, non_blocking=True)
        if len(counts) != len(taught):
            raise ValueError(
                f"student and teacher must see the same images, got {len(counts)} images in the student's batch and "
                f"{len(taught)} in the teacher's"
            )
        if not self.pool:
            for name, given in grids_given.items():
                if given is not None:
                    raise ValueError(f"{name}_grids must be None without pool=True, got {name}_grids={given!r}")
            _check_equal(counts, taught)
            return PairedTokens(student, teacher, counts)
        by_model = {"student": counts, "teacher": taught}
        grids = {name: self._grids(name, batches[name], given, by_model[name]) for name, given in grids_given.items()}
        targets = [coarser(one, other) for one, other in zip(grids["student"], grids["teacher"], strict=True)]
        pooled, counts = pool_tokens(student, grids["student"], targets)
        return PairedTokens(pooled, pool_tokens(teacher, grids["teacher"], targets)[0], counts)

    def _grids(self, name: str, batch: Mapping[str, Any], given: Grids | None, lengths: list[int]) -> list[Grid]:
        """Return the token grid of each image of one model, checked against its token counts."""
        if given is None and not lengths:
            return []
        if given is None:
            grids = _grids_of_batch(self._models[name], batch)
            if grids is None:
                raise ValueError(
                    f"{name}_grids must be given to pool: its batch has no image_grid_thw, or its config no "
                    f"spatial_merge_size, to tell them; got {name}_grids=None for {len(lengths)} images"
                )
        else:
            grids = check_grids(f"{name}_grids", given)
        if len(grids) != len(lengths):
            raise ValueError(
                f"{name}_grids must have one grid for each image, got {len(grids)} for {len(lengths)} images"
            )
        for i, (grid, length) in enumerate(zip(grids, lengths, strict=True)):
            if cells(grid) != length:
                raise ValueError(
                    f"{name}_grids must have as many cells as the image has tokens, got {grid} for {length} tokens "
                    f"(image {i})"
                )
        return grids

    def _install(self, stack: ExitStack) -> None:
        for tap in self._taps.values():
            stack.enter_context(tap)

    def __repr__(self) -> str:
        names = ", ".join(type(unwrap(model)).__name__ for model in self._models.values())
        student, teacher = (tap.layer for tap in self._taps.values())
        own = "" if teacher == student else f", teacher_layer={teacher}"
        return f"VisualTokenPair({names}, layer={student}{own}, pool={self.pool})"


def _check_equal(lengths: list[int], teacher_lengths: list[int]) -> None:
    for i, (count, taught) in enumerate(zip(lengths, teacher_lengths, strict=True)):
        if count != taught:
            raise ValueError(
                f"student and teacher must have as many tokens for each image, got {count} and {taught} for image {i} of "
                f"{len(lengths)}; prepare both batches at one resolution, or pass pool=True to pool to the coarser grid"
            )


def _grids_of_batch(model: nn.Module, batch: Mapping[str, Any]) -> list[Grid] | None:
    """Return the token grids that the batch tells, images first and then videos, or None."""
    vision = getattr(getattr(unwrap(model), "config", None), "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None)
    found = [batch[key] for key in ("image_grid_thw", "video_grid_thw") if isinstance(batch.get(key), Tensor)]
    if not isinstance(merge, int) or not found:
        return None
    return [(t, h // merge, w // merge) for grids in found for t, h, w in grids.tolist()]
