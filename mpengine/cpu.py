"""The CPU path: bit for bit `mpengine.reference`, on every core, and with a block's temporaries in the cache.

```
unit    = blocks of tensors, BLOCK elements in all: one large block, or many small tensors
inspect:  for each unit, on some thread: widen the gradients, unscale, tally, square, add up in float64
decide:   the reference's
update:   for each unit, on some thread: widen, unscale, clip, and the rule, one NumPy operation after another
```

A thread has two buffers of BLOCK FP32 numbers, and nothing else is allocated. NumPy does the arithmetic, as it rounds
after each operation; PyTorch widens and rounds fp16 and bf16, in pieces below the size at which it would start threads
of its own. Sums are taken block by block and stored by position, so they do not depend on the number of threads.

The blocks are larger than a core's own cache because the interpreter's lock changes hands at every operation, which
costs more than the way to the shared cache.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpengine import reference, workers
from mpengine.cpu_rules import RULES
from mpengine.kernels import layout
from mpengine.masters import Source, SourceTable, TensorTable, flat
from mpengine.rules import Rule

decide = reference.decide
update_scale = reference.update_scale

BLOCK = 8 * layout.INSPECT_CHUNK  # elements: 1 MiB of buffers a thread
_SERIAL = 1 << 15  # elements: PyTorch copies as many on the thread that asks for it


class _Block(NamedTuple):
    """Elements [start, stop) of a tensor of the table; `program` is the first of inspect's that has some of them."""

    tensor: int
    start: int
    stop: int
    program: int


class _Views(NamedTuple):
    """The memory of an entry, flat."""

    param: Tensor  # [numel]
    master: np.ndarray  # float32[numel]
    slots: tuple[np.ndarray, ...]  # float32[numel] each


class _Reading(NamedTuple):
    """A pending gradient, or a block of one."""

    grad: Tensor  # [n]
    inv_scale: float

    def cut(self, block: _Block) -> _Reading:
        """The gradient of a block."""
        if block.stop - block.start == len(self.grad):
            return self
        return _Reading(self.grad[block.start : block.stop], self.inv_scale)

    def takes(self, clip: float) -> bool:
        """Whether neither `grad * inv_scale` nor `inv_scale * clip` needs rounding: two factors are one then.

        An fp16 number is a multiple of 2^-24 below 2^16. What the bounds let through stays a normal FP32 number.
        """
        power_of_two = math.frexp(self.inv_scale)[0] == 0.5
        return (
            self.grad.dtype == torch.float16
            and power_of_two
            and 2.0**-60 <= self.inv_scale <= 2.0**60
            and 2.0**-60 <= clip <= 1.0
        )


class _Kind(NamedTuple):
    """A gradient's type, read as integers."""

    dtype: torch.dtype
    view: torch.dtype
    magnitude: Any  # all bits but the sign's
    widen: Callable[[np.ndarray], np.ndarray]  # from bits to float32

    def smallest_normal(self) -> Any:
        """Its bits."""
        return type(self.magnitude)(reference.SMALLEST_NORMAL[self.dtype])


_KINDS = {
    torch.float16: _Kind(torch.float16, torch.int16, np.int16(0x7FFF), lambda x: x.view(np.float16).astype(np.float32)),
    torch.bfloat16: _Kind(
        torch.bfloat16, torch.int16, np.int16(0x7FFF), lambda x: (x.astype(np.uint32) << 16).view(np.float32)
    ),
    torch.float32: _Kind(torch.float32, torch.int32, np.int32(0x7FFFFFFF), lambda x: x.view(np.float32)),
}


class _Scratch(threading.local):
    """The two buffers of one thread, which grow to the largest block that it has seen."""

    def __init__(self) -> None:
        self._both = np.empty((2, 0), np.float32)

    def take(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Two buffers, float32[size], of any content."""
        if size > self._both.shape[1]:
            self._both = np.empty((2, size), np.float32)
        return self._both[0, :size], self._both[1, :size]


_scratch = _Scratch()
_views: weakref.WeakKeyDictionary[TensorTable, list[_Views]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def inspect(table: TensorTable, sources: SourceTable) -> None:
    """Reads every pending gradient once; writes `table.stamps`, `.found`, `.partials` and `.tallies`.

    See `reference.inspect`. `partials` get the sum of each block in its first program.
    """
    attempt = int(table.counts.sum()) + 1
    table.partials.zero_()
    partials, tallies = table.partials.numpy(), table.tallies.numpy()
    readings = _readings(sources)

    def work(unit: list[_Block]) -> None:
        with np.errstate(all="ignore"):
            for block in unit:
                here = [r.cut(block) for r in readings[block.tensor]]
                for source, reading in zip(sources.entries[block.tensor], here, strict=True):
                    if source.scale is not None:
                        _tally(tallies[block.program :, source.loss_id], reading)
                partials[block.program] = _square_sum(here, block.stop - block.start)
                if not math.isfinite(partials[block.program]):  # an overflow, or only a square beyond FP32
                    partials[block.program] = math.inf
                    _stamp(table, block, attempt, here, sources.entries[block.tensor])

    workers.run(work, _units(table, sources, range(len(table.entries))))


@torch.no_grad()
def update(table: TensorTable, sources: SourceTable, rule: Rule, decision: Tensor) -> None:
    """Applies `rule` to every tensor of that rule that has a gradient; nothing at all where `decision` skips.

    See `reference.update`.
    """
    if bool(decision[layout.SKIP] != 0):
        return
    clip = float(decision[layout.CLIP])
    step = RULES[rule.name]
    entries, scalars, views = table.entries, table.scalars.numpy(), _views_of(table)
    readings = _readings(sources)
    scalars_of = {row.tobytes(): [row[j, ...] for j in range(layout.SCALARS)] for row in scalars}

    def work(unit: list[_Block]) -> None:
        with np.errstate(all="ignore"):
            for block in unit:
                tensor, start, stop, _ = block
                param, master, slots = views[tensor]
                g, t = _scratch.take(stop - start)
                _unscale(g, t, [r.cut(block) for r in readings[tensor]], clip)
                p = master[start:stop]
                step(p, g, tuple(slot[start:stop] for slot in slots), scalars_of[scalars[tensor].tobytes()], t)
                if entries[tensor].write_back:
                    _convert(torch.from_numpy(p), param[start:stop])

    chosen = [i for i, entry in enumerate(entries) if entry.rule == rule]
    workers.run(work, _units(table, sources, chosen))


def _units(table: TensorTable, sources: SourceTable, chosen: Iterable[int]) -> list[list[_Block]]:
    """Blocks of those tensors among `chosen` that have a gradient, together BLOCK elements a unit at most."""
    units: list[list[_Block]] = []
    numels = [entry.param.numel() for entry in table.entries]
    programs = np.cumsum([0, *(-(-n // layout.INSPECT_CHUNK) for n in numels)]).tolist()
    room = 0
    for i in chosen:
        if not sources.entries[i]:
            continue
        for start in range(0, numels[i], BLOCK):
            stop = min(start + BLOCK, numels[i])
            if stop - start > room:
                units.append([])
                room = BLOCK
            units[-1].append(_Block(i, start, stop, programs[i] + start // layout.INSPECT_CHUNK))
            room -= stop - start
    return units


def _views_of(table: TensorTable) -> list[_Views]:
    """Made once for a table: it is made anew when the memory of a tensor changes."""
    views = _views.get(table)
    if views is None:
        views = [
            _Views(flat(e.param), flat(e.master).numpy(), tuple(flat(slot).numpy() for slot in e.slots))
            for e in table.entries
        ]
        _views[table] = views
    return views


def _readings(sources: SourceTable) -> list[list[_Reading]]:
    """The pending gradients of each tensor."""
    scales = {id(source.scale): source.scale for pending in sources.entries for source in pending}
    inverses = {key: reference.inverse(scale) for key, scale in scales.items()}
    return [
        [_Reading(flat(source.grad), inverses[id(source.scale)]) for source in pending] for pending in sources.entries
    ]


def _convert(source: Tensor, target: Tensor) -> None:
    """Copies, rounding or widening, on this thread alone: larger copies would wake PyTorch's own threads."""
    if source.numel() <= _SERIAL:
        target.copy_(source)
        return
    for start in range(0, source.numel(), _SERIAL):
        target[start : start + _SERIAL].copy_(source[start : start + _SERIAL])


def _widen(grad: Tensor, factor: float, out: np.ndarray) -> None:
    """`out = float32(grad) * factor`."""
    if grad.dtype == torch.float32:
        np.multiply(grad.numpy(), np.float32(factor), out)
    else:
        _convert(grad, torch.from_numpy(out))
        if factor != 1.0:
            np.multiply(out, np.float32(factor), out)


def _unscale(g: np.ndarray, t: np.ndarray, readings: Sequence[_Reading], clip: float) -> None:
    """`g = (x_0 + x_1 + ...) * clip`, overwriting `t`."""
    first, *others = readings
    if not others and first.takes(clip):
        _widen(first.grad, first.inv_scale * clip, g)
        return
    _widen(first.grad, first.inv_scale, g)
    for reading in others:
        _widen(reading.grad, reading.inv_scale, t)
        np.add(g, t, g)
    if clip != 1.0:
        np.multiply(g, np.float32(clip), g)


def _square_sum(readings: Sequence[_Reading], size: int) -> float:
    """The sum of squares, each rounded to FP32, of the unscaled total; added in float64."""
    g, t = _scratch.take(size)
    _unscale(g, t, readings, 1.0)
    np.multiply(g, g, g)
    return float(np.einsum("i->", g, dtype=np.float64))


def _tally(cells: np.ndarray, reading: _Reading) -> None:
    """Counts a block of a scaled gradient, chunk by chunk; `cells` are int32[programs, layout.TALLY].

    See `reference._tally`.
    """
    kind = _KINDS[reading.grad.dtype]
    bits = reading.grad.view(kind.view).numpy()
    a, b = _scratch.take(len(bits))
    magnitudes, small = a.view(bits.dtype)[: len(bits)], b.view(np.bool_)[: len(bits)]
    np.bitwise_and(bits, kind.magnitude, magnitudes)
    np.less(magnitudes, kind.smallest_normal(), small)
    starts = range(0, len(bits), layout.INSPECT_CHUNK)
    largest = np.maximum.reduceat(magnitudes, starts)
    for p, start in enumerate(starts):
        cells[p, layout.SMALL] = np.count_nonzero(small[start : start + layout.INSPECT_CHUNK])
    values = kind.widen(largest) * np.float32(reading.inv_scale)
    cells[: len(largest), layout.LARGEST] = values.view(np.int32)


def _stamp(
    table: TensorTable, block: _Block, attempt: int, readings: Sequence[_Reading], pending: Sequence[Source]
) -> None:
    shares = [reading.grad.float() * reading.inv_scale for reading in readings]
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    reference.stamp(table, block.tensor, block.program, attempt, total, shares, pending)
