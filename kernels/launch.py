"""The launchers: each is exactly one kernel, and the twin of the function of the same name in `mpengine.reference`.

No launcher waits for the device, allocates, or recompiles when a value changes: pointers, scales, hyperparameters and
counts all reach the kernels through memory. What selects a binary is the rule, the kinds of elements that occur, and
whether a parameter may have several sources.

Triton's own launch binds the arguments, and compares every global that a kernel uses, anew each time: 60 us of the
host for these kernels. So it makes the first launch of each kind, and the binary that it returns makes the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from operator import is_
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from . import layout
from .decide import _decide_kernel
from .inspect import _inspect_kernel
from .measure import _measure_kernel
from .rules import MEASURES, RULES, SCALAR_FUNCTIONS, SETTLES
from .rules.arithmetic import given
from .scale import _update_scale_kernel
from .settle import _settle_kernel
from .update import _update_kernel

# FP32 operations in the written order: no multiply-add is contracted. The loops are too short to be worth pipelining.
_OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}
_WARPS = 8
_THREADS = 32 * _WARPS
_DECIDE_WARPS = 16  # its one program has the device to itself
_SETTLE_WARPS = 4  # a program has a tensor's partial sums to add up: one for 16,384 elements
_FLOAT32_BIT = 1 << layout.FLOAT32


class Named(Protocol):
    """`mpengine.rules.Family`, as far as the launchers read it."""

    @property
    def name(self) -> str:
        """Its key in `rules.RULES` or `rules.SCALAR_FUNCTIONS`."""

    @property
    def kernels(self) -> Any:
        """The functions of a declared one, which are in no table; else None."""


class Rule(Named, Protocol):
    """`mpengine.rules.Rule`, as far as the launchers read it."""

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of its state tensors."""

    @property
    def cells(self) -> tuple[str, ...]:
        """The names of its numbers for each tensor."""

    @property
    def norms(self) -> int:
        """How many norms it needs of each tensor."""


class Norms(Protocol):
    """`mpengine.masters.Norms`, as far as the launchers read it."""

    chunks: Tensor
    spans: Tensor
    partials: Tensor


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
    launches: dict[str, Any]

    @property
    def update_chunks(self) -> Mapping[Any, Tensor]:
        """The chunks of each rule's tensors."""

    @property
    def norms(self) -> Mapping[Any, Norms]:
        """What is measured of the tensors of each rule that settles."""

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
    # 8 elements a thread are 16 bytes of fp16; 4 where a block may also be FP32, so that both fit one layout.
    block = 4 * _THREADS if mixed and sources.width > 1 else 8 * _THREADS
    _launch_again(
        table,
        "inspect",
        _inspect_kernel,
        programs,
        (
            table.rows,
            sources.rows,
            table.inspect_chunks,
            table.counts,
            table.stamps,
            table.found,
            table.partials,
            table.tallies,
        ),
        (len(table.found),),
        (sources.width, kinds, layout.INSPECT_CHUNK, block),
        _WARPS,
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
    _launch_again(
        table,
        "decide",
        _decide_kernel,
        1,
        (
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
        ),
        (len(table.rows), found.shape[-1], found.shape[0], partials.numel()),
        (None if family is None else _scalars_of(family), sources.width, 32 * _DECIDE_WARPS),
        _DECIDE_WARPS,
    )


def measure(table: Table, sources: Sources, rule: Rule, decision: Tensor) -> None:
    """Writes `table.norms[rule].partials`: sums of squares of what the rule measures, for tensors with a gradient."""
    norms = table.norms[rule]
    programs = len(norms.chunks)
    if programs == 0:
        return
    _launch_again(
        table,
        f"measure {rule.name}",
        _measure_kernel,
        programs,
        (table.rows, sources.rows, norms.chunks, table.scalars, decision, norms.partials),
        (),
        (
            _own(rule, "measure", MEASURES),
            rule.norms,
            len(rule.slots),
            sources.width,
            _bits(sources.kinds),
            layout.INSPECT_CHUNK,
            layout.UPDATE_CHUNK,
        ),
        _WARPS,
    )


def settle(table: Table, sources: Sources, rule: Rule, decision: Tensor) -> None:
    """From norms and cells of each tensor with a gradient to the scalars that `update` reads, and the new cells."""
    norms = table.norms[rule]
    _launch_again(
        table,
        f"settle {rule.name}",
        _settle_kernel,
        len(norms.spans),
        (table.rows, sources.rows, norms.spans, table.scalars, decision, norms.partials),
        (),
        (_own(rule, "settle", SETTLES), rule.norms, len(rule.cells), sources.width, 32 * _SETTLE_WARPS),
        _SETTLE_WARPS,
    )


def update(table: Table, sources: Sources, rule: Rule, decision: Tensor) -> None:
    """Applies `rule` to every tensor of that rule that has a gradient; nothing at all where `decision` skips."""
    chunks = table.update_chunks[rule]
    programs = len(chunks)
    if programs == 0:
        return
    kinds = _bits(sources.kinds), _bits(table.param_kinds, none=0)
    _launch_again(
        table,
        rule.name,
        _update_kernel,
        programs,
        (table.rows, sources.rows, chunks, table.scalars, decision),
        (),
        (_own(rule, "update", RULES), len(rule.slots), sources.width, *kinds, layout.UPDATE_CHUNK),
        _WARPS,
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
    arguments = scale, previous, counters, votes, policy, scale.numel(), votes.shape[0]
    _launch(_update_scale_kernel, 1, scale.device, arguments, (32,), 1)


def _own(rule: Rule, kind: str, table: Mapping[str, Any]) -> Any:
    """A rule's function on the device: the declared one, or the built-in one of its name."""
    return table[rule.name] if rule.kernels is None else getattr(rule.kernels, kind)


def _scalars_of(family: Named) -> Any:
    return SCALAR_FUNCTIONS[family.name] if family.kernels is None else family.kernels.scalars or given


_binaries: dict[tuple[Any, ...], Any] = {}


class Prepared(NamedTuple):
    """A launch that may be made again with the very same tensors."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[Any, ...]  # how many programs, the kernel's counts, its constexprs
    run: Callable[..., None]


def _launch_again(
    table: Table,
    name: str,
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    counts: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int,
) -> None:
    """`_launch`, without a look at the tensors where they are those of the last time under this name."""
    numbers = programs, counts, constants
    prepared = table.launches.get(name)
    if prepared is not None and prepared.numbers == numbers and all(map(is_, tensors, prepared.tensors)):
        device = table.rows.device
        if device.type == "cpu" or device.index == torch.cuda.current_device():
            prepared.run(*tensors, *counts, *constants)
            return
    binary = _launch(kernel, programs, table.rows.device, (*tensors, *counts), constants, warps)
    if binary is not None:
        table.launches[name] = Prepared(tensors, numbers, binary[programs, 1, 1])


def _launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
) -> Any:
    """Runs `programs` programs of a kernel on a device; `constants` are its constexprs, which come last.

    Returns:
        The compiled kernel; None in the interpreter.
    """
    # What selects a binary, as Triton sees it, but for dtypes: each argument's is always the same.
    aligned = [None if a is None else a.data_ptr() % 16 == 0 for a in arguments if not isinstance(a, int)]
    key = (id(kernel), device, constants, *aligned)
    binary = _binaries.get(key)
    with _on(device):
        if binary is not None:
            binary[programs, 1, 1](*arguments, *constants)
        else:
            constexprs = dict(zip(kernel.arg_names[len(arguments) :], constants, strict=True))
            binary = kernel[(programs,)](*arguments, **constexprs, num_warps=warps, **_OPTIONS)
            if binary is not None:
                _binaries[key] = binary
    return binary


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
