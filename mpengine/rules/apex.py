"""What the optimizers of apex compute otherwise than torch's: operation for operation its CUDA kernels.

FusedAdam, without bias_correction with both corrections 1:

```
m = beta1 * m + (1 - beta1) * g
v = beta2 * v + (1 - beta2) * g^2
p = p - lr * (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p)
```

FusedAdagrad:

```
s = s + g^2
p = p - lr * (g / (sqrt(s) + eps) + weight_decay * p)
```

In both, without the "AdamW mode", g takes weight_decay * p first, instead of the step. FusedSGD with
wd_after_momentum, where the decay is no part of the momentum:

```
b = momentum * b + (1 - dampening) * g            (g itself at the first step)
p = p - lr * ((b, or g + momentum * b) + weight_decay * p)
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from mpengine.rules.arithmetic import power, sqrt_rn
from mpengine.rules.declaration import Family, Numbers, Rule, Slots
from mpengine.rules.sgd import FAMILY as SGD_FAMILY
from mpengine.rules.sgd import sgd_scalars


def apex_adam_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, betas, eps, weight_decay, bias_correction, adam_w_mode) and the step count."""
    lr, beta1, beta2, eps, weight_decay, corrects, decoupled = h[:7]
    return [
        np.where(decoupled != 0, 0.0, weight_decay),
        np.where(decoupled != 0, weight_decay, 0.0),
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        np.where(corrects != 0, 1.0 - power(beta1, step), 1.0),
        np.where(corrects != 0, 1.0 - power(beta2, step), 1.0),
        eps,
        lr,
    ]


def apex_adam(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """FusedAdam."""
    coupled_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = c[:6]
    bias_correction1, bias_correction2, eps, lr = c[6:10]
    m, v = slots
    g = g + p * coupled_decay
    m = m * beta1 + g * one_minus_beta1
    v = v * beta2 + (g * one_minus_beta2) * g
    update = (m / bias_correction1) / (sqrt_rn(v / bias_correction2) + eps) + p * decay
    return p - update * lr, (m, v)


def apex_adagrad_scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
    """From (lr, eps, weight_decay, adagrad_w_mode); the step count does not matter."""
    lr, eps, weight_decay, decoupled = h[:4]
    return [np.where(decoupled != 0, 0.0, weight_decay), np.where(decoupled != 0, weight_decay, 0.0), eps, lr]


def apex_adagrad(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """FusedAdagrad."""
    coupled_decay, decay, eps, lr = c[:4]
    (squares,) = slots
    g = g + p * coupled_decay
    squares = squares + g * g
    return p - (g / (sqrt_rn(squares) + eps) + p * decay) * lr, (squares,)


def apex_sgd_momentum(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """FusedSGD with momentum, and the decay after it."""
    _, weight_decay, lr, momentum, grad_factor, nesterov = c[:6]
    (buffer,) = slots
    buffer = buffer * momentum + g * grad_factor
    direction = g + buffer * momentum if nesterov else buffer
    return p - (direction + p * weight_decay) * lr, (buffer,)


APEX_ADAM = Rule("apex_adam", apex_adam, ("exp_avg", "exp_avg_sq"))
APEX_ADAGRAD = Rule("apex_adagrad", apex_adagrad, ("sum",))
APEX_SGD_MOMENTUM = Rule("apex_sgd_momentum", apex_sgd_momentum, ("momentum_buffer",))


def _sgd_rule(group: Mapping[str, Any]) -> Rule:
    decays_last = group["wd_after_momentum"] and group["momentum"] != 0
    return APEX_SGD_MOMENTUM if decays_last else SGD_FAMILY.variant(group)


FUSED_ADAM = Family(
    "apex_adam",
    lambda group: (
        group["lr"],
        *group["betas"],
        group["eps"],
        group["weight_decay"],
        float(group["bias_correction"]),
        float(group["adam_w_mode"]),
    ),
    lambda group: APEX_ADAM,
    apex_adam_scalars,
    slots=APEX_ADAM.slots,
)

FUSED_ADAGRAD = Family(
    "apex_adagrad",
    lambda group: (group["lr"], group["eps"], group["weight_decay"], float(group["adagrad_w_mode"])),
    lambda group: APEX_ADAGRAD,
    apex_adagrad_scalars,
    slots=APEX_ADAGRAD.slots,
    counts_steps=False,
)

FUSED_SGD = Family(
    "sgd",
    lambda group: SGD_FAMILY.hyperparameters({**group, "maximize": False}),
    _sgd_rule,
    sgd_scalars,
    slots=APEX_SGD_MOMENTUM.slots,
    counts_steps=False,
)
