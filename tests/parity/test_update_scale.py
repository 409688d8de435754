"""`update`: when a scale grows, waits or backs off, bit for bit as torch's; and how its state travels."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.parity.harness import INF, NAN, OURS, SIDES, Side, float_bits, make_scaler, vector

every_side = pytest.mark.parametrize("kind", SIDES)
every_side_of_ours = pytest.mark.parametrize("kind", OURS)


def sgd(params):
    return torch.optim.SGD(params, lr=0.125)


def iterate(side, overflow, value=INF):
    """One iteration on a gradient of ones, or on one of them spoilt."""
    side.feed([torch.tensor([1.0, value if overflow else 1.0])])
    side.step()
    side.update()


def run(kind, overflows, **arguments):
    side = Side(kind, vector(), sgd, **arguments)
    for overflow in overflows:
        iterate(side, overflow)
    return side.history


@every_side
def test_an_accepted_and_a_skipped_update_have_known_results(kind):
    """Interval 2: wait, grow, back off, wait, grow."""
    history = run(kind, [0, 0, 1, 0, 0], init_scale=8.0, growth_interval=2)
    expected = [(8.0, 1), (16.0, 0), (8.0, 0), (8.0, 1), (16.0, 0)]
    assert history == [(float_bits(scale), tracker) for scale, tracker in expected]


@every_side_of_ours
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    overflows=st.lists(st.booleans(), min_size=1, max_size=40),
    init_scale=st.sampled_from([1.0, 3.7, 65536.0, 2.0**100]),
    growth_factor=st.sampled_from([2.0, 1.3, 1.0001, 16.0]),
    backoff_factor=st.sampled_from([0.5, 0.9, 1 / 3]),
    growth_interval=st.integers(1, 5),
)
def test_any_sequence_of_overflows_gives_torchs_history(kind, overflows, **arguments):
    assert run(kind, overflows, **arguments) == run("torch", overflows, **arguments)


@every_side_of_ours
@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_every_kind_of_overflow_counts(kind, value):
    side = Side(kind, vector(), sgd, init_scale=8.0)
    iterate(side, True, value)
    assert side.history == [(float_bits(4.0), 0)]


# Growth at the end of float32.


@every_side
def test_a_growth_beyond_float32_is_not_taken(kind):
    """1e38 * 16 is inf in float32: the scale stays, the tracker starts again, as torch has it."""
    history = run(kind, [0] * 4, init_scale=1e38, growth_factor=16.0, growth_interval=1)
    assert history == [(float_bits(1e38), 0)] * 4


@every_side_of_ours
@pytest.mark.parametrize("factor", [2.0, 1.5, 1.0000001, 3.0])
def test_the_last_steps_before_the_end_of_float32(kind, factor):
    """The last scale that fits is taken and the next one is not; from there it may still back off."""
    arguments = {"init_scale": 2.0**125, "growth_factor": factor, "growth_interval": 1}
    history = run(kind, [0] * 8 + [1, 1, 0], **arguments)
    assert history == run("torch", [0] * 8 + [1, 1, 0], **arguments)
    assert history[-3][0] < history[-4][0]


@every_side
def test_the_scale_never_reaches_zero(kind):
    """166 overflows in a row from 2^16: torch's scale is 0, ours is 2^-126. Our optimizer skips under either."""
    history = run(kind, [1] * 166, init_scale=2.0**16)
    assert history[-1] == (float_bits(0.0 if kind in ("torch", "inside torch's") else 2.0**-126), 0)


# The scales of a loop with fp16 weights: overflows that fp16 itself makes, not the test.


@pytest.mark.parametrize("kind", ["torch", "plain", "wrapped fp16"])
def test_the_scales_of_a_loop_that_overflows_in_fp16(kind):
    """Gradients of 5 and 20000 at a scale of 4: 80000 is beyond fp16. The scales must be 4, 2, 2, 1."""
    side = Side(kind, vector([1.0] * 100), sgd, init_scale=4.0)
    grads, scales, trackers = [], [], []
    for value in (5.0, 20000.0, 5.0, 40000.0):
        loss = (side.model.weight.half() * torch.full((100,), value, dtype=torch.float16)).float().sum()
        side.backward(loss)
        grads.append(float(side.model.weight.grad[0]))
        side.step()
        side.update()
        scales.append(side.scaler.get_scale())
        trackers.append(side.scaler._get_growth_tracker())
    assert scales == [4.0, 2.0, 2.0, 1.0]
    assert trackers == [1, 0, 1, 0]
    assert grads == [20.0, INF, 10.0, INF]
    assert [w.tolist() for w in side.weights()] == [[1.0 - 2 * 5.0 * 0.125] * 100]


# State.


@every_side
def test_the_state_dict_has_torchs_keys_and_values(kind):
    side = Side(kind, vector(), sgd, init_scale=8.0, growth_factor=4.0, backoff_factor=0.25, growth_interval=3)
    iterate(side, False)
    state = side.scaler.state_dict()
    expected = {"scale": 8.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3, "_growth_tracker": 1}
    assert {key: state[key] for key in expected} == expected
    assert set(state) - set(expected) == (set() if kind in ("torch", "inside torch's") else {"mpengine"})


@every_side_of_ours
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("direction", ["into ours", "into torch's"])
def test_a_state_goes_from_one_to_the_other(kind, used, direction):
    """Into a scaler that has run, and into one that has not; and both go on alike."""
    source, target = Side("torch", vector(), sgd, init_scale=32.0), Side(kind, vector(), sgd, init_scale=2.0)
    if direction == "into torch's":
        source, target = Side(kind, vector(), sgd, init_scale=32.0), Side("torch", vector(), sgd, init_scale=2.0)
    for overflow in (0, 1, 0):
        iterate(source, overflow)
    if used:
        iterate(target, False)
    saved = source.scaler.state_dict()
    saved.pop("mpengine", None)  # what torch's state does not have
    target.scaler.load_state_dict(saved)
    source.history, target.history = [], []
    for overflow in (0, 0, 1, 0):
        iterate(source, overflow)
        iterate(target, overflow)
    assert source.history == target.history


def _torch_save(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@every_side_of_ours
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), _torch_save], ids=["copy", "pickle", "save"]
)
def test_a_copy_goes_on_as_torchs_copy_does(kind, used, duplicate):
    histories = []
    for one in ("torch", kind):
        side = Side(one, vector(), sgd, init_scale=8.0, growth_interval=3)
        for overflow in (0, 1, 0) if used else ():
            iterate(side, overflow)
        twin = Side(one, vector(), sgd)
        if one.startswith("wrapped"):  # a wrapper belongs to its scaler: they are copied together
            twin.model, twin.optimizer, twin.scaler = duplicate((side.model, side.optimizer, side.scaler))
        else:
            twin.scaler = duplicate(side.scaler)
        assert twin.scaler.get_scale() == side.scaler.get_scale()
        for overflow in (0, 0, 1, 0):
            iterate(twin, overflow)
        histories.append(twin.history)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("kind", ["torch", "plain"])
def test_no_copy_is_made_in_the_middle_of_an_iteration(kind):
    scaler = make_scaler(kind)
    param = nn.Parameter(torch.ones(2))
    optimizer = sgd([param])
    scaler.scale(param.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(AssertionError, match="may only be pickled at the beginning of an iteration, or at the end"):
        pickle.dumps(scaler)


@every_side_of_ours
def test_a_sabotaged_policy_is_noticed(kind):
    arguments = {"init_scale": 8.0, "growth_interval": 2}
    overflows = [0, 0, 1, 0, 0]
    theirs = run("torch", overflows, **arguments)
    for change in ({"growth_interval": 3}, {"growth_factor": 2.0000002}, {"backoff_factor": 0.50000006}):
        assert run(kind, overflows, **{**arguments, **change}) != theirs
