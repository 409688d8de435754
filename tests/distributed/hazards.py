"""More of what the workers run: mistakes that must be refused, hooks, networks, uneven inputs, checkpoints."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import mpengine
from tests.distributed.scenarios import Linear, coefficients, wrapped
from tests.harness import FUSED, frozen, snapshot

HOOKS = {"none": None, "fp16": default_hooks.fp16_compress_hook}  # bf16's needs NCCL


def refused(function: Any) -> str:
    """The message of the error that it raises; "" where it raises none."""
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def prepare_after_wrapping(rank: int, *, inner: bool) -> tuple[str, bool]:
    """The error, and whether nothing has changed."""
    model = Linear()
    outer = DistributedDataParallel(model)
    before = frozen(list(model.parameters()))
    optimizer = FUSED["sgd"](model.parameters())
    message = refused(lambda: mpengine.prepare(model if inner else outer, optimizer, mpengine.GradScaler("cpu")))
    return message, frozen(list(model.parameters())) == before


def left_local(rank: int, *, how: str, view: bool) -> tuple[str, bool]:
    """Gradients left local by no_sync and set aside; the error of the step, and whether nothing has changed."""
    model = Linear()
    scaler = mpengine.GradScaler("cpu", init_scale=8.0, growth_interval=1, num_losses=2)
    optimizer = mpengine.prepare(model, FUSED["adam"](model.parameters()), scaler)
    outer = DistributedDataParallel(model, gradient_as_bucket_view=view)

    def backward(seed: int, loss_id: int) -> None:
        scaler.scale(outer(coefficients(seed, rank)), loss_id).backward()

    if how == "averaged later":  # right: the last pass of each loss averages all of it
        for k in range(2):
            with outer.no_sync():
                backward(k, k)
            backward(10 + k, k)
    elif how == "local alone":  # each rank for itself, as in local SGD: nothing is mixed up
        with outer.no_sync():
            backward(0, 0)
            backward(1, 1)
    elif how == "evaluation":  # between forward and backward, as a bootstrapped target is
        loss = outer(coefficients(0, rank))
        with torch.no_grad():
            outer(coefficients(1, rank))
        scaler.scale(loss, 0).backward()
        backward(1, 1)
    elif how == "another loss":
        with outer.no_sync():
            backward(0, 0)
        backward(1, 1)
    elif how == "the last one":
        backward(0, 0)
        with outer.no_sync():
            backward(1, 1)
    elif how == "another scale":
        with outer.no_sync():
            backward(0, 0)
        scaler.update(16.0)
        backward(1, 0)
    before = snapshot(optimizer)
    message = refused(optimizer.step)
    return message, snapshot(optimizer) == before


def compressed(rank: int, *, hook: str, view: bool) -> list[Any]:
    """FP32 gradients beyond fp16's range on both ranks, perhaps reduced in fp16: who overflows, does on every rank."""
    model = Linear()
    scaler = mpengine.GradScaler("cpu", init_scale=2.0**14, growth_interval=100, num_losses=1)
    optimizer = mpengine.prepare(model, FUSED["adam"](model.parameters()), scaler)
    outer = DistributedDataParallel(model, gradient_as_bucket_view=view)
    if HOOKS[hook] is not None:
        outer.register_comm_hook(None, HOOKS[hook])
    history = []
    for i in range(4):
        optimizer.zero_grad()
        given: list[Tensor | None] = [torch.zeros_like(c) for c in coefficients(i, rank)]
        given[-1] = torch.full((5,), 7.0) if rank == 1 else torch.full((5,), 3.0)  # times 2^14: 114688 and 49152
        scaler.scale(outer(given)).backward()
        scaler.step(optimizer)
        scaler.update()
        history.append((scaler.get_scale(), optimizer.last_step_skipped, snapshot(optimizer)))
    return history


class Noisy(nn.Module):
    """A small convolutional network with normalisation, for both players of a GAN."""

    def __init__(self, seed: int, out: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Conv2d(2, 5, 3, padding=1), nn.GroupNorm(1, 5), nn.LeakyReLU(0.2), nn.Conv2d(5, out, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def gan(rank: int, *, view: bool, channels_last: bool) -> list[Any]:
    """Two models, three losses on two optimizers: D on real, D on fake, G through D; overflows on single ranks."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net_d, net_g = (Noisy(seed, out).to(memory_format=layout) for seed, out in ((2 * rank, 1), (2 * rank + 1, 2)))
    scaler = mpengine.GradScaler("cpu", init_scale=2.0**12, growth_interval=3, num_losses=3)
    opt_d = mpengine.prepare(net_d, torch.optim.Adam(net_d.parameters(), lr=1e-2), scaler)
    opt_g = mpengine.prepare(net_g, torch.optim.Adam(net_g.parameters(), lr=1e-2), scaler, max_grad_norm=1.0)
    ddp_d = DistributedDataParallel(net_d, gradient_as_bucket_view=view)
    ddp_g = DistributedDataParallel(net_g, gradient_as_bucket_view=view)
    generator = torch.Generator().manual_seed(50 + rank)
    history = []
    for i in range(6):
        real, z = (torch.randn(3, 2, 6, 6, generator=generator).half() for _ in range(2))
        opt_d.zero_grad()
        opt_g.zero_grad()
        fake = ddp_g(z)
        loss_real = nn.functional.softplus(-ddp_d(real).float()).mean()
        scaler.scale(loss_real * (float("inf") if (i, rank) == (2, 1) else 1.0), 0).backward()
        scaler.scale(nn.functional.softplus(ddp_d(fake.detach()).float()).mean(), 1).backward()
        opt_d.step()
        loss_g = nn.functional.softplus(-net_d(fake).float()).mean()  # D itself: its gradients here are nobody's
        inputs = list(net_g.parameters())
        scaler.scale(loss_g * (float("inf") if (i, rank) == (4, 0) else 1.0), 2).backward(inputs=inputs)
        opt_g.step()
        scaler.update()
        steps = [(o.steps_taken, o.steps_skipped) for o in (opt_d, opt_g)]
        history.append(([s.scale for s in scaler.statistics()], steps, snapshot(opt_d), snapshot(opt_g)))
    return history


def network(rank: int | None, *, view: bool = False, lr: float = 0.1) -> dict[str, Any]:
    """One SGD step of a real network on a rank's half of a batch, or on all of it: masters before, gradients' size."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4))
    scaler = mpengine.GradScaler("cpu", init_scale=2.0**10)
    optimizer = mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=lr), scaler)
    outer = wrapped(model, rank, gradient_as_bucket_view=view)
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(16, 6, generator=generator).half(), torch.randn(16, 4, generator=generator)
    own = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
    before = [p.detach().clone() for p in optimizer.master_params()]
    scaler.scale((outer(x[own]).float() - y[own]).square().mean()).backward()
    optimizer.step()
    after = [p.detach().clone() for p in optimizer.master_params()]
    return {"moved": [(b - a).numpy() / lr for b, a in zip(before, after, strict=True)], "after": frozen(after)}


def uneven(rank: int) -> list[Any]:
    """Rank 1 has two batches more than rank 0: join() goes on without it, and ends with equal weights."""
    model = Linear()
    scaler = mpengine.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    optimizer = mpengine.prepare(model, FUSED["sgd"](model.parameters()), scaler)
    outer = DistributedDataParallel(model)
    taken = 0
    with outer.join():
        for i in range(3 + 2 * rank):
            optimizer.zero_grad()
            scaler.scale(outer(coefficients(i, rank))).backward()
            optimizer.step()
            scaler.update()
            taken += 1
    return [taken, optimizer.steps_taken, frozen(list(model.parameters()))]


def checkpointed(rank: int, *, loaded_first: str) -> bool:
    """Rank 0 saves after two of four iterations; every rank loads that into new objects: as if never stopped."""

    def make(seed: int) -> tuple[Any, ...]:
        model = Linear(seed)
        scaler = mpengine.GradScaler("cpu", init_scale=2.0**15, growth_interval=2, num_losses=2)
        optimizer = mpengine.prepare(model, FUSED["adam"](model.parameters()), scaler)
        return model, optimizer, scaler, DistributedDataParallel(model, gradient_as_bucket_view=True)

    def iterate(model: Any, optimizer: Any, scaler: Any, outer: Any, i: int) -> None:
        for k in range(2):
            scaler.scale(outer(coefficients(2 * i + k, rank)), k).backward()
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()

    first = make(0)
    for i in range(2):
        iterate(*first, i)
    shelf: list[Any] = [None]
    if rank == 0:
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in zip("mos", first, strict=False)}, buffer)
        shelf = [buffer.getvalue()]
    dist.broadcast_object_list(shelf, src=0)
    second = make(7 + rank)
    saved = torch.load(io.BytesIO(shelf[0]), weights_only=True)
    for name in loaded_first:
        second["mos".index(name)].load_state_dict(copy.deepcopy(saved[name]))
    for i in range(2, 5):
        iterate(*first, i)
        iterate(*second, i)
    same_scaler = first[2].state_dict() == second[2].state_dict()
    return same_scaler and snapshot(first[1]) == snapshot(second[1])


def forgotten(rank: int) -> bool:
    """Whether a DistributedDataParallel lives no longer than its user wants."""
    from mpengine import distributed

    known = weakref.ref(DistributedDataParallel(Linear()))
    gc.collect()
    return known() is None and not list(distributed._wrappers())
