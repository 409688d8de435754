"""What is trained end to end: networks, synthetic batches on the device, and one iteration."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure.facts import ROOT
from benchmarks.training.engines import Fp32
from benchmarks.training.models import GPT2, resnet

sys.path.insert(0, str(ROOT / "examples"))
from dcgan_model import build_networks

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """One training task."""

    title: str
    build: Callable[[torch.device], list[nn.Module]]  # in FP32
    batch: Callable[[torch.device], Batch]
    iterate: Callable[..., tuple[Tensor, ...]]  # (engine, networks, *batch) to the losses
    optimizer: Callable[..., torch.optim.Optimizer]
    losses: int
    smoke: bool = False


def dcgan_iteration(engine: Fp32, networks: Sequence[nn.Module], real: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    """D on real and on generated pictures, one step; then G through D, another (examples/dcgan_trainer.py)."""
    net_d, net_g = networks
    of_d, of_g = list(net_d.parameters()), list(net_g.parameters())
    engine.zero_grad()
    with engine.autocast():
        on_real = net_d(real)
    loss_real = _loss(on_real, 1.0)
    engine.backward(loss_real, 0, of_d)
    with engine.autocast():
        generated = net_g(noise)
        on_fake = net_d(generated.detach())
    loss_fake = _loss(on_fake, 0.0)
    engine.backward(loss_fake, 1, of_d)
    engine.step(0)
    with engine.autocast():
        fooled = net_d(generated)
    loss_g = _loss(fooled, 1.0)
    engine.backward(loss_g, 2, of_g)
    engine.step(1)
    engine.update()
    return loss_real.detach(), loss_fake.detach(), loss_g.detach()


def _loss(logits: Tensor, target: float) -> Tensor:
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def classify(engine: Fp32, networks: Sequence[nn.Module], inputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropy over the last dimension of the logits."""
    engine.zero_grad()
    with engine.autocast():
        logits = networks[0](inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    engine.backward(loss, 0)
    engine.step(0)
    engine.update()
    return (loss.detach(),)


def _dcgan_batch(batch: int, size: int, nz: int, device: torch.device) -> Batch:
    real = torch.rand(batch, 3, size, size, device=device).mul_(2).sub_(1)
    return real.contiguous(memory_format=torch.channels_last), torch.randn(batch, nz, 1, 1, device=device)


def _image_batch(batch: int, size: int, classes: int, device: torch.device) -> Batch:
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(classes, (batch,), device=device)


def _token_batch(batch: int, context: int, vocabulary: int, device: torch.device) -> Batch:
    tokens = torch.randint(vocabulary, (batch, context + 1), device=device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _networks(size: int, nz: int, width: int, device: torch.device) -> list[nn.Module]:
    net_g, net_d = build_networks(size, 3, nz=nz, ngf=width, ndf=width, seed=0)
    return [net_d.to(device), net_g.to(device)]


def _one(make: Callable[[], nn.Module], device: torch.device) -> list[nn.Module]:
    with device:  # drawing 124M weights on a CPU takes seconds
        return [make()]


def _dcgan(batch: int, size: int = 64, nz: int = 100, width: int = 64, smoke: bool = False) -> Workload:
    return Workload(
        f"DCGAN, three losses, {size}x{size}, batch {batch}",
        partial(_networks, size, nz, width),
        partial(_dcgan_batch, batch, size, nz),
        dcgan_iteration,
        partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999)),
        3,
        smoke,
    )


_adamw = partial(torch.optim.AdamW, lr=1e-4)
WORKLOADS = {
    "dcgan-64": _dcgan(64),
    "dcgan-512": _dcgan(512),
    "resnet": Workload(
        "ResNet-50, 224x224, batch 64",
        partial(_one, resnet),
        partial(_image_batch, 64, 224, 1000),
        classify,
        _adamw,
        1,
    ),
    "gpt2": Workload(
        "GPT-2 124M, context 1024, batch 8",
        partial(_one, GPT2),
        partial(_token_batch, 8, 1024, 50257),
        classify,
        _adamw,
        1,
    ),
    "dcgan-smoke": _dcgan(4, 8, 4, 4, smoke=True),
    "resnet-smoke": Workload(
        "convnet, smoke test",
        partial(_one, partial(resnet, (1, 1), 8, 5)),
        partial(_image_batch, 4, 32, 5),
        classify,
        _adamw,
        1,
        True,
    ),
    "gpt2-smoke": Workload(
        "GPT, smoke test",
        partial(_one, partial(GPT2, 11, 8, 16, 2, 1)),
        partial(_token_batch, 2, 8, 11),
        classify,
        _adamw,
        1,
        True,
    ),
}
