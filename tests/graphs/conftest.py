"""A test that asks for a device runs three times.

On a CPU, where the iteration runs again in place of a graph; on a CPU by an emulated graph, which replays recorded
operations; and, where there is one, on a GPU.
"""

import contextlib

import pytest
import torch

from tests.graphs.emulator import emulated

AGAIN = pytest.param("again", id="cpu")
EMULATED = pytest.param("emulated", id="emulated")
CUDA = pytest.param(
    "cuda",
    id="cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


def _device(name):
    with emulated() if name == "emulated" else contextlib.nullcontext():
        yield "cuda" if name == "cuda" else "cpu"


@pytest.fixture(params=[AGAIN, EMULATED, CUDA])
def device(request):
    """The device that a test runs on, "cpu" or "cuda"."""
    yield from _device(request.param)


@pytest.fixture(params=[EMULATED, CUDA])
def captured(request):
    """The same, only where something is captured."""
    yield from _device(request.param)
