"""Adagrad on the device; `mpengine.rules.adagrad` specifies it."""

import triton
import triton.language as tl


@triton.jit
def adagrad_scalars(h, step):
    """From (lr, lr_decay, eps, weight_decay, maximize)."""
    lr, lr_decay, eps, weight_decay, maximize = h[0], h[1], h[2], h[3], h[4]
    return 1.0 - 2.0 * maximize, weight_decay, lr / (1.0 + (step - 1).to(tl.float64) * lr_decay), eps


@triton.jit
def adagrad(p, g, slots, c):
    """The gradient over the root of the sum of all squares so far. Semantics: `torch.optim.Adagrad`."""
    sign, weight_decay, rate, eps = c[0], c[1], c[2], c[3]
    g = g * sign + p * weight_decay
    total = slots[0] + g * g
    return p - tl.div_rn(g * rate, tl.sqrt_rn(total) + eps), (total,)
