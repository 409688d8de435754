"""The two kinds of device that a step is measured on: what each can time and count, and how.

A field that a device cannot give is None, never a guess.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
_SYNC_WARNING = "called a synchronizing CUDA operation"
_KINDS = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "memsets"}  # trace categories


def of(name: str) -> Device:
    """The device called "cpu" or "cuda"."""
    return Cuda() if name == "cuda" else Cpu()


class Cpu:
    """Wall-clock time on this thread; caches are displaced between runs, memory is not counted."""

    kind = "cpu"
    torch_device = torch.device("cpu")
    _CACHE = 64 * 2**20  # bytes; more than the last-level cache of most machines

    def __init__(self) -> None:
        self._flush = torch.ones(self._CACHE // 4)

    def synchronize(self) -> None:
        """Nothing runs ahead here."""

    def flush(self) -> None:
        """Displaces what the caches hold."""
        self._flush.add_(1.0)

    def alone(self, run: Run) -> tuple[float, float | None]:
        """(milliseconds, host microseconds or None) of one run that starts on an idle device."""
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3, None

    def queued(self, run: Run, ahead_us: float) -> float | None:
        """Milliseconds of one run whose launches are all enqueued while the device is still busy."""
        return None

    def launches(self, run: Run) -> dict[str, float] | None:
        """What the profiler saw: kernels, copies, memsets, and the kernels' own milliseconds."""
        return None

    def syncs(self, run: Run) -> int | None:
        """Operations of one run that wait for the device."""
        return None

    def transient(self, run: Run) -> int | None:
        """Bytes that one run allocated beyond what was there before, at its peak."""
        return None

    def allocated(self) -> int | None:
        """Bytes that tensors hold."""
        return None

    def peak(self) -> int | None:
        """The most bytes that tensors held since `reset_peak`."""
        return None

    def reset_peak(self) -> None:
        """Counts the peak from now on."""

    def free_bytes(self) -> int:
        """Memory that a new tensor may take."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        except (OSError, StopIteration):
            return 4 * 2**30

    def release(self) -> None:
        """Gives unused memory back."""
        gc.collect()

    def copy_gbs(self, limit_bytes: int = 2**28, repeats: int = 7) -> list[float]:
        """GB/s of copies within the device's memory, bytes read and written both counted; random data."""
        size = min(limit_bytes, self.free_bytes() // 8)
        source = torch.empty(size // 4, device=self.torch_device).normal_()
        target = torch.empty_like(source)
        for _ in range(2):
            target.copy_(source)
        found = []
        for _ in range(repeats):
            self.synchronize()
            found.append(2 * source.nbytes / self._copy_ms(target, source) / 1e6)
        return found

    def _copy_ms(self, target: Tensor, source: Tensor) -> float:
        return self.alone(lambda: target.copy_(source))[0]


class Cuda(Cpu):
    """CUDA events, torch's profiler and allocator, on the current GPU."""

    kind = "cuda"

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.torch_device)
        l2 = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self._flush = torch.ones(2 * l2 // 4, device=self.torch_device)

    def synchronize(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize(self.torch_device)

    def alone(self, run: Run) -> tuple[float, float | None]:
        """Events around a run on an idle device, and how long the host took to enqueue it.

        The host time of a run that waits for the device holds that wait.
        """
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.synchronize()
        start.record()
        before = time.perf_counter()
        run()
        host = time.perf_counter() - before
        end.record()
        self.synchronize()
        return start.elapsed_time(end), host * 1e6

    def queued(self, run: Run, ahead_us: float) -> float | None:
        """Events around a run behind other work of `ahead_us`: where the host runs ahead, this is the device's time."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.synchronize()
        torch.cuda._sleep(int(min(ahead_us, 2e5) * 2000))  # cycles; clocks are below 2 GHz or hardly above
        start.record()
        run()
        end.record()
        self.synchronize()
        return start.elapsed_time(end)

    def launches(self, run: Run) -> dict[str, float] | None:
        """Counted in the trace of torch's profiler."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            run()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return count_launches(json.loads(path.read_text(encoding="utf-8")))

    def syncs(self, run: Run) -> int | None:
        """Warnings of torch.cuda.set_sync_debug_mode("warn"): it sees torch's own synchronising calls."""
        self.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return count_syncs(caught)

    def transient(self, run: Run) -> int | None:
        """By the counters of torch's caching allocator."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.torch_device) - before

    def allocated(self) -> int | None:
        """By torch's caching allocator."""
        return torch.cuda.memory_allocated(self.torch_device)

    def peak(self) -> int | None:
        """By torch's caching allocator."""
        return torch.cuda.max_memory_allocated(self.torch_device)

    def reset_peak(self) -> None:
        """Counts the peak from now on."""
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def free_bytes(self) -> int:
        """Free on the card, and unused in torch's pool."""
        unused = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return torch.cuda.mem_get_info(self.torch_device)[0] + unused

    def release(self) -> None:
        """Gives unused memory back."""
        gc.collect()
        torch.cuda.empty_cache()

    def copy_gbs(self, limit_bytes: int = 2**32, repeats: int = 20) -> list[float]:
        """Large copies, far beyond the L2 cache."""
        return super().copy_gbs(limit_bytes, repeats)

    def _copy_ms(self, target: Tensor, source: Tensor) -> float:
        milliseconds = self.queued(lambda: target.copy_(source), 200.0)
        assert milliseconds is not None
        return milliseconds


Device = Cpu  # what a measurement is given; Cuda is one too


def count_launches(trace: dict[str, Any]) -> dict[str, float]:
    """From a Chrome trace: kernels, copies and memsets, and the milliseconds that the kernels took."""
    events = [event for event in trace.get("traceEvents", []) if event.get("cat") in _KINDS]
    counts: Counter[str] = Counter(_KINDS[event["cat"]] for event in events)
    took = sum(float(event.get("dur", 0.0)) for event in events if event["cat"] == "kernel")  # microseconds
    return {**{name: counts[name] for name in _KINDS.values()}, "kernel_ms": took / 1e3}


def count_syncs(caught: list[warnings.WarningMessage]) -> int:
    """The warnings that tell of a synchronising call; others that a run gives do not count."""
    return sum(_SYNC_WARNING in str(warning.message) for warning in caught)


def check_arguments(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> None:
    """Ends the program where `--device` is not there, or `--seconds` or `--budget` are negative."""
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device: --device cpu, or a CUDA build of torch")
    if chosen.seconds < 0.0 or chosen.budget < 0.0:
        parser.error("--seconds and --budget must not be negative")
