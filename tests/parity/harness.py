"""What the parity suite shares: the same training run on four sides, and the measure of how far weights may lie apart.

```
side            scaler                   optimizer                                  weights
torch           torch.amp.GradScaler     torch.optim                                FP32, the oracle
plain           mpengine.GradScaler      torch.optim                                FP32
wrapped         mpengine.GradScaler      MixedPrecisionOptimizer around it          FP32, their own masters
wrapped fp16    mpengine.GradScaler      MixedPrecisionOptimizer around it          fp16 with FP32 masters
inside torch's  torch.amp.GradScaler     MixedPrecisionOptimizer around it          fp16 with FP32 masters
```

`plain` performs torch's own operations on the same numbers, so it must agree bit for bit. A wrapped optimizer performs
the same equations in another order of roundings; `assert_close_in_ulp` says how far it may come.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mpengine

INF, NAN = math.inf, math.nan
SIDES = ("torch", "plain", "wrapped", "wrapped fp16", "inside torch's")
OURS = SIDES[1:]
WRAPPED = SIDES[2:]
ULP_A_STEP = 4.0  # the project's promise


def make_scaler(kind: str, **arguments: Any) -> torch.amp.GradScaler:
    """torch's scaler or ours, for one side."""
    if kind in ("torch", "inside torch's"):
        return torch.amp.GradScaler("cpu", **arguments)
    return mpengine.GradScaler("cpu", max_consecutive_skips=None, **arguments)


def wrap(
    kind: str, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any, **arguments: Any
) -> torch.optim.Optimizer:
    """The optimizer that one side steps; arguments are `prepare`'s."""
    if kind in ("torch", "plain"):
        return optimizer
    if kind == "wrapped":
        arguments["keep_fp32"] = lambda name, module: True
    ours = None if kind == "inside torch's" else scaler
    return mpengine.prepare(model, optimizer, ours, **arguments)


class Side:
    """One model, its optimizer and its scaler; and the history of what the scaler did.

    Args:
        kind: One of `SIDES`.
        model: FP32; cast where the side trains fp16.
        make: From parameters to a torch optimizer.
        clip: `max_grad_norm` where the optimizer is wrapped.
        scaler_arguments: For the scaler's constructor.
    """

    def __init__(
        self,
        kind: str,
        model: nn.Module,
        make: Callable[..., torch.optim.Optimizer],
        clip: float | None = None,
        **scaler_arguments: Any,
    ) -> None:
        self.kind, self.model = kind, model
        self.scaler = make_scaler(kind, **scaler_arguments)
        wrapping = {"max_grad_norm": clip} if kind in WRAPPED else {}
        self.optimizer = wrap(kind, model, make(model.parameters()), self.scaler, **wrapping)
        self.history: list[tuple[int, int]] = []

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def weights(self) -> list[Tensor]:
        """The FP32 weights: parameters or masters."""
        masters = getattr(self.optimizer, "master_params", None)
        return [p.detach().clone() for p in (self.params if masters is None else masters())]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Of a regression, under autocast to fp16."""
        with torch.autocast("cpu", torch.float16):
            output = self.model(x)
        return (output.float() - y).square().mean()

    def backward(self, loss: Tensor, overflow: bool = False) -> None:
        self.scaler.scale(loss * INF if overflow else loss).backward()

    def feed(self, grads: Sequence[Tensor | None]) -> None:
        """Gradients assigned by hand, the same FP32 bits on every side; scaled by the scale in force."""
        if getattr(self.scaler, "_scale", None) is None:
            self.scaler.scale(torch.ones((), requires_grad=True))
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None
            if grad is not None:
                param.grad_dtype = None  # an fp16 parameter may then hold an FP32 gradient
                param.grad = grad.clone()

    def step(self) -> None:
        self.scaler.step(self.optimizer)

    def update(self) -> None:
        self.scaler.update()
        self.optimizer.zero_grad()
        self.record()

    def record(self) -> None:
        """The scale's bits and the growth tracker."""
        self.history.append((float_bits(self.scaler.get_scale()), self.scaler._get_growth_tracker()))

    def train(self, batches: Iterable[tuple[Tensor, Tensor]], overflow: Iterable[int] = ()) -> list[float]:
        """One iteration for each batch; the losses of those in `overflow` are inf. Returns the losses."""
        losses, overflow = [], set(overflow)
        for n, (x, y) in enumerate(batches):
            loss = self.loss(x, y)
            self.backward(loss, n in overflow)
            self.step()
            self.update()
            losses.append(float(loss.detach()))
        return losses


def network(seed: int = 0, width: int = 8) -> nn.Sequential:
    """Two linear layers, FP32."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def batches(count: int, seed: int = 0, width: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Inputs that are exact in fp16, and the targets of a fixed linear map."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(width, width, generator=generator) * 0.3
    inputs = [torch.randn(4, width, generator=generator).half().float() for _ in range(count)]
    return [(x, x @ truth) for x in inputs]


def vector(values: Sequence[float] = (1.0, 2.0)) -> nn.Module:
    """A module whose one parameter is a vector."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(values))
    return module


def float_bits(value: float) -> int:
    """The bits of a float32 value."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def bits(value: Any) -> Any:
    """A nested value in which every tensor is its dtype, shape and bits, NaN included."""
    if isinstance(value, Tensor):
        dense = value.detach().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), dense.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return value


def ulp(magnitude: Tensor) -> np.ndarray:
    """The distance from each float32 number to the next larger one, as float64."""
    return np.spacing(np.abs(magnitude.detach().numpy())).astype(np.float64)


class Reach:
    """The largest magnitude that each weight has had, which is where its roundings happened."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.largest = [w.detach().abs() for w in weights]

    def follow(self, weights: Sequence[Tensor]) -> None:
        self.largest = [torch.maximum(a, w.detach().abs()) for a, w in zip(self.largest, weights, strict=True)]

    def ulp_a_step(self, ours: Sequence[Tensor], theirs: Sequence[Tensor], steps: int, floor: float = 0.0) -> float:
        """The largest difference, in ULP of the reach for each step; NaN and inf must agree."""
        worst = 0.0
        for a, b, reach in zip(ours, theirs, self.largest, strict=True):
            if not bool((a.isfinite() == b.isfinite()).all()):
                return INF
            distance = np.abs(a.double().numpy() - b.double().numpy())
            unit = ulp(reach) + floor
            worst = max(worst, float(np.max(np.nan_to_num(distance / unit), initial=0.0)) / steps)
        return worst


def assert_close_in_ulp(ours: Sequence[Tensor], theirs: Sequence[Tensor], reach: Reach, steps: int) -> None:
    """After `steps` on identical gradients no weight is more than 4 ULP of its reach a step away."""
    worst = reach.ulp_a_step(ours, theirs, steps)
    assert worst <= ULP_A_STEP, f"{worst:.3g} ULP a step"
