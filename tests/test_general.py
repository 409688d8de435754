"""The general path: any torch optimizer's own step on FP32 masters, bit for bit what it does on FP32 parameters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import mpengine
from mpengine import MixedPrecisionOptimizer
from tests.harness import (
    BRAIN,
    FUSED,
    GENERAL,
    HALF,
    SINGLE,
    feed,
    gradients,
    parameters,
    prepared,
    same_bits,
    snapshot,
    train,
    twins_of,
)

STEPS = 30
every_general = pytest.mark.parametrize("make", GENERAL.values(), ids=GENERAL)


def race(ours, theirs, params, twins, steps, idle=True, clip=None):
    """The same gradients for both; a parameter is left out now and then."""
    for step in steps:
        grads = gradients(params, step)
        if idle and step % 4 == 1:
            grads[step % len(grads)] = None
        feed(params, grads)
        feed(twins, [None if grad is None else grad.to(SINGLE, copy=True) for grad in grads])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(twins, clip)
        ours.step()
        theirs.step()


def assert_equal_runs(ours, theirs, params, twins):
    assert same_bits(list(ours.master_params()), twins)
    for param, master in zip(params, ours.master_params(), strict=True):
        assert same_bits(param, master.to(param.dtype))
    for param, twin in zip(params, twins, strict=True):
        assert same_bits(ours.state[param], theirs.state[twin])


@every_general
def test_masters_are_torchs_bit_for_bit(make):
    params = parameters((HALF, SINGLE, BRAIN))
    twins = twins_of(params)
    ours, theirs = MixedPrecisionOptimizer(make(params)), make(twins)
    race(ours, theirs, params, twins, range(STEPS))
    assert_equal_runs(ours, theirs, params, twins)
    assert ours.steps_taken == STEPS


def test_muon_bit_for_bit():
    params = [nn.Parameter(torch.randn(4, 6).half()), nn.Parameter(torch.randn(3, 3))]
    twins = twins_of(params)
    ours, theirs = MixedPrecisionOptimizer(torch.optim.Muon(params)), torch.optim.Muon(twins)
    race(ours, theirs, params, twins, range(10))
    assert_equal_runs(ours, theirs, params, twins)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1, "betas": (0.5, 0.9)},
        {"maximize": True, "foreach": True},
        {"betas": (0.0, 0.5), "eps": 1e-3, "capturable": False},
    ],
)
def test_options_reach_torchs_step(options):
    params = parameters()
    twins = twins_of(params)
    ours = MixedPrecisionOptimizer(torch.optim.Adamax(params, **options))
    theirs = torch.optim.Adamax(twins, **options)
    race(ours, theirs, params, twins, range(10))
    assert_equal_runs(ours, theirs, params, twins)


@every_general
def test_clipping_by_a_power_of_two_is_torchs(make):
    """A norm of 64 clipped to 16: both factors are 1/4 exactly, as 64 + 1e-6 is 64 in FP32."""
    params = parameters([HALF, SINGLE])
    twins = twins_of(params)
    ours, theirs = MixedPrecisionOptimizer(make(params), max_grad_norm=16.0), make(twins)
    for step in range(5):
        grads = [torch.zeros_like(p) for p in params]
        grads[step % 2].view(-1)[0] = 64.0
        feed(params, grads)
        feed(twins, [grad.to(SINGLE, copy=True) for grad in grads])
        norm = torch.nn.utils.clip_grad_norm_(twins, 16.0)
        ours.step()
        theirs.step()
        assert ours.last_grad_norm == norm == 64.0
    assert_equal_runs(ours, theirs, params, twins)


@every_general
def test_the_parameters_keep_their_scaled_gradients_and_their_groups(make):
    params = parameters()
    optimizer = MixedPrecisionOptimizer(make(params))
    grads = gradients(params, 0)
    feed(params, grads)
    own = [p.grad for p in params]
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(params, own, strict=True))
    assert same_bits(own, grads)
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], params, strict=True))
    assert set(optimizer.state) <= set(params)


@every_general
def test_state_from_before_wrapping_is_kept(make):
    params = parameters((SINGLE,))
    twins = twins_of(params)
    inner, theirs = make(params), make(twins)
    race(inner, theirs, params, twins, range(3))
    model = nn.ParameterList(params)
    ours = mpengine.prepare(model, inner)
    assert {p.dtype for p in params} == {HALF}
    race(ours, theirs, params, twins, range(3, 9), idle=False)
    # The gradients are now fp16: feed torch the same.
    assert_equal_runs(ours, theirs, params, twins)


@every_general
def test_fp16_state_from_before_wrapping_is_widened(make):
    params = parameters((HALF,))
    inner = make(params)
    feed(params, gradients(params, 0))
    inner.step()
    ours = MixedPrecisionOptimizer(inner)
    feed(params, gradients(params, 1))
    ours.step()
    for state in ours.state.values():
        assert all(value.dtype != HALF for value in state.values() if isinstance(value, torch.Tensor))


@every_general
@pytest.mark.parametrize("how", ["clear", "replace"])
def test_clearing_the_state_starts_afresh(make, how):
    params = parameters()
    twins = twins_of(params)
    ours, theirs = MixedPrecisionOptimizer(make(params)), make(twins)
    race(ours, theirs, params, twins, range(4))
    for optimizer in (ours, theirs):
        if how == "clear":
            optimizer.state.clear()
        else:
            optimizer.state = type(optimizer.state)(dict)
    race(ours, theirs, params, twins, range(4, 9))
    assert_equal_runs(ours, theirs, params, twins)


@every_general
def test_a_copy_continues_bit_for_bit(make):
    model, optimizer, scaler = prepared(make)
    train(model, optimizer, scaler, range(4), overflow=[2])
    twin = copy.deepcopy((model, optimizer, scaler))
    for one in ((model, optimizer, scaler), twin):
        train(*one, range(4, 8), overflow=[5])
    assert snapshot(optimizer) == snapshot(twin[1])
    assert scaler.state_dict() == twin[2].state_dict()


def test_hooks_run_once_on_each_optimizer():
    params = parameters()
    inner = GENERAL["Adamax"](params)
    calls = []
    inner.register_step_pre_hook(lambda *_: calls.append("inner pre"))
    inner.register_step_post_hook(lambda *_: calls.append("inner post"))
    optimizer = MixedPrecisionOptimizer(inner)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    feed(params, gradients(params, 0))
    optimizer.step()
    assert calls == ["pre", "inner pre", "inner post", "post"]
    calls.clear()
    params[0].grad.fill_(math.inf)
    optimizer.step()
    assert calls == ["pre", "post"]


def test_a_subclass_steps_by_its_own_step():
    class SignAdam(torch.optim.Adam):
        @torch.no_grad()
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                if param.grad is not None:
                    param.sub_(param.grad.sign(), alpha=0.25)

    params = parameters([HALF])
    before = [p.detach().clone().float() for p in params]
    optimizer = MixedPrecisionOptimizer(SignAdam(params))
    grads = gradients(params, 0)
    feed(params, grads)
    optimizer.step()
    for master, old, grad in zip(optimizer.master_params(), before, grads, strict=True):
        assert same_bits(master, old - 0.25 * grad.float().sign())


def test_an_error_in_the_inner_step_leaves_the_groups_in_order():
    class Broken(torch.optim.Adamax):
        def step(self, closure=None):
            raise ArithmeticError("no step today")

    params = parameters([HALF, SINGLE])
    optimizer = MixedPrecisionOptimizer(Broken(params))
    feed(params, gradients(params, 0))
    own = [p.grad for p in params]
    before = snapshot(optimizer)
    with pytest.raises(ArithmeticError, match="no step today"):
        optimizer.step()
    assert snapshot(optimizer) == before
    assert all(p.grad is grad for p, grad in zip(params, own, strict=True))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], params, strict=True))


def test_the_fused_optimizers_do_not_come_here():
    for name in FUSED:
        assert MixedPrecisionOptimizer(FUSED[name](parameters()))._family is not None
    for name in GENERAL:
        assert MixedPrecisionOptimizer(GENERAL[name](parameters()))._family is None


@pytest.mark.parametrize(
    "make",
    [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax],
)
def test_a_differentiable_step_is_refused(make):
    with pytest.raises(TypeError, match=f"{make.__name__} has differentiable=True"):
        MixedPrecisionOptimizer(make(parameters(), differentiable=True))


def test_a_step_that_somebody_put_on_the_object_is_taken():
    """torch's schedulers put one there, too, which is the class's own."""
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    plain = torch.optim.SGD([param], lr=0.5)
    torch.optim.lr_scheduler.StepLR(plain, 10)
    assert MixedPrecisionOptimizer(plain)._family is not None

    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    changed = torch.optim.SGD([param], lr=0.5)
    taken = []
    changed.step = lambda: taken.append([p.dtype for p in changed.param_groups[0]["params"]])
    optimizer = MixedPrecisionOptimizer(changed)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert taken == [[torch.float32]]
    assert param.tolist() == [1.0, 1.0, 1.0]
