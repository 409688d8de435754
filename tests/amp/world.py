"""Small models and loops for amp's tests, on coefficients that make every sum exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpengine import amp

LEVELS = ("O0", "O1", "O2", "O3")
INF = float("inf")
FIRST = 1024.0  # the scale that tests begin from: a gradient of 1.0 times 2**16 would overflow fp16
DYNAMIC = {"loss_scale": "dynamic", "max_loss_scale": FIRST}


class Weights(nn.Module):
    """A model whose gradient is what the test says: `model(c)` is the sum of c * weight."""

    def __init__(self, size: int = 3, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), value))

    def forward(self, c: Tensor) -> Tensor:
        return (c * self.weight).float().sum()


def network(seed: int = 0) -> nn.Sequential:
    """Two linear layers with a batch norm and a layer norm, FP32."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.LayerNorm(9), nn.Linear(9, 4))


def batch(seed: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


def sgd(*models: nn.Module, lr: float = 1.0, **kwargs: Any) -> torch.optim.SGD:
    return torch.optim.SGD([p for model in models for p in model.parameters()], lr=lr, **kwargs)


def weights(level: str = "O2", size: int = 3, value: float = 0.0, **kwargs: Any) -> tuple[Weights, Any]:
    """One `Weights` and its SGD of lr 1, initialized; dynamic scales begin at FIRST, and stay there."""
    model = Weights(size, value)
    model, optimizer = amp.initialize(model, sgd(model), opt_level=level, **{**DYNAMIC, **kwargs})
    return model, optimizer


def backward(model: nn.Module, optimizers: Any, values: list[float], **kwargs: Any) -> None:
    """One pass whose true gradient is `values`; inf and NaN overflow."""
    finite = torch.tensor([v if abs(v) < INF else 1.0 for v in values])
    blow = next((v for v in values if not abs(v) < INF), 1.0)
    with amp.scale_loss(model(finite) * blow, optimizers, **kwargs) as scaled:
        scaled.backward()


def master(optimizer: Any, i: int = 0) -> list[float]:
    return list(optimizer.master_params())[i].tolist()


def scales() -> list[float]:
    return [entry["loss_scale"] for entry in amp.state_dict().values()]


def unskipped() -> list[int]:
    return [entry["unskipped"] for entry in amp.state_dict().values()]
