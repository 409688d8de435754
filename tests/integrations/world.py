"""What the trainers' tests share: small models, batches whose loss overflows, and a model of known gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

LR = 1e-2
INIT_SCALE = 2.0**10

Batch = tuple[Tensor, Tensor, Tensor]


def batches(count: int, overflow: tuple[int, ...] = (), seed: int = 1) -> list[Batch]:
    """(input, target, factor of the loss): the factor is inf for the batches in `overflow`, else 1."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(5, 6, generator=generator),
            torch.randn(5, 4, generator=generator),
            torch.tensor(float("inf") if i in overflow else 1.0),
        )
        for i in range(count)
    ]


def loader(data: list[Batch]) -> DataLoader:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    x, y, factor = batch
    return (model(x) - y).square().mean() * factor


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LR, foreach=False)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Its factors are powers of two: every product is exact, so any correct step gives the same bits."""
    return torch.optim.SGD(model.parameters(), lr=2.0**-4, momentum=0.5, foreach=False)


def two_layers() -> nn.Sequential:
    """Without a normalisation layer, which autocast and we compute in different dtypes: see `network`."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


class Known(nn.Module):
    """A weight (1, 2) whose gradient is the batch's first two numbers: its loss is <weight, x>."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


class Gan(nn.Module):
    """A generator and a critic, for two optimizers and three losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.generator = nn.Linear(4, 6)
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
