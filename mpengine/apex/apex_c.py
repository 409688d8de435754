"""`apex_C`: tensors in one piece of memory, and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

__all__ = ["flatten", "unflatten"]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one new tensor, [sum of numel].

    Args:
        tensors: At least one; of one dtype and device.
    """
    return _flatten_dense_tensors(tensors)


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of `flat`, in the shapes of the tensors.

    Args:
        flat: Of `flatten`.
        tensors: What it was given.
    """
    return _unflatten_dense_tensors(flat, tensors)
