"""`unroll`: the hyperparameters that a torch scheduler would set at each step, written down ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

Value = float | tuple[float, ...]

# Torch's recurrences leave an lr that ends at zero some 1e-16 of its peak below it; a million steps, 1e-9 at most.
_ROUNDING = 1e-9
_NEVER_NEGATIVE = ("lr", "momentum", "betas", "weight_decay", "eps")  # torch's constructors refuse that, too


@dataclass(frozen=True, eq=False)
class Unrolled:
    """A schedule as a table.

    Attributes:
        keys: The hyperparameters that it sets: "lr", and those that the scheduler moved.
        columns: For each of them float64[steps, groups], or float64[steps, groups, n] where the value is a tuple of n
            (betas); read-only.
    """

    keys: tuple[str, ...]
    columns: Mapping[str, NDArray[np.float64]]

    @property
    def steps(self) -> int:
        """Rows of the table."""
        return len(self.columns[self.keys[0]])

    def row(self, step: int) -> list[dict[str, Value]]:
        """For each group the values of this step, from 0; before the first row the first, after the last the last."""
        at = min(max(step, 0), self.steps - 1)
        values = {key: column[at].tolist() for key, column in self.columns.items()}
        return [
            {key: tuple(each[g]) if isinstance(each[g], list) else each[g] for key, each in values.items()}
            for g in range(self.columns[self.keys[0]].shape[1])
        ]


class _Shadow(torch.optim.Optimizer):
    """Has the groups and defaults of an optimizer, and nothing to step: what a scheduler asks of its optimizer."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Changes nothing."""

    step.hooked = True  # type: ignore[attr-defined]  # torch then runs no global step hooks: nothing is being stepped


def unroll(
    param_groups: Sequence[dict[str, Any]],
    defaults: Mapping[str, Any],
    make_scheduler: Callable[[torch.optim.Optimizer], Any],
    steps: int,
) -> Unrolled:
    """Runs a scheduler ahead of time, on a shadow of the optimizer.

    ```
    scheduler = make_scheduler(shadow)
    for t in 0 .. steps - 1:
        row t = the hyperparameters of each group
        shadow.step(); scheduler.step()
    ```

    Row t holds what torch would use at step t, to the bit. A tensor lr is rounded to its dtype, as there.

    Args:
        param_groups: Of the optimizer; what make_scheduler may do to them is undone.
        defaults: Of the optimizer: schedulers look there for momentum and betas.
        make_scheduler: From an optimizer to its scheduler, or to several in a list, which are stepped in their order.
        steps: Rows of the table.

    Returns:
        The table.

    Raises:
        TypeError: `make_scheduler` is no function, returns no scheduler, or returns a `ReduceLROnPlateau`.
        ValueError: `steps` is no int of at least 1; the scheduler belongs to another optimizer; it has fewer steps; it
            moves what is no number; a value is not finite, or negative.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps is {steps!r}; it must be an int of at least 1: the steps that the schedule spans.")
    if not callable(make_scheduler):
        raise TypeError(
            f"make_scheduler is a {type(make_scheduler).__name__}; give a function that makes the scheduler for the "
            "optimizer that it is given, as in lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=1000)."
        )
    candidates = tuple(dict.fromkeys(("lr", *defaults)))
    start = [{key: _number(group.get(key)) for key in candidates} for group in param_groups]
    keys = [key for key in candidates if all(group[key] is not None for group in start)]
    with _restored(param_groups):
        shadow = _Shadow([_copied(group) for group in param_groups], dict(defaults))
        schedulers = _checked(make_scheduler(shadow), shadow)
        history: dict[str, list[list[Value | None]]] = {key: [] for key in keys}
        for t in range(steps):
            if t > 0:
                shadow.step()
                _advance(schedulers, t, steps)
            for key, rows in history.items():
                rows.append([_number(group[key]) for group in shadow.param_groups])
        _check_flags(shadow, param_groups, keys)
    moved = [key for key in keys if key == "lr" or any(row != [group[key] for group in start] for row in history[key])]
    return Unrolled(tuple(moved), {key: _column(key, history[key], start) for key in moved})


@contextmanager
def _restored(param_groups: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Undoes what happens to the groups: a function that closed over the true optimizer has written into them."""
    before = [dict(group) for group in param_groups]
    tensors = [(v, v.clone()) for group in before for v in group.values() if isinstance(v, Tensor) and v.numel() == 1]
    try:
        yield
    finally:
        for group, values in zip(param_groups, before, strict=True):
            group.clear()
            group.update(values)
        for tensor, value in tensors:
            if not torch.equal(tensor, value):
                tensor.copy_(value)


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    def own(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.detach().cpu().clone()
        return list(value) if isinstance(value, list) else value

    copies = {key: own(value) for key, value in group.items() if key != "params"}
    return {"params": [torch.zeros((), device="cpu")], **copies}


def _checked(made: Any, shadow: _Shadow) -> list[Any]:
    """The schedulers in what make_scheduler returned."""
    schedulers = list(made) if isinstance(made, (list, tuple)) else [made]
    if not schedulers:
        raise TypeError("make_scheduler returned no scheduler, but an empty list.")
    for scheduler in schedulers:
        if not callable(getattr(scheduler, "step", None)) or not hasattr(scheduler, "optimizer"):
            raise TypeError(
                f"make_scheduler returned a {type(scheduler).__name__}, which is no scheduler of "
                "torch.optim.lr_scheduler; return the one that it made for the optimizer it was given."
            )
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "ReduceLROnPlateau needs a metric at every step, so it cannot be unrolled ahead of time. Make it for "
                "the optimizer itself and call scheduler.step(metric) there."
            )
        if scheduler.optimizer is not shadow:
            raise ValueError(
                f"the {type(scheduler).__name__} that make_scheduler returned belongs to another optimizer (of type "
                f"{type(scheduler.optimizer).__name__}) than the one that make_scheduler was given. Use its argument, "
                "as in lambda opt: OneCycleLR(opt, ...)."
            )
    return schedulers


def _advance(schedulers: Sequence[Any], t: int, steps: int) -> None:
    for scheduler in schedulers:
        try:
            scheduler.step()
        except ValueError as error:  # OneCycleLR's, beyond its total_steps
            raise ValueError(
                f"the {type(scheduler).__name__} cannot be stepped to step {t} of steps={steps}: {error}. Schedule "
                "fewer steps, or make the scheduler for as many."
            ) from error


def _number(value: Any) -> Value | None:
    """A number or a tuple of numbers as Python floats; None for what is neither."""
    if type(value) is float:  # nearly always, and this runs for each key, group and step
        return value
    if isinstance(value, (tuple, list)):
        parts = [_number(part) for part in value]
        return tuple(p for p in parts if isinstance(p, float)) if parts and None not in parts else None
    if isinstance(value, Tensor):
        return float(value.detach()) if value.numel() == 1 else None
    return None if isinstance(value, bool) or not isinstance(value, Real) else float(value)


def _check_flags(shadow: _Shadow, param_groups: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """What is no number (nesterov, amsgrad) has no place in a table of numbers."""
    for g, (after, before) in enumerate(zip(shadow.param_groups, param_groups, strict=True)):
        for key in shadow.defaults:
            if key in before and key not in keys and not isinstance(before[key], Tensor) and after[key] != before[key]:
                raise ValueError(
                    f"the scheduler changes {key} of group {g} from {before[key]!r} to {after[key]!r}; only numbers "
                    "and tuples of numbers can be scheduled."
                )


def _column(
    key: str, rows: Sequence[Sequence[Value | None]], start: Sequence[Mapping[str, Value | None]]
) -> NDArray[np.float64]:
    """float64[steps, groups (, n)], refused where a value cannot be stepped with."""
    shapes = [np.shape(group[key]) for group in start]  # type: ignore[arg-type]  # no None among what has a column
    try:
        column = np.array(rows, dtype=np.float64)  # NaN for None
    except ValueError:  # a number here, a tuple there
        column = np.empty(0)
    if column.shape != (len(rows), len(start), *shapes[0]):
        places = ((t, g) for t, row in enumerate(rows) for g in range(len(start)) if np.shape(row[g]) != shapes[g])  # type: ignore[arg-type]
        t, g = next(places, (0, 0))
        raise ValueError(
            f"the scheduler sets {key} of group {g} to {rows[t][g]} at step {t}, from {start[g][key]}; a number must "
            "stay a number, and a tuple as long as it was."
        )
    bad = ~np.isfinite(column)
    if key in _NEVER_NEGATIVE:
        peak = np.max(np.abs(column), where=~bad, initial=0.0)
        bad |= column < -_ROUNDING * peak
    if key == "betas":
        bad |= column >= 1.0
    if bad.any():
        t, g = (int(i) for i in np.argwhere(bad)[0][:2])
        expected = "finite and in [0, 1)" if key == "betas" else "finite and not negative"
        raise ValueError(
            f"the scheduler sets {key} of group {g} to {rows[t][g]} at step {t} of steps={len(rows)}; it must be "
            f"{expected if key in _NEVER_NEGATIVE else 'finite'}. Look at its arguments."
        )
    column.setflags(write=False)
    return column
