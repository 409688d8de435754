"""amp's loop under DistributedDataParallel, one process: the averages are the gradients, by their own way."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mpengine import amp
from tests.amp.world import DYNAMIC, INF, LEVELS, batch, network
from tests.harness import frozen


@pytest.fixture(autouse=True)
def _group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def trained(level, wrap, iteration):
    model = network()
    model, optimizer = amp.initialize(
        model, torch.optim.Adam(model.parameters(), lr=0.01), opt_level=level, num_losses=2, **DYNAMIC
    )
    model = wrap(model)
    for i in range(4):
        optimizer.zero_grad()
        iteration(model, optimizer, i)
        optimizer.step()
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (3, 1)
    return frozen([list(optimizer.master_params()), amp.state_dict()])


def one_pass(model, optimizer, i, loss_id, **kwargs):
    loss = model(batch(i)).square().mean() * (INF if i == 1 else 1.0)
    with amp.scale_loss(loss, optimizer, loss_id, **kwargs) as scaled:
        scaled.backward()


def two_losses(model, optimizer, i):
    one_pass(model, optimizer, i, 0)
    one_pass(model, optimizer, i, 1)


def accumulated(model, optimizer, i):
    for _ in range(3):
        one_pass(model, optimizer, i, 0)
    if i == 2:
        torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)


def without_sync(model, optimizer, i):
    one_pass(model, optimizer, i, 0)
    with model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
        one_pass(model, optimizer, i, 1, delay_unscale=True)
    one_pass(model, optimizer, i, 1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("iteration", [two_losses, accumulated, without_sync])
def test_it_trains_as_without(level, view, iteration):
    expected = trained(level, lambda model: model, iteration)
    assert trained(level, lambda m: DistributedDataParallel(m, gradient_as_bucket_view=view), iteration) == expected


@pytest.mark.parametrize("level", LEVELS)
def test_a_sum_of_which_a_part_was_never_averaged_is_refused(level):
    model = network()
    model, optimizer = amp.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), opt_level=level, **DYNAMIC)
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        one_pass(wrapped, optimizer, 0, 0)

    def rest():
        one_pass(wrapped, optimizer, 0, 0)
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"with amp\.scale_loss, give all but the last delay_unscale=True"):
        rest()
    assert optimizer.steps_taken == 0


@pytest.mark.parametrize("level", LEVELS)
def test_a_model_that_is_wrapped_already(level):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"is an instance of .*DistributedDataParallel\. Parallel wrappers"):
        amp.initialize(wrapped, optimizer, opt_level=level)
    with pytest.raises(RuntimeError, match="holds, or is held by, an instance of DistributedDataParallel"):
        amp.initialize(model, optimizer, opt_level=level)
    assert wrapped.module is model
