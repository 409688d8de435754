"""`GradScaler`: `torch.amp.GradScaler`'s API with a dynamic scale for every loss."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from mpengine import checkpoint, plain
from mpengine.gradients import Label, Ledger
from mpengine.kernels import layout
from mpengine.labels import Pending
from mpengine.loss_scales import LossScales
from mpengine.report import LossReport, Report, loss_report
from mpengine.scaling import FLOAT32_MAX, SMALLEST_SCALE, ScalePolicy, ScaleState
from mpengine.sources import Ballot
from mpengine.watchdog import Watchdog


class _OptimizerState:
    """What the scaler knows about one optimizer between two updates."""

    def __init__(self, optimizer: torch.optim.Optimizer, row: int) -> None:
        self.optimizer = weakref.ref(optimizer)
        self.row = row  # of the votes
        self.reset()

    def reset(self) -> None:
        self.stage = OptState.READY
        self.labels: dict[int, list[Label]] = {}  # consumed, by loss_id
        self.found_inf: dict[torch.device, Tensor] = {}  # by unscale_
        self.overflowed: Tensor | None = None  # bool[L], by unscale_

    def recorded(self) -> bool:
        """Whether gradients have been looked at."""
        return self.stage is OptState.STEPPED or bool(self.labels) or bool(self.found_inf)


class _ScaleLoss(torch.autograd.Function):
    """loss -> float32 loss * scale. Its backward is the first node of the pass: there the ledger is told."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, ledger: Ledger, label: Label) -> Tensor:
        ctx.ledger, ctx.label, ctx.dtype = ledger, label, loss.dtype
        return _times_scale(loss, label)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.ledger.begin(ctx.label)
        return _times_scale(grad, ctx.label).to(ctx.dtype), None, None


def _times_scale(value: Tensor, label: Label) -> Tensor:
    """In FP32 at least: a shape-(1,) fp16 loss of 2 times 65536 would be inf."""
    assert label.scale is not None  # a label of unscaled gradients never comes from a loss
    wide = value if value.dtype in (torch.float32, torch.float64) else value.float()
    return wide * label.scale.to(value.device)


class GradScaler(torch.amp.GradScaler):
    """Scales losses so that their fp16 gradients do not underflow, one dynamic scale for each loss.

    A drop-in for `torch.amp.GradScaler`: the same arguments, methods, stages, errors and `state_dict` keys; with
    one loss the same sequence of scales, bit for bit. With `mpengine.MixedPrecisionOptimizer` no method waits for
    the device. The rule of each scale is `scaling.next_state`.

    Args:
        device: Accepted as `torch.amp.GradScaler`'s first argument. The state is made where the first scaled loss
            lives, and the scaler never disables itself.
        init_scale: Each loss's first scale, rounded to float32.
        growth_factor: What a scale is multiplied by after `growth_interval` clean updates; > 1.
        backoff_factor: What it is multiplied by after an overflow; in (0, 1).
        growth_interval: Clean updates in a row before a scale grows.
        enabled: False makes every method a pass-through, as in torch.
        num_losses: Losses with a scale of their own, numbered from 0.
        min_scale: No scale falls below this.
        max_scale: No scale grows beyond this; None: float32's largest number. With `min_scale == max_scale ==
            init_scale` the scale is static; an overflow still skips the step.
        hysteresis: Overflows in a row before a scale backs off. 1 is torch's rule.
        max_consecutive_skips: This many overflows in a row of one loss raise `LossScaleCollapse`; None: never.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> scaler = GradScaler(num_losses=2)
        >>> optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters()), scaler)
        >>> scaler.scale(policy_loss, loss_id=0).backward()
        >>> scaler.scale(value_loss, loss_id=1).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """

    def __init__(
        self,
        device: str | torch.device = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        num_losses: int = 1,
        min_scale: float = SMALLEST_SCALE,
        max_scale: float | None = None,
        hysteresis: int = 1,
        max_consecutive_skips: int | None = 50,
    ) -> None:
        # Not torch's constructor: that one turns itself off, with a warning, where there is no CUDA.
        if not _is_int(num_losses) or num_losses < 1:
            raise ValueError(f"num_losses is {num_losses!r}; it must be an int of at least 1.")
        if max_consecutive_skips is not None and (not _is_int(max_consecutive_skips) or max_consecutive_skips < 1):
            raise ValueError(
                f"max_consecutive_skips is {max_consecutive_skips!r}; give an int of at least 1, or None for never."
            )
        ceiling = FLOAT32_MAX if max_scale is None else max_scale
        self._policy = ScalePolicy(growth_factor, backoff_factor, growth_interval, min_scale, ceiling, hysteresis)
        self._check_scale(init_scale, "init_scale")
        self._device = torch.device(device).type
        self._enabled = enabled
        self.num_losses = num_losses
        start = ScaleState(float(torch.tensor(init_scale, dtype=torch.float32)), hysteresis_left=hysteresis)
        self._start = [start] * num_losses  # the state until the first scaled loss says where it lives
        self._watchdog = Watchdog(max_consecutive_skips)
        self._make_transient()

    def _make_transient(self) -> None:
        """What is neither saved nor copied."""
        self._device_state: LossScales | None = None
        self._states: dict[int, _OptimizerState] = {}
        self._ledger = Ledger(self.num_losses > 1, self._name_of)

    # The device state.

    def __getattr__(self, name: str) -> Any:
        """The private attributes of torch's class that other libraries read: None before the first `scale()`.

        `_scale` is float32 and `_growth_tracker` int32, 0-dim with one loss, else of shape (num_losses,).
        """
        if name not in ("_scale", "_growth_tracker"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        state = self.__dict__.get("_device_state")
        if state is None:
            return None
        values = state.scales if name == "_scale" else state.counters[:, layout.GROWTH_TRACKER]
        return values[0] if self.num_losses == 1 else values

    def _lazy_init_scale_growth_tracker(self, dev: torch.device) -> None:
        self._device_state = LossScales(self._start, self._policy, dev, rows=max(8, len(self._states)))

    def _initialized(self, caller: str) -> LossScales:
        if self._device_state is None:
            raise AssertionError(
                f"Attempted {caller} but _scale is None. This may indicate your script did not use "
                "scaler.scale(loss or outputs) earlier in the iteration."
            )
        return self._device_state

    def _check_loss_id(self, loss_id: int) -> int:
        if not _is_int(loss_id) or not 0 <= loss_id < self.num_losses:
            raise ValueError(
                f"loss_id is {loss_id!r}; this scaler has num_losses={self.num_losses}, so it must be an int in "
                f"[0, {self.num_losses - 1}]. Construct GradScaler(num_losses=...) with as many as you need."
            )
        return loss_id

    def _check_scale(self, value: float, name: str) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} is {value!r}; it must be a number (or for update() a tensor of one element).")
        if not (math.isfinite(value) and self._policy.min_scale <= value <= self._policy.max_scale):
            raise ValueError(
                f"{name} is {value}; a scale must be finite and lie between min_scale ({self._policy.min_scale:g}) "
                f"and max_scale ({self._policy.max_scale:g})."
            )

    # Scaling.

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Follows the gradients of this optimizer's parameters through every backward pass.

        `mpengine.prepare` does it. A plain torch optimizer needs it when there are several losses, before the
        first backward pass; with one loss it happens at the first `unscale_` or `step`.
        """
        self._ledger.watch(_bare(optimizer))

    def scale(self, outputs: Tensor | Iterable[Tensor], loss_id: int = 0) -> Any:
        """The loss (or an iterable of losses) times the scale of `loss_id`, in FP32.

        Args:
            outputs: Floating-point tensors that require grad, of any shape.
            loss_id: The loss, in [0, num_losses).

        Returns:
            float32 (float64 for a float64 loss) in the structure of `outputs`; `outputs` itself when disabled.

        Raises:
            ValueError: `loss_id` is out of range, or `outputs` is no tensor.
            RuntimeError: A loss requires no grad.
        """
        if not self._enabled:
            return outputs
        self._check_loss_id(loss_id)
        if isinstance(outputs, Tensor):
            return self._scale_one(outputs, loss_id)
        if isinstance(outputs, (list, tuple)):
            scaled = (self.scale(value, loss_id) for value in outputs)
            return type(outputs)(*scaled) if hasattr(outputs, "_fields") else type(outputs)(scaled)
        if isinstance(outputs, Iterable):
            return map(lambda value: self.scale(value, loss_id), outputs)
        raise ValueError(f"outputs must be a Tensor or an iterable of Tensors, not {type(outputs).__name__}")

    def _scale_one(self, loss: Tensor, loss_id: int) -> Tensor:
        if loss.is_complex():
            raise ValueError(f"loss {loss_id} is {loss.dtype}; scale a real loss, for example loss.abs().")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RuntimeError(
                f"loss {loss_id} (shape {tuple(loss.shape)}) requires no grad, so there is nothing to scale it for: "
                "it was computed under no_grad, detached, or from frozen parameters alone."
            )
        if self.num_losses > 1 and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"loss {loss_id} was scaled inside a backward pass (in a hook or a backward()); with several losses "
                "its gradients could not be told from those of the outer loss. Scale and run it after that pass."
            )
        if self._device_state is None:
            self._lazy_init_scale_growth_tracker(loss.device)
        label = self._initialized("scale").labels[loss_id]
        return _ScaleLoss.apply(loss, self._ledger, label)

    # Unscaling and stepping.

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Turns the pending gradients of all losses into one unscaled gradient, for clipping or inspection.

        For a plain torch optimizer the FP32 `.grad` becomes the unscaled sum. For a `MixedPrecisionOptimizer` the
        unscaled FP32 sum appears as `.grad` of `optimizer.master_params()`, and the same tensor as `.grad` of the
        fp16 parameter, so that `clip_grad_norm_` works on either.

        Raises:
            RuntimeError: It was called already since the last `update()`, or after `step()`.
            ValueError: A plain torch optimizer holds fp16 gradients.
        """
        if not self._enabled:
            return
        optimizer = _bare(optimizer)
        self._initialized("unscale_")
        attach = getattr(optimizer, "_attach", None)
        if attach is not None:
            attach(self)
        state = self._state(optimizer)
        if state.stage is OptState.UNSCALED:
            raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
        if state.stage is OptState.STEPPED:
            raise RuntimeError("unscale_() is being called after step().")
        self._unscale(optimizer, state, self._pending(optimizer))

    def _unscale(self, optimizer: torch.optim.Optimizer, state: _OptimizerState, pending: Pending) -> None:
        row = self._vote_row(optimizer)
        unscale = getattr(optimizer, "_unscale", None)
        if unscale is not None:
            unscale()
            found_inf = {row.device: (row[:, 0] >= layout.OVERFLOW).any().float()} if pending.active else {}
        else:
            found_inf = plain.unscale(optimizer, pending, row, self._ballots(state, pending))
        self._settle_votes(state, pending)
        for device, found in found_inf.items():
            state.found_inf[device] = found + state.found_inf.get(device, torch.zeros_like(found))
        state.overflowed = row[:, 0] >= layout.OVERFLOW
        self._ledger.unscaled(optimizer, pending)
        self._consume(state, pending)
        state.stage = OptState.UNSCALED

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Steps the optimizer, or skips the step where a gradient overflowed.

        A `MixedPrecisionOptimizer` decides on the device. A plain torch optimizer is stepped as
        `torch.amp.GradScaler` does it: without a sync where it is fused, otherwise after one.

        Returns:
            What `optimizer.step(*args, **kwargs)` returned; None where the host skipped it.

        Raises:
            RuntimeError: A closure was passed, it has stepped since the last `update()`, or with several losses a
                plain optimizer was not watched.
            AssertionError: No `scale()` came before, or no parameter has a gradient.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        optimizer = _bare(optimizer)
        if "closure" in kwargs or (args and callable(args[0])):
            raise RuntimeError(
                "Closure use is not currently supported if GradScaler is enabled: call closure() yourself, scale its "
                "loss, backward(), then scaler.step(optimizer)."
            )
        self._initialized("step")
        attach = getattr(optimizer, "_attach", None)
        if attach is not None:  # a MixedPrecisionOptimizer; its step() does the rest with this scaler
            attach(self)
            return optimizer.step(*args, **kwargs)
        state = self._begin_step(optimizer)
        pending = self._pending(optimizer)
        if plain.asks_for_scaler(optimizer):  # and unscales and skips with its help
            result = plain.step_with_scaler(optimizer, self, args, kwargs)
        else:
            if state.stage is OptState.READY or _any_scaled(pending):  # backward passes may follow unscale_
                self._unscale(optimizer, state, pending)
            if not state.found_inf:
                raise AssertionError("No inf checks were recorded for this optimizer.")
            result = plain.step(optimizer, state.found_inf, args, kwargs)
        state.stage = OptState.STEPPED
        self._ledger.renewed(optimizer)
        return result

    def _begin_step(self, optimizer: torch.optim.Optimizer) -> _OptimizerState:
        self._initialized("step")
        state = self._state(optimizer)
        if state.stage is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        return state

    def _end_step(self, optimizer: torch.optim.Optimizer, pending: Pending) -> None:
        state = self._state(optimizer)
        self._settle_votes(state, pending)
        self._consume(state, pending)
        state.stage = OptState.STEPPED
        self._ledger.renewed(optimizer)

    def _state(self, optimizer: torch.optim.Optimizer) -> _OptimizerState:
        state = self._states.get(id(optimizer))
        if state is None or state.optimizer() is not optimizer:
            if not self._ledger.watches(optimizer):
                if self.num_losses > 1:
                    raise RuntimeError(
                        f"this scaler has {self.num_losses} losses and does not watch this "
                        f"{type(optimizer).__name__}, so it cannot tell their gradients apart. Call "
                        "scaler.watch(optimizer) before the first backward pass, or use "
                        "mpengine.prepare(model, optimizer, scaler)."
                    )
                self._ledger.watch(optimizer)
            alive = {
                key if old.optimizer() is not None else -1 - old.row: old  # a dead one's votes are yet to be counted
                for key, old in self._states.items()
                if old.optimizer() is not None or old.labels
            }
            taken = {old.row for old in alive.values()}
            row = next(i for i in range(len(taken) + 1) if i not in taken)
            state = alive[id(optimizer)] = _OptimizerState(optimizer, row)
            self._states = alive
        return state

    def _pending(self, optimizer: torch.optim.Optimizer) -> Pending:
        """The pending (label, gradient) pairs of each parameter, in order of loss_id."""
        self._state(optimizer)  # which watches it, with one loss
        return self._ledger.sources(optimizer, self._initialized("step").labels[0])

    def _consume(self, state: _OptimizerState, pending: Pending) -> None:
        for label in pending.labels:
            if label.scale is not None or not label.counted:
                state.labels.setdefault(label.loss_id, []).append(label)

    def _ballots(self, state: _OptimizerState, pending: Pending) -> list[Ballot]:
        """How these gradients, and those that `unscale_` took before, vote on each loss."""
        labels: list[list[Label]] = [[*state.labels.get(k, ())] for k in range(self.num_losses)]
        for label in pending.labels:
            labels[label.loss_id].append(label)
        return list(map(_ballot, labels))

    def _settle_votes(self, state: _OptimizerState, pending: Pending) -> None:
        """An overflow that `unscale_` found is no longer anybody's in the unscaled sum: the first verdict holds."""
        before = state.overflowed
        if before is not None:
            row = self._initialized("step").vote_row(state.row)
            overflowed = torch.where(before.any(), before, row[:, 0] >= layout.OVERFLOW)
            plain.cast_votes(row, self._ballots(state, pending), overflowed)

    def _vote_row(self, optimizer: torch.optim.Optimizer) -> Tensor:
        return self._initialized("step").vote_row(self._state(optimizer).row)

    # Updating.

    def update(self, new_scale: float | Tensor | None = None, *, loss_id: int | None = None) -> None:
        """Moves the scale of every loss that an optimizer has consumed since the last update.

        A backward pass counts once, however many optimizers step between however many updates.

        Args:
            new_scale: Sets the scale instead: a float, or a float32 tensor of one element, which is not read back but
                clamped into [min_scale, max_scale] (NaN: min_scale).
            loss_id: Updates this loss alone; None: all.

        Raises:
            AssertionError: No `scale()` came before, or no optimizer has stepped or unscaled since the last update.
            LossScaleCollapse: A loss has overflowed `max_consecutive_skips` times in a row.
        """
        if not self._enabled:
            return
        device_state = self._initialized("update")
        losses = range(self.num_losses) if loss_id is None else [self._check_loss_id(loss_id)]
        states = [s for s in self._states.values() if any(k in s.labels for k in losses)]
        recorded = bool(states) or (loss_id is None and any(s.recorded() for s in self._states.values()))
        if new_scale is not None:
            value = self._checked_scale(new_scale)
            self._settle_labels()
            for k in losses:
                device_state.set_scale(k, value)
        elif not recorded:
            raise AssertionError(
                "No inf checks were recorded prior to update."
                + ("" if loss_id is None else f" No optimizer has consumed loss {loss_id} since its last update.")
            )
        else:
            self._settle_labels()
            consumed = {k: [label for state in states for label in state.labels.get(k, [])] for k in losses}
            device_state.update(consumed, losses)
        for state in self._states.values():
            for k in losses:
                state.labels.pop(k, None)
            if not state.labels:
                self._renew(state)
        if new_scale is None:
            self._watchdog.look(device_state.counters, self._loss_report)

    # For mpengine.graphs.

    def _after_replay(self) -> None:
        """A captured iteration has run: looks for a collapse, without waiting."""
        if self._device_state is not None:
            self._watchdog.look(self._device_state.counters, self._loss_report)

    def _before_capture(self) -> Callable[[], None]:
        """Returns what sets the host's side right where the capture fails: of what it queued nothing has run."""
        scales = self._device_state
        if scales is None:
            return lambda: None
        restore_labels = scales.keep_labels()

        def restore() -> None:
            self._ledger._close_pass()
            restore_labels()
            for state in self._states.values():
                self._renew(state)

        return restore

    def _renew(self, state: _OptimizerState) -> None:
        state.reset()
        optimizer = state.optimizer()
        if optimizer is not None:
            self._ledger.renewed(optimizer)

    def _settle_labels(self) -> None:
        states = [state for state in self._states.values() if state.stage is OptState.STEPPED]
        stepped = [optimizer for state in states if (optimizer := state.optimizer()) is not None]
        self._ledger.settle(self._initialized("update").labels[0], stepped)

    def _checked_scale(self, new_scale: float | Tensor) -> float | Tensor:
        if not isinstance(new_scale, Tensor):
            self._check_scale(new_scale, "new_scale")
            return float(new_scale)
        if new_scale.dtype != torch.float32 or new_scale.numel() != 1 or new_scale.requires_grad:
            raise AssertionError(
                "new_scale should be a float or a 1-element torch.cuda.FloatTensor or torch.FloatTensor with "
                f"requires_grad=False, not {new_scale.dtype} of {new_scale.numel()} elements with requires_grad="
                f"{new_scale.requires_grad}."
            )
        lowest, highest = self._policy.min_scale, self._policy.max_scale
        return new_scale.detach().reshape(()).nan_to_num(nan=lowest).clamp(lowest, highest)

    def _name_of(self, param: Tensor) -> str:
        for optimizer in self._ledger.optimizers:
            own = getattr(optimizer, "_name_of", None)
            name = own(param) if own is not None else plain.name_of(optimizer, param)
            if name is not None:
                return str(name)
        return f"a parameter of shape {tuple(param.shape)}"

    def _loss_report(self, loss_id: int) -> LossReport:
        alive = [optimizer for state in self._states.values() if (optimizer := state.optimizer()) is not None]
        tallies = []
        for i, optimizer in enumerate(alive):
            own = getattr(optimizer, "_tally", None)
            tally, names = plain.tally(optimizer) if own is None else own(loss_id)
            if len(alive) > 1:  # two models may well have parameters of one name
                names = {f"{name} of optimizer {i}": number for name, number in names.items()}
            tallies.append((tally, names))
        return loss_report(loss_id, self.statistics()[loss_id], tallies)

    # Reading and setting.

    def is_enabled(self) -> bool:
        """Whether this scaler does anything."""
        return self._enabled

    def statistics(self) -> list[ScaleState]:
        """The state of every loss's scale, read from the device (one sync)."""
        return list(self._start) if self._device_state is None else self._device_state.states()

    def report(self) -> Report:
        """Where each loss's scale stands, which parameters overflowed last, and how much of its gradients underflows.

        The step counts this while it reads the gradients; here it is read from the device. Plain torch optimizers
        count nothing: their part of `underflow` and `largest` is missing, and parameters are named only while
        their gradients are not finite.

        Returns:
            One `LossReport` for each loss; `print(scaler.report())` is readable. Empty when disabled.
        """
        return Report(tuple(self._loss_report(k) for k in range(self.num_losses)) if self._enabled else ())

    def get_scale(self, loss_id: int = 0) -> float:
        """The scale of a loss, read from the device (one sync); 1.0 when disabled."""
        if not self._enabled:
            return 1.0
        self._check_loss_id(loss_id)
        state = self._device_state
        return self._start[loss_id].scale if state is None else float(state.scales[loss_id])

    def get_growth_factor(self) -> float:
        """The growth factor."""
        return self._policy.growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Sets the growth factor, > 1."""
        self._set_policy(growth_factor=new_factor)

    def get_backoff_factor(self) -> float:
        """The backoff factor."""
        return self._policy.backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Sets the backoff factor, in (0, 1)."""
        self._set_policy(backoff_factor=new_factor)

    def get_growth_interval(self) -> int:
        """Clean updates in a row before a scale grows."""
        return self._policy.growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        """Sets the growth interval, at least 1."""
        self._set_policy(growth_interval=new_interval)

    def _set_policy(self, **changes: Any) -> None:
        self._policy = replace(self._policy, **changes)
        if self._device_state is not None:
            self._device_state.set_policy(self._policy)

    def _get_growth_tracker(self) -> int:
        return self.statistics()[0].growth_tracker if self._enabled else 0

    def _found_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
        return self._state(optimizer).found_inf

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """The keys of torch (lists with several losses), and the rest under "mpengine"; {} when disabled."""
        if not self._enabled:
            return {}
        return checkpoint.pack_scaler(self.statistics(), self._policy)

    def torch_state_dict(self, loss_id: int = 0) -> dict[str, Any]:
        """One loss's state, as `torch.amp.GradScaler` loads it (of several it would take the lists, and fail later)."""
        self._check_loss_id(loss_id)
        whole = {key: value for key, value in self.state_dict().items() if key != "mpengine"}
        return {key: value[loss_id] if isinstance(value, list) else value for key, value in whole.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of this class or of `torch.amp.GradScaler`; a state of one loss goes to every loss.

        Raises:
            RuntimeError: The state is empty, lacks a key, or is of another number of losses; nothing is changed.
        """
        if not self._enabled:
            return
        if len(state_dict) == 0:
            raise RuntimeError(
                "The source state dict is empty, possibly because it was saved from a disabled instance of GradScaler."
            )
        policy, states = checkpoint.parse_scaler(state_dict, self._policy, self.num_losses)
        self._policy = policy
        self._start = states
        self._watchdog.forget()
        for watched in self._ledger.optimizers:
            forget = getattr(watched, "_forget_tallies", None)
            if forget is not None:
                forget()
        if self._device_state is not None:
            self._settle_labels()
            self._device_state.set_states(states)
            self._device_state.set_policy(policy)

    def __getstate__(self) -> dict[str, Any]:
        if any(state.stage is not OptState.READY for state in self._states.values()):
            raise AssertionError(
                "A GradScaler instance may only be pickled at the beginning of an iteration, or at the end after "
                "scaler.update()."
            )
        kept = ("_policy", "_device", "_enabled", "num_losses", "_watchdog")
        return {**{name: self.__dict__[name] for name in kept}, "_start": self.statistics()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_transient()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _any_scaled(pending: Pending) -> bool:
    return any(label.scale is not None for label in pending.labels)


def _ballot(labels: list[Label]) -> Ballot:
    if not labels or all(label.scale is None and label.counted for label in labels):
        return Ballot(layout.ABSENT)
    if any(not label.counted for label in labels):
        return Ballot(layout.FRESH)
    return Ballot(layout.STALE, next((label.scale for label in labels if label.scale is not None), None))


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that Lightning's or Fabric's wrapper holds, under which its gradients are known."""
    held = getattr(optimizer, "_optimizer", None)
    return held if isinstance(held, torch.optim.Optimizer) else optimizer
