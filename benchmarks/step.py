"""The optimizer step alone: `python -m benchmarks.step` times mpengine's beside torch.amp's and other libraries'.

For every set of tensors and every engine: time, GB/s by the bytes that its algorithm must move and as a fraction of a
copy measured in the same run, launches, host time, host syncs, memory. Every repetition gets fresh gradients from a
backward pass; caches are displaced before it. Rounds go through the engines in random order, each building them anew.

    ms          from an idle device to the end of the step: what one step costs by itself, the host's part included
    queued_ms   the same behind other work, so that the host has run ahead: the device's part

Without a GPU it runs on the CPU, with the fields that a CPU has.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import devices, facts
from benchmarks.measure.devices import Device
from benchmarks.measure.results import MEASURED, SMOKE, Document
from benchmarks.measure.statistics import ratio, spread
from benchmarks.optimizers import peers, shapes
from benchmarks.optimizers.engines import Engine, Spec
from benchmarks.optimizers.gradients import SETS, Gradients
from benchmarks.optimizers.peers import ENGINES
from benchmarks.optimizers.shapes import SHAPES, ShapeSet

WARMUPS = 4
MIN_REPEATS, MAX_REPEATS = 5, 200
_SPARE = 2**30  # bytes left free beside an engine
_AHEAD = 2.5  # queued work, in multiples of the host's own time
_TIMING_SHARE = 0.85  # of the budget; the rest is for counting launches

NOT_INSTALLED, SKIPPED, FAILED, DONE = "not installed", "skipped", "failed", "measured"


@dataclass
class Samples:
    """What was measured of one engine on one set of tensors, over all rounds."""

    alone: list[float] = field(default_factory=list)  # ms
    queued: list[float] = field(default_factory=list)  # ms
    host: list[float] = field(default_factory=list)  # us
    rounds: list[float] = field(default_factory=list)  # median of each, ms
    counts: dict[str, Any] = field(default_factory=dict)
    launches: dict[str, float] | None = None


class Bench:
    """An engine ready to step: its parameters, state and gradients."""

    def __init__(self, spec: Spec, chosen: ShapeSet, device: Device) -> None:
        self.device, self.name = device, f"{chosen.title}, {spec.name}"
        before = device.allocated()
        self.engine: Engine = spec.make(chosen.shapes, device.torch_device)
        self.gradients = Gradients(self.engine.params)
        self._turn = 0
        for _ in range(WARMUPS):  # compiles, makes state and tables
            self.prepare()
            self.engine.step()
        self.engine.zero_grad()
        device.synchronize()
        after = device.allocated()
        self.held = None if before is None or after is None else after - before - self.gradients.nbytes

    def prepare(self) -> None:
        """Brings fresh gradients and displaces the caches; not timed."""
        self.engine.zero_grad()
        self.gradients.draw(self._turn)
        self.gradients.bring(self._turn, self.engine.scale)
        self._turn += 1
        self.device.flush()
        self.device.synchronize()

    def once(self, measure: Callable[[Callable[[], None]], Any]) -> Any:
        """One measurement of one step."""
        self.prepare()
        return measure(self.engine.step)

    def repeat(self, seconds: float, measure: Callable[[Callable[[], None]], Any]) -> list[Any]:
        """Measurements for this long, within the least and the most repetitions."""
        end = time.perf_counter() + seconds
        found: list[Any] = []
        while len(found) < MIN_REPEATS or (time.perf_counter() < end and len(found) < MAX_REPEATS):
            found.append(self.once(measure))
        return found


def time_round(bench: Bench, samples: Samples, seconds: float) -> None:
    """Adds one round of timings."""
    device = bench.device
    alone = bench.repeat(seconds / 2, device.alone)
    samples.alone += [ms for ms, _ in alone]
    samples.rounds.append(spread([ms for ms, _ in alone]).median)
    host = [us for _, us in alone if us is not None]
    samples.host += host
    if host:
        ahead = _AHEAD * spread(host).high + 100.0
        samples.queued += [ms for ms in bench.repeat(seconds / 2, lambda run: device.queued(run, ahead)) if ms]


def count(bench: Bench) -> dict[str, Any]:
    """What one step needs beside time; None where the device cannot tell."""
    device = bench.device
    return {
        "syncs": bench.once(device.syncs),
        "transient_bytes": bench.once(device.transient),
        "held_bytes": bench.held,
    }


class Benchmark:
    """All engines on all sets of tensors.

    Args:
        document: Gets the rows; `save` writes it after every engine.
        device: What it runs on.
        sets: Names of `SHAPES`.
        engines: Names of `specs`.
        seconds: Of timing, for one engine and set in one round.
        budget: Seconds in all; what is not reached then is named as not measured.
        specs: The engines by name.
        save: Called when the document has changed.
    """

    def __init__(
        self,
        document: Document,
        device: Device,
        sets: Sequence[str],
        engines: Sequence[str],
        seconds: float,
        budget: float,
        specs: dict[str, Spec] | None = None,
        save: Callable[[], Any] = lambda: None,
    ) -> None:
        self.document, self.device, self.seconds, self.save = document, device, seconds, save
        self.specs = ENGINES if specs is None else specs
        self.pairs = [(name, engine) for name in sets for engine in engines]
        self.samples = {pair: Samples() for pair in self.pairs}
        self.outcome: dict[tuple[str, str], tuple[str, str]] = {}
        self.start, self.budget = time.perf_counter(), budget
        self.copies: list[float] = []

    def run(self, rounds: int, seed: int = 0) -> None:
        """Copies, rounds of timing, counts, copies again."""
        order = random.Random(seed)
        self.copies += self.device.copy_gbs()
        for _ in range(rounds):
            for name in dict.fromkeys(name for name, _ in self.pairs):
                here = [pair for pair in self.pairs if pair[0] == name]
                order.shuffle(here)
                for pair in here:
                    self._visit(pair, self._time, _TIMING_SHARE)
                self.publish()
        for pair in self.pairs:  # last: the profiler slows what is launched after it
            if pair in self.samples and self.outcome.get(pair, ("", ""))[0] == DONE:
                self._visit(pair, self._profile, 1.0)
        self.copies += self.device.copy_gbs()
        self.publish()

    def _visit(self, pair: tuple[str, str], work: Callable[[Bench, Samples], None], share: float) -> None:
        """Builds one engine and works on it; whatever it raises becomes its outcome."""
        spec, chosen = self.specs[pair[1]], SHAPES[pair[0]]
        if self.outcome.get(pair, (DONE, ""))[0] != DONE:
            return
        if time.perf_counter() - self.start > share * self.budget:
            if pair not in self.outcome:
                self.document.notes.append(f"{chosen.title}, {spec.name}: not measured, out of time")
            return
        if spec.package is not None and facts.version_of(spec.package) is None:
            self.outcome[pair] = NOT_INSTALLED, spec.package
            return
        self.device.release()
        needed = needs(spec, chosen)
        if needed > self.device.free_bytes():
            gib = needed / 2**30
            self.outcome[pair] = SKIPPED, f"needs {gib:.0f} GiB of {self.device.free_bytes() / 2**30:.0f} GiB free"
            return
        try:
            torch.manual_seed(0)
            work(Bench(spec, chosen, self.device), self.samples[pair])
            self.outcome[pair] = DONE, ""
        except Exception as error:  # a peer that fails is a result, and the others go on
            self.outcome[pair] = FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finally:
            self.device.release()

    def _time(self, bench: Bench, samples: Samples) -> None:
        time_round(bench, samples, self.seconds)
        if not samples.counts:
            samples.counts = count(bench)

    def _profile(self, bench: Bench, samples: Samples) -> None:
        try:
            samples.launches = bench.once(self.device.launches)
        except Exception as error:  # the timings stand without it
            self.document.notes.append(f"{bench.name}: launches not counted ({type(error).__name__}: {error})")

    def publish(self) -> None:
        """Writes the rows as they are known now."""
        copy = spread(self.copies).median
        self.document.settings["copy_gbs"] = spread(self.copies).row()
        self.document.rows[:] = [self.row(pair, copy) for pair in self.pairs if pair in self.outcome]
        self.save()

    def row(self, pair: tuple[str, str], copy: float) -> dict[str, Any]:
        """One row of the results."""
        spec, chosen, samples = self.specs[pair[1]], SHAPES[pair[0]], self.samples[pair]
        status, reason = self.outcome[pair]
        row: dict[str, Any] = {
            "set": pair[0],
            "title": chosen.title,
            "parameters": chosen.numel,
            "tensors": len(chosen.shapes),
            "engine": spec.name,
            "status": status,
            "reason": reason,
            "version": spec.package and facts.version_of(spec.package),
            "weights": spec.weights,
            "state": spec.state,
            "full_state": spec.full_state,
            "checks": spec.checks,
            "clips": spec.clips,
            "lacks": spec.lacks,
            "step_bytes": spec.step_bytes(chosen.shapes),
        }
        if not samples.alone:
            return row
        queued = spread(samples.queued) if samples.queued else None
        best = queued or spread(samples.alone)
        gbs = row["step_bytes"] / best.median / 1e6
        return row | {
            "ms": spread(samples.alone).row(),
            "queued_ms": queued and queued.row(),
            "rounds_ms": samples.rounds,
            "gbs": gbs,
            # On a CPU a copy is no ceiling: it reads the lines that it overwrites too, an update in place does not.
            "of_copy": ratio(gbs, copy) if self.device.kind == "cuda" else None,
            "host_us": spread(samples.host).row() if samples.host else None,
            "launches": samples.launches,
            **samples.counts,
        }


def needs(spec: Spec, chosen: ShapeSet) -> float:
    """Bytes of memory that an engine takes on a set, its gradients' sets and the spare included."""
    return chosen.numel * (spec.held + spec.scratch + SETS * spec.gradient) + min(_SPARE, 64 * chosen.numel + 2**20)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes the result file, prints the table; 1 where an engine of mpengine or torch.amp failed."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: those meant for the device")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all that run on the device")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, an engine, a set and a round")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds in all")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the result file")
    chosen = parser.parse_args(arguments)
    devices.check_arguments(parser, chosen)
    if chosen.rounds < 1 or (chosen.threads is not None and chosen.threads < 1):
        parser.error("--rounds and --threads must be at least 1")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    sets = chosen.shapes or shapes.for_device(chosen.device)
    engines = chosen.engines or peers.for_device(chosen.device)
    document = Document(
        "step",
        SMOKE if sets == ["smoke"] else MEASURED,
        facts.machine(chosen.device),
        settings={"rounds": chosen.rounds, "seconds": chosen.seconds, "warmups": WARMUPS, "gradient_sets": SETS},
    )
    path = chosen.out / document.name()
    device = devices.of(chosen.device)
    save = partial(document.write, path)
    Benchmark(document, device, sets, engines, chosen.seconds, chosen.budget, save=save).run(chosen.rounds)

    from benchmarks.tables import step_table  # here: what was measured is on disk by now

    print(step_table(document))
    print(f"\n{path}")
    failed = [row for row in document.rows if row["status"] == FAILED and row["version"] is None]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
