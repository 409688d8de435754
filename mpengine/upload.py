"""NumPy tables on their way to the device: from pinned memory, without a sync, and only where they changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_kept: list[Tensor] | None = None  # staging buffers that the graph being captured reads again at every replay
_for_ever: list[Tensor] = []  # those of graphs that nobody owns


@contextmanager
def staging(kept: list[Tensor]) -> Iterator[None]:
    """While a graph is captured: the staging buffers of its uploads go to `kept`, to live as long as the graph."""
    global _kept
    before, _kept = _kept, kept
    try:
        yield
    finally:
        _kept = before


def is_capturing(device: torch.device) -> bool:
    """Whether what is done now on this device becomes part of a CUDA graph."""
    return _kept is not None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _staged(table: np.ndarray, device: torch.device) -> Tensor:
    """`table` in memory that a copy to the device does not wait for; torch reuses it only after the copy."""
    host = torch.from_numpy(table)
    if device.type == "cuda":
        host = host.pin_memory()
        if is_capturing(device):
            (_for_ever if _kept is None else _kept).append(host)
    return host


def to_device(table: np.ndarray, device: torch.device) -> Tensor:
    """A new tensor on the device. On a CPU it is the array's own memory."""
    return _staged(table, device).to(device, non_blocking=True)


class Mirror:
    """A tensor on the device that follows a NumPy array, in the same memory as long as the shape stays.

    So a CUDA graph that reads it sees what is uploaded between replays. What is uploaded during a capture happens at
    every replay.

    Args:
        device: Where the tensor lies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensor: Tensor | None = None
        self._known: bytes | None = None

    def follow(self, table: np.ndarray) -> Tensor:
        """Uploads `table` if it is not what the device has. The array may be written again afterwards."""
        content = table.tobytes()
        if self._tensor is None or self._tensor.shape != table.shape:
            self._tensor = to_device(table.copy(), self._device)
        elif content != self._known:
            self._tensor.copy_(_staged(table, self._device), non_blocking=True)
        else:
            return self._tensor
        self._known = None if is_capturing(self._device) else content  # a capture executes nothing
        return self._tensor
