"""The CPU path against the reference, bit for bit: any number of threads, block borders, errors, forks."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mpengine
from mpengine import backend, cpu, cpu_blocks, cpu_rules, reference, rules, workers
from mpengine.kernels import layout
from tests.kernels.harness import (
    BRAIN,
    CPU,
    HALF,
    SINGLE,
    Grad,
    Problem,
    Spec,
    assert_same,
    assert_same_partials,
    build,
    run_decide,
    run_inspect,
    run_update,
)
from tests.kernels.test_random import NO_DEADLINE, problems

INF, NAN = float("inf"), float("nan")
BLOCK = cpu_blocks.BLOCK


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(problem, steps=2, module=cpu):
    """Reference and CPU path side by side; norm and clip are equal too."""
    expected, actual = build(problem, CPU), build(problem, CPU)
    for _ in range(steps):
        for run in (run_inspect, run_decide, run_update):
            run(expected, reference)
            run(actual, module)
            assert_same_partials(expected, actual)
            assert_same(expected, actual)
    return actual


def small_blocks(monkeypatch, chunks=1):
    """Blocks of a few chunks, so that a small problem has many."""
    monkeypatch.setattr(cpu_blocks, "BLOCK", chunks * layout.INSPECT_CHUNK)


@settings(max_examples=150, derandomize=True, **NO_DEADLINE)
@given(problems(), st.sampled_from([1, 2, 3]))
def test_random_problems(problem, number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        check(problem)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1])
def test_block_borders(dtype, size, threads):
    specs = (Spec((size,), dtype, (Grad(0, dtype),)), Spec((3,)), Spec((0,)), Spec((size,), misaligned=True))
    check(Problem(specs, max_norm=1.0))


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
EVERY_RULE = [
    *((cls, group) for cls in (SGD, ADAM, ADAMW) for group in ({}, {"weight_decay": 0.1}, {"maximize": True})),
    (SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    *((cls, {"amsgrad": True, "weight_decay": 0.1}) for cls in (ADAM, ADAMW)),
    *((cls, {"betas": (beta1, 0.99), "maximize": True}) for cls in (ADAM, ADAMW) for beta1 in (0.0, 0.3)),
]


@pytest.mark.parametrize(("optimizer", "group"), EVERY_RULE, ids=str)
def test_every_rule(optimizer, group, threads, monkeypatch):
    small_blocks(monkeypatch)
    specs = tuple(
        Spec((n,), dtype, (Grad(0, grad),), misaligned=odd)
        for n, dtype, grad, odd in [
            (40000, HALF, HALF, False),
            (50, SINGLE, SINGLE, True),
            (17000, BRAIN, SINGLE, True),
        ]
    )
    for max_norm in (INF, 1.0):
        check(Problem(specs, optimizer, (group,), max_norm=max_norm), steps=3)


def test_many_tiny_tensors(threads):
    check(Problem(tuple(Spec((n % 97,), group=n % 2) for n in range(700)), groups=({}, {"lr": 0.1}), max_norm=1.0))


def test_a_pack_holds_only_what_the_same_numbers_step(threads):
    """Types, losses, groups, idle tensors and step counts: side by side only where all of it is equal."""
    few = (
        Spec((1000,)),
        Spec((31,), BRAIN, (Grad(0, SINGLE),)),
        Spec((1025,), SINGLE, (Grad(1, SINGLE, misaligned=True),), misaligned=True),
        Spec((7, 3, 5, 2), grads=(Grad(1),), channels_last=True),
        Spec((9,), grads=()),
        Spec((0,)),
        Spec((64,), grads=(Grad(0), Grad(1))),
        Spec((16384,), group=1),
        Spec((12,), BRAIN, (Grad(1, BRAIN),), group=1),
    )
    groups = ({"weight_decay": 0.1}, {"lr": 0.1, "amsgrad": True})
    problem = Problem(few * 5, ADAM, groups, scales=(1024.0, 3.0), max_norm=1.0)
    expected, actual = build(problem, CPU), build(problem, CPU)
    for world in (expected, actual):
        world.table.steps[::4] = 7  # the tensors of a group need not have the same scalars
    for _ in range(2):
        for run in (run_inspect, run_decide, run_update):
            run(expected, reference)
            run(actual, cpu)
            assert_same(expected, actual)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("guilty", [0, 5, 39])
def test_an_overflow_in_one_tensor_of_a_pack(dtype, guilty, threads):
    specs = tuple(Spec((31 + n,), dtype, (Grad(0, dtype),)) for n in range(40))
    world = check(Problem(specs).with_spikes(guilty, 0, (30, NAN)), steps=1)
    assert world.table.stamps[:, 0].nonzero().tolist() == [[guilty]]


@pytest.mark.parametrize("scales", [(1024.0, 3.0, 0.1), (2.0**-126, None, 2.0**40)], ids=str)
def test_several_sources(scales, threads, monkeypatch):
    small_blocks(monkeypatch, 2)
    grads = (Grad(0), Grad(1, SINGLE, misaligned=True), Grad(2, BRAIN))
    check(Problem((Spec((BLOCK // 2 + 77,), grads=grads), Spec((5,), grads=grads[1:])), scales=scales, max_norm=1.0))


def test_channels_last(threads):
    check(Problem((Spec((5, 7, 11, 13), channels_last=True), Spec((5, 7, 11, 13))), max_norm=1.0))


@pytest.mark.parametrize(
    "scale", [2.0**k for k in (-126, -61, -60, -59, -16, 0, 59, 60, 61, 120)] + [3.0, None], ids=str
)
@pytest.mark.parametrize("max_norm", [INF, 1.0, 1e-30], ids=str)
def test_one_factor_for_scale_and_clip_only_where_it_is_exact(scale, max_norm):
    """Subnormals and the largest numbers of every type, at scales on both sides of the limits."""
    spikes = ((0, 2.0**-24), (1, -(2.0**-24)), (2, 65504.0), (3, 2.0**-14), (4, -0.0), (5, 0.0))
    for dtype in (HALF, BRAIN, SINGLE):
        specs = (Spec((3000,), HALF, (Grad(0, dtype, spikes=spikes),)),)
        for magnitude in (1e-6, 100.0):
            check(Problem(specs, scales=(scale,), max_norm=max_norm, magnitude=magnitude))


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("where", [0, -1])
def test_an_overflow_in_one_block_only(value, block, where, threads, monkeypatch):
    small_blocks(monkeypatch, 2)
    size = 3 * cpu_blocks.BLOCK + 5
    position = min(block * cpu_blocks.BLOCK + where % cpu_blocks.BLOCK, size - 1)
    world = check(Problem((Spec((3,)), Spec((size,)), Spec((9,)))).with_spikes(1, 0, (position, value)))
    assert world.table.counts.tolist() == [0, 2]
    assert (world.table.stamps > 0).flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [INF, -INF, NAN, 0.0, -0.0])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.9999])
def test_signs_of_zeros_and_masters_that_are_not_finite(value, beta1):
    """`g + p * 0.0` is not left out where it would be seen: in NaN, and in the sign of a zero."""
    problem = Problem((Spec((64,)), Spec((64,), SINGLE)), groups=({"betas": (beta1, 0.9)},), rule=rules.ADAM)
    for other in (0.0, -0.0, 1.0, -1.0):
        worlds = build(problem, CPU), build(problem, CPU)
        for world, module in zip(worlds, (reference, cpu), strict=True):
            for entry, (source,) in zip(world.table.entries, world.sources.entries, strict=True):
                entry.master[:8] = value
                for j, x in enumerate((0.0, -0.0, 1.0, -1.0)):
                    source.grad[j::4] = x
                entry.slots[0][4:40] = other
            for _ in range(2):
                run_inspect(world, module)
                run_decide(world, module)
                run_update(world, module)
        assert_same(*worlds)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    small_blocks(monkeypatch)
    problem = Problem(tuple(Spec((n,)) for n in (70000, 1, 20000, 16384)), max_norm=1.0)
    before, partials = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 8):
            torch.set_num_threads(number)
            partials.append(check(problem).table.partials.clone())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(partials[0], other) for other in partials)


# Threads.


def test_units_are_shared_among_the_threads(threads):
    seen = []
    barrier = threading.Barrier(threads)

    def work(unit):
        barrier.wait(timeout=30)  # passes only if so many threads work at once
        seen.append((unit, threading.get_ident()))

    workers.run(work, list(range(threads)))
    assert sorted(unit for unit, _ in seen) == list(range(threads))
    assert len({thread for _, thread in seen}) == threads


def test_no_more_units_than_needed(monkeypatch):
    """Many small tensors are few units, one large tensor several; idle and empty tensors none."""
    specs = [Spec((1024,))] * 1000 + [Spec((3 * BLOCK,)), Spec((0,)), Spec((1024,), grads=())]
    world = build(Problem(tuple(specs)), CPU)
    units = cpu_blocks.units_of(world.table, world.sources, range(len(specs)), lambda i: None)
    assert [len(unit) for unit in units] == [cpu_blocks.PACK // 1024] * 32 + [8, 1, 1, 1]
    assert sum(block.stop - block.start for unit in units for block in unit) == 1000 * 1024 + 3 * BLOCK


def test_an_error_in_a_worker_is_raised_when_all_have_stopped(threads):
    running = []

    def work(unit):
        running.append(unit)
        if unit == 2:
            raise ValueError("unit 2")
        running.remove(unit)

    with pytest.raises(ValueError, match="unit 2"):
        workers.run(work, list(range(1000)))
    assert running == [2]
    seen = []
    workers.run(seen.append, list(range(10)))  # the threads live on
    assert sorted(seen) == list(range(10))


def test_a_rule_that_fails_changes_nothing(threads):
    def fails(p, g, slots, c):
        raise ZeroDivisionError("in a rule")

    world = build(Problem((Spec((20000,)),), rule=rules.Rule("failing", fails, ("exp_avg",))), CPU)
    run_inspect(world, cpu)
    run_decide(world, cpu)
    before = copy.deepcopy(world.buffers)
    with pytest.raises(ZeroDivisionError, match="in a rule"):
        run_update(world, cpu)
    assert all(torch.equal(before[name], now) or name == "scalars" for name, now in world.buffers.items())


def stepped(optimizer, params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    optimizer.step()
    return [p.detach().clone() for p in params]


def make(sizes=(3, BLOCK + 7)):
    params = [nn.Parameter(torch.linspace(-1, 1, size).half()) for size in sizes]
    return mpengine.MixedPrecisionOptimizer(torch.optim.AdamW(params, lr=0.1), max_grad_norm=1.0), params


def test_two_optimizers_may_step_from_two_threads(threads):
    expected = [stepped(*make(), seed=seed) for seed in range(4)]
    found = {}

    def steps(seeds):
        for seed in seeds:
            found[seed] = stepped(*make(), seed=seed)

    both = [threading.Thread(target=steps, args=(seeds,)) for seeds in ((0, 1), (2, 3))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for seed, params in enumerate(expected):
        assert all(torch.equal(a, b) for a, b in zip(params, found[seed], strict=True))


def test_copies_step_alike(threads):
    optimizer, params = make()
    stepped(optimizer, params)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = copied.param_groups[0]["params"]
        there = stepped(copied, theirs, seed=1)
        again, mine = make()
        stepped(again, mine)
        assert all(torch.equal(a, b) for a, b in zip(stepped(again, mine, seed=1), there, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_child_of_a_fork_steps_with_threads_of_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        workers.run(len, ["a", "b"])  # the parent has its threads
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                seen: list[int] = []
                barrier = threading.Barrier(2)
                workers.run(lambda unit: (barrier.wait(30), seen.append(unit)), [0, 1])
                os.write(write, b"good" if sorted(seen) == [0, 1] else b"bad!")
            finally:
                os._exit(0)
        os.close(write)
        assert os.read(read, 4) == b"good"
        os.waitpid(child, 0)
    finally:
        torch.set_num_threads(before)


def test_the_cpu_path_is_chosen():
    assert backend.of(CPU) is cpu


def test_what_a_thread_keeps_is_small():
    """However large the tensors: two rows of a block, or the rows of a pack."""
    assert cpu_blocks.buffers.take(2, BLOCK).nbytes == 4 << 20
    assert cpu_blocks.buffers.take(cpu_blocks.ROWS, cpu_blocks.PACK).nbytes <= 1 << 20


# Sabotage: the comparison must notice each of these.


def _sabotaged(**functions):
    return SimpleNamespace(**{"inspect": cpu.inspect, "decide": cpu.decide, "update": cpu.update} | functions)


PROBLEM = Problem((Spec((1025,)), Spec((40,), SINGLE)), max_norm=1.0)


@pytest.mark.parametrize("function", ["inspect", "decide", "update"])
def test_a_call_left_out_is_noticed(function):
    check(PROBLEM)
    with pytest.raises(AssertionError):
        check(PROBLEM, module=_sabotaged(**{function: lambda *_: None}))


def test_a_rule_that_rounds_once_less_is_noticed(monkeypatch):
    def contracted(p, g, slots, c, t):
        kept = slots[0].astype(np.float64) + (g - slots[0]) * np.float64(c[3])
        cpu_rules.adam(p, g, slots, c, t)
        slots[0][:] = kept

    monkeypatch.setitem(cpu.RULES, "adam", contracted)
    with pytest.raises(AssertionError, match="differ"):
        check(PROBLEM)


def test_two_factors_taken_for_one_are_noticed(monkeypatch):
    monkeypatch.setattr(cpu_blocks.Reading, "takes", lambda self, clip: True)
    with pytest.raises(AssertionError, match="differ"):
        check(replace(PROBLEM, scales=(3.0,)))


def test_a_decay_left_out_is_noticed(monkeypatch):
    """Of a master that is not finite, by whoever believes that all are."""
    monkeypatch.setattr(cpu_rules, "_is_finite", lambda x: True)
    with pytest.raises(AssertionError, match="differ"):
        test_signs_of_zeros_and_masters_that_are_not_finite(INF, 0.9)
