"""The numbers of `layout` as Triton constants: jit functions read only globals of this kind.

A plain `layout.NUMEL` inside a kernel would compile, but its value would not be part of the key under which Triton
caches the binary on disk: after a change of the layout an old kernel would run on new tables.
"""

import triton.language as tl

from . import layout

PARAM_PTR = tl.constexpr(layout.PARAM_PTR)
MASTER_PTR = tl.constexpr(layout.MASTER_PTR)
SLOT_PTR = tl.constexpr(layout.SLOT_PTR)
NUMEL = tl.constexpr(layout.NUMEL)
GROUP = tl.constexpr(layout.GROUP)
FORMAT = tl.constexpr(layout.FORMAT)
CELL_PTR = tl.constexpr(layout.CELL_PTR)
ROW = tl.constexpr(layout.ROW)

GRAD_PTR = tl.constexpr(layout.GRAD_PTR)
SCALE_PTR = tl.constexpr(layout.SCALE_PTR)
GRAD_FORMAT = tl.constexpr(layout.GRAD_FORMAT)
LOSS = tl.constexpr(layout.LOSS)
SOURCE = tl.constexpr(layout.SOURCE)

BALLOT_KIND = tl.constexpr(layout.BALLOT_KIND)
BALLOT_SCALE_PTR = tl.constexpr(layout.BALLOT_SCALE_PTR)
BALLOT = tl.constexpr(layout.BALLOT)
FRESH = tl.constexpr(layout.FRESH)
STALE = tl.constexpr(layout.STALE)

FLOAT16 = tl.constexpr(layout.FLOAT16)
BFLOAT16 = tl.constexpr(layout.BFLOAT16)
FLOAT32 = tl.constexpr(layout.FLOAT32)
KIND_MASK = tl.constexpr(layout.KIND_MASK)
ALIGNED = tl.constexpr(layout.ALIGNED)

# Sets of element kinds, as the launchers pass them: 1 << kind for each that occurs.
ONLY_FLOAT16 = tl.constexpr(1 << layout.FLOAT16)
ONLY_BFLOAT16 = tl.constexpr(1 << layout.BFLOAT16)
ONLY_FLOAT32 = tl.constexpr(1 << layout.FLOAT32)
HALVES = tl.constexpr(1 << layout.FLOAT16 | 1 << layout.BFLOAT16)

NO_VOTE = tl.constexpr(layout.NO_VOTE)
CLEAN = tl.constexpr(layout.CLEAN)
OVERFLOW = tl.constexpr(layout.OVERFLOW)
STALE_OVERFLOW = tl.constexpr(layout.STALE_OVERFLOW)
VOTE = tl.constexpr(layout.VOTE)

HYPER = tl.constexpr(layout.HYPER)
SCALARS = tl.constexpr(layout.SCALARS)

SCHEDULE_ROWS = tl.constexpr(layout.SCHEDULE_ROWS)
SCHEDULE_START = tl.constexpr(layout.SCHEDULE_START)
SCHEDULE_WIDTH = tl.constexpr(layout.SCHEDULE_WIDTH)
SCHEDULE_GROUPS = tl.constexpr(layout.SCHEDULE_GROUPS)
SCHEDULE_COLUMN = tl.constexpr(layout.SCHEDULE_COLUMN)

NORMS = tl.constexpr(layout.NORMS)
SPAN_TENSOR = tl.constexpr(layout.SPAN_TENSOR)
SPAN_START = tl.constexpr(layout.SPAN_START)
SPAN_STOP = tl.constexpr(layout.SPAN_STOP)
SPAN = tl.constexpr(layout.SPAN)

SKIP = tl.constexpr(layout.SKIP)
CLIP = tl.constexpr(layout.CLIP)
NORM = tl.constexpr(layout.NORM)
DECISION = tl.constexpr(layout.DECISION)

SMALL = tl.constexpr(layout.SMALL)
LARGEST = tl.constexpr(layout.LARGEST)
NONFINITE = tl.constexpr(layout.NONFINITE)
ATTEMPT = tl.constexpr(layout.ATTEMPT)
TALLY = tl.constexpr(layout.TALLY)

TAKEN = tl.constexpr(layout.TAKEN)
SKIPPED = tl.constexpr(layout.SKIPPED)

GROWTH_TRACKER = tl.constexpr(layout.GROWTH_TRACKER)
HYSTERESIS_LEFT = tl.constexpr(layout.HYSTERESIS_LEFT)
OVERFLOWS = tl.constexpr(layout.OVERFLOWS)
GROWTHS = tl.constexpr(layout.GROWTHS)
CONSECUTIVE_OVERFLOWS = tl.constexpr(layout.CONSECUTIVE_OVERFLOWS)
UPDATES = tl.constexpr(layout.UPDATES)
LAST_OVERFLOW = tl.constexpr(layout.LAST_OVERFLOW)
COUNTERS = tl.constexpr(layout.COUNTERS)

GROWTH_FACTOR = tl.constexpr(layout.GROWTH_FACTOR)
BACKOFF_FACTOR = tl.constexpr(layout.BACKOFF_FACTOR)
GROWTH_INTERVAL = tl.constexpr(layout.GROWTH_INTERVAL)
MIN_SCALE = tl.constexpr(layout.MIN_SCALE)
MAX_SCALE = tl.constexpr(layout.MAX_SCALE)
HYSTERESIS = tl.constexpr(layout.HYSTERESIS)
