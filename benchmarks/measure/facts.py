"""What a result must say about the machine and the versions that it was measured with."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_GPU_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw"


def version_of(distribution: str) -> str | None:
    """The installed version of a package; None: not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine(device: str) -> dict[str, Any]:
    """Date, commit, versions and hardware; `device` is "cpu" or "cuda"."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "device": device,
        "hardware": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "system": f"{platform.system()} {platform.release()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return facts if device == "cpu" else facts | _gpu()


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    smi = nvidia_smi()
    return {
        "driver": smi.get("driver_version"),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "smi": smi,
    }


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power as the card was found; empty where nvidia-smi does not answer. Changes nothing."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={_GPU_QUERY}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_smi(output)


def parse_smi(output: str) -> dict[str, str]:
    """From a line of nvidia-smi's CSV, that of the first GPU, to its fields."""
    lines = output.strip().splitlines()
    return (
        dict(zip(_GPU_QUERY.split(","), (field.strip() for field in lines[0].split(",")), strict=False))
        if lines
        else {}
    )


def _commit() -> str | None:
    """The commit measured, with "+" where files differ from it; None outside a git checkout."""
    try:
        run = {"check": True, "capture_output": True, "text": True, "cwd": ROOT, "timeout": 20}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("MPENGINE_COMMIT")
    return commit + ("+" if changed else "")


def _processor() -> str:
    """The processor's name, from /proc/cpuinfo where there is one."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def slug(hardware: str) -> str:
    """A hardware name for use in a file name: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")[:40] or "unknown"
