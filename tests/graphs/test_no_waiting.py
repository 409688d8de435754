"""The host's part of an iteration neither reads the device nor takes its memory: shown without a GPU.

The launchers are recorded instead of run, and every call of torch that comes through Python is looked at: functions and
methods by a TorchFunctionMode, what autograd and torch's functions call by a TorchDispatchMode. Not seen: what a
kernel would do inside, and uploads of tables, which on a CPU are NumPy memory (32 bytes for a gradient; 256 where
losses meet).
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpengine.graphs import GraphedIteration
from tests.graphs.emulator import LAUNCHERS, emulated, launchers
from tests.graphs.worlds import WORLDS, adversaries, batch, zeroing_last

READING_METHODS = {
    *("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__"),
    *("__array__", "__contains__", "equal", "allclose", "is_nonzero", "unique", "masked_select"),
}
READING_OPERATIONS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "allclose"}


class HostRead(Exception):
    """The host would wait here."""


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        # A device by name: as torch.device it is some tensor's own, which here is the CPU's.
        to_cpu = name == "to" and any(isinstance(a, str) for a in (*args[1:], *(kwargs or {}).values()))
        if name in READING_METHODS or to_cpu:
            raise HostRead(name)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Raises at host reads; counts the bytes of new memory, operation by operation."""

    def __init__(self):
        super().__init__()
        self.taken = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in READING_OPERATIONS:
            raise HostRead(name)
        out = func(*args, **(kwargs or {}))
        known = {_memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, Tensor) and _memory(t) not in known]
        self.taken += [(name, t.untyped_storage().nbytes()) for t in new]
        return out


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


@contextlib.contextmanager
def watched():
    """Yields the list of (operation, bytes of new memory)."""
    with _Functions(), _Operations() as operations:
        yield operations.taken


@contextlib.contextmanager
def only_launched():
    """Launchers do nothing but leave their names in the list."""
    names = []
    with launchers(lambda name: lambda *args: names.append(name)):
        yield names


def warm(make):
    """A world after two iterations. On a CPU the watchdog reads at once; on CUDA it does not run in a capture."""
    world = make("cpu")
    world.scaler._watchdog.limit = None
    for i in range(3):
        world.iteration(*batch(i, "cpu"))
    return world


@pytest.mark.parametrize("make", WORLDS, ids=lambda make: make.__name__)
def test_an_iteration_reads_nothing(make):
    world = warm(make)
    with only_launched() as launched:
        for i in range(3):
            inputs = batch(i, "cpu")
            world.optimizer.param_groups[0]["lr"] = 1e-3 / (i + 1)
            with watched():
                world.iteration(*inputs)
    steps = 3 * len(world.optimizers)
    assert launched.count("decide") == steps
    assert set(launched) == set(LAUNCHERS)


def taken_by(make):
    """The operations that take memory in steps and updates of a warm world, and of how many bytes, a call each."""
    world = warm(make)
    found = {"step": [], "update": []}

    def inside(name, function):
        def run(*args, **kwargs):
            with _Operations() as operations:
                function(*args, **kwargs)
            found[name].append(operations.taken)

        return run

    for optimizer in world.optimizers:
        optimizer.step = inside("step", optimizer.step)
    world.scaler.update = inside("update", world.scaler.update)
    with only_launched():
        for i in range(3):
            world.iteration(*batch(i, "cpu"))
    return found


# What unscale_ found holds for the step: a verdict for each loss. Weights that somebody wrote settle with their
# masters, parameter by parameter, each time that they were written.
SMALL = {"two_losses_and_clipping": 32}
SETTLING = {"clipped_weights"}


@pytest.mark.parametrize("make", [m for m in WORLDS if m.__name__ not in SETTLING], ids=lambda m: m.__name__)
def test_step_and_update_take_no_memory(make):
    found = taken_by(make)
    assert len(found["step"]) >= 3
    assert len(found["update"]) >= 3
    for call in found["step"]:
        assert sum(size for _, size in call) <= SMALL.get(make.__name__, 0)
    assert not any(found["update"])


def test_a_replay_reads_nothing_and_takes_nothing():
    """The host's part: hyperparameters are uploaded, inputs copied, versions moved."""
    with emulated() as graphs:
        world = warm(adversaries)
        train = GraphedIteration(world.iteration, world.optimizers)
        for i in range(5):
            train(*batch(i, "cpu"))
        graphs[0].queue.clear()  # its launches run on the CPU, and read
        inputs = batch(6, "cpu")
        for i in range(3):
            world.optimizers[i % 2].param_groups[0]["lr"] = 0.1 / (i + 1)
            world.optimizers[1].max_grad_norm = 1.0 + i
            versions = [p._version for o in world.optimizers for group in o.param_groups for p in group["params"]]
            with watched() as taken:
                train(*inputs)
            now = [p._version for o in world.optimizers for group in o.param_groups for p in group["params"]]
            assert all(b == a + 1 for a, b in zip(versions, now, strict=True))
            assert [name for name, size in taken if size > 0 and name != "detach"] == []
        assert train.replays == 5


SABOTAGE = {
    "item": lambda loss: loss.item(),
    "branch": lambda loss: 1 if loss > 0 else 0,
    "float": lambda loss: float(loss),
    "print": lambda loss: f"{loss.detach()}",
    "list": lambda loss: loss.tolist(),
    "numpy": lambda loss: loss.detach().numpy(),
    "cpu": lambda loss: loss.cpu(),
    "to cpu": lambda loss: loss.to("cpu"),
    "index": lambda loss: loss.expand(3)[loss.expand(3) > 0],
    "nonzero": lambda loss: torch.nonzero(loss),
    "equal": lambda loss: torch.equal(loss, loss),
}


@pytest.mark.parametrize("name", SABOTAGE)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_host_read_would_be_noticed(name, where):
    world = warm(zeroing_last)
    model = world.model
    if where == "forward":
        model.register_forward_hook(lambda module, args, out: (SABOTAGE[name](out.sum()), out)[1])
    else:
        model[0].register_full_backward_hook(lambda module, grads, out: (SABOTAGE[name](out[0].sum()), None)[1])
    with only_launched(), pytest.raises(HostRead), watched():
        world.iteration(*batch(0, "cpu"))


def test_a_read_in_a_step_would_be_noticed():
    world = warm(zeroing_last)
    world.optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.steps_taken)
    with only_launched(), pytest.raises(HostRead), watched():
        world.iteration(*batch(0, "cpu"))


@pytest.mark.parametrize("make", [torch.empty, torch.zeros], ids=["empty", "zeros"])
def test_memory_that_a_step_takes_would_be_noticed(make):
    def greedy(device):
        world = zeroing_last(device)
        world.optimizer.register_step_pre_hook(lambda *_: (make(1000), None)[1])
        return world

    assert all(sum(size for _, size in call) == 4000 for call in taken_by(greedy)["step"])
