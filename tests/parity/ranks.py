"""What the processes of `test_sharded.py` run: one optimizer step on sharded gradients, one rank's with an inf."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Shard

import mpengine

SCALE = 8.0


def run(rank: int, folder: str, size: int) -> None:
    """Every scenario on this rank; the outcomes are left in `folder`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        outcomes = {name: scenario(rank) for name, scenario in SCENARIOS.items()}
        torch.save(outcomes, Path(folder) / f"rank{rank}")
    finally:
        dist.destroy_process_group()


def _outcome(scaler: Any, optimizer: torch.optim.Optimizer, locals_: list[Tensor], unscale: bool) -> Any:
    """(scale, weights) after a step and an update, or the error."""
    try:
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    except RuntimeError as error:
        return str(error)
    return scaler.get_scale(), [p.tolist() for p in locals_]


def _grad(spoilt: bool) -> Tensor:
    grad = torch.full((2,), SCALE)
    if spoilt:
        grad[0] = math.inf
    return grad


def _ready(scaler: Any) -> Any:
    scaler.scale(torch.ones((), requires_grad=True))
    return scaler


def sharded_scaler(fused: bool, unscale: bool) -> Any:
    """torch's scaler for FSDP on this rank's part of the weights, a plain tensor."""

    def scenario(rank: int) -> Any:
        param = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.Adam([param], lr=0.125, fused=fused)
        scaler = _ready(ShardedGradScaler("cpu", init_scale=SCALE))
        param.grad = _grad(rank == 0)
        return _outcome(scaler, optimizer, [param], unscale)

    return scenario


def one_mesh(make_scaler: Any, unscale: bool) -> Any:
    """A parameter that is sharded over all ranks, fused Adam."""

    def scenario(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        param = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Shard(0)]))
        optimizer = torch.optim.Adam([param], lr=0.125, fused=True)
        scaler = _ready(make_scaler("cpu", init_scale=SCALE))
        param.grad = DTensor.from_local(_grad(rank == 0), mesh, [Shard(0)])
        return _outcome(scaler, optimizer, [param.to_local()], unscale)

    return scenario


def two_meshes(make_scaler: Any, overflow: bool = True) -> Any:
    """One parameter on a mesh of this rank alone, one on the mesh of all; rank 0's part of the first has the inf."""

    def scenario(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("all", "alone"))
        meshes = [mesh["alone"], mesh["all"]]
        params = [nn.Parameter(DTensor.from_local(torch.ones(2), m, [Shard(0)])) for m in meshes]
        optimizer = torch.optim.SGD(params, lr=0.125)
        scaler = _ready(make_scaler("cpu", init_scale=SCALE))
        for param, m, spoilt in zip(params, meshes, (overflow and rank == 0, False), strict=True):
            param.grad = DTensor.from_local(_grad(spoilt), m, [Shard(0)])
        return _outcome(scaler, optimizer, [p.to_local() for p in params], False)

    return scenario


def wrapped(rank: int) -> Any:
    """A sharded parameter in our optimizer: the refusal."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Shard(0)]))
    try:
        mpengine.MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.125))
    except ValueError as error:
        return str(error)
    return None


SCENARIOS = {
    **{f"sharded fused={f} unscale={u}": sharded_scaler(f, u) for f in (False, True) for u in (False, True)},
    **{f"ours on one mesh unscale={u}": one_mesh(mpengine.GradScaler, u) for u in (False, True)},
    "torch on two meshes": two_meshes(torch.amp.GradScaler),
    "ours on two meshes": two_meshes(mpengine.GradScaler),
    "ours on two meshes, clean": two_meshes(mpengine.GradScaler, overflow=False),
    "wrapped": wrapped,
}
