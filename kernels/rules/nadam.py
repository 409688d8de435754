"""NAdam on the device; `mpengine.rules.nadam` specifies it."""

import triton
import triton.language as tl

from .adam import moments
from .arithmetic import power


@triton.jit
def nadam_scalars(h, step):
    """From (lr, beta1, beta2, eps, weight_decay, 0.96^momentum_decay, maximize, decoupled) and the step count."""
    lr, beta1, beta2, eps, weight_decay, decay, maximize, decoupled = h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]
    fading = power(decay, step)
    mu = beta1 * (1.0 - 0.5 * fading)
    mu_next = beta1 * (1.0 - 0.5 * (fading * decay))
    return (
        1.0 - 2.0 * maximize,
        tl.where(decoupled != 0.0, 0.0, weight_decay),
        tl.where(decoupled != 0.0, 1.0 - lr * weight_decay, 1.0),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 / (1.0 - power(beta2, step)),
        eps,
        lr * (1.0 - mu),
        lr * mu_next,
        mu,
        mu_next,
    )


@triton.jit
def nadam_settle(c, norms, cells):
    """The product of all mu so far, and the rates of gradient and moment that follow from it."""
    product = cells[0] * c[10]
    grad_rate, moment_rate = c[8] / (1.0 - product), c[9] / (1.0 - product * c[11])
    return (c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], grad_rate, moment_rate), (product,)


@triton.jit
def nadam(p, g, slots, c):
    """The step along the gradient, and along the moment."""
    p, g, m, v = moments(p, g, slots[0], slots[1], c)
    denominator = tl.sqrt_rn(v * c[6]) + c[7]
    p = p - tl.div_rn(g, denominator) * c[8]
    return p - tl.div_rn(m, denominator) * c[9], (m, v)
