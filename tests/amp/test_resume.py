"""A checkpoint in mid-run, saved as apex asks for it: the resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import nn

from mpengine import amp
from tests.harness import frozen

LEVELS = ("O0", "O1", "O2", "O3")
ORDERS = list(itertools.permutations(("model", "optimizer", "amp")))
MAKE = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),  # not fused
}
BEFORE, AFTER = 4, 4  # iterations on either side of the checkpoint
# (optimizers, scalers): which nets each loss reaches, and which optimizers it lists.
LOSSES = {
    1: [((0,), (0,)), ((0,), (0,))],
    2: [((0,), (0,)), ((0, 1), (0, 1)), ((0, 1), (1,))],
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6), nn.LayerNorm(6))


class Training:
    """A script: models, optimizers, and everything that a checkpoint holds."""

    def __init__(self, level, kind, optimizers, shared=False, seed=0):
        torch.manual_seed(seed)
        self.losses, self.shared = LOSSES[optimizers], shared
        models = [network() for _ in range(optimizers)]
        self.models, self.optimizers = amp.initialize(
            models,
            [MAKE[kind](model.parameters()) for model in models],
            opt_level=level,
            num_losses=1 if shared else len(self.losses),
            verbosity=0,
        )

    def iterate(self, numbers):
        """Loss 0 overflows in iterations 1 and 5: before the checkpoint and after it."""
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            x, y = torch.randn(8, 5, generator=generator), torch.randn(8, 6, generator=generator)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            for k, (reach, listed) in enumerate(self.losses):
                outputs = sum(self.models[o](x) for o in reach)
                loss = (outputs.float() - y * (k + 1)).square().mean() / 64  # no other overflow than this:
                loss = loss * float("inf") if k == 0 and number in (1, 5) else loss
                with amp.scale_loss(
                    loss, [self.optimizers[o] for o in listed], loss_id=0 if self.shared else k
                ) as scaled:
                    scaled.backward()
            for optimizer in self.optimizers:
                optimizer.step()

    def checkpoint(self):
        return {
            "model": [model.state_dict() for model in self.models],
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "amp": amp.state_dict(),
        }

    def load(self, checkpoint, order):
        for name in order:
            if name == "amp":
                amp.load_state_dict(checkpoint["amp"])
                continue
            objects = self.models if name == "model" else self.optimizers
            for each, state in zip(objects, checkpoint[name], strict=True):
                each.load_state_dict(state)

    def everything(self):
        """The bits of all that training depends on."""
        weights = [[*model.parameters(), *model.buffers()] for model in self.models]
        masters = [list(amp.master_params(optimizer)) for optimizer in self.optimizers]
        return frozen({**self.checkpoint(), "weights": weights, "masters": masters})


def through_a_file(checkpoint):
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted():
    """The end of each run that was not interrupted, and its checkpoint in the middle; made once."""
    known = {}

    def run(*config):
        if config not in known:
            training = Training(*config)
            training.iterate(range(BEFORE))
            checkpoint = through_a_file(training.checkpoint())
            training.iterate(range(BEFORE, BEFORE + AFTER))
            known[config] = checkpoint, training.everything()
        return known[config]

    return run


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("level", LEVELS)
def test_a_resumed_run_is_the_uninterrupted_one(uninterrupted, level, kind, optimizers, order):
    checkpoint, end = uninterrupted(level, kind, optimizers)
    training = Training(level, kind, optimizers, seed=1)
    training.load(checkpoint, order)
    training.iterate(range(BEFORE, BEFORE + AFTER))
    assert training.everything() == end


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_loaded_is_what_was_saved(uninterrupted, level):
    checkpoint, _ = uninterrupted(level, "adam", 2)
    training = Training(level, "adam", 2, seed=1)
    training.load(checkpoint, ORDERS[0])
    assert frozen(through_a_file(training.checkpoint())) == frozen(checkpoint)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("level", LEVELS)
def test_a_rollback_into_objects_that_have_trained(uninterrupted, level, order):
    """Masters, state and scales of the run so far leave no trace."""
    checkpoint, end = uninterrupted(level, "momentum", 1)
    training = Training(level, "momentum", 1, seed=2)
    training.iterate(range(20, 23))
    training.optimizers[0].zero_grad()  # apex: stale masters then overwrote what was loaded
    training.load(checkpoint, order)
    training.iterate(range(BEFORE, BEFORE + AFTER))
    assert training.everything() == end


@pytest.mark.parametrize("level", LEVELS)
def test_one_scaler_for_all_losses(uninterrupted, level):
    checkpoint, end = uninterrupted(level, "adam", 2, True)
    training = Training(level, "adam", 2, True, seed=1)
    training.load(checkpoint, ORDERS[3])
    training.iterate(range(BEFORE, BEFORE + AFTER))
    assert training.everything() == end


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_the_scales_are_part_of_the_run(uninterrupted, level):
    checkpoint, end = uninterrupted(level, "adam", 2)
    assert checkpoint["amp"] == {
        "loss_scaler0": {"loss_scale": 2.0**15, "unskipped": BEFORE - 2},
        "loss_scaler1": {"loss_scale": 2.0**16, "unskipped": BEFORE},
        "loss_scaler2": {"loss_scale": 2.0**16, "unskipped": BEFORE},
    }
    assert end["amp"]["loss_scaler0"] == {"loss_scale": 2.0**14, "unskipped": AFTER - 2}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("forgotten", ["model", "optimizer", "amp"])
def test_a_part_that_was_not_loaded_is_noticed(uninterrupted, level, forgotten):
    """These comparisons can fail."""
    checkpoint, end = uninterrupted(level, "adam", 1)
    training = Training(level, "adam", 1, seed=1)
    training.load(checkpoint, [name for name in ORDERS[0] if name != forgotten])
    training.iterate(range(BEFORE, BEFORE + AFTER))
    assert training.everything() != end


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_masters_are_more_than_the_weights_that_the_model_runs_on(uninterrupted, level):
    """Half of what a checkpoint is for would be lost with the weights rounded to fp16: it is noticed."""
    checkpoint, end = uninterrupted(level, "momentum", 1)
    checkpoint = through_a_file(checkpoint)
    rounded = [
        {k: v.half().float() if v.is_floating_point() else v for k, v in state.items()} for state in checkpoint["model"]
    ]
    training = Training(level, "momentum", 1, seed=1)
    training.load({**checkpoint, "model": rounded}, ("optimizer", "model", "amp"))
    training.iterate(range(BEFORE, BEFORE + AFTER))
    assert training.everything() != end
