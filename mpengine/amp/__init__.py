"""apex.amp's API on mpengine: `from mpengine import amp` in the place of `from apex import amp`.

```
model, optimizer = amp.initialize(model, optimizer, opt_level="O2")
...
with amp.scale_loss(loss, optimizer) as scaled_loss:
    scaled_loss.backward()
torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
optimizer.step()
```

A face of the engine: `initialize` casts as `mpengine.prepare` does and returns `MixedPrecisionOptimizer`s; the scales
are those of an `mpengine.GradScaler`.
"""

from mpengine.amp.casts import (
    disable_casts,
    float_function,
    half_function,
    promote_function,
    register_float_function,
    register_half_function,
    register_promote_function,
)
from mpengine.amp.frontend import init, initialize
from mpengine.amp.handle import master_params, scale_loss
from mpengine.amp.saved import load_state_dict, state_dict
from mpengine.amp.state import amp_state as _amp_state

__all__ = [
    "_amp_state",
    "disable_casts",
    "float_function",
    "half_function",
    "init",
    "initialize",
    "load_state_dict",
    "master_params",
    "promote_function",
    "register_float_function",
    "register_half_function",
    "register_promote_function",
    "scale_loss",
    "state_dict",
]
