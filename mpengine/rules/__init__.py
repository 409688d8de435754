"""The update rules: which state each keeps, which numbers it reads, and its arithmetic.

One file for each algorithm; `declare` makes an optimizer of a rule of your own, see docs/write-a-rule.md. A family is
what one optimizer class needs: its hyperparameters, and the variants of its rule that differ in the state they keep.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from mpengine.rules import adam, lamb, sgd
from mpengine.rules.adam import ADAM, ADAM_AMSGRAD
from mpengine.rules.declaration import Family, Kernels, Numbers, Rule, Slots
from mpengine.rules.lamb import LAMB
from mpengine.rules.own import Hyperparameter, RuleOptimizer, declare
from mpengine.rules.sgd import SGD, SGD_MOMENTUM

__all__ = [
    "ADAM",
    "ADAM_AMSGRAD",
    "ASSIGN",
    "BUILT_IN",
    "LAMB",
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

BUILT_IN = (ASSIGN, SGD, SGD_MOMENTUM, ADAM, ADAM_AMSGRAD, LAMB)
FAMILIES = (sgd.FAMILY, adam.family(always_decoupled=False), adam.family(always_decoupled=True), lamb.FAMILY)

_OF_TORCH: dict[type[torch.optim.Optimizer], Family] = {
    torch.optim.SGD: FAMILIES[0],
    torch.optim.Adam: FAMILIES[1],
    torch.optim.AdamW: FAMILIES[2],
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
