"""Rules with one fault each, which `check_rule` must find. At the top of a module: pickle is not what fails."""

import numpy as np
import torch
import triton
import triton.language as tl

from mpengine.rules import Kernels, RuleOptimizer, declare, sqrt_rn
from tests.rules.own_rules import (
    HYPERPARAMETERS,
    KERNELS,
    PARTS,
    STEADY,
    STEADY_KERNELS,
    TRUST,
    TRUST_KERNELS,
    scalars,
    scalars_kernel,
    steady_settle,
    steady_update,
    trust_update,
    update,
    update_kernel,
)

# Functions that return what they must not, or change what is not theirs.


def one_slot(p, g, slots, c):
    p, (m, _) = update(p, g, slots, c)
    return p, (m,)


def only_p(p, g, slots, c):
    return update(p, g, slots, c)[0]


def edits_gradient(p, g, slots, c):
    g *= c[0] * 2.0
    return update(p, g, slots, c)


def edits_slot(p, g, slots, c):
    slots[0].mul_(0.5)
    return update(p, g, slots, c)


def edits_scalars(p, g, slots, c):
    c[4] *= 0.5
    return update(p, g, slots, c)


def double(p, g, slots, c):
    p, slots = update(p, g, slots, c)
    return p.double(), slots


def one_number(p, g, slots, c):
    p, (m, a) = update(p, g, slots, c)
    return p, (m, a.mean())


def keeps_p(p, g, slots, c):
    new, (m, _) = update(p, g, slots, c)
    return new, (m, p)


def over_elements(p, g, slots, c):
    return update(p, g - g.mean(), slots, c)


def infinite(p, g, slots, c):
    new, slots = update(p, g, slots, c)
    return new / g, slots


def does_nothing(p, g, slots, c):
    return p.clone(), tuple(slot.clone() for slot in slots)


def ignores_gradient(p, g, slots, c):
    return p * (1.0 - c[4]), tuple(slot.clone() for slot in slots)


RETURNS = {
    function.__name__: declare("Broken", function, **PARTS)
    for function in (
        one_slot,
        only_p,
        edits_gradient,
        edits_slot,
        edits_scalars,
        double,
        one_number,
        keeps_p,
        over_elements,
        infinite,
        does_nothing,
        ignores_gradient,
    )
}


def thirteen(h, step):
    return [*scalars(h, step), *[h[0]] * 8]


def edits_h(h, step):
    h[0] *= 0.5
    return scalars(h, step)


def of_all_steps(h, step):
    return scalars(h, np.full_like(step, step.max()))


def without_bound(h, step):
    return [*scalars(h, step)[:4], h[0] / (step - 2)]


def of_another_length(h, step):
    return [*scalars(h, step), np.ones(len(step) + 1)]


def with_if(h, step):
    return [*scalars(h, step)[:4], h[0] if step > 1 else 0.5 * h[0]]


SCALARS = {
    function.__name__: declare("Broken", update, **{**PARTS, "scalars": function})
    for function in (thirteen, edits_h, of_all_steps, without_bound, of_another_length, with_if)
}


def without_cell(c, norms, cells):
    return steady_settle(c, norms, cells)[0], ()


def edits_cells(c, norms, cells):
    cells[0] *= 0.5
    return steady_settle(c, norms, cells)


def of_all_tensors(c, norms, cells):
    return steady_settle(c, [np.full_like(norm, norm.max()) for norm in norms], cells)


def of_no_norm(c, norms, cells):
    return (c[0] / norms[0],), cells


SETTLES = {
    function.__name__: declare("Broken", steady_update, **{**STEADY, "settle": function})
    for function in (without_cell, edits_cells, of_all_tensors, of_no_norm)
}
MEASURES = {
    "two": declare("Broken", steady_update, **{**STEADY, "measure": lambda p, g, slots, c: (p, g)}),
    "a number": declare("Broken", steady_update, **{**STEADY, "measure": lambda p, g, slots, c: (g.norm(),)}),
}

# Triton functions that are not the twins of the rule's own.


@triton.jit
def other_brackets(p, g, slots, c):
    g = g * c[0]
    m = slots[0] * c[1] + g * c[2]
    a = slots[1] * c[1] + tl.abs(g) * c[2]
    return p - tl.div_rn(m * c[4], a + c[3]), (m, a)


@triton.jit
def old_slot(p, g, slots, c):
    p, new = update_kernel(p, g, slots, c)
    return p, (new[0], slots[1])


@triton.jit
def too_few_slots(p, g, slots, c):
    p, new = update_kernel(p, g, slots, c)
    return p, (new[0],)


@triton.jit
def other_scalars(h, step):
    return 1.0 - 2.0 * h[3], h[1], 1.0 - h[1], h[2], h[0]


@triton.jit
def thirteen_kernel(h, step):
    return h[0], h[0], h[0], h[0], h[0], h[0], h[0], h[0], h[0], h[0], h[0], h[0], h[0]


@triton.jit
def late_scalars(h, step):
    """Right in the first 24 steps."""
    c = scalars_kernel(h, step)
    return c[0], c[1], c[2], c[3], tl.where(step > 24, 2.0 * c[4], c[4])


def switched_scalars(h, step):
    return [*scalars(h, step), np.where(step > 5, 0.5, 1.0)]


@triton.jit
def switched_scalars_kernel(h, step):
    c = scalars_kernel(h, step)
    return c[0], c[1], c[2], c[3], c[4], tl.where(step > 5, 0.5, 1.0)


def switched(p, g, slots, c):
    """Otherwise from the sixth step on, of which the twin does not know."""
    return update(p, g * c[5], slots, c)


@triton.jit
def zero_settle(c, norms, cells):
    """A rate of 0 for weights of 0."""
    both = norms[1] > 0.0
    ratio = tl.where(both, norms[0] / tl.where(both, norms[1], 1.0), 1.0)
    return (c[0] * ratio * c[1], 0.7), (1.0,)


@triton.jit
def other_settle(c, norms, cells):
    mean = c[1] * cells[0] + (1.0 - c[1]) * norms[0]
    return (c[0] / tl.where(mean > 0.0, mean, 1.0), c[1]), (norms[0],)


@triton.jit
def other_measure(p, g, slots, c):
    return (p,)


TWINS = {
    "other_brackets": declare("Broken", update, **PARTS, kernels=Kernels(other_brackets, scalars_kernel)),
    "old_slot": declare("Broken", update, **PARTS, kernels=Kernels(old_slot, scalars_kernel)),
    "too_few_slots": declare("Broken", update, **PARTS, kernels=Kernels(too_few_slots, scalars_kernel)),
    "other_scalars": declare("Broken", update, **PARTS, kernels=Kernels(update_kernel, other_scalars)),
    "other_settle": declare(
        "Broken",
        steady_update,
        **STEADY,
        kernels=Kernels(STEADY_KERNELS.update, measure=STEADY_KERNELS.measure, settle=other_settle),
    ),
    "other_measure": declare(
        "Broken",
        steady_update,
        **STEADY,
        kernels=Kernels(STEADY_KERNELS.update, measure=other_measure, settle=STEADY_KERNELS.settle),
    ),
    "late_scalars": declare("Broken", update, **PARTS, kernels=Kernels(update_kernel, late_scalars)),
    "switched": declare(
        "Broken",
        switched,
        **{**PARTS, "scalars": switched_scalars},
        kernels=Kernels(update_kernel, switched_scalars_kernel),
    ),
    "zero_settle": declare(
        "Broken",
        trust_update,
        **TRUST,
        kernels=Kernels(TRUST_KERNELS.update, TRUST_KERNELS.scalars, TRUST_KERNELS.measure, zero_settle),
    ),
}

for broken in TWINS.values():  # each is to be found by pickle
    broken.__qualname__ = f"{broken.__name__}{id(broken)}"
    globals()[broken.__qualname__] = broken

# Twins that the interpreter cannot tell from right ones.


@triton.jit
def divides(p, g, slots, c):
    m = slots[0] * c[1] + g * c[2] * (-1.0 / -1.0)  # of numbers alone: Triton's, before it compiles
    a = slots[1] * c[1] + tl.abs(g) * c[2]
    return p - m / (a + c[3]) * c[4], (m, a)


@triton.jit
def divides_numbers(p, g, slots, c):
    rate = c[4]
    rate /= c[1]
    return p - g * rate, slots


@triton.jit
def _root(x):
    return tl.sqrt(tl.math.sqrt_rn(x))


@triton.jit
def takes_roots(p, g, slots, c):
    return p - _root(tl.abs(g)) * c[0], slots


@triton.jit
def fuses(p, g, slots, c):
    return tl.fma(g, -c[0], p), slots


@triton.jit
def takes_exponentials(p, g, slots, c):
    return p - g * tl.math.exp(g).log() * c[0], slots


@triton.jit
def adds_up(p, g, slots, c):
    return p - tl.sum(g) * c[0], slots


FP32 = (divides, divides_numbers, takes_roots, fuses, takes_exponentials, adds_up)


def rooted(p, g, slots, c):
    return p - sqrt_rn(torch.abs(g)) * c[0], slots


Rooted = declare("Rooted", rooted, hyperparameters={"lr": PARTS["hyperparameters"]["lr"]}, kernels=Kernels(takes_roots))


class Different(RuleOptimizer):
    """By itself not what it is prepared."""

    family, hyperparameters = declare("Different", update, **PARTS, kernels=KERNELS).family, HYPERPARAMETERS

    def __init__(self, params, lr=1e-2, beta=0.9, eps=1e-8, maximize=False):
        super().__init__(params, {"lr": lr, "beta": beta, "eps": eps, "maximize": maximize})

    def _step_one(self, group, param, grad):
        super()._step_one(group, param, 2.0 * grad if group["lr"] == 1e-2 else grad)


class Careless(RuleOptimizer):
    """Takes any value."""

    family, hyperparameters = Different.family, HYPERPARAMETERS

    def __init__(self, params, lr=1e-2, beta=0.9, eps=1e-8, maximize=False):
        torch.optim.Optimizer.__init__(self, params, {"lr": lr, "beta": beta, "eps": eps, "maximize": maximize})

    def check_group(self, group, index):
        pass
