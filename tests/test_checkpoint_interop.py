"""Runs that move between torch and mpengine mid-way: optimizers' and scalers' states, FP32 weights, and bad states."""

from __future__ import annotations

import copy
import io
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    feed,
    frozen,
    gradients,
    network,
    parameters,
    params_of,
    prepared,
    same_bits,
    snapshot,
    started,
    train,
)
from tests.oracle import Oracle


def through_a_file(value):
    """`torch.save` and the safe `torch.load`."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


class Weights(nn.Module):
    """A vector, a matrix and a scalar; gradients are fed by hand."""

    def __init__(self, seed=0):
        super().__init__()
        for i, param in enumerate(parameters([SINGLE], seed)):
            self.register_parameter(f"weight{i}", param)


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
CASES = {
    "sgd": (SGD, {}),
    "sgd-decay-maximize": (SGD, {"weight_decay": 0.02, "maximize": True}),
    "momentum": (SGD, {"momentum": 0.9}),
    "momentum-nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    "momentum-dampening": (SGD, {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    "adam": (ADAM, {}),
    "adam-l2": (ADAM, {"weight_decay": 0.02, "maximize": True}),
    "adam-amsgrad": (ADAM, {"amsgrad": True, "betas": (0.5, 0.9)}),
    "adam-decoupled": (ADAM, {"weight_decay": 0.02, "decoupled_weight_decay": True, "eps": 1e-3}),
    "adamw": (ADAMW, {"weight_decay": 0.1}),
    "adamw-amsgrad": (ADAMW, {"amsgrad": True, "maximize": True}),
}
FLAGS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}, "tensor-lr": {}}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_flag = pytest.mark.parametrize("flags", FLAGS)


def make(case, params, flags="for-loop"):
    cls, options = case
    lr = torch.tensor(0.01) if flags == "tensor-lr" else 0.01
    return cls(params, lr=lr, **options, **FLAGS[flags])


def oracle_of(case, params):
    return Oracle(list(params), case[0].__name__.lower())


def take_steps(optimizer, steps, oracle=None):
    """Feeds gradients that fp16 holds exactly, the same to whoever steps them."""
    params = params_of(optimizer)
    for step in steps:
        grads = [grad.half().to(p.dtype) for grad, p in zip(gradients(params, step), params, strict=True)]
        feed(params, grads)
        optimizer.step()
        if oracle is not None:
            oracle.step([grad.float() for grad in grads], optimizer.param_groups[0])


def into_ours(case, state, weights, order, dtype=HALF, flags="for-loop"):
    """A prepared model elsewhere, already trained on something else, that takes the run over."""
    model = Weights(seed=1)
    ours = mpengine.prepare(model, make(case, model.parameters(), flags), dtype=dtype)
    take_steps(ours, [90, 91])
    for part in order:
        if part == "optimizer":
            ours.load_state_dict(through_a_file(state))
        else:
            model.load_state_dict(through_a_file(weights))
    return model, ours


# Optimizers, there and back.


@every_flag
@every_case
@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")], ids="-".join)
def test_a_run_moves_from_torch_to_us_and_back(case, flags, order):
    """4 steps by torch, 4 by us, 4 by torch: within the bound of 12 steps that torch takes by itself, at every step."""
    source = Weights()
    theirs = make(case, source.parameters(), flags)
    oracle = oracle_of(case, source.parameters())
    take_steps(theirs, range(4), oracle)
    model, ours = into_ours(case, theirs.state_dict(), source.state_dict(), order, flags=flags)
    moments = [{k: v for k, v in ours.state[p].items() if v is not None} for p in model.parameters()]
    assert same_bits(list(ours.master_params()), list(source.parameters()))
    for own, param in zip(moments, source.parameters(), strict=True):
        saved = theirs.state[param]
        assert set(own) >= {k for k, v in saved.items() if v is not None}
        assert all(float(own[k]) == float(v) if k == "step" else same_bits(own[k], v) for k, v in saved.items() if k)
    assert ours.steps_taken == (4 if "step" in theirs.state[source.weight0] else 0)
    take_steps(ours, range(4, 8), oracle)
    assert oracle.distance([m.detach() for m in ours.master_params()], 1) <= 1.0

    back = Weights(seed=2)
    plain = make(case, back.parameters(), flags)
    plain.load_state_dict(through_a_file(ours.torch_state_dict()))
    back.load_state_dict(through_a_file(ours.fp32_state_dict(model)))
    assert same_bits(list(back.parameters()), list(ours.master_params()))
    take_steps(plain, range(8, 12), oracle)
    assert oracle.distance(list(back.parameters()), 1) <= 1.0


def _moments_forgotten(model, ours, weights):
    ours.state.clear()


def _weights_rounded(model, ours, weights):
    with torch.no_grad():
        for master in ours.master_params():
            master.copy_(master.half())


def _step_lost(model, ours, weights):
    for param in model.parameters():
        if "step" in ours.state[param]:
            ours.state[param]["step"] -= 1
        else:
            ours.state[param]["momentum_buffer"].mul_(1.001)


@pytest.mark.parametrize("break_it", [_moments_forgotten, _weights_rounded, _step_lost])
@pytest.mark.parametrize("case", [CASES["momentum"], CASES["adam"], CASES["adamw-amsgrad"]], ids=["sgd", "adam", "w"])
def test_the_bound_catches_what_a_load_may_lose(case, break_it):
    source = Weights()
    theirs = make(case, source.parameters())
    oracle = oracle_of(case, source.parameters())
    take_steps(theirs, range(4), oracle)
    model, ours = into_ours(case, theirs.state_dict(), source.state_dict(), ("optimizer", "model"))
    break_it(model, ours, source.state_dict())
    take_steps(ours, range(4, 8), oracle)
    assert oracle.distance([m.detach() for m in ours.master_params()], 1) > 1.0


@every_case
def test_fp32_weights_of_torch_before_prepare(case):
    """The other way in: the weights first, then prepare, then the optimizer's state; a stale master does no harm."""
    source = Weights()
    theirs = make(case, source.parameters())
    oracle = oracle_of(case, source.parameters())
    ours = mpengine.prepare(first := Weights(), make(case, first.parameters()))
    theirs.load_state_dict(ours.state_dict())  # with masters, which torch keeps as they are and saves again
    take_steps(theirs, range(4), oracle)
    state = through_a_file(theirs.state_dict())
    assert "master" in state["state"][0]
    model = Weights(seed=1)
    model.load_state_dict(source.state_dict())
    ours = mpengine.prepare(model, make(case, model.parameters()))
    ours.load_state_dict(state)
    assert same_bits(list(ours.master_params()), list(source.parameters()))
    take_steps(ours, range(4, 8), oracle)
    assert oracle.distance([m.detach() for m in ours.master_params()], 1) <= 1.0


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("kind", EVERY)
def test_states_pass_through_torch_unchanged(kind, dtype):
    """Ours, into a plain optimizer, its state back into ours: nothing is rounded, so it is as if nothing happened."""
    model = network()
    ours = mpengine.prepare(model, EVERY[kind](model.parameters()), dtype=dtype)
    take_steps(ours, range(3))
    plain_model = network(seed=1)
    plain = EVERY[kind](plain_model.parameters())
    plain.load_state_dict(through_a_file(ours.torch_state_dict()))
    plain_model.load_state_dict(ours.fp32_state_dict(model))
    again = mpengine.prepare(other := network(seed=2), EVERY[kind](other.parameters()), dtype=dtype)
    other.load_state_dict(plain_model.state_dict())
    again.load_state_dict(through_a_file(plain.state_dict()))
    assert snapshot(again) == snapshot(ours)
    if kind in GENERAL:  # then both take the very same step
        take_steps(ours, [3])
        take_steps(again, [3])
        assert snapshot(again) == snapshot(ours)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_state_for_torch_starts_what_was_never_stepped(kind, steps):
    """An idle parameter has a master and no state of its own; torch's step must find nothing there."""
    params = parameters([HALF])
    ours = MixedPrecisionOptimizer(EVERY[kind](params))
    for _ in range(steps):
        feed(params, [gradients(params, 0)[0], None, None])
        ours.step()
    state = ours.torch_state_dict()
    assert set(state) == {"state", "param_groups"}
    assert all(own and "master" not in own for own in state["state"].values())
    assert all("master" in own for own in ours.state_dict()["state"].values())
    weights = [nn.Parameter(m.detach().clone()) for m in ours.master_params()]
    plain = EVERY[kind](weights)
    plain.load_state_dict(through_a_file(state))
    take_steps(plain, [1])
    assert all(w.isfinite().all() for w in weights)


def test_named_parameters_and_groups():
    """Two groups of named parameters with options of their own; each against its own equations."""

    def build(module):
        named = list(module.named_parameters())
        return torch.optim.AdamW(
            [{"params": named[:1], "lr": 0.02}, {"params": named[1:], "weight_decay": 0.3, "amsgrad": True}]
        )

    source = Weights()
    theirs = build(source)
    oracles = [Oracle([p.detach() for p in group["params"]], "adam") for group in theirs.param_groups]

    def both(optimizer, steps):
        for step in steps:
            params = params_of(optimizer)
            grads = [grad.half().to(p.dtype) for grad, p in zip(gradients(params, step), params, strict=True)]
            feed(params, grads)
            optimizer.step()
            oracles[0].step([grads[0].float()], optimizer.param_groups[0])
            oracles[1].step([g.float() for g in grads[1:]], optimizer.param_groups[1])

    both(theirs, range(4))
    model = Weights(seed=1)
    ours = mpengine.prepare(model, build(model))
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    model.load_state_dict(source.state_dict())
    assert [group["param_names"] for group in ours.param_groups] == [["weight0"], ["weight1", "weight2"]]
    assert [group["lr"] for group in ours.param_groups] == [0.02, 1e-3]
    both(ours, range(4, 8))
    masters = [m.detach() for m in ours.master_params()]
    assert oracles[0].distance(masters[:1], 1) <= 1.0
    assert oracles[1].distance(masters[1:], 1) <= 1.0


def test_steps_taken_is_the_largest_step_of_torchs_state():
    """An idle parameter lags behind; a state of ours keeps its own numbers, whatever its parameters' steps are."""
    params = parameters([SINGLE])
    theirs = torch.optim.Adam(params)
    for step in range(5):
        feed(params, [grad if i or step < 2 else None for i, grad in enumerate(gradients(params, step))])
        theirs.step()
    ours = MixedPrecisionOptimizer(torch.optim.Adam(parameters([HALF])))
    ours.load_state_dict(theirs.state_dict())
    assert (ours.steps_taken, ours.steps_skipped) == (5, 0)
    state = ours.state_dict()
    state["mpengine"] = {**state["mpengine"], "steps_taken": 40, "steps_skipped": 3}
    ours.load_state_dict(state)
    assert (ours.steps_taken, ours.steps_skipped) == (40, 3)
    ours.load_state_dict(torch.optim.Adam(parameters([SINGLE])).state_dict())
    assert (ours.steps_taken, ours.steps_skipped) == (0, 0)


# Scalers.


class Losses:
    """A scaler, and losses that overflow when they are told to: loss k trains weight k of one plain optimizer."""

    def __init__(self, scaler, num_losses):
        self.scaler, self.num_losses = scaler, num_losses
        self.params = [nn.Parameter(torch.ones(1)) for _ in range(num_losses)]
        self.optimizer = torch.optim.SGD(self.params, lr=0.0)
        if num_losses > 1:
            scaler.watch(self.optimizer)

    def update(self, overflows):
        for k, overflow in enumerate(overflows):
            loss = self.params[k].sum() * (math.inf if overflow else 1.0)
            ids = {"loss_id": k} if self.num_losses > 1 else {}
            self.scaler.scale(loss, **ids).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return self.numbers()

    def numbers(self):
        values = (self.scaler._scale, self.scaler._growth_tracker)
        return [value.reshape(-1).tolist() for value in values]


HISTORY = [False, True, False, False, False, True, True, False, False, False, False, False, True, False, False, False]
POLICY = {"init_scale": 2.0**12, "growth_factor": 1.5, "backoff_factor": 0.3, "growth_interval": 3}


@pytest.mark.parametrize("num_losses", [1, 3])
@pytest.mark.parametrize("stop", range(0, 12, 3))
@pytest.mark.parametrize("running", [False, True])
def test_a_scaler_moves_from_torch_to_us_and_back(num_losses, stop, running):
    """Every loss goes on as torch's one scale would, and each may go back; in use before, or fresh."""
    theirs = Losses(torch.amp.GradScaler("cpu", **POLICY), 1)
    for overflow in HISTORY[:stop]:
        theirs.update([overflow])
    ours = Losses(GradScaler("cpu", num_losses=num_losses), num_losses)
    if running:
        ours.update([True] + [False] * (num_losses - 1))
    ours.scaler.load_state_dict(through_a_file(theirs.scaler.state_dict()))
    for overflow in HISTORY[stop : stop + 4]:
        one = theirs.update([overflow])
        assert ours.update([overflow] * num_losses) == [part * num_losses for part in one]
    state = through_a_file(ours.scaler.state_dict())
    for loss_id in range(num_losses):
        plain = through_a_file(ours.scaler.torch_state_dict(loss_id))
        back = Losses(torch.amp.GradScaler("cpu"), 1)
        if running:
            back.update([True])
        back.scaler.load_state_dict(plain if num_losses > 1 else state)
        twin = Losses(torch.amp.GradScaler("cpu"), 1)
        twin.scaler.load_state_dict(theirs.scaler.state_dict())
        for overflow in HISTORY[stop + 4 :]:
            assert back.update([overflow]) == twin.update([overflow])
        assert back.scaler.state_dict() == twin.scaler.state_dict()


def test_a_scale_of_one_loss_comes_back_alone():
    ours = Losses(GradScaler("cpu", init_scale=256.0, num_losses=3), 3)
    ours.update([False, True, False])
    ours.update([False, True, True])
    assert ours.scaler.state_dict()["scale"] == [256.0, 64.0, 128.0]
    plain = ours.scaler.torch_state_dict(1)
    assert set(plain) == set(torch.amp.GradScaler("cpu").state_dict())
    with pytest.raises(ValueError, match="loss_id is 3"):
        ours.scaler.torch_state_dict(3)
    again = GradScaler("cpu", num_losses=2)
    again.load_state_dict(plain)
    assert again.state_dict()["scale"] == [64.0, 64.0]


def _scaler_state():
    losses = Losses(GradScaler("cpu", init_scale=256.0, num_losses=2), 2)
    losses.update([False, True])
    return losses.scaler.state_dict()


SCALER_WRONG = {
    "empty": (lambda s: {}, RuntimeError, "source state dict is empty"),
    "a list": (lambda s: [s], TypeError, "state_dict is a list; give the dict"),
    "no scale": (lambda s: _without(s, "scale"), RuntimeError, "no key 'scale'"),
    "no tracker": (lambda s: _without(s, "_growth_tracker"), RuntimeError, "no key '_growth_tracker'"),
    "no interval": (lambda s: _without(s, "growth_interval"), RuntimeError, "no key 'growth_interval'"),
    "NaN": (lambda s: {**s, "scale": [1.0, math.nan]}, RuntimeError, "scale of loss 1 is nan, outside"),
    "inf": (lambda s: {**s, "scale": [math.inf, 1.0]}, RuntimeError, "scale of loss 0 is inf, outside"),
    "zero": (lambda s: {**s, "scale": [0.0, 1.0]}, RuntimeError, r"scale of loss 0 is 0\.0, outside"),
    "text": (lambda s: {**s, "scale": ["x", 1.0]}, (RuntimeError, ValueError), "could not convert|cannot be read"),
    "None": (lambda s: {**s, "scale": [None, 1.0]}, RuntimeError, "cannot be read"),
    "three scales": (lambda s: {**s, "scale": [1.0] * 3}, RuntimeError, "3 scales, 2 growth trackers and 2 rows"),
    "one tracker": (lambda s: {**s, "_growth_tracker": 0}, RuntimeError, "2 scales, 1 growth trackers and 2 rows"),
    "negative": (lambda s: {**s, "_growth_tracker": [-1, 0]}, RuntimeError, "counters of loss 0 are .*none is neg"),
    "growth": (lambda s: {**s, "growth_factor": 0.5}, ValueError, r"growth_factor is 0\.5"),
    "backoff": (lambda s: {**s, "backoff_factor": math.nan}, ValueError, "backoff_factor is nan"),
    "growth None": (lambda s: {**s, "growth_factor": None}, ValueError, "growth_factor is None; it must be a number"),
    "extra": (lambda s: {**s, "mpengine": 3}, RuntimeError, "cannot be read"),
    "three losses": (
        lambda s: GradScaler("cpu", num_losses=3).state_dict(),
        RuntimeError,
        "holds 3 losses, this scaler has num_losses=2",
    ),
}


def _without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(("change", "error", "message"), SCALER_WRONG.values(), ids=SCALER_WRONG)
@pytest.mark.parametrize("running", [False, True])
def test_a_scalers_state_that_does_not_fit_is_refused_and_changes_nothing(change, error, message, running):
    scaler = GradScaler("cpu", init_scale=32.0, num_losses=2, hysteresis=2)
    if running:
        started(scaler)
    before = scaler.state_dict()
    with pytest.raises(error, match=message):
        scaler.load_state_dict(change(_scaler_state()))
    assert scaler.state_dict() == before


# Bad states of optimizers: what tests.test_checkpoint does not have.


def _put(path, value):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def _drop(path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


WRONG = {
    "step missing": (_drop(["state", 1, "step"]), r"missing: \['step'\]"),
    "a step that is NaN": (_put(["state", 1, "step"], torch.tensor(math.nan)), "saved step of .* must be a number"),
    "a step that is inf": (_put(["state", 1, "step"], math.inf), "saved step of .* must be a number"),
    "a step below 0": (_put(["state", 1, "step"], -1), "saved step of .* must be a number, not -1; steps count from 0"),
    "two steps": (_put(["state", 1, "step"], torch.zeros(2)), "saved step of .* must be a number"),
    "a moment of None": (_put(["state", 1, "exp_avg"], None), "saved exp_avg of .* is None"),
    "a sparse moment": (_put(["state", 1, "exp_avg"], torch.zeros(9).to_sparse()), "must be a floating-point tensor"),
    "a complex moment": (_put(["state", 1, "exp_avg"], torch.zeros(9, 6) * 1j), "must be a floating-point tensor"),
    "a meta moment": (_put(["state", 1, "exp_avg"], torch.zeros(9, device="meta")), "must be a floating-point tensor"),
    "an integer master": (_put(["state", 0, "master"], torch.zeros(9, 6).int()), "saved master of .* floating-point"),
    "another master": (_put(["state", 0, "master"], torch.zeros(6, 9)), r"master of .* has shape \(6, 9\)"),
    "states as a list": (_put(["state"], [1]), "no dict of dicts"),
    "a state as a number": (_put(["state", 1], 3.0), "no dict of dicts"),
    "groups as a dict": (_put(["param_groups"], {}), "no list of dicts"),
    "a group as a number": (_put(["param_groups", 0], 5), "no list of dicts"),
    "no params": (_drop(["param_groups", 0, "params"]), "no list of dicts"),
    "the same twice": (_put(["param_groups", 0, "params"], [0, 1, 2, 3, 4, 4]), "name a parameter twice"),
    "lr as text": (_put(["param_groups", 0, "lr"], "fast"), "values that Adam cannot use"),
    "one beta": (_put(["param_groups", 0, "betas"], 0.9), "values that Adam cannot use"),
    "extra": (_put(["mpengine"], "Adam"), "saved 'mpengine' must be a dict"),
    "steps taken": (_put(["mpengine", "steps_taken"], "many"), "saved steps_taken must be an integer"),
    "steps skipped": (_put(["mpengine", "steps_skipped"], -1), "saved steps_skipped must be an integer"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("fp32_first", [False, True])
def test_a_bad_state_is_refused_and_changes_nothing(change, message, fp32_first):
    model, optimizer, scaler = prepared()
    train(model, optimizer, scaler, range(2))
    state = through_a_file(optimizer.state_dict())
    train(model, optimizer, scaler, range(2, 4), overflow=[3])
    if fp32_first:
        model.load_state_dict(network(seed=5).state_dict())
    whole = (snapshot(optimizer), frozen(model.state_dict()), scaler.state_dict())
    counts = (optimizer.steps_taken, optimizer.steps_skipped, dict(optimizer._loaded))
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert (snapshot(optimizer), frozen(model.state_dict()), scaler.state_dict()) == whole
    assert (optimizer.steps_taken, optimizer.steps_skipped, dict(optimizer._loaded)) == counts
    train(model, optimizer, scaler, [4])
    assert optimizer.steps_taken == counts[0] + 1


@pytest.mark.parametrize("value", [None, [1], "state", 3])
def test_what_is_no_dict_is_refused(value):
    _, optimizer, _ = prepared()
    before = snapshot(optimizer)
    with pytest.raises(TypeError, match=r"state_dict is a .*; give the dict that state_dict"):
        optimizer.load_state_dict(value)
    assert snapshot(optimizer) == before


def test_sgd_refuses_a_state_that_counts_steps():
    _, optimizer, _ = prepared(FUSED["momentum"])
    before, state = snapshot(optimizer), optimizer.state_dict()
    state["state"][0] = {**state["state"][0], "step": 3}
    with pytest.raises(ValueError, match=r"unknown: \['step'\]"):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


GENERAL_WRONG = {
    "missing": (lambda own: own.pop("exp_inf"), r"has \['exp_avg', 'step'\], that of parameter"),
    "surplus": (lambda own: own.update(sum=torch.zeros(4)), r"has \['exp_avg', 'exp_inf', 'step', 'sum'\], that of"),
    "shape": (lambda own: own.update(exp_inf=torch.zeros(3)), r"exp_inf of parameter '3\.\w+' has shape \(3,\)"),
    "transposed": (lambda own: own.update(exp_inf=torch.zeros(9, 4)), r"exp_inf of parameter '3\.\w+' has shape"),
    "step": (lambda own: own.update(step=math.nan), "saved step of .* must be a number"),
}


@pytest.mark.parametrize("index", [4, 5])  # a matrix and a vector
@pytest.mark.parametrize(("change", "message"), GENERAL_WRONG.values(), ids=GENERAL_WRONG)
def test_a_bad_state_of_a_general_optimizer_is_refused(change, message, index):
    model, optimizer, scaler = prepared(GENERAL["Adamax"])
    train(model, optimizer, scaler, range(2))
    before, state = snapshot(optimizer), through_a_file(optimizer.state_dict())
    change(state["state"][index])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before


# Any history of saves and loads, ours to ours, is as if nothing had happened.

ACTIONS = st.one_of(
    st.tuples(st.just("train"), st.integers(0, 99), st.booleans()),
    st.tuples(st.just("resume"), st.permutations([0, 1, 2]), st.booleans()),
    st.tuples(st.just("torch"), st.booleans(), st.booleans()),
    st.tuples(st.just("reload"), st.permutations([0, 1, 2]), st.booleans()),
    st.tuples(st.just("look"), st.none(), st.none()),
)


class Interrupted:
    """A run that is saved and loaded all the time."""

    def __init__(self, kind):
        self.make = EVERY[kind]
        self.run = prepared(self.make)

    def parts(self, exported):
        model, optimizer, scaler = self.run
        weights = optimizer.fp32_state_dict(model) if exported else model.state_dict()
        return through_a_file([weights, optimizer.state_dict(), scaler.state_dict()])

    def train(self, seed, overflow):
        train(*self.run, [seed], overflow=[seed] if overflow else [])

    def resume(self, order, exported):
        """Into new objects."""
        parts = self.parts(exported)
        self.run = prepared(self.make, seed=7)
        self._load(parts, order)

    def reload(self, order, exported):
        """Into these objects, after they went astray."""
        parts = self.parts(exported)
        train(*self.run, [50, 51])
        self.run[0].load_state_dict(network(seed=8).state_dict())
        if exported:
            train(*self.run, [52])
        self._load(parts, order)

    def _load(self, parts, order):
        for part in order:
            self.run[part].load_state_dict(parts[part])

    def torch(self, weights_first, before_prepare):
        """By way of a plain torch optimizer and torch's scaler, on FP32 weights."""
        model, optimizer, scaler = self.run
        plain_model = network(seed=7)
        plain_model.load_state_dict(through_a_file(optimizer.fp32_state_dict(model)))
        plain = self.make(plain_model.parameters())
        plain.load_state_dict(through_a_file(optimizer.torch_state_dict()))
        plain_scaler = torch.amp.GradScaler("cpu")
        plain_scaler.load_state_dict(through_a_file(scaler.state_dict()))
        started(scaler := GradScaler("cpu"))
        scaler.load_state_dict(plain_scaler.state_dict())
        model = plain_model if before_prepare else network(seed=9)
        state = through_a_file(plain.state_dict())
        weights = through_a_file(plain_model.state_dict())
        optimizer = mpengine.prepare(model, self.make(model.parameters()), scaler)
        if weights_first and not before_prepare:
            model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        if not weights_first and not before_prepare:
            model.load_state_dict(weights)
        self.run = (model, optimizer, scaler)

    def look(self, *_):
        snapshot(self.run[1])


HISTORIES = {
    "kind": st.sampled_from([*FUSED, "Adamax", "NAdam"]),
    "actions": st.lists(ACTIONS, min_size=3, max_size=9),
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**HISTORIES)
def test_any_history_of_saves_and_loads(kind, actions):
    live(kind, actions)


@pytest.mark.fuzz
@settings(max_examples=500, deadline=None)
@given(**HISTORIES)
def test_any_longer_history_of_saves_and_loads(kind, actions):
    live(kind, actions * 2)


def live(kind, actions):
    """The same run, left alone and interrupted, ends bitwise the same."""
    whole, run = prepared(EVERY[kind]), Interrupted(kind)
    for name, a, b in actions:
        getattr(run, name)(a, b)
        if name == "train":
            train(*whole, [a], overflow=[a] if b else [])
    model, optimizer, scaler = run.run
    assert same_bits(model.state_dict(), whole[0].state_dict())
    assert same_bits(optimizer.fp32_state_dict(model), whole[1].fp32_state_dict(whole[0]))
    train(*run.run, [60])
    train(*whole, [60])
    assert snapshot(optimizer) == snapshot(whole[1])
    assert [scaler.get_scale(), scaler._get_growth_tracker()] == [
        whole[2].get_scale(),
        whole[2]._get_growth_tracker(),
    ]


def test_the_uninterrupted_runs_differ_where_a_load_is_left_out():
    """The comparison above sees it when one part is not loaded."""
    for left_out in range(3):
        run, whole = Interrupted("adam"), prepared(FUSED["adam"])
        for one in (run.run, whole):
            train(*one, range(3), overflow=[1])
        parts = run.parts(exported=False)
        run.run = prepared(run.make, seed=7)
        run._load(parts, [part for part in range(3) if part != left_out])
        for one in (run.run, whole):
            train(*one, [3, 4], overflow=[4])
        same = snapshot(run.run[1]) == snapshot(whole[1]) and run.run[2].state_dict() == whole[2].state_dict()
        assert not same


def test_every_part_of_a_checkpoint_is_safe_to_load():
    """weights_only=True: tensors, numbers, strings, lists and dicts, whatever the optimizer."""
    for kind, losses in itertools.product(("adam", "momentum", "Adafactor"), (1, 3)):
        model = network()
        scaler = started(GradScaler("cpu", num_losses=losses))
        optimizer = mpengine.prepare(model, EVERY[kind](model.parameters()), scaler)
        parts = [optimizer.state_dict(), optimizer.torch_state_dict(), optimizer.fp32_state_dict(model)]
        parts += [scaler.state_dict(), model.state_dict()]
        assert same_bits(through_a_file(parts), copy.deepcopy(parts))


def test_the_pages_python_runs(tmp_path, monkeypatch):
    page = Path(__file__).parents[1] / "docs" / "checkpoints.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    assert len(blocks) == 9
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    assert namespace["optimizer"].steps_taken == 3
