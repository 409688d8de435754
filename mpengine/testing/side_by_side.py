"""Steps of a rule by the reference, by the CPU path and by the kernels, side by side; every bit is compared.

Every buffer that is read or written, the tables' own included, lies between sentinels, which are compared with the
rest: a write past an end changes one, a read past an end changes a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mpengine import reference
from mpengine.kernels import layout
from mpengine.masters import Entry, TensorTable
from mpengine.rules import Rule, RuleOptimizer
from mpengine.sources import Ballot, Source, SourceTable

CPU = torch.device("cpu")
_PAD, _SENTINEL = 64, -77
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_TABLE_BUFFERS = ("steps", "scalars", "stamps", "found", "partials", "tallies", "counts", "decision")
_HALF, _BRAIN, _SINGLE = torch.float16, torch.bfloat16, torch.float32
_SCALES = (1024.0, 65536.0)
STEPS, _OVERFLOW, _LATE = 5, 1, 4  # the second of the steps overflows, and the fifth is a late one
_TAKEN = (4, 5, 8, 24, 31, 63, 99, 500, 999, 10**4, 10**5, 10**6, 2**31 - 2)  # before it, by each of TENSORS
COUNTS = sorted({*range(1, 65), *(2**i for i in range(7, 31)), *(10**i for i in range(2, 10)), 2**31 - 1})


@dataclass(frozen=True)
class Spec:
    """A tensor, and the losses that it gets gradients of; with patterns of steps when it is idle, or gets zeros."""

    size: int
    dtype: torch.dtype = _HALF
    losses: tuple[int, ...] = (0,)
    group: int = 0
    misaligned: bool = False
    idle: tuple[int, ...] = ()
    zeros: bool = False  # for weights
    zero_grads: tuple[int, ...] = ()

    def __str__(self) -> str:
        odd = ", misaligned" if self.misaligned else ""
        zero = ", all 0" if self.zeros else ""
        still = f", gradients 0 in steps {self.zero_grads}" if self.zero_grads else ""
        return f"{self.size} elements of {str(self.dtype).removeprefix('torch.')}{odd}{zero}{still}"


TENSORS = (
    Spec(0),
    Spec(1),
    Spec(31, _SINGLE),
    Spec(1023, _BRAIN, group=1),
    Spec(1025, losses=(0, 1)),
    Spec(1025, _SINGLE, losses=(1,), group=1, misaligned=True),
    Spec(2048, misaligned=True, group=1),
    Spec(40, idle=tuple(range(STEPS))),
    Spec(100, _SINGLE, idle=(0, 2)),
    Spec(2100),
    Spec(33, zeros=True),
    Spec(9, _SINGLE, zero_grads=(0, 2)),  # so is their state, then
    Spec(7, _SINGLE, group=1, zeros=True, zero_grads=(0,)),
)


@dataclass
class World:
    """An optimizer's tensors in the memory of one device."""

    table: TensorTable
    sources: SourceTable
    hyper: Tensor
    max_norm: Tensor
    votes: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)  # whole, sentinels included


class _Builder:
    def __init__(
        self,
        optimizer: RuleOptimizer,
        device: torch.device,
        change: Callable[[Rule], Rule] = lambda rule: rule,
        specs: Sequence[Spec] = TENSORS,
    ) -> None:
        self._optimizer, self._device, self._specs = optimizer, device, specs
        self._rules = [change(optimizer.family.variant(group)) for group in _two_groups(optimizer)]
        self._generator = torch.Generator().manual_seed(0)
        self.buffers: dict[str, Tensor] = {}

    def lay(self, name: str, values: Tensor, misaligned: bool = False) -> Tensor:
        """A copy of `values` between sentinels."""
        start = _PAD + misaligned
        buffer = torch.full((start + values.numel() + _PAD,), _SENTINEL, dtype=values.dtype, device=self._device)
        view = buffer.as_strided(values.shape, values.stride(), start)
        view.copy_(values)
        self.buffers[name] = buffer
        return view

    def entry(self, i: int, spec: Spec) -> Entry:
        rule, initial = self._rules[spec.group], self._optimizer.family.initial(_two_groups(self._optimizer)[0])
        name = f"of tensor {i} ({spec})"
        values = torch.randn(spec.size, generator=self._generator)
        values = torch.zeros(spec.size) if spec.zeros else values
        slots = tuple(
            self.lay(f"slot '{slot}' {name}", torch.full((spec.size,), initial.get(slot, 0.0)), spec.misaligned)
            for slot in rule.slots
        )
        cells = tuple(self.lay(f"cell '{c}' {name}", torch.full((), initial.get(c, 0.0))) for c in rule.cells)
        param = self.lay(f"parameter {name}", values.to(spec.dtype), spec.misaligned)
        master = param if spec.dtype == _SINGLE else self.lay(f"master {name}", values, spec.misaligned)
        return Entry(param, master, slots, spec.group, rule, spec.dtype != _SINGLE, cells)

    def build(self) -> World:
        table = TensorTable([self.entry(i, spec) for i, spec in enumerate(self._specs)], len(_SCALES), self._device)
        for never_read in (table.scalars, table.partials, table.decision):
            never_read.fill_(float("nan"))
        for name in _TABLE_BUFFERS:
            setattr(table, name, self.lay(name, getattr(table, name).cpu()))
        rows = np.zeros((2, layout.HYPER))
        for row, group in zip(rows, _two_groups(self._optimizer), strict=True):
            values = [float(value) for value in self._optimizer.family.hyperparameters(group)]
            row[: len(values)] = values
        votes = self.lay("votes", torch.full((len(_SCALES), layout.VOTE), float("nan")))
        max_norm = torch.ones(1, dtype=torch.float64, device=self._device)  # every gradient here is larger
        hyper = torch.from_numpy(rows).to(self._device)
        return World(table, SourceTable(self._device), hyper, max_norm, votes, self.buffers)

    def gradients(self, world: World, step: int) -> None:
        """The gradients of one step: zeros among them, large and small ones, and once an infinity."""
        scales = [self.lay(f"scale {k}", torch.tensor([scale])) for k, scale in enumerate(_SCALES)]
        entries: list[list[Source]] = []
        for i, spec in enumerate(self._specs):
            entries.append([])
            for k in spec.losses:
                values = torch.randn(spec.size, generator=self._generator) * 100.0
                values[:: 7 if spec.size > 7 else spec.size + 1] = 0.0
                if step in spec.zero_grads:
                    values.zero_()
                if step == _OVERFLOW and spec.size == 1025 and k == 0:
                    values[1000] = float("inf")
                grad = self.lay(f"gradient {k} of tensor {i} ({spec})", values.to(spec.dtype), spec.misaligned)
                if step not in spec.idle:
                    entries[i].append(Source(grad, scales[k], k))
        world.sources.set(entries, [Ballot(layout.FRESH, scale) for scale in scales])


def _two_groups(optimizer: RuleOptimizer) -> list[dict[str, float]]:
    """The first group, and the same at half the rate."""
    group = optimizer.param_groups[0]
    return [group, {**group, "lr": 0.5 * float(group["lr"])}]


def compare(
    optimizer: RuleOptimizer,
    module: ModuleType,
    device: torch.device = CPU,
    change: Callable[[Rule], Rule] = lambda rule: rule,
) -> None:
    """Steps `TENSORS` by `reference` and by `module`; looks at all memory after each call.

    Args:
        optimizer: Gives the rule, and its hyperparameters by the first group.
        module: Has `inspect`, `decide`, `measure`, `settle` and `update`.
        device: Where `module` runs.
        change: Of the rule that the reference runs, for tests of this test.

    Raises:
        AssertionError: They differ, with the tensor, the element and both values; or the reference is not finite, or a
            skipped step changed something.
    """
    builders = _Builder(optimizer, CPU, change), _Builder(optimizer, device)
    expected, actual = (builder.build() for builder in builders)
    for step in range(STEPS):
        for builder, world in zip(builders, (expected, actual), strict=True):
            builder.gradients(world, step)
            if step == _LATE:
                world.table.steps.copy_(torch.tensor(_TAKEN))
        before = {name: buffer.clone() for name, buffer in actual.buffers.items() if _is_trained(name)}
        for call in ("inspect", "decide", "measure", "settle", "update"):
            _run(call, reference, optimizer, expected)
            try:
                _run(call, module, optimizer, actual)
            except Exception as error:  # of the rule's own function there
                raise AssertionError(f"{call} of step {step} fails where the reference does not: {error}.") from error
            if call == "decide":
                _agree_on_clip(expected, actual)
            _compare(f"{call} of step {step}", expected.buffers, actual.buffers)
        if step == _OVERFLOW:
            _compare(f"step {step}, which is skipped", before, {name: actual.buffers[name] for name in before})
    if expected.table.counts.tolist() != [STEPS - 1, 1]:
        raise AssertionError(
            f"of {STEPS} steps {expected.table.counts.tolist()} were taken and skipped; one overflows."
        )
    for name, buffer in expected.buffers.items():
        if _is_trained(name) and not buffer.isfinite().all():
            raise AssertionError(f"{name} is not finite after {STEPS} steps, of finite gradients but where skipped.")


def compare_scalars(optimizer: RuleOptimizer, module: ModuleType, device: torch.device = CPU) -> None:
    """The scalars of `COUNTS`, by the two `decide`: a tensor of one element for each.

    Raises:
        AssertionError: They differ, with the step, the scalar's number and both values.
    """
    tables = []
    for runs, where in ((reference, CPU), (module, device)):
        builder = _Builder(optimizer, where, specs=[Spec(1, _SINGLE)] * len(COUNTS))
        world = builder.build()
        builder.gradients(world, 0)
        world.table.partials.zero_()  # nothing is inspected
        world.table.steps.copy_(torch.tensor(COUNTS) - 1)
        try:
            _run("decide", runs, optimizer, world)
        except Exception as error:  # of the rule's own function there
            raise AssertionError(f"decide fails, by its scalars: {error}.") from error
        tables.append(world.table.scalars.cpu())
    expected, actual = tables
    different = (expected.view(torch.int32) != actual.view(torch.int32)) & ~(expected.isnan() & actual.isnan())
    if different.any():
        i, j = different.nonzero()[0].tolist()
        raise AssertionError(
            f"scalars differ at {int(different.any(dim=1).sum())} of {len(COUNTS)} step counts, first at step "
            f"{COUNTS[i]}: number {j} is {float(actual[i, j])!r} where the reference has {float(expected[i, j])!r}. "
            "(In Triton step is an int32 block, of which a Python float makes FP32: step.to(tl.float64).)"
        )


def _is_trained(name: str) -> bool:
    return name.split()[0] in ("parameter", "master", "slot", "cell")


def _run(call: str, module: ModuleType, optimizer: RuleOptimizer, world: World) -> None:
    table, sources = world.table, world.sources
    if call == "inspect":
        module.inspect(table, sources)
    elif call == "decide":
        found, partials = table.found[None], table.partials
        module.decide(table, sources, found, partials, world.hyper, world.max_norm, optimizer.family, votes=world.votes)
    for rule in table.update_chunks:
        if call == "update" or (call == "measure" and rule.measure) or (call == "settle" and rule.settle):
            getattr(module, call)(table, sources, rule, table.decision)


def _agree_on_clip(expected: World, actual: World) -> None:
    """A sum in another order may move norm and clip by 1 ULP; then both go on with the reference's."""
    theirs, ours = actual.table.decision.cpu(), expected.table.decision
    for name, column in (("clip coefficient", layout.CLIP), ("norm", layout.NORM)):
        a, b = ours[column], theirs[column]
        if not (a.isnan() and b.isnan()) and abs(int(a.view(torch.int32)) - int(b.view(torch.int32))) > 1:
            raise AssertionError(f"the {name} is {float(b)!r}, the reference's {float(a)!r}.")
    actual.table.decision[1:3] = ours[1:3].to(actual.table.decision.device)


def _compare(when: str, expected: dict[str, Tensor], actual: dict[str, Tensor]) -> None:
    """A NaN equals any other: processors choose its payload freely. The parts of a sum may be others, not the sum."""
    for name, there in expected.items():
        if name == "partials":
            continue
        here = actual[name].cpu()
        bits = _BITS[there.element_size()]
        different = there.cpu().view(bits) != here.view(bits)
        if there.is_floating_point():
            different &= ~(there.cpu().isnan() & here.isnan())
        where = different.nonzero().flatten().tolist()
        if where:
            raise AssertionError(_told(name, when, where, there.cpu(), here))


def _told(name: str, when: str, where: Sequence[int], expected: Tensor, actual: Tensor) -> str:
    size, i = expected.numel() - 2 * _PAD, where[0]
    inside = [j for j in where if _PAD <= j < expected.numel() - _PAD]
    if not inside:
        return f"{name} was written beyond its {'end' if i > _PAD else 'beginning'} by {when}."
    i = inside[0]
    gap = (actual[inside].double() - expected[inside].double()).abs().max()
    return (
        f"{name} differs after {when}: {len(inside)} of {size} elements, by {float(gap):.3g} at most, first at "
        f"{i - _PAD}: {actual[i].item()!r} where the reference has {expected[i].item()!r}."
    )
