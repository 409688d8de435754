"""Sums of squares of a program's elements: in FP32, as good as if float64 had added them.

Half of the work compensates: a lane's two FP32 numbers are as good as one float64, so norms, and with them the clip
coefficient and trust ratios, are the reference's, without float64 arithmetic on elements, which consumer GPUs do at
1/64 of FP32's rate.
"""

import triton
import triton.language as tl

# Squares are added up as multiples of this, so that the sum of a lane (at most 64 squares) stays below FP32's limit
# whenever each of its squares does.
UNIT = tl.constexpr(256.0)
GROUP = tl.constexpr(4)  # neighbours in one thread's registers at every layout of a block: adding them up is local


@triton.jit
def finish(squares, lost):
    """The sum of squares over `size` elements, float64; inf where it is not finite."""
    total = tl.sum(squares.to(tl.float64) + lost.to(tl.float64)) * UNIT
    return tl.where(total < float("inf"), total, float("inf"))  # inf - inf, once infinite


@triton.jit
def add(squares, lost, square):
    """Adds each group of neighbours to one sum: few sums in registers leave room for more threads."""
    even, odd = tl.split(tl.reshape(square, (square.shape[0] // 2, 2)))
    a, c = tl.split(tl.reshape(even, (square.shape[0] // GROUP, 2)))
    b, d = tl.split(tl.reshape(odd, (square.shape[0] // GROUP, 2)))
    squares, lost = _add_exactly(squares, lost, a)
    squares, lost = _add_exactly(squares, lost, b)
    squares, lost = _add_exactly(squares, lost, c)
    return _add_exactly(squares, lost, d)


@triton.jit
def _add_exactly(squares, lost, square):
    """Adds to `squares`, and what the addition rounds away, exactly, to `lost` (Dekker's Fast2Sum)."""
    total = squares + square
    lost += tl.minimum(squares, square) - (total - tl.maximum(squares, square))
    return total, lost
