"""Defects 8 and 9: ranks that come to different verdicts about one step, on two processes with gloo.

What is shown is the verdict alone, on sharded parameters that are made by hand; no FSDP wrapper runs. Our scaler sees
that parameters are sharded where they are DTensors (FSDP2, tensor parallelism). FSDP1's flat shards are plain tensors:
nothing tells a scaler that other ranks hold the rest, and ours has no counterpart to `ShardedGradScaler`.
"""

import pytest
import torch
import torch.multiprocessing as mp

from tests.parity import ranks

SKIPPED, TAKEN = (4.0, [[1.0, 1.0]]), (8.0, [[0.875, 0.875]])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """For each scenario, what came of it on rank 0 and on rank 1. Rank 0's gradient has an inf."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(ranks.run, args=(str(folder), 2), nprocs=2, start_method="spawn")
    each = [torch.load(folder / f"rank{rank}", weights_only=True) for rank in range(2)]
    return {name: [one[name] for one in each] for name in each[0]}


def test_8_torchs_sharded_scaler_and_a_fused_optimizer_part_the_ranks(outcomes):
    """With `unscale_` it raises; without, rank 0 skips and rank 1 steps. With a for-loop optimizer it is right."""
    for unscale in (False, True):
        assert outcomes[f"sharded fused=False unscale={unscale}"] == [SKIPPED, SKIPPED]
    for rank, (scale, (weights,)) in enumerate(outcomes["sharded fused=True unscale=False"]):
        assert scale == (8.0 if rank else 4.0)
        assert all(w < 0.9 if rank else w == 1.0 for w in weights)
    for message in outcomes["sharded fused=True unscale=True"]:
        assert "doesn't match the broadcast shape [1]" in message


@pytest.mark.parametrize("unscale", [False, True])
def test_8_under_our_scaler_the_ranks_agree(outcomes, unscale):
    """A parameter sharded over both ranks, torch's fused Adam: both skip, with `unscale_` and without."""
    assert outcomes[f"ours on one mesh unscale={unscale}"] == [SKIPPED, SKIPPED]


def test_9_on_two_meshes_torchs_ranks_disagree(outcomes):
    """found_inf is reduced over the mesh of the first gradient: rank 1 never hears of it."""
    (skipped_scale, skipped), (taken_scale, taken) = outcomes["torch on two meshes"]
    assert (skipped_scale, taken_scale) == (4.0, 8.0)
    assert skipped == [[1.0, 1.0]] * 2
    assert taken == [[0.875, 0.875]] * 2


def test_9_on_two_meshes_ours_agree(outcomes):
    assert outcomes["ours on two meshes"] == [(4.0, [[1.0, 1.0]] * 2)] * 2
    assert outcomes["ours on two meshes, clean"] == [(8.0, [[0.875, 0.875]] * 2)] * 2


def test_sharded_parameters_are_refused_by_our_optimizer(outcomes):
    """Its masters and its verdict would be this rank's alone."""
    for message in outcomes["wrapped"]:
        assert message.startswith("parameter 0 of shape (4,) is a DTensor, sharded over several processes")
