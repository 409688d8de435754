"""`MixedPrecisionOptimizer` is a torch.optim.Optimizer: groups, schedulers, hooks, copies, as torch's own have them."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import mpengine
from mpengine import MixedPrecisionOptimizer
from tests.harness import (
    BRAIN,
    EVERY,
    FUSED,
    GENERAL,
    HALF,
    SINGLE,
    batch,
    feed,
    gradients,
    network,
    parameters,
    params_of,
    prepared,
    same_bits,
    snapshot,
    train,
)

every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
one_of_each_path = pytest.mark.parametrize("make", [FUSED["momentum"], GENERAL["Adamax"]], ids=["fused", "general"])


def test_it_is_an_optimizer():
    model = nn.Linear(2, 2)
    inner = torch.optim.AdamW(model.parameters(), lr=0.25, betas=(0.5, 0.75))
    optimizer = mpengine.prepare(model, inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.param_groups[0]["params"][0] is model.weight
    assert optimizer.defaults == inner.defaults
    assert optimizer.state is inner.state
    assert "lr: 0.25" in repr(optimizer)
    assert repr(optimizer).startswith("MixedPrecisionOptimizer")


@one_of_each_path
def test_both_kinds_of_zero_grad(make):
    params = parameters()
    optimizer = MixedPrecisionOptimizer(make(params))
    feed(params, gradients(params, 0))
    kept = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is grad and not grad.any() for p, grad in zip(params, kept, strict=True))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_zeroed_gradients_still_step():
    """As in torch: a gradient of zeros moves momentum and weight decay on; None does not."""
    params = [nn.Parameter(torch.full((3,), 4.0))]
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD(params, lr=0.5, momentum=0.5))
    feed(params, [torch.ones(3)])
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert params[0].tolist() == [3.25] * 3
    optimizer.zero_grad()
    optimizer.step()
    assert params[0].tolist() == [3.25] * 3


# Param groups.


@every_optimizer
@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_a_group_added_later_is_trained_like_one_from_the_start(make, dtype):
    early, late = parameters((HALF, dtype), seed=1), parameters((HALF, dtype), seed=1)
    whole = MixedPrecisionOptimizer(make([{"params": early[:3]}, {"params": early[3:], "lr": 0.5}]))
    grown = MixedPrecisionOptimizer(make([{"params": late[:3]}]))
    for params, optimizer in ((early, whole), (late, grown)):
        for param in params[:3]:
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()
    grown.add_param_group({"params": late[3:], "lr": 0.5})
    assert grown.steps_taken == 1
    for params, optimizer in ((early, whole), (late, grown)):
        feed(params, gradients(params, 4))
        optimizer.step()
    assert snapshot(whole) == snapshot(grown)
    assert [m.dtype for m in grown.master_params()] == [SINGLE] * 6
    assert grown.steps_taken == 2


def test_a_group_may_be_one_tensor_or_any_iterable():
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD([first], lr=0.5))
    optimizer.add_param_group({"params": second})
    optimizer.add_param_group({"params": (p for p in [third]), "lr": 0.25})
    for param in (first, second, third):
        param.grad = torch.ones(2)
    optimizer.step()
    assert [p[0].item() for p in (first, second, third)] == [0.5, 0.5, 0.75]
    assert len(optimizer.param_groups) == 3


@one_of_each_path
def test_named_parameters(make):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = mpengine.prepare(model, make(model[0].named_parameters()))
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer.add_param_group({"params": model[1].named_parameters()})
    assert optimizer.param_groups[1]["param_names"] == ["weight", "bias"]
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][1]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (lambda own: {"params": {nn.Parameter(torch.ones(1))}}, TypeError, "ordered collections"),
        (lambda own: {"params": [own[0]]}, ValueError, "more than one parameter group"),
        (
            lambda own: {"params": [nn.Parameter(torch.ones(1).double())]},
            ValueError,
            "new parameter 0 is torch.float64",
        ),
        (lambda own: {"params": ["weight"]}, TypeError, "new parameter 0 is a str, not a Tensor"),
        (lambda own: {"params": [torch.ones(1, requires_grad=True) * 2]}, ValueError, "non-leaf"),
    ],
    ids=["set", "twice", "float64", "no tensor", "non-leaf"],
)
def test_a_bad_group_changes_nothing(group, error, message):
    params = parameters()
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    feed(params, gradients(params, 0))
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group(params))
    assert snapshot(optimizer) == before
    optimizer.step()
    assert optimizer.steps_taken == 2


def test_a_group_of_another_wrapper_is_refused():
    first, second = parameters(seed=1), parameters(seed=2)
    kept = MixedPrecisionOptimizer(FUSED["adam"](first))
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](second))
    with pytest.raises(ValueError, match="is wrapped by another MixedPrecisionOptimizer"):
        optimizer.add_param_group({"params": params_of(kept)})
    assert len(optimizer.param_groups) == 1


# Learning-rate schedulers.

SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=12),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3, cycle_momentum="momentum" in o.defaults),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}
MOVED = ("lr", "momentum", "betas")  # what a scheduler moves


def scheduled(optimizer, scheduler, params, first_overflows=False):
    history = []
    for step in range(10):
        feed(params, gradients(params, step))
        if first_overflows and step == 0:
            params[0].grad.fill_(math.inf)
        optimizer.step()
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        (group,) = optimizer.param_groups
        history.append({key: group[key] for key in MOVED if key in group})
    return history


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("make", [FUSED["momentum"], FUSED["adam"], GENERAL["Adamax"]], ids=["sgd", "adam", "adamax"])
def test_schedulers_move_the_wrapper_as_they_move_torchs(schedule, make):
    """Made for the wrapper, or for the optimizer before it was wrapped; and without a warning."""
    runs = []
    for on in ("torch", "wrapper", "inner"):
        params = parameters([SINGLE])
        inner = make(params)
        if on == "torch":
            runs.append(scheduled(inner, schedule(inner), params))
            continue
        scheduler = schedule(inner) if on == "inner" else None
        optimizer = MixedPrecisionOptimizer(inner)
        runs.append(scheduled(optimizer, scheduler or schedule(optimizer), params))
        runs.append(snapshot(optimizer)[:2])
    torchs, wrapper, weights, inner_history, same_weights = runs
    assert torchs == wrapper == inner_history
    assert weights == same_weights


@pytest.mark.parametrize("on", ["wrapper", "inner"])
@one_of_each_path
def test_a_skipped_or_empty_first_step_warns_of_nothing(on, make):
    for first_overflows in (True, False):
        params = parameters()
        inner = make(params)
        scheduler = SCHEDULERS["StepLR"](inner) if on == "inner" else None
        optimizer = MixedPrecisionOptimizer(inner)
        scheduler = scheduler or SCHEDULERS["StepLR"](optimizer)
        if not first_overflows:
            optimizer.step()
            scheduler.step()
        scheduled(optimizer, scheduler, params, first_overflows)
        assert optimizer.steps_skipped == first_overflows


def test_a_scheduler_that_runs_ahead_is_warned_of_as_in_torch():
    optimizer = MixedPrecisionOptimizer(FUSED["sgd"](parameters()))
    scheduler = SCHEDULERS["StepLR"](optimizer)
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


def test_a_scheduler_and_its_optimizer_resume():
    """Saved and loaded together they go on as if they had not been."""
    params, other = parameters(), parameters()
    optimizer = MixedPrecisionOptimizer(FUSED["momentum"](params))
    scheduler = SCHEDULERS["OneCycleLR"](optimizer)
    for step in range(4):
        feed(params, gradients(params, step))
        optimizer.step()
        scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), [p.detach() for p in params]))
    resumed = MixedPrecisionOptimizer(FUSED["momentum"](other))
    again = SCHEDULERS["OneCycleLR"](resumed)
    with torch.no_grad():
        for param, value in zip(other, saved[2], strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of a scheduler stepped before its new optimizer
        for own, one, schedule in ((params, optimizer, scheduler), (other, resumed, again)):
            for step in range(4, 8):
                feed(own, gradients(own, step))
                one.step()
                schedule.step()
    assert snapshot(optimizer) == snapshot(resumed)


# Hooks.


def test_step_hooks_are_called_with_the_wrapper_and_can_be_removed():
    params = parameters()
    inner = FUSED["adam"](params)
    calls = []
    handle = inner.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("inner pre", opt)))
    inner.register_step_post_hook(lambda opt, args, kwargs: calls.append(("inner post", opt)))
    optimizer = MixedPrecisionOptimizer(inner)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("pre", opt)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append(("post", opt)))
    feed(params, gradients(params, 0))
    optimizer.step()
    assert [name for name, _ in calls] == ["inner pre", "pre", "inner post", "post"]
    assert all(opt is optimizer for _, opt in calls)
    handle.remove()
    calls.clear()
    params[0].grad.fill_(math.nan)
    optimizer.step()  # a skipped step is a step, too
    assert [name for name, _ in calls] == ["pre", "inner post", "post"]


def test_a_pre_hook_may_edit_the_gradients():
    params, other = parameters(), parameters()
    optimizer, plain = (MixedPrecisionOptimizer(FUSED["adam"](own)) for own in (params, other))
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: [p.grad.mul_(0.5) for p in params] and None)
    feed(params, gradients(params, 0))
    feed(other, [grad * 0.5 for grad in gradients(params, 0)])
    optimizer.step()
    plain.step()
    assert snapshot(optimizer) == snapshot(plain)


@pytest.mark.parametrize("on", ["wrapper", "inner"])
@one_of_each_path
def test_state_dict_hooks(on, make):
    params = parameters()
    inner = make(params)
    wrapped = MixedPrecisionOptimizer(inner) if on == "wrapper" else None
    target, calls = wrapped or inner, []
    target.register_state_dict_pre_hook(lambda opt: calls.append(("pre", opt)))

    def post(opt, state_dict):
        calls.append(("post", opt))
        return {**state_dict, "note": 5}

    def load_pre(opt, state_dict):
        calls.append(("load pre", opt, state_dict["note"]))
        state_dict["param_groups"][0]["lr"] = 0.125
        state_dict["note"] = 6  # in a copy
        return state_dict

    target.register_state_dict_post_hook(post)
    target.register_load_state_dict_pre_hook(load_pre)
    target.register_load_state_dict_post_hook(lambda opt: calls.append(("load post", opt)))
    optimizer = wrapped or MixedPrecisionOptimizer(inner)
    saved = optimizer.state_dict()
    assert saved["note"] == 5
    optimizer.load_state_dict(saved)
    assert calls == [("pre", optimizer), ("post", optimizer), ("load pre", optimizer, 5), ("load post", optimizer)]
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert saved["note"] == 5


# Copies.


def via_deepcopy(value):
    return copy.deepcopy(value)


def via_pickle(value):
    return pickle.loads(pickle.dumps(value))


def via_torch_save(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@every_optimizer
@pytest.mark.parametrize("duplicate", [via_deepcopy, via_pickle, via_torch_save])
def test_a_copy_of_all_three_continues_bit_for_bit(make, duplicate):
    run = prepared(make, max_grad_norm=0.5)
    train(*run, range(4), overflow=[2])
    model, optimizer, scaler = twin = duplicate(run)
    assert optimizer.scaler is scaler
    assert all(a is b for a, b in zip(params_of(optimizer), model.parameters(), strict=True))
    assert optimizer.max_grad_norm == 0.5
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (3, 1)
    assert snapshot(optimizer) == snapshot(run[1])
    before = snapshot(run[1])
    train(*twin, range(4, 8), overflow=[5])
    assert snapshot(run[1]) == before  # they share nothing
    train(*run, range(4, 8), overflow=[5])
    assert snapshot(optimizer) == snapshot(run[1])
    assert scaler.state_dict() == run[2].state_dict()
    assert optimizer.steps_taken == run[1].steps_taken == 6


@every_optimizer
@pytest.mark.parametrize("duplicate", [via_deepcopy, via_pickle])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_copy_of_the_optimizer_alone_has_parameters_of_its_own(make, duplicate, steps):
    params = parameters()
    optimizer = MixedPrecisionOptimizer(make(params))
    for step in range(steps):
        feed(params, gradients(params, step))
        optimizer.step()
    twin = duplicate(optimizer)
    own = params_of(twin)
    assert not any(a is b for a, b in zip(own, params, strict=True))
    for step in range(steps, steps + 3):
        for target, one in ((params, optimizer), (own, twin)):
            feed(target, gradients(target, step))
            one.step()
    assert snapshot(optimizer) == snapshot(twin)


def test_a_copied_optimizer_still_owns_its_parameters():
    model, optimizer, _ = copy.deepcopy(prepared())
    with pytest.raises(ValueError, match=r"parameter '0\.weight' is wrapped by another"):
        mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert optimizer.steps_taken == 0


def test_a_copy_names_its_parameters():
    model, optimizer, scaler = copy.deepcopy(prepared())
    scaler.scale(model(batch(0)[0]).float().sum()).backward()
    model[0].bias.grad[0] = math.inf
    optimizer.step()
    assert optimizer.overflowed_parameters() == ["parameter '0.bias'"]


def test_a_scaler_and_its_optimizer_are_not_copied_in_mid_step():
    model, optimizer, scaler = prepared()
    scaler.scale(model(batch(0)[0]).float().sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(AssertionError, match="may only be pickled at the beginning of an iteration, or at the end"):
        copy.deepcopy((model, optimizer, scaler))


def test_a_model_prepared_again_after_its_wrapper_is_gone():
    model = network()
    optimizer = mpengine.prepare(model, FUSED["adam"](model.parameters()))
    masters = [m.detach().clone() for m in optimizer.master_params()]
    del optimizer
    again = mpengine.prepare(model, FUSED["adam"](model.parameters()))
    for master, before, param in zip(again.master_params(), masters, model.parameters(), strict=True):
        assert same_bits(master, param.float())
        assert same_bits(before.to(param.dtype), param)
