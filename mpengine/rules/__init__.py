"""The update rules: which state each keeps, which numbers it reads, and its arithmetic.

One file for each algorithm; `declare` makes an optimizer of a rule of your own, see docs/write-a-rule.md. A family is
what one optimizer class needs: its hyperparameters, and the variants of its rule that differ in the state they keep.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from mpengine.rules import adam, apex, lamb, larc, nadam, novograd, radam, sgd
from mpengine.rules.adam import ADAM, ADAM_AMSGRAD
from mpengine.rules.apex import APEX_ADAGRAD, APEX_ADAM, APEX_SGD_MOMENTUM
from mpengine.rules.declaration import Family, Kernels, Numbers, Rule, Slots
from mpengine.rules.lamb import LAMB
from mpengine.rules.nadam import NADAM
from mpengine.rules.novograd import NOVOGRAD
from mpengine.rules.own import Hyperparameter, RuleOptimizer, declare
from mpengine.rules.radam import RADAM
from mpengine.rules.sgd import SGD, SGD_MOMENTUM

__all__ = [
    "ADAM",
    "ADAM_AMSGRAD",
    "APEX_ADAGRAD",
    "APEX_ADAM",
    "APEX_SGD_MOMENTUM",
    "ASSIGN",
    "BUILT_IN",
    "LAMB",
    "NADAM",
    "NOVOGRAD",
    "RADAM",
    "SGD",
    "SGD_MOMENTUM",
    "Family",
    "Hyperparameter",
    "Kernels",
    "Rule",
    "RuleOptimizer",
    "declare",
    "family_of",
]


def assign(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The gradient itself: how unscale_ writes unscaled FP32 gradients."""
    return g, ()


ASSIGN = Rule("assign", assign)

BUILT_IN = (
    ASSIGN,
    ADAM,
    ADAM_AMSGRAD,
    APEX_ADAGRAD,
    APEX_ADAM,
    APEX_SGD_MOMENTUM,
    LAMB,
    *dict.fromkeys(larc.RULES.values()),
    NADAM,
    NOVOGRAD,
    RADAM,
    SGD,
    SGD_MOMENTUM,
)
FAMILIES = (
    adam.FAMILY,
    adam.DECOUPLED_FAMILY,
    apex.FUSED_ADAGRAD,
    apex.FUSED_ADAM,
    apex.FUSED_SGD,
    lamb.FAMILY,
    *larc.FAMILIES,
    nadam.FAMILY,
    novograd.FAMILY,
    radam.FAMILY,
    sgd.FAMILY,
)

_OF_TORCH: dict[type[torch.optim.Optimizer], Family] = {
    torch.optim.Adam: adam.FAMILY,
    torch.optim.AdamW: adam.DECOUPLED_FAMILY,
    torch.optim.NAdam: nadam.FAMILY,
    torch.optim.RAdam: radam.FAMILY,
    torch.optim.SGD: sgd.FAMILY,
}


def family_of(optimizer: torch.optim.Optimizer) -> Family | None:
    """The family that steps `optimizer` in the fused kernel, or None for the general path.

    Of torch's only the very classes above: a subclass may have a step of its own. A `RuleOptimizer` has its family,
    unless a subclass has another `step`.
    """
    if isinstance(optimizer, RuleOptimizer):
        own_step = inspect.unwrap(type(optimizer).step) is not inspect.unwrap(RuleOptimizer.step)  # torch wraps each
        return None if own_step else optimizer.family
    return _OF_TORCH.get(type(optimizer))
