r"""Centred kernel alignment of bfloat16 tokens on tensor cores, with a closed-form gradient.

Rows of bfloat16 multiply exactly into float32, so the Gram matrix is taken of the tokens as they are and the norms divide it
afterwards. With :math:`K, L` centred, :math:`s` their similarity and :math:`u_i = x_i / \|x_i\|`,

.. math::
    G = \frac{\partial s}{\partial K} = \frac{L}{\|K\|\,\|L\|} - \frac{s\,K}{\|K\|^2}, \qquad
    \frac{\partial s}{\partial x_i} = \frac{2}{\|x_i\|} \Big( \sum_j \frac{G_{ij}}{\|x_j\|}\,x_j
        - \frac{\sum_j G_{ij}\,u_i^\top u_j}{\|x_i\|}\,x_i \Big),

which is one product of a bfloat16 n x n matrix with the tokens. In feature space the centred rows themselves are rounded
to bfloat16, with unit roundoff u = 2^-9: the similarity moves by less than 2 u, the gradient by less than
8 u of its norm (from roundings of the rows, of the d x d matrix and of the result); in the Gram form the similarity is exact.
"""

# B images, n tokens of an image, d features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gracekit._autograd import differentiable_once
from gracekit.losses._inputs import use_triton

# Least sum of squares of a centred Gram matrix of n tokens, in multiples of n^2: the rounding of its float32 entries. Below it, or
# below what the plain form calls collapsed, the tokens are one point.
_GRAM_NOISE = (2e-6) ** 2


def product(a_BNM: Tensor, b_BMK: Tensor) -> Tensor:
    """Batched product of bfloat16 matrices, accumulated and returned in float32."""
    if a_BNM.is_cuda:
        return torch.bmm(a_BNM, b_BMK, out_dtype=torch.float32)
    return torch.bmm(a_BNM.float(), b_BMK.float())


def _inverse(square: Tensor) -> Tensor:
    return torch.where(square > 0, square.clamp_min(1e-24).rsqrt(), 0.0)


def _slopes(xy_B: Tensor, xx_B: Tensor, yy_B: Tensor, defined_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity, and the factors of L and K in its derivative; zeros where it is not defined."""
    norm_B = torch.where(defined_B, xx_B, 1.0).sqrt() * torch.where(defined_B, yy_B, 1.0).sqrt()
    similarity_B = torch.where(defined_B, xy_B / norm_B, 0.0)
    of_l = torch.where(defined_B, 1.0 / norm_B, 0.0)
    return similarity_B.clamp(0.0, 1.0), of_l, similarity_B / torch.where(defined_B, xx_B, 1.0)


class GramSimilarity(torch.autograd.Function):
    """Similarity of every image, and whether it is defined, through n x n matrices."""

    @staticmethod
    def forward(
        ctx: Any, x_BND: Tensor, y_BND: Tensor, mask_BN: Tensor | None, counts_B: Tensor | None, collapsed: float
    ) -> tuple[Tensor, Tensor]:
        gram_x, mean_x, inverse_x = _centred_gram(x_BND, mask_BN, counts_B)
        gram_y, _, _ = _centred_gram(y_BND, mask_BN, counts_B)
        xx_B, yy_B = (torch.linalg.vector_norm(gram, dim=(1, 2)).square() for gram in (gram_x, gram_y))
        xy_B = (gram_x * gram_y).sum((1, 2))
        size_B = x_BND.shape[1] if counts_B is None else counts_B
        least_B = torch.clamp_min(torch.as_tensor(size_B, device=xx_B.device) ** 2 * _GRAM_NOISE, collapsed)
        defined_B = (xx_B >= least_B) & (yy_B >= least_B)
        similarity_B, of_l, of_k = _slopes(xy_B, xx_B, yy_B, defined_B)
        if ctx.needs_input_grad[0]:
            slope = gram_y.mul_(of_l[:, None, None]).sub_(gram_x * of_k[:, None, None])
            # Rows of the slope sum to 0, so of the uncentred Gram matrix only its row means are left to add.
            along_BN = (slope * gram_x).sum(2) + (slope @ mean_x[:, :, None])[:, :, 0]
            slope *= inverse_x[:, None, :]
            slope.diagonal(dim1=1, dim2=2).sub_(along_BN * inverse_x)
            slope *= 2 * inverse_x[:, :, None]
            ctx.save_for_backward(x_BND, slope.to(x_BND.dtype))
        ctx.mark_non_differentiable(defined_B)
        return similarity_B, defined_B

    @staticmethod
    def backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, slope = ctx.saved_tensors
        with torch.no_grad():
            gradient_BND = torch.bmm((slope * grad_B[:, None, None]).to(slope.dtype), x_BND)
        return differentiable_once("RelationalCKA", gradient_BND, x_BND), None, None, None, None


def _centred_gram(x_BND: Tensor, mask_BN: Tensor | None, counts_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """H K H of normalised tokens, zeros where masked; the row means of K; and 1 / norm of each token."""
    gram = product(x_BND, x_BND.mT)
    inverse_BN = _inverse(gram.diagonal(dim1=1, dim2=2))
    gram *= inverse_BN[:, :, None]
    gram *= inverse_BN[:, None, :]
    count_B1 = x_BND.shape[1] if counts_B is None else counts_B.clamp_min(1)[:, None]
    mean_BN = gram.sum(2) / count_B1
    overall_B1 = mean_BN.sum(1, keepdim=True) / count_B1
    gram -= mean_BN[:, :, None]
    gram -= (mean_BN - overall_B1)[:, None, :]
    if mask_BN is not None:
        gram *= mask_BN[:, :, None]
        gram *= mask_BN[:, None, :]
    return gram, mean_BN, inverse_BN


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
        defined_B = (xx_B >= collapsed) & (yy_B >= collapsed)
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
    """Normalised and centred tokens of both sides next to each other, rounded once, and 1 / norm of the first side's."""
    dx = x_BND.shape[2]
    both_BND = x_BND.new_empty(*x_BND.shape[:2], dx + y_BND.shape[2])
    count_B1 = x_BND.shape[1] if counts_B is None else counts_B.clamp_min(1)[:, None]
    inverses = []
    for side_BND, out_BND in ((x_BND, both_BND[..., :dx]), (y_BND, both_BND[..., dx:])):
        inverse_BN = _inverse(torch.linalg.vector_norm(side_BND, dim=2, dtype=torch.float32).square())
        inverses.append(inverse_BN)
        if _kernels(side_BND):
            from gracekit.losses import _triton_cka

            mean_BD = _triton_cka.weighted_sum(side_BND, inverse_BN) / count_B1
            _triton_cka.centre(side_BND, inverse_BN, mean_BD, mask_BN, out_BND)
        else:
            unit_BND = side_BND * inverse_BN[:, :, None]
            centred_BND = unit_BND - (unit_BND.sum(1) / count_B1)[:, None, :]
            out_BND.copy_(centred_BND if mask_BN is None else centred_BND * mask_BN[:, :, None])
    return both_BND, inverses[0]


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
