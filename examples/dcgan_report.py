"""The comparison's table: one column for each engine, as text, markdown and JSON."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from dcgan_history import AVERAGED_ITERATIONS, METRICS
from dcgan_trainer import Trainer

CPU_NOTE = (
    "A CPU run shows the numerics, not the speed: fp16 convolutions on a CPU are about 10 times slower than FP32."
)


@dataclass(frozen=True)
class Result:
    """The figures of one finished run."""

    engine: str
    iterations: int
    metrics: dict[str, float]  # means over the last iterations
    seconds_per_iteration: float  # median
    peak_memory_bytes: int | None  # torch.cuda.max_memory_allocated; None on a CPU, where nothing comparable exists
    steps: dict[str, dict[str, int]]
    scales: dict[str, float]

    @classmethod
    def of(cls, trainer: Trainer) -> Result:
        """Reads the figures of a trainer; waits for the device."""
        trainer.record()
        cuda = trainer.device.type == "cuda"
        return cls(
            engine=trainer.engine.name,
            iterations=trainer.iteration,
            metrics=trainer.history.final(),
            seconds_per_iteration=statistics.median(trainer.history.seconds),
            peak_memory_bytes=torch.cuda.max_memory_allocated(trainer.device) if cuda else None,
            steps=trainer.steps(),
            scales=dict(zip(trainer.engine.scale_names, trainer.engine.scales()[0], strict=True)),
        )


def _rows(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """The table's rows: a label, then a cell for each engine."""
    rows = [(name, [f"{result.metrics[name]:.3f}" for result in results]) for name in METRICS]
    rows.append(("seconds per iteration (median)", [f"{result.seconds_per_iteration:.4f}" for result in results]))
    memory = [result.peak_memory_bytes for result in results]
    rows.append(("peak memory, MiB", ["n/a on a CPU" if peak is None else f"{peak / 2**20:.1f}" for peak in memory]))
    for net in ("D", "G"):
        steps = [result.steps[net] for result in results]
        rows.append((f"{net}: steps taken / skipped", [f"{step['taken']} / {step['skipped']}" for step in steps]))
    for name in dict.fromkeys(name for result in results for name in result.scales):
        cells = [f"{result.scales[name]:g}" if name in result.scales else "-" for result in results]
        rows.append((f"scale of {name}", cells))
    return rows


def markdown(results: Sequence[Result]) -> str:
    """The table in markdown, its columns aligned so that it reads well as plain text too."""
    table = [("", [result.engine for result in results]), *_rows(results)]
    label_width = max(len(label) for label, _ in table)
    widths = [max(len(cells[column]) for _, cells in table) for column in range(len(results))]
    lines = []
    for label, cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append(f"| {label.ljust(label_width)} | {' | '.join(padded)} |")
    rule = " | ".join("-" * (width - 1) + ":" for width in widths)
    lines.insert(1, f"| {'-' * label_width} | {rule} |")
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """The hardware that the figures belong to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def write(results: Sequence[Result], options: dict[str, object], device: torch.device, folder: Path) -> str:
    """Writes comparison.md and comparison.json.

    Returns:
        The markdown.
    """
    averaged = min(AVERAGED_ITERATIONS, results[0].iterations)
    text = (
        f"{results[0].iterations} iterations on {device_name(device)}, torch {torch.__version__}; "
        f"losses, D(x) and D(G(z)) are means over the last {averaged}.\n\n{markdown(results)}\n"
    )
    if device.type == "cpu":
        text += f"\n{CPU_NOTE}\n"
    (folder / "comparison.md").write_text(f"# DCGAN: the engines compared\n\n{text}", encoding="utf-8")
    record = {
        "device": device_name(device),
        "torch": torch.__version__,
        "options": options,
        "averaged_iterations": averaged,
        "results": [asdict(result) for result in results],
    }
    (folder / "comparison.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return text
