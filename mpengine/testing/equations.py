"""A rule's optimizer beside the paper's equations, as somebody else has written them in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from mpengine.testing.training import Make, checked

Expected = Callable[[np.ndarray, np.ndarray, dict[str, Any], Mapping[str, Any]], tuple[np.ndarray, dict[str, Any]]]
LONG = 1000  # steps, of the comparison that looks for what is otherwise later on
_LOOSER = 100.0  # an FP32 0.9999 is off by 2^-25: in LONG steps 3e-5 of a moment, where the usual tolerance is 1e-5
_SIZE, _FEW = 1000, 50
_ZERO_STEPS = 3


class _Tensor:
    """A weight of the optimizer, and what the equations make of it."""

    def __init__(self, name: str, values: torch.Tensor) -> None:
        self.name, self.size = name, len(values)
        self.param = torch.nn.Parameter(values)
        self.p = values.double().numpy().copy()
        self.state: dict[str, Any] = {}
        self.way, self.largest = np.zeros(self.size), np.abs(self.p)

    def expect(self, expected: Expected, hyper: Mapping[str, Any]) -> None:
        """One step of the equations, on the gradient that the parameter has."""
        assert self.param.grad is not None
        before = self.p
        with np.errstate(all="ignore"):
            returned = expected(before.copy(), self.param.grad.double().numpy(), self.state, hyper)
        self.p, self.state = _checked(returned, self.size)
        self.way, self.largest = self.way + np.abs(self.p - before), np.maximum(self.largest, np.abs(self.p))

    def deviation(self, step: int, tolerance: float) -> float:
        """The largest beyond the rounding of the weights, as a fraction of the way."""
        here = self.param.detach().double().numpy()
        beyond = np.maximum(np.abs(here - self.p) - self.rounding(step), 0.0)
        excess = beyond - tolerance * self.way
        if not (excess <= 0.0).all():
            i = int(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)))
            raise AssertionError(
                f"after step {step} weight {i} of {self.name} is {here[i]:.9g}, the equations' is {self.p[i]:.9g}: "
                f"{beyond[i]:.3g} apart, on a way of {self.way[i]:.3g} that allows {tolerance * self.way[i]:.3g}; "
                f"{int((~(excess <= 0.0)).sum())} of {self.size} weights are as far."
            )
        return float(np.max(beyond / np.maximum(self.way, 1e-300)))

    def rounding(self, steps: int) -> np.ndarray:
        """What rounding the weights to FP32 may have made, twice over."""
        return steps * 2.0**-23 * self.largest


def deviation(make: Make, expected: Expected, steps: int, tolerance: float) -> float:
    """Steps FP32 weights by the optimizer by itself, and float64 ones by `expected`, on the same gradients.

    ```
    |p32 - p64| <= k * 2^-23 * max |p| + tolerance * (|update 1| + ... + |update k|)      after every step k
    ```

    The first term is what rounding the weights costs (half of it at most); the second, relative to the way that each
    weight has gone, what rounding within the updates may. Three tensors, each given to `expected` as a whole: a usual
    one, one whose weights begin at 0, and one whose first gradients are 0.

    Returns:
        The largest deviation beyond the first term, as a fraction of the way: at most `tolerance`.

    Raises:
        AssertionError: It is larger; or the first term hides a tenth of the way: the rate is too small to see anything.
    """
    worst, usual = _compare(make, expected, _SIZE, steps, tolerance)
    hidden = int((usual.rounding(steps) > 0.1 * usual.way).sum())
    if 2 * hidden > _SIZE:
        raise AssertionError(
            f"{hidden} of {_SIZE} weights went less than ten times their rounding in {steps} steps, so the comparison "
            "with the equations says nothing: let make give a larger lr, or take more steps."
        )
    return worst


def long_deviation(make: Make, expected: Expected, tolerance: float) -> float:
    """The same for `LONG` steps of few weights; a hundred times as far, for rates that FP32 holds not quite."""
    return _compare(make, expected, _FEW, LONG, _LOOSER * tolerance)[0]


def check_signature(expected: Any) -> None:
    """Raises TypeError where `expected` cannot be called as it will be."""
    try:
        inspect.signature(expected).bind(None, None, None, None)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"expected is {expected!r} ({error}); give a function (p, g, state, hyper) -> (p, state)."
        ) from error


def _compare(make: Make, expected: Expected, size: int, steps: int, tolerance: float) -> tuple[float, _Tensor]:
    generator = torch.Generator().manual_seed(2)

    def random() -> torch.Tensor:
        return torch.randn(size, generator=generator)

    usual = _Tensor("a tensor", 0.1 * random())  # small: so is their rounding
    still = _Tensor(f"a tensor whose first {_ZERO_STEPS} gradients are 0", 0.1 * random())
    tensors = usual, _Tensor("a tensor whose weights begin at 0", torch.zeros(size)), still
    optimizer = checked(make([tensor.param for tensor in tensors]))
    optimizer.defaults["max_grad_norm"] = 0.0  # the equations are those of the rule
    hyper = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    worst = 0.0
    for k in range(1, steps + 1):
        for tensor in tensors:
            tensor.param.grad = random() * torch.rand(size, generator=generator)
            if tensor is still and k <= _ZERO_STEPS:
                tensor.param.grad.zero_()
        optimizer.step()
        for tensor in tensors:
            tensor.expect(expected, hyper)
            worst = max(worst, tensor.deviation(k, tolerance))
    return worst, usual


def _checked(returned: Any, size: int) -> tuple[np.ndarray, dict[str, Any]]:
    """What `expected` returned, or AssertionError."""
    told = f"a {type(returned).__name__}"
    if isinstance(returned, tuple):
        told = f"({', '.join(_told(part) for part in returned)})"
    if told != f"(float64[{size}], a dict)":
        raise AssertionError(f"expected returned {told}; it must return (p, state): float64[{size}] and a dict.")
    p, state = returned
    return p, state


def _told(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return "a dict" if isinstance(value, dict) else f"a {type(value).__name__}"
