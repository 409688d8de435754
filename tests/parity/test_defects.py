"""Defects of torch.amp that this project promises to be free of: each shown in torch's own code, then absent in ours.

The numbers are those of the project's list. 8 and 9 need several processes and stand in test_sharded.py.
"""

import math

import pytest
import torch
from torch import nn

import mpengine
from tests.parity.harness import INF, bits, make_scaler

SCALED = ("torch", "plain")
every_fused = pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])


def ones(n=2, dtype=torch.float32):
    return nn.Parameter(torch.ones(n, dtype=dtype))


def iterate(scaler, optimizer, loss):
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


# 1. Fused Adam and SGD skip only where found_inf is 1, and the scaler adds devices up.


def step_with_an_overflow_on_two_devices(scaler, optimizer, param):
    """The verdict of a second device stands beside the first's, as the scaler keeps them: the sum is 2."""
    scaler.scale((param * INF).sum()).backward()
    scaler.unscale_(optimizer)
    found = scaler._found_inf_per_device(optimizer)
    assert [float(v) for v in found.values()] == [1.0]
    found[torch.device("cpu", 1)] = torch.ones(())
    scaler.step(optimizer)
    scaler.update()


@every_fused
def test_1_an_overflow_on_two_devices(cls):
    results = {}
    for kind in SCALED:
        param = ones()
        optimizer = cls([param], lr=0.125, fused=True)
        step_with_an_overflow_on_two_devices(make_scaler(kind, init_scale=8.0), optimizer, param)
        results[kind] = param.tolist(), optimizer.state[param].get("step")
    assert not all(math.isfinite(w) for w in results["torch"][0])
    assert results["plain"][0] == [1.0, 1.0]
    if cls is not torch.optim.SGD:
        assert (float(results["torch"][1]), float(results["plain"][1])) == (-1.0, 0.0)


@every_fused
def test_1_ours_in_the_hands_of_torchs_scaler(cls):
    param = ones()
    optimizer = mpengine.MixedPrecisionOptimizer(cls([param], lr=0.125))
    step_with_an_overflow_on_two_devices(torch.amp.GradScaler("cpu", 8.0), optimizer, param)
    assert param.tolist() == [1.0, 1.0]
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (0, 1)


# 2. Fused SGD with momentum whose first step overflows goes on from uninitialised memory.


@pytest.fixture
def poisoned_memory():
    """torch fills what nobody initialised with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 0.5}, {"dampening": 0.25}], ids=str)
@pytest.mark.parametrize("skips", [1, 3])
def test_2_momentum_after_a_first_step_that_overflowed(options, skips):
    """Then three steps: as the for-loop optimizer, which never heard of the skipped ones."""
    weights = {}
    for name, kind, loop in (
        ("for-loop", "torch", {"foreach": False}),
        ("torch", "torch", {"fused": True}),
        ("plain", "plain", {"fused": True}),
        ("wrapped", "wrapped", {"fused": True}),
    ):
        param = ones()
        scaler = make_scaler(kind, init_scale=8.0)
        optimizer = torch.optim.SGD([param], lr=0.125, momentum=0.5, **options, **loop)
        if kind == "wrapped":
            optimizer = mpengine.MixedPrecisionOptimizer(optimizer, scaler)
        for factor in (*[INF] * skips, 1.0, 2.0, -1.0):
            iterate(scaler, optimizer, (param * factor).sum())
        weights[name] = param.tolist()
    assert all(math.isnan(w) for w in weights["torch"])
    assert weights["plain"] == weights["wrapped"] == weights["for-loop"]  # exact arithmetic: all dyadic


@pytest.mark.usefixtures("poisoned_memory")
def test_2_groups_that_start_at_different_times():
    """A group thawed later has a first step of its own, which overflows too."""
    weights = []
    for loop in ({"foreach": False}, {"fused": True}):
        params = [ones(), ones()]
        groups = [{"params": [params[0]]}, {"params": [params[1]], "dampening": 0.25, "momentum": 0.25}]
        optimizer = torch.optim.SGD(groups, lr=0.125, momentum=0.5, **loop)
        scaler = mpengine.GradScaler("cpu", 8.0)
        iterate(scaler, optimizer, params[0].sum())
        for first, second in ((1.0, INF), (1.0, INF), (2.0, 1.0), (1.0, 2.0)):
            iterate(scaler, optimizer, (params[0] * first).sum() + (params[1] * second).sum())
        weights.append([p.tolist() for p in params])
    assert weights[0] == weights[1]


# 3. A fused optimizer hides every skip.


def test_3_a_skip_is_visible():
    """torch's fused step returns, counts and calls its hooks alike whether it stepped or not. Ours can be asked."""
    param, calls = ones(), []
    theirs = torch.optim.Adam([param], lr=0.125, fused=True)
    theirs.register_step_post_hook(lambda *_: calls.append("stepped"))
    scaler = torch.amp.GradScaler("cpu", 8.0)
    for factor in (1.0, INF, 1.0):
        iterate(scaler, theirs, (param * factor).sum())
    assert calls == ["stepped"] * 3
    assert float(theirs.state[param]["step"]) == 2.0  # the only trace, on the device

    param = ones()
    scaler = mpengine.GradScaler("cpu", 8.0)
    optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.Adam([param], lr=0.125, fused=True), scaler)
    seen = []
    for factor in (1.0, INF, 1.0):
        iterate(scaler, optimizer, (param * factor).sum())
        seen.append(optimizer.last_step_skipped)
    assert seen == [False, True, False]
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (2, 1)


def test_3_our_scaler_counts_the_overflows_of_torchs_fused_optimizers():
    param = ones()
    scaler = mpengine.GradScaler("cpu", 8.0)
    optimizer = torch.optim.Adam([param], lr=0.125, fused=True)
    for factor in (1.0, INF, 1.0):
        iterate(scaler, optimizer, (param * factor).sum())
    (statistics,) = scaler.statistics()
    assert (statistics.updates, statistics.overflows, statistics.last_overflow) == (3, 1, 2)


# 4. What a skip leaves in `.grad`: with torch it depends on the optimizer's loop.


def after_a_skip(kind, loop):
    """Gradients 1 (finite, at scale 8) and inf: what `.grad` of the first is, and the weight after one more pass.

    The user drops the inf, keeps the rest and accumulates another gradient of 1, at scale 4: the truth is 2.
    """
    params = [ones(1), ones(1)]
    scaler = make_scaler(kind, init_scale=8.0)
    optimizer = torch.optim.SGD(params, lr=0.125, **loop)
    if kind == "wrapped":
        optimizer = mpengine.MixedPrecisionOptimizer(optimizer, scaler)
    scaler.scale(params[0].sum() + (params[1] * INF).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    left = float(params[0].grad)
    params[1].grad = None
    scaler.scale(params[0].sum()).backward()
    scaler.step(optimizer)
    return left, (1.0 - params[0].item()) / 0.125


def test_4_gradients_after_a_skip_are_the_same_for_every_optimizer():
    """Plain ones are unscaled, always; a wrapper never touches them; either way what is added later adds up."""
    fused, loop = {"fused": True}, {"foreach": False}
    assert after_a_skip("torch", fused) == (8.0, 3.0)  # (8 + 4) / 4
    assert after_a_skip("torch", loop) == (1.0, 1.25)  # (1 + 4) / 4
    assert after_a_skip("plain", fused) == after_a_skip("plain", loop) == (1.0, 2.0)
    assert after_a_skip("wrapped", fused) == after_a_skip("wrapped", loop) == (8.0, 2.0)


# 5. Two scales in one gradient.


def test_5_two_losses_with_scales_of_their_own():
    """Two gradients of 1, at scales 16 and 4: torch's two scalers make 5 of them, or 1.25."""
    first, second = torch.amp.GradScaler("cpu", 16.0), torch.amp.GradScaler("cpu", 4.0)
    for scaler, wrong in ((second, 5.0), (first, 1.25)):
        param = ones()
        optimizer = torch.optim.SGD([param], lr=1.0)
        first.scale(param.sum()).backward()
        second.scale(param.sum()).backward()
        scaler.unscale_(optimizer)
        assert param.grad.tolist() == [wrong] * 2
        scaler.update()
    for wrap in (False, True):
        param = ones(dtype=torch.float16) if wrap else ones()
        scaler = mpengine.GradScaler("cpu", 16.0, num_losses=2)
        optimizer = torch.optim.SGD([param], lr=1.0)
        optimizer = mpengine.MixedPrecisionOptimizer(optimizer, scaler) if wrap else optimizer
        scaler.watch(optimizer)
        scaler.scale(param.float().sum(), 0)
        scaler.update(4.0, loss_id=1)
        for loss_id in range(2):
            scaler.scale(param.float().sum(), loss_id).backward()
        scaler.unscale_(optimizer)
        assert param.grad.tolist() == [2.0] * 2


# 6. Loading casts FP32 state to the dtype of its parameter.


def test_6_fp32_moments_of_fp16_parameters_survive_a_load():
    value = 1e-9  # 0 in fp16

    def state_of(optimizer, param):
        optimizer.state[param]["exp_avg_sq"].fill_(value)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        return optimizer.state[param]["exp_avg_sq"]

    param = ones(dtype=torch.float16)
    theirs = torch.optim.Adam([param], foreach=False)
    zeros = {name: torch.zeros(2) for name in ("exp_avg", "exp_avg_sq")}
    theirs.state[param] = {"step": torch.tensor(1.0), **zeros}
    kept = state_of(theirs, param)
    assert (kept.dtype, kept.tolist()) == (torch.float16, [0.0, 0.0])

    param = ones(dtype=torch.float16)
    ours = mpengine.MixedPrecisionOptimizer(torch.optim.Adam([param]))
    param.grad = torch.ones_like(param)
    ours.step()
    kept = state_of(ours, param)
    assert bits(kept) == bits(torch.full((2,), value))


# 7. `update()` after each of several optimizers.


@pytest.mark.parametrize("kind", ["torch", "plain", "wrapped"])
def test_7_one_pass_two_optimizers_two_updates(kind):
    """Growth: torch counts the pass twice. An overflow of the first: torch halves the scale under the second."""

    def run(first_factor):
        params = [ones(1), ones(1)]
        scaler = make_scaler(kind, init_scale=8.0, growth_interval=10)
        optimizers = [torch.optim.SGD([p], lr=0.125) for p in params]
        if kind == "wrapped":
            optimizers = [mpengine.MixedPrecisionOptimizer(o, scaler) for o in optimizers]
        for optimizer in optimizers if kind != "torch" else ():
            scaler.watch(optimizer)
        scaler.scale((params[0] * first_factor).sum() + params[1].sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
            scaler.update()
        return scaler._get_growth_tracker(), scaler.get_scale(), params[1].item()

    assert run(1.0) == (2 if kind == "torch" else 1, 8.0, 0.875)
    assert run(INF) == ((1, 4.0, 0.75) if kind == "torch" else (0, 4.0, 0.875))


# 10. Fused Adam runs on pure fp16 parameters, with fp16 moments.


@pytest.mark.parametrize("kind", ["torch", "wrapped"])
def test_10_the_second_moment_of_fp16_parameters(kind):
    """Gradients of 1e-3: their squares are 1e-6, a thousandth of which is 0 in fp16. Adam then divides by eps."""
    param = ones(dtype=torch.float16)
    scaler = make_scaler(kind, init_scale=64.0)
    optimizer = torch.optim.Adam([param], lr=1e-3, eps=1e-6, fused=True)
    optimizer = mpengine.MixedPrecisionOptimizer(optimizer, scaler) if kind == "wrapped" else optimizer
    iterate(scaler, optimizer, (param.float() * 1e-3).sum())
    moment = optimizer.state[param]["exp_avg_sq"]
    if kind == "torch":
        assert (moment.dtype, moment.tolist()) == (torch.float16, [0.0, 0.0])
        return
    assert moment.dtype == torch.float32
    assert moment.tolist() == pytest.approx([1e-9] * 2, rel=2.0**-10)  # the fp16 gradient's rounding, squared
    (master,) = optimizer.master_params()
    assert (1.0 - master).tolist() == pytest.approx([1e-3] * 2, rel=2e-3)  # lr, but for eps and roundings
