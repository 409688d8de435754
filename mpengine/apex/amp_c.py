"""`amp_C`: those of apex's functions over lists of tensors that scripts called themselves, in torch.

Each sets `noop_flag` (of one element, any dtype) to 1 where what it reads is not finite, and computes all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["multi_tensor_axpby", "multi_tensor_l2norm", "multi_tensor_scale"]

Lists = Sequence[Sequence[Tensor]]


@torch.no_grad()
def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float) -> None:
    """Writes input * scale, computed in FP32, to the outputs.

    Args:
        chunk_size: Without effect.
        noop_flag: Set to 1 where an input is not finite.
        tensor_lists: Inputs and outputs, which may be of other dtypes, or the same tensors.
        scale: The factor.
    """
    inputs, outputs = tensor_lists
    _flag(noop_flag, inputs)
    for value, out in zip(inputs, outputs, strict=True):
        out.copy_(value.float() * scale)


@torch.no_grad()
def multi_tensor_axpby(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, a: float, b: float, arg_to_check: int = -1
) -> None:
    """Writes a * x + b * y, computed in FP32, to the outputs.

    Args:
        chunk_size: Without effect.
        noop_flag: Set to 1 where what is checked is not finite.
        tensor_lists: x, y and outputs.
        a: The factor of x.
        b: The factor of y.
        arg_to_check: 0: x is checked, 1: y, -1: both.
    """
    xs, ys, outputs = tensor_lists
    if arg_to_check in (-1, 0):
        _flag(noop_flag, xs)
    if arg_to_check in (-1, 1):
        _flag(noop_flag, ys)
    for x, y, out in zip(xs, ys, outputs, strict=True):
        out.copy_(a * x.float() + b * y.float())


@torch.no_grad()
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The Euclidean norm of all tensors as one vector, in FP32.

    Args:
        chunk_size: Without effect.
        noop_flag: Set to 1 where a tensor is not finite.
        tensor_lists: One list.
        per_tensor: Whether the norm of each tensor is wanted, too.

    Returns:
        float32[1], and the norm of each tensor, float32[number of tensors], or float32[0] where not wanted.
    """
    (tensors,) = tensor_lists
    _flag(noop_flag, tensors)
    each = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    norms = torch.stack(each) if each else torch.zeros(0, device=noop_flag.device)
    return torch.linalg.vector_norm(norms).reshape(1), norms if per_tensor else norms[:0]


def _flag(noop_flag: Tensor, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        bad = torch.isfinite(tensor).all().logical_not()
        noop_flag.masked_fill_(bad.to(noop_flag.device), 1)
