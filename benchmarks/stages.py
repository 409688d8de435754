"""Runs programs one after another, each within its own time; one that fails or is stopped does not stop the others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
NOT_INSTALLED, NOT_AVAILABLE = "not installed", "not available"
_BAD = (FAILED, TIMED_OUT)
_GRACE = 10.0  # seconds between asking a program to stop and making it


@dataclass(frozen=True)
class Stage:
    """One program.

    Args:
        name: In the table.
        command: None: it cannot run here, for the reason in `absent`.
        seconds: It may take.
        absent: `NOT_INSTALLED` or `NOT_AVAILABLE`, and why.
        excuses: Texts in the output that make a failure "not available": the machine cannot do it.
        stdout: Where its standard output goes, instead of the log.
        env: Added to the environment.
    """

    name: str
    command: Sequence[str] | None
    seconds: float
    absent: tuple[str, str] = (NOT_AVAILABLE, "")
    excuses: tuple[str, ...] = ()
    stdout: Path | None = None
    env: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    stage: str
    status: str
    seconds: float
    summary: str  # its last words

    @property
    def bad(self) -> bool:
        """Whether it makes the run fail."""
        return self.status in _BAD

    def row(self) -> dict[str, Any]:
        """As it stands in a result file."""
        return asdict(self)


def run(stage: Stage, log: Path, seconds: float) -> Outcome:
    """Runs one stage; its output is added to the log.

    Args:
        stage: What to run.
        log: Grows by a heading and the output.
        seconds: At most this long.
    """
    if stage.command is None:
        return Outcome(stage.name, stage.absent[0], 0.0, stage.absent[1])
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {stage.name}: {' '.join(map(str, stage.command))}\n")
    begin = log.stat().st_size
    with log.open("ab") as file, (stage.stdout or Path(os.devnull)).open("wb") as data:
        process = subprocess.Popen(
            [str(part) for part in stage.command],
            stdin=subprocess.DEVNULL,
            stdout=data if stage.stdout else file,
            stderr=file,
            env={**os.environ, **(stage.env or {})},
            start_new_session=True,  # so that its children end with it
        )
        try:
            code: int | None = process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    took = time.monotonic() - start
    with log.open("rb") as file:
        file.seek(begin)
        output = file.read().decode("utf-8", errors="replace")
    words = last_words(output)
    if code is None:
        return Outcome(stage.name, TIMED_OUT, took, f"stopped after {took:.0f} s; {words}")
    if code == 0:
        return Outcome(stage.name, PASSED, took, words)
    excuse = next((text for text in stage.excuses if text in output), None)
    if excuse is not None:
        return Outcome(stage.name, NOT_AVAILABLE, took, excuse)
    return Outcome(stage.name, FAILED, took, f"exit status {code}; {words}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a program and what it started."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
        if kind == signal.SIGTERM and _group_is_gone(process.pid):
            break


def _group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def last_words(output: str, limit: int = 110) -> str:
    """The last line that says something, shortened."""
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =-")]
    return lines[-1][:limit] if lines else ""


def run_all(stages: Iterable[Stage], log: Path, total: float) -> Iterable[Outcome]:
    """Runs stages as they come, each within its own time and what is left of the total."""
    end = time.monotonic() + total
    for stage in stages:
        left = end - time.monotonic()
        if stage.command is not None and left < 1.0:
            yield Outcome(stage.name, TIMED_OUT, 0.0, "not started: the run's time was used up")
            continue
        yield run(stage, log, min(stage.seconds, left))
