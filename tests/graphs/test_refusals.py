"""What cannot be captured is refused, and training goes on."""

import pytest
import torch
from torch import nn

import mpengine
from mpengine.graphs import GraphedIteration
from tests.graphs.worlds import adamw, adversaries, batch, loss_of, seen, zeroing_last
from tests.harness import frozen


def test_what_steps_on_the_host_is_refused():
    model = nn.Linear(2, 2)
    scaler = mpengine.GradScaler("cpu")
    plain = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"AdamW is no mpengine\.MixedPrecisionOptimizer.*mpengine\.prepare"):
        GraphedIteration(print, plain)
    with pytest.raises(TypeError, match="is a scaler: give the optimizers"):
        GraphedIteration(print, [torch.amp.GradScaler("cpu")])
    with pytest.raises(TypeError, match="is a scaler: give the optimizers"):
        GraphedIteration(print, scaler)
    with pytest.raises(ValueError, match="none was given"):
        GraphedIteration(print, [])
    other = nn.Linear(2, 2)
    general = mpengine.prepare(other, torch.optim.Adamax(other.parameters()), scaler)
    with pytest.raises(ValueError, match=r"Adamax runs its own step\(\).*Only torch's .*RMSprop, SGD"):
        GraphedIteration(print, general)
    fused = mpengine.prepare(model, plain, scaler)
    for warmup in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="at least 2"):
            GraphedIteration(print, fused, warmup=warmup)


def test_an_outer_autocast_is_refused(device):
    world = zeroing_last(device)
    train = GraphedIteration(world.iteration, world.optimizer)
    with torch.autocast(device, torch.float16), pytest.raises(RuntimeError, match=r"enter torch\.autocast within"):
        train(*batch(0, device))
    with torch.autocast(device, torch.float16, cache_enabled=False):
        train(*batch(0, device))


def test_torchs_scaler_is_refused(device):
    model = nn.Linear(6, 4, device=device)
    optimizer = mpengine.prepare(model, adamw(model.parameters()))
    scaler = torch.amp.GradScaler(device)

    def iteration(x, y):
        scaler.scale(loss_of(model, x, y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    train = GraphedIteration(iteration, optimizer, warmup=2)
    for i in range(2):
        train(*batch(i, device))
    with pytest.raises(RuntimeError, match=r"torch\.amp\.GradScaler drives the steps"):
        train(*batch(2, device))
    assert optimizer.steps_taken + optimizer.steps_skipped == 2


def refused(world, iteration, message, device, calls=3):
    """The call that would capture is refused without running; training goes on, eagerly and by calling again."""
    train = GraphedIteration(iteration, world.optimizers)
    for i in range(calls):
        train(*batch(i, device))
    before = seen(world)
    with pytest.raises(RuntimeError, match=message):
        train(*batch(calls, device))
    assert seen(world) == before
    iteration(*batch(calls, device))
    assert seen(world) != before
    train(*batch(calls + 1, device))
    with pytest.raises(RuntimeError, match=message):
        train(*batch(calls + 2, device))
    assert train.captures == 0
    return train


def test_gradients_from_before_that_reach_the_step_are_refused(device):
    world = zeroing_last(device)

    def never_zeroed(x, y):
        world.scaler.scale(loss_of(world.model, x, y)).backward()
        world.optimizer.step()
        world.scaler.update()

    refused(world, never_zeroed, r"before the call reach its step \(parameter '0\.weight', .* and 3 more", device)


def test_zeroing_in_place_is_refused(device):
    world = zeroing_last(device)

    def in_place(x, y):
        world.optimizer.zero_grad(set_to_none=False)
        world.scaler.scale(loss_of(world.model, x, y)).backward()
        world.optimizer.step()
        world.scaler.update()

    refused(world, in_place, "set_to_none=False keeps them", device)


def test_micro_batches_outside_are_refused(device):
    """The graph would lose them: the first such call shows it, and runs as the plain function; the next is refused."""
    world = zeroing_last(device)
    train = GraphedIteration(world.iteration, world.optimizer)
    for i in range(6):
        train(*batch(i, device))
    twin = zeroing_last(device)
    for i in range(6):
        twin.iteration(*batch(i, device))
    for each in (world, twin):
        each.scaler.scale(loss_of(each.model, *batch(6, device))).backward()
    train(*batch(7, device))
    twin.iteration(*batch(7, device))
    assert seen(world) == seen(twin)
    world.scaler.scale(loss_of(world.model, *batch(8, device))).backward()
    with pytest.raises(RuntimeError, match="accumulate micro-batches within it"):
        train(*batch(9, device))


def test_a_learning_rate_that_is_set_within_is_refused(device):
    world = zeroing_last(device)
    scheduler = torch.optim.lr_scheduler.StepLR(world.optimizer, 1, 0.5)

    def iteration(x, y):
        world.iteration(x, y)
        scheduler.step()

    refused(world, iteration, r"it sets lr of group 0, which a replay would not repeat.*optimizer\.schedule", device)


@pytest.mark.parametrize("when", ["before the pass", "before the step", "before the update", "last"])
def test_a_capture_that_fails_leaves_training_as_it_was(when, captured):
    """A host read that the watch did not see, at any point of the iteration."""
    device = captured
    world, twin = adversaries(device), adversaries(device)
    spoilt = []

    def iteration(x, y):
        if spoilt and when == "before the pass":
            float(x.sum())
        return world.iteration(x, y)

    points = {"before the step": world.optimizers[1], "before the update": world.optimizers[0]}
    if when in points:
        points[when].register_step_pre_hook(lambda *_: float(torch.ones(1, device=device)) if spoilt else None)
    if when == "last":
        plain = iteration

        def iteration(x, y):
            outputs = plain(x, y)
            return outputs, float(outputs[0]) if spoilt else None

    train = GraphedIteration(iteration, world.optimizers)
    for i in range(3):
        train(*batch(i, device))
        twin.iteration(*batch(i, device))
    spoilt.append(True)
    with pytest.raises(RuntimeError, match=r"not be captured in a CUDA graph \(.*captur.*Go on with the plain"):
        train(*batch(3, device))
    spoilt.clear()
    assert seen(world)[1:] == seen(twin)[1:]
    for i in range(3, 12):
        ours = (world.iteration if i < 5 else train)(*batch(i, device, overflows=(8,)))
        theirs = twin.iteration(*batch(i, device, overflows=(8,)))
        assert frozen(ours if i < 5 or when != "last" else ours[0]) == frozen(theirs), i
    assert seen(world) == seen(twin)
    assert train.captures == 1
    assert train.replays == 6


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_optimizer_that_was_not_given_is_noticed(device, wrapped):
    """Nobody would follow its learning rate."""
    world = zeroing_last(device)
    other = nn.Linear(3, 3, device=device)
    forgotten = adamw(other.parameters())
    if wrapped:
        forgotten = mpengine.prepare(other, forgotten, world.scaler)

    def iteration(x, y):
        world.scaler.scale(other(x.new_ones(2, 3).to(other.weight.dtype)).float().sum()).backward()
        if wrapped:
            forgotten.step()
        else:
            world.scaler.step(forgotten)
        forgotten.zero_grad()
        return world.iteration(x, y)

    train = GraphedIteration(iteration, world.optimizer, warmup=2)
    for i in range(2):
        train(*batch(i, device))
    with pytest.raises(RuntimeError, match=r"not given \(AdamW\).*GraphedIteration\(iteration, \[a, b\]\)"):
        train(*batch(2, device))
    if wrapped:
        train = GraphedIteration(iteration, [world.optimizer, forgotten], warmup=2)
        for i in range(4):
            train(*batch(i, device))
        assert train.captures == 1
