"""apex.amp's ten defects (each was seen in its last release): none is here."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mpengine import amp, cpu
from mpengine.amp.scaler import LossScaler
from mpengine.amp.verdicts import Verdicts
from tests.amp.world import DYNAMIC, FIRST, INF, LEVELS, Weights, backward, batch, master, network, scales, sgd, weights
from tests.harness import frozen

NAN = float("nan")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scale", [1.0, 128.0])
@pytest.mark.parametrize("bad", [INF, NAN])
def test_1_a_static_scale_skips_too(level, scale, bad):
    model, optimizer = weights(level, loss_scale=scale)
    for values, expected in (([1.0] * 3, -1.0), ([1.0, bad, 1.0], -1.0), ([1.0] * 3, -2.0)):
        optimizer.zero_grad()
        backward(model, optimizer, values)
        optimizer.step()
        assert master(optimizer) == [expected] * 3
    assert scales() == [scale]


def train(model, optimizer, steps):
    for i in steps:
        optimizer.zero_grad()
        loss = model(batch(i)).square().mean() * (INF if i == 3 else 1.0)
        with amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        optimizer.step()


def everything(model, optimizer):
    saved = optimizer.state_dict()
    weights = list(model.parameters())
    return frozen([model.state_dict(), weights, saved["state"], saved["param_groups"], amp.state_dict()])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["moa", "oma", "amo", "aom"])
@pytest.mark.parametrize("zero_first", [False, True])
def test_2_resuming_is_bitwise(level, order, zero_first):
    """Masters are saved; `zero_grad` before loading leaves no stale ones; moments stay FP32."""

    def fresh(seed):
        model = network(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return amp.initialize(model, optimizer, opt_level=level, **DYNAMIC)

    model, optimizer = fresh(0)
    train(model, optimizer, range(5))
    saved = copy.deepcopy({"m": model.state_dict(), "o": optimizer.state_dict(), "a": amp.state_dict()})
    train(model, optimizer, range(5, 8))
    expected = everything(model, optimizer)
    model, optimizer = fresh(1)
    if zero_first:
        optimizer.zero_grad()
    loads = {"m": model.load_state_dict, "o": optimizer.load_state_dict, "a": amp.load_state_dict}
    for part in order:
        loads[part](saved[part])
    train(model, optimizer, range(5, 8))
    assert everything(model, optimizer) == expected


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("floor", [None, 0])
def test_3_the_scale_never_reaches_zero(level, floor):
    model, optimizer = weights(level, min_loss_scale=floor)
    optimizer.scaler._watchdog.limit = None  # which stops such a run after 50 skips
    for _ in range(150):
        optimizer.zero_grad()
        backward(model, optimizer, [NAN] * 3)
        optimizer.step()
    assert scales() == [2.0**-126]
    assert master(optimizer) == [0.0] * 3
    optimizer.zero_grad()
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    assert scales() == [2.0**-126]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("by", ["optimizer", "model"])
def test_4_a_dropped_batch_does_not_cost_the_next_step(level, by):
    model, optimizer = weights(level)
    backward(model, optimizer, [INF] * 3)
    {"optimizer": optimizer, "model": model}[by].zero_grad()
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    assert master(optimizer) == [-1.0] * 3
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (1, 0)


@pytest.mark.parametrize("level", LEVELS)
def test_5_inf_gradients_that_a_skip_left_do_not_go_unnoticed(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [INF] * 3)
    optimizer.step()
    for _ in range(2):
        backward(model, optimizer, [1.0] * 3)  # nobody zeroed the gradients
        optimizer.step()
        assert optimizer.last_step_skipped
        assert master(optimizer) == [0.0] * 3
    assert scales() == [FIRST / 2]  # it overflowed once
    optimizer.zero_grad()
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    assert master(optimizer) == [-1.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_6_a_tuple_of_optimizers(level):
    models = [Weights(), Weights()]
    models, optimizers = amp.initialize(models, [sgd(m) for m in models], opt_level=level, **DYNAMIC)
    for _ in range(2):
        loss = models[0](torch.ones(3)) + models[1](torch.full((3,), 2.0))
        with amp.scale_loss(loss, tuple(optimizers)) as scaled:
            scaled.backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [master(o) for o in optimizers] == [[-2.0] * 3, [-4.0] * 3]


@pytest.mark.parametrize("level", LEVELS)
def test_6_an_exception_loses_no_gradients_and_leaves_casts_as_they_were(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [1.0, 2.0, 3.0])

    def breaks():
        with amp.scale_loss(model(torch.ones(3)), optimizer) as scaled, amp.disable_casts():
            scaled.backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert amp.casts.are_active() is (level == "O1")
    optimizer.step()
    assert master(optimizer) == [-1.0, -2.0, -3.0]


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_7_set_aside_gradients_are_not_copied(level):
    model, optimizer = weights(level, num_losses=2)
    backward(model, optimizer, [1.0] * 3)
    kept = model.weight.grad
    backward(model, optimizer, [1.0] * 3, loss_id=1)
    pending = optimizer.loss_scaler._pending(optimizer)[0]
    assert {grad.dtype for _, grad in pending} == {torch.float16}
    assert kept is pending[0][1]


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_7_accumulation_needs_one_fp32_sum_beside_the_new_gradients(level):
    model, optimizer = weights(level)
    for i in range(4):
        backward(model, optimizer, [1.0, 2.0, 3.0])
        (pending,) = optimizer.loss_scaler._pending(optimizer)
        assert [grad.dtype for _, grad in pending] == [torch.float32 if i else torch.float16]
    optimizer.step()
    assert master(optimizer) == [-4.0, -8.0, -12.0]
    total = model.weight.grad
    with amp.scale_loss(model(torch.ones(3)), optimizer) as scaled:
        scaled.backward()
        pending = optimizer.loss_scaler._pending(optimizer)[0]
        assert any(grad is total for _, grad in pending)  # set aside as it is, not copied


@pytest.mark.parametrize("level", LEVELS)
def test_7_nothing_is_read_back(level, monkeypatch):
    """On a CPU every read is at hand; that the scaler asks for none is what a GPU needs."""
    model, optimizer = weights(level, verbosity=0)
    optimizer.loss_scaler._watchdog.limit = None
    for name in ("statistics", "get_scale"):
        monkeypatch.setattr(LossScaler, name, lambda *args, name=name: pytest.fail(f"{name} was asked for"))
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()


@pytest.mark.parametrize("level", LEVELS)
def test_8_a_second_initialize_nests_nothing(level):
    model = Weights()
    for _ in range(3):
        model, optimizer = amp.initialize(model, sgd(model), opt_level=level, **DYNAMIC)
        assert model.__dict__["forward"].own is None
        assert len(model._state_dict_hooks) == (1 if level in ("O2", "O3") else 0)
        backward(model, optimizer, [1.0] * 3)
        optimizer.step()
        optimizer.zero_grad()
    assert master(optimizer) == [-3.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_8_each_initialize_has_its_own_state(level):
    (a, opt_a), (b, opt_b) = weights(level), weights(level, loss_scale=8.0)
    backward(a, opt_a, [INF] * 3)
    backward(b, opt_b, [1.0] * 3)
    opt_a.step()
    opt_b.step()
    assert (master(opt_a), master(opt_b)) == ([0.0] * 3, [-1.0] * 3)
    assert (opt_a.scaler.get_scale(), opt_b.scaler.get_scale()) == (FIRST / 2, 8.0)


@pytest.mark.parametrize("level", LEVELS)
def test_9_a_static_scale_of_one_accumulates(level):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(2)  # FP32 in O2
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, c):
            return (c * (self.weight.float() + self.norm.bias.float())).sum()

    model = Mixed()
    model, optimizer = amp.initialize(model, sgd(model), opt_level=level, loss_scale=1.0)
    for c in ([2.0, 3.0], [2.0, 3.0]):
        with amp.scale_loss(model(torch.tensor(c)), optimizer) as scaled:
            scaled.backward()
    grads = [p.grad.tolist() for p in amp.master_params(optimizer) if p.grad is not None]
    assert grads == [[4.0, 6.0], [4.0, 6.0]]
    optimizer.step()
    masters = [p.tolist() for p in optimizer.master_params()]
    assert [-4.0, -6.0] in masters
    assert masters.count([-4.0, -6.0]) == 2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
@pytest.mark.parametrize("by", ["returned", "original"])
def test_10_added_parameters_have_masters(level, make, by):
    model = nn.ModuleDict({"a": Weights(value=0.1), "b": Weights(value=0.1)})
    original = make(model["a"].parameters(), lr=0.125)
    model, optimizer = amp.initialize(model, original, opt_level=level, **DYNAMIC)
    {"returned": optimizer, "original": original}[by].add_param_group({"params": list(model["b"].parameters())})
    for _ in range(3):
        optimizer.zero_grad()
        loss = model["a"](torch.ones(3)) + model["b"](torch.ones(3))
        with amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        optimizer.step()
    masters = list(optimizer.master_params())
    assert len(masters) == 2
    assert all(m.dtype == torch.float32 for m in masters)
    for param, m in zip(model.parameters(), masters, strict=True):
        assert (m is param) is (level in ("O0", "O1"))
        assert torch.equal(m.to(param.dtype), param)
        assert not torch.equal(m, torch.full((3,), 0.1))
    started = torch.tensor([0.1]).to(model["b"].weight.dtype).float()  # of the cast value, which is all there is
    assert (masters[1] - started).tolist() == pytest.approx((masters[0] - 0.1).tolist(), rel=1e-5)


# Sabotage: the tests above notice.


def sabotaged(monkeypatch, owner, name, replacement, test):
    test()
    monkeypatch.setattr(owner, name, replacement)
    with pytest.raises(AssertionError):
        test()


def test_sabotage_without_checks(monkeypatch):
    def plain(self, optimizers, *args, **kwargs):
        for optimizer in optimizers:
            for label in self._pending(optimizer).labels:
                label.counted = True

    test = test_5_inf_gradients_that_a_skip_left_do_not_go_unnoticed
    sabotaged(monkeypatch, LossScaler, "check_", plain, lambda: test("O2"))


def test_sabotage_with_verdicts_that_last(monkeypatch):
    monkeypatch.setattr(Verdicts, "_holds", lambda *args: True)
    test = test_4_a_dropped_batch_does_not_cost_the_next_step
    sabotaged(monkeypatch, Verdicts, "forget", lambda *args: None, lambda: test("O2", "optimizer"))


def test_sabotage_of_the_saved_scales(monkeypatch):
    test = test_2_resuming_is_bitwise
    sabotaged(monkeypatch, amp, "load_state_dict", lambda state: None, lambda: test("O2", "moa", False))


def test_sabotage_of_the_decision(monkeypatch):
    real = cpu.decide

    def never_skips(table, *args, **kwargs):
        real(table, *args, **kwargs)
        table.decision[0] = 0.0

    sabotaged(monkeypatch, cpu, "decide", never_skips, lambda: test_1_a_static_scale_skips_too("O2", 1.0, INF))
