"""Gradient descent, with or without (Nesterov) momentum. Semantics: `torch.optim.SGD`.

```
g = +-g + weight_decay * p
b = momentum * b + (1 - dampening) * g            (g itself at the first step)
p = p - lr * (b, or g + momentum * b)
```
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mpengine.rules.declaration import Family, Numbers, Rule, Slots


def sgd_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, momentum, dampening, weight_decay, nesterov, maximize) and the step count."""
    lr, momentum, dampening, weight_decay, nesterov, maximize = h[:6]
    sign = 1.0 - 2.0 * maximize
    grad_factor = np.where(step == 1, 1.0, 1.0 - dampening)  # the first momentum buffer is the gradient
    return [sign, weight_decay, lr, momentum, grad_factor, nesterov]


def sgd(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """Gradient descent: `p -= lr * (g + weight_decay * p)`."""
    sign, weight_decay, lr = c[:3]
    g = g * sign + p * weight_decay
    return p - g * lr, ()


def sgd_momentum(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """Gradient descent with (Nesterov) momentum."""
    sign, weight_decay, lr, momentum, grad_factor, nesterov = c[:6]
    (buffer,) = slots
    g = g * sign + p * weight_decay
    buffer = buffer * momentum + g * grad_factor
    direction = g + buffer * momentum if nesterov else buffer
    return p - direction * lr, (buffer,)


SGD = Rule("sgd", sgd)
SGD_MOMENTUM = Rule("sgd_momentum", sgd_momentum, ("momentum_buffer",))

FAMILY = Family(
    "sgd",
    lambda group: (
        group["lr"],
        group["momentum"],
        group["dampening"],
        group["weight_decay"],
        float(group["nesterov"]),
        float(group["maximize"]),
    ),
    lambda group: SGD_MOMENTUM if group["momentum"] != 0 else SGD,
    sgd_scalars,
    slots=SGD_MOMENTUM.slots,
    counts_steps=False,
)
