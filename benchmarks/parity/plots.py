"""One picture for each model: loss curves, their distance from FP32, and the scales."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.parity.engines import AMP, FP32, MPENGINE, NUDGED, PER_LOSS
from benchmarks.parity.run import Record, Result

# Okabe and Ito's palette: distinct for colour-blind readers too. Where curves coincide, the dashed one lies above the
# wide one, and both are seen.
STYLES: dict[str, dict[str, Any]] = {
    FP32: {"color": "#999999", "linewidth": 3.5},
    AMP: {"color": "#E69F00", "linewidth": 2.2},
    NUDGED: {"color": "#009E73", "linewidth": 1.0, "alpha": 0.8},
    MPENGINE: {"color": "#0072B2", "linewidth": 1.2, "linestyle": (0, (4, 2))},
}
PER_LOSS_COLOURS = ("#CC79A7", "#56B4E9", "#D55E00")
SMOOTHED = 15  # iterations


def _smoothed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and running medians over SMOOTHED of them."""
    width = min(SMOOTHED, len(values))
    windows = np.lib.stride_tricks.sliding_window_view(values, width)
    return np.arange(len(windows)) + width // 2, np.median(windows, axis=1)


def _losses(axes: Axes, runs: dict[str, Record], names: tuple[str, ...]) -> None:
    for column, name in enumerate(names):
        for engine in (FP32, AMP, MPENGINE):
            values = np.array(runs[engine].curves)[:, column]
            axes.plot(values, label=engine if column == 0 else None, **STYLES[engine])
        if len(names) > 1:
            x = int(0.6 * len(values))
            axes.annotate(name, (x, values[x]), xytext=(0, 14), textcoords="offset points", ha="center")
    axes.margins(y=0.12)  # room for the names
    axes.set_ylabel("loss")


def _distances(axes: Axes, runs: dict[str, Record]) -> None:
    reference = np.array(runs[FP32].curves)
    for engine in (AMP, NUDGED, MPENGINE):
        apart = np.abs(np.array(runs[engine].curves) - reference).mean(axis=1)
        axes.plot(*_smoothed(apart), label=engine, **STYLES[engine])
    axes.set_yscale("log")
    axes.set_ylabel("|loss - fp32's|\n(running median)")


def _scales(axes: Axes, runs: dict[str, Record], loss_names: tuple[str, ...]) -> None:
    for engine in (AMP, MPENGINE):
        record = runs[engine]
        scales = np.array(record.scales)[:, 0]
        axes.step(range(len(scales)), scales, where="post", label=engine, **STYLES[engine])
        skipped = np.flatnonzero(np.array(record.skipped).any(axis=1))
        style = {"marker": "x", "linestyle": "none", "color": STYLES[engine]["color"]}
        axes.plot(skipped, scales[skipped], markersize=9 if engine == AMP else 5, **style)
    if PER_LOSS in runs:
        for i, (name, scales) in enumerate(zip(loss_names, np.array(runs[PER_LOSS].scales).T, strict=True)):
            colour = PER_LOSS_COLOURS[i]
            axes.step(
                range(len(scales)),
                scales,
                where="post",
                label=f"mpengine, own\nscale of {name}",
                color=colour,
                linewidth=0.9,
            )
    axes.set_yscale("log", base=2)


def save(result: Result, names: tuple[str, ...], loss_names: tuple[str, ...], path: Path) -> None:
    """Writes one seed's picture.

    Args:
        result: The runs.
        names: Of the loss curves.
        loss_names: Of the losses that are scaled.
        path: Of the PNG.
    """
    figure = Figure(figsize=(8.4, 9.2), layout="constrained")
    losses, distances, planned, free = figure.subplots(4, 1, sharex=True, height_ratios=(3, 3, 2.4, 2.4))
    _losses(losses, result.planned, names)
    _distances(distances, result.planned)
    _scales(planned, result.planned, loss_names)
    planned.set_ylabel("loss scale\n(x: skipped)")
    _scales(free, result.free, loss_names)
    free.set_ylabel("loss scale\nleft to itself")
    free.set_xlabel("iteration")
    for axes in (losses, distances, planned, free):
        axes.grid(alpha=0.3)
        axes.margins(x=0.01)
        # Beside the curves: a legend inside would cover some of them in one model or another.
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90)
    # A palette of 64 colours: a third of the bytes, and these pictures are committed.
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
