"""Saving and loading: optimizers in torch.optim's format, with FP32 masters; scalers in torch.amp.GradScaler's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpengine import general, holdings, saved_state
from mpengine.gradients import parameters
from mpengine.saved_state import EXTRA, MASTER
from mpengine.scaling import ScalePolicy, ScaleState

if TYPE_CHECKING:
    from mpengine.optimizer import MixedPrecisionOptimizer


@torch.no_grad()
def pack(optimizer: MixedPrecisionOptimizer) -> dict[str, Any]:
    """The state as `torch.optim.Optimizer.state_dict` lays it out, "master" beside each parameter's own state.

    Tensors are references, as in torch; step counts are float32 on the CPU, as torch keeps them. A momentum buffer
    that no step has filled yet is None.
    """
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    index = 0
    for group in optimizer.param_groups:
        numbers = list(range(index, index + len(group["params"])))
        index += len(numbers)
        groups.append({**{k: v for k, v in group.items() if k != "params"}, "params": numbers})
    for i, param in enumerate(parameters(optimizer)):
        if param not in optimizer._steps:
            continue
        own = dict(optimizer.state.get(param, {}))
        if optimizer._family is not None:
            steps = int(own.get("step", optimizer._steps[param]))  # the user may have set it since the last step
            if "step" in own:
                own["step"] = torch.tensor(float(steps))
            if "momentum_buffer" in own and steps == 0 and not optimizer._family.counts_steps:
                own["momentum_buffer"] = None
        if param in optimizer._masters:
            own[MASTER] = holdings.seen(optimizer, param)
        state[i] = own
    taken, skipped = optimizer._counts
    extra = {"optimizer": type(optimizer._inner).__name__, "steps_taken": taken, "steps_skipped": skipped}
    return {"state": state, "param_groups": groups, "mpengine": extra}


def plain(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A packed state without masters and what else is ours.

    A parameter that the optimizer has never stepped has no entry then: torch starts its state when there is none.
    """
    states = {
        key: {name: value for name, value in own.items() if name != MASTER} for key, own in state_dict["state"].items()
    }
    kept = {key: value for key, value in state_dict.items() if key != EXTRA}
    return {**kept, "state": {key: own for key, own in states.items() if own}}


@torch.no_grad()
def load(optimizer: MixedPrecisionOptimizer, state_dict: dict[str, Any]) -> None:
    """Checks everything first, then copies. See `MixedPrecisionOptimizer.load_state_dict`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; give the dict that state_dict() returned.")
    state_dict = dict(state_dict)  # a hook may edit it
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    state_by_param = saved_state.matched(optimizer, state_dict)
    groups = [
        saved_state.complete(optimizer, own, saved)
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    for group in groups:
        for param in group["params"]:
            saved_state.check(optimizer, param, state_by_param[param], group)
    saved_state.check_alike(optimizer, state_by_param, groups)
    for group, loaded in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(loaded)
    optimizer._register(also=[param for param, saved in state_by_param.items() if saved])
    initial = _initial(optimizer)
    for param in parameters(optimizer):
        saved = state_by_param.get(param, {})
        if param not in optimizer._steps:
            continue
        if param in optimizer._masters and MASTER in saved:
            holdings.take_master(optimizer, param, saved[MASTER])
        own = {name: value for name, value in saved.items() if name != MASTER}
        if optimizer._family is None:
            _load_inner(optimizer, param, own)
        else:
            _load_fused(optimizer, param, own, initial[param])
    optimizer._register()
    optimizer._note_state()
    optimizer._counts = _counts_of(state_dict)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _counts_of(state_dict: Mapping[str, Any]) -> list[int]:
    """Steps taken and skipped: ours as saved; of torch.optim's states the largest step of a parameter, if it counts."""
    if EXTRA in state_dict:
        extra = saved_state.extra(state_dict)
        return [extra.get("steps_taken", 0), extra.get("steps_skipped", 0)]
    return [largest_step(state_dict["state"].values()), 0]


def largest_step(states: Iterable[Mapping[str, Any]]) -> int:
    """Of torch's states of parameters; 0 where they count no steps, as SGD's do not."""
    return max((int(own.get("step", 0)) for own in states), default=0)


def _initial(optimizer: MixedPrecisionOptimizer) -> dict[Tensor, Mapping[str, float]]:
    """For each parameter what its state holds before the first step, where that is not 0."""
    family = optimizer._family
    if family is None:
        return {}
    return {param: family.initial(group) for group in optimizer.param_groups for param in group["params"]}


def _load_fused(
    optimizer: MixedPrecisionOptimizer, param: Tensor, own: dict[str, Any], initial: Mapping[str, float]
) -> None:
    """Copies slots in place, where they are there; resets those that the saved state does not have."""
    state = optimizer.state[param]
    for name, value in own.items():
        if name != "step" and isinstance(value, Tensor):
            if name not in state:
                like = param if value.shape == param.shape else value
                state[name] = torch.empty_strided(like.shape, like.stride(), dtype=torch.float32, device=param.device)
            state[name].copy_(value)
    for name in state:
        if name != "step" and own.get(name) is None:
            state[name].fill_(initial.get(name, 0.0))
    steps = own.get("step", 0 if own.get("momentum_buffer") is None else 1)  # SGD counts none, but from the first on
    optimizer._steps[param].fill_(int(steps))


def _load_inner(optimizer: MixedPrecisionOptimizer, param: Tensor, own: dict[str, Any]) -> None:
    optimizer.state.pop(param, None)
    if own:
        optimizer.state[param] = general.widened({k: _moved(k, v, param.device) for k, v in own.items()})


def _moved(name: str, value: Any, device: torch.device) -> Any:
    """A saved value as the wrapped optimizer's own, in its saved dtype; "step" stays where torch keeps it."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if name == "step" else value.to(device, copy=True)


def pack_scaler(states: list[ScaleState], policy: ScalePolicy) -> dict[str, Any]:
    """The keys of `torch.amp.GradScaler` (lists with several losses), and the rest under "mpengine"."""
    one = len(states) == 1
    return {
        "scale": states[0].scale if one else [s.scale for s in states],
        "growth_factor": policy.growth_factor,
        "backoff_factor": policy.backoff_factor,
        "growth_interval": policy.growth_interval,
        "_growth_tracker": states[0].growth_tracker if one else [s.growth_tracker for s in states],
        "mpengine": {
            "min_scale": policy.min_scale,
            "max_scale": policy.max_scale,
            "hysteresis": policy.hysteresis,
            "counters": [s.counters() for s in states],
        },
    }


def parse_scaler(
    state: Mapping[str, Any], policy: ScalePolicy, num_losses: int
) -> tuple[ScalePolicy, list[ScaleState]]:
    """The policy and the state of each loss in a saved scaler; a state of one loss goes to every loss.

    Raises:
        TypeError: It is no dict.
        ValueError: The policy is none: see `ScalePolicy`.
        RuntimeError: A key is missing, an entry is no number, the number of losses is another, or a scale is out of
            bounds.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict is a {type(state).__name__}; give the dict that a scaler's state_dict() returned.")
    extra = state.get(EXTRA, {})
    try:
        policy = replace(
            policy,
            growth_factor=state["growth_factor"],
            backoff_factor=state["backoff_factor"],
            growth_interval=state["growth_interval"],
            **{key: extra[key] for key in ("min_scale", "max_scale", "hysteresis") if key in extra},
        )
        states = _parse_losses(state["scale"], state["_growth_tracker"], extra.get("counters"), policy)
    except KeyError as error:
        raise RuntimeError(
            f"the state dict has no key {error}; it must be the state of mpengine.GradScaler or torch.amp.GradScaler, "
            f"not one with keys {sorted(state)}."
        ) from None
    except (TypeError, AttributeError) as error:
        raise RuntimeError(
            f"the state dict cannot be read ({error}); it must be the state of mpengine.GradScaler or "
            "torch.amp.GradScaler."
        ) from error
    if len(states) == 1:
        states *= num_losses
    if len(states) != num_losses:
        raise RuntimeError(
            f"the state dict holds {len(states)} losses, this scaler has num_losses={num_losses}. Construct "
            f"GradScaler(num_losses={len(states)}), or load a state of one loss, which goes to every loss."
        )
    for loss_id, loaded in enumerate(states):
        if not policy.min_scale <= loaded.scale <= policy.max_scale:
            raise RuntimeError(
                f"the state dict's scale of loss {loss_id} is {loaded.scale}, outside [min_scale, max_scale] = "
                f"[{policy.min_scale:g}, {policy.max_scale:g}]; construct GradScaler with bounds that hold it."
            )
    return policy, states


def _parse_losses(scales: Any, trackers: Any, counters: Any, policy: ScalePolicy) -> list[ScaleState]:
    scales, trackers = _listed(scales), _listed(trackers)
    rows = counters or [[tracker, policy.hysteresis] for tracker in trackers]
    if not len(scales) == len(trackers) == len(rows):
        raise RuntimeError(
            f"the state dict holds {len(scales)} scales, {len(trackers)} growth trackers and {len(rows)} rows of "
            "counters; each loss has one of each."
        )
    states = [
        ScaleState(float(scale), *[int(count) for count in (tracker, *row[1:])])
        for scale, tracker, row in zip(scales, trackers, rows, strict=True)
    ]
    for loss_id, state in enumerate(states):
        if min(state.counters()) < 0:
            raise RuntimeError(f"the state dict's counters of loss {loss_id} are {state.counters()}; none is negative.")
    return states


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
