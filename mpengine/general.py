"""The general path: any torch optimizer takes its own `step()`, on the FP32 masters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def widened(state: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state with its fp16 and bf16 tensors in FP32, as the master's step needs them."""
    low = (torch.float16, torch.bfloat16)
    return {k: v.float() if isinstance(v, Tensor) and v.dtype in low else v for k, v in state.items()}


def step(
    optimizer: torch.optim.Optimizer,
    state: defaultdict[Any, dict[str, Any]],
    masters: Mapping[Tensor, Tensor],
    grads: Mapping[Tensor, Tensor],
) -> None:
    """Steps `optimizer` with the masters in its groups, in the parameters' place.

    Args:
        optimizer: Its groups hold the parameters, before and after.
        state: The state of each parameter; updated.
        masters: The master of each parameter that is trained; an FP32 parameter is its own.
        grads: The unscaled, clipped FP32 gradients of the parameters that have one.
    """
    outside = [group["params"] for group in optimizer.param_groups]
    scaled = {param: param.grad for param in grads}
    inside = defaultdict(dict, {masters.get(key, key): value for key, value in state.items()})
    try:
        optimizer.state = inside
        for group, params in zip(optimizer.param_groups, outside, strict=True):
            group["params"] = [masters[p] for p in params if p in masters]
        for param, grad in grads.items():
            masters[param].grad = grad
        optimizer.step()
    finally:
        for group, params in zip(optimizer.param_groups, outside, strict=True):
            group["params"] = params
        for param, master in masters.items():
            if master in inside:
                state[param] = inside[master]
        optimizer.state = state
        for param, before in scaled.items():
            masters[param].grad = before if masters[param] is param else None
