"""`optimizer.schedule`: the step follows a torch scheduler by the steps taken, and skips do not advance it."""

import copy
import pickle
import re

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR, StepLR

from mpengine import backend, cpu, reference
from tests import harness
from tests.harness import HALF, SINGLE, same_bits

STEPS = 12
SKIPS = (0, 3, 4, 9)  # the very first attempt too
SCALE = 8.0

MAKERS = {
    "exponential": lambda opt: ExponentialLR(opt, 0.7),
    "one cycle": lambda opt: OneCycleLR(opt, max_lr=0.05, total_steps=STEPS),
    "two groups": lambda opt: LambdaLR(opt, [lambda t: 1 / (1 + t), lambda t: 1.0 + t]),
    "chained": lambda opt: [StepLR(opt, 2, 0.5), ExponentialLR(opt, 0.9)],
}
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=False),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=False),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, foreach=False),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01, foreach=False),  # the general path
}


def groups_of(params):
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]


def wrapped(make=OPTIMIZERS["adamw"], seed=0):
    params = harness.parameters((HALF, SINGLE), seed)
    scaler = harness.static_scaler(SCALE)
    return params, harness.MixedPrecisionOptimizer(make(groups_of(params)), scaler), scaler


def scaled(params, seed, overflow=False):
    grads = harness.gradients(params, seed)
    grads = [(grad.float() * SCALE).to(grad.dtype) for grad in grads]
    if overflow:
        grads[1][0] = torch.inf
    return grads


def run(optimizer, scaler, params, attempts, skips=SKIPS):
    for t in attempts:
        harness.fed(optimizer, scaler, scaled(params, t, t in skips))


def constant_twin(make, params, rows, seeds):
    """A wrapper of its own whose groups are set by hand to `rows` before each step that is taken."""
    own, optimizer, scaler = wrapped(make)
    for row, seed in zip(rows, seeds, strict=True):
        for group, values in zip(optimizer.param_groups, row, strict=True):
            group.update(values)
        harness.fed(optimizer, scaler, scaled(params, seed))
    return own, optimizer


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
def test_equals_setting_the_values_by_hand_where_steps_are_taken(make, maker):
    """Bitwise, skips and all; and the values are torch's own."""
    params, optimizer, scaler = wrapped(make)
    optimizer.schedule(maker, steps=STEPS)
    plain = make(groups_of(harness.twins_of(params)))
    schedulers = maker(plain)
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    rows, seeds = [], []
    for t in range(STEPS):
        now = optimizer.scheduled()
        keys = now[0]
        assert now == [{key: group[key] for key in keys} for group in plain.param_groups]
        run(optimizer, scaler, params, [t])
        if t not in SKIPS:
            rows.append(now)
            seeds.append(t)
            plain.step()
            for scheduler in schedulers:
                scheduler.step()
    assert optimizer.steps_skipped == len(SKIPS)
    own, twin = constant_twin(make, params, rows, seeds)
    assert same_bits(params, own)
    assert same_bits(list(optimizer.master_params()), list(twin.master_params()))


def test_a_schedule_that_counts_attempts_is_noticed(monkeypatch):
    def hasty(hyper, schedule, taken):
        return original(hyper, schedule, taken + 1)

    original = reference._scheduled
    monkeypatch.setattr(reference, "_scheduled", hasty)
    with pytest.raises(AssertionError):
        test_equals_setting_the_values_by_hand_where_steps_are_taken(OPTIMIZERS["adamw"], MAKERS["exponential"])


def test_the_last_row_holds_and_start_moves_the_first():
    params, optimizer, scaler = wrapped()
    run(optimizer, scaler, params, range(2), skips=())
    optimizer.schedule(lambda opt: ExponentialLR(opt, 0.5), steps=3, start=4)
    seen = []
    for t in range(2, 10):
        seen.append(optimizer.scheduled()[0]["lr"])
        run(optimizer, scaler, params, [t], skips=())
    assert seen == [0.01, 0.01, 0.01, 0.005, 0.0025, 0.0025, 0.0025, 0.0025]


def test_groups_keep_their_own_values_and_get_them_back():
    params, optimizer, scaler = wrapped(OPTIMIZERS["adamax"])
    optimizer.schedule(lambda opt: ExponentialLR(opt, 0.5), steps=3)
    run(optimizer, scaler, params, range(3), skips=())
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.02]
    optimizer.schedule(None)
    assert optimizer.scheduled() == [{"lr": 0.01}, {"lr": 0.02}]
    run(optimizer, scaler, params, range(3), skips=())
    assert optimizer.steps_taken == 6


def test_unscheduled_hyperparameters_are_still_read_from_the_groups():
    results = []
    for value in (0.0, 0.5):
        params, optimizer, scaler = wrapped()
        optimizer.schedule(MAKERS["exponential"], steps=STEPS)
        run(optimizer, scaler, params, range(2), skips=())
        optimizer.param_groups[0]["weight_decay"] = value
        run(optimizer, scaler, params, range(2, 4), skips=())
        results.append(params)
    assert not same_bits(results[0][:3], results[1][:3])
    assert same_bits(results[0][3:], results[1][3:])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_setting_what_is_scheduled_is_refused_before_anything_changes(make):
    params, optimizer, scaler = wrapped(make)
    optimizer.schedule(MAKERS["exponential"], steps=STEPS)
    run(optimizer, scaler, params, range(2), skips=())
    optimizer.param_groups[1]["lr"] = 0.5
    before = harness.snapshot(optimizer)
    harness.feed(params, scaled(params, 5))
    with pytest.raises(RuntimeError, match=re.escape("lr of group 1 was set to 0.5 while optimizer.schedule")):
        optimizer.step()
    assert harness.snapshot(optimizer) == before
    optimizer.param_groups[1]["lr"] = 0.02
    optimizer.step()


def test_another_scheduler_beside_it_is_refused():
    params, optimizer, scaler = wrapped()
    other = StepLR(optimizer, 1)
    optimizer.schedule(MAKERS["exponential"], steps=STEPS)
    run(optimizer, scaler, params, [0], skips=())
    other.step()
    harness.feed(params, scaled(params, 5))
    with pytest.raises(RuntimeError, match="an LR scheduler beside it is one too many"):
        optimizer.step()


def test_a_new_group_asks_for_a_new_schedule():
    params, optimizer, scaler = wrapped()
    optimizer.schedule(MAKERS["exponential"], steps=STEPS)
    run(optimizer, scaler, params, [0], skips=())
    new = torch.nn.Parameter(torch.ones(3).half())
    optimizer.add_param_group({"params": [new]})
    harness.feed([*params, new], scaled([*params, new], 1))
    with pytest.raises(RuntimeError, match="scheduled with 2 param groups and has 3 now"):
        optimizer.step()
    optimizer.schedule(MAKERS["exponential"], steps=STEPS, start=1)
    assert [row["lr"] for row in optimizer.scheduled()] == [0.01, 0.02, 0.01]
    optimizer.step()
    scaler.update()
    assert optimizer.scheduled()[2]["lr"] == 0.01 * 0.7


@pytest.mark.parametrize("again", [False, True])
def test_resuming_goes_on_at_the_row_of_the_steps_taken(again):
    params, optimizer, scaler = wrapped()
    optimizer.schedule(MAKERS["one cycle"], steps=STEPS)
    run(optimizer, scaler, params, range(5))
    saved = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
    run(optimizer, scaler, params, range(5, STEPS))
    params2, optimizer2, scaler2 = wrapped(seed=1)
    if not again:
        optimizer2.schedule(MAKERS["one cycle"], steps=STEPS)
    optimizer2.load_state_dict(saved[0])
    with torch.no_grad():
        for param, value in zip(params2, saved[1], strict=True):
            param.copy_(value)
    if again:
        optimizer2.schedule(MAKERS["one cycle"], steps=STEPS)
    run(optimizer2, scaler2, params2, range(5, STEPS))
    assert same_bits(params, params2)
    assert optimizer.scheduled() == optimizer2.scheduled()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_follows_too(copied):
    params, optimizer, scaler = wrapped()
    optimizer.schedule(MAKERS["one cycle"], steps=STEPS)
    run(optimizer, scaler, params, range(5))
    twin = copied(optimizer)
    assert twin.scheduled() == optimizer.scheduled()
    harness.started(twin.scaler)
    run(twin, twin.scaler, harness.params_of(twin), range(5, 8))
    run(optimizer, scaler, params, range(5, 8))
    assert same_bits(params, harness.params_of(twin))


def test_momentum_may_begin_at_the_schedules_value():
    """SGD without momentum of its own keeps a buffer once the schedule gives it one, as in torch."""
    params = harness.parameters((HALF,))
    scaler = harness.static_scaler(SCALE)
    optimizer = harness.MixedPrecisionOptimizer(torch.optim.SGD(params, lr=0.1), scaler)
    optimizer.schedule(MAKERS["one cycle"], steps=STEPS)
    assert optimizer.scheduled()[0]["momentum"] == pytest.approx(0.95)
    run(optimizer, scaler, params, range(3), skips=())
    assert all(state["momentum_buffer"].abs().sum() > 0 for state in optimizer.state.values())


def test_state_that_comes_and_goes_is_refused():
    def sometimes(opt):
        class Scheduler:
            optimizer = opt

            def step(self):
                opt.param_groups[0]["momentum"] = 0.5 - opt.param_groups[0]["momentum"]

        return Scheduler()

    params = harness.parameters((HALF,))
    optimizer = harness.MixedPrecisionOptimizer(torch.optim.SGD(params, lr=0.1), harness.static_scaler())
    with pytest.raises(
        ValueError, match=r"group 0 keeps the state \[\] at step 0, but \['momentum_buffer'\] at step 1"
    ):
        optimizer.schedule(sometimes, steps=3)
    assert optimizer.scheduled() == [{"lr": 0.1}]


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({}, ValueError, "needs steps="),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"steps": 3, "start": 1.5}, ValueError, "start is 1.5"),
    ],
)
def test_bad_arguments_change_nothing(kwargs, error, words):
    params, optimizer, scaler = wrapped()
    optimizer.schedule(lambda opt: CosineAnnealingLR(opt, 4), steps=4)
    run(optimizer, scaler, params, range(2), skips=())
    before = optimizer.scheduled()
    with pytest.raises(error, match=words):
        optimizer.schedule(MAKERS["exponential"], **kwargs)
    assert optimizer.scheduled() == before
    run(optimizer, scaler, params, [2], skips=())


def test_changing_the_schedule_keeps_the_record_of_steps():
    params, optimizer, scaler = wrapped()
    run(optimizer, scaler, params, range(5))
    counts = optimizer.steps_taken, optimizer.steps_skipped
    optimizer.schedule(MAKERS["exponential"], steps=3)
    assert (optimizer.steps_taken, optimizer.steps_skipped) == counts


def test_the_table_holds_only_what_moves():
    """8 bytes a step and group for each scheduled number: a million steps of lr take 8 MB."""
    _, optimizer, _ = wrapped()
    optimizer.schedule(MAKERS["one cycle"], steps=STEPS)
    plan, values = optimizer._timetable.tables(optimizer._family, optimizer.param_groups)
    assert values.shape == (STEPS, 2, 2)  # lr and beta1
    assert plan.tolist()[:4] == [STEPS, 0, 2, 2]
    assert backend.of(torch.device("cpu")) is cpu


def test_a_tensor_lr_is_read_only_where_it_may_have_changed():
    params = harness.parameters((HALF,))
    scaler = harness.static_scaler(SCALE)
    lr = torch.tensor(0.01)
    optimizer = harness.MixedPrecisionOptimizer(torch.optim.AdamW(params, lr=lr, capturable=False), scaler)
    optimizer.schedule(MAKERS["exponential"], steps=STEPS)
    run(optimizer, scaler, params, range(2), skips=())
    lr.fill_(0.01)  # a write that changes nothing
    run(optimizer, scaler, params, [2], skips=())
    lr.fill_(0.5)
    harness.feed(params, scaled(params, 5))
    with pytest.raises(RuntimeError, match="lr of group 0 was set to"):
        optimizer.step()
