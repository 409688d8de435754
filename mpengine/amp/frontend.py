"""`initialize`: apex's entry point."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mpengine import validation
from mpengine.amp import casts, modules, state
from mpengine.amp.optimizer import AmpOptimizer
from mpengine.amp.overflow_log import OverflowLog
from mpengine.amp.properties import Properties, as_bool, chosen, scale_bounds
from mpengine.amp.scaler import LossScaler
from mpengine.gradients import parameters

logger = logging.getLogger("mpengine.amp")


def initialize(
    models: Any,
    optimizers: Any = None,
    enabled: bool | str = True,
    opt_level: str = "O1",
    cast_model_type: torch.dtype | Literal[False] | None = None,
    patch_torch_functions: bool | str | None = None,
    keep_batchnorm_fp32: bool | str | None = None,
    master_weights: bool | str | None = None,
    loss_scale: float | str | None = None,
    cast_model_outputs: torch.dtype | None = None,
    num_losses: int = 1,
    verbosity: int = 1,
    min_loss_scale: float | None = None,
    max_loss_scale: float | None = 2.0**24,
) -> Any:
    """Prepares models and optimizers for mixed precision, as `apex.amp.initialize` did.

    ```
          weights          forward                              loss scale
    O0    FP32             inputs and outputs FP32              1.0
    O1    FP32             under fp16 autocast, outputs FP32    dynamic
    O2    fp16, norms FP32 inputs fp16, outputs FP32            dynamic
    O3    fp16             inputs fp16, outputs FP32            1.0
    ```

    fp16 weights always have FP32 masters: in O3 and with `master_weights=False` too. O2 keeps every normalisation layer
    FP32, where apex kept batch norms. A static scale skips steps that overflow, too. A second call for a model
    is a fresh start: what the first did to it is undone, and its optimizers are done with.

    Args:
        models: A module, or a list of several, on their final device and not in DistributedDataParallel yet.
        optimizers: A torch optimizer, or a list of several; None where nothing is trained.
        enabled: False: every function of amp lets everything pass.
        opt_level: "O0" to "O3".
        cast_model_type: Overrides what weights and inputs are cast to.
        patch_torch_functions: False: O1 without autocast.
        keep_batchnorm_fp32: Whether normalisation layers stay FP32 (O2, O3).
        master_weights: Accepted; see above.
        loss_scale: A number, or "dynamic"; both may be strings.
        cast_model_outputs: What floating-point outputs of `forward` are cast to.
        num_losses: Losses with a scale of their own.
        verbosity: 0: nothing is logged (to the logger "mpengine.amp").
        min_loss_scale: The floor of dynamic scales; None or 0: 2**-126.
        max_loss_scale: Dynamic scales do not grow beyond it, and begin there if it is below 2**16.

    Returns:
        The models, and unless `optimizers` is None the optimizers: one object or a list, as they were given. The
        optimizers are `MixedPrecisionOptimizer`s; the ones given do the same from now on.

    Raises:
        RuntimeError: An unknown level, an override that the level does not allow, a model that is fp16 or in a parallel
            wrapper already, an optimizer that was passed before. Nothing has changed then.
        TypeError: Models are no modules, optimizers are none, or one cannot be wrapped.
        ValueError: A value is out of its range; see also `mpengine.prepare`.

    Example:
        >>> model, optimizer = amp.initialize(model, optimizer, opt_level="O2")
        >>> with amp.scale_loss(loss, optimizer) as scaled_loss:
        ...     scaled_loss.backward()
        >>> optimizer.step()
    """
    if isinstance(enabled, str):
        enabled = as_bool("enabled", enabled)
    if not enabled:
        casts.begin(False)
        state.begin(state.Amp(Properties(enabled=False), None, [], verbosity))
        return models if optimizers is None else (models, optimizers)
    model_list = _listed(models, nn.Module, "models must be either a single model or a list of models")
    optimizer_list = (
        []
        if optimizers is None
        else _listed(
            optimizers, torch.optim.Optimizer, "optimizers must be either a single optimizer or a list of optimizers"
        )
    )
    properties = chosen(
        opt_level, cast_model_type, patch_torch_functions, keep_batchnorm_fp32, master_weights, loss_scale
    )
    first, lowest, highest = scale_bounds(properties.loss_scale, min_loss_scale, max_loss_scale)
    if cast_model_outputs is not None and not getattr(cast_model_outputs, "is_floating_point", False):
        raise ValueError(f"cast_model_outputs is {cast_model_outputs!r}; it must be a floating-point torch.dtype.")
    overflow_log = OverflowLog(enabled=verbosity > 0)
    scaler = LossScaler(
        overflow_log,
        init_scale=first,
        growth_interval=2000 if properties.loss_scale == "dynamic" else 2**31 - 1,
        num_losses=num_losses,
        min_scale=lowest,
        max_scale=highest,
    )
    overflow_log.begin([first] * num_losses, [0] * num_losses)
    amp = state.Amp(properties, scaler, model_list, verbosity)
    wrappers = _build(amp, model_list, optimizer_list, cast_model_outputs)
    if verbosity > 0:
        logger.info("Selected optimization level %s: %s", properties.opt_level, properties)
    returned = model_list if isinstance(models, (list, tuple)) else models
    if optimizers is None:
        return returned
    return returned, wrappers if isinstance(optimizers, (list, tuple)) else wrappers[0]


def init(*args: Any, **kwargs: Any) -> None:
    """The oldest API of apex, which apex itself no longer supported.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        "amp.init and its handle are apex's old API, and not supported: call model, optimizer = amp.initialize(model, "
        "optimizer, opt_level='O1'), and in the loop `with amp.scale_loss(loss, optimizer) as scaled_loss`."
    )


def _listed(value: Any, kind: type, message: str) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    for one in values:
        if not isinstance(one, kind):
            raise TypeError(f"{message}, not {type(one).__name__}.")
    return values


def _build(
    amp: state.Amp, models: Sequence[nn.Module], optimizers: Sequence[Any], outputs: torch.dtype | None
) -> list[AmpOptimizer]:
    """Checks everything, undoes what was before, casts and wraps."""
    properties, scaler = amp.properties, amp.scaler
    assert scaler is not None
    names = modules.names(models)
    earlier = _earlier(properties, models, optimizers)
    modules.check(models, earlier.models, properties)
    _check_optimizers(optimizers, names, earlier.optimizers)
    for model in earlier.models:
        modules.undo(model)
    for optimizer in earlier.optimizers:
        optimizer.retire()
    for ended in earlier.ended:
        ended.end()
    casts.begin(properties.patch_torch_functions)
    originals = modules.cast_params(models, properties)
    wrappers = []
    for optimizer in optimizers:
        wrappers.append(AmpOptimizer(optimizer, scaler, names, originals))
        amp.add(wrappers[-1])
    for model in models:
        modules.patch(model, properties, outputs)
    if wrappers:
        scaler._lazy_init_scale_growth_tracker(next(iter(parameters(wrappers[0]))).device)
    state.begin(amp)
    return wrappers


class _Earlier(NamedTuple):
    """What a fresh start undoes."""

    models: list[nn.Module]
    optimizers: list[AmpOptimizer]
    ended: list[state.Amp]  # of which nothing is left


def _earlier(
    properties: Properties, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> _Earlier:
    """What earlier calls have done to these models and to parameters that these optimizers train."""
    own = {id(module): module for model in models for module in model.modules()}
    weights = {id(param) for model in models for param in model.parameters()}
    trained = {id(param) for optimizer in optimizers for param in parameters(optimizer)}
    undone = {key: module for key, module in own.items() if modules.is_patched(module)}
    retired: list[AmpOptimizer] = []
    ended = []
    for amp in state.alive():
        shares = any(id(param) in weights for model in amp.models for param in model.parameters())
        if shares and (amp.properties.is_low or properties.is_low):
            undone.update((id(model), model) for model in amp.models)
            retired += amp.optimizers
            ended.append(amp)
        else:  # nothing was cast: optimizers of other parameters may go on
            retired += [o for o in amp.optimizers if any(id(param) in trained for param in parameters(o))]
    return _Earlier(list(undone.values()), retired, ended)


def _check_optimizers(
    optimizers: Sequence[torch.optim.Optimizer], names: Mapping[Tensor, str], earlier: Sequence[AmpOptimizer]
) -> None:
    """Raises where an optimizer cannot be wrapped, as if the earlier ones were not there."""
    seen: dict[int, int] = {}
    for i, optimizer in enumerate(optimizers):
        if state.wrapper_of(optimizer) is not None or any(optimizer is other for other in optimizers[:i]):
            raise RuntimeError("A given optimizer should only be passed through amp.initialize once.")
    validation.wrappers.difference_update(earlier)
    try:
        for i, optimizer in enumerate(optimizers):
            validation.check_wrappable(optimizer, names)
            for param in parameters(optimizer):
                if seen.setdefault(id(param), i) != i:
                    raise ValueError(
                        f"parameter '{names.get(param, '?')}' of shape {tuple(param.shape)} is in optimizers "
                        f"{seen[id(param)]} and {i}; a parameter has one master, so give it to one of them."
                    )
    finally:
        validation.wrappers.update(earlier)
