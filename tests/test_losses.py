"""Gradients of several losses: kept apart, unscaled by the scale that made them, and added up in FP32."""

import gc
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpengine import GradScaler, MixedPrecisionOptimizer, cpu, gradients, plain, reference
from mpengine.gradients import Ledger
from mpengine.kernels import layout
from mpengine.loss_scales import LossScales
from tests.losses_world import KINDS, OWNED, SIZES, STEPPED, World

INF, NAN = math.inf, math.nan
U = 2.0**-24


class Rig:
    """One parameter, its optimizer, and losses whose gradients are random and of full precision."""

    def __init__(self, kind: str, scales: list[float], size: int = 64, seed: int = 0) -> None:
        self.kind = kind
        self.draw = torch.Generator().manual_seed(seed)
        self.param = nn.Parameter(torch.zeros(size, dtype=torch.float16 if kind == "masters" else torch.float32))
        self.scaler = GradScaler("cpu", num_losses=len(scales), max_consecutive_skips=None)
        optimizer = torch.optim.SGD([self.param], lr=1.0)
        if kind == "masters":
            self.optimizer = MixedPrecisionOptimizer(optimizer, self.scaler)
        else:
            self.optimizer = optimizer
            self.scaler.watch(optimizer)
        self.scaler.scale(self.param.float().sum())
        for k, scale in enumerate(scales):
            self.scaler.update(scale, loss_id=k)
        self.made: list[tuple[torch.Tensor, float]] = []  # every pass's gradient, and the scale that scaled it
        self.param.register_hook(lambda grad: self.made.append((grad.clone(), self.scale_of_pass)))

    def loss(self, magnitude: float = 1.0) -> torch.Tensor:
        factors = torch.randn(self.param.shape, generator=self.draw) * magnitude
        return (self.param.float() * factors).sum()

    def backward(self, k: int, magnitude: float = 1.0) -> None:
        self.scale_of_pass = self.scaler.get_scale(k)
        self.scaler.scale(self.loss(magnitude), k).backward()

    @property
    def master(self) -> torch.Tensor:
        return next(self.optimizer.master_params()) if self.kind == "masters" else self.param

    def step(self) -> list[float]:
        """The gradient that the rule received: masters start at 0, and SGD with lr 1 subtracts it."""
        self.scaler.step(self.optimizer)
        return [-v for v in self.master.tolist()]

    def unscale(self) -> list[float]:
        self.scaler.unscale_(self.optimizer)
        return self.master.grad.tolist()


def shares(made: list[tuple[torch.Tensor, float]]) -> list[list[Fraction]]:
    """For each element the exact unscaled gradient of every pass."""
    columns = [[Fraction(v) / Fraction(scale) for v in grad.tolist()] for grad, scale in made]
    return [list(row) for row in zip(*columns, strict=True)]


def round_to_float32(x: Fraction) -> float:
    """To nearest, ties to even, by integers alone."""
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x)))
    exponent += (abs(x) >= Fraction(2) ** (exponent + 1)) - (abs(x) < Fraction(2) ** exponent)
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    return float(round(x / ulp) * ulp)


def assert_correctly_rounded(received: list[float], made) -> None:
    exact = [round_to_float32(sum(row, Fraction(0))) for row in shares(made)]
    wrong = sum(a != b for a, b in zip(received, exact, strict=True))
    assert wrong == 0, f"{wrong} of {len(exact)} elements are not the rounded sum"


def assert_within(received: list[float], made, roundings: int) -> None:
    """Each rounding loses at most U of what it rounds, which the sum of magnitudes bounds."""
    for value, row in zip(received, shares(made), strict=True):
        bound = ((1 + Fraction(U)) ** roundings - 1) * sum(map(abs, row))
        assert abs(Fraction(value) - sum(row, Fraction(0))) <= bound


SINGLE = ("masters", "watched")


class TestTheSum:
    def test_the_rounding_of_the_oracle(self):
        for value in (1.0, -3.5, 2.0**-149, 2.0**-126 * 1.5, 1e38, 0.1, 1 + 2.0**-24, 1 + 3 * 2.0**-24):
            assert round_to_float32(Fraction(value)) == torch.tensor(value, dtype=torch.float32).item()
        assert round_to_float32(Fraction(1) + Fraction(1, 2**24) + Fraction(1, 2**80)) == 1 + 2.0**-23

    @pytest.mark.parametrize("kind", SINGLE)
    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    @pytest.mark.parametrize("scales", [(8.0, 1024.0), (1.0, 16384.0), (2.0**-10, 2.0**14), (32.0, 32.0)])
    def test_two_losses_at_powers_of_two(self, kind, order, scales):
        rig = Rig(kind, list(scales))
        for k in order:
            rig.backward(k, magnitude=[1.0, 1e-4][k])
        assert_correctly_rounded(rig.step(), rig.made)
        rounded = sum(Fraction(round_to_float32(sum(row))) != sum(row) for row in shares(rig.made))
        assert rounded > 10, "these numbers hardly need rounding"

    @pytest.mark.parametrize("kind", SINGLE)
    def test_two_losses_as_unscale_shows_them(self, kind):
        rig = Rig(kind, [8.0, 1024.0])
        rig.backward(1)
        rig.backward(0)
        received = rig.unscale()
        assert_correctly_rounded(received, rig.made)
        assert rig.step() == received

    @pytest.mark.parametrize("kind", SINGLE)
    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_three_losses_at_powers_of_two(self, kind, order):
        rig = Rig(kind, [2.0, 64.0, 4096.0])
        for k in order:
            rig.backward(k, magnitude=1e-3**k)
        # x / 2^i is exact, two additions round; Jeannerod and Rump (2013): (n - 1) U without terms of second order
        received = rig.step()
        for value, row in zip(received, shares(rig.made), strict=True):
            assert abs(Fraction(value) - sum(row)) <= 2 * Fraction(U) * sum(map(abs, row))
        in_order = [torch.zeros(64)] * 3
        for (grad, scale), k in zip(rig.made, order, strict=True):
            in_order[k] = grad.float() / scale
        assert received == (in_order[0] + in_order[1] + in_order[2]).tolist(), "not in order of loss_id"

    @pytest.mark.parametrize("kind", SINGLE)
    @pytest.mark.parametrize("count", [1, 2, 5, 8])
    def test_any_scales(self, kind, count):
        rig = Rig(kind, [3.0, 1000.1, 0.7, 12345.6, 17.0, 5.5, 100.0, 33.3][:count])
        for k in random.Random(count).sample(range(count), count):
            rig.backward(k)
        # 1 / scale rounds, the product rounds, count - 1 additions round
        assert_within(rig.step(), rig.made, roundings=count + 1)

    @pytest.mark.parametrize("kind", SINGLE)
    def test_accumulation_of_one_loss_adds_in_the_gradients_dtype_as_torch_does(self, kind):
        rig = Rig(kind, [4.0, 512.0])
        for k in (0, 1, 0, 1, 1):
            rig.backward(k)
        sums = [torch.zeros(64, dtype=rig.param.dtype)] * 2
        for k, (grad, _) in zip((0, 1, 0, 1, 1), rig.made, strict=True):
            sums[k] = sums[k] + grad
        assert_correctly_rounded(rig.step(), [(sums[0], 4.0), (sums[1], 512.0)])

    @pytest.mark.parametrize("kind", SINGLE)
    def test_a_scale_that_changes_in_between(self, kind):
        """The same loss under two scales: apart, like two losses."""
        rig = Rig(kind, [4.0, 512.0])
        rig.backward(0)
        rig.scaler.update(4096.0, loss_id=0)
        rig.backward(0)
        assert_correctly_rounded(rig.step(), rig.made)
        assert [scale for _, scale in rig.made] == [4.0, 4096.0]

    @pytest.mark.parametrize("kind", SINGLE)
    def test_one_loss_whose_scale_changes_in_between(self, kind):
        """With a single loss too, and whether or not the optimizer is known already."""
        rig = Rig(kind, [4.0])
        rig.backward(0)
        rig.scaler.update(4096.0)
        rig.backward(0)
        assert_correctly_rounded(rig.step(), rig.made)

    def test_a_different_number_of_losses_on_each_parameter(self):
        world = World("masters")
        world.backward(world.scale(0, {0: [1.0, 2.0, 3.0], 1: [4.0]}))
        world.set_scale(64.0, 1)
        world.backward(world.scale(1, {1: [2.0], 2: [5.0, 1.0]}))
        world.backward(world.scale(2, {0: [-1.0, 1.0, 0.0]}))
        world.step(0)
        world.step(1)

    def test_empty_and_scalar_parameters(self):
        params = [nn.Parameter(torch.zeros(shape, dtype=torch.float16)) for shape in ((0,), (), (2, 0), (1, 1))]
        scaler = GradScaler("cpu", init_scale=4.0, num_losses=2)
        optimizer = MixedPrecisionOptimizer(torch.optim.SGD(params, lr=1.0), scaler)
        for k in range(2):
            scaler.scale(sum(p.sum().float() * (k + 1) for p in params), k).backward()
        optimizer.step()
        assert [p.tolist() for p in params] == [[], -3.0, [[], []], [[-3.0]]]


def two_pending(kind: str) -> World:
    """Losses 0 and 1 wait on every parameter, at scales 8 and 64."""
    world = World(kind, 2)
    world.set_scale(64.0, 1)
    for k in (0, 1):
        world.backward(world.scale(k, {0: [1.0 + k, 2.0, -3.0], 1: [4.0], 2: [5.0, 1.0 - k]}))
    return world


ZEROINGS = [("model", True), ("model", False), ("0", True), ("0", False)]


@pytest.mark.parametrize("kind", KINDS)
class TestZeroing:
    @pytest.mark.parametrize(("which", "set_to_none"), ZEROINGS)
    @pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (2, 1, 0), (0, 1, 2, 0)])
    def test_at_every_point(self, kind, which, set_to_none, order):
        """What was there before is gone, what comes after stays; the one refusal is of an edit with several pending."""
        for point in range(len(order) + 1):
            world = World(kind)
            world.set_scale(64.0, 1)
            world.set_scale(2.0, 2)
            graphs = [world.scale(k, {0: [k + 1.0, 2.0, -3.0], 1: [4.0 - k]}) for k in order]
            for i, graph in enumerate(graphs):
                if i == point:
                    world.zero(which, set_to_none)
                world.backward(graph)
            if point == len(order):
                world.zero(which, set_to_none)
            world.step(0)
            ambiguous = not set_to_none and len(set(order[:point])) > 1 and (which == "model" or kind == "watched")
            assert bool(world.edited) == ambiguous
            if ambiguous:
                world.zero("model", True)  # what the error says to do
                world.backward(graphs[0])
                world.step(0)

    def test_the_refusal_names_the_parameter_and_the_remedy(self, kind):
        world = two_pending(kind)
        world.params[0].grad.zero_()
        error = world.refused(lambda: world.scaler.step(world.optimizers[0]), RuntimeError)
        assert "the gradient of group 0, parameter 0 of shape (3,) was edited" in str(error)
        assert "edited while gradients of 2 losses are pending" in str(error)
        assert "zero_grad(set_to_none=True)" in str(error)
        assert "scaler.unscale_(optimizer)" in str(error)

    def test_by_the_optimizer_with_masters_always_works(self, kind):
        for set_to_none in (True, False):
            world = two_pending(kind)
            for o in (0, 1):
                if world.has_masters[o]:
                    world.zero(str(o), set_to_none)
            assert not world.edited
            world.backward(world.scale(0, {0: [1.0, 1.0, 1.0]}))
            world.step(0)

    def test_gradients_kept_as_zeros_are_added_to_in_place(self, kind):
        """Nothing is set aside: zeros fit any scale."""
        world = two_pending(kind)
        if not world.has_masters[0]:
            world.zero("model", True)
            world.backward(world.scale(0, {0: [1.0, 1.0, 1.0]}))
        p = world.params[0]
        world.zero("0", False)
        before = p.grad.data_ptr()
        world.backward(world.scale(0, {0: [1.0, 1.0, 1.0]}))
        assert p.grad.data_ptr() == before
        assert len(world.scaler._pending(world.optimizers[0])[0]) == 1
        world.step(0)

    def test_frees_what_was_set_aside(self, kind):
        world = two_pending(kind)
        world.zero("model", True)
        world.backward(world.scale(0, {0: [1.0, 1.0, 1.0]}))
        assert [len(record.aside) for record in world.scaler._ledger._records.values()] == [0]


@pytest.mark.parametrize("kind", KINDS)
class TestExceptionsInBackward:
    @pytest.mark.parametrize("broken", [0, 1, 2])
    @pytest.mark.parametrize("k", [0, 1, 2])
    def test_nothing_set_aside_is_lost(self, kind, broken, k):
        """The broken pass leaves what it had computed so far, under its own label, as torch does."""
        world = two_pending(kind)
        broken_graph = World.scale(world, k % 2, {0: [2.0, 2.0, 2.0], 1: [3.0], 2: [1.0, 1.0]}, broken=broken)
        world.backward(broken_graph)
        if k == 2:  # a second one
            world.backward(broken_graph)
        world.step(0)
        world.step(1)
        world.update()

    def test_before_the_first_gradient(self, kind):
        """The pass breaks before it reaches any parameter."""
        world = two_pending(kind)
        graph = world.scale(0, {0: [2.0, 2.0, 2.0]}, broken=0)
        before = world.totals(0)
        world.backward(graph)
        assert {i: t.tolist() for i, t in world.totals(0).items()} == {i: t.tolist() for i, t in before.items()}
        world.step(0)

    def test_then_zeroed_then_retried(self, kind):
        world = two_pending(kind)
        world.backward(world.scale(1, {0: [2.0, 2.0, 2.0], 1: [3.0]}, broken=0))
        world.zero("model", True)
        world.backward(world.scale(1, {0: [2.0, 2.0, 2.0], 1: [3.0]}))
        world.step(0)

    def test_a_kept_traceback_does_not_keep_the_pass_open(self, kind):
        world = two_pending(kind)
        graph = world.scale(0, {0: [2.0, 2.0, 2.0], 1: [3.0]}, broken=0)
        with pytest.raises(ZeroDivisionError) as kept:
            graph.scaled.backward()
        assert all(p.grad is not None for p in world.params)
        world.model.zero_grad()
        world.pending = [{} for _ in SIZES]
        world.backward(world.scale(1, {0: [1.0, 1.0, 1.0]}))
        world.step(0)
        del kept

    def test_with_one_loss(self, kind):
        world = World(kind, 1)
        scaled = world.scale(0, {0: [1.0, 2.0, 3.0]}).scaled
        scaled.backward()
        world.scaler.update(64.0)  # the waiting gradient is set aside by the next pass
        with pytest.raises(ZeroDivisionError):
            world.scale(0, {0: [1.0, 2.0, 3.0]}, broken=0).scaled.backward()
        assert world.params[0].grad.tolist() == [8.0, 16.0, 24.0]
        world.scaler.step(world.optimizers[0])
        assert world.params[0].tolist() == [-1.0, -2.0, -3.0]


class TestTwoLossesInOnePass:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("pair", [(0, 1), (1, 0), (0, 2)])
    def test_is_an_error_that_changes_no_step(self, kind, pair):
        world = World(kind, 3)
        world.backward(world.scale(2, {0: [1.0, 2.0, 3.0], 1: [4.0]}))
        one, other = (world.scale(k, {0: [1.0, 1.0, 1.0]}).scaled for k in pair)
        world.arrived.clear()
        with pytest.raises(
            RuntimeError, match=r"two scaled losses in one backward pass \(loss_id \d and \d\).*scale the sum"
        ):
            (one + other).backward()
        for i, grad in world.arrived:  # what the first of them had done by then
            world.pending[i][world.tags[pair[1]]] = grad + world.pending[i].pop(world.tags[pair[1]], 0)
        world.step(0)
        world.update()

    def test_the_traceback_does_not_bring_back_zeroed_gradients(self):
        scaler = GradScaler("cpu", init_scale=4.0, num_losses=2)
        p, q = (nn.Parameter(torch.zeros(2, dtype=torch.float16)) for _ in range(2))
        optimizer = MixedPrecisionOptimizer(torch.optim.SGD([p, q], lr=1.0), scaler)
        scaler.scale(p.float().sum(), 0).backward()
        both = scaler.scale(q.float().sum(), 0) + scaler.scale(q.float().sum(), 1)
        with pytest.raises(RuntimeError, match="two scaled losses") as kept:
            both.backward()
        assert p.grad.tolist() == [4.0, 4.0]
        p.grad = q.grad = None
        scaler.scale((q.float() * 3).sum(), 1).backward()
        optimizer.step()
        assert (p.tolist(), q.tolist()) == ([0.0, 0.0], [-3.0, -3.0])
        del kept

    def test_one_loss_before_and_after_an_update_is_two(self):
        scaler = GradScaler("cpu", init_scale=4.0)
        param = nn.Parameter(torch.zeros(2))
        before = scaler.scale(param.sum())
        scaler.update(8.0)
        with pytest.raises(RuntimeError, match="two scaled losses in one backward pass"):
            (before + scaler.scale(param.sum())).backward()


@pytest.mark.parametrize("kind", KINDS)
class TestKindsOfPasses:
    def test_gradient_penalty_between_passes(self, kind):
        """autograd.grad with create_graph, whose result enters another loss."""
        world = World(kind, 2)
        p = world.params[0]
        world.backward(world.scale(0, {0: [1.0, 2.0, 3.0], 1: [1.0]}))
        waiting = p.grad.clone()
        scaled = world.scaler.scale((p.float() * p.float()).sum() + p.float().sum(), 1)
        (grad,) = torch.autograd.grad(scaled, [p], create_graph=True)
        assert torch.equal(p.grad, waiting)
        penalty = (grad.float() / world.scaler.get_scale(1)).pow(2).sum()  # at 0: sum of (2 p + 1)^2
        world.arrived.clear()
        world.scaler.scale(penalty, 1).backward()
        assert [i for i, _ in world.arrived] == [0]
        world.pending[0][world.tags[1]] = torch.full((3,), 4.0 * 8.0)
        world.step(0)

    def test_autograd_grad_changes_nothing(self, kind):
        world = two_pending(kind)
        for k in (0, 1):
            world.grad(world.scale(k, {0: [1.0, 2.0, 3.0], 2: [4.0, 4.0]}))
        world.step(0)
        world.step(1)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing(self, kind, use_reentrant):
        world = World(kind, 2)
        world.set_scale(128.0, 1)
        p, q, _ = world.params

        def block(x):
            return x * p.float()[:1] + q.float()

        x = torch.full((1,), 2.0, requires_grad=True)
        for k in (0, 1, 0):
            world.arrived.clear()
            loss = checkpoint(block, x * (k + 1), use_reentrant=use_reentrant).sum()
            world.scaler.scale(loss, k).backward()
            for i, grad in world.arrived:
                tag = world.tags[k]
                world.pending[i][tag] = world.pending[i].get(tag, torch.zeros_like(grad)) + grad
        assert world.total(0).tolist() == [2.0 + 4.0 + 2.0, 0.0, 0.0]
        assert world.total(1).tolist() == [3.0]
        world.step(0)

    def test_a_retained_graph_used_again_after_an_update(self, kind):
        """It keeps its scale; a new pass counts, under whatever scale."""
        world = World(kind, 2)
        graph = world.scale(0, {0: [1.0, 2.0, 3.0], 2: [1.0, 1.0]})
        for _ in range(4):
            world.backward(graph)
            world.step(0)
            world.update()
        assert world.scaler.get_scale(0) == 32.0
        world.step(1)
        world.backward(world.scale(0, {2: [1.0, 1.0]}))
        world.update()
        world.step(1)

    def test_a_pass_that_reaches_nobody_we_watch(self, kind):
        world = two_pending(kind)
        world.scaler.scale(torch.ones(2, requires_grad=True).sum() * 3, 0).backward()
        world.step(0)
        world.step(1)

    def test_a_callback_at_the_end_of_the_pass_may_write_into_grad(self, kind):
        """So DistributedDataParallel averages over ranks: its callback is queued after ours."""
        world = two_pending(kind)
        p = world.params[0]
        halve = p.register_post_accumulate_grad_hook(
            lambda p: torch.autograd.Variable._execution_engine.queue_callback(lambda: p.grad.mul_(0.5))
        )
        world.arrived.clear()
        world.scale(0, {0: [2.0, 2.0, 2.0]}).scaled.backward()
        halve.remove()
        tag = world.tags[0]
        world.pending[0][tag] = (world.pending[0][tag] + world.arrived[0][1]) * 0.5
        world.step(0)
        world.step(1)

    def test_a_nested_pass(self, kind):
        """A backward pass of an unscaled loss inside a scaled one."""
        world = two_pending(kind)
        inner = torch.ones(2, requires_grad=True)

        class Nested(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, grad):
                with torch.enable_grad():
                    (inner * 2).sum().backward()
                return grad

        world.arrived.clear()
        world.scaler.scale((Nested.apply(world.params[0].float()) * 2).sum(), 0).backward()
        for i, grad in world.arrived:
            world.pending[i][world.tags[0]] = world.pending[i][world.tags[0]] + grad
        assert inner.grad.tolist() == [2.0, 2.0]
        world.step(0)


@pytest.mark.parametrize("num_losses", [1, 2])
def test_a_loss_scaled_inside_a_pass(num_losses):
    """With several losses its gradients could not be told from the outer loss's; with one they add up, as in torch."""
    world = World("masters", num_losses)
    p, q, _ = world.params

    def inner(grad):
        with torch.enable_grad():
            world.scaler.scale(q.float().sum() * 3, num_losses - 1).backward()

    p.register_hook(inner)
    outer = world.scale(0, {0: [1.0, 1.0, 1.0]}).scaled
    if num_losses == 2:
        with pytest.raises(RuntimeError, match="loss 1 was scaled inside a backward pass"):
            outer.backward()
        world.zero("model", True)
    else:
        outer.backward()
        world.scaler.step(world.optimizers[0])
        assert (p.tolist(), q.tolist()) == ([-1.0, -1.0, -1.0], [-3.0])


def test_a_step_inside_the_pass():
    """A hook that steps as soon as the last gradient has arrived."""
    world = World("masters", 2)
    graph = world.scale(1, {2: [1.0, 2.0]})
    world.params[2].register_post_accumulate_grad_hook(lambda p: world.optimizers[1].step())
    graph.scaled.backward()
    assert world.params[2].tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("kind", KINDS)
class TestGradientsByHand:
    def test_one_loss_they_are_scaled_by_the_current_scale(self, kind):
        world = World(kind, 1)
        world.scaler.update(16.0)
        for o, owned in enumerate(OWNED):
            for i in owned:
                world.params[i].grad = torch.full_like(world.params[i], 32.0)
            world.scaler.step(world.optimizers[o])
            assert all(world.params[i].tolist() == [-2.0] * SIZES[i] for i in owned)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_one_loss_after_an_update(self, kind, in_place):
        """Assigned, or written into zeroed gradients: they are new, so today's scale holds."""
        world = World(kind, 1, growth_interval=1)
        o = 0
        for expected in (-1.0, -3.0):
            scale = world.scaler.get_scale()
            for i in OWNED[o]:
                p = world.params[i]
                if in_place and p.grad is not None:
                    p.grad.copy_(torch.full_like(p, 2.0 * scale))
                else:
                    p.grad = torch.full_like(p, (1.0 if expected == -1.0 else 2.0) * scale)
            world.scaler.step(world.optimizers[o])
            world.scaler.update()
            world.optimizers[o].zero_grad(set_to_none=not in_place)
            assert all(world.params[i].tolist() == [expected] * SIZES[i] for i in OWNED[o])
        assert world.scaler.get_scale() == 32.0

    def test_one_loss_then_a_pass_on_top(self, kind):
        world = World(kind, 1, growth_interval=1)
        p = world.params[0]
        world.backward(world.scale(0, {0: [1.0, 1.0, 1.0]}))
        world.step(0)
        world.update()
        world.optimizers[0].zero_grad()
        p.grad = torch.full_like(p, 2 * 16.0)
        world.scale(0, {0: [1.0, 1.0, 1.0]}).scaled.backward()
        with torch.no_grad():
            for tensor in (p, *world.masters(0)):
                tensor.zero_()
        world.scaler.step(world.optimizers[0])
        assert p.tolist() == [-3.0, -3.0, -3.0]

    def test_several_losses_refuse_them(self, kind):
        world = two_pending(kind)
        world.assign(0)
        for call in (
            lambda: world.scaler.step(world.optimizers[0]),
            lambda: world.scaler.unscale_(world.optimizers[0]),
            lambda: world.scaler.scale(world.params[1].float().sum(), 1).backward(),
        ):
            error = world.refused(call, RuntimeError)
            assert "was not made by a scaled loss" in str(error)
            assert "group 0, parameter 0 of shape (3,)" in str(error)
        world.step(1)  # the other optimizer's are in order
        world.zero("0", True)
        world.backward(world.scale(0, {0: [1.0, 1.0, 1.0]}))
        world.step(0)

    @pytest.mark.parametrize("num_losses", [1, 2])
    def test_after_unscale_they_are_unscaled(self, kind, num_losses):
        world = World(kind, num_losses)
        world.backward(world.scale(0, {0: [1.0, 2.0, 3.0], 1: [1.0]}))
        world.unscale(0)
        world.scaler.scale(world.params[2].float().sum(), 0).backward()  # of the other optimizer, in between
        world.assign(0)
        world.scaler.step(world.optimizers[0])
        assert world.params[0].tolist() == [-1.0, -1.0, -1.0]
        assert world.params[1].tolist() == [-1.0]

    def test_what_was_assigned_after_unscale_stays_known_after_the_step(self, kind):
        world = World(kind, 2)
        world.backward(world.scale(0, {0: [1.0, 2.0, 3.0], 1: [1.0]}))
        world.unscale(0)
        world.assign(0)
        world.step(0)
        world.backward(world.scale(1, {0: [2.0, 2.0, 2.0]}))  # on top, as nobody has zeroed
        world.update()
        world.step(0)

    def test_an_update_does_not_make_an_unclear_edit_clear(self, kind):
        """One loss, two of its scales: the edit is of one of them, before and after yet another scale."""
        world = World(kind, 1)
        p = world.params[0]
        for scale in (16.0, 32.0):
            world.scale(0, {0: [1.0, 1.0, 1.0]}).scaled.backward()
            world.scaler.update(scale)
        world.scale(0, {0: [1.0, 1.0, 1.0]}).scaled.backward()
        p.grad.mul_(0.5)
        world.scaler.update(64.0)
        with pytest.raises(RuntimeError, match="was edited while gradients of 3 losses are pending"):
            world.scaler.step(world.optimizers[0])

    def test_edited_in_place_under_one_label(self, kind):
        """Clipping by hand, say: the user's right."""
        world = World(kind, 2)
        world.backward(world.scale(1, {0: [1.0, 2.0, 3.0], 1: [1.0]}))
        world.edit(0)
        world.set_scale(64.0)
        world.step(0)

    def test_edited_while_several_wait(self, kind):
        world = two_pending(kind)
        world.edit(0)
        for call in (
            lambda: world.scaler.step(world.optimizers[0]),
            lambda: world.scaler.step(world.optimizers[1]),
            lambda: world.scaler.scale(world.params[1].float().sum(), 1).backward(),
        ):
            assert "was edited while gradients of 2 losses" in str(world.refused(call, RuntimeError))

    def test_edited_after_unscale(self, kind):
        world = two_pending(kind)
        world.unscale(0)
        world.edit(0)
        world.step(0)


@pytest.mark.parametrize("kind", KINDS)
class TestUnscale:
    @pytest.mark.parametrize("k", [0, 1, 2])
    def test_an_overflow_it_found_backs_off_the_loss_at_fault(self, kind, k):
        world = World(kind)
        for loss in (2, 0, 1):
            world.backward(world.scale(loss, {0: [INF if loss == k else 1.0, 1.0, 1.0], 1: [1.0]}))
        world.unscale(0)
        world.step(0)
        world.update()
        assert [world.scaler.get_scale(j) for j in range(3)] == [4.0 if j == k else 8.0 for j in range(3)]

    def test_without_a_step_its_overflow_does_not_skip_the_next_one(self, kind):
        world = World(kind, 2)
        world.backward(world.scale(0, {0: [INF, 1.0, 1.0]}))
        world.unscale(0)
        world.update()
        world.zero("model", True)
        world.backward(world.scale(1, {0: [1.0, 1.0, 1.0]}))
        world.step(0)
        assert world.params[0].tolist() == [-1.0, -1.0, -1.0]

    def test_its_verdict_stands_though_other_gradients_take_their_place(self, kind):
        """As in torch, until the next update."""
        world = World(kind, 2)
        world.backward(world.scale(0, {0: [INF, 1.0, 1.0]}))
        world.unscale(0)
        world.zero("model", True)
        world.backward(world.scale(1, {0: [1.0, 1.0, 1.0]}))
        world.step(0)
        assert world.params[0].tolist() == [0.0, 0.0, 0.0]
        world.update()
        assert [world.scaler.get_scale(k) for k in range(2)] == [4.0, 8.0]
        world.step(0)
        assert world.params[0].tolist() != [0.0, 0.0, 0.0]

    def test_backward_passes_may_follow_it(self, kind):
        """In torch their scaled gradients would be added to unscaled ones."""
        world = two_pending(kind)
        world.unscale(0)
        world.backward(world.scale(1, {0: [1.0, 1.0, 1.0], 2: [1.0, 1.0]}))
        world.backward(world.scale(0, {1: [2.0]}))
        world.step(0)
        world.step(1)
        world.update()

    def test_of_nothing(self, kind):
        world = World(kind, 2)
        world.unscale(0)
        world.step(0)
        world.backward(world.scale(0, {0: [1.0, 1.0, 1.0]}))
        world.step(0)

    def test_no_gradient_of_an_earlier_one_is_left(self, kind):
        """A norm over the masters would count it."""
        world = two_pending(kind)
        world.unscale(0)
        world.update()
        world.zero("model", True)
        world.backward(world.scale(0, {1: [1.0]}))
        world.unscale(0)
        assert [m.grad is None for m in world.masters(0)] == [True, False]


class TestManySources:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("scales", [7, 8, 9, 16, 30])
    def test_old_scales_of_one_loss_are_folded(self, kind, scales):
        """More than eight values of one scale wait on a parameter, then another loss too."""
        world = World(kind, 2)
        p = world.params[0]
        total = 0
        for n in range(scales):
            world.scaler.update(2.0 ** (n % 5), loss_id=0)
            world.scaler.scale((p.float() * (n + 1)).sum(), 0).backward()
            total += n + 1
        # This does not reach it: one of them comes back to .grad, from 8 scales on what was folded into FP32.
        world.scaler.scale(world.params[1].float().sum(), 1).backward()
        assert p.grad is not None
        assert (p.grad.dtype == torch.float32) == (scales >= 8 or kind == "watched")
        world.scaler.scale((p.float() * 3).sum(), 1).backward()
        world.scaler.step(world.optimizers[0])
        assert (-world.masters(0)[0]).tolist() == [total + 3.0] * 3
        assert max(map(len, world.scaler._pending(world.optimizers[0]))) <= layout.MAX_SOURCES

    @pytest.mark.parametrize("overflow_at", [0, 5, 11])
    def test_a_folded_overflow_is_still_its_losses(self, overflow_at):
        world = World("masters", 2)
        world.backward(world.scale(1, {0: [1.0, 1.0, 1.0]}))
        for n in range(12):
            world.scaler.update(2.0 ** (n % 5), loss_id=0)
            factor = INF if n == overflow_at else 1.0
            world.scaler.scale((world.params[0].float() * factor).sum(), 0).backward()
        scale = world.scaler.get_scale(0)
        world.scaler.step(world.optimizers[0])
        world.scaler.update()
        assert world.params[0].tolist() == [0.0, 0.0, 0.0]
        assert [world.scaler.get_scale(k) for k in range(2)] == [scale / 2, 8.0]

    def test_a_folded_pass_still_counts_once(self):
        """It waits for two optimizers; on the parameter of one of them it has been folded."""
        world = World("masters", 2, growth_interval=100)
        p, q = world.params[2], world.params[0]
        world.scaler.scale(p.float().sum() + q.float().sum(), 0).backward()
        for n in range(9):
            world.scaler.update(2.0 ** (n % 5), loss_id=1)
            world.scaler.scale(p.float().sum(), 1).backward()
        assert {label.scale for label, _ in world.scaler._pending(world.optimizers[1])[0] if label.loss_id == 0} == {
            None
        }
        updates = []
        for o in (1, 0):
            world.scaler.step(world.optimizers[o])
            world.scaler.update()
            updates.append(world.scaler.statistics()[0].updates)
        assert (p.tolist(), q.tolist()) == ([-10.0, -10.0], [-1.0, -1.0, -1.0])
        assert updates == [1, 1]

    def test_folding_float64_gradients_keeps_them_float64(self):
        param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        scaler = GradScaler("cpu", init_scale=4.0, num_losses=2)
        optimizer = torch.optim.SGD([param], lr=1.0)
        scaler.watch(optimizer)
        scaler.scale(param.sum())
        for n in range(12):
            scaler.update(2.0**n, loss_id=0)
            scaler.scale((param * (1.0 + 2.0**-40)).sum(), 0).backward()
        scaler.scale(torch.ones(1, requires_grad=True).sum(), 1).backward()
        assert param.grad.dtype == torch.float64
        scaler.step(optimizer)
        assert param.tolist() == [-12 * (1.0 + 2.0**-40)] * 2

    @pytest.mark.parametrize("kind", SINGLE)
    def test_eight_losses_are_fine_nine_are_refused(self, kind):
        rig = Rig(kind, [4.0] * 9, size=2)
        for k in range(8):
            rig.backward(k)
        assert len(rig.scaler._pending(rig.optimizer)[0]) == 8
        rig.backward(8)
        for call in (lambda: rig.scaler.step(rig.optimizer), lambda: rig.backward(0)):
            with pytest.raises(
                RuntimeError, match=r"9 losses are pending on .*shape \(2,\).*at most 8.*zero the gradients"
            ):
                call()
        assert rig.param.tolist() == [0.0, 0.0]
        rig.optimizer.zero_grad()
        rig.made.clear()
        rig.backward(3)
        assert_correctly_rounded(rig.step(), rig.made)


@pytest.mark.parametrize("kind", KINDS)
class TestOverflow:
    @pytest.mark.parametrize("guilty", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
    @pytest.mark.parametrize("value", [INF, -INF, NAN])
    def test_backs_off_its_own_loss_alone_and_skips_the_step_whole(self, kind, guilty, order, value):
        world = World(kind)
        for k in order:
            world.backward(world.scale(k, {0: [1.0, 1.0, value if k in guilty else 1.0], 1: [1.0], 2: [2.0, 2.0]}))
        world.step(0)
        assert [p.tolist() for p in world.params[:2]] == [[0.0, 0.0, 0.0], [0.0]]
        world.step(1)
        assert world.params[2].tolist() == [-6.0, -6.0]
        world.update()
        assert [world.scaler.get_scale(k) for k in range(3)] == [4.0 if k in guilty else 8.0 for k in range(3)]
        assert [s.growth_tracker for s in world.scaler.statistics()] == [0 if k in guilty else 1 for k in range(3)]

    def test_a_sum_that_overflows_is_everybodys(self, kind):
        """Each share is finite, their FP32 sum is not: nobody can tell whose fault it is."""
        param = nn.Parameter(torch.zeros(1))
        scaler = GradScaler("cpu", init_scale=1.0, num_losses=2)
        optimizer = torch.optim.SGD([param], lr=1.0)
        if kind == "masters":
            optimizer = MixedPrecisionOptimizer(optimizer, scaler)
        else:
            scaler.watch(optimizer)
        for k in range(2):
            scaler.scale((param * 3e38).sum(), k).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (param.tolist(), [scaler.get_scale(k) for k in range(2)]) == ([0.0], [0.5, 0.5])

    def test_an_unscaled_product_that_overflows(self, kind):
        """The gradient is finite; divided by its small scale it is not. torch takes this step."""
        param = nn.Parameter(torch.zeros(1))
        scaler = GradScaler("cpu", init_scale=2.0**-20, num_losses=2)
        optimizer = torch.optim.SGD([param], lr=1.0)
        if kind == "masters":
            optimizer = MixedPrecisionOptimizer(optimizer, scaler)
        else:
            scaler.watch(optimizer)
        param_loss = scaler.scale(param.sum(), 1)
        param_loss.backward()
        param.grad.fill_(1e38)
        scaler.step(optimizer)
        scaler.update()
        assert (param.tolist(), [scaler.get_scale(k) for k in range(2)]) == ([0.0], [2.0**-20, 2.0**-21])


@pytest.mark.parametrize("kind", KINDS)
class TestTwoOptimizers:
    @pytest.mark.parametrize("update_each", [False, True])
    @pytest.mark.parametrize("num_losses", [1, 2])
    def test_each_pass_counts_once(self, kind, update_each, num_losses):
        world = World(kind, num_losses, growth_interval=3)
        for _ in range(6):
            for k in range(num_losses):
                world.backward(world.scale(k, {0: [1.0, 1.0, 1.0], 2: [2.0, 2.0]}))
            world.step(0)
            if update_each:
                world.update()
            world.step(1)
            world.update()
            world.zero("model", True)
        assert [world.scaler.get_scale(k) for k in range(num_losses)] == [32.0] * num_losses
        assert [s.updates for s in world.scaler.statistics()] == [6] * num_losses

    @pytest.mark.parametrize("update_each", [False, True])
    @pytest.mark.parametrize("where", [0, 2, "both"])
    def test_an_overflow_backs_off_once(self, kind, update_each, where):
        world = World(kind, 2)
        spikes = {i: INF if where in (i, "both") else 1.0 for i in (0, 2)}
        world.backward(world.scale(1, {i: [spike, 1.0, 1.0] for i, spike in spikes.items()}))
        world.step(0)
        if update_each:
            world.update()
        world.step(1)
        world.update()
        assert [world.scaler.get_scale(k) for k in range(2)] == [8.0, 4.0]

    def test_a_generator_and_a_discriminator(self, kind):
        """Two losses for one network, a third that reaches both; `update()` after each step; the scales move apart."""
        world = World(kind, 3)
        for n in range(12):
            spike = INF if n % 5 == 3 else 1.0
            world.zero("0", True)
            world.backward(world.scale(0, {0: [1.0, 1.0, 1.0], 1: [1.0]}))
            world.backward(world.scale(1, {0: [spike, 1.0, 1.0], 1: [1.0]}))
            world.step(0)
            world.update()
            world.zero("1", True)
            world.backward(world.scale(2, {0: [1.0, 1.0, 1.0], 2: [2.0, 3.0]}))
            world.step(1)
            world.update()
        assert len({world.scaler.get_scale(k) for k in range(3)}) == 2

    def test_the_second_step_uses_the_scale_that_scaled_its_loss(self, kind):
        world = World(kind, 1, growth_interval=1)
        world.backward(world.scale(0, {0: [1.0, 1.0, 1.0], 2: [2.0, 2.0]}))
        world.step(0)
        world.update()
        assert world.scaler.get_scale() == 16.0
        world.step(1)
        assert world.params[2].tolist() == [-2.0, -2.0]

    def test_new_gradients_between_step_and_update_keep_their_scale(self, kind):
        world = World(kind, 1, growth_interval=1)
        for i in (0, 2):
            world.backward(world.scale(0, {i: [1.0, 1.0, 1.0]}))
        world.step(0)
        world.zero("0", True)
        world.scaler.scale(world.params[1].float().sum(), 0).backward()
        world.scaler.update()
        world.scaler.step(world.optimizers[0])
        assert world.params[1].tolist() == [-1.0]
        world.scaler.step(world.optimizers[1])
        assert world.params[2].tolist() == [-1.0, -1.0]


class TestLifetimes:
    def test_a_dead_optimizers_gradients_are_forgotten(self):
        scaler = GradScaler("cpu", init_scale=4.0, num_losses=2)
        params = [nn.Parameter(torch.zeros(2, dtype=torch.float16)) for _ in range(2)]
        optimizers = [MixedPrecisionOptimizer(torch.optim.SGD([p], lr=1.0), scaler) for p in params]
        for k in range(2):
            scaler.scale(sum(p.float().sum() for p in params), k).backward()
        del optimizers[1], params[1]
        gc.collect()
        scaler.scale(params[0].float().sum(), 0).backward()
        optimizers[0].step()
        scaler.update()
        assert params[0].tolist() == [-3.0, -3.0]
        assert len(scaler._ledger._records) == 1

    def test_a_parameter_that_died_leaves_nothing(self):
        scaler = GradScaler("cpu", num_losses=2)
        keep = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([keep], lr=1.0)
        scaler.watch(optimizer)
        for _ in range(20):
            param = nn.Parameter(torch.zeros(2))
            optimizer.param_groups[0]["params"] = [keep, param]
            scaler.scale(param.sum() + keep.sum(), 0).backward()
            scaler.scale(param.sum() + keep.sum(), 1).backward()
            optimizer.zero_grad()
        optimizer.param_groups[0]["params"] = [keep]
        scaler.scale(keep.sum(), 0).backward()
        assert len(scaler._ledger._records) == 1

    def test_gradients_set_aside_are_not_copied(self):
        rig = Rig("masters", [4.0, 8.0])
        rig.backward(0)
        first = rig.param.grad.data_ptr()
        rig.backward(1)
        assert first in [grad.data_ptr() for _, grad in rig.scaler._pending(rig.optimizer)[0]]

    def test_gradients_that_the_next_pass_overwrites_are_copied(self):
        """DistributedDataParallel's gradients are views of its buckets."""
        rig = Rig("masters", [4.0, 8.0], size=4)
        bucket = torch.zeros(16, dtype=torch.float16)
        rig.backward(0)
        bucket[4:8] = rig.param.grad
        rig.param.grad = bucket[4:8]
        rig.scaler._ledger._end(rig.scaler._device_state.labels[0])  # as at the end of a pass
        rig.backward(1)
        bucket.fill_(NAN)
        assert_correctly_rounded(rig.step(), rig.made)

    def test_a_graph_that_is_never_run_costs_nothing(self):
        rig = Rig("masters", [4.0, 8.0])
        for k in (0, 1, 0):
            rig.scaler.scale(rig.loss(), k)
        rig.backward(1)
        assert_correctly_rounded(rig.step(), rig.made)


class Machine(RuleBasedStateMachine):
    """Any calls in any order: `World` knows what each of them should do."""

    kinds = KINDS

    @initialize(data=st.data(), num_losses=st.integers(2, 3), hysteresis=st.integers(1, 2))
    def build(self, data, num_losses, hysteresis):
        self.world = World(data.draw(st.sampled_from(self.kinds)), num_losses, hysteresis=hysteresis)
        self.graphs = []
        self.saved = self.world.save()

    @rule(
        k=st.integers(0, 2),
        coefficients=st.dictionaries(
            st.integers(0, 2), st.lists(st.integers(-4, 4).map(float), min_size=3, max_size=3), min_size=1
        ),
        spike=st.sampled_from([None] * 6 + [INF, NAN]),
        broken=st.sampled_from([None] * 5 + [0, 1, 2]),
    )
    def scale_and_backward(self, k, coefficients, spike, broken):
        first = next(iter(coefficients))
        if spike is not None:
            coefficients[first][0] = spike
        graph = self.world.scale(k % self.world.num_losses, coefficients, broken if broken in coefficients else None)
        self.graphs = [*self.graphs[-3:], graph]
        self.world.backward(graph)

    @precondition(lambda self: self.graphs)
    @rule(n=st.integers(0, 3))
    def backward_again(self, n):
        self.world.backward(self.graphs[n % len(self.graphs)])

    @precondition(lambda self: self.graphs)
    @rule(n=st.integers(0, 3))
    def autograd_grad(self, n):
        self.world.grad(self.graphs[n % len(self.graphs)])

    @rule(which=st.sampled_from(["model", "0", "1"]), set_to_none=st.booleans())
    def zero(self, which, set_to_none):
        self.world.zero(which, set_to_none)

    @rule(o=st.integers(0, 1), by_itself=st.booleans())
    def step(self, o, by_itself):
        self.world.step(o, by_itself)

    @rule(o=st.integers(0, 1), k=st.sampled_from([None, None, 0, 1]))
    def step_and_update(self, o, k):
        self.world.step(o)
        self.world.update(k)

    @rule(
        data=st.data(),
        spikes=st.lists(st.sampled_from([1.0, 1.0, 2.0, INF, NAN]), min_size=3, max_size=3),
        unscaled=st.booleans(),
        o=st.integers(0, 1),
    )
    def iteration(self, data, spikes, unscaled, o):
        for k in data.draw(st.permutations(range(self.world.num_losses))):
            self.world.backward(self.world.scale(k, {0: [spikes[k], 1.0, 2.0], 2: [1.0, spikes[k]]}))
        if unscaled:
            self.world.unscale(o)
        self.world.step(o)
        self.world.update()

    @rule(o=st.integers(0, 1))
    def unscale(self, o):
        self.world.unscale(o)

    @rule(k=st.sampled_from([None, None, 0, 1]))
    def update(self, k):
        self.world.update(k)

    @rule(value=st.sampled_from([1.0, 4.0, 256.0]), k=st.sampled_from([None, 0, 1]))
    def set_scale(self, value, k):
        self.world.set_scale(value, k)

    @rule()
    def save(self):
        self.saved = self.world.save()

    @rule()
    def load(self):
        self.world.load(self.saved)

    @rule(i=st.integers(0, 2))
    def edit(self, i):
        self.world.edit(i)

    @rule(i=st.integers(0, 2))
    def assign(self, i):
        self.world.assign(i)

    @precondition(lambda self: self.world.edited or self.world.foreign)
    @rule()
    def follow_the_error_message(self):
        self.world.zero("model", True)

    @invariant()
    def few_sources(self):
        """Folding has its own tests: the model does not follow it."""
        if any(len(pending) > 4 for pending in self.world.pending):
            self.world.zero("model", True)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("which", ["model", "0"])
def test_a_step_on_what_unscale_found_and_the_user_dropped(stepped, which):
    world = World("masters", 2)
    for k in range(2):
        world.backward(world.scale(k, {0: [1.0, 1.0, 2.0], 2: [1.0, 1.0]}))
    if stepped:
        world.step(0)
        world.update()
    world.unscale(0)
    world.zero(which, True)
    world.step(0)
    assert world.votes[0].stage == STEPPED
    world.update()
    world.backward(world.scale(0, {0: [1.0, 1.0, 2.0], 2: [1.0, 1.0]}))
    world.step(0)


def test_state_machine():
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=QUIET)
    )


@pytest.mark.fuzz
def test_state_machine_for_long():
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=5000, stateful_step_count=100, deadline=None, suppress_health_check=QUIET),
    )


def _unscale_by_todays_scale(monkeypatch):
    """Labels follow the scale instead of keeping theirs."""

    def sabotaged(self, loss_id, fresh):
        self.labels[loss_id] = type(self.labels[loss_id])(loss_id, self.scales[loss_id])

    monkeypatch.setattr(LossScales, "_retire", sabotaged)


def _back_off_all_losses(monkeypatch):
    update_scale = cpu.update_scale

    def sabotaged(scale, previous, counters, votes, policy):
        votes[:, :, 0] = votes[:, :, 0].max()
        update_scale(scale, previous, counters, votes, policy)

    monkeypatch.setattr(cpu, "update_scale", sabotaged)


def _growth_one_late(monkeypatch):
    next_state = reference.next_state

    def sabotaged(state, votes, policy):
        after = next_state(state, votes, policy)
        return after if after.growths == state.growths else state

    monkeypatch.setattr(reference, "next_state", sabotaged)


def _drop_what_was_set_aside(monkeypatch):
    end = Ledger._end

    def sabotaged(self, label):
        for record in self._records.values():
            record.aside.clear()
        end(self, label)

    monkeypatch.setattr(Ledger, "_end", sabotaged)


def _keep_what_was_zeroed(monkeypatch):
    monkeypatch.setattr(Ledger, "_check_edits", lambda self: None)


def _add_up_scaled_gradients(monkeypatch):
    monkeypatch.setattr(Ledger, "_set_aside", lambda self, label: None)


def _forget_what_unscale_found(monkeypatch):
    monkeypatch.setattr(GradScaler, "_settle_votes", lambda self, state, pending: None)


def _count_every_step(monkeypatch):
    monkeypatch.setattr(
        gradients.Label, "counted", property(lambda self: False, lambda self, value: None), raising=False
    )


def _never_skip(monkeypatch):
    monkeypatch.setattr(plain, "step", lambda optimizer, found_inf, args, kwargs: optimizer.step(*args, **kwargs))


SABOTAGES = [
    _unscale_by_todays_scale,
    _back_off_all_losses,
    _growth_one_late,
    _drop_what_was_set_aside,
    _keep_what_was_zeroed,
    _add_up_scaled_gradients,
    _forget_what_unscale_found,
    _count_every_step,
    _never_skip,
]


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_the_state_machine_notices_sabotage(sabotage, monkeypatch):
    sabotage(monkeypatch)
    once = settings(
        max_examples=300,
        stateful_step_count=50,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=QUIET,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
    )
    with pytest.raises((AssertionError, RuntimeError)):
        run_state_machine_as_test(Machine, settings=once)


def _wrong_by_an_ulp(monkeypatch):
    update = cpu.update

    def sabotaged(table, sources, rule, decision):
        update(table, sources, rule, decision)
        for entry in table.entries:
            entry.master.data = torch.nextafter(entry.master.data, torch.tensor(INF))

    monkeypatch.setattr(cpu, "update", sabotaged)


def _in_order_of_arrival(monkeypatch):
    pending = Ledger._pending
    monkeypatch.setattr(Ledger, "_pending", lambda self, param, default: pending(self, param, default)[::-1])


def test_the_sum_of_two_notices_one_ulp(monkeypatch):
    _wrong_by_an_ulp(monkeypatch)
    with pytest.raises(AssertionError, match="not the rounded sum"):
        TestTheSum().test_two_losses_at_powers_of_two("masters", (0, 1), (8.0, 1024.0))


def test_the_sum_of_three_notices_the_order(monkeypatch):
    _in_order_of_arrival(monkeypatch)
    with pytest.raises(AssertionError, match="not in order of loss_id"):
        TestTheSum().test_three_losses_at_powers_of_two("masters", (0, 1, 2))


def test_the_sum_notices_a_factor_of_two(monkeypatch):
    inverse = reference.inverse
    monkeypatch.setattr(reference, "inverse", lambda scale: inverse(scale) * (2.0 if float(scale) == 3.0 else 1.0))
    with pytest.raises(AssertionError):
        TestTheSum().test_any_scales("masters", 5)
