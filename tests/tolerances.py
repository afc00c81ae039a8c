"""One table of how far a result may lie from the float64 oracle, by the dtype it was computed from.

rtol is a few units in the last place of the *computing* dtype (float32 for half inputs: losses compute there) times the
length of the sums involved; gradients of half inputs are rounded once to their own dtype, hence the larger figures.
"""

import torch

VALUE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 2e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-5, "atol": 1e-6},
}
GRADIENT = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-5},  # 2^-8 relative, one rounding
    torch.float16: {"rtol": 2e-3, "atol": 1e-6},  # 2^-11 relative, and its subnormals
}
