"""One step on all devices of an optimizer: tables, gradients, hyperparameters, and the calls in their order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpengine import backend
from mpengine.gradients import Labelled, as_sources
from mpengine.kernels import layout
from mpengine.masters import Ballot, DeviceSchedule, Entry, SourceTable, TensorTable, arena, same_layout, to_device
from mpengine.plain import cast_votes
from mpengine.rules import ASSIGN, Family
from mpengine.tally import Tally, counted


class _Numbers:
    """Float64 numbers on the device, uploaded when one of them changed, from pinned memory, without a sync."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: list[list[float]] | None = None

    def set(self, rows: Sequence[Sequence[Any]], width: int) -> Tensor:
        """float64[len(rows), width]; a tensor on this device (a capturable lr) is copied there each time."""
        moving = [(i, j, v) for i, row in enumerate(rows) for j, v in enumerate(row) if _on_cuda(v)]
        plain = [[0.0 if _on_cuda(value) else float(value) for value in row] for row in rows]
        if plain != self._known:
            table = np.zeros((len(plain), width))
            for i, row in enumerate(plain):
                table[i, : len(row)] = row
            self.table = to_device(table, self.device)
            self._known = plain
        for i, j, value in moving:
            self.table[i, j].copy_(value, non_blocking=True)
        return self.table


def _on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


class _Device(NamedTuple):
    """All tensors of the optimizer on one device; `positions` are their places in the optimizer's order."""

    device: torch.device
    table: TensorTable
    positions: list[int]
    sources: SourceTable
    hyper: _Numbers
    max_norm: _Numbers


class Execution:
    """Runs the steps of one optimizer.

    Args:
        entries: From a parameter's position in the optimizer to its entry; frozen parameters have none.
        num_losses: Losses that the scaler has.
    """

    def __init__(self, entries: dict[int, Entry], num_losses: int) -> None:
        self.entries = entries
        self.num_losses = num_losses
        by_device: dict[torch.device, list[int]] = {}
        for position, entry in entries.items():
            by_device.setdefault(entry.param.device, []).append(position)
        self._devices = [
            _Device(
                device,
                TensorTable([entries[i] for i in positions], num_losses, device),
                positions,
                SourceTable(device),
                _Numbers(device),
                _Numbers(device),
            )
            for device, positions in by_device.items()
        ]
        self._schedules: list[DeviceSchedule | None] = [None] * len(self._devices)
        self.memory = {i: memory_of(entry.param) for i, entry in entries.items()}

    def step_views(self) -> dict[int, Tensor]:
        """From a position to its step count, int32 0-dim: a view of the table that decide writes."""
        return {i: d.table.steps[j] for d in self._devices for j, i in enumerate(d.positions)}

    def set_schedule(self, plan: np.ndarray, values: np.ndarray) -> None:
        """From now on `decide` reads scheduled hyperparameters: see `masters.DeviceSchedule`."""
        self._schedules = [
            DeviceSchedule(to_device(plan, d.device), to_device(values, d.device)) for d in self._devices
        ]

    def inspect(self, pending: list[list[Labelled]], ballots: list[Ballot]) -> None:
        """Reads all pending gradients once."""
        for d in self._devices:
            sources = [as_sources(pending[i], d.device) for i in d.positions]
            sources = [
                [s._replace(grad=_in_layout(s.grad, entry.param)) for s in one]
                for one, entry in zip(sources, d.table.entries, strict=True)
            ]
            local = [b if b.scale is None else b._replace(scale=b.scale.to(d.device)) for b in ballots]
            d.sources.set(sources, local)
            backend.of(d.device).inspect(d.table, d.sources)

    def decide(
        self,
        hyper: Sequence[Sequence[Any]],
        max_norm: float,
        family: Family | None,
        found_inf: Tensor | None,
        votes: Tensor | None,
    ) -> None:
        """Decides about the step: the same on every device, from the verdicts of all."""
        for d, schedule in zip(self._devices, self._schedules, strict=True):
            tables = [other.table for other in self._devices]
            found = [t.found.to(d.device, non_blocking=True)[None] for t in tables]
            partials = [t.partials.to(d.device, non_blocking=True) for t in tables]
            local_votes = None
            if votes is not None and d is self._devices[0]:
                local_votes = votes if votes.device == d.device else torch.zeros_like(votes, device=d.device)
            backend.of(d.device).decide(
                d.table,
                d.sources,
                found[0] if len(found) == 1 else torch.cat(found),
                partials[0] if len(partials) == 1 else torch.cat(partials),
                d.hyper.set(hyper, layout.HYPER),
                d.max_norm.set([[max_norm]], 1),
                family,
                None if found_inf is None else found_inf.to(d.device, non_blocking=True),
                local_votes,
                schedule,
            )
            if votes is not None and local_votes is not None and local_votes is not votes:
                votes.copy_(local_votes, non_blocking=True)

    def update(self) -> None:
        """Applies the rules, where the decision is to step."""
        for d in self._devices:
            for rule in d.table.update_chunks:
                backend.of(d.device).update(d.table, d.sources, rule, d.table.decision)

    def release(self) -> None:
        """Lets go of the gradients, so that zeroing them frees their memory."""
        for d in self._devices:
            d.sources.entries = []

    def unscaled(self, positions: Sequence[int], clipped: bool) -> dict[int, Tensor]:
        """The unscaled gradients of the last `inspect` in new FP32 tensors, one allocation for each device.

        Args:
            positions: Of the parameters; their gradients' shapes and strides.
            clipped: Whether to multiply by the clip coefficient of the last `decide`.
        """
        grads: dict[int, Tensor] = {}
        for d in self._devices:
            chosen = [(i, j) for j, i in enumerate(d.positions) if i in positions]
            params = [self.entries[i].param for i, _ in chosen]
            targets = arena(params, fill=None)
            entries = [Entry(p, target, (), 0, ASSIGN, False) for p, target in zip(params, targets, strict=True)]
            table = TensorTable(entries, self.num_losses, d.device)
            sources = SourceTable(d.device)
            sources.set([d.sources.entries[j] for _, j in chosen], [])
            decision = d.table.decision if clipped else table.decision
            for rule in table.update_chunks:
                backend.of(d.device).update(table, sources, rule, decision)
            grads.update(zip((i for i, _ in chosen), targets, strict=True))
        return grads

    def cast_votes(self, votes: Tensor, ballots: list[Ballot]) -> None:
        """Votes by the last `inspect` alone: `unscale_` may be followed by `update()` without a step."""
        overflowed = torch.zeros(self.num_losses, dtype=torch.bool, device=votes.device)
        for d in self._devices:
            overflowed |= (d.table.found == d.table.counts.sum() + 1).to(votes.device)
            d.table.found.zero_()  # whatever is looked at next bears the same number of attempt
        cast_votes(votes, ballots, overflowed)

    # What the user sees. Each of these waits for the device.

    @property
    def skipped(self) -> bool:
        """Whether the last step was skipped."""
        return bool(self._devices[0].table.decision[layout.SKIP] != 0) if self._devices else False

    @property
    def norm(self) -> float:
        """The norm of the last step's unscaled gradient."""
        return float(self._devices[0].table.decision[layout.NORM]) if self._devices else float("nan")

    def forget_tallies(self) -> None:
        """What was counted, and which parameters overflowed last, belongs to another run."""
        for d in self._devices:
            d.table.stamps.zero_()
            d.table.tallies.fill_(-1)

    def get_counts(self) -> list[int]:
        """[steps taken, steps skipped]."""
        return self._devices[0].table.counts.tolist() if self._devices else [0, 0]

    def set_counts(self, counts: Iterable[int]) -> None:
        """Sets both counts, on every device; forgets the overflows, whose stamps are numbers of attempts."""
        values = list(counts)
        for d in self._devices:
            for count, value in zip(d.table.counts, values, strict=True):
                count.fill_(value)
            d.table.stamps.zero_()
            d.table.tallies[..., layout.ATTEMPT] = -1
            d.table.found.zero_()

    def overflowed(self, loss_id: int | None) -> list[int]:
        """Positions of the parameters that overflowed last (in this loss)."""
        losses = range(self.num_losses) if loss_id is None else [loss_id]
        tallies = [self.tally(k) for k in losses]
        last = max((tally.overflow for tally in tallies), default=0)
        return sorted({i for tally in tallies if last > 0 and tally.overflow == last for i in tally.nonfinite})

    def tally(self, loss_id: int) -> Tally:
        """What the last `inspect` that saw this loss has counted in its gradients."""
        return counted([(d.table, d.positions) for d in self._devices], loss_id)


def memory_of(param: Tensor) -> tuple[Any, ...]:
    """Where and how a parameter lies in memory: `.to(memory_format=...)` and `.data = ...` change it."""
    return param.data_ptr(), param.shape, param.stride()


def _in_layout(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient with the parameter's strides: channels_last parameters may get contiguous gradients."""
    if same_layout(grad, param):
        return grad
    return torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
