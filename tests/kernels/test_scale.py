"""update_scale against `scaling.next_state`, bit for bit over long random histories of many losses at once."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from mpengine.kernels import launch, layout
from mpengine.scaling import FLOAT32_MAX, SMALLEST_SCALE, ScalePolicy, ScaleState, Vote, next_state
from tests.kernels.harness import DEVICE

LOSSES = 100  # more than one block holds
COUNTERS = [f.name for f in fields(ScaleState)][1:]

POLICIES = [
    ScalePolicy(),
    ScalePolicy(growth_interval=1),
    ScalePolicy(growth_factor=1.7, backoff_factor=0.3, growth_interval=3, hysteresis=2),
    ScalePolicy(growth_interval=2, hysteresis=3, min_scale=1.0, max_scale=2.0**16),
    ScalePolicy(growth_factor=1.0 + 2**-22, backoff_factor=1.0 - 2**-23, growth_interval=1),
    ScalePolicy(min_scale=0.1, max_scale=0.3, growth_interval=2),
    ScalePolicy(growth_interval=2, min_scale=1024.0, max_scale=1024.0),
]


class Scaler:
    """The device's state of many losses, and the same as `ScaleState`s."""

    def __init__(self, policy, scales, optimizers=2):
        self.policy = policy
        self.states = [ScaleState(float(np.float32(s)), hysteresis_left=policy.hysteresis) for s in scales]
        self.scale = torch.tensor(scales, dtype=torch.float32, device=DEVICE)
        self.previous = torch.full_like(self.scale, -1.0)
        self.counters = torch.zeros(len(scales), layout.COUNTERS, dtype=torch.int32, device=DEVICE)
        self.counters[:, layout.HYSTERESIS_LEFT] = policy.hysteresis
        self.votes = torch.zeros(optimizers, len(scales), layout.VOTE, device=DEVICE)
        self.row = torch.tensor(policy.row(), dtype=torch.float64, device=DEVICE)

    def update(self, outcomes, behind, launcher=launch.update_scale):
        """One update with outcomes and scales of shape (optimizers, losses); compares the whole state."""
        self.votes.copy_(torch.from_numpy(np.stack([outcomes, behind], axis=-1)))
        before, previous = self.states, self.previous.tolist()
        launcher(self.scale, self.previous, self.counters, self.votes, self.row)
        self.states = [
            next_state(
                state, [Vote(int(o), float(s)) for o, s in zip(outcomes[:, k], behind[:, k], strict=True)], self.policy
            )
            for k, state in enumerate(before)
        ]
        assert self.scale.tolist() == [state.scale for state in self.states]
        assert self.counters.tolist() == [[getattr(state, name) for name in COUNTERS] for state in self.states]
        voted = (outcomes != layout.NO_VOTE).any(axis=0)
        then = [state.scale if v else p for v, state, p in zip(voted, before, previous, strict=True)]
        assert self.previous.tolist() == then
        assert not self.votes.any()


def history(policy, scales, steps, seed, launcher=launch.update_scale):
    random = np.random.default_rng(seed)
    scaler = Scaler(policy, scales)
    outcomes_of = [layout.NO_VOTE, layout.CLEAN, layout.OVERFLOW, layout.STALE_OVERFLOW]
    for _ in range(steps):
        shape = (2, len(scales))
        outcomes = random.choice(outcomes_of, size=shape, p=[0.25, 0.55, 0.12, 0.08]).astype(np.float32)
        today = scaler.scale.cpu().numpy()
        behind = random.choice([today * np.float32(0.5), today, today * np.float32(2)], axis=0)
        behind = np.where(outcomes == layout.NO_VOTE, 0.0, np.broadcast_to(behind, shape)).astype(np.float32)
        scaler.update(outcomes, behind, launcher)
    return scaler


def test_the_counters_lie_in_the_order_of_the_state():
    assert [getattr(layout, name.upper()) for name in COUNTERS] == list(range(layout.COUNTERS))


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_long_histories(policy):
    """4,000 updates of a loss each, 28,000 in all."""
    random = np.random.default_rng(7)
    scales = np.exp2(random.uniform(-20, 20, LOSSES)).clip(policy.min_scale, policy.max_scale)
    scaler = history(policy, scales.astype(np.float32).tolist(), steps=40, seed=1)
    assert all(state.updates > 20 and state.overflows for state in scaler.states)


def test_growth_stops_at_float32s_limit():
    policy = ScalePolicy(growth_interval=1)
    scaler = Scaler(policy, [2.0**126, 2.0**127, FLOAT32_MAX, 1.5 * 2.0**126], optimizers=1)
    clean = np.full((1, 4), layout.CLEAN, np.float32)
    for _ in range(3):
        scaler.update(clean, np.zeros((1, 4), np.float32))
    assert scaler.scale.tolist() == [2.0**127, 2.0**127, FLOAT32_MAX, 1.5 * 2.0**127]


def test_back_off_ends_at_the_floor():
    scaler = Scaler(ScalePolicy(), [2.0**-124, 1.9 * SMALLEST_SCALE, SMALLEST_SCALE], optimizers=1)
    overflow = np.full((1, 3), layout.OVERFLOW, np.float32)
    for _ in range(4):
        scaler.update(overflow, np.zeros((1, 3), np.float32))
    assert scaler.scale.tolist() == [SMALLEST_SCALE] * 3


def test_stale_overflows_count_once_for_a_scale():
    """A scale that was already backed off from does not back off again for gradients from before."""
    scaler = Scaler(ScalePolicy(), [1024.0] * 3, optimizers=1)
    stale = np.full((1, 3), layout.STALE_OVERFLOW, np.float32)
    scaler.update(stale, np.array([[2048.0, 1024.0, 512.0]], np.float32))
    assert scaler.scale.tolist() == [1024.0, 512.0, 512.0]
    assert scaler.previous.tolist() == [1024.0] * 3


def test_no_votes_change_nothing():
    scaler = Scaler(ScalePolicy(growth_interval=1), [3.0, 5.0])
    scaler.update(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32))
    assert scaler.previous.tolist() == [-1.0, -1.0]


def test_nothing_beyond_the_last_loss_is_written():
    """Views into larger buffers, with sentinels around."""
    scaler = Scaler(ScalePolicy(growth_interval=1), [3.0, 5.0, 7.0], optimizers=1)
    guarded = {}
    for name in ("scale", "previous", "counters", "votes"):
        tensor = getattr(scaler, name)
        buffer = torch.full((tensor.numel() + 128,), 77, dtype=tensor.dtype, device=DEVICE)
        view = buffer[64:-64].view(tensor.shape)
        view.copy_(tensor)
        setattr(scaler, name, view)
        guarded[name] = buffer
    scaler.update(np.array([[1, 2, 1]], np.float32), np.zeros((1, 3), np.float32))
    for name, buffer in guarded.items():
        assert (buffer[:64] == 77).all(), name
        assert (buffer[-64:] == 77).all(), name


def test_a_sabotaged_transition_is_noticed():
    def never_growing(scale, previous, counters, votes, policy):
        policy = policy.clone()
        policy[layout.MAX_SCALE] = 0.0
        launch.update_scale(scale, previous, counters, votes, policy)

    def forgetful(scale, previous, counters, votes, policy):
        kept = votes.clone()
        launch.update_scale(scale, previous, counters, votes, policy)
        votes.copy_(kept)

    for launcher in (never_growing, forgetful, lambda *_: None):
        with pytest.raises(AssertionError):
            history(ScalePolicy(growth_interval=2), [1024.0] * 8, 12, 0, launcher)
