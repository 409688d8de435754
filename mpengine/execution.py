"""One step on all devices of an optimizer: tables, gradients, hyperparameters, and the calls in their order.

The host's time counts: whatever a step does for each tensor is one call for all of them, where nothing has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpengine import backend
from mpengine.agreement import memory_of
from mpengine.gradients import as_sources
from mpengine.kernels import layout
from mpengine.labels import Pending
from mpengine.masters import DeviceSchedule, Entry, TensorTable, arena, same_layout
from mpengine.plain import cast_votes
from mpengine.rules import ASSIGN, BUILT_IN, Family
from mpengine.sources import Ballot, Column, Source, SourceTable
from mpengine.tally import Tally, counted
from mpengine.upload import Mirror, is_capturing, to_device


class _Numbers:
    """Float64 numbers on the device, uploaded when one of them changed, without a sync."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._mirror = device, Mirror(device)
        self._table: Tensor | None = None
        self._known: list[list[Any]] | None = None

    def set(self, rows: list[list[Any]], width: int) -> Tensor:
        """float64[len(rows), width]; a tensor on a GPU (a capturable lr) is copied there each time."""
        moving = []
        if any(isinstance(value, Tensor) for row in rows for value in row):
            moving = [(i, j, v) for i, row in enumerate(rows) for j, v in enumerate(row) if _on_cuda(v)]
            rows = [[0.0 if _on_cuda(value) else float(value) for value in row] for row in rows]
        if self._table is None or rows != self._known:
            table = np.array([_floats(g, row, width) for g, row in enumerate(rows)])
            self._table = self._mirror.follow(table)
            self._known = None if is_capturing(self._device) else rows  # a capture executes nothing
        for i, j, value in moving:
            self._table[i, j].copy_(value, non_blocking=True)
        return self._table


def _floats(group: int, row: list[Any], width: int) -> list[float]:
    try:
        return [float(value) for value in row] + [0.0] * (width - len(row))
    except (TypeError, ValueError):
        raise TypeError(
            f"group {group} of the optimizer has {row} among its hyperparameters; each must be a number. Set it in "
            "optimizer.param_groups."
        ) from None


def _on_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


class _Device:
    """All tensors of the optimizer on one device; `positions` are their places in the optimizer's order."""

    def __init__(self, device: torch.device, positions: list[int], entries: list[Entry], num_losses: int) -> None:
        self.device, self.positions = device, positions
        if device.type == "cuda":
            _check_kernels(entries)
        self.table = TensorTable(entries, num_losses, device)
        self.sources = SourceTable(device)
        self.hyper, self.max_norm = _Numbers(device), _Numbers(device)
        self.found = self.table.found[None]
        self.params = [entry.param for entry in entries]
        self._every = list(range(len(positions))) == positions

    def own(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """The gradients of this device's tensors, of those of all parameters."""
        return grads if self._every and len(grads) == len(self.positions) else [grads[i] for i in self.positions]


def _check_kernels(entries: Iterable[Entry]) -> None:
    """Raises RuntimeError where a rule is to run on CUDA and has no functions for it."""
    for rule in dict.fromkeys(entry.rule for entry in entries):
        if rule not in BUILT_IN and rule.kernels is None:
            raise RuntimeError(
                f"rule '{rule.name}' has no Triton functions, and its parameters lie on CUDA. Give their twins to "
                "declare(kernels=...), or step FP32 weights with the optimizer by itself."
            )


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
            _Device(device, positions, [entries[i] for i in positions], num_losses)
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

    def columns(self, pending: Pending) -> list[Column] | None:
        """The gradients on each device, where all are of the kinds, at the places and in the layouts of the last step.

        Then they need no other check.
        """
        if pending.column is None:
            return None
        label, grads = pending.column
        columns = []
        for d in self._devices:
            column = Column(d.own(grads), label.scale, label.loss_id)
            if not d.sources.knows(column):
                return None
            columns.append(column)
        return columns

    def inspect(self, pending: Pending, ballots: list[Ballot], columns: list[Column] | None = None) -> None:
        """Reads all pending gradients once.

        Args:
            pending: The gradients of all parameters.
            ballots: One for each loss.
            columns: The same gradients, if `columns` returned them.
        """
        for i, d in enumerate(self._devices):
            local = ballots
            if any(b.scale is not None for b in ballots):
                local = [b if b.scale is None else b._replace(scale=b.scale.to(d.device)) for b in ballots]
            if columns is not None:
                d.sources.set_column(columns[i], local)
            else:
                self._describe(d, pending, local)
            backend.of(d.device).inspect(d.table, d.sources)

    def _describe(self, d: _Device, pending: Pending, ballots: list[Ballot]) -> None:
        waiting = as_sources([pending[i] for i in d.positions], d.device)
        sources = [
            [s._replace(grad=_in_layout(s.grad, entry.param)) for s in one]
            for one, entry in zip(waiting, d.table.entries, strict=True)
        ]
        d.sources.set(sources, ballots)
        if pending.column is not None and all(map(_same_grads, waiting, sources)):
            label, grads = pending.column
            d.sources.learn(Column(d.own(grads), label.scale, label.loss_id))

    def decide(
        self,
        hyper: list[list[Any]],
        max_norm: float,
        family: Family | None,
        found_inf: Tensor | None,
        votes: Tensor | None,
    ) -> None:
        """Decides about the step: the same on every device, from the verdicts of all."""
        for d, schedule in zip(self._devices, self._schedules, strict=True):
            found, partials = self._verdicts(d)
            local_votes = None
            if votes is not None and d is self._devices[0]:
                local_votes = votes if votes.device == d.device else torch.zeros_like(votes, device=d.device)
            backend.of(d.device).decide(
                d.table,
                d.sources,
                found,
                partials,
                d.hyper.set(hyper, layout.HYPER),
                d.max_norm.set([[max_norm]], 1),
                family,
                None if found_inf is None else found_inf.to(d.device, non_blocking=True),
                local_votes,
                schedule,
            )
            if votes is not None and local_votes is not None and local_votes is not votes:
                votes.copy_(local_votes, non_blocking=True)

    def _verdicts(self, d: _Device) -> tuple[Tensor, Tensor]:
        """int32[D, L] and float64[P], on one device: what inspect found on all of them."""
        if len(self._devices) == 1:
            return d.found, d.table.partials
        found = [other.found.to(d.device, non_blocking=True) for other in self._devices]
        partials = [other.table.partials.to(d.device, non_blocking=True) for other in self._devices]
        return torch.cat(found), torch.cat(partials)

    def upload(self, hyper: list[list[Any]], max_norm: float) -> None:
        """Brings hyperparameters to the device, where they changed: for the replays of a CUDA graph."""
        for d in self._devices:
            d.hyper.set(hyper, layout.HYPER)
            d.max_norm.set([[max_norm]], 1)

    def written(self, pending: Pending, columns: list[Column] | None) -> list[Tensor]:
        """The parameters that have gradients."""
        if columns is None:
            return [self.entries[i].param for i in pending.active]
        return [param for d in self._devices for param in d.sources.of_active(d.params)]

    def trained(self) -> list[Tensor]:
        """Every parameter that has a master, or is its own."""
        return [param for d in self._devices for param in d.params]

    def update(self) -> None:
        """Applies the rules, where the decision is to step."""
        for d in self._devices:
            module = backend.of(d.device)
            for rule in d.table.update_chunks:
                if rule.measure is not None:
                    module.measure(d.table, d.sources, rule, d.table.decision)
                if rule.settle is not None:
                    module.settle(d.table, d.sources, rule, d.table.decision)
                module.update(d.table, d.sources, rule, d.table.decision)

    def release(self) -> None:
        """Lets go of the gradients, so that zeroing them frees their memory."""
        for d in self._devices:
            d.sources.release()

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


def _same_grads(one: list[Source], other: list[Source]) -> bool:
    return all(a.grad is b.grad for a, b in zip(one, other, strict=True))


def _in_layout(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient with the parameter's strides: channels_last parameters may get contiguous gradients."""
    if same_layout(grad, param) and not grad.is_neg():
        return grad
    return torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
