"""The threads that step CPU tensors: as many as `torch.get_num_threads()` says, the caller among them.

NumPy and PyTorch let go of the interpreter's lock inside an operation, so blocks large enough keep several cores busy.
The threads start at the first step that needs them, in each process anew: a fork has none of its parent's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Unit = TypeVar("Unit")

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0  # threads of the pool


def run(work: Callable[[Unit], None], units: Sequence[Unit]) -> None:
    """Calls `work` on every unit, each on some thread; returns when all are done.

    Raises:
        BaseException: The first error of `work`, when every thread has stopped; units not yet begun are left alone.
    """
    helpers = min(torch.get_num_threads(), len(units)) - 1
    if helpers <= 0:
        for unit in units:
            work(unit)
        return
    left = iter(units)  # shared: a list's iterator hands each unit out once
    failures: list[BaseException] = []
    futures = _submit(helpers, _drain, work, left, failures)
    _drain(work, left, failures)
    for future in futures:
        if not future.cancel():  # one that has not begun has nothing to do any more
            future.result()
    if failures:
        raise failures[0]


def _drain(work: Callable[[Unit], None], left: Iterator[Unit], failures: list[BaseException]) -> None:
    for unit in left:
        if failures:
            return
        try:
            work(unit)
        except BaseException as error:  # the caller's to raise, KeyboardInterrupt included
            failures.append(error)
            return


def _submit(helpers: int, function: Callable[..., None], *args: object) -> list[Future[None]]:
    global _pool, _size
    with _lock:
        if _pool is None or _size < helpers:
            if _pool is not None:
                _pool.shutdown(wait=False)  # its threads end when they have done what they were given
            _pool, _size = ThreadPoolExecutor(helpers, thread_name_prefix="mpengine"), helpers
        try:
            return [_pool.submit(function, *args) for _ in range(helpers)]
        except RuntimeError:  # the interpreter is shutting down: the caller goes on alone
            return []


def _forget() -> None:
    """In the child of a fork, where no thread but the caller lives on."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
