"""Adadelta (Zeiler 2012, arXiv 1212.5701). Semantics: `torch.optim.Adadelta`.

```
g = +-g + weight_decay * p
v = rho * v + (1 - rho) * g^2
d = sqrt(a + eps) / sqrt(v + eps) * g
a = rho * a + (1 - rho) * d^2
p = p - lr * d
```
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mpengine.rules.arithmetic import sqrt_rn
from mpengine.rules.declaration import Family, Numbers, Rule, Slots


def adadelta_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, rho, eps, weight_decay, maximize); the step count is not needed."""
    lr, rho, eps, weight_decay, maximize = h[:5]
    return [1.0 - 2.0 * maximize, weight_decay, rho, 1.0 - rho, eps, lr]


def adadelta(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The gradient in units of the last steps over those of the last gradients."""
    sign, weight_decay, rho, one_minus_rho, eps, lr = c[:6]
    v, a = slots
    g = g * sign + p * weight_decay
    v = v * rho + (g * one_minus_rho) * g
    d = (sqrt_rn(a + eps) / sqrt_rn(v + eps)) * g
    a = a * rho + (d * one_minus_rho) * d
    return p - d * lr, (v, a)


ADADELTA = Rule("adadelta", adadelta, ("square_avg", "acc_delta"))

FAMILY = Family(
    "adadelta",
    lambda group: (group["lr"], group["rho"], group["eps"], group["weight_decay"], float(group["maximize"])),
    lambda group: ADADELTA,
    adadelta_scalars,
    slots=ADADELTA.slots,
)
