"""`unroll`: a torch scheduler's values, written down ahead of time, and nothing else changed."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mpengine import MixedPrecisionOptimizer, schedules
from mpengine.unroll import unroll
from tests.harness import EVERY, FUSED, GENERAL, SINGLE, frozen, parameters
from tests.torch_schedulers import SCHEDULERS, STEPS, advance, made, rows_of

UNROLLABLE = {name: make for name, make in SCHEDULERS.items() if name != "ReduceLROnPlateau"}


def torchs_rows(make, schedule, steps=STEPS, keys=("lr", "momentum", "betas")):
    """What torch's own optimizer uses at each step."""
    optimizer = made(make)
    scheduler = schedule(optimizer)
    rows = []
    for step in range(steps):
        rows.append([{k: group[k] for k in keys if k in group} for group in optimizer.param_groups])
        if step < steps - 1:
            optimizer.step()
            advance(scheduler)
    return rows


@pytest.mark.parametrize("name", UNROLLABLE)
@pytest.mark.parametrize("wrap", [False, True], ids=["torch", "wrapper"])
@pytest.mark.parametrize("make", [FUSED["momentum"], FUSED["adamw"], GENERAL["Rprop"]], ids=["sgd", "adamw", "rprop"])
def test_the_rows_are_what_torch_would_use(name, make, wrap):
    optimizer = MixedPrecisionOptimizer(made(make)) if wrap else made(make)
    before = frozen(optimizer.param_groups), frozen(optimizer.defaults)
    random_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    attributes = set(vars(optimizer))
    table, rows = rows_of(optimizer, UNROLLABLE[name])
    expected = torchs_rows(make, UNROLLABLE[name])
    momentum = [
        key for key in ("momentum", "betas") if any(e[0].get(key) != expected[-1][0].get(key) for e in expected)
    ]
    assert table.keys == ("lr", *momentum)
    assert rows == [[{key: group[key] for key in table.keys} for group in row] for row in expected]  # to the bit
    # Nothing else has changed.
    assert (frozen(optimizer.param_groups), frozen(optimizer.defaults)) == before
    assert set(vars(optimizer)) == attributes  # its step is not patched
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert (np.random.get_state()[1] == random_state[1]).all()


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_every_optimizer_has_a_shadow(make):
    optimizer = made(make)
    table, rows = rows_of(optimizer, SCHEDULERS["ExponentialLR"])
    assert table.keys == ("lr",)
    start = [group["lr"] for group in optimizer.param_groups]
    assert rows[0] == [{"lr": lr} for lr in start]
    assert rows == torchs_rows(make, SCHEDULERS["ExponentialLR"], keys=("lr",))


def test_after_the_last_row_its_values_hold():
    table, rows = rows_of(made(), SCHEDULERS["OneCycleLR"])
    assert table.row(STEPS) == table.row(10**9) == rows[-1] != rows[-2]
    assert table.row(-1) == rows[0] != rows[1]


def test_columns_are_float64_by_step_and_group_and_read_only():
    table, rows = rows_of(made(FUSED["adam"]), SCHEDULERS["OneCycleLR"])
    assert table.columns["lr"].shape == (STEPS, 2)
    assert table.columns["betas"].shape == (STEPS, 2, 2)
    assert table.columns["lr"].dtype == table.columns["betas"].dtype == np.float64
    assert table.columns["betas"][3, 1].tolist() == list(rows[3][1]["betas"])
    assert isinstance(rows[3][1]["betas"], tuple)
    with pytest.raises(ValueError, match="read-only"):
        table.columns["lr"][0, 0] = 1.0


@pytest.mark.parametrize("as_a", [list, tuple])
def test_several_schedulers_are_stepped_in_their_order(as_a):
    warmup = schedules.linear_warmup(warmup_steps=5, start_factor=0.1)

    def both(opt):
        return as_a([warmup(opt), lr_scheduler.MultiStepLR(opt, [8, 12], gamma=0.1)])

    optimizer = made()
    first, second = both(optimizer)
    expected = []
    for _ in range(STEPS):
        expected.append([{"lr": group["lr"]} for group in optimizer.param_groups])
        optimizer.step()
        first.step()
        second.step()
    assert rows_of(made(), both)[1] == expected
    assert rows_of(made(), warmup)[1] != expected


def test_a_scheduler_that_is_stepped_twice_is_found_out():
    """The comparisons above can fail."""

    def twice(opt):
        scheduler = SCHEDULERS["ExponentialLR"](opt)
        return [scheduler, scheduler]

    assert rows_of(made(), twice)[1] != torchs_rows(FUSED["momentum"], SCHEDULERS["ExponentialLR"])


def test_a_tensor_rate_keeps_its_precision_and_its_value():
    def make(params):
        return torch.optim.Adam([{**group, "lr": torch.tensor(0.02)} for group in params], foreach=False)

    optimizer = made(make)
    kept = [group["lr"] for group in optimizer.param_groups]
    _, rows = rows_of(optimizer, SCHEDULERS["ExponentialLR"])
    expected = torchs_rows(make, SCHEDULERS["ExponentialLR"], steps=1, keys=("lr",))
    assert rows[0] == [{"lr": float(group["lr"])} for group in expected[0]]
    for row in rows:
        for group in row:
            assert type(group["lr"]) is float
            assert group["lr"] == float(np.float32(group["lr"]))
    assert len({row[0]["lr"] for row in rows}) == STEPS
    for group, lr in zip(optimizer.param_groups, kept, strict=True):
        assert group["lr"] is lr
        assert (lr, lr._version) == (torch.tensor(0.02), 0)  # not even written and put back


class _Decay(lr_scheduler.LRScheduler):
    """Moves other numbers than a rate."""

    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.5 / (1 + self.last_epoch)
            group["alpha"] = 0.9 + 0.001 * self.last_epoch
        return self.base_lrs


def test_whatever_number_a_scheduler_moves_is_a_column():
    table, rows = rows_of(made(FUSED["rmsprop"]), _Decay)
    assert table.keys == ("lr", "alpha", "weight_decay")
    assert rows[3][0] == {"lr": 0.01, "alpha": 0.9 + 0.001 * 3, "weight_decay": 0.125}


class _InPlace(lr_scheduler.LRScheduler):
    def get_lr(self):
        for group in self.optimizer.param_groups:
            group["betas"][0] = 0.5 + 0.01 * self.last_epoch
        return self.base_lrs


def test_a_list_that_a_scheduler_writes_into_is_not_the_optimizers():
    optimizer = made(FUSED["adam"])
    for group in optimizer.param_groups:
        group["betas"] = list(group["betas"])
    table, rows = rows_of(optimizer, _InPlace)
    assert table.keys == ("lr", "betas")
    assert rows[3][0]["betas"] == (0.53, 0.999)
    assert optimizer.param_groups[0]["betas"] == [0.9, 0.999]


def test_what_the_scheduler_keeps_for_itself_is_no_column():
    optimizer = made()
    optimizer.param_groups[0]["max_lr"] = 7.0  # left there by an earlier one
    optimizer.param_groups[1]["max_lr"] = 7.0
    assert rows_of(optimizer, SCHEDULERS["OneCycleLR"])[0].keys == ("lr", "momentum")


def test_an_earlier_scheduler_left_its_initial_lr_as_for_torch():
    """torch's schedulers start from a group's "initial_lr" where it has one."""
    optimizer = made()
    optimizer.param_groups[0]["initial_lr"] = 1.0
    _, rows = rows_of(optimizer, SCHEDULERS["LambdaLR"], 2)
    assert [row[0]["lr"] for row in rows] == [1.0, 0.5]


def test_global_step_hooks_see_no_step():
    seen = []
    handles = [
        register_optimizer_step_pre_hook(lambda *args: seen.append(args)),
        register_optimizer_step_post_hook(lambda *args: seen.append(args)),
    ]
    try:
        rows_of(made(), SCHEDULERS["StepLR"])
    finally:
        for handle in handles:
            handle.remove()
    assert not seen


def test_named_parameters_and_own_entries_of_groups_are_no_hindrance():
    params = parameters([SINGLE])
    own = [object()]
    named = [{"params": [("a", params[0]), ("b", params[1])], "own": own}, {"params": [("c", params[2])], "own": own}]
    optimizer = torch.optim.SGD(named, lr=0.1)
    assert rows_of(optimizer, SCHEDULERS["StepLR"])[0].keys == ("lr",)
    assert optimizer.param_groups[0]["own"] is own


def test_a_rate_that_ends_at_zero_may_end_below_it_by_rounding():
    optimizer = torch.optim.SGD(parameters([SINGLE]), lr=0.13738555031257638)
    decay = partial(lr_scheduler.LinearLR, start_factor=0.36, end_factor=0.0, total_iters=209)
    lowest = min(row[0]["lr"] for row in rows_of(optimizer, decay, 230)[1])
    assert abs(lowest) < 1e-15


def refused(kind, match, make_scheduler, steps=STEPS, make=FUSED["momentum"]):
    optimizer = made(make)
    before = frozen(optimizer.param_groups)
    with pytest.raises(kind, match=match):
        unroll(optimizer.param_groups, optimizer.defaults, lambda opt: make_scheduler(opt, optimizer), steps)
    assert frozen(optimizer.param_groups) == before


@pytest.mark.parametrize("steps", [0, -3, 2.0, True, None, "5"])
def test_steps_must_be_a_positive_int(steps):
    refused(ValueError, r"steps is .*int of at least 1", lambda opt, _: SCHEDULERS["StepLR"](opt), steps)


@pytest.mark.parametrize(
    ("kind", "match", "make_scheduler"),
    [
        (TypeError, "returned a NoneType, which is no scheduler", lambda opt, _: None),
        (TypeError, "no scheduler, but an empty list", lambda opt, _: []),
        (TypeError, "returned a object, which is no scheduler", lambda opt, _: [SCHEDULERS["StepLR"](opt), object()]),
        (TypeError, "ReduceLROnPlateau needs a metric", lambda opt, _: SCHEDULERS["ReduceLROnPlateau"](opt)),
        (
            ValueError,
            r"cannot be stepped to step 12 of steps=20: Tried to step 12 times",
            lambda opt, _: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=11),
        ),
        (
            ValueError,
            r"sets lr of group 0 to nan at step 4 of steps=20; it must be finite and not negative",
            lambda opt, _: lr_scheduler.LambdaLR(opt, lambda t: math.nan if t == 4 else 1.0),
        ),
        (
            ValueError,
            r"sets lr of group 1 to inf at step 0 ",
            lambda opt, _: lr_scheduler.LambdaLR(opt, [lambda t: 1.0, lambda t: math.inf]),
        ),
        (
            ValueError,
            r"sets lr of group 1 to -0.03 at step 7 ",
            lambda opt, _: lr_scheduler.LambdaLR(opt, [lambda t: 1.0, lambda t: -1.0 if t == 7 else 1.0]),
        ),
        (ZeroDivisionError, "division by zero", lambda opt, _: lr_scheduler.LambdaLR(opt, lambda t: 1 / (t - 5))),
        (KeyError, "mine", lambda opt, _: {}["mine"]),
    ],
)
def test_what_cannot_be_unrolled_is_refused_and_changes_nothing(kind, match, make_scheduler):
    refused(kind, match, make_scheduler)


@pytest.mark.parametrize("name", ["OneCycleLR", "SWALR", "ExponentialLR"])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_scheduler_of_the_true_optimizer_is_refused_and_undone(name, rate):
    """`lambda opt: OneCycleLR(optimizer, ...)` has written into the optimizer's groups by then."""

    def make(params):
        return torch.optim.SGD([{**group, "lr": copy.copy(rate)} for group in params], momentum=0.9, foreach=False)

    match = r"belongs to another optimizer \(of type SGD\).*lambda opt: OneCycleLR\(opt"
    refused(ValueError, match, lambda opt, true: SCHEDULERS[name](true), make=make)
    refused(ValueError, match, lambda opt, true: [SCHEDULERS[name](opt), SCHEDULERS[name](true)], make=make)


def test_a_scheduler_in_place_of_a_function_is_refused():
    optimizer = made()
    scheduler = SCHEDULERS["StepLR"](optimizer)
    with pytest.raises(TypeError, match=r"make_scheduler is a StepLR; give a function .* lambda opt:"):
        unroll(optimizer.param_groups, optimizer.defaults, scheduler, STEPS)


class _Flips(lr_scheduler.LRScheduler):
    key, value = "nesterov", True

    def get_lr(self):
        if self.last_epoch == 3:
            self.optimizer.param_groups[1][self.key] = self.value
        return self.base_lrs


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("nesterov", True, "changes nesterov of group 1 from False to True; only numbers"),
        ("momentum", None, "sets momentum of group 1 to None at step 3 of steps=20; it must be finite and not neg"),
        ("momentum", (0.9, 0.8), r"sets momentum of group 1 to \(0.9, 0.8\) at step 3, from 0.9; a number must stay"),
        ("momentum", -0.5, "sets momentum of group 1 to -0.5 at step 3"),
        ("dampening", math.nan, "sets dampening of group 1 to nan at step 3 of steps=20; it must be finite"),
    ],
)
def test_what_no_table_holds_is_refused(key, value, match):
    refused(ValueError, match, lambda opt, _: type("_Odd", (_Flips,), {"key": key, "value": value})(opt))


def test_a_beta_of_one_is_refused():
    refused(
        ValueError,
        r"sets betas of group 0 to \(1.0, 0.999\) at step 0 .* in \[0, 1\)",
        lambda opt, _: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=STEPS, max_momentum=1.0),
        make=FUSED["adam"],
    )


def test_nothing_here_warns():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in UNROLLABLE:
            rows_of(made(), UNROLLABLE[name])
    assert not caught
