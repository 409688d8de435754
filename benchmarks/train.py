"""Training end to end: `python -m benchmarks.train` counts iterations a second and peak memory.

DCGAN with three losses, a ResNet-50 and GPT-2 124M; FP32 with and without TF32, torch.amp with fused Adam, mpengine,
and mpengine captured in one CUDA graph (`mpengine.graphs`). Batches are synthetic and lie on the device. The claim to
beat: mixed precision runs DCGAN twice as fast as FP32.

On a CPU only tiny models run, to see that the program does: nothing is claimed of speed there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import devices, facts
from benchmarks.measure.devices import Device
from benchmarks.measure.results import MEASURED, SMOKE, Document
from benchmarks.measure.statistics import spread
from benchmarks.training.engines import ENGINES, Tf32
from benchmarks.training.workloads import WORKLOADS, Workload

WARMUPS = 8  # the captured engine captures at its fourth call
BATCHES = 4  # used in turn
MIN_BLOCKS, MAX_BLOCKS = 5, 40
CLAIM = "The claim to beat: mixed precision runs DCGAN twice as fast as FP32."

NOT_AVAILABLE, FAILED, DONE = "not available", "failed", "measured"


class Missing(RuntimeError):
    """An engine cannot run here; the message says what is missing."""


def graphs() -> Any:
    """The module `mpengine.graphs`.

    Raises:
        Missing: There is none.
    """
    try:
        return importlib.import_module("mpengine.graphs")
    except ModuleNotFoundError as error:
        raise Missing(f"captured: not available ({error})") from error


class Training:
    """One engine on one workload, ready to iterate."""

    def __init__(self, workload: Workload, engine: str, device: Device) -> None:
        kind = ENGINES[engine]
        if kind.captured and device.kind != "cuda":
            raise Missing("captured: not available without a GPU")
        capture = graphs().GraphedIteration if kind.captured else None
        torch.manual_seed(0)
        networks = workload.build(device.torch_device)
        self.engine = kind(networks, workload.optimizer, workload.losses, device.torch_device.type)
        self.device = device
        self.batches = [workload.batch(device.torch_device) for _ in range(BATCHES)]
        self._iterate: Callable[..., Any] = partial(workload.iterate, self.engine, networks)
        if capture is not None:
            self._iterate = capture(self._iterate, optimizers=self.engine.optimizers)
        self._turn = 0

    def iterations(self, count: int) -> Any:
        """Runs some; returns the last losses."""
        losses = None
        for _ in range(count):
            losses = self._iterate(*self.batches[self._turn % BATCHES])
            self._turn += 1
        return losses

    def measure(self, seconds: float) -> dict[str, Any]:
        """Milliseconds an iteration, over blocks that each take at least a fifth of a second."""
        device = self.device
        self.iterations(3)
        device.synchronize()
        device.reset_peak()  # from here on: what was tried while libraries chose their algorithms does not count
        self.iterations(WARMUPS - 3)
        each = device.alone(lambda: self.iterations(2))[0] / 2
        count = max(1, min(200, round(min(0.2, seconds / MIN_BLOCKS) * 1e3 / max(each, 1e-3))))
        end = time.perf_counter() + seconds
        blocks: list[float] = []
        while len(blocks) < MIN_BLOCKS or (time.perf_counter() < end and len(blocks) < MAX_BLOCKS):
            blocks.append(device.alone(lambda: self.iterations(count))[0] / count)
        losses = [float(loss) for loss in self.iterations(1)]
        took = spread(blocks)
        return {
            "ms": took.row(),
            "iterations_per_second": 1e3 / took.median,
            "peak_bytes": device.peak(),
            "losses": losses,
            "skipped": [getattr(optimizer, "steps_skipped", None) for optimizer in self.engine.optimizers],
        }


@contextlib.contextmanager
def precision(tf32: bool, device: Device) -> Iterator[None]:
    """TF32 in matrix products and convolutions, or not; cuDNN chooses its fastest algorithms meanwhile."""
    if device.kind != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        # Not by fp32_precision of convolutions alone: torch refuses to say what holds where its parts differ.
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = tf32, tf32, True
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def run_one(name: str, engine: str, device: Device, seconds: float) -> dict[str, Any]:
    """One row of the results; an engine that raises gives its error."""
    workload = WORKLOADS[name]
    row: dict[str, Any] = {"workload": name, "title": workload.title, "engine": engine, "status": DONE, "reason": ""}
    try:
        with precision(ENGINES[engine].tf32, device):
            row |= Training(workload, engine, device).measure(seconds)
    except Missing as error:
        row |= {"status": NOT_AVAILABLE, "reason": str(error)}
    except Exception as error:  # the others go on
        row |= {"status": FAILED, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        device.release()
    return row


def order(names: Sequence[str], engines: Sequence[str]) -> list[tuple[str, str]]:
    """Workload by workload, the engines of each in random order; but captured ones last, before them all others.

    A capture that fails may leave a stream that nothing else can run on.
    """
    pairs = [(name, engine) for name in names for engine in random.Random(name).sample(engines, len(engines))]
    return sorted(pairs, key=lambda pair: ENGINES[pair[1]].captured)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, writes the result file, prints the table; 1 where an engine failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--engines", nargs="+", choices=ENGINES)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, an engine and a workload")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds in all")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder of the result file")
    chosen = parser.parse_args(arguments)
    devices.check_arguments(parser, chosen)
    smoke = chosen.device == "cpu"
    names = chosen.workloads or [name for name, workload in WORKLOADS.items() if workload.smoke == smoke]
    document = Document(
        "train",
        SMOKE if smoke or all(WORKLOADS[name].smoke for name in names) else MEASURED,
        facts.machine(chosen.device),
        settings={"seconds": chosen.seconds, "warmups": WARMUPS, "batches": BATCHES},
    )
    engines = chosen.engines or [e for e, kind in ENGINES.items() if not smoke or kind is not Tf32]
    path = chosen.out / document.name()
    device = devices.of(chosen.device)
    start = time.perf_counter()
    for name, engine in order(names, engines):
        if time.perf_counter() - start > chosen.budget:
            document.notes.append(f"{WORKLOADS[name].title}, {engine}: not measured, out of time")
            continue
        document.rows.append(run_one(name, engine, device, chosen.seconds))
        document.write(path)

    from benchmarks.tables import train_table  # here: what was measured is on disk by now

    print(train_table(document))
    print(f"\n{CLAIM}\n{path}")
    return 1 if any(row["status"] == FAILED for row in document.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
