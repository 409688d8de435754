"""Python processes for the tests of the runner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNNER = ("-m", "mpengine.apex")


def python(*arguments: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs python, warnings are errors; `path` is where installed packages lie."""
    folders = [str(ROOT), *([str(path)] if path else [])]
    return subprocess.run(
        [sys.executable, "-W", "error", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def runner(*arguments: str | Path, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs `python -m mpengine.apex`."""
    return python(*RUNNER, *arguments, cwd=cwd, path=path)


def printed(run: subprocess.CompletedProcess[str]) -> str:
    """What a successful process printed; errors are shown."""
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
    return run.stdout


def write(folder: Path, files: dict[str, str]) -> None:
    """Writes files; the names are paths below the folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
