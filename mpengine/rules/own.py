"""`RuleOptimizer`: an optimizer that a rule makes, mpengine's own and those that users declare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mpengine.kernels import layout
from mpengine.rules.arithmetic import square_sum
from mpengine.rules.declaration import Columns, Family, Rule
from mpengine.rules.hyperparameters import Hyperparameter


class RuleOptimizer(torch.optim.Optimizer):
    """An optimizer that a rule makes. `mpengine.prepare` steps it in the fused pass; by itself it steps FP32 weights.

    By itself it is the reference, tensor after tensor, as torch's for-loop optimizers are. `step` must stay what it is
    in a subclass that is to run in the fused pass.

    Attributes:
        family: Its rules.
        hyperparameters: What each param group holds.

    Args:
        params: As of any torch optimizer: FP32 ones, unless the optimizer is prepared.
        defaults: The hyperparameters of groups that have none of their own; all of them.

    Raises:
        TypeError: A hyperparameter is of another type, missing, or not one of this optimizer.
        ValueError: It is out of its bounds.
    """

    family: ClassVar[Family]
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]]

    def __init__(self, params: Iterable[Any], defaults: Mapping[str, Any]) -> None:
        if set(defaults) != set(self.hyperparameters):
            raise TypeError(
                f"{type(self).__name__} was given the hyperparameters {sorted(defaults)}; it has "
                f"{sorted(self.hyperparameters)}."
            )
        for name, value in defaults.items():
            self.hyperparameters[name].check(name, value)
        super().__init__(params, dict(defaults))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, once its hyperparameters are checked; those that it lacks are the defaults."""
        if isinstance(param_group, dict):  # what else it may be, torch refuses
            group = {**self.defaults, **param_group}
            self.check_group(group, len(self.param_groups))
            _check_one_norm([*self.param_groups, group])
        super().add_param_group(param_group)

    def check_group(self, group: Mapping[str, Any], index: int) -> None:
        """Raises TypeError or ValueError, by name, where a hyperparameter of a param group is missing or cannot be."""
        where = f" of group {index}"
        for name, hyperparameter in self.hyperparameters.items():
            if name not in group:
                raise ValueError(f"group {index} of this {type(self).__name__} has no {name}; set it there.")
            hyperparameter.check(name, group[name], where)

    def check_groups(self) -> None:
        """Raises where users or schedulers set a hyperparameter in `param_groups` to what it cannot be."""
        for index, group in enumerate(self.param_groups):
            self.check_group(group, index)
        _check_one_norm(self.param_groups)

    def clips_at(self) -> float | None:
        """The norm that the gradient of all parameters is clipped to by the optimizer itself; None: no clipping."""
        return self.param_groups[0].get("max_grad_norm") or None

    def check_schedule(self, columns: Mapping[str, np.ndarray]) -> None:
        """Raises where a scheduled hyperparameter leaves its bounds.

        Args:
            columns: By name [steps, groups], or [steps, groups, n] where it is a tuple of n.
        """
        if "max_grad_norm" in columns:
            raise ValueError("max_grad_norm cannot be scheduled: set optimizer.max_grad_norm between steps instead.")
        for name, column in columns.items():
            if name not in self.hyperparameters:
                continue
            for extreme in (column.min(axis=(0, 1)), column.max(axis=(0, 1))):
                value = tuple(extreme) if extreme.ndim else float(extreme)
                self.hyperparameters[name].check(name, value, " of the schedule")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of pickling, copying and `load_state_dict`: takes the state as a whole, or refuses it."""
        for index, group in enumerate(state["param_groups"]):
            self.check_group(group, index)
            for i, param in enumerate(group["params"]):
                self._check_state(group, _shown(group, index, i), param, state["state"].get(param, {}))
        _check_one_norm(state["param_groups"])
        super().__setstate__(state)

    def _check_state(self, group: Mapping[str, Any], name: str, param: Tensor, own: Mapping[str, Any]) -> None:
        rule = self.family.variant(group)
        shapes = {**dict.fromkeys(rule.slots, param.shape), **dict.fromkeys(rule.cells, torch.Size())}
        for key, shape in shapes.items() if own else ():
            value = own.get(key)
            if not isinstance(value, Tensor) or value.shape != shape:
                what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"the value {value!r:.40}"
                raise ValueError(
                    f"the {key} of {name} has {what} in the state; {type(self).__name__} keeps a tensor of shape "
                    f"{tuple(shape)}. Load a state of the same model and optimizer."
                )
            if value.dtype != torch.float32:
                raise ValueError(
                    f"the {key} of {name} would be loaded as {value.dtype}, the parameter's type, and lose bits: load "
                    "the state into what mpengine.prepare returns."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: Recomputes the loss and its gradients first.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: A hyperparameter was set to what it cannot be; nothing is changed, as below.
            ValueError: Likewise.
            RuntimeError: A parameter is not FP32, or a gradient not dense.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_groups()
        stepped = []
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    _check_steppable(type(self).__name__, _shown(group, index, i), param)
                    stepped.append((group, param))
        with np.errstate(all="ignore"):
            clip = self._clip([param.grad for _, param in stepped])
            for group, param in stepped:
                self._step_one(group, param, param.grad.float() * clip)
        return loss

    def _clip(self, grads: list[Tensor]) -> float:
        """The factor on every gradient, as `decide` has it, where the optimizer clips by itself."""
        limit = self.clips_at()
        if limit is None or not grads:
            return 1.0
        norm = np.float32(math.sqrt(sum(float(g.float().square().sum(dtype=torch.float64)) for g in grads)))
        quotient = np.float32(limit) / (norm + np.float32(1e-6))
        return 1.0 if quotient > 1.0 else float(quotient)

    def _step_one(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        rule, p = self.family.variant(group), param.detach()
        step = self._counted(rule, self.state[param])
        state = self._state_of(group, param)
        slots = tuple(state[name] for name in rule.slots)
        c = _rounded(self.family.scalars(self._row(group), np.array([step])))
        if rule.settle is not None:
            measured = () if rule.measure is None else rule.measure(p, grad, slots, c)
            norms = [np.sqrt(np.array([square_sum(x)])) for x in measured]
            cells = [np.array([float(state[name])]) for name in rule.cells]
            settled, new_cells = rule.settle([np.array([x]) for x in c], norms, cells)
            c[: len(settled)] = _rounded(settled)
            for name, cell in zip(rule.cells, _rounded(new_cells), strict=True):
                state[name].fill_(cell)
        stepped, new_slots = rule.update(p, grad, slots, c)
        param.copy_(stepped)
        for slot, new in zip(slots, new_slots, strict=True):
            slot.copy_(new)

    def _state_of(self, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
        """The parameter's state, made where there is none yet."""
        rule, state, initial = self.family.variant(group), self.state[param], self.family.initial(group)
        for name in rule.slots:
            if state.get(name) is None:
                state[name] = torch.full_like(param, initial.get(name, 0.0))
        for name in rule.cells:
            if name not in state:
                state[name] = torch.full((), initial.get(name, 0.0), device=param.device)
        return state

    def _counted(self, rule: Rule, state: dict[str, Any]) -> int:
        """The number of this step. Of a family that counts none 1 at the first, when state is missing, and 2 after."""
        if not self.family.counts_steps:
            return 1 if any(state.get(name) is None for name in rule.slots) else 2
        state.setdefault("step", torch.zeros(()))
        state["step"] += 1
        return int(state["step"])

    def _row(self, group: Mapping[str, Any]) -> np.ndarray:
        row = np.zeros((layout.HYPER, 1))
        values = [float(value) for value in self.family.hyperparameters(group)]
        row[: len(values), 0] = values
        return row


def _check_one_norm(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where groups differ in the norm that all gradients together are clipped to."""
    norms = [group.get("max_grad_norm") for group in groups]
    if norms[1:] != norms[:-1]:
        raise ValueError(
            f"max_grad_norm is {norms} in the groups of this optimizer; the gradient of all parameters is clipped to "
            "one norm: give every group the same."
        )


def _shown(group: Mapping[str, Any], index: int, i: int) -> str:
    """A parameter in a message: by its name, where the optimizer was given named ones."""
    if "param_names" in group:
        return f"parameter '{group['param_names'][i]}'"
    return f"group {index}, parameter {i} of shape {tuple(group['params'][i].shape)}"


def _check_steppable(kind: str, name: str, param: Tensor) -> None:
    if param.dtype != torch.float32:
        raise RuntimeError(
            f"{kind} by itself steps FP32 parameters, and {name} is {param.dtype}: let mpengine.prepare(model, "
            "optimizer, scaler) cast a FP32 model and keep its masters."
        )
    if param.grad is not None and (param.grad.layout is not torch.strided or not param.grad.is_floating_point()):
        raise RuntimeError(
            f"the gradient of {name} is {param.grad.layout} and {param.grad.dtype}; {kind} steps dense real ones "
            "(nn.Embedding(sparse=False))."
        )


def _rounded(columns: Columns) -> list[float]:
    return [float(np.float32(np.ravel(column)[0])) for column in columns]
