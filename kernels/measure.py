"""measure: what a rule wants to know of each tensor before it steps: norms, LAMB's of the weight and of the direction.

```
program (tensor, chunk):                           # 16,384 elements; returns at once where the step is skipped
    for each block of the chunk:
        x, ... = MEASURE(master, grad, slots, scalars[tensor])     # grad and its sources as in update
        square_sums += x * x, ...
    partials[program] = square_sums                # -> settle
```

Bytes per parameter for LAMB: gradient 2, master 4, moments 8: 14, or 3.3 ms for 10^9 parameters at 4.3 TB/s, before the
28 of update. Rules that measure nothing have no such pass.
"""

import triton
import triton.language as tl

from .fields import ALIGNED, CLIP, FORMAT, MASTER_PTR, NORMS, NUMEL, ROW, SCALARS, SKIP, SLOT_PTR, SOURCE
from .gradients import pending, source
from .sums import GROUP, UNIT, add, finish
from .update import read_block


@triton.jit
def _measure_kernel(
    rows_ptr,  # int64[T, ROW]
    sources_ptr,  # int64[T, SOURCES, SOURCE]
    chunks_ptr,  # int32[P, 2]
    scalars_ptr,  # float32[T, SCALARS]
    decision_ptr,  # float32[DECISION]
    partials_ptr,  # float64[P, NORMS], written
    MEASURE: tl.constexpr,  # a function of rules.MEASURES
    COUNT: tl.constexpr,  # how many norms it has
    SLOTS: tl.constexpr,
    SOURCES: tl.constexpr,
    KINDS: tl.constexpr,  # set of the gradients' kinds
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    skip = tl.load(decision_ptr + SKIP)
    clip = tl.load(decision_ptr + CLIP)
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + program * 2).to(tl.int64)
    start = tl.load(chunks_ptr + program * 2 + 1).to(tl.int64) * CHUNK
    if skip != 0.0:
        return

    row_ptr = rows_ptr + tensor * ROW
    left = tl.load(row_ptr + NUMEL) - start
    format = tl.load(row_ptr + FORMAT)
    state = (tl.load(row_ptr + MASTER_PTR),)
    for i in tl.static_range(SLOTS):
        state = state + (tl.load(row_ptr + SLOT_PTR + i),)
    source_ptr = sources_ptr + tensor * (SOURCES * SOURCE)
    address, scale, kind = source(source_ptr)
    count, aligned = pending(source_ptr, SOURCES, False)
    size = tl.where(address != 0, tl.minimum(left, CHUNK), 0).to(tl.int32)  # of an idle tensor nothing is read

    work = ((address, scale, kind), source_ptr, count, state, (), scalars_ptr + tensor * SCALARS, clip)
    offsets = tl.arange(0, BLOCK)
    first = tl.zeros((BLOCK // GROUP,), tl.float32)
    first_lost = tl.zeros((BLOCK // GROUP,), tl.float32)
    second = tl.zeros((BLOCK // GROUP,), tl.float32)
    second_lost = tl.zeros((BLOCK // GROUP,), tl.float32)
    full = 0
    if aligned & ((format & ALIGNED) != 0):
        full = size // BLOCK * BLOCK
    for offset in range(0, full, BLOCK):
        _, values = read_block(work, start + offset, offsets, None, SLOTS, SOURCES, KINDS)
        measured = MEASURE(values[0], values[1], values[2], values[3])
        first, first_lost = add(first, first_lost, _square(measured[0]))
        if COUNT > 1:
            second, second_lost = add(second, second_lost, _square(measured[1]))
    for offset in range(full, size, BLOCK):
        mask = offset + offsets < size
        _, values = read_block(work, start + offset, offsets, mask, SLOTS, SOURCES, KINDS)
        measured = MEASURE(values[0], values[1], values[2], values[3])
        first, first_lost = add(first, first_lost, tl.where(mask, _square(measured[0]), 0.0))
        if COUNT > 1:
            second, second_lost = add(second, second_lost, tl.where(mask, _square(measured[1]), 0.0))
    tl.store(partials_ptr + program * NORMS, finish(first, first_lost))
    if COUNT > 1:
        tl.store(partials_ptr + program * NORMS + 1, finish(second, second_lost))


@triton.jit
def _square(x):
    """As a multiple of UNIT; infinite where the square is."""
    return (x * x) * (1.0 / UNIT)
