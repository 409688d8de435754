"""Iterations of every kind that a GraphedIteration captures, each a small world of models, optimizers and a scaler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import mpengine
from mpengine.graphs import GraphedIteration
from tests.harness import frozen, snapshot


@dataclass
class World:
    model: nn.Module
    optimizers: list[mpengine.MixedPrecisionOptimizer]
    scaler: mpengine.GradScaler
    iteration: Any

    @property
    def optimizer(self):
        return self.optimizers[0]


def network(device, *layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.LayerNorm(40), *layers, nn.Tanh(), nn.Linear(40, 4)).to(device)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)


def loss_of(model, x, y):
    return (model(x).float() - y).square().mean()


def zeroing_last(device, make=adamw, layers=(), **kwargs):
    model = network(device, *layers)
    scaler = mpengine.GradScaler(device, init_scale=2.0**10, growth_interval=3)
    optimizer = mpengine.prepare(model, make(model.parameters()), scaler, max_grad_norm=1.0)

    def iteration(x, y):
        loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
        return loss

    return World(model, [optimizer], scaler, iteration)


def zeroing_first(device):
    model = network(device)
    scaler = mpengine.GradScaler(device, init_scale=2.0**10, growth_interval=3)
    optimizer = mpengine.prepare(model, sgd(model.parameters()), scaler)

    def iteration(x, y):
        model.zero_grad()  # of which the optimizer hears nothing
        with torch.autocast(device, torch.float16):
            loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return {"losses": [loss], "name": "zeroing_first"}

    return World(model, [optimizer], scaler, iteration)


def with_dropout(device):
    return zeroing_last(device, layers=(nn.Dropout(0.4),))


def two_losses_and_clipping(device):
    model = network(device)
    scaler = mpengine.GradScaler(device, init_scale=2.0**10, growth_interval=2, num_losses=2)
    optimizer = mpengine.prepare(model, adamw(model.parameters()), scaler)

    def iteration(x, y):
        optimizer.zero_grad()
        out = model(x).float()
        scaler.scale((out - y).square().mean(), 0).backward(retain_graph=True)
        scaler.scale(out.abs().mean() * 1e-2, 1).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        return norm, None

    return World(model, [optimizer], scaler, iteration)


def clipped_weights(device):
    model = network(device)
    scaler = mpengine.GradScaler(device, init_scale=2.0**10)
    optimizer = mpengine.prepare(model, adamw(model.parameters()), scaler)

    def iteration(x, y):
        loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
        with torch.no_grad():
            for param in model.parameters():
                param.clamp_(-0.2, 0.2)
        return loss

    return World(model, [optimizer], scaler, iteration)


def micro_batches(device):
    model = network(device)
    scaler = mpengine.GradScaler(device, init_scale=2.0**10, growth_interval=3)
    optimizer = mpengine.prepare(model, adamw(model.parameters()), scaler)

    def iteration(x, y):
        for half in (slice(0, 3), slice(3, None)):
            scaler.scale(loss_of(model, x[half], y[half]) / 2).backward()
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()

    return World(model, [optimizer], scaler, iteration)


def adversaries(device, updates=1):
    generator, critic = network(device), network(device)
    scaler = mpengine.GradScaler(device, init_scale=2.0**10, growth_interval=3, num_losses=3)
    opt_g = mpengine.prepare(generator, adamw(generator.parameters()), scaler)
    opt_c = mpengine.prepare(critic, sgd(critic.parameters()), scaler)
    judge = nn.Linear(4, 6, device=device).half().requires_grad_(False)

    def iteration(x, y):
        fake = judge(generator(x))
        opt_c.zero_grad()
        real_loss = loss_of(critic, x, y)
        scaler.scale(real_loss, 0).backward()
        fake_loss = critic(fake.detach()).float().square().mean()
        scaler.scale(fake_loss, 1).backward()
        opt_c.step()
        if updates == 2:
            scaler.update()
        opt_g.zero_grad()
        loss = loss_of(critic, fake, y)
        scaler.scale(loss, 2).backward()  # leaves gradients on the critic, which the next iteration drops
        opt_g.step()
        scaler.update()
        return real_loss, fake_loss, loss

    return World(nn.ModuleList([generator, critic]), [opt_g, opt_c], scaler, iteration)


def adversaries_with_two_updates(device):
    return adversaries(device, updates=2)


WORLDS = [
    zeroing_last,
    zeroing_first,
    with_dropout,
    two_losses_and_clipping,
    clipped_weights,
    micro_batches,
    adversaries,
    adversaries_with_two_updates,
]


def batch(i, device, overflows=(), rows=5):
    generator = torch.Generator().manual_seed(100 + i)
    x, y = torch.randn(rows, 6, generator=generator).half(), torch.randn(rows, 4, generator=generator)
    if i in overflows:
        y[0, 0] = torch.inf
    return x.to(device), y.to(device)


def seen(world, outputs=None):
    """Everything that training has brought about, bit for bit."""
    counts = [(o.steps_taken, o.steps_skipped, o.last_step_skipped, o.scheduled()) for o in world.optimizers]
    names = [o.overflowed_parameters() for o in world.optimizers]
    return frozen([outputs, list(map(snapshot, world.optimizers)), repr(world.scaler.statistics()), counts, names])


def trajectory(make, device, graphed, before=None, *, calls=14, overflows=(6, 9), eager=(), look=True, **kwargs):
    """What is seen after each of so many iterations, and the GraphedIteration.

    Args:
        make: One of WORLDS.
        device: "cpu" or "cuda".
        graphed: Whether through a GraphedIteration.
        before: `before(world, i)` runs before call i.
        calls: How many.
        overflows: Calls whose losses are inf.
        eager: Calls that the plain function takes in either case.
        look: Whether all is looked at after each call, or only outputs and parameters, and all in the end.
        **kwargs: Of the GraphedIteration.
    """
    world = make(device)
    torch.manual_seed(1)
    train = GraphedIteration(world.iteration, world.optimizers, **kwargs)
    found = []
    for i in range(calls):
        if before is not None:
            before(world, i)
        inputs = batch(i, device, overflows)
        outputs = (train if graphed and i not in eager else world.iteration)(*inputs)
        for tensor in inputs:
            tensor.fill_(-1)
        found.append(seen(world, outputs) if look else frozen([outputs, list(world.model.state_dict().values())]))
    return [*found, seen(world)], train
