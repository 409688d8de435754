"""RMSprop (Tieleman & Hinton 2012, lecture 6.5), centered as in Graves 2013. Semantics: `torch.optim.RMSprop`.

```
g = +-g + weight_decay * p
v = alpha * v + (1 - alpha) * g^2
m = alpha * m + (1 - alpha) * g                   centered; then sqrt(v - m^2) stands for sqrt(v)
b = momentum * b + g / (sqrt(v) + eps)            with momentum; without, this is the quotient alone
p = p - lr * b
```

v - m^2 is 0 where roundings make it negative; torch takes the root, NaN, and the weight with it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpengine.rules.arithmetic import lerp, sqrt_rn
from mpengine.rules.declaration import Family, Numbers, Rule, Slots


def rmsprop_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, alpha, eps, weight_decay, momentum, maximize); the step count is not needed."""
    lr, alpha, eps, weight_decay, momentum, maximize = h[:6]
    return [1.0 - 2.0 * maximize, weight_decay, alpha, 1.0 - alpha, eps, lr, momentum]


def rmsprop(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The gradient over the root of its mean square."""
    g, v = _mean_square(p, g, slots[0], c)
    return _plain_step(p, g, v, c), (v,)


def rmsprop_momentum(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """With momentum of the quotients."""
    g, v = _mean_square(p, g, slots[0], c)
    p, b = _momentum_step(p, g, v, slots[1], c)
    return p, (v, b)


def rmsprop_centered(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The gradient over an estimate of its deviation."""
    g, v = _mean_square(p, g, slots[0], c)
    m, variance = _variance(g, v, slots[1], c)
    return _plain_step(p, g, variance, c), (v, m)


def rmsprop_centered_momentum(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """Both."""
    g, v = _mean_square(p, g, slots[0], c)
    m, variance = _variance(g, v, slots[1], c)
    p, b = _momentum_step(p, g, variance, slots[2], c)
    return p, (v, m, b)


def _mean_square(p: Tensor, g: Tensor, v: Tensor, c: Numbers) -> tuple[Tensor, Tensor]:
    sign, weight_decay, alpha, one_minus_alpha = c[:4]
    g = g * sign + p * weight_decay
    return g, v * alpha + (g * one_minus_alpha) * g


def _variance(g: Tensor, v: Tensor, m: Tensor, c: Numbers) -> tuple[Tensor, Tensor]:
    m = lerp(m, g, c[3])
    difference = v - m * m
    return m, torch.where(difference < 0.0, 0.0, difference)


def _plain_step(p: Tensor, g: Tensor, v: Tensor, c: Numbers) -> Tensor:
    eps, lr = c[4:6]
    return p - (g * lr) / (sqrt_rn(v) + eps)


def _momentum_step(p: Tensor, g: Tensor, v: Tensor, b: Tensor, c: Numbers) -> tuple[Tensor, Tensor]:
    eps, lr, momentum = c[4:7]
    b = b * momentum + g / (sqrt_rn(v) + eps)
    return p - b * lr, b


RMSPROP = Rule("rmsprop", rmsprop, ("square_avg",))
RMSPROP_MOMENTUM = Rule("rmsprop_momentum", rmsprop_momentum, ("square_avg", "momentum_buffer"))
RMSPROP_CENTERED = Rule("rmsprop_centered", rmsprop_centered, ("square_avg", "grad_avg"))
RMSPROP_CENTERED_MOMENTUM = Rule(
    "rmsprop_centered_momentum", rmsprop_centered_momentum, ("square_avg", "grad_avg", "momentum_buffer")
)
VARIANTS = {  # by (centered, with momentum)
    (False, False): RMSPROP,
    (False, True): RMSPROP_MOMENTUM,
    (True, False): RMSPROP_CENTERED,
    (True, True): RMSPROP_CENTERED_MOMENTUM,
}

FAMILY = Family(
    "rmsprop",
    lambda group: (
        group["lr"],
        group["alpha"],
        group["eps"],
        group["weight_decay"],
        group["momentum"],
        float(group["maximize"]),
    ),
    lambda group: VARIANTS[bool(group["centered"]), bool(group["momentum"] > 0)],
    rmsprop_scalars,
    slots=RMSPROP_CENTERED_MOMENTUM.slots,
)
