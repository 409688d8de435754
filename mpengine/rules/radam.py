"""RAdam: Adam whose step waits until its second moment can be trusted (Liu et al. 2020, arXiv 1908.03265).

```
m   = beta1 * m + (1 - beta1) * g
v   = beta2 * v + (1 - beta2) * g^2
rho = 2 / (1 - beta2) - 1;  rho_t = rho - 2 * t * beta2^t / (1 - beta2^t)
r   = sqrt((rho_t - 4) * (rho_t - 2) * rho / ((rho - 4) * (rho - 2) * rho_t))
p   = p - lr / (1 - beta1^t) * m * r * sqrt(1 - beta2^t) / (sqrt(v) + eps)       where rho_t > 5
p   = p - lr / (1 - beta1^t) * m                                                 before
```

Decoupled, p shrinks by lr * weight_decay first; else g takes weight_decay * p. Semantics: `torch.optim.RAdam`; the
factors on m are multiplied in float64 first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpengine.rules.adam import moments
from mpengine.rules.arithmetic import power, sqrt_rn
from mpengine.rules.declaration import Family, Numbers, Rule, Slots


def radam_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, beta1, beta2, eps, weight_decay, maximize, decoupled) and the step count."""
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled = h[:7]
    power2 = power(beta2, step)
    bias_correction2 = 1.0 - power2
    rho = 2.0 / (1.0 - beta2) - 1.0
    rho_t = rho - 2.0 * step * power2 / bias_correction2
    rectified = rho_t > 5.0
    above = np.where(rectified, (rho_t - 4.0) * (rho_t - 2.0) * rho, 1.0)
    below = np.where(rectified, (rho - 4.0) * (rho - 2.0) * rho_t, 1.0)
    rate = lr / (1.0 - power(beta1, step))
    return [
        1.0 - 2.0 * maximize,
        np.where(decoupled != 0, 0.0, weight_decay),
        np.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        np.where(rectified, rate * np.sqrt(bias_correction2) * np.sqrt(above / below), rate),
        np.where(rectified, 1.0, 0.0),
        eps,
    ]


def radam(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The step along m / (sqrt(v) + eps), or along m."""
    rate, rectified, eps = c[6:9]
    p, _, m, v = moments(p, g, slots[0], slots[1], c)
    denominator = sqrt_rn(v) + eps if rectified else torch.ones_like(v)
    return p - (m / denominator) * rate, (m, v)


RADAM = Rule("radam", radam, ("exp_avg", "exp_avg_sq"))

FAMILY = Family(
    "radam",
    lambda group: (
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        float(group["maximize"]),
        float(group["decoupled_weight_decay"]),
    ),
    lambda group: RADAM,
    radam_scalars,
    slots=RADAM.slots,
)
