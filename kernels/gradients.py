"""The unscaled gradient of one tensor, as inspect and update read it.

```
x_k   = float32(grad_k) * inv_scale_k        each source k: the gradient of one loss, with the scale behind it
total = x_0 + x_1 + ...                      in order of loss_id, FP32
```

A block is read without a mask where it is full and everything lies on 16 bytes; `mask=None` says so. (A mask whose
bound the compiler does not know turns every vector access into scalar ones.)
"""

import triton
import triton.language as tl

from .fields import (
    ALIGNED,
    BFLOAT16,
    FLOAT32,
    GRAD_FORMAT,
    GRAD_PTR,
    HALVES,
    KIND_MASK,
    ONLY_FLOAT16,
    ONLY_FLOAT32,
    SCALE_PTR,
    SOURCE,
)


@triton.jit
def element_ptr(address, start, mask, DTYPE: tl.constexpr):
    """Pointer to element `start` (int64) of the tensor at `address` (int64)."""
    ptr = address.to(tl.pointer_type(DTYPE)) + start
    if mask is None:
        ptr = tl.multiple_of(ptr, 16)  # counts only on a pointer; on the int64 it is lost
    return ptr


@triton.jit
def read(ptr, mask):
    """A block; 0 where masked."""
    if mask is None:
        return tl.load(ptr)
    else:  # not the end of the function: a branch at compile time prunes only itself
        return tl.load(ptr, mask=mask, other=0)


@triton.jit
def write(ptr, value, mask):
    """Stores a block, but where masked."""
    if mask is None:
        tl.store(ptr, value)
    else:
        tl.store(ptr, value, mask=mask)


@triton.jit
def source(source_ptr):
    """A row of the source table: (address of the gradient, its scale, its kind)."""
    address = tl.load(source_ptr + GRAD_PTR)
    kind = tl.load(source_ptr + GRAD_FORMAT).to(tl.int32) & KIND_MASK
    scale_address = tl.load(source_ptr + SCALE_PTR)
    scale_ptr = scale_address.to(tl.pointer_type(tl.float32))
    return address, tl.load(scale_ptr, mask=scale_address != 0, other=1.0), kind


@triton.jit
def pending(source_ptr, SOURCES: tl.constexpr, SPREAD: tl.constexpr):
    """How many sources a tensor has, and whether all of them lie on 16 bytes.

    SPREAD: a row a thread, added up across threads; it needs fewer registers than one row after the other.
    """
    if SOURCES == 1:
        return 1, (tl.load(source_ptr + GRAD_FORMAT) & ALIGNED) != 0
    elif SPREAD:
        row_ptr = source_ptr + tl.arange(0, SOURCES) * SOURCE
        present = tl.load(row_ptr + GRAD_PTR) != 0
        misaligned = present & ((tl.load(row_ptr + GRAD_FORMAT) & ALIGNED) == 0)
        return tl.sum(present.to(tl.int32)), tl.sum(misaligned.to(tl.int32)) == 0
    else:
        count = 0
        wrong = 0
        for k in tl.static_range(SOURCES):
            here = (tl.load(source_ptr + k * SOURCE + GRAD_PTR) != 0).to(tl.int32)
            count += here
            wrong += here & ((tl.load(source_ptr + k * SOURCE + GRAD_FORMAT) & ALIGNED) == 0).to(tl.int32)
        return count, wrong == 0


@triton.jit
def _read_half(address, kind, start, offsets, mask, KINDS: tl.constexpr):
    if KINDS == ONLY_FLOAT16:
        return read(element_ptr(address, start, mask, tl.float16) + offsets, mask).to(tl.float32)
    else:
        raw = read(element_ptr(address, start, mask, tl.int16) + offsets, mask)
        wide = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)  # a bf16 is the upper half of an FP32
        if KINDS == HALVES:
            wide = tl.where(kind == BFLOAT16, wide, raw.to(tl.float16, bitcast=True).to(tl.float32))
        return wide


@triton.jit
def gradient(row, start, offsets, mask, KINDS: tl.constexpr):
    """float32(grad_k) of the block that begins at element `start`, from a row that `source` read; 0 where masked."""
    address, _, kind = row
    if KINDS == ONLY_FLOAT32:
        g = read(element_ptr(address, start, mask, tl.float32) + offsets, mask)
    elif KINDS < ONLY_FLOAT32:
        g = _read_half(address, kind, start, offsets, mask, KINDS)
    else:
        if kind == FLOAT32:
            g = read(element_ptr(address, start, mask, tl.float32) + offsets, mask)
        else:
            g = _read_half(address, kind, start, offsets, mask, KINDS - ONLY_FLOAT32)
    return g


@triton.jit
def share(row, start, offsets, mask, KINDS: tl.constexpr):
    """x_k of a block: the gradient, unscaled."""
    g = gradient(row, start, offsets, mask, KINDS)
    # Bitwise float32(1 / float64(scale)): 53 bits are at least 2 * 24 + 2, so rounding twice rounds as once. A float64
    # division by every thread would take consumer GPUs longer than the gradient's bytes. It stands below the load,
    # which need not wait for the scale.
    return g * tl.div_rn(1.0, row[1])


@triton.jit
def unscaled(first, source_ptr, count, start, offsets, mask, SOURCES: tl.constexpr, KINDS: tl.constexpr):
    """The total of a block. The row of the first source is at hand; the others, if any, are read here."""
    total = share(first, start, offsets, mask, KINDS)
    if SOURCES > 1:
        for k in range(1, count):
            total = total + share(source(source_ptr + k * SOURCE), start, offsets, mask, KINDS)
    return total
