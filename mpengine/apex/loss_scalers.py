"""apex's two loss scalers, for loops that scale, check and unscale by hand, on the engine's policy and rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mpengine.kernels import layout
from mpengine.scaling import ScalePolicy, ScaleState, Vote, next_state


class LossScaler:
    """A static loss scale.

    Args:
        scale: Greater than 0.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.policy = ScalePolicy(min_scale=scale, max_scale=scale)
        self.state = ScaleState(float(scale))

    @property
    def loss_scale(self) -> float:
        """The scale."""
        return self.state.scale

    @property
    def cur_scale(self) -> float:
        """The scale."""
        return self.state.scale

    def has_overflow(self, params: Iterable[Tensor]) -> bool:
        """Whether a gradient of these parameters is inf or NaN; a static scale tells it, too. Waits for the device."""
        grads = [param.grad for param in params if param.grad is not None]
        return not all(bool(torch.isfinite(grad).all()) for grad in grads)

    def update_scale(self, overflow: bool) -> None:
        """Moves the scale by `mpengine.scaling.next_state`; a static one stays."""
        vote = Vote(layout.OVERFLOW if overflow else layout.CLEAN)
        self.state = next_state(self.state, [vote], self.policy)

    def scale_gradient(self, module: Any, grad_in: Iterable[Tensor], grad_out: Any) -> tuple[Tensor, ...]:
        """Gradients times the scale: a backward hook."""
        return tuple(self.loss_scale * grad for grad in grad_in)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """`backward()` of the loss times the scale, in FP32."""
        (loss.float() * self.loss_scale).backward(retain_graph=retain_graph)


class DynamicLossScaler(LossScaler):
    """A dynamic loss scale, never below 1.

    Args:
        init_scale: The first.
        scale_factor: What it is divided by after an overflow, and multiplied with after `scale_window` clean
            iterations; > 1.
        scale_window: At least 1.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, init_scale: float = 2.0**32, scale_factor: float = 2.0, scale_window: int = 1000) -> None:
        if not scale_factor > 1.0:
            raise ValueError(f"scale_factor is {scale_factor!r}; it must be a number > 1 (2.0 is usual).")
        self.policy = ScalePolicy(scale_factor, 1.0 / scale_factor, scale_window, min_scale=1.0)
        if not 1.0 <= init_scale <= self.policy.max_scale:
            raise ValueError(f"init_scale is {init_scale!r}; it must lie in [1, {self.policy.max_scale:g}].")
        self.state = ScaleState(float(init_scale))
