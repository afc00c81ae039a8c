"""Group-wise quantisation in float64 and textbook order, sharing nothing with the library."""

import math

import torch


def codes(weight, scale, bits):
    """Integer codes of (out, in) weights for (out, groups) scales, one number at a time."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    outputs, inputs = weight.shape
    group_size = inputs // scale.shape[1]
    result = torch.empty(outputs, inputs, dtype=torch.int64)
    for row, (weights, scales) in enumerate(zip(weight.tolist(), scale.tolist(), strict=True)):
        for column, value in enumerate(weights):
            result[row, column] = min(max(round(value / scales[column // group_size]), low), high)
    return result


def fake_quantize(weight, scale, bits):
    group_size = weight.shape[1] // scale.shape[1]
    return codes(weight, scale, bits).double() * scale.double().repeat_interleave(group_size, dim=1)


def gradients(weight, scale, grad, bits):
    """(dL/dW, dL/dtheta) of the straight-through estimator, theta being the logarithm of the scale."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    outputs, inputs = weight.shape
    group_size = inputs // scale.shape[1]
    grad_weight = torch.zeros(outputs, inputs, dtype=torch.float64)
    grad_theta = torch.zeros(outputs, scale.shape[1], dtype=torch.float64)
    for row in range(outputs):
        for column in range(inputs):
            s, g = float(scale[row, column // group_size]), float(grad[row, column])
            ratio = float(weight[row, column]) / s
            if low <= round(ratio) <= high:
                grad_weight[row, column] = g
                slope = round(ratio) - ratio
            else:
                slope = low if ratio < 0 else high
            grad_theta[row, column // group_size] += s * g * slope
    return grad_weight, grad_theta


def naive_fake_quantize(weight, log_scale, bits):
    """LSQ as its paper's listing has it (Esser et al., appendix B), by torch's autograd: a dozen tensors of the weight's size."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = log_scale.exp().unsqueeze(-1)
    ratio = (weight.float().view(*log_scale.shape, -1) / scale).clamp(low, high)
    rounded = (ratio.round() - ratio).detach() + ratio
    return (rounded * scale).view_as(weight).to(weight.dtype)


def candidates(group, bits):
    """The twenty scales that initialisation tries for one group, and the squared error of each."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    peak = max(abs(value) for value in group)
    scales = [(0.3 + 0.9 * step / 19) * peak / high for step in range(20)]
    errors = [
        math.fsum((value - s * min(max(round(value / s), low), high)) ** 2 for value in group) if s else 0.0
        for s in scales
    ]
    return scales, errors


def unpack_awq(packed):
    """(rows, columns / 8) int32 in AWQ's GEMM order to unsigned 4-bit numbers (rows, columns)."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each nibble, lowest first, holds
    rows, words = packed.shape
    result = torch.empty(rows, words * 8, dtype=torch.int64)
    for row in range(rows):
        for word in range(words):
            value = int(packed[row, word]) & 0xFFFFFFFF
            for nibble, column in enumerate(order):
                result[row, word * 8 + column] = (value >> (4 * nibble)) & 15
    return result


def unpack_int32(packed, bits, columns):
    """(rows, words) int32, lowest bits first, to signed numbers (rows, columns) that were stored with an offset."""
    per_word = 32 // bits
    result = torch.empty(packed.shape[0], columns, dtype=torch.int64)
    for row in range(packed.shape[0]):
        for column in range(columns):
            value = int(packed[row, column // per_word]) & 0xFFFFFFFF
            result[row, column] = ((value >> (bits * (column % per_word))) & (2**bits - 1)) - 2 ** (bits - 1)
    return result
