"""What a mixed-precision optimizer accepts: optimizers, parameters and gradients; errors name the remedy."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpengine.gradients import parameters
from mpengine.masters import is_dense
from mpengine.sources import KINDS

wrappers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # every MixedPrecisionOptimizer alive


def check_wrappable(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
    """Raises TypeError or ValueError, with the remedy, where the optimizer cannot be wrapped."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    if optimizer in wrappers:
        raise TypeError("optimizer is a MixedPrecisionOptimizer already; use it as it is.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS evaluates its closure several times within a step, which cannot be scaled or skipped as one; use "
            "SGD, Adam, AdamW or another optimizer that steps once, or keep LBFGS with FP32 parameters."
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise TypeError(
            "SparseAdam steps sparse gradients, which fp16 parameters cannot have here; use Adam with dense ones "
            "(nn.Embedding(sparse=False)), or keep SparseAdam with FP32 parameters."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise TypeError(
            f"this {type(optimizer).__name__} has differentiable=True: autograd would have to record its step, which "
            "changes masters that are no part of any graph; leave differentiable at False."
        )
    params = list(parameters(optimizer))
    if not params:
        raise ValueError(f"this {type(optimizer).__name__} has no parameters; give it model.parameters().")
    for i, param in enumerate(params):
        check_param(param, _shown(param, names, f"parameter {i} of shape {tuple(param.shape)}"))
    check_unwrapped(params, names)


def _shown(param: Tensor, names: Mapping[Tensor, str], otherwise: str) -> str:
    return f"parameter '{names[param]}'" if param in names else otherwise


def check_param(param: Any, name: str) -> None:
    """Raises TypeError or ValueError where a parameter can have no master."""
    if not isinstance(param, Tensor):
        raise TypeError(f"{name} is a {type(param).__name__}, not a Tensor.")
    if hasattr(param, "device_mesh"):
        raise ValueError(
            f"{name} is a DTensor, sharded over several processes, and masters are not sharded yet; step it with the "
            "torch optimizer as it is, under mpengine.GradScaler."
        )
    if param.dtype not in KINDS:
        raise ValueError(f"{name} is {param.dtype}; mpengine trains float16, bfloat16 and float32: cast it first.")
    if param.layout is not torch.strided or not is_dense(param):
        raise ValueError(
            f"{name} has strides {param.stride() if param.layout is torch.strided else param.layout} for shape "
            f"{tuple(param.shape)}, which leave gaps or overlap in memory; make it dense, with .contiguous() say."
        )
    if param.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} lies on {param.device}; mpengine trains on cpu and cuda. Move the model first.")


def check_unwrapped(
    params: Sequence[Tensor], names: Mapping[Tensor, str], by_others_than: torch.optim.Optimizer | None = None
) -> None:
    """Raises ValueError where another wrapper holds the master of one of these parameters."""

    def clash() -> Tensor | None:
        owned = {id(p) for wrapper in wrappers if wrapper is not by_others_than for p in parameters(wrapper)}
        return next((p for p in params if id(p) in owned), None)

    if clash() is not None:
        gc.collect()  # a wrapper that is only waiting for the garbage collector does not count
    param = clash()
    if param is not None:
        raise ValueError(
            f"{_shown(param, names, f'a parameter of shape {tuple(param.shape)}')} is wrapped by another "
            "MixedPrecisionOptimizer already, which holds its master. Use that one, or delete it first (del optimizer, "
            "and the learning-rate schedulers that hold it); fp16 weights lose what the masters hold beyond them then, "
            "unless optimizer.fp32_state_dict(model) is taken before and loaded after the model is prepared again."
        )


def check_unmoved(param: Tensor, master: Tensor, device: torch.device, name_of: Callable[[Tensor], str | None]) -> None:
    """Raises RuntimeError where a parameter no longer is what its master (itself, for FP32) was made for."""
    if param.device != device:
        raise RuntimeError(
            f"{name_of(param)} moved from {device} to {param.device} after it was wrapped; its master and state did "
            "not. Move the model first, then call mpengine.prepare."
        )
    if (master is not param) != (param.dtype != torch.float32) or param.dtype not in KINDS:
        raise RuntimeError(
            f"{name_of(param)} became {param.dtype} after it was wrapped. Cast the model before mpengine.prepare, "
            "which casts it to fp16 itself."
        )
    if not is_dense(param):
        raise RuntimeError(
            f"{name_of(param)} was given memory with gaps or overlaps after it was wrapped (strides {param.stride()} "
            f"for shape {tuple(param.shape)}), which a step would write too. Give it dense memory: .contiguous()."
        )
    if master.shape != param.shape:
        raise RuntimeError(
            f"{name_of(param)} changed its shape from {tuple(master.shape)} to {tuple(param.shape)} after it was "
            "wrapped; its master and state do not fit it. Change the model first, then call mpengine.prepare."
        )


def refuse_raw_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A step pre-hook of the wrapped optimizer: called by itself, it would step scaled fp16 gradients as they are."""
    if optimizer not in wrappers and any(p.dtype != torch.float32 for p in parameters(optimizer)):
        raise RuntimeError(
            f"this {type(optimizer).__name__} was wrapped, and its step would apply scaled fp16 gradients to fp16 "
            "weights. Step what prepare returned: optimizer = mpengine.prepare(model, optimizer, scaler)."
        )


def check_slot(
    param: Tensor, name: str, value: Any, shape: torch.Size, name_of: Callable[[Tensor], str | None]
) -> None:
    """Raises ValueError where an entry of `optimizer.state[param]` cannot be the state of its parameter."""
    if not isinstance(value, Tensor) or value.shape != shape:
        what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(
            f"state['{name}'] of {name_of(param)} is {what}; it must be a tensor of shape {tuple(shape)}, as "
            "the rule needs it for this parameter."
        )


def check_grad(param: Tensor, grad: Tensor, name_of: Callable[[Tensor], str | None]) -> None:
    """Raises RuntimeError where a gradient cannot be stepped."""
    remedy = ""
    if grad.layout is not torch.strided:
        remedy = f"is {grad.layout}: use dense gradients (nn.Embedding(sparse=False))"
    elif grad.dtype not in KINDS:
        remedy = f"is {grad.dtype}: cast it to {param.dtype} or float32"
    elif grad.device != param.device:
        remedy = f"lies on {grad.device}, the parameter on {param.device}: move it there"
    if remedy:
        raise RuntimeError(f"the gradient of {name_of(param)} {remedy}.")
