"""What `GradScaler.report()` says about each loss: where its scale stands, and what its gradients look like in fp16."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mpengine.scaling import ScaleState
from mpengine.tally import Tally


@dataclass(frozen=True)
class LossReport:
    """One loss.

    Attributes:
        loss_id: The loss.
        scale: Its scale.
        growths: How often the scale has grown.
        overflows: How many backward passes have overflowed.
        steps_since_overflow: Updates of this loss since the last of them; None: none has.
        overflowed: Names of the parameters whose gradients were inf or NaN in the last overflow, and how many of
            their elements were (0: not counted), the worst first. With several optimizers each name says which, in the
            order in which the scaler met them.
        underflow: The fraction of gradient elements that are zero or subnormal in their type (below 2^-14 in fp16,
            where precision is lost), in the last step that had gradients of this loss; NaN where none was counted.
        largest: The largest unscaled magnitude of a gradient element then; inf where one overflowed, NaN as above.
    """

    loss_id: int
    scale: float
    growths: int
    overflows: int
    steps_since_overflow: int | None
    overflowed: Mapping[str, int] = field(default_factory=dict)
    underflow: float = math.nan
    largest: float = math.nan

    def __str__(self) -> str:
        since = "never" if self.steps_since_overflow is None else f"{self.steps_since_overflow} updates ago"
        counts = f"{self.growths} growths, {self.overflows} overflows, last {since}"
        lines = [f"loss {self.loss_id}: scale {self.scale:g}, {counts}"]
        if not math.isnan(self.underflow):
            lines.append(f"  gradients: {self.underflow:.1%} zero or subnormal, largest {self.largest:.3g} unscaled")
        if self.overflowed:
            shown = [f"{name} ({count})" if count else name for name, count in list(self.overflowed.items())[:8]]
            more = f" and {len(self.overflowed) - 8} more" if len(self.overflowed) > 8 else ""
            lines.append(f"  inf or NaN (elements): {', '.join(shown)}{more}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """All losses of a scaler, by loss_id. Prints as a few lines a loss."""

    losses: tuple[LossReport, ...]

    def __getitem__(self, loss_id: int) -> LossReport:
        return self.losses[loss_id]

    def __iter__(self) -> Iterator[LossReport]:
        return iter(self.losses)

    def __len__(self) -> int:
        return len(self.losses)

    def __str__(self) -> str:
        return "\n".join(map(str, self.losses))


def loss_report(loss_id: int, state: ScaleState, tallies: Iterable[tuple[Tally, Mapping[str, int]]]) -> LossReport:
    """One loss's report.

    Args:
        loss_id: The loss.
        state: Of its scale.
        tallies: For each optimizer what it counted, and the overflowed elements by name.
    """
    found = list(tallies)
    elements = sum(tally.elements for tally, _ in found)
    small = sum(tally.small for tally, _ in found)
    largest = [tally.largest for tally, _ in found if not math.isnan(tally.largest)]
    ages = [tally.age for tally, names in found if names]
    latest = {name: n for tally, names in found if names and tally.age == min(ages) for name, n in names.items()}
    return LossReport(
        loss_id,
        state.scale,
        state.growths,
        state.overflows,
        state.updates - state.last_overflow if state.overflows else None,
        dict(sorted(latest.items(), key=lambda item: -item[1])),
        small / elements if elements else math.nan,
        max(largest, default=math.nan),
    )
