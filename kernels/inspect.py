"""inspect: reads every pending gradient once.

```
program (tensor, chunk):
    for each block of the chunk:                   # 16,384 elements a chunk
        total = sum over sources of float32(grad) * inv_scale
        square_sum += total * total
    partials[program] = square_sum                 # -> decide: the norm
    if square_sum is not finite:                   # an overflow, or only a square beyond FP32: read again
        for each source with a non-finite share, or all of them where only their sum overflows:
            stamps[tensor, loss] = attempt         # -> optimizer: which parameters overflowed
            found[loss] = attempt                  # -> decide: skip, and the votes
```

An `attempt` is the number of the step being tried, so stamps need no clearing. Programs that find the same loss
guilty store the same number: the race is harmless.

Bytes per parameter: each source's gradient once: 2 (fp16, bf16) or 4 (FP32), or 0.5 ms for 10^9 fp16 parameters at
4.3 TB/s. About 10 instructions an element (an H200 issues 15 in the time of 2 bytes), half of them a compensated sum:
it makes a lane's two FP32 numbers as good as one float64, so the norm and with it the clip coefficient are the
reference's, without float64 arithmetic on elements, which consumer GPUs do at 1/64 of FP32's rate.
"""

import triton
import triton.language as tl

from .fields import FLOAT32, LOSS, NUMEL, ONLY_FLOAT32, ROW, SKIPPED, SOURCE, TAKEN
from .gradients import pending, share, source, unscaled

# Squares are added up as multiples of this, so that the sum of a lane (at most 16 squares) stays below FP32's limit
# whenever each of its squares does.
_UNIT = tl.constexpr(32.0)


@triton.jit(do_not_specialize=["num_losses"])
def _inspect_kernel(
    rows_ptr,  # int64[T, ROW]
    sources_ptr,  # int64[T, SOURCES, SOURCE]
    chunks_ptr,  # int32[P, 2]
    counts_ptr,  # int32[COUNTS]
    stamps_ptr,  # int32[T, L], written
    found_ptr,  # int32[L], written
    partials_ptr,  # float64[P], written
    num_losses,
    SOURCES: tl.constexpr,
    KINDS: tl.constexpr,  # set of the gradients' kinds
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + program * 2).to(tl.int64)
    start = tl.load(chunks_ptr + program * 2 + 1).to(tl.int64) * CHUNK
    source_ptr = sources_ptr + tensor * (SOURCES * SOURCE)
    left = tl.load(rows_ptr + tensor * ROW + NUMEL) - start
    address, scale, kind = source(source_ptr)
    count, aligned = pending(source_ptr, SOURCES)
    size = tl.where(address != 0, tl.minimum(left, CHUNK), 0).to(tl.int32)  # an idle tensor adds up to 0

    first = (address, scale, kind)
    if SOURCES == 1 and KINDS > ONLY_FLOAT32:  # halves and FP32: one branch a program instead of one a block
        if kind == FLOAT32:
            square_sum = _square_sum(first, source_ptr, count, aligned, start, size, SOURCES, ONLY_FLOAT32, BLOCK)
        else:
            halves: tl.constexpr = KINDS - ONLY_FLOAT32
            square_sum = _square_sum(first, source_ptr, count, aligned, start, size, SOURCES, halves, BLOCK)
    else:
        square_sum = _square_sum(first, source_ptr, count, aligned, start, size, SOURCES, KINDS, BLOCK)

    tl.store(partials_ptr + program, square_sum)
    if square_sum == float("inf"):
        attempt = tl.load(counts_ptr + TAKEN) + tl.load(counts_ptr + SKIPPED) + 1
        _stamp(source_ptr, count, start, size, attempt, stamps_ptr + tensor * num_losses, found_ptr, KINDS, BLOCK)


@triton.jit
def _square_sum(
    first, source_ptr, count, aligned, start, size, SOURCES: tl.constexpr, KINDS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of squares of the unscaled total over `size` elements, float64; inf where it is not finite."""
    offsets = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    lost = tl.zeros((BLOCK,), tl.float32)
    full = 0
    if aligned:
        full = size // (2 * BLOCK) * (2 * BLOCK)
    for offset in range(0, full, 2 * BLOCK):  # two blocks at a time: twice the bytes in flight
        here = start + offset
        a = unscaled(first, source_ptr, count, here, offsets, None, SOURCES, KINDS)
        b = unscaled(first, source_ptr, count, here + BLOCK, offsets, None, SOURCES, KINDS)
        squares, lost = _add_square(squares, lost, a)
        squares, lost = _add_square(squares, lost, b)
    for offset in range(full, size, BLOCK):
        mask = offset + offsets < size
        a = unscaled(first, source_ptr, count, start + offset, offsets, mask, SOURCES, KINDS)
        squares, lost = _add_square(squares, lost, a)
    total = tl.sum(squares.to(tl.float64) + lost.to(tl.float64)) * _UNIT
    return tl.where(total < float("inf"), total, float("inf"))  # inf - inf, once infinite


@triton.jit
def _add_square(squares, lost, x):
    """Adds x * x to `squares`, and what the addition rounds away, exactly, to `lost` (Dekker's Fast2Sum)."""
    square = (x * x) * (1.0 / _UNIT)
    total = squares + square
    lost += tl.minimum(squares, square) - (total - tl.maximum(squares, square))
    return total, lost


@triton.jit
def _stamp(
    source_ptr,
    count,
    start,
    size,
    attempt,
    stamps_ptr,  # of this tensor
    found_ptr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Marks the losses that overflowed in this chunk. Rare, so it is short rather than fast."""
    offsets = tl.arange(0, BLOCK)
    guilty = tl.zeros((BLOCK,), tl.int32)  # bit k: source k
    for offset in range(0, size, BLOCK):
        mask = offset + offsets < size
        flags = tl.zeros((BLOCK,), tl.int32)
        total = tl.full((BLOCK,), -0.0, tl.float32)  # -0 + x is x, for every x
        for k in range(0, count):
            x = share(source(source_ptr + k * SOURCE), start + offset, offsets, mask, KINDS)
            total = total + x
            flags = flags | (_overflowed(x).to(tl.int32) << k)
        only_the_sum = _overflowed(total) & (flags == 0)
        guilty = guilty | tl.where(only_the_sum, (1 << count) - 1, flags)
    for k in range(0, count):
        if tl.max((guilty >> k) & 1) != 0:
            loss = tl.load(source_ptr + k * SOURCE + LOSS)
            tl.store(stamps_ptr + loss, attempt)
            tl.store(found_ptr + loss, attempt)


@triton.jit
def _overflowed(x):
    """Infinite or NaN, by the bits: a maximum would drop NaN in the interpreter."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000
