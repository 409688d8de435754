"""The update rules on the device, operation for operation those of `mpengine.rules`, which specify them.

`rule(p, g, slots, c) -> (p, slots)`: master, unscaled and clipped gradient, state and the tensor's scalars, all FP32.
Division and root are the correctly rounded ones: Triton's `/` and `tl.sqrt` are not.

`scalars(h, step) -> c`: from the columns of a group's hyperparameters and the tensors' step counts, in float64 (where
`/` and `tl.sqrt` are correctly rounded); decide rounds the results to FP32 once.

`measure(p, g, slots, c) -> (x, ...)` and `settle(c, norms, cells) -> (c, cells)`, of rules that need norms of each
tensor, or keep numbers for it: FP32 blocks, and float64 numbers, which are rounded to FP32 once.
"""

from .adam import adam, adam_amsgrad, adam_scalars
from .arithmetic import assign
from .lamb import lamb, lamb_measure, lamb_scalars, lamb_settle
from .sgd import sgd, sgd_momentum, sgd_scalars

SCALAR_FUNCTIONS = {"sgd": sgd_scalars, "adam": adam_scalars, "lamb": lamb_scalars}
RULES = {
    "assign": assign,
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
    "adam": adam,
    "adam_amsgrad": adam_amsgrad,
    "lamb": lamb,
}
MEASURES = {"lamb": lamb_measure}
SETTLES = {"lamb": lamb_settle}
