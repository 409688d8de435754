"""The numerical specification, written plainly: everything that runs a step is compared with it, bit for bit.

Every function here has a twin of the same name and signature in `kernels.launch` and in `mpengine.cpu`, whose `decide`
and `update_scale` are these. All arithmetic on elements is FP32 in the order written, without contraction into fused
multiply-adds, with correctly rounded division and square root; scalars are computed in float64 and rounded once. So
the reference, the CPU path, the Triton interpreter and the GPU give the same bits, except for the order in which sums
of squares are added.

A step is three calls:

```
inspect   reads every pending gradient once: x_k = float32(g_k) * inv_scale_k; total = x_0 + x_1 + ...
          -> which losses overflowed in which tensor; sums of squares of total
decide    -> skip or not, the clip coefficient, step counts, per-tensor scalars, votes for the scaler
update    -> total * clip through the rule into master and slots; param = rounded master
```

and `update_scale` moves the scales. A rule that needs norms of each tensor, or keeps a number for it, has `measure`
and `settle` before its update. Element loops are blocked so that a block's temporaries stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mpengine.kernels import layout
from mpengine.masters import DeviceSchedule, TensorTable, flat
from mpengine.rules import BUILT_IN, FAMILIES, Family, Rule
from mpengine.rules.arithmetic import square_sum
from mpengine.scaling import ScalePolicy, ScaleState, Vote, next_state
from mpengine.sources import Source, SourceTable

BLOCK = 4 * layout.INSPECT_CHUNK  # elements: the temporaries of a block (about 2 MB) stay in the cache
_INFINITY_BITS = int(np.float32(np.inf).view(np.int32))


@torch.no_grad()
def inspect(table: TensorTable, sources: SourceTable) -> None:
    """Reads every pending gradient once; writes `table.stamps`, `.found`, `.partials` and `.tallies`.

    A loss is marked with the number of this attempt, in the tensor and overall, where one of its unscaled
    gradients is inf or NaN (a product that overflows counts). Where only the sum of several losses overflows, all
    of them are marked. `partials` get the sum of squares (each rounded to FP32, added in float64) of the unscaled
    total; here the first program of a tensor holds all of its sum. `tallies` count the elements of each scaled
    gradient that are zero or subnormal, find the largest unscaled one, and where a loss overflowed, count that.
    """
    attempt = int(table.counts.sum()) + 1
    table.partials.zero_()
    tallies = table.tallies.numpy()
    first = 0
    for i, entry in enumerate(table.entries):
        pending = sources.entries[i]
        square_sum = 0.0
        for b, (total, shares) in enumerate(_unscaled_blocks(pending)):
            here = first + b * (BLOCK // layout.INSPECT_CHUNK)  # the first of this block's programs
            for source in pending:
                if source.scale is not None:
                    _tally(tallies[here:, source.loss_id], flat(source.grad)[b * BLOCK : (b + 1) * BLOCK], source)
            block_sum = float((total * total).sum(dtype=torch.float64))
            square_sum += block_sum
            if not math.isfinite(block_sum):  # an overflow, or only a square beyond FP32
                stamp(table, i, here, attempt, total, shares, pending)
        programs = -(-entry.param.numel() // layout.INSPECT_CHUNK)
        if programs:
            table.partials[first] = square_sum
        first += programs


def _tally(cells: np.ndarray, grad: Tensor, source: Source) -> None:
    """Counts a block of a scaled gradient, chunk by chunk; `cells` are int32[programs, layout.TALLY].

    Bits without the sign are ordered as magnitudes are, with the subnormal ones below the smallest normal number's.
    """
    bits = grad.view(torch.int32 if grad.dtype == torch.float32 else torch.int16).numpy()
    magnitudes = bits & np.iinfo(bits.dtype).max
    largest = []
    for p, start in enumerate(range(0, len(magnitudes), layout.INSPECT_CHUNK)):
        chunk = magnitudes[start : start + layout.INSPECT_CHUNK]
        cells[p, layout.SMALL] = np.count_nonzero(chunk < SMALLEST_NORMAL[grad.dtype])
        largest.append(chunk.max())
    values = torch.from_numpy(np.array(largest)).view(grad.dtype).float() * inverse(source.scale)
    cells[: len(largest), layout.LARGEST] = values.numpy().view(np.int32)


SMALLEST_NORMAL = {torch.float16: 1 << 10, torch.bfloat16: 1 << 7, torch.float32: 1 << 23}  # bits


def stamp(
    table: TensorTable, i: int, here: int, attempt: int, total: Tensor, shares: list[Tensor], pending: Sequence[Source]
) -> None:
    """Marks and counts the overflows of a block of tensor `i` that begins with program `here`; none may be there."""
    overflowed = [~torch.isfinite(x) for x in shares]
    only_the_sum = ~torch.isfinite(total)
    for bad in overflowed:
        only_the_sum &= ~bad
    for source, bad in zip(pending, overflowed, strict=True):
        bad |= only_the_sum
        if not bool(bad.any()):
            continue
        table.stamps[i, source.loss_id] = attempt
        table.found[source.loss_id] = attempt
        for p, chunk in enumerate(bad.split(layout.INSPECT_CHUNK)):
            count = int(chunk.sum())
            if count and source.scale is not None:
                cell = table.tallies[here + p, source.loss_id]
                cell[layout.LARGEST] = _INFINITY_BITS
                cell[layout.NONFINITE] = count
                cell[layout.ATTEMPT] = attempt


def decide(
    table: TensorTable,
    sources: SourceTable,
    found: Tensor,
    partials: Tensor,
    hyper: Tensor,
    max_norm: Tensor,
    family: Family | None,
    found_inf: Tensor | None = None,
    votes: Tensor | None = None,
    schedule: DeviceSchedule | None = None,
) -> None:
    """Decides about the step; writes `decision`, `counts`, and where it is taken `steps` and `scalars` of `table`.

    ```
    skip = a loss of some device has a stamp of this attempt in found, or found_inf != 0 (NaN included)
    norm = float32(sqrt(sum of partials)); NaN where the step is skipped
    clip = min(1, max_norm / (norm + 1e-6)); 1 where max_norm is inf
    taken:   steps += 1 for tensors that have a gradient; scalars = family's function of hyper and steps
    ```

    Args:
        table: The tensors of this device.
        sources: Their gradients, and the ballots on the losses.
        found: int32[D, L], `found` of every device of the optimizer.
        partials: float64[P], `partials` of every device.
        hyper: float64[G, layout.HYPER].
        max_norm: float64[1], inf for no clipping.
        family: Gives the scalars; None leaves them alone.
        found_inf: float32, one element: a verdict from outside (`torch.amp.GradScaler`'s).
        votes: float32[L, layout.VOTE], written for the scaler unless None.
        schedule: Replaces some of the hyperparameters by those of the steps taken.
    """
    attempt = int(table.counts.sum()) + 1
    overflowed = (found == attempt).any(dim=0).tolist()
    outside = found_inf is not None and float(found_inf) != 0.0
    skip = any(overflowed) or outside
    clip = np.float32(1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        norm = np.float32(math.sqrt(float(partials.sum()))) if not skip else np.float32("nan")
        if not skip and float(max_norm) != math.inf:
            clip = min(clip, np.float32(float(max_norm)) / (norm + np.float32(1e-6)))
    table.decision.copy_(torch.tensor([float(skip), float(clip), float(norm), 0.0]))
    table.counts[layout.SKIPPED if skip else layout.TAKEN] += 1
    if not skip and table.entries:
        active = torch.tensor([bool(pending) for pending in sources.entries])
        table.steps += active
        if family is not None:
            groups = [entry.group for entry in table.entries]
            now = (
                hyper.numpy() if schedule is None else _scheduled(hyper, schedule, int(table.counts[layout.TAKEN]) - 1)
            )
            rows = now[groups]
            steps = np.maximum(table.steps.numpy(), 1)  # a tensor that has never stepped: 0 would divide by 0
            columns = SCALAR_FUNCTIONS.get(family.name, family.scalars)(rows.T, steps)
            for column, values in enumerate(columns):
                table.scalars[:, column] = torch.from_numpy(np.broadcast_to(values, len(groups)).astype(np.float32))
    if votes is not None:
        for loss_id, ballot in enumerate(sources.ballots):
            votes[loss_id, 0] = _outcome(ballot.kind, overflowed[loss_id] or outside)
            votes[loss_id, 1] = ballot.scale if ballot.scale is not None else 0.0


def _scheduled(hyper: Tensor, schedule: DeviceSchedule, taken: int) -> np.ndarray:
    """The hyperparameters of each group after `taken` steps."""
    plan = schedule.plan.tolist()
    row = max(min(taken - plan[layout.SCHEDULE_START], plan[layout.SCHEDULE_ROWS] - 1), 0)
    now = hyper.numpy().copy()
    for j, column in enumerate(plan[layout.SCHEDULE_COLUMN :]):
        if column >= 0:
            now[:, j] = schedule.values[row, :, column].numpy()
    return now


def _outcome(kind: int, overflow: bool) -> int:
    if kind == layout.FRESH:
        return layout.OVERFLOW if overflow else layout.CLEAN
    return layout.STALE_OVERFLOW if kind == layout.STALE and overflow else layout.NO_VOTE


@torch.no_grad()
def update(table: TensorTable, sources: SourceTable, rule: Rule, decision: Tensor) -> None:
    """Applies `rule` to every tensor of that rule that has a gradient; nothing at all where `decision` skips.

    ```
    grad = (x_0 + x_1 + ...) * clip
    master, slots = rule(master, grad, slots, scalars)
    param = round(master)                   # unless the parameter is its own master
    ```
    """
    if bool(decision[layout.SKIP] != 0):
        return
    clip = float(decision[layout.CLIP])
    step = RULES.get(rule.name, rule.update)
    for entry, pending, scalars in zip(table.entries, sources.entries, table.scalars.tolist(), strict=True):
        if not pending or entry.rule != rule:
            continue
        master, param = flat(entry.master), flat(entry.param)
        slots = [flat(slot) for slot in entry.slots]
        start = 0
        for total, _ in _unscaled_blocks(pending):
            here = slice(start, start + total.numel())
            start += total.numel()
            old = tuple(slot[here] for slot in slots)
            new_master, new_slots = step(master[here], total * clip, old, scalars)
            master[here] = new_master
            for slot, new in zip(old, new_slots, strict=True):
                slot.copy_(new)
            if entry.write_back:
                param[here] = new_master


@torch.no_grad()
def measure(table: TensorTable, sources: SourceTable, rule: Rule, decision: Tensor) -> None:
    """Writes `table.norms[rule].partials`: sums of squares of what the rule measures, for tensors with a gradient.

    Each square is rounded to FP32, the sum is of float64, infinite where it is not finite. Here the first program of a
    tensor holds all of its sums.
    """
    if rule.measure is None or bool(decision[layout.SKIP] != 0):
        return
    norms, clip = table.norms[rule], float(decision[layout.CLIP])
    norms.partials.zero_()
    scalars = table.scalars.tolist()
    for i, first, _ in norms.spans.tolist():
        entry, start = table.entries[i], 0
        for total, _ in _unscaled_blocks(sources.entries[i]):
            here = slice(start, start + total.numel())
            start += total.numel()
            slots = tuple(flat(slot)[here] for slot in entry.slots)
            measured = rule.measure(flat(entry.master)[here], total * clip, slots, scalars[i])
            for j, x in enumerate(measured):
                norms.partials[first, j] += square_sum(x)


@torch.no_grad()
def settle(table: TensorTable, sources: SourceTable, rule: Rule, decision: Tensor) -> None:
    """From norms and cells of each tensor with a gradient to the scalars that `update` reads, and the new cells."""
    if rule.settle is None or bool(decision[layout.SKIP] != 0):
        return
    norms = table.norms[rule]
    spans = [span for span in norms.spans.tolist() if sources.entries[span[layout.SPAN_TENSOR]]]
    if not spans:
        return
    chosen = [i for i, _, _ in spans]
    sums = np.array([norms.partials[start:stop].sum(dim=0).numpy() for _, start, stop in spans])
    cells = [[table.entries[i].cells[j] for i in chosen] for j in range(len(rule.cells))]
    with np.errstate(all="ignore"):
        c, settled = rule.settle(
            list(table.scalars[chosen].double().numpy().T),
            [np.sqrt(column) for column in sums.T[: rule.norms]],
            [np.array([float(cell) for cell in column]) for column in cells],
        )
        for j, values in enumerate(c):
            rounded = np.broadcast_to(values, len(chosen)).astype(np.float32)
            table.scalars[chosen, j] = torch.from_numpy(rounded)
        for column, values in zip(cells, settled, strict=True):
            for cell, value in zip(column, np.broadcast_to(values, len(chosen)).astype(np.float32), strict=True):
                cell.fill_(float(value))


def update_scale(scale: Tensor, previous: Tensor, counters: Tensor, votes: Tensor, policy: Tensor) -> None:
    """Moves the scale of every loss that has a vote, by `scaling.next_state`, and clears the votes.

    Args:
        scale: float32[L].
        previous: float32[L]: gets the scale from before, where there is a vote.
        counters: int32[L, layout.COUNTERS].
        votes: float32[R, L, layout.VOTE], one row for each optimizer.
        policy: float64[layout.POLICY].
    """
    numbers = policy.tolist()
    rule = ScalePolicy.from_row(numbers)
    for loss_id in range(scale.numel()):
        cast = [Vote(int(outcome), value) for outcome, value in votes[:, loss_id].tolist()]
        if all(vote.outcome == layout.NO_VOTE for vote in cast):
            continue
        state = ScaleState(float(scale[loss_id]), *counters[loss_id].tolist())
        after = next_state(state, cast, rule)
        previous[loss_id] = state.scale
        scale[loss_id] = after.scale
        counters[loss_id] = torch.tensor(after.counters(), dtype=torch.int32)
    votes.zero_()


def _unscaled_blocks(pending: Sequence[Source]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The unscaled gradient, block by block: the FP32 total, and each source's share x_k = g_k * inv_scale_k."""
    if not pending:
        return
    grads = [flat(source.grad) for source in pending]
    inverses = [inverse(source.scale) for source in pending]
    for start in range(0, grads[0].numel(), BLOCK):
        shares = [grad[start : start + BLOCK].float() * inv for grad, inv in zip(grads, inverses, strict=True)]
        total = shares[0]
        for share in shares[1:]:
            total = total + share
        yield total, shares


def inverse(scale: Tensor | None) -> float:
    """float32(1 / float64(scale)), as `torch.amp.GradScaler` computes it; inf at its scales below 2^-128."""
    if scale is None:
        return 1.0
    with np.errstate(over="ignore", divide="ignore"):
        return float(np.float32(np.float64(1.0) / float(scale)))


# A table, so that the tests' sabotage finds one place.
SCALAR_FUNCTIONS = {family.name: family.scalars for family in FAMILIES}
RULES = {rule.name: rule.update for rule in BUILT_IN}
