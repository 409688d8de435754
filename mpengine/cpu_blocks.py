"""What the CPU path works on: blocks of tensors, the gradients in them, and each thread's buffers.

```
unit = one block of a large tensor, BLOCK elements at most, in place
     | a pack: many small tensors that the same numbers step, PACK elements at most, copied side by side
```
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpengine import reference
from mpengine.kernels import layout
from mpengine.masters import TensorTable, flat
from mpengine.sources import SourceTable

BLOCK = 32 * layout.INSPECT_CHUNK  # elements: an operation then takes far longer than handing on the interpreter's lock
SERIAL = 1 << 15  # elements: PyTorch copies as many on the thread that asks for it
PACK = SERIAL - 1  # and concatenates fewer
ROWS = 8  # arrays of PACK numbers that a thread's buffers hold


class Block(NamedTuple):
    """Elements [start, stop) of a tensor of the table; `program` is the first of inspect's that has some of them."""

    tensor: int
    start: int
    stop: int
    program: int


class Reading(NamedTuple):
    """A pending gradient, or a part of one."""

    grad: Tensor  # [n]
    inv_scale: float

    def cut(self, block: Block) -> Reading:
        """The gradient of a block."""
        if block.stop - block.start == len(self.grad):
            return self
        return Reading(self.grad[block.start : block.stop], self.inv_scale)

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


class _Buffers(threading.local):
    """The memory of one thread, which grows to what the largest block or pack needs: 4 MiB at most."""

    def __init__(self) -> None:
        self._all = np.empty(0, np.float32)

    def take(self, rows: int, size: int) -> np.ndarray:
        """float32[rows, size] of any content."""
        if rows * size > len(self._all):
            self._all = np.empty(rows * size, np.float32)
        return self._all[: rows * size].reshape(rows, size)


buffers = _Buffers()


def readings_of(sources: SourceTable) -> list[list[Reading]]:
    """The pending gradients of each tensor."""
    scales = {id(source.scale): source.scale for pending in sources.entries for source in pending}
    inverses = {key: reference.inverse(scale) for key, scale in scales.items()}
    return [
        [Reading(flat(source.grad), inverses[id(source.scale)]) for source in pending] for pending in sources.entries
    ]


def units_of(
    table: TensorTable, sources: SourceTable, chosen: Iterable[int], kind: Callable[[int], Any]
) -> list[list[Block]]:
    """Blocks of those tensors among `chosen` that have a gradient.

    Args:
        table: The tensors.
        sources: Their gradients.
        chosen: Positions of tensors.
        kind: From a position to what the tensors of a pack have in common.
    """
    units: list[list[Block]] = []
    packs: dict[Any, list[Block]] = {}  # those that are being filled
    numels = [entry.param.numel() for entry in table.entries]
    programs = np.cumsum([0, *(-(-n // layout.INSPECT_CHUNK) for n in numels)]).tolist()
    room: dict[Any, int] = {}
    for i in chosen:
        pending = sources.entries[i]
        if len(pending) == 1 and 0 < numels[i] <= layout.INSPECT_CHUNK:
            key = (kind(i), pending[0].grad.dtype, id(pending[0].scale))
            if numels[i] > room.get(key, 0):
                packs[key], room[key] = [], PACK
                units.append(packs[key])
            packs[key].append(Block(i, 0, numels[i], programs[i]))
            room[key] -= numels[i]
        elif pending:
            for start in range(0, numels[i], BLOCK):
                program = programs[i] + start // layout.INSPECT_CHUNK
                units.append([Block(i, start, min(start + BLOCK, numels[i]), program)])
    return units


def ends_of(pack: Sequence[Block]) -> list[int]:
    """0, and where each tensor of a pack ends."""
    ends = [0]
    for block in pack:
        ends.append(ends[-1] + block.stop)
    return ends


def side_by_side(readings: Sequence[Reading], row: np.ndarray) -> Reading:
    """The gradients of a pack as one, copied into `row`."""
    dtype = readings[0].grad.dtype
    together = torch.from_numpy(row).view(dtype)[: sum(len(reading.grad) for reading in readings)]
    torch.cat([reading.grad for reading in readings], out=together)
    return Reading(together, readings[0].inv_scale)


def convert(source: Tensor, target: Tensor) -> None:
    """Copies, rounding or widening, on this thread alone: larger copies would wake PyTorch's own threads."""
    pieces = -(-source.numel() // SERIAL)
    if pieces <= 1:
        target.copy_(source)
        return
    for to, part in zip(target.chunk(pieces), source.chunk(pieces), strict=True):
        to.copy_(part)


def unscale(g: np.ndarray, t: np.ndarray, readings: Sequence[Reading], clip: float) -> None:
    """`g = (x_0 + x_1 + ...) * clip`, overwriting `t`; both float32[n]."""
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


def _widen(grad: Tensor, factor: float, out: np.ndarray) -> None:
    """`out = float32(grad) * factor`."""
    if grad.dtype == torch.float32:
        np.multiply(grad.numpy(), np.float32(factor), out)
    else:
        convert(grad, torch.from_numpy(out))
        if factor != 1.0:
            np.multiply(out, np.float32(factor), out)
