"""A rule's optimizer beside the paper's equations, as somebody else has written them in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from mpengine.testing.training import Make, checked

Expected = Callable[[np.ndarray, np.ndarray, dict[str, Any], Mapping[str, Any]], tuple[np.ndarray, dict[str, Any]]]
_SIZE = 1000


def deviation(make: Make, expected: Expected, steps: int, tolerance: float) -> float:
    """Steps FP32 weights by the optimizer by itself, and float64 ones by `expected`, on the same gradients.

    ```
    |p32 - p64| <= k * 2^-23 * max |p| + tolerance * (|update 1| + ... + |update k|)      after every step k
    ```

    The first term is what rounding the weights costs (half of it at most); the second, relative to the way that each
    weight has gone, what rounding within the updates may.

    Returns:
        The largest deviation beyond the first term, as a fraction of the way: at most `tolerance`.

    Raises:
        AssertionError: It is larger; or the first term hides a tenth of the way: the rate is too small to see anything.
    """
    generator = torch.Generator().manual_seed(2)
    param = torch.nn.Parameter(0.1 * torch.randn(_SIZE, generator=generator))  # small: so is their rounding
    optimizer = checked(make([param]))
    optimizer.defaults["max_grad_norm"] = 0.0  # the equations are those of the rule
    hyper = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    p = param.detach().double().numpy()
    state: dict[str, Any] = {}
    way, largest, worst = np.zeros(_SIZE), np.abs(p), 0.0
    for k in range(1, steps + 1):
        param.grad = torch.randn(_SIZE, generator=generator) * torch.rand(_SIZE, generator=generator)
        optimizer.step()
        before = p.copy()
        p, state = expected(before.copy(), param.grad.double().numpy(), state, hyper)
        _check_returned(p, state)
        way, largest = way + np.abs(p - before), np.maximum(largest, np.abs(p))
        rounding = k * 2.0**-23 * largest
        beyond = np.maximum(np.abs(param.detach().double().numpy() - p) - rounding, 0.0)
        excess = beyond - tolerance * way
        if not (excess <= 0.0).all():
            i = int(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)))
            raise AssertionError(
                f"after step {k} weight {i} is {float(param.detach()[i]):.9g}, the equations' is {p[i]:.9g}: "
                f"{beyond[i]:.3g} apart, on a way of {way[i]:.3g} that allows {tolerance * way[i]:.3g}; "
                f"{int((excess > 0.0).sum())} of {_SIZE} weights are as far."
            )
        worst = max(worst, float(np.max(beyond / np.maximum(way, 1e-300))))
    hidden = int((rounding > 0.1 * way).sum())
    if 2 * hidden > _SIZE:
        raise AssertionError(
            f"{hidden} of {_SIZE} weights went less than ten times their rounding in {steps} steps, so the comparison "
            "with the equations says nothing: let make give a larger lr, or take more steps."
        )
    return worst


def _check_returned(p: Any, state: Any) -> None:
    if not isinstance(p, np.ndarray) or p.dtype != np.float64 or p.shape != (_SIZE,) or not isinstance(state, dict):
        raise AssertionError(
            f"expected returned a {type(p).__name__} and a {type(state).__name__}; it must return (p, state): "
            f"float64[{_SIZE}] and a dict."
        )
