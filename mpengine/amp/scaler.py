"""`LossScaler`: the engine's `GradScaler`, but each scale moves as soon as its loss's backward pass was checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from mpengine.amp.overflow_log import OverflowLog
from mpengine.amp.verdicts import Verdicts
from mpengine.execution import Execution
from mpengine.grad_scaler import GradScaler, _OptimizerState
from mpengine.kernels import layout
from mpengine.labels import UNSCALED, Pending
from mpengine.optimizer import MixedPrecisionOptimizer
from mpengine.sources import Ballot, Column


@runtime_checkable
class Spoilable(Protocol):
    """`AmpOptimizer`, as far as a failed pass concerns it."""

    def spoil(self, loss_id: int) -> None:
        """See `AmpOptimizer.spoil`."""


_Look = tuple[MixedPrecisionOptimizer, Execution, Pending, list[Column] | None]


class LossScaler(GradScaler):
    """A `GradScaler` for loops without `update()`: `check_` judges a backward pass, and the step obeys.

    ```
    scale(loss, k).backward()
    check_(optimizers, k)   inspects the new gradients of loss k on these optimizers; its scale grows, waits or backs
                            off; the verdict stays with each of them, on the device, until its next step
    optimizer.step()        skips by the verdict, or where a pending gradient is not finite; casts no votes
    ```

    Gradients that no scaled loss has made count as unscaled. Passes that nobody has checked are checked by the step.

    Args:
        kwargs: Of `GradScaler`.
        overflow_log: Is told where scales may have moved.
    """

    def __init__(self, overflow_log: OverflowLog, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.overflow_log = overflow_log

    def _make_transient(self) -> None:
        super()._make_transient()
        self._ledger.zeros_drop = True
        self._ledger.refuses_replaced = True
        self.verdicts = Verdicts(self._peek, self._ledger.edited)

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
        looks = [look for optimizer in optimizers if (look := self._look(optimizer, loss_id)) is not None]
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
        self.verdicts.add(optimizers, found_inf, [look[0] for look in looks])
        if moves_scale:
            self.update(loss_id=loss_id)
            self.overflow_log.look(scales.scales, scales.counters)
        else:
            self._drop_votes(loss_id)

    def _look(self, optimizer: MixedPrecisionOptimizer, loss_id: int) -> _Look | None:
        """What is to be inspected, checked; None: nothing."""
        new = _unchecked(self._peek(optimizer), loss_id)
        if not new.active:
            return None
        execution = optimizer._ready()
        columns = None if optimizer._unscaled else execution.columns(new)
        return optimizer, execution, new if columns is not None else optimizer._checked(new), columns

    def _drop_votes(self, loss_id: int) -> None:
        for state in self._states.values():
            for label in state.labels.pop(loss_id, ()):
                label.counted = True
            self._initialized("check_").vote_row(state.row)[loss_id].zero_()

    def has_unchecked(self, loss_id: int) -> bool:
        """Whether a pass of this loss waits to be checked, on any optimizer."""
        return bool(self._unchecked_optimizers(loss_id))

    def _unchecked_optimizers(self, loss_id: int) -> list[MixedPrecisionOptimizer]:
        watched = [o for o in self._ledger.optimizers if isinstance(o, MixedPrecisionOptimizer)]
        return [o for o in watched if _unchecked(self._peek(o), loss_id).active]

    @property
    def passes(self) -> int:
        """Backward passes of scaled losses so far."""
        return self._ledger.passes

    def spoil(self, loss_id: int) -> None:
        """A pass of a loss failed on top of unchecked ones: no optimizer that has them may step them."""
        for optimizer in self._unchecked_optimizers(loss_id):
            if isinstance(optimizer, Spoilable):
                optimizer.spoil(loss_id)

    def discard(self, loss_id: int) -> None:
        """Drops the gradients of unchecked passes of a loss; what was pending before is there as it was."""
        self._ledger.discard(loss_id)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.overflow_log = OverflowLog(enabled=False)

    # What the step asks.

    def _pending(self, optimizer: torch.optim.Optimizer) -> Pending:
        return _as_column(super()._pending(optimizer))

    def _peek(self, optimizer: torch.optim.Optimizer) -> Pending:
        """The same between the passes of an accumulation under `no_sync()`, of which a part is not averaged yet."""
        self._state(optimizer)
        return _as_column(self._ledger.peek(optimizer, self._initialized("check_").labels[0]))

    def check_rest(self, optimizer: MixedPrecisionOptimizer) -> None:
        """Checks the passes that left gradients on this optimizer and were not checked, on all optimizers."""
        waiting = self._peek(optimizer).labels
        for loss_id in sorted({label.loss_id for label in waiting if not label.counted}):
            self.check_(self._unchecked_optimizers(loss_id), loss_id)

    def _begin_step(self, optimizer: torch.optim.Optimizer) -> _OptimizerState:
        assert isinstance(optimizer, MixedPrecisionOptimizer)
        self.check_rest(optimizer)
        state, found_inf = self._state(optimizer), self.verdicts.on(optimizer)
        state.found_inf = {} if found_inf is None else {found_inf.device: found_inf}
        return state

    def _ballots(self, state: _OptimizerState | None, pending: Pending) -> list[Ballot]:
        return [Ballot(layout.ABSENT)] * self.num_losses

    def _end_step(self, optimizer: torch.optim.Optimizer, pending: Pending) -> None:
        self._state(optimizer).reset()
        self._ledger.forget_edited(optimizer)
        self.verdicts.stepped(optimizer)

    def _renew(self, state: _OptimizerState) -> None:
        """After an update: gradients by hand are unscaled before it and after it."""
        state.reset()


def _unchecked(pending: Pending, loss_id: int) -> Pending:
    """Those gradients of a loss that no check has seen."""
    column = pending.column
    if column is not None:
        label, grads = column
        return pending if label.loss_id == loss_id and not label.counted else Pending([[] for _ in grads])
    rows = [[(k, grad) for k, grad in row if k.loss_id == loss_id and not k.counted] for row in pending]
    return _as_column(Pending(rows))


def _as_column(pending: Pending) -> Pending:
    """The same, said in the way that is quick to step, where all gradients are under one label."""
    labels = pending.labels if pending.column is None else []
    if len(labels) != 1 or any(len(row) > 1 for row in pending):
        return pending
    return Pending(grads=[row[0][1] if row else None for row in pending], label=labels[0])
