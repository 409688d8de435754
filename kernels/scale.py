"""update_scale: moves the scale of every loss that has a vote. `mpengine.scaling.next_state`, on the device.

```
overflow = any OVERFLOW, or a STALE_OVERFLOW under a scale no larger than today's
overflow:     hysteresis_left = max(hysteresis_left - 1, 0); tracker = 0
              if hysteresis_left == 0: scale = max(min_scale, float32(float64(scale) * backoff_factor))
else, clean:  hysteresis_left = hysteresis; tracker += 1
              if tracker == growth_interval: tracker = 0
                  grown = float32(float64(scale) * growth_factor); scale = grown if grown <= max_scale
votes = 0
```

One program of one warp, each loss a lane: a lane clears the votes that it alone has read.
"""

import triton
import triton.language as tl

from .fields import (
    BACKOFF_FACTOR,
    CLEAN,
    CONSECUTIVE_OVERFLOWS,
    COUNTERS,
    GROWTH_FACTOR,
    GROWTH_INTERVAL,
    GROWTH_TRACKER,
    GROWTHS,
    HYSTERESIS,
    HYSTERESIS_LEFT,
    LAST_OVERFLOW,
    MAX_SCALE,
    MIN_SCALE,
    NO_VOTE,
    OVERFLOW,
    OVERFLOWS,
    STALE_OVERFLOW,
    UPDATES,
    VOTE,
)


@triton.jit(do_not_specialize=["num_losses", "num_optimizers"])
def _update_scale_kernel(
    scale_ptr,  # float32[L], updated
    previous_ptr,  # float32[L], the scale from before, written where there is a vote
    counters_ptr,  # int32[L, COUNTERS], updated
    votes_ptr,  # float32[R, L, VOTE], cleared
    policy_ptr,  # float64[POLICY]
    num_losses,
    num_optimizers,
    BLOCK: tl.constexpr,
):
    for start in range(0, num_losses, BLOCK):
        loss = start + tl.arange(0, BLOCK)
        mask = loss < num_losses
        scale = tl.load(scale_ptr + loss, mask=mask, other=1.0)
        voted = tl.zeros((BLOCK,), tl.int1)
        overflow = tl.zeros((BLOCK,), tl.int1)
        clean = tl.zeros((BLOCK,), tl.int1)
        for optimizer in range(0, num_optimizers):
            vote_ptr = votes_ptr + (optimizer * num_losses + loss) * VOTE
            outcome = tl.load(vote_ptr, mask=mask, other=0.0).to(tl.int32)
            behind = tl.load(vote_ptr + 1, mask=mask, other=0.0)
            voted = voted | (outcome != NO_VOTE)
            clean = clean | (outcome == CLEAN)
            overflow = overflow | (outcome == OVERFLOW) | ((outcome == STALE_OVERFLOW) & (behind <= scale))
            tl.store(vote_ptr, 0.0, mask=mask)
            tl.store(vote_ptr + 1, 0.0, mask=mask)
        tl.store(previous_ptr + loss, scale, mask=mask & voted)
        _move(scale, overflow, clean & ~overflow, scale_ptr + loss, counters_ptr + loss * COUNTERS, policy_ptr, mask)


@triton.jit
def _move(scale, overflow, clean, scale_ptr, counters_ptr, policy_ptr, mask):
    """The next state of each loss. `overflow` and `clean` exclude each other; where neither holds, nothing moves."""
    tracker = tl.load(counters_ptr + GROWTH_TRACKER, mask=mask, other=0)
    left = tl.load(counters_ptr + HYSTERESIS_LEFT, mask=mask, other=0)
    overflows = tl.load(counters_ptr + OVERFLOWS, mask=mask, other=0)
    growths = tl.load(counters_ptr + GROWTHS, mask=mask, other=0)
    consecutive = tl.load(counters_ptr + CONSECUTIVE_OVERFLOWS, mask=mask, other=0)
    updates = tl.load(counters_ptr + UPDATES, mask=mask, other=0)

    left = tl.where(overflow, tl.maximum(left - 1, 0), left)
    back_off = overflow & (left == 0)
    min_scale = tl.load(policy_ptr + MIN_SCALE).to(tl.float32)
    backed_off = tl.maximum(min_scale, (scale.to(tl.float64) * tl.load(policy_ptr + BACKOFF_FACTOR)).to(tl.float32))

    tracker = tl.where(clean, tracker + 1, tracker)
    due = clean & (tracker == tl.load(policy_ptr + GROWTH_INTERVAL).to(tl.int64))
    grown = (scale.to(tl.float64) * tl.load(policy_ptr + GROWTH_FACTOR)).to(tl.float32)
    grow = due & (grown.to(tl.float64) <= tl.load(policy_ptr + MAX_SCALE))  # inf is not
    hysteresis = tl.load(policy_ptr + HYSTERESIS).to(tl.int32)

    mask = mask & (overflow | clean)
    tl.store(scale_ptr, tl.where(back_off, backed_off, tl.where(grow, grown, scale)), mask=mask)
    tl.store(counters_ptr + GROWTH_TRACKER, tl.where(overflow | due, 0, tracker), mask=mask)
    tl.store(counters_ptr + HYSTERESIS_LEFT, tl.where(clean, hysteresis, left), mask=mask)
    tl.store(counters_ptr + OVERFLOWS, overflows + overflow.to(tl.int32), mask=mask)
    tl.store(counters_ptr + GROWTHS, growths + grow.to(tl.int32), mask=mask)
    tl.store(counters_ptr + CONSECUTIVE_OVERFLOWS, tl.where(overflow, consecutive + 1, 0), mask=mask)
    tl.store(counters_ptr + UPDATES, updates + 1, mask=mask)
    tl.store(counters_ptr + LAST_OVERFLOW, updates + 1, mask=mask & overflow)
