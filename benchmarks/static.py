"""What the kernels became for every architecture, counted without a GPU; and the bounds that counting can prove.

    python -m benchmarks.static                          # a table, and predictions
    python -m benchmarks.static --arch 90 --case adam    # of some kernels, for some architectures
    python -m benchmarks.static --json                   # {"rows": [counts.Row, ...], "broken": ["...", ...]}
    python -m benchmarks.static --check                  # exits with 1 where a bound is broken, and names it

`counts` says how it is counted, `gpus` what a prediction is worth.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context

from benchmarks.counts import PER_PARAMETER, Row, count
from benchmarks.gpus import MULTIPROCESSORS

ARCHITECTURES = tuple(MULTIPROCESSORS)
WIDTHS = {8, 16}  # bytes of a full block's access
ADAMW, INSPECT = "adam", "inspect"  # the cases of fp16
BYTES = {ADAMW: 28, INSPECT: 2}
ADAMW_INSTRUCTIONS = 150
BYTES_IN_FLIGHT = 48 * 1024
# Instructions of PTX that round otherwise than the reference, or that ptxas may contract to one that does: it leaves
# alone only those that say how they round.
_INEXACT = re.compile(r"\.ftz|\.approx|^fma\.|^mad\.f|^div\.full|^rcp|^rsqrt|^ex2|^(add|sub|mul)\.f(32|64)")


def broken(rows: Iterable[Row]) -> list[str]:
    """The bounds that some row breaks, each with the row and its value."""
    found = []
    for row in rows:
        name = f"{row.case}, sm_{row.arch}"
        if row.spilled_bytes:
            found.append(f"{name}: spills {row.spilled_bytes} bytes; none may spill")
        inexact = sorted(i for i in row.ptx if _INEXACT.search(i))
        if inexact:
            found.append(f"{name}: arithmetic is not IEEE's: {', '.join(inexact)}")
        if row.kernel in PER_PARAMETER:
            found += [f"{name}: {what}" for what in _broken_paths(row)]
    return found


def _broken_paths(row: Row) -> list[str]:
    found = []
    if not row.paths:
        return ["no path for full blocks: every access to elements is masked"]
    widths = {width for path in row.paths for width, _ in path.loads + path.stores}
    if widths - WIDTHS:
        found.append(f"accesses of {_listed(widths - WIDTHS)} bytes in full blocks; only 8 and 16 are wide")
    first = row.paths[0]
    if row.case in BYTES and first.bytes_per_parameter != BYTES[row.case]:
        found.append(f"{first.bytes_per_parameter:g} bytes a parameter, not {BYTES[row.case]}")
    if row.kernel == "_update_kernel" and row.shared_bytes:
        found.append(f"{row.shared_bytes} bytes of shared memory: the layout changes between accesses; none may")
    if row.case == ADAMW and row.arch == 90:
        if (first.instructions_per_parameter or math.inf) > ADAMW_INSTRUCTIONS:
            found.append(f"{first.instructions_per_parameter:.1f} instructions a parameter, over {ADAMW_INSTRUCTIONS}")
        if (first.bytes_in_flight or 0) < BYTES_IN_FLIGHT:
            found.append(f"{first.bytes_in_flight} bytes of loads in flight a multiprocessor, under {BYTES_IN_FLIGHT}")
    return found


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def table(rows: Sequence[Row]) -> str:
    """The rows for a reader, and the predictions."""
    lines = [
        "B: bytes a parameter in full blocks; instr: SASS instructions a parameter of the whole program (in its loop);",
        "blocks: on a multiprocessor (limited by); flight: KB of loads in flight there.",
        "Of several paths (other element types, nothing written back) the one that moves most; --json has all.",
        "",
        f"{'case':33} {'arch':6} {'B':>4} {'reads':12} {'writes':12} {'regs':>4} {'spilled':>7} {'shared':>6}  "
        f"{'blocks':15} {'instr':>13} {'flight':>6}",
    ]
    for row in rows:
        line = f"{row.case:33} sm_{row.arch:<3}"
        middle = f"{row.registers:4} {row.spilled_bytes:7} {row.shared_bytes:6}  "
        middle += f"{f'{row.blocks} ({row.blocks_limit})':15}"
        lines += [f"{line} {'-':>4} {'-':12} {'-':12} {middle}"] if not row.paths else []
        for path in row.paths[:1]:
            counted = "-" if path.instructions_per_parameter is None else f"{path.instructions_per_parameter:.1f}"
            if path.loop_instructions_per_parameter is not None:
                counted += f" ({path.loop_instructions_per_parameter:.1f})"
            flight = "-" if path.bytes_in_flight is None else f"{path.bytes_in_flight / 1024:.0f}"
            lines.append(
                f"{line} {path.bytes_per_parameter:4g} {_moves(path.loads):12} {_moves(path.stores):12} {middle} "
                f"{counted:>13} {flight:>6}"
            )
    lines += ["", "PREDICTIONS, ns a parameter (= ms for 10^6 parameters), by published figures: nothing was measured"]
    lines += [f"{'case':33} {'GPU':10} {'prediction':>10} {'memory':>8} {'issue':>8}"]
    for row in rows:
        for path in row.paths[:1]:
            for p in path.predictions:
                lines.append(f"{row.case:33} {p.gpu:10} {p.ns:10.5f} {p.memory_ns:8.5f} {p.issue_ns:8.5f}")
    return "\n".join(lines)


def _moves(accesses: list[tuple[int, float]]) -> str:
    return "+".join(f"{n:g}x{width}" for width, n in accesses) or "-"


def rows_of(cases: Sequence[str], architectures: Sequence[int], workers: int) -> list[Row]:
    """Counts every case for every architecture, in so many processes."""
    jobs = [(case, arch) for case in cases for arch in architectures]
    if workers <= 1:
        return [count(*job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(count, *zip(*jobs, strict=True), chunksize=4))


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--case", nargs="+", help="default: all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    from benchmarks import aot  # needs Triton

    cases = list(aot.cases())
    if unknown := sorted(set(args.case or ()) - set(cases)):
        parser.error(f"--case {', '.join(unknown)}; there are {', '.join(cases)}")
    rows = rows_of(args.case or cases, args.arch, args.workers)
    failures = broken(rows)
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "broken": failures}))
    elif not args.check:
        print(table(rows))
    if args.check:
        for failure in failures:
            print(f"BROKEN  {failure}", file=sys.stderr)
        print(f"{len(rows)} kernels counted, {len(failures)} bounds broken", file=sys.stderr)
    return 1 if args.check and failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
