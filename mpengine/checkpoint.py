"""Saving and loading: optimizers in torch.optim's format, with FP32 masters; scalers in torch.amp.GradScaler's."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpengine import general, holdings
from mpengine.gradients import parameters
from mpengine.scaling import ScalePolicy, ScaleState

if TYPE_CHECKING:
    from mpengine.optimizer import MixedPrecisionOptimizer

MASTER = "master"


def pack(optimizer: MixedPrecisionOptimizer) -> dict[str, Any]:
    """The state as `torch.optim.Optimizer.state_dict` lays it out, "master" beside each parameter's own state.

    Tensors are references, as in torch; step counts are float32 on the CPU, as torch keeps them. A momentum buffer
    that no step has filled yet is None.
    """
    holdings.adopt_outside_changes(optimizer, loaded=False)
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
            steps = int(optimizer._steps[param])
            if "step" in own:
                own["step"] = torch.tensor(float(steps))
            if "momentum_buffer" in own and steps == 0:
                own["momentum_buffer"] = None
        if param in optimizer._masters:
            own[MASTER] = optimizer._masters[param].detach()
        state[i] = own
    taken, skipped = optimizer._counts
    extra = {"optimizer": type(optimizer._inner).__name__, "steps_taken": taken, "steps_skipped": skipped}
    return {"state": state, "param_groups": groups, "mpengine": extra}


@torch.no_grad()
def load(optimizer: MixedPrecisionOptimizer, state_dict: dict[str, Any]) -> None:
    """Checks everything first, then copies. See `MixedPrecisionOptimizer.load_state_dict`."""
    state_dict = dict(state_dict)  # a hook may edit it
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    state_by_param = _matched(optimizer, state_dict)
    groups = [
        _complete(optimizer, own, saved)
        for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    for group in groups:
        for param in group["params"]:
            _check_state(optimizer, param, state_by_param[param], group)
    for group, loaded in zip(optimizer.param_groups, groups, strict=True):
        group.clear()
        group.update(loaded)
    optimizer._register(also=[param for param, saved in state_by_param.items() if saved])
    for param in parameters(optimizer):
        saved = state_by_param.get(param, {})
        if param not in optimizer._steps:
            continue
        if param in optimizer._masters:
            if MASTER in saved:
                optimizer._masters[param].copy_(saved[MASTER])
            optimizer._agreed.pop(param, None)  # the next step asks which of the two is newer, element by element
        own = {name: value for name, value in saved.items() if name != MASTER}
        if optimizer._family is None:
            _load_inner(optimizer, param, own)
        else:
            _load_fused(optimizer, param, own)
    optimizer._register()
    extra = state_dict.get("mpengine", {})
    optimizer._counts = [int(extra.get("steps_taken", 0)), int(extra.get("steps_skipped", 0))]
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _load_fused(optimizer: MixedPrecisionOptimizer, param: Tensor, own: dict[str, Any]) -> None:
    """Copies slots in place, where they are there; resets those that the saved state does not have."""
    state = optimizer.state[param]
    for name, value in own.items():
        if name != "step" and isinstance(value, Tensor):
            if name not in state:
                state[name] = torch.empty_strided(param.shape, param.stride(), dtype=torch.float32, device=param.device)
            state[name].copy_(value)
    for name in state:
        if name != "step" and own.get(name) is None:
            state[name].zero_()
    steps = own.get("step", 0 if own.get("momentum_buffer") is None else 1)
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


def _complete(optimizer: MixedPrecisionOptimizer, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The group to load: the saved one around our parameters. What an older torch did not know keeps its default."""
    defaults = optimizer._inner.defaults
    missing = [
        key for key, default in defaults.items() if key not in saved and default is not None and default is not False
    ]
    if missing:
        raise ValueError(
            f"the saved param_groups lack {sorted(missing)}, which {type(optimizer._inner).__name__} needs (they have "
            f"{sorted(set(saved) - {'params'})}); load a state of the same kind of optimizer."
        )
    names = {"param_names": own["param_names"]} if "param_names" in own else {}
    return {**defaults, **names, **copy.deepcopy({**saved, "params": []}), "params": own["params"]}


def _matched(optimizer: MixedPrecisionOptimizer, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """The saved state of each parameter; raises where groups or parameters do not match in number."""
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(f"an optimizer's state has the keys state and param_groups; this has {sorted(state_dict)}.")
    saved_class = state_dict.get("mpengine", {}).get("optimizer")
    if saved_class is not None and saved_class != type(optimizer._inner).__name__:
        raise ValueError(
            f"the state was saved by {saved_class}, this optimizer wraps {type(optimizer._inner).__name__}; wrap a "
            f"torch.optim.{saved_class} to load it."
        )
    saved, own = state_dict["param_groups"], optimizer.param_groups
    sizes, own_sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in own]
    if sizes != own_sizes:
        raise ValueError(
            f"the state has groups of {sizes} parameters, this optimizer has groups of {own_sizes}; build the model "
            "and its param groups as they were when the state was saved."
        )
    keys = [key for group in saved for key in group["params"]]
    surplus = set(state_dict["state"]) - set(keys)
    if surplus:
        raise ValueError(f"the state has entries {sorted(surplus)} that belong to no parameter of its param_groups.")
    return {p: state_dict["state"].get(key, {}) for key, p in zip(keys, parameters(optimizer), strict=True)}


def _check_state(
    optimizer: MixedPrecisionOptimizer, param: Tensor, saved: dict[str, Any], group: dict[str, Any]
) -> None:
    """Raises where a saved tensor does not fit the parameter, or belongs to another kind of optimizer."""
    name, kind, family = optimizer._name_of(param), type(optimizer._inner).__name__, optimizer._family
    own = {key: value for key, value in saved.items() if key not in (MASTER, "step")}
    if family is not None:
        unknown = sorted(set(own) - set(family.slots))
        missing = sorted(set(family.variant(group).slots) - set(own)) if own and family.counts_steps else []
        if unknown or missing:
            raise ValueError(
                f"the saved state of {name} has {sorted(own)}, but this {kind} keeps {sorted(family.slots)} "
                f"(unknown: {unknown}, missing: {missing}); load a state of the same kind of optimizer."
            )
    step = saved.get("step", 0)
    if not isinstance(step, (int, float)) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise ValueError(f"the saved step of {name} must be a number, not {step!r:.60}.")
    slots = own if family is not None else {}
    if MASTER in saved:
        slots = {**slots, MASTER: saved[MASTER]}
    for key, value in slots.items():
        if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
            raise ValueError(f"the saved {key} of {name} must be a floating-point tensor, not {value!r:.60}.")
        if value is not None and value.shape != param.shape:
            raise ValueError(
                f"the saved {key} of {name} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}; build "
                "the model as it was when the state was saved."
            )


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


def parse_scaler(state: dict[str, Any], policy: ScalePolicy, num_losses: int) -> tuple[ScalePolicy, list[ScaleState]]:
    """The policy and the state of each loss in a saved scaler; a state of one loss goes to every loss.

    Raises:
        RuntimeError: A key is missing, the number of losses is another, or a scale is out of bounds.
    """
    try:
        scales, trackers = state["scale"], state["_growth_tracker"]
        extra = state.get("mpengine", {})
        policy = replace(
            policy,
            growth_factor=state["growth_factor"],
            backoff_factor=state["backoff_factor"],
            growth_interval=state["growth_interval"],
            **{key: extra[key] for key in ("min_scale", "max_scale", "hysteresis") if key in extra},
        )
    except KeyError as error:
        raise RuntimeError(
            f"the state dict has no key {error}; it must be the state of mpengine.GradScaler or torch.amp.GradScaler, "
            f"not one with keys {sorted(state)}."
        ) from None
    scales = list(scales) if isinstance(scales, (list, tuple)) else [scales]
    trackers = list(trackers) if isinstance(trackers, (list, tuple)) else [trackers]
    counters = extra.get("counters") or [[tracker, policy.hysteresis] for tracker in trackers]
    states = [ScaleState(float(s), *row) for s, row in zip(scales, counters, strict=False)]
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
