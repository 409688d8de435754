"""What is compared, and when a row passes. The limits stand here; nothing in a run moves them but its own spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.parity.engines import AMP, FP32, MPENGINE, NUDGED, NUDGED_AGAIN
from benchmarks.parity.run import Record, Result

MAX_ULP_A_STEP = 4.0
# The median of three ratios scatters 0.67 times as much as one; six samples of one give its scatter only roughly:
# Student's t, six degrees of freedom, 99% on one side, is 3.14. 0.67 * 3.14 = 2.1.
SPREADS = 2.1


@dataclass(frozen=True)
class Check:
    """One comparison of one model."""

    what: str
    found: str
    wanted: str
    passed: bool


def differences(a: Record, b: Record) -> list[float]:
    """How far two runs' losses are apart: every loss of every iteration."""
    pairs = zip(a.curves, b.curves, strict=True)
    return [abs(x - y) for ours, theirs in pairs for x, y in zip(ours, theirs, strict=True)]


def distance(a: Record, b: Record) -> float:
    """The median of the differences; NaN where one of them is not finite."""
    values = differences(a, b)
    return median(values) if all(map(math.isfinite, values)) else math.nan


def first_difference(a: Record, b: Record) -> float:
    """The largest difference in the first iteration, in which the weights are the same."""
    return max(abs(x - y) for x, y in zip(a.curves[0], b.curves[0], strict=True))


def ratio(result: Result, engine: str) -> float:
    """How far an engine is from FP32, in units of how far torch.amp is; 1.0 where both are FP32 exactly."""
    reference = result.planned[FP32]
    ours, theirs = distance(result.planned[engine], reference), distance(result.planned[AMP], reference)
    if theirs == 0.0:
        return 1.0 if ours == 0.0 else math.nan if math.isnan(ours) else math.inf
    return ours / theirs


def limit(results: Sequence[Result]) -> float:
    """The largest median ratio that rounding alone explains: `exp(SPREADS * s)`, at least 1.

    `s` is the root mean square, over the seeds and two runs of each, of the logarithm of torch.amp's ratio to itself
    where a few weights are rounded otherwise after each step.
    """
    ratios = [ratio(result, name) for result in results for name in (NUDGED, NUDGED_AGAIN)]
    if not all(0.0 < value < math.inf for value in ratios):
        return 1.0
    return math.exp(SPREADS * math.sqrt(sum(math.log(value) ** 2 for value in ratios) / len(ratios)))


def parts_at(a: Record, b: Record) -> int | None:
    """The first iteration in which two histories differ; None: never."""
    pairs = enumerate(zip(a.history, b.history, strict=True))
    return next((iteration for iteration, (ours, theirs) in pairs if ours != theirs), None)


def same_history(a: Record, b: Record) -> bool:
    """Whether every scale and every skip is the same, and some step was skipped: else nothing was compared."""
    return parts_at(a, b) is None and any(map(any, a.skipped))


def _all_of(values: Sequence[bool]) -> str:
    return f"identical in {sum(values)} of {len(values)}"


def checks(results: Sequence[Result]) -> list[Check]:
    """The comparisons of one model, over its seeds."""
    races = [result.race for result in results]
    fed = [race.same_history and race.skipped > 0 for race in races]
    ulp = max(race.ulp_a_step for race in races)
    rounded = all(race.rounded for race in races)
    own = [same_history(result.planned[MPENGINE], result.planned[AMP]) for result in results]
    middle, bound = median(ratio(result, MPENGINE) for result in results), limit(results)
    every = f"{len(results)} of {len(results)}"
    return [
        Check("same gradients: scale history", _all_of(fed), every, all(fed)),
        Check(
            "same gradients: weights",
            f"{ulp:.3f} ULP a step" + ("" if rounded else ", fp16 weights are not the masters"),
            f"at most {MAX_ULP_A_STEP:g}",
            ulp <= MAX_ULP_A_STEP and rounded,
        ),
        Check("own gradients: scale history", _all_of(own), every, all(own)),
        Check("own gradients: distance ratio", f"{middle:.2f}", f"at most {bound:.2f}", middle <= bound),
    ]
