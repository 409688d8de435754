"""LossScaler and its verdicts: the hook that judges a pass before the step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from mpengine import amp
from mpengine.amp.overflow_log import OverflowLog
from mpengine.amp.scaler import LossScaler
from mpengine.amp.verdicts import Verdicts
from mpengine.optimizer import MixedPrecisionOptimizer
from tests.amp.world import (
    DYNAMIC,
    FIRST,
    INF,
    LEVELS,
    Weights,
    backward,
    batch,
    master,
    scales,
    sgd,
    unskipped,
    weights,
)
from tests.harness import frozen


def scaler_of(num_losses=1, **kwargs):
    return LossScaler(OverflowLog(enabled=False), init_scale=8.0, num_losses=num_losses, **kwargs)


def test_check_before_scale():
    with pytest.raises(AssertionError, match="Attempted check_ but _scale is None"):
        scaler_of().check_([])


def test_check_of_a_loss_that_does_not_exist():
    scaler = scaler_of()
    scaler.scale(torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match="loss_id is 1"):
        scaler.check_([], 1)


def test_check_works_with_the_engines_own_wrapper():
    scaler = scaler_of(num_losses=2)
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float16)), nn.Parameter(torch.zeros(2))]
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD(params, lr=1.0), scaler)
    for k, size in ((0, 1.0), (1, 2.0)):
        scaler.scale(sum(p.float().sum() for p in params) * size, k).backward()
        scaler.check_([optimizer], k)
        scaler.check_([optimizer], k)  # of what has been judged nothing is judged again
    assert [s.growth_tracker for s in scaler.statistics()] == [1, 1]
    optimizer.step()
    assert [p.tolist() for p in params] == [[-3.0, -3.0]] * 2
    assert [s.growth_tracker for s in scaler.statistics()] == [1, 1]  # the step casts no votes
    optimizer.zero_grad()
    scaler.scale(params[1].sum() * INF, 1).backward()
    scaler.check_([optimizer], 1)
    optimizer.step()
    assert optimizer.last_step_skipped
    assert optimizer.overflowed_parameters(1) == ["group 0, parameter 1 of shape (2,)"]
    assert [s.scale for s in scaler.statistics()] == [8.0, 4.0]


def test_a_copy_goes_on():
    scaler = scaler_of(max_scale=64.0)
    scaler.scale(torch.ones((), requires_grad=True))
    for twin in (copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))):
        param = nn.Parameter(torch.zeros(2, dtype=torch.float16))
        optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0), twin)
        twin.scale(param.float().sum()).backward()
        twin.check_([optimizer])
        optimizer.step()
        assert param.tolist() == [-1.0, -1.0]
        assert twin.get_scale() == 8.0


@pytest.mark.parametrize("level", LEVELS)
def test_a_copied_optimizer_is_none_of_amps(level):
    model, optimizer = weights(level)
    twin = copy.deepcopy(optimizer)
    with (
        pytest.raises(RuntimeError, match=r"that amp\.initialize was not given"),
        amp.scale_loss(model(torch.ones(3)), twin),
    ):
        pass


# Two losses at once.


def pair(level):
    models = [Weights(), Weights()]
    return amp.initialize(models, [sgd(m) for m in models], opt_level=level, num_losses=2, **DYNAMIC)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [None, 0, 1])
def test_nested_contexts(level, bad):
    """Both losses are made of both models; one of them overflows on the second model alone."""
    models, optimizers = pair(level)
    losses = [models[0](torch.full((3,), k + 1.0)) + models[1](torch.full((3,), 4.0)) for k in (0, 1)]
    if bad is not None:
        losses[bad] = losses[bad] + models[1](torch.ones(3)) * INF
    with amp.scale_loss(losses[0], optimizers) as first, amp.scale_loss(losses[1], optimizers, loss_id=1) as second:
        first.backward()
        second.backward()
    assert scales() == [FIRST / 2 if bad == k else FIRST for k in (0, 1)]
    assert unskipped() == [int(bad != k) for k in (0, 1)]
    for optimizer in optimizers:
        optimizer.step()
    assert master(optimizers[1]) == [-8.0 if bad is None else 0.0] * 3
    if bad is None:
        assert master(optimizers[0]) == [-3.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_a_delayed_loss_is_checked_on_all_optimizers_that_have_it(level):
    models, optimizers = pair(level)
    with amp.scale_loss(models[0](torch.ones(3)) + models[1](torch.ones(3)) * INF, optimizers, delay_unscale=True) as s:
        s.backward()
    assert scales() == [FIRST] * 2
    optimizers[0].step()  # which finds that it was forgotten
    assert scales() == [FIRST / 2, FIRST]
    optimizers[1].step()
    assert [master(o) for o in optimizers] == [[0.0] * 3] * 2


@pytest.mark.parametrize("level", LEVELS)
def test_backward_twice_in_one_context_counts_once(level):
    model, optimizer = weights(level)
    with amp.scale_loss(model(torch.ones(3)), optimizer) as scaled:
        scaled.backward(retain_graph=True)
        scaled.backward()
    assert unskipped() == [1]
    optimizer.step()
    assert master(optimizer) == [-2.0] * 3


# Verdicts.


@pytest.mark.parametrize("level", LEVELS)
def test_a_skip_outlives_the_step_and_the_zeroing_of_its_witness(level):
    """The second optimizer has no gradients of the loss that overflowed; it was listed."""
    models, optimizers = pair(level)
    backward(models[0], optimizers, [INF] * 3)
    optimizers[0].step()
    optimizers[0].zero_grad()
    backward(models[1], optimizers[1], [1.0] * 3, loss_id=1)
    optimizers[1].step()
    assert optimizers[1].last_step_skipped


@pytest.mark.parametrize("level", LEVELS)
def test_a_skip_goes_with_the_gradients_of_its_witness(level):
    models, optimizers = pair(level)
    backward(models[0], optimizers, [INF] * 3)
    models[0].zero_grad()
    backward(models[1], optimizers[1], [1.0] * 3, loss_id=1)
    optimizers[1].step()
    assert master(optimizers[1]) == [-1.0] * 3


# Layers.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.GRU(4, 3), (5, 2, 4)),
        (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.GroupNorm(1, 3)), (2, 2, 5, 5)),
        (lambda: nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)), None),
        (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4)),
    ],
    ids=["gru", "conv", "embedding", "transformer"],
)
def test_layers_train_at_every_level(level, make, inputs):
    torch.manual_seed(0)
    model = make()
    model, optimizer = amp.initialize(model, torch.optim.AdamW(model.parameters(), lr=0.01), opt_level=level, **DYNAMIC)
    x = torch.tensor([[1, 2], [3, 4]]) if inputs is None else torch.randn(inputs)
    before = frozen(list(optimizer.master_params()))
    for _ in range(2):
        optimizer.zero_grad()
        out = model(x)
        out = out[0] if isinstance(out, tuple) else out
        assert out.dtype == torch.float32
        with amp.scale_loss(out.square().mean(), optimizer) as scaled:
            scaled.backward()
        optimizer.step()
    assert optimizer.steps_taken == 2
    assert frozen(list(optimizer.master_params())) != before


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])  # of O1 torch's autocast has no LSTM on a CPU
def test_an_lstm(level):
    test_layers_train_at_every_level(level, lambda: nn.LSTM(4, 3), (5, 2, 4))


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_a_buffer_that_meets_activations_is_cast(level):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.register_buffer("position", torch.full((6,), 0.1))

        def forward(self, x):
            return self.linear(x + self.position)

    model = amp.initialize(Net(), opt_level=level)
    assert model(batch(0)).dtype == torch.float32
    assert model.position.dtype == torch.float16
    assert model.state_dict()["position"].dtype == torch.float32


@pytest.mark.parametrize("level", LEVELS)
def test_hooks_of_a_step_run_once(level):
    MixedPrecisionOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))  # torch patches its step too
    model, optimizer = weights(level)
    calls = []
    optimizer.register_step_pre_hook(lambda *args: calls.append("before"))
    optimizer.register_step_post_hook(lambda *args: calls.append("after"))
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    assert calls == ["before", "after"]


def test_sabotage_of_the_witnesses_is_noticed(monkeypatch):
    monkeypatch.setattr(Verdicts, "stepped", Verdicts.forget)
    with pytest.raises(AssertionError):
        test_a_skip_outlives_the_step_and_the_zeroing_of_its_witness("O2")
    monkeypatch.setattr(LossScaler, "_unchecked_optimizers", lambda self, loss_id: [])
    with pytest.raises(AssertionError):
        test_a_delayed_loss_is_checked_on_all_optimizers_that_have_it("O1")
