r"""Centred kernel alignment of bfloat16 tokens on tensor cores, with a closed-form gradient.

Tokens are normalised and centred in float32, :math:`c_i = u_i - \bar u` with :math:`u_i = x_i / \|x_i\|`, and rounded to bfloat16
once; products of bfloat16 are exact in float32. Centring first is what keeps a common component, or the few huge dimensions of
real models' hidden states, from drowning what is left. With :math:`K, L` the Gram matrices of the two sides' :math:`c` and
:math:`s` their similarity,

.. math::
    G = \frac{\partial s}{\partial K} = \frac{L}{\|K\|\,\|L\|} - \frac{s\,K}{\|K\|^2}, \qquad
    \frac{\partial s}{\partial x_i} = \frac{2}{\|x_i\|}\, (I - u_i u_i^\top) \sum_j G_{ij}\, c_j,

which is one product of a bfloat16 n x n matrix with the centred tokens, or in feature space of the tokens with a d x d matrix. With
unit roundoff u = 2^-9 the similarity moves by less than 2 u, the gradient by less than 8 u of its norm (from the roundings of the
rows, of the matrix and of the result); by more of it where the similarity hardly depends on the tokens, as when one dimension of
changing sign outweighs all others.
"""

# B images, n tokens of an image, d features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gracekit._autograd import differentiable_once
from gracekit.losses._inputs import use_triton


def product(a_BNM: Tensor, b_BMK: Tensor) -> Tensor:
    """Batched product of bfloat16 matrices, accumulated and returned in float32."""
    if a_BNM.is_cuda:
        return torch.bmm(a_BNM, b_BMK, out_dtype=torch.float32)
    return torch.bmm(a_BNM.float(), b_BMK.float())


def _inverse(square: Tensor) -> Tensor:
    return torch.where(square > 0, square.rsqrt(), 0.0)


def is_defined(xx_B: Tensor, yy_B: Tensor, collapsed: float) -> Tensor:
    """Whether no side's centred Gram matrix is (almost) zero; NaN is not, and shows in the loss."""
    return ~((xx_B < collapsed) | (yy_B < collapsed))


def _slopes(xy_B: Tensor, xx_B: Tensor, yy_B: Tensor, defined_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity, and the factors of L and K in its derivative; zeros where it is not defined."""
    norm_B = torch.where(defined_B, xx_B, 1.0).sqrt() * torch.where(defined_B, yy_B, 1.0).sqrt()
    similarity_B = torch.where(defined_B, xy_B / norm_B, 0.0)
    of_l = torch.where(defined_B, 1.0 / norm_B, 0.0)
    return similarity_B.clamp(0.0, 1.0), of_l, similarity_B / torch.where(defined_B, xx_B, 1.0)


class GramSimilarity(torch.autograd.Function):
    """Similarity of every image, and whether it is defined, through n x n matrices; keeps none of the centred tokens."""

    @staticmethod
    def forward(
        ctx: Any, x_BND: Tensor, y_BND: Tensor, mask_BN: Tensor | None, counts_B: Tensor | None, collapsed: float
    ) -> tuple[Tensor, Tensor]:
        grams = []
        for side_BND in (x_BND, y_BND):
            centred_BND, inverse_BN = _centred(side_BND, mask_BN, counts_B)
            grams.append((product(centred_BND, centred_BND.mT), inverse_BN))
            del centred_BND
        (gram_x, inverse_BN), (gram_y, _) = grams
        xx_B, yy_B = (torch.linalg.vector_norm(gram, dim=(1, 2)).square() for gram in (gram_x, gram_y))
        xy_B = (gram_x * gram_y).sum((1, 2))
        defined_B = is_defined(xx_B, yy_B, collapsed)
        similarity_B, of_l, of_k = _slopes(xy_B, xx_B, yy_B, defined_B)
        if ctx.needs_input_grad[0]:
            slope = gram_y.mul_(2 * of_l[:, None, None]).sub_(gram_x.mul_(2 * of_k[:, None, None]))
            ctx.save_for_backward(x_BND, mask_BN, counts_B, inverse_BN, slope.to(x_BND.dtype))
        ctx.mark_non_differentiable(defined_B)
        return similarity_B, defined_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, mask_BN, counts_B, inverse_BN, slope = ctx.saved_tensors
        with torch.no_grad():
            centred_BND, _ = _centred(x_BND, mask_BN, counts_B)
            gradient_BND = torch.bmm(slope, centred_BND)
            del centred_BND
            _to_tangent(x_BND, inverse_BN, grad_B, gradient_BND)
        return differentiable_once("RelationalCKA", gradient_BND, x_BND), None, None, None, None


class FeatureSimilarity(torch.autograd.Function):
    """Similarity of every image, and whether it is defined, through d x d matrices; keeps none of the centred tokens."""

    @staticmethod
    def forward(
        ctx: Any, x_BND: Tensor, y_BND: Tensor, mask_BN: Tensor | None, counts_B: Tensor | None, collapsed: float
    ) -> tuple[Tensor, Tensor]:
        both_BND, inverse_BN = _centred_pair(x_BND, y_BND, mask_BN, counts_B)
        dx = x_BND.shape[2]
        yy_B = torch.linalg.vector_norm(product(both_BND[..., dx:].mT, both_BND[..., dx:]), dim=(1, 2)).square()
        cross = product(both_BND[..., :dx].mT, both_BND)  # [X^T X | X^T Y]
        del both_BND
        xx_B = torch.linalg.vector_norm(cross[..., :dx], dim=(1, 2)).square()
        xy_B = torch.linalg.vector_norm(cross[..., dx:], dim=(1, 2)).square()
        defined_B = is_defined(xx_B, yy_B, collapsed)
        similarity_B, of_l, of_k = _slopes(xy_B, xx_B, yy_B, defined_B)
        if ctx.needs_input_grad[0]:
            cross[..., :dx] *= -2 * of_k[:, None, None]
            cross[..., dx:] *= 2 * of_l[:, None, None]
            ctx.save_for_backward(x_BND, y_BND, mask_BN, counts_B, inverse_BN, cross.to(x_BND.dtype))
        ctx.mark_non_differentiable(defined_B)
        return similarity_B, defined_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, y_BND, mask_BN, counts_B, inverse_BN, cross = ctx.saved_tensors
        with torch.no_grad():
            both_BND, _ = _centred_pair(x_BND, y_BND, mask_BN, counts_B)
            # Sums of centred rows are centred: no second centring.
            gradient_BND = torch.bmm(both_BND, cross.mT)
            del both_BND
            _to_tangent(x_BND, inverse_BN, grad_B, gradient_BND)
        return differentiable_once("RelationalCKA", gradient_BND, x_BND), None, None, None, None


def _centred_pair(
    x_BND: Tensor, y_BND: Tensor, mask_BN: Tensor | None, counts_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Normalised and centred tokens of both sides next to each other, and 1 / norm of the first side's."""
    dx = x_BND.shape[2]
    both_BND = x_BND.new_empty(*x_BND.shape[:2], dx + y_BND.shape[2])
    _, inverse_BN = _centred(x_BND, mask_BN, counts_B, out_BND=both_BND[..., :dx])
    _centred(y_BND, mask_BN, counts_B, out_BND=both_BND[..., dx:])
    return both_BND, inverse_BN


def _centred(
    side_BND: Tensor, mask_BN: Tensor | None, counts_B: Tensor | None, *, out_BND: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalised and centred tokens, rounded once, zeros where masked; and 1 / norm of each token."""
    if out_BND is None:
        out_BND = side_BND.new_empty(side_BND.shape)
    count_B1 = side_BND.shape[1] if counts_B is None else counts_B.clamp_min(1)[:, None]
    inverse_BN = _inverse(torch.linalg.vector_norm(side_BND, dim=2, dtype=torch.float32).square())
    if _kernels(side_BND):
        from gracekit.losses import _triton_cka

        mean_BD = _triton_cka.weighted_sum(side_BND, inverse_BN) / count_B1
        _triton_cka.centre(side_BND, inverse_BN, mean_BD, mask_BN, out_BND)
    else:
        unit_BND = side_BND * inverse_BN[:, :, None]
        centred_BND = unit_BND - (unit_BND.sum(1) / count_B1)[:, None, :]
        out_BND.copy_(centred_BND if mask_BN is None else centred_BND * mask_BN[:, :, None])
    return out_BND, inverse_BN


def _to_tangent(x_BND: Tensor, inverse_BN: Tensor, grad_B: Tensor, slope_BND: Tensor) -> None:
    """Turn slopes of unit tokens into those of the tokens, in place."""
    if _kernels(x_BND):
        from gracekit.losses import _triton_cka

        return _triton_cka.to_tangent(x_BND, inverse_BN, grad_B, slope_BND)
    unit_BND, slope = x_BND * inverse_BN[:, :, None], slope_BND.float()
    slope -= unit_BND * (unit_BND * slope).sum(2, keepdim=True)
    slope_BND.copy_(slope * (inverse_BN * grad_B[:, None])[:, :, None])


def _kernels(tokens: Tensor) -> bool:
    return use_triton("auto", tokens)
