"""A rule's optimizer by itself and prepared, on equal gradients: stepping, skipping, clipping, saving, schedules."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mpengine.precision
from mpengine.grad_scaler import GradScaler
from mpengine.optimizer import MixedPrecisionOptimizer
from mpengine.rules import Rule, RuleOptimizer

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]
_CPU = torch.device("cpu")
_SHAPES = ((), (0,), (5,), (19, 7), (2, 3, 4, 5))  # the last is channels_last
_CLIP = 0.25
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Alone:
    """The optimizer by itself, on FP32 weights."""

    def __init__(self, make: Make, values: list[Tensor] | None = None, device: torch.device = _CPU) -> None:
        self.params = [torch.nn.Parameter(value.to(device, copy=True)) for value in values or _values()]
        self.optimizer = checked(make(self.params))

    def step(self, grads: list[Tensor]) -> None:
        """Steps on true gradients, FP32."""
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.to(param.device, copy=True)
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Weights and state, by name."""
        return _named(self.optimizer, self.params, self.params)


class Prepared:
    """The optimizer prepared, on fp16 weights but for one in a normalisation layer, with a scaler."""

    def __init__(self, make: Make, device: torch.device, **options: Any) -> None:
        *values, scale = _values()
        self.model = torch.nn.ParameterList([torch.nn.Parameter(value) for value in values])
        self.model.norm = torch.nn.RMSNorm(len(scale))
        self.model.norm.weight = torch.nn.Parameter(scale)
        self.model.to(device)
        self.params = [*self.model.parameters()]
        self.scaler = GradScaler(device.type, init_scale=1024.0)
        inner = checked(make(self.params))
        self.optimizer = mpengine.precision.prepare(self.model, inner, self.scaler, **options)

    def step(self, grads: list[Tensor]) -> None:
        """Steps on gradients that backward passes with a scaled loss."""
        total = torch.zeros((), device=self.params[0].device)
        for param, grad in zip(self.params, grads, strict=True):
            total = total + (param.float() * grad.to(param.device)).sum()
        self.scaler.scale(total).backward()
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Masters and state, by name."""
        return _named(self.optimizer, self.params, list(self.optimizer.master_params()))

    def saved(self) -> io.BytesIO:
        """All three states, as a file."""
        file = io.BytesIO()
        parts = self.model, self.optimizer, self.scaler
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        """Loads what `saved` returned."""
        parts: tuple[Any, ...] = self.model, self.optimizer, self.scaler
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)


def checked(optimizer: Any) -> RuleOptimizer:
    """Raises TypeError where it is no optimizer of a rule."""
    if not isinstance(optimizer, RuleOptimizer):
        raise TypeError(
            f"make returned a {type(optimizer).__name__}; check_rule checks the optimizers that rules make: those of "
            "mpengine.rules.declare, and of mpengine.optim."
        )
    return optimizer


def flipped(make: Make) -> Make:
    """The same optimizer with every update in the other direction: what a test must notice."""

    def make_flipped(params: Iterable[Any]) -> torch.optim.Optimizer:
        optimizer = checked(make(params))
        family = optimizer.family
        changed = replace(family, variant=lambda group: flip(family.variant(group)))
        optimizer.__class__ = type(type(optimizer).__name__, (type(optimizer),), {"family": changed})
        return optimizer

    return make_flipped


def flip(rule: Rule) -> Rule:
    """The rule with its update in the other direction, under a name of its own: the built-in ones are found by it."""

    def update(p: Tensor, g: Tensor, slots: tuple[Tensor, ...], c: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        stepped, new = rule.update(p, g, slots, c)
        return p - (stepped - p), new

    return replace(rule, name=f"{rule.name} (flipped)", update=update)


def check_moves(make: Make) -> None:
    """Weights move, and not in the same way whatever the gradients are."""
    one, other = Alone(make), Alone(make)
    for k in range(3):
        one.step(grads_of(k))
        other.step(grads_of(k + 100))
    start = torch.cat([value.flatten() for value in _values()])
    ends = [torch.cat([param.detach().flatten() for param in world.params]) for world in (one, other)]
    moved, differ = int((ends[0] != start).sum()), int((ends[0] != ends[1]).sum())
    if 2 * moved < len(start):
        raise AssertionError(
            f"{moved} of {len(start)} weights moved in 3 steps: the update does nothing to the others, or make's lr is "
            "too small for FP32 weights of about 1."
        )
    if 4 * differ < len(start):
        raise AssertionError(
            f"{differ} of {len(start)} weights differ after 3 steps on other gradients: the update ignores them."
        )


def check_by_itself(make: Make, device: torch.device) -> None:
    """By itself the optimizer is the same on `device` as on a CPU."""
    here, there = Alone(make), Alone(make, device=device)
    for k in range(3):
        here.step(grads_of(k))
        there.step(grads_of(k))
        same(f"step {k}: by itself on a CPU, and on {device}", here.tensors(), there.tensors())


def check_prepared(make: Make, device: torch.device, alone: Make | None = None) -> None:
    """The prepared optimizer is the one by itself, bit for bit; an overflow in between changes nothing."""
    prepared, single = Prepared(make, device), Alone(alone or make)
    for k in range(3):
        if k == 1:
            _check_skip(prepared)
        prepared.step(grads_of(k))
        single.step(grads_of(k))
        same(f"step {k}: the optimizer by itself, and prepared", single.tensors(), prepared.tensors())
    for param, master in zip(prepared.params, prepared.optimizer.master_params(), strict=True):
        same("3 steps", {"the weight": master.detach().to(param.dtype)}, {"the weight": param.detach()})


def _check_skip(prepared: Prepared) -> None:
    before, skipped = _cloned(prepared.tensors()), prepared.optimizer.steps_skipped
    grads = grads_of(50)
    grads[3][2, 2] = float("inf")
    prepared.step(grads)
    if prepared.optimizer.steps_skipped != skipped + 1:
        raise AssertionError("a step with an infinite gradient was not skipped.")
    same("a step that was skipped", before, prepared.tensors())


def check_clipping(make: Make, device: torch.device) -> None:
    """`max_grad_norm`: the step by itself on gradients times the coefficient."""
    prepared, single = Prepared(make, device, max_grad_norm=_CLIP), Alone(make)
    single.optimizer.defaults["max_grad_norm"] = 0.0  # it does not clip by itself, too
    for k in range(2):
        grads = grads_of(k)
        prepared.step(grads)
        true = float(torch.cat([grad.flatten() for grad in grads]).double().norm())
        norm = np.float32(prepared.optimizer.last_grad_norm)
        if not abs(norm - true) <= 1e-6 * true:
            raise AssertionError(f"the norm of the gradient is {norm}, not {true}.")
        coefficient = float(np.float32(_CLIP) / (norm + np.float32(1e-6)))
        single.step([grad * coefficient for grad in grads])
        same(f"step {k}, clipped: by itself, and prepared", single.tensors(), prepared.tensors())


def check_saving(make: Make, device: torch.device) -> None:
    """Saved, loaded and resumed: as if it had never stopped; prepared, and by itself; pickled and copied."""
    through, resumed = Prepared(make, device), Prepared(make, device)
    for k in range(2):
        through.step(grads_of(k))
    resumed.load(through.saved())
    single = Alone(make, [master.detach().cpu() for master in through.optimizer.master_params()])
    single.optimizer.load_state_dict(copy.deepcopy(through.optimizer.torch_state_dict()))
    again = Alone(make, [param.detach() for param in single.params])
    again.optimizer.load_state_dict(copy.deepcopy(single.optimizer.state_dict()))
    copies = [_pickled(single), copy.deepcopy(single)]
    for k in range(2, 4):
        through.step(grads_of(k))
        for what, world in (
            ("resumed", resumed),
            ("handed over to the optimizer by itself", single),
            ("saved and loaded by itself", again),
            ("pickled", copies[0]),
            ("copied", copies[1]),
        ):
            world.step(grads_of(k))
            same(f"step {k}: never stopped, and {what}", through.tensors(), world.tensors())


def _pickled(single: Alone) -> Alone:
    try:
        return pickle.loads(pickle.dumps(single))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise AssertionError(
            f"an instance of {type(single.optimizer).__name__} cannot be pickled ({error}): give declare the name of "
            "the variable, at the top of a module, that holds the class."
        ) from error


def check_schedule(make: Make, device: torch.device) -> None:
    """`schedule` follows the steps taken: the optimizer by itself under torch's scheduler, which sees those alone."""

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    prepared, single = Prepared(make, device), Alone(make)
    prepared.optimizer.schedule(schedule, steps=3)
    scheduler = schedule(single.optimizer)
    for k in range(3):
        if k == 1:
            _check_skip(prepared)
        prepared.step(grads_of(k))
        single.step(grads_of(k))
        scheduler.step()
        same(f"step {k} of a schedule: by itself, and prepared", single.tensors(), prepared.tensors())


def check_groups(make: Make, device: torch.device) -> None:
    """Two param groups of different rates, which are set anew between steps."""

    def two(params: Iterable[Any]) -> torch.optim.Optimizer:
        params = list(params)
        optimizer = make(params[:2])
        optimizer.add_param_group({"params": params[2:], "lr": 0.5 * float(optimizer.param_groups[0]["lr"])})
        return optimizer

    prepared, single = Prepared(two, device), Alone(two)
    for k in range(3):
        for world in (prepared, single):
            world.optimizer.param_groups[1]["lr"] *= 0.75
            world.step(grads_of(k))
        same(f"step {k} of two groups: by itself, and prepared", single.tensors(), prepared.tensors())


def same(what: str, expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> None:
    """Raises AssertionError where a bit differs, with the tensor, the element and both values."""
    if expected.keys() != actual.keys():
        raise AssertionError(f"{what} keep {sorted(expected)} and {sorted(actual)}.")
    for name, there in expected.items():
        here = actual[name].detach().cpu()
        there = there.detach().cpu()
        if here.shape != there.shape or here.dtype != there.dtype:
            raise AssertionError(
                f"{what}: {name} is {here.dtype}{list(here.shape)} for {there.dtype}{list(there.shape)}."
            )
        bits = _BITS[there.element_size()]
        different = (there.contiguous().view(bits) != here.contiguous().view(bits)).flatten().nonzero().flatten()
        if len(different):
            i = int(different[0])
            gap = float((here.double() - there.double()).abs().max())
            raise AssertionError(
                f"{what}: {name} differs in {len(different)} of {here.numel()} elements, by {gap:.3g} at most, first "
                f"at {i}: {here.flatten()[i].item()!r} for {there.flatten()[i].item()!r}."
            )


def _named(
    optimizer: RuleOptimizer | MixedPrecisionOptimizer, params: list[Any], weights: list[Any]
) -> dict[str, Tensor]:
    found = {}
    for i, (param, weight) in enumerate(zip(params, weights, strict=True)):
        found[f"weight {i} of shape {tuple(param.shape)}"] = weight
        for name, value in optimizer.state[param].items():
            key = f"state['{name}'] of weight {i} of shape {tuple(param.shape)}"
            found[key] = value.float() if name == "step" else value
    return found


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _values() -> list[Tensor]:
    """The weights that training begins with, the normalisation layer's last."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in _SHAPES]
    values[-1] = values[-1].contiguous(memory_format=torch.channels_last)
    return [*values, torch.linspace(0.5, 1.5, 6)]


def grads_of(k: int) -> list[Tensor]:
    """Gradients of step k that fp16 holds, scaled or not; some are 0."""
    generator = torch.Generator().manual_seed(1000 + k)
    grads = [torch.randn(value.shape, generator=generator).half().float() for value in _values()]
    return [torch.where(grad.abs() < 0.05, 0.0, grad) for grad in grads]
