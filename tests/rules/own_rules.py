"""Rules that the tests declare, as a user's module would: at the top of a module, where pickle and Triton find them."""

import numpy as np
import torch
import triton
import triton.language as tl

from mpengine.kernels.rules import arithmetic
from mpengine.rules import Hyperparameter, Kernels, declare, power

RATE = Hyperparameter(1e-2, at_least=0.0)
SHARE = Hyperparameter(0.9, at_least=0.0, below=1.0)


# Two slots, a scalar that depends on the step, a flag.


def scalars(h, step):
    lr, beta, eps, maximize = h[:4]
    return [1.0 - 2.0 * maximize, beta, 1.0 - beta, eps, lr / (1.0 - power(beta, step))]


def update(p, g, slots, c):
    """The mean gradient over the mean magnitude."""
    sign, beta, rest, eps, corrected = c[:5]
    m, a = slots
    g = g * sign
    m = m * beta + g * rest
    a = a * beta + torch.abs(g) * rest
    return p - m / (a + eps) * corrected, (m, a)


@triton.jit
def scalars_kernel(h, step):
    return 1.0 - 2.0 * h[3], h[1], 1.0 - h[1], h[2], h[0] / (1.0 - arithmetic.power(h[1], step))


@triton.jit
def update_kernel(p, g, slots, c):
    g = g * c[0]
    m = slots[0] * c[1] + g * c[2]
    a = slots[1] * c[1] + tl.abs(g) * c[2]
    return p - tl.div_rn(m, a + c[3]) * c[4], (m, a)


def paper(p, g, state, hyper):
    beta, t = hyper["beta"], state.get("t", 0) + 1
    g = -g if hyper["maximize"] else g
    m = beta * state.get("m", 0.0) + (1 - beta) * g
    a = beta * state.get("a", 0.0) + (1 - beta) * np.abs(g)
    return p - hyper["lr"] * m / (1 - beta**t) / (a + hyper["eps"]), {"t": t, "m": m, "a": a}


HYPERPARAMETERS = {
    "lr": RATE,
    "beta": SHARE,
    "eps": Hyperparameter(1e-8, above=0.0, at_most=1.0),
    "maximize": Hyperparameter(False),
}
PARTS = {"hyperparameters": HYPERPARAMETERS, "slots": ("mean", "magnitude"), "scalars": scalars}
KERNELS = Kernels(update_kernel, scalars_kernel)
Ratio = declare("Ratio", update, **PARTS, kernels=KERNELS)


# A norm and a number for each tensor, and clipping by itself.


def steady_measure(p, g, slots, c):
    return (g,)


def steady_settle(c, norms, cells):
    lr, beta = c[:2]
    mean = beta * cells[0] + (1.0 - beta) * norms[0]
    return (lr / np.where(mean > 0.0, mean, 1.0), beta), (mean,)


def steady_update(p, g, slots, c):
    return p - g * c[0], ()


@triton.jit
def steady_measure_kernel(p, g, slots, c):
    return (g,)


@triton.jit
def steady_settle_kernel(c, norms, cells):
    mean = c[1] * cells[0] + (1.0 - c[1]) * norms[0]
    return (c[0] / tl.where(mean > 0.0, mean, 1.0), c[1]), (mean,)


@triton.jit
def steady_update_kernel(p, g, slots, c):
    return p - g * c[0], ()


STEADY = {
    "hyperparameters": {"lr": RATE, "beta": SHARE, "max_grad_norm": Hyperparameter(0.5, at_least=0.0)},
    "measure": steady_measure,
    "norms": 1,
    "settle": steady_settle,
    "cells": ("mean_norm",),
    "initial": {"mean_norm": 1.0},
}
STEADY_KERNELS = Kernels(steady_update_kernel, measure=steady_measure_kernel, settle=steady_settle_kernel)
Steady = declare("Steady", steady_update, **STEADY, kernels=STEADY_KERNELS)

# A ratio of norms, and constants among what scalars and settle return.


def trust_scalars(h, step):
    return [h[0], 0.3]


def trust_measure(p, g, slots, c):
    return p, g


def trust_settle(c, norms, cells):
    both = (norms[0] > 0.0) & (norms[1] > 0.0)
    ratio = np.where(both, norms[0] / np.where(both, norms[1], 1.0), 1.0)
    return (c[0] * ratio * c[1], 0.7), (1.0,)


def trust_update(p, g, slots, c):
    return p - g * c[1] * c[0], ()


def trust_paper(p, g, state, hyper):
    norms = np.sqrt((p * p).sum()), np.sqrt((g * g).sum())
    ratio = norms[0] / norms[1] if norms[0] > 0.0 and norms[1] > 0.0 else 1.0
    return p - 0.3 * 0.7 * hyper["lr"] * ratio * g, state


@triton.jit
def trust_scalars_kernel(h, step):
    return h[0], 0.3


@triton.jit
def trust_measure_kernel(p, g, slots, c):
    return p, g


@triton.jit
def trust_settle_kernel(c, norms, cells):
    both = (norms[0] > 0.0) & (norms[1] > 0.0)
    ratio = tl.where(both, norms[0] / tl.where(both, norms[1], 1.0), 1.0)
    return (c[0] * ratio * c[1], 0.7), (1.0,)


@triton.jit
def trust_update_kernel(p, g, slots, c):
    return p - g * c[1] * c[0], ()


TRUST = {
    "hyperparameters": {"lr": RATE},
    "scalars": trust_scalars,
    "measure": trust_measure,
    "norms": 2,
    "settle": trust_settle,
    "cells": ("stepped",),
}
TRUST_KERNELS = Kernels(trust_update_kernel, trust_scalars_kernel, trust_measure_kernel, trust_settle_kernel)
Trust = declare("Trust", trust_update, **TRUST, kernels=TRUST_KERNELS)

# The name of a built-in rule, a flag as an `if`, and no kernels.


def plain_update(p, g, slots, c):
    return p - g * c[0], ()


Adam = declare("Adam", plain_update, hyperparameters={"lr": RATE})
