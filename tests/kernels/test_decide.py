"""The decision alone: verdicts from outside and from other devices, votes, and more of everything than one block."""

import pytest
import torch

from mpengine import reference, rules
from mpengine.kernels import launch, layout
from mpengine.masters import DeviceSchedule
from tests.kernels.harness import (
    DEVICE,
    Grad,
    Problem,
    Spec,
    assert_same,
    assert_same_decision,
    assert_same_partials,
    build,
    check,
    run_inspect,
)

NAN = float("nan")
CPU = torch.device("cpu")


def decide_both(problem, found=None, partials=None, family="own", votes=True, schedule=None, taken=0):
    """Reference and kernel on a problem whose gradients were inspected; `found` and `partials` may replace theirs."""
    expected, actual = build(problem, CPU), build(problem, DEVICE)
    for world, module in ((expected, reference), (actual, launch)):
        world.table.counts[layout.TAKEN] = taken
        run_inspect(world, module)
        table = world.table
        on_device = None if schedule is None else DeviceSchedule(*(t.to(table.found.device) for t in schedule))
        module.decide(
            table,
            world.sources,
            table.found[None] if found is None else found.to(table.found.device),
            table.partials if partials is None else partials.to(table.found.device),
            world.hyper,
            world.max_norm,
            world.family if family == "own" else family,
            world.found_inf,
            world.votes if votes else None,
            on_device,
        )
    assert_same_partials(expected, actual)
    assert_same_decision(expected, actual)
    assert_same(expected, actual)
    return actual.table


@pytest.mark.parametrize(("found_inf", "skips"), [(0.0, False), (-0.0, False), (1.0, True), (-1.0, True), (NAN, True)])
def test_a_verdict_from_outside(found_inf, skips):
    tensors = (Spec((5,), grads=(Grad(0), Grad(1))),)
    world = check(Problem(tensors, scales=(2.0, 4.0), found_inf=found_inf, max_norm=1.0))
    assert world.table.counts.tolist() == ([0, 2] if skips else [2, 0])
    outcome = layout.OVERFLOW if skips else layout.CLEAN
    assert world.votes.tolist() == [[outcome, 2.0], [outcome, 4.0]]


@pytest.mark.parametrize("overflows", [False, True])
def test_votes(overflows):
    kinds = (layout.ABSENT, layout.FRESH, layout.STALE, layout.STALE)
    tensors = (Spec((9,), grads=(Grad(1), Grad(2), Grad(3))),)
    problem = Problem(tensors, scales=(5.0, 6.0, 7.0, None), kinds=kinds)
    if overflows:
        problem = problem.with_spikes(0, 1, (3, NAN))
    votes = check(problem, steps=1).votes.tolist()
    stale = layout.STALE_OVERFLOW if overflows else layout.NO_VOTE
    assert votes == [[layout.NO_VOTE, 5.0], [layout.CLEAN, 6.0], [stale, 7.0], [layout.NO_VOTE, 0.0]]


@pytest.mark.parametrize("guilty", [None, (0, 0), (1, 2), (2, 1)])
def test_any_device_may_have_found_an_overflow(guilty):
    problem = Problem((Spec((5,), grads=(Grad(0), Grad(1), Grad(2))),), scales=(2.0, 4.0, 8.0), max_norm=1.0)
    found = torch.zeros(3, 3, dtype=torch.int32)
    if guilty:
        found[guilty] = 1  # this attempt
    found[2, 2] = 7  # another attempt's number
    table = decide_both(problem, found)
    assert table.decision[layout.SKIP] == (guilty is not None)


def test_more_devices_losses_and_partial_sums_than_a_block_holds():
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(Spec((3,), grads=(Grad(k),)) for k in (0, 599))
    problem = Problem(tensors, scales=(2.0,) * 600, max_norm=1.0)
    found = torch.zeros(2, 600, dtype=torch.int32)
    partials = torch.rand(9001, generator=generator, dtype=torch.float64)
    decide_both(problem, found, partials)
    found[1, 599] = 1
    assert decide_both(problem, found, partials).counts.tolist() == [0, 1]


def test_no_partial_sums():
    assert decide_both(Problem(()), partials=torch.zeros(0, dtype=torch.float64)).decision[layout.NORM] == 0.0


def test_more_tensors_than_a_block_holds():
    groups = ({"betas": (0.9, 0.999)}, {"betas": (0.5, 0.9), "lr": 3e-4, "weight_decay": 0.1})
    tensors = tuple(Spec((int(i % 50 == 1),), grads=(Grad(),) if i % 3 else (), group=i % 2) for i in range(1100))
    world = check(Problem(tensors, torch.optim.AdamW, groups), steps=1)
    assert world.table.steps.tolist() == [int(i % 3 != 0) for i in range(1100)]


@pytest.mark.parametrize("steps", [1, 2, 3, 1000, 65535, 2**20 + 1, 2**31 - 2])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD], ids=lambda o: o.__name__)
def test_scalars_at_any_step(steps, optimizer):
    """Bias corrections from the first step to the last that an int32 counts."""
    problem = Problem((Spec((3,)), Spec((2,), grads=()), Spec((1,))), optimizer, ({"lr": 0.0}, {"lr": 0.1}))
    expected, actual = build(problem, CPU), build(problem, DEVICE)
    for world, module in ((expected, reference), (actual, launch)):
        world.table.steps.copy_(torch.tensor([steps - 1, 0, 5]))
        table = world.table
        module.decide(
            table, world.sources, table.found[None], table.partials, world.hyper, world.max_norm, world.family
        )
    assert actual.table.steps.tolist() == [steps, 0, 6]
    assert torch.equal(expected.table.scalars.isnan(), actual.table.scalars.cpu().isnan())
    assert torch.equal(expected.table.scalars.nan_to_num(), actual.table.scalars.cpu().nan_to_num())


def test_without_a_family_the_scalars_stay():
    table = decide_both(Problem((Spec((5,)),)), family=None)
    assert table.scalars.isnan().all()
    assert table.steps.tolist() == [1]


def test_without_votes_nobody_votes():
    decide_both(Problem((Spec((5,)),)), votes=False)


def test_equal_gradients_have_equal_norms_in_every_run():
    problem = Problem((Spec((50000,)),), max_norm=1.0)
    first, second = (decide_both(problem).decision for _ in range(2))
    assert torch.equal(first, second)


def schedule_of(columns, rows, groups, start=0):
    """Random values for these hyperparameters, in the order given."""
    generator = torch.Generator().manual_seed(len(columns))
    plan = torch.full((layout.SCHEDULE,), -1, dtype=torch.int64)
    plan[:4] = torch.tensor([rows, start, len(columns), groups])
    for place, column in enumerate(columns):
        plan[layout.SCHEDULE_COLUMN + column] = place
    return DeviceSchedule(plan, torch.rand(rows, groups, len(columns), generator=generator, dtype=torch.float64))


SCHEDULED = Problem(
    tuple(Spec((3,), grads=(Grad(),) if i else (), group=i % 3) for i in range(7)),
    torch.optim.AdamW,
    ({}, {"lr": 0.5, "betas": (0.5, 0.9)}, {"lr": 2.0}),
)


@pytest.mark.parametrize("columns", [(0,), (0, 1), (2, 0), (4,), ()], ids=str)
@pytest.mark.parametrize(("taken", "row"), [(0, 0), (3, 3), (4, 4), (5, 4), (2**31 - 3, 4)])
def test_a_schedule_gives_the_row_of_the_steps_taken(columns, taken, row):
    schedule = schedule_of(columns, rows=5, groups=3)
    table = decide_both(SCHEDULED, schedule=schedule, taken=taken)
    assert table.counts.tolist() == [taken + 1, 0]
    if columns == (0,):  # lr / bias_correction1 of a tensor in its first step, group 2
        lr = schedule.values[row, 2, 0]
        assert float(table.scalars[2, 7]) == pytest.approx(float(lr / (1 - 0.9)), rel=1e-6)


@pytest.mark.parametrize(("start", "row"), [(0, 7), (7, 0), (9, 0), (3, 4), (-100, 4), (2**40, 0), (-(2**40), 4)])
def test_a_schedule_may_begin_at_any_step(start, row):
    schedule = schedule_of((0,), rows=5, groups=3, start=start)
    table = decide_both(SCHEDULED, schedule=schedule, taken=7)
    lr = schedule.values[min(row, 4), 1, 0]
    assert float(table.scalars[1, 7]) == pytest.approx(float(lr / (1 - 0.5)), rel=1e-6)


def test_a_skipped_step_leaves_the_row_to_the_next():
    schedule = schedule_of((0,), rows=5, groups=3)
    problem = SCHEDULED.with_spikes(1, 0, (2, NAN))
    table = decide_both(problem, schedule=schedule, taken=2)
    assert table.counts.tolist() == [2, 1]


def test_a_family_by_its_name_alone():
    assert set(reference.SCALAR_FUNCTIONS) == set(launch.SCALAR_FUNCTIONS)
    assert set(reference.RULES) == set(launch.RULES)
    assert {rule.name for rule in vars(rules).values() if isinstance(rule, rules.Rule)} <= set(launch.RULES)
