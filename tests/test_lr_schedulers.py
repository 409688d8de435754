"""Every torch scheduler moves the wrapper as it moves torch's optimizer, bit for bit and without a warning.

The wrapper is made from the optimizer; the scheduler may be made for either. Warnings are errors in these tests.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer, schedules
from tests.harness import (
    EVERY,
    FUSED,
    GENERAL,
    SINGLE,
    feed,
    frozen,
    gradients,
    network,
    parameters,
    params_of,
    twins_of,
)
from tests.torch_schedulers import SCHEDULERS, STEPS, advance, groups, known_to_torch

MAKES = {name: EVERY[name] for name in ("sgd", "momentum", "adamw", "rmsprop", "adagrad", "ASGD", "_OwnAdam")}
ON = ("wrapper", "inner")
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)
either = pytest.mark.parametrize("on", ON)


def test_no_scheduler_of_torchs_is_left_out():
    assert set(SCHEDULERS) == known_to_torch()


def moved(optimizer):
    """All hyperparameters, and what schedulers keep beside them."""
    return frozen([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])


def run(optimizer, scheduler, steps, skips=()):
    """The hyperparameters that each step used, and the weights after all of them."""
    history = []
    for step in steps:
        params = params_of(optimizer)
        feed(params, gradients(params, step))
        if step in skips:
            params[0].grad.fill_(torch.inf)
        history.append(moved(optimizer))
        optimizer.step()
        advance(scheduler, step)
        history.append(frozen(scheduler.get_last_lr()))
    return history


def wrapped(make, schedule, on, dtypes=(SINGLE,)):
    """A wrapper and a scheduler that was made for it, or for the optimizer inside before that was wrapped."""
    inner = make(groups(parameters(dtypes)))
    before = schedule(inner) if on == "inner" else None
    optimizer = MixedPrecisionOptimizer(inner)
    return optimizer, before or schedule(optimizer)


@every_scheduler
@either
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_the_wrapper_is_moved_as_torchs_optimizer_is(name, on, make):
    schedule = SCHEDULERS[name]
    torchs = make(groups(parameters([SINGLE])))
    expected = run(torchs, schedule(torchs), range(STEPS))
    optimizer, scheduler = wrapped(make, schedule, on)
    assert run(optimizer, scheduler, range(STEPS)) == expected
    assert len({str(each[0]["lr"]) for each in expected[::2]}) > 1  # it is no constant
    assert optimizer.steps_taken == STEPS


@every_scheduler
def test_prepare_keeps_a_scheduler_and_takes_a_new_one(name):
    """Through `mpengine.prepare`, with fp16 weights and losses of the scaler."""
    histories = []
    for on in ON:
        model = network()
        halves = list(model.parameters())
        inner = torch.optim.AdamW([{"params": halves[:2]}, {"params": halves[2:], "lr": 0.03}], lr=0.01)
        scheduler = SCHEDULERS[name](inner) if on == "inner" else None
        scaler = GradScaler(init_scale=2.0**8)
        optimizer = mpengine.prepare(model, inner, scaler)
        scheduler = scheduler or SCHEDULERS[name](optimizer)
        history = []
        for step in range(STEPS):
            loss = model(torch.full((3, 6), 0.5 + step, dtype=torch.float16)).float().square().mean()
            scaler.scale(loss * (torch.inf if step in (0, 5) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            history.append(moved(optimizer))
            advance(scheduler, step)
        assert optimizer.steps_skipped == 2
        histories.append(history)
    params = twins_of(network().parameters())
    torchs = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.03}], lr=0.01)
    expected = run(torchs, SCHEDULERS[name](torchs), range(STEPS))[::2]
    assert histories == [expected, expected]


@every_scheduler
@either
def test_the_step_uses_the_scheduled_rate(name, on):
    """SGD on gradients of one: `weight - lr` has a single rounding, so torch's bits are ours."""
    weights = []
    for wrap in (False, True):
        if wrap:
            optimizer, scheduler = wrapped(FUSED["sgd"], SCHEDULERS[name], on)
        else:
            optimizer = FUSED["sgd"](groups(parameters([SINGLE])))
            scheduler = SCHEDULERS[name](optimizer)
        for group in optimizer.param_groups:
            group["momentum"] = 0.0  # what a scheduler of momentum does is compared elsewhere
        for step in range(STEPS):
            params = params_of(optimizer)
            feed(params, [torch.ones_like(p) for p in params])
            for group in optimizer.param_groups:
                group["momentum"] = 0.0
            optimizer.step()
            advance(scheduler, step)
        weights.append(frozen(params_of(optimizer)))
    assert weights[0] == weights[1]
    assert weights[1] != frozen(parameters([SINGLE]))


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_momentum_that_a_scheduler_brings_is_stepped_with(name):
    """SGD without momentum, until the scheduler sets one: the state that it needs appears."""
    optimizer, scheduler = wrapped(FUSED["sgd"], SCHEDULERS[name], "wrapper")
    torchs = FUSED["sgd"](groups(parameters([SINGLE])))
    assert run(optimizer, scheduler, range(STEPS)) == run(torchs, SCHEDULERS[name](torchs), range(STEPS))
    for ours, theirs in zip(params_of(optimizer), params_of(torchs), strict=True):
        assert "momentum_buffer" in optimizer.state[ours]
        # Each of 20 steps rounds a buffer and a weight, each below 64, a few times: 20 * 4 * 64 * 2^-24.
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=20 * 4 * 64 * 2.0**-24)


@every_scheduler
@either
def test_a_tensor_rate_is_filled_as_torchs_is(name, on):
    def make(params):
        optimizer = torch.optim.Adam(params, lr=torch.tensor(0.01), foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.02)  # of each group its own
        return optimizer

    torchs = make(groups(parameters([SINGLE])))
    expected = run(torchs, SCHEDULERS[name](torchs), range(STEPS))
    optimizer, scheduler = wrapped(make, SCHEDULERS[name], on)
    kept = [group["lr"] for group in optimizer.param_groups]
    assert run(optimizer, scheduler, range(STEPS)) == expected
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, kept, strict=True))


@every_scheduler
@either
def test_a_scheduler_resumes_with_its_optimizer(name, on):
    """Saved after 7 steps and loaded into new ones, both go on as if they had not been."""
    optimizer, scheduler = wrapped(FUSED["momentum"], SCHEDULERS[name], on)
    run(optimizer, scheduler, range(7))
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), [p.detach() for p in params_of(optimizer)]))
    expected = run(optimizer, scheduler, range(7, STEPS))
    resumed, again = wrapped(FUSED["momentum"], SCHEDULERS[name], on)
    with torch.no_grad():
        for param, value in zip(params_of(resumed), saved[2], strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert run(resumed, again, range(7, STEPS)) == expected
    assert frozen(params_of(resumed)) == frozen(params_of(optimizer))


@every_scheduler
@either
@pytest.mark.parametrize("make", [FUSED["adam"], GENERAL["Adamax"]], ids=["fused", "general"])
def test_a_skipped_first_step_warns_of_nothing(name, on, make):
    """A skip changes no weight, but the step was called: the scheduler has nothing to warn of, and moves as ever."""
    torchs = make(groups(parameters([SINGLE])))
    expected = run(torchs, SCHEDULERS[name](torchs), range(4))
    optimizer, scheduler = wrapped(make, SCHEDULERS[name], on)
    assert run(optimizer, scheduler, range(4), skips=(0, 1)) == expected
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (2, 2)


def overflowing(optimizer, scaler, scheduler):
    """A first iteration that overflows."""
    (param,) = params_of(optimizer)
    scaler.scale((param * torch.inf).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()


def test_torch_amp_warns_of_a_skipped_first_step_and_we_do_not():
    """torch.amp does not call the `step()` of most optimizers when it skips; torch's scheduler misses the call."""

    def parts(scaler):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
        return optimizer, scaler, lr_scheduler.ExponentialLR(optimizer, 0.5)

    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        overflowing(*parts(torch.amp.GradScaler("cpu")))
    overflowing(*parts(GradScaler("cpu")))  # our scaler, torch's optimizer
    for scaler in (torch.amp.GradScaler("cpu"), GradScaler("cpu")):
        optimizer = MixedPrecisionOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        overflowing(optimizer, scaler, scheduler)
        assert (optimizer.steps_skipped, optimizer.param_groups[0]["lr"]) == (1, 0.05)


@either
def test_a_scheduler_that_truly_runs_ahead_is_warned_of(on):
    """What the tests above must not see, they can see."""
    _, scheduler = wrapped(FUSED["sgd"], SCHEDULERS["StepLR"], on)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


def test_a_scheduler_that_is_stepped_twice_is_found_out():
    """The comparison of histories can fail."""
    torchs = FUSED["adam"](groups(parameters([SINGLE])))
    expected = run(torchs, SCHEDULERS["ExponentialLR"](torchs), range(3))
    optimizer, scheduler = wrapped(FUSED["adam"], SCHEDULERS["ExponentialLR"], "wrapper")
    run(optimizer, scheduler, range(1))
    assert run(optimizer, scheduler, range(3)) != expected


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ReduceLROnPlateau"])
@pytest.mark.parametrize(
    "make", [FUSED["momentum"], FUSED["adamw"], GENERAL["Adamax"]], ids=["sgd", "adamw", "general"]
)
def test_a_schedule_is_the_scheduler_stepped_where_steps_are_taken(name, make):
    """`optimizer.schedule` over skips and beyond its end, against a loop that looks at every step before it goes on."""
    skips, rows, ends = (0, 3, 7), 12, []
    for by_hand in (True, False):
        params = parameters((torch.float16, SINGLE))
        optimizer = MixedPrecisionOptimizer(make(groups(params)))
        scheduler = SCHEDULERS[name](optimizer) if by_hand else optimizer.schedule(SCHEDULERS[name], steps=rows)
        for step in range(STEPS):
            feed(params, gradients(params, step))
            if step in skips:
                params[0].grad.fill_(torch.inf)
            optimizer.step()
            if by_hand and not optimizer.last_step_skipped and optimizer.steps_taken < rows:
                advance(scheduler)
        assert optimizer.steps_taken == STEPS - len(skips) > rows
        ends.append(frozen([params_of(optimizer), list(optimizer.master_params()), optimizer.state_dict()["state"]]))
    assert ends[0] == ends[1]


RECIPES = {
    "linear_warmup": schedules.linear_warmup(warmup_steps=9, start_factor=0.1),
    "cyclic_decaying": schedules.cyclic_decaying(base_lr=0.01, max_lr=0.1, step_size_up=4, momentum_range=(0.8, 0.9)),
    "one_cycle": schedules.one_cycle(max_lr=[0.1, 0.05], total_steps=STEPS),
    "warmup_cosine": schedules.warmup_cosine(warmup_steps=5, total_steps=STEPS),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@either
@pytest.mark.parametrize("make", [FUSED["momentum"], FUSED["adamw"]], ids=["sgd", "adamw"])
def test_the_recipes_are_schedulers_like_any_other(recipe, on, make):
    torchs = make(groups(parameters([SINGLE])))
    optimizer, scheduler = wrapped(make, recipe, on)
    assert run(optimizer, scheduler, range(STEPS), skips=(0,)) == run(torchs, recipe(torchs), range(STEPS))
