"""NovoGrad: Adam with one second moment for each tensor, of its gradient's norm (Ginsburg et al. 2019).

```
v = beta2 * v + (1 - beta2) * ||g||^2             (||g||^2 at the first step, unless init_zero)
d = sqrt(v) / sqrt(1 - beta2^t) + eps
g = g / d + weight_decay * p                      (g, unless reg_inside_moment)
m = beta1 * m + (1 - beta1) * g                   (+ g, without grad_averaging)
p = p - lr * m / (1 - beta1^t)                    (lr * (m / (1 - beta1^t) / d + weight_decay * p) then)
```

arXiv 1905.11286, with the options of apex's FusedNovoGrad. The paper's own algorithm is the one with reg_inside_moment,
and without bias_correction (then both corrections are 1) and grad_averaging.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mpengine.rules.arithmetic import power
from mpengine.rules.declaration import Columns, Family, Numbers, Rule, Slots


def novograd_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, betas, eps, weight_decay, bias_correction, reg_inside, grad_averaging, init_zero) and the step."""
    lr, beta1, beta2, eps, weight_decay, corrects, inside, averages, from_zero = h[:9]
    bias_correction1 = np.where(corrects != 0, 1.0 - power(beta1, step), 1.0)
    bias_correction2 = np.where(corrects != 0, 1.0 - power(beta2, step), 1.0)
    replaced = (step == 1) & (from_zero == 0)
    return [
        np.where(inside != 0, weight_decay, 0.0),
        beta1,
        np.where(averages != 0, 1.0 - beta1, 1.0),
        1.0 / bias_correction1,
        np.where(inside != 0, 0.0, weight_decay),
        lr,
        np.where(replaced, 0.0, beta2),
        np.where(replaced, 1.0, 1.0 - beta2),
        np.sqrt(bias_correction2),
        eps,
        inside,
    ]


def novograd_measure(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor]:
    """The gradient."""
    return (g,)


def novograd_settle(c: Columns, norms: Columns, cells: Columns) -> tuple[Columns, Columns]:
    """The second moment; d divides the gradient, or the first moment, and 1 the other."""
    *others, beta2, grad_factor, root_correction, eps, inside = c[:11]
    second = cells[0] * beta2 + (norms[0] * norms[0]) * grad_factor
    d = np.sqrt(second) / root_correction + eps
    return (*others, np.where(inside != 0, d, 1.0), np.where(inside != 0, 1.0, d)), (second,)


def novograd(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The step, with the norms in the two divisors."""
    inner_decay, beta1, grad_factor, correction, outer_decay, lr, inner, outer = c[:8]
    (m,) = slots
    g = g / inner + p * inner_decay
    m = m * beta1 + g * grad_factor
    return p - ((m * correction) / outer + p * outer_decay) * lr, (m,)


NOVOGRAD = Rule("novograd", novograd, ("exp_avg",), novograd_measure, 1, novograd_settle, ("exp_avg_sq",))

FAMILY = Family(
    "novograd",
    lambda group: (
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        float(group["bias_correction"]),
        float(group["reg_inside_moment"]),
        float(group["grad_averaging"]),
        float(group["init_zero"]),
    ),
    lambda group: NOVOGRAD,
    novograd_scalars,
    slots=NOVOGRAD.slots + NOVOGRAD.cells,
)
