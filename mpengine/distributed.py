"""DistributedDataParallel: which parameters it averages, where it keeps their gradients, and masters that agree.

It moves gradients behind everybody's back: it finishes the average when the backward pass is over, keeps gradients in
buckets that the next pass overwrites, makes the buckets anew in the second forward pass, leaves gradients local under
`no_sync()`, and overwrites the weights of all ranks but the first when it is made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from mpengine.masters import flat

_known: list[weakref.ref[DistributedDataParallel]] = []  # in the order in which they were made, as on every rank
_agreed: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


def _note(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(module, DistributedDataParallel) and name == "module":
        _known[:] = [known for known in _known if known() is not None]
        _known.append(weakref.ref(module))


register_module_module_registration_hook(_note)


def _wrappers() -> Iterator[DistributedDataParallel]:
    for known in list(_known):
        wrapper = known()
        if wrapper is not None:
            yield wrapper


def is_used() -> bool:
    """Whether any model is wrapped."""
    return any(True for _ in _wrappers())


def wraps(model: nn.Module) -> bool:
    """Whether the model is a DistributedDataParallel, holds one, or shares trained parameters with one."""
    own = {id(param) for param in model.parameters() if param.requires_grad}
    return any(isinstance(module, DistributedDataParallel) for module in model.modules()) or any(
        id(param) in own for wrapper in _wrappers() for param in wrapper.module.parameters()
    )


def unsynchronised() -> set[int]:
    """The ids of all parameters whose gradients the backward pass under way leaves local: see `no_sync`.

    The forward pass decides, but an evaluation since then looks like one under `no_sync`: it must be in force still.
    """
    local = [w for w in _wrappers() if not (w.require_forward_param_sync or w.require_backward_grad_sync)]
    return {id(param) for wrapper in local for param in wrapper.module.parameters()}


def is_bucket_view(grad: Tensor) -> bool:
    """Whether the next backward pass may overwrite this memory (`gradient_as_bucket_view=True`)."""
    if grad.layout is not torch.strided:
        return False
    # A bucket may hold one gradient alone, and end where it ends; autograd's own gradients are no views.
    return grad._is_view() or grad.untyped_storage().nbytes() > grad.numel() * grad.element_size()


def was_moved(param: Tensor, grad: Tensor) -> bool:
    """Whether a gradient that is not the tensor that it was may be the same one, moved into a new bucket."""
    return is_bucket_view(grad) and any(
        param is own
        for wrapper in _wrappers()
        if wrapper.gradient_as_bucket_view
        for own in wrapper.module.parameters()
    )


def call_last(function: Callable[[], None], turns: int = 3) -> None:
    """Calls a function when the backward pass under way is over, after what others do then.

    The engine's callbacks run in the order in which they were queued, and may queue more. DistributedDataParallel's
    writes the averages into `.grad`; with a static graph it is, in the first pass, queued by another callback.
    """
    if turns == 0:
        function()
    else:  # a partial makes no cycle: where the pass is broken off, the engine drops it, and the function, at once
        torch.autograd.Variable._execution_engine.queue_callback(partial(call_last, function, turns - 1))


@torch.no_grad()
def share_masters(optimizer: object, masters: Mapping[Tensor, Tensor]) -> None:
    """Gives every rank the masters of the first, once for each DistributedDataParallel over their parameters.

    It broadcasts the fp16 weights when it is made; what masters hold beyond fp16 would differ for ever between ranks
    that were initialised from different seeds. Called at an optimizer's first step, on all ranks alike.
    """
    for wrapper in _wrappers():
        done = _agreed.setdefault(wrapper, weakref.WeakSet())
        if optimizer in done:
            continue
        done.add(optimizer)
        for param in wrapper.module.parameters():
            if param in masters and wrapper.process_group.size() > 1:
                torch.distributed.broadcast(flat(masters[param]), group=wrapper.process_group, group_src=0)
