"""RAdam on the device; `mpengine.rules.radam` specifies it."""

import triton
import triton.language as tl

from .adam import moments
from .arithmetic import power


@triton.jit
def radam_scalars(h, step):
    """From (lr, beta1, beta2, eps, weight_decay, maximize, decoupled) and the step count."""
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled = h[0], h[1], h[2], h[3], h[4], h[5], h[6]
    power2 = power(beta2, step)
    bias_correction2 = 1.0 - power2
    rho = 2.0 / (1.0 - beta2) - 1.0
    rho_t = rho - 2.0 * step.to(tl.float64) * power2 / bias_correction2
    rectified = rho_t > 5.0
    above = tl.where(rectified, (rho_t - 4.0) * (rho_t - 2.0) * rho, 1.0)
    below = tl.where(rectified, (rho - 4.0) * (rho - 2.0) * rho_t, 1.0)
    rate = lr / (1.0 - power(beta1, step))
    return (
        1.0 - 2.0 * maximize,
        tl.where(decoupled != 0.0, 0.0, weight_decay),
        tl.where(decoupled != 0.0, 1.0 - lr * weight_decay, 1.0),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        tl.where(rectified, rate * tl.sqrt(bias_correction2) * tl.sqrt(above / below), rate),
        tl.where(rectified, 1.0, 0.0),
        eps,
    )


@triton.jit
def radam(p, g, slots, c):
    """The step along m / (sqrt(v) + eps), or along m."""
    p, _, m, v = moments(p, g, slots[0], slots[1], c)
    denominator = tl.where(c[7] != 0.0, tl.sqrt_rn(v) + c[8], 1.0)
    return p - tl.div_rn(m, denominator) * c[6], (m, v)
