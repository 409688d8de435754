"""Draws the recipes of `mpengine.schedules` into docs/schedules/, for docs/schedules.md.

From the repository's root, with matplotlib installed:

    python benchmarks/plot_schedules.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch

from mpengine import schedules
from mpengine.unroll import unroll

FOLDER = Path(__file__).parent.parent / "docs" / "schedules"
STEPS = 1000
LR, MOMENTUM = "tab:blue", "tab:orange"

RECIPES = {
    "linear_warmup": (
        schedules.linear_warmup(warmup_steps=200, start_factor=256 / 8192),
        schedules.scaled_lr(0.1, global_batch=8192),
        "linear_warmup(warmup_steps=200, start_factor=256 / 8192), lr = scaled_lr(0.1, 8192)",
    ),
    "cyclic_decaying": (
        schedules.cyclic_decaying(base_lr=0.01, max_lr=0.1, step_size_up=100, momentum_range=(0.8, 0.9)),
        0.1,
        "cyclic_decaying(base_lr=0.01, max_lr=0.1, step_size_up=100, momentum_range=(0.8, 0.9))",
    ),
    "cyclic_decaying_gamma": (
        schedules.cyclic_decaying(base_lr=0.01, max_lr=0.1, step_size_up=50, step_size_down=150, gamma=0.998),
        0.1,
        "cyclic_decaying(base_lr=0.01, max_lr=0.1, step_size_up=50, step_size_down=150, gamma=0.998)",
    ),
    "one_cycle": (
        schedules.one_cycle(max_lr=0.1, total_steps=STEPS),
        0.1,
        "one_cycle(max_lr=0.1, total_steps=1000)",
    ),
    "warmup_cosine": (
        schedules.warmup_cosine(warmup_steps=100, total_steps=STEPS, final_factor=0.1),
        0.1,
        "warmup_cosine(warmup_steps=100, total_steps=1000, final_factor=0.1), lr = 0.1",
    ),
}


def draw(name: str, recipe: schedules.Recipe, lr: float, title: str) -> Path:
    """Plots lr, and momentum where the recipe moves it, by the number of steps taken."""
    optimizer = torch.optim.SGD([torch.zeros(())], lr=lr, momentum=0.9)
    table = unroll(optimizer.param_groups, optimizer.defaults, recipe, STEPS)
    figure, left = plt.subplots(figsize=(7.2, 2.6), layout="constrained")
    left.plot(table.columns["lr"][:, 0], color=LR)
    left.set_xlabel("steps taken")
    left.set_ylabel("lr", color=LR)
    left.set_ylim(bottom=0)
    left.set_xlim(0, STEPS)
    left.grid(alpha=0.3)
    if "momentum" in table.columns:
        right = left.twinx()
        right.plot(table.columns["momentum"][:, 0], color=MOMENTUM, linestyle="--")
        right.set_ylabel("momentum", color=MOMENTUM)
    left.set_title(title, fontsize=7, family="monospace")
    path = FOLDER / f"{name}.png"
    figure.savefig(path, dpi=100, metadata={"Software": None})  # the same bytes whenever it is drawn
    plt.close(figure)
    return path


def main() -> None:
    """Draws them all."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (recipe, lr, title) in RECIPES.items():
        print(draw(name, recipe, lr, title).relative_to(FOLDER.parents[1]))


if __name__ == "__main__":
    main()
