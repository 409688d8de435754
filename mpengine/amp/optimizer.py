"""`AmpOptimizer`: what `initialize` returns; it stands in for the optimizer that the script made, by either name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from inspect import unwrap
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor

from mpengine import plain, validation
from mpengine.amp.scaler import LossScaler
from mpengine.gradients import parameters
from mpengine.kernels import layout
from mpengine.labels import Pending
from mpengine.optimizer import MixedPrecisionOptimizer
from mpengine.sources import Ballot


class AmpOptimizer(MixedPrecisionOptimizer):
    """A `MixedPrecisionOptimizer` for apex's loop, without `scaler.update()`.

    The wrapped optimizer's `step`, `zero_grad`, `state_dict` and `load_state_dict` become this one's, so a script may
    go on with the object that it made.

    Args:
        optimizer: See `MixedPrecisionOptimizer`.
        scaler: Judges the passes.
        names: The names of parameters in their models.
        originals: The FP32 values of parameters that were cast.
    """

    _stepping_inner = False
    _replaced = False
    _spoiled: int | None = None  # the loss of which a pass failed on top of delayed gradients
    _looks_for_edits = 3  # steps

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler,
        names: Mapping[Tensor, str],
        originals: Mapping[Tensor, Tensor],
    ) -> None:
        super().__init__(optimizer, scaler, _names=names, _originals=originals)
        own_step = optimizer.step

        def step(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            return own_step(*args, **kwargs) if self._stepping_inner else self.step(*args, **kwargs)

        step.__wrapped__ = getattr(own_step, "__func__", own_step)  # type: ignore[attr-defined]  # it still is this one's
        if hasattr(own_step, "_wrapped_by_lr_sched"):  # by a scheduler that warns where it does not find it again
            step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
        for name in ("zero_grad", "state_dict", "load_state_dict"):
            setattr(optimizer, name, MethodType(_same_of(self, name), optimizer))
        optimizer.__dict__["_amp_optimizer"] = self

    @property
    def loss_scaler(self) -> LossScaler:
        """The scaler that judges the passes."""
        return cast(LossScaler, self._scaler)

    @property
    def has_masters(self) -> bool:
        """Whether some parameter is not its own master."""
        return bool(self._masters)

    @property
    def is_replaced(self) -> bool:
        """Whether a later `initialize` has taken over."""
        return self._replaced

    def check_current(self) -> None:
        """Raises RuntimeError where a later `initialize` has taken over."""
        if self._replaced:
            raise RuntimeError(
                "this optimizer belongs to an earlier amp.initialize, and a later one was given the same model: use "
                "what the later one returned."
            )

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on the pending gradients of all losses; skipped where a listed backward pass overflowed.

        Raises:
            RuntimeError: A closure was passed; a later `initialize` has replaced this optimizer; or as
                `MixedPrecisionOptimizer.step`. Nothing has changed then.
        """
        if closure is not None:
            raise RuntimeError("Currently, Amp does not support closure use with optimizers.")
        if all(param.grad is None for param in parameters(self)):
            self._spoiled = None
            self.loss_scaler.verdicts.stepped(self)
            self._inner._opt_called = True  # type: ignore[attr-defined]  # schedulers ask
            return
        self.check_unspoiled()
        edited = self._are_edited()
        unwrap(MixedPrecisionOptimizer.step)(self)  # torch wraps each class's step with the hooks; once is enough
        if edited:
            _warn_of_edits()

    def spoil(self, loss_id: int) -> None:
        """A pass failed on top of delayed gradients, and what it added cannot be taken out of them."""
        self._spoiled = loss_id

    def check_unspoiled(self) -> None:
        """Raises RuntimeError where gradients hold a part of a pass that failed, and were not zeroed since."""
        if self._spoiled is not None and any(param.grad is not None for param in parameters(self)):
            raise RuntimeError(
                f"a backward pass of loss {self._spoiled} was broken off by an exception on top of gradients of passes "
                "with delay_unscale=True, which hold a part of it now. Drop them, with optimizer.zero_grad(), and "
                "begin the accumulation anew."
            )
        self._spoiled = None

    def _are_edited(self) -> bool:
        """Whether fp16 gradients were edited as they are, which in the first steps is worth a warning, and once."""
        if self._looks_for_edits == 0 or not self._masters:
            return False
        edited = self.loss_scaler._ledger.has_edited_scaled(self)
        self._looks_for_edits = 0 if edited else self._looks_for_edits - 1
        return edited

    def retire(self) -> None:
        """A later `initialize` takes over the parameters: from now on `step` is an error."""
        self._replaced = True
        self.step = MethodType(AmpOptimizer._refuse_step, self)  # type: ignore[method-assign]
        validation.wrappers.discard(self)

    def _refuse_step(self, closure: None = None) -> None:
        self.check_current()

    def _step_inner(self, *args: Any) -> None:
        self._stepping_inner = True
        try:
            super()._step_inner(*args)
        finally:
            self._stepping_inner = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all pending gradients, and with them the skip that an overflow among them called for."""
        super().zero_grad(set_to_none)
        self._spoiled = None
        if self._scaler is not None:
            self.loss_scaler.verdicts.forget(self)

    def unscale_pending(self) -> None:
        """Puts the unscaled FP32 sum of what is pending into `.grad` of parameters and masters. May be called again."""
        scaler = self.loss_scaler
        scaler.check_rest(self)  # afterwards nothing will be known of passes
        pending = scaler._pending(self)
        self._drop_stale(pending)
        if self._is_unscaled(pending):
            return
        votes, ballots = scaler._vote_row(self), [Ballot(layout.FRESH)] * scaler.num_losses
        if self._masters:
            self._unscale(ballots)
        else:  # in place: a script may hold on to the gradients, and they are as large as the weights
            plain.unscale(self, self._checked(pending), votes, ballots)
        scaler._ledger.unscaled(self, pending, own_memory=self.has_masters)
        # A script that clips an inf by value does not undo the skip, though nobody listed this optimizer.
        scaler.verdicts.add([self], (votes[:, 0] >= layout.OVERFLOW).any().float(), [self])
        votes.zero_()

    def fold(self, loss_id: int) -> None:
        """Several passes of a loss become one FP32 sum, as large as the masters.

        Set aside, each would keep its own gradients until the step. Passes that were delayed have added up already.
        """
        labels = self.loss_scaler._peek(self).labels
        several = sum(label.loss_id == loss_id for label in labels) > 1
        if several and all(label.counted for label in labels):
            self.unscale_pending()

    def _drop_stale(self, pending: Pending) -> None:
        """Where `model.zero_grad()` dropped a gradient, its master's goes too: a norm of them would count it."""
        for param, labelled in zip(parameters(self), pending, strict=True):
            if not labelled and param in self._unscaled and param in self._masters:
                if self._masters[param].grad is self._unscaled[param]:
                    self._masters[param].grad = None
                del self._unscaled[param]

    def _is_unscaled(self, pending: Pending) -> bool:
        for param, labelled in zip(parameters(self), pending, strict=True):
            if len(labelled) > 1 or any(label.scale is not None for label, _ in labelled):
                return False
            if labelled and param in self._masters and self._unscaled.get(param) is not labelled[0][1]:
                return False
        return True


def _warn_of_edits() -> None:
    warnings.warn(
        "gradients of the model's parameters were edited in place after scale_loss. At O2 and O3 those carry the "
        "loss's scale: a factor is right, but a norm or a value to clip at means another one there. Clip the unscaled "
        "gradients: torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), max_norm).",
        stacklevel=4,
    )


def _same_of(wrapper: AmpOptimizer, name: str) -> Any:
    def method(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        return getattr(wrapper, name)(*args, **kwargs)

    return method
