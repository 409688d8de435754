"""`apex.optimizers`: apex's arguments; torch's classes bit for bit, and float64 where torch has no such thing."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from torch import nn

import mpengine
from mpengine import amp
from mpengine.apex import optimizers as O
from tests.kernels.harness import BRAIN, SINGLE, Grad, Problem, Spec, check

KINDS = [O.FusedAdagrad, O.FusedAdam, O.FusedLAMB, O.FusedSGD]
SHAPES = [(7,), (3, 5), (), (65,)]


def defaults(kind):
    own = inspect.signature(kind).parameters.values()
    return [(p.name, p.default) for p in own if p.name != "params"]


def test_arguments_are_apexs():
    assert defaults(O.FusedAdam) == [
        ("lr", 1e-3), ("bias_correction", True), ("betas", (0.9, 0.999)), ("eps", 1e-8), ("adam_w_mode", True),
        ("weight_decay", 0.0), ("amsgrad", False), ("set_grad_none", True), ("capturable", False),
        ("master_weights", False),
    ]  # fmt: skip
    assert defaults(O.FusedAdagrad) == [
        ("lr", 1e-2), ("eps", 1e-10), ("weight_decay", 0.0), ("set_grad_none", True), ("adagrad_w_mode", False),
    ]  # fmt: skip
    assert defaults(O.FusedSGD) == [
        ("lr", inspect.Parameter.empty), ("momentum", 0.0), ("dampening", 0.0), ("weight_decay", 0.0),
        ("nesterov", False), ("wd_after_momentum", False), ("materialize_master_grads", True), ("set_grad_none", False),
    ]  # fmt: skip
    assert defaults(O.FusedLAMB) == [
        ("lr", 1e-3), ("bias_correction", True), ("betas", (0.9, 0.999)), ("eps", 1e-6), ("weight_decay", 0.01),
        ("amsgrad", False), ("adam_w_mode", True), ("grad_averaging", True), ("set_grad_none", True),
        ("max_grad_norm", 1.0), ("use_nvlamb", False),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [O.FusedAdam, O.FusedLAMB])
def test_amsgrad_is_refused(kind):
    with pytest.raises(RuntimeError, match=rf"{kind.__name__} does not support the AMSGrad variant\. Use torch\.optim"):
        kind(nn.Linear(1, 1).parameters(), amsgrad=True)


@pytest.mark.parametrize("args", [{"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}], ids=str)
def test_nesterov_needs_momentum(args):
    with pytest.raises(ValueError, match="Nesterov momentum requires a momentum and zero dampening"):
        O.FusedSGD(nn.Linear(1, 1).parameters(), 0.1, **args)


def test_wd_after_momentum_is_refused():
    with pytest.raises(ValueError, match=r"wd_after_momentum=True is not supported.*_foreach_mul_"):
        O.FusedSGD(nn.Linear(1, 1).parameters(), 0.1, wd_after_momentum=True)


def test_adagrad_w_mode_is_refused():
    with pytest.raises(ValueError, match=r"adagrad_w_mode=True is not supported.*_foreach_mul_"):
        O.FusedAdagrad(nn.Linear(1, 1).parameters(), adagrad_w_mode=True)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", -1e-8), ("weight_decay", -1.0)]
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        O.FusedAdam(nn.Linear(1, 1).parameters(), **{name: value})


# Against torch and float64.


class Product(nn.Module):
    """The sum of weight * coefficient: its gradients are the coefficients."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.own = nn.ParameterList([torch.randn(shape, generator=generator) for shape in SHAPES])

    def forward(self, seed):
        generator = torch.Generator().manual_seed(seed)
        return sum((p.float() * torch.randint(-8, 9, p.shape, generator=generator)).sum() for p in self.own)


def prepared(make, steps=4, before=lambda model, optimizer: None):
    model = Product()
    scaler = mpengine.GradScaler(init_scale=64.0)
    optimizer = mpengine.prepare(model, make(model.parameters()), scaler)
    before(model, optimizer)
    for seed in range(steps):
        optimizer.zero_grad()
        scaler.scale(model(seed)).backward()
        optimizer.step()
        scaler.update()
    return [p.detach().clone() for p in optimizer.master_params()]


PAIRS = {
    "AdamW": (
        lambda params: O.FusedAdam(params, lr=0.02, weight_decay=0.1),
        lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1),
    ),
    "Adam": (
        lambda params: O.FusedAdam(params, lr=0.02, adam_w_mode=False, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6),
        lambda params: torch.optim.Adam(params, lr=0.02, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6),
    ),
    "SGD": (lambda params: O.FusedSGD(params, 0.1), lambda params: torch.optim.SGD(params, 0.1)),
    "momentum": (
        lambda params: O.FusedSGD(params, 0.1, 0.9, 0.5, 0.01),
        lambda params: torch.optim.SGD(params, 0.1, 0.9, 0.5, 0.01),
    ),
    "Nesterov": (
        lambda params: O.FusedSGD(params, 0.1, 0.9, nesterov=True),
        lambda params: torch.optim.SGD(params, 0.1, 0.9, nesterov=True),
    ),
    "Adagrad": (
        lambda params: O.FusedAdagrad(params, lr=0.1, weight_decay=0.1),
        lambda params: torch.optim.Adagrad(params, lr=0.1, weight_decay=0.1, eps=1e-10),
    ),
    "LAMB": (
        lambda params: O.FusedLAMB(params, lr=0.02, grad_averaging=False, use_nvlamb=True),
        lambda params: mpengine.optim.LAMB(params, lr=0.02, grad_averaging=False, use_nvlamb=True),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_prepared_they_are_torchs_bit_for_bit(pair):
    ours, theirs = map(prepared, PAIRS[pair])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(ours, Product().parameters(), strict=True))


@pytest.mark.parametrize("pair", PAIRS)
def test_by_themselves(pair):
    """The same numbers as prepared; its gradients are exact, and so are the scales."""
    model = Product()
    optimizer = PAIRS[pair][0](model.parameters())
    for seed in range(4):
        optimizer.zero_grad()
        model(seed).backward()
        optimizer.step()
    for ours, theirs in zip(model.parameters(), prepared(PAIRS[pair][0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * 2.0**-24 * 4)  # a few roundings for each step


def adam64(lr, beta1, beta2, eps, decay, decoupled, corrected):
    """Kingma & Ba in float64, on `Product`'s gradients."""
    model = Product().double()
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.own]
    for step in range(1, 5):
        model.zero_grad()
        model(step - 1).backward()
        with torch.no_grad():
            for param, (m, v) in zip(model.own, moments, strict=True):
                grad = param.grad if decoupled else param.grad + decay * param
                m.lerp_(grad, 1 - beta1)
                v.lerp_(grad**2, 1 - beta2)
                m_hat, v_hat = (m / (1 - beta1**step), v / (1 - beta2**step)) if corrected else (m, v)
                update = m_hat / (v_hat.sqrt() + eps) + (decay * param if decoupled else 0)
                param -= lr * update
    return list(model.parameters())


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_with_and_without_bias_correction(corrected, decoupled):
    args = {"lr": 0.02, "betas": (0.8, 0.96), "eps": 1e-6, "weight_decay": 0.1}
    ours = prepared(lambda p: O.FusedAdam(p, bias_correction=corrected, adam_w_mode=decoupled, **args))
    exact = adam64(0.02, 0.8, 0.96, 1e-6, 0.1, decoupled, corrected)
    for mine, true in zip(ours, exact, strict=True):
        # FP32 roundings of four steps, each of a size at most 0.1 (uncorrected moments make large steps)
        assert (mine.double() - true).abs().max() <= 4 * 16 * 2.0**-24 * 4


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        (O.FusedAdam, ({"bias_correction": False, "lr": 0.1}, {"adam_w_mode": False, "weight_decay": 0.1})),
        (O.FusedLAMB, ({"bias_correction": False}, {"adam_w_mode": False, "use_nvlamb": True})),
    ],
)
def test_kernels_reference_and_cpu_agree_bit_for_bit(kind, groups):
    tensors = [
        Spec((31,)),
        Spec((1025,), dtype=SINGLE, grads=(Grad(0, SINGLE),)),
        Spec((5,), BRAIN, (Grad(0, BRAIN),), 1),
    ]
    check(Problem(tuple(tensors), optimizer=kind, groups=groups))


# In apex's loop.


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize("kind", KINDS)
def test_initialize_takes_them(kind, level):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model, optimizer = amp.initialize(model, kind(model.parameters(), lr=0.05), opt_level=level, verbosity=0)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    losses = []
    for _ in range(12):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        with amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.steps_taken == 12
    assert losses[-1] < 0.9 * losses[0]


def test_the_remedy_for_decay_after_momentum():
    """p = p - lr * (b + decay * p) with b = momentum * b + g, in float64, and what the refusal says instead."""
    lr, momentum, decay = 0.1, 0.5, 0.25
    model, exact = Product(), [p.detach().double() for p in Product().own]
    buffers = [torch.zeros_like(p) for p in exact]
    optimizer = O.FusedSGD(model.parameters(), lr, momentum)
    model, optimizer = amp.initialize(model, optimizer, opt_level="O2", loss_scale=64.0, verbosity=0)
    for seed in range(3):
        optimizer.zero_grad()
        with amp.scale_loss(model(seed), optimizer) as scaled:
            scaled.backward()
        with torch.no_grad():
            torch._foreach_mul_(list(amp.master_params(optimizer)), 1 - lr * decay)
        twin = Product()
        twin(seed).backward()
        for value, buffer, param in zip(exact, buffers, twin.own, strict=True):
            buffer.mul_(momentum).add_(param.grad)
            value.sub_(lr * (buffer + decay * value))
        optimizer.step()
    for ours, true in zip(amp.master_params(optimizer), exact, strict=True):
        assert (ours.double() - true).abs().max() <= 3 * 8 * 2.0**-24 * 4


# What apex saved.


def saved_by_apex(optimizer):
    """Our state as apex's class would have saved it."""
    state = copy.deepcopy(optimizer.state_dict())
    (group,) = state["param_groups"]
    steps = {int(own.pop("step")) for own in state["state"].values()}
    kept = ("lr", "bias_correction", "betas", "eps", "weight_decay", "params")
    return {"state": state["state"], "param_groups": [{**{k: group[k] for k in kept}, "step": steps.pop()}]}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", [O.FusedAdam, O.FusedLAMB])
def test_a_state_of_apex_goes_on(kind, wrapped):
    model = Product()
    optimizer = kind(model.parameters(), lr=0.02, adam_w_mode=False)

    def train(model, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            model(seed).backward()
            optimizer.step()

    train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = kind(other.parameters(), lr=1.0, adam_w_mode=False)
    state = saved_by_apex(optimizer)
    if wrapped:
        resumed = mpengine.MixedPrecisionOptimizer(resumed)
    resumed.load_state_dict(state)
    assert "step" not in resumed.param_groups[0]
    assert resumed.param_groups[0]["lr"] == 0.02
    assert resumed.param_groups[0]["adam_w_mode"] is False
    assert {int(own["step"]) for own in resumed.state.values()} == {3}
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=(16 * 2.0**-24 * 4) if wrapped else 0)


def test_own_states_are_torchs_format():
    model = Product()
    optimizer = O.FusedSGD(model.parameters(), 0.1, momentum=0.9)
    model(0).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    assert {tuple(own) for own in state["state"].values()} == {("momentum_buffer",)}
    twin = Product()
    twin.load_state_dict(model.state_dict())
    other = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    other.load_state_dict({"state": state["state"], "param_groups": other.state_dict()["param_groups"]})
    for each, by in ((model, optimizer), (twin, other)):
        each.zero_grad()
        each(1).backward()
        by.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * 2.0**-24)


# The tests notice.


def test_a_correction_that_stays_on_would_be_noticed(monkeypatch):
    row = O.FusedAdam.family.hyperparameters
    monkeypatch.setattr(
        O.FusedAdam, "family", replace(O.FusedAdam.family, hyperparameters=lambda g: (*row(g)[:7], 0.0))
    )
    with pytest.raises(AssertionError):
        test_adam_with_and_without_bias_correction(False, True)


def test_a_step_count_that_is_lost_would_be_noticed(monkeypatch):
    monkeypatch.setattr(O, "_from_apex", lambda optimizer, state: None)
    with pytest.raises(ValueError, match=r"missing: \['step'\]"):
        test_a_state_of_apex_goes_on(O.FusedAdam, True)
