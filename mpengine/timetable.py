"""A schedule that an optimizer follows by the steps it has taken: checked on the host, read on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from mpengine.kernels import layout
from mpengine.rules import Family, Rule
from mpengine.unroll import Unrolled

Group = Mapping[str, Any]


class Timetable:
    """Hyperparameters of every step ahead, for each param group.

    Args:
        unrolled: The values of each step and group.
        start: The number of steps taken at which the first row applies; before, the first row, after the end the last.
        groups: The optimizer's param groups, whose own values of what is scheduled are no longer read.
        family: Of the optimizer; None on the general path.

    Raises:
        ValueError: Steps of one group need different state (an SGD momentum that is 0 in some of them only).
    """

    def __init__(self, unrolled: Unrolled, start: int, groups: Sequence[Group], family: Family | None) -> None:
        if not isinstance(start, int) or isinstance(start, bool):
            raise ValueError(f"start is {start!r}; it must be an int: the steps taken where the schedule begins.")
        self._unrolled, self._start = unrolled, start
        self._own = [{key: _number(group[key]) for key in unrolled.keys} for group in groups]
        self._marks = [{key: _mark(group[key]) for key in unrolled.keys} for group in groups]
        self._rules = None if family is None else [self._rule(family, g, group) for g, group in enumerate(groups)]

    def _rule(self, family: Family, g: int, group: Group) -> Rule:
        columns = {key: column[:, g].tolist() for key, column in self._unrolled.columns.items() if key != "lr"}
        steps = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rules = [family.variant({**group, **values}) for values in steps or [{}]]
        for step, rule in enumerate(rules):
            if rule != rules[0]:
                raise ValueError(
                    f"the schedule of group {g} keeps the state {list(rules[0].slots)} at step 0, but "
                    f"{list(rule.slots)} at step {step}, where it is {steps[step]}; keep a momentum at 0 throughout, "
                    "or above."
                )
        return rules[0]

    def rule(self, g: int) -> Rule | None:
        """The update rule of a group; None on the general path, and for a group that came later."""
        return None if self._rules is None or g >= len(self._rules) else self._rules[g]

    def values(self, taken: int) -> list[dict[str, Any]]:
        """For each group what is scheduled for the step after `taken` steps."""
        return [dict(row) for row in self._unrolled.row(taken - self._start)]

    def check(self, groups: Sequence[Group]) -> None:
        """Raises RuntimeError where groups came, went, or somebody set what is scheduled: it would have no effect."""
        if len(groups) != len(self._own):
            raise RuntimeError(
                f"the optimizer was scheduled with {len(self._own)} param groups and has {len(groups)} now; call "
                "optimizer.schedule(...) again."
            )
        for g, (group, own, marks) in enumerate(zip(groups, self._own, self._marks, strict=True)):
            for key, before in own.items():
                if _mark(group[key]) == marks[key]:
                    continue
                if _number(group[key]) != before:
                    raise RuntimeError(
                        f"{key} of group {g} was set to {group[key]} while optimizer.schedule(...) sets it (it was "
                        f"{before} when it was scheduled). Call schedule again to begin from the new value, or "
                        "optimizer.schedule(None) to end the schedule; an LR scheduler beside it is one too many."
                    )
                marks[key] = _mark(group[key])

    @contextmanager
    def applied(self, groups: Sequence[MutableMapping[str, Any]], taken: int) -> Iterator[None]:
        """The groups hold the values of the step after `taken` steps: the wrapped optimizer's own step reads them."""
        before = [{key: group[key] for key in self._unrolled.keys} for group in groups]
        try:
            for group, values in zip(groups, self.values(taken), strict=True):
                group.update(values)
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)

    def tables(self, family: Family, groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray]:
        """int64[layout.SCHEDULE] and float64[steps, groups, scheduled hyperparameters], as `decide` reads them."""
        own = np.array([family.hyperparameters({**group, **self._own[g]}) for g, group in enumerate(groups)])
        every = np.broadcast_to(own, (self._unrolled.steps, *own.shape)).copy()
        for g, group in enumerate(groups):
            columns = {key: _by_step(column[:, g]) for key, column in self._unrolled.columns.items()}
            for j, value in enumerate(family.hyperparameters({**group, **columns})):
                every[:, g, j] = value
        chosen = np.flatnonzero((every != own).any(axis=(0, 1)))
        plan = np.full(layout.SCHEDULE, -1, dtype=np.int64)
        plan[layout.SCHEDULE_ROWS] = self._unrolled.steps
        plan[layout.SCHEDULE_START] = self._start
        plan[layout.SCHEDULE_WIDTH] = len(chosen)
        plan[layout.SCHEDULE_GROUPS] = len(groups)
        plan[layout.SCHEDULE_COLUMN + chosen] = np.arange(len(chosen))
        return plan, np.ascontiguousarray(every[:, :, chosen])


def _by_step(column: np.ndarray) -> Any:
    """A hyperparameter's values of all steps, in the place of one: an array, or for betas a tuple of arrays."""
    return column if column.ndim == 1 else tuple(column.T)


def _mark(value: Any) -> Any:
    """Changes when the value may have changed; of a tensor, which may lie on the device, the value is not read."""
    if isinstance(value, Tensor):
        return id(value), value._version
    return tuple(map(_mark, value)) if isinstance(value, (list, tuple)) else value


def _number(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return tuple(map(_number, value)) if isinstance(value, (list, tuple)) else value
