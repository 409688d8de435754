"""Saving and loading the scales in apex's format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from mpengine.amp import state
from mpengine.amp.scaler import LossScaler


def state_dict() -> dict[str, dict[str, float | int]]:
    """The scales of the latest `initialize`: {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 0}, ...}.

    Save it beside `model.state_dict()` and `optimizer.state_dict()`, which hold the weights and their masters; the
    three may be loaded in any order.

    Returns:
        Python numbers, read from the device (one sync); {} where amp is disabled.

    Raises:
        RuntimeError: Nothing was initialized.
    """
    amp = _latest("state_dict")
    states = [] if amp.scaler is None else amp.scaler.statistics()
    return {
        f"loss_scaler{k}": {"loss_scale": one.scale, "unskipped": one.growth_tracker} for k, one in enumerate(states)
    }


def load_state_dict(state_dict: Mapping[str, Any]) -> None:
    """Loads what `state_dict` or apex's saved, into the scales of the latest `initialize`.

    Where it holds another number of losses, those that both have are loaded, with a warning. Disabled, it does
    nothing.

    Raises:
        RuntimeError: Nothing was initialized; an unexpected or missing key, or a scale that `initialize` does not
            allow. Nothing has changed then.
    """
    scaler = _latest("load_state_dict").scaler
    if scaler is None:
        return
    if not isinstance(state_dict, Mapping):
        raise RuntimeError(
            f"state_dict is a {type(state_dict).__name__}; give the dict that amp.state_dict() returned."
        )
    unexpected = [key for key in state_dict if not str(key).startswith("loss_scaler")]
    if unexpected:
        raise RuntimeError(
            f"Error(s) in loading state_dict. Unexpected key(s) in state_dict: {', '.join(map(repr, unexpected))}. "
        )
    saved = [_parsed(key, entry) for key, entry in state_dict.items()]
    if len(saved) != scaler.num_losses:
        warnings.warn(
            f"state_dict contains {len(saved)} entries, while {scaler.num_losses} loss_scalers are used "
            "(amp.initialize(num_losses=)); the first of them are loaded, the others stay as they are.",
            stacklevel=2,
        )
    _load(scaler, saved[: scaler.num_losses])


def _latest(caller: str) -> state.Amp:
    amp = state.latest()
    if amp is None:
        raise RuntimeError(f"amp.{caller} was called before amp.initialize(model, optimizer, opt_level=...).")
    return amp


def _parsed(key: str, entry: Any) -> tuple[float, int]:
    try:
        return float(entry["loss_scale"]), int(entry["unskipped"])
    except (KeyError, TypeError, ValueError):
        raise RuntimeError(
            f"Error(s) in loading state_dict. {key!r} is {entry!r}; it must have a number 'loss_scale' and a number "
            "'unskipped'."
        ) from None


def _load(scaler: LossScaler, saved: list[tuple[float, int]]) -> None:
    whole = scaler.state_dict()
    states = scaler.statistics()
    now = [(one.scale, one.growth_tracker) for one in states]
    loaded = saved + now[len(saved) :]
    lowest, highest = whole["mpengine"]["min_scale"], whole["mpengine"]["max_scale"]
    for k, (scale, unskipped) in enumerate(loaded):
        if not lowest <= scale <= highest:
            raise RuntimeError(
                f"state_dict's loss_scale of loss_scaler{k} is {scale}, and this amp.initialize allows "
                f"[{lowest:g}, {highest:g}]: give it the loss_scale, min_loss_scale and max_loss_scale of the run "
                "that was saved, or do not load its amp state."
            )
        if unskipped < 0:
            raise RuntimeError(f"state_dict's unskipped of loss_scaler{k} is {unskipped}; it must not be negative.")
    whole["scale"], whole["_growth_tracker"] = [s for s, _ in loaded], [n for _, n in loaded]
    del whole["mpengine"]["counters"]
    scaler.load_state_dict(whole)
    scaler.overflow_log.begin([s for s, _ in loaded], [0] * len(loaded))
