"""Adadelta on the device; `mpengine.rules.adadelta` specifies it."""

import triton
import triton.language as tl


@triton.jit
def adadelta_scalars(h, step):
    """From (lr, rho, eps, weight_decay, maximize)."""
    lr, rho, eps, weight_decay, maximize = h[0], h[1], h[2], h[3], h[4]
    return 1.0 - 2.0 * maximize, weight_decay, rho, 1.0 - rho, eps, lr


@triton.jit
def adadelta(p, g, slots, c):
    """The gradient in units of the last steps over those of the last gradients. Semantics: `torch.optim.Adadelta`."""
    sign, weight_decay, rho, one_minus_rho, eps, lr = c[0], c[1], c[2], c[3], c[4], c[5]
    v, a = slots[0], slots[1]
    g = g * sign + p * weight_decay
    v = v * rho + (g * one_minus_rho) * g
    d = tl.div_rn(tl.sqrt_rn(a + eps), tl.sqrt_rn(v + eps)) * g
    a = a * rho + (d * one_minus_rho) * d
    return p - d * lr, (v, a)
