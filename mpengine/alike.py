"""Whether tensors are of the kind that others were; one call for all of them, since a step asks about every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Alike:
    """Remembers class, dtype, device, shape and strides of tensors, not the tensors.

    torch.compile's guards compare them natively, at 50 ns a tensor. They also look at `requires_grad` and at the modes
    that are on, so that equal tensors may be called different. Where torch has no such guards, Python compares.

    Args:
        tensors: Dense ones.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        try:
            guards: Any = torch._C._dynamo.guards.TensorGuards
            self._check = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check  # none is dynamic
        except (AttributeError, TypeError):
            self._check = _Compared(tensors).check

    def holds(self, tensors: Sequence[Any]) -> bool:
        """Whether these are of the same kinds, one by one; what is no tensor is not."""
        return len(tensors) == self._count and (self._count == 0 or self._check(*tensors))


class _Compared:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kinds = list(map(_kind, tensors))

    def check(self, *tensors: Any) -> bool:
        return list(map(_kind, tensors)) == self._kinds


def _kind(tensor: Any) -> tuple[Any, ...]:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        return (type(tensor),)
    return type(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride()
