"""The same scaled gradients into torch's for-loop optimizer under torch.amp.GradScaler, and into mpengine's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mpengine
from benchmarks.parity.tasks import Task


@dataclass(frozen=True)
class Finish:
    """How far apart the two are at the end of a race."""

    taken: int  # steps, of the network that took most
    skipped: int
    growths: int
    same_history: bool  # scale, growth tracker and skips of every iteration, bit for bit
    rounded: bool  # every fp16 weight is its master, rounded
    ulp_a_step: float  # of the weight that is furthest apart


class Race:
    """Steps both optimizers, from the same FP32 weights, on gradients that somebody else computed.

    A ULP is that of the largest value the weight itself has had: a weight that ends near zero carries the roundings
    of where it has been.

    Args:
        task: Gives weights and optimizers.
        seed: Of the weights.
        options: Of both scalers.
    """

    def __init__(self, task: Task, seed: int, **options: Any) -> None:
        self.theirs = task.build(seed)
        self.ours = task.build(seed)
        self.their_scaler = torch.amp.GradScaler("cpu", **options)
        self.our_scaler = mpengine.GradScaler("cpu", **options)
        self.their_optimizers = [task.optimizer(network.parameters()) for network in self.theirs]
        self.our_optimizers = [
            mpengine.prepare(network, task.optimizer(network.parameters()), self.our_scaler, keep_fp32=task.keep_fp32)
            for network in self.ours
        ]
        for scaler in (self.their_scaler, self.our_scaler):
            scaler.scale(torch.ones((), requires_grad=True))  # the first scaled loss brings the scale to its device
        self.largest = [param.detach().abs() for network in self.theirs for param in network.parameters()]
        self.taken = [0] * len(self.theirs)
        for i, optimizer in enumerate(self.their_optimizers):
            optimizer.register_step_post_hook(lambda *_, i=i: self._count(i))
        self.iterations = self.growths = 0
        self.same_history = True

    def _count(self, which: int) -> None:
        self.taken[which] += 1

    def step(self, which: int, network: nn.Module) -> None:
        """Steps one network's optimizers on the gradients of `network`, scaled by the scale in force.

        A gradient is first rounded to the dtype of our parameter, so that both see the same numbers.
        """
        ours, theirs = self.ours[which].parameters(), self.theirs[which].parameters()
        for our, their, source in zip(ours, theirs, network.parameters(), strict=True):
            if source.grad is None:
                raise RuntimeError(f"a parameter of network {which} has no gradient: call backward() first")
            our.grad = source.grad.to(our.dtype, copy=True)
            their.grad = our.grad.to(torch.float32, copy=True)
        self.their_scaler.step(self.their_optimizers[which])
        self.our_optimizers[which].step()

    def update(self) -> None:
        """Ends an iteration: both scales move, and are compared."""
        before = self.their_scaler.get_scale()
        self.their_scaler.update()
        self.our_scaler.update()
        self.iterations += 1
        self.growths += self.their_scaler.get_scale() > before
        (ours,) = self.our_scaler.statistics()
        self.same_history &= (
            self.their_scaler.get_scale() == ours.scale
            and self.their_scaler._get_growth_tracker() == ours.growth_tracker
            and self.taken == [optimizer.steps_taken for optimizer in self.our_optimizers]
        )
        values = [param for network in self.theirs for param in network.parameters()]
        for largest, value in zip(self.largest, values, strict=True):
            torch.maximum(largest, value.detach().abs(), out=largest)

    def finish(self) -> Finish:
        """Compares the weights."""
        theirs = [param.detach() for network in self.theirs for param in network.parameters()]
        masters = [master.detach() for optimizer in self.our_optimizers for master in optimizer.master_params()]
        weights = [param.detach() for network in self.ours for param in network.parameters()]
        pairs = zip(theirs, masters, self.largest, strict=True)
        return Finish(
            taken=max(self.taken),
            skipped=sum(self.iterations - taken for taken in self.taken),
            growths=self.growths,
            same_history=self.same_history,
            rounded=all(torch.equal(w, m.to(w.dtype)) for w, m in zip(weights, masters, strict=True)),
            ulp_a_step=max(_ulps(*pair) for pair in pairs) / max(1, max(self.taken)),
        )


def _ulps(theirs: Tensor, ours: Tensor, largest: Tensor) -> float:
    """The largest difference, in ULP of what the weight has been at most; NaN counts as infinitely far."""
    spacing = np.spacing(largest.numpy()).astype(np.float64)
    apart = float((np.abs(theirs.double().numpy() - ours.double().numpy()) / spacing).max())
    return apart if apart == apart else float("inf")
