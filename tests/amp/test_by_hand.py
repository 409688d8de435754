"""What scripts do to gradients between the passes: clipping an inf, zeroing by the model, giving up in the middle."""

from __future__ import annotations

import contextlib

import pytest
import torch

from mpengine import amp
from mpengine.labels import Label, fold
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


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_another_tensor_in_the_place_of_a_scaled_gradient_is_refused(level):
    """Taken for an unscaled one it would be applied many times too large."""
    model, optimizer = weights(level)
    backward(model, optimizer, [1.0] * 3)
    model.weight.grad = model.weight.grad * 0.5
    with pytest.raises(RuntimeError, match=r"'weight' was replaced by another torch.float16 tensor.*amp.master_params"):
        optimizer.step()
    assert master(optimizer) == [0.0] * 3
    optimizer.zero_grad()
    backward(model, optimizer, [1.0] * 3)
    model.weight.grad = model.weight.grad.clone()
    with pytest.raises(RuntimeError, match="'weight' was replaced"):
        backward(model, optimizer, [1.0] * 3)
    model.zero_grad()
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    assert master(optimizer) == [-1.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_of_fp32_weights_too(level):
    """At O2 the gradients of norm layers carry the scale as well, and everywhere those of delayed passes."""
    model = torch.nn.LayerNorm(3, bias=False)
    model, optimizer = amp.initialize(model, sgd(model), opt_level="O2" if level == "O3" else level, **DYNAMIC)
    for delayed in (level in ("O2", "O3"), True):
        with amp.scale_loss(model(torch.tensor([1.0, 2.0, 6.0])).sum(), optimizer, delay_unscale=delayed) as scaled:
            scaled.backward()
        model.weight.grad = model.weight.grad * 0.5
        if delayed:
            with pytest.raises(RuntimeError, match="'weight' was replaced"):
                optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("level", LEVELS)
def test_a_replaced_unscaled_gradient_is_taken(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [1.0] * 3)
    (param,) = amp.master_params(optimizer)
    param.grad = param.grad * 0.5
    optimizer.step()
    assert master(optimizer) == [-0.5] * 3


def test_what_was_judged_is_folded_apart_from_what_was_not():
    """Else an overflow that was counted would be found again among the gradients of later passes."""

    def aside():
        old, new, other = (Label(k, torch.tensor(2.0), counted=k == 0) for k in (0, 1, 2))
        new.loss_id = 0
        return [(old, torch.full((2,), INF).half()), (old, torch.ones(2)), (new, torch.ones(2)), (other, torch.ones(2))]

    assert [(k.loss_id, k.counted, g.tolist()) for k, g in fold(aside(), limit=4)] == [
        (0, True, [INF] * 2),
        (0, False, [0.5] * 2),
        (2, False, [0.5] * 2),
    ]
    assert [(k.loss_id, k.counted, g.tolist()) for k, g in fold(aside(), limit=3)] == [
        (0, False, [INF] * 2),
        (2, False, [0.5] * 2),
    ]


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_clipping_scaled_gradients_is_warned_of_once(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [3.0, 0.0, 4.0])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.warns(UserWarning, match=r"carry the loss's scale.*amp.master_params\(optimizer\)"):
        optimizer.step()
    optimizer.zero_grad()
    backward(model, optimizer, [1.0] * 3)
    model.weight.grad.mul_(0.5)
    optimizer.step()  # warnings are errors


@pytest.mark.parametrize("level", LEVELS)
def test_a_pass_that_fails_on_top_of_delayed_ones_is_not_stepped(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [1.0] * 3, delay_unscale=True)
    with contextlib.suppress(ZeroDivisionError), amp.scale_loss(model(torch.ones(3)), optimizer) as scaled:
        scaled.backward()
        raise ZeroDivisionError
    for go_on in (optimizer.step, lambda: backward(model, optimizer, [1.0] * 3)):
        with pytest.raises(RuntimeError, match=r"pass of loss 0 was broken off.*optimizer.zero_grad\(\)"):
            go_on()
    assert master(optimizer) == [0.0] * 3
    optimizer.zero_grad()
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    assert master(optimizer) == [-1.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_an_exception_before_the_pass_leaves_delayed_gradients_alone(level):
    model, optimizer = weights(level)
    backward(model, optimizer, [1.0] * 3, delay_unscale=True)
    with contextlib.suppress(ZeroDivisionError), amp.scale_loss(model(torch.ones(3)), optimizer):
        raise ZeroDivisionError
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    assert master(optimizer) == [-2.0] * 3


def test_scripts_may_set_a_scale():
    model, optimizer = weights("O2", num_losses=2)
    amp._amp_state.loss_scalers[1]._loss_scale = 64
    assert [scaler.loss_scale() for scaler in amp._amp_state.loss_scalers] == [1024.0, 64.0]
    backward(model, optimizer, [1.0] * 3, loss_id=1)
    assert model.weight.grad.tolist() == [64.0] * 3
    optimizer.step()
    assert master(optimizer) == [-1.0] * 3
    with pytest.raises(ValueError, match=r"new_scale is 0\.0"):
        amp._amp_state.loss_scalers[1]._loss_scale = 0


def test_a_loss_beyond_num_losses_and_enabled_as_a_string():
    model, optimizer = weights("O2", num_losses=2)
    with (
        pytest.raises(ValueError, match=r"loss_id is 2; amp.initialize was given num_losses=2"),
        amp.scale_loss(model(torch.ones(3)), optimizer, loss_id=2),
    ):
        pass
    model = Weights()
    assert amp.initialize(model, enabled="False") is model
    assert model.weight.dtype is torch.float32
    with pytest.raises(ValueError, match="enabled must be a boolean"):
        amp.initialize(model, enabled="no")


@pytest.mark.parametrize("level", LEVELS)
def test_zeros_that_a_delayed_pass_does_not_reach_are_not_of_it(level):
    """Else a step on them would judge that pass, which is judged with the next one of its loss."""
    first, second = Weights(), Weights()
    (first, second), (one, two) = amp.initialize([first, second], [sgd(first), sgd(second)], opt_level=level, **DYNAMIC)
    backward(second, two, [1.0] * 3)
    two.step()
    two.zero_grad(set_to_none=False)
    backward(first, one, [1.0] * 3, delay_unscale=True)
    two.step()
    backward(first, one, [1.0] * 3)
    one.step()
    assert (master(one), master(two)) == ([-2.0] * 3, [-1.0] * 3)
    assert amp.state_dict()["loss_scaler0"]["unskipped"] == 2
