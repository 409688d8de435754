"""LARC on the device; `mpengine.rules.larc` specifies it."""

import triton
import triton.language as tl

from .adam import adam, adam_amsgrad, adam_scalars
from .apex import apex_adam, apex_adam_scalars
from .sgd import sgd, sgd_momentum, sgd_scalars


@triton.jit
def larc_sgd_scalars(h, step):
    """From SGD's row and (trust_coefficient, eps, clip); its decay is left to LARC."""
    zero = h[3] * 0.0
    c = sgd_scalars((h[0], h[1], h[2], zero, h[4], h[5]), step)
    return c[0], h[7], c[2], c[3], c[4], c[5], zero, zero, zero, h[0], h[3], _signed(h[6], h[8])


@triton.jit
def larc_adam_scalars(h, step):
    """From Adam's row and (trust_coefficient, eps, clip); its decay is left to LARC."""
    c = adam_scalars((h[0], h[1], h[2], h[3], h[4] * 0.0, h[5], h[6]), step)
    return c[0], h[8], c[2], c[3], c[4], c[5], c[6], c[7], c[8], h[0], h[4], _signed(h[7], h[9])


@triton.jit
def larc_apex_adam_scalars(h, step):
    """From FusedAdam's row and (trust_coefficient, eps, clip); its decay is left to LARC."""
    c = apex_adam_scalars((h[0], h[1], h[2], h[3], h[4] * 0.0, h[5], h[6]), step)
    return c[0], h[8], c[2], c[3], c[4], c[5], c[6], c[7], c[8], h[0], h[4], _signed(h[7], h[9])


@triton.jit
def _signed(trust, clips):
    """Negative with clip, so that settle knows of it."""
    return tl.where(clips != 0.0, -trust, trust)


@triton.jit
def larc_measure(p, g, slots, c):
    """The weight, and the gradient."""
    return p, g


@triton.jit
def larc_settle(c, norms, cells):
    """The trust becomes a; c[1] becomes the 0 that the inner rule's decay is."""
    lr, decay, trust = c[9], c[10], c[11]
    adapted = (norms[0] > 0.0) & (norms[1] > 0.0)
    a = tl.abs(trust) * norms[0] / tl.where(adapted, norms[1] + decay * norms[0] + c[1], 1.0)
    a = tl.where(trust < 0.0, tl.where(a < lr, a / tl.where(lr > 0.0, lr, 1.0), 1.0), a)
    decay, a = tl.where(adapted, decay, 0.0), tl.where(adapted, a, 1.0)
    return (c[0], c[1] * 0.0, c[2], c[3], c[4], c[5], c[6], c[7], c[8], lr, decay, a), cells


@triton.jit
def larc_sgd(p, g, slots, c):
    """Gradient descent."""
    return sgd(p, (g + p * c[10]) * c[11], slots, c)


@triton.jit
def larc_sgd_momentum(p, g, slots, c):
    """Gradient descent with (Nesterov) momentum."""
    return sgd_momentum(p, (g + p * c[10]) * c[11], slots, c)


@triton.jit
def larc_adam(p, g, slots, c):
    """Adam and AdamW."""
    return adam(p, (g + p * c[10]) * c[11], slots, c)


@triton.jit
def larc_adam_amsgrad(p, g, slots, c):
    """Adam with the largest second moment so far."""
    return adam_amsgrad(p, (g + p * c[10]) * c[11], slots, c)


@triton.jit
def larc_apex_adam(p, g, slots, c):
    """FusedAdam of apex."""
    return apex_adam(p, (g + p * c[10]) * c[11], slots, c)
