"""Runs the reference, the CPU path and the kernels side by side on equal problems; compares every bit after each call.

Every buffer, the tables' own included, lies between sentinels: a read past an end changes a sum, a write past an end
changes a sentinel, and whole buffers are compared. (The sentinel is a number: NaN would come out of the arithmetic as
it went in.) What a launch must write is filled with NaN before.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpengine import cpu, reference, rules
from mpengine.kernels import launch, layout
from mpengine.masters import Entry, TensorTable
from mpengine.sources import Ballot, Source, SourceTable

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAD = 64  # sentinel elements on either side: 128 bytes at least, so that buffers start on 16 bytes
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SENTINEL = -77
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_TABLE_BUFFERS = ("steps", "scalars", "stamps", "found", "partials", "tallies", "counts", "decision")


@dataclass(frozen=True)
class Grad:
    """A gradient of one loss; `spikes` are (flat position, value)."""

    loss: int = 0
    dtype: torch.dtype = HALF
    misaligned: bool = False
    spikes: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Spec:
    """One parameter, and all that belongs to it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = HALF
    grads: tuple[Grad, ...] = (Grad(),)
    group: int = 0
    misaligned: bool = False
    channels_last: bool = False


@dataclass(frozen=True)
class Problem:
    """An optimizer's tensors; `optimizer` gives the family and the hyperparameters of each group."""

    tensors: tuple[Spec, ...]
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    groups: tuple[dict[str, Any], ...] = ({},)
    scales: tuple[float | None, ...] = (1024.0,)  # of each loss
    kinds: tuple[int, ...] | None = None  # ballots; None: all fresh
    max_norm: float = float("inf")
    found_inf: float | None = None
    magnitude: float = 100.0  # of the scaled gradients
    seed: int = 0
    rule: rules.Rule | None = None  # instead of the optimizer's

    def with_spikes(self, tensor: int, grad: int, *spikes: tuple[int, float]) -> Problem:
        tensors, grads = list(self.tensors), list(self.tensors[tensor].grads)
        grads[grad] = replace(grads[grad], spikes=spikes)
        tensors[tensor] = replace(tensors[tensor], grads=tuple(grads))
        return replace(self, tensors=tuple(tensors))


@dataclass
class World:
    """A problem in the memory of one device."""

    table: TensorTable
    sources: SourceTable
    hyper: Tensor
    max_norm: Tensor
    found_inf: Tensor | None
    votes: Tensor
    family: rules.Family | None
    buffers: dict[str, Tensor] = field(default_factory=dict)  # whole, sentinels included


class Builder:
    """Lays tensors between sentinels; the same values on every device."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.buffers: dict[str, Tensor] = {}

    def lay(self, name: str, values: Tensor, misaligned: bool = False) -> Tensor:
        """A copy of `values`, of the same shape and strides, between sentinels."""
        start = PAD + misaligned
        buffer = torch.full((start + values.numel() + PAD,), SENTINEL, dtype=values.dtype, device=self.device)
        view = buffer.as_strided(values.shape, values.stride(), start)
        view.copy_(values)
        self.buffers[name] = buffer
        return view

    def normal(self, spec: Spec) -> Tensor:
        values = torch.randn(spec.shape, generator=self.generator)
        return values.contiguous(memory_format=torch.channels_last) if spec.channels_last else values

    def entry(self, i: int, spec: Spec, rule: rules.Rule) -> Entry:
        master = self.normal(spec)
        slots = [self.lay(f"slot {j} of {i}", self.normal(spec).abs(), spec.misaligned) for j in range(len(rule.slots))]
        cells = tuple(
            self.lay(f"cell {j} of {i}", torch.rand((), generator=self.generator)) for j in range(len(rule.cells))
        )
        if spec.dtype is SINGLE and rule is not rules.ASSIGN:
            param = self.lay(f"param {i}", master, spec.misaligned)
            return Entry(param, param, tuple(slots), spec.group, rule, write_back=False, cells=cells)
        param = self.lay(f"param {i}", master.to(spec.dtype), spec.misaligned)
        master = self.lay(f"master {i}", master, spec.misaligned)
        return Entry(param, master, tuple(slots), spec.group, rule, write_back=True, cells=cells)

    def sources(self, i: int, spec: Spec, scales: list[Tensor | None]) -> list[Source]:
        found = []
        for k, grad in enumerate(spec.grads):
            values = (self.normal(spec) * self.problem.magnitude).to(grad.dtype)
            flat = values.as_strided((values.numel(),), (1,))
            for position, value in grad.spikes:
                flat[position] = value
            found.append(Source(self.lay(f"grad {k} of {i}", values, grad.misaligned), scales[grad.loss], grad.loss))
        return found


def build(problem: Problem, device: torch.device) -> World:
    builder = Builder(problem, device)
    optimizer = problem.optimizer([{"params": [torch.zeros(1)], **group} for group in problem.groups], lr=1e-2)
    family = rules.family_of(optimizer)
    groups = optimizer.param_groups
    rows = np.zeros((len(groups), layout.HYPER))
    for row, group in zip(rows, groups, strict=True):
        values = family.hyperparameters(group)
        row[: len(values)] = values
    chosen = [problem.rule or family.variant(groups[spec.group]) for spec in problem.tensors]
    entries = [builder.entry(i, s, rule) for i, (s, rule) in enumerate(zip(problem.tensors, chosen, strict=True))]
    losses = len(problem.scales)
    table = TensorTable(entries, losses, device)
    table.scalars.fill_(float("nan"))
    table.partials.fill_(float("nan"))
    table.decision.fill_(float("nan"))
    for name in _TABLE_BUFFERS:
        setattr(table, name, builder.lay(name, getattr(table, name).cpu()))
    scales = [None if s is None else builder.lay(f"scale {k}", torch.tensor([s])) for k, s in enumerate(problem.scales)]
    sources = SourceTable(device)
    kinds = problem.kinds or (layout.FRESH,) * losses
    sources.set(
        [builder.sources(i, spec, scales) for i, spec in enumerate(problem.tensors)],
        [Ballot(kind, scale) for kind, scale in zip(kinds, scales, strict=True)],
    )
    return World(
        table,
        sources,
        hyper=torch.from_numpy(rows).to(device),
        max_norm=torch.tensor([problem.max_norm], dtype=torch.float64, device=device),
        found_inf=None if problem.found_inf is None else torch.tensor([problem.found_inf], device=device),
        votes=builder.lay("votes", torch.full((losses, layout.VOTE), float("nan"))),
        family=family,
        buffers=builder.buffers,
    )


def run_inspect(world: World, module: Any) -> None:
    module.inspect(world.table, world.sources)


def run_decide(world: World, module: Any) -> None:
    t = world.table
    module.decide(
        t,
        world.sources,
        t.found[None],
        t.partials,
        world.hyper,
        world.max_norm,
        world.family,
        world.found_inf,
        world.votes,
    )


def run_measure(world: World, module: Any) -> None:
    for rule in world.table.update_chunks:
        if rule.measure is not None:
            module.measure(world.table, world.sources, rule, world.table.decision)
        if rule.settle is not None:
            module.settle(world.table, world.sources, rule, world.table.decision)


def run_update(world: World, module: Any) -> None:
    for rule in world.table.update_chunks:
        module.update(world.table, world.sources, rule, world.table.decision)


def check(problem: Problem, steps: int = 2, module: Any = launch) -> World:
    """Runs `steps` steps of the reference, of the CPU path and of `module` side by side; raises where they differ.

    Returns:
        The kernels' world after the last step.
    """
    expected, blocked, actual = (build(problem, device) for device in (CPU, CPU, DEVICE))
    others = ((blocked, cpu), (actual, module))
    for _ in range(steps):
        run_inspect(expected, reference)
        for world, path in others:
            run_inspect(world, path)
            assert_same_partials(expected, world)
            assert_same(expected, world)
        run_decide(expected, reference)
        for world, path in others:
            run_decide(world, path)
            assert_same_decision(expected, world)
            assert_same(expected, world)
        run_measure(expected, reference)
        for world, path in others:
            run_measure(world, path)
            assert_same(expected, world)
        run_update(expected, reference)
        for world, path in others:
            run_update(world, path)
            assert_same(expected, world)
    return actual


def assert_same_partials(expected: World, actual: World) -> None:
    """The programs' sums differ, their total does not."""
    total, other = expected.table.partials.sum().item(), actual.table.partials.sum().item()
    if np.isfinite(total):
        np.testing.assert_allclose(other, total, rtol=1e-12)
    else:
        assert other == float("inf"), f"the sum of squares is {other} where the reference's is {total}"
    buffer = actual.buffers["partials"].cpu()
    assert not buffer[PAD:-PAD].isnan().any(), "a program left its partial sum unwritten"
    assert (buffer[:PAD] == SENTINEL).all(), "a program wrote before the first partial sum"
    assert (buffer[-PAD:] == SENTINEL).all(), "a program wrote beyond the last partial sum"


def assert_same_decision(expected: World, actual: World) -> None:
    """Norm and clip to 1 ULP, for the order of a sum; then both go on with the reference's."""
    there, here = expected.table.decision.cpu(), actual.table.decision.cpu()
    assert ulps(there[layout.CLIP], here[layout.CLIP]) <= 1, f"clip {here[layout.CLIP]} for {there[layout.CLIP]}"
    assert ulps(there[layout.NORM], here[layout.NORM]) <= 1, f"norm {here[layout.NORM]} for {there[layout.NORM]}"
    actual.table.decision[1:3] = expected.table.decision[1:3].to(actual.table.decision.device)


def ulps(a: Tensor, b: Tensor) -> int:
    """How many FP32 values lie between two numbers of one sign; 0 for two NaN."""
    if a.isnan() or b.isnan():
        return 0 if a.isnan() and b.isnan() else 1 << 30
    return abs(int(a.view(torch.int32)) - int(b.view(torch.int32)))


def assert_same(expected: World, actual: World) -> None:
    """Every bit of every buffer, sentinels included. A NaN equals any other: processors choose its payload freely."""
    for name, there in expected.buffers.items():
        if name != "partials":
            assert_same_bits(name, there, actual.buffers[name].cpu())


def assert_same_bits(name: str, expected: Tensor, actual: Tensor) -> None:
    bits = _BITS[expected.element_size()]
    different = expected.view(bits) != actual.view(bits)
    if expected.is_floating_point():
        different &= ~(expected.isnan() & actual.isnan())
    where = different.nonzero().flatten()
    assert len(where) == 0, (
        f"{name}: {len(where)} of {expected.numel() - 2 * PAD} elements differ, first at {int(where[0]) - PAD}: "
        f"{actual[where[0]]} for {expected[where[0]]}"
    )
