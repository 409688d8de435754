"""A model's weights in FP32 on their way in and out: loaded FP32 weights become masters, masters are exported.

`prepare` watches every module of a model. `load_state_dict` of the model, of a part of it, or of what the model is a
part of (DistributedDataParallel, torch.compile), then hands FP32 entries to the masters before torch rounds them into
the fp16 parameters. The hook knows no optimizer: it looks for the one that holds the parameter's master.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mpengine import holdings, validation
from mpengine.gradients import parameters

if TYPE_CHECKING:
    from mpengine.optimizer import MixedPrecisionOptimizer

_LOW = (torch.float16, torch.bfloat16)


def fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether no finite value becomes infinite in `dtype`."""
    return bool((torch.isfinite(tensor.detach().to(dtype)) | ~torch.isfinite(tensor)).all())


# Loading.


def watch(model: nn.Module) -> None:
    """Lets masters take the FP32 weights that are loaded into the modules of this model from now on."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks.values()
        if isinstance(module, torch.jit.ScriptModule) or any(getattr(h, "hook", None) is _before_load for h in hooks):
            continue  # scripted modules take no hooks
        module.register_load_state_dict_pre_hook(_before_load)


def _before_load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """A pre-hook of torch: `state_dict` is the load's own, and may be written; `prefix` is the module's place.

    A module-level function, for a model is copied and pickled with its hooks.
    """
    if local_metadata.get("assign_to_params_buffers"):
        _refuse_assign(module, state_dict, prefix)
    for name, param in module._parameters.items():
        entry = state_dict.get(prefix + name)
        if entry is None or param is None or param.dtype not in _LOW or not _can_be_read(entry, param):
            continue
        optimizer = holder_of(param)
        if entry.dtype == param.dtype:
            if optimizer is not None:
                holdings.expect_weights(optimizer, param)
            continue
        value = entry.detach().to(torch.float32)
        if not fits(value, param.dtype):
            error_msgs.append(
                f"parameter '{prefix + name}' holds {float(value[value.isfinite()].abs().max()):g} in the state_dict, "
                f"beyond {param.dtype}'s largest number ({torch.finfo(param.dtype).max:g}), and was left as it was; "
                "prepare the model with this module in FP32 (keep_fp32=)."
            )
            value = param.detach()
        elif optimizer is not None:
            holdings.take_weights(optimizer, param, value.reshape(param.shape))
        state_dict[prefix + name] = value  # what torch rounds is what the master took


def _can_be_read(entry: Any, param: Tensor) -> bool:
    """Whether torch will copy the entry into the parameter; whatever is wrong with others, torch says it."""
    return (
        type(entry) in (Tensor, nn.Parameter)
        and entry.is_floating_point()
        and entry.layout is torch.strided
        and not entry.is_meta
        and not param.is_meta
        and (entry.shape == param.shape or (param.dim() == 0 and entry.shape == (1,)))
    )


def _refuse_assign(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    trained = {id(param) for wrapper in validation.wrappers for param in parameters(wrapper)}
    for name, param in module.named_parameters(prefix.rstrip("."), remove_duplicate=False):
        if id(param) in trained and name in state_dict:
            raise RuntimeError(
                f"load_state_dict(assign=True) would put another tensor in the place of parameter '{name}', which its "
                "optimizer trains and would lose. Load without assign=True, or before mpengine.prepare."
            )


def holder_of(param: Tensor) -> MixedPrecisionOptimizer | None:
    """The optimizer that holds a parameter's master."""
    wrappers = cast("Iterable[MixedPrecisionOptimizer]", validation.wrappers)
    holders = [holder for holder in wrappers if param in holder._masters]
    if len(holders) > 1:  # it was moved from one optimizer to another
        holders = [holder for holder in holders if any(param is own for own in parameters(holder))] or holders
    return holders[0] if holders else None


# Exporting.


@torch.no_grad()
def export(optimizer: MixedPrecisionOptimizer, model: nn.Module) -> dict[str, Any]:
    """The model's state dict in FP32. See `MixedPrecisionOptimizer.fp32_state_dict`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the torch.nn.Module that prepare was given.")
    named = dict(model.named_parameters(remove_duplicate=False))
    own = set(parameters(optimizer))
    if own.isdisjoint(named.values()):
        raise ValueError(
            f"this {type(model).__name__} has none of the optimizer's parameters; give the model that mpengine.prepare "
            "was given with it, or a part of it."
        )
    holders: dict[Tensor, MixedPrecisionOptimizer] = {
        param: holder for param in named.values() if (holder := holder_of(param)) is not None
    }
    for param, holder in holders.items():
        validation.check_unmoved(param, holder._masters[param], holder._steps[param].device, holder._name_of)
    state_dict: dict[str, Any] = model.state_dict(keep_vars=True)  # the parameters themselves, to know them by
    params = set(named.values())
    copies: dict[int, Tensor] = {}  # by id: what is tied stays tied
    entries = list(state_dict.items())  # keeps alive what the ids are of
    for key, value in entries:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                known = value in params or key not in named  # else a hook of the model replaced it
                copies[id(value)] = _wide_copy(value if known else named[key], value, holders)
            state_dict[key] = copies[id(value)]
    return state_dict


def _wide_copy(param: Tensor, value: Tensor, holders: Mapping[Tensor, MixedPrecisionOptimizer]) -> Tensor:
    """The master of `param`, or else the entry's own value."""
    wide = holdings.settled(holders[param], param) if param in holders else value.detach()
    return wide.to(torch.float32 if wide.dtype in _LOW else wide.dtype, copy=True)
