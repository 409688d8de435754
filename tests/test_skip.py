"""A skipped step changes nothing, bit for bit, and is visible; the next one is as if it had not been."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer, reference
from tests.harness import (
    BRAIN,
    EVERY,
    FUSED,
    HALF,
    SINGLE,
    batch,
    fed,
    feed,
    gradients,
    parameters,
    prepared,
    same_bits,
    snapshot,
    static_scaler,
    train,
)

every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


@every_optimizer
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("taken", [0, 2])
def test_a_skip_changes_nothing_and_is_visible(make, bad, taken):
    params, scaler = parameters(), static_scaler()
    optimizer = MixedPrecisionOptimizer(make(params), scaler)
    for step in range(taken):
        fed(optimizer, scaler, gradients(params, step))
    before = snapshot(optimizer)
    grads = gradients(params, 9)
    grads[4].view(-1)[-1] = bad
    fed(optimizer, scaler, grads)
    assert snapshot(optimizer) == before
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (taken, 1)
    assert optimizer.last_step_skipped
    assert math.isnan(optimizer.last_grad_norm)
    assert optimizer.overflowed_parameters() == ["group 0, parameter 4 of shape (3, 5)"]
    fed(optimizer, scaler, gradients(params, 10))
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (taken + 1, 1)
    assert not optimizer.last_step_skipped
    assert optimizer.last_grad_norm > 0.0


@every_optimizer
@pytest.mark.parametrize("first", [False, True])
def test_the_step_after_a_skip_is_as_if_it_had_not_been(make, first):
    results = []
    for with_skip in (False, True):
        params, scaler = parameters(), static_scaler()
        optimizer = MixedPrecisionOptimizer(make(params), scaler)
        seeds = [-1, 0, 1, 2] if first else [0, 1, -1, 2]
        for seed in seeds if with_skip else [0, 1, 2]:
            grads = gradients(params, abs(seed))
            if seed == -1:
                grads[0][0] = math.inf
            fed(optimizer, scaler, grads)
        results.append(snapshot(optimizer))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("where", ["first", "last", "end of a block", "start of the last block"])
@pytest.mark.parametrize("position", range(3))
def test_an_overflow_in_any_element_of_any_tensor_skips(dtype, where, position):
    sizes = [1, reference.BLOCK + 5, 31]
    params = [nn.Parameter(torch.ones(size, dtype=dtype)) for size in sizes]
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD(params, lr=0.5, momentum=0.9))
    feed(params, [torch.ones_like(p) for p in params])
    optimizer.step()
    before = snapshot(optimizer)
    last = sizes[position] - 1
    blocks = {"end of a block": min(last, reference.BLOCK - 1), "start of the last block": min(last, reference.BLOCK)}
    feed(params, [torch.ones_like(p) for p in params])
    params[position].grad[{"first": 0, "last": last, **blocks}[where]] = math.inf
    optimizer.step()
    assert optimizer.last_step_skipped
    assert snapshot(optimizer) == before
    assert optimizer.overflowed_parameters() == [f"group 0, parameter {position} of shape ({sizes[position]},)"]


@every_optimizer
def test_an_overflow_that_only_the_unscaled_product_has_skips(make):
    """torch's check looks at the scaled gradient alone, and its step then makes the weights infinite."""
    params, scaler = parameters((HALF, SINGLE)), static_scaler(2.0**-120)
    optimizer = MixedPrecisionOptimizer(make(params), scaler)
    before = snapshot(optimizer)
    grads = gradients(params, 0, size=2.0**-122)
    grads[1][0, 0] = 60000.0  # finite, but 60000 * 2^120 is not
    fed(optimizer, scaler, grads)
    assert optimizer.last_step_skipped
    assert snapshot(optimizer) == before
    assert optimizer.overflowed_parameters() == ["group 0, parameter 1 of shape (3, 5)"]
    grads[1][0, 0] = 1.0
    fed(optimizer, scaler, grads)
    assert not optimizer.last_step_skipped


def test_a_norm_beyond_fp32_is_no_overflow():
    """Each gradient is finite, so the step is taken, as torch's would be; clipping to a norm of inf gives zeros."""
    for max_grad_norm in (None, 1.0):
        params, twins = parameters([SINGLE]), parameters([SINGLE])
        optimizer = MixedPrecisionOptimizer(torch.optim.SGD(params, lr=2.0**-110), max_grad_norm=max_grad_norm)
        theirs = torch.optim.SGD(twins, lr=2.0**-110)
        for own in (params, twins):
            feed(own, [torch.full_like(p, 2.0**100) for p in own])
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(twins, max_grad_norm)
        optimizer.step()
        theirs.step()
        assert optimizer.steps_taken == 1
        assert optimizer.last_grad_norm == math.inf
        assert same_bits(params, twins)


def test_nothing_is_counted_before_the_first_step():
    _, optimizer, _ = prepared()
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (0, 0)
    assert not optimizer.last_step_skipped
    assert math.isnan(optimizer.last_grad_norm)
    assert optimizer.overflowed_parameters() == []


def test_overflowed_parameters_have_the_models_names():
    model, optimizer, scaler = prepared()
    train(model, optimizer, scaler, [0])
    loss = model(batch(1)[0]).float().square().mean()
    scaler.scale(loss).backward()
    model[3].weight.grad[1, 2] = math.nan
    model[1].bias.grad[0] = math.inf
    optimizer.step()
    assert optimizer.overflowed_parameters() == ["parameter '1.bias'", "parameter '3.weight'"]
    assert optimizer.overflowed_parameters(0) == optimizer.overflowed_parameters()
    scaler.update()
    optimizer.zero_grad()
    train(model, optimizer, scaler, [2])
    assert optimizer.overflowed_parameters() == ["parameter '1.bias'", "parameter '3.weight'"]  # the last overflow's


def test_an_overflow_of_one_loss_skips_the_whole_step_and_backs_off_its_scale_alone():
    model = nn.Linear(3, 2)
    scaler = GradScaler(init_scale=16.0, num_losses=2)
    optimizer = mpengine.prepare(model, FUSED["momentum"](model.parameters()), scaler)
    before = snapshot(optimizer)
    x = torch.ones(1, 3, dtype=HALF)
    scaler.scale(model(x).sum(), 0).backward()
    scaler.scale(model(x).sum() * math.inf, 1).backward()
    optimizer.step()
    scaler.update()
    assert snapshot(optimizer) == before
    assert (scaler.get_scale(0), scaler.get_scale(1)) == (16.0, 8.0)
    assert optimizer.overflowed_parameters(0) == []
    assert optimizer.overflowed_parameters(1) == ["parameter 'weight'", "parameter 'bias'"]
