"""Lightning's Trainer: with our plugin, and with Lightning's own plugin around our scaler and optimizer."""

from __future__ import annotations

import os

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import mpengine
from mpengine.integrations.lightning import MixedPrecision
from tests.harness import frozen, same_bits
from tests.integrations.lightning_world import (
    GRADIENT,
    WARNINGS,
    KnownModule,
    Regression,
    Seen,
    fit,
    lightnings,
    scaler_of,
    ways,
)
from tests.integrations.world import INIT_SCALE, adamw, batches, loader, sgd

pytestmark = WARNINGS


# Automatic optimization.


CLIPPING = {
    "free": {},
    "value": {"gradient_clip_val": 0.0625, "gradient_clip_algorithm": "value"},
    "norm": {"gradient_clip_val": 0.25},
}


@ways
@pytest.mark.parametrize("clipping", CLIPPING.values(), ids=CLIPPING)
def test_it_trains_as_lightning_with_torchs_scaler_does(plugin, prepares, clipping):
    """Scales, losses and weights, bit for bit; two of eight batches overflow. Clipping is not without effect."""
    data = batches(8, overflow=(2, 5))
    ours, theirs, unclipped = Seen(), Seen(), Seen()
    fit(Regression(prepares, make=sgd), plugin(scaler_of()), data, [ours], **clipping)
    fit(Regression(make=sgd), lightnings(scaler_of(torch.amp.GradScaler)), data, [theirs], **clipping)
    fit(Regression(make=sgd), lightnings(scaler_of(torch.amp.GradScaler)), data, [unclipped])
    assert ours.scales == theirs.scales == [1024.0, 1024.0, 512.0, 512.0, 512.0, 256.0, 256.0, 256.0]
    assert set(ours.dtypes) == {torch.float16}
    if clipping == CLIPPING["norm"] and plugin is MixedPrecision:
        # Clipped within the step: the norm is summed in another order, so the coefficient may differ by an ULP, which
        # is 2 ULP of the update, at most 0.25 / 16 in size, and one of the weight, which is below 1.
        for ours_w, theirs_w in zip(ours.weights[0], theirs.weights[0], strict=True):
            torch.testing.assert_close(ours_w, theirs_w, rtol=0.0, atol=2.0**-24 + 2.0**-22 / 64)
    else:
        assert ours.losses == theirs.losses
        assert same_bits(ours.weights, theirs.weights)
    for ours_w, unclipped_w in zip(ours.weights[0], unclipped.weights[0], strict=True):
        assert (clipping == {}) == torch.allclose(ours_w, unclipped_w, rtol=2.0**-10, atol=0.0)


@ways
def test_a_skip_changes_nothing_and_is_counted(plugin, prepares):
    seen = Seen()
    trainer = fit(Regression(prepares), plugin(scaler_of()), batches(4, overflow=(1, 2)), [seen])
    assert same_bits(seen.weights[0], seen.weights[1])
    assert same_bits(seen.weights[1], seen.weights[2])
    assert not same_bits(seen.weights[2], seen.weights[3])
    (optimizer,) = trainer.optimizers
    assert (optimizer.steps_taken, optimizer.steps_skipped, optimizer.last_step_skipped) == (2, 2, False)


@ways
def test_clipping_by_value_gives_the_known_weights(plugin, prepares):
    """Gradient (3, -4) clipped to (2, -2): the weight (1, 2) becomes (0, 3) at lr 0.5, exactly."""
    seen = Seen()
    fit(
        KnownModule(prepares),
        plugin(scaler_of()),
        [GRADIENT],
        [seen],
        gradient_clip_val=2.0,
        gradient_clip_algorithm="value",
    )
    assert seen.weights[0][0].tolist() == [0.0, 3.0]


@ways
@pytest.mark.parametrize(("norm", "factor"), [(2.5, 0.5), (100.0, 1.0)])
def test_clipping_by_norm_gives_the_known_weights(plugin, prepares, norm, factor):
    """The gradient's norm is 5. The coefficient is norm / (5 + 1e-6), rounded once or twice: rtol 2 ULP."""
    seen = Seen()
    fit(KnownModule(prepares), plugin(scaler_of()), [GRADIENT], [seen], gradient_clip_val=norm)
    coefficient = min(1.0, norm / (5.0 + 1e-6))
    expected = torch.tensor([1.0, 2.0], dtype=torch.float64) - 0.5 * coefficient * GRADIENT.double()
    torch.testing.assert_close(seen.weights[0][0].double(), expected, rtol=2.0**-22, atol=0.0)
    assert abs(coefficient - factor) < 1e-6


def test_the_plugin_clips_by_norm_inside_the_step_and_restores_the_optimizers_own_norm():
    seen = Seen()
    trainer = fit(
        KnownModule(), MixedPrecision(scaler_of(), max_grad_norm=50.0), [GRADIENT], [seen], gradient_clip_val=2.5
    )
    assert seen.grads[0].dtype == torch.float16  # never unscaled in memory
    assert seen.grads[0].tolist() == [3.0 * INIT_SCALE, -4.0 * INIT_SCALE]
    assert trainer.optimizers[0].max_grad_norm == 50.0
    assert trainer.optimizers[0].last_grad_norm == 5.0
    torch.testing.assert_close(seen.weights[0][0], torch.tensor([0.25, 3.0]), rtol=2.0**-20, atol=0.0)


class Hook(pl.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen = [p.grad.clone() for p in pl_module.parameters()]


@ways
def test_hooks_see_unscaled_gradients(plugin, prepares):
    hook, seen = Hook(), Seen()
    fit(KnownModule(prepares), plugin(scaler_of()), [GRADIENT], [hook, seen], gradient_clip_val=2.5)
    assert hook.seen[0].dtype == torch.float32
    assert hook.seen[0].tolist() == [3.0, -4.0]
    torch.testing.assert_close(seen.weights[0][0], torch.tensor([0.25, 3.0]), rtol=2.0**-20, atol=0.0)


def test_a_module_may_clip_in_its_own_way():
    class Halving(KnownModule):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            for param in self.parameters():
                param.grad.mul_(0.5)

    seen = Seen()
    fit(Halving(), MixedPrecision(scaler_of()), [GRADIENT], [seen])
    assert seen.weights[0][0].tolist() == [1.0 - 0.5 * 1.5, 2.0 + 0.5 * 2.0]


@ways
def test_a_batch_without_a_loss_is_no_step(plugin, prepares):
    class Sometimes(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    seen = Seen()
    trainer = fit(Sometimes(prepares), plugin(scaler_of()), batches(3), [seen])
    assert trainer.optimizers[0].steps_taken == 2
    assert same_bits(seen.weights[0], seen.weights[1])


def test_accumulated_batches_are_one_step():
    data = batches(4)
    seen, whole = Seen(), Seen()
    trainer = fit(Regression(make=sgd), MixedPrecision(scaler_of()), data, [seen], accumulate_grad_batches=2)
    fit(Regression(make=sgd), lightnings(scaler_of(torch.amp.GradScaler)), data, [whole], accumulate_grad_batches=2)
    assert trainer.optimizers[0].steps_taken == 2
    assert seen.scales == whole.scales
    # The sum of two gradients is rounded to fp16, 2^-11 of it; gradients are below 4 here, and lr is 1/16.
    for ours, theirs in zip(seen.weights[1], whole.weights[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=4 * 2.0**-11 / 16)


def test_bf16_has_masters_and_no_scaler():
    class Dtypes(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.dtype, self.optimizer = pl_module.net[0].weight.dtype, trainer.optimizers[0]

    seen = Dtypes()
    fit(Regression(), MixedPrecision(precision="bf16-mixed"), batches(2), [seen], gradient_clip_val=1.0)
    assert seen.dtype == torch.bfloat16
    assert seen.optimizer.steps_taken == 2


# Schedules.


def test_a_scheduler_steps_as_with_torch_and_can_wait_for_skipped_steps():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)

    class Waiting(Regression):
        def lr_scheduler_step(self, scheduler, metric):
            if not self.trainer.optimizers[0].last_step_skipped:
                scheduler.step()

    data = batches(4, overflow=(1,))
    ours, waiting, theirs = Seen(), Seen(), Seen()
    fit(Regression(schedule=schedule), MixedPrecision(scaler_of()), data, [ours])
    fit(Waiting(schedule=schedule), MixedPrecision(scaler_of()), data, [waiting])
    fit(Regression(schedule=schedule), lightnings(scaler_of(torch.amp.GradScaler)), data, [theirs])
    assert ours.lrs == theirs.lrs == [0.005, 0.0025, 0.00125, 0.000625]  # after the batch's step
    assert waiting.lrs == [0.005, 0.005, 0.0025, 0.00125]


# Checkpoints.


def state_of(trainer):
    """Masters, moments, counts and the scaler, bit for bit."""
    optimizer = trainer.optimizers[0]
    return frozen([optimizer.state_dict(), trainer.precision_plugin.scaler.state_dict()])


class Save(pl.Callback):
    """Writes a checkpoint while the weights still are fp16."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        assert pl_module.net[0].weight.dtype == torch.float16
        trainer.save_checkpoint(self.path)


@ways
@pytest.mark.parametrize("when", ["within", "after"])
def test_resuming_is_bitwise_equal_to_never_having_stopped(plugin, prepares, when, tmp_path):
    """The checkpoint is written within `fit`, or after it, when the plugin has given the module its FP32 weights."""
    data, path = batches(5, overflow=(1,)), tmp_path / "half.ckpt"
    unbroken = fit(Regression(prepares), plugin(scaler_of()), data, epochs=2)
    first = fit(Regression(prepares), plugin(scaler_of()), data, [Save(path)] if when == "within" else [])
    if when == "after":
        first.save_checkpoint(path)
    second = fit(Regression(prepares), plugin(scaler_of()), data, epochs=2, ckpt_path=path)
    assert state_of(second) == state_of(unbroken)
    assert state_of(second) != state_of(first)
    assert second.optimizers[0].steps_taken == 8
    fresh = fit(Regression(prepares), plugin(scaler_of()), data, epochs=1)
    assert state_of(fresh) == state_of(first)  # the run itself is reproducible, or none of this would say much


def test_a_checkpoint_of_torchs_scaler_goes_on_in_ours(tmp_path):
    data = batches(5, overflow=(1,))
    theirs = Seen()
    fit(Regression(make=sgd), lightnings(scaler_of(torch.amp.GradScaler)), data, [theirs], epochs=2)
    half = fit(Regression(make=sgd), lightnings(scaler_of(torch.amp.GradScaler)), data)
    half.save_checkpoint(tmp_path / "torch.ckpt")
    ours = Seen()
    fit(Regression(make=sgd), MixedPrecision(scaler_of()), data, [ours], epochs=2, ckpt_path=tmp_path / "torch.ckpt")
    assert ours.scales == theirs.scales[5:]
    assert same_bits(ours.weights, theirs.weights[5:])


def test_after_fit_the_module_has_the_masters_and_another_fit_goes_on_from_them():
    data = batches(3)
    seen, again = Seen(), Seen()
    module = Regression()
    fit(module, MixedPrecision(scaler_of()), data, [seen])
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert same_bits([p.detach() for p in module.parameters()], seen.weights[-1])
    before = [p.detach().clone() for p in module.parameters()]
    fit(module, MixedPrecision(scaler_of()), data, [again])
    assert not same_bits(before, again.weights[0])
    torch.testing.assert_close(before, again.weights[0], rtol=0.0, atol=1.1e-2)  # one step of Adam from there: lr


@pytest.mark.parametrize("make", [adamw, lambda m: torch.optim.SGD(m.net[3].parameters(), lr=0.1)], ids=["in", "out"])
def test_after_fit_frozen_layers_and_buffers_are_as_they_were(make):
    """Bitwise; in the optimizer's groups or not."""
    module = Regression(make=make)
    module.net[0].requires_grad_(False)
    module.net[0].register_buffer("count", torch.tensor(4097.0))
    before = [p.detach().clone() for p in module.net[0].parameters()]
    fit(module, MixedPrecision(scaler_of()), batches(3))
    assert same_bits([p.detach() for p in module.net[0].parameters()], before)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert module.net[0].count == 4097.0
    assert not torch.equal(before[0].half().float(), before[0])  # fp16 would have cost something


def test_validation_after_fit_and_another_fit_of_the_same_trainer():
    class Validated(Regression):
        def validation_step(self, batch, batch_idx):
            self.out = self.net(batch[0])

    data, module = batches(3), Validated()
    trainer = fit(module, MixedPrecision(scaler_of()), data)
    trainer.validate(module, loader(data), verbose=False)
    assert module.out.dtype == torch.float16  # autocast, of FP32 weights
    assert module.net[0].weight.dtype == torch.float32
    first = trainer.optimizers[0]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(data))
    assert trainer.optimizers[0] is not first
    assert (first.steps_taken, trainer.optimizers[0].steps_taken) == (3, 3)


def test_weights_written_at_the_end_of_training_stay():
    """An average of weights, say, that a callback puts into the module."""

    class Swap(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            with torch.no_grad():
                pl_module.net[0].weight.fill_(0.75)

    module, seen = Regression(), Seen()
    fit(module, MixedPrecision(scaler_of()), batches(2), [Swap(), seen])
    assert (module.net[0].weight == 0.75).all()
    assert same_bits(module.net[3].weight.detach(), seen.weights[-1][4])


# Misuse.


def test_torchs_scaler_is_refused():
    with pytest.raises(TypeError, match=r"scaler is a torch\.amp.*give a mpengine\.GradScaler"):
        MixedPrecision(torch.amp.GradScaler("cpu"))


def test_an_optimizer_of_another_scaler_is_refused():
    module = Regression()
    optimizer = mpengine.prepare(module, adamw(module), scaler_of())
    with pytest.raises(ValueError, match=r"another scaler.*self\.trainer\.precision_plugin\.scaler"):
        MixedPrecision(scaler_of()).connect(module, [optimizer], [])


def test_a_model_that_the_strategy_wrapped_is_refused():
    module = nn.Sequential(Regression())
    with pytest.raises(ValueError, match=r"wrapped the model in Sequential .*LightningModule\.setup"):
        MixedPrecision(scaler_of()).connect(module, [adamw(module)], [])
    assert all(p.dtype == torch.float32 for p in module.parameters())


@pytest.fixture
def _environment_restored():
    """Lightning writes ranks and ports into it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_environment_restored")
def test_with_distributed_data_parallel_the_module_is_prepared_in_setup():
    """As the error above says. One process; bit for bit as without DistributedDataParallel."""

    class Early(Regression):
        def setup(self, stage):
            self.to(self.trainer.strategy.root_device)
            self.optimizer = mpengine.prepare(self, adamw(self), self.trainer.precision_plugin.scaler)

        def configure_optimizers(self):
            return self.optimizer

    data = batches(4, overflow=(1,))
    alone, seen = Seen(), Seen()
    fit(Regression(), MixedPrecision(scaler_of()), data, [alone])
    ddp = {"strategy": "ddp", "use_distributed_sampler": False}
    fit(Early(), MixedPrecision(scaler_of()), data, [seen], **ddp)
    assert seen.scales == alone.scales
    assert same_bits(seen.weights, alone.weights)
    with pytest.raises(ValueError, match="wrapped the model in DistributedDataParallel"):
        fit(Regression(), MixedPrecision(scaler_of()), data, **ddp)


def test_a_loss_id_without_a_scaler_is_refused():
    with pytest.raises(ValueError, match="loss_id is 1, but bf16-mixed has no scaler"):
        MixedPrecision(precision="bf16-mixed").backward(torch.ones(()), Regression(), None, loss_id=1)
