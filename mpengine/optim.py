"""Optimizers that torch does not have, each made by one rule of `mpengine.rules`.

`mpengine.prepare` steps them in the fused pass, as it does torch's; by themselves they step FP32 weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpengine.larc import LARC
from mpengine.rules import lamb, lion, novograd
from mpengine.rules.own import Hyperparameter, RuleOptimizer

__all__ = ["LAMB", "LARC", "Lion", "NovoGrad"]

_RATE = Hyperparameter(at_least=0.0)
_BETAS = Hyperparameter((0.9, 0.999), at_least=0.0, below=1.0)
_FLAG = Hyperparameter(False)


class LAMB(RuleOptimizer):
    """Adam's direction, with a step as large as each layer's weights ask for; for large batches.

    ```
    m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
    r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p
    p = p - lr * ||p|| / ||r|| * r
    ```

    You et al. 2020, arXiv 1904.00962, with the options of apex's FusedLAMB.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        betas: Of both moments, each in [0, 1).
        eps: Added to the root, at least 0.
        weight_decay: At least 0.
        bias_correction: Whether moments are divided by 1 - beta^t.
        grad_averaging: Whether g enters m with the factor 1 - beta1; else 1.
        adam_w_mode: Whether the decay is part of r; else of g.
        use_nvlamb: Whether the norms count without weight decay, too.
        max_grad_norm: The norm that the gradient of all parameters is clipped to first; 0 or None: no clipping. Every
            param group has the same; what `prepare` is given wins.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
    """

    family = lamb.FAMILY
    hyperparameters = {  # noqa: RUF012
        "lr": _RATE,
        "betas": _BETAS,
        "eps": _RATE,
        "weight_decay": _RATE,
        "bias_correction": _FLAG,
        "grad_averaging": _FLAG,
        "adam_w_mode": _FLAG,
        "use_nvlamb": _FLAG,
        "max_grad_norm": _RATE,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        adam_w_mode: bool = True,
        use_nvlamb: bool = False,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "grad_averaging": grad_averaging,
            "adam_w_mode": adam_w_mode,
            "use_nvlamb": use_nvlamb,
            "max_grad_norm": max_grad_norm or 0.0,
        }
        super().__init__(params, defaults)


class Lion(RuleOptimizer):
    """Steps of one size by the sign of a momentum; give it a third to a tenth of AdamW's lr, and as much more decay.

    ```
    u = sign(beta1 * m + (1 - beta1) * g)
    p = p - lr * (u + weight_decay * p)
    m = beta2 * m + (1 - beta2) * g
    ```

    Chen et al. 2023, arXiv 2302.06675.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The size of a step, at least 0.
        betas: How much of the old momentum is in the sign, and in the new one, each in [0, 1).
        weight_decay: Decoupled, at least 0.
        maximize: Whether the objective is to grow.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
    """

    family = lion.FAMILY
    hyperparameters = {  # noqa: RUF012
        "lr": _RATE,
        "betas": _BETAS,
        "weight_decay": _RATE,
        "maximize": _FLAG,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})


class NovoGrad(RuleOptimizer):
    """Adam with one second moment for each tensor, of its gradient's norm: half of Adam's state.

    ```
    v = beta2 * v + (1 - beta2) * ||g||^2 (||g||^2 at first);  d = sqrt(v / (1 - beta2^t)) + eps
    m = beta1 * m + (1 - beta1) * g
    p = p - lr * (m / (1 - beta1^t) / d + weight_decay * p)
    ```

    Ginsburg et al. 2019, arXiv 1905.11286, with the options and defaults of apex's FusedNovoGrad. The paper's algorithm
    is `NovoGrad(params, bias_correction=False, reg_inside_moment=True, grad_averaging=False)`.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        betas: Of both moments, each in [0, 1).
        eps: Added to the root, at least 0.
        weight_decay: At least 0.
        bias_correction: Whether moments are divided by 1 - beta^t.
        reg_inside_moment: Whether m is of g / d + weight_decay * p, and the step along m.
        grad_averaging: Whether g enters m with the factor 1 - beta1; else 1.
        init_zero: Whether v starts at 0; else with the first gradient's norm.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
    """

    family = novograd.FAMILY
    hyperparameters = {  # noqa: RUF012
        "lr": _RATE,
        "betas": _BETAS,
        "eps": _RATE,
        "weight_decay": _RATE,
        "bias_correction": _FLAG,
        "reg_inside_moment": _FLAG,
        "grad_averaging": _FLAG,
        "init_zero": _FLAG,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        reg_inside_moment: bool = False,
        grad_averaging: bool = True,
        init_zero: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "reg_inside_moment": reg_inside_moment,
            "grad_averaging": grad_averaging,
            "init_zero": init_zero,
        }
        super().__init__(params, defaults)
