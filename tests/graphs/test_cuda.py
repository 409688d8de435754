"""What only a GPU can show of graphs; that they are bitwise the plain function, the other files show there as well."""

import warnings

import pytest
import torch

from mpengine import capture, upload
from mpengine.graphs import GraphedIteration
from tests.graphs.worlds import WORLDS, adversaries, batch, seen, with_dropout, zeroing_last

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def graphed(make, calls=4):
    world = make("cuda")
    train = GraphedIteration(world.iteration, world.optimizers)
    for i in range(calls):
        train(*batch(i, "cuda"))
    assert train.captures == (calls > 3)
    return world, train


def sync_debug_mode(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("make", WORLDS, ids=lambda make: make.__name__)
def test_a_replay_never_waits_for_the_device(make):
    world, train = graphed(make)
    given = [batch(i, "cuda") for i in range(5)]
    train(*given[0])
    torch.cuda.synchronize()
    sync_debug_mode("error")
    try:
        for i, inputs in enumerate(given):
            for optimizer in world.optimizers:
                optimizer.param_groups[0]["lr"] = 1e-3 / (i + 1)
                optimizer.max_grad_norm = 1.0 + i
            train(*inputs)
    finally:
        sync_debug_mode("default")
    assert train.replays == 7


def test_inputs_from_the_cpu_never_wait_for_the_device():
    world = zeroing_last("cuda")
    train = GraphedIteration(world.iteration, world.optimizer)
    for i in range(5):
        train(*batch(i, "cpu"))
    sync_debug_mode("error")
    try:
        for i in range(5):
            train(*batch(i, "cpu"))
    finally:
        sync_debug_mode("default")
    assert train.captures == 1


def test_a_pinned_input_may_be_overwritten_at_once():
    results = []
    for pinned in (False, True):
        world = zeroing_last("cuda")
        train = GraphedIteration(world.iteration, world.optimizer)
        x, y = (tensor.pin_memory() if pinned else tensor for tensor in batch(0, "cpu"))
        for i in range(20):
            torch.cuda._sleep(10_000_000)  # the device is behind
            for mine, new in zip((x, y), batch(i, "cpu"), strict=True):
                mine.copy_(new)
            train(x, y)
            x.fill_(torch.nan)
        results.append(seen(world))
    assert results[0] == results[1]


def test_a_replay_takes_no_memory():
    _, train = graphed(adversaries, calls=6)
    inputs = batch(0, "cuda")
    train(*inputs)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        train(*inputs)
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.parametrize("read", [lambda t: t.item(), lambda t: t.cpu(), lambda t: 1 if t > 0 else 0, torch.nonzero])
def test_a_host_read_is_refused_with_its_place_and_training_goes_on(read):
    world = zeroing_last("cuda")

    def iteration(x, y):
        loss = world.iteration(x, y)
        read(loss.detach())
        return loss

    train = GraphedIteration(iteration, world.optimizer)
    for i in range(3):
        train(*batch(i, "cuda"))
    before = seen(world)
    with pytest.raises(RuntimeError, match=r"it waits for the device at .*test_cuda\.py:\d+"):
        train(*batch(3, "cuda"))
    assert seen(world) == before
    train(*batch(3, "cuda"))
    assert seen(world) != before
    assert train.captures == 0


def test_dropout_goes_on_where_the_generator_is():
    world, train = graphed(with_dropout, calls=5)
    x, y = batch(0, "cuda")
    world.optimizer.param_groups[0]["lr"] = 0.0
    world.optimizer.param_groups[0]["weight_decay"] = 0.0
    first, second = train(x, y).clone(), train(x, y).clone()
    assert not torch.equal(first, second)
    torch.cuda.manual_seed(7)
    third = train(x, y).clone()
    torch.cuda.manual_seed(7)
    assert torch.equal(third, train(x, y))


def test_staging_buffers_live_as_long_as_their_graph():
    _, train = graphed(adversaries, calls=5)
    kept = train._recorded._graph._kept
    assert kept
    assert all(tensor.is_pinned() for tensor in kept)
    assert upload._kept is None
    del train
    assert any(parked is kept for _, parked in capture._parked)
    torch.cuda.synchronize()
    graphed(zeroing_last)
    assert not any(parked is kept for _, parked in capture._parked)


def test_a_replay_is_in_order_with_the_current_stream():
    """Inputs that the stream has yet to compute, and outputs that it reads next."""
    results = []
    for slow in (False, True):
        world = zeroing_last("cuda")
        train = GraphedIteration(world.iteration, world.optimizer)
        losses = []
        for i in range(10):
            x, y = batch(i, "cuda")
            if slow:
                torch.cuda._sleep(10_000_000)
            losses.append(train(x * 2, y + 1) * 1)
            del x, y
        results.append([loss.item() for loss in losses])
    assert results[0] == results[1]
