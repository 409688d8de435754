"""`apex.parallel`: DistributedDataParallel, Reducer and SyncBatchNorm over torch's; LARC is `mpengine.optim`'s."""

# Not `from __future__ import annotations`: torch looks at the types of a communication hook's arguments.

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ReduceOp

from mpengine.apex.apex_c import flatten, unflatten
from mpengine.optim import LARC

__all__ = [
    "LARC",
    "DistributedDataParallel",
    "ReduceOp",
    "Reducer",
    "SyncBatchNorm",
    "apply_flat_dist_call",
    "convert_syncbn_model",
    "create_syncbn_process_group",
    "flat_dist_call",
    "flatten",
    "unflatten",
]


@dataclass(frozen=True)
class _Averaging:
    """How gradients are averaged where torch's own way was not asked for."""

    group: Any
    in_fp32: bool
    average: bool
    predivide_factor: float


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """`torch.nn.parallel.DistributedDataParallel` with apex's arguments. Wrap after `amp.initialize`.

    As apex's it takes inputs that lie on the model's device already. Buffers are each process's own after the start.

    Args:
        module: On its final device.
        message_size: Without effect.
        delay_allreduce: Whether parameters may stay without a gradient (torch's find_unused_parameters): apex needed
            it for that. The reduction overlaps with the backward pass all the same. torch warns once, on stderr,
            where all of them have one.
        shared_param: Refused, as apex refused it.
        allreduce_trigger_params: Without effect.
        retain_allreduce_buffers: Refused: `.grad` has the averaged gradients.
        allreduce_always_fp32: Whether gradients are added up in FP32.
        num_allreduce_streams: Without effect.
        allreduce_communicators: Refused: torch.distributed owns them.
        gradient_average: Whether the sum is divided by the number of processes.
        gradient_predivide_factor: What gradients are divided by before they are added up, and multiplied with after.
            1.0 leaves it to torch, which divides by the number of processes before.
        gradient_average_split_factor: An older name of it.
        prof: Without effect.

    Raises:
        ValueError: An argument was given that is refused; the message names the replacement.
    """

    def __init__(
        self,
        module: nn.Module,
        message_size: int = 10_000_000,
        delay_allreduce: bool = False,
        shared_param: bool | None = None,
        allreduce_trigger_params: Iterable[Tensor] | None = None,
        retain_allreduce_buffers: bool = False,
        allreduce_always_fp32: bool = False,
        num_allreduce_streams: int = 1,
        allreduce_communicators: Any = None,
        gradient_average: bool = True,
        gradient_predivide_factor: float = 1.0,
        gradient_average_split_factor: float | None = None,
        prof: bool = False,
    ) -> None:
        _refuse("shared_param", shared_param, "leave it out: shared parameters need nothing")
        _refuse("retain_allreduce_buffers", retain_allreduce_buffers or None, "read parameter.grad, the average")
        _refuse(
            "allreduce_communicators",
            allreduce_communicators,
            "use torch.nn.parallel.DistributedDataParallel(model, process_group=...)",
        )
        factor = gradient_predivide_factor if gradient_average_split_factor is None else gradient_average_split_factor
        if not factor > 0.0:
            raise ValueError(f"gradient_predivide_factor is {factor!r}; it must be a number > 0.")
        super().__init__(module, find_unused_parameters=delay_allreduce)
        self.broadcast_buffers = False  # an argument of this name is deprecated from torch 2.13 on
        if allreduce_always_fp32 or not gradient_average or factor != 1.0:
            averaging = _Averaging(self.process_group, allreduce_always_fp32, gradient_average, factor)
            self.register_comm_hook(averaging, _average)

    def disable_allreduce(self) -> None:
        """Gradients stay local from the next forward pass on, as within torch's `no_sync()`."""
        self.require_backward_grad_sync = False

    def enable_allreduce(self) -> None:
        """Gradients are averaged again from the next forward pass on."""
        self.require_backward_grad_sync = True


def _refuse(name: str, value: Any, remedy: str) -> None:
    if value is not None:
        raise ValueError(f"{name}={value!r} is not supported: {remedy}.")


def _average(averaging: _Averaging, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook: divides, adds up over the processes and divides."""
    grads = bucket.buffer()
    total = grads.float() if averaging.in_fp32 else grads
    if averaging.predivide_factor != 1.0:
        total.div_(averaging.predivide_factor)
    future = dist.all_reduce(total, group=averaging.group, async_op=True).get_future()

    def finish(_: Any) -> Tensor:
        if averaging.average:
            total.mul_(averaging.predivide_factor / averaging.group.size())
        return grads if total is grads else grads.copy_(total)

    return future.then(finish)


class Reducer:
    """Averages gradients over all processes when told to. Gives a module the first process's parameters.

    Args:
        module_or_grads_list: A module, or the gradients themselves.
    """

    def __init__(self, module_or_grads_list: nn.Module | Iterable[Tensor]) -> None:
        self.module = module_or_grads_list if isinstance(module_or_grads_list, nn.Module) else None
        self.grads = [] if isinstance(module_or_grads_list, nn.Module) else list(module_or_grads_list)
        if self.module is not None:
            flat_dist_call(list(self.module.parameters()), dist.broadcast, (0,))

    def reduce(self) -> None:
        """Averages the gradients in place; a parameter without one is left out, and must be so on every process."""
        grads = self.grads
        if self.module is not None:
            grads = [param.grad for param in self.module.parameters() if param.grad is not None]
        size = dist.get_world_size()
        flat_dist_call(grads, lambda flat: dist.all_reduce(flat.div_(size)))  # divided first: fp16 sums may overflow


def flat_dist_call(
    tensors: Iterable[Tensor], call: Callable[..., Any], extra_args: Sequence[Any] | None = None
) -> None:
    """`apply_flat_dist_call` for the tensors of each dtype and device, in order of their first.

    Args:
        tensors: They are written in place.
        call: See `apply_flat_dist_call`.
        extra_args: See `apply_flat_dist_call`.
    """
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for bucket in alike.values():
        apply_flat_dist_call(bucket, call, extra_args)


@torch.no_grad()
def apply_flat_dist_call(
    bucket: Sequence[Tensor], call: Callable[..., Any], extra_args: Sequence[Any] | None = None
) -> None:
    """Calls once for all tensors, flattened, and copies the result back.

    Args:
        bucket: Of one dtype and device. They are written in place.
        call: A collective that works in place. What `torch.distributed.all_reduce` adds up is divided by the number of
            processes.
        extra_args: Of the call, after the flat tensor.
    """
    flat = flatten(bucket)
    call(flat, *(extra_args or ()))
    if call is dist.all_reduce:
        flat /= dist.get_world_size()
    for tensor, part in zip(bucket, unflatten(flat, bucket), strict=True):
        tensor.copy_(part)


class SyncBatchNorm(nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` with apex's arguments.

    Args:
        num_features: As torch's.
        eps: As torch's.
        momentum: As torch's.
        affine: As torch's.
        track_running_stats: As torch's.
        process_group: As torch's; see `create_syncbn_process_group`.
        channel_last: Whether the channels are the input's last dimension.
        fuse_relu: Whether the output goes through a ReLU.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        channel_last: bool = False,
        fuse_relu: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, process_group)
        self.channel_last = channel_last
        self.fuse_relu = fuse_relu

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalises, and adds `z`, before the ReLU, if any."""
        if self.channel_last and input.dim() > 2:
            output = super().forward(input.movedim(-1, 1)).movedim(1, -1)
        else:
            output = super().forward(input)
        if z is not None:
            output = output + z
        return torch.relu(output) if self.fuse_relu else output


def convert_syncbn_model(module: nn.Module, process_group: Any = None, channel_last: bool = False) -> nn.Module:
    """The module with a `SyncBatchNorm` in the place of every batch norm; parameters and buffers are the same objects.

    Args:
        module: A model; its children are replaced in place. Give it before the optimizer, as with torch's.
        process_group: See `SyncBatchNorm`.
        channel_last: See `SyncBatchNorm`.

    Returns:
        The module, or the layer that takes its place.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _synchronised(module, process_group, channel_last)
    for name, child in module.named_children():
        setattr(module, name, convert_syncbn_model(child, process_group, channel_last))
    return module


def _synchronised(norm: Any, process_group: Any, channel_last: bool) -> SyncBatchNorm:
    numbers = (norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    layer = SyncBatchNorm(*numbers, process_group, channel_last)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(layer, name, getattr(norm, name))
    return layer.train(norm.training)


def create_syncbn_process_group(group_size: int) -> Any:
    """The group of `group_size` neighbouring ranks that this process belongs to, for `SyncBatchNorm`.

    Args:
        group_size: Must divide the number of processes; 0: all of them.

    Returns:
        A process group; None for all.

    Raises:
        ValueError: It does not divide the number of processes.
    """
    if group_size == 0:
        return None
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if group_size < 0 or world_size % group_size:
        raise ValueError(f"group_size is {group_size}; it must divide the number of processes, {world_size}.")
    starts = range(0, world_size, group_size)
    groups = [dist.new_group(range(start, start + group_size)) for start in starts]  # every rank makes all of them
    return groups[rank // group_size]
