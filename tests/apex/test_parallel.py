"""`apex.parallel` over torch's: averages, the options that change them, Reducer, batch norms."""

import pytest
import torch
from torch import nn

import mpengine
from mpengine import amp
from mpengine.apex import apex_c, parallel

RANKS = "tests.apex.ranks"


def averaged(pair, each, **options):
    (weights, first), (_, second) = pair.run("average", RANKS, each=each, **options)
    assert weights == [1.0] * 5  # the first rank's
    assert first == second
    assert len(set(first)) == 1
    return first[0]


def test_gradients_are_averaged(pair):
    assert averaged(pair, [1.0, 4.0]) == 2.5


IGNORED = {"message_size": 1, "allreduce_trigger_params": [], "num_allreduce_streams": 2, "prof": True}


def test_arguments_without_effect(pair):
    assert averaged(pair, [1.0, 4.0], **IGNORED) == 2.5


def test_a_sum_instead_of_an_average(pair):
    assert averaged(pair, [1.0, 4.0], gradient_average=False) == 5.0


@pytest.mark.parametrize("name", ["gradient_predivide_factor", "gradient_average_split_factor"])
def test_division_before_and_after(pair, name):
    assert averaged(pair, [1.0, 4.0], **{name: 4.0}) == 2.5


def test_division_before_alone(pair):
    assert averaged(pair, [1.0, 4.0], gradient_predivide_factor=4.0, gradient_average=False) == 1.25


def test_a_sum_that_fp16_cannot_hold(pair):
    """40000 twice is inf in fp16; FP32 holds it. Divided by 1.5 before, it is inf."""
    each = {"each": [40000.0, 40000.0], "dtype": "float16"}
    assert averaged(pair, **each, allreduce_always_fp32=True) == 40000.0
    assert averaged(pair, **each) == 40000.0  # torch divides before it adds
    assert averaged(pair, **each, gradient_average=False) == float("inf")


def test_parameters_without_gradient(pair):
    assert pair.run("unused", RANKS) == [[True, True]] * 2


def test_allreduce_can_be_put_off(pair):
    assert pair.run("local", RANKS) == [[[0.0] * 5, [4.0] * 5], [[4.0] * 5, [4.0] * 5]]


REFUSED = {
    "shared_param": (True, "leave it out"),
    "retain_allreduce_buffers": (True, "parameter.grad"),
    "allreduce_communicators": ([], "torch.nn.parallel.DistributedDataParallel"),
    "gradient_predivide_factor": (0.0, "> 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_the_replacement(name):
    value, remedy = REFUSED[name]
    with pytest.raises(ValueError, match=rf"{name}.*{remedy}"):
        parallel.DistributedDataParallel(nn.Linear(1, 1), **{name: value})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_reducer(pair, dtype):
    for result in pair.run("reducer", RANKS, dtype=dtype, large=40000.0):
        assert result == ([1.0] * 5, [40000.0] * 5, [0.5, 2.0])


def test_flat_dist_call(pair):
    """Broadcast of the first rank's; an average, and what is called by another name a sum; fp16, FP32 and integers."""
    for rank, result in enumerate(pair.run("flat", RANKS)):
        assert result == [[[1.0], [1.0, 1.0], [1]], [[1.5], [1.5, 1.5]], [[3.0], [3.0, 3.0], [3]], rank]


def test_flatten_and_unflatten():
    tensors = [torch.arange(6.0).view(2, 3).t(), torch.tensor(7.0), torch.zeros(0)]
    flat = apex_c.flatten(tensors)
    assert flat.tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0, 7.0]
    for part, tensor in zip(apex_c.unflatten(flat, tensors), tensors, strict=True):
        assert torch.equal(part, tensor)
    apex_c.unflatten(flat, tensors)[1].fill_(9.0)
    assert flat[-1] == 9.0
    assert parallel.flatten is apex_c.flatten
    assert parallel.ReduceOp is torch.distributed.ReduceOp


def test_fp16_optimizer_on_a_wrapped_model(pair):
    (first, counts), (second, _) = pair.run("fp16_optimizer", RANKS)
    assert first == second
    assert counts == [3, 1, 2**8]


# LARC.


def initialized(level):
    model = nn.Linear(3, 2)
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    return given, amp.initialize(model, given, opt_level=level, verbosity=0)[1]


def prepared():
    model = nn.Linear(3, 2)
    return mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), mpengine.GradScaler())


WRAPPED = {
    "O1, returned": lambda: initialized("O1")[1],
    "O1, given": lambda: initialized("O1")[0],
    "O2, returned": lambda: initialized("O2")[1],
    "O2, given": lambda: initialized("O2")[0],
    "prepare": prepared,
}


@pytest.mark.parametrize("optimizer", WRAPPED)
def test_larc_comes_first(optimizer):
    words = r"Wrap LARC first: LARC\(torch\.optim\.SGD\(\.\.\.\)\), then amp\.initialize or mpengine\.prepare\."
    with pytest.raises(TypeError, match=f"LARC is around .*{words}"):
        parallel.LARC(WRAPPED[optimizer]())


# Batch norms.


def test_process_groups(pair):
    message = "group_size is 3; it must divide the number of processes, 2."
    assert pair.run("groups", RANKS) == [[1, [rank], None, message] for rank in range(2)]


def network():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.BatchNorm1d(4, eps=1e-3, momentum=0.3), nn.ReLU())
    return nn.Sequential(nn.Conv1d(3, 4, 3), inner, nn.BatchNorm1d(4, affine=False, track_running_stats=False))


def test_convert_syncbn_model_keeps_everything_but_the_class():
    model, twin = network(), network()
    model[1][0].eval()
    twin[1][0].eval()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    converted = parallel.convert_syncbn_model(model)
    assert converted is model
    assert isinstance(model[1][0], parallel.SyncBatchNorm)
    assert isinstance(model[2], nn.SyncBatchNorm)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {name: id(value) for name, value in after.items()} == {name: id(value) for name, value in before.items()}
    assert [layer.training for layer in (model[1][0], model[2])] == [False, True]
    x = torch.randn(2, 3, 9)
    assert torch.equal(model(x), twin(x))


def test_convert_of_a_single_layer():
    layer = parallel.convert_syncbn_model(nn.BatchNorm2d(3), channel_last=True)
    assert isinstance(layer, parallel.SyncBatchNorm)
    assert layer.channel_last


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 5, 3), (2, 3, 4, 3), (7, 3)])
def test_channels_last(shape, training):
    torch.manual_seed(0)
    last, first = parallel.SyncBatchNorm(3, channel_last=True), nn.BatchNorm1d(3)
    x = torch.randn(shape)
    last.train(training)
    first.train(training)
    flat = first(x.reshape(-1, 3)).reshape(shape)
    # Two orders of adding up at most 24 numbers of size 1, FP32
    torch.testing.assert_close(last(x), flat, rtol=0, atol=24 * 2.0**-23)
    torch.testing.assert_close(last.running_var, first.running_var, rtol=0, atol=24 * 2.0**-23)


def test_fuse_relu_and_z():
    layer = parallel.SyncBatchNorm(3, fuse_relu=True)
    x, z = torch.randn(8, 3), torch.randn(8, 3)
    assert torch.equal(layer(x, z), torch.relu(nn.BatchNorm1d(3)(x) + z))


# The tests notice.


def test_a_conversion_that_copies_parameters_would_be_noticed(monkeypatch):
    monkeypatch.setattr(parallel, "_synchronised", lambda norm, group, last: parallel.SyncBatchNorm(norm.num_features))
    with pytest.raises(AssertionError):
        test_convert_syncbn_model_keeps_everything_but_the_class()


def test_channels_that_are_not_moved_would_be_noticed(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "movedim", lambda self, *_: self)
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        test_channels_last((2, 3, 4, 3), True)
