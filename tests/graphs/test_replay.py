"""A captured iteration is the plain one bit for bit, whatever lies between; three times each: see conftest."""

import contextlib
import inspect

import pytest
import torch
from torch import nn

import mpengine
from mpengine import backend, sources, upload
from mpengine.graphs import GraphedIteration
from mpengine.kernels import layout
from tests.graphs.emulator import emulated
from tests.graphs.worlds import (
    WORLDS,
    adversaries,
    batch,
    clipped_weights,
    loss_of,
    seen,
    trajectory,
    two_losses_and_clipping,
    zeroing_first,
    zeroing_last,
)
from tests.harness import frozen


def assert_same(make, device, before=None, captures=1, replays=None, **kwargs):
    expected, _ = trajectory(make, device, False, before, **kwargs)
    found, train = trajectory(make, device, True, before, **kwargs)
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert a == b, f"call {i} differs"
    assert train.captures == captures
    assert replays is None or train.replays == replays
    return train


@pytest.mark.parametrize("make", WORLDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("look", [True, False], ids=["watched", "unwatched"])
def test_replays_are_the_plain_function_bit_for_bit(make, device, look):
    assert_same(make, device, look=look, replays=11)


def test_scales_move_and_overflows_skip(device):
    found, _ = trajectory(zeroing_last, device, True)
    again, _ = trajectory(zeroing_last, device, True, overflows=())
    assert found[5] == again[5]
    assert found[6] != again[6]
    world = zeroing_last(device)
    train = GraphedIteration(world.iteration, world.optimizer)
    for i in range(12):
        train(*batch(i, device, overflows=(6, 9)))
    assert (world.optimizer.steps_taken, world.optimizer.steps_skipped) == (10, 2)
    (state,) = world.scaler.statistics()
    assert (state.scale, state.overflows, state.growths) == (2.0**10, 2, 2)  # 3 clean, 3 clean, skip, 2 clean, skip, 2
    assert world.optimizer.overflowed_parameters()


BETWEEN = {
    "lr": lambda world, i: [group.update(lr=1e-2 / (i + 1)) for o in world.optimizers for group in o.param_groups],
    "betas": lambda world, i: world.optimizer.param_groups[0].update(betas=(0.5, 0.9)) if i == 8 else None,
    "max_grad_norm": lambda world, i: setattr(world.optimizer, "max_grad_norm", 0.1 if i % 2 else None),
    "growth_interval": lambda world, i: world.scaler.set_growth_interval(1) if i == 7 else None,
    "new_scale": lambda world, i: world.scaler.update(64.0) if i == 7 else None,
    "evaluation": lambda world, i: world.model[0](torch.zeros(1, 6, device=world.model[0].weight.device).half()),
    "model": lambda world, i: load_model(world) if i in (2, 7) else None,
    "weights": lambda world, i: shrink(world) if i in (1, 7, 8) else None,
}


def load_model(world):
    world.model.load_state_dict({k: v * 0.5 for k, v in world.model.state_dict().items()})


@torch.no_grad()
def shrink(world):
    for param in world.model.parameters():
        param.mul_(0.5)


@pytest.mark.parametrize("look", [True, False], ids=["watched", "unwatched"])
@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_done_between_replays_is_followed(name, device, look):
    assert_same(zeroing_last, device, BETWEEN[name], look=look, replays=11)


def test_a_scheduler_of_torch_is_followed(device):
    schedulers = {}

    def before(world, i):
        if i == 0:
            schedulers[world.optimizer] = torch.optim.lr_scheduler.StepLR(world.optimizer, 1, 0.7)
        else:
            schedulers[world.optimizer].step()

    assert_same(zeroing_last, device, before, replays=11)


def test_a_schedule_is_followed_by_the_steps_taken(device):
    def before(world, i):
        if i == 0:
            world.optimizer.schedule(
                lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20), steps=20
            )

    assert_same(zeroing_last, device, before, replays=11)


def test_a_schedule_that_is_replaced_makes_it_capture_again(device):
    def before(world, i):
        if i == 7:
            world.optimizer.schedule(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2), steps=20)

    assert_same(zeroing_last, device, before, captures=2, replays=4 + 4)


def test_lr_may_not_be_set_under_a_schedule(device):
    world = zeroing_last(device)
    world.optimizer.schedule(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2), steps=20)
    train = GraphedIteration(world.iteration, world.optimizer)
    for i in range(6):
        train(*batch(i, device))
    world.optimizer.param_groups[0]["lr"] = 3.0
    before = seen(world)
    with pytest.raises(RuntimeError, match=r"lr of group 0 was set to 3\.0"):
        train(*batch(6, device))
    assert seen(world) == before


@pytest.mark.parametrize("make", [zeroing_last, zeroing_first, adversaries], ids=lambda make: make.__name__)
def test_the_plain_function_may_be_called_before_between_and_after(make, device):
    def before(world, i):
        if i == 0:  # before anything: the tables are there, and gradients may be left
            world.iteration(*batch(99, device))

    assert_same(make, device, before, eager=(1, 5, 8, 9, 13), replays=6)


def test_a_checkpoint_loaded_between_replays_resumes_bit_for_bit(device):
    saved = {}

    def before(world, i):
        if i == 5:
            saved["model"] = {k: v.clone() for k, v in world.model.state_dict().items()}
            saved["optimizer"] = copy_of(world.optimizer.state_dict())
            saved["scaler"] = world.scaler.state_dict()
        if i == 8:
            world.model.load_state_dict(saved["model"])
            world.optimizer.load_state_dict(saved["optimizer"])
            world.scaler.load_state_dict(saved["scaler"])

    train = assert_same(zeroing_last, device, before, captures=2)
    assert train.replays < 11  # new state, new tables: it warmed up again


def copy_of(state):
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: copy_of(value) for key, value in state.items()}
    return [copy_of(value) for value in state] if isinstance(state, list) else state


def test_layers_that_are_frozen_or_join_make_it_capture_again(device):
    def freeze(world, i):
        if i in (6, 10):
            world.model[0].requires_grad_(i == 10)

    assert_same(zeroing_last, device, freeze, captures=3, calls=18, replays=3 + 1 + 5)

    def before(world, i):
        if i == 6:
            late = nn.Parameter(torch.ones(4, device=device))
            world.model.register_parameter("late", late)
            world.optimizer.add_param_group({"params": [late], "lr": 0.5})
            world.model[-1].register_forward_hook(lambda module, args, out: out * late.half())

    assert_same(zeroing_last, device, before, captures=2, replays=2 + 6)


# Several graphs.


@pytest.mark.parametrize("shared", [False, True], ids=["own pools", "one pool"])
def test_two_graphs_over_one_optimizer(shared, device):
    results = []
    for graphed in (False, True):
        world = adversaries(device)
        pool = torch.cuda.graph_pool_handle() if shared and device == "cuda" else None
        trains = {
            rows: GraphedIteration(world.iteration, world.optimizers, pool=pool) if graphed else world.iteration
            for rows in (5, 3)
        }
        losses = []
        for i in range(24):
            rows = 3 if i % 3 == 2 else 5
            losses.append(frozen(trains[rows](*batch(i, device, rows=rows, overflows=(13, 17)))))
        results.append([losses, seen(world)])
    assert results[0] == results[1]
    assert trains[5].captures == trains[3].captures == 1
    assert trains[5].replays == 16 - 3
    assert trains[3].replays == 8 - 3


def test_a_graph_of_tables_that_are_gone_is_not_replayed(device):
    """One graph makes new tables; the other, captured over the old ones, must notice at its next call."""
    results = []
    for graphed in (False, True):
        world = zeroing_last(device)
        first, second = (
            GraphedIteration(world.iteration, world.optimizer) if graphed else world.iteration for _ in range(2)
        )
        for i in range(5):
            first(*batch(i, device))
        world.model[1].weight.requires_grad_(False)
        for i in range(5, 10):
            second(*batch(i, device))
        world.model[1].weight.requires_grad_(True)
        world.optimizer.schedule(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2), steps=20)
        for i in range(10, 15):
            second(*batch(i, device))
        for i in range(15, 20):
            first(*batch(i, device))
        results.append(seen(world))
    assert results[0] == results[1]
    assert (first.captures, second.captures) == (2, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # by the interpreter
@pytest.mark.parametrize("make", [two_losses_and_clipping, adversaries], ids=lambda make: make.__name__)
def test_the_kernels_find_their_tables(make):
    """The reference is handed tensors; the kernels, here in Triton's interpreter, follow addresses in tables."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the other tests run the compiled kernels")
    with emulated(), backend.interpreter():
        assert_same(make, "cpu", BETWEEN["lr"], eager=(4, 6, 7), calls=10, overflows=(5,), replays=4)


@pytest.mark.slow
def test_an_eager_step_does_not_find_the_tables_of_a_replay(device):
    """Gradients at the same address each time, one for eager iterations and another for the graph's."""
    results = []
    for graphed in (False, True):
        world = zeroing_last(device)
        params = list(world.model.parameters())
        places = {name: [torch.empty_like(p) for p in params] for name in ("eager", "graph")}

        def iteration(x, y, place, world=world, params=params, places=places):
            world.scaler.scale(loss_of(world.model, x, y)).backward()
            for param, home in zip(params, places[place], strict=True):
                param.grad = home.copy_(param.grad)
            world.optimizer.step()
            world.scaler.update()
            world.optimizer.zero_grad()

        train = GraphedIteration(iteration, world.optimizer) if graphed else iteration
        with backend.interpreter() if device == "cpu" else contextlib.nullcontext():
            for i in range(11):
                eager = i in (4, 5, 7, 9)
                (iteration if eager else train)(*batch(i, device), "eager" if eager else "graph")
        results.append(seen(world))
    assert results[0] == results[1]
    assert train.replays == 4


def test_a_capture_has_tables_of_its_own():
    """An eager step that describes other gradients may let go of those that it finds."""
    grad, scale = torch.ones(4).half(), torch.ones(())
    table = sources.SourceTable(torch.device("cpu"))
    arguments = [[sources.Source(grad, scale, 0)]], [sources.Ballot(layout.FRESH, scale)]
    table.set(*arguments)
    first = table.rows
    table.set(*arguments)
    assert table.rows.data_ptr() == first.data_ptr()
    with upload.staging([]):
        table.set(*arguments)
    assert table.rows.data_ptr() != first.data_ptr()
    assert torch.equal(table.rows, first)


# What happened.


def test_a_collapse_is_raised_by_a_replay(device):
    world = zeroing_last(device)
    train = GraphedIteration(world.iteration, world.optimizer)

    def collapse():
        for i in range(80):  # the default limit is 50; on a GPU it is noticed a few calls late
            train(*batch(i, device, overflows=range(80)))
            if device == "cuda":
                torch.cuda.synchronize()

    with pytest.raises(mpengine.LossScaleCollapse, match=r"'0\.weight'"):
        collapse()
    assert 50 <= world.optimizer.steps_skipped <= 53
    assert train.replays > 40


def test_the_report_is_readable_between_replays(device):
    reports = []
    for graphed in (False, True):
        world = adversaries(device)
        run = GraphedIteration(world.iteration, world.optimizers) if graphed else world.iteration
        for i in range(8):
            run(*batch(i, device, overflows=(5,)))
        reports.append(str(world.scaler.report()))
    assert reports[0] == reports[1]
    assert "overflow" in reports[0]


def test_gradients_that_are_left_are_those_of_the_replay(device):
    """Until an eager iteration has put its own there: then none are shown, rather than old ones."""
    found = []
    for graphed in (False, True):
        world = zeroing_first(device)
        run = GraphedIteration(world.iteration, world.optimizer) if graphed else world.iteration
        left = []
        for i in range(7):
            run(*batch(i, device))
            left.append(frozen([p.grad for p in world.model.parameters()]))
        found.append(left)
    assert found[0] == found[1]
    world.iteration(*batch(7, device))
    run(*batch(8, device))
    if run._recorded._graph.executes_later:
        assert all(p.grad is None for p in world.model.parameters())


def test_an_error_in_the_function_is_the_callers(device):
    world = zeroing_last(device)
    wrong = []

    def iteration(x, y):
        if wrong:
            raise KeyError("mine")
        return world.iteration(x, y)

    train = GraphedIteration(iteration, world.optimizer)
    train(*batch(0, device))
    wrong.append(True)
    with pytest.raises(KeyError, match="mine"):
        train(*batch(1, device))
    wrong.clear()
    for i in range(1, 5):
        train(*batch(i, device))
    assert (train.captures, train.replays, world.optimizer.steps_taken) == (1, 2, 5)


def test_what_is_asked_of_torch_is_there():
    """Without a GPU this is as near as a test comes to the calls."""
    assert {"pool", "stream", "capture_error_mode"} <= set(inspect.signature(torch.cuda.graph).parameters)
    for name in (
        "CUDAGraph",
        "Stream",
        "Event",
        "stream",
        "current_stream",
        "graph_pool_handle",
        "get_sync_debug_mode",
    ):
        assert callable(getattr(torch.cuda, name))
    for name in ("wait_stream", "wait_event", "record_event"):
        assert callable(getattr(torch.cuda.Stream, name))


def test_autograd_notices_a_replay(device):
    """As after an eager step: what was saved of the weights before is stale."""
    world = zeroing_last(device)
    train = GraphedIteration(world.iteration, world.optimizer)
    for i in range(5):
        train(*batch(i, device))
    x = torch.ones(2, 6, device=device, requires_grad=True)
    loss = world.model(x.half()).float().sum()
    train(*batch(5, device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Sabotage: these tests would notice.

SABOTAGE = {
    "nothing uploaded": (mpengine.MixedPrecisionOptimizer, "_before_replay", lambda self: True, "lr"),
    "inputs not copied": (mpengine.inputs.StaticInputs, "fill", lambda self, tensors: None, None),
    "freezing overlooked": (mpengine.graphs._Recorded, "is_current", lambda self: True, "freezing"),
    "own writes overlooked": (mpengine.MixedPrecisionOptimizer, "_written_elsewhere", lambda self: [], "clipping"),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_noticed(name, captured, monkeypatch):
    owner, attribute, replacement, kind = SABOTAGE[name]
    before = BETWEEN["lr"] if kind == "lr" else freezing if kind == "freezing" else None
    make = clipped_weights if kind == "clipping" else zeroing_last
    assert_same(make, captured, before, captures=2 if kind == "freezing" else 1)
    monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError, match="differs"):
        assert_same(make, captured, before)


def freezing(world, i):
    if i == 6:
        world.model[0].requires_grad_(False)
