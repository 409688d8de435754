"""settle: the scalars that update reads, of rules that depend on norms of each tensor, or keep numbers for it.

```
program (tensor):                                  # returns at once where the step is skipped
    norms = sqrt(sum of the tensor's partials)     # float64, in a fixed order
    scalars[tensor], cells = SETTLE(scalars[tensor], norms, cells)     # float64, rounded to FP32 once
```

Bytes: 16 for 16,384 parameters, and about 100 a tensor: latency, not bandwidth.
"""

import triton
import triton.language as tl

from .fields import CELL_PTR, GRAD_PTR, NORMS, ROW, SCALARS, SKIP, SOURCE, SPAN, SPAN_START, SPAN_STOP, SPAN_TENSOR


@triton.jit
def _settle_kernel(
    rows_ptr,  # int64[T, ROW]
    sources_ptr,  # int64[T, SOURCES, SOURCE]
    spans_ptr,  # int32[n, SPAN]
    scalars_ptr,  # float32[T, SCALARS], updated
    decision_ptr,  # float32[DECISION]
    partials_ptr,  # float64[P, NORMS]
    SETTLE: tl.constexpr,  # a function of rules.SETTLES
    COUNT: tl.constexpr,  # how many norms it reads
    CELLS: tl.constexpr,  # how many cells
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(decision_ptr + SKIP) != 0.0:
        return
    span_ptr = spans_ptr + tl.program_id(0) * SPAN
    tensor = tl.load(span_ptr + SPAN_TENSOR).to(tl.int64)
    start, stop = tl.load(span_ptr + SPAN_START), tl.load(span_ptr + SPAN_STOP)
    if tl.load(sources_ptr + tensor * (SOURCES * SOURCE) + GRAD_PTR) == 0:
        return

    norms = ()
    for j in tl.static_range(COUNT):
        norms = norms + (tl.sqrt(_sum(partials_ptr + j, start, stop, BLOCK)),)
    own_ptr = scalars_ptr + tensor * SCALARS
    scalars = ()
    for j in tl.static_range(SCALARS):
        scalars = scalars + (tl.load(own_ptr + j).to(tl.float64),)
    cell_ptrs = ()
    cells = ()
    for j in tl.static_range(CELLS):
        address = tl.load(rows_ptr + tensor * ROW + CELL_PTR + j)
        cell_ptrs = cell_ptrs + (address.to(tl.pointer_type(tl.float32)),)
        cells = cells + (tl.load(cell_ptrs[j]).to(tl.float64),)

    scalars, cells = SETTLE(scalars, norms, cells)
    tl.static_assert(len(scalars) <= SCALARS, "a rule settles more scalars than layout.SCALARS")

    one = tl.full((), 1.0, tl.float64)  # makes a number of a constant, and nothing else of a number
    tl.debug_barrier()  # every warp has read what is overwritten now
    for j in tl.static_range(len(scalars)):
        tl.store(own_ptr + j, (scalars[j] * one).to(tl.float32))
    for j in tl.static_range(CELLS):
        tl.store(cell_ptrs[j], (cells[j] * one).to(tl.float32))


@triton.jit
def _sum(partials_ptr, start, stop, BLOCK: tl.constexpr):
    lanes = tl.zeros((BLOCK,), tl.float64)
    for first in range(start, stop, BLOCK):
        i = (first + tl.arange(0, BLOCK)).to(tl.int64)
        lanes += tl.load(partials_ptr + i * NORMS, mask=i < stop, other=0.0)
    return tl.sum(lanes)
