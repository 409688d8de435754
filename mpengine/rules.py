"""The update rules' declarations: which state a rule keeps, and which hyperparameters it reads.

The arithmetic of a rule stands three times under the rule's name: in `mpengine.reference` (the specification), in
`mpengine.cpu_rules` (NumPy) and in `kernels.rules` (Triton). A family is what one optimizer class needs: its
hyperparameters, and the variants of its rule that differ in the state they keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rule:
    """One update rule: `rule(master, grad, slots, scalars) -> (master, slots)`, element by element.

    Attributes:
        name: Its key in `reference.RULES` and `kernels.rules.RULES`.
        slots: Names of its FP32 state tensors in `optimizer.state[p]`, each of the parameter's shape.
    """

    name: str
    slots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """The rules behind one torch optimizer class.

    Attributes:
        name: Key of the function that turns a row of hyperparameters and a step count into a tensor's scalars.
        hyperparameters: From a param group to its row of at most `layout.HYPER` numbers (or 0-dim tensors).
        variant: From a param group to the rule that its parameters need.
        slots: The state that any of the variants keeps.
        counts_steps: Whether `optimizer.state[p]` has a "step", as torch's class has.
    """

    name: str
    hyperparameters: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    variant: Callable[[Mapping[str, Any]], Rule]
    slots: tuple[str, ...]
    counts_steps: bool


ASSIGN = Rule("assign")  # master = gradient: how unscale_ writes unscaled FP32 gradients
SGD = Rule("sgd")
SGD_MOMENTUM = Rule("sgd_momentum", ("momentum_buffer",))
ADAM = Rule("adam", ("exp_avg", "exp_avg_sq"))
ADAM_AMSGRAD = Rule("adam_amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))

_SGD_FAMILY = Family(
    "sgd",
    lambda group: (
        group["lr"],
        group["momentum"],
        group["dampening"],
        group["weight_decay"],
        float(group["nesterov"]),
        float(group["maximize"]),
    ),
    lambda group: SGD_MOMENTUM if group["momentum"] != 0 else SGD,
    slots=SGD_MOMENTUM.slots,
    counts_steps=False,
)


def _adam_family(always_decoupled: bool) -> Family:
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
        slots=ADAM_AMSGRAD.slots,
        counts_steps=True,
    )


_FAMILIES: dict[type[torch.optim.Optimizer], Family] = {
    torch.optim.SGD: _SGD_FAMILY,
    torch.optim.Adam: _adam_family(always_decoupled=False),
    torch.optim.AdamW: _adam_family(always_decoupled=True),
}


def family_of(optimizer: torch.optim.Optimizer) -> Family | None:
    """The family that steps `optimizer` in the fused kernel, or None for the general path.

    Only the very classes above: a subclass may have a step of its own.
    """
    return _FAMILIES.get(type(optimizer))
