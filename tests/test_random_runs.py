"""Random histories of an optimizer's life, against torch's own optimizer or the equations, step by step.

Steps, overflows of every kind, frozen and idle parameters, learning rates, new groups, saves and loads, copies, edits
of weights and of state. `fuzz` runs are the same, longer.
"""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mpengine import GradScaler, MixedPrecisionOptimizer
from tests.harness import BRAIN, FUSED, GENERAL, HALF, SINGLE, feed, gradients, params_of, same_bits, started, twins_of
from tests.oracle import Oracle

KINDS = [*FUSED, "Adamax", "NAdam", "Rprop"]
SEED = st.integers(0, 999)
WHICH = st.integers(0, 3)
ACTIONS = st.one_of(
    st.tuples(st.just("step"), SEED, st.sets(WHICH)),  # the parameters of the set are idle
    st.tuples(st.just("step"), SEED, st.just(frozenset())),
    st.tuples(st.just("overflow"), SEED, st.tuples(WHICH, st.integers(0, 99), st.sampled_from([math.inf, math.nan]))),
    st.tuples(st.just("lr"), st.sampled_from([0.0, 0.001, 0.01, 0.05]), st.none()),
    st.tuples(st.just("freeze"), WHICH, st.booleans()),
    st.tuples(st.just("resume"), st.booleans(), st.none()),
    st.tuples(st.just("copy"), st.none(), st.none()),
    st.tuples(st.just("weights"), SEED, WHICH),
    st.tuples(st.just("clear"), st.none(), st.none()),
    st.tuples(st.just("layout"), st.booleans(), st.none()),
)


def fresh():
    """An fp16 matrix whose layout may change, a bf16 vector, an FP32 matrix, an fp16 scalar."""
    generator = torch.Generator().manual_seed(0)
    shapes = [((2, 3, 2, 2), HALF), ((5,), BRAIN), ((3, 4), SINGLE), ((), HALF)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in shapes]


class Life:
    """An optimizer under a scaler, and beside it the model of what must come of it."""

    def __init__(self, kind):
        self.make = {**FUSED, **GENERAL}[kind]
        self.params = fresh()
        self.scaler = started(GradScaler(init_scale=256.0, growth_interval=3, max_consecutive_skips=None))
        self.ours = MixedPrecisionOptimizer(self.make(self.params), self.scaler)
        self.exact = kind in GENERAL  # then torch's own step is the model, bit for bit
        self.twins = twins_of(self.params)
        self.theirs = self.make(self.twins)
        self.oracle = None if self.exact else Oracle.of(self.twins, self.theirs)
        self.scale, self.tracker, self.taken, self.skipped = 256.0, 0, 0, 0

    def act(self, name, a, b):
        getattr(self, f"_{name}")(a, b)
        self.check()

    def _step(self, seed, idle):
        grads = [grad * 0.01 for grad in gradients(self.params, seed)]
        self._backward([None if i in idle else grad for i, grad in enumerate(grads)])

    def _overflow(self, seed, where):
        which, element, value = where
        grads = gradients(self.params, seed)
        grads[which].view(-1)[element % grads[which].numel()] = value
        self._backward(grads, overflow=True)

    def _backward(self, grads, overflow=False):
        grads = [g if p.requires_grad else None for g, p in zip(grads, self.params, strict=True)]
        overflow = overflow and any(g is not None and not g.isfinite().all() for g in grads)
        if all(grad is None for grad in grads):
            return
        feed(self.params, grads)
        self.scaler.step(self.ours)
        self.scaler.update()
        self.ours.zero_grad()
        self.scale, self.tracker, scale = self._next_scale(overflow)
        self.taken, self.skipped = self.taken + (not overflow), self.skipped + overflow
        if overflow:
            return
        unscaled = [None if grad is None else grad.float() / scale for grad in grads]
        feed(self.twins, unscaled)
        if self.exact:
            self.theirs.step()
        else:
            self.oracle.step(unscaled, self.theirs.param_groups[0])

    def _next_scale(self, overflow):
        if overflow:
            return self.scale * 0.5, 0, self.scale
        grows = self.tracker == 2
        return self.scale * (2.0 if grows else 1.0), 0 if grows else self.tracker + 1, self.scale

    def _lr(self, value, _):
        for optimizer in (self.ours, self.theirs):
            optimizer.param_groups[0]["lr"] = value

    def _freeze(self, which, thaw):
        self.params[which].requires_grad_(thaw)

    def _resume(self, model_first, _):
        """Everything through a file into new objects, in either order."""
        stream = io.BytesIO()
        torch.save([self.ours.state_dict(), self.scaler.state_dict(), [p.detach() for p in self.params]], stream)
        stream.seek(0)
        state, scaler_state, weights = torch.load(stream, weights_only=True)
        old, self.params = self.params, fresh()
        for param, before in zip(self.params, old, strict=True):
            param.requires_grad_(before.requires_grad)
            param.data = torch.empty_like(before)  # its layout, too
        self.scaler = GradScaler(growth_interval=7, max_consecutive_skips=None)
        self.ours = MixedPrecisionOptimizer(self.make(self.params), self.scaler)
        self.scaler.load_state_dict(scaler_state)
        started(self.scaler)
        if not model_first:
            self.ours.load_state_dict(state)
        with torch.no_grad():
            for param, value in zip(self.params, weights, strict=True):
                param.copy_(value)
        if model_first:
            self.ours.load_state_dict(state)

    def _copy(self, *_):
        self.ours = copy.deepcopy(self.ours)
        self.scaler = started(self.ours.scaler)
        self.params = params_of(self.ours)

    def _weights(self, seed, which):
        """Somebody else writes a parameter; where its master rounds to something else, that follows.

        At the next step, so let there be one.
        """
        value = gradients(self.params, seed)[which]
        follows = self.masters()[which].to(value.dtype) != value
        with torch.no_grad():
            self.params[which].copy_(value)
            self.twins[which].copy_(torch.where(follows, value.float(), self.twins[which]))
        if self.oracle is not None:
            self.oracle.replace(which, value, follows)
        self._settle()

    def _settle(self):
        """A step that moves nothing: lr 0, no state yet to change but the model's own."""
        lr = self.ours.param_groups[0]["lr"]
        self._lr(0.0, None)
        frozen = [not p.requires_grad for p in self.params]
        for param in self.params:
            param.requires_grad_(True)
        self._backward([torch.zeros_like(p) for p in self.params])
        for param, still in zip(self.params, frozen, strict=True):
            param.requires_grad_(not still)
        self._lr(lr, None)

    def _clear(self, *_):
        self.ours.state.clear()
        self.theirs.state.clear()
        if self.oracle is not None:
            self.oracle.forget()

    def _layout(self, channels_last, _):
        kind = torch.channels_last if channels_last else torch.contiguous_format
        self.params[0].data = self.params[0].data.contiguous(memory_format=kind)

    def check(self):
        masters = self.masters()
        if self.exact:
            assert same_bits(masters, self.twins)
        else:
            assert self.oracle.distance(masters, 0) <= 1.0
        for param, master in zip(self.params, masters, strict=True):
            assert same_bits(param, master.to(param.dtype))
        assert self.scaler.get_scale() == self.scale
        assert self.scaler._get_growth_tracker() == self.tracker
        assert (self.ours.steps_taken, self.ours.steps_skipped) == (self.taken, self.skipped)

    def masters(self):
        """A frozen parameter that was never trained stands for its own master."""
        known = {param: master for param, master in self.ours._masters.items()}
        return [known.get(param, param).detach().float() for param in self.params]


def live(kind, actions):
    life = Life(kind)
    for action in actions:
        life.act(*action)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, min_size=3, max_size=14))
def test_a_random_life(kind, actions):
    live(kind, actions)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, min_size=10, max_size=40))
def test_a_long_random_life(kind, actions):
    live(kind, actions)
