"""Manual optimization in Lightning: several losses and optimizers, clipping, closures, Lightning's wrapper."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import mpengine
from mpengine.integrations.lightning import MixedPrecision
from tests.harness import frozen
from tests.integrations import world
from tests.integrations.lightning_world import GRADIENT, WARNINGS, KnownModule, Seen, fit, scaler_of, ways
from tests.integrations.world import adamw, batches

pytestmark = WARNINGS


class Gan(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.nets = world.Gan()

    def configure_optimizers(self):
        return adamw(self.nets.generator), adamw(self.nets.critic)

    def training_step(self, batch, batch_idx):
        opt_g, opt_c = self.optimizers()
        x, _, factor = batch
        fake = self.nets.generator(x[:, :4])
        opt_c.zero_grad()
        self.manual_backward(nn.functional.softplus(-self.nets.critic(x)).mean(), loss_id=0)
        self.manual_backward(nn.functional.softplus(self.nets.critic(fake.detach())).mean() * factor, loss_id=1)
        opt_c.step()
        opt_g.zero_grad()
        self.manual_backward(nn.functional.softplus(-self.nets.critic(fake)).mean(), loss_id=2)
        opt_g.step()


def plain_gan(data):
    """The same without Lightning."""
    nets, scaler = world.Gan(), scaler_of(num_losses=3)
    opt_g = mpengine.prepare(nets, adamw(nets.generator), scaler)
    opt_c = mpengine.prepare(nets, adamw(nets.critic), scaler)
    for x, _, factor in data:
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            fake = nets.generator(x[:, :4])
            real_loss = nn.functional.softplus(-nets.critic(x)).mean()
            fake_loss = nn.functional.softplus(nets.critic(fake.detach())).mean() * factor
        opt_c.zero_grad()
        scaler.scale(real_loss, 0).backward()
        scaler.scale(fake_loss, 1).backward()
        scaler.step(opt_c)
        scaler.update()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            loss = nn.functional.softplus(-nets.critic(fake)).mean()
        opt_g.zero_grad()
        scaler.scale(loss, 2).backward()
        scaler.step(opt_g)
        scaler.update()
    return opt_g, opt_c, scaler


def test_two_optimizers_and_three_losses_with_a_scale_each():
    """Bit for bit the plain loop; the overflows of loss 1 skip the critic's steps and back off scale 1 alone."""
    data = batches(6, overflow=(1, 3))
    trainer = fit(Gan(), MixedPrecision(scaler_of(num_losses=3)), data)
    opt_g, opt_c, scaler = plain_gan(data)
    ours = trainer.precision_plugin.scaler
    assert frozen([o.state_dict() for o in trainer.optimizers]) == frozen([opt_g.state_dict(), opt_c.state_dict()])
    assert ours.state_dict() == scaler.state_dict()
    assert [s.overflows for s in ours.statistics()] == [0, 2, 0]
    assert [s.scale for s in ours.statistics()] == [4096.0, 256.0, 4096.0]
    assert [(o.steps_taken, o.steps_skipped) for o in trainer.optimizers] == [(6, 0), (4, 2)]


def test_a_wrong_loss_id_would_be_seen():
    """With every loss scaled as loss 0, the overflow backs off the scale of the others as well."""

    class Confused(Gan):
        def manual_backward(self, loss, loss_id):
            super().manual_backward(loss, loss_id=0)

    trainer = fit(Confused(), MixedPrecision(scaler_of(num_losses=3)), batches(6, overflow=(1, 3)))
    assert [s.overflows for s in trainer.precision_plugin.scaler.statistics()] == [2, 0, 0]


class ManualKnown(KnownModule):
    def __init__(self, use):
        super().__init__()
        self.automatic_optimization, self.use = False, use

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.use(self, optimizer, batch)


def clipped_by_value(self, optimizer, batch):
    self.manual_backward(self.net(batch))
    self.clip_gradients(optimizer, gradient_clip_val=3.5, gradient_clip_algorithm="value")
    self.clip_gradients(optimizer, gradient_clip_val=2.0, gradient_clip_algorithm="value")
    optimizer.step()


def by_closure(self, optimizer, batch):
    def closure():
        self.manual_backward(self.net(batch))
        return "the closure's result"

    self.result = optimizer.step(closure)


def test_manual_clipping():
    """Twice, and the second time what is unscaled already is not unscaled again."""
    seen = Seen()
    fit(ManualKnown(clipped_by_value), MixedPrecision(scaler_of()), [GRADIENT], [seen])
    assert seen.weights[0][0].tolist() == [0.0, 3.0]


def test_manual_clipping_by_norm_is_for_one_step():
    def use(self, optimizer, batch):
        self.manual_backward(self.net(batch))
        if self.global_step == 0:
            self.clip_gradients(optimizer, gradient_clip_val=2.5, gradient_clip_algorithm="norm")
        optimizer.step()

    seen = Seen()
    fit(ManualKnown(use), MixedPrecision(scaler_of()), [GRADIENT, GRADIENT], [seen])
    for weight, expected in zip(seen.weights, ([0.25, 3.0], [-1.25, 5.0]), strict=True):
        torch.testing.assert_close(weight[0], torch.tensor(expected), rtol=2.0**-20, atol=0.0)


def test_clipping_before_and_after_another_backward_pass_is_refused():
    """What came before is unscaled, what came after is not: no one number can clip both."""

    def use(self, optimizer, batch):
        for _ in range(2):
            self.manual_backward(self.net(batch))
            self.clip_gradients(optimizer, gradient_clip_val=2.0, gradient_clip_algorithm="value")

    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        fit(ManualKnown(use), MixedPrecision(scaler_of()), [GRADIENT])


def test_a_closure_is_run_before_the_step_and_its_result_returned():
    seen, module = Seen(), ManualKnown(by_closure)
    fit(module, MixedPrecision(scaler_of()), [GRADIENT], [seen])
    assert seen.weights[0][0].tolist() == [1.0 - 1.5, 2.0 + 2.0]
    assert module.result == "the closure's result"


def test_lightnings_wrapper_tells_what_happened():
    def use(self, optimizer, batch):
        self.manual_backward(self.net(batch) * (float("inf") if self.global_step else 1.0))
        optimizer.step()
        self.told = (optimizer.steps_taken, optimizer.steps_skipped, optimizer.last_step_skipped)

    module = ManualKnown(use)
    fit(module, MixedPrecision(scaler_of()), [GRADIENT] * 3)
    assert module.told == (1, 2, True)


def test_what_is_set_on_lightnings_wrapper_holds():
    def use(self, optimizer, batch):
        self.manual_backward(self.net(batch))
        optimizer.max_grad_norm = 2.5
        optimizer.step()

    seen = Seen()
    trainer = fit(ManualKnown(use), MixedPrecision(scaler_of()), [GRADIENT], [seen])
    assert trainer.optimizers[0].max_grad_norm == 2.5
    torch.testing.assert_close(seen.weights[0][0], torch.tensor([0.25, 3.0]), rtol=2.0**-20, atol=0.0)


@ways
def test_the_scaler_knows_lightnings_wrapper(plugin, prepares):
    """Unscaled by hand, and the infinite gradient of the second batch clipped away: that step is skipped still."""

    def use(self, optimizer, batch):
        self.manual_backward(self.net(batch))
        self.trainer.precision_plugin.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_value_(self.net.parameters(), 2.0)
        optimizer.optimizer.step()
        self.trainer.precision_plugin.scaler.update()

    seen = Seen()
    module = ManualKnown(use)
    module.prepares = prepares
    trainer = fit(module, plugin(scaler_of()), [GRADIENT, GRADIENT * float("inf"), GRADIENT], [seen])
    assert [w[0].tolist() for w in seen.weights] == [[0.0, 3.0], [0.0, 3.0], [-1.0, 4.0]]
    assert trainer.optimizers[0].steps_skipped == 1
