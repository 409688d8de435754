"""NovoGrad against Algorithm 1 of its paper, written in float64, and against apex's kernel of it."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from mpengine import MixedPrecisionOptimizer, rules
from mpengine.optim import NovoGrad
from tests.harness import SINGLE, feed, gradients, parameters
from tests.rules.properties import check_equations, check_kernels, check_learns, check_run


def paper(w, grads, lr=0.01, beta1=0.95, beta2=0.98, eps=1e-8, decay=0.001):
    """Algorithm 1 of Ginsburg et al. 2019; one layer."""
    path = []
    for t, g in enumerate(grads):
        if t == 0:
            v = np.linalg.norm(g) ** 2
            m = g / (np.sqrt(v) + eps) + decay * w
        else:
            v = beta2 * v + (1 - beta2) * np.linalg.norm(g) ** 2
            m = beta1 * m + (g / (np.sqrt(v) + eps) + decay * w)
        w = w - lr * m
        path.append(w)
    return path


def apex(p, grads, lr, betas, eps, weight_decay, bias_correction, reg_inside_moment, grad_averaging, init_zero):
    """apex/optimizers/fused_novograd.py and csrc/multi_tensor_novograd.cu, with their float64 values."""
    (beta1, beta2), m, path = betas, np.zeros_like(p), []
    norm = 0.0 if init_zero else np.linalg.norm(grads[0])  # the root of the second moment
    for t, g in enumerate(grads, 1):
        first, second = (1 - beta1**t, np.sqrt(1 - beta2**t)) if bias_correction else (1.0, 1.0)
        norm = np.sqrt(beta2 * norm**2 + (1 - beta2) * np.linalg.norm(g) ** 2)
        denominator = norm / second + eps
        beta3 = 1 - beta1 if grad_averaging else 1.0
        if reg_inside_moment:
            m = beta1 * m + beta3 * (g / denominator + weight_decay * p)
            p = p - lr * (m / first)
        else:
            m = beta1 * m + beta3 * g
            p = p - lr * ((m / first) / denominator + weight_decay * p)
        path.append(p)
    return path


PAPER = {"bias_correction": False, "reg_inside_moment": True, "grad_averaging": False}
FLAGS = ("bias_correction", "reg_inside_moment", "grad_averaging", "init_zero")


def test_it_is_the_papers_algorithm():
    check_equations(
        lambda params: NovoGrad(params, lr=0.01, betas=(0.95, 0.98), weight_decay=0.001, **PAPER),
        paper,
        sizes=(1, 50, 3000),
    )


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=4)), ids=str)
def test_every_option_of_apex(flags):
    options = dict(zip(FLAGS, flags, strict=True))
    options |= {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.1}
    check_equations(lambda params: NovoGrad(params, **options), apex, **options)


def test_the_kernels_have_the_same_bits():
    check_kernels(NovoGrad, {"weight_decay": 0.1})
    check_kernels(NovoGrad, {**PAPER, "init_zero": True, "weight_decay": 0.1})


def test_in_a_run():
    check_run(lambda params: NovoGrad(params, lr=0.01, weight_decay=0.01))
    check_learns(lambda params: NovoGrad(params, lr=0.1))


def test_the_second_moment_is_one_number_for_a_tensor():
    params = parameters((SINGLE,))
    optimizer = MixedPrecisionOptimizer(NovoGrad(params, betas=(0.9, 0.5)))
    first, second = gradients(params, 0), gradients(params, 1)
    for grads in (first, second):
        feed(params, grads)
        optimizer.step()
    for param, one, two in zip(params, first, second, strict=True):
        moment = optimizer.state[param]["exp_avg_sq"]
        assert moment.shape == ()
        expected = 0.5 * one.double().square().sum() + 0.5 * two.double().square().sum()
        torch.testing.assert_close(moment.double(), expected, rtol=1e-6, atol=0.0)


def test_a_tensor_that_was_idle_starts_with_its_own_first_gradient():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = MixedPrecisionOptimizer(NovoGrad(params))
    feed(params, [torch.ones(3), None])
    optimizer.step()
    feed(params, [torch.ones(3), torch.full((3,), 2.0)])
    optimizer.step()
    assert float(optimizer.state[params[1]]["exp_avg_sq"]) == 12.0


def test_hyperparameters_out_of_bounds_are_refused():
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NovoGrad([torch.zeros(1)], **wrong)
    with pytest.raises(TypeError, match="init_zero is 1; it must be True or False"):
        NovoGrad([torch.zeros(1)], init_zero=1)


# Sabotage: each of these must be noticed.


def without_norm(c, norms, cells):
    return rules.novograd.novograd_settle(c, [norms[0] * 0.0 + 1.0], cells)


def cells_forgotten(c, norms, cells):
    return rules.novograd.novograd_settle(c, norms, cells)[0], cells


def on(change):
    """The update with its result changed."""

    def update(p, g, slots, c, novograd=rules.novograd.novograd):
        return change(p, slots, *novograd(p, g, slots, c))

    return update


SABOTAGE = {
    "norm dropped": {"settle": without_norm},
    "second moment forgotten": {"settle": cells_forgotten},
    "sign flipped": {"update": on(lambda p, old, new, slots: (p + (p - new), slots))},
    "rate doubled": {"update": on(lambda p, old, new, slots: (p - (p - new) * 2, slots))},
    "first moment forgotten": {"update": on(lambda p, old, new, slots: (new, old))},
}


def make(params, **options):
    return NovoGrad(params, **{"lr": 0.01, "betas": (0.95, 0.98), "weight_decay": 0.001, **PAPER, **options})


@pytest.mark.parametrize("changed", SABOTAGE.values(), ids=SABOTAGE)
def test_a_sabotaged_rule_is_noticed(changed, monkeypatch):
    for name, function in changed.items():
        monkeypatch.setitem(rules.NOVOGRAD.__dict__, name, function)
    with pytest.raises(AssertionError):
        check_equations(make, paper)


@pytest.mark.parametrize("wrong", [{"init_zero": True}, {"weight_decay": 0.0}, {"eps": 1e-3}], ids=str)
def test_another_option_is_noticed(wrong):
    check_equations(make, paper)
    with pytest.raises(AssertionError):
        check_equations(lambda params: make(params, **wrong), paper)
