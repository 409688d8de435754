"""`declare`: an optimizer class of one rule."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mpengine.kernels import layout
from mpengine.rules.declaration import Columns, Family, Kernels, Measure, Rule, Scalars, Settle, Update
from mpengine.rules.hyperparameters import REQUIRED, Hyperparameter
from mpengine.rules.own import RuleOptimizer

_TAKEN = {"params", "param_names", "self"}  # of the constructor, and of torch's param groups
_KEPT = {"step", "master"}  # what the engine keeps beside a rule's own state


def given(h: np.ndarray, step: np.ndarray) -> Columns:
    """The hyperparameters as they are: the scalars of a rule that declares none."""
    return list(h)


def declare(
    name: str,
    update: Update,
    *,
    hyperparameters: Mapping[str, Hyperparameter],
    slots: Sequence[str] = (),
    scalars: Scalars = given,
    measure: Measure | None = None,
    norms: int = 0,
    settle: Settle | None = None,
    cells: Sequence[str] = (),
    initial: Mapping[str, float] | None = None,
    kernels: Kernels | None = None,
    module: str | None = None,
) -> type[RuleOptimizer]:
    """Makes an optimizer class of one rule: masters, scaling, skipping, clipping, saving and schedules come with it.

    See `Rule` for the functions, and docs/write-a-rule.md for a rule from its paper. `mpengine.testing.check_rule`
    tests the class.

    Args:
        name: Of the class; give it the name of the variable that holds it, so that instances can be pickled. It may be
            that of a built-in rule: a declared one is found by its functions.
        update: `(p, g, slots, c) -> (p, slots)`.
        hyperparameters: Of every param group, in the order in which `scalars` gets them, tuples spread out, flags as 0
            or 1; "lr" is among them. At most `layout.HYPER` numbers. One named "max_grad_norm" is not among `scalars`'
            numbers: by itself the optimizer clips to it, and `prepare` does, unless it is given another.
        slots: Names of the rule's state tensors.
        scalars: `(h, step) -> c`, at most `layout.SCALARS`. Left out, `c` are the hyperparameters.
        measure: `(p, g, slots, c) -> (x, ...)`, for norms of each tensor.
        norms: How many.
        settle: `(c, norms, cells) -> (c, cells)`.
        cells: Names of the rule's numbers for each tensor.
        initial: What slots and cells hold before the first step, where it is not 0.
        kernels: The functions' Triton twins. Without them the optimizer runs on a CPU, and by itself anywhere.
        module: Where the class is to be found by its name. None: the module that calls this.

    Returns:
        A subclass of `RuleOptimizer`, constructed as `Class(params, lr=..., ...)`.

    Raises:
        TypeError: A hyperparameter is no `Hyperparameter`, or a Triton twin no function under `triton.jit`.
        ValueError: Too many numbers or tensors, no lr, a name that is taken, or functions that do not belong together.
    """
    _check_names(name, hyperparameters, [*slots, *cells])
    unknown = sorted(set(initial or {}) - {*slots, *cells})
    if unknown:
        raise ValueError(f"rule '{name}' has initial values of {unknown}, which are no slots or cells of it.")
    # Not a name of a built-in rule, whose functions are found by it.
    rule = Rule(f"{name} (declared)", update, tuple(slots), measure, norms, settle, tuple(cells), kernels)
    if kernels is not None:
        _check_twins(name, kernels, {"scalars": scalars is not given, "measure": measure, "settle": settle})
    numbers = [key for key in hyperparameters if key != "max_grad_norm"]
    values = dict(initial or {})
    family = Family(
        rule.name,
        lambda group: _flat(group[key] for key in numbers),
        lambda group: rule,
        scalars,
        slots=rule.slots + rule.cells,
        initial=lambda group: values,
        kernels=kernels,
    )
    body = {
        "__module__": module or sys._getframe(1).f_globals.get("__name__", __name__),
        "__qualname__": name,
        "__doc__": update.__doc__,
        "__init__": _constructor(hyperparameters),
        "family": family,
        "hyperparameters": dict(hyperparameters),
    }
    return type(name, (RuleOptimizer,), body)


def _check_names(name: str, hyperparameters: Mapping[str, Hyperparameter], state: Sequence[str]) -> None:
    for key, one in hyperparameters.items():
        if not isinstance(one, Hyperparameter):
            raise TypeError(f"hyperparameter {key} of rule '{name}' is {one!r}; give Hyperparameter({one!r}).")
    odd = [key for key in (name, *hyperparameters) if not key.isidentifier() or key in _TAKEN]
    if odd:
        raise ValueError(f"{odd[0]!r} of rule '{name}' is no name, or one that torch needs: choose another.")
    taken = [key for key in state if key in _KEPT or state.count(key) > 1]
    if taken:
        raise ValueError(f"rule '{name}' keeps {taken[0]!r} twice, or with the engine, which keeps {sorted(_KEPT)}.")
    width = sum(one.width for key, one in hyperparameters.items() if key != "max_grad_norm")
    if "lr" not in hyperparameters or width > layout.HYPER:
        raise ValueError(
            f"rule '{name}' declares {width} numbers, {sorted(hyperparameters)}; lr must be one of them, and there is "
            f"room for {layout.HYPER}."
        )


def _check_twins(name: str, kernels: Kernels, needed: Mapping[str, Any]) -> None:
    """A missing twin would be found at the first step on a GPU only."""
    for kind, function in {"update": True, **needed}.items():
        twin = getattr(kernels, kind)
        if (twin is not None) != bool(function):
            what = f"has {kind}, and no" if function else f"has no {kind}, but a"
            raise ValueError(f"rule '{name}' {what} Triton twin of it: give Kernels(...) exactly what the rule has.")
        if twin is not None and not hasattr(twin, "arg_names"):
            raise TypeError(f"the Triton twin {kind} of rule '{name}' is {twin!r}; put @triton.jit above it.")


def _flat(values: Iterable[Any]) -> tuple[Any, ...]:
    spread: list[Any] = []
    for value in values:
        spread += value if isinstance(value, (tuple, list)) else [float(value) if isinstance(value, bool) else value]
    return tuple(spread)


def _constructor(hyperparameters: Mapping[str, Hyperparameter]) -> Callable[..., None]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    wanted = sorted(hyperparameters, key=lambda key: hyperparameters[key].default is not REQUIRED)
    signature = inspect.Signature(
        [inspect.Parameter("self", kind), inspect.Parameter("params", kind)]
        + [inspect.Parameter(key, kind, default=hyperparameters[key].default) for key in wanted]
    )

    def __init__(self: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        _, params, *values = bound.arguments.values()
        RuleOptimizer.__init__(self, params, dict(zip(wanted, values, strict=True)))

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    return __init__
