"""Runs every engine on every model and seed, and records losses, scales and skipped steps."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.parity.engines import ALL_HALF, AMP, FP32, FP32_ALL, MPENGINE, NUDGED, NUDGED_AGAIN, PER_LOSS
from benchmarks.parity.race import Finish, Race
from benchmarks.parity.tasks import TASKS, Task


@dataclass(frozen=True)
class Regime:
    """How the scale moves.

    Args:
        init_scale: What it starts from.
        growth_interval: Steps without an overflow until it doubles.
        planned: Whether two losses in every 40 iterations are made to overflow.
    """

    init_scale: float
    growth_interval: int
    planned: bool

    @property
    def options(self) -> dict[str, Any]:
        """For a GradScaler."""
        return {"init_scale": self.init_scale, "growth_interval": self.growth_interval}

    def outliers(self, iteration: int, num_losses: int) -> set[int]:
        """The losses that overflow in an iteration: the first one, and in the next iteration the last one."""
        if not self.planned:
            return set()
        return {5: {0}, 6: {num_losses - 1}}.get(iteration % 40, set())


# Two overflows and two growths in every 40 iterations, between 2^12 and 2^14: below what the gradients allow, and well
# above the scale (2^10 for the GPT) from which on gradients underflow so much that it shows.
PLANNED = Regime(2.0**14, 15, planned=True)
# Far too large at first; then it grows until a gradient overflows, again and again.
FREE = Regime(2.0**24, 50, planned=False)


@dataclass
class Record:
    """What one engine did, iteration by iteration."""

    curves: list[list[float]] = field(default_factory=list)  # [iteration][loss]
    scales: list[list[float]] = field(default_factory=list)  # [iteration][scale], in force in that iteration
    skipped: list[list[bool]] = field(default_factory=list)  # [iteration][network]

    @property
    def history(self) -> list[tuple[list[float], list[bool]]]:
        """Scales and skips: what two engines are to have in common."""
        return list(zip(self.scales, self.skipped, strict=True))


@dataclass
class Result:
    """All runs of one model from one seed."""

    task: str
    seed: int
    planned: dict[str, Record]  # by engine
    free: dict[str, Record]
    race: Finish


def train(
    task: Task,
    name: str,
    seed: int,
    steps: int,
    regime: Regime,
    *,
    race: Race | None = None,
    like: Record | None = None,
) -> Record:
    """Trains with one engine.

    Args:
        task: The model.
        name: The engine.
        seed: Of weights and batches.
        steps: How many iterations.
        regime: How the scale moves.
        race: Is given the gradients.
        like: Whose skipped steps FP32 leaves out.
    """
    engine = task.engine(name, seed, **regime.options)
    if like is not None:
        engine.left_out = like.skipped
    if race is not None:
        engine.watch(race)
    record = Record()
    before = engine.steps_taken()
    for iteration, batch in enumerate(task.batches(seed, steps)):
        engine.outliers = regime.outliers(iteration, task.num_losses)
        record.scales.append(engine.scales())
        record.curves.append([float(loss) for loss in task.iterate(engine, batch)])
        after = engine.steps_taken()
        record.skipped.append([old == new for old, new in zip(before, after, strict=True)])
        before = after
    return record


def run_one(name: str, seed: int, steps: int) -> Result:
    """Everything about one model from one seed."""
    torch.set_num_threads(1)
    task = TASKS[name]
    race = Race(task, seed, **FREE.options)
    free = {AMP: train(task, AMP, seed, steps, FREE, race=race)}
    free |= {engine: train(task, engine, seed, steps, FREE) for engine in (NUDGED, MPENGINE)}
    engines = [AMP, NUDGED, NUDGED_AGAIN, MPENGINE, FP32_ALL]
    engines += [PER_LOSS] * (task.num_losses > 1) + [ALL_HALF] * bool(task.keep_fp32)
    planned = {engine: train(task, engine, seed, steps, PLANNED) for engine in engines}
    planned[FP32] = train(task, FP32, seed, steps, PLANNED, like=planned[AMP])
    return Result(name, seed, planned, free, race.finish())


def run_all(names: Sequence[str], seeds: Sequence[int], steps: int, workers: int) -> Iterator[Result]:
    """Every model from every seed, as they finish.

    Args:
        names: Of `TASKS`.
        seeds: Of weights and batches.
        steps: Iterations of each run.
        workers: Processes, each with one thread; 0: this one.
    """
    jobs = [(name, seed, steps) for name in names for seed in seeds]
    if workers == 0:
        yield from (run_one(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_one, *job) for job in jobs]):
            yield future.result()
