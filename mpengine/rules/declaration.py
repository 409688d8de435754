"""What a rule is: the state it keeps, the numbers it reads, and its arithmetic, element by element.

```
c           = family.scalars(hyperparameters, step)          float64 on the host or in decide, then rounded to FP32
norms       = sqrt(sum of squares) of rule.measure(p, g, slots, c)      only for rules that have them: of each tensor
c, cells    = rule.settle(c, norms, cells)                              float64, then rounded to FP32
p, slots    = rule.update(p, g, slots, c)                    FP32
```

`p` is the FP32 master, `g` the unscaled and clipped gradient of all losses. Each function stands here for the reference
and the CPU, and again in Triton for the device: built-in ones in `kernels.rules` under the same name, those of a
declared rule beside it (`Kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mpengine.kernels import layout

Slots = tuple[Tensor, ...]
Numbers = Sequence[float]
Columns = Sequence[np.ndarray]  # one number of every tensor each: float64[T]

Update = Callable[[Tensor, Tensor, Slots, Numbers], tuple[Tensor, Slots]]
Measure = Callable[[Tensor, Tensor, Slots, Numbers], tuple[Tensor, ...]]
Settle = Callable[[Columns, Columns, Columns], tuple[Columns, Columns]]
Scalars = Callable[[np.ndarray, np.ndarray], Columns]


@dataclass(frozen=True)
class Kernels:
    """The Triton twins of a declared rule; functions under `triton.jit`, of the same arguments and results.

    Attributes:
        update: `(p, g, slots, c) -> (p, slots)`: blocks of FP32, tuples of them, and FP32 numbers.
        scalars: `(h, step) -> c`: float64 blocks and an int32 block. None: the hyperparameters as they are.
        measure: `(p, g, slots, c) -> (x, ...)`.
        settle: `(c, norms, cells) -> (c, cells)`: float64 numbers.
    """

    update: Any
    scalars: Any = None
    measure: Any = None
    settle: Any = None


@dataclass(frozen=True)
class Rule:
    """One update rule.

    Attributes:
        name: Its key in `reference.RULES` and `kernels.rules.RULES`.
        update: `(p, g, slots, c) -> (p, slots)`, element by element: FP32 tensors of one shape, tuples of them, and the
            tensor's scalars as FP32 values in Python floats. Returns new tensors.
        slots: Names of its FP32 state tensors in `optimizer.state[p]`, each of the parameter's shape; at most
            `layout.MAX_SLOTS`.
        measure: `(p, g, slots, c) -> (x, ...)`: FP32 tensors of whose elements the tensor's norms are taken.
        norms: How many tensors `measure` returns; at most `layout.NORMS`.
        settle: `(c, norms, cells) -> (c, cells)`: the scalars that `update` reads, once the tensor's norms are known.
            It may get more of them than `scalars` gave, and may return fewer, which are the first ones then.
        cells: Names of its FP32 numbers in `optimizer.state[p]`, of no dimension; at most `layout.MAX_CELLS`.
        kernels: Of a declared rule. None: `kernels.rules` has them under this name.
    """

    name: str
    update: Update
    slots: tuple[str, ...] = ()
    measure: Measure | None = None
    norms: int = 0
    settle: Settle | None = None
    cells: tuple[str, ...] = ()
    kernels: Kernels | None = None

    def __post_init__(self) -> None:
        """Holds what the device's tables have room for."""
        for what, count, most in (
            ("slots", len(self.slots), layout.MAX_SLOTS),
            ("cells", len(self.cells), layout.MAX_CELLS),
            ("norms", self.norms, layout.NORMS),
        ):
            if count > most:
                raise ValueError(f"rule '{self.name}' has {count} {what}; there is room for {most}.")
        if (self.measure is None) != (self.norms == 0) or (self.settle is None and (self.norms or self.cells)):
            raise ValueError(
                f"rule '{self.name}' has measure={self.measure}, norms={self.norms}, settle={self.settle} and cells="
                f"{self.cells}: norms come from measure, and norms and cells are for settle to read."
            )


def _nothing(group: Mapping[str, Any]) -> Mapping[str, float]:
    """Every state is 0 before the first step."""
    return {}


@dataclass(frozen=True)
class Family:
    """The rules behind one optimizer class.

    Attributes:
        name: Key of `scalars` in `reference.SCALAR_FUNCTIONS` and `kernels.rules.SCALAR_FUNCTIONS`.
        hyperparameters: From a param group to its row of at most `layout.HYPER` numbers (or 0-dim tensors).
        variant: From a param group to the rule that its parameters need.
        scalars: `(h, step) -> c`: from float64[HYPER, T] and int[T] to at most `layout.SCALARS` columns of T numbers.
        slots: The slots and cells that any of the variants keeps.
        counts_steps: Whether `optimizer.state[p]` has a "step", as torch's class has. One that has none starts its
            momentum buffer with the first gradient.
        initial: From a param group to what slots and cells hold before the first step, where that is not 0.
        kernels: Of a declared family: the rule's `Kernels`, of which decide needs `scalars`.
    """

    name: str
    hyperparameters: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    variant: Callable[[Mapping[str, Any]], Rule]
    scalars: Scalars
    slots: tuple[str, ...]
    counts_steps: bool = True
    initial: Callable[[Mapping[str, Any]], Mapping[str, float]] = _nothing
    kernels: Kernels | None = None
