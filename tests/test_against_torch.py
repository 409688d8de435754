"""200 steps of SGD, Adam and AdamW in every option against torch.optim, and against the equations in float64.

The bound on each weight is derived, not chosen: `tests.oracle` follows every rounding of every step. It comes to a few
ULP a step, as `test_the_bound_is_a_few_ulp_a_step` says in numbers; and whatever changes the update must break it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mpengine import MixedPrecisionOptimizer, backend, reference, rules
from tests.harness import SINGLE, feed, parameters, same_bits, twins_of
from tests.oracle import Oracle, U
from tests.race import STEPS, Race, gradients_of
from tests.sabotage import (
    a_thousandth_more,
    doubled,
    every_rule,
    every_scalars,
    flipped,
    no_clip,
    replaced,
    skipped,
    state_forgotten,
)


def _sgd_options() -> Iterator[dict[str, Any]]:
    for weight_decay, maximize in itertools.product((0.0, 0.02), (False, True)):
        shared = {"weight_decay": weight_decay, "maximize": maximize}
        yield {"momentum": 0.0, **shared}
        for kind in ({}, {"nesterov": True}, {"dampening": 0.3}):
            yield {"momentum": 0.9, **kind, **shared}


def _adam_options() -> Iterator[dict[str, Any]]:
    decays = ({}, {"weight_decay": 0.002}, {"weight_decay": 0.02, "decoupled_weight_decay": True})
    for amsgrad, maximize, decay in itertools.product((False, True), (False, True), decays):
        yield {"amsgrad": amsgrad, "maximize": maximize, **decay}
    yield {"betas": (0.5, 0.9)}
    yield {"betas": (0.0, 0.99)}
    yield {"betas": (0.3, 0.999), "amsgrad": True}
    yield {"eps": 1e-3}


def _adamw_options() -> Iterator[dict[str, Any]]:
    for amsgrad, maximize in itertools.product((False, True), (False, True)):
        yield {"amsgrad": amsgrad, "maximize": maximize}
    yield {"weight_decay": 0.3, "betas": (0.5, 0.99)}
    yield {"weight_decay": 0.0}


CASES = [
    *((torch.optim.SGD, options) for options in _sgd_options()),
    *((torch.optim.Adam, options) for options in _adam_options()),
    *((torch.optim.AdamW, options) for options in _adamw_options()),
]


def _name(case: Any) -> str:
    cls, options = case
    return "-".join([cls.__name__, *(f"{key}={value}" for key, value in options.items())])


every_case = pytest.mark.parametrize("case", CASES, ids=_name)


@every_case
def test_200_steps_stay_within_the_bound(case):
    """And that bound is small: of the largest weight and the path's length, 1/4 ULP a step for SGD, 1 ULP for Adam."""
    cls, options = case
    race = Race(cls, options).run()
    assert race.bound_in_ulp() <= (0.25 if cls is torch.optim.SGD else 1.0)


@pytest.mark.parametrize("case", CASES[::5], ids=_name)
def test_200_clipped_steps_stay_within_the_bound(case):
    cls, options = case
    race = Race(cls, options, max_grad_norm=1.0).run()
    assert 20 < sum(exact > 1.0 for _, _, exact in race.norms) < STEPS - 20  # some are clipped, some are not
    for ours, theirs, exact in race.norms:
        assert abs(ours - exact) <= 2 * U * exact
        assert abs(theirs - exact) <= 100 * U * exact


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_the_learning_rate_may_be_a_tensor(cls):
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {"weight_decay": 0.1}
    race = Race(cls, options, lr=torch.tensor(0.01)).run()
    (group,) = race.ours.param_groups
    assert isinstance(group["lr"], Tensor)


def test_betas_may_be_tensors():
    params = parameters()
    oracle = Oracle(params, "adam")
    betas = (torch.tensor(0.75), torch.tensor(0.875))
    inner = torch.optim.Adam(params, lr=torch.tensor(0.0625), betas=betas, foreach=False)
    optimizer = MixedPrecisionOptimizer(inner)
    for step in range(20):
        grads = gradients_of(params, step)
        feed(params, grads)
        optimizer.step()
        oracle.step(grads, optimizer.param_groups[0])
        assert oracle.distance(list(optimizer.master_params()), 0) <= 1.0


@pytest.mark.parametrize(
    ("cls", "options", "key"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, "momentum"),
        (torch.optim.Adam, {}, "betas"),
        (torch.optim.AdamW, {"amsgrad": True}, "betas"),
        (torch.optim.Adam, {"weight_decay": 0.002}, "weight_decay"),
        (torch.optim.SGD, {"momentum": 0.9}, "nesterov"),
        (torch.optim.AdamW, {}, "eps"),
    ],
)
def test_any_hyperparameter_may_change_every_step(cls, options, key):
    """As OneCycleLR cycles momentum and betas; the bias correction is that of today's betas, as in torch."""
    values = {
        "momentum": lambda x: 0.95 - 0.1 * x,
        "betas": lambda x: (0.95 - 0.5 * x, 0.999),
        "weight_decay": lambda x: 0.01 * x,
        "nesterov": lambda x: x > 0.5,
        "eps": lambda x: 10.0 ** (-8 + 4 * x),
    }
    race = Race(cls, options)
    for step in range(60):
        for group in (*race.ours.param_groups, *race.theirs.param_groups):
            group[key] = values[key]((1 + math.sin(step)) / 2)
        race.run(range(step, step + 1))


def test_groups_keep_their_own_options():
    params = parameters()
    twins = twins_of(params)

    def groups(own):
        return [
            {"params": own[:2], "lr": 0.1, "amsgrad": True},
            {"params": own[2:5], "weight_decay": 0.1},
            {"params": own[5:], "betas": (0.5, 0.9), "maximize": True},
        ]

    optimizer = MixedPrecisionOptimizer(torch.optim.Adam(groups(params)))
    theirs = torch.optim.Adam(groups(twins), foreach=False)
    oracles = [Oracle(group["params"], "adam") for group in theirs.param_groups]
    for step in range(STEPS):
        grads = gradients_of(params, step)
        feed(params, grads)
        feed(twins, [None if grad is None else grad.to(SINGLE, copy=True) for grad in grads])
        for oracle, group in zip(oracles, theirs.param_groups, strict=True):
            oracle.step([p.grad for p in group["params"]], group)
        optimizer.step()
        theirs.step()
    masters = list(optimizer.master_params())
    for oracle, part in zip(oracles, (slice(2), slice(2, 5), slice(5, None)), strict=True):
        assert oracle.distance(masters[part], 0) <= 1.0
        assert oracle.distance(twins[part], 1) <= 1.0
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert set(optimizer.state[params[5]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_first_moment_without_memory_is_the_gradient():
    """beta1 = 0, as GANs train: m = g exactly, however much larger the last gradient was."""
    (param,) = parameters([SINGLE])[:1]
    optimizer = MixedPrecisionOptimizer(torch.optim.Adam([param], betas=(0.0, 0.99)))
    for grad in (torch.full((7,), 1e6), torch.linspace(1e-4, 3e-4, 7)):
        param.grad = grad
        optimizer.step()
        assert same_bits(optimizer.state[param]["exp_avg"], grad)


# Sabotage: each of these must be noticed by the comparison above.


def _without_largest(p, g, slots, c):
    new, moments = rules.ADAM.update(p, g, slots[:2], c)
    return new, (*moments, slots[2])


def _no_write_back(monkeypatch):
    update = reference.update

    def without(table, *args):
        kept = [entry.param.detach().clone() for entry in table.entries]
        update(table, *args)
        for entry, param in zip(table.entries, kept, strict=True):
            if entry.write_back:
                entry.param.data.copy_(param)

    monkeypatch.setattr(reference, "update", without)


SGD = (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02})
NESTEROV = (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})
ADAM = (torch.optim.Adam, {"weight_decay": 0.02, "amsgrad": True})
ADAMW = (torch.optim.AdamW, {"weight_decay": 0.02, "eps": 1e-4})
SABOTAGE = {
    "sign flipped": (every_rule(flipped), [SGD, ADAM, ADAMW]),
    "update skipped": (every_rule(skipped), [SGD, ADAM, ADAMW]),
    "rate doubled": (every_rule(doubled), [SGD, ADAM, ADAMW]),
    "rate a thousandth too high": (every_rule(a_thousandth_more), [SGD, ADAM, ADAMW]),
    "state forgotten": (every_rule(state_forgotten), [SGD, ADAM, ADAMW]),
    "clip dropped": (no_clip, [SGD, ADAM]),
    "no bias correction": (every_scalars(lambda f, h, step: f(h, step * 0 + 2**30)), [ADAM, ADAMW]),
    "step counted twice": (every_scalars(lambda f, h, step: f(h, 2 * step)), [ADAM, ADAMW]),
    "step off by one": (every_scalars(lambda f, h, step: f(h, step + 1)), [SGD, ADAM, ADAMW]),
    "no weight decay in SGD": (every_scalars(lambda f, h, step: f(replaced(h, 3, 0.0), step)), [SGD]),
    "no weight decay in Adam": (every_scalars(lambda f, h, step: f(replaced(h, 4, 0.0), step)), [ADAM, ADAMW]),
    "weight decay of the other kind": (
        every_scalars(lambda f, h, step: f(replaced(h, 6, 1.0 - h[6]), step)),
        [ADAM, ADAMW],
    ),
    "no momentum": (every_scalars(lambda f, h, step: f(replaced(h, 1, 0.0), step)), [SGD, NESTEROV]),
    "no dampening": (every_scalars(lambda f, h, step: f(replaced(h, 2, 0.0), step)), [SGD]),
    "no nesterov": (every_scalars(lambda f, h, step: f(replaced(h, 4, 0.0), step)), [NESTEROV]),
    "no eps": (every_scalars(lambda f, h, step: f(replaced(h, 3, 0.0), step)), [ADAMW]),
    "maximize": (every_scalars(lambda f, h, step: f(replaced(h, 5, 1.0), step)), [SGD, ADAM, ADAMW]),
    "no largest moment": (
        lambda monkeypatch: monkeypatch.setitem(reference.RULES, "adam_amsgrad", _without_largest),
        [ADAM],
    ),
    "parameter not written": (_no_write_back, [SGD, ADAM]),
}


@pytest.mark.parametrize(
    ("sabotage", "case"),
    [
        pytest.param(install, case, id=f"{name}-{case[0].__name__}")
        for name, (install, cases) in SABOTAGE.items()
        for case in cases
    ],
)
def test_a_sabotaged_update_is_noticed(sabotage, case, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_module", reference)
    cls, options = case
    race = Race(cls, options, max_grad_norm=1.0)
    sabotage(monkeypatch)
    with pytest.raises(AssertionError, match=r"beyond its bound|not its master"):
        race.run(range(20))


def test_without_sabotage_the_same_race_is_clean():
    for cls, options in (SGD, NESTEROV, ADAM, ADAMW):
        Race(cls, options, max_grad_norm=1.0).run(range(20))


def test_a_gradient_of_zeros_and_tiny_gradients():
    """No moment has filled: 0 / (0 + eps) is 0; and FP32's smallest numbers do not become NaN."""
    for cls in (torch.optim.Adam, torch.optim.AdamW):
        params = parameters()
        oracle = Oracle(params, "adam")
        optimizer = MixedPrecisionOptimizer(cls(params))
        for size in (0.0, 2.0**-24, 0.0, 1.0):
            grads = [torch.full_like(p, size) for p in params]
            feed(params, grads)
            optimizer.step()
            oracle.step(grads, optimizer.param_groups[0])
            assert oracle.distance(list(optimizer.master_params()), 0) <= 1.0
