"""Recipes for learning rates: functions from an optimizer to one of torch's schedulers.

Each constructor returns such a function. It serves as any scheduler does, `scheduler = recipe(optimizer)`, and in
`optimizer.schedule(recipe, steps=N)`, where skipped steps do not advance it. In the formulas t counts steps from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LinearLR, LRScheduler, OneCycleLR

Recipe = Callable[[torch.optim.Optimizer], LRScheduler]
PerGroup = float | list[float]  # one number for all groups, or one for each


def scaled_lr(base_lr: float, global_batch: int, base_batch: int = 256) -> float:
    """The linear scaling rule: as the batch grows k-fold, so does the learning rate.

    ```
    lr = base_lr * global_batch / base_batch
    ```

    Args:
        base_lr: The learning rate that suits `base_batch`.
        global_batch: Samples that one optimizer step averages over: per rank * ranks * accumulation steps.
        base_batch: The paper's reference is 256.

    Returns:
        The learning rate; warm up to it, since the rule does not hold in the first epochs (`linear_warmup`).

    Raises:
        ValueError: A number is not positive.

    Example:
        >>> scaled_lr(0.1, global_batch=8192)
        3.2

    Goyal et al. 2017, Accurate, Large Minibatch SGD, https://arxiv.org/abs/1706.02677, section 2.1. The rule is SGD's;
    for Adam many scale by the square root instead.
    """
    _positive(base_lr=base_lr, global_batch=global_batch, base_batch=base_batch)
    return base_lr * global_batch / base_batch


def linear_warmup(*, warmup_steps: int, start_factor: float = 0.01) -> Recipe:
    """A ramp from `start_factor * lr` to each group's lr, which then holds.

    ```
    lr(t) = lr * (s + (1 - s) * min(t, W) / W)
    ```

    Args:
        warmup_steps: W, the first step with the full lr.
        start_factor: s, in (0, 1]. The paper starts at the unscaled rate: s = base_batch / global_batch.

    Returns:
        From an optimizer to its `torch.optim.lr_scheduler.LinearLR`.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=scaled_lr(0.1, 8192), momentum=0.9)
        >>> scheduler = linear_warmup(warmup_steps=780, start_factor=256 / 8192)(optimizer)

    Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.2 (gradual warmup). It multiplies the lr that it
    finds, so it may be chained with other schedulers of that kind: `lambda opt: [warmup(opt), MultiStepLR(opt, ...)]`
    is the paper's whole schedule. torch's `LinearLR` counts from 1/3 over 5 steps by default.
    """
    _whole(1, warmup_steps=warmup_steps)
    _within(0.0, 1.0, start_factor=start_factor)
    return partial(LinearLR, start_factor=start_factor, total_iters=warmup_steps)


def cyclic_decaying(
    *,
    base_lr: PerGroup,
    max_lr: PerGroup,
    step_size_up: int,
    step_size_down: int | None = None,
    gamma: float | None = None,
    momentum_range: tuple[float, float] | None = None,
) -> Recipe:
    """Triangles between `base_lr` and an upper bound that decays.

    ```
    cycle(t) = floor(t / (U + D))
    x        = t - (U + D) * cycle(t)
    tri(t)   = x / U  where x <= U, else  (U + D - x) / D
    decay(t) = 2^-cycle(t),  or gamma^t
    lr(t)    = base_lr + (max_lr - base_lr) * tri(t) * decay(t)
    momentum(t) = m_max - (m_max - m_min) * tri(t) * decay(t)
    ```

    Args:
        base_lr: The lower bound; for all groups or for each.
        max_lr: The upper bound of the first cycle; for all groups or for each.
        step_size_up: U, steps of a rise.
        step_size_down: D, steps of a fall; None: U.
        gamma: None: each cycle's bound is half as high above `base_lr` ("triangular2"). In (0, 1]: it falls by this
            factor at every step ("exp_range").
        momentum_range: (m_min, m_max), for momentum (Adam: beta1) that falls while the lr rises; None: momentum stays.

    Returns:
        From an optimizer to its `torch.optim.lr_scheduler.CyclicLR`, which sets `base_lr` in its groups.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> recipe = cyclic_decaying(base_lr=0.001, max_lr=0.006, step_size_up=2000)

    Smith 2015, Cyclical Learning Rates for Training Neural Networks, https://arxiv.org/abs/1506.01186, which advises
    2 to 10 epochs for a rise. torch's `CyclicLR` has no decay by default ("triangular") and cycles momentum unasked.
    """
    _whole(1, step_size_up=step_size_up, step_size_down=step_size_up if step_size_down is None else step_size_down)
    lows, highs = _each(base_lr), _each(max_lr)
    groups = max(len(lows), len(highs), 1)
    if not {len(lows), len(highs)} <= {1, groups}:
        raise ValueError(f"base_lr has {len(lows)} values and max_lr {len(highs)}; give one for each group, or one.")
    for low, high in zip(lows * (groups // len(lows)), highs * (groups // len(highs)), strict=True):
        if not 0.0 <= low <= high < math.inf:
            raise ValueError(f"base_lr is {low} and max_lr {high}; they must be finite, with 0 <= base_lr <= max_lr.")
    if gamma is not None:
        _within(0.0, 1.0, gamma=gamma)
    least, most = _checked_momenta(momentum_range)
    return partial(
        CyclicLR,
        base_lr=base_lr,
        max_lr=max_lr,
        step_size_up=step_size_up,
        step_size_down=step_size_down,
        mode="triangular2" if gamma is None else "exp_range",
        gamma=1.0 if gamma is None else gamma,
        cycle_momentum=momentum_range is not None,
        base_momentum=least,
        max_momentum=most,
    )


def one_cycle(
    *,
    max_lr: PerGroup,
    total_steps: int,
    warmup_fraction: float = 0.3,
    start_factor: float = 1 / 25,
    final_factor: float = 4e-6,
    momentum_range: tuple[float, float] | None = (0.85, 0.95),
    linear: bool = False,
) -> Recipe:
    """One rise of the lr and one fall to almost nothing, with momentum in reverse.

    ```
    P = warmup_fraction * T - 1,  E = T - 1
    lr(t)       = blend(s * max_lr, max_lr, t / P)                where t <= P
                  blend(max_lr, f * max_lr, (t - P) / (E - P))    after it
    momentum(t) = blend(m_max, m_min, t / P),  blend(m_min, m_max, (t - P) / (E - P))
    blend(a, b, x) = b + (a - b) * (1 + cos(pi * x)) / 2,  or a + (b - a) * x  where linear
    ```

    Args:
        max_lr: The peak; for all groups or for each.
        total_steps: T. The last step, T - 1, has the smallest lr.
        warmup_fraction: The share of T in which the lr rises, in (0, 1); more than one step.
        start_factor: s, in (0, 1].
        final_factor: f, in (0, 1].
        momentum_range: (m_min, m_max) of momentum (Adam: beta1); None: momentum stays.
        linear: Straight lines, as in the paper, instead of half cosines.

    Returns:
        From an optimizer to its `torch.optim.lr_scheduler.OneCycleLR`, which refuses to go beyond step T.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> recipe = one_cycle(max_lr=0.1, total_steps=1000)

    Smith & Topin 2017, Super-Convergence, https://arxiv.org/abs/1708.07120. The names say what they multiply: torch's
    `OneCycleLR` has div_factor = 1 / s and final_div_factor = s / f. The paper falls back to the first lr and then
    goes on falling in a third phase; here one fall does both, as in fastai and by torch's default.
    """
    _whole(2, total_steps=total_steps)
    _positive(**{f"max_lr[{i}]": value for i, value in enumerate(_each(max_lr))})
    _within(0.0, 1.0, start_factor=start_factor)
    _within(0.0, 1.0, final_factor=final_factor)
    if not (warmup_fraction < 1.0 and warmup_fraction * total_steps > 1.0):
        raise ValueError(
            f"warmup_fraction is {warmup_fraction}; it must be below 1, and more than one of total_steps={total_steps}."
        )
    least, most = _checked_momenta(momentum_range)
    return partial(
        OneCycleLR,
        max_lr=max_lr,
        total_steps=total_steps,
        pct_start=warmup_fraction,
        anneal_strategy="linear" if linear else "cos",
        div_factor=1 / start_factor,
        final_div_factor=start_factor / final_factor,
        cycle_momentum=momentum_range is not None,
        base_momentum=least,
        max_momentum=most,
    )


@dataclass(frozen=True)
class WarmupCosine:
    """The factor of `warmup_cosine`, from a step to a multiple of each group's lr."""

    warmup_steps: int
    total_steps: int
    start_factor: float
    final_factor: float

    def __call__(self, step: int) -> float:
        """The factor at this step; `final_factor` from `total_steps` on."""
        if step < self.warmup_steps:
            return self.start_factor + (1.0 - self.start_factor) * step / self.warmup_steps
        done = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.final_factor + (1.0 - self.final_factor) * (1.0 + math.cos(math.pi * done)) / 2.0


def warmup_cosine(
    *, warmup_steps: int, total_steps: int, start_factor: float = 0.01, final_factor: float = 0.0
) -> Recipe:
    """A linear ramp to each group's lr, then half a cosine down.

    ```
    lr(t) = lr * (s + (1 - s) * t / W)                                       where t < W
            lr * (f + (1 - f) * (1 + cos(pi * (t - W) / (T - W))) / 2)       where W <= t < T
            lr * f                                                           from T on
    ```

    Args:
        warmup_steps: W, the first step with the full lr; 0: no ramp.
        total_steps: T > W. The last step, T - 1, is one short of the smallest lr.
        start_factor: s, in [0, 1]; at 0 the first step does nothing.
        final_factor: f, in [0, 1].

    Returns:
        From an optimizer to its `torch.optim.lr_scheduler.LambdaLR`; the lr of each group is its peak.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> recipe = warmup_cosine(warmup_steps=100, total_steps=1000, final_factor=0.1)

    The cosine is Loshchilov & Hutter 2016, SGDR, https://arxiv.org/abs/1608.03983, equation 5, without restarts; the
    ramp is Goyal et al. 2017, https://arxiv.org/abs/1706.02677. Closed form at every step, so no error builds up as
    in torch's `SequentialLR` of `LinearLR` and `CosineAnnealingLR`, which after T would also rise again.
    """
    _whole(0, warmup_steps=warmup_steps)
    _whole(warmup_steps + 1, total_steps=total_steps)
    for name, value in (("start_factor", start_factor), ("final_factor", final_factor)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}; it must lie in [0, 1].")
    return partial(LambdaLR, lr_lambda=WarmupCosine(warmup_steps, total_steps, start_factor, final_factor))


def _each(value: PerGroup) -> list[float]:
    return list(value) if isinstance(value, list) else [value]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be > 0 and finite.")


def _whole(least: int, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be an int of at least {least}.")


def _within(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low < value <= high:
            raise ValueError(f"{name} is {value}; it must lie in ({low:g}, {high:g}].")


def _checked_momenta(momentum_range: tuple[float, float] | None) -> tuple[float, float]:
    if momentum_range is None:
        return 0.0, 0.0  # unread: the scheduler is told to leave momentum alone
    low, high = momentum_range
    if not 0.0 <= low <= high < 1.0:
        raise ValueError(f"momentum_range is {momentum_range}; it must be (low, high) with 0 <= low <= high < 1.")
    return low, high
