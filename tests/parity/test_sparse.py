"""Sparse gradients: unscaled by value, coalesced or not, and an overflow that only coalescing makes."""

import pytest
import torch
from torch import nn

from tests.parity.harness import INF, NAN, Side, bits, make_scaler

SCALED = ("torch", "plain")
SCALE = 4.0


def sparse(values, indices=((0, 2, 2, 5),), size=(6, 2), dtype=torch.float32):
    rows = [[v, -v] for v in values]
    return torch.sparse_coo_tensor(torch.tensor(indices), torch.tensor(rows, dtype=dtype), size, check_invariants=True)


def unscaled(kind, grad):
    scaler = make_scaler(kind, init_scale=SCALE)
    scaler.scale(torch.ones((), requires_grad=True))
    param = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    optimizer = torch.optim.SGD([param], lr=1.0)
    param.grad = grad.clone()
    scaler.unscale_(optimizer)
    (found,) = scaler._found_inf_per_device(optimizer).values()
    return param.grad, float(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("bad", [None, INF, NAN])
def test_sparse_gradients_are_unscaled_as_torch_does_it(dtype, coalesced, bad):
    grad = sparse([1.0, 2.0, 4.0, 8.0 if bad is None else bad], dtype=dtype)
    grad = grad.coalesce() if coalesced else grad
    (theirs, found), (ours, ours_found) = (unscaled(kind, grad) for kind in SCALED)
    assert ours_found == found == (bad is not None)
    assert ours.is_sparse
    assert ours.is_coalesced() == theirs.is_coalesced()
    assert bits(ours.to_dense()) == bits(theirs.to_dense())
    if bad is None:
        assert bits(ours.to_dense()) == bits(grad.to_dense() / SCALE)


def test_an_empty_sparse_gradient():
    empty = torch.sparse_coo_tensor(torch.zeros(1, 0).long(), torch.zeros(0, 2), (6, 2), check_invariants=True)
    for kind in SCALED:
        grad, found = unscaled(kind, empty)
        assert found == 0.0
        assert grad.to_dense().tolist() == [[0.0, 0.0]] * 6


def test_fp16_sparse_gradients_are_refused_without_masters():
    """torch's refusal; it coalesces fp16 only for scalers that allow fp16, because the sum may overflow."""
    for kind in SCALED:
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            unscaled(kind, sparse([1.0] * 4, dtype=torch.float16))


def test_rows_that_are_finite_each_are_no_overflow():
    """Entries of one row are added up by the optimizer, after the check, under both scalers: 6e38 is its inf."""
    weights, scales = {}, {}
    for kind in SCALED:
        scaler = make_scaler(kind, init_scale=1.0)
        param = nn.Parameter(torch.zeros(6, 2))
        optimizer = torch.optim.SGD([param], lr=1.0)
        scaler.scale(torch.ones((), requires_grad=True))
        param.grad = sparse([1.0, 3e38, 3e38, 1.0])
        scaler.step(optimizer)
        scaler.update()
        weights[kind], scales[kind] = param.detach(), scaler.get_scale()
    assert bits(weights["plain"]) == bits(weights["torch"])
    assert scales["plain"] == scales["torch"] == 1.0
    assert weights["plain"][:3].tolist() == [[-1.0, 1.0], [0.0, 0.0], [-INF, INF]]


class Embedding(nn.Module):
    """A sparse embedding and a dense layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(6, 3, sparse=True)
        self.out = nn.Linear(3, 1)

    def forward(self, indices):
        return self.out(self.rows(indices)).sum()


BATCHES = [[0, 2, 2], [5, 5, 5], [1], [0, 1, 2, 3, 4, 5], [3, 3]]


@pytest.mark.parametrize("overflow", [(), (1,), (0, 3)])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("init_scale", [1024.0, 3.7])
def test_training_with_sparse_and_dense_gradients(overflow, unscale, init_scale):
    """Indices that occur several times; weights, momentum and scales equal torch's bit for bit."""
    results = []
    for kind in SCALED:
        side = Side(kind, Embedding(), lambda p: torch.optim.SGD(p, lr=0.5), init_scale=init_scale, growth_interval=2)
        for n, indices in enumerate(BATCHES):
            side.backward(side.model(torch.tensor(indices)), n in overflow)
            assert side.model.rows.weight.grad.is_sparse
            if unscale:
                side.scaler.unscale_(side.optimizer)
            side.step()
            side.update()
        results.append((side.history, bits(side.weights())))
    assert results[0] == results[1]
    assert len(set(results[0][0])) > 2
