"""What the tests of Lightning's Trainer share: modules, a callback that notes what happened, and `fit`."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision as LightningsPlugin

import mpengine
from mpengine.integrations.lightning import MixedPrecision
from tests.harness import network
from tests.integrations.world import INIT_SCALE, Known, adamw, loader, loss_of, sgd, two_layers

WARNINGS = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),  # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice on loaders, for tensors in memory
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),  # a test does so
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # devices found, and tips


def scaler_of(kind=mpengine.GradScaler, **kwargs):
    return kind("cpu", init_scale=INIT_SCALE, growth_interval=3, **kwargs)


class Regression(pl.LightningModule):
    """`prepares` makes it wrap its optimizer itself, with the plugin's scaler."""

    def __init__(self, prepares=False, schedule=None, make=adamw):
        super().__init__()
        self.net = two_layers() if make is sgd else network()
        self.prepares, self.schedule, self.make = prepares, schedule, make

    def training_step(self, batch, batch_idx):
        return loss_of(self.net, batch)

    def configure_optimizers(self):
        optimizer = self.make(self)
        if self.prepares:
            optimizer = mpengine.prepare(self, optimizer, self.trainer.precision_plugin.scaler)
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


class Seen(pl.Callback):
    """What happened at each batch."""

    def __init__(self):
        self.scales, self.losses, self.dtypes, self.weights, self.grads, self.lrs = [], [], [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.losses.append(outputs["loss"].item() if outputs else None)
        optimizer = trainer.optimizers[0]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        self.dtypes.append(params[0].dtype)
        masters = list(optimizer.master_params()) if hasattr(optimizer, "master_params") else params
        self.weights.append([p.detach().clone() for p in masters])
        self.grads.append(params[0].grad)
        self.lrs.append(optimizer.param_groups[0]["lr"])


def fit(module, plugin, data, callbacks=(), ckpt_path=None, epochs=1, **kwargs):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        plugins=[plugin],
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )
    trainer.fit(module, loader(data), ckpt_path=ckpt_path)
    return trainer


def lightnings(scaler):
    return LightningsPlugin("16-mixed", "cpu", scaler)


WAYS = {"plugin": (MixedPrecision, False), "plain": (lightnings, True)}
ways = pytest.mark.parametrize(("plugin", "prepares"), WAYS.values(), ids=WAYS)


class KnownModule(pl.LightningModule):
    def __init__(self, prepares=False):
        super().__init__()
        self.net, self.prepares = Known(), prepares

    def training_step(self, batch, batch_idx):
        return self.net(batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return mpengine.prepare(self, optimizer, self.trainer.precision_plugin.scaler) if self.prepares else optimizer


GRADIENT = torch.tensor([3.0, -4.0])
