"""`apex.fp16_utils`: FP16_Optimizer against FP32 twins and exact numbers; the tools of loops by hand."""

import copy
import logging
import pickle
import re

import pytest
import torch
from torch import nn

import mpengine
from mpengine.amp.optimizer import AmpOptimizer
from mpengine.apex import fp16_utils
from mpengine.apex.fp16_utils import FP16_Optimizer

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.125, momentum=0.5),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.01),
}
SCALES = {
    "static": {"static_loss_scale": 128.0},
    "dynamic": {"dynamic_loss_scale": True, "dynamic_loss_args": {"init_scale": 2.0**10}},
}


class Product(nn.Module):
    """The sum of weight * coefficient: its gradients are the coefficients, integers that fp16 holds exactly."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.low = nn.ParameterList([torch.randn(s, generator=generator).half() for s in ((7,), (3, 5), ())])
        self.wide = nn.Parameter(torch.randn(4, generator=generator))

    def forward(self, seed, factor=1.0):
        generator = torch.Generator().manual_seed(seed)
        total = 0.0
        for param in self.parameters():  # the wide one comes first
            coefficient = torch.randint(-8, 9, param.shape, generator=generator).float()
            total = total + (param.float() * coefficient).sum() * factor
        return total


def twins(make, **scale):
    """An fp16 model with FP16_Optimizer, and its FP32 twin with torch's own optimizer."""
    model = Product()
    twin = copy.deepcopy(model).float()
    return model, FP16_Optimizer(make(model.parameters()), **scale), twin, make(twin.parameters())


def masters(optimizer):
    return [param.detach().clone() for param in optimizer.optimizer.master_params()]


def check_equal(model, optimizer, twin, steps=1):
    """Masters are the twin's weights up to a few roundings of FP32 a step; parameters are the masters rounded."""
    for ours, theirs in zip(masters(optimizer), twin.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= 4 * steps * 2.0**-24 * theirs.abs().max().clamp(min=1.0)
    for param, master in zip(model.parameters(), masters(optimizer), strict=True):
        assert torch.equal(param, master.to(param.dtype))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_it_steps_as_fp32(make, scale):
    model, optimizer, twin, theirs = twins(OPTIMIZERS[make], **SCALES[scale])
    start = masters(optimizer)
    for seed in range(5):
        optimizer.zero_grad()
        optimizer.backward(model(seed))
        optimizer.step()
        theirs.zero_grad()
        twin(seed).backward()
        theirs.step()
    check_equal(model, optimizer, twin, steps=5)
    assert any((now - then).abs().max() > 0.01 for now, then in zip(masters(optimizer), start, strict=True))
    assert not optimizer.overflow


@pytest.mark.parametrize("update", [True, False])
def test_backward_passes_add_up(update):
    model, optimizer, twin, theirs = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    optimizer.zero_grad()
    optimizer.backward(model(0), update_master_grads=update)
    optimizer.backward(model(1), update_master_grads=update)
    optimizer.update_master_grads()
    optimizer.step()
    (twin(0) + twin(1)).backward()
    theirs.step()
    check_equal(model, optimizer, twin)


def test_retain_graph():
    model, optimizer, twin, theirs = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    loss = model(0)
    optimizer.backward(loss, retain_graph=True)
    optimizer.backward(loss)
    optimizer.step()
    (2 * twin(0)).backward()
    theirs.step()
    check_equal(model, optimizer, twin)


# Clipping.


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("norm_type", [2, 1, float("inf")])
def test_clip_master_grads(scale, norm_type):
    model, optimizer, twin, theirs = twins(OPTIMIZERS["SGD"], **SCALES[scale])
    for seed in range(3):
        optimizer.zero_grad()
        optimizer.backward(model(seed))
        norm = optimizer.clip_master_grads(1.5, norm_type)
        theirs.zero_grad()
        twin(seed).backward()
        exact = torch.cat([p.grad.double().reshape(-1) for p in twin.parameters()]).norm(norm_type).item()
        assert float(norm) == pytest.approx(exact, rel=2.0**-22)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.5, norm_type)
        optimizer.step()
        theirs.step()
    check_equal(model, optimizer, twin, steps=3)


def test_clipping_twice_in_an_iteration():
    model, optimizer, _, _ = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    optimizer.backward(model(0))
    first = float(optimizer.clip_master_grads(1e6))
    assert float(optimizer.clip_master_grads(1e6)) == first
    optimizer.backward(model(0))
    assert float(optimizer.clip_master_grads(1e6)) == pytest.approx(2 * first, rel=2.0**-22)


def test_inspect_master_grad_data():
    model, optimizer, twin, _ = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    optimizer.backward(model(0))
    twin(0).backward()
    (grads,) = optimizer.inspect_master_grad_data()
    assert all(
        g.dtype == torch.float32 and torch.equal(g, p.grad) for g, p in zip(grads, twin.parameters(), strict=True)
    )


# Overflows.


def snapshot(model, optimizer):
    return [p.detach().clone() for p in model.parameters()] + masters(optimizer)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("clip", [False, True])
def test_an_overflow_skips(scale, clip, caplog):
    model, optimizer, _, _ = twins(OPTIMIZERS["Adam"], **SCALES[scale])
    before, first = snapshot(model, optimizer), optimizer.loss_scale
    optimizer.backward(model(0, factor=float("inf")))
    with caplog.at_level(logging.INFO, "mpengine.amp"):
        assert not clip or optimizer.clip_master_grads(1.0) == -1
        assert not clip or optimizer.inspect_master_grad_data() is None
        assert optimizer.overflow
        optimizer.step()
    assert optimizer.overflow
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
    assert optimizer.loss_scale == (first if scale == "static" else first / 2)
    moved = "keeping loss scale at 128.0" if scale == "static" else "reducing loss scale to 512.0"
    assert f"Gradient overflow.  Skipping step, loss scaler 0 {moved}" in caplog.text
    optimizer.zero_grad()
    optimizer.backward(model(0))
    optimizer.step()
    assert not optimizer.overflow
    assert (optimizer.optimizer.steps_taken, optimizer.optimizer.steps_skipped) == (1, 1)
    assert not torch.equal(before[0], model.low[0])


def test_the_scale_moves_as_apexs_did():
    """From 2**32 down to 1 and no further; up after scale_window clean iterations."""
    args = {"init_scale": 8.0, "scale_factor": 4.0, "scale_window": 3}
    model, optimizer, _, _ = twins(OPTIMIZERS["SGD"], dynamic_loss_scale=True, dynamic_loss_args=args)
    hand = fp16_utils.DynamicLossScaler(**args)
    scales = []
    for overflow in [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]:
        optimizer.zero_grad()
        optimizer.backward(model(0, factor=float("nan") if overflow else 1.0))
        optimizer.step()
        hand.update_scale(bool(overflow))
        scales.append(optimizer.loss_scale)
        assert hand.loss_scale == hand.cur_scale == scales[-1]
    assert scales == [2.0, 1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 16.0, 4.0, 4.0, 4.0, 16.0]
    assert fp16_utils.DynamicLossScaler().loss_scale == 2.0**32


def test_verbose_false_logs_nothing(caplog):
    model = Product()
    optimizer = FP16_Optimizer(OPTIMIZERS["SGD"](model.parameters()), dynamic_loss_scale=True, verbose=False)
    with caplog.at_level(logging.INFO, "mpengine.amp"):
        optimizer.backward(model(0, factor=float("inf")))
        optimizer.step()
    assert caplog.text == ""


# What it is.


def test_setting_the_scale():
    model, optimizer, twin, theirs = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    optimizer.loss_scale = 16.0
    assert optimizer.loss_scale == 16.0
    optimizer.backward(model(0))
    optimizer.loss_scale = 4.0  # these keep the 16 that scaled them
    optimizer.step()
    assert optimizer.loss_scale == 4.0
    twin(0).backward()
    theirs.step()
    check_equal(model, optimizer, twin)
    dynamic = FP16_Optimizer(OPTIMIZERS["SGD"](Product().parameters()), dynamic_loss_scale=True)
    dynamic.loss_scale = 32.0
    assert dynamic.loss_scale == 32.0


def test_it_is_made_of_the_engines_parts():
    model = Product()
    inner = OPTIMIZERS["Adam"](model.parameters())
    optimizer = FP16_Optimizer(inner, **SCALES["dynamic"])
    assert type(optimizer.optimizer) is AmpOptimizer
    assert isinstance(optimizer.optimizer, mpengine.MixedPrecisionOptimizer)
    assert isinstance(optimizer.loss_scaler, mpengine.GradScaler)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is optimizer.optimizer.state
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1, gamma=0.5)
    optimizer.backward(model(0))
    inner.step()
    scheduler.step()
    assert optimizer.optimizer.steps_taken == 1
    assert optimizer.param_groups[0]["lr"] == 0.005


def test_the_scalers_own_names():
    _, optimizer, _, _ = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    assert optimizer.loss_scaler.loss_scale == optimizer.loss_scaler.cur_scale == optimizer.loss_scale == 64.0


def test_groups_of_parameters_and_masters():
    model = Product()
    frozen = nn.Parameter(torch.ones(2).half(), requires_grad=False)
    groups = [{"params": [model.low[0], frozen, model.wide]}, {"params": list(model.low)[1:]}]
    optimizer = FP16_Optimizer(OPTIMIZERS["SGD"](groups), static_loss_scale=64.0)
    low, from_low, wide = optimizer.fp16_groups, optimizer.fp32_from_fp16_groups, optimizer.fp32_from_fp32_groups
    assert [list(map(id, group)) for group in low] == [[id(model.low[0])], [id(model.low[1]), id(model.low[2])]]
    assert [list(map(id, group)) for group in wide] == [[id(model.wide)], []]
    optimizer.backward(model(0))
    optimizer.update_master_grads()
    twin = Product().float()
    twin(0).backward()
    masters_of = [master for group in from_low for master in group]
    for param, master, exact in zip(model.low, masters_of, twin.low, strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(master, param.float())
        assert torch.equal(master.grad, exact.grad)
    with pytest.raises(AttributeError):
        optimizer.fp16_groups = []


@pytest.mark.parametrize("name", ["set_grads_to_None", "set_to_none"])
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none, name):
    model, optimizer, _, _ = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    optimizer.backward(model(0))
    optimizer.clip_master_grads(1.0)
    optimizer.zero_grad(**{name: to_none})
    assert all((p.grad is None) if to_none else not p.grad.any() for p in model.parameters())
    optimizer.backward(model(1))
    optimizer.step()
    assert optimizer.optimizer.steps_taken == 1


def test_refusals():
    model, optimizer, _, _ = twins(OPTIMIZERS["SGD"])
    with pytest.raises(RuntimeError, match="takes no closure"):
        optimizer.step(lambda: model(0))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(optimizer)
    with pytest.raises(TypeError, match="already"):
        FP16_Optimizer(optimizer.optimizer)
    for args in ({"scale_factor": 1.0}, {"init_scale": 0.5}, {"scale_window": 0}):
        with pytest.raises(
            ValueError, match=next(iter(args)) if "window" not in next(iter(args)) else "growth_interval"
        ):
            FP16_Optimizer(OPTIMIZERS["SGD"](Product().parameters()), dynamic_loss_scale=True, dynamic_loss_args=args)


@pytest.mark.parametrize("value", [0, -1.0, "dynamic", float("nan"), float("inf"), True, None])
def test_a_static_scale_that_is_none(value):
    _, optimizer, _, _ = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    words = rf"loss_scale is {re.escape(repr(value))}; .* dynamic_loss_scale=True"
    with pytest.raises(ValueError, match=f"static_{words}"):
        FP16_Optimizer(OPTIMIZERS["SGD"](Product().parameters()), static_loss_scale=value)
    with pytest.raises(ValueError, match=words):
        optimizer.loss_scale = value
    assert optimizer.loss_scale == 64.0


# Gradients that `backward` has not made.


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("ask", ["step", "update_master_grads", "inspect_master_grad_data"])
def test_a_plain_backward_is_refused_in_every_iteration(scale, ask):
    model, optimizer, twin, theirs = twins(OPTIMIZERS["SGD"], **SCALES[scale])
    for seed in range(3):
        before, first = snapshot(model, optimizer), optimizer.loss_scale
        model(seed).backward()
        with pytest.raises(RuntimeError, match=r"call it in the place of loss\.backward\(\)"):
            getattr(optimizer, ask)()
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
        assert optimizer.loss_scale == first
        optimizer.zero_grad()
        optimizer.backward(model(seed))
        optimizer.step()
        optimizer.zero_grad()
        theirs.zero_grad()
        twin(seed).backward()
        theirs.step()
    check_equal(model, optimizer, twin, steps=3)
    assert optimizer.optimizer.steps_taken == 3


def test_gradients_put_in_the_place_of_scaled_ones():
    """They carry the scale, and nobody could tell; once unscaled, they do not."""
    model, optimizer, twin, theirs = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    optimizer.backward(model(0))
    for param in model.parameters():
        param.grad = param.grad * 1.0
    with pytest.raises(RuntimeError, match="was replaced by another"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(model(0))
    optimizer.update_master_grads()
    for param in model.parameters():
        param.grad = param.grad * 2.0
    optimizer.step()
    (2.0 * twin(0)).backward()
    theirs.step()
    check_equal(model, optimizer, twin)


@pytest.mark.parametrize("to_none", [True, False])
def test_the_models_own_zero_grad(to_none):
    model, optimizer, twin, theirs = twins(OPTIMIZERS["SGD"], static_loss_scale=64.0)
    for seed in range(3):
        model.zero_grad(set_to_none=to_none)
        optimizer.backward(model(seed))
        optimizer.step()
        theirs.zero_grad()
        twin(seed).backward()
        theirs.step()
    check_equal(model, optimizer, twin, steps=3)


# Saving and loading.


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_resuming_is_bitwise(make, model_first, tmp_path):
    def run(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            optimizer.backward(model(seed, factor=float("inf") if seed == 1 else 1.0))
            optimizer.step()

    model, optimizer, _, _ = twins(OPTIMIZERS[make], **SCALES["dynamic"])
    run(model, optimizer, range(4))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "saved.pt")
    run(model, optimizer, range(4, 8))
    of_model, of_optimizer = torch.load(tmp_path / "saved.pt", weights_only=True)
    other, resumed, _, _ = twins(OPTIMIZERS[make], dynamic_loss_scale=True)
    if model_first:
        other.load_state_dict(of_model)
    resumed.load_state_dict(of_optimizer)
    if not model_first:
        other.load_state_dict(of_model)
    assert resumed.loss_scale == 2.0**9
    run(other, resumed, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model, optimizer), snapshot(other, resumed), strict=True))
    assert resumed.loss_scale == optimizer.loss_scale


def test_states_that_do_not_fit_change_nothing():
    model, optimizer, _, _ = twins(OPTIMIZERS["SGD"], **SCALES["dynamic"])
    good = optimizer.state_dict()
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match="apex's own FP16_Optimizer"):
        optimizer.load_state_dict({"fp32_from_fp16": []})
    with pytest.raises(ValueError, match=r"no .*'loss_scaler'"):
        optimizer.load_state_dict({})
    bad = {
        **good,
        "loss_scaler": {**good["loss_scaler"], "scale": 2.0},
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(bad)
    assert optimizer.loss_scale == 2.0**10
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))


# Loops by hand.


def network():
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False), nn.LayerNorm(6))


def dtypes(model):
    return [{t.dtype for t in [*layer.parameters(), *layer.buffers()] if t.is_floating_point()} for layer in model]


LOW, WIDE = {torch.float16}, {torch.float32}


def test_network_to_half():
    model = fp16_utils.network_to_half(network())
    assert isinstance(model[0], fp16_utils.tofp16)
    assert dtypes(model[1]) == [LOW, WIDE, WIDE, LOW]
    assert model(torch.randn(2, 2, 8)).dtype == torch.float16


def test_fp16_model():
    model = fp16_utils.FP16Model(network())
    assert dtypes(model.network) == [LOW, WIDE, LOW, LOW]
    model.network[2].float()
    assert model(torch.randn(2, 2, 8)).dtype == torch.float16


def test_convert_network_takes_gradients_along():
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    model[0](torch.ones(1, 2)).sum().backward()
    assert fp16_utils.convert_network(model, torch.half) is model
    assert model[0].weight.grad.dtype == torch.float16
    assert {p.dtype for p in model.parameters()} == LOW


@pytest.mark.parametrize("flat", [False, True])
def test_masters_by_hand(flat):
    model = Product()
    params, held = fp16_utils.prep_param_lists(model, flat)
    twin = Product().float()
    assert [m.dtype for m in held] == [torch.float32] * (1 if flat else 4)
    optimizer, theirs = torch.optim.SGD(held, lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    for seed in range(3):
        model.zero_grad()
        model(seed).backward()
        fp16_utils.model_grads_to_master_grads(params, held, flat)
        optimizer.step()
        fp16_utils.master_params_to_model_params(params, held, flat)
        theirs.zero_grad()
        twin(seed).backward()
        theirs.step()
    exact = torch.cat([p.detach().reshape(-1) for p in twin.parameters()])
    assert torch.equal(torch.cat([m.detach().reshape(-1) for m in held]), exact)
    assert torch.equal(params[0], exact[:4])
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in params[1:]]), exact[4:].half())


def test_a_parameter_without_gradient():
    model = Product()
    params, held = fp16_utils.prep_param_lists(model)
    held[0].grad = torch.ones(4)
    fp16_utils.model_grads_to_master_grads(params, held)
    assert held[0].grad is None
    params, held = fp16_utils.prep_param_lists(model, flat_master=True)
    fp16_utils.model_grads_to_master_grads(params, held, flat_master=True)
    assert not held[0].grad.any()


def test_loss_scalers_by_hand():
    weight = nn.Parameter(torch.ones(3).half())
    static = fp16_utils.LossScaler(64.0)
    static.backward((weight * 2).sum())
    assert weight.grad.tolist() == [128.0] * 3
    assert not static.has_overflow([weight])
    assert [g.tolist() for g in static.scale_gradient(None, (torch.ones(2),), None)] == [[64.0, 64.0]]
    weight.grad[1] = float("inf")
    assert static.has_overflow([weight, nn.Parameter(torch.ones(1))])
    static.update_scale(True)
    assert static.loss_scale == 64.0


def test_to_python_float():
    assert fp16_utils.to_python_float(torch.tensor(2.5)) == fp16_utils.to_python_float([2.5]) == 2.5


# The tests notice.


def test_a_skipped_update_would_be_noticed(monkeypatch):
    monkeypatch.setattr(FP16_Optimizer, "step", lambda self: None)
    with pytest.raises(AssertionError):
        test_it_steps_as_fp32("Adam", "static")


def test_a_clip_that_does_nothing_would_be_noticed(monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, *_: torch.linalg.vector_norm(torch.ones(1)))
    with pytest.raises(AssertionError):
        test_clip_master_grads("static", 2)


def test_gradients_that_are_not_unscaled_would_be_noticed(monkeypatch):
    monkeypatch.setattr(AmpOptimizer, "unscale_pending", lambda self: None)
    with pytest.raises(AssertionError):
        test_inspect_master_grad_data()


def test_a_plain_backward_that_is_not_refused_would_be_noticed(monkeypatch):
    monkeypatch.setattr(FP16_Optimizer, "_check_scaled", lambda self: None)
    with pytest.raises(pytest.fail.Exception):
        test_a_plain_backward_is_refused_in_every_iteration("static", "step")
