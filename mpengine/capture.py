"""What a device offers for capturing an iteration: a CUDA graph, or on a CPU the iteration itself again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from mpengine import upload


class Graph(Protocol):
    """An iteration that can be run again.

    Attributes:
        executes_later: Whether `record` only records; then Python does not run in `replay`.
    """

    executes_later: bool

    def record(self, call: Callable[[], Any]) -> Any:
        """Calls `call` and records what it queues; returns its result."""

    def replay(self) -> Any:
        """Runs on the current stream what was recorded; returns the result where `record` had none yet."""


class Repetition:
    """Stands for a graph where there is no GPU: calls again."""

    executes_later = False

    def record(self, call: Callable[[], Any]) -> None:
        """Remembers the call."""
        self._call = call

    def replay(self) -> Any:
        """Calls."""
        return self._call()


class CudaGraph:
    """A CUDA graph, and the staging buffers that it reads again at every replay.

    Args:
        device: A CUDA device.
        pool: The memory pool to record into; None: one of its own.
    """

    executes_later = True

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._kept: list[Tensor] = []
        self._device, self._pool = device, pool
        self._graph = torch.cuda.CUDAGraph()
        self._done = torch.cuda.Event()  # the last replay

    def record(self, call: Callable[[], Any]) -> Any:
        """Captures on the capture stream. Where that fails nothing has run, and the stream is the caller's again."""
        _parked[:] = [(done, kept) for done, kept in _parked if not done.query()]
        stream = _capture_stream(self._device)
        try:
            # The outer context ends even where capture_end raises, of which torch.cuda.graph does not take care.
            with torch.cuda.stream(stream), upload.staging(self._kept):
                mode = "thread_local"  # "global" would forbid the threads of a DataLoader to pin memory meanwhile
                with torch.cuda.graph(self._graph, pool=self._pool, stream=stream, capture_error_mode=mode):
                    return call()
        except BaseException:
            _failed.append(self._graph)
            raise

    def replay(self) -> None:
        """One launch."""
        self._graph.replay()
        self._done.record(torch.cuda.current_stream(self._device))

    def __del__(self) -> None:
        if self._kept:
            _parked.append((self._done, self._kept))  # a replay under way may read them yet


_parked: list[tuple[torch.cuda.Event, list[Tensor]]] = []  # dropped before the next capture, once their event is over
# torch's allocator goes on asking a capture that could not be ended about every block: it must not go away.
_failed: list[torch.cuda.CUDAGraph] = []
_streams: dict[torch.device, torch.cuda.Stream] = {}


def make_graph(device: torch.device, pool: Any) -> Graph:
    """What records an iteration on this device."""
    return CudaGraph(device, pool) if device.type == "cuda" else Repetition()


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: a pool that graphs share has its memory by streams."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


@contextlib.contextmanager
def on_capture_stream(device: torch.device) -> Iterator[None]:
    """Runs on the stream of captures what comes after the current stream's work and before what follows there."""
    if device.type != "cuda":
        yield
        return
    current, stream = torch.cuda.current_stream(device), _capture_stream(device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextlib.contextmanager
def host_reads(device: torch.device) -> Iterator[list[str]]:
    """Collects where the host waits for the device, as "file:line"; nothing where the user watches it himself."""
    found: list[str] = []
    if device.type != "cuda" or torch.cuda.get_sync_debug_mode() != 0:
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            found.append(f"{warning.filename}:{warning.lineno}")
        elif "Synchronization debug mode is a prototype" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
