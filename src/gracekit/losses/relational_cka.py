r"""Centred kernel alignment of visual tokens (GRACE, arXiv 2601.22709, section 3.2; CKA: Kornblith et al., ICML 2019).

Rows are l2-normalised, :math:`K = X X^\top`, :math:`H = I - \mathbf 1 \mathbf 1^\top / n`, and

.. math::
    \mathrm{HSIC}(K, L) = \frac{\mathrm{tr}(K H L H)}{(n - 1)^2}, \qquad
    \mathrm{CKA} = \frac{\mathrm{HSIC}(K_S, K_T)}{\sqrt{\mathrm{HSIC}(K_S, K_S)\,\mathrm{HSIC}(K_T, K_T)}}.

Centring the features centres their Gram matrix, and :math:`\mathrm{tr}(K H L H) = \|\tilde X^\top \tilde Y\|_F^2` with
:math:`\tilde X = H X`: the n x n form costs :math:`n^2 (d_x + d_y)` products, the d x d form
:math:`n (d_x^2 + d_y^2 + d_x d_y)`, and whichever is cheaper is taken. The unbiased estimator (Song et al., JMLR 2012) drops the
diagonal; it depends on centred features alone too, so both forms serve it.
"""

# B images, n tokens of an image, d features (dx, dy of the two sides)

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import einsum, reduce
from torch import Tensor, nn

from gracekit._autograd import without_autocast
from gracekit._checks import (
    check_choice,
    check_floating,
    check_int,
    check_rank,
    check_same_device,
)
from gracekit.losses._bfloat16_cka import FeatureSimilarity, GramSimilarity, is_defined
from gracekit.losses._image_batches import ImageBatch, as_batches
from gracekit.losses._inputs import divisor

ESTIMATORS = ("biased", "unbiased")

# Least sum of squares of a centred Gram matrix: below it the tokens of an image are one point.
_COLLAPSED = 1e-8
# Without normalisation tokens are brought to size 1 by what differs between them, if that is more than this share of them.
_DIFFERENT = 1e-4
# An unbiased self-similarity below this share of the biased one is rounding of sums that cancel.
_CANCELLED = 1e-6


def cka(x: Tensor, y: Tensor, *, estimator: str = "biased", normalize: bool = True) -> Tensor:
    """Linear centred kernel alignment of two sets of features of the same n items (Kornblith et al., ICML 2019).

    Args:
        x: (n, dx), any floating dtype.
        y: (n, dy); dx and dy may differ.
        estimator: ``"biased"``, in [0, 1], or ``"unbiased"`` (Song et al., JMLR 2012), at most about 1 and possibly negative.
        normalize: divide every row by its l2 norm first, as GRACE does.

    Returns:
        A scalar, at least float32. 0 without gradient where the similarity is undefined: all rows of a side
        (almost) equal, or an unbiased self-similarity that is not positive.

    Raises:
        TypeError: wrong dtype.
        ValueError: shapes that do not fit, fewer than 2 rows (4 if unbiased), an unknown estimator.

    Example:
        >>> x = torch.randn(10, 5)
        >>> rotation = torch.linalg.qr(torch.randn(5, 5)).Q
        >>> round(cka(x, x @ rotation).item(), 4)
        1.0
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("normalize", normalize, (True, False))
    _check_pair("x", x, "y", y)
    check_rank("x", x, (2,), "(n, dx)")
    check_rank("y", y, (2,), "(n, dy)")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"x and y must have the same number of rows, got {tuple(x.shape)} and {tuple(y.shape)}")
    least = _least_tokens(estimator)
    if x.shape[0] < least:
        raise ValueError(f"x must have at least {least} rows for estimator={estimator!r}, got {tuple(x.shape)}")
    similarity_B, defined_B = _similarity(x[None], y[None], None, None, estimator, normalize)
    return torch.where(defined_B, similarity_B, 0.0)[0]


class RelationalCKA(nn.Module):
    """Mean of 1 - CKA over the images of a batch (GRACE, arXiv 2601.22709, section 3.2).

    Args:
        estimator: ``"biased"`` or ``"unbiased"``.
        normalize: divide every token by its l2 norm first.
        min_tokens: images with fewer tokens are left out of the mean; at least 2 (4 if unbiased).

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range.

    Example:
        >>> criterion = RelationalCKA()
        >>> student, teacher = torch.randn(9, 16, requires_grad=True), torch.randn(9, 32)
        >>> loss = criterion(student, teacher, lengths=[5, 4])
        >>> loss.backward()
        >>> 0.0 < loss.item() < 1.0
        True
    """

    def __init__(self, *, estimator: str = "biased", normalize: bool = True, min_tokens: int = 4) -> None:
        super().__init__()
        check_choice("estimator", estimator, ESTIMATORS)
        self.estimator = estimator
        check_choice("normalize", normalize, (True, False))
        self.normalize = normalize
        self.min_tokens = check_int("min_tokens", min_tokens, low=_least_tokens(estimator))

    def forward(
        self,
        student_tokens: Tensor,
        teacher_tokens: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        mask: Tensor | None = None,
        image_count: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss of one image, of a padded batch or of packed images.

        Args:
            student_tokens: (n, d_S) one image; (B, n, d_S) a batch; or (sum of lengths, d_S) packed images.
            teacher_tokens: the same with d_T; no gradient reaches it.
            lengths: tokens of each packed image: a list, or a CPU tensor (one on CUDA costs a sync; under torch.compile, a list).
            mask: (B, n) bool, True at the tokens of a padded batch that count.
            image_count: images of the whole global batch that count, where this call sees a part of them: the sum of
                1 - CKA is divided by it instead of by the images that count here.

        Returns:
            A scalar, at least float32, in [0, 1] for the biased estimator. Images with fewer than ``min_tokens`` tokens or with
            collapsed tokens (sum of squares of the centred Gram matrix below 1e-8; without normalisation, tokens that are equal
            up to about a millionth) do not count; 0, attached to the graph, if none does.

        Raises:
            TypeError: wrong dtype.
            ValueError: shapes, ``lengths`` or ``mask`` that do not fit.
        """
        _check_pair("student_tokens", student_tokens, "teacher_tokens", teacher_tokens)
        teacher_tokens = teacher_tokens.detach()
        on_tensor_cores = _on_tensor_cores(student_tokens, teacher_tokens)
        batches = as_batches(student_tokens, teacher_tokens, lengths, mask)
        sums = [self._sums(batch, on_tensor_cores) for batch in batches]
        total, count = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
        return total / divisor("image_count", image_count, count)

    def _sums(self, batch: ImageBatch, on_tensor_cores: bool) -> tuple[Tensor, Tensor]:
        """Return the sum of 1 - CKA over the images of a batch that count, and how many do."""
        batch = batch.without_short_images(self.min_tokens)
        some = len(batch.x_BND) > 0 and batch.x_BND.shape[1] > 0
        if some and on_tensor_cores and self.normalize and self.estimator == "biased":
            similarity_B, defined_B = _bfloat16_similarity(batch)
        else:
            similarity_B, defined_B = _similarity(*batch, self.estimator, self.normalize)
        return torch.where(defined_B, 1.0 - similarity_B, 0.0).sum(), defined_B.sum()

    def extra_repr(self) -> str:
        """Return the constructor's arguments."""
        return f"estimator={self.estimator!r}, normalize={self.normalize}, min_tokens={self.min_tokens}"


class _HSIC(NamedTuple):
    """Unnormalised HSIC of the pair and of each side with itself."""

    xy_B: Tensor
    xx_B: Tensor
    yy_B: Tensor


def _least_tokens(estimator: str) -> int:
    return 4 if estimator == "unbiased" else 2


def _check_pair(x_name: str, x: Tensor, y_name: str, y: Tensor) -> None:
    check_floating(x_name, x)
    check_floating(y_name, y)
    check_same_device(**{x_name: x, y_name: y})


def _centred(tokens_BND: Tensor, batch: ImageBatch, normalize: bool) -> Tensor:
    """Normalise and centre the tokens of every image in at least float32; zero rows where masked."""
    dtype = torch.promote_types(torch.promote_types(batch.x_BND.dtype, batch.y_BND.dtype), torch.float32)
    tokens_BND = tokens_BND.to(dtype)
    if batch.mask_BN is None:
        if normalize:
            tokens_BND = _unit(tokens_BND)
        centred_BND = tokens_BND - tokens_BND.mean(1, keepdim=True)
        return centred_BND if normalize else _to_size_one(centred_BND, tokens_BND)
    assert batch.counts_B is not None
    keep_BN1 = batch.mask_BN[..., None]
    # Before the mathematics: a NaN in a padded row must reach neither value nor gradient.
    tokens_BND = tokens_BND.masked_fill(~keep_BN1, 0.0)
    if normalize:
        tokens_BND = _unit(tokens_BND)
    mean_B1D = tokens_BND.sum(1, keepdim=True) / batch.counts_B.clamp_min(1)[:, None, None]
    centred_BND = (tokens_BND - mean_B1D).masked_fill(~keep_BN1, 0.0)
    return centred_BND if normalize else _to_size_one(centred_BND, tokens_BND)


def _unit(tokens_BND: Tensor) -> Tensor:
    """Divide every token by its l2 norm. A token of zeros stays one, without gradient: it is no nearer to any direction."""
    norm_BN1 = torch.linalg.vector_norm(tokens_BND, dim=-1, keepdim=True)
    return tokens_BND / torch.where(norm_BN1 == 0, torch.inf, norm_BN1)


def _to_size_one(centred_BND: Tensor, tokens_BND: Tensor) -> Tensor:
    """Divide the centred tokens of every image by their size, which similarity does not depend on and float32 does."""
    sizes = (torch.linalg.vector_norm(side.detach(), dim=(1, 2), keepdim=True) for side in (centred_BND, tokens_BND))
    own_B11, whole_B11 = sizes
    size_B11 = torch.maximum(own_B11, _DIFFERENT * whole_B11)
    return centred_BND / torch.where(size_B11 == 0, 1.0, size_B11)


def _on_tensor_cores(student: Tensor, teacher: Tensor) -> bool:
    """Whether products of these tokens run on tensor cores; torch.compile gets the plain form.

    Float16 does not: its range cannot hold the slopes between tokens of large norm.
    """
    bfloat16 = student.dtype == teacher.dtype == torch.bfloat16
    return bfloat16 and student.is_cuda and not torch.compiler.is_compiling()


def _bfloat16_similarity(batch: ImageBatch) -> tuple[Tensor, Tensor]:
    """Return what :func:`_similarity` does, of bfloat16 tokens in closed form."""
    x_BND, y_BND, mask_BN, counts_B = batch
    if mask_BN is not None:
        x_BND, y_BND = (side.masked_fill(~mask_BN[..., None], 0.0) for side in (x_BND, y_BND))
    form = GramSimilarity if _gram_is_cheaper(x_BND, y_BND) else FeatureSimilarity
    with without_autocast(x_BND):
        return form.apply(x_BND, y_BND, mask_BN, counts_B, _COLLAPSED)  # type: ignore[no-any-return, no-untyped-call]


def _gram_is_cheaper(x_BND: Tensor, y_BND: Tensor) -> bool:
    n, dx, dy = x_BND.shape[1], x_BND.shape[2], y_BND.shape[2]
    return n * (dx + dy) <= dx * dx + dy * dy + dx * dy


def _similarity(
    x_BND: Tensor,
    y_BND: Tensor,
    mask_BN: Tensor | None,
    counts_B: Tensor | None,
    estimator: str,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """CKA of every image and whether it is defined; a finite value with finite gradient where it is not."""
    batch = ImageBatch(x_BND, y_BND, mask_BN, counts_B)
    with without_autocast(x_BND):
        x_BND, y_BND = _centred(x_BND, batch, normalize), _centred(y_BND, batch, normalize)
        biased = (_gram_hsic if _gram_is_cheaper(x_BND, y_BND) else _feature_hsic)(x_BND, y_BND)
        defined_B = is_defined(biased.xx_B, biased.yy_B, _COLLAPSED)
        hsic = biased
        if estimator == "unbiased":
            count_B = (
                torch.full_like(biased.xx_B, x_BND.shape[1]) if counts_B is None else counts_B.to(biased.xx_B.dtype)
            )
            hsic = _unbiased(biased, x_BND, y_BND, count_B)
            cancelled_B = (hsic.xx_B <= _CANCELLED * biased.xx_B) | (hsic.yy_B <= _CANCELLED * biased.yy_B)
            defined_B = defined_B & ~cancelled_B
        # Roots before the product: at 1e-8 each it would underflow in its gradient. Undefined images divide by 1.
        norm_B = torch.where(defined_B, hsic.xx_B, 1.0).sqrt() * torch.where(defined_B, hsic.yy_B, 1.0).sqrt()
        similarity_B = hsic.xy_B / norm_B
        return (similarity_B.clamp(0.0, 1.0) if estimator == "biased" else similarity_B), defined_B


def _gram_hsic(x_BND: Tensor, y_BND: Tensor) -> _HSIC:
    """tr(K H L H) through n x n Gram matrices of centred tokens."""
    gram_x = einsum(x_BND, x_BND, "b i d, b j d -> b i j")
    gram_y = einsum(y_BND, y_BND, "b i d, b j d -> b i j")
    return _HSIC(*(reduce(product, "b i j -> b", "sum") for product in (gram_x * gram_y, gram_x**2, gram_y**2)))


def _feature_hsic(x_BND: Tensor, y_BND: Tensor) -> _HSIC:
    """The same through d x d cross-products."""

    def square_norm(a_BND: Tensor, b_BND: Tensor) -> Tensor:
        return reduce(einsum(a_BND, b_BND, "b n i, b n j -> b i j") ** 2, "b i j -> b", "sum")

    return _HSIC(square_norm(x_BND, y_BND), square_norm(x_BND, x_BND), square_norm(y_BND, y_BND))


def _unbiased(biased: _HSIC, x_BND: Tensor, y_BND: Tensor, count_B: Tensor) -> _HSIC:
    r"""Song et al.'s estimator of centred features, up to the factor that CKA divides out.

    With :math:`\tilde K` the Gram matrix without its diagonal :math:`k`, rows of the whole Gram matrix sum to 0, so
    :math:`\tilde K \mathbf 1 = -k`, :math:`\mathbf 1^\top \tilde K \mathbf 1 = -\sum k`, and the three terms of the estimator are
    :math:`\mathrm{tr}(KL) - k \cdot l`, :math:`\sum k \sum l` and :math:`k \cdot l`.
    """
    k_BN, l_BN = (reduce(side**2, "b n d -> b n", "sum") for side in (x_BND, y_BND))

    def corrected(full_B: Tensor, a_BN: Tensor, b_BN: Tensor) -> Tensor:
        dot_B = (a_BN * b_BN).sum(1)
        sums_B = a_BN.sum(1) * b_BN.sum(1)
        n = count_B.clamp_min(4)
        return full_B - dot_B + sums_B / ((n - 1) * (n - 2)) - 2 / (n - 2) * dot_B

    return _HSIC(
        corrected(biased.xy_B, k_BN, l_BN), corrected(biased.xx_B, k_BN, k_BN), corrected(biased.yy_B, l_BN, l_BN)
    )
