"""The one place that chooses who executes a step: `mpengine.cpu` on a CPU, the Triton kernels on CUDA."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch

from mpengine import cpu

_cpu_module: ModuleType = cpu


def of(device: torch.device) -> ModuleType:
    """The module with `inspect`, `decide`, `update` and `update_scale` for tensors on `device`.

    Raises:
        ImportError: The device is CUDA and Triton is not installed.
        ValueError: No backend exists for the device.
    """
    if device.type == "cpu":
        return _cpu_module
    if device.type == "cuda":
        return _kernels()
    raise ValueError(f"mpengine runs on cpu and cuda; a parameter lies on {device}. Move the model first.")


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Runs CPU tensors through the Triton kernels for the duration. Needs TRITON_INTERPRET=1 from the start."""
    global _cpu_module
    before, _cpu_module = _cpu_module, _kernels()
    try:
        yield
    finally:
        _cpu_module = before


def _kernels() -> ModuleType:
    try:
        return importlib.import_module("mpengine.kernels.launch")
    except ImportError as error:
        raise ImportError(
            f"the CUDA path needs Triton, which could not be imported ({error}): pip install triton"
        ) from error
