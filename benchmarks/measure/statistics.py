"""Medians and quartiles of repeated measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the quartiles on either side."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    count: int

    @property
    def iqr(self) -> float:
        """The interquartile range."""
        return self.high - self.low

    def row(self) -> dict[str, Any]:
        """As it stands in a result file."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; quartiles interpolate, the extremes included.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("there is nothing to summarise: measure at least once.")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high, len(values))


def ratio(above: float | None, below: float | None) -> float | None:
    """A quotient; None where one of the two was not measured."""
    return above / below if above is not None and below else None
