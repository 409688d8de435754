"""decide: one program turns what inspect found into the decision of the step.

```
skip = some found[device, loss] == attempt, or found_inf != 0 (NaN included)
norm = float32(sqrt(sum of partials)); NaN where the step is skipped
clip = min(1, max_norm / (norm + 1e-6)); 1 where max_norm is inf
taken:  steps[tensor] += 1 where the tensor has a gradient         # -> the next decide
        hyper[group] = the schedule's row of the steps taken so far, where something is scheduled
        scalars[tensor] = family(hyper[group], steps[tensor])      # -> update
decision = skip, clip, norm                                        # -> update; last_grad_norm
votes[loss] = clean, overflow, stale overflow or none, and the scale behind it     # -> update_scale
counts[taken or skipped] += 1                                      # -> the next attempt's number
```

Bytes per parameter: 8 / 16,384 (partials), and about 150 bytes a tensor: latency, not bandwidth. The sum over the
partials has a fixed order, so the norm of equal gradients is equal in every run.
"""

import triton
import triton.language as tl

from .fields import (
    BALLOT,
    BALLOT_KIND,
    BALLOT_SCALE_PTR,
    CLEAN,
    CLIP,
    DECISION,
    FRESH,
    GRAD_PTR,
    GROUP,
    HYPER,
    NO_VOTE,
    NORM,
    OVERFLOW,
    ROW,
    SCALARS,
    SCHEDULE_COLUMN,
    SCHEDULE_GROUPS,
    SCHEDULE_ROWS,
    SCHEDULE_START,
    SCHEDULE_WIDTH,
    SKIP,
    SKIPPED,
    SOURCE,
    STALE,
    STALE_OVERFLOW,
    TAKEN,
    VOTE,
)


@triton.jit(
    do_not_specialize=["num_tensors", "num_losses", "num_devices", "num_partials"],
    do_not_specialize_on_alignment=["ballots_ptr", "found_inf_ptr", "votes_ptr", "plan_ptr", "schedule_ptr"],
)
def _decide_kernel(
    rows_ptr,  # int64[T, ROW]
    sources_ptr,  # int64[T, SOURCES, SOURCE]
    ballots_ptr,  # int64[L, BALLOT]
    found_ptr,  # int32[D, L]
    partials_ptr,  # float64[P]
    hyper_ptr,  # float64[G, HYPER]
    plan_ptr,  # int64[SCHEDULE], or None
    schedule_ptr,  # float64[rows, G, width], or None
    max_norm_ptr,  # float64[1]
    found_inf_ptr,  # float32[1] or None
    counts_ptr,  # int32[COUNTS], updated
    steps_ptr,  # int32[T], updated
    scalars_ptr,  # float32[T, SCALARS], written
    decision_ptr,  # float32[DECISION], written
    votes_ptr,  # float32[L, VOTE], written, or None
    num_tensors,
    num_losses,
    num_devices,
    num_partials,
    FAMILY: tl.constexpr,  # a function of rules.SCALAR_FUNCTIONS, or None
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,  # the number of threads: every element has one owner, so a lane may overwrite what it read
):
    taken, skipped = tl.load(counts_ptr + TAKEN), tl.load(counts_ptr + SKIPPED)
    attempt = taken + skipped + 1
    outside = 0  # flags of one value are int32: the interpreter cannot spread a boolean over a block
    if found_inf_ptr is not None:
        outside = (tl.load(found_inf_ptr) != 0.0).to(tl.int32)
    skip = _occurs(attempt, found_ptr, num_devices * num_losses, BLOCK) | outside

    norm = tl.full((), float("nan"), tl.float32)
    clip = tl.full((), 1.0, tl.float32)
    if skip == 0:
        norm = tl.sqrt(_sum(partials_ptr, num_partials, 8 * BLOCK)).to(tl.float32)
        max_norm = tl.load(max_norm_ptr)
        if max_norm != float("inf"):
            quotient = tl.div_rn(max_norm.to(tl.float32), norm + 1e-6)
            clip = tl.where(quotient < 1.0, quotient, 1.0)
        hyper_ptrs = (hyper_ptr, plan_ptr, schedule_ptr)
        _advance(rows_ptr, sources_ptr, hyper_ptrs, steps_ptr, scalars_ptr, num_tensors, taken, FAMILY, SOURCES, BLOCK)
    if votes_ptr is not None:
        _vote(attempt, outside, found_ptr, ballots_ptr, votes_ptr, num_losses, num_devices, BLOCK)

    tl.store(decision_ptr + SKIP, skip.to(tl.float32))
    tl.store(decision_ptr + CLIP, clip)
    tl.store(decision_ptr + NORM, norm)
    tl.store(decision_ptr + DECISION - 1, 0.0)
    tl.debug_barrier()  # by now every warp has read the counts
    tl.store(counts_ptr + TAKEN, taken + 1 - skip)
    tl.store(counts_ptr + SKIPPED, skipped + skip)


@triton.jit
def _occurs(attempt, found_ptr, size, BLOCK: tl.constexpr):
    """1 where a stamp of this attempt stands in `found`, else 0."""
    seen = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        stamps = tl.load(found_ptr + i, mask=i < size, other=0)  # an attempt is at least 1
        seen = seen | (stamps == attempt).to(tl.int32)
    return tl.max(seen)


@triton.jit
def _sum(partials_ptr, size, BLOCK: tl.constexpr):
    lanes = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        lanes += tl.load(partials_ptr + i, mask=i < size, other=0.0)
    return tl.sum(lanes)


@triton.jit
def _advance(
    rows_ptr,
    sources_ptr,
    hyper_ptrs,
    steps_ptr,
    scalars_ptr,
    num_tensors,
    taken,
    FAMILY: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the step of every tensor that has a gradient, and computes the tensors' scalars."""
    for start in range(0, num_tensors, BLOCK):
        tensor = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = tensor < num_tensors
        address = tl.load(sources_ptr + tensor * (SOURCES * SOURCE) + GRAD_PTR, mask=mask, other=0)
        step = tl.load(steps_ptr + tensor, mask=mask, other=0) + (address != 0).to(tl.int32)
        tl.store(steps_ptr + tensor, step, mask=mask)
        if FAMILY is not None:
            group = tl.load(rows_ptr + tensor * ROW + GROUP, mask=mask, other=0)
            hyper = ()
            for j in tl.static_range(HYPER):
                hyper = hyper + (_hyperparameter(j, hyper_ptrs, group, taken, mask),)
            columns = FAMILY(hyper, tl.maximum(step, 1))
            one = tl.full((BLOCK,), 1.0, tl.float64)  # makes a column of a constant, and nothing else of a column
            tl.static_assert(len(columns) <= SCALARS, "a rule's scalars are more than layout.SCALARS")
            for j in tl.static_range(len(columns)):
                tl.store(scalars_ptr + tensor * SCALARS + j, (columns[j] * one).to(tl.float32), mask=mask)


@triton.jit
def _hyperparameter(j, hyper_ptrs, group, taken, mask):
    """Hyperparameter j of each tensor's group: the group's own, or the scheduled one."""
    hyper_ptr, plan_ptr, schedule_ptr = hyper_ptrs
    value = tl.load(hyper_ptr + group * HYPER + j, mask=mask, other=0.0)
    if schedule_ptr is not None:
        column = tl.load(plan_ptr + SCHEDULE_COLUMN + j) + tl.zeros_like(group)  # of one shape with the mask
        width = tl.load(plan_ptr + SCHEDULE_WIDTH)
        row = taken.to(tl.int64) - tl.load(plan_ptr + SCHEDULE_START)
        row = tl.maximum(tl.minimum(row, tl.load(plan_ptr + SCHEDULE_ROWS) - 1), 0)
        place = (row * tl.load(plan_ptr + SCHEDULE_GROUPS) + group) * width + column
        value = tl.load(schedule_ptr + place, mask=mask & (column >= 0), other=value)
    return value


@triton.jit
def _vote(attempt, outside, found_ptr, ballots_ptr, votes_ptr, num_losses, num_devices, BLOCK: tl.constexpr):
    """Tells the scaler about each loss."""
    for start in range(0, num_losses, BLOCK):
        loss = start + tl.arange(0, BLOCK)
        mask = loss < num_losses
        overflow = (tl.zeros((BLOCK,), tl.int32) | outside) != 0
        for device in range(0, num_devices):
            stamp = tl.load(found_ptr + device * num_losses + loss, mask=mask, other=0)
            overflow = overflow | (stamp == attempt)
        kind = tl.load(ballots_ptr + loss * BALLOT + BALLOT_KIND, mask=mask, other=0)
        fresh = tl.where(kind == FRESH, tl.where(overflow, OVERFLOW, CLEAN), NO_VOTE)
        outcome = tl.where((kind == STALE) & overflow, STALE_OVERFLOW, fresh)
        scale_address = tl.load(ballots_ptr + loss * BALLOT + BALLOT_SCALE_PTR, mask=mask, other=0)
        scale = tl.load(scale_address.to(tl.pointer_type(tl.float32)), mask=scale_address != 0, other=0.0)
        tl.store(votes_ptr + loss * VOTE, outcome.to(tl.float32), mask=mask)
        tl.store(votes_ptr + loss * VOTE + 1, scale, mask=mask)
