"""`LossScaler`: the engine's `GradScaler`, but each scale moves as soon as its loss's backward pass was checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpengine.amp.overflow_log import OverflowLog
from mpengine.grad_scaler import GradScaler, _OptimizerState
from mpengine.kernels import layout
from mpengine.labels import UNSCALED, Pending
from mpengine.optimizer import MixedPrecisionOptimizer
from mpengine.sources import Ballot


class LossScaler(GradScaler):
    """A `GradScaler` for loops without `update()`: `check_` judges a backward pass, and the step obeys.

    ```
    scale(loss, k).backward()
    check_(optimizers, k)   inspects the new gradients of loss k on these optimizers; its scale grows, waits or backs
                            off; found_inf stays with each of them, on the device, until its next step
    optimizer.step()        skips where found_inf is set or a pending gradient is not finite; casts no votes
    ```

    Gradients that no scaled loss has made count as unscaled. Passes that nobody has checked are checked by the step.
    `found_inf` belongs to the gradients: where all of these are zeroed, it is forgotten.
    """

    overflow_log = OverflowLog(enabled=False)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """See `GradScaler.watch`."""
        super().watch(optimizer)
        self._ledger.label_others(optimizer, UNSCALED)

    def check_(
        self, optimizers: Sequence[MixedPrecisionOptimizer], loss_id: int = 0, *, moves_scale: bool = True
    ) -> None:
        """Judges what backward passes of a loss have left on these optimizers since it was last judged. No sync.

        Args:
            optimizers: Wrapped with this scaler. An overflow on one of them makes all of them skip their next step.
            loss_id: The loss; its scale, and no other, moves by the rule of `scaling.next_state`.
            moves_scale: False: the scale stays, and the passes do not count.

        Raises:
            RuntimeError: A gradient cannot be stepped; see `MixedPrecisionOptimizer.step`. Nothing has changed then.
            LossScaleCollapse: See `GradScaler.update`.
        """
        scales = self._initialized("check_")
        self._check_loss_id(loss_id)
        pending = [self._pending(optimizer) for optimizer in optimizers]
        looks = []
        for optimizer, waiting in zip(optimizers, pending, strict=True):
            new = _unchecked(waiting, loss_id)
            if new.active:
                execution = optimizer._ready()
                columns = None if optimizer._unscaled else execution.columns(new)
                looks.append((optimizer, execution, new if columns else optimizer._checked(new), columns))
        if not looks:
            return
        ballots = [Ballot(layout.FRESH if k == loss_id else layout.ABSENT) for k in range(self.num_losses)]
        found_inf = torch.zeros((), device=scales.scales.device)
        for optimizer, execution, new, columns in looks:
            row = self._vote_row(optimizer)
            execution.inspect(new, ballots, columns)
            execution.cast_votes(row, ballots)
            execution.release()
            found_inf = torch.maximum(found_inf, (row[loss_id, 0] >= layout.OVERFLOW).float())
            self._consume(self._state(optimizer), new)
        for optimizer, waiting in zip(optimizers, pending, strict=True):
            self._remember(self._state(optimizer), waiting, found_inf)
        if moves_scale:
            self.update(loss_id=loss_id)
            self.overflow_log.look(scales.scales, scales.counters)
        else:
            self._set_votes_aside(loss_id)

    def _remember(self, state: _OptimizerState, waiting: Pending, found_inf: Tensor) -> None:
        for old in state.found_inf.values() if _has_checked(waiting) else ():
            found_inf = torch.maximum(found_inf, old)
        state.found_inf = {found_inf.device: found_inf}

    def _set_votes_aside(self, loss_id: int) -> None:
        for state in self._states.values():
            for label in state.labels.pop(loss_id, ()):
                label.counted = True
            self._initialized("check_").vote_row(state.row)[loss_id].zero_()

    def recall(self, optimizers: Sequence[MixedPrecisionOptimizer]) -> None:
        """Forgets `found_inf` of optimizers whose checked gradients have been zeroed since. No sync."""
        for optimizer in optimizers:
            state = self._state(optimizer)
            if not state.found_inf:
                continue
            pending = self._pending(optimizer)
            if not _has_checked(pending):
                state.found_inf = {}
            elif self._ledger.edited(optimizer):  # perhaps to zeros, in place
                grads = [grad for labelled in pending for label, grad in labelled if label.counted]
                rest = _any_nonzero(grads, next(iter(state.found_inf)))
                state.found_inf = {device: found_inf * rest for device, found_inf in state.found_inf.items()}

    def forget(self, optimizer: MixedPrecisionOptimizer) -> None:
        """Forgets `found_inf`: the optimizer zeroed its gradients."""
        self._state(optimizer).found_inf = {}

    def verdict(self, optimizer: MixedPrecisionOptimizer) -> bool | None:
        """Whether its next step will be skipped; None where nothing came since its last one. Waits for the device."""
        found_inf = self._begin_step(optimizer).found_inf.values()
        return any(map(bool, found_inf)) if found_inf else None

    def has_unchecked(self, loss_id: int) -> bool:
        """Whether a pass of this loss waits to be checked, on any optimizer."""
        watched = [state.optimizer() for state in self._states.values()]
        return any(o is not None and bool(_unchecked(self._pending(o), loss_id).active) for o in watched)

    def discard(self, loss_id: int) -> None:
        """Drops the gradients of unchecked passes of a loss; what was pending before is there as it was."""
        self._ledger.discard(loss_id)

    # What the step asks.

    def _pending(self, optimizer: torch.optim.Optimizer) -> Pending:
        return _as_column(super()._pending(optimizer))

    def _begin_step(self, optimizer: torch.optim.Optimizer) -> _OptimizerState:
        assert isinstance(optimizer, MixedPrecisionOptimizer)
        self.recall([optimizer])
        waiting = self._pending(optimizer).labels
        for loss_id in sorted({label.loss_id for label in waiting if not label.counted}):
            self.check_([optimizer], loss_id)
        return self._state(optimizer)

    def _ballots(self, state: _OptimizerState, pending: Pending) -> list[Ballot]:
        return [Ballot(layout.ABSENT)] * self.num_losses

    def _end_step(self, optimizer: torch.optim.Optimizer, pending: Pending) -> None:
        self._state(optimizer).reset()
        self._ledger.forget_edited(optimizer)

    def _renew(self, state: _OptimizerState) -> None:
        """After an update: a verdict outlives it, and gradients by hand stay unscaled."""
        found_inf = state.found_inf
        state.reset()
        state.found_inf = found_inf


def _unchecked(pending: Pending, loss_id: int) -> Pending:
    """Those gradients of a loss that no check has seen."""
    column = pending.column
    if column is not None:
        label, grads = column
        return pending if label.loss_id == loss_id and not label.counted else Pending([[] for _ in grads])
    rows = [[(k, grad) for k, grad in row if k.loss_id == loss_id and not k.counted] for row in pending]
    return _as_column(Pending(rows))


def _has_checked(pending: Pending) -> bool:
    return any(label.counted for label in pending.labels)


def _as_column(pending: Pending) -> Pending:
    """The same, said in the way that is quick to step, where all gradients are under one label."""
    labels = pending.labels if pending.column is None else []
    if len(labels) != 1 or any(len(row) > 1 for row in pending):
        return pending
    return Pending(grads=[row[0][1] if row else None for row in pending], label=labels[0])


def _any_nonzero(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """1.0 where an element of some gradient is not 0 (NaN is not), else 0.0; float32, on `device`."""
    norms = [torch.linalg.vector_norm(grad, float("inf")).to(device, torch.float32) for grad in grads if grad.numel()]
    return (torch.stack(norms) != 0).any().float() if norms else torch.zeros((), device=device)
