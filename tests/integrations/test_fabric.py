"""Lightning Fabric: the same loop as without it, bit for bit; with Fabric's plugin around our scaler, and with ours."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision as FabricsPlugin
from torch import nn

import mpengine
from mpengine.integrations.lightning import FabricMixedPrecision
from tests.harness import frozen, same_bits
from tests.integrations import world
from tests.integrations.world import INIT_SCALE, Known, adamw, batches, loss_of, sgd, two_layers

logging.getLogger("lightning.fabric").setLevel(logging.ERROR)


def scaler_of(kind=mpengine.GradScaler, **kwargs):
    return kind("cpu", init_scale=INIT_SCALE, growth_interval=3, **kwargs)


PLUGINS = {
    "ours": lambda scaler: FabricMixedPrecision(scaler, device="cpu"),
    "fabrics": lambda scaler: FabricsPlugin("16-mixed", "cpu", scaler),
}
plugins = pytest.mark.parametrize("plugin", PLUGINS.values(), ids=PLUGINS)


def launched(plugin):
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    fabric.launch()
    return fabric


def ready(plugin, model, make):
    """Fabric, the model and its optimizer, prepared where the plugin's scaler is ours."""
    fabric = launched(plugin)
    model = fabric.setup_module(model)
    optimizer = make(model)
    if isinstance(plugin.scaler, mpengine.GradScaler):
        optimizer = mpengine.prepare(model, optimizer, plugin.scaler)
    return fabric, model, fabric.setup_optimizers(optimizer)


def train(fabric, model, optimizer, data, **clipping):
    weights, scales = [], []
    for batch in data:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        fabric.backward(loss)
        if clipping:
            fabric.clip_gradients(model, optimizer, error_if_nonfinite=False, **clipping)
        optimizer.step()
        own = optimizer.master_params() if hasattr(optimizer, "master_params") else model.parameters()
        weights.append([p.detach().clone() for p in own])
        scales.append(fabric.strategy.precision.scaler.get_scale())
    return weights, scales


CLIPPING = {"free": {}, "value": {"clip_val": 0.0625}, "norm": {"max_norm": 0.25}}


@plugins
@pytest.mark.parametrize("clipping", CLIPPING.values(), ids=CLIPPING)
def test_it_trains_as_fabric_with_torchs_scaler_does(plugin, clipping):
    """Scales and weights, bit for bit; two of eight batches overflow."""
    data = batches(8, overflow=(2, 5))
    ours = train(*ready(plugin(scaler_of()), two_layers(), sgd), data, **clipping)
    theirs = train(
        *ready(FabricsPlugin("16-mixed", "cpu", scaler_of(torch.amp.GradScaler)), two_layers(), sgd), data, **clipping
    )
    assert ours[1] == theirs[1] == [1024.0, 1024.0, 512.0, 512.0, 512.0, 256.0, 256.0, 256.0]
    assert same_bits(ours[0], theirs[0])
    if clipping:
        free = train(*ready(plugin(scaler_of()), two_layers(), sgd), data)
        assert not same_bits(ours[0], free[0])


@plugins
def test_clipping_gives_the_known_norm_and_weights(plugin):
    """Gradient (3, -4) of norm 5; clipped to (2, -2) afterwards: the weight (1, 2) becomes (0, 3) at lr 0.5."""
    fabric, model, optimizer = ready(plugin(scaler_of()), Known(), lambda m: torch.optim.SGD(m.parameters(), lr=0.5))
    x = torch.tensor([3.0, -4.0])
    fabric.backward(model(x))
    assert model.weight.grad.tolist() == [3.0 * INIT_SCALE, -4.0 * INIT_SCALE]
    assert fabric.clip_gradients(model, optimizer, max_norm=100.0).item() == 5.0
    assert model.weight.grad.tolist() == [3.0, -4.0]
    torch.nn.utils.clip_grad_value_(model.parameters(), 2.0)
    optimizer.step()
    assert next(optimizer.master_params()).tolist() == [0.0, 3.0]
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (1, 0)


def test_two_optimizers_and_three_losses_with_a_scale_each():
    nets, scaler = world.Gan(), scaler_of(num_losses=3)
    fabric = launched(FabricMixedPrecision(scaler, device="cpu"))
    generator, critic = fabric.setup_module(nets.generator), fabric.setup_module(nets.critic)
    opt_g, opt_c = fabric.setup_optimizers(
        mpengine.prepare(generator, adamw(generator), scaler), mpengine.prepare(critic, adamw(critic), scaler)
    )
    for x, _, factor in batches(6, overflow=(1, 3)):
        fake = generator(x[:, :4])
        opt_c.zero_grad()
        fabric.backward(nn.functional.softplus(-critic(x)).mean(), loss_id=0)
        fabric.backward(nn.functional.softplus(critic(fake.detach())).mean() * factor, loss_id=1)
        opt_c.step()
        opt_g.zero_grad()
        fabric.backward(nn.functional.softplus(-critic(fake)).mean(), loss_id=2)
        opt_g.step()
    assert [s.overflows for s in scaler.statistics()] == [0, 2, 0]
    assert [s.scale for s in scaler.statistics()] == [4096.0, 256.0, 4096.0]
    assert [(o.steps_taken, o.steps_skipped) for o in (opt_g, opt_c)] == [(6, 0), (4, 2)]


@plugins
def test_save_and_load_resume_bitwise(plugin, tmp_path):
    data = batches(6, overflow=(1,))
    fabric, model, optimizer = ready(plugin(scaler_of()), two_layers(), adamw)
    train(fabric, model, optimizer, data[:3])
    scaler = fabric.strategy.precision.scaler
    fabric.save(tmp_path / "half", {"model": model, "optimizer": optimizer, "scaler": scaler.state_dict()})
    unbroken = train(fabric, model, optimizer, data[3:])

    fabric, model, optimizer = ready(plugin(scaler_of()), world.two_layers(), adamw)
    rest = fabric.load(tmp_path / "half", {"model": model, "optimizer": optimizer})
    fabric.strategy.precision.scaler.load_state_dict(rest["scaler"])
    resumed = train(fabric, model, optimizer, data[3:])
    assert resumed[1] == unbroken[1]
    assert same_bits(resumed[0], unbroken[0])
    assert frozen(optimizer.state_dict()["mpengine"]) == {
        "optimizer": "AdamW",
        "steps_taken": 5,
        "steps_skipped": 1,
    }


def test_misuse_is_refused():
    with pytest.raises(TypeError, match=r"scaler is a torch\.amp"):
        FabricMixedPrecision(torch.amp.GradScaler("cpu"))
    plugin = FabricMixedPrecision(precision="bf16-mixed", device="cpu")
    with pytest.raises(ValueError, match="loss_id is 2, but bf16-mixed has no scaler"):
        plugin.backward(torch.ones(()), None, loss_id=2)
