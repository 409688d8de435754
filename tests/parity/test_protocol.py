"""Both directions of the protocol between scaler and optimizer, over random histories.

Our scaler drives torch's optimizers: the same weights, state and scales as under torch's, bit for bit. torch's scaler
drives ours (`_step_supports_amp_scaling`): torch's own history of scales, and weights within 4 ULP a step.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mpengine
from tests.parity.harness import INF, NAN, Reach, Side, assert_close_in_ulp, bits

SHAPES = ((3,), (2, 2), ())
LOOPS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
OPTIMIZERS = {
    "sgd": lambda params, **loop: torch.optim.SGD(params, lr=0.1, weight_decay=0.01, **loop),
    "momentum": lambda params, **loop: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **loop),
    "adam": lambda params, **loop: torch.optim.Adam(params, lr=0.01, amsgrad=True, **loop),
    "adamw": lambda params, **loop: torch.optim.AdamW(params, lr=0.01, **loop),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])

BAD = st.tuples(st.integers(0, 2), st.sampled_from([INF, -INF, NAN]))
ACTIONS = st.one_of(
    st.tuples(st.just("iterate"), st.integers(0, 99), st.none() | BAD, st.booleans()),
    st.tuples(st.just("iterate"), st.integers(0, 99), st.none(), st.booleans()),
    st.tuples(st.just("set scale"), st.sampled_from([1.0, 64.0, 2.0**20]), st.none(), st.booleans()),
    st.tuples(st.just("reload"), st.none(), st.none(), st.booleans()),
)
HISTORY = st.lists(ACTIONS, min_size=3, max_size=14)


class Weights(nn.Module):
    """Three parameters of different shapes, exact in fp16."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator).half().float() for shape in SHAPES]
        self.weights = nn.ParameterList([nn.Parameter(value) for value in values])


def gradients(seed, scale, bad=None):
    generator = torch.Generator().manual_seed(seed)
    size = 10.0 ** (seed % 5 - 3)
    grads = [torch.randn(shape, generator=generator) * size * scale for shape in SHAPES]
    if bad is not None:
        which, value = bad
        grads[which].view(-1)[-1] = value
    return grads


def life(kind, make, actions, unscale=True, preset=None):
    """What becomes of one side."""
    side = Side(kind, Weights(), make, init_scale=256.0, growth_interval=2)
    side.reach, side.steps = Reach(side.weights()), 1  # Adam's first step alone may be 6 ULP
    side.feed([None] * len(SHAPES))  # which makes the scaler's state
    for action, seed, bad, flag in actions:
        if action == "iterate":
            scale = side.scaler.get_scale() * (1.0 if preset is None else preset)
            side.feed(gradients(seed, scale, bad))
            if preset is not None:
                side.optimizer.grad_scale = torch.tensor(preset)
            if unscale and flag:
                side.scaler.unscale_(side.optimizer)
            side.step()
            side.update()
            side.steps += bad is None
        elif action == "set scale":
            side.scaler.update(seed)
            side.record()
        else:
            side.scaler.load_state_dict(side.scaler.state_dict())
            side.record()
        side.reach.follow(side.weights())
    return side


# Our scaler, torch's optimizers.


@every_optimizer
@pytest.mark.parametrize("loop", LOOPS)
@few
@given(actions=HISTORY)
def test_our_scaler_drives_torchs_optimizers_as_torchs_does(name, loop, actions):
    if loop == "fused" and name == "momentum":  # a first step that overflows is torch's defect, see test_defects
        actions = [("iterate", 1, None, False), *actions]
    ours, theirs = (life(k, lambda p: OPTIMIZERS[name](p, **LOOPS[loop]), actions) for k in ("plain", "torch"))
    assert ours.history == theirs.history
    assert bits(ours.weights()) == bits(theirs.weights())
    for mine, yours in zip(ours.params, theirs.params, strict=True):
        assert bits(dict(ours.optimizer.state[mine])) == bits(dict(theirs.optimizer.state[yours]))


# Our optimizer, torch's scaler; and our optimizer under our scaler, driven alike.


@every_optimizer
@pytest.mark.parametrize("kind", ["inside torch's", "wrapped", "wrapped fp16"])
@few
@given(actions=HISTORY, unscale=st.booleans())
def test_our_optimizer_in_the_hands_of_a_scaler(name, kind, actions, unscale):
    theirs = life("torch", lambda p: OPTIMIZERS[name](p, foreach=False), actions, unscale)
    ours = life(kind, lambda p: OPTIMIZERS[name](p), actions, unscale)
    assert ours.history == theirs.history
    assert_close_in_ulp(ours.weights(), theirs.weights(), theirs.reach, theirs.steps)
    skipped = sum(bad is not None for action, _, bad, _ in actions if action == "iterate")
    assert (ours.optimizer.steps_taken, ours.optimizer.steps_skipped) == (theirs.steps - 1, skipped)


@every_optimizer
@few
@given(actions=HISTORY)
def test_torchs_scaler_multiplies_a_preset_grad_scale(name, actions):
    """Gradients 4 times as large beside the loss scale, and `grad_scale` says so: the same run as without."""
    plain = life("inside torch's", OPTIMIZERS[name], actions, unscale=False)
    preset = life("inside torch's", OPTIMIZERS[name], actions, unscale=False, preset=4.0)
    assert preset.history == plain.history
    assert bits(preset.weights()) == bits(plain.weights())


def inside_torchs(dtype=torch.float16, **options):
    param = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.125, **options))
    return param, optimizer, torch.amp.GradScaler("cpu", 8.0)


def test_torchs_unscale_refuses_fp16_gradients_and_changes_nothing():
    """So clipping is `max_grad_norm`'s; the step that follows is right all the same."""
    param, optimizer, scaler = inside_torchs()
    scaler.scale(param.float().sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)
    assert param.grad.tolist() == [8.0, 8.0]
    scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [0.875, 0.875]


def test_torchs_unscale_takes_fp32_parameters():
    """Then torch hands over no grad_scale, and the step uses the gradients as they were left: clipped, say."""
    param, optimizer, scaler = inside_torchs(torch.float32)
    scaler.scale((param * 4.0).sum()).backward()
    scaler.unscale_(optimizer)
    assert param.grad.tolist() == [4.0, 4.0]
    param.grad.div_(4.0)
    scaler.step(optimizer)
    assert param.tolist() == [0.875, 0.875]


@pytest.mark.parametrize("found", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, NAN)])
def test_found_inf_is_the_sum_over_devices(found):
    """As the scaler keeps it, one verdict for each device: 2.0 where both overflowed."""
    param, optimizer, scaler = inside_torchs(torch.float32)
    scaler.scale(param.sum()).backward()
    scaler.unscale_(optimizer)
    verdicts = scaler._found_inf_per_device(optimizer)
    for index, value in enumerate(found):
        verdicts[torch.device("cpu", index)] = torch.tensor(value)
    scaler.step(optimizer)
    scaler.update()
    taken = found == (0.0, 0.0)
    assert param.tolist() == [0.875 if taken else 1.0] * 2
    assert optimizer.last_step_skipped == (not taken)
    assert scaler.get_scale() == (8.0 if taken else 4.0)


def test_nothing_of_the_protocol_is_left_behind():
    """Neither after a step nor after one that raised; and the next step without a scaler unscales nothing."""
    param, optimizer, scaler = inside_torchs()
    scaler.scale(param.float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")
    optimizer.zero_grad()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.tolist() == [0.75, 0.75]


@pytest.mark.parametrize(
    ("dtype", "error", "message"),
    [
        (torch.float16, ValueError, "Attempting to unscale FP16 gradients"),
        (torch.float32, AssertionError, "Attempted step but _scale is None"),
    ],
    ids=str,
)
def test_an_optimizer_prepared_with_our_scaler_is_not_driven_by_torchs(dtype, error, message):
    """Both would unscale: the step is refused."""
    param = nn.Parameter(torch.ones(2, dtype=dtype))
    ours, theirs = mpengine.GradScaler("cpu", 8.0), torch.amp.GradScaler("cpu", 8.0)
    optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.125), ours)
    theirs.scale(param.float().sum()).backward()
    with pytest.raises(error, match=message):
        theirs.step(optimizer)
    assert param.tolist() == [1.0, 1.0]


def test_a_wrong_unscale_is_noticed(monkeypatch):
    """A scale that is read as twice what it is: the comparison above fails."""
    from mpengine import reference

    inverse = reference.inverse
    monkeypatch.setattr(reference, "inverse", lambda scale: inverse(scale) * (1.0 if scale is None else 2.0))
    actions = [("iterate", 2, None, False)] * 4
    theirs = life("torch", lambda p: OPTIMIZERS["momentum"](p, foreach=False), actions, False)
    ours = life("inside torch's", OPTIMIZERS["momentum"], actions, False)
    with pytest.raises(AssertionError, match="ULP a step"):
        assert_close_in_ulp(ours.weights(), theirs.weights(), theirs.reach, theirs.steps)
