"""DCGAN's pictures: grids of samples, the scales with their overflows, and the comparison of the engines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from dcgan_history import METRICS, History
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

MIN_TILE_PIXELS = 48  # small pictures are enlarged to this, pixel by pixel
SMOOTHED_ITERATIONS = 25
# Okabe and Ito's palette: distinct for colour-blind readers too.
SCALE_COLOURS = ("#0072B2", "#D55E00", "#009E73")
ENGINE_COLOURS = {"mpengine": "#0072B2", "torch-amp": "#D55E00", "fp32": "#555555"}


def grid(images: Tensor) -> np.ndarray:
    """Tiles pictures row by row into one that is about square.

    Args:
        images: (count, channels, size, size) in [-1, 1], 1 or 3 channels.

    Returns:
        uint8, (height, width, 3), with a gap between the tiles.
    """
    count, size = len(images), images.shape[-1]
    columns = math.ceil(math.sqrt(count))
    zoom = max(1, math.ceil(MIN_TILE_PIXELS / size))
    pixels = images.float().add(1.0).mul(127.5).clamp(0.0, 255.0).round().expand(-1, 3, -1, -1)
    tiles = pixels.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    tiles = F.pad(tiles, [zoom, zoom, zoom, zoom], value=96.0)
    tiles = torch.cat([tiles, torch.full((columns * math.ceil(count / columns) - count, *tiles.shape[1:]), 96.0)])
    rows, side = len(tiles) // columns, tiles.shape[2]
    whole = tiles.reshape(rows, columns, 3, side, side).permute(0, 3, 1, 4, 2)
    return whole.reshape(rows * side, columns * side, 3).to(torch.uint8).numpy()


def save_grid(images: Tensor, path: Path) -> None:
    """Writes `grid(images)` as a PNG."""
    Image.fromarray(grid(images)).save(path)


def save_scales(history: History, names: Sequence[str], path: Path) -> None:
    """Plots each loss's scale over the iterations; a cross marks an overflow, at the scale that was too large."""
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.subplots()
    iterations = [row[0] for row in history.scale_rows]
    for index, name in enumerate(names):
        colour = SCALE_COLOURS[index]
        overflows = history.overflow_iterations(index)
        label = f"{name} ({int(history.scale_rows[-1][1 + len(names) + index])} overflows)"
        # Scales are powers of two: curves that would lie on each other are drawn 4% apart.
        offset = 1.04**index
        axes.step(
            iterations, [row[1 + index] * offset for row in history.scale_rows], where="post", color=colour, label=label
        )
        axes.plot([x for x, _ in overflows], [y * offset for _, y in overflows], "x", color=colour, markersize=8)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss scale (x: overflow)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def save_comparison(samples: Mapping[str, Tensor], path: Path) -> None:
    """Puts each engine's grid beside the real pictures'."""
    figure = Figure(figsize=(4.0 * len(samples), 4.3), layout="constrained")
    panels = figure.subplots(1, len(samples), squeeze=False)[0]
    for panel, (title, images) in zip(panels, samples.items(), strict=True):
        panel.imshow(grid(images), interpolation="nearest")
        panel.set_title(title)
        panel.set_axis_off()
    figure.savefig(path, dpi=150)


def _smoothed(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and running means over SMOOTHED_ITERATIONS."""
    width = min(SMOOTHED_ITERATIONS, len(values))
    means = F.avg_pool1d(values.double().view(1, 1, -1), width, stride=1).flatten().numpy()
    return np.arange(width, len(values) + 1), means


def save_losses(histories: Mapping[str, History], path: Path) -> None:
    """Plots Loss_D and Loss_G of every engine: each iteration faintly, the running mean over it."""
    figure = Figure(figsize=(12.0, 4.0), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 2)
    for panel, column in zip(panels, (METRICS.index("Loss_D"), METRICS.index("Loss_G")), strict=True):
        for name, history in histories.items():
            values = history.metrics[:, column]
            colour = ENGINE_COLOURS[name]
            panel.plot(range(1, len(values) + 1), values.numpy(), color=colour, alpha=0.15, linewidth=0.8)
            panel.plot(*_smoothed(values), color=colour, label=name)
        panel.set_xlabel("iteration")
        panel.set_ylabel(METRICS[column])
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)
