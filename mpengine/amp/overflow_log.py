"""Tells the log about overflows, in apex's words, without ever waiting for the device."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from mpengine.kernels import layout

logger = logging.getLogger("mpengine.amp")


class OverflowLog:
    """Logs each overflow once, with the scale that follows. On CUDA when a copy of the numbers has arrived: later.

    Args:
        enabled: False: it does nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._told: list[int] = []  # overflows of each loss so far
        self._scales: list[float] = []
        self._host: tuple[Tensor, Tensor] | None = None
        self._arrived: torch.cuda.Event | None = None

    def look(self, scales: Tensor, counters: Tensor) -> None:
        """Looks at float32[L] and int32[L, layout.COUNTERS] after scales may have moved."""
        if not self.enabled or not logger.isEnabledFor(logging.INFO):
            return
        if scales.device.type != "cuda":
            self._tell(scales.tolist(), counters[:, layout.OVERFLOWS].tolist())
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self._arrived is not None:
            if not self._arrived.query():
                return
            assert self._host is not None
            self._tell(self._host[0].tolist(), self._host[1][:, layout.OVERFLOWS].tolist())
        if self._host is None:
            self._host = (
                torch.empty_like(scales, device="cpu").pin_memory(),
                counters.new_empty(counters.shape, device="cpu").pin_memory(),
            )
        self._host[0].copy_(scales, non_blocking=True)
        self._host[1].copy_(counters, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(scales.device))

    def begin(self, scales: Sequence[float], overflows: Sequence[int]) -> None:
        """These are known: what comes is logged."""
        self._scales, self._told, self._arrived = list(scales), list(overflows), None

    def _tell(self, scales: list[float], overflows: list[int]) -> None:
        before = self._scales or scales
        for loss_id, (count, known) in enumerate(zip(overflows, self._told or [0] * len(overflows), strict=True)):
            if count > known:
                moved = "reducing loss scale to" if scales[loss_id] < before[loss_id] else "keeping loss scale at"
                logger.info("Gradient overflow.  Skipping step, loss scaler %d %s %s", loss_id, moved, scales[loss_id])
        self._scales, self._told = scales, overflows
