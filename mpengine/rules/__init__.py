"""The update rules: which state each keeps, which numbers it reads, and its arithmetic.

One file for each algorithm; `declare` makes an optimizer of a rule of your own, see docs/write-a-rule.md. A family is
what one optimizer class needs: its hyperparameters, and the variants of its rule that differ in the state they keep.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from mpengine.rules import adadelta, adagrad, adam, apex, lamb, larc, lion, nadam, novograd, radam, rmsprop, sgd
from mpengine.rules.adadelta import ADADELTA
from mpengine.rules.adagrad import ADAGRAD
from mpengine.rules.adam import ADAM, ADAM_AMSGRAD
from mpengine.rules.apex import APEX_ADAGRAD, APEX_ADAM, APEX_SGD_MOMENTUM
from mpengine.rules.arithmetic import power, sqrt_rn
from mpengine.rules.declaration import Family, Kernels, Numbers, Rule, Slots
from mpengine.rules.declared import declare
from mpengine.rules.hyperparameters import Hyperparameter
from mpengine.rules.lamb import LAMB
from mpengine.rules.lion import LION
from mpengine.rules.nadam import NADAM
from mpengine.rules.novograd import NOVOGRAD
from mpengine.rules.own import RuleOptimizer
from mpengine.rules.radam import RADAM
from mpengine.rules.rmsprop import RMSPROP, RMSPROP_CENTERED, RMSPROP_CENTERED_MOMENTUM, RMSPROP_MOMENTUM
from mpengine.rules.sgd import SGD, SGD_MOMENTUM

__all__ = [
    "ADADELTA",
    "ADAGRAD",
    "ADAM",
    "ADAM_AMSGRAD",
    "APEX_ADAGRAD",
    "APEX_ADAM",
    "APEX_SGD_MOMENTUM",
    "ASSIGN",
    "BUILT_IN",
    "LAMB",
    "LION",
    "NADAM",
    "NOVOGRAD",
    "OF_TORCH",
    "RADAM",
    "RMSPROP",
    "RMSPROP_CENTERED",
    "RMSPROP_CENTERED_MOMENTUM",
    "RMSPROP_MOMENTUM",
    "SGD",
    "SGD_MOMENTUM",
    "Family",
    "Hyperparameter",
    "Kernels",
    "Rule",
    "RuleOptimizer",
    "declare",
    "family_of",
    "power",
    "sqrt_rn",
]


def assign(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
    """The gradient itself: how unscale_ writes unscaled FP32 gradients."""
    return g, ()


ASSIGN = Rule("assign", assign)

BUILT_IN = (
    ASSIGN,
    ADADELTA,
    ADAGRAD,
    ADAM,
    ADAM_AMSGRAD,
    APEX_ADAGRAD,
    APEX_ADAM,
    APEX_SGD_MOMENTUM,
    LAMB,
    LION,
    NADAM,
    NOVOGRAD,
    RADAM,
    RMSPROP,
    RMSPROP_CENTERED,
    RMSPROP_CENTERED_MOMENTUM,
    RMSPROP_MOMENTUM,
    *dict.fromkeys(larc.RULES.values()),
    SGD,
    SGD_MOMENTUM,
)
FAMILIES = (
    adadelta.FAMILY,
    adagrad.FAMILY,
    adam.DECOUPLED_FAMILY,
    adam.FAMILY,
    apex.FUSED_ADAGRAD,
    apex.FUSED_ADAM,
    apex.FUSED_SGD,
    lamb.FAMILY,
    *larc.FAMILIES,
    lion.FAMILY,
    nadam.FAMILY,
    novograd.FAMILY,
    radam.FAMILY,
    rmsprop.FAMILY,
    sgd.FAMILY,
)

OF_TORCH: dict[type[torch.optim.Optimizer], Family] = {
    torch.optim.Adadelta: adadelta.FAMILY,
    torch.optim.Adagrad: adagrad.FAMILY,
    torch.optim.Adam: adam.FAMILY,
    torch.optim.AdamW: adam.DECOUPLED_FAMILY,
    torch.optim.NAdam: nadam.FAMILY,
    torch.optim.RAdam: radam.FAMILY,
    torch.optim.RMSprop: rmsprop.FAMILY,
    torch.optim.SGD: sgd.FAMILY,
}


def family_of(optimizer: torch.optim.Optimizer) -> Family | None:
    """The family that steps `optimizer` in the fused kernel, or None for the general path.

    Of torch's only the very classes above: a subclass may have a step of its own. A `RuleOptimizer` has its family,
    unless a subclass has another `step`; and an object that was given another one has none.
    """
    known = RuleOptimizer if isinstance(optimizer, RuleOptimizer) else type(optimizer)
    if _step_of(optimizer) is not inspect.unwrap(known.step):
        return None
    return optimizer.family if isinstance(optimizer, RuleOptimizer) else OF_TORCH.get(type(optimizer))


def _step_of(optimizer: torch.optim.Optimizer) -> object:
    """The function behind `optimizer.step`: torch wraps it for each class, and its schedulers for each object."""
    step = optimizer.step
    return inspect.unwrap(getattr(step, "__func__", step))
