"""Optimizers that a rule makes: mpengine's own, and those that users declare."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mpengine.kernels import layout
from mpengine.rules.declaration import Columns, Family, Kernels, Measure, Rule, Scalars, Settle, Update

_REQUIRED = inspect.Parameter.empty


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
    """

    default: Any = _REQUIRED
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises TypeError or ValueError, with the bounds, where `value` cannot be this hyperparameter."""
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}; it must be True or False.")
            return
        if isinstance(self.default, tuple):
            if not isinstance(value, (tuple, list)) or len(value) != len(self.default):
                raise ValueError(f"{name} is {value!r}; it must be {len(self.default)} numbers, as {self.default}.")
            for i, each in enumerate(value):
                self._check_number(f"{name}[{i}]", each)
            return
        self._check_number(name, value)

    def _check_number(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.numel() == 1:
            if value.device.type != "cpu":
                return  # a capturable one: to read it would wait for the device
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise TypeError(f"{name} is {value!r}; it must be a number.")
        bounds = (
            ("at least", self.at_least, lambda bound: value >= bound),
            ("above", self.above, lambda bound: value > bound),
            ("at most", self.at_most, lambda bound: value <= bound),
            ("below", self.below, lambda bound: value < bound),
        )
        given = [(word, bound, holds) for word, bound, holds in bounds if bound is not None]
        if not math.isfinite(value) or not all(holds(bound) for _, bound, holds in given):
            wanted = " and ".join(f"{word} {bound:g}" for word, bound, _ in given) or "finite"
            raise ValueError(f"{name} is {value!r}; it must be {wanted}.")


class RuleOptimizer(torch.optim.Optimizer):
    """An optimizer that a rule makes. `mpengine.prepare` steps it in the fused pass; by itself it steps FP32 weights.

    By itself it is the reference, tensor after tensor, as torch's for-loop optimizers are.

    Attributes:
        family: Its rules.
        hyperparameters: What each param group may hold.

    Args:
        params: As of any torch optimizer: FP32 ones, unless the optimizer is prepared.
        defaults: The hyperparameters of groups that have none of their own.

    Raises:
        TypeError: A hyperparameter is of another type.
        ValueError: It is out of its bounds.
    """

    family: ClassVar[Family]
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]]

    def __init__(self, params: Iterable[Any], defaults: Mapping[str, Any]) -> None:
        for name, value in defaults.items():
            self.hyperparameters[name].check(name, value)
        super().__init__(params, dict(defaults))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, once its hyperparameters are checked."""
        for name, value in param_group.items():
            if name in self.hyperparameters:
                self.hyperparameters[name].check(f"{name} of group {len(self.param_groups)}", value)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and its gradients first.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: A parameter is not FP32, or a gradient not dense; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, param in stepped:
            if param.dtype != torch.float32 or param.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} by itself steps FP32 parameters with dense gradients; one of shape "
                    f"{tuple(param.shape)} is {param.dtype}, its gradient {param.grad.layout}. Give a fp16 model's "
                    "optimizer to mpengine.prepare(model, optimizer, scaler)."
                )
        clip = self._clip([param.grad for _, param in stepped])
        for group, param in stepped:
            self._step_one(group, param, param.grad.float() * clip)
        return loss

    def _clip(self, grads: list[Tensor]) -> float:
        """The factor on every gradient, where the optimizer clips by itself."""
        limit = self.defaults.get("max_grad_norm")
        if not limit or not grads:
            return 1.0
        norm = torch.nn.utils.get_total_norm(grads)
        return float((limit / (norm + 1e-6)).clamp(max=1.0))

    def _step_one(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        rule, state = self.family.variant(group), self.state[param]
        initial = self.family.initial(group)
        begun = all(name in state for name in rule.slots)
        if self.family.counts_steps:
            state.setdefault("step", torch.zeros(()))
        for name in rule.slots:
            if name not in state:
                state[name] = torch.full_like(param, initial.get(name, 0.0))
        for name in rule.cells:
            if name not in state:
                state[name] = torch.full((), initial.get(name, 0.0), device=param.device)
        if self.family.counts_steps:
            state["step"] += 1
        step = int(state.get("step", 2 if begun else 1))
        slots = tuple(state[name] for name in rule.slots)
        c = _rounded(self.family.scalars(self._row(group), np.array([step])))
        if rule.settle is not None:
            measured = () if rule.measure is None else rule.measure(param, grad, slots, c)
            norms = [np.sqrt(np.array([float((x * x).sum(dtype=torch.float64))])) for x in measured]
            cells = [np.array([float(state[name])]) for name in rule.cells]
            settled, new_cells = rule.settle([np.array([x]) for x in c], norms, cells)
            c = _rounded(settled)
            for name, (value,) in zip(rule.cells, new_cells, strict=True):
                state[name].fill_(float(value))
        value, new_slots = rule.update(param.detach(), grad, slots, c)
        param.copy_(value)
        for slot, new in zip(slots, new_slots, strict=True):
            slot.copy_(new)

    def _row(self, group: Mapping[str, Any]) -> np.ndarray:
        row = np.zeros((layout.HYPER, 1))
        values = [float(value) for value in self.family.hyperparameters(group)]
        row[: len(values), 0] = values
        return row


def _rounded(columns: Columns) -> list[float]:
    return [float(np.float32(np.ravel(column)[0])) for column in columns]


def given(h: np.ndarray, step: np.ndarray) -> Columns:
    """The hyperparameters as they are: the scalars of a rule that declares none."""
    return list(h)


def declare(
    name: str,
    update: Update,
    *,
    hyperparameters: Mapping[str, Hyperparameter],
    slots: tuple[str, ...] = (),
    scalars: Scalars = given,
    measure: Measure | None = None,
    norms: int = 0,
    settle: Settle | None = None,
    cells: tuple[str, ...] = (),
    initial: Mapping[str, float] | None = None,
    kernels: Kernels | None = None,
) -> type[RuleOptimizer]:
    """Makes an optimizer class of one rule: masters, scaling, skipping, clipping, saving and schedules come with it.

    See `Rule` for the functions, and docs/write-a-rule.md for a rule from its paper. `mpengine.testing.check_rule`
    tests the class.

    Args:
        name: Of the class; give it the name of the variable that holds it, so that instances can be pickled.
        update: `(p, g, slots, c) -> (p, slots)`.
        hyperparameters: Of every param group, in the order in which `scalars` gets them, tuples spread out; "lr" is
            among them. At most `layout.HYPER` numbers.
        slots: Names of the rule's state tensors.
        scalars: `(h, step) -> c`. Left out, `c` are the hyperparameters.
        measure: `(p, g, slots, c) -> (x, ...)`, for norms of each tensor.
        norms: How many.
        settle: `(c, norms, cells) -> (c, cells)`.
        cells: Names of the rule's numbers for each tensor.
        initial: What slots and cells hold before the first step, where it is not 0.
        kernels: The functions' Triton twins. Without them the optimizer runs on a CPU, and by itself anywhere.

    Returns:
        A subclass of `RuleOptimizer`, constructed as `Class(params, lr=..., ...)`.

    Raises:
        ValueError: Too many numbers or tensors, no lr, or functions that do not belong together.
    """
    width = sum(len(one.default) if isinstance(one.default, tuple) else 1 for one in hyperparameters.values())
    if "lr" not in hyperparameters or width > layout.HYPER:
        raise ValueError(
            f"rule '{name}' declares {width} hyperparameters, {sorted(hyperparameters)}; lr must be one of them, and "
            f"there is room for {layout.HYPER}."
        )
    unknown = sorted(set(initial or {}) - {*slots, *cells})
    if unknown:
        raise ValueError(f"rule '{name}' has initial values of {unknown}, which are no slots or cells of it.")
    rule = Rule(f"{name} (declared)", update, tuple(slots), measure, norms, settle, tuple(cells), kernels)
    values = dict(initial or {})
    family = Family(
        rule.name,
        lambda group: _flat(group[key] for key in hyperparameters),
        lambda group: rule,
        scalars,
        slots=rule.slots + rule.cells,
        initial=lambda group: values,
        kernels=kernels,
    )
    module = sys._getframe(1).f_globals.get("__name__", __name__)
    body = {
        "__module__": module,
        "__qualname__": name,
        "__doc__": update.__doc__,
        "__init__": _constructor(hyperparameters),
    }
    return type(name, (RuleOptimizer,), {**body, "family": family, "hyperparameters": dict(hyperparameters)})


def _flat(values: Iterable[Any]) -> tuple[Any, ...]:
    spread: list[Any] = []
    for value in values:
        spread += value if isinstance(value, (tuple, list)) else [float(value) if isinstance(value, bool) else value]
    return tuple(spread)


def _constructor(hyperparameters: Mapping[str, Hyperparameter]) -> Callable[..., None]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    wanted = sorted(hyperparameters, key=lambda key: hyperparameters[key].default is not _REQUIRED)
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
