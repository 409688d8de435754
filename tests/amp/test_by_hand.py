"""What scripts do to gradients between the passes: clipping an inf, zeroing by the model, giving up in the middle."""

from __future__ import annotations

import contextlib

import pytest
import torch

from mpengine import amp
from tests.amp.world import DYNAMIC, INF, LEVELS, Weights, backward, master, sgd, weights


@pytest.mark.parametrize("level", LEVELS)
def test_an_inf_on_an_unlisted_optimizer_is_not_applied_though_it_was_clipped(level):
    first, second = Weights(), Weights()
    (first, second), (one, two) = amp.initialize([first, second], [sgd(first), sgd(second)], opt_level=level, **DYNAMIC)
    with amp.scale_loss(first(torch.ones(3)) + second(torch.ones(3)) * INF, one) as scaled:
        scaled.backward()
    torch.nn.utils.clip_grad_value_(list(amp.master_params(two)), 1.0)
    one.step()
    two.step()
    assert (master(one), master(two)) == ([-1.0] * 3, [0.0] * 3)
    two.zero_grad()
    backward(second, two, [1.0] * 3)
    two.step()
    assert master(two) == [-1.0] * 3


@pytest.mark.parametrize("level", ["O2", "O3"])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_norm_of_masters_does_not_count_what_the_model_has_zeroed(level, to_none):
    model, optimizer = weights(level)
    backward(model, optimizer, [1.0] * 3)
    list(amp.master_params(optimizer))
    optimizer.step()
    backward(model, optimizer, [2.0] * 3)
    list(amp.master_params(optimizer))
    model.zero_grad(set_to_none=to_none)
    norm = torch.nn.utils.clip_grad_norm_(list(amp.master_params(optimizer)), 1.0, foreach=False)
    assert norm == 0.0


@pytest.mark.parametrize("level", LEVELS)
def test_zeros_are_zeros_again_after_a_pass_that_broke(level):
    """Momentum steps on zeros, and does nothing where there is no gradient."""
    model = Weights()
    model, optimizer = amp.initialize(model, sgd(model, momentum=0.5), opt_level=level, **DYNAMIC)
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with contextlib.suppress(ZeroDivisionError), amp.scale_loss(model(torch.ones(3)), optimizer) as scaled:
        scaled.backward()
        raise ZeroDivisionError
    assert next(model.parameters()).grad.tolist() == [0.0] * 3
    optimizer.step()
    assert master(optimizer) == [-1.5] * 3
