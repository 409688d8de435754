"""The scale's state machine: `next_state` against a plain-Python model and against torch's own update."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpengine import reference
from mpengine.kernels import layout
from mpengine.scaling import FLOAT32_MAX, SMALLEST_SCALE, ScalePolicy, ScaleState, Vote, next_state
from tests import scale_model
from tests.scale_model import ScaleModel, float32

CLEAN, OVERFLOW = Vote(layout.CLEAN), Vote(layout.OVERFLOW)
IDLE = Vote(layout.NO_VOTE)
EVENTS = {scale_model.CLEAN: CLEAN, scale_model.OVERFLOW: OVERFLOW}


def walk(state: ScaleState, votes: list[Vote], policy: ScalePolicy, transition=next_state) -> list[float]:
    """The scales after each update."""
    scales = []
    for vote in votes:
        state = transition(state, [vote], policy)
        scales.append(state.scale)
    return scales


def assert_follows_model(transition, policy: ScalePolicy, init_scale: float, events: list[str | None]) -> None:
    """Every field of the state, after each event; None is an idle update."""
    model = ScaleModel(
        float32(init_scale),
        policy.growth_factor,
        policy.backoff_factor,
        policy.growth_interval,
        policy.min_scale,
        policy.max_scale,
        policy.hysteresis,
    )
    state = ScaleState(float32(init_scale), hysteresis_left=policy.hysteresis)
    growths = last_overflow = 0
    for event in events:
        before = state
        state = transition(state, [IDLE if event is None else EVENTS[event]], policy)
        if event is None:
            assert state == before
            continue
        old_scale, due = model.scale, model.tracker + 1 == model.interval
        model.see(event)
        if event == scale_model.OVERFLOW:
            last_overflow = len(model.history)
        elif due and float32(old_scale * model.growth) <= model.ceiling:
            growths += 1
        expected = ScaleState(
            model.scale,
            growth_tracker=model.tracker,
            hysteresis_left=max(policy.hysteresis - model.strikes, 0),
            overflows=model.overflows,
            growths=growths,
            consecutive_overflows=model.streak,
            updates=len(model.history),
            last_overflow=last_overflow,
        )
        assert state == expected, f"after {model.history[-8:]}: {state} is not {expected}"


POLICIES = [
    ScalePolicy(growth_interval=3),
    ScalePolicy(growth_factor=1.1, backoff_factor=0.7, growth_interval=1),
    ScalePolicy(growth_interval=2, hysteresis=3),
    ScalePolicy(growth_interval=1, min_scale=0.3, max_scale=100.0, growth_factor=3.0, backoff_factor=0.1),
    ScalePolicy(growth_factor=1e30, backoff_factor=1e-30, growth_interval=2),
]


def seeded_events(seed: int, count: int) -> list[str | None]:
    choices = [scale_model.CLEAN, scale_model.OVERFLOW, None]
    return random.Random(seed).choices(choices, weights=[5, 4, 1], k=count)


class TestAgainstTheModel:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_long_sequences(self, policy):
        assert_follows_model(next_state, policy, 64.1, seeded_events(1, 2000))

    @settings(deadline=None)
    @given(
        policy=st.builds(
            ScalePolicy,
            growth_factor=st.floats(1.0, 1e38, exclude_min=True),
            backoff_factor=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True),
            growth_interval=st.integers(1, 4),
            min_scale=st.floats(SMALLEST_SCALE, 1.0),
            max_scale=st.floats(1.0, FLOAT32_MAX),
            hysteresis=st.integers(1, 4),
        ),
        events=st.lists(st.sampled_from([*EVENTS, None]), max_size=60),
    )
    def test_any_policy(self, policy, events):
        assert_follows_model(next_state, policy, 1.0, events)


class TestAgainstTorch:
    """`torch._amp_update_scale_` is what `torch.amp.GradScaler.update` runs."""

    def test_ten_thousand_updates_bit_for_bit(self):
        draw = random.Random(7)
        updates = 0
        for growth, backoff, interval in [(2.0, 0.5, 3), (1.1, 0.9, 1), (1.7, 0.3, 2), (4.0, 0.25, 1), (1e10, 1e-9, 2)]:
            policy = ScalePolicy(growth, backoff, interval)
            scale = torch.tensor(65536.0)
            tracker = torch.tensor(0, dtype=torch.int32)
            state = ScaleState(65536.0)
            for _ in range(2000):
                found_inf = draw.choices([0.0, 1.0, 2.0, -1.0, math.nan, math.inf], weights=[30, 2, 1, 1, 1, 1])[0]
                torch._amp_update_scale_(scale, tracker, torch.tensor(found_inf), growth, backoff, interval)
                state = next_state(state, [CLEAN if found_inf == 0.0 else OVERFLOW], policy)
                if float(scale) < SMALLEST_SCALE:  # where torch's goes on towards 0
                    assert state.scale == SMALLEST_SCALE
                    scale.fill_(1.0)
                    state = replace(state, scale=1.0)
                assert (state.scale, state.growth_tracker) == (float(scale), int(tracker))
                updates += 1
        assert updates == 10_000

    def test_parity_holds_for_142_skips_from_2_to_the_16(self):
        scale, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
        ours = walk(ScaleState(2.0**16), [OVERFLOW] * 143, ScalePolicy())
        for i in range(143):
            torch._amp_update_scale_(scale, tracker, torch.tensor(1.0), 2.0, 0.5, 2000)
            assert (ours[i] == float(scale)) == (i < 142), i
        assert ours[141] == ours[142] == 2.0**-126

    def test_an_interval_below_the_tracker_never_matches(self):
        scale, tracker = torch.tensor(8.0), torch.tensor(5, dtype=torch.int32)
        state = ScaleState(8.0, growth_tracker=5)
        for _ in range(4):
            torch._amp_update_scale_(scale, tracker, torch.tensor(0.0), 2.0, 0.5, 3)
            state = next_state(state, [CLEAN], ScalePolicy(growth_interval=3))
        assert (state.scale, state.growth_tracker) == (float(scale), int(tracker)) == (8.0, 9)


class TestKnownValues:
    def test_clean_overflow_clean(self):
        votes = [CLEAN, CLEAN, OVERFLOW, CLEAN, CLEAN, CLEAN, CLEAN]
        assert walk(ScaleState(4.0), votes, ScalePolicy(growth_interval=2)) == [4.0, 8.0, 4.0, 4.0, 8.0, 8.0, 16.0]

    def test_hysteresis_waits_for_that_many_overflows_in_a_row(self):
        policy = ScalePolicy(growth_interval=100, hysteresis=3)
        votes = [OVERFLOW, OVERFLOW, CLEAN, OVERFLOW, OVERFLOW, OVERFLOW, OVERFLOW, CLEAN, OVERFLOW]
        start = ScaleState(16.0, hysteresis_left=3)
        assert walk(start, votes, policy) == [16.0, 16.0, 16.0, 16.0, 16.0, 8.0, 4.0, 4.0, 4.0]

    def test_floor(self):
        policy = ScalePolicy(min_scale=3.0)
        assert walk(ScaleState(16.0), [OVERFLOW] * 4, policy) == [8.0, 4.0, 3.0, 3.0]

    def test_ceiling_refuses_the_growth_and_keeps_trying(self):
        policy = ScalePolicy(growth_interval=1, max_scale=10.0)
        assert walk(ScaleState(4.0), [CLEAN, CLEAN, OVERFLOW, CLEAN], policy) == [8.0, 8.0, 4.0, 8.0]

    def test_growth_near_the_largest_float32(self):
        policy = ScalePolicy(growth_interval=1)
        state = next_state(ScaleState(2.0**126), [CLEAN], policy)
        assert state.scale == 2.0**127
        state = next_state(state, [CLEAN], policy)
        assert (state.scale, state.growth_tracker, state.growths) == (2.0**127, 0, 1)

    def test_factors_act_in_double_precision(self):
        policy = ScalePolicy(growth_factor=1.1, backoff_factor=0.1, growth_interval=1)
        grown = float32(3.0 * 1.1)
        assert walk(ScaleState(3.0), [CLEAN, OVERFLOW], policy) == [grown, float32(grown * 0.1)]
        in_float32 = float32(float32(3.0) * float32(1.1))
        assert in_float32 != grown, "the numbers chosen cannot tell the two apart"

    def test_static_scale(self):
        policy = ScalePolicy(growth_interval=1, min_scale=128.0, max_scale=128.0)
        assert walk(ScaleState(128.0), [CLEAN, OVERFLOW, OVERFLOW, CLEAN], policy) == [128.0] * 4

    def test_never_zero_infinite_or_nan(self):
        policy = ScalePolicy(growth_factor=1e38, backoff_factor=1e-38, growth_interval=1)
        for vote in (CLEAN, OVERFLOW):
            assert all(0.0 < scale < math.inf for scale in walk(ScaleState(1.0), [vote] * 300, policy))


class TestSeveralVotes:
    """Of several optimizers on one loss, at one update."""

    policy = ScalePolicy(growth_interval=2)

    @pytest.mark.parametrize("votes", [[CLEAN, OVERFLOW], [OVERFLOW, CLEAN], [OVERFLOW, OVERFLOW], [IDLE, OVERFLOW]])
    def test_any_overflow_backs_off_once(self, votes):
        state = next_state(ScaleState(8.0, growth_tracker=1), votes, self.policy)
        assert (state.scale, state.growth_tracker, state.overflows, state.updates) == (4.0, 0, 1, 1)

    def test_two_clean_votes_are_one_clean_update(self):
        state = next_state(ScaleState(8.0), [CLEAN, CLEAN, IDLE], self.policy)
        assert (state.scale, state.growth_tracker) == (8.0, 1)

    @pytest.mark.parametrize(
        ("overflowed_at", "scale"), [(16.0, 8.0), (8.0, 4.0), (4.0, 4.0)], ids=["dealt with", "not yet", "grown since"]
    )
    def test_an_overflow_under_an_old_scale(self, overflowed_at, scale):
        state = ScaleState(8.0, growth_tracker=1)
        after = next_state(state, [Vote(layout.STALE_OVERFLOW, overflowed_at)], self.policy)
        assert after.scale == scale
        assert (after == state) == (overflowed_at == 16.0)

    def test_an_old_overflow_does_not_hide_a_clean_vote(self):
        after = next_state(ScaleState(8.0), [Vote(layout.STALE_OVERFLOW, 16.0), CLEAN], self.policy)
        assert (after.scale, after.growth_tracker) == (8.0, 1)

    def test_no_vote_changes_nothing(self):
        state = ScaleState(8.0, 1, 1, 3, 2, 0, 9, 4)
        assert next_state(state, [IDLE, IDLE], self.policy) == next_state(state, [], self.policy) == state


class TestOnTensors:
    """`reference.update_scale`: all losses at once, and the votes of every optimizer."""

    def test_each_loss_for_itself(self):
        policy = ScalePolicy(growth_interval=1)
        scale = torch.tensor([4.0, 4.0, 4.0, 4.0])
        previous = torch.full((4,), -1.0)
        states = [ScaleState(4.0, overflows=k) for k in range(4)]
        counters = torch.tensor([s.counters() for s in states], dtype=torch.int32)
        votes = torch.zeros(2, 4, layout.VOTE)
        votes[0, 0, 0] = layout.CLEAN
        votes[1, 1, 0] = layout.OVERFLOW
        votes[0, 3] = torch.tensor([layout.STALE_OVERFLOW, 8.0])
        reference.update_scale(scale, previous, counters, votes, torch.tensor(policy.row(), dtype=torch.float64))
        assert scale.tolist() == [8.0, 2.0, 4.0, 4.0]
        assert previous.tolist() == [4.0, 4.0, -1.0, 4.0]
        assert counters[2].tolist() == states[2].counters()
        assert counters[3].tolist() == states[3].counters()
        assert counters[1].tolist() == next_state(states[1], [OVERFLOW], policy).counters()
        assert not votes.any()


class TestPolicy:
    @pytest.mark.parametrize(
        ("name", "value", "remedy"),
        [
            *(("growth_factor", value, "> 1") for value in (1.0, 0.5, -2.0, math.inf, math.nan)),
            *(("backoff_factor", value, r"\(0, 1\)") for value in (0.0, 1.0, -0.5, 1.5, math.nan)),
            *(("growth_interval", value, "at least 1") for value in (0, -3)),
            *(("min_scale", value, r"2\*\*-126") for value in (0.0, -1.0, 2.0**-127, math.inf, math.nan)),
            *(("max_scale", value, "min_scale") for value in (0.0, math.inf, math.nan)),
            *(("hysteresis", value, "at least 1") for value in (0, -1)),
        ],
    )
    def test_refuses(self, name, value, remedy):
        with pytest.raises(ValueError, match=rf"{name} is {value}.*{remedy}"):
            ScalePolicy(**{name: value})

    def test_max_scale_below_min_scale(self):
        with pytest.raises(ValueError, match=r"max_scale is 4\.0"):
            ScalePolicy(min_scale=8.0, max_scale=4.0)

    @pytest.mark.parametrize("policy", [*POLICIES, ScalePolicy()])
    def test_the_row_that_the_device_reads(self, policy):
        assert ScalePolicy.from_row(torch.tensor(policy.row(), dtype=torch.float64).tolist()) == policy


# Each of these is wrong in one way, and the model must notice.


def _growth_one_late(state, votes, policy):
    return next_state(state, votes, replace(policy, growth_interval=policy.growth_interval + 1))


def _hysteresis_ignored(state, votes, policy):
    return next_state(state, votes, replace(policy, hysteresis=1))


def _tracker_survives_an_overflow(state, votes, policy):
    return replace(next_state(state, votes, policy), growth_tracker=state.growth_tracker + 1)


def _no_floor(state, votes, policy):
    return next_state(state, votes, replace(policy, min_scale=SMALLEST_SCALE))


def _no_ceiling(state, votes, policy):
    return next_state(state, votes, replace(policy, max_scale=FLOAT32_MAX))


def _idle_counts(state, votes, policy):
    return next_state(state, [CLEAN if vote is IDLE else vote for vote in votes], policy)


@pytest.mark.parametrize(
    "sabotage",
    [
        _growth_one_late,
        _hysteresis_ignored,
        _tracker_survives_an_overflow,
        _no_floor,
        _no_ceiling,
        _idle_counts,
    ],
)
def test_a_sabotaged_transition_is_noticed(sabotage):
    policy = ScalePolicy(growth_interval=2, hysteresis=2, min_scale=8.0, max_scale=64.0)
    events = seeded_events(3, 400)
    assert_follows_model(next_state, policy, 16.0, events)
    with pytest.raises(AssertionError):
        assert_follows_model(sabotage, policy, 16.0, events)
