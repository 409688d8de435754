"""What the workers run of the DCGAN example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dcgan_data import BatchOrder, load_images
from dcgan_ranks import Ranks
from dcgan_trainer import Config, Trainer

from tests.distributed.scenarios import RANKS
from tests.harness import frozen

BATCH, IMAGES = 32, 1797


def train(rank: int, *, engine: str, folder: str) -> dict[str, Any]:
    """Four iterations straight, and again from the checkpoint that rank 0 wrote after two."""
    images = load_images("digits", dataroot=Path(), image_size=8, channels=None)
    sizes = {"nc": 1, "imageSize": 8, "batchSize": BATCH, "nz": 4, "ngf": 4, "ndf": 4}
    scale = {"init_scale": 2.0**24, "growth_interval": 2}
    config = Config(engine=engine, dataset="digits", images=IMAGES, lr=1e-3, beta1=0.5, manualSeed=3, **sizes, **scale)
    ranks = Ranks(rank, RANKS)
    order = list(BatchOrder(IMAGES, BATCH, 3, 0, 4, ranks))
    path = Path(folder) / "checkpoint.pt"

    def make() -> Trainer:
        return Trainer(config, torch.device("cpu"), ranks=ranks)

    def iterate(trainer: Trainer, batches: list[list[int]]) -> None:
        for batch in batches:
            trainer.train_step(torch.stack([images[i] for i in batch]))
            trainer.record()

    def weights(trainer: Trainer) -> Any:
        parameters = [*trainer.net_d.parameters(), *trainer.net_g.parameters()]
        return frozen([parameters, trainer.engine.state_dict()])

    straight = make()
    start = weights(straight)
    iterate(straight, order[:2])
    if rank == 0:
        straight.save(path)
    dist.barrier()
    iterate(straight, order[2:])
    resumed = make()
    resumed.resume(path)
    iterate(resumed, order[2:])
    return {
        "start": start,
        "weights": weights(straight),
        "resumed": weights(resumed),
        "state": weights(straight),
        "share": order[0],
        "batch": next(iter(BatchOrder(IMAGES, BATCH, 3, 0, 1))),
        "metrics": straight.history.metrics.tolist(),
        "scales": [scale for row in straight.history.scale_rows for scale in row[1:2]],
    }
