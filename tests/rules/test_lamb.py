"""LAMB against Algorithm 2 of its paper, written in float64, and against apex's variants of it."""

import itertools

import numpy as np
import pytest
import torch

from mpengine import MixedPrecisionOptimizer, reference, rules
from mpengine.kernels import launch
from mpengine.optim import LAMB
from tests.kernels.harness import (
    CPU,
    DEVICE,
    Problem,
    Spec,
    assert_same,
    build,
    run_decide,
    run_inspect,
    run_measure,
)
from tests.rules.properties import check_equations, check_kernels, check_learns, check_run, exact, numbers

FREE = {"max_grad_norm": None}  # the clip has its own test


def paper(x, grads, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, decay=0.01):
    """Algorithm 2 of You et al. 2020, with phi the identity; one layer."""
    m, v, path = 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
        x = x - lr * np.linalg.norm(x) / np.linalg.norm(r + decay * x) * (r + decay * x)
        path.append(x)
    return path


def apex(x, grads, lr, betas, eps, weight_decay, bias_correction, grad_averaging, adam_w_mode, use_nvlamb):
    """The stages of csrc/multi_tensor_lamb.cu, with their float64 values."""
    (beta1, beta2), m, v, path = betas, np.zeros_like(x), np.zeros_like(x), []
    beta3 = 1 - beta1 if grad_averaging else 1.0
    for t, g in enumerate(grads, 1):
        first, second = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
        if not adam_w_mode:
            g = g + weight_decay * x
        m = m * beta1 + beta3 * g
        v = v * beta2 + (1 - beta2) * g * g
        update = (m / first) / (np.sqrt(v / second) + eps)
        if adam_w_mode:
            update = update + weight_decay * x
        ratio = lr
        if use_nvlamb or weight_decay != 0.0:
            ratio = lr * np.linalg.norm(x) / np.linalg.norm(update)
        x = x - ratio * update
        path.append(x)
    return path


def make(params, **options):
    return LAMB(params, **{"lr": 0.01, **FREE, **options})


def test_it_is_the_papers_algorithm():
    check_equations(lambda params: LAMB(params, **FREE), paper, sizes=(1, 50, 3000))
    numbers = {"lr": 0.02, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "decay": 0.2}
    check_equations(
        lambda params: LAMB(params, lr=0.02, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2, **FREE), paper, **numbers
    )


FLAGS = ("bias_correction", "grad_averaging", "adam_w_mode", "use_nvlamb")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=4)), ids=str)
def test_every_option_of_apex(flags, weight_decay):
    options = dict(zip(FLAGS, flags, strict=True))
    options |= {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": weight_decay}
    check_equations(lambda params: LAMB(params, **options, **FREE), apex, **options)


@pytest.mark.parametrize("zero", ["weights", "gradients"])
def test_without_a_norm_the_factor_is_one(zero):
    """A weight of zeros moves by lr, as one that is not; one without gradient and decay stays where it is."""
    start, grads = numbers(steps=3)
    if zero == "weights":
        (first, *_) = exact(make, start * 0.0, grads)
        np.testing.assert_allclose(np.abs(first), 0.01, rtol=1e-3)
    else:
        path = exact(lambda params: make(params, weight_decay=0.0, use_nvlamb=True), start, grads * 0.0)
        assert all((p == start).all() for p in path)


def test_it_clips_by_itself():
    """By max_grad_norm, the norm of all gradients."""
    clipped, given = ([torch.nn.Parameter(torch.ones(n)) for n in (5, 7)] for _ in range(2))
    for param, twin in zip(clipped, given, strict=True):
        param.grad = torch.full_like(param, 3.0)
        twin.grad = torch.full_like(twin, 1.0 / 12**0.5)
    LAMB(clipped, max_grad_norm=1.0).step()
    LAMB(given, **FREE).step()
    for param, twin in zip(clipped, given, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=0.0)


def clipped_to(optimizer, param, norm):
    """Whether a second step, after one of small gradients, is that of gradients of this norm: LAMB forgets a factor."""
    twin = torch.nn.Parameter(param.detach().clone())
    free = LAMB([twin], **FREE)
    small, large = torch.linspace(0.01, 0.02, 16), torch.tensor([1.0, -1.0] * 8)  # of norm 4
    for grad, clipped in ((small, small), (large * 25.0, large * (norm / 4.0))):
        param.grad, twin.grad = grad.clone(), clipped.clone()
        optimizer.step()
        free.step()
    return torch.allclose(param, twin, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("prepared", [False, True])
def test_the_groups_say_what_it_clips_to(prepared):
    def made(**kw):
        param = torch.nn.Parameter(torch.linspace(1.0, 2.0, 16))
        optimizer = LAMB([param], **kw)
        return (MixedPrecisionOptimizer(optimizer) if prepared else optimizer), param

    assert clipped_to(*made(max_grad_norm=0.5), 0.5)
    assert not clipped_to(*made(max_grad_norm=0.5), 0.25)
    optimizer, param = made(max_grad_norm=0.5)
    optimizer.param_groups[0]["max_grad_norm"] = 0.25
    assert clipped_to(optimizer, param, 0.25)
    saved = made(max_grad_norm=0.25)[0].state_dict()
    optimizer, param = made()
    optimizer.load_state_dict(saved)
    assert clipped_to(optimizer, param, 0.25)
    with pytest.raises(ValueError, match=r"max_grad_norm is \[0.25, 2.0\] in the groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "max_grad_norm": 2.0})
    assert len(optimizer.param_groups) == 1


def test_its_clipping_cannot_be_scheduled():
    optimizer = MixedPrecisionOptimizer(LAMB([torch.nn.Parameter(torch.ones(3))]))

    class Tightening(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            for group in self.optimizer.param_groups:
                group["max_grad_norm"] = 1.0 / (1 + self.last_epoch)
            return [group["lr"] for group in self.optimizer.param_groups]

    with pytest.raises(ValueError, match=r"set optimizer.max_grad_norm between steps"):
        optimizer.schedule(Tightening, steps=3)


def test_the_kernels_have_the_same_bits():
    check_kernels(LAMB, {"weight_decay": 0.1}, {"use_nvlamb": True, "adam_w_mode": False})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_gives_the_kernels_the_same_norms(bad):
    problem = Problem((Spec((20000,)), Spec((31,))), LAMB, ({"weight_decay": 0.1},))
    worlds = []
    for device, module in ((CPU, reference), (DEVICE, launch)):
        world = build(problem, device)
        world.table.entries[0].master[3] = bad
        for run in (run_inspect, run_decide, run_measure):
            run(world, module)
        worlds.append(world)
    sums = [norms.partials.sum(dim=0).tolist() for world in worlds for norms in world.table.norms.values()]
    assert sums == [[float("inf")] * 2] * 2
    assert_same(*worlds)


def test_in_a_run():
    check_run(lambda params: LAMB(params, lr=0.01))
    check_learns(lambda params: LAMB(params, lr=0.05))


# Sabotage: each of these must be noticed.


def without_trust(c, norms, cells):
    return c, cells


def on(change):
    """The update with its result changed."""

    def update(p, g, slots, c, lamb=rules.lamb.lamb):
        return change(p, slots, *lamb(p, g, slots, c))

    return update


SABOTAGE = {
    "trust ratio dropped": {"settle": without_trust},
    "ratio upside down": {"settle": lambda c, norms, cells: rules.lamb.lamb_settle(c, norms[::-1], cells)},
    "sign flipped": {"update": on(lambda p, old, new, slots: (p + (p - new), slots))},
    "rate doubled": {"update": on(lambda p, old, new, slots: (p - (p - new) * 2, slots))},
    "moments forgotten": {"update": on(lambda p, old, new, slots: (new, old))},
}


@pytest.mark.parametrize("changed", SABOTAGE.values(), ids=SABOTAGE)
def test_a_sabotaged_rule_is_noticed(changed, monkeypatch):
    for name, function in changed.items():
        monkeypatch.setitem(rules.LAMB.__dict__, name, function)
    with pytest.raises(AssertionError):
        check_equations(lambda params: LAMB(params, **FREE), paper)


def test_dropped_decay_is_noticed():
    with pytest.raises(AssertionError):
        check_equations(lambda params: LAMB(params, weight_decay=0.0, use_nvlamb=True, **FREE), paper)
