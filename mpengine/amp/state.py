"""What one `initialize` has made, which of them is the latest, and the view of it that apex's scripts print."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import nn

from mpengine.amp.optimizer import AmpOptimizer
from mpengine.amp.properties import Properties
from mpengine.amp.scaler import LossScaler


class Amp:
    """The state of one `initialize`.

    Args:
        properties: What it did.
        scaler: The scales of its losses; None where it was disabled.
        models: What it was given. They are not kept alive.
        verbosity: As given.
    """

    def __init__(
        self, properties: Properties, scaler: LossScaler | None, models: Sequence[nn.Module], verbosity: int
    ) -> None:
        self.properties, self.scaler, self.verbosity = properties, scaler, verbosity
        self._models = [weakref.ref(model) for model in models]
        self._optimizers: list[weakref.ref[AmpOptimizer]] = []
        self.delayed: set[int] = set()  # losses of which a pass waits for the next one's check

    def add(self, optimizer: AmpOptimizer) -> None:
        """One of its optimizers; it keeps this state alive, not the other way round."""
        self._optimizers.append(weakref.ref(optimizer))
        optimizer.__dict__["_amp"] = self

    @property
    def models(self) -> list[nn.Module]:
        """Those that are alive."""
        return [model for reference in self._models if (model := reference()) is not None]

    @property
    def optimizers(self) -> list[AmpOptimizer]:
        """Those that are alive, and that no later call has replaced."""
        alive = [optimizer for reference in self._optimizers if (optimizer := reference()) is not None]
        return [optimizer for optimizer in alive if not optimizer.is_replaced]

    def end(self) -> None:
        """A later call has undone what this one did."""
        self._models.clear()
        for optimizer in self.optimizers:
            optimizer.retire()


_latest: Amp | None = None
_every: weakref.WeakSet[Amp] = weakref.WeakSet()


def begin(amp: Amp) -> None:
    """From now on functions without arguments speak of this one."""
    global _latest
    _latest = amp
    _every.add(amp)


def latest() -> Amp | None:
    """The state of the latest `initialize`; None before the first."""
    return _latest


def alive() -> list[Amp]:
    """Every one that some optimizer or the user still needs."""
    return list(_every)


def wrapper_of(optimizer: object) -> AmpOptimizer | None:
    """The optimizer that `initialize` returned, from itself or the one that it was given; None: from neither."""
    known = getattr(optimizer, "__dict__", {})
    found = optimizer if isinstance(optimizer, AmpOptimizer) else known.get("_amp_optimizer")
    return found if isinstance(found, AmpOptimizer) and "_amp" in found.__dict__ else None  # a copy has no state


def of(optimizer: AmpOptimizer) -> Amp:
    """The state of the `initialize` that made an optimizer."""
    amp: Amp = optimizer.__dict__["_amp"]
    return amp


class _LossScaler:
    """One loss's scale, as apex's `LossScaler` showed it. Each reading waits for the device."""

    def __init__(self, amp: Amp, loss_id: int) -> None:
        self._amp, self._loss_id = amp, loss_id

    def _scaler(self) -> LossScaler:
        assert self._amp.scaler is not None
        return self._amp.scaler

    def loss_scale(self) -> float:
        """The scale."""
        return self._scaler().get_scale(self._loss_id)

    @property
    def _loss_scale(self) -> float:
        return self.loss_scale()

    @_loss_scale.setter
    def _loss_scale(self, value: float) -> None:
        self._scaler().update(float(value), loss_id=self._loss_id)

    @property
    def _unskipped(self) -> int:
        return self._scaler().statistics()[self._loss_id].growth_tracker

    @property
    def dynamic(self) -> bool:
        """Whether the scale moves."""
        return self._amp.properties.loss_scale == "dynamic"


class AmpState:
    """A view of the latest `initialize`, of which apex's scripts print `loss_scalers[0].loss_scale()`."""

    @property
    def loss_scalers(self) -> list[_LossScaler]:
        """One for each loss; none where amp is disabled."""
        amp = _required()
        return [] if amp.scaler is None else [_LossScaler(amp, k) for k in range(amp.scaler.num_losses)]

    @property
    def opt_properties(self) -> Properties:
        """What was chosen."""
        return _required().properties

    @property
    def verbosity(self) -> int:
        """As given."""
        return _required().verbosity


def _required() -> Amp:
    if _latest is None:
        raise AttributeError("amp has no state yet: call amp.initialize first.")
    return _latest


amp_state = AmpState()
