"""The equations of torch's fused optimizers in float64, and how far any FP32 execution of them may lie from it.

This is running error analysis (Higham, Accuracy and Stability of Numerical Algorithms, section 3.3). Every quantity is
a float64 value and a bound on how far the FP32 one may be from it. An operation passes its arguments' errors on, and
adds its own roundings, `k` of them, each at most U = 2^-24 of the result:

```
x + y    e_x + e_y
x * y    |x| e_y + |y| e_x + e_x e_y            each:  + k U (|result| + error) + k TINY
x / y    (e_x + |x / y| e_y) / (|y| - e_y)
sqrt x   e_x / sqrt(x), at most sqrt(e_x)
lerp     (1 - w) e_x + w e_y + 3 k U min(w, 1 - w) |y - x|
```

A scalar that is computed in float64 and rounded once carries U times its value. With k = 1 this bounds an execution
that performs the operations as they stand here, each correctly rounded: the engine's. With k = 2 it bounds torch's as
well: its operations are these, some fused (fewer roundings), its vector square root is within 1 ULP = 2 U, and it
computes some scalars in FP32 where lr is a tensor (two roundings).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

U = 2.0**-24  # half a ULP, relative
TINY = 2.0**-149  # what an FP32 result may lose to underflow
_K = np.array([[1.0], [2.0]])  # both bounds at once: row 0 is the engine's, row 1 torch's


class Near:
    """float64[n] values, and float64[2, n] bounds on the errors of their FP32 executions."""

    def __init__(self, value: np.ndarray, error: np.ndarray | float = 0.0) -> None:
        self.value = value
        self.error = np.broadcast_to(error, (2, value.size))

    @classmethod
    def scalar(cls, value: float, like: Near, relative: np.ndarray | float = U) -> Near:
        exact = value in (0.0, 1.0, -1.0)
        return cls(np.full_like(like.value, value), 0.0 if exact else _K * relative * abs(value))

    @staticmethod
    def _rounded(value: np.ndarray, error: np.ndarray) -> Near:
        return Near(value, error + _K * (U * (np.abs(value) + error) + TINY))

    def __add__(self, other: Near) -> Near:
        return self._rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Near) -> Near:
        return self._rounded(self.value - other.value, self.error + other.error)

    def __mul__(self, other: Near | float) -> Near:
        other = other if isinstance(other, Near) else Near.scalar(other, self)
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return self._rounded(self.value * other.value, error)

    def __truediv__(self, other: Near) -> Near:
        value = self.value / other.value
        smallest = np.maximum(np.abs(other.value) - other.error, 1e-300)
        return self._rounded(value, (self.error + np.abs(value) * other.error) / smallest)

    def sqrt(self) -> Near:
        root = np.sqrt(self.value)
        return self._rounded(root, np.minimum(self.error / np.maximum(root, 1e-300), np.sqrt(self.error)))

    def maximum(self, other: Near) -> Near:
        return Near(np.maximum(self.value, other.value), np.maximum(self.error, other.error))

    def lerp(self, end: Near, weight: float) -> Near:
        """`self + (end - self) * weight`, from the nearer end, as torch does it: weight 1 gives `end` itself.

        The error that `self` brings fades with `1 - weight`: it occurs twice, with opposite signs.
        """
        near = min(weight, 1.0 - weight)
        way = np.abs(end.value - self.value) + end.error + self.error
        passed = (1.0 - weight) * self.error + weight * end.error
        rounded = 3 * _K * U * near * way  # the difference, the weight and their product
        return self._rounded(self.value + (end.value - self.value) * weight, passed + rounded)

    def where(self, mask: np.ndarray, other: Near) -> Near:
        return Near(np.where(mask, self.value, other.value), np.where(mask, self.error, other.error))


class Oracle:
    """One of torch's optimizers on all tensors of one group, as one vector.

    Args:
        params: The initial values, exact.
        kind: The name of torch's class in lower case.
        start: What the state holds before the first step.
    """

    def __init__(self, params: Sequence[Tensor], kind: str, start: float = 0.0) -> None:
        self.equations = getattr(self, f"_{kind}")
        self.sizes = [p.numel() for p in params]
        self.p = Near(_flat(params))
        self.start = Near(np.full_like(self.p.value, start), _K * U * start)
        self.forget()

    @classmethod
    def of(cls, params: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Oracle:
        """The equations of this optimizer."""
        return cls(params, type(optimizer).__name__.lower(), optimizer.defaults.get("initial_accumulator_value", 0.0))

    def step(
        self, grads: Sequence[Tensor | None], group: Mapping[str, Any], clip: float = 1.0, clip_error: Any = 0.0
    ) -> None:
        """One step.

        Args:
            grads: The exact FP32 gradients; None leaves a tensor alone.
            group: torch's hyperparameters.
            clip: The clip coefficient.
            clip_error: The relative errors of its FP32 executions, float64[2, 1].
        """
        active = np.repeat([grad is not None for grad in grads], self.sizes)
        self.steps += active
        g = Near(_flat([torch.zeros(n) if grad is None else grad for n, grad in zip(self.sizes, grads, strict=True)]))
        if clip != 1.0:
            g = g * Near(np.full_like(g.value, clip), clip * np.asarray(clip_error))
        g = Near(-g.value, g.error) if group["maximize"] else g
        p, state = self.equations(g, group)
        self.p = p.where(active, self.p)
        for name, new in state.items():
            self.state[name] = new.where(active, self.state[name])

    def replace(self, which: int, value: Tensor, where: Tensor) -> None:
        """One tensor takes the exact values of another where the mask says so."""
        start = sum(self.sizes[:which])
        mask = np.zeros(self.p.value.size, dtype=bool)
        mask[start : start + self.sizes[which]] = where.reshape(-1).numpy()
        new = self.p.value.copy()
        new[start : start + self.sizes[which]] = _flat([value])
        self.p = Near(new).where(mask, self.p)

    def forget(self) -> None:
        """Starts with fresh state, as after `optimizer.state.clear()`."""
        self.state = dict.fromkeys(("buffer", "m", "v", "largest", "a"), self.start)
        self.steps = np.zeros(self.p.value.size, dtype=np.int64)

    def _decayed(self, g: Near, group: Mapping[str, Any]) -> Near:
        return g + self.p * float(group["weight_decay"]) if group["weight_decay"] != 0 else g

    def _sgd(self, g: Near, group: Mapping[str, Any]) -> tuple[Near, dict[str, Near]]:
        p, g, state = self.p, self._decayed(g, group), {}
        momentum = float(group["momentum"])
        if momentum != 0:
            buffer = self.state["buffer"] * momentum + g * (1.0 - group["dampening"])
            buffer = state["buffer"] = g.where(self.steps == 1, buffer)  # the first one is the gradient
            g = g + buffer * momentum if group["nesterov"] else buffer
        return p - g * float(group["lr"]), state

    def _adam(self, g: Near, group: Mapping[str, Any]) -> tuple[Near, dict[str, Near]]:
        p, m, v = self.p, self.state["m"], self.state["v"]
        lr, (beta1, beta2) = float(group["lr"]), map(float, group["betas"])
        weight_decay = float(group["weight_decay"])
        if weight_decay != 0 and group["decoupled_weight_decay"]:
            p = p * (1.0 - lr * weight_decay)
        elif weight_decay != 0:
            g = g + p * weight_decay
        m = m.lerp(g, 1.0 - beta1)
        v = v * beta2 + (g * (1.0 - beta2)) * g
        state = {"m": m, "v": v}
        if group["amsgrad"]:
            v = state["largest"] = self.state["largest"].maximum(v)
        steps = np.maximum(self.steps, 1)
        root_correction, step_size = 1.0 / np.sqrt(1.0 - beta2**steps), lr / (1.0 - beta1**steps)
        denominator = v.sqrt() * Near(root_correction, _K * U * root_correction) + Near.scalar(float(group["eps"]), p)
        return p - (m / denominator) * Near(step_size, _K * U * step_size), state

    _adamw = _adam

    def _rmsprop(self, g: Near, group: Mapping[str, Any]) -> tuple[Near, dict[str, Near]]:
        lr, alpha, momentum = float(group["lr"]), float(group["alpha"]), float(group["momentum"])
        g = self._decayed(g, group)
        v = self.state["v"] * alpha + (g * (1.0 - alpha)) * g
        state, square = {"v": v}, v
        if group["centered"]:
            m = state["m"] = self.state["m"].lerp(g, 1.0 - alpha)
            square = (v - m * m).maximum(Near(np.zeros_like(v.value)))
        root = square.sqrt() + Near.scalar(float(group["eps"]), v)
        if momentum == 0:
            return self.p - (g * lr) / root, state
        buffer = state["buffer"] = self.state["buffer"] * momentum + g / root
        return self.p - buffer * lr, state

    def _adagrad(self, g: Near, group: Mapping[str, Any]) -> tuple[Near, dict[str, Near]]:
        g = self._decayed(g, group)
        v = self.state["v"] + g * g
        rate = float(group["lr"]) / (1.0 + (np.maximum(self.steps, 1) - 1) * group["lr_decay"])
        root = v.sqrt() + Near.scalar(float(group["eps"]), v)
        return self.p - (g * Near(rate, _K * U * rate)) / root, {"v": v}

    def _adadelta(self, g: Near, group: Mapping[str, Any]) -> tuple[Near, dict[str, Near]]:
        lr, rho = float(group["lr"]), float(group["rho"])
        g, eps = self._decayed(g, group), Near.scalar(float(group["eps"]), self.p)
        v = self.state["v"] * rho + (g * (1.0 - rho)) * g
        way = ((self.state["a"] + eps).sqrt() / (v + eps).sqrt()) * g
        return self.p - way * lr, {"v": v, "a": self.state["a"] * rho + (way * (1.0 - rho)) * way}

    def distance(self, params: Sequence[Tensor], execution: int) -> float:
        """How far parameters are from the equations: the largest share of the bound of execution 0 or 1."""
        error = np.abs(_flat(params) - self.p.value)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = np.where(error == 0.0, 0.0, error / self.p.error[execution])
        return float(np.max(shares)) if np.isfinite(shares).all() else math.inf


def _flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([t.detach().double().reshape(-1).numpy() for t in tensors])


def clip_of(grads: Sequence[Tensor | None], max_norm: float | None) -> float:
    """`torch.nn.utils.clip_grad_norm_`'s coefficient, in float64."""
    if max_norm is None:
        return 1.0
    return min(1.0, max_norm / (norm_of(grads) + 1e-6))


def norm_of(grads: Sequence[Tensor | None]) -> float:
    """The norm over all gradients, in float64."""
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))
