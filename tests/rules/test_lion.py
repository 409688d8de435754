"""Lion: kernels, the paper's equations in float64, by itself and prepared, and what it refuses."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import mpengine
from mpengine import MixedPrecisionOptimizer, backend, reference
from mpengine.kernels import launch
from mpengine.optim import Lion
from mpengine.rules import lion
from tests.harness import BRAIN, HALF, SINGLE, feed, parameters, prepared, same_bits, snapshot, train, twins_of
from tests.kernels.harness import Grad, Problem, Spec, check
from tests.oracle import Near, Oracle
from tests.race import few_parameters, gradients_of
from tests.sabotage import (
    a_thousandth_more,
    doubled,
    every_rule,
    every_scalars,
    flipped,
    replaced,
    skipped,
    state_forgotten,
)

OPTIONS = [
    {},
    {"weight_decay": 0.3},
    {"betas": (0.5, 0.9), "maximize": True},
    {"betas": (0.0, 0.0), "weight_decay": 0.1, "maximize": True},
    {"betas": (0.95, 0.98), "lr": 0.1},
]


def name(options):
    return "-".join(f"{key}={value}" for key, value in options.items()) or "plain"


every_option = pytest.mark.parametrize("options", OPTIONS, ids=name)


def lion_of(params, **options):
    return Lion(params, **{"lr": 0.01, **options})


class Equations(Oracle):
    """Algorithm 2 of the paper."""

    def _lion(self, g, group):
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        m = self.state["m"]
        mixed = m * beta1 + g * (1.0 - beta1)
        known = (np.abs(mixed.value) > mixed.error).all(axis=0) | (mixed.value == 0.0)
        assert known.all(), "the sign depends on roundings; give this test other gradients"
        p = self.p * (1.0 - lr * decay) - Near(np.sign(mixed.value)) * lr
        return p, {"m": m * beta2 + g * (1.0 - beta2)}


def run(options, steps=100):
    """On fp16, FP32 and bf16 parameters, some of them idle now and then; each step must be within its bound."""
    params = few_parameters()
    optimizer, oracle = MixedPrecisionOptimizer(lion_of(params, **options)), Equations(params, "lion")
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1.0 + math.cos(step / 9.0))
        grads = gradients_of(params, step)
        feed(params, grads)
        optimizer.step()
        oracle.step(grads, optimizer.param_groups[0])
        assert oracle.distance(list(optimizer.master_params()), 0) <= 1.0, "beyond the bound"
    ulp = 2.0**-23 * max(float(np.abs(oracle.p.value).max()), 1.0)
    assert oracle.p.error[0].max() <= 1.5 * steps * ulp  # the bound itself: a few roundings a step


# The kernels and the CPU path give the reference's bits.


@every_option
def test_kernels_at_odd_sizes(options):
    tensors = (*(Spec((n,)) for n in (0, 1, 31, 1023, 1025)), Spec((9,), grads=()))
    check(Problem(tensors, Lion, (options,), max_norm=1.0), steps=3)


def test_kernels_of_every_kind_and_alignment():
    kinds = (HALF, BRAIN, SINGLE)
    tensors = (
        *(Spec((n,), kind, (Grad(0, kind),)) for n in (33, 2048) for kind in kinds),
        Spec((20000,), grads=tuple(Grad(loss, kind) for loss, kind in enumerate(kinds))),
        Spec((1100,), SINGLE, (Grad(1, HALF, misaligned=True),), misaligned=True),
    )
    check(Problem(tensors, Lion, ({"weight_decay": 0.1},), scales=(1024.0, 3.0, None), max_norm=1.0), steps=2)


def test_kernels_skip():
    world = check(Problem((Spec((1025,)), Spec((31,))), Lion).with_spikes(1, 0, (30, math.nan)))
    assert world.table.counts.tolist() == [0, 2]


def test_a_kernel_that_computes_something_else_is_noticed(monkeypatch):
    monkeypatch.setitem(launch.RULES, "lion", launch.RULES["sgd_momentum"])
    with pytest.raises(AssertionError, match="elements differ"):
        check(Problem((Spec((31,)),), Lion), steps=1)


# The equations.


@every_option
def test_100_steps_stay_within_the_bound(options):
    run(options)


def test_the_sign_of_nothing_is_0_and_that_of_nan_is_nan():
    p, m = torch.ones(4), torch.zeros(4)
    g = torch.tensor([0.0, -0.0, math.nan, -(2.0**-149)])
    new, _ = lion.lion(p, g, (m,), [1.0, 1.0, 0.5, 0.0, 1.0, 0.0, 1.0])
    assert new[[0, 1, 3]].tolist() == [1.0, 1.0, 1.5]
    assert new[2].isnan()


def test_maximize_is_the_gradient_with_the_other_sign():
    results = []
    for sign in (1.0, -1.0):
        params = parameters()
        optimizer = MixedPrecisionOptimizer(lion_of(params, maximize=sign < 0.0, weight_decay=0.1))
        for step in range(5):
            feed(params, [grad * sign for grad in gradients_of(params, step * 7)])
            optimizer.step()
        results.append([params, [optimizer.state[param] for param in params]])
    assert same_bits(*results)


def test_groups_and_a_tensor_lr():
    """A group's own numbers, and a tensor in the place of one, as a number."""
    results = []
    for make in (float, torch.tensor):
        params = parameters()
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": make(0.5), "betas": (0.5, 0.5)}]
        optimizer = MixedPrecisionOptimizer(Lion(groups, lr=make(0.25)))
        before = [master.clone() for master in optimizer.master_params()]
        feed(params, [torch.ones_like(param) for param in params])
        optimizer.step()
        moved = [a - b for a, b in zip(before, optimizer.master_params(), strict=True)]
        for i, way in enumerate(moved):
            torch.testing.assert_close(way, torch.full_like(way, 0.25 if i < 3 else 0.5), rtol=0, atol=2.0**-22)
        results.append(params)
    assert same_bits(*results)


# By itself, and prepared.


@every_option
def test_by_itself_it_steps_as_prepared(options):
    params = parameters([SINGLE])
    twins = twins_of(params)
    alone, ours = lion_of(params, **options), MixedPrecisionOptimizer(lion_of(twins, **options))
    for step in range(20):
        grads = gradients_of(params, step)
        for own, optimizer in ((params, alone), (twins, ours)):
            feed(own, grads)
            optimizer.step()
    assert same_bits(params, twins)
    for param, twin in zip(params, twins, strict=True):
        assert same_bits(alone.state[param]["exp_avg"], ours.state[twin]["exp_avg"])
        assert int(alone.state[param]["step"]) == int(ours.state[twin]["step"])


@pytest.mark.parametrize("max_grad_norm", [None, 0.25])
@every_option
def test_an_overflow_is_skipped_and_a_checkpoint_resumes(options, max_grad_norm):
    def make(params):
        return lion_of(params, **options)

    model, optimizer, scaler = prepared(make, max_grad_norm=max_grad_norm)
    train(model, optimizer, scaler, range(4), overflow=[0, 2])
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (2, 2)
    before = snapshot(optimizer)
    train(model, optimizer, scaler, [4], overflow=[4])
    assert snapshot(optimizer) == before
    saved = model.state_dict(), optimizer.state_dict(), scaler.state_dict()
    again, twin = prepared(make, seed=1, max_grad_norm=max_grad_norm), copy.deepcopy((model, optimizer, scaler))
    for one, state in zip(again, saved, strict=True):
        one.load_state_dict(state)
    for one in ((model, optimizer, scaler), again, twin):
        train(*one, range(5, 8), overflow=[6])
    assert snapshot(again[1]) == snapshot(optimizer) == snapshot(twin[1])
    assert snapshot(optimizer) != before


def test_a_clipped_gradient_keeps_its_sign_but_not_its_weight_in_the_momentum():
    (param,) = parameters([HALF])[:1]
    optimizer = MixedPrecisionOptimizer(lion_of([param]), max_grad_norm=16.0)
    param.grad = torch.tensor([64.0] + [0.0] * 6).half()
    before = next(optimizer.master_params()).clone()
    optimizer.step()
    assert optimizer.last_grad_norm == 64.0
    assert optimizer.state[param]["exp_avg"][0] == torch.tensor(16.0) * float(np.float32(1.0 - 0.99))
    assert torch.equal(before - next(optimizer.master_params()) != 0.0, param.grad != 0.0)


def test_a_schedule_follows_the_steps_taken():
    model, optimizer, scaler = prepared(lion_of)
    optimizer.schedule(lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.5), steps=8)
    train(model, optimizer, scaler, range(4), overflow=[1])
    other, by_hand, its_scaler = prepared(lion_of)
    for taken, seed in enumerate((0, 2, 3)):
        by_hand.param_groups[0]["lr"] = 0.01 * 0.5**taken
        train(other, by_hand, its_scaler, [seed])
    assert optimizer.steps_taken == 3
    assert same_bits(list(optimizer.master_params()), list(by_hand.master_params()))


def test_a_state_of_another_lion_is_loaded():
    """Others keep "exp_avg" alone, and no count; where it is added, their runs go on here."""
    params = parameters([SINGLE])
    optimizer = MixedPrecisionOptimizer(lion_of(params))
    state = optimizer.state_dict()
    for i, param in enumerate(params):
        state["state"][i] = {"step": 3, "exp_avg": torch.full_like(param, 0.5)}
    optimizer.load_state_dict(state)
    assert all((optimizer.state[param]["exp_avg"] == 0.5).all() for param in params)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr is -1.0; it must be at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0; it must be at least 0 and below 1"),
        ({"betas": 0.9}, ValueError, "betas is 0.9; it must be 2 numbers"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay is nan"),
        ({"maximize": 1}, TypeError, "maximize is 1; it must be True or False"),
    ],
)
def test_what_it_cannot_use_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Lion(parameters(), **options)


def test_prepare_takes_it():
    model = torch.nn.Linear(6, 4)
    optimizer = mpengine.prepare(model, Lion(model.parameters()), mpengine.GradScaler("cpu"))
    assert optimizer._family is lion.FAMILY
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)


# Sabotage: the equations must notice each.


def without(index, value=0.0):
    return every_scalars(lambda f, h, step: f(replaced(h, index, value), step))


def _sign_of_the_new_momentum(monkeypatch):
    """As signSGD with momentum has it: the difference that the paper makes."""
    monkeypatch.setitem(
        reference.RULES, "lion", lambda p, g, slots, c: lion.lion(p, g, slots, [*c[:3], c[5], c[6], c[5], c[6]])
    )


SABOTAGE = {
    "sign flipped": every_rule(flipped),
    "update skipped": every_rule(skipped),
    "rate doubled": every_rule(doubled),
    "rate a thousandth too high": every_rule(a_thousandth_more),
    "state forgotten": every_rule(state_forgotten),
    "sign of the new momentum": _sign_of_the_new_momentum,
    "no weight decay": without(3),
    "another beta1": without(1, 0.1),
    "another beta2": without(2, 0.5),
    "maximize": without(4, 1.0),
}


@pytest.mark.parametrize("sabotage", SABOTAGE.values(), ids=SABOTAGE)
def test_a_sabotaged_update_is_noticed(sabotage, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_module", reference)
    run({"weight_decay": 0.3}, steps=30)
    sabotage(monkeypatch)
    with pytest.raises(AssertionError, match="beyond the bound"):
        run({"weight_decay": 0.3}, steps=30)
