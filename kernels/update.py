"""update: unscale, clip, the rule, and the rounding to the parameter's type, in one pass.

```
program (tensor, chunk):                           # 1,024 elements; returns at once where the step is skipped
    grad = (x_0 + x_1 + ...) * clip                # the sources, as in inspect
    master, slots = RULE(master, grad, slots, scalars[tensor])
    master, slots                                  # -> the next step
    param = round(master)                          # -> the next forward pass; not where it is its own master
```

Bytes per parameter for Adam: gradient 2, master 4 + 4, moments 8 + 8, parameter 2: 28, or 6.5 ms for 10^9 parameters
at 4.3 TB/s. A thread has 4 elements: 16-byte accesses to FP32, 8-byte ones to fp16, and no change of layout between.
48 registers: 5 blocks of threads, 70 KB of loads in flight a multiprocessor (counted for sm_90).
"""

import triton
import triton.language as tl

from .fields import (
    ALIGNED,
    BFLOAT16,
    CLIP,
    FLOAT32,
    FORMAT,
    HALVES,
    KIND_MASK,
    MASTER_PTR,
    NUMEL,
    ONLY_FLOAT16,
    ONLY_FLOAT32,
    PARAM_PTR,
    ROW,
    SCALARS,
    SKIP,
    SLOT_PTR,
    SOURCE,
)
from .gradients import element_ptr, pending, read, source, unscaled, write

_PER_THREAD = tl.constexpr(4)  # elements of a full block


@triton.jit
def _update_kernel(
    rows_ptr,  # int64[T, ROW]
    sources_ptr,  # int64[T, SOURCES, SOURCE]
    chunks_ptr,  # int32[P, 2]
    scalars_ptr,  # float32[T, SCALARS]
    decision_ptr,  # float32[DECISION]
    RULE: tl.constexpr,  # a function of rules.RULES
    SLOTS: tl.constexpr,  # how many slots it has
    SOURCES: tl.constexpr,
    KINDS: tl.constexpr,  # set of the gradients' kinds
    PARAM_KINDS: tl.constexpr,  # set of the kinds of the parameters that are written
    CHUNK: tl.constexpr,
):
    # Each wait for a table is one for memory: whatever does not depend on another load is loaded before it is needed.
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
    param = (tl.load(row_ptr + PARAM_PTR), format & KIND_MASK)  # address 0: nothing to write
    state = (tl.load(row_ptr + MASTER_PTR),)
    for i in tl.static_range(SLOTS):
        state = state + (tl.load(row_ptr + SLOT_PTR + i),)
    source_ptr = sources_ptr + tensor * (SOURCES * SOURCE)
    address, scale, kind = source(source_ptr)
    count, aligned = pending(source_ptr, SOURCES, False)

    active = address != 0  # an idle tensor is left alone
    work = ((address, scale, kind), source_ptr, count, state, param, scalars_ptr + tensor * SCALARS, clip)
    if active & aligned & ((format & ALIGNED) != 0) & (left >= CHUNK):
        offsets = tl.arange(0, CHUNK)
        _update_block(work, start, offsets, None, RULE, SLOTS, SOURCES, KINDS, PARAM_KINDS)
    elif active:  # an element a thread: in one layout, where a masked block would be stored in another than it is read
        end = start + tl.minimum(left, CHUNK)
        for first in range(start, end, CHUNK // _PER_THREAD):
            offsets = tl.arange(0, CHUNK // _PER_THREAD)
            _update_block(work, first, offsets, offsets < end - first, RULE, SLOTS, SOURCES, KINDS, PARAM_KINDS)


@triton.jit
def _update_block(
    work,  # what the tables say of this tensor
    start,
    offsets,
    mask,
    RULE: tl.constexpr,
    SLOTS: tl.constexpr,
    SOURCES: tl.constexpr,
    KINDS: tl.constexpr,
    PARAM_KINDS: tl.constexpr,
):
    pointers, values = read_block(work, start, offsets, mask, SLOTS, SOURCES, KINDS)
    master, grad, slots, scalars = values

    master, slots = RULE(master, grad, slots, scalars)

    write(pointers[0], master, mask)
    for i in tl.static_range(SLOTS):
        write(pointers[1 + i], slots[i], mask)
    if PARAM_KINDS != 0:
        param_address, param_kind = work[4]
        if param_address != 0:
            _write_param(param_address, param_kind, start, offsets, master, mask, PARAM_KINDS)


@triton.jit
def read_block(
    work,  # what the tables say of this tensor
    start,
    offsets,
    mask,
    SLOTS: tl.constexpr,
    SOURCES: tl.constexpr,
    KINDS: tl.constexpr,
):
    """Pointers to a block of master and slots; and what a rule gets: master, gradient, slots, scalars."""
    first, source_ptr, count, state, _, scalars_ptr, clip = work
    pointers = (element_ptr(state[0], start, mask, tl.float32) + offsets,)
    master = read(pointers[0], mask)
    slots = ()
    for i in tl.static_range(SLOTS):
        pointers = pointers + (element_ptr(state[1 + i], start, mask, tl.float32) + offsets,)
        slots = slots + (read(pointers[1 + i], mask),)
    total = unscaled(first, source_ptr, count, start, offsets, mask, SOURCES, KINDS)
    scalars = ()
    for j in tl.static_range(SCALARS):  # those that the rule does not use are never loaded
        scalars = scalars + (tl.load(scalars_ptr + j),)
    return pointers, (master, total * clip, slots, scalars)


@triton.jit
def _write_param(address, kind, start, offsets, value, mask, KINDS: tl.constexpr):
    """Rounds to the parameter's kind, to nearest even."""
    if KINDS == ONLY_FLOAT32:
        write(element_ptr(address, start, mask, tl.float32) + offsets, value, mask)
    elif KINDS < ONLY_FLOAT32:
        _write_half(address, kind, start, offsets, value, mask, KINDS)
    else:
        if kind == FLOAT32:
            write(element_ptr(address, start, mask, tl.float32) + offsets, value, mask)
        else:
            _write_half(address, kind, start, offsets, value, mask, KINDS - ONLY_FLOAT32)


@triton.jit
def _write_half(address, kind, start, offsets, value, mask, KINDS: tl.constexpr):
    if KINDS == ONLY_FLOAT16:
        write(element_ptr(address, start, mask, tl.float16) + offsets, value.to(tl.float16), mask)
    else:
        raw = _bfloat16_bits(value)
        if KINDS == HALVES:
            raw = tl.where(kind == BFLOAT16, raw, value.to(tl.float16).to(tl.int16, bitcast=True))
        write(element_ptr(address, start, mask, tl.int16) + offsets, raw, mask)


@triton.jit
def _bfloat16_bits(x):
    """The bf16 nearest to x, by integers: sm_75 has no such cast, and the interpreter's does not round to nearest."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)  # rounding up could carry a NaN to infinity, or to zero
