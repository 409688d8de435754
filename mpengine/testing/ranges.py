"""Whether values out of a hyperparameter's bounds are refused wherever they may come from, and nothing has changed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mpengine.rules import Hyperparameter, RuleOptimizer
from mpengine.testing.training import Alone, Make, Prepared, grads_of, same


def check_ranges(make: Make) -> int:
    """Tries to give every hyperparameter values that it cannot have.

    Returns:
        How many there were.

    Raises:
        AssertionError: One was accepted, refused without its name, or something had changed by then.
    """
    alone, prepared = Alone(make), Prepared(make, torch.device("cpu"))
    for world in (alone, prepared):
        world.step(grads_of(0))
    tried = 0
    for name, hyperparameter in alone.optimizer.hyperparameters.items():
        good = alone.optimizer.defaults[name]
        for bad in bad_values(hyperparameter, good):
            _check_constructor(alone.optimizer, name, bad)
            for world in (alone, prepared):
                _check_one(world, name, good, bad)
            tried += 1
    return tried


def bad_values(hyperparameter: Hyperparameter, good: Any) -> list[Any]:
    """One value beyond each bound; and what is no number, or no flag."""
    if isinstance(hyperparameter.default, bool):
        return ["yes", 2.0]
    bounds = hyperparameter.at_least, hyperparameter.above, hyperparameter.at_most, hyperparameter.below
    steps = -1.0, 0.0, 1.0, 0.0
    beyond = [bound + step for bound, step in zip(bounds, steps, strict=True) if bound is not None]
    numbers: list[Any] = [*beyond, float("nan"), float("inf"), "0.1"]
    if isinstance(hyperparameter.default, tuple):
        return [(*good[:-1], number) for number in numbers] + [(*good, good[-1])]
    return numbers


def _check_constructor(optimizer: RuleOptimizer, name: str, bad: Any) -> None:
    param = [torch.nn.Parameter(torch.zeros(2))]
    values = {key: optimizer.defaults[key] for key in optimizer.hyperparameters}
    type(optimizer)(param, **values)  # which is fine
    with _refused(name, bad, "the constructor"):
        type(optimizer)(param, **{**values, name: bad})


def _check_one(world: Alone | Prepared, name: str, good: Any, bad: Any) -> None:
    before = {key: value.detach().clone() for key, value in world.tensors().items()}
    optimizer = world.optimizer
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    who = "by itself" if isinstance(world, Alone) else "prepared"

    def add() -> None:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], name: bad})

    def load() -> None:
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0][name] = bad
        optimizer.load_state_dict(state)

    def step() -> None:
        optimizer.param_groups[0][name] = bad
        try:
            world.step(grads_of(1))
        finally:
            optimizer.param_groups[0][name] = good
            optimizer.zero_grad()

    tries: dict[str, Callable[[], None]] = {"add_param_group": add, "load_state_dict": load, "step": step}
    for what, attempt in tries.items():
        with _refused(name, bad, f"{what} ({who})"):
            attempt()
        kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        if kept != groups:
            raise AssertionError(f"{what} ({who}) refused {name} = {bad!r}, but changed param_groups to {kept}.")
        same(f"{what} ({who}) with {name} = {bad!r}, which is refused", before, world.tensors())


@contextlib.contextmanager
def _refused(name: str, bad: Any, what: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        if name not in str(error):
            raise AssertionError(f"{what} refuses {name} = {bad!r} without naming it: {error}") from error
    else:
        raise AssertionError(f"{what} accepts {name} = {bad!r}, which is out of its bounds.")
