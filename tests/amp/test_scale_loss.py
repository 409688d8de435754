"""scale_loss: what a pass does to scales, gradients and steps; several losses and optimizers; delays; exceptions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from mpengine import amp
from mpengine.amp.scaler import LossScaler
from mpengine.amp.verdicts import Verdicts
from mpengine.watchdog import LossScaleCollapse
from tests.amp.world import DYNAMIC, FIRST, INF, LEVELS, Weights, backward, master, scales, sgd, unskipped, weights
from tests.harness import frozen

NAN = float("nan")


def two(level="O2", num_losses=2, **kwargs):
    """Two models, an optimizer for each."""
    models = [Weights(), Weights()]
    options = {**DYNAMIC, **kwargs}
    return amp.initialize(models, [sgd(m) for m in models], opt_level=level, num_losses=num_losses, **options)


# What is yielded, and who may call.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_loss_is_scaled_in_fp32(dtype):
    _, optimizer = weights()
    loss = torch.tensor([2.0, 3.0], dtype=dtype, requires_grad=True)
    with amp.scale_loss(loss, optimizer) as scaled:
        assert scaled.tolist() == [2048.0, 3072.0]
        assert scaled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_before_initialize():
    loss = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match="internal Amp state has not been initialized"), amp.scale_loss(loss, []):
        pass


def test_an_optimizer_that_amp_does_not_know():
    model, optimizer = weights()
    with pytest.raises(RuntimeError, match="optimizer 0 of scale_loss is a NoneType"), amp.scale_loss(None, None):
        pass
    stranger = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    with (
        pytest.raises(RuntimeError, match="optimizer 1 of scale_loss is a Adam that"),
        amp.scale_loss(model(torch.ones(3)), [optimizer, stranger]),
    ):
        pass


@pytest.mark.parametrize("loss_id", [-1, 2, "0", True, None])
def test_a_loss_that_does_not_exist(loss_id):
    models, optimizers = two()
    with (
        pytest.raises(ValueError, match="loss_id is"),
        amp.scale_loss(models[0](torch.ones(3)), optimizers, loss_id),
    ):
        pass


def test_a_loss_without_a_graph():
    _, optimizer = weights()
    with pytest.raises(RuntimeError, match="requires no grad"), amp.scale_loss(torch.ones(()), optimizer):
        pass


@pytest.mark.parametrize("level", LEVELS)
def test_a_closure(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [1.0, 1.0, 1.0])
    with pytest.raises(RuntimeError, match="Currently, Amp does not support closure use"):
        optimizer.step(lambda: None)
    assert optimizer.steps_taken == 0
    optimizer.step()
    assert master(optimizer) == [-1.0] * 3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("given", ["one", "list", "tuple", "original", "twice"])
def test_how_optimizers_may_be_given(level, given):
    model = Weights()
    original = sgd(model)
    model, optimizer = amp.initialize(model, original, opt_level=level, **DYNAMIC)
    forms = {
        "one": optimizer,
        "list": [optimizer],
        "tuple": (optimizer,),
        "original": original,
        "twice": [optimizer, original],
    }
    backward(model, forms[given], [1.0, 2.0, 3.0])
    optimizer.step()
    assert master(optimizer) == [-1.0, -2.0, -3.0]
    assert unskipped() == [1]


# One loss.


@pytest.mark.parametrize("level", LEVELS)
def test_accept_skip_accept(level):
    model, optimizer = weights(level)
    expected, history = [0.0] * 3, []
    for values in ([1.0, 2.0, 3.0], [INF, 1.0, 1.0], [NAN, 1.0, 1.0], [4.0, 0.5, 1.0]):
        optimizer.zero_grad()
        backward(model, optimizer, values)
        optimizer.step()
        clean = all(abs(v) < INF for v in values)
        expected = [e - v for e, v in zip(expected, values, strict=True)] if clean else expected
        assert master(optimizer) == expected
        assert model.weight.tolist() == expected
        history.append((scales()[0], unskipped()[0], optimizer.last_step_skipped))
    assert history == [(1024.0, 1, False), (512.0, 0, True), (256.0, 0, True), (256.0, 1, False)]


@pytest.mark.parametrize("level", LEVELS)
def test_growth_after_the_window(level):
    model, optimizer = weights(level, max_loss_scale=2.0**11)
    amp.load_state_dict({"loss_scaler0": {"loss_scale": 2.0**10, "unskipped": 1998}})
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, optimizer, [1.0, 0.0, 0.0])
        optimizer.step()
        seen.append((scales()[0], unskipped()[0]))
    assert seen == [(2.0**10, 1999), (2.0**11, 0), (2.0**11, 1)]
    amp.load_state_dict({"loss_scaler0": {"loss_scale": 2.0**11, "unskipped": 1999}})
    backward(model, optimizer, [0.0, 0.0, 0.0])
    assert (scales(), unskipped()) == ([2.0**11], [0])  # not beyond max_loss_scale


@pytest.mark.parametrize("level", LEVELS)
def test_accumulation_checks_and_counts_each_pass(level):
    """The scale moves between the passes; the sum is the true one all the same."""
    model, optimizer = weights(level, max_loss_scale=2.0**24)
    amp.load_state_dict({"loss_scaler0": {"loss_scale": 2.0**10, "unskipped": 1998}})
    passes = [[1.0, 2.0, 3.0], [0.5, 0.5, 0.5], [2.0, 0.0, 1.0], [0.25, 8.0, 0.0]]
    seen = []
    for values in passes:
        backward(model, optimizer, values)
        seen.append(scales()[0])
    assert seen == [2.0**10, 2.0**11, 2.0**11, 2.0**11]
    assert unskipped() == [2]
    optimizer.step()
    assert master(optimizer) == [-sum(v) for v in zip(*passes, strict=True)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_an_overflow_anywhere_in_an_accumulation_skips_its_step_and_backs_off_once(level, bad):
    model, optimizer = weights(level)
    for i in range(3):
        backward(model, optimizer, [INF if i == bad else 1.0] * 3)
    assert (scales(), unskipped()) == ([FIRST / 2], [2 - bad])
    optimizer.step()
    assert optimizer.last_step_skipped
    assert master(optimizer) == [0.0] * 3
    optimizer.zero_grad()
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    assert master(optimizer) == [-1.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_many_passes_before_one_step(level):
    """More than the engine keeps apart: older ones are folded, in FP32."""
    model, optimizer = weights(level)
    for i in range(20):
        backward(model, optimizer, [float(i), 1.0, 0.5])
    optimizer.step()
    assert master(optimizer) == [-190.0, -20.0, -10.0]
    assert unskipped() == [20]


@pytest.mark.parametrize("level", LEVELS)
def test_no_pass_in_the_context_counts_nothing(level):
    model, optimizer = weights(level)
    with amp.scale_loss(model(torch.ones(3)), optimizer):
        pass
    assert unskipped() == [0]
    optimizer.step()
    assert master(optimizer) == [0.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_a_step_without_gradients_is_none(level):
    model, optimizer = weights(level)
    optimizer.step()
    backward(model, optimizer, [1.0] * 3)
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.steps_taken == 0
    assert master(optimizer) == [0.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_stepping_twice_steps_twice(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [1.0, 2.0, 3.0])
    optimizer.step()
    optimizer.step()
    assert master(optimizer) == [-2.0, -4.0, -6.0]
    assert unskipped() == [1]


def test_a_gradient_that_no_scaled_loss_made_is_unscaled():
    for level in ("O0", "O1"):
        model, optimizer = weights(level)
        model(torch.tensor([1.0, 2.0, 3.0])).backward()
        optimizer.step()
        assert master(optimizer) == [-1.0, -2.0, -3.0]
        optimizer.zero_grad()
        backward(model, optimizer, [1.0, 1.0, 1.0])
        model(torch.tensor([1.0, 2.0, 3.0])).backward()
        optimizer.step()
        assert master(optimizer) == [-3.0, -5.0, -7.0]


# Several losses and optimizers.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [(), (0,), (1,), (0, 1)])
def test_each_loss_has_its_scale_and_the_sum_is_true(level, bad):
    model, optimizer = weights(level, num_losses=2)
    amp.load_state_dict({f"loss_scaler{k}": {"loss_scale": s, "unskipped": 0} for k, s in enumerate([4.0, 1024.0])})
    for k, values in enumerate([[1.0, 2.0, 3.0], [4.0, 0.5, 0.25]]):
        backward(model, optimizer, [INF, 1.0, 1.0] if k in bad else values, loss_id=k)
    optimizer.step()
    assert master(optimizer) == ([0.0] * 3 if bad else [-5.0, -2.5, -3.25])
    assert scales() == [4.0 / (2 if 0 in bad else 1), 1024.0 / (2 if 1 in bad else 1)]
    assert unskipped() == [int(0 not in bad), int(1 not in bad)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("listed", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("bad", [0, 1])
def test_listed_optimizers_skip_and_others_step(level, listed, bad):
    """The loss that overflows is made of one model alone; who is listed skips, though its own gradients are finite."""
    models, optimizers = two(level)
    for i in (0, 1):
        backward(models[i], optimizers[i], [1.0] * 3, loss_id=1)
    if bad in listed:
        backward(models[bad], [optimizers[i] for i in listed], [INF] * 3, loss_id=0)
        skipped = set(listed)
    else:  # the lister has none of its gradients; the step of the other notices
        backward(models[bad], [optimizers[i] for i in listed], [INF] * 3, loss_id=0)
        skipped = {bad}
    for i in (0, 1):
        optimizers[i].step()
        assert optimizers[i].last_step_skipped is (i in skipped)
        assert master(optimizers[i]) == [0.0 if i in skipped else -1.0] * 3
    assert scales() == [FIRST / 2, FIRST]


@pytest.mark.parametrize("level", LEVELS)
def test_a_skip_is_of_the_next_step_alone(level):
    models, optimizers = two(level)
    for i in (0, 1):
        backward(models[i], optimizers[i], [1.0] * 3, loss_id=1)
    backward(models[0], optimizers, [INF] * 3)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    for i in (0, 1):
        backward(models[i], optimizers[i], [1.0] * 3, loss_id=1)
        optimizers[i].step()
        assert master(optimizers[i]) == [-1.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_dcgan(level):
    """Two losses of D, one of G that leaves gradients in D, wiped by the next zero_grad of the MODEL."""
    models, (opt_d, opt_g) = two(level, num_losses=3)
    net_d, net_g = models
    for i in range(4):
        net_d.zero_grad()
        backward(net_d, opt_d, [1.0, 2.0, 3.0], loss_id=0)
        backward(net_d, opt_d, [INF if i == 1 else 1.0] * 3, loss_id=1)
        opt_d.step()
        net_g.zero_grad()
        loss = net_g(torch.ones(3)) * (INF if i == 2 else 1.0) + net_d(torch.full((3,), 7.0))
        with amp.scale_loss(loss, opt_g, loss_id=2) as scaled:
            scaled.backward()
        opt_g.step()
    assert master(opt_d) == [-6.0, -9.0, -12.0]
    assert master(opt_g) == [-3.0] * 3
    assert scales() == [FIRST, FIRST / 2, FIRST / 2]
    assert unskipped() == [4, 2, 1]


def test_optimizers_of_several_initializes():
    (m1, o1), (m2, o2) = weights(), weights()
    backward(m1, o1, [INF] * 3)
    backward(m2, o2, [1.0] * 3)
    o1.step()
    o2.step()
    assert master(o1) == [0.0] * 3
    assert master(o2) == [-1.0] * 3
    assert (o1.scaler.get_scale(), o2.scaler.get_scale()) == (FIRST / 2, FIRST)
    with pytest.raises(ValueError, match="come from several calls"), amp.scale_loss(m1(torch.ones(3)), [o1, o2]):
        pass


# Delays.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [None, 0, 1, 2])
def test_delay_unscale_checks_the_whole_at_the_end(level, bad):
    model, optimizer = weights(level)
    for i in range(3):
        backward(model, optimizer, [INF if i == bad else float(i + 1)] * 3, delay_unscale=i < 2)
        if i < 2:
            assert (scales(), unskipped()) == ([1024.0], [0])
    assert (scales(), unskipped()) == (([1024.0], [1]) if bad is None else ([512.0], [0]))
    optimizer.step()
    assert master(optimizer) == [-6.0 if bad is None else 0.0] * 3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [False, True])
def test_a_step_checks_what_was_only_delayed(level, bad):
    model, optimizer = weights(level)
    backward(model, optimizer, [INF if bad else 1.0] * 3, delay_unscale=True)
    optimizer.step()
    assert master(optimizer) == [0.0 if bad else -1.0] * 3
    assert (scales(), unskipped()) == (([FIRST / 2], [0]) if bad else ([FIRST], [1]))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [False, True])
def test_delay_overflow_check_moves_no_scale_but_no_overflow_is_applied(level, bad):
    models, optimizers = two(level)
    backward(models[1], optimizers[1], [1.0] * 3)
    backward(models[0], optimizers, [INF if bad else 1.0] * 3, delay_overflow_check=True)
    assert (scales(), unskipped()) == ([FIRST] * 2, [1, 0])
    for optimizer in optimizers:
        optimizer.step()
        assert master(optimizer) == [0.0 if bad else -1.0] * 3
    assert (scales(), unskipped()) == ([FIRST] * 2, [1, 0])
    for optimizer in optimizers:
        optimizer.zero_grad()
    backward(models[0], optimizers, [INF] * 3)
    assert scales() == [FIRST / 2, FIRST]


# master_params.


@pytest.mark.parametrize("level", LEVELS)
def test_master_params_have_the_true_gradient(level):
    model, optimizer = weights(level, num_losses=2)
    amp.load_state_dict({f"loss_scaler{k}": {"loss_scale": s, "unskipped": 0} for k, s in enumerate([4.0, 1024.0])})
    backward(model, optimizer, [1.0, 2.0, 3.0])
    for _ in range(2):
        (p,) = amp.master_params(optimizer)
        assert p.dtype == torch.float32
        assert p.grad.dtype == torch.float32
        assert p.grad.tolist() == [1.0, 2.0, 3.0]
    backward(model, optimizer, [0.5, 0.5, 0.5], loss_id=1)
    (p,) = amp.master_params(optimizer)
    assert p.grad.tolist() == [1.5, 2.5, 3.5]
    torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
    norm = (1.5**2 + 2.5**2 + 3.5**2) ** 0.5
    optimizer.step()
    torch.testing.assert_close(p, -torch.tensor([1.5, 2.5, 3.5]) / norm, rtol=1e-6, atol=0.0)  # clip adds 1e-6
    assert unskipped() == [1, 1]


@pytest.mark.parametrize("level", LEVELS)
def test_edited_gradients_are_stepped_and_further_passes_add_to_them(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [1.0, 2.0, 3.0])
    for p in amp.master_params(optimizer):
        p.grad.mul_(0.5)
    backward(model, optimizer, [1.0, 1.0, 1.0])
    for p in amp.master_params(optimizer):
        p.grad = p.grad * 2.0
    optimizer.step()
    assert master(optimizer) == [-3.0, -4.0, -5.0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("edit", ["nan_to_num", "fill", "assign"])
def test_a_skip_stays_though_gradients_are_edited(level, edit):
    model, optimizer = weights(level)
    backward(model, optimizer, [INF, 1.0, 1.0])
    for p in amp.master_params(optimizer):
        if edit == "assign":
            p.grad = torch.ones(3)
        elif edit == "fill":
            p.grad.fill_(1.0)
        else:
            p.grad.nan_to_num_(0.0, 0.0, 0.0)
    optimizer.step()
    assert optimizer.last_step_skipped
    assert master(optimizer) == [0.0] * 3


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_fp32_parameters_have_the_true_gradient_after_the_context(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [3.0, 4.0, 0.0])
    assert model.weight.grad.tolist() == [3.0, 4.0, 0.0]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 2.5)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([-1.5, -2.0, 0.0]), rtol=1e-6, atol=0.0)
    backward(model, optimizer, [1.0, 1.0, 1.0])
    assert model.weight.grad.tolist() == pytest.approx([2.5, 3.0, 1.0], rel=1e-6)  # nobody zeroed it


def test_master_params_of_an_optimizer_that_amp_does_not_know():
    params = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)]
    assert [id(p) for p in amp.master_params(sgd_of(params))] == [id(p) for p in params]


def sgd_of(params):
    return torch.optim.SGD(params, lr=1.0)


# Dropped batches.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("who", ["optimizer", "model", "original"])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("others", [False, True])
def test_zeroing_the_gradients_drops_the_skip(level, who, to_none, others):
    model = Weights()
    original = sgd(model)
    model, optimizer = amp.initialize(model, original, opt_level=level, num_losses=2, **DYNAMIC)
    if others and not (level in ("O2", "O3") and who == "model" and not to_none):  # see the next test
        backward(model, optimizer, [1.0] * 3, loss_id=1)
    backward(model, optimizer, [INF] * 3)
    {"optimizer": optimizer, "model": model, "original": original}[who].zero_grad(set_to_none=to_none)
    backward(model, optimizer, [1.0, 2.0, 3.0])
    optimizer.step()
    assert not optimizer.last_step_skipped
    assert master(optimizer) == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_zeroing_in_place_while_two_losses_are_pending_is_refused_until_they_were_stepped(level):
    model, optimizer = weights(level, num_losses=2)
    backward(model, optimizer, [1.0] * 3)
    backward(model, optimizer, [1.0] * 3, loss_id=1)
    optimizer.step()
    model.zero_grad(set_to_none=False)
    backward(model, optimizer, [1.0] * 3)
    backward(model, optimizer, [1.0] * 3, loss_id=1)
    model.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=r"optimizer.zero_grad\(\)"):
        backward(model, optimizer, [1.0] * 3)
    assert master(optimizer) == [-2.0] * 3


# Exceptions.


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ZeroDivisionError("on purpose")


def breaks(loss, optimizers, backward=True):
    with amp.scale_loss(loss, optimizers) as scaled:
        if backward:
            scaled.backward()
        raise ZeroDivisionError


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("where", ["before", "in the pass", "after"])
@pytest.mark.parametrize("pending", ["nothing", "checked", "overflowed", "clipped"])
def test_an_exception_leaves_everything_as_it_was(level, where, pending):
    models, optimizers = two(level)
    if pending != "nothing":
        for i in (0, 1):
            backward(models[i], optimizers[i], [INF if pending == "overflowed" else 1.0, 2.0, 3.0], loss_id=i)
    if pending == "clipped":
        for optimizer in optimizers:
            for p in amp.master_params(optimizer):
                p.grad.mul_(0.5)
    before = [(m.weight.grad, frozen(m.weight.grad)) for m in models]
    state = amp.state_dict()
    loss = models[0](torch.ones(3)) + models[1](torch.ones(3))
    loss = Broken.apply(loss) if where == "in the pass" else loss
    with pytest.raises(ZeroDivisionError):
        breaks(loss, optimizers, backward=where != "before")
    for model, (grad, values) in zip(models, before, strict=True):
        assert frozen(model.weight.grad) == values
        assert (model.weight.grad is grad) or model.weight.dtype == torch.float16
    assert amp.state_dict() == state
    for optimizer in optimizers:
        optimizer.step()
    expected = {"nothing": [0.0] * 3, "checked": [-1.0, -2.0, -3.0], "clipped": [-0.5, -1.0, -1.5]}
    for optimizer in optimizers:
        assert master(optimizer) == expected.get(pending, [0.0] * 3)
        optimizer.zero_grad()
        assert optimizer.steps_skipped == (pending == "overflowed")
    backward(models[0], optimizers, [1.0] * 3)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_a_broken_pass_are_dropped(level):
    models, optimizers = two(level)
    backward(models[0], optimizers, [1.0] * 3)
    loss = models[0](torch.ones(3)) + models[1](torch.ones(3))
    with pytest.raises(ZeroDivisionError):
        breaks(loss, optimizers)
    assert models[1].weight.grad is None
    optimizers[0].step()
    assert master(optimizers[0]) == [-1.0] * 3
    assert unskipped() == [1, 0]


@pytest.mark.parametrize("level", LEVELS)
def test_a_gradient_that_cannot_be_stepped_is_refused_before_anything_changed(level):
    embedding = nn.Embedding(4, 3, sparse=True)
    (embedding,), (optimizer,) = amp.initialize([embedding], [sgd(embedding)], opt_level=level, **DYNAMIC)
    state = amp.state_dict()
    with (
        pytest.raises(RuntimeError, match=r"gradient of parameter 'weight' is torch.sparse_coo: use dense"),
        amp.scale_loss(embedding(torch.tensor([1])).sum(), optimizer) as scaled,
    ):
        scaled.backward()
    assert amp.state_dict() == state
    assert optimizer.steps_taken == optimizer.steps_skipped == 0


# Collapse.


@pytest.mark.parametrize("level", LEVELS)
def test_a_loss_that_always_overflows_says_so(level):
    model, optimizer = weights(level)

    def train():
        for _ in range(60):
            optimizer.zero_grad()
            backward(model, optimizer, [NAN] * 3)
            optimizer.step()

    with pytest.raises(LossScaleCollapse, match=r"loss 0 has overflowed 50 times .*parameter 'weight'"):
        train()
    assert master(optimizer) == [0.0] * 3


# Sabotage: these tests notice where the code is broken.


def skips_one_loss(monkeypatch):
    monkeypatch.setattr(Verdicts, "on", lambda *args: None)


def forgets_nothing(monkeypatch):
    monkeypatch.setattr(Verdicts, "forget", lambda *args: None)
    monkeypatch.setattr(Verdicts, "review", lambda *args: None)
    monkeypatch.setattr(Verdicts, "_holds", lambda *args: True)


def keeps_broken_passes(monkeypatch):
    monkeypatch.setattr(LossScaler, "discard", lambda *args: None)


def checks_all_losses(monkeypatch):
    import mpengine.amp.scaler as module

    monkeypatch.setattr(module, "_unchecked", lambda pending, loss_id: pending)


@pytest.mark.parametrize(
    ("sabotage", "test"),
    [
        (skips_one_loss, lambda: test_listed_optimizers_skip_and_others_step("O2", (0, 1), 0)),
        (skips_one_loss, lambda: test_a_skip_stays_though_gradients_are_edited("O1", "nan_to_num")),
        (forgets_nothing, lambda: test_zeroing_the_gradients_drops_the_skip("O2", "model", True, False)),
        (forgets_nothing, lambda: test_zeroing_the_gradients_drops_the_skip("O1", "original", False, False)),
        (keeps_broken_passes, lambda: test_gradients_of_a_broken_pass_are_dropped("O2")),
        (
            checks_all_losses,
            lambda: test_an_overflow_anywhere_in_an_accumulation_skips_its_step_and_backs_off_once("O2", 0),
        ),
    ],
)
def test_sabotage_is_noticed(sabotage, test, monkeypatch):
    test()
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        test()


def test_random_histories_match_apexs_rule():
    """Two losses, two optimizers, every overflow pattern of three iterations: scales and weights by apex's rule."""
    for level, pattern in itertools.product(("O1", "O2"), itertools.product((0, 1), repeat=6)):
        models, optimizers = two(level)
        expected_scale, expected_count, expected = [FIRST] * 2, [0, 0], [0.0, 0.0]
        for i in range(3):
            skip = False
            for k in (0, 1):
                bad = pattern[2 * i + k]
                backward(models[k], optimizers, [INF if bad else 1.0] * 3, loss_id=k)
                expected_scale[k] *= 0.5 if bad else 1.0
                expected_count[k] = 0 if bad else expected_count[k] + 1
                skip |= bool(bad)
            for k, optimizer in enumerate(optimizers):
                optimizer.step()
                optimizer.zero_grad()
                expected[k] -= 0.0 if skip else 1.0
                assert master(optimizer) == [expected[k]] * 3
            assert (scales(), unskipped()) == (expected_scale, expected_count)
