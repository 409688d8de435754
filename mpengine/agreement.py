"""Whether parameters are as they were left: nobody wrote them, nobody moved them. One look at all of them is cheap."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

_version = attrgetter("_version")


class _Noted(dict[str, Any]):
    """A parameter's state in the optimizer, a dict like any other; whoever puts something else into it is noticed."""

    def __init__(self, content: dict[str, Any], agreement: Agreement) -> None:
        super().__init__(content)
        self._agreement = agreement

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _noting(name: str) -> Any:
    change = getattr(dict, name)

    def method(self: _Noted, *args: Any, **kwargs: Any) -> Any:
        self._agreement.epoch += 1
        return change(self, *args, **kwargs)

    return functools.wraps(change)(method)


for _name in ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update"):
    setattr(_Noted, _name, _noting(_name))


def noted(state: dict[str, Any], agreement: Agreement) -> dict[str, Any]:
    """The state of a parameter in a dict that starts a new epoch of `agreement` when somebody changes it.

    Copies of it, pickled ones too, are plain dicts.
    """
    return state if is_noted(state, agreement) else _Noted(state, agreement)


def is_noted(state: Any, agreement: Agreement) -> bool:
    """Whether `noted` has made it."""
    return isinstance(state, _Noted) and state._agreement is agreement


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where and how a tensor lies in memory: `.to(memory_format=...)` and `.data = ...` change it."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class Agreement:
    """Which parameters agree with their masters: those that are as they were when they were marked.

    Attributes:
        epoch: Another number after every change but `written`.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self._places: dict[Tensor, int] = {}
        self._params: list[Tensor] = []
        self._versions: list[int] = []
        self._memory: list[tuple[Any, ...]] = []
        self._doubtful: set[int] = set()
        self._unknown: set[int] = set()
        self._pointers: list[int] = []  # of _memory, to compare all at once
        # Kept until the next look: no other memory may get its address meanwhile, and pass for it.
        self._storages: list[torch.UntypedStorage | None] = []

    def mark(self, params: Iterable[Tensor]) -> None:
        """These agree, as they are."""
        for param in params:
            place = self._place(param)
            self._versions[place], self._memory[place] = param._version, memory_of(param)
            self._pointers[place], self._storages[place] = param.data_ptr(), param.untyped_storage()
            self._doubtful.discard(place)
            self._unknown.discard(place)
        self.epoch += 1

    def doubt(self, param: Tensor) -> None:
        """This one is to be compared with its master, whether somebody writes it or not."""
        place = self._place(param)
        self._doubtful.add(place)
        self._unknown.discard(place)
        self.epoch += 1

    def forget(self, param: Tensor) -> None:
        """Nothing is known of this one any more."""
        self._unknown.add(self._place(param))
        self.epoch += 1

    def __contains__(self, param: Tensor) -> bool:
        """Whether this one has been marked or doubted, and not forgotten."""
        return self._places.get(param, -1) not in self._unknown | {-1}

    def holds(self, param: Tensor) -> bool:
        """Whether this one agrees."""
        if param not in self or self._places[param] in self._doubtful:
            return False
        place = self._places[param]
        return self._versions[place] == param._version and self._memory[place] == memory_of(param)

    def holds_all(self) -> bool:
        """Whether every one agrees, as far as versions and addresses tell: not another shape in the same memory."""
        if self._doubtful or self._unknown or list(map(_version, self._params)) != self._versions:
            return False
        return list(map(Tensor.data_ptr, self._params)) == self._pointers

    def written(self, params: Sequence[Tensor]) -> None:
        """We wrote these, which agreed, where they lie: they agree again."""
        if len(params) == len(self._params):
            self._versions = list(map(_version, self._params))
        else:
            for param in params:
                self._versions[self._places[param]] = param._version

    def _place(self, param: Tensor) -> int:
        place = self._places.setdefault(param, len(self._params))
        if place == len(self._params):
            self._params.append(param)
            self._versions.append(0)
            self._memory.append(())
            self._pointers.append(0)
            self._storages.append(None)
        return place
