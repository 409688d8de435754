"""The layout of the device tables that the launchers and `mpengine.masters` share. Needs no Triton.

All tensors of an optimizer on one device are described by one int64 table, so a step is a fixed number of
launches at any number of tensors. A second table maps each program to (tensor, chunk).
"""

# A row of the tensor table: int64[T, ROW].
PARAM_PTR = 0  # 0: nothing is written back (the master is the parameter itself, or a gradient buffer)
MASTER_PTR = 1
SLOT_PTR = 2  # and SLOT_PTR + 1, ... + MAX_SLOTS - 1
MAX_SLOTS = 3
NUMEL = 5
GROUP = 6
FORMAT = 7  # kind of the parameter, + ALIGNED when parameter, master and slots all lie on 16 bytes
CELL_PTR = 8  # and CELL_PTR + 1, ... + MAX_CELLS - 1: float32 numbers of the tensor
MAX_CELLS = 2
ROW = 10

# A row of the source table: int64[T, SOURCES, SOURCE]. The first source of an idle tensor has GRAD_PTR 0.
GRAD_PTR = 0
SCALE_PTR = 1  # float32: the scale that scaled this gradient; 0 stands for 1.0
GRAD_FORMAT = 2  # kind of the gradient, + ALIGNED
LOSS = 3
SOURCE = 4
MAX_SOURCES = 8  # losses that may be pending on one parameter

# A row of the ballot table: int64[L, BALLOT]: what an optimizer says about each loss that it consumes.
BALLOT_KIND = 0  # one of ABSENT, FRESH, STALE
BALLOT_SCALE_PTR = 1  # float32: the scale behind the consumed gradients, read where STALE
BALLOT = 2
ABSENT, FRESH, STALE = 0, 1, 2

# Element kinds, and the flag that allows 16-byte accesses.
FLOAT16, BFLOAT16, FLOAT32 = 0, 1, 2
KIND_MASK = 3
ALIGNED = 4

# A vote: float32[2]: (outcome, the scale behind it).
NO_VOTE, CLEAN, OVERFLOW, STALE_OVERFLOW = 0, 1, 2, 3
VOTE = 2

# Hyperparameters of a group: float64[G, HYPER]. Scalars of a tensor at this step: float32[T, SCALARS].
HYPER = 10
SCALARS = 12

# A schedule: float64[SCHEDULE_ROWS, G, SCHEDULE_WIDTH] values, and int64[SCHEDULE]: what they are. The step reads the
# row of the steps taken so far, less SCHEDULE_START, or the first or last row beyond the ends.
SCHEDULE_ROWS = 0
SCHEDULE_START = 1
SCHEDULE_WIDTH = 2  # hyperparameters that are scheduled
SCHEDULE_GROUPS = 3
SCHEDULE_COLUMN = 4  # + j: where hyperparameter j stands among the scheduled ones; -1: it is not scheduled
SCHEDULE = SCHEDULE_COLUMN + HYPER

# The decision of a step: float32[DECISION].
SKIP = 0  # 1.0: leave everything as it is
CLIP = 1  # the factor on the unscaled gradient
NORM = 2  # the norm of the unscaled gradient; NaN where the step is skipped
DECISION = 4

# The counts of an optimizer: int32[COUNTS].
TAKEN, SKIPPED = 0, 1
COUNTS = 2

# What inspect counts of the scaled gradients, for each of its programs and each loss: int32[P, L, TALLY]; -1 at first.
SMALL = 0  # elements that are zero or subnormal in the gradient's type
LARGEST = 1  # the bits of the largest unscaled magnitude, float32; inf where an element is counted in NONFINITE
NONFINITE = 2  # elements whose unscaled value, or the losses' sum, was inf or NaN, at the attempt beside it
ATTEMPT = 3
TALLY = 4

# The state of a loss scale: float32[L] scales and int32[L, COUNTERS].
GROWTH_TRACKER, HYSTERESIS_LEFT, OVERFLOWS, GROWTHS, CONSECUTIVE_OVERFLOWS, UPDATES, LAST_OVERFLOW = range(7)
COUNTERS = 7

# The policy of a scaler: float64[POLICY].
GROWTH_FACTOR, BACKOFF_FACTOR, GROWTH_INTERVAL, MIN_SCALE, MAX_SCALE, HYSTERESIS = range(6)
POLICY = 6

# What measure finds, and settle turns into norms: float64[P, NORMS] sums of squares, a row for each program of measure;
# int32[n, SPAN] says of each of the n tensors of a rule which one it is, and which rows are its own.
NORMS = 2
SPAN_TENSOR, SPAN_START, SPAN_STOP = 0, 1, 2
SPAN = 3

INSPECT_CHUNK = 16384  # elements a program of inspect or measure reads
UPDATE_CHUNK = 1024  # elements a program of update writes
