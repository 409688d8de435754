"""Made-up results, in the form that the benchmarks write, and a device that claims to be a GPU."""

from __future__ import annotations

from benchmarks.measure.devices import Cpu
from benchmarks.measure.results import SYNTHETIC, Document
from benchmarks.optimizers.peers import ENGINES, for_device
from benchmarks.optimizers.shapes import SHAPES
from benchmarks.optimizers.shapes import for_device as sets_for
from benchmarks.step import DONE, NOT_INSTALLED, Benchmark, Samples
from benchmarks.train import NOT_AVAILABLE
from benchmarks.training.engines import ENGINES as TRAINERS
from benchmarks.training.workloads import WORKLOADS

MACHINE = {
    "date": "2001-01-01",
    "commit": "0" * 12,
    "device": "cuda",
    "hardware": "Imaginary GPU",
    "driver": "1.0",
    "cuda": "99.0",
    "torch": "0.0",
    "triton": "0.0",
    "python": "3.11",
}
CPU_MACHINE = {**MACHINE, "device": "cpu", "hardware": "Imaginary CPU", "threads": 2, "cores": 2}
COPY = 3000.0  # GB/s


class Pretend(Cpu):
    """Runs on the CPU, and gives every answer that a GPU gives."""

    kind = "cuda"
    log: tuple[str, ...] = ()

    def _said(self, what: str) -> None:
        self.log = (*self.log, what)

    def synchronize(self):
        self._said("synchronize")

    def alone(self, run):
        self._said("alone")
        return super().alone(run)[0], 100.0

    def queued(self, run, ahead_us):
        self._said(f"queued behind {ahead_us:.0f} us")
        return super().alone(run)[0] / 2

    def launches(self, run):
        self._said("launches")
        run()
        return {"kernels": 4, "copies": 1, "memsets": 0, "kernel_ms": 0.1}

    def syncs(self, run):
        self._said("syncs")
        run()
        return 0

    def transient(self, run):
        self._said("transient")
        run()
        return 2048

    def allocated(self):
        return 0 if "alone" in self.log else 1000 * len(self.log)

    def peak(self):
        return 12345


def step_document(device: str = "cuda", origin: str = SYNTHETIC) -> Document:
    """All sets and engines; time by bytes and tensors, peers not installed but for one."""
    document = Document("step", origin, MACHINE if device == "cuda" else CPU_MACHINE)
    world = Benchmark(
        document, Pretend() if device == "cuda" else Cpu(), sets_for(device), for_device(device), 0.0, 0.0
    )
    world.copies = [COPY * 0.99, COPY, COPY * 1.01]
    for pair in world.pairs:
        spec, chosen = ENGINES[pair[1]], SHAPES[pair[0]]
        if spec.package not in (None, "flashoptim"):
            world.outcome[pair] = NOT_INSTALLED, spec.package
            continue
        ms = spec.step_bytes(chosen.shapes) / COPY / 1e6
        alone = [ms * noise + 0.05 + 2e-3 * len(chosen.shapes) * (spec.full_state or 2) for noise in (1.0, 1.05, 1.1)]
        gpu = device == "cuda"
        world.samples[pair] = Samples(
            alone,
            [ms * 1.02, ms * 1.04] if gpu else [],
            [110.0, 120.0] if gpu else [],
            [alone[1], alone[2]],
            {"syncs": 0, "transient_bytes": 1000, "held_bytes": int(spec.held * chosen.numel)} if gpu else {},
            {"kernels": 4, "copies": 1, "memsets": 0, "kernel_ms": ms} if gpu else None,
        )
        world.outcome[pair] = DONE, ""
    world.publish()
    return document


def train_document(origin: str = SYNTHETIC) -> Document:
    """All workloads and engines; the captured one is missing from the last."""
    document = Document("train", origin, MACHINE)
    for i, (name, workload) in enumerate((n, w) for n, w in WORKLOADS.items() if not w.smoke):
        for j, engine in enumerate(TRAINERS):
            row = {"workload": name, "title": workload.title, "engine": engine, "status": "measured", "reason": ""}
            ms = (i + 1) * 20.0 / (j + 1)
            if i == 3 and j == 4:
                row |= {"status": NOT_AVAILABLE, "reason": "captured: not available"}
            else:
                row |= {"ms": {"median": ms, "low": 0.97 * ms, "high": 1.02 * ms, "count": 9}}
                row |= {"iterations_per_second": 1e3 / ms, "peak_bytes": 2**31, "losses": [1.0], "skipped": [0]}
            document.rows.append(row)
    return document
