"""LAMB: Adam's direction, with a step as large as the layer's weights ask for (You et al. 2020, arXiv 1904.00962).

```
m = beta1 * m + (1 - beta1) * g                   (+ g, without grad_averaging)
v = beta2 * v + (1 - beta2) * g^2
r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p
p = p - lr * ||p|| / ||r|| * r                    norms of the tensor; a factor of 1 where one of them is 0
```

As apex has it, the factor is 1 too where weight_decay is 0, unless `use_nvlamb`; and without `adam_w_mode` g takes
weight_decay * p instead of r.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mpengine.rules.arithmetic import power, sqrt_rn
from mpengine.rules.declaration import Columns, Family, Numbers, Rule, Slots


def lamb_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, betas, eps, weight_decay, bias_correction, grad_averaging, adam_w_mode, use_nvlamb) and the step."""
    lr, beta1, beta2, eps, weight_decay, corrects, averages, decoupled, always = h[:9]
    bias_correction1 = np.where(corrects != 0, 1.0 - power(beta1, step), 1.0)
    bias_correction2 = np.where(corrects != 0, 1.0 - power(beta2, step), 1.0)
    return [
        np.where(decoupled != 0, 0.0, weight_decay),
        np.where(decoupled != 0, weight_decay, 0.0),
        beta1,
        np.where(averages != 0, 1.0 - beta1, 1.0),
        beta2,
        1.0 - beta2,
        1.0 / bias_correction1,
        1.0 / np.sqrt(bias_correction2),
        eps,
        lr,
        np.where((weight_decay != 0) | (always != 0), 1.0, 0.0),
    ]


def lamb_measure(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Tensor]:
    """The weight, and r."""
    direction, _, _ = _direction(p, g, slots, c)
    return p, direction


def lamb_settle(c: Columns, norms: Columns, cells: Columns) -> tuple[Columns, Columns]:
    """Lr becomes lr * ||p|| / ||r||."""
    *others, lr, adapts = c[:11]
    weight, direction = norms
    adapted = (adapts != 0) & (weight > 0.0) & (direction > 0.0)
    ratio = np.where(adapted, weight / np.where(adapted, direction, 1.0), 1.0)
    return (*others, lr * ratio, adapts), cells


def lamb(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The step, with the factor in the rate."""
    direction, m, v = _direction(p, g, slots, c)
    return p - direction * c[9], (m, v)


def _direction(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    coupled_decay, decay, beta1, grad_factor, beta2, one_minus_beta2, correction, root_correction, eps = c[:9]
    m, v = slots
    g = g + p * coupled_decay
    m = m * beta1 + g * grad_factor
    v = v * beta2 + (g * one_minus_beta2) * g
    return (m * correction) / (sqrt_rn(v) * root_correction + eps) + p * decay, m, v


LAMB = Rule("lamb", lamb, ("exp_avg", "exp_avg_sq"), lamb_measure, 2, lamb_settle)

FAMILY = Family(
    "lamb",
    lambda group: (
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        float(group["bias_correction"]),
        float(group["grad_averaging"]),
        float(group["adam_w_mode"]),
        float(group["use_nvlamb"]),
    ),
    lambda group: LAMB,
    lamb_scalars,
    slots=LAMB.slots,
)
