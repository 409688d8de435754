"""Several processes, one for each GPU or share of the cores, that train one DCGAN: what `torchrun` starts.

Every process holds the same networks and takes its share of each batch of pictures and noise; gradients are averaged
by DistributedDataParallel. The first process alone writes files and prints. Batch normalisation sees a process's own
share, so that the numbers depend on how many processes there are.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number, from 0, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def share(self, batch: Sequence[T]) -> Sequence[T]:
        """This process's part of a batch: every size-th element."""
        return batch[self.rank :: self.size]

    def share_of(self, batch: Tensor) -> Tensor:
        """The same of a tensor, along its first dimension."""
        return batch[self.rank :: self.size]

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network whose gradients are averaged over all processes; call it after `mpengine.prepare`."""
        return network if self.size == 1 else DistributedDataParallel(network)


def ranks_of_environment() -> Ranks:
    """What torchrun says in RANK and WORLD_SIZE; a process of its own without them."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, where there are several processes; a CPU is shared."""
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextlib.contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The processes are one group within; nothing is done where there is one process alone."""
    if ranks.size == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()  # the first may still be writing
    finally:
        dist.destroy_process_group()
