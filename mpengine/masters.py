"""Masters and optimizer state as the device sees them: flat FP32 arenas and the table of pointers.

`Entry` is one tensor of an optimizer, `TensorTable` all of them on one device. The table stands twice: as Python
lists, which `mpengine.reference` reads, and as int64 rows on the device, which the kernels read (`kernels.layout`
numbers the columns). `mpengine.sources` has the table of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpengine.kernels import layout
from mpengine.rules import Rule
from mpengine.sources import KINDS
from mpengine.upload import to_device

_ARENA_ALIGNMENT = 64  # elements: every slice of an arena starts on 256 bytes


@dataclass
class Entry:
    """One tensor of an optimizer.

    Attributes:
        param: The model's parameter: fp16, bf16 or FP32.
        master: FP32, the parameter's shape and strides; `param` itself where that is FP32.
        slots: The rule's FP32 state, in the order of `rule.slots`.
        group: Index of its param group.
        rule: The update rule.
        write_back: Whether the step writes `master`, rounded, into `param`.
        cells: The rule's FP32 numbers of this tensor, of no dimension, in the order of `rule.cells`.
    """

    param: Tensor
    master: Tensor
    slots: tuple[Tensor, ...]
    group: int
    rule: Rule
    write_back: bool
    cells: tuple[Tensor, ...] = ()


class DeviceSchedule(NamedTuple):
    """Hyperparameters of every step ahead, on the device."""

    plan: Tensor  # int64[layout.SCHEDULE]
    values: Tensor  # float64[rows, groups, scheduled hyperparameters]


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected and tensor.numel() > 0:
            return False
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether element i of `a`'s memory is element i of the dense `b`'s (strides of size-1 dimensions are moot)."""
    if a.shape != b.shape:
        return False
    ours, theirs = a.stride(), b.stride()
    return ours == theirs or all(n == 1 or s == t for n, s, t in zip(a.shape, ours, theirs, strict=True))


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory, shape (numel,). A view."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def arena(like: Sequence[Tensor], fill: float | None = 0.0) -> list[Tensor]:
    """FP32 tensors with the shapes, strides and device of `like`, cut from one allocation.

    Args:
        like: Dense tensors, all on one device.
        fill: The initial value; None leaves the memory uninitialised.
    """
    if not like:
        return []
    sizes = [-(-t.numel() // _ARENA_ALIGNMENT) * _ARENA_ALIGNMENT for t in like]
    whole = torch.empty(sum(sizes), dtype=torch.float32, device=like[0].device)
    if fill is not None:
        whole.fill_(fill)
    offsets = np.cumsum([0, *sizes]).tolist()
    return [whole.as_strided(t.shape, t.stride(), start) for t, start in zip(like, offsets, strict=False)]


def _aligned(*tensors: Tensor) -> bool:
    return all(t.data_ptr() % 16 == 0 for t in tensors)


def _chunks(indices: Sequence[int], numels: Sequence[int], chunk: int) -> np.ndarray:
    """int32[P, 2]: (tensor, chunk) of each program."""
    counts = np.array([-(-n // chunk) for n in numels], dtype=np.int64)
    owner = np.repeat(np.array(indices, dtype=np.int32), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    number = np.arange(counts.sum(), dtype=np.int64) - starts
    return np.stack([owner, number.astype(np.int32)], axis=1)


class Norms:
    """What `measure` finds of the tensors of one rule, and `settle` reads.

    Attributes:
        chunks: int32[P, 2], (tensor, chunk) of each program of measure.
        partials: float64[P, layout.NORMS], each program's sums of squares.
        spans: int32[n, layout.SPAN]: each tensor, and where its rows of `partials` begin and end.
    """

    def __init__(self, indices: Sequence[int], numels: Sequence[int], device: torch.device) -> None:
        chunks = _chunks(indices, numels, layout.INSPECT_CHUNK)
        ends = np.cumsum([-(-n // layout.INSPECT_CHUNK) for n in numels], dtype=np.int64)
        spans = np.zeros((len(indices), layout.SPAN), dtype=np.int32)
        spans[:, layout.SPAN_TENSOR] = indices
        spans[1:, layout.SPAN_START] = ends[:-1]
        spans[:, layout.SPAN_STOP] = ends
        self.chunks = to_device(chunks, device)
        self.spans = to_device(spans, device)
        self.partials = torch.zeros(len(chunks), layout.NORMS, dtype=torch.float64, device=device)


class TensorTable:
    """All tensors of an optimizer on one device, and what the kernels keep about each.

    Attributes:
        entries: The tensors.
        rows: int64[T, layout.ROW].
        inspect_chunks: int32[P, 2], (tensor, chunk) of each program of inspect.
        update_chunks: The same for update, for each rule that occurs.
        norms: What is measured of the tensors of each rule that settles.
        steps: int32[T], steps that each tensor has taken.
        scalars: float32[T, layout.SCALARS], written by decide, read by update.
        stamps: int32[T, L], the attempt at which a loss last overflowed in this tensor; 0: never.
        found: int32[L], the attempt at which a loss last overflowed on this device.
        partials: float64[P], each program's sum of squares of the unscaled gradient.
        tallies: int32[P, L, layout.TALLY], what each program counts of each loss's scaled gradient; -1 at first.
        counts: int32[layout.COUNTS], steps taken and skipped.
        decision: float32[layout.DECISION].
        launches: What the launchers keep between steps.
    """

    def __init__(self, entries: Sequence[Entry], num_losses: int, device: torch.device) -> None:
        self.entries = list(entries)
        self.num_losses = num_losses
        self.device = device
        numels = [e.param.numel() for e in self.entries]
        rows = np.zeros((len(self.entries), layout.ROW), dtype=np.int64)
        for row, entry in zip(rows, self.entries, strict=True):
            row[layout.PARAM_PTR] = entry.param.data_ptr() if entry.write_back else 0
            row[layout.MASTER_PTR] = entry.master.data_ptr()
            for i, slot in enumerate(entry.slots):
                row[layout.SLOT_PTR + i] = slot.data_ptr()
            for i, cell in enumerate(entry.cells):
                row[layout.CELL_PTR + i] = cell.data_ptr()
            row[layout.NUMEL] = entry.param.numel()
            row[layout.GROUP] = entry.group
            aligned = layout.ALIGNED if _aligned(entry.param, entry.master, *entry.slots) else 0
            row[layout.FORMAT] = KINDS[entry.param.dtype] + aligned
        self.rows = to_device(rows, device)
        self.param_kinds = frozenset(KINDS[e.param.dtype] for e in self.entries if e.write_back)
        every = range(len(self.entries))
        self.inspect_chunks = to_device(_chunks(every, numels, layout.INSPECT_CHUNK), device)
        self.update_chunks: dict[Rule, Tensor] = {}
        self.norms: dict[Rule, Norms] = {}
        for rule in dict.fromkeys(e.rule for e in self.entries):
            chosen = [i for i in every if self.entries[i].rule == rule]
            chunks = _chunks(chosen, [numels[i] for i in chosen], layout.UPDATE_CHUNK)
            self.update_chunks[rule] = to_device(chunks, device)
            if rule.settle is not None:
                self.norms[rule] = Norms(chosen, [numels[i] for i in chosen], device)
        count = len(self.entries)
        self.steps = torch.zeros(count, dtype=torch.int32, device=device)
        self.scalars = torch.zeros(count, layout.SCALARS, dtype=torch.float32, device=device)
        self.stamps = torch.zeros(count, num_losses, dtype=torch.int32, device=device)
        self.found = torch.zeros(num_losses, dtype=torch.int32, device=device)
        self.partials = torch.zeros(len(self.inspect_chunks), dtype=torch.float64, device=device)
        programs = len(self.inspect_chunks)
        self.tallies = torch.full((programs, num_losses, layout.TALLY), -1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(layout.COUNTS, dtype=torch.int32, device=device)
        self.launches: dict[str, Any] = {}
        self.decision = to_device(np.array([0.0, 1.0, np.nan, 0.0], dtype=np.float32), device)
