"""Three ways to train the same two networks: FP32, torch.amp, and mpengine.

They share an interface, so that one training loop serves all three and a comparison is of the engines alone.
DCGAN has three losses: D on real pictures (0), D on generated ones (1), G (2). D's optimizer steps on the
gradients of losses 0 and 1, G's on those of loss 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

REAL, FAKE, GENERATOR = 0, 1, 2  # the loss_id of each loss
LOSS_NAMES = ("D on real", "D on fake", "G")


@dataclass(frozen=True)
class Hyperparameters:
    """What the optimizers and the scale are made with."""

    lr: float
    beta1: float
    init_scale: float
    growth_interval: int

    def adam(self, network: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(network.parameters(), lr=self.lr, betas=(self.beta1, 0.999))


class Fp32Engine:
    """Plain FP32 training, and the interface of the other two."""

    name = "fp32"
    scale_names: tuple[str, ...] = ()  # one for each scale that the engine keeps

    def __init__(self, net_d: nn.Module, net_g: nn.Module, device: torch.device, hyper: Hyperparameters) -> None:
        self.device = device
        self.optimizer_d: torch.optim.Optimizer = hyper.adam(net_d)
        self.optimizer_g: torch.optim.Optimizer = hyper.adam(net_g)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        return nullcontext()

    def backward(self, loss: Tensor, loss_id: int, inputs: Sequence[Tensor]) -> None:
        """Adds the loss's gradients to those of `inputs` and of no other parameter."""
        loss.backward(inputs=inputs)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Steps one optimizer on the gradients of its losses, or skips when they overflowed."""
        optimizer.step()

    def update(self) -> None:
        """Ends an iteration: each scale grows, waits or backs off."""

    def scales(self) -> tuple[list[float], list[int] | None]:
        """The scales now and how often each overflowed (None: the engine does not count); waits for the device."""
        return [], []

    def steps_taken(self, optimizer: torch.optim.Optimizer) -> int:
        """Updates that changed the weights, as Adam counts them itself: a skipped one does not advance its step."""
        return max((int(state["step"]) for state in optimizer.state.values()), default=0)

    def state_dict(self) -> dict[str, Any]:
        """Both optimizers (with the master weights, where there are any) and the scaler."""
        return {"optimizerD": self.optimizer_d.state_dict(), "optimizerG": self.optimizer_g.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave, bit for bit."""
        self.optimizer_d.load_state_dict(state["optimizerD"])
        self.optimizer_g.load_state_dict(state["optimizerG"])


class TorchAmpEngine(Fp32Engine):
    """torch.amp as its documentation shows it: autocast, FP32 weights, one GradScaler for all losses."""

    name = "torch-amp"
    scale_names = ("all losses",)

    def __init__(self, net_d: nn.Module, net_g: nn.Module, device: torch.device, hyper: Hyperparameters) -> None:
        super().__init__(net_d, net_g, device, hyper)
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=hyper.init_scale, growth_interval=hyper.growth_interval
        )

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.float16)

    def backward(self, loss: Tensor, loss_id: int, inputs: Sequence[Tensor]) -> None:
        self.scaler.scale(loss).backward(inputs=inputs)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.step(optimizer)

    def update(self) -> None:
        self.scaler.update()

    def scales(self) -> tuple[list[float], list[int] | None]:
        return [self.scaler.get_scale()], None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scaler.load_state_dict(state["scaler"])


class MpengineEngine(Fp32Engine):
    """fp16 weights and gradients, FP32 masters in the optimizers, one scale for each loss."""

    name = "mpengine"
    scale_names = LOSS_NAMES

    def __init__(self, net_d: nn.Module, net_g: nn.Module, device: torch.device, hyper: Hyperparameters) -> None:
        import mpengine  # here, so that the other engines run without it

        super().__init__(net_d, net_g, device, hyper)
        self.scaler = mpengine.GradScaler(
            device.type,
            num_losses=len(LOSS_NAMES),
            init_scale=hyper.init_scale,
            growth_interval=hyper.growth_interval,
        )
        self.optimizer_d = mpengine.prepare(net_d, self.optimizer_d, self.scaler)
        self.optimizer_g = mpengine.prepare(net_g, self.optimizer_g, self.scaler)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.float16)

    def backward(self, loss: Tensor, loss_id: int, inputs: Sequence[Tensor]) -> None:
        self.scaler.scale(loss, loss_id=loss_id).backward(inputs=inputs)

    def update(self) -> None:
        self.scaler.update()

    def scales(self) -> tuple[list[float], list[int] | None]:
        records = self.scaler.statistics()
        return [record.scale for record in records], [record.overflows for record in records]

    def steps_taken(self, optimizer: torch.optim.Optimizer) -> int:
        return optimizer.steps_taken  # type: ignore[attr-defined]  # prepare's optimizers have it

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scaler.load_state_dict(state["scaler"])


ENGINES = {engine.name: engine for engine in (MpengineEngine, TorchAmpEngine, Fp32Engine)}
