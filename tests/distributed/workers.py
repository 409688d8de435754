"""A pair of processes in one gloo group that run scenarios by name, so that processes start once for all tests."""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2
COLLECTIVE_TIMEOUT = 20  # seconds: a rank that waits for one that failed gives up
SCENARIO_TIMEOUT = 60
LOST = "a rank died, or did not answer in time"


class ScenarioError(Exception):
    """A scenario failed on some rank; the message holds the tracebacks."""


def _serve(rank: int, store: str, channel: Connection) -> None:
    """A rank's process: joins the group, then runs what it is told until the parent is gone."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=Path(store).as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT),
    )
    while True:
        try:
            module, name, arguments = channel.recv()
        except EOFError:
            return
        try:
            result = getattr(importlib.import_module(module), name)(rank, **arguments)
            channel.send((True, result))
        except BaseException:
            channel.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


class Pair:
    """Two workers. Where one failed alone, both are replaced: a collective may be pending in the other."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._channels: list[Connection] = []
        self._folder = ""

    def _start(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.mkdtemp(prefix="mpengine-ddp-")
        store = Path(self._folder) / "store"
        for rank in range(RANKS):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._channels.append(mine)

    def run(self, name: str, module: str = "tests.distributed.scenarios", **arguments: Any) -> list[Any]:
        """Calls `module.name(rank, **arguments)` in every process; returns what each returned, by rank.

        Raises:
            ScenarioError: A rank raised, or did not answer in time.
        """
        if not self._processes:
            self._start()
        for channel in self._channels:
            channel.send((module, name, arguments))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + SCENARIO_TIMEOUT
        while len(answers) < RANKS and time.monotonic() < deadline:
            for rank, channel in enumerate(self._channels):
                if rank not in answers and channel.poll(0.01):
                    try:
                        answers[rank] = channel.recv()
                    except EOFError:
                        answers[rank] = (False, LOST)
                    if not answers[rank][0]:  # the other may wait for this one in vain
                        deadline = min(deadline, time.monotonic() + 2)
        for rank in range(RANKS):
            answers.setdefault(rank, (False, LOST))
        if not all(good for good, _ in answers.values()):
            if any(good or answer == LOST for good, answer in answers.values()):
                self.stop()  # where both raised, both are at the same place
            raise ScenarioError("\n".join(str(value) for good, value in answers.values() if not good))
        return [answers[rank][1] for rank in range(RANKS)]

    def stop(self) -> None:
        """Ends both processes."""
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            process.kill()
            process.join(10)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._channels = [], []
