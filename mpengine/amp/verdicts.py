"""What an overflow leaves behind until the step: which optimizers skip, and for how long that holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from mpengine.labels import Pending


@dataclass
class _Verdict:
    """On the next step of one optimizer.

    Attributes:
        found_inf: float32, 0-dim: not 0 where the step is to be skipped.
        witnesses: The optimizers whose pending gradients say so; None: one of them has stepped since, so the verdict
            stands by itself.
    """

    found_inf: Tensor
    witnesses: weakref.WeakSet[Optimizer] | None


class Verdicts:
    """The verdicts on all optimizers of a scaler.

    A verdict belongs to gradients: where all that witness it are zeroed without a step, the batch was dropped, and the
    verdict with it. An optimizer that has gradients of the judged loss is its own witness.

    Args:
        pending: The pending gradients of an optimizer.
        edited: Whether somebody has written gradients of an optimizer since their pass.
    """

    def __init__(self, pending: Callable[[Optimizer], Pending], edited: Callable[[Optimizer], bool]) -> None:
        self._pending, self._edited = pending, edited
        self._of: weakref.WeakKeyDictionary[Optimizer, _Verdict] = weakref.WeakKeyDictionary()

    def add(self, optimizers: Iterable[Optimizer], found_inf: Tensor, judged: Sequence[Optimizer]) -> None:
        """The gradients of `judged` were looked at; a verdict from before stays in force beside the new one."""
        for optimizer in optimizers:
            witnesses = weakref.WeakSet([optimizer] if any(optimizer is own for own in judged) else judged)
            verdict = _Verdict(found_inf, witnesses)
            old = self._of.get(optimizer)
            if old is not None and self._holds(old):
                verdict.found_inf = torch.maximum(found_inf, old.found_inf)
                verdict.witnesses = None if old.witnesses is None else witnesses | old.witnesses
            self._of[optimizer] = verdict

    def on(self, optimizer: Optimizer) -> Tensor | None:
        """The verdict on the next step, as `decide` takes it."""
        verdict = self._of.get(optimizer)
        return verdict.found_inf if verdict is not None and self._holds(verdict) else None

    def forget(self, optimizer: Optimizer) -> None:
        """The optimizer zeroed its gradients."""
        self._of.pop(optimizer, None)

    def stepped(self, optimizer: Optimizer) -> None:
        """The optimizer has obeyed; others that it witnesses for are yet to."""
        self._of.pop(optimizer, None)
        for verdict in self._of.values():
            if verdict.witnesses is not None and optimizer in verdict.witnesses:
                verdict.witnesses = None

    def review(self) -> None:
        """Before a pass: drops verdicts whose gradients were zeroed, also by the model, also in place. No sync."""
        for optimizer, verdict in list(self._of.items()):
            if not self._holds(verdict):
                del self._of[optimizer]
            elif verdict.witnesses is not None and any(self._edited(witness) for witness in verdict.witnesses):
                rows = [row for witness in verdict.witnesses for row in self._pending(witness)]
                grads = [grad for row in rows for label, grad in row if label.counted]
                verdict.found_inf = verdict.found_inf * _any_nonzero(grads, verdict.found_inf.device)

    def _holds(self, verdict: _Verdict) -> bool:
        witnesses = verdict.witnesses
        return witnesses is None or any(label.counted for one in witnesses for label in self._pending(one).labels)


def _any_nonzero(grads: Sequence[Tensor], device: torch.device) -> Tensor:
    """1.0 where an element of some gradient is not 0 (NaN is not), else 0.0; float32, on `device`."""
    norms = [torch.linalg.vector_norm(grad, float("inf")).to(device, torch.float32) for grad in grads if grad.numel()]
    return (torch.stack(norms) != 0).any().float() if norms else torch.zeros((), device=device)
