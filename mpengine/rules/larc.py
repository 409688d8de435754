"""LARC: another optimizer's step, with a rate for each layer as large as its weights ask for (You et al. 2017).

```
a = trust_coefficient * ||p|| / (||g|| + weight_decay * ||p|| + eps)
a = min(a / lr, 1)                                with clip
g = (g + weight_decay * p) * a                    g itself where one of the norms is 0
```

and then SGD's or Adam's step, without weight decay. arXiv 1708.03888, as apex has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from mpengine.rules.adam import ADAM, ADAM_AMSGRAD, adam_scalars
from mpengine.rules.adam import FAMILY as ADAM_FAMILY
from mpengine.rules.apex import APEX_ADAM, APEX_SGD_MOMENTUM, FUSED_ADAM, apex_adam_scalars
from mpengine.rules.declaration import Columns, Family, Numbers, Rule, Scalars, Slots, Update
from mpengine.rules.sgd import FAMILY as SGD_FAMILY
from mpengine.rules.sgd import SGD, SGD_MOMENTUM, sgd_scalars


def _scalars(inner: Scalars, width: int, decay: int) -> Scalars:
    """Of the inner rule's row of `width` hyperparameters, `decay` among them, and (trust_coefficient, eps, clip).

    The inner rule's scalars; c[9], which is lr or none of them, is lr; then the decay, and the trust, negative with
    clip. Without decay c[1] would be 0: it holds eps until settle.
    """

    def scalars(h: np.ndarray, step: np.ndarray) -> list[np.ndarray]:
        trust, eps, clips = h[width : width + 3]
        own = h.copy()
        own[decay] = 0.0
        first, _, *others = inner(own, step)
        missing = [np.zeros_like(trust)] * (7 - len(others))
        return [first, eps, *others[:7], *missing, h[0], h[decay], np.where(clips != 0, -trust, trust)]

    return scalars


def larc_measure(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Tensor]:
    """The weight, and the gradient."""
    return p, g


def larc_settle(c: Columns, norms: Columns, cells: Columns) -> tuple[Columns, Columns]:
    """The trust becomes a; c[1] becomes the 0 that the inner rule's decay is."""
    first, eps, *others, lr, decay, trust = c[:12]
    weight, grad = norms
    adapted = (weight > 0.0) & (grad > 0.0)
    a = np.abs(trust) * weight / np.where(adapted, grad + decay * weight + eps, 1.0)
    a = np.where(trust < 0.0, np.where(a < lr, a / np.where(lr > 0.0, lr, 1.0), 1.0), a)
    return (first, eps * 0.0, *others, lr, np.where(adapted, decay, 0.0), np.where(adapted, a, 1.0)), cells


def _update(inner: Update) -> Update:
    def update(p: Tensor, g: Tensor, slots: Slots, c: Numbers) -> tuple[Tensor, Slots]:
        return inner(p, (g + p * c[10]) * c[11], slots, c)

    return update


def _rule(inner: Rule) -> Rule:
    return Rule(f"larc_{inner.name}", _update(inner.update), inner.slots, larc_measure, 2, larc_settle)


RULES = {rule: _rule(rule) for rule in (SGD, SGD_MOMENTUM, ADAM, ADAM_AMSGRAD, APEX_ADAM)}
RULES[APEX_SGD_MOMENTUM] = RULES[SGD_MOMENTUM]  # they differ in the decay only, which is LARC's
_SCALARS = {
    "sgd": _scalars(sgd_scalars, width=6, decay=3),
    "adam": _scalars(adam_scalars, width=7, decay=4),
    "apex_adam": _scalars(apex_adam_scalars, width=7, decay=4),
}


def family(inner: Family, numbers: Callable[[], tuple[float, float, float]]) -> Family | None:
    """The family of LARC around an optimizer of the family `inner`; None where LARC cannot be around it.

    Args:
        inner: Of the optimizer.
        numbers: Gives (trust_coefficient, eps, clip), at every step.
    """
    if inner.name not in _SCALARS:
        return None

    def variant(group: Mapping[str, Any]) -> Rule:
        if group.get("maximize"):
            raise ValueError("maximize is True, and LARC's decay is of a gradient that is descended; negate the loss.")
        return RULES[inner.variant(group)]

    return Family(
        f"larc_{inner.name}",
        lambda group: (*inner.hyperparameters(group), *numbers()),
        variant,
        _SCALARS[inner.name],
        inner.slots,
        inner.counts_steps,
    )


FAMILIES = [
    made
    for inner in (SGD_FAMILY, ADAM_FAMILY, FUSED_ADAM)
    if (made := family(inner, lambda: (0.02, 1e-8, 1.0))) is not None
]
