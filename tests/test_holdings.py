"""What an optimizer holds for its parameters stays true while users freeze, write, move and replace things.

The arithmetic of `dyadic` runs is exact in FP32 (numbers of few bits, factors that are powers of two), so torch's
result on FP32 parameters is the result, bit for bit.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer, holdings
from tests.harness import (
    BRAIN,
    EVERY,
    FUSED,
    GENERAL,
    HALF,
    SINGLE,
    feed,
    gradients,
    network,
    parameters,
    prepared,
    same_bits,
    snapshot,
    started,
    train,
    twins_of,
)
from tests.oracle import Oracle

every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
one_of_each_path = pytest.mark.parametrize("make", [FUSED["adam"], GENERAL["Adamax"]], ids=["fused", "general"])


def dyadic_params(dtypes=(HALF, SINGLE)):
    return [nn.Parameter(torch.arange(1.0, 6.0).to(dtype)) for dtype in dtypes]


def dyadic_grads(params, step):
    return [torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0]).roll(step).to(p.dtype) for p in params]


def dyadic_sgd(params, **kw):
    return torch.optim.SGD(params, **{"lr": 0.5, "momentum": 0.5, "dampening": 0.25, "foreach": False, **kw})


class Pair:
    """Our optimizer on fp16 and FP32 parameters beside torch's on FP32 ones, in exact arithmetic."""

    def __init__(self, **options):
        self.params = dyadic_params()
        self.twins = twins_of(self.params)
        self.ours = MixedPrecisionOptimizer(dyadic_sgd(self.params, **options))
        self.theirs = dyadic_sgd(self.twins, **options)

    def both(self, change):
        change(self.ours)
        change(self.theirs)

    def run(self, steps, active=(True, True)):
        for step in steps:
            grads = [grad if on else None for grad, on in zip(dyadic_grads(self.params, step), active, strict=True)]
            feed(self.params, grads)
            feed(self.twins, [None if grad is None else grad.to(SINGLE, copy=True) for grad in grads])
            self.ours.step()
            self.theirs.step()
            assert same_bits(list(self.ours.master_params()), self.twins)
            assert same_bits(self.params[0], self.twins[0].half())


# Hyperparameters.


def momentum_of(value):
    def change(optimizer):
        optimizer.param_groups[0]["momentum"] = value

    return change


@pytest.mark.parametrize(
    "momenta",
    [(0.0, 0.5), (0.5, 0.0, 0.5), (0.0, 0.5, 0.0, 0.5), (0.5, 0.25)],
)
@pytest.mark.parametrize("steps", [1, 2])
def test_momentum_may_be_switched_on_and_off(momenta, steps):
    pair = Pair(momentum=momenta[0])
    for phase, momentum in enumerate(momenta):
        pair.both(momentum_of(momentum))
        pair.run(range(phase * steps, (phase + 1) * steps))


def test_momentum_switched_off_before_the_first_step():
    """torch has no buffer yet then, so the one that comes later starts with the gradient, undampened."""
    pair = Pair(momentum=0.5)
    pair.both(momentum_of(0.0))
    pair.run(range(2))
    pair.both(momentum_of(0.5))
    pair.run(range(2, 5))


def test_a_skipped_first_step_leaves_no_momentum_buffer():
    """torch's fused SGD keeps an uninitialised one then."""
    pair = Pair()
    feed(pair.params, [torch.full_like(p, math.nan) for p in pair.params])
    pair.ours.step()
    assert pair.ours.last_step_skipped
    pair.run(range(3))


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_lr_may_change_every_step(make):
    """And a tensor that a scheduler fills in place is read at every step."""
    number, tensor = parameters(), parameters()
    one = MixedPrecisionOptimizer(make(number, lr=0.125))
    other = MixedPrecisionOptimizer(make(tensor, lr=torch.tensor(0.125)))
    for step, lr in enumerate((0.125, 0.25, 0.0, 1.0, 0.0625)):
        one.param_groups[0]["lr"] = lr
        other.param_groups[0]["lr"].fill_(lr)
        for params, optimizer in ((number, one), (tensor, other)):
            feed(params, gradients(params, step))
            optimizer.step()
        assert same_bits(number, tensor)


def test_amsgrad_may_be_switched_on():
    """Its largest moment starts with what comes from then on."""
    params = parameters()
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    oracle = Oracle(params, "adam")
    for step in range(6):
        optimizer.param_groups[0]["amsgrad"] = step >= 3
        grads = gradients(params, step, size=1.0 / (1 + step))
        feed(params, grads)
        optimizer.step()
        oracle.step(grads, optimizer.param_groups[0])
        assert oracle.distance(list(optimizer.master_params()), 0) <= 1.0


# Freezing.


@every_optimizer
def test_a_parameter_without_gradient_does_not_advance(make):
    """Frozen for a while or just unused: it goes on later as if the steps between had not been."""
    params, other = parameters(), parameters()
    optimizer, expected = MixedPrecisionOptimizer(make(params)), MixedPrecisionOptimizer(make(other))
    for step in range(6):
        grads = gradients(params, step)
        feed(params, [None if i % 2 and step in (1, 2, 4) else grad for i, grad in enumerate(grads)])
        before = snapshot(optimizer)
        optimizer.step()
        if step in (1, 2, 4):
            after = snapshot(optimizer)
            assert all(after[0][i] == before[0][i] for i in range(1, 9, 2))
            assert all(after[2].get(i) == before[2].get(i) for i in range(1, 9, 2))
    for step in (0, 3, 5):
        grads = gradients(other, step)
        feed(other, [grad if i % 2 else None for i, grad in enumerate(grads)])
        expected.step()
    assert same_bits(params[1::2], other[1::2])
    masters, others = list(optimizer.master_params()), list(expected.master_params())
    assert same_bits(masters[1::2], others[1::2])


@every_optimizer
def test_a_layer_frozen_from_the_start_has_no_master_until_it_is_trained(make):
    model = network()
    for param in model[0].parameters():
        param.requires_grad = False
    scaler = mpengine.GradScaler(init_scale=256.0)
    optimizer = mpengine.prepare(model, make(model.parameters()), scaler)
    assert model[0].weight.dtype == HALF
    assert len(list(optimizer.master_params())) == 4
    before = [p.detach().clone() for p in model[0].parameters()]
    train(model, optimizer, scaler, range(2))
    assert same_bits(list(model[0].parameters()), before)
    for param in model[0].parameters():
        param.requires_grad = True
    train(model, optimizer, scaler, range(2, 4))
    assert len(list(optimizer.master_params())) == 6
    assert optimizer.steps_taken == 4
    for param, old in zip(model[0].parameters(), before, strict=True):
        assert not same_bits(param, old)
    for param, master in zip(model.parameters(), optimizer.master_params(), strict=True):
        assert same_bits(param, master.to(param.dtype))
    if make is FUSED["adam"]:
        assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [2, 2, 4, 4, 4, 4]


@one_of_each_path
def test_all_parameters_frozen(make):
    params = [p.requires_grad_(False) for p in parameters()]
    optimizer = MixedPrecisionOptimizer(make(params))
    assert list(optimizer.master_params()) == []
    optimizer.step()
    assert optimizer.steps_taken == 0
    assert optimizer.state_dict()["state"] == {}
    feed(params, gradients(params, 0))  # as torch does: what has a gradient is stepped
    optimizer.step()
    assert optimizer.steps_taken == 1
    assert len(list(optimizer.master_params())) == len(params)


# Groups.


@one_of_each_path
def test_a_group_or_parameter_that_is_taken_out_is_left_alone(make):
    """And the rest goes on as if it had always been alone."""
    params, other = parameters(), parameters()
    optimizer = MixedPrecisionOptimizer(make([{"params": params[:4]}, {"params": params[4:]}]))
    expected = MixedPrecisionOptimizer(make([{"params": other[1:4]}]))
    for step in range(4):
        if step == 2:
            optimizer.param_groups.pop()
            del optimizer.param_groups[0]["params"][0]
            kept = [p.detach().clone() for p in (params[0], *params[4:])]
        for own in (params, other):
            feed(own, gradients(own, step))
        optimizer.step()
        expected.step()
    assert same_bits([params[0], *params[4:]], kept)
    assert snapshot(optimizer) == snapshot(expected)
    assert optimizer.steps_taken == 4


@one_of_each_path
def test_the_last_group_is_taken_out(make):
    params = parameters()
    optimizer = MixedPrecisionOptimizer(make([{"params": params[:4]}, {"params": params[4:]}]))
    for step in range(3):
        feed(params, gradients(params, step))
        optimizer.step()
        if step == 0:
            optimizer.param_groups.pop()
            kept = [p.detach().clone() for p in params[4:]]
    assert same_bits(params[4:], kept)
    assert optimizer.steps_taken == 3


@one_of_each_path
def test_a_parameter_may_take_anothers_place(make):
    params = parameters([HALF])
    optimizer = MixedPrecisionOptimizer(make(params))
    feed(params, gradients(params, 0))
    optimizer.step()
    new = nn.Parameter(torch.full((2, 2), 3.0, dtype=HALF))
    old = params[1].detach().clone()
    optimizer.param_groups[0]["params"][1] = new
    feed([params[0], new, params[2]], gradients([params[0], new, params[2]], 1))
    optimizer.step()
    assert same_bits(params[1], old)
    assert not same_bits(new, torch.full((2, 2), 3.0, dtype=HALF))
    assert [m.shape for m in optimizer.master_params()] == [(7,), (2, 2), ()]


# State.


@pytest.mark.parametrize("name", FUSED)
def test_state_from_before_wrapping_is_kept(name):
    make, params = FUSED[name], parameters((SINGLE,))
    inner = FUSED[name](params)
    oracle = Oracle.of(params, inner)
    model = nn.ParameterList(params)
    for step in range(3):
        grads = gradients(params, step)
        feed(params, grads)
        inner.step()
        oracle.step(grads, inner.param_groups[0])
    optimizer = mpengine.prepare(model, inner)
    for step in range(3, 6):
        grads = gradients(params, step)
        assert {grad.dtype for grad in grads} == {HALF}
        feed(params, grads)
        optimizer.step()
        oracle.step(grads, inner.param_groups[0])
    assert oracle.distance(list(optimizer.master_params()), 1) <= 1.0
    if optimizer._family.counts_steps:
        assert [int(optimizer.state[p]["step"]) for p in params] == [6, 6, 6]
    assert make is FUSED[name]


def test_the_first_momentum_buffer_of_a_wrapped_sgd_is_known_to_be_filled():
    pair = Pair()
    params = dyadic_params((SINGLE, SINGLE))
    inner = dyadic_sgd(params)
    for step in range(2):
        feed(params, dyadic_grads(params, step))
        inner.step()
    pair.run(range(2))
    wrapped = MixedPrecisionOptimizer(inner)
    for step in range(2, 5):
        feed(params, dyadic_grads(params, step))
        wrapped.step()
    pair.run(range(2, 5))
    assert same_bits(params, pair.twins)


@pytest.mark.parametrize("low", [HALF, BRAIN])
def test_low_precision_state_is_widened(low):
    params = parameters((low,))
    inner = FUSED["adam"](params)
    feed(params, gradients(params, 0))
    inner.step()
    moments = {p: inner.state[p]["exp_avg"].clone() for p in params}
    optimizer = MixedPrecisionOptimizer(inner)
    for param, moment in moments.items():
        assert same_bits(optimizer.state[param]["exp_avg"], moment.float())
        assert int(optimizer.state[param]["step"]) == 1


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("how", ["clear", "replace", "one parameter"])
def test_clearing_the_state_starts_afresh(name, how):
    params, other = parameters(), parameters()
    optimizer = MixedPrecisionOptimizer(FUSED[name](params))
    for step in range(3):
        feed(params, gradients(params, step))
        optimizer.step()
    if how == "clear":
        optimizer.state.clear()
    elif how == "replace":
        optimizer.state = type(optimizer.state)(dict)
    else:
        for param in params:
            optimizer.state[param] = {}
    with torch.no_grad():
        for param, value in zip(other, params, strict=True):
            param.copy_(value)
    fresh = MixedPrecisionOptimizer(FUSED[name](other))
    for master, value in zip(fresh.master_params(), optimizer.master_params(), strict=True):
        master.data.copy_(value.data)
    for step in range(3, 6):
        for own, one in ((params, optimizer), (other, fresh)):
            feed(own, gradients(own, step))
            one.step()
    assert snapshot(optimizer) == snapshot(fresh)


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_state_edited_in_place_and_state_replaced_are_the_same(name):
    """Optimizer surgery: halving the moments by either way takes effect at the next step."""
    runs = []
    for replace in (False, True):
        params = parameters()
        optimizer = MixedPrecisionOptimizer(FUSED[name](params))
        for step in range(4):
            feed(params, gradients(params, step))
            optimizer.step()
            if step == 1:
                for param in params:
                    for key, value in list(optimizer.state[param].items()):
                        if key == "step" and replace:
                            optimizer.state[param][key] = torch.tensor(7.0)
                        elif key == "step":
                            value.fill_(7)
                        elif replace:
                            optimizer.state[param][key] = value * 0.5
                        else:
                            value.mul_(0.5)
        runs.append(snapshot(optimizer))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("key", ["step", "exp_avg"])
def test_one_piece_of_state_replaced_is_noticed(key):
    """By a value of any kind that holds the number: torch keeps steps in FP32, a colleague's moments are float64."""
    runs = []
    for replace in (False, True):
        params = parameters()
        optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
        for step in range(3):
            feed(params, gradients(params, step))
            optimizer.step()
            for param in params:
                value = optimizer.state[param][key]
                if replace:
                    optimizer.state[param][key] = value.double() * 2
                else:
                    value.mul_(2)
        runs.append(snapshot(optimizer)[:2])
    assert runs[0] == runs[1]


def test_a_state_of_another_shape_is_refused():
    params = parameters()
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(2)
    feed(params, gradients(params, 0))
    with pytest.raises(ValueError, match=r"state\['exp_avg'\] of group 0, parameter 1 of shape \(3, 5\) is of shape"):
        optimizer.step()
    assert optimizer.steps_taken == 0


# Weights changed from outside.


def edited(param, how, value):
    with torch.no_grad():
        if how == "copy_":
            param.copy_(value)
        elif how == "data = ":
            param.data = value.to(param.dtype)
        elif how == "detach().copy_":
            param.detach().copy_(value)
        else:
            param[...] = value


@every_optimizer
@pytest.mark.parametrize("how", ["copy_", "data = ", "detach().copy_", "index"])
def test_new_weights_are_taken_over(make, how):
    """As if the optimizer had been made for them, but for its state."""
    params, other = parameters((HALF, BRAIN, SINGLE)), parameters((HALF, BRAIN, SINGLE))
    optimizer, expected = MixedPrecisionOptimizer(make(params)), MixedPrecisionOptimizer(make(other))
    for own, one in ((params, optimizer), (other, expected)):
        for step in range(2):
            feed(own, gradients(own, step))
            one.step()
    new = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).to(p.dtype) for p in params]
    for param, twin, value, master in zip(params, other, new, expected.master_params(), strict=True):
        edited(param, how, value)
        edited(twin, "copy_", value)
        if master is not twin:
            master.data.copy_(value)
    for own, one in ((params, optimizer), (other, expected)):
        feed(own, gradients(own, 5))
        one.step()
    assert snapshot(optimizer) == snapshot(expected)


def test_masters_keep_what_rounding_hid_where_nothing_changed():
    param = nn.Parameter(torch.ones(4, dtype=HALF))
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.25))
    param.grad = torch.tensor([1.0, 3.0, 5.0, 7.0]).half() * 2.0**-10
    optimizer.step()
    (master,) = optimizer.master_params()
    kept = master.detach().clone()
    assert (kept.half() != kept).all()
    with torch.no_grad():
        param[2] = 2.0
    param.grad = torch.zeros(4, dtype=HALF)
    optimizer.step()
    assert same_bits(master, torch.tensor([kept[0], kept[1], 2.0, kept[3]]))


def test_load_state_dict_of_the_model_is_noticed():
    model, optimizer, scaler = prepared()
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, scaler, range(3))
    model.load_state_dict(start)
    expected = {name: value.float() for name, value in start.items()}
    optimizer.param_groups[0]["lr"] = 0.0  # so that the step changes nothing but what it takes over
    train(model, optimizer, scaler, [3])
    for (name, _), master in zip(model.named_parameters(), optimizer.master_params(), strict=True):
        assert same_bits(master, expected[name])


def test_nan_weights_are_taken_over_too():
    params = parameters([HALF])
    optimizer = MixedPrecisionOptimizer(FUSED["sgd"](params))
    with torch.no_grad():
        params[0][1] = math.nan
    feed(params, gradients(params, 0))
    optimizer.step()
    for value in (next(iter(optimizer.master_params())), params[0]):
        assert value.isnan().tolist() == [i == 1 for i in range(7)]


# Adafactor's means over rows and columns depend on the layout, in torch too.
@pytest.mark.parametrize("make", [make for name, make in EVERY.items() if name != "Adafactor"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_a_model_that_goes_to_channels_last_after_wrapping(make, dtype):
    """Masters and state follow into the new layout, before the first step and between steps."""
    runs = []
    for change_at in (None, 0, 2):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 2).to(dtype)
        optimizer = MixedPrecisionOptimizer(make(model.parameters()))
        for step in range(4):
            if step == change_at:
                model.to(memory_format=torch.channels_last)
                assert model.weight.stride() != (12, 4, 2, 1)
            feed(model.parameters(), gradients(model.parameters(), step))
            optimizer.step()
        runs.append(snapshot(optimizer))
    assert runs[0] == runs[1] == runs[2]


def test_a_transposed_parameter_is_no_surprise():
    """The same memory, other strides."""
    runs = []
    for transpose in (False, True):
        param = nn.Parameter(torch.arange(9.0).reshape(3, 3).half())
        optimizer = MixedPrecisionOptimizer(FUSED["adam"]([param]))
        param.grad = torch.arange(9.0).reshape(3, 3).half()
        optimizer.step()
        if transpose:
            param.grad = None
            param.data = param.data.t()
        else:
            param.grad = None
            param.data = param.data.t().contiguous()
        param.grad = torch.arange(9.0).reshape(3, 3).half()
        optimizer.step()
        runs.append(snapshot(optimizer))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.float(), r"became torch\.float32 after it was wrapped. Cast the model before"),
        (lambda p: p.double(), r"became torch\.float64"),
        (lambda p: p.new_zeros(2, 2), r"changed its shape from \(7,\) to \(2, 2\)"),
    ],
    ids=["float32", "float64", "shape"],
)
def test_a_parameter_that_was_changed_beyond_recognition_is_refused(change, message):
    params = parameters([HALF])
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    feed(params, gradients(params, 0))
    optimizer.step()
    masters, state = snapshot(optimizer)[1:3]
    params[0].grad = None
    params[0].data = change(params[0].data)
    feed(params[1:], gradients(params, 1)[1:])
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert snapshot(optimizer)[1:3] == [masters, state]


def test_a_model_may_go_from_fp16_to_bf16():
    params = parameters([HALF])
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    for param in params:
        param.data = param.data.bfloat16()
    feed(params, gradients(params, 0))
    values = [p.detach().float() for p in params]
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    for param, master, value in zip(params, optimizer.master_params(), values, strict=True):
        assert same_bits(param, master.bfloat16())
        assert same_bits(master.bfloat16(), value.bfloat16())


def test_an_fp32_parameter_that_was_cast_is_refused():
    params = parameters([SINGLE])
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
    params[0].data = params[0].data.half()
    feed(params, gradients(params, 0))
    with pytest.raises(RuntimeError, match=r"parameter 0 of shape \(7,\) became torch\.float16"):
        optimizer.step()


@pytest.mark.parametrize("family", ["adamw", "sgd"])
def test_a_warm_step_does_not_look_at_every_tensor(family, monkeypatch):
    """The quick look must not fail by our own writes, on a CPU or anywhere: it would cost the host milliseconds."""
    params = [nn.Parameter(torch.randn(3, 4).half()), nn.Parameter(torch.randn(5))]
    optimizer = MixedPrecisionOptimizer(FUSED[family](params), GradScaler("cpu"))
    scaler = started(optimizer.scaler)

    def step(seed):
        feed(params, gradients(params, seed))
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()

    step(0)
    step(1)
    monkeypatch.setattr(holdings, "is_current", lambda *_: pytest.fail("every tensor was looked at"))
    for seed in range(2, 6):
        optimizer.param_groups[0]["lr"] *= 0.5
        step(seed)
    with torch.no_grad():
        params[1].add_(1.0)
    with pytest.raises(pytest.fail.Exception):
        step(6)


def move_down(groups):
    groups[0]["params"].append(groups[1]["params"].pop())


def drop_the_empty(groups):
    groups[0]["params"][:], groups[1]["params"][:] = groups[1]["params"] + groups[0]["params"], []
    del groups[1]


def swap(groups):
    groups.reverse()


@pytest.mark.parametrize("change", [move_down, drop_the_empty, swap])
@pytest.mark.parametrize("family", ["adamw", "sgd"])
def test_a_parameter_takes_the_numbers_of_the_group_it_moved_to(family, change):
    """Of the same rule, so that only the learning rate tells."""
    params = [nn.Parameter(torch.ones(3, 4).half()) for _ in range(2)]
    groups = [{"params": [param], "lr": lr} for param, lr in zip(params, (0.0, 0.25), strict=True)]
    optimizer = MixedPrecisionOptimizer(FUSED[family](groups))
    optimizer.param_groups[0]["lr"] = 0.0
    for seed in range(2):
        feed(params, gradients(params, seed))
        optimizer.step()
    change(optimizer.param_groups)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    before = [master.clone() for master in optimizer.master_params()]
    order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    feed(params, gradients(params, 2))
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, optimizer.master_params(), strict=True)]
    assert moved == [rates[key] != 0.0 for key in order]


def test_a_step_count_that_was_set_is_saved_before_the_next_step():
    param = nn.Parameter(torch.ones(3).half())
    optimizer = MixedPrecisionOptimizer(FUSED["adam"]([param]))
    for seed in range(3):
        feed([param], gradients([param], seed))
        optimizer.step()
    optimizer.state[param]["step"] = torch.tensor(0.0)
    assert float(optimizer.state_dict()["state"][0]["step"]) == 0.0


@pytest.mark.parametrize("memory", [torch.ones(4, 8).half()[:, ::2], torch.ones(1, 1).half().expand(4, 4)])
def test_memory_with_gaps_or_overlaps_is_refused_after_wrapping(memory):
    """A step would write between the elements."""
    param = nn.Parameter(torch.ones(4, 4).half())
    optimizer = MixedPrecisionOptimizer(FUSED["adam"]([param]))
    feed([param], gradients([param], 0))
    optimizer.step()
    param.data = memory
    with pytest.raises(RuntimeError, match="was given memory with gaps or overlaps after it was wrapped"):
        optimizer.step()


@pytest.mark.parametrize("prepare", [lambda optimizer: None, lambda optimizer: optimizer.schedule(None)])
def test_memory_that_was_swapped_twice_between_two_looks(prepare):
    """The allocator may give the first address back; then version and address would be as they were."""
    for n in range(64, 104):
        param = nn.Parameter(torch.ones(n, n).half())
        optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0))
        prepare(optimizer)
        for factor in (0.5, 0.25):
            param.data = param.data * factor
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert (param == 0.125).all(), n


def test_other_bits_in_the_same_memory():
    """The dtype changed, and nothing else."""
    param = nn.Parameter(torch.ones(4, 4).half())
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.5))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    param.grad = None
    param.data = param.data.view(BRAIN)
    (value,) = set(param.detach().float().flatten().tolist())
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert next(iter(optimizer.master_params())).unique().tolist() == [value]
    assert param.float().unique().tolist() == [value]


def test_fp32_weights_go_to_the_optimizer_that_holds_the_parameter_now():
    for seed in range(12):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        first = mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        second = MixedPrecisionOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(2).half())], lr=0.1))
        second.add_param_group({"params": [first.param_groups[0]["params"].pop()]})
        weights = {key: torch.randn(4, 4) for key in model.state_dict()}
        model.load_state_dict(weights)
        assert torch.equal(list(second.master_params())[-1], weights["1.weight"]), seed
        assert torch.equal(second.fp32_state_dict(model)["1.weight"], weights["1.weight"]), seed


def momentum(param):
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0, momentum=0.5))
    return optimizer, optimizer.state[param]


def test_a_dict_of_state_stays_the_one_that_it_is():
    """Who holds it may edit it at any time, as with torch."""
    param = nn.Parameter(torch.ones(4).half())
    optimizer, own = momentum(param)
    theirs = None
    for step in range(6):
        if step == 3:
            theirs = optimizer.state[param] = {"momentum_buffer": torch.ones(4)}
        (own if theirs is None else theirs)["momentum_buffer"] = torch.full((4,), float(step))
        assert optimizer.state[param] is (own if theirs is None else theirs)
        before = param.detach().clone()
        param.grad = torch.zeros(4).half()
        optimizer.step()
        expected = 0.0 if step == 0 else 0.5 * step  # the first buffer is the gradient
        assert (before - param.detach()).tolist() == [expected] * 4


def test_a_gradient_with_the_negative_bit():
    runs = []
    for lazy in (False, True):
        param = nn.Parameter(torch.ones(40, 40).half())
        optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.5))
        for _ in range(3):
            param.grad = torch._neg_view(torch.ones(40, 40).half()) if lazy else -torch.ones(40, 40).half()
            optimizer.step()
        runs.append(param.detach().unique().tolist())
    assert runs[0] == runs[1] == [2.5]


@pytest.mark.parametrize("value", ["x", 1j, None])
def test_a_hyperparameter_that_is_no_number(value):
    param = nn.Parameter(torch.ones(4).half())
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.5))
    optimizer.param_groups[0]["lr"] = value
    param.grad = torch.ones(4).half()
    with pytest.raises(TypeError, match=r"group 0 of the optimizer has .* among its hyperparameters; each must be"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert param.tolist() == [0.5] * 4
    assert optimizer.steps_taken == 1


def test_gradients_that_are_dropped_after_unscale_():
    """Nothing is stepped, as with torch.amp; the scale moves by what unscale_ found."""
    param = nn.Parameter(torch.ones(4).half())
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.5), GradScaler("cpu", growth_interval=1))
    scaler = started(optimizer.scaler)
    before = scaler.get_scale()
    param.grad = torch.ones(4).half()
    scaler.unscale_(optimizer)
    param.grad = None
    for master in optimizer.master_params():
        master.grad = None
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [1.0] * 4
    assert scaler.get_scale() == 2.0 * before
