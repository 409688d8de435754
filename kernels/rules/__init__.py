"""The update rules on the device, operation for operation those of `mpengine.rules`, which specify them.

`rule(p, g, slots, c) -> (p, slots)`: master, unscaled and clipped gradient, state and the tensor's scalars, all FP32.
Division and root are the correctly rounded ones: Triton's `/` and `tl.sqrt` are not.

`scalars(h, step) -> c`: from the columns of a group's hyperparameters and the tensors' step counts, in float64 (where
`/` and `tl.sqrt` are correctly rounded); decide rounds the results to FP32 once.

`measure(p, g, slots, c) -> (x, ...)` and `settle(c, norms, cells) -> (c, cells)`, of rules that need norms of each
tensor, or keep numbers for it: FP32 blocks, and float64 numbers, which are rounded to FP32 once.
"""

from .adadelta import adadelta, adadelta_scalars
from .adagrad import adagrad, adagrad_scalars
from .adam import adam, adam_amsgrad, adam_scalars
from .arithmetic import assign
from .lamb import lamb, lamb_measure, lamb_scalars, lamb_settle
from .lion import lion, lion_scalars
from .rmsprop import (
    rmsprop,
    rmsprop_centered,
    rmsprop_centered_momentum,
    rmsprop_momentum,
    rmsprop_scalars,
)
from .sgd import sgd, sgd_momentum, sgd_scalars

SCALAR_FUNCTIONS = {
    "adadelta": adadelta_scalars,
    "adagrad": adagrad_scalars,
    "adam": adam_scalars,
    "lamb": lamb_scalars,
    "lion": lion_scalars,
    "rmsprop": rmsprop_scalars,
    "sgd": sgd_scalars,
}
RULES = {
    "assign": assign,
    "adadelta": adadelta,
    "adagrad": adagrad,
    "adam": adam,
    "adam_amsgrad": adam_amsgrad,
    "lamb": lamb,
    "lion": lion,
    "rmsprop": rmsprop,
    "rmsprop_centered": rmsprop_centered,
    "rmsprop_centered_momentum": rmsprop_centered_momentum,
    "rmsprop_momentum": rmsprop_momentum,
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
}
MEASURES = {"lamb": lamb_measure}
SETTLES = {"lamb": lamb_settle}
