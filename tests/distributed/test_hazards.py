"""What DistributedDataParallel's users run into: order of calls, no_sync, hooks, several models, checkpoints."""

import numpy as np
import pytest
import torch
from torch import nn

from mpengine import distributed
from tests.distributed import hazards, scenarios
from tests.distributed.test_parity import INFS, TINY_BUCKETS
from tests.distributed.workers import ScenarioError

VIEWS = pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket views"])


def equal_results(pair, name, **options):
    first, second = pair.run(name, "tests.distributed.hazards", **options)
    assert first == second
    return first


@pytest.mark.parametrize("inner", [False, True], ids=["wrapper", "model"])
def test_prepare_after_wrapping_is_refused(pair, inner):
    message, unchanged = equal_results(pair, "prepare_after_wrapping", inner=inner)
    assert "DistributedDataParallel(model)" in message
    assert "Prepare first" in message
    assert unchanged


@VIEWS
@pytest.mark.parametrize("how", ["another loss", "another scale", "the last one"])
def test_a_mixture_of_local_and_averaged_gradients_is_refused(pair, how, view):
    message, unchanged = equal_results(pair, "left_local", how=how, view=view)
    assert "no_sync()" in message
    assert "parameter 'own.0'" in message
    assert unchanged


@VIEWS
@pytest.mark.parametrize("how", ["averaged later", "local alone", "evaluation"])
def test_gradients_that_are_all_averaged_or_all_local_are_stepped(pair, how, view):
    for message, unchanged in pair.run("left_local", "tests.distributed.hazards", how=how, view=view):
        assert (message, unchanged) == ("", False)


@VIEWS
@pytest.mark.parametrize("hook", hazards.HOOKS)
def test_an_overflow_in_a_compressed_average_is_everybodys(pair, hook, view):
    history = equal_results(pair, "compressed", hook=hook, view=view)
    skipped = [skipped for _, skipped, _ in history]
    # The hook casts a rank's 114688 to fp16, where it is inf; FP32 holds it, and the average of 81920.
    assert skipped == ([True, False, False, False] if hook == "fp16" else [False] * 4)


@VIEWS
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_two_models_and_three_losses(pair, view, channels_last):
    history = equal_results(pair, "gan", view=view, channels_last=channels_last)
    scales, steps, _, _ = history[-1]
    assert steps == [(5, 1), (5, 1)]
    assert scales[0] < scales[1]
    assert scales[2] < scales[1]


@VIEWS
def test_a_network_moves_as_one_process_on_the_joined_batch(pair, view):
    """A gradient of a rank is off by what its eight roundings to fp16, forward and backward, contribute."""
    first, second = pair.run("network", "tests.distributed.hazards", view=view)
    assert first["after"] == second["after"]
    for ours, joined in zip(first["moved"], hazards.network(None)["moved"], strict=True):
        bound = 8 * 2.0**-11 * np.abs(joined).max()
        assert np.abs(ours - joined).max() <= bound
        assert np.abs(joined).max() > 100 * bound


def test_uneven_inputs(pair):
    (taken0, steps0, weights0), (taken1, steps1, weights1) = pair.run("uneven", "tests.distributed.hazards")
    assert (taken0, steps0, taken1, steps1) == (3, 3, 5, 5)
    assert weights0 == weights1


@pytest.mark.parametrize("loaded_first", ["mos", "som"])
def test_a_checkpoint_of_the_first_rank_resumes_all(pair, loaded_first):
    assert equal_results(pair, "checkpointed", loaded_first=loaded_first) is True


def test_wrappers_are_not_kept_alive(pair):
    assert equal_results(pair, "forgotten") is True


def test_gradients_of_one_process_are_not_copied():
    """None of autograd's own looks like a view into a bucket."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5)
    ).half()
    for _ in range(2):
        model(torch.randn(2, 2, 4, 4).half()).float().sum().backward()
        assert not [name for name, p in model.named_parameters() if distributed.is_bucket_view(p.grad)]
    assert distributed.unsynchronised() == set()
    assert not distributed.wraps(model)


# Sabotage: the tests above can fail.


def differs(pair, name="train", **options):
    """Whether ranks differ from each other, from one process on the joined batch, or fail."""
    try:
        first, second = pair.run(name, **options)
    except ScenarioError:
        return True
    options.pop("sabotage")
    return first != second or first != getattr(scenarios, name)(None, **options)


@pytest.mark.parametrize("buckets", [{}, TINY_BUCKETS], ids=["shared", "own"])
def test_gradients_left_in_their_buckets_are_noticed(pair, buckets):
    options = {"losses": 3, "ddp": {"gradient_as_bucket_view": True, **buckets}}
    assert not differs(pair, sabotage="", **options)
    assert differs(pair, sabotage="no copy", **options)


def test_masters_of_their_own_are_noticed(pair):
    assert differs(pair, sabotage="own masters", seed_of_rank=True)


@VIEWS
def test_a_pass_that_ends_before_the_average_is_noticed(pair, view):
    assert differs(pair, "unused", sabotage="end early", bucket_view=view)


def test_an_overflow_that_one_rank_ignores_is_noticed(pair):
    first, second = pair.run("train", infs=INFS[1], sabotage="repair")
    assert first != second
