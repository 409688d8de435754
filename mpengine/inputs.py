"""Inputs that stay in one place: nested tensors are copied into static buffers, everything else may not change."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class _Container(NamedTuple):
    """A tuple, list or dict, as far as it must stay the same; its items follow it."""

    kind: type
    keys: tuple[Any, ...]


class _Kind(NamedTuple):
    """A tensor, as far as it must stay the same."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout


class StaticInputs:
    """The arguments of one function, whose tensors lie in buffers that every call refills.

    Args:
        names: Names of positional arguments, for errors; those beyond are numbered.
        args: The arguments of the first call: tensors and plain values, in tuples, lists and dicts.
        kwargs: The same by keyword.
        device: Where the buffers lie. CPU tensors come there from pinned memory.

    Raises:
        TypeError: An argument cannot be followed: a NumPy array, a mapping that is no dict.
        ValueError: A tensor requires grad, is not strided, or lies on another device than this and the CPU.
    """

    def __init__(
        self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
    ) -> None:
        self._names = list(names)
        self._device = device
        found = list(self._items(args, kwargs))
        for path, value in found:
            _check_followed(path, value, device)
        self._expected = [(path, _kind(value)) for path, value in found]
        self._args, self._kwargs = mapped((args, kwargs), self._buffer)
        self._buffers = [value for value in _walk((self._args, self._kwargs)) if isinstance(value, Tensor)]

    def _buffer(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=self._device)

    def _items(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        names = [*self._names, *(f"argument {i}" for i in range(len(self._names), len(args)))][: len(args)]
        yield "the arguments", _Container(tuple, (*names, *_sorted(kwargs)))
        for name, value in zip(names, args, strict=True):
            yield from _items(name, value)
        for name in _sorted(kwargs):
            yield from _items(name, kwargs[name])

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among the arguments, which `fill` takes.

        Raises:
            ValueError: Something is not as at the first call: structure, shape, dtype, device, or a value that is no
                tensor. Nothing has changed then.
        """
        tensors = []
        for (path, expected), (_, value) in zip(self._expected, self._items(args, kwargs), strict=False):
            if not _same(expected, _kind(value)):
                raise ValueError(
                    f"{path}: got {_described(_kind(value))}, where the first call had {_described(expected)}. "
                    + _remedy(expected, _kind(value))
                )
            if isinstance(value, Tensor):
                if value.requires_grad:
                    raise ValueError(_REQUIRES_GRAD.format(path))
                tensors.append(value)
        return tensors

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Copies tensors into the buffers, on the current stream and without waiting; they may be overwritten after."""
        for buffer, tensor in zip(self._buffers, tensors, strict=True):
            if tensor.device.type == "cpu" and buffer.device.type == "cuda":
                # A copy of ours, pinned or not: it is read later, and torch reuses its memory only after that.
                tensor = torch.empty_like(tensor, pin_memory=True).copy_(tensor)
            buffer.copy_(tensor, non_blocking=True)

    def values(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for a call: new containers and aliases of the buffers, so that no `.grad` stays on a buffer."""
        args, kwargs = mapped((self._args, self._kwargs), Tensor.detach)
        return args, kwargs


_REQUIRES_GRAD = "{} requires grad, which a static copy of it cannot pass on: detach it, or require grad inside."
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` with `function` applied to the tensors in its tuples, lists and dicts, which are made anew."""
    if isinstance(value, Tensor):
        return function(value)
    if _is_tuple(value):
        items = [mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, (list, dict)):
        copied = copy.copy(value)
        for key in range(len(value)) if isinstance(value, list) else list(value):
            copied[key] = mapped(value[key], function)
        return copied
    return value


def _sorted(mapping: dict[Any, Any]) -> list[Any]:
    return sorted(mapping, key=repr)


def _is_tuple(value: Any) -> bool:
    return type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields"))


def _walk(value: Any) -> Iterator[Any]:
    return (item for _, item in _items("", value))


def _items(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every container and every value in it, with where it stands."""
    if _is_tuple(value) or isinstance(value, list):
        yield path, _Container(type(value), tuple(range(len(value))))
        for i, item in enumerate(value):
            yield from _items(f"{path}[{i}]", item)
    elif isinstance(value, dict):
        yield path, _Container(type(value), tuple(_sorted(value)))
        for key in _sorted(value):
            yield from _items(f"{path}[{key!r}]", value[key])
    else:
        yield path, value


def _check_followed(path: str, value: Any, device: torch.device) -> None:
    if isinstance(value, np.ndarray):
        raise TypeError(f"{path} is a NumPy array, which cannot be followed: give torch.from_numpy(...) of it.")
    if isinstance(value, Mapping):
        raise TypeError(f"{path} is a {type(value).__name__}, whose tensors cannot be followed: give dict(...) of it.")
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise ValueError(_REQUIRES_GRAD.format(path))
        if value.layout != torch.strided:
            raise ValueError(f"{path} is a {value.layout} tensor; static buffers are dense: give it as .to_dense().")
        if value.device not in (device, torch.device("cpu")):
            raise ValueError(f"{path} lies on {value.device}, the parameters on {device}: move it there.")


def _same(expected: Any, value: Any) -> bool:
    if isinstance(expected, float | complex):
        return type(value) is type(expected) and repr(value) == repr(expected)  # NaN is NaN, and -0.0 is not 0.0
    if isinstance(expected, (_Kind, _Container, *_PLAIN)):
        return type(value) is type(expected) and bool(value == expected)
    return value is expected


def _kind(value: Any) -> Any:
    return _Kind(value.shape, value.dtype, value.device, value.layout) if isinstance(value, Tensor) else value


def _described(value: Any) -> str:
    if isinstance(value, _Kind):
        dtype = str(value.dtype).removeprefix("torch.")
        sparse = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"a {sparse}{dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, _Container):
        return f"a {value.kind.__name__} with {list(value.keys)}"
    return f"the {type(value).__name__} {value!r}" if not isinstance(value, str) else repr(value)


def _remedy(expected: Any, value: Any) -> str:
    if isinstance(expected, _Kind) and isinstance(value, _Kind):
        if value.shape != expected.shape:
            return (
                "A captured iteration has one shape: pad the batch, let the DataLoader drop the last one "
                "(drop_last=True), call the plain function here, or make a second GraphedIteration for this shape."
            )
        return "Convert or move it, or make a second GraphedIteration."
    if isinstance(expected, (_Kind, _Container)) or isinstance(value, (_Kind, _Container)):
        return "Give the same structure in every call, or make a second GraphedIteration."
    return "It is baked in: give what changes as a tensor, or make a second GraphedIteration for this value."
