"""The loss scale's state machine: a policy of numbers, a state, and the pure transition between states.

`next_state` is the specification. The kernel `kernels.scale` is the same function on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from mpengine.kernels import layout

FLOAT32_MAX = float(np.finfo(np.float32).max)
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: its reciprocal, 2^126, is finite


@dataclass(frozen=True)
class ScalePolicy:
    """How a dynamic loss scale moves.

    Attributes:
        growth_factor: What the scale is multiplied by after `growth_interval` clean updates in a row; > 1.
        backoff_factor: What it is multiplied by after an overflow; in (0, 1).
        growth_interval: Clean updates in a row before it grows; >= 1.
        min_scale: The scale never falls below this; a normal float32 > 0.
        max_scale: A growth beyond this is not taken.
        hysteresis: Overflows in a row that it takes to back off; a clean update starts the count again. 1 is
            `torch.amp.GradScaler`'s rule.
    """

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = SMALLEST_SCALE
    max_scale: float = FLOAT32_MAX
    hysteresis: int = 1

    def __post_init__(self) -> None:
        for name, kind in (("growth_interval", int), ("hysteresis", int)):
            _check_number(name, getattr(self, name), kind)
        for name in ("growth_factor", "backoff_factor", "min_scale", "max_scale"):
            _check_number(name, getattr(self, name), float)
        if not (self.growth_factor > 1.0 and math.isfinite(self.growth_factor)):
            raise ValueError(
                f"growth_factor is {self.growth_factor}; it must be finite and > 1 (2.0 is usual). For a scale "
                "that never moves, give init_scale, min_scale and max_scale the same value."
            )
        if not 0.0 < self.backoff_factor < 1.0:
            raise ValueError(f"backoff_factor is {self.backoff_factor}; it must lie in (0, 1) (0.5 is usual).")
        if self.growth_interval < 1:
            raise ValueError(f"growth_interval is {self.growth_interval}; it must be at least 1 (2000 is usual).")
        if not SMALLEST_SCALE <= self.min_scale <= FLOAT32_MAX:
            raise ValueError(f"min_scale is {self.min_scale}; it must lie in [2**-126, {FLOAT32_MAX:g}].")
        if not self.min_scale <= self.max_scale <= FLOAT32_MAX:
            raise ValueError(
                f"max_scale is {self.max_scale}; it must lie between min_scale ({self.min_scale:g}) and "
                f"{FLOAT32_MAX:g}."
            )
        if self.hysteresis < 1:
            raise ValueError(f"hysteresis is {self.hysteresis}; it must be at least 1 (1 backs off at once).")

    @classmethod
    def from_row(cls, row: list[float]) -> ScalePolicy:
        """The policy that `row` describes."""
        growth_factor, backoff_factor, growth_interval, min_scale, max_scale, hysteresis = row
        return cls(growth_factor, backoff_factor, int(growth_interval), min_scale, max_scale, int(hysteresis))

    def row(self) -> list[float]:
        """The policy as the float64 row that the device reads."""
        return [
            self.growth_factor,
            self.backoff_factor,
            float(self.growth_interval),
            self.min_scale,
            self.max_scale,
            float(self.hysteresis),
        ]


def _check_number(name: str, value: object, kind: type) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer) if kind is int else (int, float, np.number)):
        raise ValueError(f"{name} is {value!r}; it must be {'an int' if kind is int else 'a number'}.")


@dataclass(frozen=True)
class ScaleState:
    """The state of one loss's scale. `scale` is a float32 value; the counters are int32 on the device."""

    scale: float
    growth_tracker: int = 0  # clean updates since the last change
    hysteresis_left: int = 1  # overflows left before a back-off
    overflows: int = 0  # updates that saw an overflow, ever
    growths: int = 0  # growths taken, ever
    consecutive_overflows: int = 0
    updates: int = 0  # updates that had a vote on this loss, ever
    last_overflow: int = 0  # the number of the update that last saw an overflow; 0: none did

    def counters(self) -> list[int]:
        """The counters in the order of `layout.COUNTERS`."""
        return [
            self.growth_tracker,
            self.hysteresis_left,
            self.overflows,
            self.growths,
            self.consecutive_overflows,
            self.updates,
            self.last_overflow,
        ]


@dataclass(frozen=True)
class Vote:
    """What one optimizer found in the gradients of one loss.

    Attributes:
        outcome: `layout.CLEAN`, `OVERFLOW`, `STALE_OVERFLOW` (an overflow under a scale that an `update()` has
            already dealt with) or `NO_VOTE`. Clean gradients under such a scale do not vote: each backward pass
            counts once.
        scale: For `STALE_OVERFLOW`: the scale that overflowed.
    """

    outcome: int
    scale: float = 0.0


def next_state(state: ScaleState, votes: list[Vote], policy: ScalePolicy) -> ScaleState:
    """The state after one `update()`.

    ```
    overflow = any fresh overflow, or an overflow under a scale no larger than today's
    overflow:  hysteresis_left -= 1; tracker = 0
               if hysteresis_left <= 0: scale = max(min_scale, float32(float64(scale) * backoff_factor))
    clean:     hysteresis_left = hysteresis; tracker += 1
               if tracker == growth_interval: tracker = 0
                   grown = float32(float64(scale) * growth_factor); scale = grown if finite and <= max_scale
    no vote:   the state stays as it is
    ```

    The rule is `torch.amp.GradScaler`'s (`_amp_update_scale_`), to which it is equal bit for bit with
    `hysteresis=1` until `min_scale` or `max_scale` is reached.
    """
    overflow = any(
        vote.outcome == layout.OVERFLOW or (vote.outcome == layout.STALE_OVERFLOW and vote.scale <= state.scale)
        for vote in votes
    )
    if overflow:
        left = max(state.hysteresis_left - 1, 0)
        scale = state.scale
        if left == 0:
            scale = max(_float32(policy.min_scale), _float32(scale * policy.backoff_factor))
        return replace(
            state,
            scale=scale,
            growth_tracker=0,
            hysteresis_left=left,
            overflows=state.overflows + 1,
            consecutive_overflows=state.consecutive_overflows + 1,
            updates=state.updates + 1,
            last_overflow=state.updates + 1,
        )
    if not any(vote.outcome == layout.CLEAN for vote in votes):
        return state
    scale, tracker, growths = state.scale, state.growth_tracker + 1, state.growths
    if tracker == policy.growth_interval:
        tracker = 0
        grown = _float32(scale * policy.growth_factor)
        if grown <= policy.max_scale:  # inf is not
            scale, growths = grown, growths + 1
    return replace(
        state,
        scale=scale,
        growth_tracker=tracker,
        hysteresis_left=policy.hysteresis,
        growths=growths,
        consecutive_overflows=0,
        updates=state.updates + 1,
    )


def _float32(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(value))
