"""The checks of `mpengine.validation` that other tests do not reach through `prepare` and `step`."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import mpengine
from mpengine import MixedPrecisionOptimizer, validation
from tests.harness import FUSED, HALF, parameters


def name_of(param):
    return "parameter 'w'"


def test_a_parameter_that_moved():
    """Reached with a GPU alone: its master did not move with it."""
    param = nn.Parameter(torch.ones(2, dtype=HALF))
    with pytest.raises(RuntimeError, match=r"parameter 'w' moved from cuda:0 to cpu after it was wrapped; its master"):
        validation.check_unmoved(param, param.detach().float(), torch.device("cuda:0"), name_of)
    validation.check_unmoved(param, param.detach().float(), torch.device("cpu"), name_of)


def test_a_gradient_of_another_device():
    param, grad = torch.ones(2, dtype=HALF), torch.ones(2, dtype=HALF, device="meta")
    with pytest.raises(
        RuntimeError, match=r"the gradient of parameter 'w' lies on meta, the parameter on cpu: move it"
    ):
        validation.check_grad(param, grad, name_of)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, device="meta"), "w lies on meta; mpengine trains on cpu and cuda"),
        (lambda: torch.ones(2, dtype=torch.int64), "w is torch.int64; mpengine trains float16, bfloat16 and float32"),
        (lambda: torch.ones(4)[::2], r"w has strides \(2,\) for shape \(2,\), which leave gaps or overlap in memory"),
        (lambda: torch.ones(2, 2).to_sparse(), "w has strides torch.sparse_coo for shape"),
    ],
)
def test_a_parameter_without_a_master(make, message):
    with pytest.raises(ValueError, match=message), torch.sparse.check_sparse_tensor_invariants():
        validation.check_param(make(), "w")


def test_names_of_unnamed_parameters():
    params = parameters()
    params.insert(2, nn.Parameter(torch.ones(2, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"parameter 2 of shape \(2,\) is torch\.float64"):
        MixedPrecisionOptimizer(torch.optim.SGD(params, lr=0.1))


def test_a_wrapper_that_nobody_holds_does_not_count():
    """Even where a reference cycle keeps it until the next garbage collection."""
    params = parameters()
    gc.disable()
    try:
        optimizer = MixedPrecisionOptimizer(FUSED["adam"](params))
        optimizer.myself = optimizer
        del optimizer
        MixedPrecisionOptimizer(FUSED["adam"](params))
    finally:
        gc.enable()


def test_a_refused_wrapper_leaves_the_optimizer_usable():
    params = parameters()
    inner = FUSED["adam"](params)
    hooks, state = inner._optimizer_step_pre_hooks, inner.state
    for bad in ({"scaler": 5.0}, {"scaler": torch.amp.GradScaler("cpu")}, {"max_grad_norm": -1.0}):
        with pytest.raises((TypeError, ValueError)):
            MixedPrecisionOptimizer(inner, **bad)
    assert inner.state is state
    assert inner._optimizer_step_pre_hooks is hooks
    assert MixedPrecisionOptimizer(inner).steps_taken == 0


def test_a_state_that_cannot_be_its_parameters_is_refused_at_wrapping():
    params = parameters()
    inner = FUSED["adam"](params)
    inner.state[params[1]] = {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(3, 5), "step": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"state\['exp_avg'\] of group 0, parameter 1 of shape \(3, 5\) is of shape"):
        MixedPrecisionOptimizer(inner)
    assert not inner._optimizer_step_pre_hooks
    inner.state[params[1]]["exp_avg"] = torch.zeros(3, 5)
    assert MixedPrecisionOptimizer(inner).steps_taken == 1  # the largest step that the state knows


@pytest.mark.parametrize("value", [None, 5, "sgd", nn.Linear(1, 1)])
def test_no_optimizer_at_all(value):
    with pytest.raises(TypeError, match=f"must be a torch.optim.Optimizer, not {type(value).__name__}"):
        mpengine.prepare(nn.Linear(2, 2), value)
