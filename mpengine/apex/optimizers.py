"""`apex.optimizers`: FusedAdam, FusedSGD, FusedLAMB, FusedNovoGrad and FusedAdagrad, with apex's arguments.

`mpengine.prepare` steps them in the fused pass; by themselves they step FP32 weights, on any device. States that apex
saved are loaded, FusedNovoGrad's aside; those saved here have a step count for each parameter (FusedSGD's and
FusedAdagrad's none), where apex has one for each group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mpengine import optim
from mpengine.rules import Hyperparameter, RuleOptimizer, apex

__all__ = ["FusedAdagrad", "FusedAdam", "FusedLAMB", "FusedNovoGrad", "FusedSGD"]

_RATE = Hyperparameter(at_least=0.0)
_BETAS = Hyperparameter((0.9, 0.999), at_least=0.0, below=1.0)
_FLAG = Hyperparameter(False)


class _Fused(RuleOptimizer):
    """What apex's optimizers have beside their hyperparameters; and they load what apex's own classes saved."""

    set_grad_none: bool

    def _finish(self, set_grad_none: bool) -> None:
        self.set_grad_none = set_grad_none
        self.register_load_state_dict_pre_hook(_from_apex)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drops the gradients, or fills them with zeros.

        Args:
            set_to_none: Whether to drop them. None: what `set_grad_none` of the constructor says.
        """
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "set_grad_none": self.set_grad_none}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "set_grad_none" in state:  # of a copy or pickle, not of load_state_dict
            self._finish(state["set_grad_none"])


def _from_apex(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """A load hook: apex's step count of each group goes to its parameters; options that apex does not save stay."""
    groups, states = state_dict.get("param_groups", []), dict(state_dict.get("state", {}))
    if "mpengine" in state_dict or len(groups) != len(optimizer.param_groups):
        return None
    moved = []
    for own, saved in zip(optimizer.param_groups, groups, strict=True):
        group = {**{key: value for key, value in own.items() if key != "params"}, **saved}
        if "step" in group:
            step = float(group.pop("step"))
            states.update(
                (key, {**states[key], "step": torch.tensor(step)}) for key in group["params"] if key in states
            )
        moved.append(group)
    return {**state_dict, "state": states, "param_groups": moved}


def _refuse_amsgrad(kind: str, amsgrad: bool) -> None:
    if amsgrad:
        raise RuntimeError(f"{kind} does not support the AMSGrad variant; torch.optim.Adam(amsgrad=True) does.")


class FusedAdam(_Fused):
    """Adam, with decoupled weight decay unless `adam_w_mode=False`.

    `m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p` is the step, times lr.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        bias_correction: Whether moments are divided by 1 - beta^t.
        betas: Of both moments, each in [0, 1).
        eps: Added to the root, at least 0.
        adam_w_mode: Whether the decay is part of the step (AdamW); else of the gradient (L2 regularization).
        weight_decay: At least 0.
        amsgrad: Must be False.
        set_grad_none: Whether `zero_grad()` drops the gradients; else it fills them with zeros.
        capturable: Changes nothing: a prepared optimizer can always be captured.
        master_weights: Changes nothing: `mpengine.prepare` keeps FP32 masters of all fp16 and bf16 weights.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
        RuntimeError: `amsgrad`, or `master_weights` without `capturable`, as in apex.
    """

    family = apex.FUSED_ADAM
    hyperparameters = {  # noqa: RUF012
        "lr": _RATE,
        "bias_correction": _FLAG,
        "betas": _BETAS,
        "eps": _RATE,
        "adam_w_mode": _FLAG,
        "weight_decay": _RATE,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        _refuse_amsgrad("FusedAdam", amsgrad)
        if master_weights and not capturable:
            raise RuntimeError("master_weights is True and capturable False; apex allows it with capturable=True only.")
        defaults = {
            "lr": lr,
            "bias_correction": bool(bias_correction),
            "betas": betas,
            "eps": eps,
            "adam_w_mode": bool(adam_w_mode),
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self._finish(set_grad_none)


class FusedSGD(_Fused):
    """Gradient descent, with or without (Nesterov) momentum.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0; groups may have their own instead.
        momentum: At least 0. The first momentum is the gradient itself.
        dampening: 1 - dampening is the gradient's factor in the momentum.
        weight_decay: At least 0.
        nesterov: Whether the step looks ahead; needs a momentum, and no dampening.
        wd_after_momentum: Whether the decay is part of the step; else of the gradient, and so of the momentum.
        materialize_master_grads: Changes nothing: no FP32 gradients are kept.
        set_grad_none: Whether `zero_grad()` drops the gradients; else it fills them with zeros.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is missing, out of its bounds, or they do not go together.
    """

    family = apex.FUSED_SGD
    hyperparameters = {  # noqa: RUF012
        "lr": _RATE,
        "momentum": _RATE,
        "dampening": Hyperparameter(),
        "weight_decay": _RATE,
        "nesterov": _FLAG,
        "wd_after_momentum": _FLAG,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"nesterov needs a momentum above 0 and no dampening; they are {momentum} and {dampening}."
            )
        params = params if isinstance(params, Tensor) else list(params)  # of a tensor torch tells
        if lr is None:
            lr = _lr_of_groups(params)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": bool(nesterov),
            "wd_after_momentum": bool(wd_after_momentum),
        }
        super().__init__(params, defaults)
        self._finish(set_grad_none)


def _lr_of_groups(params: Iterable[Any]) -> Any:
    rates = [group.get("lr") if isinstance(group, dict) else None for group in params]
    if not rates or None in rates:
        raise ValueError("FusedSGD has no lr: give it one, or every param group its own.")
    return rates[0]


class FusedLAMB(_Fused, optim.LAMB):
    """`mpengine.optim.LAMB`, with apex's order of arguments.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        bias_correction: Whether moments are divided by 1 - beta^t.
        betas: Of both moments, each in [0, 1).
        eps: Added to the root, at least 0.
        weight_decay: At least 0.
        amsgrad: Must be False.
        adam_w_mode: Whether the decay is part of the step; else of the gradient.
        grad_averaging: Whether g enters m with the factor 1 - beta1; else 1.
        set_grad_none: Whether `zero_grad()` drops the gradients; else it fills them with zeros.
        max_grad_norm: The norm that the gradient of all parameters is clipped to first; 0: no clipping.
        use_nvlamb: Whether the norms count without weight decay, too.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
        RuntimeError: `amsgrad`, as in apex.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        _refuse_amsgrad("FusedLAMB", amsgrad)
        optim.LAMB.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            bias_correction=bool(bias_correction),
            grad_averaging=bool(grad_averaging),
            adam_w_mode=bool(adam_w_mode),
            use_nvlamb=bool(use_nvlamb),
            max_grad_norm=max_grad_norm,
        )
        self._finish(set_grad_none)


class FusedNovoGrad(_Fused, optim.NovoGrad):
    """`mpengine.optim.NovoGrad`, with apex's order of arguments.

    The state's "exp_avg_sq" is the second moment, where apex keeps its root.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        bias_correction: Whether moments are divided by 1 - beta^t.
        betas: Of both moments, each in [0, 1).
        eps: Added to the root, at least 0.
        weight_decay: At least 0.
        amsgrad: Must be False.
        reg_inside_moment: Whether m is of g / d + weight_decay * p, and the step along m.
        grad_averaging: Whether g enters m with the factor 1 - beta1; else 1.
        norm_type: Must be 2; apex's 0 is the largest magnitude of the gradient.
        init_zero: Whether the second moment starts at 0; else with the first gradient's norm.
        set_grad_none: Whether `zero_grad()` drops the gradients; else it fills them with zeros.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
        RuntimeError: `amsgrad`, or another norm.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        reg_inside_moment: bool = False,
        grad_averaging: bool = True,
        norm_type: int = 2,
        init_zero: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        _refuse_amsgrad("FusedNovoGrad", amsgrad)
        if norm_type != 2:
            raise RuntimeError(
                f"norm_type is {norm_type!r}; the step measures sums of squares, so only norm_type=2 (the 2-norm, as "
                "in the paper) is there."
            )
        optim.NovoGrad.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            bias_correction=bool(bias_correction),
            reg_inside_moment=bool(reg_inside_moment),
            grad_averaging=bool(grad_averaging),
            init_zero=bool(init_zero),
        )
        self._finish(set_grad_none)


class FusedAdagrad(_Fused):
    """Adagrad, without a decay of the rate.

    Args:
        params: Parameters or param groups, as of any torch optimizer.
        lr: The rate, at least 0.
        eps: Added to the root, at least 0.
        weight_decay: At least 0.
        set_grad_none: Whether `zero_grad()` drops the gradients; else it fills them with zeros.
        adagrad_w_mode: Whether the decay is part of the step, as AdamW's; else of the gradient.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
    """

    family = apex.FUSED_ADAGRAD
    hyperparameters = {  # noqa: RUF012
        "lr": _RATE,
        "eps": _RATE,
        "weight_decay": _RATE,
        "adagrad_w_mode": _FLAG,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
        adagrad_w_mode: bool = False,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "adagrad_w_mode": bool(adagrad_w_mode)}
        super().__init__(params, defaults)
        self._finish(set_grad_none)
