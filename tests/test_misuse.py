"""Mistakes that would give wrong numbers silently are refused, and a failed step leaves nothing half-changed."""

import pytest
import torch
from torch import nn

import mpengine


def prepared(make=lambda params: torch.optim.SGD(params, lr=0.1), num_losses=1):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    raw = make(model.parameters())
    scaler = mpengine.GradScaler("cpu", init_scale=64.0, num_losses=num_losses)
    return model, raw, mpengine.prepare(model, raw, scaler), scaler


def loss_of(model):
    return model(torch.ones(3, 4).half()).float().square().mean()


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: torch.optim.Adamax(p, lr=0.1)])
def test_the_wrapped_optimizer_does_not_step_by_itself(make):
    model, raw, optimizer, scaler = prepared(make)
    scaler.scale(loss_of(model)).backward()
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="Step what prepare returned"):
        raw.step()
    assert torch.equal(model.weight, before)
    optimizer.step()
    assert not torch.equal(model.weight, before)


def test_a_scaled_backward_inside_a_backward_is_refused_with_several_losses():
    model, _, _, scaler = prepared(num_losses=2)
    hidden = model.weight * 1.0

    def hook(_):
        with torch.enable_grad():
            scaler.scale(loss_of(model), 1).backward()

    hidden.register_hook(hook)
    with pytest.raises(RuntimeError, match="loss 1 was scaled inside a backward pass"):
        scaler.scale(hidden.float().sum(), 0).backward()


def test_masters_and_state_dict_follow_new_weights_at_once():
    model, _, optimizer, _ = prepared()
    model.load_state_dict({name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()})
    assert optimizer.state_dict()["state"][0]["master"].eq(0.5).all()
    assert all(master.eq(0.5).all() for master in optimizer.master_params())


def test_a_master_whose_gradient_is_cleared_after_unscale_does_not_move():
    model, _, optimizer, scaler = prepared()
    scaler.scale(loss_of(model)).backward()
    scaler.unscale_(optimizer)
    weight, bias = (p.detach().clone() for p in model.parameters())
    next(iter(optimizer.master_params())).grad = None
    scaler.step(optimizer)
    assert torch.equal(model.weight, weight)
    assert not torch.equal(model.bias, bias)


def test_an_error_in_the_wrapped_optimizers_step_is_no_step():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise KeyError("broken")

    model, _, optimizer, scaler = prepared(lambda params: Broken(params, lr=0.1))
    scaler.scale(loss_of(model)).backward()
    with pytest.raises(KeyError):
        optimizer.step()
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (0, 0)
    for param, master in zip(model.parameters(), optimizer.master_params(), strict=True):
        assert torch.equal(param, master.half())


def test_a_single_name_in_keep_fp32_is_a_name():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "h": nn.Linear(2, 2)})
    mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), mpengine.GradScaler("cpu"), keep_fp32="head")
    assert model["head"].weight.dtype == torch.float32
    assert model["h"].weight.dtype == torch.float16
    with pytest.raises(TypeError, match="model is a generator"):
        mpengine.prepare(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("words", "kwargs"),
    [
        ("init_scale is 'a'", {"init_scale": "a"}),
        ("growth_interval is 1.5", {"growth_interval": 1.5}),
        ("growth_factor is 'x'", {"growth_factor": "x"}),
        ("num_losses is 2.0", {"num_losses": 2.0}),
        ("num_losses is True", {"num_losses": True}),
        ("max_consecutive_skips is 1.5", {"max_consecutive_skips": 1.5}),
    ],
)
def test_a_number_of_another_kind_is_named(words, kwargs):
    with pytest.raises(ValueError, match=f"{words}; "):
        mpengine.GradScaler("cpu", **kwargs)


def test_a_loss_id_is_no_truth_value():
    scaler = mpengine.GradScaler("cpu", num_losses=2)
    with pytest.raises(ValueError, match="loss_id is True"):
        scaler.scale(torch.ones((), requires_grad=True), loss_id=True)


def test_a_wrapped_optimizer_that_has_stepped_knows_its_steps():
    """So that a schedule begins where it would after loading the same state."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped = mpengine.prepare(model, optimizer, mpengine.GradScaler("cpu"))
    assert wrapped.steps_taken == 3


def test_buffers_keep_their_dtype():
    model = nn.Linear(2, 2)
    model.register_buffer("steps", torch.arange(2048.0))
    model.register_buffer("positions", torch.arange(5000.0))
    model.register_buffer("frequencies", torch.tensor([1.0, 1e-9]))
    mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), mpengine.GradScaler("cpu"))
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
