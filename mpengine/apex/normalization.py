"""`apex.normalization`: apex's layers over torch's functions, for any mixture of fp16 and FP32 inputs and weights.

They compute in FP32 inside. `memory_efficient`, which let apex keep the output in place of the input, has no effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "FusedLayerNorm",
    "FusedRMSNorm",
    "MixedFusedLayerNorm",
    "MixedFusedRMSNorm",
    "fused_layer_norm",
    "fused_layer_norm_affine",
    "fused_rms_norm",
    "fused_rms_norm_affine",
    "manual_rms_norm",
    "mixed_dtype_fused_layer_norm_affine",
    "mixed_dtype_fused_rms_norm_affine",
]

Shape = int | Sequence[int]


def fused_layer_norm(
    input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """`torch.nn.functional.layer_norm` without weights, in the input's dtype; under autocast in autocast's."""
    return _normalized(F.layer_norm, input, normalized_shape, (None, None), eps, input.dtype)


def fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """`torch.nn.functional.layer_norm` in the input's dtype; under autocast in autocast's."""
    return _normalized(F.layer_norm, input, normalized_shape, (weight, bias), eps, input.dtype)


def mixed_dtype_fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """`torch.nn.functional.layer_norm` in the weight's dtype; under autocast in autocast's."""
    return _normalized(F.layer_norm, input, normalized_shape, (weight, bias), eps, weight.dtype)


def fused_rms_norm(input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False) -> Tensor:
    """`torch.nn.functional.rms_norm` without a weight, in the input's dtype; under autocast in autocast's."""
    return _normalized(F.rms_norm, input, normalized_shape, (None,), eps, input.dtype)


def fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """`torch.nn.functional.rms_norm` in the input's dtype; under autocast in autocast's."""
    return _normalized(F.rms_norm, input, normalized_shape, (weight,), eps, input.dtype)


def mixed_dtype_fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """`torch.nn.functional.rms_norm` in the weight's dtype; under autocast in autocast's."""
    return _normalized(F.rms_norm, input, normalized_shape, (weight,), eps, weight.dtype)


def manual_rms_norm(input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float) -> Tensor:
    """RMS normalisation in the weight's dtype, or in the input's without one."""
    dtype = input.dtype if weight is None else weight.dtype
    return _normalized(F.rms_norm, input, normalized_shape, (weight,), eps, dtype)


def _normalized(
    function: Callable[..., Tensor],
    input: Tensor,
    normalized_shape: Shape,
    params: tuple[Tensor | None, ...],
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """`function`, computed in FP32 and rounded once, to `dtype` or to autocast's.

    Where all dtypes are one, torch's kernels compute in FP32 by themselves; of several, not all devices take a mixture.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if any(param is not None and param.dtype != input.dtype for param in params):
        input, params = input.float(), tuple(None if param is None else param.float() for param in params)
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    return function(input, shape, *params, eps).to(dtype)


class FusedLayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` whose output has the input's dtype, whatever the weights have.

    Args:
        normalized_shape: As torch's.
        eps: As torch's.
        elementwise_affine: As torch's.
        memory_efficient: Without effect.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, input: Tensor) -> Tensor:
        """Normalises over the last dimensions; any floating dtype in, the same out (under autocast, autocast's)."""
        params = (self.weight, self.bias)
        return _normalized(F.layer_norm, input, self.normalized_shape, params, self.eps, input.dtype)


class FusedRMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` whose output has the input's dtype, whatever the weight has; eps is 1e-5 by default.

    Args:
        normalized_shape: As torch's.
        eps: As torch's.
        elementwise_affine: As torch's.
        memory_efficient: Without effect.
    """

    eps: float

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine)
        self.memory_efficient = memory_efficient

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over the last dimensions; any floating dtype in, the same out (under autocast, autocast's)."""
        return _normalized(F.rms_norm, x, self.normalized_shape, (self.weight,), self.eps, x.dtype)


class MixedFusedLayerNorm(FusedLayerNorm):
    """`FusedLayerNorm` whose output has the weights' dtype.

    Args:
        normalized_shape: As torch's.
        eps: As torch's.
        memory_efficient: Without effect.
        elementwise_affine: Only True.

    Raises:
        RuntimeError: `elementwise_affine` is False: without weights there is no dtype of theirs.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        *,
        memory_efficient: bool = False,
        elementwise_affine: bool = True,
    ) -> None:
        _check_affine(self, elementwise_affine, FusedLayerNorm)
        super().__init__(normalized_shape, eps, True, memory_efficient)

    def forward(self, input: Tensor) -> Tensor:
        """Normalises over the last dimensions; any floating dtype in, the weights' out (under autocast, autocast's)."""
        params = (self.weight, self.bias)
        return _normalized(F.layer_norm, input, self.normalized_shape, params, self.eps, self.weight.dtype)


class MixedFusedRMSNorm(FusedRMSNorm):
    """`FusedRMSNorm` whose output has the weight's dtype.

    Args:
        normalized_shape: As torch's.
        eps: As torch's.
        memory_efficient: Without effect.
        elementwise_affine: Only True.

    Raises:
        RuntimeError: `elementwise_affine` is False: without a weight there is no dtype of its.
    """

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        *,
        memory_efficient: bool = False,
        elementwise_affine: bool = True,
    ) -> None:
        _check_affine(self, elementwise_affine, FusedRMSNorm)
        super().__init__(normalized_shape, eps, True, memory_efficient)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over the last dimensions; any floating dtype in, the weight's out (under autocast, autocast's)."""
        return _normalized(F.rms_norm, x, self.normalized_shape, (self.weight,), self.eps, self.weight.dtype)


def _check_affine(layer: nn.Module, elementwise_affine: bool, instead: type[nn.Module]) -> None:
    if not elementwise_affine:
        raise RuntimeError(
            f"{type(layer).__name__} does not support elementwise_affine=False: its output has the weights' dtype. Use "
            f"{instead.__name__}."
        )
