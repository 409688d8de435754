"""What the workers run. Each scenario takes its rank (None: one process on the joined batch) and returns its results.

The model of most scenarios is linear in its parameters with small integer coefficients, and scales are powers of two,
so that averages over ranks, sums over micro-batches and roundings to fp16 are exact: one process on the joined batch
must then give the very same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mpengine
from tests.harness import FUSED, GENERAL, frozen, snapshot

RANKS = 2
SHAPES = ((7,), (3, 5), (), (2, 3, 1, 2), (65,))  # odd sizes: views into a bucket start anywhere
FIRST_SCALE = 2.0**8
Micro = tuple[int, int]  # loss_id, micro-batch


class GainNorm(nn.Module):
    """A parameter that stays FP32, as its class's name says."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, coefficient: Tensor) -> Tensor:
        return self.weight * coefficient


class Linear(nn.Module):
    """The sum of coefficient * parameter over all parameters: its gradients are the coefficients."""

    def __init__(self, seed: int = 0, shapes: Iterable[tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.own = nn.ParameterList([torch.randn(shape, generator=generator) for shape in shapes])
        self.gain = GainNorm((5,))

    def forward(self, coefficients: list[Tensor | None]) -> Tensor:
        *rest, last = coefficients
        pairs = zip(self.own, rest, strict=True)
        terms = [(param.float() * c).sum() for param, c in pairs if c is not None]
        if last is not None:
            terms.append(self.gain(last).float().sum())
        return torch.stack(terms).sum()


def coefficients(seed: int, rank: int | None) -> list[Tensor]:
    """Integers from -8 to 8 for each parameter of `Linear`; of all ranks together their mean."""
    if rank is None:
        own = [coefficients(seed, r) for r in range(RANKS)]
        return [torch.stack(parts).mean(0) for parts in zip(*own, strict=True)]
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return [torch.randint(-8, 9, shape, generator=generator).float() for shape in (*SHAPES, (5,))]


def wrapped(model: nn.Module, rank: int | None, **options: Any) -> nn.Module:
    return model if rank is None else DistributedDataParallel(model, **options)


def unsynchronised(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager[None]:
    return model.no_sync() if wanted and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def optimizer_of(name: str) -> Callable[..., torch.optim.Optimizer]:
    return {**FUSED, **GENERAL}[name]


def overflowing(rank: int | None, culprit: int | None) -> bool:
    return culprit is not None and rank in (None, culprit)


def train(
    rank: int | None,
    *,
    losses: int = 1,
    micro: int = 1,
    infs: dict[tuple[int, int], int] | None = None,
    make: str = "adam",
    kind: str = "prepared",
    iterations: int = 6,
    clip: str = "",
    zero: str = "optimizer",
    seed_of_rank: bool = False,
    max_grad_norm: float | None = None,
    ddp: dict[str, Any] | None = None,
    sabotage: str = "",
) -> list[Any]:
    """Trains `Linear`; every loss has `micro` micro-batches, of which only the last is averaged over ranks.

    Args:
        rank: This process's rank.
        losses: The number of losses.
        micro: Micro-batches of each loss.
        infs: From (iteration, loss) to the rank whose loss is inf there.
        make: The optimizer.
        kind: See `built`.
        iterations: How many.
        clip: "unscale" to clip after `unscale_`.
        zero: "optimizer", "optimizer in place" or "model": how gradients are zeroed.
        seed_of_rank: Initialises each rank from a seed of its own.
        max_grad_norm: Of `prepare`.
        ddp: Options of DistributedDataParallel.
        sabotage: What to do wrongly.

    Returns:
        For each iteration the scales, whether the step was skipped, and all that the step may change, bit for bit.
    """
    model = Linear(seed=rank if seed_of_rank and rank is not None else 0)
    scaler, optimizers = built(kind, model, losses, optimizer_of(make), max_grad_norm)
    outer = wrapped(model, rank, **(ddp or {}))
    history: list[Any] = []
    with sabotaged(sabotage, rank):
        for i in range(iterations):
            for k in range(losses):
                for m in range(micro):
                    with unsynchronised(outer, m < micro - 1):
                        c = coefficients(100 * i + 10 * k + m, rank)
                        loss = outer([None if t is None else t * (k + 1) for t in c])
                        if m == 0 and overflowing(rank, (infs or {}).get((i, k))):
                            loss = loss * float("inf")
                        scaler.scale(loss, *([k] if losses > 1 else [])).backward()
            if clip == "unscale":
                for optimizer in optimizers:
                    scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            if sabotage == "repair" and rank == 1:
                for param in model.parameters():
                    param.grad.nan_to_num_(0.0, 0.0, 0.0)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            ours = isinstance(scaler, mpengine.GradScaler)
            scales = [state.scale for state in scaler.statistics()] if ours else [scaler.get_scale()]
            skipped = [getattr(optimizer, "last_step_skipped", None) for optimizer in optimizers]
            history.append((scales, skipped[0], [snapshot_of(optimizer) for optimizer in optimizers]))
            if zero == "model":
                model.zero_grad()
            for optimizer in optimizers if zero != "model" else ():
                optimizer.zero_grad(set_to_none=zero == "optimizer")
    return history


def built(
    kind: str, model: nn.Module, losses: int, make: Any, max_grad_norm: float | None
) -> tuple[Any, list[torch.optim.Optimizer]]:
    """A scaler and the optimizers of a model.

    Args:
        kind: "prepared": fp16 weights. "split": the same, half of them by another optimizer. "plain", "plain split":
            FP32 weights and torch's optimizers. "torch's scaler": fp16 weights, stepped by torch.amp.GradScaler.
            "bf16": without scales.
        model: Whose parameters.
        losses: The number of losses.
        make: Makes an optimizer.
        max_grad_norm: Of `prepare`.
    """
    scaler: Any = mpengine.GradScaler(
        "cpu", init_scale=FIRST_SCALE, growth_interval=3, num_losses=losses, enabled=kind != "bf16"
    )
    params = list(model.parameters())
    parts = [params[::2], params[1::2]] if "split" in kind else [params]
    if "plain" in kind:
        optimizers = [make(part) for part in parts]
        for optimizer in optimizers:
            scaler.watch(optimizer)
        return scaler, optimizers
    if kind == "torch's scaler":
        scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=3)
        return scaler, [mpengine.prepare(model, make(params))]
    if kind == "bf16":
        return scaler, [mpengine.prepare(model, make(params), dtype=torch.bfloat16)]
    return scaler, [mpengine.prepare(model, make(part), scaler, max_grad_norm=max_grad_norm) for part in parts]


def snapshot_of(optimizer: torch.optim.Optimizer) -> Any:
    if isinstance(optimizer, mpengine.MixedPrecisionOptimizer):
        return snapshot(optimizer)
    return frozen([optimizer.param_groups[0]["params"], optimizer.state_dict()["state"]])


@contextlib.contextmanager
def sabotaged(what: str, rank: int | None) -> Iterator[None]:
    """Breaks one thing that the engine does for DistributedDataParallel."""
    from mpengine import distributed

    broken: dict[str, tuple[str, Any]] = {
        "no copy": ("is_bucket_view", lambda grad: False),
        "own masters": ("share_masters", lambda optimizer, masters: None),
        "end early": ("call_last", lambda function, turns=0: _call_next(function)),
    }
    if what not in broken or rank is None:
        yield
        return
    name, replacement = broken[what]
    original = getattr(distributed, name)
    setattr(distributed, name, replacement)
    try:
        yield
    finally:
        setattr(distributed, name, original)


def _call_next(function: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def unused(rank: int | None, *, bucket_view: bool, sabotage: str = "") -> list[Any]:
    """Two losses, of which the second does not reach parameter 0 on rank 0 nor parameter 1 on any rank."""
    model = Linear()
    scaler = mpengine.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=2, num_losses=2)
    optimizer = mpengine.prepare(model, FUSED["adam"](model.parameters()), scaler)
    outer = wrapped(model, rank, find_unused_parameters=True, gradient_as_bucket_view=bucket_view)
    history = []
    with sabotaged(sabotage, rank):
        for i in range(5):
            for k in range(2):
                given: list[Tensor | None] = list(coefficients(10 * i + k, rank))
                if k == 1:
                    if rank == 0:
                        given[0] = None
                    elif rank is None:
                        given[0] = coefficients(10 * i + k, 1)[0] / RANKS
                    given[1] = None
                scaler.scale(outer(given), k).backward()
            optimizer.step()
            scaler.update()
            history.append((scaler.get_scale(0), scaler.get_scale(1), snapshot(optimizer)))
            optimizer.zero_grad()
    return history


def torch_amp(rank: int, *, infs: dict[tuple[int, int], int], iterations: int, make: str) -> list[Any]:
    """`train` with one loss, by torch.amp.GradScaler and FP32 weights: scales, skips and weights."""
    model = Linear()
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=3)
    optimizer = FUSED[make](model.parameters())
    outer = DistributedDataParallel(model)
    history = []
    for i in range(iterations):
        optimizer.zero_grad()
        loss = outer(coefficients(100 * i, rank))
        scaler.scale(loss * float("inf") if infs.get((i, 0)) == rank else loss).backward()
        before = frozen(list(model.parameters()))
        scaler.step(optimizer)
        scaler.update()
        skipped = frozen(list(model.parameters())) == before
        history.append(([scaler.get_scale()], skipped, [p.detach().numpy().copy() for p in model.parameters()]))
    return history


def masters_after(rank: int | None, *, make: str, **options: Any) -> list[Any]:
    """The masters after each iteration of `train`, as arrays."""
    history = train(rank, make=make, **options)
    return [(scales, skipped, masters) for scales, skipped, [(_, masters, _, _)] in history]
