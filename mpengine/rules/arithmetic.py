"""What the rules compute with beyond `+ - * /`: in the same steps, and so with the same bits, on every device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def power(base: Any, exponent: np.ndarray) -> np.ndarray:
    """base**exponent in float64 by repeated squaring: the same 31 multiplications here and on the device.

    Args:
        base: float64, a number or one for each tensor.
        exponent: Integers in [0, 2^31), shape (tensors,).
    """
    result = np.ones(len(exponent))
    factor = np.array(np.broadcast_to(base, len(exponent)))
    for bit in range(31):
        result = np.where((exponent >> bit) & 1 == 1, result * factor, result)
        factor = factor * factor
    return result


def lerp(start: Tensor, end: Tensor, weight: float) -> Tensor:
    """As torch's `start.lerp(end, weight)`: from the nearer end, so that a weight of 1 gives `end` itself."""
    way = end - start
    return end - way * (1.0 - weight) if weight >= 0.5 else start + way * weight


def sqrt_rn(x: Tensor) -> Tensor:
    """The correctly rounded FP32 square root (torch's own, on a CPU, is not)."""
    if x.device.type != "cpu":
        return torch.sqrt(x)
    root = torch.empty_like(x)  # NumPy by itself would return a number where x has no dimension
    np.sqrt(x.numpy(), out=root.numpy())
    return root


def square_sum(x: Tensor) -> float:
    """Of FP32 elements, each square rounded to FP32, added in float64; infinite where it is not finite."""
    total = float((x * x).sum(dtype=torch.float64))
    return total if math.isfinite(total) else math.inf
