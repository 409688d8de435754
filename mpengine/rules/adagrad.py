"""Adagrad (Duchi et al. 2011). Semantics: `torch.optim.Adagrad`.

```
g = +-g + weight_decay * p
s = s + g^2                                       initial_accumulator_value before the first step
p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
```
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mpengine.rules.arithmetic import sqrt_rn
from mpengine.rules.declaration import Family, Numbers, Rule, Slots


def adagrad_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, lr_decay, eps, weight_decay, maximize) and the step count."""
    lr, lr_decay, eps, weight_decay, maximize = h[:5]
    return [1.0 - 2.0 * maximize, weight_decay, lr / (1.0 + (step - 1) * lr_decay), eps]


def adagrad(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The gradient over the root of the sum of all squares so far."""
    sign, weight_decay, rate, eps = c[:4]
    g = g * sign + p * weight_decay
    total = slots[0] + g * g
    return p - (g * rate) / (sqrt_rn(total) + eps), (total,)


ADAGRAD = Rule("adagrad", adagrad, ("sum",))

FAMILY = Family(
    "adagrad",
    lambda group: (group["lr"], group["lr_decay"], group["eps"], group["weight_decay"], float(group["maximize"])),
    lambda group: ADAGRAD,
    adagrad_scalars,
    slots=ADAGRAD.slots,
    initial=lambda group: {"sum": float(group["initial_accumulator_value"])},
)
