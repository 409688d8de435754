"""Our optimizer, torch's on FP32, and the equations in float64, side by side on the same gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpengine import MixedPrecisionOptimizer
from tests.harness import BRAIN, HALF, SINGLE, parameters, same_bits, twins_of
from tests.oracle import Oracle, U, clip_of, norm_of

STEPS = 200


def few_parameters() -> list[Tensor]:
    """One of each dtype, in one of the three shapes."""
    vector, _, _, _, matrix, _, _, _, scalar = parameters((HALF, SINGLE, BRAIN))
    return [vector, matrix, scalar]


def gradients_of(params: list[Tensor], step: int) -> list[Tensor | None]:
    """Gradients of every size, in the dtype of their parameter; now and then one is missing."""
    generator = torch.Generator().manual_seed(step)
    size = 10.0 ** (torch.rand((), generator=generator).item() * 3 - 2)
    grads: list[Tensor | None] = [(torch.randn(p.shape, generator=generator) * size).to(p.dtype) for p in params]
    if step % 7 == 3:
        grads[step % len(grads)] = None
    return grads


class Race:
    """Our optimizer, torch's on FP32, and the equations, side by side."""

    def __init__(
        self,
        cls: type[torch.optim.Optimizer],
        options: dict[str, Any],
        lr: float | Tensor = 0.01,
        max_grad_norm: float | None = None,
    ) -> None:
        self.params = few_parameters()
        self.twins = twins_of(self.params)
        mine, yours = (lr.clone() if isinstance(lr, Tensor) else lr for _ in range(2))
        self.ours = MixedPrecisionOptimizer(cls(self.params, lr=mine, **options), max_grad_norm=max_grad_norm)
        self.theirs = cls(self.twins, lr=yours, foreach=False, **options)
        self.oracle = Oracle.of(self.twins, self.theirs)
        self.max_grad_norm = max_grad_norm
        self.norms: list[tuple[float, float, float]] = []
        self.path = 0.0  # what the weight that moved most has moved, step by step

    def run(self, steps: range = range(STEPS)) -> Race:
        for step in steps:
            self._set_lr(0.02 * (1.0 + math.cos(step / 15.0)) + 1e-4)
            grads = gradients_of(self.params, step)
            for param, twin, grad in zip(self.params, self.twins, grads, strict=True):
                param.grad = None if grad is None else grad.clone()
                twin.grad = None if grad is None else grad.to(SINGLE, copy=True)
            before = self.oracle.p.value
            self._step(grads)
            self.path += float(np.abs(self.oracle.p.value - before).max())
            self.check()
        return self

    def _set_lr(self, value: float) -> None:
        for group in (*self.ours.param_groups, *self.theirs.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _step(self, grads: list[Tensor | None]) -> None:
        # The clip coefficient is off, relatively, by: ours, 1 U of the squares and of the root, + 1e-6, max_norm and
        # the quotient; torch's, a rounding of each sum as well, of all n elements.
        numel = sum(grad.numel() for grad in grads if grad is not None)
        clip_error = np.array([[6.0], [2.0 * numel + 16.0]]) * U
        self.oracle.step(grads, self.theirs.param_groups[0], clip_of(grads, self.max_grad_norm), clip_error)
        if self.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.twins, self.max_grad_norm, foreach=False)
        self.ours.step()
        self.theirs.step()
        if self.max_grad_norm is not None:
            self.norms.append((self.ours.last_grad_norm, float(norm), norm_of(grads)))

    def check(self) -> None:
        """Raises AssertionError where a weight lies beyond its bound, or is not its master rounded."""
        masters = list(self.ours.master_params())
        for param, master in zip(self.params, masters, strict=True):
            assert same_bits(param, master.to(param.dtype)), "the parameter is not its master, rounded"
        assert self.oracle.distance(masters, 0) <= 1.0, "ours is beyond its bound"
        assert self.oracle.distance(self.twins, 1) <= 1.0, "torch's is beyond its bound"

    def bound_in_ulp(self) -> float:
        """The bound on our weights, in ULP a step of the largest weight and the path's length."""
        ulp = 2.0 * U * (np.abs(self.oracle.p.value).max() + self.path)
        return float(self.oracle.p.error[0].max() / (STEPS * ulp))
