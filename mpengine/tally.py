"""What `inspect` has counted in the scaled gradients of one loss, read back and added up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpengine.kernels import layout
from mpengine.masters import TensorTable


@dataclass(frozen=True)
class Tally:
    """Counts of one optimizer.

    Attributes:
        elements: Gradient elements that were looked at.
        small: Those of them that are zero or subnormal in the gradient's type.
        largest: The largest unscaled magnitude; inf where one overflowed, NaN where none was looked at.
        overflow: The attempt at a step that overflowed last; 0: none.
        age: Attempts since.
        nonfinite: From a parameter's position to its elements that were inf or NaN then; 0 where that was not counted.
    """

    elements: int = 0
    small: int = 0
    largest: float = math.nan
    overflow: int = 0
    age: int = 0
    nonfinite: Mapping[int, int] = field(default_factory=dict)


def counted(tables: Sequence[tuple[TensorTable, Sequence[int]]], loss_id: int) -> Tally:
    """Adds up what stands in an optimizer's tables, which have the positions of their tensors beside them. Waits."""
    elements = small = 0
    largest = [math.nan]
    overflowed: list[tuple[int, int, int]] = []  # (attempt, position, elements)
    latest = 0  # attempt that counted an overflow of any loss
    for table, positions in tables:
        owners, chunks = table.inspect_chunks.cpu().numpy().T
        every = table.tallies.cpu().numpy()
        cells = every[:, loss_id]
        numels = np.array([entry.param.numel() for entry in table.entries], dtype=np.int64)
        seen = cells[:, layout.SMALL] >= 0
        rest = numels[owners] - chunks.astype(np.int64) * layout.INSPECT_CHUNK
        elements += int(np.minimum(rest, layout.INSPECT_CHUNK)[seen].sum())
        small += int(cells[seen, layout.SMALL].sum(dtype=np.int64))
        largest += np.ascontiguousarray(cells[seen, layout.LARGEST]).view(np.float32).tolist()
        for p in np.flatnonzero(cells[:, layout.ATTEMPT] > 0):
            overflowed.append((int(cells[p, layout.ATTEMPT]), positions[owners[p]], int(cells[p, layout.NONFINITE])))
        latest = max(latest, int(every[..., layout.ATTEMPT].max(initial=0)))
    stamps = [
        (stamp, position)
        for table, positions in tables
        for position, stamp in zip(positions, table.stamps[:, loss_id].tolist(), strict=True)
    ]
    # Unscaled gradients are stamped, not counted. Where unscale_ came before, they bear the first loss's number, and
    # what was counted in the scaled ones says which loss it was.
    last = max((stamp for stamp, _ in stamps), default=0)
    if last > latest:
        overflowed = [(stamp, position, 0) for stamp, position in stamps if stamp == last]
    last = max((attempt for attempt, _, _ in overflowed), default=0)
    nonfinite: dict[int, int] = {}
    for attempt, position, number in overflowed:
        if attempt == last:
            nonfinite[position] = nonfinite.get(position, 0) + number
    attempts = int(tables[0][0].counts.sum()) if tables else 0
    return Tally(elements, small, float(np.fmax.reduce(largest)), last, attempts - last, nonfinite)
