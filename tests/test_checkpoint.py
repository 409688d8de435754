"""Save, load and resume is bitwise never having stopped; a state that does not fit is refused, and nothing changed."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer
from tests.harness import (
    EVERY,
    FUSED,
    GENERAL,
    HALF,
    SINGLE,
    feed,
    frozen,
    gradients,
    parameters,
    prepared,
    same_bits,
    snapshot,
    train,
    twins_of,
)
from tests.oracle import Oracle

every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
one_of_each_path = pytest.mark.parametrize("make", [FUSED["adam"], GENERAL["Adamax"]], ids=["fused", "general"])


def through_a_file(value):
    """`torch.save` and the safe `torch.load`: plain numbers, strings, lists and tensors alone."""
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def saved(model, optimizer, scaler):
    return through_a_file(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    )


# Resuming.


@every_optimizer
@pytest.mark.parametrize("order", list(itertools.permutations(["model", "optimizer", "scaler"])), ids="-".join)
def test_resuming_is_never_having_stopped(make, order):
    run = prepared(make)
    train(*run, range(5), overflow=[1, 3])
    state = saved(*run)
    model, optimizer, scaler = again = prepared(make, seed=1)
    for part, target in zip(
        order, [{"model": model, "optimizer": optimizer, "scaler": scaler}[p] for p in order], strict=True
    ):
        target.load_state_dict(state[part])
    assert snapshot(optimizer)[1:] == snapshot(run[1])[1:]
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (3, 2)
    for one in (run, again):
        train(*one, range(5, 10), overflow=[6])
    assert snapshot(optimizer) == snapshot(run[1])
    assert same_bits(model.state_dict(), run[0].state_dict())
    assert scaler.state_dict() == run[2].state_dict()
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (7, 3)


@every_optimizer
@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("overflow", [[], [0]])
def test_resuming_at_any_point(make, stop, overflow):
    """At the very start and after a first step that was skipped, too: momentum must still begin with the gradient."""
    whole = prepared(make)
    train(*whole, range(6), overflow=overflow)
    first = prepared(make)
    train(*first, range(stop), overflow=overflow)
    state = saved(*first)
    model, optimizer, scaler = second = prepared(make, seed=2)
    optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])
    scaler.load_state_dict(state["scaler"])
    train(*second, range(stop, 6), overflow=overflow)
    assert snapshot(optimizer) == snapshot(whole[1])
    assert scaler.state_dict() == whole[2].state_dict()


@every_optimizer
def test_loading_over_a_run_that_is_under_way(make):
    """Everything of the old run is gone: moments, counts, masters, and the overflow that it ended with."""
    run = prepared(make)
    train(*run, range(3))
    state = saved(*run)
    train(*run, range(3, 6))
    other = prepared(make, seed=4)
    train(*other, range(7, 12), overflow=[11])
    model, optimizer, scaler = other
    optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])
    scaler.load_state_dict(state["scaler"])
    train(*other, range(3, 6))
    assert snapshot(optimizer) == snapshot(run[1])
    assert optimizer.steps_taken == 6


@every_optimizer
@pytest.mark.parametrize("by_torch", [False, True])
def test_loading_a_state_from_before_the_first_step(make, by_torch):
    """Whatever the run had gathered is gone; torch saves nothing at all for a parameter that was never stepped."""
    params, other = parameters(), parameters()
    optimizer, fresh = MixedPrecisionOptimizer(make(params)), MixedPrecisionOptimizer(make(other))
    start = make(parameters([SINGLE] * 3)).state_dict() if by_torch else copy.deepcopy(fresh.state_dict())
    weights = [p.detach().clone() for p in params]
    for step in range(2):
        feed(params, gradients(params, step))
        optimizer.step()
    optimizer.load_state_dict(start)
    with torch.no_grad():
        for param, master, value in zip(params, optimizer.master_params(), weights, strict=True):
            param.copy_(value)
            master.copy_(value)  # torch's state has none
    for step in range(3):
        for own, one in ((params, optimizer), (other, fresh)):
            feed(own, gradients(own, step))
            one.step()
    assert snapshot(optimizer) == snapshot(fresh)


@pytest.mark.parametrize("make", [*FUSED.values(), GENERAL["Adamax"]], ids=[*FUSED, "Adamax"])
def test_the_state_of_another_model_gives_way_to_the_weights(make):
    """Only the optimizer is loaded: moments are the saved ones, masters follow the model that is there."""
    trained, optimizer, scaler = prepared(make)
    train(trained, optimizer, scaler, range(3))
    model, other, its_scaler = prepared(make, seed=1)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"] = 0.0
    assert same_bits(dict(model.named_parameters()), weights)
    train(model, other, its_scaler, [3])
    for master, param in zip(other.master_params(), weights.values(), strict=True):
        torch.testing.assert_close(master.detach(), param.float(), rtol=2.0**-10, atol=2.0**-10)


@one_of_each_path
def test_the_state_is_a_copy(make):
    """Training on after loading leaves the state dict alone, and the other way round."""
    run = prepared(make)
    train(*run, range(2))
    state = copy.deepcopy(run[1].state_dict())
    before = frozen(state)
    again = prepared(make)
    again[1].load_state_dict(state)
    train(*again, range(2, 4))
    assert frozen(state) == before


def test_a_tensor_lr_is_not_shared_with_the_state():
    params, other = parameters(), parameters()
    first = MixedPrecisionOptimizer(torch.optim.Adam(params, lr=torch.tensor(0.5)))
    second = MixedPrecisionOptimizer(torch.optim.Adam(other, lr=torch.tensor(0.25)))
    second.load_state_dict(first.state_dict())
    first.param_groups[0]["lr"].fill_(9.0)
    assert second.param_groups[0]["lr"] == 0.5


@every_optimizer
def test_frozen_layers_keep_their_state_through_a_checkpoint(make):
    """Trained, frozen, saved; loaded where they were frozen from the start; thawed."""

    def run(stop_at):
        model, optimizer, scaler = one = prepared(make)
        for phase, frozen_now in enumerate((False, True, False)):
            if phase == stop_at:
                state = saved(*one)
                model = one[0].__class__(*prepared(seed=3)[0].float().children())
                for param in model[0].parameters():
                    param.requires_grad = not frozen_now
                scaler = GradScaler(init_scale=2.0**10, growth_interval=3)
                optimizer = mpengine.prepare(model, make(model.parameters()), scaler)
                one = (model, optimizer, scaler)
                optimizer.load_state_dict(state["optimizer"])
                model.load_state_dict(state["model"])
                scaler.load_state_dict(state["scaler"])
            for param in model[0].parameters():
                param.requires_grad = not frozen_now
            train(*one, range(3 * phase, 3 * phase + 3))
        return snapshot(one[1])

    assert run(None) == run(1) == run(2)


# Formats.


def test_the_format_is_torchs_with_a_master_beside_each_state():
    params = parameters([HALF, SINGLE])
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    feed(params, gradients(params, 0))
    optimizer.step()
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "mpengine"}
    assert state["mpengine"] == {"optimizer": "Adam", "steps_taken": 1, "steps_skipped": 0}
    assert state["param_groups"][0]["params"] == list(range(6))
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq", "master"}
    assert set(state["state"][3]) == {"step", "exp_avg", "exp_avg_sq"}
    assert same_bits(state["state"][0]["step"], torch.tensor(1.0))
    assert {t.dtype for own in state["state"].values() for t in own.values()} == {SINGLE}


def test_the_masters_in_a_state_are_exact():
    model, optimizer, scaler = prepared()
    train(model, optimizer, scaler, range(3))
    state = optimizer.state_dict()["state"]
    for i, (param, master) in enumerate(zip(model.parameters(), optimizer.master_params(), strict=True)):
        assert ("master" in state[i]) == (param.dtype == HALF)
        if param.dtype == HALF:
            assert same_bits(state[i]["master"], master)
    assert not same_bits(state[0]["master"], model[0].weight.float())


@pytest.mark.parametrize("name", FUSED)
def test_a_state_of_torchs_optimizer_is_loaded(name):
    """Its FP32 moments are not rounded to the parameters' dtype, as torch's own load_state_dict would round them."""
    make, params = FUSED[name], parameters([SINGLE])
    theirs = FUSED[name](params)
    oracle = Oracle.of(params, theirs)
    for step in range(4):
        grads = gradients(params, step)
        feed(params, grads)
        theirs.step()
        oracle.step(grads, theirs.param_groups[0])
    own = [nn.Parameter(p.detach().half()) for p in params]
    ours = MixedPrecisionOptimizer(make(own))
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for master, param in zip(ours.master_params(), params, strict=True):
        master.data.copy_(param.data)
    for param, twin in zip(own, params, strict=True):
        for key in theirs.state[twin].keys() - {"step"}:
            assert same_bits(ours.state[param][key], theirs.state[twin][key])
    for step in range(4, 6):
        grads = gradients(own, step)
        feed(own, grads)
        ours.step()
        oracle.step(grads, theirs.param_groups[0])
    assert oracle.distance(list(ours.master_params()), 1) <= 1.0


@every_optimizer
def test_torchs_optimizer_loads_our_state(make):
    params = parameters([SINGLE])
    twins = twins_of(params)
    ours, theirs = MixedPrecisionOptimizer(make(params)), make(twins)
    for step in range(3):
        feed(params, gradients(params, step))
        ours.step()
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    with torch.no_grad():
        for twin, param in zip(twins, params, strict=True):
            twin.copy_(param)
    for own, one in ((params, ours), (twins, theirs)):
        feed(own, gradients(own, 5))
        one.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)


def test_a_state_of_an_older_torch_gets_the_options_it_did_not_know():
    params = parameters()
    optimizer = MixedPrecisionOptimizer(torch.optim.Adam(params, lr=0.5, amsgrad=True))
    state = optimizer.state_dict()
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
        del state["param_groups"][0][key]
    optimizer.load_state_dict(state)
    feed(params, gradients(params, 0))
    optimizer.step()
    assert optimizer.param_groups[0]["maximize"] is False
    assert optimizer.param_groups[0]["amsgrad"] is True


def test_extra_keys_of_a_group_are_kept():
    params = parameters()
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    optimizer.param_groups[0]["initial_lr"] = 0.75
    state = through_a_file(optimizer.state_dict())
    other = MixedPrecisionOptimizer(FUSED["adam"](parameters()))
    other.load_state_dict(state)
    assert other.param_groups[0]["initial_lr"] == 0.75


def test_several_groups():
    def build(seed):
        params = parameters(seed=seed)
        groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.25, "amsgrad": True}]
        return params, MixedPrecisionOptimizer(torch.optim.AdamW(groups))

    params, optimizer = build(0)
    for step in range(3):
        feed(params, gradients(params, step))
        optimizer.step()
    other, again = build(1)
    with torch.no_grad():
        for param, value in zip(other, params, strict=True):
            param.copy_(value)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    assert again.param_groups[1]["amsgrad"] is True
    for own, one in ((params, optimizer), (other, again)):
        feed(own, gradients(own, 5))
        one.step()
    assert snapshot(optimizer) == snapshot(again)


# Refusals.


def _drop(path):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def _put(path, value):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


def _another(make):
    def change(state):
        params = parameters()
        optimizer = make(params)
        feed(params, gradients(params, 0))
        optimizer.step()
        state.clear()
        state.update(optimizer.state_dict())

    return change


WRONG = {
    "no groups": (_drop(["param_groups"]), "has the keys state and param_groups"),
    "no state": (_drop(["state"]), "has the keys state and param_groups"),
    "empty": (lambda state: state.clear(), "has the keys state and param_groups"),
    "fewer parameters": (_put(["param_groups", 0, "params"], [0, 1]), r"groups of \[2\] parameters.*groups of \[9\]"),
    "more groups": (lambda state: state["param_groups"].append({"params": []}), r"groups of \[9, 0\] parameters"),
    "a stranger's state": (_put(["state", 99], {}), r"entries \[99\] that belong to no parameter"),
    "shape of a moment": (_put(["state", 4, "exp_avg"], torch.zeros(2)), r"exp_avg of .* has shape \(2,\)"),
    "shape of a master": (
        _put(["state", 0, "master"], torch.zeros(8)),
        r"master of .* has shape \(8,\), the parameter",
    ),
    "a moment missing": (_drop(["state", 2, "exp_avg_sq"]), r"missing: \['exp_avg_sq'\]"),
    "a moment too many": (_put(["state", 2, "square_avg"], torch.zeros(())), r"unknown: \['square_avg'\]"),
    "a moment that is none": (_put(["state", 2, "exp_avg"], 3.0), "must be a floating-point tensor, not 3.0"),
    "integers": (_put(["state", 2, "exp_avg"], torch.zeros((), dtype=torch.int32)), "must be a floating-point tensor"),
    "a step that is none": (_put(["state", 1, "step"], "seven"), "saved step of .* must be a number, not 'seven'"),
    "a group without betas": (_drop(["param_groups", 0, "betas"]), r"lack \['betas'\], which Adam needs"),
    "another class": (_put(["mpengine", "optimizer"], "SGD"), "saved by SGD, this optimizer wraps Adam"),
    "torch's SGD": (_another(FUSED["momentum"]), "lack .*'betas'"),
    "torch's RMSprop": (_another(FUSED["rmsprop"]), "lack .*'betas'"),
    "torch's Adagrad": (_another(FUSED["adagrad"]), "lack .*'betas'"),
    "torch's NAdam": (_another(GENERAL["NAdam"]), "unknown"),
    "torch's amsgrad": (_put(["param_groups", 0, "amsgrad"], True), r"missing: \['max_exp_avg_sq'\]"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    params = parameters()
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    for step in range(2):
        feed(params, gradients(params, step))
        optimizer.step()
    state = through_a_file(optimizer.state_dict())
    feed(params, gradients(params, 2))
    optimizer.step()
    before = snapshot(optimizer)
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert snapshot(optimizer) == before
    assert optimizer.steps_taken == 3
    feed(params, gradients(params, 3))
    optimizer.step()
    assert optimizer.steps_taken == 4


@pytest.mark.parametrize("other", ["adam", "momentum", "Adamax"])
def test_a_general_optimizer_refuses_the_state_of_another(other):
    params = parameters()
    optimizer = MixedPrecisionOptimizer(GENERAL["ASGD"](params))
    before = snapshot(optimizer)
    foreign = MixedPrecisionOptimizer(EVERY[other](parameters()))
    with pytest.raises(ValueError, match="this optimizer wraps ASGD"):
        optimizer.load_state_dict(foreign.state_dict())
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_a_state_of_other_shapes_is_refused(name):
    model, optimizer, scaler = prepared(FUSED[name])
    train(model, optimizer, scaler, range(2))
    other = nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4))
    wider = mpengine.prepare(other, FUSED[name](other.parameters()))
    before = snapshot(wider)
    with pytest.raises(ValueError, match=r"parameter '0\.weight' has shape \(9, 6\), the parameter \(9, 7\)"):
        wider.load_state_dict(optimizer.state_dict())
    assert snapshot(wider) == before
