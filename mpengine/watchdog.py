"""Notices that a loss scale has collapsed, without ever waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpengine.kernels import layout
from mpengine.report import LossReport


class LossScaleCollapse(RuntimeError):
    """A loss has overflowed so many times in a row that its scale will not recover by itself.

    Attributes:
        loss_id: The loss.
        scale: Its scale when this was noticed.
        skips: How many times in a row it has overflowed.
        parameters: Names of the parameters whose gradients overflowed last.
        report: All that is known about the loss; None where nobody asked.
    """

    def __init__(
        self, loss_id: int, scale: float, skips: int, parameters: Sequence[str], report: LossReport | None = None
    ) -> None:
        self.loss_id, self.scale, self.skips, self.parameters = loss_id, scale, skips, list(parameters)
        self.report = report
        shown = ", ".join(self.parameters[:8]) or "unknown"
        more = f" and {len(self.parameters) - 8} more" if len(self.parameters) > 8 else ""
        super().__init__(
            f"loss {loss_id} has overflowed {skips} times in a row; its scale is down to {scale:g} and every step is "
            f"skipped. The gradients of these parameters are not finite: {shown}{more}. Look for an inf or NaN in that "
            "loss or in those layers (a smaller learning rate, max_grad_norm, keep_fp32 for layers whose weights or "
            "activations outgrew fp16); "
            "GradScaler(max_consecutive_skips=...) sets the limit, None turns this check off."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.loss_id, self.scale, self.skips, self.parameters, self.report)


class Watchdog:
    """Raises `LossScaleCollapse` after `limit` overflows in a row of one loss and at each that follows; None: never.

    On a CPU it looks at once. On CUDA every few updates (a tenth of the limit) start a copy of the counters into pinned
    memory, which is judged once it has arrived, so it notices a few updates late.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._looks = 0
        self._told: dict[int, int] = {}  # how often a loss had overflowed when that was last raised
        self.forget()

    def forget(self) -> None:
        """Drops a copy that is under way."""
        self._arrived: torch.cuda.Event | None = None
        self._host: Tensor | None = None

    def look(self, counters: Tensor, report_of: Callable[[int], LossReport]) -> None:
        """Judges int32[L, layout.COUNTERS]; `report_of(loss_id)` is called only to raise."""
        if self.limit is None:
            return
        if counters.device.type != "cuda":
            self._judge(counters, report_of)
            return
        self._looks += 1
        if self._looks % max(1, self.limit // 10) or torch.cuda.is_current_stream_capturing():
            return
        if self._arrived is not None:
            if not self._arrived.query():
                return
            assert self._host is not None
            self._judge(self._host, report_of)
        if self._host is None:
            self._host = torch.empty(counters.shape, dtype=counters.dtype, pin_memory=True)
        self._host.copy_(counters, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(counters.device))

    def _judge(self, counters: Tensor, report_of: Callable[[int], LossReport]) -> None:
        assert self.limit is not None
        for loss_id, row in enumerate(counters.tolist()):
            skips, overflows = row[layout.CONSECUTIVE_OVERFLOWS], row[layout.OVERFLOWS]
            if skips >= self.limit and self._told.get(loss_id) != overflows:
                self.forget()
                self._told[loss_id] = overflows
                report = report_of(loss_id)
                raise LossScaleCollapse(loss_id, report.scale, skips, list(report.overflowed), report)

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.limit = state["limit"]
        self._looks = 0
        self._told = {}
        self.forget()
