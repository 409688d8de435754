"""Random scripts: passes, overflows, accumulation, dropped batches, exceptions, clipping and resuming, in any order."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.amp.oracle_world import BIG, SIZES, Spoilt, World

LEVELS = ("O0", "O1", "O2", "O3")
CEILING = 2.0**15  # so that sums of some thirty gradients stay below fp16's largest number
NETS = st.sampled_from([(0,), (1,), (0, 1), (1, 0)])
NET = st.integers(0, 1)
NUMBER = st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0])
SPOILT = st.one_of(
    st.none(),
    st.none(),
    st.builds(Spoilt, NET, st.integers(0, len(SIZES) - 1), st.sampled_from([math.inf, math.nan])),
    st.builds(Spoilt, NET, st.just(0), st.just(BIG)),
)
KEYWORDS = st.sampled_from([{}, {}, {}, {"delay_unscale": True}, {"delay_overflow_check": True}])
NUMBERS = st.tuples(NUMBER, NUMBER, NUMBER), st.tuples(NUMBER, NUMBER)
BACKWARD = st.tuples(st.just("backward"), st.integers(0, 2), NETS, NETS, SPOILT, *NUMBERS, KEYWORDS)
ZERO = st.tuples(
    st.just("zero"), st.sampled_from(["model", "optimizer"]), st.booleans(), st.sampled_from([(0,), (1,), (0, 1)])
)
ACTIONS = st.one_of(
    BACKWARD,
    BACKWARD,
    BACKWARD,
    st.tuples(st.just("step"), NET),
    st.tuples(st.just("step"), NET),
    ZERO,
    st.tuples(st.just("look"), NET),
    st.tuples(st.just("clip"), NET, st.sampled_from([2.0**-6, 2.0**-4, 1.0])),
    st.tuples(st.just("resume"), st.permutations(["model", "optimizer", "amp"])),
    st.tuples(st.just("broken"), st.integers(0, 2), NETS, NETS, st.booleans()),
    st.tuples(st.just("set_unskipped"), st.sampled_from([1997, 1998, 1999])),
)


def live(level, kind, shared, dynamic, actions):
    """Every action on the world, which compares after each."""
    loss_scale = "dynamic" if dynamic else 1024.0
    world = World(level, 2, 1 if shared else 3, kind, loss_scale=loss_scale, max_loss_scale=CEILING)
    for name, *arguments in actions:
        if name in ("backward", "broken") and shared:
            arguments[0] = 0
        if name == "backward":
            k, reach, listed, spoilt, x, tilt, keywords = arguments
            if spoilt is not None and spoilt.value == BIG and world.scalers[k].scale < 2.0**14:
                spoilt = Spoilt(spoilt.optimizer, spoilt.param)  # else it would fit, and sums be inexact
            listed = [o for o in listed if o in reach] or reach
            world.backward(k, reach, listed, spoilt, x, tilt, **keywords)
        elif name == "zero":
            who, set_to_none, which = arguments
            if any(world.trained[o].unchecked for o in which):
                who = "optimizer"  # zeros written in place would stay an unchecked gradient, though a clean one
            world.zero(who, set_to_none, which)
        elif name == "set_unskipped":
            if dynamic:
                world.set_unskipped(*arguments)
        else:
            getattr(world, name)(*arguments)
    world.check()


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(["plain", "adam"]),
    shared=st.booleans(),
    dynamic=st.booleans(),
    actions=st.lists(ACTIONS, min_size=3, max_size=16),
)
def test_a_random_script(level, kind, shared, dynamic, actions):
    live(level, kind, shared, dynamic, actions)


@pytest.mark.fuzz
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    kind=st.sampled_from(["plain", "adam"]),
    shared=st.booleans(),
    dynamic=st.booleans(),
    actions=st.lists(ACTIONS, min_size=10, max_size=40),
)
def test_a_long_random_script(level, kind, shared, dynamic, actions):
    live(level, kind, shared, dynamic, actions)
