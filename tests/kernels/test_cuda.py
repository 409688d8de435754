"""What only a GPU can show: no synchronisation, no recompilation, graphs, size. Not collected without one."""

from contextlib import contextmanager

import pytest
import torch
import triton

from mpengine import rules
from mpengine.kernels import launch, layout
from mpengine.masters import Entry, TensorTable
from mpengine.scaling import ScalePolicy
from mpengine.sources import Ballot, Source, SourceTable
from tests.kernels.harness import DEVICE, HALF, SINGLE, Grad, Problem, Spec, build, run_decide, run_inspect, run_update

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # it says so once

TENSORS = (Spec((70001,)), Spec((1025,), SINGLE), Spec((3,), grads=()))
PROBLEM = Problem(TENSORS, torch.optim.AdamW, max_norm=1.0)


def step(world):
    run_inspect(world, launch)
    run_decide(world, launch)
    run_update(world, launch)


def scaler_state(losses):
    policy = torch.tensor(ScalePolicy(growth_interval=1).row(), dtype=torch.float64, device=DEVICE)
    counters = torch.zeros(losses, layout.COUNTERS, dtype=torch.int32, device=DEVICE)
    return torch.full((losses,), 8.0, device=DEVICE), torch.zeros(losses, device=DEVICE), counters, policy


@contextmanager
def compilations():
    """Collects the names of what Triton compiles, or finds compiled on the disk, meanwhile."""
    names = []
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda src, **about: names.append(src.fn.__name__)
    try:
        yield names
    finally:
        triton.knobs.compilation.listener = before


@contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_does_not_synchronise():
    world = build(PROBLEM, DEVICE)
    scale, previous, counters, policy = scaler_state(1)
    step(world)
    launch.update_scale(scale, previous, counters, world.votes[None], policy)
    with no_synchronisation():
        step(world)
        launch.update_scale(scale, previous, counters, world.votes[None], policy)
    assert world.table.counts.tolist() == [2, 0]


def test_other_values_and_sizes_compile_nothing():
    step(build(PROBLEM, DEVICE))
    others = [
        Problem((*TENSORS, Spec((16,))), torch.optim.AdamW, ({"lr": 1.0, "betas": (0.1, 0.2)},), max_norm=2.0),
        Problem((Spec((1,)), Spec((16,), SINGLE)), torch.optim.Adam, scales=(None,)),
        Problem((Spec((16384 * 16,)), Spec((0,), SINGLE, (Grad(0, SINGLE),))), scales=(3.0,) * 16, max_norm=1.0),
    ]
    with compilations() as names:
        for problem in others[:2]:
            step(build(problem, DEVICE))
    assert names == []
    step(build(others[2], DEVICE))  # other kinds: may compile
    with compilations() as names:
        step(build(others[2], DEVICE))
    assert names == []


def test_other_numbers_of_losses_compile_no_new_scale_update():
    for losses in (1, 2, 16, 33):
        scale, previous, counters, policy = scaler_state(losses)
        votes = torch.ones(3, losses, layout.VOTE, device=DEVICE)
        with compilations() as names:
            launch.update_scale(scale, previous, counters, votes, policy)
        assert losses == 1 or names == []
        assert scale.tolist() == [16.0] * losses


def test_a_step_inside_a_graph():
    expected, world = build(PROBLEM, DEVICE), build(PROBLEM, DEVICE)
    step(build(PROBLEM, DEVICE))  # compiles outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(world)
    for _ in range(3):
        step(expected)
        graph.replay()
    assert world.table.counts.tolist() == [3, 0]
    for name, buffer in expected.buffers.items():
        bits = torch.int16 if buffer.element_size() == 2 else torch.int32
        assert torch.equal(buffer.view(bits), world.buffers[name].view(bits)), name


def test_the_norm_is_the_same_in_every_run():
    world = build(Problem((Spec((3_000_001,)),), max_norm=1.0), DEVICE)
    run_inspect(world, launch)
    first = world.table.partials.clone()
    for _ in range(20):
        run_inspect(world, launch)
        assert torch.equal(first, world.table.partials)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    count = 2**31 + 5000
    grad = torch.ones(count, dtype=HALF, device=DEVICE)
    master = torch.zeros(count, device=DEVICE)
    table = TensorTable([Entry(master, master, (), 0, rules.ASSIGN, write_back=False)], 1, DEVICE)
    sources = SourceTable(DEVICE)
    sources.set([[Source(grad, torch.tensor([4.0], device=DEVICE), 0)]], [Ballot(layout.FRESH)])
    nothing, no_limit = (
        torch.zeros(1, layout.HYPER).double().to(DEVICE),
        torch.tensor([float("inf")]).double().to(DEVICE),
    )
    launch.inspect(table, sources)
    launch.decide(table, sources, table.found[None], table.partials, nothing, no_limit, None)
    launch.update(table, sources, rules.ASSIGN, table.decision)
    assert float(table.partials.sum()) == count / 16
    assert bool((master == 0.25).all())
    grad[-1] = float("inf")
    launch.inspect(table, sources)
    assert table.stamps.tolist() == [[2]]


def test_tensors_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    other = torch.device("cuda:1")
    world = build(PROBLEM, other)
    step(world)
    assert world.table.counts.tolist() == [1, 0]
