"""The optimization levels O0 to O3: what each sets, what may be overridden, and how arguments are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from mpengine.scaling import FLOAT32_MAX, SMALLEST_SCALE

LossScale = float | Literal["dynamic"]


@dataclass(frozen=True)
class Properties:
    """What `initialize` does.

    Attributes:
        enabled: False: nothing.
        opt_level: "O0" to "O3".
        cast_model_type: What models are cast to, and their inputs; None: neither is cast.
        patch_torch_functions: Whether `forward` runs under autocast.
        keep_batchnorm_fp32: Whether normalisation layers stay FP32.
        master_weights: As given; fp16 parameters have FP32 masters in any case.
        loss_scale: The static scale, or "dynamic".
    """

    enabled: bool = True
    opt_level: str | None = None
    cast_model_type: torch.dtype | None = None
    patch_torch_functions: bool = False
    keep_batchnorm_fp32: bool | None = None
    master_weights: bool | None = None
    loss_scale: LossScale = 1.0

    @property
    def is_low(self) -> bool:
        """Whether weights become fp16 (or bf16)."""
        return self.cast_model_type in (torch.float16, torch.bfloat16)


LEVELS = {
    "O0": Properties(opt_level="O0", cast_model_type=torch.float32, master_weights=False),
    "O1": Properties(opt_level="O1", patch_torch_functions=True, loss_scale="dynamic"),
    "O2": Properties(
        opt_level="O2",
        cast_model_type=torch.float16,
        keep_batchnorm_fp32=True,
        master_weights=True,
        loss_scale="dynamic",
    ),
    "O3": Properties(opt_level="O3", cast_model_type=torch.float16, keep_batchnorm_fp32=False, master_weights=False),
}


def chosen(
    opt_level: str,
    cast_model_type: torch.dtype | Literal[False] | None,
    patch_torch_functions: bool | str | None,
    keep_batchnorm_fp32: bool | str | None,
    master_weights: bool | str | None,
    loss_scale: float | str | None,
) -> Properties:
    """The properties of a level, with what was overridden; None is no override.

    Raises:
        RuntimeError: There is no such level, or the level does not allow the override.
        ValueError: A value is none of those that are allowed.
    """
    if not isinstance(opt_level, str) or opt_level not in LEVELS:
        raise RuntimeError(
            f"Unexpected optimization level {opt_level}. Options are 'O0', 'O1', 'O2', 'O3'. Note that in `O0`, `O1`, "
            "etc., the prefix O is the letter O, not the number zero."
        )
    overrides: dict[str, Any] = {}
    if cast_model_type is not None:
        overrides["cast_model_type"] = _dtype(cast_model_type)
        if opt_level == "O1" and overrides["cast_model_type"] not in (None, torch.float32):
            raise RuntimeError(
                "O1 inserts casts around Torch functions rather than model weights, so with O1, the model weights "
                "themselves should remain FP32. If you wish to cast the model to a different type, use opt_level='O2' "
                f"or 'O3'. cast_model_type was {cast_model_type}"
            )
    if patch_torch_functions is not None:
        overrides["patch_torch_functions"] = as_bool("patch_torch_functions", patch_torch_functions)
        if opt_level != "O1" and overrides["patch_torch_functions"]:
            raise RuntimeError("Currently, patch_torch_functions=True should only be set by selecting opt_level='O1'.")
    if keep_batchnorm_fp32 is not None:
        if opt_level == "O1":
            raise RuntimeError(
                "With opt_level O1, batchnorm functions are automatically patched to run in FP32, so "
                f"keep_batchnorm_fp32 should be None. keep_batchnorm_fp32 was {keep_batchnorm_fp32}"
            )
        overrides["keep_batchnorm_fp32"] = as_bool("keep_batchnorm_fp32", keep_batchnorm_fp32)
    if master_weights is not None:
        if opt_level == "O1":
            raise RuntimeError(
                "It doesn't make sense to use master_weights with O1. With O1, your model weights themselves should "
                "be FP32."
            )
        overrides["master_weights"] = as_bool("master_weights", master_weights)
    if loss_scale is not None:
        overrides["loss_scale"] = _loss_scale(loss_scale)
    return replace(LEVELS[opt_level], **overrides)


def _dtype(value: Any) -> torch.dtype | None:
    if value is False:
        return None
    if value not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(
            f"cast_model_type is {value!r}; it must be torch.float16, torch.bfloat16, torch.float32, or None for the "
            "level's own."
        )
    return value


def as_bool(name: str, value: Any) -> bool:
    """A flag that may be a string, as command lines give it; ValueError, by name, for anything else."""
    known = {"True": True, "False": False}.get(value, value) if isinstance(value, str) else value
    if not isinstance(known, bool):
        raise ValueError(f"{name} must be a boolean, the string 'True' or 'False', or None, found {name}={value!r}")
    return known


def _loss_scale(value: Any) -> LossScale:
    if value == "dynamic":
        return "dynamic"
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not SMALLEST_SCALE <= number <= FLOAT32_MAX:
        raise ValueError(f"loss_scale is {value!r}; it must be a positive number, one in a string, or 'dynamic'.")
    return number


def scale_bounds(loss_scale: LossScale, lowest: float | None, highest: float | None) -> tuple[float, float, float]:
    """The first scale of each loss, the lowest and the highest; a static scale is all three.

    Raises:
        ValueError: A bound is no number, or the two are in the wrong order.
    """
    if loss_scale != "dynamic":
        return loss_scale, loss_scale, loss_scale
    for name, value in (("min_loss_scale", lowest), ("max_loss_scale", highest)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0.0):
            raise ValueError(f"{name} is {value!r}; it must be a number >= 0, or None for none.")
    floor = max(lowest or 0.0, SMALLEST_SCALE)  # a scale of 0 would end the training: no floor is this one
    ceiling = FLOAT32_MAX if highest is None else min(highest, FLOAT32_MAX)
    if not floor <= ceiling:
        raise ValueError(f"min_loss_scale is {lowest} and max_loss_scale {highest}; the first must not be larger.")
    return max(floor, min(ceiling, 2.0**16)), floor, ceiling
