"""The gradients that a step consumes, as the device sees them: where each lies, and the scale that scaled it.

The table stands twice: as Python lists, which `mpengine.reference` reads, and as int64 rows on the device, which the
kernels read (`kernels.layout` numbers the columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpengine.alike import Alike
from mpengine.kernels import layout
from mpengine.upload import Mirror, is_capturing, to_device

KINDS = {torch.float16: layout.FLOAT16, torch.bfloat16: layout.BFLOAT16, torch.float32: layout.FLOAT32}


class Source(NamedTuple):
    """A gradient that waits for the step: `grad / scale` is its share of the true gradient."""

    grad: Tensor
    scale: Tensor | None  # float32, one element, on the gradient's device; None stands for 1.0
    loss_id: int


class Ballot(NamedTuple):
    """How an optimizer consumes one loss: `layout.ABSENT`, `FRESH` or `STALE`, and the scale behind it."""

    kind: int
    scale: Tensor | None = None


class Column(NamedTuple):
    """One gradient for each tensor, or None, all of one loss and one scale: what most steps consume."""

    grads: list[Tensor | None]
    scale: Tensor | None
    loss_id: int


class SourceTable:
    """The gradients that one step consumes, and the ballots on their losses.

    Attributes:
        ballots: One for each loss.
        rows: int64[T, width, layout.SOURCE].
        ballot_rows: int64[L, layout.BALLOT].
        kinds: The element kinds that occur among the gradients.
        width: The most sources of any tensor; 1, or `layout.MAX_SOURCES`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ballots: list[Ballot] = []
        self._mirror = Mirror(device)
        self._entries: list[list[Source]] | None = []
        self._column: Column | None = None
        self._shape: _Shape | None = None
        self._whole: Tensor | None = None  # of which rows and ballot_rows are views
        self.rows = self.ballot_rows = torch.empty(0, dtype=torch.int64)
        self._described: Any = None  # what a column was described by, while the device has it

    @property
    def entries(self) -> list[list[Source]]:
        """For each tensor of a `TensorTable` its sources in order of loss_id; none for an idle tensor."""
        if self._entries is None:
            assert self._column is not None
            grads, scale, loss_id = self._column
            self._entries = [[] if grad is None else [Source(grad, scale, loss_id)] for grad in grads]
        return self._entries

    def release(self) -> None:
        """Lets go of the gradients, so that zeroing them frees their memory."""
        self._entries, self._column = [], None

    def set(self, entries: list[list[Source]], ballots: list[Ballot]) -> None:
        """Describes the gradients of the next step; uploads only what changed, without a sync."""
        self._entries, self._column, self.ballots = entries, None, ballots
        self.width = 1 if max(map(len, entries), default=0) <= 1 else layout.MAX_SOURCES
        self.kinds = frozenset(KINDS[source.grad.dtype] for sources in entries for source in sources)
        rows = np.zeros((len(entries), self.width, layout.SOURCE), dtype=np.int64)
        places = [(i, k) for i, sources in enumerate(entries) for k in range(len(sources))]
        if places:
            rows[tuple(np.array(places).T)] = [_row(source) for sources in entries for source in sources]
        self._described = None
        self._upload(rows, _addresses(ballots))

    def learn(self, column: Column) -> None:
        """From now on `knows` says yes to gradients of these kinds: dense, checked, in their parameters' layouts."""
        if any(grad is not None for grad in column.grads):
            self._shape = _Shape(column.grads)

    def knows(self, column: Column) -> bool:
        """Whether these gradients may go to `set_column`."""
        shape, scale = self._shape, column.scale
        return shape is not None and (scale is None or scale.device == self.device) and shape.fits(column.grads)

    def of_active(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those of `tensors`, one for each of the table, that have a gradient in a column."""
        assert self._shape is not None
        return self._shape.of_active(tensors)

    def set_column(self, column: Column, ballots: list[Ballot]) -> None:
        """What `set` does, in a few calls for all tensors at once; only for a column that the table knows."""
        self._entries, self._column, self.ballots = None, column, ballots
        shape = self._shape
        assert shape is not None
        pointers = list(map(Tensor.data_ptr, shape.of_active(column.grads)))
        scale = 0 if column.scale is None else column.scale.data_ptr()
        described = (shape, pointers, scale, column.loss_id, _addresses(ballots))
        if described == self._described and not is_capturing(self.device):
            return
        self.width, self.kinds = 1, shape.kinds
        addresses = np.array(pointers, dtype=np.int64)
        addresses[addresses == 0] = 16
        rows = np.zeros((len(column.grads), 1, layout.SOURCE), dtype=np.int64)
        flat = rows[shape.active, 0]
        flat[:, layout.GRAD_PTR] = addresses
        flat[:, layout.SCALE_PTR] = scale
        flat[:, layout.GRAD_FORMAT] = shape.formats + np.where(addresses % 16 == 0, layout.ALIGNED, 0)
        flat[:, layout.LOSS] = column.loss_id
        rows[shape.active, 0] = flat
        self._upload(rows, described[-1])
        self._described = None if is_capturing(self.device) else described

    def _upload(self, rows: np.ndarray, ballots: list[tuple[int, int]]) -> None:
        table = np.concatenate([rows.reshape(-1), np.array(ballots, dtype=np.int64).reshape(-1)])
        # A graph gets a table of its own: later steps write other addresses into ours, and its gradients stay.
        whole = to_device(table, self.device) if is_capturing(self.device) else self._mirror.follow(table)
        if whole is not self._whole or self.rows.shape != rows.shape:
            self.rows = whole[: rows.size].view(rows.shape)
            self.ballot_rows = whole[rows.size :].view(len(ballots), layout.BALLOT)
            self._whole = whole


def _row(source: Source) -> tuple[int, int, int, int]:
    grad, scale, loss_id = source
    pointer = grad.data_ptr() or 16  # an empty gradient has no address, but its tensor takes the step
    aligned = layout.ALIGNED if pointer % 16 == 0 else 0
    return pointer, 0 if scale is None else scale.data_ptr(), KINDS[grad.dtype] + aligned, loss_id


def _addresses(ballots: Sequence[Ballot]) -> list[tuple[int, int]]:
    return [(ballot.kind, 0 if ballot.scale is None else ballot.scale.data_ptr()) for ballot in ballots]


class _Shape:
    """Which tensors of a column have a gradient, and of what kind each is."""

    def __init__(self, grads: Sequence[Tensor | None]) -> None:
        present = [grad for grad in grads if grad is not None]
        self.active = np.array([i for i, grad in enumerate(grads) if grad is not None], dtype=np.int64)
        self.formats = np.array([KINDS[grad.dtype] for grad in present], dtype=np.int64)
        self.kinds = frozenset(self.formats.tolist())
        self._idle = None if len(present) == len(grads) else [grad is None for grad in grads]
        self._alike = Alike(present)

    def of_active(self, column: list[Any]) -> list[Any]:
        """What stands where there is a gradient."""
        if self._idle is None:
            return column
        return [value for value, idle in zip(column, self._idle, strict=True) if not idle]

    def fits(self, grads: list[Tensor | None]) -> bool:
        """Whether these are of the same kinds, at the same places."""
        if self._idle is not None and [grad is None for grad in grads] != self._idle:
            return False
        return self._alike.holds(self.of_active(grads))
