"""No call of the loop reads the device: shown without a GPU, as in tests/graphs; and with one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from mpengine import amp, plain
from mpengine.amp.scaler import LossScaler
from tests.amp.world import DYNAMIC, LEVELS
from tests.graphs.test_no_waiting import HostRead, only_launched, watched


def loop(level, device="cpu", **kwargs):
    """Two losses and two optimizers, accumulation, clipping, a delay, an exception: one iteration of each is a call."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)).to(device) for _ in range(2)]
    makers = (torch.optim.Adam(models[0].parameters()), torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9))
    models, optimizers = amp.initialize(models, list(makers), opt_level=level, num_losses=2, **{**DYNAMIC, **kwargs})
    optimizers[0].loss_scaler._watchdog.limit = None  # on a CPU it reads at once
    x = torch.randn(5, 6, device=device)

    def broken():
        with amp.scale_loss(models[0](x).square().mean(), optimizers[0]) as scaled:
            scaled.backward()
            raise ZeroDivisionError

    def iteration():
        for k in (0, 1, 1):
            loss = models[0](x).square().mean() + models[1](x).square().mean() * (k + 1)
            with amp.scale_loss(loss, optimizers, loss_id=k) as scaled:
                scaled.backward()
        for model in models:
            model.zero_grad()  # a dropped batch
        for k in (0, 1):
            with amp.scale_loss(models[k](x).square().mean(), optimizers[k], k, delay_unscale=True) as scaled:
                scaled.backward()
            with amp.scale_loss(models[k](x).square().mean(), optimizers[k], loss_id=k) as scaled:
                scaled.backward()
        with contextlib.suppress(ZeroDivisionError):
            broken()
        torch.nn.utils.clip_grad_norm_(amp.master_params(optimizers[0]), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return iteration, optimizers


@pytest.mark.parametrize("level", LEVELS)
def test_an_iteration_reads_nothing(level, monkeypatch):
    monkeypatch.setattr(plain, "_may_overflow", lambda labelled: True)  # a CPU looks at the scale, a GPU cannot
    iteration, _ = loop(level)
    for _ in range(2):
        iteration()
    with only_launched() as launched, watched():
        for _ in range(3):
            iteration()
    assert launched.count("decide") == 6
    assert launched.count("update_scale") == 15


def test_sabotage_is_noticed(monkeypatch):
    iteration, _ = loop("O2")
    iteration()
    real = LossScaler.check_

    def reads(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.statistics()

    monkeypatch.setattr(LossScaler, "check_", reads)
    with pytest.raises(HostRead), only_launched(), watched():
        iteration()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("level", LEVELS)
def test_an_iteration_never_waits_for_the_device(level):
    iteration, optimizers = loop(level, "cuda", verbosity=0)
    for _ in range(2):
        iteration()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            iteration()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [optimizer.steps_taken for optimizer in optimizers] == [5, 5]
