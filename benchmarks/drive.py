"""`make gpu` and `make bench`: every test and measurement that this machine can run, one command, tables last.

    python -m benchmarks.drive gpu --out DIR [--wheels DIR]    under nine minutes, no network
    python -m benchmarks.drive bench --out DIR

Stages run one after another, each within its own time. One that fails, or is stopped, does not stop the others, is
named in the last table and makes the exit status 1; what is not installed is said to be so. The interpreter is the one
that runs this, with the checkout on PYTHONPATH; nothing is installed into it. What WHEELS holds and it lacks goes into
a temporary folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.measure import facts
from benchmarks.measure.results import MEASURED, PREDICTION, Document, ResultError, read_all, rows_of
from benchmarks.stages import NOT_AVAILABLE, NOT_INSTALLED, Outcome, Stage, run_all

GPU_SECONDS = 510.0  # of the nine minutes that a run may take
BENCH_SECONDS = 3600.0
_SANITIZED = ["tests/kernels/test_update.py", "tests/kernels/test_inspect.py", "tests/kernels/test_scale.py"]
_SELECTION = "odd_sizes or many_programs or misaligned_views or accept_skip_accept or growth_stops"
_TAIL = 15  # lines of a failed stage's log that are shown


def installed(module: str) -> bool:
    """Whether a stage could import it."""
    return importlib.util.find_spec(module) is not None


def gpu_stages(out: Path) -> Iterator[Stage]:
    """Tests, step, training, and compute-sanitizer over a small selection of the kernels' tests."""
    no_gpu = (NOT_AVAILABLE, "no CUDA device")
    cuda = torch.cuda.is_available()
    yield Stage("GPU tests", pytest_command(gpu_tests()) if cuda and installed("pytest") else None, 190, _why(cuda))
    step = module("step", "--device", "cuda", "--out", out, "--budget", 125, "--rounds", 2, "--seconds", 0.8)
    yield Stage("step", step if cuda else None, 150, no_gpu)
    train = module("train", "--device", "cuda", "--out", out, "--budget", 85, "--seconds", 1.5)
    yield Stage("train", train if cuda else None, 110, no_gpu)
    sanitizer = find_sanitizer()
    absent = no_gpu if not cuda else (NOT_INSTALLED, "compute-sanitizer") if sanitizer is None else _why(cuda)
    for tool in ("memcheck", "racecheck"):
        command = None
        if cuda and sanitizer and installed("pytest"):
            options = ["--tool", tool, "--error-exitcode", "1"]
            options += ["--report-api-errors", "no"] if tool == "memcheck" else []
            command = [sanitizer, *options, *pytest_command(_SANITIZED, "-x", "-k", _SELECTION, parallel=False)]
        # Without torch's pool every tensor has an allocation of its own, whose end memcheck sees.
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        yield Stage(tool, command, 50, absent, ("Device not supported",), env=env)


def _why(cuda: bool) -> tuple[str, str]:
    return (NOT_INSTALLED, "pytest") if cuda else (NOT_AVAILABLE, "no CUDA device")


def bench_stages(out: Path) -> Iterator[Stage]:
    """Predictions and host time without a GPU, the CPU's step, and with a GPU the step and training on it."""
    for name in ("static", "host"):
        exists = installed(f"benchmarks.{name}")
        command = module(name, "--json") if exists else None
        yield Stage(name, command, 600, (NOT_AVAILABLE, f"no benchmarks.{name}"), stdout=out / f"{name}.raw")
    yield Stage("step on the CPU", module("step", "--device", "cpu", "--out", out, "--budget", 600), 900)
    cuda, absent = torch.cuda.is_available(), (NOT_AVAILABLE, "no CUDA device")
    for name in ("step", "train"):
        command = module(name, "--device", "cuda", "--out", out) if cuda else None
        yield Stage(f"{name} on the GPU", command, 900, absent)


def module(name: str, *arguments: object) -> list[str]:
    """The command line of a benchmark."""
    return [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]


def gpu_tests() -> list[str]:
    """The test files that hold GPU tests; those of the kernels are all marked where there is a GPU."""
    tests = facts.ROOT / "tests"
    marked = [
        path for path in tests.rglob("test_*.py") if path.parent.name != "kernels" and "mark.gpu" in path.read_text()
    ]
    return ["tests/kernels", *sorted(str(path.relative_to(facts.ROOT)) for path in marked)]


def pytest_command(paths: Sequence[str], *options: str, parallel: bool = True) -> list[str]:
    """Runs pytest over the GPU tests in these paths.

    Plugins that happen to be installed stay out, but for xdist; warnings of other versions of libraries are shown, not
    raised; files that need a missing package are left out.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not fuzz", "-W", "default", "--durations=5"]
    command += ["-p", "no:cacheprovider"]
    if parallel and installed("xdist"):
        command += ["-p", "xdist.plugin", "-n", str(min(8, os.cpu_count() or 1))]
    if not installed("hypothesis"):
        tests = (facts.ROOT / "tests").rglob("test_*.py")
        command += [f"--ignore={path.relative_to(facts.ROOT)}" for path in tests if "hypothesis" in path.read_text()]
    return [*command, *options, *paths]


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH or beside CUDA."""
    places = [shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer"]
    return next((place for place in places if place and Path(place).is_file()), None)


def install(wheels: Path | None, folder: Path, log: Path) -> Iterator[Outcome]:
    """Puts the wheels of what is not installed yet into a folder, each for itself: a bad one spoils no other."""
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        name = wheel.name.split("-")[0]
        if facts.version_of(name) is not None:
            continue
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        yield from run_all([Stage(f"wheel {name}", [*command, "--target", str(folder), str(wheel)], 60)], log, 60)


def wrap(out: Path, kind: str, origin: str) -> None:
    """Makes a document of what a program printed as JSON; says so where it printed something else."""
    raw = out / f"{kind}.raw"
    if not raw.is_file():
        return
    try:
        rows = rows_of(json.loads(raw.read_text(encoding="utf-8")))
    except ValueError:
        rows = None
    raw.unlink()
    if rows is None:
        print(f"{kind}: printed no JSON with rows; the report is without it")
        return
    document = Document(kind, origin, facts.machine("cpu"), rows)
    document.write(out / document.name())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages, writes the report, prints its tables; 1 where a stage failed or was stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gpu", "bench"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wheels", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.wheels is not None and not chosen.wheels.is_dir():
        parser.error(f"--wheels {chosen.wheels} is no folder")
    return drive(chosen.what, chosen.out.resolve(), chosen.wheels and chosen.wheels.resolve())


def drive(what: str, out: Path, wheels: Path | None = None, stages: Sequence[Stage] | None = None) -> int:
    """See `main`; `stages` replaces those of the command."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{what}.log"
    log.write_text("", encoding="utf-8")
    device = "cuda" if what == "gpu" and torch.cuda.is_available() else "cpu"
    document = Document("stages", MEASURED, facts.machine(device), settings={"command": what})
    path = out / document.name()
    total = GPU_SECONDS if what == "gpu" else BENCH_SECONDS
    with tempfile.TemporaryDirectory() as site:
        _use(Path(site))
        for outcome in install(wheels, Path(site), log):
            _note(document, outcome, path, log)
        importlib.invalidate_caches()
        chosen = stages if stages is not None else list((gpu_stages if what == "gpu" else bench_stages)(out))
        for outcome in run_all(chosen, log, total):
            _note(document, outcome, path, log)
    for kind, origin in (("static", PREDICTION), ("host", MEASURED)):
        wrap(out, kind, origin)
    status = _finish(document, out, path)
    if what == "gpu" and stages is None and not torch.cuda.is_available():
        print(f"FAILED: torch {torch.__version__} finds no CUDA device, and nothing could be measured.")
        return 1
    return status


def _use(site: Path) -> None:
    """Lets this program and the stages import the checkout and what was installed from WHEELS."""
    paths = [str(facts.ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["PYTHONUNBUFFERED"] = "1"
    sys.path.append(str(site))
    os.chdir(facts.ROOT)


def _note(document: Document, outcome: Outcome, path: Path, log: Path) -> None:
    document.rows.append(outcome.row())
    document.write(path)
    print(f"{outcome.stage}: {outcome.status}, {outcome.seconds:.0f} s. {outcome.summary}", flush=True)
    if outcome.bad:
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]), flush=True)


def _finish(document: Document, out: Path, path: Path) -> int:
    """The report's tables, and the stages last."""
    from benchmarks import report

    try:
        print(report.printed(read_all(out)))
    except (ResultError, KeyError, ValueError) as error:
        document.rows.append(Outcome("report", "failed", 0.0, f"{type(error).__name__}: {error}").row())
        document.write(path)
    from benchmarks.tables import provenance, stage_table

    bad = [row["stage"] for row in document.rows if row["status"] in ("failed", "timed out")]
    print(f"\n{provenance(document)}\n\n{stage_table(document)}\n")
    if bad:
        print(f"FAILED: {', '.join(bad)}")
    elif any(row["status"] == "passed" for row in document.rows):
        print("No stage failed.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
