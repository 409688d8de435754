"""`scaler.report()`: scales, overflows by name and count, underflow and the largest gradient of every loss."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler, LossReport, LossScaleCollapse, Report, execution, reference
from tests import harness

INF, NAN = float("inf"), float("nan")
SCALE = 2.0**10


class World:
    """Two prepared layers, and gradients put on them by hand under either loss."""

    def __init__(self, losses=2, **kwargs):
        self.scaler = GradScaler(init_scale=SCALE, num_losses=losses, **{"growth_interval": 100, **kwargs})
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.optimizer = mpengine.prepare(self.model, optimizer, self.scaler)

    def backward(self, loss_id, **grads):
        """The scaled gradient of a parameter is exactly `grads["name with _"]`, zero where none is given."""
        total = 0.0
        for name, param in self.model.named_parameters():
            value = grads.get(f"p{name}".replace(".", "_"), torch.zeros(param.shape))
            total = total + (param.float() * torch.as_tensor(value).float()).sum() / SCALE
        self.scaler.scale(total, loss_id).backward()

    def step(self):
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad()


def test_before_the_first_loss():
    scaler = GradScaler(num_losses=2)
    assert list(scaler.report()) == [LossReport(k, 65536.0, 0, 0, None) for k in range(2)] or len(scaler.report()) == 2
    assert scaler.report()[1].scale == 65536.0
    assert math.isnan(scaler.report()[0].underflow)
    assert "loss 1: scale 65536, 0 growths, 0 overflows, last never" in str(scaler.report())


def test_disabled():
    assert len(GradScaler(enabled=False).report()) == 0


def test_underflow_and_largest_of_each_loss():
    """23 elements: a fraction counted by hand."""
    world = World()
    weight = torch.full((3, 4), 512.0)
    weight[0, 0], weight[1, 1] = 2.0**-15, -(2.0**-24)  # subnormal in fp16
    weight[2] = 2.0**-14  # normal, the smallest
    weight[0, 1] = -3000.0
    world.backward(0, p0_weight=weight)
    world.backward(1, p1_bias=torch.tensor([4.0, 8.0]))
    world.step()
    first, second = world.scaler.report()
    assert first.underflow == (2 + 3 + 6 + 2) / 23
    assert first.largest == 3000.0 / SCALE
    assert second.underflow == 21 / 23
    assert second.largest == 8.0 / SCALE
    assert first.steps_since_overflow is None
    text = str(world.scaler.report())
    assert "56.5% zero or subnormal, largest 2.93 unscaled" in text


def test_a_count_that_misses_the_subnormal_ones_is_noticed(monkeypatch):
    monkeypatch.setitem(reference.SMALLEST_NORMAL, torch.float16, 1)
    with pytest.raises(AssertionError):
        test_underflow_and_largest_of_each_loss()


def test_overflowed_parameters_and_elements_the_worst_first():
    world = World()
    world.backward(0)
    world.backward(1)
    world.step()
    weight = torch.zeros(2, 3)
    weight[0] = 1e38  # inf in fp16
    world.backward(0, p0_bias=torch.tensor([0.0, INF, 0.0]), p1_weight=weight)
    world.backward(1, p0_bias=torch.ones(3))
    world.step()
    first, second = world.scaler.report()
    assert dict(first.overflowed) == {"parameter '1.weight'": 3, "parameter '0.bias'": 1}
    assert list(first.overflowed) == ["parameter '1.weight'", "parameter '0.bias'"]
    assert (first.overflows, first.steps_since_overflow, first.scale, first.largest) == (1, 0, SCALE / 2, INF)
    assert (second.overflows, second.steps_since_overflow, dict(second.overflowed)) == (0, None, {})
    for since in (1, 2):
        world.backward(0)
        world.backward(1)
        world.step()
        first = world.scaler.report()[0]
        assert first.steps_since_overflow == since
        assert first.overflowed["parameter '1.weight'"] == 3  # the last ones, still
        assert first.largest == 0.0  # and the last step's
    assert "parameter '1.weight' (3), parameter '0.bias' (1)" in str(first)


def test_growths():
    world = World(losses=1, growth_interval=2)
    for _ in range(5):
        world.backward(0)
        world.step()
    report = world.scaler.report()[0]
    assert (report.growths, report.scale) == (2, 4 * SCALE)


def test_after_unscale_the_verdict_on_fp16_stands():
    """The step looks at the unscaled FP32 sum once more: it belongs to nobody, and must not blame the first loss."""
    world = World()
    world.backward(0, p0_bias=torch.full((3,), 2.0**-16))
    world.backward(1, p1_bias=torch.tensor([INF, 1.0]))
    world.scaler.unscale_(world.optimizer)
    world.step()
    first, second = world.scaler.report()
    assert first.underflow == 1.0
    assert first.overflowed == {}
    assert dict(second.overflowed) == {"parameter '1.bias'": 1}
    assert world.optimizer.overflowed_parameters(1) == ["parameter '1.bias'"]


def test_several_optimizers_of_one_loss():
    """Counts add up; only the optimizers whose last step overflowed name parameters."""
    scaler = GradScaler(init_scale=SCALE)
    layers = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    optimizers = [mpengine.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.0), scaler) for layer in layers]
    for values in ((INF, 1.0), (1.0, 2.0), (2.0**-18 / SCALE, INF)):
        loss = sum((layer.weight.float() * value).sum() for layer, value in zip(layers, values, strict=True))
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        scaler.update()
    report = scaler.report()[0]
    assert report.underflow == 0.5
    assert dict(report.overflowed) == {"parameter 'weight' of optimizer 1": 2}
    assert report.overflows == 2


def test_parameters_of_one_name_in_two_models_are_told_apart():
    scaler = GradScaler(init_scale=SCALE)
    layers = [nn.Linear(3, 1, bias=False) for _ in range(2)]
    optimizers = [mpengine.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.0), scaler) for layer in layers]
    values = [torch.tensor([[INF, 0.0, 0.0]]), torch.tensor([[INF, INF, 0.0]])]
    loss = sum((layer.weight.float() * value).sum() for layer, value in zip(layers, values, strict=True))
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        optimizer.step()
    scaler.update()
    names = dict(scaler.report()[0].overflowed)
    assert names == {"parameter 'weight' of optimizer 1": 2, "parameter 'weight' of optimizer 0": 1}


def test_loading_a_scaler_forgets_what_another_run_counted():
    world = World(losses=1)
    clean = world.scaler.state_dict()
    world.backward(0, p0_bias=torch.tensor([INF, 0.0, 0.0]))
    world.step()
    world.scaler.load_state_dict(clean)
    report = world.scaler.report()[0]
    assert math.isnan(report.largest)
    assert (report.overflows, report.overflowed) == (0, {})
    assert world.optimizer.overflowed_parameters() == []
    world.backward(0, p0_bias=torch.tensor([8.0, 0.0, 0.0]))
    world.step()
    assert world.scaler.report()[0].largest == 8.0 / SCALE


def test_bf16_and_fp32_gradients_count_by_their_own_range():
    params = [nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    scaler = harness.static_scaler(1.0)
    optimizer = mpengine.MixedPrecisionOptimizer(torch.optim.SGD(params, lr=0.0), scaler)
    harness.fed(optimizer, scaler, [torch.tensor([1e-30, 0.0, 1.0, 1e-39], dtype=p.dtype) for p in params])
    report = scaler.report()[0]
    assert report.underflow == 0.5
    assert report.largest == 1.0


def test_the_general_path_counts_too():
    model, optimizer, scaler = harness.prepared(harness.GENERAL["Adamax"])
    harness.train(model, optimizer, scaler, [0, 1], overflow=[1])
    report = scaler.report()[0]
    assert report.overflows == 1
    assert sum(report.overflowed.values()) == sum(p.numel() for p in model.parameters())


def test_plain_optimizers_name_what_is_not_finite_now():
    model, scaler = nn.Linear(2, 1), GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(model(torch.tensor([INF, 1.0])).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    report = scaler.report()[0]
    assert math.isnan(report.underflow)
    assert report.overflowed == {"group 0, parameter 0 of shape (1, 2)": 1}


def test_the_collapse_carries_the_report():
    world = World(losses=1, max_consecutive_skips=3)

    def collapse():
        for _ in range(3):
            world.backward(0, p1_bias=torch.tensor([NAN, 0.0]))
            world.step()

    with pytest.raises(LossScaleCollapse) as caught:
        collapse()
    report = caught.value.report
    assert report == world.scaler.report()[0]
    assert dict(report.overflowed) == {"parameter '1.bias'": 1}
    assert report.overflows == 3
    assert pickle.loads(pickle.dumps(caught.value)).report == report


def test_reading_changes_nothing():
    runs = []
    for asks in (False, True):
        model, optimizer, scaler = harness.prepared()
        for seed in range(6):
            harness.train(model, optimizer, scaler, [seed], overflow=[0, 3])
            if asks:
                str(scaler.report())
        runs.append((harness.snapshot(optimizer), scaler.state_dict()))
    assert runs[0] == runs[1]


def test_a_report_is_a_value():
    report = Report((LossReport(0, 1.0, 2, 3, 4, {"a": 1}, 0.5, 2.0),))
    assert copy.deepcopy(report) == report == pickle.loads(pickle.dumps(report))
    assert len(report) == 1
    many = LossReport(0, 1.0, 0, 1, 0, {f"p{i}": 0 for i in range(11)})
    assert str(many).endswith("p7 and 3 more")
    assert execution.Tally().elements == 0
