"""Gradients that are not plain: other layouts, dtypes and alignments, no elements, no dimensions; and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer, reference
from mpengine.execution import _Numbers
from tests.harness import (
    BRAIN,
    EVERY,
    FUSED,
    GENERAL,
    HALF,
    SINGLE,
    feed,
    frozen,
    gradients,
    parameters,
    params_of,
    same_bits,
    snapshot,
    started,
)

every_optimizer = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
one_of_each_path = pytest.mark.parametrize("make", [FUSED["adam"], GENERAL["Adamax"]], ids=["fused", "general"])
SHAPE = (4, 3, 2, 5)
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


def misaligned(t):
    """The same values in memory that starts at an odd element."""
    buffer = torch.full((t.numel() + 1,), math.nan, dtype=t.dtype)
    view = buffer[1:].view(t.shape)
    return view.copy_(t)


GRADS = {
    **LAYOUTS,
    "misaligned": misaligned,
    "every other element": lambda t: torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0],
    "a slice of a bucket": lambda t: torch.cat([torch.full((3,), math.nan).to(t), t.flatten()])[3:].view(t.shape),
}


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("param_layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("grad_layout", GRADS.values(), ids=GRADS)
@one_of_each_path
def test_layouts_of_parameters_and_gradients(dtype, param_layout, grad_layout, make):
    """Whatever the layouts, the same numbers; NaN beside the gradient is not read, memory beside it not written."""
    value = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, other = nn.Parameter(value.clone()), nn.Parameter(param_layout(value.clone()))
    runs = []
    for param, change in ((plain, lambda t: t), (other, grad_layout)):
        optimizer = MixedPrecisionOptimizer(make([param]), max_grad_norm=1.0)
        for step in range(3):
            (grad,) = gradients([plain], step)
            param.grad = change(grad)
            before = frozen(param.grad)
            stride = param.stride()
            optimizer.step()
            assert not optimizer.last_step_skipped
            assert frozen(param.grad) == before
            assert param.stride() == stride
        runs.append((snapshot(optimizer), optimizer.last_grad_norm))
    assert runs[0][0] == runs[1][0]
    # The squares are added in the order of memory: float64 sums of different orders, rounded to FP32 once.
    assert abs(runs[0][1] - runs[1][1]) <= 2.0**-23 * runs[0][1]


@every_optimizer
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_an_expanded_gradient(dtype, make):
    """`param.sum().backward()` gives one: every element is the same memory."""
    results = []
    for expanded in (False, True):
        param = nn.Parameter(torch.ones(3, 4, dtype=dtype))
        optimizer = MixedPrecisionOptimizer(make([param]))
        grad = torch.full((), 0.5, dtype=dtype).expand(3, 4)
        param.grad = grad if expanded else grad.clone()
        optimizer.step()
        assert param.grad.tolist() == [[0.5] * 4] * 3
        results.append(snapshot(optimizer))
    assert results[0] == results[1]


@pytest.mark.parametrize("make", [make for name, make in EVERY.items() if name != "Adafactor"])
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_no_elements_and_no_dimensions(dtype, make):
    empty, scalar = nn.Parameter(torch.ones(0, 3, dtype=dtype)), nn.Parameter(torch.ones((), dtype=dtype))
    optimizer = MixedPrecisionOptimizer(make([empty, scalar]))
    for step in range(2):
        feed([empty, scalar], gradients([empty, scalar], step))
        optimizer.step()
    assert optimizer.steps_taken == 2
    assert empty.shape == (0, 3)
    assert list(optimizer.master_params())[1] != 1.0
    if make in (FUSED["adam"], FUSED["adamw"]):
        assert int(optimizer.state[empty]["step"]) == 2
    loaded = MixedPrecisionOptimizer(make([nn.Parameter(p.detach().clone()) for p in (empty, scalar)]))
    loaded.load_state_dict(optimizer.state_dict())
    assert snapshot(loaded) == snapshot(optimizer)


@pytest.mark.parametrize("make", [FUSED["adam"], GENERAL["Adamax"]], ids=["fused", "general"])
def test_only_empty_parameters(make):
    empty = nn.Parameter(torch.ones(0, dtype=HALF))
    optimizer = MixedPrecisionOptimizer(make([empty]), max_grad_norm=1.0)
    empty.grad = torch.ones(0, dtype=HALF)
    optimizer.step()
    assert optimizer.steps_taken == 1
    assert optimizer.last_grad_norm == 0.0


@pytest.mark.parametrize("param_dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("grad_dtype", [HALF, BRAIN, SINGLE])
@one_of_each_path
def test_a_gradient_of_another_dtype(param_dtype, grad_dtype, make):
    """`grad_dtype` lets a parameter hold one; it is read as what it is."""
    value = torch.tensor([0.5, -1.25, 3.0])
    results = []
    for dtype in (grad_dtype, SINGLE):
        param = nn.Parameter(torch.ones(3, dtype=param_dtype))
        param.grad_dtype = None
        optimizer = MixedPrecisionOptimizer(make([param]))
        param.grad = value.to(dtype)
        optimizer.step()
        results.append(snapshot(optimizer))
    assert results[0] == results[1]


def test_a_large_tensor_goes_block_by_block():
    size = 2 * reference.BLOCK + 17
    value = torch.randn(size, generator=torch.Generator().manual_seed(0))
    whole = nn.Parameter(value.half())
    parts = [nn.Parameter(part.clone().half()) for part in value.split(1000)]
    one, many = MixedPrecisionOptimizer(FUSED["adamw"]([whole])), MixedPrecisionOptimizer(FUSED["adamw"](parts))
    for step in range(2):
        (grad,) = gradients([whole], step)
        whole.grad = grad
        feed(parts, grad.split(1000))
        one.step()
        many.step()
    assert same_bits(whole, torch.cat([p.detach() for p in parts]))
    (master,) = one.master_params()
    assert same_bits(master, torch.cat([m.detach() for m in many.master_params()]))
    assert one.last_grad_norm == pytest.approx(many.last_grad_norm, rel=2.0**-23)


def test_a_gradient_with_a_history_is_stepped():
    """create_graph leaves gradients that require grad."""
    param = nn.Parameter(torch.ones(3))
    optimizer = MixedPrecisionOptimizer(torch.optim.SGD([param], lr=0.5))
    (grad,) = torch.autograd.grad(param.square().sum(), param, create_graph=True)
    param.grad = grad
    optimizer.step()
    assert param.tolist() == [0.0, 0.0, 0.0]
    assert not param.grad_fn


# Refusals.


def sparse(param):
    return torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (3,), check_invariants=True).to(param.dtype)


def double(param):
    return torch.ones(3, dtype=torch.float64)


def complex_(param):
    return torch.ones(3, dtype=torch.complex64)


def integer(param):
    return torch.ones(3, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (sparse, r"is torch\.sparse_coo: use dense gradients \(nn\.Embedding\(sparse=False\)\)"),
        (double, r"is torch\.float64: cast it to torch\.\w+ or float32"),
        (complex_, r"is torch\.complex64: cast it"),
        (integer, r"is torch\.int32: cast it"),
    ],
    ids=["sparse", "float64", "complex", "integer"],
)
@pytest.mark.parametrize("scaled", [False, True])
@one_of_each_path
def test_a_gradient_that_cannot_be_stepped_changes_nothing(dtype, grad, message, scaled, make):
    params = [nn.Parameter(torch.ones(2, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))]
    scaler = started(GradScaler(init_scale=4.0)) if scaled else None
    optimizer = MixedPrecisionOptimizer(make(params), scaler)
    feed(params, gradients(params, 0))
    optimizer.step()
    if scaler is not None:
        scaler.update()
    before = snapshot(optimizer)
    feed(params, gradients(params, 1))
    params[1].grad = None
    params[1].grad_dtype = None
    params[1].grad = grad(params[1])
    with pytest.raises(RuntimeError, match=r"the gradient of group 0, parameter 1 of shape \(3,\) " + message):
        optimizer.step()
    assert snapshot(optimizer) == before
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (1, 0)
    params[1].grad = gradients(params, 1)[1]
    optimizer.step()
    assert optimizer.steps_taken == 2


def test_a_sparse_gradient_names_its_embedding():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    optimizer = mpengine.prepare(model, FUSED["adam"](model.parameters()))
    with torch.sparse.check_sparse_tensor_invariants():
        model(torch.tensor([1, 2])).float().sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of parameter '0\.weight' is torch\.sparse_coo.*sparse=False"):
        optimizer.step()
    assert optimizer.steps_taken == 0


def test_the_gradients_of_the_user_are_never_written():
    """Neither unscaling nor clipping edits `.grad`: reading it after a step shows what backward made."""
    params = parameters()
    optimizer = MixedPrecisionOptimizer(FUSED["adam"](params), max_grad_norm=1e-3)
    grads = gradients(params, 0, size=10.0)
    feed(params, grads)
    own = [p.grad for p in params_of(optimizer)]
    optimizer.step()
    assert same_bits(own, grads)
    assert all(p.grad is grad for p, grad in zip(params, own, strict=True))


def test_whole_numbers_reach_the_device_as_float64():
    """The kernels read their bits: max_grad_norm=1, lr=1."""
    numbers = _Numbers(torch.device("cpu"))
    for rows in ([[1]], [[2]], [[2.5]], [[True]]):
        table = numbers.set(rows, 1)
        assert table.dtype == torch.float64
        assert table.tolist() == [[float(rows[0][0])]]
