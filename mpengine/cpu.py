"""The CPU path: bit for bit `mpengine.reference`, on every core, and with a block's temporaries in the cache.

```
inspect:  for each unit, on some thread: tally, widen the gradients, unscale, square, add up in float64
decide:   the reference's
update:   for each unit, on some thread: widen, unscale, clip, and the rule, one NumPy operation after another
```

NumPy does the arithmetic, as it rounds after each operation; PyTorch widens and rounds fp16 and bf16. Sums are taken
block by block and stored by position, so they do not depend on the number of threads. The blocks are larger than a
core's own cache because the interpreter's lock changes hands at every operation, which costs more than the way to the
shared cache: on two cores, blocks of an eighth of the size made the threads slower together than one alone. A thread
keeps at most 4 MiB of buffers; nothing else of a tensor's size is allocated, unless a loss overflowed.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpengine import cpu_blocks, reference, workers
from mpengine.cpu_blocks import ROWS, Block, Reading, buffers
from mpengine.cpu_rules import RULES, in_place
from mpengine.kernels import layout
from mpengine.masters import TensorTable, flat
from mpengine.rules import Rule
from mpengine.sources import SourceTable

decide = reference.decide
measure = reference.measure
settle = reference.settle
update_scale = reference.update_scale


@torch.no_grad()
def inspect(table: TensorTable, sources: SourceTable) -> None:
    """Reads every pending gradient once; writes `table.stamps`, `.found`, `.partials` and `.tallies`.

    See `reference.inspect`. `partials` get the sum of each block in its first program.
    """
    table.partials.zero_()
    task = _Inspection(
        table,
        sources,
        cpu_blocks.readings_of(sources),
        table.partials.numpy(),
        table.tallies.numpy(),
        attempt=int(table.counts.sum()) + 1,
    )
    units = cpu_blocks.units_of(table, sources, range(len(table.entries)), lambda i: sources.entries[i][0].loss_id)
    workers.run(task.run, units)


def _run(unit: list[Block], on_block: Callable[[Block], None], on_pack: Callable[[list[Block]], None]) -> None:
    with np.errstate(all="ignore"):
        if len(unit) == 1:
            on_block(unit[0])
        else:
            on_pack(unit)


class _Inspection(NamedTuple):
    """What the threads of `inspect` share; each writes the cells of its own units."""

    table: TensorTable
    sources: SourceTable
    readings: list[list[Reading]]
    partials: np.ndarray
    tallies: np.ndarray
    attempt: int

    def run(self, unit: list[Block]) -> None:
        """Inspects a unit."""
        _run(unit, self._block, self._pack)

    def _block(self, block: Block) -> None:
        here = [reading.cut(block) for reading in self.readings[block.tensor]]
        size = block.stop - block.start
        g, t = buffers.take(2, size)
        ends = [*range(0, size, layout.INSPECT_CHUNK), size]
        for source, reading in zip(self.sources.entries[block.tensor], here, strict=True):
            if source.scale is not None:
                cells = self.tallies[block.program : block.program + len(ends) - 1, source.loss_id]
                cells[:, layout.SMALL], cells[:, layout.LARGEST] = _tally(reading, ends, g, t)
        cpu_blocks.unscale(g, t, here, 1.0)
        np.multiply(g, g, g)
        self._finish(block, here, float(np.einsum("i->", g, dtype=np.float64)))

    def _pack(self, pack: list[Block]) -> None:
        here = [self.readings[block.tensor][0] for block in pack]
        ends = cpu_blocks.ends_of(pack)
        g, t, *_, row = buffers.take(ROWS, ends[-1])
        together = cpu_blocks.side_by_side(here, row)
        (source,) = self.sources.entries[pack[0].tensor]
        if source.scale is not None:
            programs = [block.program for block in pack]
            small, largest = _tally(together, ends, g, t)
            self.tallies[programs, source.loss_id, layout.SMALL] = small
            self.tallies[programs, source.loss_id, layout.LARGEST] = largest
        cpu_blocks.unscale(g, t, [together], 1.0)
        np.multiply(g, g, g)
        sums = np.add.reduceat(g, ends[:-1], dtype=np.float64).tolist()
        for block, reading, square_sum in zip(pack, here, sums, strict=True):
            self._finish(block, [reading], square_sum)

    def _finish(self, block: Block, here: Sequence[Reading], square_sum: float) -> None:
        self.partials[block.program] = square_sum
        if math.isfinite(square_sum):
            return
        self.partials[block.program] = math.inf  # an overflow, or only a square beyond FP32
        shares = [reading.grad.float() * reading.inv_scale for reading in here]
        total = shares[0]
        for share in shares[1:]:
            total = total + share
        pending = self.sources.entries[block.tensor]
        reference.stamp(self.table, block.tensor, block.program, self.attempt, total, shares, pending)


class _Kind(NamedTuple):
    """A gradient's type, read as integers."""

    view: torch.dtype
    magnitude: Any  # all bits but the sign's
    widen: Callable[[np.ndarray], np.ndarray]  # from bits to float32


_KINDS = {
    torch.float16: _Kind(torch.int16, np.int16(0x7FFF), lambda x: x.view(np.float16).astype(np.float32)),
    torch.bfloat16: _Kind(torch.int16, np.int16(0x7FFF), lambda x: (x.astype(np.uint32) << 16).view(np.float32)),
    torch.float32: _Kind(torch.int32, np.int32(0x7FFFFFFF), lambda x: x.view(np.float32)),
}


def _tally(reading: Reading, ends: Sequence[int], a: np.ndarray, b: np.ndarray) -> tuple[list[int], np.ndarray]:
    """What `layout.SMALL` and `LARGEST` say of the elements between each two of `ends`; overwrites `a` and `b`.

    See `reference._tally`.
    """
    dtype, kind = reading.grad.dtype, _KINDS[reading.grad.dtype]
    bits = reading.grad.view(kind.view).numpy()
    magnitudes, small = a.view(bits.dtype)[: len(bits)], b.view(np.bool_)[: len(bits)]
    np.bitwise_and(bits, kind.magnitude, magnitudes)
    np.less(magnitudes, bits.dtype.type(reference.SMALLEST_NORMAL[dtype]), small)
    largest = kind.widen(np.maximum.reduceat(magnitudes, ends[:-1])) * np.float32(reading.inv_scale)
    counts = [int(np.count_nonzero(small[start:stop])) for start, stop in itertools.pairwise(ends)]
    return counts, largest.view(np.int32)


@torch.no_grad()
def update(table: TensorTable, sources: SourceTable, rule: Rule, decision: Tensor) -> None:
    """Applies `rule` to every tensor of that rule that has a gradient; nothing at all where `decision` skips.

    See `reference.update`.
    """
    if bool(decision[layout.SKIP] != 0):
        return
    scalars = table.scalars.numpy()
    rows = [row.tobytes() for row in scalars]
    task = _Update(
        cpu_blocks.readings_of(sources),
        _views_of(table),
        RULES.get(rule.name) or in_place(rule.update),
        rows,
        # As arrays without a dimension, which NumPy takes faster than its own numbers, or Python's.
        {row: [values[j, ...] for j in range(layout.SCALARS)] for row, values in zip(rows, scalars, strict=True)},
        clip=float(decision[layout.CLIP]),
    )
    entries = table.entries
    chosen = [i for i, entry in enumerate(entries) if entry.rule == rule]
    units = cpu_blocks.units_of(
        table, sources, chosen, lambda i: (rows[i], entries[i].write_back, entries[i].param.dtype)
    )
    workers.run(task.run, units)


class _Views(NamedTuple):
    """The memory of an entry, flat."""

    master: np.ndarray  # float32[numel]
    slots: tuple[np.ndarray, ...]  # float32[numel] each
    param: Tensor | None  # [numel]; None where nothing is written back
    bits: np.ndarray | None  # the same as integers, which NumPy copies as they are


_views: weakref.WeakKeyDictionary[TensorTable, list[_Views]] = weakref.WeakKeyDictionary()


def _views_of(table: TensorTable) -> list[_Views]:
    """Made once for a table: it is made anew when the memory of a tensor changes."""
    views = _views.get(table)
    if views is None:
        views = []
        for entry in table.entries:
            param = flat(entry.param) if entry.write_back else None
            bits = None if param is None else param.view(_KINDS[param.dtype].view).numpy()
            views.append(_Views(flat(entry.master).numpy(), tuple(flat(s).numpy() for s in entry.slots), param, bits))
        _views[table] = views
    return views


class _Update(NamedTuple):
    """What the threads of `update` share; each writes the tensors of its own units."""

    readings: list[list[Reading]]
    views: list[_Views]
    step: Callable[..., None]
    rows: list[bytes]  # of each tensor's scalars
    scalars: dict[bytes, list[np.ndarray]]
    clip: float

    def run(self, unit: list[Block]) -> None:
        """Steps a unit."""
        _run(unit, self._block, self._pack)

    def _block(self, block: Block) -> None:
        i, start, stop, _ = block
        master, slots, param, _ = self.views[i]
        g, t = buffers.take(2, stop - start)
        cpu_blocks.unscale(g, t, [reading.cut(block) for reading in self.readings[i]], self.clip)
        p = master[start:stop]
        self.step(p, g, [slot[start:stop] for slot in slots], self.scalars[self.rows[i]], t)
        if param is not None:
            cpu_blocks.convert(torch.from_numpy(p), param[start:stop])

    def _pack(self, pack: list[Block]) -> None:
        views = [self.views[block.tensor] for block in pack]
        ends = cpu_blocks.ends_of(pack)
        g, t, p, *slots, row = buffers.take(ROWS, ends[-1])
        slots = slots[: len(views[0].slots)]
        together = cpu_blocks.side_by_side([self.readings[block.tensor][0] for block in pack], row)
        cpu_blocks.unscale(g, t, [together], self.clip)
        np.concatenate([view.master for view in views], out=p)
        for j, slot in enumerate(slots):
            np.concatenate([view.slots[j] for view in views], out=slot)
        self.step(p, g, slots, self.scalars[self.rows[pack[0].tensor]], t)
        bits = None
        if views[0].param is not None:
            rounded = torch.from_numpy(row).view(views[0].param.dtype)[: ends[-1]]
            rounded.copy_(torch.from_numpy(p))
            bits = rounded.view(_KINDS[rounded.dtype].view).numpy()
        for view, (start, stop) in zip(views, itertools.pairwise(ends), strict=True):
            view.master[:] = p[start:stop]
            for old, slot in zip(view.slots, slots, strict=True):
                old[:] = slot[start:stop]
            if view.bits is not None and bits is not None:
                view.bits[:] = bits[start:stop]
