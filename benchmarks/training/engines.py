"""FP32, torch.amp and mpengine behind one interface, so that one iteration serves all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import mpengine

MakeOptimizer = Callable[..., torch.optim.Optimizer]


class Fp32:
    """FP32 weights; torch's fused optimizer where the device has one. The interface of the others.

    Args:
        networks: One optimizer each.
        make: From parameters (and `fused=`) to an optimizer.
        losses: How many have scales of their own.
        device: "cpu" or "cuda".
    """

    name = "fp32"
    tf32 = False
    captured = False

    def __init__(self, networks: Sequence[nn.Module], make: MakeOptimizer, losses: int, device: str) -> None:
        self.device = device
        self.optimizers = [make(network.parameters(), fused=True) for network in networks]

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, loss_id: int, inputs: Sequence[Tensor] | None = None) -> None:
        """Adds the loss's gradients to those of `inputs`; None: of every parameter."""
        loss.backward(inputs=inputs)

    def step(self, index: int) -> None:
        """Steps one optimizer."""
        self.optimizers[index].step()

    def update(self) -> None:
        """Ends an iteration."""

    def zero_grad(self) -> None:
        """Begins one."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class Tf32(Fp32):
    """FP32 with TF32 in matrix products and convolutions."""

    name = "fp32, TF32"
    tf32 = True


class TorchAmp(Fp32):
    """FP32 weights, autocast to fp16, one torch.amp.GradScaler."""

    name = "torch.amp"
    tf32 = True  # for what autocast leaves in FP32

    def __init__(self, networks: Sequence[nn.Module], make: MakeOptimizer, losses: int, device: str) -> None:
        super().__init__(networks, make, losses, device)
        self.scaler: Any = torch.amp.GradScaler(device)

    def autocast(self) -> AbstractContextManager[Any]:
        """fp16."""
        return torch.autocast(self.device, torch.float16)

    def backward(self, loss: Tensor, loss_id: int, inputs: Sequence[Tensor] | None = None) -> None:
        """Of the scaled loss."""
        self.scaler.scale(loss).backward(inputs=inputs)

    def step(self, index: int) -> None:
        """Steps, or skips."""
        self.scaler.step(self.optimizers[index])

    def update(self) -> None:
        """The scale grows, waits or backs off."""
        self.scaler.update()


class Mpengine(TorchAmp):
    """fp16 weights and gradients, FP32 masters, a scale for every loss."""

    name = "mpengine"

    def __init__(self, networks: Sequence[nn.Module], make: MakeOptimizer, losses: int, device: str) -> None:
        self.device = device
        self.scaler = mpengine.GradScaler(device, num_losses=losses)
        self.optimizers = [mpengine.prepare(network, make(network.parameters()), self.scaler) for network in networks]

    def backward(self, loss: Tensor, loss_id: int, inputs: Sequence[Tensor] | None = None) -> None:
        """Of the loss scaled by its own scale."""
        self.scaler.scale(loss, loss_id=loss_id).backward(inputs=inputs)


class Captured(Mpengine):
    """The same; the whole iteration is captured in one CUDA graph and replayed."""

    name = "mpengine, captured"
    captured = True


ENGINES = {engine.name: engine for engine in (Fp32, Tf32, TorchAmp, Mpengine, Captured)}
