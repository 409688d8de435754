"""What inspect counts: elements that underflow, the largest one, and those that overflow, by program and loss."""

import numpy as np
import pytest

from mpengine.kernels import launch, layout
from mpengine.tally import counted
from tests.kernels.harness import (
    BRAIN,
    DEVICE,
    HALF,
    SINGLE,
    Grad,
    Problem,
    Spec,
    build,
    check,
    run_decide,
    run_inspect,
)

INF, NAN = float("inf"), float("nan")
CHUNK = layout.INSPECT_CHUNK
SMALLEST = {HALF: 2.0**-14, BRAIN: 2.0**-126, SINGLE: 2.0**-126}


def totals(world, loss=0):
    positions = range(len(world.table.entries))
    return counted([(world.table, positions)], loss)


def expected(world, loss=0):
    """(elements, small, largest) by plain arithmetic on whole gradients."""
    elements = small = 0
    largest = 0.0
    for sources in world.sources.entries:
        for grad, scale, loss_id in sources:
            if loss_id == loss and grad.numel():
                size = grad.float().abs()
                elements += grad.numel()
                small += int((size < SMALLEST[grad.dtype]).sum())
                inverse = np.float32(1.0 / float(scale))
                largest = max(largest, float(np.float32(size.max().item()) * inverse))
    return elements, small, largest


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("size", [0, 1, 31, 1023, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK + 77])
@pytest.mark.parametrize("misaligned", [False, True])
def test_elements_that_underflow_and_the_largest_one(dtype, size, misaligned):
    """Zeros, subnormals and the smallest normal number are told apart."""
    magnitude = {HALF: 1e-4, BRAIN: 1e-38, SINGLE: 1e-38}[dtype]
    tiny = SMALLEST[dtype]
    spikes = ((0, 0.0), (size // 2, tiny), (size - 1, tiny / 2)) if size > 4 else ()
    spec = Spec((size,), dtype, (Grad(0, dtype, misaligned, spikes),))
    world = check(Problem((spec, Spec((5,))), scales=(3.0,), magnitude=magnitude), steps=1)
    tally = totals(world)
    assert (tally.elements, tally.small, tally.largest) == expected(world)
    assert tally.overflow == 0
    assert tally.nonfinite == {}
    if size > 1000:
        assert 0.05 < tally.small / tally.elements < 0.95  # the test sees both kinds


@pytest.mark.parametrize("kinds", [(HALF, HALF), (HALF, SINGLE), (SINGLE, BRAIN)], ids=str)
@pytest.mark.parametrize("misaligned", [False, True])
def test_each_loss_is_counted_by_itself(kinds, misaligned):
    grads = tuple(Grad(2 * k, kind, misaligned) for k, kind in enumerate(kinds))
    tensors = (Spec((CHUNK + 5000,), grads=grads), Spec((7,), grads=grads[:1]), Spec((9,), grads=()))
    world = check(Problem(tensors, scales=(8.0, 1.0, 3.0), magnitude=1e-4), steps=1)
    for loss in (0, 2):
        tally = totals(world, loss)
        assert (tally.elements, tally.small, tally.largest) == expected(world, loss)
    assert totals(world, 1).elements == 0
    assert np.isnan(totals(world, 1).largest)


@pytest.mark.parametrize("losses", [1, 3, 8])
def test_overflowed_elements_are_counted_where_they_are(losses):
    grads = tuple(Grad(k) for k in range(losses))
    problem = Problem((Spec((2 * CHUNK + 99,), grads=grads), Spec((40,), grads=grads)), scales=(2.0,) * losses)
    spikes = ((0, INF), (5, NAN), (CHUNK, -INF), (2 * CHUNK + 98, NAN))
    world = check(problem.with_spikes(0, losses - 1, *spikes).with_spikes(1, 0, (39, INF)), steps=1)
    tally = totals(world, losses - 1)
    assert tally.nonfinite == ({0: 4} if losses > 1 else {0: 4, 1: 1})
    assert tally.largest == INF
    assert totals(world, 0).nonfinite == ({1: 1} if losses > 1 else {0: 4, 1: 1})


def test_where_only_the_sum_overflows_both_losses_have_the_element():
    grads = (Grad(0, SINGLE, spikes=((7, 3e38),)), Grad(2, SINGLE, spikes=((7, 3e38),)))
    world = check(Problem((Spec((1025,), SINGLE, grads),), scales=(1.0, 1.0, 1.0)), steps=1)
    assert totals(world, 0).nonfinite == {0: 1}
    assert totals(world, 2).nonfinite == {0: 1}
    assert totals(world, 1).nonfinite == {}


def test_a_square_beyond_float32_is_the_largest_and_no_overflow():
    problem = Problem((Spec((3000,), SINGLE, (Grad(0, SINGLE, spikes=((2999, 1e30),)),)),), scales=(1.0,))
    tally = totals(check(problem, steps=1))
    assert tally.largest == float(np.float32(1e30))
    assert tally.nonfinite == {}


def test_the_last_overflow_is_remembered_with_its_age():
    problem = Problem((Spec((9,)), Spec((CHUNK + 3,))))
    world = build(problem, DEVICE)
    first, second = (sources[0].grad for sources in world.sources.entries)
    for spoilt, value in ((first, INF), (second, INF), (None, 1.0), (None, 1.0)):
        first[-2:] = second[-2:] = 1.0
        if spoilt is not None:
            spoilt[-2:] = value
        run_inspect(world, launch)
        run_decide(world, launch)
    tally = totals(world)
    assert (tally.overflow, tally.age, tally.nonfinite) == (2, 2, {1: 2})
    assert tally.largest < 1000


def test_gradients_without_a_scale_are_not_counted():
    """What `unscale_` has unscaled says nothing of fp16; its overflow is stamped all the same."""
    world = check(Problem((Spec((9,), grads=(Grad(0, SINGLE, spikes=((3, INF),)),)),), scales=(None,)), steps=1)
    assert (world.table.tallies == -1).all()
    assert totals(world).nonfinite == {0: 0}
