"""inspect: reads every pending gradient once.

```
program (tensor, chunk):
    for each block of the chunk:                   # 16,384 elements a chunk
        total = sum over sources of float32(grad) * inv_scale
        square_sum += total * total
    partials[program] = square_sum                 # -> decide: the norm
    tallies[program, loss] = how many elements of the scaled gradient are zero or subnormal, the largest unscaled one
                                                   # -> report, on demand
    if square_sum is not finite:                   # an overflow, or only a square beyond FP32: read again
        for each source with a non-finite share, or all of them where only their sum overflows:
            stamps[tensor, loss] = attempt         # -> optimizer: which parameters overflowed
            found[loss] = attempt                  # -> decide: skip, and the votes
            tallies[program, loss] = how many elements, attempt
```

An `attempt` is the number of the step being tried, so stamps need no clearing. Programs that find the same loss
guilty store the same number: the race is harmless. Gradients without a scale (unscaled by `unscale_`) are not tallied.

Bytes per parameter: each source's gradient once: 2 (fp16, bf16) or 4 (FP32), or 0.5 ms for 10^9 fp16 parameters at
4.3 TB/s; a tally of 16 bytes a chunk. About 16 instructions an element, counted for sm_90 (an H200 issues 15 in the
time of 2 bytes), 4 of them before and behind the loop; in it, four are for the tallies and half of the others for a
compensated sum. That makes a lane's two FP32 numbers as good as one float64, so the norm and with it the clip
coefficient are the reference's, without float64 arithmetic on elements, which consumer GPUs do at 1/64 of FP32's rate.
With several sources each is tallied in a loop of its own, which finds the chunk (32 KB of fp16) in the cache.
"""

import triton
import triton.language as tl

from .fields import (
    ATTEMPT,
    FLOAT16,
    FLOAT32,
    LARGEST,
    LOSS,
    NONFINITE,
    NUMEL,
    ONLY_FLOAT16,
    ONLY_FLOAT32,
    ROW,
    SCALE_PTR,
    SKIPPED,
    SMALL,
    SOURCE,
    TAKEN,
    TALLY,
)
from .gradients import gradient, pending, share, source, unscaled
from .sums import GROUP, UNIT, add, finish

_ROOT_UNIT = tl.constexpr(16.0)  # squared: UNIT


@triton.jit(do_not_specialize=["num_losses"])
def _inspect_kernel(
    rows_ptr,  # int64[T, ROW]
    sources_ptr,  # int64[T, SOURCES, SOURCE]
    chunks_ptr,  # int32[P, 2]
    counts_ptr,  # int32[COUNTS]
    stamps_ptr,  # int32[T, L], written
    found_ptr,  # int32[L], written
    partials_ptr,  # float64[P], written
    tallies_ptr,  # int32[P, L, TALLY], written
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
    count, aligned = pending(source_ptr, SOURCES, True)
    size = tl.where(address != 0, tl.minimum(left, CHUNK), 0).to(tl.int32)  # an idle tensor adds up to 0

    first = (address, scale, kind)
    tally_ptr = tallies_ptr + program * num_losses * TALLY
    if SOURCES == 1 and KINDS > ONLY_FLOAT32:  # halves and FP32: one branch a program instead of one a block
        if kind == FLOAT32:
            square_sum = _read_one(first, source_ptr, tally_ptr, aligned, start, size, ONLY_FLOAT32, BLOCK)
        else:
            halves: tl.constexpr = KINDS - ONLY_FLOAT32
            square_sum = _read_one(first, source_ptr, tally_ptr, aligned, start, size, halves, BLOCK)
    elif SOURCES == 1:
        square_sum = _read_one(first, source_ptr, tally_ptr, aligned, start, size, KINDS, BLOCK)
    else:
        square_sum = _read_several(first, source_ptr, tally_ptr, count, aligned, start, size, SOURCES, KINDS, BLOCK)

    tl.store(partials_ptr + program, square_sum)
    if square_sum == float("inf"):
        attempt = tl.load(counts_ptr + TAKEN) + tl.load(counts_ptr + SKIPPED) + 1
        stamps_ptr += tensor * num_losses
        _stamp(source_ptr, count, start, size, attempt, stamps_ptr, found_ptr, tally_ptr, KINDS, BLOCK)


@triton.jit
def _read_one(first, source_ptr, tally_ptr, aligned, start, size, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares (see `finish`) of a tensor that has one source; counts it in the same pass."""
    offsets = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK // GROUP,), tl.float32)
    lost = tl.zeros((BLOCK // GROUP,), tl.float32)
    small = tl.zeros((BLOCK // GROUP,), tl.float32)
    largest = tl.zeros((BLOCK // GROUP,), tl.float32)
    inv_scale = tl.div_rn(1.0, first[1])  # see `share`
    tiny = _smallest_normal(first[2], KINDS)
    full = 0
    if aligned:
        full = size // (2 * BLOCK) * (2 * BLOCK)
    for offset in range(0, full, 2 * BLOCK):  # two blocks at a time: twice the bytes in flight
        a = gradient(first, start + offset, offsets, None, KINDS)
        b = gradient(first, start + offset + BLOCK, offsets, None, KINDS)
        squares, lost = add(squares, lost, _square(a, inv_scale, KINDS))
        squares, lost = add(squares, lost, _square(b, inv_scale, KINDS))
        small, largest = _tally(small, largest, a, tiny, None, BLOCK)
        small, largest = _tally(small, largest, b, tiny, None, BLOCK)
    for offset in range(full, size, BLOCK):
        mask = offset + offsets < size
        a = gradient(first, start + offset, offsets, mask, KINDS)
        squares, lost = add(squares, lost, _square(a, inv_scale, KINDS))
        small, largest = _tally(small, largest, a, tiny, mask, BLOCK)
    biggest = tl.max(largest) * inv_scale
    _store_tally(source_ptr, tally_ptr, tl.sum(small).to(tl.int32), biggest, size)
    square_sum = finish(squares, lost)
    return tl.where(biggest * biggest < float("inf"), square_sum, float("inf"))  # as if squares were added as they are


@triton.jit
def _read_several(
    first,
    source_ptr,
    tally_ptr,
    count,
    aligned,
    start,
    size,
    SOURCES: tl.constexpr,
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of squares (see `finish`) of the total; then counts each source, while the chunk is in the cache."""
    offsets = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK // GROUP,), tl.float32)
    lost = tl.zeros((BLOCK // GROUP,), tl.float32)
    full = 0
    if aligned:
        full = size // BLOCK * BLOCK
    for offset in range(0, full, BLOCK):  # two blocks at a time would spill
        a = unscaled(first, source_ptr, count, start + offset, offsets, None, SOURCES, KINDS)
        squares, lost = add(squares, lost, (a * a) * (1.0 / UNIT))
    for offset in range(full, size, BLOCK):
        mask = offset + offsets < size
        a = unscaled(first, source_ptr, count, start + offset, offsets, mask, SOURCES, KINDS)
        squares, lost = add(squares, lost, (a * a) * (1.0 / UNIT))
    for k in range(0, count):
        _tally_source(source_ptr + k * SOURCE, tally_ptr, aligned, start, size, KINDS, BLOCK)
    return finish(squares, lost)


@triton.jit
def _tally_source(source_ptr, tally_ptr, aligned, start, size, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    row = source(source_ptr)
    offsets = tl.arange(0, BLOCK)
    small = tl.zeros((BLOCK // GROUP,), tl.float32)
    largest = tl.zeros((BLOCK // GROUP,), tl.float32)
    tiny = _smallest_normal(row[2], KINDS)
    full = 0
    if aligned:
        full = size // BLOCK * BLOCK
    for offset in range(0, full, BLOCK):
        a = gradient(row, start + offset, offsets, None, KINDS)
        small, largest = _tally(small, largest, a, tiny, None, BLOCK)
    for offset in range(full, size, BLOCK):
        mask = offset + offsets < size
        a = gradient(row, start + offset, offsets, mask, KINDS)
        small, largest = _tally(small, largest, a, tiny, mask, BLOCK)
    _store_tally(source_ptr, tally_ptr, tl.sum(small).to(tl.int32), tl.max(largest) * tl.div_rn(1.0, row[1]), size)


@triton.jit
def _tally(small, largest, g, tiny, mask, BLOCK: tl.constexpr):
    """Counts a block: elements below `tiny`, and the largest magnitude; each over groups that one thread holds.

    The count is a float because a comparison can give 1.0 in one instruction, and integer units are busy.
    """
    size = tl.abs(g)
    below = size < tiny
    if mask is not None:
        below = below & mask
    below = tl.reshape(tl.where(below, 1.0, 0.0), (BLOCK // GROUP, GROUP))
    size = tl.reshape(size, (BLOCK // GROUP, GROUP))
    return small + tl.sum(below, axis=1), tl.maximum(largest, tl.max(size, axis=1))


@triton.jit
def _smallest_normal(kind, KINDS: tl.constexpr):
    if KINDS == ONLY_FLOAT16:
        tiny = 6.103515625e-05  # 2^-14
    else:
        tiny = tl.where(kind == FLOAT16, 6.103515625e-05, 1.1754943508222875e-38)  # 2^-126: bf16, FP32
    return tiny


@triton.jit
def _store_tally(source_ptr, tally_ptr, small, largest, size):
    """`tally_ptr` is the program's. An overflow, if any, is entered later, by `_stamp`."""
    if (size > 0) & (tl.load(source_ptr + SCALE_PTR) != 0):
        own_ptr = tally_ptr + tl.load(source_ptr + LOSS) * TALLY
        tl.store(own_ptr + SMALL, small)
        tl.store(own_ptr + LARGEST, largest.to(tl.int32, bitcast=True))


@triton.jit
def _square(g, inv_scale, KINDS: tl.constexpr):
    """The square of the unscaled gradient, as a multiple of UNIT."""
    if KINDS == ONLY_FLOAT16:  # one multiplication less; where the factor is so small that it rounds, squares are 0
        x = g * (inv_scale * (1.0 / _ROOT_UNIT))
        square = x * x
    else:
        x = g * inv_scale
        square = (x * x) * (1.0 / UNIT)
    return square


@triton.jit
def _stamp(
    source_ptr,
    count,
    start,
    size,
    attempt,
    stamps_ptr,  # of this tensor
    found_ptr,
    tally_ptr,  # of this program
    KINDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Marks the losses that overflowed in this chunk. Rare, so it is short rather than fast."""
    offsets = tl.arange(0, BLOCK)
    for k in range(0, count):
        guilty = tl.zeros((BLOCK,), tl.int32)
        for offset in range(0, size, BLOCK):
            mask = offset + offsets < size
            own = tl.zeros((BLOCK,), tl.int32)
            some = tl.zeros((BLOCK,), tl.int32)
            total = tl.full((BLOCK,), -0.0, tl.float32)  # -0 + x is x, for every x
            for j in range(0, count):
                x = share(source(source_ptr + j * SOURCE), start + offset, offsets, mask, KINDS)
                total = total + x
                some = some | _overflowed(x)
                own = own | tl.where(j == k, _overflowed(x), 0)
            guilty += own | (_overflowed(total) & (1 - some))  # or only the sum
        elements = tl.sum(guilty)
        if elements != 0:
            loss = tl.load(source_ptr + k * SOURCE + LOSS)
            tl.store(stamps_ptr + loss, attempt)
            tl.store(found_ptr + loss, attempt)
            if tl.load(source_ptr + k * SOURCE + SCALE_PTR) != 0:
                own_ptr = tally_ptr + loss * TALLY
                tl.debug_barrier()  # after the largest finite one was entered there
                tl.store(own_ptr + LARGEST, 0x7F800000)  # inf
                tl.store(own_ptr + NONFINITE, elements)
                tl.store(own_ptr + ATTEMPT, attempt)


@triton.jit
def _overflowed(x):
    """1 where infinite or NaN, else 0; by the bits: a maximum would drop NaN in the interpreter."""
    return ((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000).to(tl.int32)
