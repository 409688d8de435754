"""The four trainings: which networks, on which batches, with which optimizer and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.parity import data, models
from benchmarks.parity.engines import ENGINES, Engine

Batch = tuple[Tensor, ...]
REAL, FAKE, GENERATOR = 0, 1, 2  # DCGAN's losses
G, D = 0, 1  # its networks


@dataclass(frozen=True)
class Task:
    """One training, whatever the engine. From one seed every engine has the same weights and the same batches."""

    name: str
    title: str
    setting: str  # for the reader of the page
    build: Callable[[int], list[nn.Module]]  # from a seed
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]  # one for each network
    batches: Callable[[int, int], Iterator[Batch]]  # from a seed, that many
    iterate: Callable[[Engine, Batch], list[Tensor]]  # trains on one batch and returns `curves`
    curves: tuple[str, ...] = ("loss",)  # what `iterate` returns
    num_losses: int = 1  # that are scaled: where there are several, mpengine can scale each by itself
    keep_fp32: tuple[type[nn.Module], ...] = ()  # that mpengine keeps, where torch.amp computes in FP32

    def engine(self, name: str, seed: int, init_scale: float, growth_interval: int) -> Engine:
        """The engine of that name, with this task's networks and optimizers."""
        options = (self.num_losses, init_scale, growth_interval, self.keep_fp32)
        return ENGINES[name](self.build(seed), self.optimizer, *options)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[int], list[nn.Module]]:
    def build(seed: int) -> list[nn.Module]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [make()]

    return build


def _classify(engine: Engine, batch: Batch) -> list[Tensor]:
    """Cross-entropy in FP32 of one network's logits."""
    inputs, labels = batch
    (network,) = engine.networks
    engine.zero_grad(0)
    with engine.autocast():
        logits = network(inputs)
    loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
    engine.backward(loss, 0)
    engine.step(0)
    engine.update()
    return [loss.detach()]


def _bce(logits: Tensor, real: bool) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def _play(engine: Engine, batch: Batch) -> list[Tensor]:
    """One iteration of DCGAN as examples/dcgan.py has it: D on real and on generated pictures, then G."""
    images, noise = batch
    generator, critic = engine.networks
    engine.zero_grad(G)
    engine.zero_grad(D)
    with engine.autocast():
        real = critic(images)
    loss_real = _bce(real, True)
    engine.backward(loss_real, REAL, critic)
    with engine.autocast():
        generated = generator(noise)
        fake = critic(generated.detach())
    loss_fake = _bce(fake, False)
    engine.backward(loss_fake, FAKE, critic)
    engine.step(D)
    with engine.autocast():
        fooled = critic(generated)
    loss_g = _bce(fooled, True)
    engine.backward(loss_g, GENERATOR, generator)
    engine.step(G)
    engine.update()
    return [(loss_real + loss_fake).detach(), loss_g.detach()]


def _conv_batches(seed: int, steps: int) -> Iterator[Batch]:
    for images, labels in data.digit_batches(seed, steps, 32):
        yield images.contiguous(memory_format=torch.channels_last), labels


def _dcgan_batches(seed: int, steps: int) -> Iterator[Batch]:
    stream = torch.Generator().manual_seed(seed + 1000)
    for images, _ in data.digit_batches(seed, steps, 32):
        noise = torch.randn(len(images), models.NOISE, 1, 1, generator=stream)
        yield images.contiguous(memory_format=torch.channels_last), noise


TASKS = {
    task.name: task
    for task in (
        Task(
            "mlp",
            "MLP",
            "three linear layers, digits in batches of 64, AdamW at 1e-3",
            _seeded(models.mlp),
            lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=False),
            lambda seed, steps: data.digit_batches(seed, steps, 64),
            _classify,
        ),
        Task(
            "convnet",
            "Convnet, channels_last",
            "three convolutions with BatchNorm, digits in batches of 32, SGD at 0.05 with momentum 0.9",
            _seeded(models.convnet),
            lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, foreach=False),
            _conv_batches,
            _classify,
        ),
        Task(
            "gpt",
            "GPT, four layers",
            f"width 32, 4 heads, 4 windows of {models.CONTEXT} characters, AdamW at 1e-3",
            _seeded(lambda: models.GPT(data.VOCABULARY)),
            lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=False),
            lambda seed, steps: data.text_batches(seed, steps, 4, models.CONTEXT),
            _classify,
            keep_fp32=(nn.Embedding,),
        ),
        Task(
            "dcgan",
            "DCGAN",
            "generator and discriminator for 8 x 8 digits, batches of 32, Adam at 5e-4 with betas 0.5 and 0.999",
            models.dcgan,
            lambda params: torch.optim.Adam(params, lr=5e-4, betas=(0.5, 0.999), foreach=False),
            _dcgan_batches,
            _play,
            curves=("loss of D", "loss of G"),
            num_losses=3,
        ),
    )
}
