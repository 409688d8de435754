"""What the param groups of a `RuleOptimizer` hold: numbers, tuples of numbers and flags, with their bounds."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Hyperparameter:
    """A number of every param group, or a tuple of numbers, or a flag.

    Attributes:
        default: What it is where the user gives none; of a tuple its length, of a flag (bool) its type. Left out: the
            user has to give it.
        at_least: The smallest value, None for no bound; so
        above: the largest value that it must exceed,
        at_most: the largest value,
        below: and the smallest value that it must not reach.

    Raises:
        TypeError: The default is no number, tuple of numbers or flag.
        ValueError: It is out of its own bounds.
    """

    default: Any = REQUIRED
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if self.default is not REQUIRED:
            self.check("the default", self.default)

    @property
    def width(self) -> int:
        """How many numbers it is."""
        return len(self.default) if isinstance(self.default, tuple) else 1

    def check(self, name: str, value: Any, where: str = "") -> None:
        """Raises TypeError or ValueError, with the bounds, where `value` cannot be this hyperparameter.

        Args:
            name: The hyperparameter's.
            value: To be looked at. A tensor on a GPU is not: that would wait for the device.
            where: Follows the name in messages, as in " of group 1".
        """
        if isinstance(self.default, bool):
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{name}{where} is {value!r}; it must be True or False.")
        elif isinstance(self.default, tuple):
            if not isinstance(value, (tuple, list)) or len(value) != self.width:
                raise ValueError(f"{name}{where} is {value!r}; it must be {self.width} numbers, as {self.default}.")
            for i, each in enumerate(value):
                if type(each) is not float or not self._allows(each):
                    self._check_number(f"{name}[{i}]{where}", each)
        elif type(value) is not float or not self._allows(value):
            self._check_number(name + where, value)

    def _allows(self, value: float) -> bool:
        return (
            -math.inf < value < math.inf
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def _check_number(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() == 1:
            if value.device.type != "cpu":
                return
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise TypeError(f"{name} is {value!r}; it must be a number.")
        if not self._allows(float(value)):
            bounds = ("at_least", "above", "at_most", "below")
            given = [f"{bound.replace('_', ' ')} {getattr(self, bound):g}" for bound in bounds if self._has(bound)]
            raise ValueError(f"{name} is {value!r}; it must be {' and '.join(['finite', *given])}.")

    def _has(self, bound: str) -> bool:
        return getattr(self, bound) is not None
