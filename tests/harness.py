"""What the optimizer's tests share: exact snapshots, and optimizers that are fed gradients by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# Every torch optimizer that steps once, in dense arithmetic, on tensors of any shape.
FUSED = {
    "sgd": lambda params, **kw: torch.optim.SGD(params, **{"lr": 0.1, "foreach": False, **kw}),
    "momentum": lambda params, **kw: torch.optim.SGD(
        params, **{"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01, "foreach": False, **kw}
    ),
    "adam": lambda params, **kw: torch.optim.Adam(params, **{"lr": 0.01, "foreach": False, **kw}),
    "adamw": lambda params, **kw: torch.optim.AdamW(params, **{"lr": 0.01, "amsgrad": True, "foreach": False, **kw}),
    "rmsprop": lambda params, **kw: torch.optim.RMSprop(
        params, **{"lr": 0.01, "momentum": 0.5, "centered": True, "foreach": False, **kw}
    ),
    "adagrad": lambda params, **kw: torch.optim.Adagrad(
        params, **{"lr": 0.01, "lr_decay": 0.1, "initial_accumulator_value": 0.25, "foreach": False, **kw}
    ),
    "adadelta": lambda params, **kw: torch.optim.Adadelta(
        params, **{"lr": 0.5, "weight_decay": 0.01, "foreach": False, **kw}
    ),
}


class _OwnAdam(torch.optim.Adam):
    """A subclass may have a step of its own, so it takes the general path."""


GENERAL = {
    cls.__name__: lambda params, cls=cls, **kw: cls(params, **{"lr": 0.01, **kw})
    for cls in (
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.ASGD,
        torch.optim.Rprop,
        torch.optim.Adafactor,
        _OwnAdam,
    )
}
EVERY = {**FUSED, **GENERAL}


def frozen(value: Any) -> Any:
    """A copy of a nested value in which every tensor is its dtype, shape and bits."""
    if isinstance(value, Tensor):
        dense = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), dense.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: frozen(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [frozen(part) for part in value]
    return value


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(optimizer: MixedPrecisionOptimizer) -> Any:
    """All that a step may change, bit for bit; not the counts of steps taken and skipped."""
    saved = optimizer.state_dict()
    return frozen([params_of(optimizer), list(optimizer.master_params()), saved["state"], saved["param_groups"]])


def same_bits(a: Any, b: Any) -> bool:
    return frozen(a) == frozen(b)


def parameters(dtypes: Sequence[torch.dtype] = (HALF, SINGLE, BRAIN), seed: int = 0) -> list[nn.Parameter]:
    """Small parameters of every dtype: a vector, a matrix, a scalar."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7,), (3, 5), ()]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for dtype in dtypes for s in shapes]


def twins_of(params: Iterable[Tensor]) -> list[nn.Parameter]:
    """FP32 copies of the parameters, for torch's own optimizer."""
    return [nn.Parameter(p.detach().to(SINGLE, copy=True)) for p in params]


def gradients(params: Iterable[Tensor], seed: int, size: float = 1.0) -> list[Tensor]:
    """One random gradient for each parameter, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(p.shape, generator=generator) * size).to(p.dtype) for p in params]


def feed(params: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
    """Puts copies of the gradients on the parameters."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def started(scaler: GradScaler) -> GradScaler:
    """A scaler whose state is on the CPU, as after its first scaled loss."""
    scaler.scale(torch.ones((), requires_grad=True))
    return scaler


def network(seed: int = 0) -> nn.Sequential:
    """Linear layers with a norm between them, FP32."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4))


def prepared(
    make: Any = FUSED["adam"], seed: int = 0, init_scale: float = 2.0**10, **kwargs: Any
) -> tuple[nn.Sequential, MixedPrecisionOptimizer, GradScaler]:
    """A network, its wrapper and their scaler."""
    model = network(seed)
    scaler = GradScaler(init_scale=init_scale, growth_interval=3)
    optimizer = mpengine.prepare(model, make(model.parameters()), scaler, **kwargs)
    return model, optimizer, scaler


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """fp16 inputs and FP32 targets of `network`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 6, generator=generator).half(), torch.randn(5, 4, generator=generator)


def train(
    model: nn.Module,
    optimizer: MixedPrecisionOptimizer,
    scaler: GradScaler,
    seeds: Iterable[int],
    overflow: Iterable[int] = (),
) -> None:
    """One iteration for each seed; the losses of seeds in `overflow` are inf."""
    for seed in seeds:
        x, y = batch(seed)
        loss = (model(x).float() - y).square().mean()
        scaler.scale(loss * float("inf") if seed in overflow else loss).backward()
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()


def static_scaler(scale: float = 8.0) -> GradScaler:
    return started(GradScaler(init_scale=scale, min_scale=scale, max_scale=scale, max_consecutive_skips=None))


def fed(optimizer, scaler, grads):
    """One step on gradients assigned by hand, which count as scaled by the scale in force."""
    feed(params_of(optimizer), grads)
    optimizer.step()
    scaler.update()
