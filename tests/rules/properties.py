"""What holds for every rule: its kernels' bits, its exact arithmetic, and what becomes of it in a training run."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import nn

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer
from mpengine.kernels import layout
from mpengine.rules import family_of
from tests.harness import HALF, SINGLE, feed, gradients, parameters, params_of, same_bits, snapshot, started
from tests.kernels.harness import BRAIN, Grad, Problem, Spec, check

U = 2.0**-24  # half a ULP, relative


def check_kernels(make, *groups):
    """Reference, CPU path and kernels have the same bits: odd sizes, every kind, several losses, idle, skipped."""
    odd = [*(Spec((n,)) for n in (0, 1, 31, 1023, 1025)), Spec((20000,), SINGLE, (Grad(0, SINGLE),))]
    check(Problem(tuple(odd), make, groups or ({},), max_norm=1.0), steps=2)
    mixed = (
        Spec((1500,), BRAIN, (Grad(0, BRAIN, misaligned=True),), misaligned=True),
        Spec((33,), HALF, (Grad(0), Grad(1, SINGLE))),
        Spec((7, 5), SINGLE, (Grad(1),)),
        Spec((40,), HALF, ()),  # idle
    )
    problem = Problem(mixed, make, groups or ({},), scales=(1024.0, 3.0))
    check(problem, steps=2)
    check(problem.with_spikes(0, 0, (7, float("inf"))), steps=1)


def exact(make, start, grads):
    """The weights after each step of the rule on one tensor in float64, nothing rounded to FP32."""
    optimizer = make([nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    family = family_of(optimizer)
    rule, initial = family.variant(group), family.initial(group)
    h = np.zeros((layout.HYPER, 1))
    values = [float(value) for value in family.hyperparameters(group)]
    h[: len(values), 0] = values
    p = torch.from_numpy(start.copy())
    slots = tuple(torch.full_like(p, initial.get(name, 0.0)) for name in rule.slots)
    cells = [np.array([initial.get(name, 0.0)]) for name in rule.cells]
    path = []
    for t, grad in enumerate(grads, 1):
        g = torch.from_numpy(grad.copy())
        c = [float(np.ravel(column)[0]) for column in family.scalars(h, np.array([t]))]
        if rule.settle is not None:
            measured = () if rule.measure is None else rule.measure(p, g, slots, c)
            norms = [np.array([float((x * x).sum().sqrt())]) for x in measured]
            settled, cells = rule.settle([np.array([x]) for x in c], norms, cells)
            c = [float(np.ravel(column)[0]) for column in settled]
        p, slots = rule.update(p, g, slots, c)
        path.append(p.numpy().copy())
    return path


def numbers(steps=30, size=50, seed=0):
    """Weights and gradients of one tensor, FP32 values in float64; the gradients of every size."""
    generator = np.random.default_rng(seed)
    scales = 10.0 ** generator.uniform(-2, 1, (steps, 1))
    both = generator.normal(size=size), generator.normal(size=(steps, size)) * scales
    return tuple(values.astype(np.float32).astype(np.float64) for values in both)


def check_equations(make, paper, sizes=(50,), **options):
    """The rule is the paper's equations: to 1e-12 in float64, and to the roundings of FP32 by itself.

    Those: each step rounds the weight once, and what it adds carries at most 64 roundings, and two more for each
    earlier step that its moments remember.

    Args:
        make: From params to the optimizer.
        paper: From (weights, gradients of each step) in float64 to the weights after each step.
    """
    for size in sizes:
        start, grads = numbers(size=size)
        wanted = paper(start, grads, **options)
        for got, want in zip(exact(make, start, grads), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
        param = nn.Parameter(torch.from_numpy(start).float())
        optimizer = make([param])
        way, largest, before = 0.0, np.abs(start).max(), start
        for t, (grad, want) in enumerate(zip(grads, wanted, strict=True), 1):
            param.grad = torch.from_numpy(grad).float()
            optimizer.step()
            way, largest, before = way + np.abs(want - before).max(), max(largest, np.abs(want).max()), want
            error = np.abs(param.detach().double().numpy() - want).max()
            bound = U * (t * largest + (64 + 2 * t) * way)
            assert error <= bound, f"step {t} is {error} from the equations; its roundings allow {bound}"


def check_run(make):
    """Prepared: skip, clip and resume; and the class by itself."""
    check_alone(make)
    check_skip(make)
    check_resume(make)


def check_alone(make):
    """FP32 weights that the class steps by itself are, bit for bit, those of the prepared optimizer."""
    ours, own = parameters((SINGLE,)), parameters((SINGLE,))
    prepared, alone = MixedPrecisionOptimizer(make(ours)), make(own)
    for step in range(6):
        grads = gradients(own, step, 0.01)
        grads[step % 3] = None if step > 3 else grads[step % 3]
        feed(ours, grads)
        feed(own, grads)
        prepared.step()
        alone.step()
        assert same_bits(ours, own), f"the weights differ at step {step}"
    for p, q in zip(ours, own, strict=True):
        kept = {name: value for name, value in prepared.state[p].items() if name != "step"}
        assert same_bits(kept, {name: alone.state[q][name] for name in kept})


def check_skip(make):
    """An overflow leaves weights, masters, slots and cells as they are; and clipping scales the gradient."""
    params = parameters()
    scaler = started(GradScaler(init_scale=8.0, growth_interval=1000))
    optimizer = MixedPrecisionOptimizer(make(params), scaler, max_grad_norm=0.5)
    for step in range(3):
        feed(params, gradients(params, step))
        optimizer.step()
        scaler.update()
    assert optimizer.last_grad_norm > 0.5
    before = snapshot(optimizer)
    grads = gradients(params, 3)
    grads[4].view(-1)[2] = float("nan")
    feed(params, grads)
    optimizer.step()
    scaler.update()
    assert optimizer.last_step_skipped
    assert snapshot(optimizer) == before


def check_resume(make):
    """Saved after 3 steps, loaded elsewhere and trained on: as if it had never stopped."""
    whole, params = parameters(), parameters()
    through, first = MixedPrecisionOptimizer(make(whole)), MixedPrecisionOptimizer(make(params))
    _train(through, range(6))
    _train(first, range(3))
    stream = io.BytesIO()
    torch.save([first.state_dict(), [p.detach() for p in params]], stream)
    stream.seek(0)
    state, weights = torch.load(stream)
    others = parameters(seed=1)
    second = MixedPrecisionOptimizer(make(others))
    second.load_state_dict(state)
    with torch.no_grad():
        for param, value in zip(others, weights, strict=True):
            param.copy_(value)
    _train(second, range(3, 6))
    assert snapshot(second) == snapshot(through)


def _train(optimizer, steps):
    params = params_of(optimizer)
    for step in steps:
        feed(params, gradients(params, step))
        optimizer.step()


def check_learns(make):
    """A regression in fp16 gets better by a factor of 2 in 60 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(64, 6)
    y = x[:, :2] * 0.5 + 0.1
    scaler = GradScaler(init_scale=2.0**10)
    optimizer = mpengine.prepare(model, make(model.parameters()), scaler)
    losses = []
    for _ in range(60):
        loss = (model(x.half()).float() - y).square().mean()
        scaler.scale(loss).backward()
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses
