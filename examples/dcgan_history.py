"""What a run leaves behind for the table and the plots, gathered without stopping the device every iteration."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

METRICS = ("Loss_D", "Loss_G", "D(x)", "D(G(z)) before", "D(G(z)) after")  # before and after D's step
AVERAGED_ITERATIONS = 100  # the figures in the table are means over the last 100 iterations


class LapTimer:
    """Seconds of each iteration: the clock on a CPU, events on a CUDA device (nothing waits until `drain`)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._laps: list[tuple[Any, Any]] = []
        self.restart()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def restart(self) -> None:
        """Begins a lap here; what came since the last one (pictures, a checkpoint) is not counted."""
        self._last = self._now()

    def lap(self) -> None:
        """Ends a lap and begins the next."""
        now = self._now()
        self._laps.append((self._last, now))
        self._last = now

    def drain(self) -> list[float]:
        """The laps since the last drain, in seconds; waits for the device."""
        laps, self._laps = self._laps, []
        if not self._cuda:
            return [end - begin for begin, end in laps]
        if laps:
            laps[-1][1].synchronize()
        return [begin.elapsed_time(end) / 1000.0 for begin, end in laps]


class History:
    """Metrics of every iteration, and the scales with their overflow counts.

    `metrics` may lie on the device until `flush`; `scale_rows` holds [iteration, scales..., overflow counts...].
    """

    def __init__(self, scales: list[float]) -> None:
        self._pending: list[Tensor] = []
        self.metrics = torch.empty(0, len(METRICS))  # FP32, a row for each iteration
        self.seconds: list[float] = []
        self.scale_rows: list[list[float]] = [[0.0, *scales, *[0.0] * len(scales)]]

    def add(self, metrics: Tensor) -> None:
        """Keeps one iteration's metrics: FP32, shape (5,), on any device."""
        self._pending.append(metrics)

    def flush(self) -> None:
        """Brings the pending metrics to the CPU in one copy; waits for the device."""
        if self._pending:
            self.metrics = torch.cat([self.metrics, torch.stack(self._pending).cpu()])
            self._pending.clear()

    def add_scales(self, iteration: int, scales: list[float], overflows: list[int] | None) -> None:
        """Keeps the scales after an iteration; where no one counted overflows, each halving of a scale was one."""
        if not scales:
            return
        counts = len(scales)
        before, counted = self.scale_rows[-1][1 : 1 + counts], self.scale_rows[-1][1 + counts :]
        if overflows is None:
            falls = [max(0, round(math.log2(old / new))) for old, new in zip(before, scales, strict=True)]
            overflows = [int(old) + fall for old, fall in zip(counted, falls, strict=True)]
        self.scale_rows.append([float(iteration), *scales, *map(float, overflows)])

    def final(self) -> dict[str, float]:
        """The mean of each metric over the last iterations."""
        means = self.metrics[-AVERAGED_ITERATIONS:].double().mean(dim=0).tolist()
        return dict(zip(METRICS, means, strict=True))

    def overflow_iterations(self, scale: int) -> list[tuple[float, float]]:
        """Where one scale overflowed: (iteration, the scale that was too large)."""
        count = 1 + (len(self.scale_rows[0]) - 1) // 2 + scale
        pairs = zip(self.scale_rows[:-1], self.scale_rows[1:], strict=True)
        return [(new[0], old[1 + scale]) for old, new in pairs if new[count] > old[count]]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and lists that torch.load(weights_only=True) reads."""
        self.flush()
        return {"metrics": self.metrics, "seconds": self.seconds, "scale_rows": self.scale_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self._pending.clear()
        self.metrics = state["metrics"]
        self.seconds = list(state["seconds"])
        self.scale_rows = [list(row) for row in state["scale_rows"]]
