"""Inputs are copied, followed and checked; outputs are detached."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch

from mpengine.graphs import GraphedIteration
from tests.graphs.worlds import batch, seen, zeroing_first, zeroing_last
from tests.harness import frozen


@pytest.fixture
def echo(device):
    """A GraphedIteration that hands its arguments back, called once."""
    world = zeroing_last(device)
    given = []

    def iteration(x, y, *rest, **options):
        given.append((x, y, rest, options))
        world.iteration(x, y)
        return x * 1, rest, options

    return GraphedIteration(iteration, world.optimizer), world, given


def nested(i, device, **changes):
    x, y = batch(i, device)
    options = {"flag": True, "pair": [x[0] + i, {"name": "a", "deep": (y[0] + i, 1.5)}], **changes}
    return (x, y), options


def test_nested_inputs_reach_every_call(echo, device):
    train, _, _ = echo
    for i in range(7):
        args, options = nested(i, device)
        got_x, got_rest, got = train(*args, **options)
        assert got_rest == ()
        assert frozen([got_x, got]) == frozen([args[0], options])
    assert train.replays == 4


WRONG = {
    "shape": (
        {},
        0,
        r"^x: got a float16 tensor of shape \(4, 6\) on .*, where the first call .*\(5, 6\).*drop_last",
    ),
    "dtype": ({}, 1, r"^x: got a float32 tensor .* first call had a float16 .*second GraphedIteration"),
    "value": ({"flag": False}, None, r"^flag: got the bool False, where the first call had the bool True.*baked in"),
    "kind": ({"flag": 1}, None, r"^flag: got the int 1, where the first call had the bool True"),
    "structure": ({"pair": []}, None, r"^pair: got a list with \[\], where the first call had a list with \[0, 1\]"),
    "leaf": ({"flag": torch.ones(1)}, None, r"^flag: got a float32 tensor .*same structure"),
    "keyword": ({"extra": 1}, None, r"^the arguments: got a tuple with .*'extra'"),
}


@pytest.mark.parametrize("calls", [1, 5], ids=["warm-up", "captured"])
@pytest.mark.parametrize("name", WRONG)
def test_inputs_that_change_are_refused_before_anything_has_changed(name, calls, echo, device):
    changes, x_changes, message = WRONG[name]
    train, world, _ = echo
    for i in range(calls):
        args, options = nested(i, device)
        train(*args, **options)
    before = seen(world)
    (x, y), options = nested(9, device, **changes)
    x = {None: x, 0: x[:4], 1: x.float()}[x_changes]
    with pytest.raises(ValueError, match=message):
        train(x, y, **options)
    assert seen(world) == before
    (x, y), options = nested(9, device)
    train(x, y, **dict(reversed(options.items())))  # the order of keywords is nobody's business
    assert train.captures == (calls == 5)


def test_errors_name_what_lies_deep(echo, device):
    train, _, _ = echo
    args, options = nested(0, device)
    train(*args, **options)
    args, options = nested(0, device, pair=[args[0][0], {"name": "a", "deep": (args[1][0], 2.5)}])
    with pytest.raises(ValueError, match=r"^pair\[1\]\['deep'\]\[1\]: got the float 2\.5, .* the float 1\.5"):
        train(*args, **options)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.ones(5, 6).requires_grad_(), ValueError, "x requires grad"),
        (torch.ones(5, 6).to_sparse(), ValueError, r"x is a torch\.sparse_coo tensor"),
        (torch.ones(5, 6).numpy(), TypeError, "x is a NumPy array"),
    ],
    ids=["grad", "sparse", "numpy"],
)
def test_inputs_that_cannot_be_followed_are_refused_at_once(bad, error, message, echo, device):
    train, _, given = echo
    with pytest.raises(error, match=message):
        train(bad, batch(0, device)[1])
    assert given == []


class Pair(NamedTuple):
    first: torch.Tensor
    second: float


def test_containers_keep_their_types_and_tensors_their_memory_format(echo, device):
    train, _, given = echo
    (x, y), _ = nested(0, device)
    image = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    for i in range(5):
        options = {"pair": Pair(image + i, 2.0), "ordered": OrderedDict(b=y + i, a=[image])}
        got = train(x, y, **options)[2]
        assert frozen(got) == frozen(options)
        assert type(got["pair"]) is Pair
        assert list(got["ordered"]) == ["b", "a"]
        inside = given[-1][3]
        assert type(inside["ordered"]) is OrderedDict
        assert inside["pair"].first.is_contiguous(memory_format=torch.channels_last)
    assert train.captures == 1


def test_an_argument_may_come_by_name_or_by_place(device):
    world = zeroing_last(device)
    train = GraphedIteration(world.iteration, world.optimizer)
    for i in range(6):
        x, y = batch(i, device)
        train(x, y) if i % 2 else train(y=y, x=x)
    assert (train.captures, world.optimizer.steps_taken) == (1, 6)


def test_what_the_function_does_to_an_input_stays_with_it(device):
    """A leaf that it makes of an input gets its gradient anew in each call, and the caller's tensor none."""
    world = zeroing_last(device)

    def iteration(x, y):
        x.requires_grad_()
        world.iteration(x, y)
        return x.grad

    train = GraphedIteration(iteration, world.optimizer)
    x, y = batch(0, device)
    first = [train(x, y).clone() for _ in range(6)]
    assert not x.requires_grad
    assert float(first[5].abs().sum()) < 3 * float(first[0].abs().sum())  # not the sum of six


def test_inputs_may_come_from_the_cpu_and_be_overwritten_at_once(device):
    """On a GPU the weights' device is where they arrive, from a copy in pinned memory."""
    results = []
    for graphed in (False, True):
        world = zeroing_last(device)
        train = GraphedIteration(world.iteration, world.optimizer)
        x, y = batch(0, "cpu")
        for i in range(8):
            for mine, new in zip((x, y), batch(i, "cpu"), strict=True):
                mine.copy_(new)
            train(x, y) if graphed else world.iteration(*batch(i, device))
            x.fill_(torch.nan)
            y.fill_(torch.nan)
        results.append(seen(world))
    assert results[0] == results[1]


# Outputs.


def test_outputs_are_detached_and_static(device):
    world = zeroing_first(device)
    train = GraphedIteration(world.iteration, world.optimizer)
    outputs = [train(*batch(i, device)) for i in range(6)]
    for out in outputs:
        assert out["name"] == "zeroing_first"
        assert not out["losses"][0].requires_grad
    if device == "cuda":
        assert outputs[4]["losses"][0].data_ptr() == outputs[5]["losses"][0].data_ptr()
    assert outputs[4]["losses"] is not outputs[5]["losses"]
