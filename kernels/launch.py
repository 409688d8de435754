"""The launchers: each is exactly one kernel, and the twin of the function of the same name in `mpengine.reference`.

No launcher waits for the device, allocates, or recompiles when a value changes: pointers, scales, hyperparameters and
counts all reach the kernels through memory. What selects a binary is the rule, the kinds of elements that occur, and
whether a parameter may have several sources.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from . import layout
from .decide import _decide_kernel
from .inspect import _inspect_kernel
from .rules import RULES, SCALAR_FUNCTIONS
from .scale import _update_scale_kernel
from .update import _update_kernel

# FP32 operations in the written order: no multiply-add is contracted. The loops are too short to be worth pipelining.
_OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}
_WARPS = 8
_THREADS = 32 * _WARPS
_DECIDE_WARPS = 16  # its one program has the device to itself
_FLOAT32_BIT = 1 << layout.FLOAT32


class Named(Protocol):
    """`mpengine.rules.Family`, as far as the launchers read it."""

    @property
    def name(self) -> str:
        """Its key in `rules.RULES` or `rules.SCALAR_FUNCTIONS`."""


class Rule(Named, Protocol):
    """`mpengine.rules.Rule`, as far as the launchers read it."""

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of its state tensors."""


class Table(Protocol):
    """`mpengine.masters.TensorTable`, as far as the launchers read it."""

    rows: Tensor
    inspect_chunks: Tensor
    steps: Tensor
    scalars: Tensor
    stamps: Tensor
    found: Tensor
    partials: Tensor
    tallies: Tensor
    counts: Tensor
    decision: Tensor

    @property
    def update_chunks(self) -> Mapping[Any, Tensor]:
        """The chunks of each rule's tensors."""

    @property
    def param_kinds(self) -> Iterable[int]:
        """The element kinds of the parameters that are written."""


class Schedule(Protocol):
    """`mpengine.masters.DeviceSchedule`, as far as the launchers read it."""

    plan: Tensor
    values: Tensor


class Sources(Protocol):
    """`mpengine.masters.SourceTable`, as far as the launchers read it."""

    rows: Tensor
    ballot_rows: Tensor
    width: int

    @property
    def kinds(self) -> Iterable[int]:
        """The element kinds of the gradients."""


def inspect(table: Table, sources: Sources) -> None:
    """Reads every pending gradient once; writes `table.stamps`, `.found`, `.partials` and `.tallies`."""
    programs = len(table.inspect_chunks)
    if programs == 0:
        return
    kinds = _bits(sources.kinds)
    mixed = kinds > _FLOAT32_BIT
    with _on(table.rows.device):
        _inspect_kernel[(programs,)](
            table.rows,
            sources.rows,
            table.inspect_chunks,
            table.counts,
            table.stamps,
            table.found,
            table.partials,
            table.tallies,
            len(table.found),
            SOURCES=sources.width,
            KINDS=kinds,
            CHUNK=layout.INSPECT_CHUNK,
            # 8 elements a thread are 16 bytes of fp16; 4 where a block may also be FP32, so that both fit one layout.
            BLOCK=4 * _THREADS if mixed and sources.width > 1 else 8 * _THREADS,
            num_warps=_WARPS,
            **_OPTIONS,
        )


def decide(
    table: Table,
    sources: Sources,
    found: Tensor,
    partials: Tensor,
    hyper: Tensor,
    max_norm: Tensor,
    family: Named | None,
    found_inf: Tensor | None = None,
    votes: Tensor | None = None,
    schedule: Schedule | None = None,
) -> None:
    """Decides about the step; writes `decision`, `counts`, and where it is taken `steps` and `scalars` of `table`.

    Args:
        table: The tensors of this device.
        sources: Their gradients, and the ballots on the losses.
        found: int32[D, L], `found` of every device of the optimizer; contiguous.
        partials: float64[P], `partials` of every device; contiguous.
        hyper: float64[G, layout.HYPER].
        max_norm: float64[1], inf for no clipping.
        family: Gives the scalars; None leaves them alone.
        found_inf: float32, one element: a verdict from outside (`torch.amp.GradScaler`'s).
        votes: float32[L, layout.VOTE], written for the scaler unless None; contiguous.
        schedule: Replaces some of the hyperparameters by those of the steps taken.
    """
    with _on(table.rows.device):
        _decide_kernel[(1,)](
            table.rows,
            sources.rows,
            sources.ballot_rows,
            found,
            partials,
            hyper,
            None if schedule is None else schedule.plan,
            None if schedule is None else schedule.values,
            max_norm,
            found_inf,
            table.counts,
            table.steps,
            table.scalars,
            table.decision,
            votes,
            len(table.rows),
            found.shape[-1],
            found.shape[0],
            partials.numel(),
            FAMILY=None if family is None else SCALAR_FUNCTIONS[family.name],
            SOURCES=sources.width,
            BLOCK=32 * _DECIDE_WARPS,
            num_warps=_DECIDE_WARPS,
            **_OPTIONS,
        )


def update(table: Table, sources: Sources, rule: Rule, decision: Tensor) -> None:
    """Applies `rule` to every tensor of that rule that has a gradient; nothing at all where `decision` skips."""
    chunks = table.update_chunks[rule]
    programs = len(chunks)
    if programs == 0:
        return
    with _on(table.rows.device):
        _update_kernel[(programs,)](
            table.rows,
            sources.rows,
            chunks,
            table.scalars,
            decision,
            RULE=RULES[rule.name],
            SLOTS=len(rule.slots),
            SOURCES=sources.width,
            KINDS=_bits(sources.kinds),
            PARAM_KINDS=_bits(table.param_kinds, none=0),
            CHUNK=layout.UPDATE_CHUNK,
            num_warps=_WARPS,
            **_OPTIONS,
        )


def update_scale(scale: Tensor, previous: Tensor, counters: Tensor, votes: Tensor, policy: Tensor) -> None:
    """Moves the scale of every loss that has a vote, by `mpengine.scaling.next_state`, and clears the votes.

    Args:
        scale: float32[L].
        previous: float32[L]: gets the scale from before, where there is a vote.
        counters: int32[L, layout.COUNTERS].
        votes: float32[R, L, layout.VOTE], one row for each optimizer; contiguous.
        policy: float64[layout.POLICY].
    """
    with _on(scale.device):
        _update_scale_kernel[(1,)](
            scale,
            previous,
            counters,
            votes,
            policy,
            scale.numel(),
            votes.shape[0],
            BLOCK=32,
            num_warps=1,
            **_OPTIONS,
        )


def _bits(kinds: Iterable[int], none: int = 1 << layout.FLOAT16) -> int:
    """A set of element kinds as the kernels read it; `none` for the empty set."""
    return sum(1 << kind for kind in kinds) or none


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device. On the CPU its interpreter does, with NumPy, which warns of overflows."""
    if device.type == "cpu":
        return np.errstate(all="ignore")
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
