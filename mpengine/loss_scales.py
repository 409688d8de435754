"""The scales of all losses on the device: their values, counters and votes, and the labels that refer to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mpengine import backend
from mpengine.gradients import Label
from mpengine.kernels import layout
from mpengine.scaling import ScalePolicy, ScaleState
from mpengine.upload import to_device


class LossScales:
    """The device's side of a `GradScaler`; every method but `states` works without a sync.

    Attributes:
        scales: float32[L].
        counters: int32[L, layout.COUNTERS].
        labels: One for each loss: the scale in force.
    """

    def __init__(self, states: Sequence[ScaleState], policy: ScalePolicy, device: torch.device, rows: int) -> None:
        self.scales = to_device(np.array([s.scale for s in states], dtype=np.float32), device)
        self.counters = to_device(np.array([s.counters() for s in states], dtype=np.int32), device)
        self._previous = self.scales.clone()  # float32[L], from before the last update
        self._each = list(zip(self.scales.unbind(), self._previous.unbind(), strict=True))  # their elements
        self.labels = [Label(k, scale) for k, (scale, _) in enumerate(self._each)]
        self._retired: list[weakref.ref[Label] | None] = [None] * len(states)  # whose scale is in _previous
        self._votes = torch.zeros(rows, len(states), layout.VOTE, dtype=torch.float32, device=device)
        self._vote_rows = list(self._votes)
        self._policy = to_device(np.array(policy.row()), device)

    def vote_row(self, row: int) -> Tensor:
        """float32[L, layout.VOTE]: the votes of one optimizer."""
        while row >= len(self._vote_rows):
            self._votes = torch.cat([self._votes, torch.zeros_like(self._votes)])
            self._vote_rows = list(self._votes)
        return self._vote_rows[row]

    def update(self, consumed: dict[int, list[Label]], losses: Sequence[int]) -> None:
        """Moves the scales of `losses` by the votes; `consumed` holds the labels that the votes are about."""
        for k in losses:
            labels = consumed.get(k, [])
            if labels:
                self._retire(k, fresh=any(not label.counted for label in labels))
            for label in labels:
                label.counted = True
        update_scale = backend.of(self.scales.device).update_scale
        if len(losses) == len(self.labels):
            update_scale(self.scales, self._previous, self.counters, self._votes, self._policy)
            return
        for k in losses:
            votes = self._votes[:, k : k + 1].contiguous()
            one = slice(k, k + 1)
            update_scale(self.scales[one], self._previous[one], self.counters[one], votes, self._policy)
            self._votes[:, k].zero_()

    def keep_labels(self) -> Callable[[], None]:
        """Returns what brings all labels back to how they are now."""
        labels, retired = list(self.labels), list(self._retired)
        older = [label for reference in retired if reference is not None and (label := reference()) is not None]
        known = [(label, label.scale, label._counted) for label in labels + older]

        def restore() -> None:
            self.labels[:], self._retired[:] = labels, retired
            for label, scale, counted in known:
                label.scale, label._counted = scale, counted

        return restore

    def set_scale(self, loss_id: int, value: float | Tensor) -> None:
        """Sets one scale and drops the votes on it; its counters stay."""
        self._set(loss_id, value)
        self._votes[:, loss_id].zero_()

    def set_states(self, states: Sequence[ScaleState]) -> None:
        """Sets scales and counters; the votes stay, as in torch."""
        for k, state in enumerate(states):
            self._set(k, state.scale)
        self.counters.copy_(torch.tensor([s.counters() for s in states], dtype=torch.int32))

    def _set(self, loss_id: int, value: float | Tensor) -> None:
        self._retire(loss_id, fresh=False)
        self.scales[loss_id] = value

    def set_policy(self, policy: ScalePolicy) -> None:
        """Sets the policy that the device reads."""
        self._policy.copy_(torch.tensor(policy.row(), dtype=torch.float64))

    def states(self) -> list[ScaleState]:
        """The state of every loss's scale, read from the device (one sync)."""
        rows = zip(self.scales.tolist(), self.counters.tolist(), strict=True)
        return [ScaleState(scale, *counters) for scale, counters in rows]

    def _retire(self, loss_id: int, fresh: bool) -> None:
        """The scale of a loss is about to change: gradients under the old value keep the old value."""
        reference = self._retired[loss_id]
        older = reference() if reference is not None else None
        if older is not None and older.scale is not None:
            older.scale = older.scale.clone()  # _previous is about to be written
        self._retired[loss_id] = None
        old = self.labels[loss_id]
        if fresh:  # update_scale writes the old value there
            old.scale = self._each[loss_id][1]
            self._retired[loss_id] = weakref.ref(old)
        else:
            old.scale = self.scales[loss_id].clone()
        self.labels[loss_id] = Label(loss_id, self._each[loss_id][0])
