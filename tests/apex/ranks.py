"""What the workers run for test_parallel. Gradients are small integers, or sums that fp16 cannot hold."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mpengine.apex import fp16_utils, parallel


class Product(nn.Module):
    """The sum of weight * coefficient: its gradient is the coefficient. `spare` may stay without one."""

    def __init__(self, start: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((5,), start, dtype=dtype))
        self.spare = nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, coefficient: float, spare: bool = True) -> Tensor:
        total = (self.weight.float() * coefficient).sum()
        return total + self.spare.float().sum() if spare else total


def average(rank: int, each: list[float], dtype: str = "float32", **options: Any) -> tuple[list[float], list[float]]:
    """The first rank's weights, and the gradient that `DistributedDataParallel` leaves for `each` rank's own."""
    model = parallel.DistributedDataParallel(Product(1.0 + rank, getattr(torch, dtype)), **options)
    model(each[rank]).backward()
    return model.module.weight.tolist(), model.module.weight.grad.tolist()


def unused(rank: int) -> list[bool]:
    """Two iterations that leave a parameter out."""
    model = parallel.DistributedDataParallel(Product(1.0), delay_allreduce=True)
    for _ in range(2):
        model.zero_grad()
        model(1.0 + rank, spare=False).backward()
    return [model.module.weight.grad.tolist() == [1.5] * 5, model.module.spare.grad is None]


def local(rank: int) -> list[list[float]]:
    """A micro-batch without a reduction, and one with."""
    model = parallel.DistributedDataParallel(Product(1.0))
    model.disable_allreduce()
    model(4.0 * rank).backward()
    grads = [model.module.weight.grad.tolist()]
    model.enable_allreduce()
    model(4.0 * rank).backward()
    return [*grads, model.module.weight.grad.tolist()]


def reducer(rank: int, dtype: str, large: float) -> tuple[list[float], list[float], list[float]]:
    """Weights after construction; gradients of a module and of a list after the reduction."""
    model = Product(1.0 + rank, getattr(torch, dtype))
    reduce = parallel.Reducer(model)
    weights = model.weight.tolist()
    model(large, spare=False).backward()
    reduce.reduce()
    grads = [torch.full((2, 2), float(rank)), torch.full((), 4.0 * rank)]
    parallel.Reducer(grads).reduce()
    return weights, model.weight.grad.tolist(), [grads[0][0, 0].item(), grads[1].item()]


def flat(rank: int) -> list[Any]:
    """What `flat_dist_call` leaves in tensors of three dtypes for three collectives, and the rank."""

    def tensors(*dtypes: torch.dtype) -> list[Tensor]:
        return [torch.full((i % 2 + 1,), 1 + rank, dtype=dtype) for i, dtype in enumerate(dtypes)]

    first = tensors(torch.float16, torch.float32, torch.int64)
    parallel.flat_dist_call(first, dist.broadcast, (0,))
    second = tensors(torch.float16, torch.float32)
    parallel.flat_dist_call(second, dist.all_reduce)
    third = tensors(torch.float16, torch.float32, torch.int64)
    parallel.flat_dist_call(third, lambda value, op: dist.all_reduce(value, op), (parallel.ReduceOp.SUM,))
    return [[tensor.tolist() for tensor in some] for some in (first, second, third)] + [rank]


def fp16_optimizer(rank: int) -> tuple[list[float], list[int]]:
    """The masters of a half model that was wrapped before its optimizer, as apex's examples had it; steps, skips."""
    torch.manual_seed(rank)
    model = parallel.DistributedDataParallel(fp16_utils.network_to_half(nn.Linear(4, 3)))
    torch_optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = fp16_utils.FP16_Optimizer(
        torch_optimizer, dynamic_loss_scale=True, dynamic_loss_args={"init_scale": 2.0**9}
    )
    for i in range(4):
        optimizer.zero_grad()
        factor = float("inf") if i == 1 and rank == 1 else 1.0
        optimizer.backward(model(torch.randn(8, 4)).float().square().mean() * factor)
        optimizer.clip_master_grads(0.5)
        optimizer.step()
    values = torch.cat([master.detach().reshape(-1) for master in optimizer.optimizer.master_params()]).tolist()
    return values, [optimizer.optimizer.steps_taken, optimizer.optimizer.steps_skipped, int(optimizer.loss_scale)]


def groups(rank: int) -> list[Any]:
    """Sizes of the groups of 1 and of 0, and the message for 3."""
    try:
        parallel.create_syncbn_process_group(3)
    except ValueError as error:
        message = str(error)
    group = parallel.create_syncbn_process_group(1)
    return [group.size(), dist.get_process_group_ranks(group), parallel.create_syncbn_process_group(0), message]
