"""NAdam: Adam with Nesterov's look ahead (Dozat 2016). Semantics: `torch.optim.NAdam`.

```
mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2);  product = mu_1 * ... * mu_t
m    = beta1 * m + (1 - beta1) * g
v    = beta2 * v + (1 - beta2) * g^2
d    = sqrt(v / (1 - beta2^t)) + eps
p    = p - lr * (1 - mu_t) / (1 - product) * g / d - lr * mu_{t+1} / (1 - product * mu_{t+1}) * m / d
```

Decoupled, p shrinks by lr * weight_decay first; else g takes weight_decay * p.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from mpengine.rules.adam import moments
from mpengine.rules.arithmetic import power, sqrt_rn
from mpengine.rules.declaration import Columns, Family, Numbers, Rule, Slots


def nadam_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, beta1, beta2, eps, weight_decay, 0.96^momentum_decay, maximize, decoupled) and the step count."""
    lr, beta1, beta2, eps, weight_decay, decay, maximize, decoupled = h[:8]
    fading = power(decay, step)
    mu = beta1 * (1.0 - 0.5 * fading)
    mu_next = beta1 * (1.0 - 0.5 * (fading * decay))
    return [
        1.0 - 2.0 * maximize,
        np.where(decoupled != 0, 0.0, weight_decay),
        np.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 / (1.0 - power(beta2, step)),
        eps,
        lr * (1.0 - mu),
        lr * mu_next,
        mu,
        mu_next,
    ]


def nadam_settle(c: Columns, norms: Columns, cells: Columns) -> tuple[Columns, Columns]:
    """The product of all mu so far, and the rates of gradient and moment that follow from it."""
    *others, grad_rate, moment_rate, mu, mu_next = c[:12]
    product = cells[0] * mu
    return (*others, grad_rate / (1.0 - product), moment_rate / (1.0 - product * mu_next)), (product,)


def nadam(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The step along the gradient, and along the moment."""
    correction, eps, grad_rate, moment_rate = c[6:10]
    p, g, m, v = moments(p, g, slots[0], slots[1], c)
    denominator = sqrt_rn(v * correction) + eps
    p = p - (g / denominator) * grad_rate
    return p - (m / denominator) * moment_rate, (m, v)


NADAM = Rule("nadam", nadam, ("exp_avg", "exp_avg_sq"), settle=nadam_settle, cells=("mu_product",))


def _hyperparameters(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        0.96 ** group["momentum_decay"],  # here, for the device has no correctly rounded power of two fractions
        float(group["maximize"]),
        float(group["decoupled_weight_decay"]),
    )


FAMILY = Family(
    "nadam",
    _hyperparameters,
    lambda group: NADAM,
    nadam_scalars,
    slots=NADAM.slots + NADAM.cells,
    initial=lambda group: {"mu_product": 1.0},
)
