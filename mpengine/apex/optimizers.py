"""`apex.optimizers`: apex's classes over the engine's rules, with apex's arguments.

`amp.initialize` and `mpengine.prepare` step them in the fused pass; by themselves they step FP32 weights. What apex's
kernels needed to be told has no effect: `set_grad_none` (`zero_grad` drops gradients, as torch's does), `capturable`,
`master_weights` and `materialize_master_grads` (masters are those of `initialize` and `prepare`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mpengine import optim
from mpengine.rules import adagrad, adam, lamb, sgd
from mpengine.rules.declaration import Family
from mpengine.rules.own import Hyperparameter, RuleOptimizer

__all__ = ["FusedAdagrad", "FusedAdam", "FusedLAMB", "FusedSGD"]

Betas = tuple[float, float]

_FLAG = Hyperparameter(False)
_RATE = Hyperparameter(at_least=0.0)
_BETAS = Hyperparameter((0.9, 0.999), at_least=0.0, below=1.0)
_DECAY_YOURSELF = (
    "give weight_decay=0, and before each step decay the FP32 weights under torch.no_grad(): "
    "torch._foreach_mul_(list(amp.master_params(optimizer)), 1 - lr * weight_decay)."
)


class _Fused(RuleOptimizer):
    """Loads what apex's own class saved, too."""

    def __init__(self, params: Iterable[Any], defaults: Mapping[str, Any], amsgrad: bool = False) -> None:
        if amsgrad:
            raise RuntimeError(
                f"{type(self).__name__} does not support the AMSGrad variant. Use torch.optim.AdamW(amsgrad=True)."
            )
        super().__init__(params, defaults)
        self.register_load_state_dict_pre_hook(_from_apex)


def _from_apex(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """A state that apex saved: it counted the steps of each group. Hyperparameters that it lacks stay as they are."""
    groups = state_dict.get("param_groups", [])
    if not any("step" in group for group in groups):
        return None
    states = dict(state_dict.get("state", {}))
    for group in groups:
        step = torch.tensor(float(group.get("step", 0)))
        states.update((key, {**states[key], "step": step.clone()}) for key in group["params"] if key in states)
    own = optimizer.param_groups + [{}] * (len(groups) - len(optimizer.param_groups))
    filled = [{**kept, **group} for kept, group in zip(own, groups, strict=False)]
    return {**state_dict, "state": states, "param_groups": [_without_step(group) for group in filled]}


def _without_step(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "step"}


class FusedAdam(_Fused):
    """Adam; with `adam_w_mode` AdamW. See `torch.optim.AdamW`.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        bias_correction: Whether moments are divided by 1 - beta^t.
        betas: Of both moments, each in [0, 1).
        eps: Added to the root, at least 0.
        adam_w_mode: Whether the weights decay by themselves; else the decay is part of the gradient.
        weight_decay: At least 0.
        amsgrad: Refused.
        set_grad_none: Without effect.
        capturable: Without effect.
        master_weights: Without effect.

    Raises:
        RuntimeError: `amsgrad` is True.
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
    """

    family = Family(
        "adam",
        lambda group: (
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            0.0,  # no maximize
            float(group["adam_w_mode"]),
            float(not group["bias_correction"]),
        ),
        lambda group: adam.ADAM,
        adam.adam_scalars,
        slots=adam.ADAM.slots,
    )
    hyperparameters = {  # noqa: RUF012
        "lr": _RATE,
        "bias_correction": _FLAG,
        "betas": _BETAS,
        "eps": _RATE,
        "weight_decay": _RATE,
        "adam_w_mode": _FLAG,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bool(bias_correction),
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adam_w_mode": bool(adam_w_mode),
        }
        super().__init__(params, defaults, amsgrad)


class FusedSGD(_Fused):
    """Gradient descent, with or without (Nesterov) momentum. See `torch.optim.SGD`.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        momentum: At least 0.
        dampening: Of the momentum; it must be 0 with `nesterov`.
        weight_decay: At least 0.
        nesterov: Whether the momentum is Nesterov's; it needs `momentum`.
        wd_after_momentum: Refused.
        materialize_master_grads: Without effect.
        set_grad_none: Without effect.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds, or refused.
    """

    family = Family(
        "sgd",
        lambda group: (
            group["lr"],
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            float(group["nesterov"]),
            0.0,  # no maximize
        ),
        lambda group: sgd.SGD_MOMENTUM if group["momentum"] != 0 else sgd.SGD,
        sgd.sgd_scalars,
        slots=sgd.SGD_MOMENTUM.slots,
        counts_steps=False,
    )
    hyperparameters = {  # noqa: RUF012
        "lr": _RATE,
        "momentum": _RATE,
        "dampening": Hyperparameter(),
        "weight_decay": _RATE,
        "nesterov": _FLAG,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if wd_after_momentum:
            raise ValueError(f"wd_after_momentum=True is not supported: {_DECAY_YOURSELF}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": bool(nesterov),
        }
        super().__init__(params, defaults)


class FusedLAMB(_Fused):
    """`mpengine.optim.LAMB` with apex's arguments.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        bias_correction: Whether moments are divided by 1 - beta^t.
        betas: Of both moments, each in [0, 1).
        eps: Added to the root, at least 0.
        weight_decay: At least 0.
        amsgrad: Refused.
        adam_w_mode: Whether the decay is part of the direction; else of the gradient.
        grad_averaging: Whether the gradient enters the first moment with the factor 1 - beta1; else 1.
        set_grad_none: Without effect.
        max_grad_norm: The norm that the gradient of all parameters is clipped to first; 0: no clipping.
        use_nvlamb: Whether the norms count without weight decay, too.

    Raises:
        RuntimeError: `amsgrad` is True.
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
    """

    family = lamb.FAMILY
    hyperparameters = optim.LAMB.hyperparameters

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float | None = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bool(bias_correction),
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": bool(grad_averaging),
            "adam_w_mode": bool(adam_w_mode),
            "use_nvlamb": bool(use_nvlamb),
            "max_grad_norm": max_grad_norm or 0.0,
        }
        super().__init__(params, defaults, amsgrad)


class FusedAdagrad(_Fused):
    """Adagrad. See `torch.optim.Adagrad`.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        eps: Added to the root, at least 0.
        weight_decay: At least 0; part of the gradient.
        set_grad_none: Without effect.
        adagrad_w_mode: Refused.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds, or refused.
    """

    family = Family(
        "adagrad",
        lambda group: (group["lr"], 0.0, group["eps"], group["weight_decay"], 0.0),  # no lr_decay, no maximize
        lambda group: adagrad.ADAGRAD,
        adagrad.adagrad_scalars,
        slots=adagrad.ADAGRAD.slots,
    )
    hyperparameters = {"lr": _RATE, "eps": _RATE, "weight_decay": _RATE}  # noqa: RUF012

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
        adagrad_w_mode: bool = False,
    ) -> None:
        if adagrad_w_mode:
            raise ValueError(f"adagrad_w_mode=True is not supported: {_DECAY_YOURSELF}")
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
