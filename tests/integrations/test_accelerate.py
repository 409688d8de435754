"""Hugging Face Accelerate: its loop with our `Accelerator`, against its own with `torch.amp.GradScaler`."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradScalerKwargs
from torch import nn

import mpengine
from mpengine.integrations.accelerate import Accelerator
from tests.harness import frozen, same_bits
from tests.integrations import world
from tests.integrations.world import INIT_SCALE, Known, adamw, batches, loss_of, sgd, two_layers


@pytest.fixture(autouse=True)
def _a_state_of_its_own():
    """Accelerate keeps its state in singletons."""
    yield
    for kept in (AcceleratorState, GradientState, PartialState):
        kept._reset_state()


def scaler_of(kind=mpengine.GradScaler, **kwargs):
    return kind("cpu", init_scale=INIT_SCALE, growth_interval=3, **kwargs)


def ours(**kwargs):
    kwargs.setdefault("scaler", scaler_of())
    return Accelerator(cpu=True, mixed_precision="fp16", **kwargs)


def theirs(**kwargs):
    """Accelerate leaves fp16 off on the CPU; this is what it does on a GPU."""
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="fp16", **kwargs)
    accelerator.scaler, accelerator.native_amp = scaler_of(torch.amp.GradScaler), True
    return accelerator


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def train(accelerator, data, make=sgd, clip=None, schedule=None, model=None):
    """A loop as Accelerate's documentation has it. Returns what could be seen after each batch."""
    model = two_layers() if model is None else model
    optimizer = make(model)
    scheduler = (schedule or halving)(optimizer)
    loader = world.loader(data)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    return model, optimizer, scheduler, go_on(accelerator, model, optimizer, scheduler, loader, clip)


def go_on(accelerator, model, optimizer, scheduler, loader, clip=None):
    seen = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if clip is not None and accelerator.sync_gradients:
                clip(accelerator, model.parameters())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        lr = optimizer.param_groups[0]["lr"]
        own = getattr(optimizer.optimizer, "master_params", model.parameters)()
        weights = frozen([p.detach() for p in own])
        seen.append((accelerator.optimizer_step_was_skipped, lr, accelerator.scaler.get_scale(), weights))
    return seen


CLIPPING = {
    "free": None,
    "norm": lambda accelerator, params: accelerator.clip_grad_norm_(params, 0.25),
    "value": lambda accelerator, params: accelerator.clip_grad_value_(params, 0.0625),
}


@pytest.mark.parametrize("clip", CLIPPING.values(), ids=CLIPPING)
def test_it_trains_as_accelerate_with_torchs_scaler_does(clip):
    """Skips, learning rates, scales and weights, bit for bit; the scheduler waits for the two skipped steps."""
    data = batches(8, overflow=(2, 5))
    *_, seen = train(ours(), data, clip=clip)
    AcceleratorState._reset_state()
    *_, expected = train(theirs(), data, clip=clip)
    assert [skipped for skipped, *_ in seen] == [False, False, True, False, False, True, False, False]
    lrs = [2.0**-4 * 0.5**taken for taken in (1, 2, 2, 3, 4, 4, 5, 6)]
    assert [lr for _, lr, *_ in seen] == lrs
    assert seen == expected
    if clip is not None:
        AcceleratorState._reset_state()
        assert seen != train(ours(), data)[-1]


def test_torchs_fused_optimizer_is_not_seen_to_skip_and_ours_is():
    """The reason for our `AcceleratedOptimizer`: Accelerate watches whether `optimizer.step()` is called."""
    data = batches(2, overflow=(0,))

    def fused(model):
        return torch.optim.SGD(model.parameters(), lr=2.0**-4, fused=True)

    *_, wrong = train(theirs(), data, fused)
    AcceleratorState._reset_state()
    *_, right = train(ours(), data, fused)
    assert [s[:2] for s in wrong] == [(False, 2.0**-5), (False, 2.0**-6)]
    assert [s[:2] for s in right] == [(True, 2.0**-4), (False, 2.0**-5)]


def test_gradient_accumulation_is_one_step_of_several_batches():
    """Batches 1 and 2 overflow, so the first two of the three accumulated steps are skipped."""
    data = batches(6, overflow=(1, 2))
    _, optimizer, _, seen = train(ours(gradient_accumulation_steps=2), data)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    model, _, _, expected = train(theirs(gradient_accumulation_steps=2), data)
    assert [s[:3] for s in seen] == [s[:3] for s in expected]
    assert [skipped for skipped, *_ in seen] == [False, True, True, True, True, False]
    assert seen[4][3] == seen[0][3]
    # The sum of two gradients is rounded to fp16, 2^-11 of it; gradients are below 4 here, and lr is 1/16.
    for master, weight, start in zip(
        optimizer.master_params(), model.parameters(), two_layers().parameters(), strict=True
    ):
        torch.testing.assert_close(master, weight, rtol=0.0, atol=4 * 2.0**-11 / 16)
        assert (master - start).abs().max() > 16 * 4 * 2.0**-11 / 16  # a gradient twice as large would be seen


def known_pair(accelerator):
    """Two models of known gradient with an optimizer each: weight (1, 2), gradient x, lr 0.5."""
    a, b = Known(), Known()
    opts = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (a, b)]
    return accelerator.prepare(a, b, *opts)


X = torch.tensor([3.0, -4.0])
Y = torch.tensor([4.0, 3.0])


def weights(optimizer):
    own = getattr(optimizer.optimizer, "master_params", None)
    return (next(own()) if own else optimizer.param_groups[0]["params"][0]).tolist()


def clip_and_step_in_turn(accelerator):
    """One backward pass for both; then each model is clipped (its norm of 5 stays) and stepped."""
    a, b, opt_a, opt_b = known_pair(accelerator)
    accelerator.backward(a(X) + b(Y))
    norms = []
    for model, optimizer in ((a, opt_a), (b, opt_b)):
        norms.append(accelerator.clip_grad_norm_(model.parameters(), 100.0).item())
        optimizer.step()
    return norms, weights(opt_a), weights(opt_b)


def test_two_optimizers_are_each_unscaled_once():
    """`clip_grad_norm_` unscales all optimizers, and each step updates the scaler."""
    norms, a, b = clip_and_step_in_turn(ours())
    assert norms == [5.0, 5.0]
    assert (a, b) == ([-0.5, 4.0], [-1.0, 0.5])


def test_accelerate_with_torchs_scaler_unscales_the_second_twice():
    norms, a, b = clip_and_step_in_turn(theirs())
    assert norms[0] == 5.0
    assert norms[1] == pytest.approx(5.0 / INIT_SCALE)
    assert a == [-0.5, 4.0]
    assert b == [1.0 - 2.0 / INIT_SCALE, 2.0 - 1.5 / INIT_SCALE]


def test_a_scheduler_waits_for_its_own_optimizer_alone():
    accelerator = ours(scaler=scaler_of(num_losses=2))
    a, b = Known(), Known()
    opts = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (a, b)]
    schedulers = [halving(opt) for opt in opts]
    a, b, *rest = accelerator.prepare(a, b, *opts, *schedulers)
    for i in range(2):
        accelerator.backward(a(X) * (float("inf") if i == 0 else 1.0), loss_id=0)
        accelerator.backward(b(Y), loss_id=1)
        for one in rest:  # the optimizers, then their schedulers
            one.step()
        for optimizer in rest[:2]:
            optimizer.zero_grad()
    assert [opt.param_groups[0]["lr"] for opt in opts] == [0.25, 0.125]
    assert [s.scale for s in accelerator.scaler.statistics()] == [512.0, 1024.0]
    assert [opt.steps_taken for opt in rest[:2]] == [1, 2]


def test_max_grad_norm_clips_within_the_step():
    accelerator = ours(max_grad_norm=2.5)
    model, optimizer = accelerator.prepare(model := Known(), torch.optim.SGD(model.parameters(), lr=0.5))
    accelerator.backward(model(X))
    assert model.weight.grad.dtype == torch.float16
    optimizer.step()
    # The coefficient 2.5 / (5 + 1e-6) is 1/2 less 1e-7, rounded: rtol 1e-6.
    assert weights(optimizer) == pytest.approx([0.25, 3.0], rel=1e-6)


def test_save_state_and_load_state_resume_bitwise(tmp_path):
    data = batches(8, overflow=(1, 5))
    accelerator = ours()
    model, optimizer, scheduler, _ = train(accelerator, data[:4], adamw)
    accelerator.save_state(tmp_path)
    unbroken = go_on(accelerator, model, optimizer, scheduler, data[4:])
    final = frozen([optimizer.state_dict(), accelerator.scaler.state_dict(), scheduler.state_dict()["_step_count"]])

    AcceleratorState._reset_state()
    accelerator = ours()
    model = two_layers()
    with torch.no_grad():
        model[0].weight.zero_()
    model, optimizer, scheduler, _ = train(accelerator, [], adamw, model=model)
    accelerator.load_state(tmp_path)
    assert optimizer.steps_taken == 3
    assert go_on(accelerator, model, optimizer, scheduler, data[4:]) == unbroken
    assert final == frozen(
        [optimizer.state_dict(), accelerator.scaler.state_dict(), scheduler.state_dict()["_step_count"]]
    )
    weights_at_start = frozen(list(two_layers().parameters()))
    assert unbroken[-1][3] != weights_at_start


def test_three_losses_have_a_scale_each():
    accelerator = ours(scaler=scaler_of(num_losses=3))
    nets = world.Gan()
    nets, opt_g, opt_c = accelerator.prepare(nets, adamw(nets.generator), adamw(nets.critic))
    for x, _, factor in batches(6, overflow=(1, 3)):
        with accelerator.autocast():
            fake = nets.generator(x[:, :4])
            real_loss = nn.functional.softplus(-nets.critic(x)).mean()
            fake_loss = nn.functional.softplus(nets.critic(fake.detach())).mean() * factor
        opt_c.zero_grad()
        accelerator.backward(real_loss, loss_id=0)
        accelerator.backward(fake_loss, loss_id=1)
        opt_c.step()
        with accelerator.autocast():
            loss = nn.functional.softplus(-nets.critic(fake)).mean()
        opt_g.zero_grad()
        accelerator.backward(loss, loss_id=2)
        opt_g.step()
    assert [s.overflows for s in accelerator.scaler.statistics()] == [0, 2, 0]
    assert [s.scale for s in accelerator.scaler.statistics()] == [4096.0, 256.0, 4096.0]
    assert [o.steps_taken for o in (opt_g, opt_c)] == [6, 4]


# What is made, and from what.


def test_the_scaler_takes_grad_scaler_kwargs():
    handler = GradScalerKwargs(init_scale=64.0, growth_interval=7, backoff_factor=0.25)
    scaler = Accelerator(cpu=True, mixed_precision="fp16", kwargs_handlers=[handler]).scaler
    assert isinstance(scaler, mpengine.GradScaler)
    assert (scaler.get_scale(), scaler.get_growth_interval(), scaler.get_backoff_factor()) == (64.0, 7, 0.25)


def test_bf16_has_masters_and_no_scaler():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(model := Known(), torch.optim.SGD(model.parameters(), lr=0.5))
    accelerator.backward(model(X))
    optimizer.step()
    assert (accelerator.scaler, model.weight.dtype) == (None, torch.bfloat16)
    assert weights(optimizer) == [-0.5, 4.0]
    assert not accelerator.optimizer_step_was_skipped
    with pytest.raises(AttributeError, match="no attribute 'steps_made'"):
        optimizer.steps_made  # noqa: B018
    with pytest.raises(ValueError, match="loss_id is 1, but bf16 has no scaler"):
        accelerator.backward(model(X), loss_id=1)


@pytest.mark.parametrize("together", [True, False])
def test_what_prepare_gives(together):
    accelerator = ours(keep_fp32=[nn.Tanh])
    model = two_layers()
    optimizer = adamw(model)
    if together:
        prepared = accelerator.prepare(model, optimizer)
    else:
        prepared = accelerator.prepare(model), accelerator.prepare(optimizer)
    assert prepared[0][0].weight.dtype == torch.float16
    assert isinstance(prepared[1].optimizer, mpengine.MixedPrecisionOptimizer)
    assert accelerator.prepare(*prepared) == prepared  # not wrapped twice
    assert same_bits(next(prepared[1].master_params()), two_layers()[0].weight)


def test_one_optimizer_may_train_two_models():
    accelerator = ours()
    a, b = Known(), Known()
    a, b, optimizer = accelerator.prepare(a, b, torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.5))
    accelerator.backward(a(X) + b(Y))
    optimizer.step()
    assert [m.tolist() for m in optimizer.master_params()] == [[-0.5, 4.0], [-1.0, 0.5]]


def test_an_optimizer_that_was_prepared_by_hand_is_kept():
    accelerator = ours()
    model = two_layers()
    optimizer = mpengine.prepare(model, sgd(model), accelerator.scaler, keep_fp32=["0"])
    model, prepared = accelerator.prepare(model, optimizer)
    assert prepared.optimizer is optimizer
    assert [layer.weight.dtype for layer in (model[0], model[2])] == [torch.float32, torch.float16]


# Misuse.


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="mixed_precision is 'no'"):
        Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state()
    with pytest.raises(TypeError, match=r"scaler is a torch\.amp"):
        ours(scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match="scaler and GradScalerKwargs are given"):
        ours(kwargs_handlers=[GradScalerKwargs(init_scale=2.0)])
    accelerator = ours()
    with pytest.raises(ValueError, match="belong to no model that was prepared"):
        accelerator.prepare(sgd(two_layers()))
    model = two_layers()
    with pytest.raises(ValueError, match=r"another scaler; prepare it with accelerator\.scaler"):
        accelerator.prepare(model, mpengine.prepare(model, sgd(model), scaler_of()))


def test_an_accelerator_that_prepared_something_is_not_adopted():
    accelerator = theirs()
    accelerator.prepare(model := two_layers(), sgd(model))
    with pytest.raises(ValueError, match="prepared 2 models and optimizers already"):
        Accelerator.adopt(accelerator)
    assert type(accelerator) is accelerate.Accelerator
    accelerator.free_memory()
    with pytest.raises(TypeError, match="scaler is a"):
        Accelerator.adopt(accelerator, scaler=torch.amp.GradScaler("cpu"))
    assert type(accelerator) is accelerate.Accelerator
