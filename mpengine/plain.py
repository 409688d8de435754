"""Plain torch optimizers under our scaler: unscaling their FP32 gradients in place, and stepping them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpengine.gradients import Label, Labelled, parameters
from mpengine.kernels import layout
from mpengine.sources import Ballot
from mpengine.tally import Tally


@torch.no_grad()
def unscale(
    optimizer: torch.optim.Optimizer, pending: Sequence[list[Labelled]], votes: Tensor, ballots: list[Ballot]
) -> dict[torch.device, Tensor]:
    """Turns `.grad` of every parameter into the unscaled sum of its pending gradients, and casts the votes.

    Args:
        optimizer: FP32 (or bf16, float64) parameters; gradients may be sparse.
        pending: For each parameter its (label, gradient) pairs in order of loss_id.
        votes: float32[L, layout.VOTE], written.
        ballots: One for each loss.

    Returns:
        For each device found_inf, float32 of one element: not 0 where a gradient was inf or NaN.

    Raises:
        ValueError: A gradient is fp16: without masters it cannot be unscaled. Nothing is changed.
    """
    for i, labelled in enumerate(pending):
        for _, grad in labelled:
            if grad.dtype == torch.float16:
                raise ValueError(
                    f"Attempting to unscale FP16 gradients: parameter {i} of this {type(optimizer).__name__} is "
                    "fp16 and has no FP32 master. Wrap the optimizer: "
                    "optimizer = mpengine.prepare(model, optimizer, scaler)."
                )
    batches: dict[tuple[torch.device, torch.dtype, int], tuple[Label, list[Tensor]]] = {}
    for labelled in pending:
        for label, grad in labelled:
            values = grad._values() if grad.is_sparse else grad
            key = (grad.device, grad.dtype, id(label))
            batches.setdefault(key, (label, []))[1].append(values)
    found: dict[torch.device, Tensor] = {}
    for (device, _, _), (label, grads) in batches.items():
        each = found.setdefault(device, torch.zeros(len(ballots), dtype=torch.float32, device=device))
        inverse = torch.ones((), device=device)
        if label.scale is not None:
            inverse = label.scale.double().reciprocal().float().to(device, non_blocking=True)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, each[label.loss_id], inverse)
    for param, labelled in zip(parameters(optimizer), pending, strict=True):
        if len(labelled) > 1:
            total = labelled[0][1]
            for _, grad in labelled[1:]:
                total = total + grad
            param.grad = total
    _check_results(optimizer, found, ballots, pending)
    _agree(optimizer, found)
    overflowed = sum((each.to(votes.device) for each in found.values()), torch.zeros_like(votes[:, 0]))
    cast_votes(votes, ballots, overflowed != 0)
    return {device: each.sum() for device, each in found.items()}


def _check_results(
    optimizer: torch.optim.Optimizer,
    found: dict[torch.device, Tensor],
    ballots: list[Ballot],
    pending: Sequence[list[Labelled]],
) -> None:
    """A finite gradient may overflow as it is multiplied by 1 / scale, or added to another: look at the result too."""
    consumed = [i for i, ballot in enumerate(ballots) if ballot.kind != layout.ABSENT]
    results: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for param, labelled in zip(parameters(optimizer), pending, strict=True):
        if param.grad is not None and (len(labelled) > 1 or _may_overflow(labelled)):
            values = param.grad._values() if param.grad.is_sparse else param.grad
            results.setdefault((values.device, values.dtype), []).append(values)
    for (device, _), grads in results.items():
        one = torch.ones((), device=device)
        overflow = torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, overflow, one)
        unexplained = overflow * (found[device].sum() == 0)  # otherwise the guilty loss is known
        for k in consumed:
            found[device][k] += unexplained


def _agree(optimizer: torch.optim.Optimizer, found: dict[torch.device, Tensor]) -> None:
    """All ranks get one verdict where the parameters are sharded over several meshes.

    The call above has reduced it over the mesh of the first gradient alone.
    """
    meshes = {param.device_mesh: None for param in parameters(optimizer) if hasattr(param, "device_mesh")}
    for mesh in meshes if len(meshes) > 1 else ():
        for dim in range(mesh.ndim):
            for each in found.values():
                torch.distributed.all_reduce(each, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))


def _may_overflow(labelled: list[Labelled]) -> bool:
    scale = labelled[0][0].scale
    return scale is not None and (scale.device.type != "cpu" or float(scale) < 1.0)


def cast_votes(votes: Tensor, ballots: list[Ballot], overflowed: Tensor) -> None:
    """Writes float32[L, layout.VOTE] from bool[L], without a sync."""
    clean = [layout.CLEAN if ballot.kind == layout.FRESH else layout.NO_VOTE for ballot in ballots]
    bad = {layout.ABSENT: layout.NO_VOTE, layout.FRESH: layout.OVERFLOW, layout.STALE: layout.STALE_OVERFLOW}
    for k, ballot in enumerate(ballots):
        votes[k, 0] = clean[k] + overflowed[k].to(votes.device) * float(bad[ballot.kind] - clean[k])
        votes[k, 1] = 0.0 if ballot.scale is None else ballot.scale


def step(
    optimizer: torch.optim.Optimizer,
    found_inf: dict[torch.device, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Steps, unless a gradient overflowed; a fused optimizer decides on the device, for others this is one sync.

    A fused SGD with dampening decides on the host until it has its first momentum buffers.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    buffers_to_come = _first_buffers(optimizer)
    if fused and all(group["dampening"] == 0 for group, _ in buffers_to_come):
        first, *others = found_inf.values()
        total = sum((other.to(first.device, non_blocking=True) for other in others), first)
        overflow = total != 0
        optimizer.grad_scale = getattr(optimizer, "grad_scale", None)  # type: ignore[attr-defined]
        optimizer.found_inf = overflow.float()  # type: ignore[attr-defined]  # torch's kernels test == 1
        try:
            return optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
            _clear_where(overflow, optimizer, buffers_to_come)
    try:
        if any(found.item() != 0 for found in found_inf.values()):
            optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers ask: it was its turn, and skipped
            return None
        return optimizer.step(*args, **kwargs)
    finally:
        if fused:
            optimizer.__dict__.pop("grad_scale", None)  # a preset one is for one step


def asks_for_scaler(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its `step` takes the scaler itself: torch's older, deprecated contract with fused optimizers."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return fused and "grad_scaler" in inspect.signature(optimizer.step).parameters


def step_with_scaler(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Steps an optimizer that unscales and skips by itself, with torch's warning."""
    warnings.warn(
        "GradScaler is going to stop passing itself as a keyword argument to the passed optimizer: read "
        "`found_inf` and `grad_scale` (None: the gradients are unscaled), which are set on the optimizer in `step`.",
        FutureWarning,
        stacklevel=3,
    )
    return optimizer.step(*args, **{**kwargs, "grad_scaler": scaler})


def _first_buffers(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], Tensor]]:
    """The (group, parameter) pairs whose momentum buffer the next step of a fused SGD makes.

    It allocates them before its kernel looks at found_inf, and takes what lies there for momentum ever after. Zeros are
    the right momentum before a first step, except with dampening: the first step does not dampen, the others do.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return []
    return [
        (group, param)
        for group in optimizer.param_groups
        if group["fused"] and group["momentum"] != 0
        for param in group["params"]
        if param.grad is not None and optimizer.state.get(param, {}).get("momentum_buffer") is None
    ]


def _clear_where(
    overflow: Tensor, optimizer: torch.optim.Optimizer, fresh: list[tuple[dict[str, Any], Tensor]]
) -> None:
    """Zeros, without a sync, in the momentum buffers that a skipped step has left uninitialised."""
    for _, param in fresh:
        buffer = optimizer.state.get(param, {}).get("momentum_buffer")
        if buffer is not None:
            buffer.masked_fill_(overflow.to(buffer.device, non_blocking=True), 0.0)


def name_of(optimizer: torch.optim.Optimizer, param: Tensor) -> str | None:
    """A parameter's place in its optimizer; None where it belongs to another."""
    for g, group in enumerate(optimizer.param_groups):
        for i, own in enumerate(group["params"]):
            if own is param:
                return f"group {g}, parameter {i} of shape {tuple(param.shape)}"
    return None


def tally(optimizer: torch.optim.Optimizer) -> tuple[Tally, dict[str, int]]:
    """What can be said of a plain optimizer's gradients: by name, how many elements are not finite now."""
    found: dict[str, int] = {}
    for param in parameters(optimizer):
        if param.grad is not None:
            values = param.grad._values() if param.grad.is_sparse else param.grad
            count = int((~torch.isfinite(values)).sum())
            if count:
                found[str(name_of(optimizer, param))] = count
    return Tally(), found
