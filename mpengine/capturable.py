"""Whether an iteration can be captured: what is refused at once, and what a watched eager iteration shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpengine import capture
from mpengine.gradients import parameters
from mpengine.optimizer import MixedPrecisionOptimizer
from mpengine.rules import OF_TORCH


def checked(optimizers: Any) -> list[MixedPrecisionOptimizer]:
    """One or several optimizers as a list; raises TypeError or ValueError for one that cannot step in a graph."""
    single = isinstance(optimizers, (torch.optim.Optimizer, torch.amp.GradScaler))
    found = [getattr(one, "_optimizer", one) for one in ([optimizers] if single else optimizers)]  # not Lightning's
    if not found:
        raise ValueError("GraphedIteration needs the optimizers that the iteration steps; none was given.")
    for optimizer in found:
        kind = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        if isinstance(optimizer, torch.amp.GradScaler):
            raise TypeError(
                f"{kind} is a scaler: give the optimizers, which know theirs. (torch.amp.GradScaler cannot drive a "
                "captured iteration: give a mpengine.GradScaler to prepare.)"
            )
        if not isinstance(optimizer, MixedPrecisionOptimizer):
            raise TypeError(
                f"{kind} is no mpengine.MixedPrecisionOptimizer: a plain optimizer waits for the device, or keeps its "
                "lr and its steps on the host, where a graph does not follow. Wrap it: mpengine.prepare(model, "
                "optimizer, scaler), or mpengine.MixedPrecisionOptimizer(optimizer, scaler) to keep FP32 weights."
            )
        if optimizer._family is None:
            inner = type(optimizer._inner).__name__
            known = ", ".join(sorted(kind.__name__ for kind in OF_TORCH))
            raise ValueError(
                f"{inner} runs its own step(), for which the host waits to know whether gradients overflowed. Only "
                f"torch's {known} and the optimizers of mpengine.optim step on the device: use one of them, or run "
                "the iteration without a graph."
            )
    return found


def only_device(optimizers: list[MixedPrecisionOptimizer]) -> torch.device:
    """The device of all parameters; raises ValueError where there are several."""
    devices = list(dict.fromkeys(p.device for optimizer in optimizers for p in parameters(optimizer)))
    if len(devices) > 1:
        raise ValueError(f"the parameters lie on {', '.join(map(str, devices))}; one CUDA graph needs one device.")
    return devices[0]


def refuse_autocast(device: torch.device) -> None:
    """Raises RuntimeError under an autocast that was entered outside of the iteration."""
    if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
        raise RuntimeError(
            "a GraphedIteration was called under autocast, whose cache would keep weights of one iteration for the "
            "next: enter torch.autocast within the function, or with cache_enabled=False."
        )


class Watch:
    """Watches an eager iteration for what a capture would not survive, or would not repeat."""

    def __init__(self, optimizers: list[MixedPrecisionOptimizer], device: torch.device) -> None:
        self._optimizers, self._device = optimizers, device
        self._read: dict[Tensor, str] = {}  # parameters whose step was given a gradient from before, and their names
        self._driven = False
        self._strangers: dict[str, None] = {}  # kinds of optimizers that stepped and were not given
        self.unread: set[Tensor] = set()

    def __enter__(self) -> Watch:
        params = [p for optimizer in self._optimizers for p in parameters(optimizer)]
        self._old = {p: (p.grad, p.grad._version) for p in params if p.grad is not None}
        self._settings = _settings(self._optimizers)
        self._closing = contextlib.ExitStack()
        for optimizer in self._optimizers:
            self._closing.callback(optimizer.register_step_pre_hook(self._stepping).remove)
        self._closing.callback(register_optimizer_step_pre_hook(self._meeting).remove)
        self._host_reads = self._closing.enter_context(capture.host_reads(self._device))
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()
        for param, (grad, version) in self._old.items():
            if grad._version != version:  # a backward pass added to it; zeroing in place looks the same
                self._read.setdefault(param, _name(self._optimizers, param))
            elif param not in self._read:
                self.unread.add(param)
        self._old.clear()

    def _stepping(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._driven |= hasattr(optimizer, "found_inf")
        for param, labelled in zip(parameters(optimizer), optimizer._gather(), strict=True):
            if param in self._old and any(grad is self._old[param][0] for _, grad in labelled):
                self._read[param] = _name(self._optimizers, param)

    def _meeting(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not any(optimizer in (own, own._inner) for own in self._optimizers):
            self._strangers[type(getattr(optimizer, "_inner", optimizer)).__name__] = None

    def problem(self, host_reads: bool) -> str | None:
        """Why this iteration cannot be captured; None if nothing is known."""
        if self._driven:
            return (
                "torch.amp.GradScaler drives the steps; it keeps what it knows on the host. Use mpengine.GradScaler, "
                "and give it to prepare."
            )
        if self._strangers:
            return (
                f"it steps an optimizer that GraphedIteration was not given ({', '.join(self._strangers)}), whose lr, "
                "state and weights nobody would follow. Give it all that step: GraphedIteration(iteration, [a, b])."
            )
        if host_reads and self._host_reads:
            return (
                f"it waits for the device at {', '.join(dict.fromkeys(self._host_reads))}. Return the tensor and "
                "read it after the call (.item(), .cpu(), print and branches on tensors all wait)."
            )
        if self._read:
            names = list(self._read.values())
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return (
                f"gradients from before the call reach its step ({', '.join(names[:3])}{more}), and a graph has its "
                "own. Call optimizer.zero_grad() in it, first or last (set_to_none=False keeps them), and "
                "accumulate micro-batches within it."
            )
        changed = [f"{key} of group {g}" for g, key in _changed(self._settings, _settings(self._optimizers))]
        if changed:
            return (
                f"it sets {', '.join(changed)}, which a replay would not repeat. Set it, or step the LR scheduler, "
                "after the call; or let optimizer.schedule(...) lay the schedule out on the device."
            )
        return None


def _settings(optimizers: list[MixedPrecisionOptimizer]) -> list[dict[str, Any]]:
    """What users may set, group by group."""
    return [
        {"max_grad_norm": optimizer.max_grad_norm, **{k: _mark(v) for k, v in group.items() if k != "params"}}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]


def _changed(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    for g, (old, new) in enumerate(zip(before, after, strict=False)):
        yield from ((g, key) for key in new if key not in old or old[key] != new[key])


def _mark(value: Any) -> Any:
    """Changes when the value may have; a tensor, which the device may write, counts as the same."""
    if isinstance(value, Tensor):
        return id(value)
    return tuple(map(_mark, value)) if isinstance(value, (list, tuple)) else value


def _name(optimizers: list[MixedPrecisionOptimizer], param: Tensor) -> str:
    names = (optimizer._name_of(param) for optimizer in optimizers)
    return next((name for name in names if name is not None), f"a parameter of shape {tuple(param.shape)}")
