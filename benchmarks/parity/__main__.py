"""`python -m benchmarks.parity` writes docs/parity.md and its pictures, and exits with 1 where a row fails."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.parity import page, plots
from benchmarks.parity.run import Result, run_all
from benchmarks.parity.tasks import TASKS
from benchmarks.parity.verdict import checks

LOSS_NAMES = {1: ("the loss",), 3: ("D on real", "D on fake", "G")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(TASKS), choices=list(TASKS), help="which of them")
    parser.add_argument("--steps", type=int, default=300, help="iterations of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and batches")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="processes, one thread each; 0: none but this",
    )
    parser.add_argument("--page", type=Path, default=Path("docs/parity.md"), help="pictures go beside it, into parity/")
    parser.add_argument("--raw", type=Path, default=Path("out/parity"), help="folder for all numbers, as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps is {args.steps}; give at least 1")
    if args.workers < 0:
        parser.error(f"--workers is {args.workers}; give 0 or more")
    start = time.monotonic()
    results: dict[str, list[Result]] = {name: [] for name in args.models}
    args.raw.mkdir(parents=True, exist_ok=True)
    for result in run_all(args.models, args.seeds, args.steps, args.workers):
        results[result.task].append(result)
        raw = args.raw / f"{result.task}-{result.seed}.json"
        raw.write_text(json.dumps(asdict(result)), encoding="utf-8")
        print(f"{time.monotonic() - start:6.0f} s  {TASKS[result.task].title}, seed {result.seed}", flush=True)
    for its in results.values():
        its.sort(key=lambda result: args.seeds.index(result.seed))
    seconds = time.monotonic() - start

    folder = args.page.parent / "parity"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, its in results.items():
        task = TASKS[name]
        plots.save(its[0], task.curves, LOSS_NAMES[task.num_losses], folder / f"{name}.png")
        pictures[name] = f"parity/{name}.png"
    args.page.write_text(page.render(results, pictures, args.steps, seconds), encoding="utf-8")

    failed = 0
    for name, its in results.items():
        for check in checks(its):
            failed += not check.passed
            verdict = "pass" if check.passed else "FAIL"
            print(f"{verdict}  {TASKS[name].title}, {check.what}: {check.found} (wanted: {check.wanted})")
    print(f"{args.page} is written; numbers: {args.raw}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
