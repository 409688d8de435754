"""`MixedPrecisionOptimizer`: FP32 masters, one fused step, and skipping on the device, around any torch optimizer."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpengine import checkpoint
from mpengine.execution import Execution
from mpengine.gradients import Label, Labelled, parameters
from mpengine.kernels import layout
from mpengine.masters import KINDS, Ballot, Entry, arena, is_dense
from mpengine.rules import ASSIGN, Rule, family_of

if TYPE_CHECKING:
    from mpengine.grad_scaler import GradScaler

_wrappers: weakref.WeakSet[MixedPrecisionOptimizer] = weakref.WeakSet()


class MixedPrecisionOptimizer(torch.optim.Optimizer):
    """Steps FP32 masters of fp16 or bf16 parameters, and writes the rounded masters into the parameters.

    ```
    inspect   found_inf for each loss, norm of the unscaled gradient          (reads each gradient once)
    decide    skip, or clip coefficient, step counts and scalars
    update    unscale, clip, update master and state, write the parameter     (one pass)
    ```

    SGD, Adam and AdamW run in this fused form, without a sync. Any other torch optimizer steps by its own
    `step()` on the masters, after one sync. FP32 parameters are their own masters.

    Args:
        optimizer: The optimizer to wrap. Its `param_groups` stay shared with it; state that it has is kept.
        scaler: Where the gradients' scales come from. None: gradients are taken as they are (bf16), or
            `torch.amp.GradScaler` drives the step. A step whose gradients are not finite is skipped either way.
        max_grad_norm: Clips the unscaled gradient of all parameters to this norm, as
            `torch.nn.utils.clip_grad_norm_` does, in the same pass; None: no clipping.

    Raises:
        TypeError: `optimizer` cannot be wrapped (LBFGS, another wrapper, no optimizer at all).
        ValueError: It has no parameters, one that is wrapped already, or one of a dtype, layout or device that
            has no master.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then hands us grad_scale and found_inf

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: GradScaler | None = None,
        *,
        max_grad_norm: float | None = None,
        _names: Mapping[Tensor, str] | None = None,
        _originals: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        self._names = dict(_names or {})
        check_wrappable(optimizer, self._names)
        self._inner = optimizer
        self._family = family_of(optimizer)
        self._scaler: GradScaler | None = None
        self.max_grad_norm = max_grad_norm
        self._execution: Execution | None = None
        self._masters: dict[Tensor, Tensor] = {}  # of fp16 and bf16 parameters that are trained
        self._steps: dict[Tensor, Tensor] = {}  # int32, 0-dim; has every parameter that is trained
        self._versions: dict[Tensor, int] = {}  # of parameters, when their masters were last known to agree
        self._unscaled: dict[Tensor, Tensor] = {}  # the FP32 gradients that unscale_ put on parameters and masters
        self._counts = [0, 0]
        super().__init__([dict(group) for group in optimizer.param_groups], dict(optimizer.defaults))
        self.param_groups = optimizer.param_groups
        if self._family is not None:
            self._optimizer_step_pre_hooks.update(optimizer._optimizer_step_pre_hooks)
            self._optimizer_step_post_hooks.update(optimizer._optimizer_step_post_hooks)
        self._register(_originals or {})
        if self._family is not None:
            optimizer.state = self.state  # taken over; one state, whichever of the two is asked
        if scaler is not None:
            self._attach(scaler)
        _wrappers.add(self)

    # Parameters, masters and state.

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to; None: no clipping. May be set between steps."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and not value > 0.0:
            raise ValueError(f"max_grad_norm is {value}; it must be > 0, or None for no clipping.")
        self._max_grad_norm = value

    @property
    def scaler(self) -> GradScaler | None:
        """The scaler whose scales the gradients carry."""
        return self._scaler

    def master_params(self) -> Iterator[Tensor]:
        """The FP32 master of every parameter, group by group; an FP32 parameter is its own.

        After `scaler.unscale_(self)` their `.grad` holds the unscaled FP32 gradient. A parameter that has been frozen
        since it was wrapped has no master and does not appear.
        """
        for param in parameters(self):
            if param in self._steps:
                yield self._masters.get(param, param)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group` does; its parameters get masters and state."""
        if "_inner" not in self.__dict__ or self.param_groups is not self._inner.param_groups:
            super().add_param_group(param_group)  # torch's constructor builds its own copy of the groups
            return
        params = param_group["params"]
        group = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
        for param in group["params"]:
            _check_param(param, self._name_of(param) or f"new parameter of shape {tuple(param.shape)}")
        _check_unwrapped(group["params"], self._names, by_others_than=self)
        self._inner.add_param_group(group)
        self._register({})

    def _register(self, originals: Mapping[Tensor, Tensor]) -> None:
        """Gives a master and state to every parameter that needs them now and has none."""
        self._keep_counts()
        self._execution = None
        new = [p for p in parameters(self) if p not in self._steps and (p.requires_grad or p.grad is not None)]
        for device in dict.fromkeys(p.device for p in new):
            local = [p for p in new if p.device == device]
            halves = [p for p in local if p.dtype != torch.float32]
            with torch.no_grad():
                for param, master in zip(halves, arena(halves, fill=None), strict=True):
                    master.copy_(originals.get(param, param))
                    self._masters[param] = torch.nn.Parameter(master)
            for param in local:
                self._steps[param] = torch.zeros((), dtype=torch.int32, device=device)
                self._versions[param] = param._version
        for group in self.param_groups:
            if self._family is not None:
                self._make_slots([p for p in group["params"] if p in self._steps], self._family.variant(group))

    def _make_slots(self, params: list[Tensor], rule: Rule) -> None:
        """State of zeros for parameters that lack it; state that the wrapped optimizer had is taken over."""
        for name in rule.slots:
            for device in dict.fromkeys(p.device for p in params):
                lacking = [p for p in params if p.device == device and name not in self.state[p]]
                for param, slot in zip(lacking, arena(lacking), strict=True):
                    before = self._inner.state.get(param, {}).get(name)
                    if before is not None:
                        slot.copy_(before)
                    self.state[param][name] = slot
                    if name == "momentum_buffer":  # torch's first momentum buffer is the gradient itself
                        self._steps[param].fill_(0 if before is None else 1)
        if self._family is not None and self._family.counts_steps:
            for param in params:
                if "step" not in self.state[param]:
                    before = self._inner.state.get(param, {}).get("step", 0)
                    self._steps[param].fill_(int(before))
                    self.state[param]["step"] = self._steps[param]

    def _entries(self) -> dict[int, Entry]:
        """The tensors by their position among all parameters."""
        entries: dict[int, Entry] = {}
        position = 0
        for g, group in enumerate(self.param_groups):
            rule = ASSIGN if self._family is None else self._family.variant(group)
            for param in group["params"]:
                if param in self._steps:
                    master = self._masters.get(param, param)
                    slots = tuple(self.state[param][name] for name in rule.slots)
                    entries[position] = Entry(param, master, slots, g, rule, master is not param)
                position += 1
        return entries

    def _ready(self) -> Execution:
        """The tables, made anew where the parameters, their memory or their rules changed."""
        params = list(parameters(self))
        if self._is_incomplete():
            self._register({})
        execution = self._execution
        scaler = self._active_scaler()
        num_losses = 1 if scaler is None else scaler.num_losses
        if (
            execution is None
            or execution.num_losses != num_losses
            or any(params[i].data_ptr() != pointer for i, pointer in execution.pointers.items())
            or any(execution.entries[i].rule != rule for i, rule in self._rules(execution))
        ):
            execution = self._build(num_losses)
        self._adopt_outside_changes()
        return execution

    def _is_incomplete(self) -> bool:
        """Whether a parameter was unfrozen, or the user cleared the state."""
        incomplete = False
        for group in self.param_groups:
            needs_state = self._family is not None and bool(self._family.variant(group).slots)
            for param in group["params"]:
                if param in self._steps:
                    self._check_unmoved(param)
                    incomplete = incomplete or (needs_state and param not in self.state)
                else:
                    incomplete = incomplete or param.grad is not None
        return incomplete

    def _rules(self, execution: Execution) -> Iterator[tuple[int, Rule]]:
        if self._family is None:
            return
        variants = [self._family.variant(group) for group in self.param_groups]
        for i, entry in execution.entries.items():
            yield i, variants[entry.group]

    def _build(self, num_losses: int) -> Execution:
        self._register({})
        execution = self._execution = Execution(self._entries(), num_losses)
        for i, view in execution.step_views().items():
            param = execution.entries[i].param
            view.copy_(self._steps[param])
            self._steps[param] = view
            if "step" in self.state.get(param, {}):
                self.state[param]["step"] = view
        execution.set_counts(self._counts)
        return execution

    def _keep_counts(self) -> None:
        if self._execution is not None:
            self._counts = self._execution.get_counts()

    def _check_unmoved(self, param: Tensor) -> None:
        steps = self._steps[param]
        if param.device != steps.device:
            raise RuntimeError(
                f"{self._name_of(param)} moved from {steps.device} to {param.device} after it was wrapped; its master "
                "and state did not. Move the model first, then call mpengine.prepare."
            )
        if (param in self._masters) != (param.dtype != torch.float32) or param.dtype not in KINDS:
            raise RuntimeError(
                f"{self._name_of(param)} became {param.dtype} after it was wrapped. Cast the model before "
                "mpengine.prepare, which casts it to fp16 itself."
            )

    @torch.no_grad()
    def _adopt_outside_changes(self) -> None:
        """Where somebody else wrote a parameter, its master follows, element by element.

        The master stays where it still rounds to the parameter, so loading the model's weights of a checkpoint
        leaves the masters of that checkpoint alone, whichever of the two was loaded first.
        """
        for param, master in self._masters.items():
            if param._version != self._versions[param]:
                master.copy_(torch.where(master.to(param.dtype) == param, master, param.to(torch.float32)))
                self._versions[param] = param._version

    # Stepping.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the pending gradients of all losses; skipped, on the device, where one is not finite.

        Args:
            closure: Only without an enabled scaler: recomputes the loss and its gradients first.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: A closure with a scaler; a second step before `scaler.update()`; a gradient that cannot be
                stepped (sparse, float64, of another device, edited while several losses are pending); a parameter
                that moved or was cast. Nothing has changed then.
            AssertionError: With a scaler: no `scale()` came before, or no parameter has a gradient.
        """
        scaler = self._active_scaler()
        if closure is not None and scaler is not None:
            raise RuntimeError(
                "Closure use is not currently supported with a GradScaler: call closure() yourself, scale its loss, "
                "backward(), then optimizer.step()."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        state = None if scaler is None else scaler._begin_step(self)
        execution = self._ready()
        pending = self._gather()
        if not any(pending):
            if scaler is not None:
                raise AssertionError(
                    "No inf checks were recorded for this optimizer: no parameter has a gradient. Call "
                    "scaler.scale(loss).backward() before step()."
                )
            return loss
        ballots = [Ballot(layout.ABSENT)] if scaler is None or state is None else scaler._ballots(state, pending)
        votes = None if scaler is None else scaler._vote_row(self)
        found_inf = getattr(self, "found_inf", None)  # from torch.amp.GradScaler
        hyper = [self._family.hyperparameters(group) for group in self.param_groups] if self._family else [[0.0]]
        execution.inspect(pending, ballots)
        execution.decide(hyper, self._max_grad_norm or math.inf, self._family, found_inf, votes)
        if self._family is not None:
            execution.update()
        elif not execution.skipped:
            self._step_inner(execution, pending)
        execution.release()
        self._finish(execution, pending)
        if scaler is not None:
            scaler._end_step(self, pending)
        return loss

    def _active_scaler(self) -> GradScaler | None:
        return self._scaler if self._scaler is not None and self._scaler.is_enabled() else None

    def _gather(self) -> list[list[Labelled]]:
        """The pending gradients of each parameter; refused, before anything changed, where one cannot be stepped."""
        scaler = self._active_scaler()
        if scaler is not None:
            pending = scaler._pending(self)
        else:
            label = Label(0, getattr(self, "grad_scale", None))
            pending = [[] if p.grad is None else [(label, p.grad)] for p in parameters(self)]
        for param, labelled in zip(parameters(self), pending, strict=True):
            master = self._masters.get(param)
            for i, (label, grad) in enumerate(labelled):
                if master is not None and master.grad is not None and grad is self._unscaled.get(param):
                    labelled[i] = (label, master.grad)  # the user may have replaced it there
                self._check_grad(param, labelled[i][1])
        return pending

    def _check_grad(self, param: Tensor, grad: Tensor) -> None:
        remedy = ""
        if grad.layout is not torch.strided:
            remedy = f"is {grad.layout}: use dense gradients (nn.Embedding(sparse=False))"
        elif grad.dtype not in KINDS:
            remedy = f"is {grad.dtype}: cast it to {param.dtype} or float32"
        elif grad.device != param.device:
            remedy = f"lies on {grad.device}, the parameter on {param.device}: move it there"
        if remedy:
            raise RuntimeError(f"the gradient of {self._name_of(param)} {remedy}.")

    def _step_inner(self, execution: Execution, pending: list[list[Labelled]]) -> None:
        """The general path: the wrapped optimizer steps on the masters with unscaled, clipped FP32 gradients."""
        active = {i: execution.entries[i] for i, labelled in enumerate(pending) if labelled}
        buffers = _gradient_buffers(active)
        execution.write(buffers, clipped=True)
        with self._masters_inside(active, buffers):
            self._inner.step()
        with torch.no_grad():
            for param, master in self._masters.items():
                param.copy_(master)
        for param in self._steps:
            master = self._masters.get(param, param)
            if master in self._inner.state:
                self.state[param] = self._inner.state[master]

    @contextmanager
    def _masters_inside(self, active: dict[int, Entry], buffers: dict[int, Tensor]) -> Iterator[None]:
        outside = [group["params"] for group in self.param_groups]
        grads = {entry.param: entry.param.grad for entry in active.values()}
        try:
            for group, params in zip(self.param_groups, outside, strict=True):
                group["params"] = [self._masters.get(p, p) for p in params if p in self._steps]
            for i, entry in active.items():
                entry.master.grad = buffers[i]
            yield
        finally:
            for group, params in zip(self.param_groups, outside, strict=True):
                group["params"] = params
            for param, grad in grads.items():
                if param not in self._masters:
                    param.grad = grad

    def _finish(self, execution: Execution, pending: list[list[Labelled]]) -> None:
        written = [execution.entries[i].param for i, labelled in enumerate(pending) if labelled]
        if self._family is not None:  # the kernels' writes are invisible to autograd until it is told
            torch.autograd.graph.increment_version(written)
        for param, master in self._masters.items():
            self._versions[param] = param._version
            master.grad = None
        self._unscaled.clear()
        self._inner._opt_called = True  # type: ignore[attr-defined]  # schedulers made for the wrapped optimizer ask

    def _attach(self, scaler: GradScaler) -> None:
        if self._scaler is None:
            self._scaler = scaler
        elif self._scaler is not scaler:
            raise RuntimeError(
                "this MixedPrecisionOptimizer was prepared with another GradScaler; use that one "
                "(optimizer.scaler), or prepare it with this one."
            )
        scaler.watch(self)

    def _unscale(self) -> None:
        """`scaler.unscale_`: the unscaled FP32 sum becomes `.grad` of masters and parameters."""
        assert self._scaler is not None
        execution = self._ready()
        pending = self._gather()
        ballots = self._scaler._ballots(self._scaler._state(self), pending)
        execution.inspect(pending, ballots)
        active = {i: execution.entries[i] for i, labelled in enumerate(pending) if labelled}
        buffers = _gradient_buffers(active)
        execution.write(buffers, clipped=False)
        execution.cast_votes(self._scaler._vote_row(self), ballots)
        execution.release()
        for i, entry in active.items():
            entry.param.grad = None
            entry.param.grad_dtype = None  # an fp16 parameter may then hold an FP32 gradient
            entry.param.grad = entry.master.grad = self._unscaled[entry.param] = buffers[i]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all pending gradients, those set aside for other losses too."""
        super().zero_grad(set_to_none)
        for master in self._masters.values():
            master.grad = None
        self._unscaled.clear()
        if self._scaler is not None:
            self._scaler._ledger.zeroed(parameters(self))

    # What happened. Each of these waits for the device.

    @property
    def steps_taken(self) -> int:
        """Steps that changed the weights."""
        return self._execution.get_counts()[0] if self._execution is not None else self._counts[0]

    @property
    def steps_skipped(self) -> int:
        """Steps skipped because a gradient was not finite."""
        return self._execution.get_counts()[1] if self._execution is not None else self._counts[1]

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last `step()` was skipped."""
        return self._execution is not None and self._execution.skipped

    @property
    def last_grad_norm(self) -> float:
        """The norm of the last step's unscaled gradient before clipping; NaN where the step was skipped."""
        return float("nan") if self._execution is None else self._execution.norm

    def overflowed_parameters(self, loss_id: int | None = None) -> list[str]:
        """Names of the parameters whose gradients were not finite at the last overflow (of this loss)."""
        if self._execution is None:
            return []
        return [str(self._name_of(self._execution.entries[i].param)) for i in self._execution.overflowed(loss_id)]

    def _name_of(self, param: Tensor) -> str | None:
        if param in self._names:
            return f"parameter '{self._names[param]}'"
        for g, group in enumerate(self.param_groups):
            for i, own in enumerate(group["params"]):
                if own is param:
                    return f"group {g}, parameter {i} of shape {tuple(param.shape)}"
        return None

    # Saving, loading, copying.

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's format; each parameter's state has its "master" beside the rule's tensors."""
        self._keep_counts()
        return checkpoint.pack(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of the wrapped class in torch.optim's format.

        FP32 tensors stay FP32. Model and optimizer may be loaded in either order: at the next step a master stays
        where it rounds to the parameter's value, and takes the parameter's value elsewhere.

        Raises:
            ValueError: The state has other groups, parameters, tensors or shapes; nothing is changed.
        """
        checkpoint.load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._keep_counts()
        kept = ["_inner", "_scaler", "_masters", "_steps", "_names", "_counts", "_max_grad_norm"]
        kept += ["defaults", "state", "param_groups"]
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._inner.param_groups = self.param_groups
        self._family = family_of(self._inner)
        self._execution = None
        self._unscaled = {}
        self._versions = dict.fromkeys(self._steps, -1)
        if self._scaler is not None:
            self._scaler.watch(self)
        _wrappers.add(self)


def _gradient_buffers(active: dict[int, Entry]) -> dict[int, Tensor]:
    """Uninitialised FP32 tensors like the parameters, one allocation for each device."""
    buffers: dict[int, Tensor] = {}
    for device in dict.fromkeys(entry.param.device for entry in active.values()):
        local = [i for i, entry in active.items() if entry.param.device == device]
        buffers.update(zip(local, arena([active[i].param for i in local], fill=None), strict=True))
    return buffers


def check_wrappable(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
    """Raises TypeError or ValueError, with the remedy, where the optimizer cannot be wrapped."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    if isinstance(optimizer, MixedPrecisionOptimizer):
        raise TypeError("optimizer is a MixedPrecisionOptimizer already; use it as it is.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS evaluates its closure several times within a step, which cannot be scaled or skipped as one; use "
            "SGD, Adam, AdamW or another optimizer that steps once, or keep LBFGS with FP32 parameters."
        )
    params = list(parameters(optimizer))
    if not params:
        raise ValueError(f"this {type(optimizer).__name__} has no parameters; give it model.parameters().")
    for i, param in enumerate(params):
        _check_param(param, names.get(param, f"parameter {i} of shape {tuple(param.shape)}"))
    _check_unwrapped(params, names)


def _check_param(param: Any, name: str) -> None:
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} is a {type(param).__name__}, not a Tensor.")
    if param.dtype not in KINDS:
        raise ValueError(f"{name} is {param.dtype}; mpengine trains float16, bfloat16 and float32: cast it first.")
    if param.layout is not torch.strided or not is_dense(param):
        raise ValueError(
            f"{name} has strides {param.stride() if param.layout is torch.strided else param.layout} for shape "
            f"{tuple(param.shape)}, which leave gaps or overlap in memory; make it dense, with .contiguous() say."
        )
    if param.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} lies on {param.device}; mpengine trains on cpu and cuda. Move the model first.")


def _check_unwrapped(
    params: list[Tensor], names: Mapping[Tensor, str], by_others_than: MixedPrecisionOptimizer | None = None
) -> None:
    def clash() -> Tensor | None:
        owned = {id(p) for wrapper in _wrappers if wrapper is not by_others_than for p in parameters(wrapper)}
        return next((p for p in params if id(p) in owned), None)

    if clash() is not None:
        gc.collect()  # a wrapper that is only waiting for the garbage collector does not count
    param = clash()
    if param is not None:
        raise ValueError(
            f"{names.get(param, f'a parameter of shape {tuple(param.shape)}')} is wrapped by another "
            "MixedPrecisionOptimizer already, which holds its master. Use that one, or delete it first (del optimizer)."
        )
