"""RMSprop, Adagrad and Adadelta in every option: kernels, torch.optim, the equations in float64, and a training loop.

tests/test_skip.py, test_checkpoint.py and their like run them beside the other fused optimizers.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer, backend, reference
from mpengine.kernels import launch
from mpengine.rules import rmsprop
from tests.harness import BRAIN, HALF, SINGLE, feed, network, parameters, prepared, same_bits, snapshot, train, twins_of
from tests.kernels.harness import Grad, Problem, Spec, check
from tests.oracle import Oracle
from tests.race import Race, few_parameters, gradients_of
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

KERNELS = dict(launch.RULES)
RMSPROP, ADAGRAD, ADADELTA = torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta
VARIANTS = [
    (RMSPROP, {}),
    (RMSPROP, {"momentum": 0.9}),
    (RMSPROP, {"centered": True}),
    (RMSPROP, {"centered": True, "momentum": 0.9}),
    (ADAGRAD, {}),
    (ADADELTA, {}),
]
OTHERS = [
    (RMSPROP, {"alpha": 0.5, "eps": 1e-3}),
    (RMSPROP, {"alpha": 0.3, "centered": True}),
    (ADAGRAD, {"lr_decay": 0.1}),
    (ADAGRAD, {"initial_accumulator_value": 0.3, "eps": 1e-3}),
    (ADADELTA, {"rho": 0.5}),
    (ADADELTA, {"eps": 1e-3}),
]
CASES = [
    *((cls, {**options, **more}) for cls, options in VARIANTS for more in ({}, {"weight_decay": 0.02})),
    *((cls, {**options, "weight_decay": 0.02, "maximize": True}) for cls, options in VARIANTS),
    *OTHERS,
]
STATE = {RMSPROP: {"square_avg"}, ADAGRAD: {"sum"}, ADADELTA: {"square_avg", "acc_delta"}}


def name(case):
    cls, options = case
    return "-".join([cls.__name__, *(f"{key}={value}" for key, value in options.items())])


every_variant = pytest.mark.parametrize("case", VARIANTS, ids=name)
every_case = pytest.mark.parametrize("case", CASES, ids=name)


# The kernels and the CPU path give the reference's bits.


@every_case
def test_kernels_at_odd_sizes(case):
    cls, options = case
    tensors = (*(Spec((n,)) for n in (0, 1, 31, 1023, 1025)), Spec((9,), grads=()))
    check(Problem(tensors, cls, (options,), max_norm=1.0), steps=3)


@every_variant
def test_kernels_of_every_kind_and_alignment(case):
    cls, options = case
    kinds = (HALF, BRAIN, SINGLE)
    several = tuple(Grad(loss, kind) for loss, kind in enumerate(kinds))
    tensors = (
        *(Spec((n,), kind, (Grad(0, kind),)) for n, kind in itertools.product((33, 2048), kinds)),
        Spec((20000,), grads=several),
        Spec((1100,), SINGLE, (Grad(1, HALF, misaligned=True),), misaligned=True),
        Spec((4, 7, 5, 3), channels_last=True),
    )
    groups = ({**options, "weight_decay": 0.1},)
    check(Problem(tensors, cls, groups, scales=(1024.0, 3.0, None), max_norm=1.0), steps=1)


@every_variant
def test_kernels_skip(case):
    cls, options = case
    problem = Problem((Spec((1025,)), Spec((31,))), cls, (options,)).with_spikes(1, 0, (30, math.inf))
    world = check(problem)
    assert world.table.counts.tolist() == [0, 2]
    assert world.table.steps.tolist() == [0, 0]


@every_variant
def test_a_kernel_that_computes_something_else_is_noticed(case, monkeypatch):
    cls, options = case
    other = {
        "rmsprop": "adagrad",
        "rmsprop_momentum": "adadelta",
        "rmsprop_centered": "rmsprop_momentum",
        "rmsprop_centered_momentum": "adam_amsgrad",
        "adagrad": "rmsprop",
        "adadelta": "rmsprop_momentum",
    }
    for rule, instead in other.items():
        monkeypatch.setitem(launch.RULES, rule, KERNELS[instead])
    with pytest.raises(AssertionError, match="elements differ"):
        check(Problem((Spec((31,)),), cls, (options,)), steps=1)


# torch's own, and the equations.


@every_case
def test_200_steps_stay_within_the_bound(case):
    """And that bound is small, in ULP a step; Adadelta's steps depend on its steps."""
    assert Race(*case).run().bound_in_ulp() <= (1.5 if case[0] is ADADELTA else 0.5)


@pytest.mark.parametrize("case", CASES[::4], ids=name)
def test_200_clipped_steps_stay_within_the_bound(case):
    race = Race(*case, max_grad_norm=1.0).run()
    assert 20 < sum(exact > 1.0 for _, _, exact in race.norms) < 180


@every_variant
def test_the_learning_rate_may_be_a_tensor(case):
    race = Race(*case, lr=torch.tensor(0.01)).run(range(40))
    assert isinstance(race.ours.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        (VARIANTS[1], "momentum", lambda x: 0.95 - 0.1 * x),
        (VARIANTS[2], "alpha", lambda x: 0.99 - 0.7 * x),
        (VARIANTS[4], "lr_decay", lambda x: 0.1 * x),
        (VARIANTS[5], "rho", lambda x: 0.95 - 0.5 * x),
        *((case, "weight_decay", lambda x: 0.01 * x) for case in VARIANTS[3:]),
        *((case, "eps", lambda x: 10.0 ** (-6 + 3 * x)) for case in VARIANTS[3:]),
    ],
    ids=lambda x: name(x) if isinstance(x, tuple) else x if isinstance(x, str) else "",
)
def test_any_hyperparameter_may_change_every_step(case, key, value):
    race = Race(*case)
    for step in range(30):
        for group in (*race.ours.param_groups, *race.theirs.param_groups):
            group[key] = value((1 + math.sin(step)) / 2)
        race.run(range(step, step + 1))


@pytest.mark.parametrize(
    ("cls", "flags"),
    [
        *itertools.product((RMSPROP, ADAGRAD, ADADELTA), ({"foreach": True}, {"foreach": False})),
        *((cls, {"capturable": True}) for cls in (RMSPROP, ADADELTA)),
        (ADAGRAD, {"fused": True}),
    ],
)
def test_how_torch_would_loop_has_no_say(cls, flags):
    results = []
    for options in ({}, flags):
        params = parameters()
        optimizer = MixedPrecisionOptimizer(cls(params, weight_decay=0.1, **options))
        for step in range(5):
            feed(params, gradients_of(params, step))
            optimizer.step()
        results.append([params, [optimizer.state[param] for param in params]])
    assert same_bits(*results)


@every_case
def test_checkpoints_go_both_ways(case):
    """Five steps of torch, five of ours on its state, five of torch's on ours: bit for bit the state, and one run."""
    cls, options = case

    def run(optimizer, params, steps):
        for step in steps:
            grads = gradients_of(params, step)
            feed(params, grads)
            optimizer.step()
            oracle.step(grads, optimizer.param_groups[0])
        assert oracle.distance(params, 1) <= 1.0

    def state(optimizer, params):
        return [{**optimizer.state[p], "step": float(optimizer.state[p]["step"])} for p in params]

    params = twins_of(few_parameters())
    theirs = cls(params, lr=0.01, foreach=False, **options)
    oracle = Oracle.of(params, theirs)
    run(theirs, params, range(5))
    own = twins_of(params)
    ours = MixedPrecisionOptimizer(cls(own, lr=0.01, **options))
    ours.load_state_dict(theirs.state_dict())
    assert same_bits(state(ours, own), state(theirs, params))
    run(ours, own, range(5, 10))
    again = twins_of(own)
    theirs = cls(again, lr=0.01, foreach=False, **options)
    theirs.load_state_dict(ours.torch_state_dict())
    assert same_bits(state(theirs, again), state(ours, own))
    run(theirs, again, range(10, 15))


def test_state_has_torchs_names_and_nothing_that_is_not_needed():
    for cls, options in VARIANTS:
        params = few_parameters()
        optimizer = MixedPrecisionOptimizer(cls(params, **options))
        feed(params, gradients_of(params, 0))
        optimizer.step()
        more = {"momentum_buffer"} if options.get("momentum") else set()
        more |= {"grad_avg"} if options.get("centered") else set()
        assert all(set(optimizer.state[param]) == {"step", *STATE[cls], *more} for param in params)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_the_initial_accumulator_is_not_rounded_to_the_parameters_type(dtype):
    """torch fills it in the parameter's type, when the optimizer is made; what a step has filled is kept."""
    params = parameters([dtype])
    inner = ADAGRAD(params, initial_accumulator_value=0.3)
    feed(params, [torch.ones_like(params[0]), None, None])
    inner.step()
    kept = inner.state[params[0]]["sum"].float()
    optimizer = MixedPrecisionOptimizer(inner)
    exact = torch.tensor(0.3)
    assert [bool((optimizer.state[p]["sum"] == exact).all()) for p in params] == [False, True, True]
    assert same_bits(optimizer.state[params[0]]["sum"], kept)
    late = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer.add_param_group({"params": [late]})
    assert (optimizer.state[late]["sum"] == exact).all()


def test_state_that_is_switched_on_later_starts_at_zero():
    """Where torch's step raises KeyError."""
    (param,) = few_parameters()[:1]
    optimizer = MixedPrecisionOptimizer(RMSPROP([param], lr=0.5))
    for step in range(2):
        feed([param], gradients_of([param], step))
        optimizer.step()
        optimizer.param_groups[0]["momentum"] = 0.9
    grad, state = gradients_of([param], 1)[0].float(), optimizer.state[param]
    expected = grad.double() / (state["square_avg"].double().sqrt() + 1e-8)
    torch.testing.assert_close(state["momentum_buffer"].double(), expected, rtol=4 * 2.0**-24, atol=0.0)


def test_a_variance_that_roundings_make_negative_is_zero():
    """torch takes its root, NaN; a NaN that comes in stays."""
    p, g = torch.zeros(3), torch.tensor([1.0, 1.0, math.nan])
    v, m = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.5, 1.0, 0.5])
    c = [1.0, 0.0, 1.0, 0.0, 0.5, 1.0, 0.0]  # alpha 1, eps 0.5, lr 1
    new, _ = rmsprop.rmsprop_centered(p, g, (v, m), c)
    assert new[1] == -2.0  # 1 / (0 + eps)
    assert new[:2].isfinite().all()
    assert new[2].isnan()


# Through prepare, with a scaler.


@every_case
@pytest.mark.parametrize("max_grad_norm", [None, 0.25])
def test_an_overflow_is_skipped_and_a_checkpoint_resumes(case, max_grad_norm):
    cls, options = case

    def make(params):
        return cls(params, lr=0.01, **options)

    model, optimizer, scaler = prepared(make, max_grad_norm=max_grad_norm)
    train(model, optimizer, scaler, range(4), overflow=[0, 2])
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (2, 2)
    before = snapshot(optimizer)
    train(model, optimizer, scaler, [4], overflow=[4])
    assert snapshot(optimizer) == before
    saved = model.state_dict(), optimizer.state_dict(), scaler.state_dict()
    again = prepared(make, seed=1, max_grad_norm=max_grad_norm)
    for one, state in zip(again, saved, strict=True):
        one.load_state_dict(state)
    for one in ((model, optimizer, scaler), again):
        train(*one, range(5, 8), overflow=[6])
    assert snapshot(again[1]) == snapshot(optimizer)
    assert snapshot(optimizer) != before


@every_variant
def test_the_losses_of_a_run_fall(case):
    cls, options = case
    model, scaler = network(), GradScaler(init_scale=2.0**10)
    make = cls(model.parameters(), lr=1.0 if cls is ADADELTA else 0.01, **options)
    optimizer = mpengine.prepare(model, make, scaler)
    x, y = torch.ones(4, 6).half(), torch.ones(4, 4)
    losses = []
    for _ in range(60):
        loss = (model(x).float() - y).square().mean()
        losses.append(loss.item())
        scaler.scale(loss).backward()
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


# Sabotage: the race must notice each.

WHOLE = (RMSPROP, {"momentum": 0.9, "centered": True, "weight_decay": 0.02, "eps": 1e-3})
PLAIN = (RMSPROP, {"weight_decay": 0.02})
SUM = (ADAGRAD, {"lr_decay": 0.1, "weight_decay": 0.02, "eps": 1e-3})
DELTA = (ADADELTA, {"weight_decay": 0.02, "eps": 1e-3})
ALL = [WHOLE, PLAIN, SUM, DELTA]


def without(index, value=0.0):
    return every_scalars(lambda f, h, step: f(replaced(h, index, value), step))


def _plain_for_centered(monkeypatch):
    def plain(p, g, slots, c):
        new, (v, b) = rmsprop.rmsprop_momentum(p, g, (slots[0], slots[2]), c)
        return new, (v, slots[1], b)

    monkeypatch.setitem(reference.RULES, "rmsprop_centered_momentum", plain)


SABOTAGE = {
    "sign flipped": (every_rule(flipped), ALL),
    "update skipped": (every_rule(skipped), ALL),
    "rate doubled": (every_rule(doubled), ALL),
    "rate a thousandth too high": (every_rule(a_thousandth_more), ALL),
    "state forgotten": (every_rule(state_forgotten), ALL),
    "clip dropped": (no_clip, ALL),
    "no weight decay": (without(3), ALL),
    "no eps": (without(2), [WHOLE, SUM]),
    "no momentum": (without(4), [WHOLE]),
    "not centered": (_plain_for_centered, [WHOLE]),
    "no lr_decay": (without(1), [SUM]),
    "step off by one": (every_scalars(lambda f, h, step: f(h, step + 1)), [SUM]),
    "another rho": (without(1, 0.91), [DELTA]),
    "another alpha": (without(1, 0.991), [WHOLE, PLAIN]),
    "maximize in RMSprop": (without(5, 1.0), [WHOLE, PLAIN]),
    "maximize": (without(4, 1.0), [SUM, DELTA]),
}


@pytest.mark.parametrize(
    ("sabotage", "case"),
    [
        pytest.param(install, case, id=f"{what}-{name(case)}")
        for what, (install, cases) in SABOTAGE.items()
        for case in cases
    ],
)
def test_a_sabotaged_update_is_noticed(sabotage, case, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_module", reference)
    race = Race(*case, max_grad_norm=1.0)
    sabotage(monkeypatch)
    with pytest.raises(AssertionError, match="ours is beyond its bound"):
        race.run(range(20))


def test_without_sabotage_the_same_race_is_clean():
    for case in ALL:
        Race(*case, max_grad_norm=1.0).run(range(20))
