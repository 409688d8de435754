"""Whether a saved optimizer state fits: everything is looked at before any of it is loaded."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpengine.gradients import parameters

if TYPE_CHECKING:
    from mpengine.optimizer import MixedPrecisionOptimizer

MASTER = "master"
EXTRA = "mpengine"


def matched(optimizer: MixedPrecisionOptimizer, state_dict: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
    """The saved state of each parameter; ValueError where kind, groups or parameters do not match.

    Masters count in a state that this class saved. torch.optim passes entries on that it does not know: in a state
    that it saved, a master is of the time when the run was handed over to it.
    """
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(f"an optimizer's state has the keys state and param_groups; this has {sorted(state_dict)}.")
    saved, states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(states, Mapping) or not all(isinstance(own, Mapping) for own in states.values()):
        raise ValueError("the saved state is no dict of dicts, one for each parameter; it is no optimizer's state.")
    if not isinstance(saved, (list, tuple)) or not all(isinstance(g, Mapping) and "params" in g for g in saved):
        raise ValueError("the saved param_groups are no list of dicts with params; this is no optimizer's state.")
    saved_class = extra(state_dict).get("optimizer")
    if saved_class is not None and saved_class != type(optimizer._inner).__name__:
        raise ValueError(
            f"the state was saved by {saved_class}, this optimizer wraps {type(optimizer._inner).__name__}; wrap a "
            f"torch.optim.{saved_class} to load it."
        )
    sizes, own_sizes = [len(g["params"]) for g in saved], [len(g["params"]) for g in optimizer.param_groups]
    if sizes != own_sizes:
        raise ValueError(
            f"the state has groups of {sizes} parameters, this optimizer has groups of {own_sizes}; build the model "
            "and its param groups as they were when the state was saved."
        )
    keys = [key for group in saved for key in group["params"]]
    if len(set(keys)) != len(keys):
        raise ValueError("the saved param_groups name a parameter twice; each has one place in one group.")
    surplus = set(states) - set(keys)
    if surplus:
        raise ValueError(f"the state has entries {sorted(surplus)} that belong to no parameter of its param_groups.")
    dropped = () if EXTRA in state_dict else (MASTER,)
    return {
        param: {name: value for name, value in states.get(key, {}).items() if name not in dropped}
        for key, param in zip(keys, parameters(optimizer), strict=True)
    }


def extra(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """What this class saved beside torch's entries; ValueError where it is nothing that it saves."""
    found = state_dict.get(EXTRA, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"the saved '{EXTRA}' must be a dict, not {found!r:.60}.")
    for key in ("steps_taken", "steps_skipped"):
        value = found.get(key, 0)
        if not isinstance(value, int) or value < 0:
            raise ValueError(f"the saved {key} must be an integer of at least 0, not {value!r:.60}.")
    return found


def complete(optimizer: MixedPrecisionOptimizer, own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The group to load: the saved one around our parameters. What an older torch did not know keeps its default."""
    defaults, kind = optimizer._inner.defaults, type(optimizer._inner).__name__
    missing = [
        key for key, default in defaults.items() if key not in saved and default is not None and default is not False
    ]
    if missing:
        raise ValueError(
            f"the saved param_groups lack {sorted(missing)}, which {kind} needs (they have "
            f"{sorted(set(saved) - {'params'})}); load a state of the same kind of optimizer."
        )
    names = {"param_names": own["param_names"]} if "param_names" in own else {}
    group = {**defaults, **names, **copy.deepcopy({**saved, "params": []}), "params": own["params"]}
    if optimizer._family is not None:
        try:
            [float(number) for number in optimizer._family.hyperparameters(group)]
        except (TypeError, ValueError, RuntimeError) as error:
            shown = {key: group[key] for key in defaults}
            raise ValueError(f"the saved param_groups have values that {kind} cannot use ({error}): {shown}.") from None
    return group


def check(optimizer: MixedPrecisionOptimizer, param: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> None:
    """Raises ValueError where a saved tensor does not fit the parameter, or belongs to another kind of optimizer."""
    name, kind, family = optimizer._name_of(param), type(optimizer._inner).__name__, optimizer._family
    own = {key: value for key, value in saved.items() if key not in (MASTER, "step")}
    if family is not None:
        unknown = sorted(set(own) - set(family.slots))
        kept = {*family.variant(group).slots, *family.variant(group).cells}
        missing = sorted(kept - set(own)) if own and family.counts_steps else []
        if family.counts_steps and own and "step" not in saved:
            missing.append("step")
        if not family.counts_steps and "step" in saved:
            unknown.append("step")
        if unknown or missing:
            raise ValueError(
                f"the saved state of {name} has {sorted(own)}, but this {kind} keeps {sorted(family.slots)} "
                f"(unknown: {unknown}, missing: {missing}); load a state of the same kind of optimizer."
            )
    _check_step(saved.get("step", 0), name)
    slots = own if family is not None else {}
    if MASTER in saved:
        slots = {**slots, MASTER: saved[MASTER]}
    for key, value in slots.items():
        if value is not None and not _is_dense_float(value):
            raise ValueError(f"the saved {key} of {name} must be a floating-point tensor, not {value!r:.60}.")
        shape = torch.Size() if family is not None and key in family.variant(group).cells else param.shape
        if value is not None and value.shape != shape:
            raise ValueError(
                f"the saved {key} of {name} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}; build "
                "the model as it was when the state was saved."
            )
    starts_empty = family is not None and not family.counts_steps  # a momentum buffer that no step has filled
    empty = [key for key, value in slots.items() if value is None and (key == MASTER or not starts_empty)]
    if empty:
        raise ValueError(f"the saved {empty[0]} of {name} is None; it must be a floating-point tensor.")


def check_alike(
    optimizer: MixedPrecisionOptimizer, states: Mapping[Tensor, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Raises ValueError where torch's optimizers of the general path cannot have saved this.

    What such an optimizer keeps is the same for all parameters of a group (Adafactor: for all matrices), and has the
    parameter's shape or broadcasts to it. Of optimizers from elsewhere nothing is known.
    """
    if optimizer._family is not None or not type(optimizer._inner).__module__.startswith("torch.optim"):
        return
    for group in groups:
        first: dict[bool, tuple[Tensor, set[str]]] = {}
        for param in group["params"]:
            own = {key: value for key, value in states[param].items() if key != MASTER}
            if not own:
                continue
            other, keys = first.setdefault(param.dim() >= 2, (param, set(own)))
            if keys != set(own):
                raise ValueError(
                    f"the saved state of {optimizer._name_of(param)} has {sorted(own)}, that of "
                    f"{optimizer._name_of(other)} has {sorted(keys)}; an optimizer keeps the same for both."
                )
            for key, value in own.items():
                if isinstance(value, Tensor) and not _broadcasts(value, param):
                    raise ValueError(
                        f"the saved {key} of {optimizer._name_of(param)} has shape {tuple(value.shape)}, the parameter "
                        f"{tuple(param.shape)}; build the model as it was when the state was saved."
                    )


def _broadcasts(value: Tensor, param: Tensor) -> bool:
    scalar = value.numel() == 1
    return scalar or (
        value.dim() == param.dim() and all(n in (1, m) for n, m in zip(value.shape, param.shape, strict=True))
    )


def _check_step(step: Any, name: str | None) -> None:
    value = step
    if isinstance(step, Tensor) and step.numel() == 1 and not step.is_meta and not step.is_complex():
        value = step.item()
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"the saved step of {name} must be a number, not {step!r:.60}; steps count from 0.")


def _is_dense_float(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided and not value.is_meta
    )
