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
from .apex import apex_adagrad, apex_adagrad_scalars, apex_adam, apex_adam_scalars, apex_sgd_momentum
from .arithmetic import assign
from .lamb import lamb, lamb_measure, lamb_scalars, lamb_settle
from .larc import (
    larc_adam,
    larc_adam_amsgrad,
    larc_adam_scalars,
    larc_apex_adam,
    larc_apex_adam_scalars,
    larc_measure,
    larc_settle,
    larc_sgd,
    larc_sgd_momentum,
    larc_sgd_scalars,
)
from .lion import lion, lion_scalars
from .nadam import nadam, nadam_scalars, nadam_settle
from .novograd import novograd, novograd_measure, novograd_scalars, novograd_settle
from .radam import radam, radam_scalars
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
    "apex_adagrad": apex_adagrad_scalars,
    "apex_adam": apex_adam_scalars,
    "lamb": lamb_scalars,
    "larc_adam": larc_adam_scalars,
    "larc_apex_adam": larc_apex_adam_scalars,
    "larc_sgd": larc_sgd_scalars,
    "lion": lion_scalars,
    "nadam": nadam_scalars,
    "novograd": novograd_scalars,
    "radam": radam_scalars,
    "rmsprop": rmsprop_scalars,
    "sgd": sgd_scalars,
}
RULES = {
    "adadelta": adadelta,
    "adagrad": adagrad,
    "adam": adam,
    "adam_amsgrad": adam_amsgrad,
    "apex_adagrad": apex_adagrad,
    "apex_adam": apex_adam,
    "apex_sgd_momentum": apex_sgd_momentum,
    "assign": assign,
    "lamb": lamb,
    "larc_adam": larc_adam,
    "larc_adam_amsgrad": larc_adam_amsgrad,
    "larc_apex_adam": larc_apex_adam,
    "larc_sgd": larc_sgd,
    "larc_sgd_momentum": larc_sgd_momentum,
    "lion": lion,
    "nadam": nadam,
    "novograd": novograd,
    "radam": radam,
    "rmsprop": rmsprop,
    "rmsprop_centered": rmsprop_centered,
    "rmsprop_centered_momentum": rmsprop_centered_momentum,
    "rmsprop_momentum": rmsprop_momentum,
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
}
_LARC = ("larc_adam", "larc_adam_amsgrad", "larc_apex_adam", "larc_sgd", "larc_sgd_momentum")
MEASURES = {
    "lamb": lamb_measure,
    **dict.fromkeys(_LARC, larc_measure),
    "novograd": novograd_measure,
}
SETTLES = {
    "lamb": lamb_settle,
    **dict.fromkeys(_LARC, larc_settle),
    "nadam": nadam_settle,
    "novograd": novograd_settle,
}
