"""LAMB on the device; `mpengine.rules.lamb` specifies it."""

import triton
import triton.language as tl

from .arithmetic import power


@triton.jit
def lamb_scalars(h, step):
    """From (lr, betas, eps, weight_decay, bias_correction, grad_averaging, adam_w_mode, use_nvlamb) and the step."""
    lr, beta1, beta2, eps, weight_decay = h[0], h[1], h[2], h[3], h[4]
    corrects, averages, decoupled, always = h[5], h[6], h[7], h[8]
    bias_correction1 = tl.where(corrects != 0.0, 1.0 - power(beta1, step), 1.0)
    bias_correction2 = tl.where(corrects != 0.0, 1.0 - power(beta2, step), 1.0)
    return (
        tl.where(decoupled != 0.0, 0.0, weight_decay),
        tl.where(decoupled != 0.0, weight_decay, 0.0),
        beta1,
        tl.where(averages != 0.0, 1.0 - beta1, 1.0),
        beta2,
        1.0 - beta2,
        1.0 / bias_correction1,
        1.0 / tl.sqrt(bias_correction2),
        eps,
        lr,
        tl.where((weight_decay != 0.0) | (always != 0.0), 1.0, 0.0),
    )


@triton.jit
def lamb_measure(p, g, slots, c):
    """The weight, and r."""
    direction, _, _ = _direction(p, g, slots, c)
    return p, direction


@triton.jit
def lamb_settle(c, norms, cells):
    """Lr becomes lr * ||p|| / ||r||."""
    adapted = (c[10] != 0.0) & (norms[0] > 0.0) & (norms[1] > 0.0)
    ratio = tl.where(adapted, norms[0] / tl.where(adapted, norms[1], 1.0), 1.0)
    return (c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7], c[8], c[9] * ratio, c[10]), cells


@triton.jit
def lamb(p, g, slots, c):
    """The step, with the factor in the rate."""
    direction, m, v = _direction(p, g, slots, c)
    return p - direction * c[9], (m, v)


@triton.jit
def _direction(p, g, slots, c):
    coupled_decay, decay, beta1, grad_factor, beta2, one_minus_beta2 = c[0], c[1], c[2], c[3], c[4], c[5]
    correction, root_correction, eps = c[6], c[7], c[8]
    g = g + p * coupled_decay
    m = slots[0] * beta1 + g * grad_factor
    v = slots[1] * beta2 + (g * one_minus_beta2) * g
    return tl.div_rn(m * correction, tl.sqrt_rn(v) * root_correction + eps) + p * decay, m, v
