"""The update rules: which state each keeps, which numbers it reads, and its arithmetic.

One file for each algorithm; `declare` makes an optimizer of a rule of your own, see docs/write-a-rule.md. A family is
what one optimizer class needs: its hyperparameters, and the variants of its rule that differ in the state they keep.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from mpengine.rules import adadelta, adagrad, adam, lamb, lion, rmsprop, sgd
from mpengine.rules.adadelta import ADADELTA
from mpengine.rules.adagrad import ADAGRAD
from mpengine.rules.adam import ADAM, ADAM_AMSGRAD
from mpengine.rules.declaration import Family, Kernels, Numbers, Rule, Slots
from mpengine.rules.lamb import LAMB
from mpengine.rules.lion import LION
from mpengine.rules.own import Hyperparameter, RuleOptimizer, declare
from mpengine.rules.rmsprop import RMSPROP, RMSPROP_CENTERED, RMSPROP_CENTERED_MOMENTUM, RMSPROP_MOMENTUM
from mpengine.rules.sgd import SGD, SGD_MOMENTUM

__all__ = [
    "ADADELTA",
    "ADAGRAD",
    "ADAM",
    "ADAM_AMSGRAD",
    "ASSIGN",
    "BUILT_IN",
    "LAMB",
    "LION",
    "OF_TORCH",
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
    LAMB,
    LION,
    RMSPROP,
    RMSPROP_CENTERED,
    RMSPROP_CENTERED_MOMENTUM,
    RMSPROP_MOMENTUM,
    SGD,
    SGD_MOMENTUM,
)
FAMILIES = (
    adadelta.FAMILY,
    adagrad.FAMILY,
    adam.FAMILY,
    adam.DECOUPLED_FAMILY,
    lamb.FAMILY,
    lion.FAMILY,
    rmsprop.FAMILY,
    sgd.FAMILY,
)

OF_TORCH: dict[type[torch.optim.Optimizer], Family] = {
    torch.optim.Adadelta: adadelta.FAMILY,
    torch.optim.Adagrad: adagrad.FAMILY,
    torch.optim.Adam: adam.FAMILY,
    torch.optim.AdamW: adam.DECOUPLED_FAMILY,
    torch.optim.RMSprop: rmsprop.FAMILY,
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
    return OF_TORCH.get(type(optimizer))
