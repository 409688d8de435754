"""A loss scale's rule in plain Python, written from torch.amp's documentation: the tests' second opinion."""

import math
import struct
from dataclasses import dataclass, field

CLEAN, OVERFLOW = "clean", "overflow"


def float32(value: float) -> float:
    """The nearest float32; inf beyond the largest."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


@dataclass
class ScaleModel:
    """One loss: the scale goes down at every overflow, up after every `interval` clean updates in a row."""

    scale: float = 65536.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    floor: float = 2.0**-126
    ceiling: float = float32(3.4028234663852886e38)
    patience: int = 1
    tracker: int = 0
    strikes: int = 0  # overflows since the last clean update
    streak: int = 0  # the same, but `new_scale` and loads may differ
    history: list[str] = field(default_factory=list)

    def see(self, event: str) -> None:
        """One update at which the loss was clean, or overflowed."""
        self.history.append(event)
        if event == OVERFLOW:
            self.tracker = 0
            self.strikes += 1
            self.streak += 1
            if self.strikes >= self.patience:
                self.scale = max(float32(self.floor), float32(self.scale * self.backoff))
            return
        self.strikes = self.streak = 0
        self.tracker += 1
        if self.tracker == self.interval:
            self.tracker = 0
            grown = float32(self.scale * self.growth)
            if math.isfinite(grown) and grown <= self.ceiling:
                self.scale = grown

    @property
    def overflows(self) -> int:
        return self.history.count(OVERFLOW)
