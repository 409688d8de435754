"""What a compiled kernel does for each parameter, counted in its PTX and its SASS.

- A path is what a thread of a full block executes, from the kernel's entry to its end (`listing` says how it is found).
  Bytes and widths are those of its accesses to element data in the PTX; instructions are those of the same path in the
  SASS, found independently.
- Loops count by their bodies. What the counter adds in the PTX says how many elements an iteration covers; a loop over
  losses runs for two of them. The instructions of a parameter are the whole program's: what stands before and behind
  the loop is shared out over the program's elements.
- Where inspect reads several losses, its loops are nested, and ptxas rearranges them, as it does measure's: bytes are
  counted there, and instructions are not. What inspect reads a second time, for the tallies, is in the cache.
- Instructions in the slow paths of a correctly rounded division or root, which ordinary numbers do not take, are left
  out; the tests that lead there are not. At other branches both sides are followed, and the longer counts.
- Blocks on a multiprocessor are limited by registers, threads, shared memory and their own number. Loads in flight are
  what those blocks have asked for before a thread needs the first of its elements, in the order of the SASS.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks import listing
from benchmarks.gpus import GPUS, MULTIPROCESSORS, WARP

PER_PARAMETER = ("_update_kernel", "_inspect_kernel", "_measure_kernel")  # the others run once a step, or a tensor


@dataclass
class Prediction:
    """Nanoseconds a parameter, by published figures: not measured."""

    gpu: str
    ns: float  # the larger of the next two
    memory_ns: float
    issue_ns: float


@dataclass
class Path:
    """A full block's way through a kernel, for one combination of element types."""

    loads: list[tuple[int, float]]  # (bytes of an access, how many of them a thread makes)
    stores: list[tuple[int, float]]
    bytes_per_parameter: float
    cached_bytes_per_parameter: float  # of these, what is read a second time while it is in the cache
    instructions_per_parameter: float | None = None  # None where they are not counted
    loop_instructions_per_parameter: float | None = None  # of the loop over the elements, where there is one
    bytes_in_flight: int | None = None  # of loads, on a multiprocessor
    predictions: list[Prediction] = field(default_factory=list)


@dataclass
class Row:
    """What one kernel became for one architecture."""

    case: str
    kernel: str
    arch: int
    registers: int
    spilled_bytes: int  # local memory
    shared_bytes: int
    threads: int
    blocks: int  # on a multiprocessor
    blocks_limit: str
    ptx: dict[str, int]  # its instructions, of which a loop's stand once
    paths: list[Path]  # what moves most first; none for a kernel that runs once a step


def count(case: str, arch: int) -> Row:
    """Compiles a case of `aot.cases` for an architecture, and counts."""
    try:
        return _count(case, arch)
    except ValueError as error:
        raise ValueError(f"{case} for sm_{arch} cannot be counted: {error}") from error


def _count(case: str, arch: int) -> Row:
    from benchmarks import aot

    launched = _cases()[case]
    compiled = aot.compile_launch(launched, arch)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    usage = aot.resources(cubin)
    threads = WARP * launched.kwargs["num_warps"]
    blocks, limit = MULTIPROCESSORS[arch].resident(usage["REG"], threads, compiled.metadata.shared)
    row = Row(
        case=case,
        kernel=launched.kernel.__name__,
        arch=arch,
        registers=usage["REG"],
        spilled_bytes=usage["LOCAL"] + usage["STACK"],
        shared_bytes=compiled.metadata.shared,
        threads=threads,
        blocks=blocks,
        blocks_limit=limit,
        ptx=ptx_instructions(ptx),
        paths=[],
    )
    if row.kernel in PER_PARAMETER:
        several = row.kernel == "_inspect_kernel" and launched.kwargs["SOURCES"] > 1
        sass = None if several or row.kernel == "_measure_kernel" else aot.sass(cubin)
        row.paths = full_block_paths(ptx, sass, launched.kwargs["CHUNK"] // threads, row, aot.LOSSES)
    return row


@functools.cache
def _cases() -> dict[str, Any]:
    from benchmarks import aot

    return aot.cases()


def ptx_instructions(ptx: str) -> dict[str, int]:
    """How often each instruction stands in a PTX text."""
    return dict(Counter(re.findall(r"^\s*(?:@!?%\w+ )?([a-z][\w.:]*) ", ptx, re.MULTILINE)))


def full_block_paths(ptx: str, sass: str | None, elements: int, row: Row, losses: int) -> list[Path]:
    """The paths through a kernel.

    Args:
        ptx: Its PTX.
        sass: Its SASS, as nvdisasm lists it; None to count bytes alone.
        elements: How many a thread covers.
        row: What is known of it already.
        losses: How many losses the paths are counted for, where the kernel loops over them.

    Raises:
        ValueError: The two listings contradict each other.
    """
    high, low = listing.read_ptx(ptx), listing.read_sass(sass) if sass else None
    found = []
    for way in listing.full_paths(high):
        loops = high.busy_loops(way)
        trips = _trips(high, loops, elements * row.threads, losses)
        again = {b for loop in loops if _repeats(high, loop, loops) for b in loop.blocks}
        moved: dict[listing.Access, float] = {}
        cached = 0.0
        for b, runs in zip(way, high.runs(way, trips), strict=True):
            for access, n in high.blocks[b].accesses.items():
                moved[access] = moved.get(access, 0) + n * runs
                cached += access.width * n * runs if b in again else 0
        path = Path(
            loads=[(a.width, n) for a, n in sorted(moved.items()) if a.kind == "load"],
            stores=[(a.width, n) for a, n in sorted(moved.items()) if a.kind == "store"],
            bytes_per_parameter=sum(a.width * n for a, n in moved.items()) / elements,
            cached_bytes_per_parameter=cached / elements,
        )
        if low:
            wanted = [(high.within(loop, way), trips[loop.head]) for loop in loops]
            _count_instructions(path, low, high.accesses(way), wanted, elements, row)
        found.append(path)
    return sorted(found, key=lambda path: -path.bytes_per_parameter)


def _count_instructions(
    path: Path,
    sass: listing.Program,
    accesses: Counter[listing.Access],
    loops: list[tuple[Counter[listing.Access], float]],
    elements: int,
    row: Row,
) -> None:
    """Adds to a path what its SASS says. `loops` are the accesses and the trips of each."""
    way = listing.same_path(sass, accesses, [part for part, _ in loops])
    twins = sass.busy_loops(way)
    trips = {twin.head: runs for twin, (_, runs) in zip(twins, loops, strict=True)}
    looping = {b for twin in twins for b in twin.blocks}
    counts = [len(sass.blocks[b].instructions) * runs for b, runs in zip(way, sass.runs(way, trips), strict=True)]
    path.instructions_per_parameter = sum(counts) / elements
    if loops:
        looped = sum(n for b, n in zip(way, counts, strict=True) if b in looping)
        path.loop_instructions_per_parameter = looped / elements
    path.bytes_in_flight = sass.loads_in_flight(way) * row.threads * row.blocks
    for gpu in GPUS:
        if gpu.arch == row.arch:
            memory = gpu.memory_ns(path.bytes_per_parameter - path.cached_bytes_per_parameter)
            issue = gpu.issue_ns(path.instructions_per_parameter)
            path.predictions.append(Prediction(gpu.name, max(memory, issue), memory, issue))


def _trips(ptx: listing.Program, loops: list[listing.Loop], chunk: int, losses: int) -> dict[int, float]:
    """How often the loops of a path run, by their first blocks: for the program's elements, or for the losses."""
    trips: dict[int, float] = {}
    for loop in loops:
        if ptx.step(loop) > 1:
            trips[loop.head] = chunk / ptx.step(loop)
        else:
            trips[loop.head] = losses if _repeats(ptx, loop, loops) else losses - 1  # the first stands before the loop
    return trips


def _repeats(ptx: listing.Program, loop: listing.Loop, loops: list[listing.Loop]) -> bool:
    """Whether a loop over losses has one over elements in it: inspect's tallies, behind its first reading."""
    return ptx.step(loop) <= 1 and any(inner.blocks < loop.blocks for inner in loops)
