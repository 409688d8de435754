"""Lion on the device; `mpengine.rules.lion` specifies it."""

import triton
import triton.language as tl


@triton.jit
def lion_scalars(h, step):
    """From (lr, beta1, beta2, weight_decay, maximize)."""
    lr, beta1, beta2, weight_decay, maximize = h[0], h[1], h[2], h[3], h[4]
    return 1.0 - 2.0 * maximize, 1.0 - lr * weight_decay, lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2


@triton.jit
def lion(p, g, slots, c):
    """The step by the sign, and the momentum after it."""
    sign, decay_factor, lr, beta1, one_minus_beta1, beta2, one_minus_beta2 = c[0], c[1], c[2], c[3], c[4], c[5], c[6]
    m = slots[0]
    g = g * sign
    mixed = m * beta1 + g * one_minus_beta1
    direction = tl.where(mixed > 0.0, 1.0, tl.where(mixed < 0.0, -1.0, mixed))
    return p * decay_factor - direction * lr, (m * beta2 + g * one_minus_beta2,)
