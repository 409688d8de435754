"""Tensors in nested containers: change each of them, find all of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def mapped(change: Callable[[Tensor], Tensor], value: Any, other: Callable[[Any], Any] | None = None) -> Any:
    """The value with `change` applied to its tensors.

    Tuples (named ones too), lists, mappings of any class and dataclasses are copied with what they hold.

    Args:
        change: What becomes of a tensor.
        value: Anything.
        other: What becomes of what is neither a tensor nor a tuple, list or mapping, if it is not None that comes
            back; dataclasses are asked first. None: the rest stays as it is.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        parts = [mapped(change, part, other) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        return _like(value, {key: mapped(change, part, other) for key, part in value.items()})
    changed = None if other is None else other(value)
    if changed is None and dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):  # a frozen one is written too: nobody else has it yet
                object.__setattr__(changed, field.name, mapped(change, getattr(value, field.name), other))
    return value if changed is None else changed


def _like(value: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """A mapping of the class of `value`: a written copy, for entries of transformers' outputs are attributes too."""
    if type(value) is dict or not hasattr(value, "__setitem__"):
        return parts
    changed: Any = copy.copy(value)
    for key, part in parts.items():
        changed[key] = part
    return changed


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The value with its floating-point tensors in `dtype`; an object with a `.to` of its own casts itself."""

    def change(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def by_itself(part: Any) -> Any:
        return part.to(dtype) if callable(getattr(part, "to", None)) and not isinstance(part, nn.Module) else None

    return mapped(change, value, by_itself)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
