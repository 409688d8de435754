"""`scale_loss` and `master_params`: what a training loop calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpengine.amp import state
from mpengine.amp.optimizer import AmpOptimizer
from mpengine.gradients import parameters


@contextlib.contextmanager
def scale_loss(
    loss: Tensor,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    loss_id: int = 0,
    model: nn.Module | None = None,
    delay_unscale: bool = False,
    delay_overflow_check: bool = False,
) -> Iterator[Tensor]:
    """Yields the loss times its scale; on exit judges the new gradients, and moves that scale. No sync.

    ```
    exit   found_inf = any new gradient of this loss on a listed optimizer is inf or NaN
           found_inf: the scale of loss_id backs off; every listed optimizer skips its next step
           else:      the scale counts one more clean pass
    ```

    At O0 and O1 `.grad` has the true gradient then; at O2 and O3, where it carries the scale, `master_params` gives it.
    An exception in the body leaves gradients, scale and skips as they were before it; where its pass ran on top of
    delayed ones, which hold a part of it now, they have to be zeroed before the next pass or step, which are refused
    until then. A step whose pending gradients are not finite is skipped even where nobody listed its optimizer.

    Args:
        loss: Floating point, of any shape.
        optimizers: Those that the loss makes gradients for: one, a list or a tuple, from `initialize`.
        loss_id: Which of `num_losses` scales.
        model: Not used, as in apex.
        delay_unscale: Leaves the gradients as they are: they are judged with those of the next pass of this loss that
            is not delayed, or by the step.
        delay_overflow_check: The scale does not move; a step that would apply an overflow is skipped all the same.

    Yields:
        float32 (float64 for a float64 loss), of the loss's shape; the loss itself where amp is disabled.

    Raises:
        RuntimeError: Nothing was initialized, or not these optimizers; a gradient cannot be stepped.
        ValueError: `loss_id` is out of range, or the optimizers come from several calls of `initialize`.
        LossScaleCollapse: A loss has overflowed 50 times in a row.
    """
    amp, listed = _state_of(optimizers)
    if amp.scaler is None:
        yield loss
        return
    scaler = amp.scaler
    _check_loss_id(loss_id, scaler.num_losses)
    for optimizer in listed:
        optimizer.check_unspoiled()
    scaler.verdicts.review()
    joins = loss_id in amp.delayed and scaler.has_unchecked(loss_id)
    scaled: Tensor = scaler.scale(loss, loss_id)
    passes = scaler.passes
    try:
        yield scaled
    except BaseException:
        if not joins:
            scaler.discard(loss_id)
        elif scaler.passes != passes:
            scaler.spoil(loss_id)
        raise
    if delay_unscale or not listed:
        amp.delayed.add(loss_id)
        return
    amp.delayed.discard(loss_id)
    scaler.check_(listed, loss_id, moves_scale=not delay_overflow_check)
    for optimizer in listed:
        if optimizer.has_masters:
            optimizer.fold(loss_id)
        else:
            optimizer.unscale_pending()


def master_params(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The FP32 parameters that the optimizer steps, with the unscaled FP32 sum of what is pending in `.grad`.

    For clipping and the like, between `scale_loss` and the step; may be called again, and more passes may follow. A
    parameter of FP32 is its own master.

    Args:
        optimizer: From `initialize`, or the one that was given there.

    Returns:
        An iterator over float32 tensors; over the optimizer's parameters where amp has not prepared it.

    Raises:
        RuntimeError: As `step`.
    """
    wrapper = state.wrapper_of(optimizer)
    if wrapper is None:
        return iter(list(parameters(optimizer)))
    wrapper.unscale_pending()
    return wrapper.master_params()


def _check_loss_id(loss_id: int, num_losses: int) -> None:
    if isinstance(loss_id, bool) or not isinstance(loss_id, int) or not 0 <= loss_id < num_losses:
        raise ValueError(
            f"loss_id is {loss_id!r}; amp.initialize was given num_losses={num_losses}, so it must be an int in "
            f"[0, {num_losses - 1}]. Give amp.initialize(num_losses=...) as many as you need."
        )


def _state_of(optimizers: Any) -> tuple[state.Amp, list[AmpOptimizer]]:
    latest = state.latest()
    if latest is None:
        raise RuntimeError(
            "Invoked 'with amp.scale_loss`, but internal Amp state has not been initialized.  model, optimizer = "
            "amp.initialize(model, optimizer, opt_level=...) must be called before `with amp.scale_loss`."
        )
    given = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
    wrappers = [state.wrapper_of(optimizer) for optimizer in given]
    listed = [wrapper for wrapper in wrappers if wrapper is not None]
    if not listed and latest.scaler is None:
        return latest, []
    for i, (optimizer, wrapper) in enumerate(zip(given, wrappers, strict=True)):
        if wrapper is None:
            raise RuntimeError(
                f"optimizer {i} of scale_loss is a {type(optimizer).__name__} that amp.initialize was not given; list "
                "optimizers that it returned."
            )
        wrapper.check_current()
    states = {id(state.of(wrapper)): state.of(wrapper) for wrapper in listed}
    if len(states) > 1:
        raise ValueError(
            "the optimizers of this scale_loss come from several calls of amp.initialize, whose scales differ: give "
            "them to one call, amp.initialize([model1, model2], [optimizer1, optimizer2])."
        )
    return next(iter(states.values()), latest), list(dict.fromkeys(listed))
