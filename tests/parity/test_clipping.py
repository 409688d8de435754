"""Clipping: of unscaled gradients after a separate `unscale_`, by the step itself, and of scaled ones by mistake."""

import pytest
import torch
from torch import nn

from tests.parity.harness import INF, Reach, Side, assert_close_in_ulp, batches, bits, network, vector

MAX_NORM = 0.25
SCALER = {"init_scale": 2.0**8, "growth_interval": 4}
MAKE = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=False),
    "fused adam": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
}
every_optimizer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def by_norm(params):
    return nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=False)


def by_value(params):
    nn.utils.clip_grad_value_(params, 0.01)


def train(side, clip, overflow=(2, 5), steps=12):
    for n, (x, y) in enumerate(batches(steps)):
        side.backward(side.loss(x, y), n in overflow)
        side.scaler.unscale_(side.optimizer)
        clip(side.params)
        side.step()
        side.update()
    return side


@every_optimizer
@pytest.mark.parametrize("clip", [by_norm, by_value])
def test_clipping_after_a_separate_unscale_equals_torchs(make, clip):
    """Bit for bit with torch's optimizers, overflows among the steps."""
    theirs, ours = (train(Side(kind, network(), make, **SCALER), clip) for kind in ("torch", "plain"))
    assert ours.history == theirs.history
    assert bits(ours.weights()) == bits(theirs.weights())


@every_optimizer
@pytest.mark.parametrize("clip", [by_norm, by_value])
@pytest.mark.parametrize("kind", ["wrapped", "wrapped fp16"])
@pytest.mark.parametrize("which", ["parameters", "masters"])
def test_a_wrapped_optimizers_gradients_are_clipped_as_torchs(make, clip, kind, which):
    """The same FP32 gradients on both, unscaled, clipped by torch's function: through parameters or masters."""
    theirs, ours = Side("torch", network(), make, **SCALER), Side(kind, network(), make, **SCALER)
    reach = Reach(theirs.weights())
    for n, (x, y) in enumerate(batches(12)):
        theirs.backward(theirs.loss(x, y), n in (2, 5))
        ours.feed([p.grad for p in theirs.params])
        for side in (theirs, ours):
            side.scaler.unscale_(side.optimizer)
        clip(theirs.params)
        clip(ours.params if which == "parameters" else list(ours.optimizer.master_params()))
        assert bits([p.grad for p in ours.params]) == bits([p.grad for p in theirs.params])
        for side in (theirs, ours):
            side.step()
            side.update()
        reach.follow(theirs.weights())
    assert ours.history == theirs.history
    assert_close_in_ulp(ours.weights(), theirs.weights(), reach, 10)


@pytest.mark.parametrize("norm", [0.1, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("kind", ["wrapped", "wrapped fp16", "inside torch's"])
def test_max_grad_norm_is_clip_grad_norm_(kind, norm):
    """Clipping in the step: the norm that torch reports, within 4 roundings, and its weights within 4 ULP a step.

    torch adds 144 squares in FP32 and in some order; ours in float64. Each of its additions is off by at most half a
    ULP of the sum, and they add up in blocks: the norm is off by less than 20 * 2^-24 of itself.
    """
    make = MAKE["sgd"]
    theirs, ours = Side("torch", network(), make, **SCALER), Side(kind, network(), make, clip=norm, **SCALER)
    reach = Reach(theirs.weights())
    clipped = 0
    for n, (x, y) in enumerate(batches(16)):
        theirs.backward(theirs.loss(x, y * 4), n in (2, 5))
        ours.feed([p.grad for p in theirs.params])
        theirs.scaler.unscale_(theirs.optimizer)
        total = float(nn.utils.clip_grad_norm_(theirs.params, norm, foreach=False))
        for side in (theirs, ours):
            side.step()
            side.update()
        if n not in (2, 5):
            assert abs(ours.optimizer.last_grad_norm - total) <= 20 * 2.0**-24 * total
            clipped += total > norm
        reach.follow(theirs.weights())
    assert clipped == {0.1: 14, 1.0: clipped, 10.0: 0, 1e6: 0}[norm]
    assert ours.history == theirs.history
    assert_close_in_ulp(ours.weights(), theirs.weights(), reach, 14)


@pytest.mark.parametrize("kind", ["torch", "plain", "wrapped", "wrapped fp16"])
def test_an_exact_case(kind):
    """Gradients (3, 4) of norm 5, clipped to 2.5, lr 2: weights 1 - 2 * (1.5, 2)."""
    side = Side(kind, vector([1.0, 1.0]), lambda p: torch.optim.SGD(p, lr=2.0), init_scale=4.0)
    side.backward((side.model.weight.float() * torch.tensor([3.0, 4.0])).sum())
    assert side.model.weight.grad.tolist() == [12.0, 16.0]
    side.scaler.unscale_(side.optimizer)
    assert side.model.weight.grad.tolist() == [3.0, 4.0]
    assert float(nn.utils.clip_grad_norm_(side.params, 2.5)) == 5.0
    side.step()
    side.update()
    for weight, exact in zip(side.weights()[0].tolist(), (-2.0, -3.0), strict=True):
        assert abs(weight - exact) <= 6 * (2.5e-7 + 2.0**-24 * 5)  # max_norm / (norm + 1e-6), and two roundings


@pytest.mark.parametrize("kind", ["torch", "plain"])
def test_clipping_scaled_gradients_clips_to_another_norm(kind):
    """What `unscale_` is for: gradients clipped at scale 4 are a quarter of the norm after it."""
    side = Side(kind, vector([1.0, 1.0]), lambda p: torch.optim.SGD(p, lr=1.0), init_scale=4.0)
    side.backward((side.model.weight * torch.tensor([3.0, 4.0])).sum())
    nn.utils.clip_grad_norm_(side.params, 2.5)
    side.step()
    moved = torch.linalg.vector_norm(1.0 - side.weights()[0])
    assert abs(float(moved) - 2.5 / 4) < 1e-6


@pytest.mark.parametrize("kind", ["torch", "plain", "wrapped", "wrapped fp16"])
def test_an_overflow_that_clipping_turned_into_nan_or_zero_is_still_skipped(kind):
    """The verdict of `unscale_` holds, whatever the user's clipping leaves in the gradients."""
    for repair in (lambda g: g.zero_(), lambda g: g.nan_to_num_(0.0, 1.0, -1.0)):
        side = Side(kind, vector([1.0, 1.0]), lambda p: torch.optim.SGD(p, lr=1.0), init_scale=4.0)
        side.backward((side.model.weight.float() * torch.tensor([INF, 1.0])).sum())
        side.scaler.unscale_(side.optimizer)
        for param in side.params:
            repair(param.grad)
        side.step()
        side.update()
        assert side.weights()[0].tolist() == [1.0, 1.0]
        assert side.scaler.get_scale() == 2.0


@pytest.mark.parametrize("kind", ["wrapped fp16", "inside torch's"])
def test_clipping_left_out_is_noticed(kind):
    """The comparison above fails where the step does not clip."""
    make = MAKE["sgd"]
    theirs, ours = Side("torch", network(), make, **SCALER), Side(kind, network(), make, **SCALER)
    reach = Reach(theirs.weights())
    for x, y in batches(3):
        theirs.backward(theirs.loss(x, y))
        ours.feed([p.grad for p in theirs.params])
        theirs.scaler.unscale_(theirs.optimizer)
        by_norm(theirs.params)
        for side in (theirs, ours):
            side.step()
            side.update()
        reach.follow(theirs.weights())
    with pytest.raises(AssertionError, match="ULP a step"):
        assert_close_in_ulp(ours.weights(), theirs.weights(), reach, 3)
