"""What several rules compute with; `mpengine.rules.arithmetic` specifies it."""

import triton
import triton.language as tl


@triton.jit
def power(base, exponent):
    """base**exponent in float64 by repeated squaring, the reference's multiplications.

    It ends at the highest bit of any exponent: the reference's further squarings never reach a result.
    """
    result = tl.full(base.shape, 1.0, tl.float64)
    factor = base
    while tl.max(exponent) > 0:
        result = tl.where((exponent & 1) == 1, result * factor, result)
        factor = factor * factor
        exponent = exponent >> 1
    return result


@triton.jit
def lerp(start, end, weight):
    """From the nearer end, as torch has it."""
    way = end - start
    return tl.where(weight >= 0.5, end - way * (1.0 - weight), start + way * weight)


@triton.jit
def assign(p, g, slots, c):
    """The gradient itself."""
    return g, slots


@triton.jit
def given(h, step):
    """The hyperparameters as they are: the scalars of a declared rule that has no function for them."""
    return h
