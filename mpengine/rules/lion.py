"""Lion, the evolved sign momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

```
u = sign(beta1 * m + (1 - beta1) * g)             -1, 0 or 1
p = p - lr * (u + weight_decay * p)
m = beta2 * m + (1 - beta2) * g
```
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpengine.rules.declaration import Family, Numbers, Rule, Slots


def lion_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, beta1, beta2, weight_decay, maximize); the step count is not needed."""
    lr, beta1, beta2, weight_decay, maximize = h[:5]
    return [1.0 - 2.0 * maximize, 1.0 - lr * weight_decay, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2]


def lion(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The step by the sign, and the momentum after it."""
    sign, decay_factor, lr, beta1, one_minus_beta1, beta2, one_minus_beta2 = c[:7]
    (m,) = slots
    g = g * sign
    mixed = m * beta1 + g * one_minus_beta1
    direction = torch.where(mixed > 0.0, 1.0, torch.where(mixed < 0.0, -1.0, mixed))  # torch.sign makes 0 of NaN
    return p * decay_factor - direction * lr, (m * beta2 + g * one_minus_beta2,)


LION = Rule("lion", lion, ("exp_avg",))

FAMILY = Family(
    "lion",
    lambda group: (group["lr"], *group["betas"], group["weight_decay"], float(group["maximize"])),
    lambda group: LION,
    lion_scalars,
    slots=LION.slots,
)
