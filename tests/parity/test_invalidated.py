"""Parameters and gradients that are replaced, frozen, idle or invalidated between iterations."""

import pytest
import torch
from torch import nn

from tests.parity.harness import INF, SIDES, Side, batches, bits, network, vector

SCALER = {"init_scale": 2.0**6, "growth_interval": 3}


def adam(params):
    return torch.optim.Adam(params, lr=0.01, foreach=False)


def fused_adam(params):
    return torch.optim.Adam(params, lr=0.01, fused=True)


def sgd(params):
    return torch.optim.SGD(params, lr=0.125)


@pytest.mark.parametrize("kind", ["plain"])
@pytest.mark.parametrize("make", [adam, fused_adam])
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("through", ["model", "optimizer"])
def test_gradients_zeroed_either_way_equal_torchs(kind, make, set_to_none, through):
    results = []
    for one in ("torch", kind):
        side = Side(one, network(), make, **SCALER)
        for n, (x, y) in enumerate(batches(8)):
            side.backward(side.loss(x, y), n in (2, 3))
            side.step()
            side.scaler.update()
            side.record()
            (side.model if through == "model" else side.optimizer).zero_grad(set_to_none=set_to_none)
        results.append((side.history, bits(side.weights())))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_zeroed_after_an_overflow_leave_no_inf(kind, set_to_none):
    """`inf * 0` would be NaN: zeroing writes, it does not multiply."""
    side = Side(kind, vector([1.0, 1.0]), sgd, init_scale=8.0)
    for factor in (INF, 1.0):
        side.backward((side.model.weight.float() * factor).sum())
        side.step()
        side.scaler.update()
        side.model.zero_grad(set_to_none=set_to_none)
    assert side.weights()[0].tolist() == [0.875, 0.875]


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("when", ["before backward", "after step", "after update"])
def test_gradients_invalidated_between_iterations(kind, when):
    """`.grad` becomes None, its memory is freed and taken by something else: the next iteration is as any other."""
    weights = []
    for invalidate in (False, True):
        side = Side(kind, vector([1.0, 1.0]), sgd, init_scale=8.0)
        for factor in (1.0, 2.0, 1.0):
            side.scaler.scale(torch.ones((), requires_grad=True))
            drop(side, invalidate and when == "before backward")
            side.backward((side.model.weight.float() * factor).sum())
            side.step()
            drop(side, invalidate and when == "after step")
            side.scaler.update()
            drop(side, invalidate and when == "after update")
            side.optimizer.zero_grad()
        weights.append(side.weights()[0].tolist())
    assert weights[0] == weights[1] == [0.5, 0.5]


def drop(side, wanted):
    if wanted:
        for param in side.params:
            param.grad = None
        for _ in range(8):
            torch.full((2,), float("nan"))  # what takes the memory


@pytest.mark.parametrize("kind", ["torch", "plain"])
def test_parameters_replaced_between_iterations(kind):
    """A new parameter object in the group, between update and the next backward; the scaler has no hold on the old."""
    side = Side(kind, vector([1.0, 1.0]), sgd, init_scale=8.0)
    for n in range(3):
        fresh = nn.Parameter(side.params[0].detach().clone())
        side.optimizer.param_groups[0]["params"] = [fresh]
        side.backward(fresh.sum() * (INF if n == 1 else 1.0))
        side.step()
        side.update()
    assert side.params[0].tolist() == [0.75, 0.75]
    assert side.scaler.get_scale() == 4.0


@pytest.mark.parametrize("kind", SIDES)
def test_weights_written_between_forward_and_backward_are_noticed_by_autograd(kind):
    """A step moves the versions of what it wrote: a graph saved before it must not run after it."""
    side = Side(kind, vector([1.0, 1.0]), sgd, init_scale=8.0)
    weight = side.model.weight
    stale = (weight * weight).float().sum()
    side.backward(weight.float().sum())
    side.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        side.scaler.scale(stale).backward()


@pytest.mark.parametrize("kind", SIDES)
def test_freezing_and_thawing(kind):
    """A frozen parameter has no gradient: it is left alone, with its state, and goes on when it is thawed."""
    model = nn.ModuleList([vector([1.0]), vector([1.0])])
    side = Side(kind, model, lambda p: torch.optim.SGD(p, lr=0.125, momentum=0.5), init_scale=8.0)
    for frozen in (False, True, False):
        model[1].weight.requires_grad_(not frozen)
        side.backward(sum(m.weight.float().sum() for m in model))
        side.step()
        side.update()
    # Momentum 1, 1.5, 1.75 where it trained three times, 1 and 1.5 where it trained twice.
    assert [w.item() for w in side.weights()] == [1.0 - 0.125 * 4.25, 1.0 - 0.125 * 2.5]


@pytest.mark.parametrize("kind", SIDES)
def test_an_idle_parameter_is_left_alone(kind):
    """Weight decay and momentum do not move what has no gradient."""
    model = nn.ModuleList([vector([1.0]), vector([1.0])])
    side = Side(kind, model, lambda p: torch.optim.SGD(p, lr=0.125, momentum=0.5, weight_decay=0.5), init_scale=8.0)
    side.backward(model[0].weight.float().sum())
    side.step()
    side.update()
    assert [w.item() for w in side.weights()] == [1.0 - 0.125 * 1.5, 1.0]


@pytest.mark.parametrize("kind", SIDES)
def test_a_gradient_that_is_all_idle_overflows_nothing(kind):
    """Gradients of zeros: a step, not a skip, and the scale waits."""
    side = Side(kind, vector([1.0, 1.0]), sgd, init_scale=8.0)
    side.backward((side.model.weight.float() * 0.0).sum())
    side.step()
    side.update()
    assert side.weights()[0].tolist() == [1.0, 1.0]
    assert (side.scaler.get_scale(), side.scaler._get_growth_tracker()) == (8.0, 1)


@pytest.mark.parametrize("seed", range(3))
def test_random_mixes_of_all_of_these_equal_torchs(seed):
    """Idle, frozen and thawed parameters, zeroed either way, overflows: bit for bit."""
    results = []
    for kind in ("torch", "plain"):
        draw = torch.Generator().manual_seed(seed)
        side = Side(kind, network(seed), adam, **SCALER)
        for x, y in batches(15, seed):
            choice = torch.randint(6, (4,), generator=draw).tolist()
            for param, number in zip(side.params, choice, strict=True):
                param.requires_grad_(number > 1 or param is side.params[0])
            side.backward(side.loss(x, y), choice[0] == 0)
            if choice[1] == 0:
                side.params[-1].grad = None
            side.step()
            side.scaler.update()
            side.record()
            side.optimizer.zero_grad(set_to_none=choice[2] > 1)
        results.append((side.history, bits(side.weights())))
    assert results[0] == results[1]
