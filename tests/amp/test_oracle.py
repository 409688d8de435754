"""Every combination of level, scalers, zeroing, overflow and script against apex's semantics in float64.

An overflow is injected at each iteration, in each backward pass and in each parameter. `fuzz` walks the whole product;
else every seventh case runs, in which every two factors meet in all of their values.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest

from mpengine.amp import state
from mpengine.amp.verdicts import Verdicts
from mpengine.labels import Label, Record
from mpengine.loss_scales import LossScales
from mpengine.optimizer import MixedPrecisionOptimizer
from tests.amp.oracle_world import BIG, SIZES, LossScaler, Spoilt, World

LEVELS = ("O0", "O1", "O2", "O3")
ITERATIONS = 3
ZEROING = (("model", True), ("model", False), ("optimizer", True), ("optimizer", False))
# Which nets each backward pass reaches and which optimizers it lists; an int is a step of that optimizer.
PLANS = {
    "two losses": [((0,), (0,)), ((0,), (0,)), 0],
    "three losses": [((0,), (0,)), ((0,), (0,)), ((0,), (0,)), 0],
    "one unlisted": [((0, 1), (0, 1)), ((0, 1), (1,)), 0, 1],
    "adversaries": [((0,), (0,)), ((0,), (0,)), 0, ((0, 1), (1,)), 1],
    "third listed clean": [((0,), (0, 1)), ((1,), (1,)), ((0, 1), (0, 1)), 1, 0],
}
VALUES = (math.inf, math.nan, -math.inf)


@dataclass(frozen=True)
class Case:
    level: str
    shared: bool
    zeroing: tuple[str, bool]
    plan: str
    iteration: int  # of the overflow
    backward: int  # the pass within it
    spoilt: Spoilt
    kind: str
    loss_scale: str | float | None
    together: bool
    near_growth: bool

    def __str__(self) -> str:
        return "-".join(
            str(part)
            for part in (
                self.level,
                "shared" if self.shared else "each",
                *self.zeroing,
                self.plan.replace(" ", "_"),
                f"iteration{self.iteration}",
                f"pass{self.backward}",
                f"net{self.spoilt.optimizer}",
                f"param{self.spoilt.param}",
            )
        )


def passes(plan: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [entry for entry in PLANS[plan] if isinstance(entry, tuple)]


def cases() -> list[Case]:
    """The product; what matters less goes round beside it."""
    found = []
    for level, shared, zeroing, plan in itertools.product(LEVELS, (True, False), ZEROING, PLANS):
        for backward, (reach, _) in enumerate(passes(plan)):
            for iteration, o, i in itertools.product(range(ITERATIONS), reach, range(len(SIZES))):
                n = len(found)
                value = BIG if i == 0 and n % 2 else VALUES[n % 3]
                found.append(
                    Case(
                        level,
                        shared,
                        zeroing,
                        plan,
                        iteration,
                        backward,
                        Spoilt(o, i, value),
                        kind=("sgd", "adam")[n // 2 % 2],
                        loss_scale=(None, None, "dynamic", 1024.0, 2.0**16)[n % 5],
                        together=n % 3 == 0,
                        near_growth=n // 3 % 2 == 1,
                    )
                )
    return found


CASES = cases()
SAMPLE = CASES[::7]


def run(case: Case) -> World:
    """Three iterations of the plan, of which one overflows."""
    optimizers = 2 if any(1 in reach for reach, _ in passes(case.plan)) else 1
    num_losses = 1 if case.shared else len(passes(case.plan))
    kwargs = {} if case.loss_scale is None else {"loss_scale": case.loss_scale}
    world = World(case.level, optimizers, num_losses, case.kind, case.together, **kwargs)
    if case.near_growth and world.scalers[0].dynamic:
        world.set_unskipped(1997)
    for iteration in range(ITERATIONS):
        world.zero(*case.zeroing)
        number = 0
        for entry in PLANS[case.plan]:
            if isinstance(entry, int):
                world.step(entry)
                continue
            hit = (iteration, number) == (case.iteration, case.backward)
            x = (1.0, -2.0, 3.0 - iteration)
            world.backward(
                0 if case.shared else number, *entry, spoilt=case.spoilt if hit else None, x=x, tilt=(1.0, number - 1.0)
            )
            number += 1
    world.check()
    return world


def test_the_sample_covers_every_two_factors():
    def factors(case):
        return (*vars(case).values(), case.spoilt.optimizer, case.spoilt.param, (case.plan, case.backward))

    for one, two in itertools.combinations(range(len(factors(CASES[0]))), 2):
        everything = {(factors(case)[one], factors(case)[two]) for case in CASES}
        sampled = {(factors(case)[one], factors(case)[two]) for case in SAMPLE}
        assert sampled == everything, f"factors {one} and {two}: {everything - sampled}"


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_case(case):
    run(case)


@pytest.mark.fuzz
@pytest.mark.parametrize("level", LEVELS)
def test_every_case(level):
    for case in CASES:
        if case.level == level:
            try:
                run(case)
            except BaseException as error:
                error.add_note(repr(case))
                raise


@pytest.mark.parametrize("level", LEVELS)
def test_a_scale_stays_between_floor_and_ceiling(level):
    world = World(level, kind="plain", loss_scale="dynamic", min_loss_scale=2.0**9, max_loss_scale=2.0**11)
    for spoilt in (*[Spoilt(0, 1)] * 4, None, None, None):
        if spoilt is None:
            world.set_unskipped(1999)
        world.zero()
        world.backward(0, (0,), (0,), spoilt)
        world.step(0)
        assert 2.0**9 <= world.scalers[0].scale <= 2.0**11
    assert (world.scalers[0].scale, world.scalers[0].unskipped) == (2.0**11, 0)


@pytest.mark.parametrize("level", LEVELS)
def test_a_static_scale_counts_on(level):
    world = World(level, kind="plain", loss_scale=256.0)
    world.set_unskipped(1999)
    for spoilt in (None, None, Spoilt(0, 2), None):
        world.zero()
        world.backward(0, (0,), (0,), spoilt)
        world.step(0)
    assert world.scalers[0] == LossScaler(256.0, dynamic=False, unskipped=1)


# Sabotage: what the oracle is for. Each breaks one rule.


def skip_ignored(monkeypatch):
    """Only gradients that are not finite skip a step; what was found on other listed optimizers does not."""
    monkeypatch.setattr(Verdicts, "on", lambda *args: None)


def unlisted_skipped_too(monkeypatch):
    add = Verdicts.add

    def to_everybody(self, optimizers, found_inf, judged):
        add(self, state.latest().optimizers, found_inf, judged)

    monkeypatch.setattr(Verdicts, "add", to_everybody)


def wrong_scaler_backed_off(monkeypatch):
    update = LossScales.update

    def on_the_next(self, consumed, losses):
        before = self.scales.clone(), self.counters.clone()
        update(self, consumed, losses)
        for old, new in zip(before, (self.scales, self.counters), strict=True):
            new.copy_(old + (new - old).roll(1, dims=0))

    monkeypatch.setattr(LossScales, "update", on_the_next)


def unscaled_by_the_new_scale(monkeypatch):
    def without_a_copy(self, loss_id, fresh):
        self.labels[loss_id] = Label(loss_id, self._each[loss_id][0])

    monkeypatch.setattr(LossScales, "_retire", without_a_copy)


def scales_stay(monkeypatch):
    def only_counts(self, consumed, losses):
        for label in (label for k in losses for label in consumed.get(k, [])):
            label.counted = True
        self._votes.zero_()

    monkeypatch.setattr(LossScales, "update", only_counts)


def every_scale_moves(monkeypatch):
    update = LossScales.update

    def on_all(self, consumed, losses):
        before = self.scales.clone()
        update(self, consumed, losses)
        (k,) = losses
        self.scales.copy_(before * (self.scales[k] / before[k]))

    monkeypatch.setattr(LossScales, "update", on_all)


def lr_doubled(monkeypatch):
    numbers = MixedPrecisionOptimizer._numbers

    def doubled(self):
        rows, max_norm = numbers(self)
        return [[2 * row[0], *row[1:]] for row in rows], max_norm

    monkeypatch.setattr(MixedPrecisionOptimizer, "_numbers", doubled)


def step_forgotten(monkeypatch):
    monkeypatch.setattr(MixedPrecisionOptimizer, "step", lambda self: None)


def earlier_passes_lost(monkeypatch):
    """What waits under another label is dropped when the next pass begins."""
    monkeypatch.setattr(Record, "set_aside", lambda self, *args: self.forget_aside())


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "sabotage",
    [
        skip_ignored,
        unlisted_skipped_too,
        wrong_scaler_backed_off,
        unscaled_by_the_new_scale,
        scales_stay,
        every_scale_moves,
        lr_doubled,
        step_forgotten,
        earlier_passes_lost,
    ],
)
def test_sabotage_is_noticed(sabotage, level, monkeypatch):
    """By the second loss, which overflows in the first iteration, and lists the second optimizer alone."""
    case = Case(
        level,
        shared=False,
        zeroing=("model", True),
        plan="one unlisted",
        iteration=0,
        backward=1,
        spoilt=Spoilt(1, 1),
        kind="sgd",
        loss_scale="dynamic",
        together=False,
        near_growth=True,
    )
    if sabotage is skip_ignored:  # the first loss lists both, and one has clean gradients
        case = replace(case, backward=0)
    run(case)
    sabotage(monkeypatch)
    with pytest.raises(AssertionError):
        run(case)
