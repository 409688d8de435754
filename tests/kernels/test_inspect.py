"""Overflows: found wherever they hide, charged to the right loss and tensor, and the step changes nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mpengine.kernels import launch, layout
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
    run_update,
)

INF, NAN = float("inf"), float("nan")
SIZE = 2 * layout.INSPECT_CHUNK + 5000  # full blocks, a tail of full blocks, a masked tail
STATE = ("param", "master", "slot", "steps", "scalars")


def guilty(world):
    """(tensor, loss) of each stamp of the last attempt."""
    attempt = int(world.table.counts.sum())
    return [tuple(pair) for pair in (world.table.stamps == attempt).nonzero().tolist()]


def step(world):
    run_inspect(world, launch)
    run_decide(world, launch)
    run_update(world, launch)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("position", [0, 4095, 4096, layout.INSPECT_CHUNK - 1, layout.INSPECT_CHUNK, SIZE - 1])
def test_a_non_finite_gradient_is_found_wherever_it_is(value, position):
    problem = Problem((Spec((3,)), Spec((SIZE,), grads=(Grad(),)))).with_spikes(1, 0, (position, value))
    world = check(problem, steps=1)
    assert guilty(world) == [(1, 0)]
    assert world.table.counts.tolist() == [0, 1]


@pytest.mark.parametrize("kind", [HALF, BRAIN, SINGLE], ids=str)
@pytest.mark.parametrize("size", [1, 31, 1025])
def test_small_tensors_of_every_kind(kind, size):
    problem = Problem((Spec((size,), kind, (Grad(0, kind),)), Spec((size,)))).with_spikes(0, 0, (size - 1, NAN))
    assert guilty(check(problem)) == [(0, 0)]


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("kinds", [(HALF, HALF), (HALF, SINGLE), (SINGLE, BRAIN)], ids=str)
def test_only_the_loss_that_overflowed_is_charged(kinds, misaligned):
    grads = tuple(Grad(k, kind, misaligned) for k, kind in enumerate(kinds))
    problem = Problem((Spec((20000,), grads=grads), Spec((5,), grads=grads)), scales=(8.0, 3.0))
    world = check(problem.with_spikes(0, 1, (19999, -INF)), steps=1)
    assert guilty(world) == [(0, 1)]
    assert world.table.found.tolist() == [0, 1]
    world = check(problem.with_spikes(1, 0, (4, NAN)), steps=1)
    assert guilty(world) == [(1, 0)]


def test_opposite_infinities_charge_both_losses():
    grads = (Grad(0, spikes=((2, INF),)), Grad(1, spikes=((2, -INF),)), Grad(2))
    assert guilty(check(Problem((Spec((9,), grads=grads),), scales=(1.0,) * 3), steps=1)) == [(0, 0), (0, 1)]


def test_a_product_that_overflows():
    problem = Problem((Spec((1025,)),), scales=(2.0**-126,), magnitude=1e-3).with_spikes(0, 0, (1024, 4.0))
    assert guilty(check(problem)) == [(0, 0)]  # 4 * 2^126
    problem = problem.with_spikes(0, 0, (1024, 2.0))
    assert guilty(check(problem)) == []


def test_only_the_sum_of_two_losses_overflows():
    tensors = (Spec((1025,), SINGLE, (Grad(0, SINGLE, spikes=((7, 3e38),)), Grad(2, SINGLE, spikes=((7, 3e38),)))),)
    problem = Problem(tensors, scales=(1.0, 1.0, None))
    assert guilty(check(problem)) == [(0, 0), (0, 2)]
    assert guilty(check(problem.with_spikes(0, 1, (7, -3e38)))) == []


def test_a_square_beyond_float32_is_no_overflow():
    problem = Problem((Spec((3000,), SINGLE, (Grad(0, SINGLE),)),), scales=(None,), max_norm=1.0)
    world = check(problem.with_spikes(0, 0, (2999, 1e30)))
    assert guilty(world) == []
    assert world.table.decision[layout.NORM] == INF
    assert world.table.decision[layout.CLIP] == 0.0


def test_a_sum_of_squares_beyond_float32_is_exact():
    spikes = tuple((i, 1.5e19) for i in range(0, layout.INSPECT_CHUNK, 2048))  # all in one lane
    spec = Spec((layout.INSPECT_CHUNK,), SINGLE, (Grad(0, SINGLE, spikes=spikes),))
    world = check(Problem((spec,), scales=(None,), max_norm=1.0), steps=1)
    assert float(world.table.decision[layout.NORM]) == pytest.approx(1.5e19 * 8**0.5)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3])
def test_equal_gradients_have_the_exact_norm(value):
    """Rounding errors of equal additions do not cancel: a plain FP32 sum fails here."""
    problem = Problem((Spec((3 * layout.INSPECT_CHUNK + 77,), SINGLE, (Grad(0, SINGLE),)),), scales=(3.0,))
    world = build(problem, DEVICE)
    world.sources.entries[0][0].grad.fill_(value)
    run_inspect(world, launch)
    share = np.float32(value) * np.float32(1.0 / 3.0)
    expected = float(share * share) * (3 * layout.INSPECT_CHUNK + 77)
    assert world.table.partials.sum().item() == pytest.approx(expected, rel=1e-13)


def test_squares_of_the_smallest_gradients_count():
    world = check(Problem((Spec((4096,)),), scales=(65536.0,), magnitude=1e-6, max_norm=1e-15), steps=1)
    assert world.table.decision[layout.NORM] > 0


def test_a_skip_changes_no_bit_of_the_state():
    """The very first step too; the norm says NaN."""
    grads = (Grad(0), Grad(1))
    tensors = (Spec((1025,), grads=grads), Spec((64,), SINGLE, grads), Spec((31,), BRAIN))
    problem = Problem(tensors, scales=(2.0, 3.0), max_norm=1.0).with_spikes(0, 1, (1000, INF))
    world = build(problem, DEVICE)
    for taken in (0, 1):
        before = {name: buffer.clone() for name, buffer in world.buffers.items() if name.startswith(STATE)}
        step(world)
        for name, buffer in before.items():
            bits = torch.int16 if buffer.element_size() == 2 else torch.int32
            assert torch.equal(buffer.view(bits), world.buffers[name].view(bits)), name
        assert world.table.counts.tolist() == [taken, 1 + taken]
        assert world.table.decision[layout.SKIP] == 1.0
        assert world.table.decision[layout.NORM].isnan()
        grad = world.sources.entries[0][1].grad
        kept = grad.clone()
        grad[1000] = 0.0
        step(world)  # accept, then skip again with moments that are not zero
        assert world.table.counts.tolist() == [taken + 1, 1 + taken]
        assert world.table.decision[layout.SKIP] == 0.0
        grad.copy_(kept)


def test_accept_skip_accept_stamps_the_attempt():
    problem = Problem((Spec((5,), grads=(Grad(1),)), Spec((9,), grads=(Grad(0),))), scales=(4.0, 2.0))
    world = build(problem, DEVICE)
    grad = world.sources.entries[0][0].grad
    step(world)
    grad[4] = NAN
    step(world)
    assert world.table.stamps.tolist() == [[0, 2], [0, 0]]
    assert world.table.found.tolist() == [0, 2]
    grad[4] = 1.0
    step(world)
    assert world.table.stamps.tolist() == [[0, 2], [0, 0]]
    assert world.table.counts.tolist() == [2, 1]
    assert world.table.steps.tolist() == [2, 2]


def test_the_inverse_of_a_scale_is_float64s_rounded():
    """Why a correctly rounded FP32 division may stand for float32(1 / float64(scale)): every mantissa."""
    mantissas = np.arange(1 << 23, dtype=np.uint32)
    for exponent in (1, 127, 128, 253, 254):  # the last two have subnormal inverses
        scale = (mantissas | np.uint32(exponent << 23)).view(np.float32)
        exact = (1.0 / scale.astype(np.float64)).astype(np.float32)
        assert (exact == np.float32(1.0) / scale).all()


def test_an_overflow_in_the_tail_that_nobody_reads_is_noticed():
    def hasty(table, sources):
        """Drops the last program, as a wrong count of chunks would."""
        kept, table.inspect_chunks = table.inspect_chunks, table.inspect_chunks[:-1]
        table.partials[-1] = 0.0
        launch.inspect(table, sources)
        table.inspect_chunks = kept

    problem = Problem((Spec((SIZE,)),)).with_spikes(0, 0, (SIZE - 1, INF))
    module = SimpleNamespace(inspect=hasty, decide=launch.decide, update=launch.update)
    with pytest.raises(AssertionError):
        check(problem, steps=1, module=module)
