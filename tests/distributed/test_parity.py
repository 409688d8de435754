"""Two ranks give the bits of one process on the joined batch: one loss and three, buckets, no_sync, overflows."""

import numpy as np
import pytest

from tests.distributed import scenarios

# The iteration and the loss at which a rank's loss is inf; the growth interval of 3 makes scales grow as well.
INFS = {1: {(0, 0): 1, (4, 0): 0}, 3: {(0, 1): 1, (1, 0): 0, (4, 2): 1}}
TINY_BUCKETS = {"bucket_cap_mb": 1e-6}  # after the second forward pass, a bucket for each parameter


def agree(pair, name="train", **options):
    """Both ranks' results, which are the same, bit for bit, and those of one process."""
    first, second = pair.run(name, **options)
    assert first == second
    alone = getattr(scenarios, name)(None, **options)
    for i, (ours, joined) in enumerate(zip(first, alone, strict=True)):
        assert ours == joined, f"iteration {i}"
    return first


@pytest.mark.parametrize("losses", [1, 3])
@pytest.mark.parametrize("micro", [1, 2], ids=["", "no_sync"])
@pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket views"])
def test_two_ranks_are_one_process_on_the_joined_batch(pair, view, micro, losses):
    options = {"losses": losses, "micro": micro, "infs": INFS[losses]}
    history = agree(pair, **options, ddp={"gradient_as_bucket_view": view})
    skipped = [skipped for _, skipped, _ in history]
    assert skipped == [(i in {at for at, _ in INFS[losses]}) for i in range(len(history))]
    scales = np.array([scales for scales, _, _ in history])
    assert (scales < scenarios.FIRST_SCALE).any()
    assert (np.diff(scales, axis=0) > 0).any()


@pytest.mark.parametrize("losses", [1, 3])
@pytest.mark.parametrize("make", ["momentum", "adamw", "rmsprop", "Adamax"])
def test_every_path_of_the_optimizer(pair, make, losses):
    """One bucket for each parameter, where the buckets end with the gradients."""
    agree(pair, losses=losses, make=make, infs=INFS[losses], ddp={"gradient_as_bucket_view": True, **TINY_BUCKETS})


@pytest.mark.parametrize("zero", ["optimizer in place", "model"])
@pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket views"])
@pytest.mark.parametrize("losses", [1, 3])
def test_zeroing(pair, losses, view, zero):
    agree(pair, losses=losses, infs=INFS[losses], zero=zero, ddp={"gradient_as_bucket_view": view})


@pytest.mark.parametrize("losses", [1, 3])
@pytest.mark.parametrize("kind", ["plain", "plain split", "split"])
def test_torchs_optimizer_and_two_optimizers_on_one_model(pair, kind, losses):
    agree(pair, kind=kind, losses=losses, micro=2, infs=INFS[losses], ddp={"gradient_as_bucket_view": True})


@pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket views"])
@pytest.mark.parametrize("kind", ["torch's scaler", "bf16"])
def test_without_a_scaler_of_ours(pair, kind, view):
    agree(pair, kind=kind, infs=INFS[1], ddp={"gradient_as_bucket_view": view})


@pytest.mark.parametrize("zero", ["optimizer", "optimizer in place"])
@pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket views"])
@pytest.mark.parametrize("losses", [1, 3])
def test_clipping_after_unscale(pair, losses, view, zero):
    options = {"clip": "unscale", "zero": zero, "infs": INFS[losses]}
    agree(pair, losses=losses, **options, ddp={"gradient_as_bucket_view": view})


@pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket views"])
def test_clipping_in_the_step(pair, view):
    agree(pair, losses=3, max_grad_norm=1.0, infs=INFS[3], ddp={"gradient_as_bucket_view": view})


@pytest.mark.parametrize("losses", [1, 3])
@pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket views"])
def test_static_graph(pair, view, losses):
    agree(pair, losses=losses, infs=INFS[losses], ddp={"static_graph": True, "gradient_as_bucket_view": view})


@pytest.mark.parametrize("view", [False, True], ids=["copies", "bucket views"])
def test_unused_parameters_keep_the_gradients_of_other_losses(pair, view):
    agree(pair, "unused", bucket_view=view)


def test_ranks_from_different_seeds_train_alike(pair):
    """DistributedDataParallel broadcasts the fp16 weights; the masters of the first rank must follow them."""
    agree(pair, seed_of_rank=True)
    agree(pair, seed_of_rank=True, make="Adamax", ddp={"gradient_as_bucket_view": True})


@pytest.mark.parametrize("make", ["sgd", "adam"])
def test_torch_amp_has_the_same_scales(pair, make):
    """And FP32 weights that stay within 4 ULP a step of the masters."""
    options = {"infs": INFS[1], "make": make, "iterations": 9}
    ours = pair.run("masters_after", **options)
    theirs = pair.run("torch_amp", **options)
    for mine, other in zip(ours, theirs, strict=True):
        assert [(scales, skipped) for scales, skipped, _ in mine] == [(s, skipped) for s, skipped, _ in other]
        for i, ((_, _, masters), (_, _, weights)) in enumerate(zip(mine, other, strict=True)):
            for (_, shape, bits), weight in zip(masters, weights, strict=True):
                master = np.frombuffer(bits, np.float32).reshape(shape)
                ulp = np.spacing(np.maximum(np.abs(weight), np.float32(2.0**-3)))  # sums near zero lose digits
                assert (np.abs(master - weight) <= 4 * (i + 1) * ulp).all()
