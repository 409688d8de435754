"""`GradScaler` beside `torch.amp.GradScaler` in lockstep, and with several losses against a plain-Python model."""

import copy
import gc
import io
import itertools
import math
import pickle
import random
import re
from collections import namedtuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mpengine
from mpengine import cpu, reference
from mpengine.grad_scaler import GradScaler
from mpengine.loss_scales import LossScales
from mpengine.scaling import next_state
from tests import scale_model
from tests.scale_model import ScaleModel

INF, NAN = math.inf, math.nan


def bits(tensor: torch.Tensor | None) -> list[int] | None:
    return None if tensor is None else tensor.detach().reshape(-1).view(torch.int32).tolist()


def plain(message: str) -> str:
    return " ".join(message.split()).rstrip(".")


def outcome(action, *args):
    """What an action returned, or the exception it raised."""
    try:
        return action(*args)
    except (AssertionError, RuntimeError, ValueError) as error:
        return error


def assert_same_outcome(ours, theirs) -> None:
    """The same value; or torch's exception type, its message being where ours begins."""
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs), f"torch: {theirs!r}, ours: {ours!r}"
        assert plain(str(ours)).startswith(plain(str(theirs))), f"torch: {theirs}, ours: {ours}"
    else:
        assert not isinstance(ours, Exception), f"torch: {theirs!r}, ours: {ours!r}"
        assert ours == theirs


class Side:
    """One of the two scalers, with two plain optimizers."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.params = [nn.Parameter(torch.tensor([0.5, -3.0])), nn.Parameter(torch.tensor([1.0]))]
        self.optimizers = [torch.optim.SGD([param], lr=0.125) for param in self.params]
        self.saved = None
        self.watch()

    def watch(self) -> None:
        """Ours then knows which gradients of an optimizer that has not stepped yet were assigned after an update."""
        for optimizer in self.optimizers if isinstance(self.scaler, GradScaler) else ():
            self.scaler.watch(optimizer)

    def assign(self, i: int, values: list[float], scaled: bool) -> None:
        factor = self.scaler.get_scale() if scaled else 1.0
        shape = self.params[i].shape
        self.params[i].grad = torch.tensor([v * factor for v in values], dtype=torch.float32)[: shape[0]].clone()

    def scale(self, value: float) -> list[int]:
        return bits(self.scaler.scale(torch.tensor(value, requires_grad=True)))

    def backward(self, i: int, factor: float) -> list[int]:
        scaled = self.scaler.scale((self.params[i] * factor).sum())
        scaled.backward()
        return bits(scaled)

    def clear(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def update(self) -> None:
        self.scaler.update()
        self.clear()

    def set_scale(self, value: float, as_tensor: bool) -> None:
        self.scaler.update(torch.tensor(value) if as_tensor else value)
        self.clear()

    def save(self) -> dict:
        self.saved = self.scaler.state_dict()
        return {key: value for key, value in self.saved.items() if key != "mpengine"}

    def load(self) -> None:
        if self.saved is not None:
            self.scaler.load_state_dict(self.saved)
            self.clear()

    def pickle(self) -> None:
        self.scaler = pickle.loads(pickle.dumps(self.scaler))
        self.watch()

    def deepcopy(self) -> None:
        self.scaler = copy.deepcopy(self.scaler)
        self.watch()

    def state(self) -> dict:
        return {
            "scale": self.scaler.get_scale(),
            "tracker": self.scaler._get_growth_tracker(),
            "device scale": bits(self.scaler._scale),
            "device tracker": bits(self.scaler._growth_tracker),
            "params": [bits(p) for p in self.params],
            "grads": [bits(p.grad) for p in self.params],
        }


class Lockstep:
    """Drives both sides with the same random calls, in order and out of order, and compares them after each."""

    def __init__(self, seed: int, make_ours=GradScaler) -> None:
        self.draw = random.Random(seed)
        arguments = {
            "init_scale": self.draw.choice([1.0, 65536.0, 2.0**100]),
            "growth_factor": self.draw.choice([2.0, 1.3, 8.0]),
            "backoff_factor": self.draw.choice([0.5, 0.9, 0.3]),
            "growth_interval": self.draw.choice([1, 2, 5]),
        }
        self.theirs = Side(torch.amp.GradScaler("cpu", **arguments))
        self.ours = Side(make_ours("cpu", max_consecutive_skips=None, **arguments))
        self.steps = 0
        self.log: list[tuple] = []
        self.unscaled: set[int] = set()  # optimizers that a backward pass must not reach: torch would scale twice

    def both(self, name: str, *args) -> bool:
        """Whether it succeeded."""
        return self._both(name, *args, of=lambda side: getattr(side, name)(*args))

    def call(self, method: str, i: int) -> bool:
        """`unscale_` or `step`; whether it succeeded."""
        self.steps += method == "step"
        self.unscaled.add(i)
        return self._both(method, i, of=lambda side: getattr(side.scaler, method)(side.optimizers[i]))

    def _both(self, *call, of) -> bool:
        self.log = [*self.log[-14:], call]
        theirs, ours = outcome(of, self.theirs), outcome(of, self.ours)
        try:
            assert_same_outcome(ours, theirs)
            assert self.ours.state() == self.theirs.state()
        except AssertionError as error:
            error.add_note(f"the last calls: {self.log}")
            raise
        return not isinstance(theirs, Exception)

    def gradient(self, i: int) -> None:
        if self.draw.random() < 0.5 and i not in self.unscaled:
            self.both("backward", i, self.draw.choice([1.0, 1.0, 0.37, INF, NAN]))
        else:
            value = self.draw.choice([1.5, -0.2, 0.0, 1.0, INF, -INF, NAN])
            self.both("assign", i, self.draw.choice([[value, 1.0], [0.3, value]]), i not in self.unscaled)

    def iteration(self) -> None:
        self.both("scale", 1.25)
        chosen = self.draw.choice([[0], [1], [0, 1], [1, 0]])
        for i in chosen:
            self.gradient(i)
        for i in chosen:
            if self.draw.random() < 0.3:
                self.call("unscale_", i)
            self.call("step", i)
        self.update()

    def update(self) -> None:
        if self.both("update"):
            self.unscaled.clear()

    def anything(self) -> None:
        i = self.draw.randrange(2)
        match self.draw.randrange(12):
            case 0 | 1:
                self.gradient(i)
            case 2:
                self.call("unscale_", i)
            case 3:
                self.call("step", i)
            case 4:
                self.update()
            case 5:
                if self.both("set_scale", self.draw.choice([1.0, 0.25, 3.0, 65536.0]), self.draw.random() < 0.5):
                    self.unscaled.clear()
            case 6:
                self.both("save")
            case 7:
                self.both("load")
            case 8 if not self.unscaled:
                self.both("pickle")
            case 9 if not self.unscaled:
                self.both("deepcopy")
            case 10:
                for side in (self.ours, self.theirs):
                    side.scaler.set_growth_interval(1 + i * 2)
            case _:
                self.both("clear")

    def run(self, steps: int) -> None:
        while self.steps < steps:
            if self.theirs.scaler.get_scale() < 2.0**-100:  # torch's goes on below our floor
                self.both("scale", 1.0)
                self.both("set_scale", 65536.0, False)
                self.unscaled.clear()
            if self.draw.random() < 0.7:
                self.iteration()
            else:
                self.anything()


class TestInLockstepWithTorch:
    @pytest.mark.parametrize("seed", range(10))
    def test_any_calls_in_any_order(self, seed):
        run = Lockstep(seed)
        run.run(steps=1100)
        assert run.steps >= 1000  # more than 10,000 in all

    @pytest.mark.fuzz
    @pytest.mark.parametrize("seed", range(100, 130))
    def test_any_calls_in_any_order_for_long(self, seed):
        Lockstep(seed).run(steps=3000)

    def test_an_fp16_model_with_masters_has_the_scales_of_torch_on_fp32(self):
        """The same overflows give the same scales, whatever holds the weights."""
        draw = random.Random(0)
        half = nn.Parameter(torch.zeros(3, dtype=torch.float16))
        single = nn.Parameter(torch.zeros(3))
        ours = GradScaler("cpu", init_scale=2.0**12, growth_interval=3, max_consecutive_skips=None)
        theirs = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
        mine = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([half], lr=0.0), ours)
        yours = torch.optim.SGD([single], lr=0.0)
        for _ in range(400):
            # Overflows of fp16 itself, at a scale beyond 2^15, are made to happen on both sides.
            spike = draw.choice([1.0, 1.0, 1.0, INF if draw.random() < 0.5 else NAN])
            if theirs.get_scale() * 1.0 > 65504:
                spike = INF
            for param, scaler, optimizer in ((half, ours, mine), (single, theirs, yours)):
                scaler.scale((param.float() * spike).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            assert ours.get_scale() == theirs.get_scale()
            assert ours._get_growth_tracker() == theirs._get_growth_tracker()
        assert mine.steps_skipped == ours.statistics()[0].overflows > 50


def _loss(param):
    return (param * 2.0).sum()


def _scaled(scaler, param):
    scaler.scale(_loss(param)).backward()


def _misuse_double_unscale(scaler, optimizer, param):
    _scaled(scaler, param)
    scaler.unscale_(optimizer)
    scaler.unscale_(optimizer)


def _misuse_unscale_after_step(scaler, optimizer, param):
    _scaled(scaler, param)
    scaler.step(optimizer)
    scaler.unscale_(optimizer)


def _misuse_double_step(scaler, optimizer, param):
    _scaled(scaler, param)
    scaler.step(optimizer)
    scaler.step(optimizer)


def _misuse_double_update(scaler, optimizer, param):
    _scaled(scaler, param)
    scaler.step(optimizer)
    scaler.update()
    scaler.update()


def _misuse_update_without_step(scaler, optimizer, param):
    _scaled(scaler, param)
    scaler.update()


def _misuse_step_without_gradient(scaler, optimizer, param):
    scaler.scale(_loss(param))
    scaler.step(optimizer)


def _misuse_closure(scaler, optimizer, param):
    _scaled(scaler, param)
    scaler.step(optimizer, closure=lambda: 0.0)


def _misuse_pickled_when_unscaled(scaler, optimizer, param):
    _scaled(scaler, param)
    scaler.unscale_(optimizer)
    pickle.dumps(scaler)


def _misuse_deepcopied_when_stepped(scaler, optimizer, param):
    _scaled(scaler, param)
    scaler.step(optimizer)
    copy.deepcopy(scaler)


def _misuse_fp16_gradients(scaler, optimizer, param):
    half = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    _scaled(scaler, half)
    scaler.unscale_(torch.optim.SGD([half], lr=1.0))


def _misuse_two_new_scales(scaler, optimizer, param):
    scaler.scale(_loss(param))
    scaler.update(torch.tensor([1.0, 2.0]))


def _misuse_new_scale_with_grad(scaler, optimizer, param):
    scaler.scale(_loss(param))
    scaler.update(torch.tensor(1.0, requires_grad=True))


MISUSES = {
    "step before scale": lambda scaler, optimizer, param: scaler.step(optimizer),
    "unscale_ before scale": lambda scaler, optimizer, param: scaler.unscale_(optimizer),
    "update before scale": lambda scaler, optimizer, param: scaler.update(),
    "new_scale before scale": lambda scaler, optimizer, param: scaler.update(4.0),
    "unscale_ twice": _misuse_double_unscale,
    "unscale_ after step": _misuse_unscale_after_step,
    "step twice": _misuse_double_step,
    "update twice": _misuse_double_update,
    "update without step": _misuse_update_without_step,
    "step without gradient": _misuse_step_without_gradient,
    "closure": _misuse_closure,
    "pickle between unscale_ and update": _misuse_pickled_when_unscaled,
    "deepcopy between step and update": _misuse_deepcopied_when_stepped,
    "fp16 gradients without masters": _misuse_fp16_gradients,
    "new_scale of two elements": _misuse_two_new_scales,
    "new_scale that requires grad": _misuse_new_scale_with_grad,
    "scale of a number": lambda scaler, optimizer, param: scaler.scale(3.0),
    "an empty state": lambda scaler, optimizer, param: scaler.load_state_dict({}),
}


class TestErrorsAreTorchs:
    """The type of torch's error, and its message where ours begins; ours may go on with the remedy."""

    @pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES.keys())
    def test_plain_optimizer(self, misuse):
        results = []
        for scaler in (GradScaler("cpu", init_scale=4.0), torch.amp.GradScaler("cpu", init_scale=4.0)):
            param = nn.Parameter(torch.ones(2))
            results.append(outcome(misuse, scaler, torch.optim.SGD([param], lr=1.0), param))
        assert isinstance(results[1], Exception), "torch accepts this"
        assert_same_outcome(*results)

    @pytest.mark.parametrize(
        "misuse",
        [m for name, m in MISUSES.items() if name != "fp16 gradients without masters"],
        ids=[name for name in MISUSES if name != "fp16 gradients without masters"],
    )
    def test_optimizer_with_masters(self, misuse):
        scaler = GradScaler("cpu", init_scale=4.0)
        param = nn.Parameter(torch.ones(2, dtype=torch.float16))
        optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0), scaler)
        before = nn.Parameter(torch.ones(2))
        theirs = torch.amp.GradScaler("cpu", init_scale=4.0)
        expected = outcome(misuse, theirs, torch.optim.SGD([before], lr=1.0), before)
        assert_same_outcome(outcome(misuse, scaler, optimizer, param), expected)

    def test_optimizer_step_by_itself_knows_the_stages_too(self):
        scaler = GradScaler("cpu", init_scale=4.0)
        param = nn.Parameter(torch.ones(2, dtype=torch.float16))
        optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0), scaler)
        with pytest.raises(AssertionError, match="Attempted step but _scale is None"):
            optimizer.step()
        _scaled(scaler, param)
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            optimizer.step(lambda: 0.0)
        optimizer.step()
        with pytest.raises(RuntimeError, match=re.escape("step() has already been called since the last update()")):
            optimizer.step()
        assert param.tolist() == [-1.0, -1.0]
        assert optimizer.steps_taken == 1

    def test_misuse_leaves_everything_usable(self):
        """After every one of them an ordinary iteration works."""
        for misuse in MISUSES.values():
            scaler = GradScaler("cpu", init_scale=4.0)
            param = nn.Parameter(torch.ones(2))
            optimizer = torch.optim.SGD([param], lr=1.0)
            scaler.scale(_loss(param))
            outcome(misuse, scaler, optimizer, param)
            scaler.update(4.0)
            optimizer.zero_grad()
            before = param.tolist()
            _scaled(scaler, param)
            scaler.step(optimizer)
            scaler.update()
            assert param.tolist() == [value - 2.0 for value in before]


class TestScale:
    @pytest.mark.parametrize(
        ("loss", "dtype"),
        [
            (torch.tensor(2.0, dtype=torch.float16), torch.float32),
            (torch.tensor([2.0], dtype=torch.float16), torch.float32),  # torch's product is inf
            (torch.tensor([2.0], dtype=torch.bfloat16), torch.float32),
            (torch.tensor([[2.0]]), torch.float32),
            (torch.tensor([2.0], dtype=torch.float64), torch.float64),
        ],
        ids=["fp16", "fp16 of one element", "bf16", "fp32", "fp64"],
    )
    def test_the_product_is_wide(self, loss, dtype):
        scaled = GradScaler("cpu").scale(loss.requires_grad_())
        assert (scaled.dtype, scaled.shape) == (dtype, loss.shape)
        assert scaled.item() == 131072.0

    def test_torchs_product_would_be_infinite(self):
        loss = torch.tensor([2.0], dtype=torch.float16, requires_grad=True)
        assert torch.amp.GradScaler("cpu").scale(loss).item() == INF

    @pytest.mark.parametrize("structure", [list, tuple], ids=["list", "tuple"])
    def test_nested_iterables(self, structure):
        def tree():
            a, b, c = (torch.tensor(v, requires_grad=True) for v in (1.0, 2.0, 3.0))
            return structure([a, structure([b]), iter([c])])

        ours, theirs = GradScaler("cpu").scale(tree()), torch.amp.GradScaler("cpu").scale(tree())
        assert type(ours) is type(theirs) is structure
        assert type(ours[1]) is structure
        assert ours[0].item() == theirs[0].item() == 65536.0
        assert ours[1][0].item() == theirs[1][0].item()
        assert [x.item() for x in ours[2]] == [x.item() for x in theirs[2]] == [196608.0]

    def test_a_named_tuple_stays_one(self):
        Losses = namedtuple("Losses", "policy value")
        scaler = GradScaler("cpu", init_scale=2.0, num_losses=2)
        scaled = scaler.scale(Losses(torch.ones((), requires_grad=True), torch.ones((), requires_grad=True)), loss_id=1)
        assert isinstance(scaled, Losses)
        assert scaled.value.item() == 2.0

    def test_losses_of_one_scale_may_share_a_pass(self):
        scaler = GradScaler("cpu", init_scale=4.0)
        param = nn.Parameter(torch.zeros(2))
        sum(scaler.scale([param.sum(), (param * 2).sum()])).backward()
        assert param.grad.tolist() == [12.0, 12.0]

    def test_each_loss_has_its_own(self):
        scaler = GradScaler("cpu", init_scale=4.0, num_losses=3)
        param = nn.Parameter(torch.ones(1))
        scaler.scale(param.sum(), loss_id=2)
        scaler.update(16.0, loss_id=1)
        assert [scaler.get_scale(k) for k in range(3)] == [4.0, 16.0, 4.0]
        assert [scaler.scale(param.sum(), k).item() for k in range(3)] == [4.0, 16.0, 4.0]
        assert scaler._scale.tolist() == [4.0, 16.0, 4.0]
        assert scaler._growth_tracker.tolist() == [0, 0, 0]

    def test_without_grad_mode_it_is_only_a_product(self):
        with torch.no_grad():
            assert GradScaler("cpu", init_scale=4.0).scale(torch.tensor(3.0)).item() == 12.0

    def test_the_scaler_never_disables_itself(self):
        scaler = GradScaler()  # the device is "cuda" unless said otherwise
        assert scaler.is_enabled()
        assert scaler.scale(torch.ones((), requires_grad=True)).item() == 65536.0
        assert isinstance(scaler, torch.amp.GradScaler)


class TestDisabled:
    def test_everything_passes_through(self):
        scaler = GradScaler("cpu", enabled=False, num_losses=2)
        param = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([param], lr=1.0)
        loss = _loss(param)
        assert scaler.scale(loss, 1) is loss
        losses = [loss, loss]
        assert scaler.scale(losses) is losses
        loss.backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scaler.update(4.0)
        assert param.tolist() == [-1.0, -1.0]
        assert (scaler.get_scale(), scaler._get_growth_tracker(), scaler.state_dict()) == (1.0, 0, {})
        assert not scaler.is_enabled()
        scaler.load_state_dict({})

    def test_a_closure_is_the_optimizers_business(self):
        param = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([param], lr=1.0)
        assert GradScaler("cpu", enabled=False).step(optimizer, lambda: 7.0) == 7.0

    def test_gradients_of_a_master_optimizer_are_taken_as_they_are(self):
        param = nn.Parameter(torch.ones(2, dtype=torch.float16))
        scaler = GradScaler("cpu", enabled=False)
        optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0), scaler)
        for _ in range(2):
            _scaled(scaler, param)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert param.tolist() == [-3.0, -3.0]

    def test_pickle(self):
        assert not pickle.loads(pickle.dumps(GradScaler("cpu", enabled=False))).is_enabled()


class TestNewScale:
    @pytest.mark.parametrize("value", [32.0, 32, torch.tensor(32.0), torch.tensor([32.0])])
    def test_float_or_tensor(self, value):
        scaler = GradScaler("cpu", init_scale=4.0, growth_interval=10)
        param = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([param], lr=1.0)
        _scaled(scaler, param)
        scaler.step(optimizer)
        scaler.update()
        scaler.update(value)
        if isinstance(value, torch.Tensor):
            value.fill_(1.0)
        assert (scaler.get_scale(), scaler._get_growth_tracker()) == (32.0, 1)

    def test_it_replaces_what_was_recorded(self):
        scaler = GradScaler("cpu", init_scale=4.0)
        param = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([param], lr=1.0)
        scaler.scale((param * INF).sum()).backward()
        scaler.step(optimizer)
        scaler.update(32.0)
        assert (scaler.get_scale(), scaler.statistics()[0].overflows) == (32.0, 0)
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.update()

    def test_it_drops_the_votes_of_every_optimizer(self):
        scaler = GradScaler("cpu", init_scale=4.0)
        params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
        optimizers = [torch.optim.SGD([p], lr=1.0) for p in params]
        scaler.scale((params[0] * INF).sum()).backward()
        scaler.step(optimizers[0])
        scaler.update(32.0)
        scaler.scale(params[1].sum()).backward()
        scaler.step(optimizers[1])
        scaler.update()
        state = scaler.statistics()[0]
        assert (state.scale, state.growth_tracker, state.overflows) == (32.0, 1, 0)

    @pytest.mark.parametrize("value", [0.0, -1.0, INF, NAN, 2.0**-127])
    def test_a_float_out_of_range(self, value):
        scaler = GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones((), requires_grad=True))
        with pytest.raises(ValueError, match=re.escape(f"new_scale is {value}")):
            scaler.update(value)
        assert scaler.get_scale() == 4.0

    @pytest.mark.parametrize(
        ("value", "scale"), [(0.0, 0.5), (-1.0, 0.5), (INF, 64.0), (NAN, 0.5), (-INF, 0.5), (100.0, 64.0), (8.0, 8.0)]
    )
    def test_a_tensor_out_of_range_is_clamped_on_its_device(self, value, scale):
        scaler = GradScaler("cpu", init_scale=4.0, min_scale=0.5, max_scale=64.0)
        scaler.scale(torch.ones((), requires_grad=True))
        scaler.update(torch.tensor(value))
        assert scaler.get_scale() == scale

    def test_a_tensor_of_another_dtype(self):
        scaler = GradScaler("cpu")
        scaler.scale(torch.ones((), requires_grad=True))
        with pytest.raises(AssertionError, match=r"new_scale should be .* not torch\.float16"):
            scaler.update(torch.tensor(4.0, dtype=torch.float16))


class TestFoundInf:
    """NaN, -1 and 2 are overflows too; torch's fused kernels test `== 1`."""

    @pytest.mark.parametrize("value", [1.0, 2.0, -1.0, NAN, INF, 1e-30])
    def test_handed_to_an_optimizer_with_masters(self, value):
        param = nn.Parameter(torch.ones(2, dtype=torch.float16))
        optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0, momentum=0.9))
        param.grad = torch.ones_like(param)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(value)
        optimizer.step()
        assert (param.tolist(), optimizer.steps_skipped, optimizer.last_step_skipped) == ([1.0, 1.0], 1, True)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        assert (param.tolist(), optimizer.steps_taken) == ([0.5, 0.5], 1)

    def test_torchs_scaler_drives_an_optimizer_with_masters(self):
        param = nn.Parameter(torch.zeros(2, dtype=torch.float16))
        optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0))
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        seen = []
        for factor in (1.0, INF, 1.0, NAN, 1.0, 1.0, 1.0):
            scaler.scale((param.float() * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen.append((scaler.get_scale(), param.tolist()[0], optimizer.last_step_skipped))
        assert seen == [
            (4.0, -1.0, False),
            (2.0, -1.0, True),
            (2.0, -2.0, False),
            (1.0, -2.0, True),
            (1.0, -3.0, False),
            (2.0, -4.0, False),
            (2.0, -5.0, False),
        ]
        assert not hasattr(optimizer, "found_inf")

    def test_an_overflow_that_unscale_found_counts_though_the_gradient_was_repaired(self):
        """As in torch: the verdict of `unscale_` stands."""
        for make in (
            lambda p, s: mpengine.MixedPrecisionOptimizer(torch.optim.SGD([p], lr=1.0), s),
            lambda p, s: torch.optim.SGD([p], lr=1.0),
        ):
            scaler = GradScaler("cpu", init_scale=4.0)
            param = nn.Parameter(torch.ones(2))
            optimizer = make(param, scaler)
            scaler.scale((param * INF).sum()).backward()
            scaler.unscale_(optimizer)
            param.grad.nan_to_num_(posinf=1.0)
            scaler.step(optimizer)
            scaler.update()
            assert (param.tolist(), scaler.get_scale()) == ([1.0, 1.0], 2.0)


class TestUpdate:
    def make(self, **kwargs):
        scaler = GradScaler("cpu", init_scale=4.0, growth_interval=2, **kwargs)
        params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
        optimizers = [torch.optim.SGD([p], lr=1.0) for p in params]
        for optimizer in optimizers:
            scaler.watch(optimizer)
        return scaler, params, optimizers

    def test_one_loss_at_a_time(self):
        scaler, (param, _), (optimizer, _) = self.make(num_losses=2)
        scaler.scale((param * INF).sum(), 0).backward()
        scaler.scale(param.sum(), 1).backward()
        scaler.step(optimizer)
        scaler.update(loss_id=1)
        assert [s.updates for s in scaler.statistics()] == [0, 1]
        with pytest.raises(AssertionError, match="No optimizer has consumed loss 1 since its last update"):
            scaler.update(loss_id=1)
        scaler.update(loss_id=0)
        assert [scaler.get_scale(k) for k in range(2)] == [2.0, 4.0]
        assert [s.growth_tracker for s in scaler.statistics()] == [0, 1]

    def test_unscale_alone_is_enough(self):
        scaler, (param, _), (optimizer, _) = self.make()
        scaler.scale((param * INF).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0

    def test_the_overflow_of_one_optimizer_skips_only_its_step(self):
        scaler, params, optimizers = self.make()
        for param, factor in zip(params, (INF, 1.0), strict=True):
            scaler.scale((param * factor).sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        assert [p.tolist() for p in params] == [[0.0, 0.0], [-1.0, -1.0]]
        assert scaler.get_scale() == 2.0

    @pytest.mark.parametrize("factor", [1.0, INF])
    def test_one_backward_pass_counts_once_however_many_updates(self, factor):
        """Two optimizers share a pass, and `update()` follows each step."""
        scaler, params, optimizers = self.make()
        (scaler.scale((params[0] * factor).sum() + (params[1] * factor).sum())).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
            scaler.update()
        state = scaler.statistics()[0]
        assert (state.scale, state.updates) == ((4.0, 1) if factor == 1.0 else (2.0, 1))

    def test_an_overflow_seen_only_by_the_second_optimizer(self):
        scaler, params, optimizers = self.make()
        (scaler.scale(params[0].sum() + (params[1] * INF).sum())).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
            scaler.update()
        state = scaler.statistics()[0]
        assert (state.scale, state.growth_tracker, state.overflows) == (2.0, 0, 1)

    def test_the_second_optimizer_unscales_by_the_scale_of_its_pass(self):
        scaler, params, optimizers = self.make()
        (scaler.scale((params[0] * INF).sum() + params[1].sum())).backward()
        scaler.step(optimizers[0])
        scaler.update()
        assert scaler.get_scale() == 2.0
        scaler.step(optimizers[1])
        assert params[1].tolist() == [-1.0, -1.0]  # torch takes a step of 2

    def test_a_graph_made_before_an_update_counts_when_its_pass_runs(self):
        """All losses first, then backward, step and update for each optimizer (torch's graphs do not survive that)."""
        scaler, params, optimizers = self.make()
        losses = [scaler.scale(p.sum()) for p in params]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            scaler.step(optimizer)
            scaler.update()
        state = scaler.statistics()[0]
        assert (state.scale, state.updates) == (8.0, 2)
        assert [p.tolist() for p in params] == [[-1.0, -1.0], [-1.0, -1.0]]

    def test_a_step_on_zeroed_gradients_is_over_at_the_next_update(self):
        param = nn.Parameter(torch.zeros(2, dtype=torch.float16))
        scaler = GradScaler("cpu", init_scale=4.0)
        optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0), scaler)
        _scaled(scaler, param)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        scaler.update()
        optimizer.step()
        scaler.update()
        assert (scaler.get_scale(), scaler.statistics()[0].updates, param.tolist()) == (4.0, 0, [0.0, 0.0])

    def test_the_vote_of_an_optimizer_that_died_counts(self):
        scaler, params, optimizers = self.make(num_losses=2)
        scaler.scale((params[0] * INF).sum(), 0).backward()
        scaler.scale(params[1].sum(), 0).backward()
        scaler.step(optimizers[0])
        del optimizers[0]
        gc.collect()
        newcomer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scaler.watch(newcomer)
        scaler.scale(newcomer.param_groups[0]["params"][0].sum(), 1).backward()
        scaler.step(newcomer)
        scaler.update()
        assert [scaler.get_scale(k) for k in range(2)] == [2.0, 4.0]
        scaler.step(optimizers[0])
        assert params[1].tolist() == [-1.0, -1.0]


def drive(scaler, optimizer, param, outcomes: list[str | None]) -> None:
    """One iteration: every loss is clean, overflows or is idle."""
    for k, event in enumerate(outcomes):
        if event is not None:
            factor = 1.0 if event == scale_model.CLEAN else INF
            scaler.scale((param.float() * factor).sum(), k).backward()
    if any(outcomes):
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def assert_losses_follow_the_model(kind: str, num_losses: int, iterations, policy: dict, save_at=()) -> None:
    """Scales, trackers and statistics of every loss, after each iteration; saved and loaded at some of them."""
    dtype = torch.float16 if kind == "masters" else torch.float32
    param = nn.Parameter(torch.zeros(2, dtype=dtype))

    def build():
        scaler = GradScaler("cpu", num_losses=num_losses, max_consecutive_skips=None, **policy)
        optimizer = torch.optim.SGD([param], lr=1.0)
        if kind == "masters":
            return scaler, mpengine.MixedPrecisionOptimizer(optimizer, scaler)
        scaler.watch(optimizer)
        return scaler, optimizer

    scaler, optimizer = build()
    models = [
        ScaleModel(
            policy["init_scale"],
            interval=policy["growth_interval"],
            patience=policy.get("hysteresis", 1),
            floor=policy.get("min_scale", 2.0**-126),
            ceiling=policy.get("max_scale", 2.0**127),
        )
        for _ in range(num_losses)
    ]
    for number, outcomes in enumerate(iterations):
        if number in save_at:
            state = scaler.state_dict()
            buffer = io.BytesIO()
            torch.save(state, buffer)
            del optimizer
            scaler, optimizer = build()
            buffer.seek(0)
            scaler.load_state_dict(torch.load(buffer))
            assert scaler.state_dict() == state
        before = param.tolist()
        drive(scaler, optimizer, param, outcomes)
        for model, event in zip(models, outcomes, strict=True):
            if event is not None:
                model.see(event)
        ours = [(s.scale, s.growth_tracker, s.overflows, s.consecutive_overflows) for s in scaler.statistics()]
        assert ours == [(m.scale, m.tracker, m.overflows, m.streak) for m in models], (number, outcomes)
        skipped = scale_model.OVERFLOW in outcomes
        clean = outcomes.count(scale_model.CLEAN)
        assert param.tolist() == [value - (0 if skipped else clean) for value in before]
        if number % 100 == 99:
            with torch.no_grad():
                param.zero_()  # so that fp16 counts exactly


EVENT = st.sampled_from([scale_model.CLEAN, scale_model.OVERFLOW, None])
SCALE_POLICY = st.fixed_dictionaries(
    {"init_scale": st.sampled_from([1.0, 64.0, 1024.0]), "growth_interval": st.integers(1, 3)},
    optional={"hysteresis": st.integers(1, 3), "min_scale": st.just(0.5), "max_scale": st.just(2048.0)},
)


class TestSeveralLosses:
    @pytest.mark.parametrize("kind", ["masters", "watched"])
    @settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
    @given(
        iterations=st.lists(st.lists(EVENT, min_size=3, max_size=3), max_size=20),
        policy=SCALE_POLICY,
        save_at=st.sets(st.integers(0, 19), max_size=3),
    )
    def test_sequences_of_overflows_and_idle_losses(self, kind, iterations, policy, save_at):
        # Masters are fp16: a scale beyond 2^15 would overflow by itself.
        policy = {"max_scale": 2048.0, **policy}
        assert_losses_follow_the_model(kind, 3, iterations, policy, save_at)

    @pytest.mark.fuzz
    @settings(deadline=None, max_examples=3000, suppress_health_check=[HealthCheck.too_slow])
    @given(
        kind=st.sampled_from(["masters", "watched"]),
        iterations=st.lists(st.lists(EVENT, min_size=4, max_size=4), max_size=60),
        policy=SCALE_POLICY,
        save_at=st.sets(st.integers(0, 59), max_size=5),
    )
    def test_sequences_of_overflows_and_idle_losses_for_long(self, kind, iterations, policy, save_at):
        assert_losses_follow_the_model(kind, 4, iterations, {"max_scale": 2048.0, **policy}, save_at)

    def test_static_scale_still_skips(self):
        iterations = [[scale_model.CLEAN], [scale_model.OVERFLOW], [scale_model.OVERFLOW], [scale_model.CLEAN]]
        policy = {"init_scale": 128.0, "growth_interval": 1, "min_scale": 128.0, "max_scale": 128.0}
        assert_losses_follow_the_model("masters", 1, iterations, policy)

    def test_an_unwatched_plain_optimizer_is_refused(self):
        scaler = GradScaler("cpu", num_losses=2)
        param = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([param], lr=1.0)
        _scaled(scaler, param)
        for method in (scaler.step, scaler.unscale_):
            with pytest.raises(RuntimeError, match=re.escape("scaler.watch(optimizer) before the first backward pass")):
                method(optimizer)
        assert param.tolist() == [0.0, 0.0]


def _one_loss_backs_off_all(monkeypatch):
    update_scale = cpu.update_scale

    def sabotaged(scale, previous, counters, votes, policy):
        votes[:, :, 0] = votes[:, :, 0].max()
        update_scale(scale, previous, counters, votes, policy)

    monkeypatch.setattr(cpu, "update_scale", sabotaged)


def _growth_one_late(monkeypatch):
    def sabotaged(state, votes, policy):
        after = next_state(state, votes, policy)
        return after if after.growths == state.growths else state

    monkeypatch.setattr(reference, "next_state", sabotaged)


def _hysteresis_ignored(monkeypatch):
    from dataclasses import replace

    def sabotaged(state, votes, policy):
        return next_state(replace(state, hysteresis_left=1), votes, replace(policy, hysteresis=1))

    monkeypatch.setattr(reference, "next_state", sabotaged)


def _saved_scales_are_not_loaded(monkeypatch):
    monkeypatch.setattr(GradScaler, "load_state_dict", lambda self, state: None)


def _overflow_is_stepped(monkeypatch):
    decide = cpu.decide

    def sabotaged(table, *args, **kwargs):
        decide(table, *args, **kwargs)
        table.decision[0] = 0.0

    monkeypatch.setattr(cpu, "decide", sabotaged)


@pytest.mark.parametrize(
    "sabotage",
    [
        _one_loss_backs_off_all,
        _growth_one_late,
        _hysteresis_ignored,
        _saved_scales_are_not_loaded,
        _overflow_is_stepped,
    ],
)
def test_a_sabotaged_scaler_is_noticed(sabotage, monkeypatch):
    events = [scale_model.CLEAN, scale_model.OVERFLOW, None]
    iterations = [list(row) for row in itertools.product(events, repeat=2)] * 3
    policy = {"init_scale": 64.0, "growth_interval": 2, "hysteresis": 2}
    assert_losses_follow_the_model("masters", 2, iterations, policy, {10})
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        assert_losses_follow_the_model("masters", 2, iterations, policy, {10})


@pytest.mark.parametrize("sabotage", [_growth_one_late, _hysteresis_ignored], ids=["growth", "nothing wrong"])
def test_the_lockstep_notices_what_differs_from_torch(sabotage, monkeypatch):
    sabotage(monkeypatch)
    if sabotage is _hysteresis_ignored:  # torch has none, so this is right here
        Lockstep(0).run(steps=200)
    else:
        with pytest.raises(AssertionError):
            Lockstep(0).run(steps=200)


def test_the_lockstep_notices_a_counter_that_a_load_forgets(monkeypatch):
    monkeypatch.setattr(LossScales, "set_states", lambda self, states: self.set_scale(0, states[0].scale))
    with pytest.raises(AssertionError):
        Lockstep(0).run(steps=1000)


class TestSavingAndLoading:
    def used(self, num_losses=1):
        scaler = GradScaler("cpu", init_scale=4.0, growth_interval=5, num_losses=num_losses)
        param = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([param], lr=1.0)
        scaler.watch(optimizer)
        for k in range(num_losses):
            scaler.scale(param.sum() * (k + 1), k).backward()
        scaler.step(optimizer)
        scaler.update()
        return scaler

    def test_torchs_keys_and_back(self):
        ours = self.used()
        keys = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
        assert set(ours.state_dict()) == keys | {"mpengine"}
        theirs = torch.amp.GradScaler("cpu")
        theirs.load_state_dict(ours.state_dict())
        assert theirs.state_dict() == {key: ours.state_dict()[key] for key in keys}
        fresh = GradScaler("cpu")
        fresh.load_state_dict(theirs.state_dict())
        assert {key: fresh.state_dict()[key] for key in keys} == theirs.state_dict()

    def test_before_and_after_the_first_scale(self):
        saved = self.used().state_dict()
        for scaled in (False, True):
            fresh = GradScaler("cpu")
            if scaled:
                fresh.scale(torch.ones((), requires_grad=True))
            fresh.load_state_dict(saved)
            assert fresh.state_dict() == saved
            assert fresh.scale(torch.ones((), requires_grad=True)).item() == 4.0

    def test_a_state_of_one_loss_goes_to_every_loss(self):
        fresh = GradScaler("cpu", num_losses=3)
        fresh.load_state_dict(self.used().state_dict())
        assert [s.scale for s in fresh.statistics()] == [4.0] * 3
        assert [s.growth_tracker for s in fresh.statistics()] == [1] * 3

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("_growth_tracker"), "no key '_growth_tracker'"),
            (lambda s: s.update(scale=0.0), "scale of loss 0 is 0.0, outside"),
            (lambda s: s.update(scale=NAN), "scale of loss 0 is nan, outside"),
            (lambda s: s.clear(), "state dict is empty"),
        ],
    )
    def test_a_bad_state_changes_nothing(self, change, message):
        scaler = self.used()
        before = scaler.state_dict()
        state = scaler.state_dict()
        state["growth_interval"] = 77
        change(state)
        with pytest.raises(RuntimeError, match=re.escape(message)):
            scaler.load_state_dict(state)
        assert scaler.state_dict() == before

    def test_another_number_of_losses(self):
        scaler = GradScaler("cpu", num_losses=3)
        with pytest.raises(RuntimeError, match=r"holds 2 losses, this scaler has num_losses=3.*num_losses=2"):
            scaler.load_state_dict(self.used(2).state_dict())
        assert scaler.get_scale(2) == 65536.0

    @pytest.mark.parametrize(
        "copied", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy], ids=["pickle", "deepcopy"]
    )
    def test_copies_are_independent(self, copied):
        scaler = self.used(2)
        scaler.set_growth_interval(7)
        other = copied(scaler)
        assert other.state_dict() == scaler.state_dict()
        assert other.num_losses == 2
        other.scale(torch.ones((), requires_grad=True))
        other.update(64.0, loss_id=1)
        other.set_growth_factor(4.0)
        assert (scaler.get_scale(1), scaler.get_growth_factor()) == (4.0, 2.0)
        assert (other.get_scale(1), other.get_growth_interval()) == (64.0, 7)

    def test_a_load_between_step_and_update_counts_the_step_as_torch_does(self):
        """And gradients made after the load keep the loaded scale."""
        results = []
        for scaler in (GradScaler("cpu", init_scale=4.0), torch.amp.GradScaler("cpu", init_scale=4.0)):
            param = nn.Parameter(torch.zeros(2))
            optimizer = torch.optim.SGD([param], lr=1.0)
            scaler.scale(param.sum()).backward()
            scaler.step(optimizer)
            scaler.load_state_dict({**scaler.state_dict(), "scale": 64.0})
            optimizer.zero_grad()
            scaler.scale(param.sum()).backward()
            scaler.update()
            scaler.step(optimizer)
            results.append((scaler.get_scale(), scaler._get_growth_tracker(), param.tolist()))
        assert results[0] == results[1] == (64.0, 1, [-2.0, -2.0])


class TestBadInput:
    @pytest.mark.parametrize("value", [0.0, -4.0, INF, -INF, NAN, 2.0**-127, 1e39])
    def test_init_scale(self, value):
        with pytest.raises(ValueError, match=re.escape(f"init_scale is {value}")):
            GradScaler("cpu", init_scale=value)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("growth_factor", 1.0),
            ("backoff_factor", 1.0),
            ("growth_interval", 0),
            ("min_scale", 0.0),
            ("max_scale", INF),
            ("hysteresis", 0),
            ("num_losses", 0),
            ("max_consecutive_skips", 0),
        ],
    )
    def test_construction(self, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            GradScaler("cpu", **{name: value})

    @pytest.mark.parametrize(
        ("setter", "value", "getter"),
        [
            ("set_growth_factor", 1.0, "get_growth_factor"),
            ("set_backoff_factor", 0.0, "get_backoff_factor"),
            ("set_growth_interval", 0, "get_growth_interval"),
        ],
    )
    @pytest.mark.parametrize("scaled", [False, True])
    def test_setters(self, setter, value, getter, scaled):
        scaler = GradScaler("cpu")
        if scaled:
            scaler.scale(torch.ones((), requires_grad=True))
        before = getattr(scaler, getter)()
        with pytest.raises(ValueError, match=f" is {value}"):
            getattr(scaler, setter)(value)
        assert getattr(scaler, getter)() == before

    @pytest.mark.parametrize("loss_id", [-1, 2, 1.0, "0", None])
    def test_loss_id(self, loss_id):
        scaler = GradScaler("cpu", num_losses=2)
        loss = torch.ones((), requires_grad=True)
        message = re.escape(f"loss_id is {loss_id!r}; this scaler has num_losses=2")
        with pytest.raises(ValueError, match=message):
            scaler.scale(loss, loss_id)
        with pytest.raises(ValueError, match=message):
            scaler.get_scale(loss_id)
        assert scaler._scale is None
        if loss_id is not None:
            scaler.scale(loss)
            with pytest.raises(ValueError, match=message):
                scaler.update(4.0, loss_id=loss_id)

    def test_a_loss_without_grad(self):
        scaler = GradScaler("cpu", num_losses=2)
        with pytest.raises(RuntimeError, match=r"loss 1 \(shape \(3,\)\) requires no grad.*detached"):
            scaler.scale(torch.ones(3), loss_id=1)
        assert scaler._scale is None

    def test_a_complex_loss(self):
        with pytest.raises(ValueError, match=r"complex64.*loss\.abs\(\)"):
            GradScaler("cpu").scale(torch.ones((), dtype=torch.complex64, requires_grad=True))

    def test_a_closure_by_position(self):
        scaler = GradScaler("cpu", init_scale=4.0)
        param = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([param], lr=1.0)
        _scaled(scaler, param)
        with pytest.raises(RuntimeError, match=r"Closure use is not.*call closure\(\) yourself"):
            scaler.step(optimizer, lambda: 0.0)
        assert param.grad.tolist() == [8.0, 8.0]
        scaler.step(optimizer)
        assert param.tolist() == [-2.0, -2.0]

    def test_an_optimizer_of_another_scaler(self):
        one, other = GradScaler("cpu"), GradScaler("cpu")
        param = nn.Parameter(torch.zeros(2, dtype=torch.float16))
        optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0), one)
        other.scale(_loss(param)).backward()
        for method in (other.step, other.unscale_):
            with pytest.raises(RuntimeError, match="prepared with another GradScaler"):
                method(optimizer)

    def test_an_attribute_that_is_not_there(self):
        with pytest.raises(AttributeError, match="no attribute 'momentum'"):
            GradScaler("cpu").momentum  # noqa: B018

    def test_an_optimizer_made_without_a_scaler_takes_the_one_that_unscales_it(self):
        param = nn.Parameter(torch.zeros(2, dtype=torch.float16))
        optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=1.0))
        scaler = GradScaler("cpu", init_scale=4.0)
        _scaled(scaler, param)
        scaler.unscale_(optimizer)
        assert [m.grad.tolist() for m in optimizer.master_params()] == [[2.0, 2.0]]
        scaler.step(optimizer)
        assert param.tolist() == [-2.0, -2.0]
