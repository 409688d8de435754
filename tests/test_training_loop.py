"""Whole training loops in fp16 beside torch.amp: the same scales, the same skips, the same weights; and it learns.

torch's side is what its users run: FP32 parameters, `torch.amp.GradScaler`, torch.optim. It gets our gradients, so that
both see the same overflows and the comparison is exact: the weights stay within `tests.oracle`'s bound, or are equal
bit for bit where both run torch's own step.
"""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import mpengine
from mpengine import GradScaler, cpu, reference
from tests.harness import BRAIN, FUSED, GENERAL, HALF, SINGLE, feed, params_of, same_bits, snapshot
from tests.oracle import Oracle, U, clip_of

ITERATIONS = 40


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 10))


def convnet(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def channels_last(seed=0):
    return convnet(seed).to(memory_format=torch.channels_last)


MODELS = {"mlp": mlp, "convnet": convnet, "channels_last": channels_last}
DIGITS = load_digits()
IMAGES = torch.from_numpy((DIGITS.images / 16.0).astype(np.float32))[:, None]
LABELS = torch.from_numpy(DIGITS.target)


def batch(step, size=16):
    picked = torch.randint(1500, (size,), generator=torch.Generator().manual_seed(step))
    return IMAGES[picked], LABELS[picked]


def loss_of(model, step, size=16):
    x, y = batch(step, size)
    if model[0].__class__ is nn.Conv2d and not model[0].weight.is_contiguous():
        x = x.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", HALF):
        out = model(x)
    return nn.functional.cross_entropy(out.float(), y)


# How an overflow comes about.


def in_the_loss(loss, params):
    return loss * math.inf


def in_a_gradient(loss, params):
    params[-2].register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.inf))
    return loss


def nan_in_a_gradient(loss, params):
    params[0].register_hook(lambda grad: grad * math.nan)
    return loss


def by_its_size(loss, params):
    return loss * 2.0**20  # fp16 gradients overflow of themselves


KINDS = [in_the_loss, in_a_gradient, nan_in_a_gradient, by_its_size]
OVERFLOWS = {0: 0, 1: 3, 9: 1, 10: 2, 11: 3, 12: 0, 25: 1, 39: 2}  # iteration -> kind


class Loop:
    """The same loop under mpengine and under torch.amp, which gets our gradients."""

    def __init__(self, make_model, make_optimizer, max_grad_norm=None):
        self.model = make_model()
        self.twin = copy.deepcopy(self.model)
        self.scaler = GradScaler(init_scale=2.0**12, growth_interval=4)
        self.ours = mpengine.prepare(
            self.model, make_optimizer(self.model.parameters()), self.scaler, max_grad_norm=max_grad_norm
        )
        self.theirs = make_optimizer(self.twin.parameters())
        self.amp = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=4)
        self.max_grad_norm = max_grad_norm
        self.oracle = Oracle.of(list(self.twin.parameters()), self.theirs) if make_optimizer in FUSED.values() else None
        self.history = []

    def run(self, steps):
        for step in steps:
            self.iterate(step)
        return self

    def iterate(self, step):
        params = list(self.model.parameters())
        kept = [dict(p._backward_hooks or {}) for p in params]
        loss = loss_of(self.model, step)
        if step in OVERFLOWS:
            loss = KINDS[OVERFLOWS[step]](loss, params)
        self.scaler.scale(loss).backward()
        for param, hooks in zip(params, kept, strict=True):
            if param._backward_hooks:
                param._backward_hooks.clear()
                param._backward_hooks.update(hooks)
        scale = self.scaler.get_scale()
        grads = [p.grad.float() for p in params]
        feed(params_of(self.theirs), grads)
        self.amp.scale(torch.zeros(()))
        if self.max_grad_norm is not None:
            self.amp.unscale_(self.theirs)
            torch.nn.utils.clip_grad_norm_(self.twin.parameters(), self.max_grad_norm, foreach=False)
        self.amp.step(self.theirs)
        self.ours.step()
        assert self.ours.last_step_skipped == (step in OVERFLOWS)
        if not self.ours.last_step_skipped and self.oracle is not None:
            self.follow([grad / scale for grad in grads])
        self.amp.update()
        self.scaler.update()
        self.ours.zero_grad()
        self.history.append((self.scaler.get_scale(), self.scaler._get_growth_tracker()))
        assert self.history[-1] == (self.amp.get_scale(), self.amp._get_growth_tracker())
        self.check()

    def follow(self, grads):
        numel = sum(grad.numel() for grad in grads)
        clip_error = np.array([[6.0], [2.0 * numel + 16.0]]) * U
        self.oracle.step(grads, self.theirs.param_groups[0], clip_of(grads, self.max_grad_norm), clip_error)

    def check(self):
        masters = list(self.ours.master_params())
        for param, master in zip(self.model.parameters(), masters, strict=True):
            assert same_bits(param, master.to(param.dtype))
        if self.oracle is None:
            assert same_bits(masters, list(self.twin.parameters()))
        else:
            assert self.oracle.distance(masters, 0) <= 1.0
            assert self.oracle.distance(list(self.twin.parameters()), 1) <= 1.0


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
# Adamax is equal bit for bit, so not where two norms differ in the last bit: tests/test_general.py clips it.
@pytest.mark.parametrize(
    ("name", "max_grad_norm"), [*((name, norm) for name in FUSED for norm in (None, 0.5)), ("Adamax", None)]
)
def test_scales_and_weights_are_torch_amps(make_model, name, max_grad_norm):
    loop = Loop(make_model, {**FUSED, **GENERAL}[name], max_grad_norm).run(range(ITERATIONS))
    assert loop.ours.steps_taken == ITERATIONS - len(OVERFLOWS)
    assert loop.ours.steps_skipped == len(OVERFLOWS)
    scales = [scale for scale, _ in loop.history]
    assert {after / before for before, after in itertools.pairwise(scales)} == {0.5, 1.0, 2.0}
    assert {p.dtype for p in loop.model.parameters()} == {HALF, SINGLE}


def _no_back_off(monkeypatch):
    monkeypatch.setattr(cpu, "update_scale", lambda scale, previous, counters, votes, policy: votes.zero_())


def _overflows_unnoticed(monkeypatch):
    monkeypatch.setattr(reference, "stamp", lambda *args: None)


def _skips_not_obeyed(monkeypatch):
    decide = cpu.decide

    def careless(table, *args, **kwargs):
        decide(table, *args, **kwargs)
        table.decision[0] = 0.0

    monkeypatch.setattr(cpu, "decide", careless)


def _unscaled_twice(monkeypatch):
    monkeypatch.setattr(reference, "inverse", lambda scale: 1.0 if scale is None else 1.0 / float(scale) ** 2)


@pytest.mark.parametrize("sabotage", [_no_back_off, _overflows_unnoticed, _skips_not_obeyed, _unscaled_twice])
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_sabotaged_loop_is_noticed(sabotage, name, monkeypatch):
    loop = Loop(mlp, FUSED[name])
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        loop.run(range(6))


@pytest.mark.parametrize("make_model", [mlp, convnet], ids=["mlp", "convnet"])
def test_the_first_gradients_are_those_of_torch_autocast(make_model):
    """autocast rounds FP32 weights to what our weights are; with no norm layer between, to the same bits."""
    layers = [m for m in make_model() if not isinstance(m, (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm))]
    model = nn.Sequential(*layers)
    twin = copy.deepcopy(model)
    scaler, amp = GradScaler(init_scale=64.0), torch.amp.GradScaler("cpu", init_scale=64.0)
    mpengine.prepare(model, FUSED["sgd"](model.parameters()), scaler)
    loss, theirs = loss_of(model, 0), loss_of(twin, 0)
    assert same_bits(loss, theirs)
    scaler.scale(loss).backward()
    amp.scale(theirs).backward()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(param.grad.float(), other.grad)


@pytest.mark.parametrize("make_model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("name", ["momentum", "adam", "rmsprop", "Adamax"])
def test_a_free_run_follows_torch_amp(make_model, name):
    """Each with its own gradients: the first loss and all scales are equal, and both learn."""
    make = {**FUSED, **GENERAL}[name]
    model, twin = make_model(), make_model()
    scaler, amp = GradScaler(init_scale=2.0**10, growth_interval=5), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    amp.set_growth_interval(5)
    ours, theirs = mpengine.prepare(model, make(model.parameters()), scaler), make(twin.parameters())
    histories = []
    for step in range(20):
        losses = []
        for one, scaling, optimizer in ((model, scaler, ours), (twin, amp, theirs)):
            loss = loss_of(one, step)
            losses.append(loss.item())
            scaling.scale(loss * math.inf if step in (3, 4, 11) else loss).backward()
            scaling.step(optimizer)
            scaling.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == amp.get_scale()
        histories.append(losses)
    assert ours.steps_skipped == 3
    first, last = np.mean(histories[:4], axis=0), np.mean(histories[-4:], axis=0)
    assert (last < 0.9 * first).all()
    assert histories[0][0] == pytest.approx(histories[0][1], rel=2.0**-9)  # a few roundings to fp16 on the way


def accuracy(model, low=HALF):
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", low):
        return float((model(IMAGES[1500:]).argmax(1) == LABELS[1500:]).float().mean())


@pytest.mark.parametrize(
    ("make_model", "make", "low"),
    [
        (mlp, lambda p: torch.optim.AdamW(p, lr=1e-2), HALF),
        (mlp, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), HALF),
        (mlp, lambda p: torch.optim.RAdam(p, lr=1e-2), HALF),
        (mlp, lambda p: torch.optim.Adam(p, lr=1e-2), BRAIN),
        (channels_last, lambda p: torch.optim.Adam(p, lr=1e-2), HALF),
    ],
    ids=["mlp-adamw", "mlp-sgd", "mlp-radam", "mlp-adam-bf16", "convnet-adam"],
)
def test_it_learns_handwritten_digits(make_model, make, low):
    """200 batches of 32 of the 1,500 training digits; an untrained model gets one in ten of the others right."""
    model = make_model()
    scaler = GradScaler(init_scale=2.0**16, growth_interval=50) if low is HALF else None
    optimizer = mpengine.prepare(model, make(model.parameters()), scaler, low, max_grad_norm=5.0)
    losses = []
    for step in range(200):
        with torch.autocast("cpu", low):
            loss = loss_of(model, step, 32)
        (loss if scaler is None else scaler.scale(loss)).backward()
        optimizer.step()
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.3 * np.mean(losses[:5])
    assert accuracy(model, low) > 0.85
    assert optimizer.steps_taken > 150


def test_small_updates_add_up_in_the_masters():
    """What masters are for: 1000 updates, each below half of an fp16 ULP, move the weight as they do in FP32."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=2.0**-14))
    for _ in range(1024):
        model.weight.grad = torch.ones(1, 1, dtype=HALF)
        optimizer.step()
    assert model.weight.item() == 1.0 - 2.0**-4
    naive = torch.ones((), dtype=HALF)
    for _ in range(1024):
        naive = naive - 2.0**-14
    assert naive == 1.0


def test_accumulation_over_micro_batches():
    """Two backward passes before a step add up in `.grad`, as in torch."""
    runs = []
    for parts in (1, 2):
        model = nn.Linear(4, 2)
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(0.5)
        scaler = GradScaler(init_scale=8.0)
        optimizer = mpengine.prepare(model, FUSED["momentum"](model.parameters()), scaler)
        for step in range(3):
            x = torch.arange(16.0).reshape(4, 4).roll(step).half()
            for part in x.chunk(parts):
                scaler.scale(model(part).float().sum()).backward()
            optimizer.step()
            scaler.update()
            optimizer.zero_grad()
        runs.append(snapshot(optimizer))
    assert runs[0] == runs[1]
    assert {p.dtype for p in model.parameters()} == {HALF}
    assert SINGLE in {m.dtype for m in optimizer.master_params()}
