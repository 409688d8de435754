"""The step of `MixedPrecisionOptimizer`: clipping, unscaling, who may drive it, and the memory it holds."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer
from tests.harness import (
    BRAIN,
    EVERY,
    FUSED,
    GENERAL,
    HALF,
    SINGLE,
    batch,
    fed,
    feed,
    frozen,
    gradients,
    parameters,
    prepared,
    same_bits,
    snapshot,
    started,
    static_scaler,
    train,
    twins_of,
)

every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
one_of_each_path = pytest.mark.parametrize("make", [FUSED["adam"], GENERAL["Adamax"]], ids=["fused", "general"])


# Clipping and unscaling.


def test_the_norm_is_that_of_the_unscaled_gradient():
    params, scaler = parameters(), static_scaler(1024.0)
    optimizer = MixedPrecisionOptimizer(FUSED["sgd"](params), scaler)
    grads = gradients(params, 0)
    fed(optimizer, scaler, grads)
    exact = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads)) / 1024.0
    assert optimizer.last_grad_norm == pytest.approx(exact, rel=2**-22)


@one_of_each_path
def test_max_grad_norm_may_change_between_steps(make):
    """Clipping by a power of two is exact: the same bits as with gradients that are smaller by it.

    At a norm of 64 the formula's 1e-6 is less than half a ULP.
    """
    params, small = parameters([HALF, SINGLE]), parameters([HALF, SINGLE])
    ours, other = MixedPrecisionOptimizer(make(params)), MixedPrecisionOptimizer(make(small))
    assert ours.max_grad_norm is None
    grad = torch.zeros(7)
    grad[2] = 64.0
    for limit, factor in ((None, 1.0), (16.0, 0.25), (32.0, 0.5), (100.0, 1.0), (math.inf, 1.0)):
        ours.max_grad_norm = limit
        params[0].grad, small[0].grad = grad.half(), grad.half() * factor
        ours.step()
        other.step()
        assert ours.last_grad_norm == 64.0
        assert snapshot(ours) == snapshot(other)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, True, "1.0"])
def test_max_grad_norm_must_be_positive(value):
    params = parameters()
    with pytest.raises(ValueError, match=f"max_grad_norm is {value!r}; it must be a number > 0, or None"):
        MixedPrecisionOptimizer(FUSED["sgd"](params), max_grad_norm=value)
    optimizer = MixedPrecisionOptimizer(FUSED["sgd"](params), max_grad_norm=2.0)
    with pytest.raises(ValueError, match=f"max_grad_norm is {value!r}"):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm == 2.0


def halved_in_place(params):
    for param in params:
        param.grad.mul_(0.5)


def halved_by_replacement(params):
    for param in params:
        param.grad = param.grad * 0.5


@every_optimizer
@pytest.mark.parametrize("edit", [halved_in_place, halved_by_replacement])
@pytest.mark.parametrize("on", ["parameters", "masters"])
def test_edits_after_unscale_take_effect(make, edit, on):
    params, scaler = parameters((HALF, SINGLE)), static_scaler(64.0)
    optimizer = MixedPrecisionOptimizer(make(params), scaler)
    other, plain = parameters((HALF, SINGLE)), static_scaler(128.0)
    reference_run = MixedPrecisionOptimizer(make(other), plain)
    for step in range(3):
        grads = gradients(params, step)
        feed(params, grads)
        scaler.unscale_(optimizer)
        for param, master, grad in zip(params, optimizer.master_params(), grads, strict=True):
            assert param.grad.dtype == SINGLE
            assert same_bits(master.grad, grad.float() / 64.0)
            assert same_bits(param.grad, master.grad)
        edit(params if on == "parameters" else list(optimizer.master_params()))
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
        fed(reference_run, plain, grads)
        assert optimizer.last_grad_norm == reference_run.last_grad_norm
    assert snapshot(optimizer) == snapshot(reference_run)


@pytest.mark.parametrize("on", ["parameters", "masters"])
def test_clip_grad_norm_after_unscale(on):
    params, scaler = parameters(), static_scaler(64.0)
    twins = twins_of(params)
    optimizer, theirs = MixedPrecisionOptimizer(FUSED["sgd"](params), scaler), FUSED["sgd"](twins)
    for step in range(5):
        grads = gradients(params, step, size=100.0)
        feed(params, grads)
        feed(twins, [grad.float() / 64.0 for grad in grads])
        expected = torch.nn.utils.clip_grad_norm_(twins, 0.5)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params if on == "parameters" else optimizer.master_params(), 0.5)
        assert same_bits(norm, expected)
        optimizer.step()
        theirs.step()
        scaler.update()
        assert optimizer.last_grad_norm == pytest.approx(0.5, rel=1e-5)
        # lr * grad is rounded once and subtracted with one more rounding; torch fuses the two. So 1 ULP a step.
        for master, twin in zip(optimizer.master_params(), twins, strict=True):
            bound = (step + 1) * 2.0**-24 * 2 * (twin.detach().abs() + 0.1)
            assert ((master - twin).abs() <= bound).all()


@one_of_each_path
def test_an_overflow_that_unscale_found_skips(make):
    params = parameters((HALF, SINGLE))
    scaler = started(GradScaler(init_scale=16.0))
    optimizer = MixedPrecisionOptimizer(make(params), scaler)
    before = snapshot(optimizer)
    grads = gradients(params, 0)
    grads[2].fill_(math.inf)
    feed(params, grads)
    scaler.unscale_(optimizer)
    optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    assert optimizer.last_step_skipped
    assert snapshot(optimizer) == before
    assert scaler.get_scale() == 8.0


@one_of_each_path
def test_unscale_votes_though_no_step_follows(make):
    params = parameters((HALF, SINGLE))
    scaler = started(GradScaler(init_scale=16.0, growth_interval=1))
    optimizer = MixedPrecisionOptimizer(make(params), scaler)
    for value, scale in ((1.0, 32.0), (math.inf, 16.0), (math.nan, 8.0), (1.0, 16.0)):
        feed(params, [torch.full_like(p, value) for p in params])
        scaler.unscale_(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == scale
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (0, 0)


def test_unscale_then_max_grad_norm():
    """Both: the user's edit first, then the engine's clip of what came of it."""
    param, scaler = nn.Parameter(torch.zeros(3)), static_scaler(8.0)
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.5), scaler, max_grad_norm=16.0)
    param.grad = torch.full((3,), 512.0)
    scaler.unscale_(optimizer)
    param.grad[1:] = 0.0
    optimizer.step()
    assert optimizer.last_grad_norm == 64.0
    assert param.tolist() == [-8.0, 0.0, 0.0]


def test_zero_grad_after_unscale_leaves_nothing_behind():
    model, optimizer, scaler = prepared()
    for seed in range(3):
        x, y = batch(seed)
        scaler.scale((model(x).float() - y).square().mean()).backward()
        scaler.unscale_(optimizer)
        optimizer.zero_grad()
        assert all(p.grad is None for p in (*model.parameters(), *optimizer.master_params()))
        scaler.update()
    train(model, optimizer, scaler, [4])
    assert optimizer.steps_taken == 1


# Who drives the step.


@every_optimizer
def test_scaler_step_and_optimizer_step_are_the_same(make):
    results = []
    for by_scaler in (False, True):
        model, optimizer, scaler = prepared(make)
        for seed in range(4):
            x, y = batch(seed)
            scaler.scale((model(x).float() - y).square().mean()).backward()
            if by_scaler:
                assert scaler.step(optimizer) is None
            else:
                assert optimizer.step() is None
            scaler.update()
            optimizer.zero_grad()
        results.append((snapshot(optimizer), scaler.state_dict()))
    assert results[0] == results[1]


@every_optimizer
def test_torch_amps_scaler_may_drive_the_step(make):
    """It hands over its scale and its verdict; ours does the rest, to the same bits as under our scaler."""
    runs = []
    for theirs in (False, True):
        model = nn.Linear(6, 4)
        with torch.no_grad():
            for i, param in enumerate(model.parameters()):
                param.copy_(torch.linspace(-1, 1, param.numel()).reshape(param.shape) + i)
        kind = torch.amp.GradScaler("cpu", init_scale=2.0**17) if theirs else GradScaler(init_scale=2.0**17)
        optimizer = mpengine.prepare(model, make(model.parameters()), None if theirs else kind)
        scales = []
        for seed in range(5):
            x, y = batch(seed)
            kind.scale((model(x).float() - y).square().mean()).backward()
            kind.step(optimizer)
            kind.update()
            optimizer.zero_grad()
            scales.append(kind.get_scale())
        runs.append((snapshot(optimizer), scales, optimizer.steps_taken, optimizer.steps_skipped))
    assert runs[0] == runs[1]
    assert runs[0][3] > 0  # the first scales overflow fp16
    assert runs[0][2] > 0


def test_torch_amp_sums_found_inf_and_multiplies_a_preset_grad_scale():
    params = parameters((HALF, SINGLE))
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    before = snapshot(optimizer)
    feed(params, gradients(params, 0))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(2.0)  # two devices overflowed
    optimizer.step()
    assert optimizer.last_step_skipped
    assert snapshot(optimizer) == before
    del optimizer.grad_scale, optimizer.found_inf

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    feed(params, gradients(params, 0))
    optimizer.grad_scale = torch.tensor(2.0)
    scaler.step(optimizer)
    other = parameters((HALF, SINGLE))
    expected = MixedPrecisionOptimizer(FUSED["adam"](other))
    feed(other, [grad / 8.0 for grad in gradients(params, 0)])
    expected.step()
    assert snapshot(optimizer) == snapshot(expected)


@pytest.mark.parametrize("dtype", [BRAIN, SINGLE])
def test_torch_amp_may_unscale_what_is_not_fp16(dtype):
    params = parameters([dtype])
    optimizer = MixedPrecisionOptimizer(FUSED["momentum"](params))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    feed(params, gradients(params, 0))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    other = parameters([dtype])
    expected = MixedPrecisionOptimizer(FUSED["momentum"](other))
    feed(other, [grad / 4.0 for grad in gradients(params, 0)])
    expected.step()
    assert snapshot(optimizer) == snapshot(expected)


@every_optimizer
def test_bf16_needs_no_scaler(make):
    model = nn.Linear(6, 4)
    optimizer = mpengine.prepare(model, make(model.parameters()), dtype=BRAIN)
    losses = []
    for _ in range(3):
        loss = (model(batch(0)[0].bfloat16()).float() - batch(0)[1]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {BRAIN}
    for param in model.parameters():
        param.grad = torch.full_like(param, math.inf)
    before = snapshot(optimizer)
    optimizer.step()
    assert optimizer.last_step_skipped
    assert snapshot(optimizer) == before


def test_a_disabled_scaler_is_no_scaler():
    params, other = parameters(), parameters()
    scaler = GradScaler(enabled=False)
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params), scaler)
    expected = MixedPrecisionOptimizer(FUSED["adam"](other))
    for step in range(3):
        for own in (params, other):
            feed(own, gradients(own, step))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        expected.step()
    assert snapshot(optimizer) == snapshot(expected)


@every_optimizer
def test_a_closure_is_called_once_and_its_loss_returned(make):
    model = nn.Linear(6, 4)
    optimizer = mpengine.prepare(model, make(model.parameters()))
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model(batch(0)[0]).float().square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    before = snapshot(optimizer)
    with torch.no_grad():
        assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert optimizer.steps_taken == 1
    assert snapshot(optimizer) != before


def test_a_closure_with_a_scaler_is_refused():
    model, optimizer, scaler = prepared()
    scaler.scale(model(batch(0)[0]).float().sum()).backward()
    before = snapshot(optimizer)
    for step in (optimizer.step, lambda closure: scaler.step(optimizer, closure)):
        with pytest.raises(RuntimeError, match=r"Closure use is not currently supported.*closure\(\) yourself"):
            step(lambda: pytest.fail("the closure was called"))
    assert snapshot(optimizer) == before
    optimizer.step()
    assert optimizer.steps_taken == 1


def test_a_step_without_gradients():
    params = parameters()
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    before = snapshot(optimizer)
    assert optimizer.step() is None  # as in torch
    assert optimizer.step(lambda: 5) == 5
    assert snapshot(optimizer) == before
    assert optimizer.steps_taken == 0
    scaled = MixedPrecisionOptimizer(FUSED["adam"](parameters()), static_scaler())
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer: no parameter has a gr"):
        scaled.step()
    assert scaled.steps_taken == 0


def test_a_step_before_any_scale_is_refused():
    params = parameters()
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params), GradScaler())
    feed(params, gradients(params, 0))
    before = snapshot(optimizer)
    with pytest.raises(AssertionError, match=r"Attempted step but _scale is None.*scaler\.scale"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_two_steps_without_an_update_are_refused():
    model, optimizer, scaler = prepared()
    scaler.scale(model(batch(0)[0]).float().sum()).backward()
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last update\(\)"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_another_scaler_is_refused():
    model, optimizer, scaler = prepared()
    assert optimizer.scaler is scaler
    other = GradScaler()
    other.scale(model(batch(0)[0]).float().sum()).backward()
    with pytest.raises(RuntimeError, match="prepared with another GradScaler; use that one"):
        other.step(optimizer)


def test_a_scaler_may_come_with_the_first_step():
    params, scaler = parameters(), static_scaler(4.0)
    optimizer = MixedPrecisionOptimizer(FUSED["sgd"](params))
    feed(params, gradients(params, 0))
    scaler.step(optimizer)
    assert optimizer.scaler is scaler
    other = parameters()
    expected = MixedPrecisionOptimizer(FUSED["sgd"](other))
    feed(other, [grad / 4.0 for grad in gradients(params, 0)])
    expected.step()
    assert snapshot(optimizer) == snapshot(expected)


# Memory.


@every_optimizer
@pytest.mark.parametrize("zero", ["optimizer", "model"])
@pytest.mark.parametrize("unscale", [False, True])
def test_no_gradient_outlives_zero_grad(make, zero, unscale):
    model, optimizer, scaler = prepared(make)
    for seed in range(2):
        scaler.scale(model(batch(seed)[0]).float().sum()).backward()
        alive = [weakref.ref(p.grad) for p in model.parameters()]
        if unscale:
            scaler.unscale_(optimizer)
            alive += [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.step()
        scaler.update()
        (model if zero == "model" else optimizer).zero_grad(set_to_none=True)
        assert all(grad() is None for grad in alive)
        assert all(master.grad is None for master in optimizer.master_params())


@pytest.mark.parametrize(("name", "each"), [("sgd", 4), ("momentum", 8), ("adam", 12), ("adamw", 16)])
def test_the_bytes_of_masters_and_state(name, each):
    """fp16 parameter 2 + master 4 + 4 for each slot (the gradient's 2 are the user's); slices start on 256 bytes."""
    model = nn.Sequential(nn.Linear(301, 100, bias=False), nn.Linear(100, 77))
    numel = sum(p.numel() for p in model.parameters())
    optimizer = mpengine.prepare(model, FUSED[name](model.parameters()))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.zero_grad()
    held = [t for s in optimizer.state.values() for t in s.values() if t.dtype == SINGLE]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*optimizer.master_params(), *held)}
    size = sum(storage.nbytes() for storage in storages.values())
    arenas = each // 4
    assert each * numel <= size <= each * numel + arenas * 3 * 252
    assert len(storages) == arenas
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 2 * numel


def test_a_step_tells_autograd_that_the_weights_changed():
    """A graph that saved the old weights must not run backward with the new ones."""
    model, optimizer, scaler = prepared(FUSED["sgd"])
    x, y = batch(0)
    stale = (model(x.requires_grad_()).float() - y).square().mean()
    scaler.scale((model(x).float() - y).square().mean()).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


def test_frozen_copies_are_exact():
    """The tests above rest on `frozen`: it must see a single bit, the sign of zero, and the dtype."""
    one = torch.ones(3)
    other = one.clone()
    other[1] = 1.0 + 2.0**-23
    assert frozen([one]) != frozen([other])
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(one, one.double())
    assert same_bits({"a": [one]}, {"a": [one.clone()]})
