"""Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov & Hutter 2019).

```
m = beta1 * m + (1 - beta1) * g
v = beta2 * v + (1 - beta2) * g^2
p = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
```

Decoupled, p shrinks by lr * weight_decay first; else g takes weight_decay * p. Semantics: `torch.optim.Adam`, `AdamW`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mpengine.rules.arithmetic import lerp, power, sqrt_rn
from mpengine.rules.declaration import Family, Numbers, Rule, Slots


def adam_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, beta1, beta2, eps, weight_decay, maximize, decoupled, uncorrected) and the step count."""
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled, uncorrected = h[:8]
    bias_correction1 = np.where(uncorrected != 0, 1.0, 1.0 - power(beta1, step))
    bias_correction2 = np.where(uncorrected != 0, 1.0, 1.0 - power(beta2, step))
    return [
        1.0 - 2.0 * maximize,
        np.where(decoupled != 0, 0.0, weight_decay),
        np.where(decoupled != 0, 1.0 - lr * weight_decay, 1.0),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 / np.sqrt(bias_correction2),
        lr / bias_correction1,
        eps,
    ]


def adam(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """Adam and AdamW."""
    p, m, v = moments(p, g, slots[0], slots[1], c)
    return adam_step(p, m, v, c), (m, v)


def adam_amsgrad(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """Adam with the largest second moment so far."""
    p, m, v = moments(p, g, slots[0], slots[1], c)
    largest = torch.maximum(slots[2], v)
    return adam_step(p, m, largest, c), (m, v, largest)


def moments(p: Tensor, g: Tensor, m: Tensor, v: Tensor, c: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """The decayed weight, and both moments after this gradient."""
    sign, coupled_decay, decay_factor, one_minus_beta1, beta2, one_minus_beta2 = c[:6]
    g = g * sign + p * coupled_decay
    p = p * decay_factor
    m = lerp(m, g, one_minus_beta1)
    v = v * beta2 + (g * one_minus_beta2) * g
    return p, m, v


def adam_step(p: Tensor, m: Tensor, v: Tensor, c: Numbers) -> Tensor:
    """The weight after the step."""
    inverse_root_correction, step_size, eps = c[6:9]
    return p - (m / (sqrt_rn(v) * inverse_root_correction + eps)) * step_size


ADAM = Rule("adam", adam, ("exp_avg", "exp_avg_sq"))
ADAM_AMSGRAD = Rule("adam_amsgrad", adam_amsgrad, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))


def _family(always_decoupled: bool) -> Family:
    return Family(
        "adam",
        lambda group: (
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            float(group["maximize"]),
            float(always_decoupled or group.get("decoupled_weight_decay", False)),
        ),
        lambda group: ADAM_AMSGRAD if group["amsgrad"] else ADAM,
        adam_scalars,
        slots=ADAM_AMSGRAD.slots,
    )


FAMILY = _family(always_decoupled=False)
DECOUPLED_FAMILY = _family(always_decoupled=True)
