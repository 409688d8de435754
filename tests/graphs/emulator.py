"""A CUDA graph on a CPU: records what an iteration queues, and runs it again without its Python.

It keeps to a graph's rules as far as the host could tell: the same memory is read and written at every replay, values
that Python computed are baked in, nobody is told that tensors were written, a host read breaks the capture off. Two
things differ: an operation must run to be recorded, so the capture is itself the first replay (undone where it fails);
and memory that a graph would use again is left alone, so only stale values are found, not dangling ones.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mpengine import backend, capture, upload
from mpengine.sources import SourceTable

LAUNCHERS = ("inspect", "decide", "update", "update_scale")


class EmulatedGraph(TorchDispatchMode):
    """What `capture.make_graph` gives for the CPU within `emulated`."""

    executes_later = True

    def __init__(self):
        super().__init__()
        self._module = backend.of(torch.device("cpu"))  # the reference, or the interpreted kernels
        self.queue = []  # (function, its arguments, its results)
        self.launches = []  # the names of the kernels among them
        self._before = {}  # memory that the recording has written, as it was
        self._launching = False
        self._replayed = True

    def record(self, call):
        try:
            with upload.staging([]), self, launchers(self._recorded):
                outputs = call()
        except BaseException:
            for written, before in self._before.values():
                written.copy_(before)
            raise
        finally:
            self._before.clear()
        self._replayed = False
        return outputs

    def replay(self):
        if not self._replayed:  # the recording was it
            self._replayed = True
            return
        for function, args, kwargs, results in self.queue:
            again = function(*args, **kwargs)
            taken = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for result, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(result, Tensor) and _memory(result) not in taken:
                    result.copy_(new)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._launching:
            return func(*args, **kwargs)
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._save(tree_leaves(value))
        out = func(*args, **kwargs)
        self.queue.append((func, _silent(args), _silent(kwargs), _silent(out)))
        return out

    def _recorded(self, name):
        launcher = getattr(self._module, name)

        def record(*args):
            args = tuple(_frozen(arg) for arg in args)
            self._launching = True
            try:
                self._save(_reached(args))
                launcher(*args)
            finally:
                self._launching = False
            self.queue.append((launcher, args, {}, None))
            self.launches.append(name)

        return record

    def _save(self, tensors):
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._before.setdefault(_memory(tensor), (_whole(tensor), _whole(tensor).clone()))


@contextlib.contextmanager
def emulated():
    """GraphedIterations record and replay on the CPU for the duration; yields the list of their graphs."""
    made, original = [], capture.make_graph

    def make_graph(device, pool):
        made.append(EmulatedGraph())
        return made[-1]

    capture.make_graph = make_graph
    try:
        yield made
    finally:
        capture.make_graph = original


@contextlib.contextmanager
def launchers(make):
    """`make(name)` takes the place of each launcher on the CPU."""
    before = backend._cpu_module
    backend._cpu_module = SimpleNamespace(**{name: make(name) for name in LAUNCHERS})
    try:
        yield
    finally:
        backend._cpu_module = before


def _silent(value):
    """The same memory, whose writers move no version counter."""
    return tree_map(lambda t: t.data if isinstance(t, Tensor) else t, value)


def _frozen(value):
    """A launch's argument as it is now: the tables are changed for the next one, their memory stays."""
    if isinstance(value, Tensor):
        return value.data
    if not hasattr(value, "entries"):
        return value
    frozen = copy.copy(value)
    if isinstance(value, SourceTable):
        frozen._entries = [list(entry) for entry in value.entries]
        return frozen
    frozen.entries = [
        dataclasses.replace(e, param=e.param.data, master=e.master.data, slots=tuple(slot.data for slot in e.slots))
        for e in value.entries
    ]
    return frozen


def _reached(args):
    for arg in args:
        if hasattr(arg, "entries"):
            yield from (value for value in vars(arg).values() if isinstance(value, Tensor))
            for entry in arg.entries:
                if dataclasses.is_dataclass(entry):
                    yield from (entry.param, entry.master, *entry.slots)
        else:
            yield arg


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


def _whole(tensor):
    """All bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
