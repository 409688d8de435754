"""`MixedPrecisionOptimizer`: FP32 masters, one fused step, and skipping on the device, around any torch optimizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mpengine import checkpoint, distributed, general, holdings, validation, weights
from mpengine.agreement import Agreement, noted
from mpengine.execution import Execution
from mpengine.grad_scaler import GradScaler
from mpengine.gradients import Label, parameters
from mpengine.kernels import layout
from mpengine.labels import Labelled, Pending
from mpengine.rules import RuleOptimizer, family_of
from mpengine.sources import Ballot
from mpengine.tally import Tally
from mpengine.timetable import Timetable
from mpengine.unroll import unroll


class MixedPrecisionOptimizer(torch.optim.Optimizer):
    """Steps FP32 masters of fp16 or bf16 parameters, and writes the rounded masters into the parameters.

    ```
    inspect   found_inf for each loss, norm of the unscaled gradient          (reads each gradient once)
    decide    skip, or clip coefficient, step counts and scalars
    update    unscale, clip, update master and state, write the parameter     (one pass)
    ```

    The torch optimizers of `rules.OF_TORCH` (SGD, Adam, AdamW and others) and those of `mpengine.optim` run in this
    fused form, without a sync. Any other torch optimizer steps by its own `step()` on the masters, after one sync. FP32
    parameters are their own masters.

    Args:
        optimizer: The optimizer to wrap. Its `param_groups` stay shared with it; state that it has is kept.
        scaler: Where the gradients' scales come from. None: gradients are taken as they are (bf16), or
            `torch.amp.GradScaler` drives the step. A step whose gradients are not finite is skipped either way.
        max_grad_norm: Clips the unscaled gradient of all parameters to this norm, as
            `torch.nn.utils.clip_grad_norm_` does, in the same pass; None: no clipping, unless the optimizer clips by
            itself (LAMB).

    Raises:
        TypeError: `optimizer` cannot be wrapped (LBFGS, SparseAdam, another wrapper, no optimizer at all), or `scaler`
            is not mpengine's.
        ValueError: It has no parameters, one that is wrapped already, or one of a dtype, layout or device that
            has no master.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scaler: GradScaler | None = None,
        *,
        max_grad_norm: float | None = None,
        _names: Mapping[Tensor, str] | None = None,
        _originals: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(
                f"scaler is a {type(scaler).__module__}.{type(scaler).__name__}; give a mpengine.GradScaler, or None "
                "where torch.amp.GradScaler drives the steps."
            )
        self._names = dict(_names or {})
        validation.check_wrappable(optimizer, self._names)
        self._inner = optimizer
        self._family = family_of(optimizer)
        self._scaler: GradScaler | None = None
        self.max_grad_norm = max_grad_norm
        self._execution: Execution | None = None
        self._masters: dict[Tensor, Tensor] = {}  # of fp16 and bf16 parameters that are trained
        self._steps: dict[Tensor, Tensor] = {}  # int32, 0-dim; has every parameter that is trained
        self._agreed = Agreement()
        self._known: holdings.Known | None = None  # what the tables were last found to describe
        self._loaded: dict[Tensor, Tensor | None] = {}  # by FP32 weights, see holdings.take_master
        self._before: dict[Tensor, Tensor] = {}  # masters that other weights replaced since the last step
        self._unscaled: dict[Tensor, Tensor] = {}  # the FP32 gradients that unscale_ put on parameters and masters
        self._counts = [checkpoint.largest_step(optimizer.state.values()), 0]
        self._timetable: Timetable | None = None
        super().__init__([dict(group) for group in optimizer.param_groups], dict(optimizer.defaults))
        self.param_groups = optimizer.param_groups
        self._share_hooks()
        self.state.update({key: general.widened(state) for key, state in optimizer.state.items()})
        self._note_state()
        self._register(originals=_originals or {})
        optimizer.state = self.state  # one state, whichever of the two is asked
        optimizer.register_step_pre_hook(validation.refuse_raw_step)
        if scaler is not None:
            self._attach(scaler)
        validation.wrappers.add(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning and Fabric wrap an optimizer in an object of its class: our state stays with the optimizer."""
        held = self.__dict__.get("_optimizer")
        if isinstance(held, MixedPrecisionOptimizer) and name.startswith("_") and name in held.__dict__:
            setattr(held, name, value)
        else:
            super().__setattr__(name, value)

    def _note_state(self) -> None:
        """The fused step need not look at state that tells when it is changed."""
        if self._family is not None:
            for param, state in self.state.items():
                self.state[param] = noted(state, self._agreed)

    def _share_hooks(self) -> None:
        """Hooks of the wrapped optimizer are ours; on the general path its own `step()` runs its step hooks."""
        kinds = ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]
        if self._family is not None:
            kinds += ["step_pre", "step_post"]
        for kind in kinds:
            name = f"_optimizer_{kind}_hooks"
            setattr(self, name, getattr(self._inner, name))

    # Parameters, masters and state.

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that gradients are clipped to; None: no clipping. May be set between steps.

        None set here leaves it to an optimizer that clips by itself: LAMB's is in its param groups.
        """
        if self._max_grad_norm is None and isinstance(self._inner, RuleOptimizer):
            return self._inner.clips_at()
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and (isinstance(value, (bool, str)) or not value > 0.0):
            raise ValueError(f"max_grad_norm is {value!r}; it must be a number > 0, or None for no clipping.")
        self._max_grad_norm = value

    @property
    def scaler(self) -> GradScaler | None:
        """The scaler whose scales the gradients carry."""
        return self._scaler

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `torch.amp.GradScaler` is to hand the step grad_scale and found_inf.

        Lightning and Fabric ask it as well, and do not clip where it is True. With our own scaler `unscale_` works.
        """
        return self._scaler is None

    def master_params(self) -> Iterator[Tensor]:
        """The FP32 master of every parameter, group by group; an FP32 parameter is its own.

        After `scaler.unscale_(self)` their `.grad` holds the unscaled FP32 gradient. A parameter that has been frozen
        since it was wrapped has no master and does not appear.
        """
        holdings.adopt_outside_changes(self, loaded=False)
        for param in parameters(self):
            if param in self._steps:
                yield self._masters.get(param, param)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as `torch.optim.Optimizer.add_param_group` does; its parameters get masters and state."""
        if "_inner" not in self.__dict__ or self.param_groups is not self._inner.param_groups:
            super().add_param_group(param_group)  # torch's constructor builds its own copy of the groups
            return
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else params if isinstance(params, set) else list(params)
        new = [p[1] if isinstance(p, tuple) else p for p in params]  # named parameters come in pairs
        for i, param in enumerate(new):
            validation.check_param(param, self._name_of(param) or f"new parameter {i}")
        validation.check_unwrapped(new, self._names, by_others_than=self)
        self._inner.add_param_group({**param_group, "params": params})
        self._register()

    def _register(self, originals: Mapping[Tensor, Tensor] | None = None, also: Iterable[Tensor] = ()) -> None:
        self._keep_counts()
        self._execution = None
        holdings.register(self, originals or {}, set(also))

    def _ready(self) -> Execution:
        """The tables, made anew where the parameters, their memory, their state or their rules changed."""
        if self._is_unchanged():
            assert self._execution is not None
            distributed.share_masters(self, self._masters)
            return self._execution
        return self._looked_over()

    def _is_unchanged(self) -> bool:
        return (
            self._execution is not None
            and self._known is not None
            and self._execution.num_losses == self._num_losses()
            and holdings.is_unchanged(self, self._known)
        )

    def _looked_over(self) -> Execution:
        """The tables, after a look at every tensor."""
        holdings.check_unmoved(self)
        execution, num_losses = self._execution, self._num_losses()
        if execution is None or execution.num_losses != num_losses or not holdings.is_current(self, execution):
            execution = self._build(num_losses)
        holdings.adopt_outside_changes(self)
        self._known = holdings.known(self)
        return execution

    def _num_losses(self) -> int:
        scaler = self._active_scaler()
        return 1 if scaler is None else scaler.num_losses

    def _build(self, num_losses: int) -> Execution:
        self._register()
        execution = self._execution = Execution(holdings.entries(self), num_losses)
        for i, view in execution.step_views().items():
            param = execution.entries[i].param
            view.copy_(self._steps[param])
            self._steps[param] = view
            if self._family is not None and self._family.counts_steps:
                self.state[param]["step"] = view
        execution.set_counts(self._counts)
        if self._timetable is not None and self._family is not None:
            execution.set_schedule(*self._timetable.tables(self._family, self.param_groups))
        return execution

    def _keep_counts(self) -> None:
        if self._execution is not None:
            self._counts = self._execution.get_counts()

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
        if self._timetable is not None:
            self._timetable.check(self.param_groups)
        self._inner._opt_called = True  # type: ignore[attr-defined]  # schedulers made for the wrapped optimizer ask
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
        numbers = self._numbers()  # which may be refused
        state = None if scaler is None else scaler._begin_step(self)
        execution = self._ready()
        pending = self._gather()
        columns = None if self._unscaled else execution.columns(pending)
        if columns is None:
            pending = self._checked(pending)
        if columns is None and not pending.active:
            if scaler is not None and state is not None:
                if not state.recorded():
                    raise AssertionError(
                        "No inf checks were recorded for this optimizer: no parameter has a gradient. Call "
                        "scaler.scale(loss).backward() before step()."
                    )
                scaler._end_step(self, pending)  # unscale_ found gradients, and the user dropped them
            return loss
        ballots = [Ballot(layout.ABSENT)] if scaler is None or state is None else scaler._ballots(state, pending)
        votes = None if scaler is None else scaler._vote_row(self)
        # From torch.amp.GradScaler, or what unscale_ found: a gradient that was repaired since does not undo the skip.
        found_inf = getattr(self, "found_inf", None) if state is None else next(iter(state.found_inf.values()), None)
        execution.inspect(pending, ballots, columns)
        execution.decide(*numbers, self._family, found_inf, votes)
        if self._family is not None:
            execution.update()
        elif not execution.skipped:
            self._step_inner(execution, pending)
        self._finish(execution.written(pending, columns))
        execution.release()
        if scaler is not None:
            scaler._end_step(self, pending)
        return loss

    def _active_scaler(self) -> GradScaler | None:
        return self._scaler if self._scaler is not None and self._scaler.is_enabled() else None

    def _numbers(self) -> tuple[list[list[Any]], float]:
        """The hyperparameters of each group, and the norm that the gradient is clipped to."""
        family = self._family
        if isinstance(self._inner, RuleOptimizer):
            self._inner.check_groups()
        try:
            hyper = [[0.0]] if family is None else [list(family.hyperparameters(group)) for group in self.param_groups]
        except (TypeError, ValueError) as error:
            numbers = [{k: v for k, v in group.items() if k in self.defaults} for group in self.param_groups]
            raise TypeError(
                f"{type(self._inner).__name__} cannot use the hyperparameters of its groups ({error}): {numbers}. Set "
                "them in optimizer.param_groups."
            ) from error
        return hyper, self.max_grad_norm or math.inf

    def _gather(self) -> Pending:
        """The pending gradients of each parameter."""
        scaler = self._active_scaler()
        if scaler is not None:
            return scaler._pending(self)
        return Pending(grads=[p.grad for p in parameters(self)], label=Label(0, getattr(self, "grad_scale", None)))

    def _checked(self, pending: Pending) -> Pending:
        """The gradients that are stepped; refused, before anything changed, where one cannot be."""
        if self._unscaled:
            pending = Pending(
                [self._edited(p, labelled) for p, labelled in zip(parameters(self), pending, strict=True)]
            )
        for param, labelled in zip(parameters(self), pending, strict=True):
            for _, grad in labelled:
                validation.check_grad(param, grad, self._name_of)
        return pending

    def _edited(self, param: Tensor, labelled: list[Labelled]) -> list[Labelled]:
        """The gradient that unscale_ put there is the master's: the user may have edited, or dropped, it there."""
        master, known = self._masters.get(param), self._unscaled.get(param)
        if master is None:
            return labelled
        grad = master.grad
        theirs = [(label, grad if old is known else old) for label, old in labelled]
        return [(label, chosen) for label, chosen in theirs if chosen is not None]

    def _step_inner(self, execution: Execution, pending: Pending) -> None:
        """The wrapped optimizer steps on the masters with unscaled, clipped FP32 gradients."""
        unscaled = execution.unscaled(pending.active, clipped=True)
        grads = {execution.entries[i].param: grad for i, grad in unscaled.items()}
        counts = execution.get_counts()
        table = self._timetable
        try:
            with contextlib.nullcontext() if table is None else table.applied(self.param_groups, counts[0] - 1):
                general.step(self._inner, self.state, {p: self._masters.get(p, p) for p in self._steps}, grads)
        except BaseException:
            execution.set_counts([counts[0] - 1, counts[1]])  # not a step, whatever it did to the masters
            raise
        finally:
            with torch.no_grad():
                for param, master in self._masters.items():
                    param.copy_(master)

    def _finish(self, written: list[Tensor]) -> None:
        if self._family is not None:  # the kernels' writes are invisible to autograd until it is told
            torch.autograd.graph.increment_version(written)
            self._agreed.written(written)
        else:
            self._agreed.mark(self._masters)
        if self._unscaled:
            for master in self._masters.values():
                master.grad = None
            self._unscaled.clear()

    def _attach(self, scaler: GradScaler) -> None:
        if self._scaler is None:
            self._scaler = scaler
        elif self._scaler is not scaler:
            raise RuntimeError(
                "this MixedPrecisionOptimizer was prepared with another GradScaler; use that one "
                "(optimizer.scaler), or prepare it with this one."
            )
        scaler.watch(self)

    def _unscale(self, ballots: list[Ballot] | None = None) -> None:
        """`scaler.unscale_`: the unscaled FP32 sum becomes `.grad` of masters and parameters.

        Args:
            ballots: What the votes are cast about; None: what the scaler says of these gradients.
        """
        assert self._scaler is not None
        execution = self._ready()
        pending = self._checked(self._gather())
        if ballots is None:
            ballots = self._scaler._ballots(self._scaler._state(self), pending)
        execution.inspect(pending, ballots)
        grads = execution.unscaled(pending.active, clipped=False)
        execution.cast_votes(self._scaler._vote_row(self), ballots)
        execution.release()
        for master in self._masters.values():
            master.grad = None  # of an earlier unscale_
        for i, grad in grads.items():
            entry = execution.entries[i]
            entry.param.grad = None
            entry.param.grad_dtype = None  # an fp16 parameter may then hold an FP32 gradient
            entry.param.grad = entry.master.grad = self._unscaled[entry.param] = grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all pending gradients, those set aside for other losses too."""
        super().zero_grad(set_to_none)
        for master in self._masters.values():
            master.grad = None
        self._unscaled.clear()
        if self._scaler is not None:
            ledger = self._scaler._ledger
            ledger.dropped(self) if set_to_none else ledger.zeroed(self)

    def schedule(
        self, make_scheduler: Callable[[torch.optim.Optimizer], Any] | None, *, steps: int | None = None, start: int = 0
    ) -> None:
        """Follows a torch LR scheduler by the steps TAKEN: a skipped step does not advance it, and nothing waits.

        The scheduler is run ahead on a stand-in of this optimizer; its values of every step go to the device, where
        the step reads the row of the steps taken so far. So a captured CUDA graph follows it too. What it schedules
        (lr; momentum or betas of the cyclic ones) is no longer read from `param_groups`, which keep the values that
        the scheduler began from. After loading a checkpoint the schedule goes on by itself, or where it is set again
        with the same arguments: it is not saved, the steps taken are.

        Args:
            make_scheduler: From an optimizer to its `torch.optim.lr_scheduler` (or several, stepped in order). None
                ends the schedule; the values in `param_groups` hold again.
            steps: How many steps to lay out, at least 1. Beyond them the last row holds.
            start: The number of steps taken at which the first row applies.

        Raises:
            TypeError: `make_scheduler` returns no scheduler that can run ahead (`ReduceLROnPlateau`).
            ValueError: `steps` is missing or below 1, or the scheduler cannot take that many.
            RuntimeError: Raised by a later `step()` where what is scheduled was set in `param_groups`.

        Example:
            >>> optimizer.schedule(lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=1000), steps=1000)
        """
        timetable = None
        if make_scheduler is not None:
            if steps is None:
                raise ValueError("schedule needs steps=: how many steps of the scheduler to lay out.")
            unrolled = unroll(self.param_groups, self.defaults, make_scheduler, steps)
            if isinstance(self._inner, RuleOptimizer):
                self._inner.check_schedule(unrolled.columns)
            timetable = Timetable(unrolled, start, self.param_groups, self._family)
        self._keep_counts()
        self._timetable = timetable
        self._execution = None  # its tables are made anew at the next step

    def scheduled(self) -> list[dict[str, Any]]:
        """For each param group lr, and what else is scheduled, of the next step. Waits for the device."""
        now = [{"lr": group["lr"]} for group in self.param_groups]
        if self._timetable is None:
            return now
        return [{**own, **row} for own, row in zip(now, self._timetable.values(self.steps_taken), strict=True)]

    # For mpengine.graphs.

    def _before_replay(self) -> bool:
        """Brings to the device what the host changed since the last step: hyperparameters, and weights into masters.

        Returns:
            Whether the tables that a captured step reads still describe this optimizer. If not, capture again.
        """
        if self._timetable is not None:
            self._timetable.check(self.param_groups)
        execution = self._execution
        if execution is None or self._ready() is not execution:
            return False
        execution.upload(*self._numbers())
        return True

    def _after_replay(self) -> None:
        """Parameters were written, by the masters: any that had a gradient when the step was captured; we say all."""
        assert self._execution is not None
        self._finish(self._execution.trained())

    def _before_capture(self) -> Callable[[], None]:
        """Returns what sets us right where the capture fails: of what it queued nothing has run."""
        return self.zero_grad

    def _tables(self) -> tuple[object, ...]:
        """What a captured step reads and writes by address; where one was replaced, the capture is of no use."""
        scales = None if self._scaler is None else self._scaler._device_state
        return self._execution, scales, None if scales is None else scales.vote_row(0)

    def _written_elsewhere(self) -> list[Tensor]:
        """The parameters that somebody else has written since they last agreed with their masters."""
        return [param for param in self._masters if not self._agreed.holds(param)]

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
        return [self._name_at(position) for position in self._execution.overflowed(loss_id)]

    def _tally(self, loss_id: int) -> tuple[Tally, dict[str, int]]:
        """What the step has counted in the gradients of a loss, and by name the elements that overflowed last."""
        if self._execution is None:
            return Tally(), {}
        tally = self._execution.tally(loss_id)
        return tally, {self._name_at(position): n for position, n in tally.nonfinite.items()}

    def _forget_tallies(self) -> None:
        if self._execution is not None:
            self._execution.forget_tallies()

    def _name_at(self, position: int) -> str:
        assert self._execution is not None
        return str(self._name_of(self._execution.entries[position].param))

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
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._keep_counts()
        state_dict = checkpoint.pack(self)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of the wrapped class in torch.optim's format.

        FP32 tensors stay FP32. Model and optimizer may be loaded in either order: at the next step a master stays
        where it rounds to the parameter's value, and takes the parameter's value elsewhere. FP32 weights that the
        model loads are masters themselves, and win over those of the state. `steps_taken` is the saved one, or the
        largest step of a state that torch.optim saved.

        Raises:
            TypeError: It is no dict.
            ValueError: The state has other groups, parameters, tensors or shapes; nothing is changed.
        """
        checkpoint.load(self, state_dict)

    def torch_state_dict(self) -> dict[str, Any]:
        """`state_dict` without masters and mpengine's own entries, for a plain optimizer on FP32 weights."""
        return checkpoint.plain(self.state_dict())

    def fp32_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """`model.state_dict()` at master precision, for export: loaded into the FP32 model, it is the masters' bits.

        Every fp16 or bf16 parameter is replaced by its master, whichever wrapper holds it (of several optimizers one
        call gives the whole model); one that has none, and every such buffer, is widened. All are copies, and what is
        tied stays tied.

        Args:
            model: What `prepare` was given, a part of it, or what wraps it (then keys bear the wrapper's prefix).

        Raises:
            TypeError: `model` is no module.
            ValueError: It has none of this optimizer's parameters.
            RuntimeError: A parameter moved, or was cast, since it was wrapped.
        """
        return weights.export(self, model)

    def __getstate__(self) -> dict[str, Any]:
        self._keep_counts()
        kept = ["_inner", "_scaler", "_masters", "_steps", "_names", "_counts", "_max_grad_norm", "_timetable"]
        kept += ["defaults", "state", "param_groups"]
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._inner.param_groups = self.param_groups
        self._inner.register_step_pre_hook(validation.refuse_raw_step)
        self._family = family_of(self._inner)
        self._execution = None
        self._unscaled = {}
        self._agreed = Agreement()
        self._note_state()
        self._known = None
        self._loaded = {}
        self._before = {}
        if self._scaler is not None:
            self._scaler.watch(self)
        validation.wrappers.add(self)
