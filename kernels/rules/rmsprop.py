"""RMSprop on the device; `mpengine.rules.rmsprop` specifies it."""

import triton
import triton.language as tl

from .arithmetic import lerp


@triton.jit
def rmsprop_scalars(h, step):
    """From (lr, alpha, eps, weight_decay, momentum, maximize)."""
    lr, alpha, eps, weight_decay, momentum, maximize = h[0], h[1], h[2], h[3], h[4], h[5]
    return 1.0 - 2.0 * maximize, weight_decay, alpha, 1.0 - alpha, eps, lr, momentum


@triton.jit
def rmsprop(p, g, slots, c):
    """The gradient over the root of its mean square. Semantics: `torch.optim.RMSprop`."""
    g, v = _mean_square(p, g, slots[0], c)
    return _plain_step(p, g, v, c), (v,)


@triton.jit
def rmsprop_momentum(p, g, slots, c):
    """With momentum of the quotients."""
    g, v = _mean_square(p, g, slots[0], c)
    p, b = _momentum_step(p, g, v, slots[1], c)
    return p, (v, b)


@triton.jit
def rmsprop_centered(p, g, slots, c):
    """The gradient over an estimate of its deviation."""
    g, v = _mean_square(p, g, slots[0], c)
    m, variance = _variance(g, v, slots[1], c)
    return _plain_step(p, g, variance, c), (v, m)


@triton.jit
def rmsprop_centered_momentum(p, g, slots, c):
    """Both."""
    g, v = _mean_square(p, g, slots[0], c)
    m, variance = _variance(g, v, slots[1], c)
    p, b = _momentum_step(p, g, variance, slots[2], c)
    return p, (v, m, b)


@triton.jit
def _mean_square(p, g, v, c):
    sign, weight_decay, alpha, one_minus_alpha = c[0], c[1], c[2], c[3]
    g = g * sign + p * weight_decay
    return g, v * alpha + (g * one_minus_alpha) * g


@triton.jit
def _variance(g, v, m, c):
    m = lerp(m, g, c[3])
    difference = v - m * m
    return m, tl.where(difference < 0.0, 0.0, difference)


@triton.jit
def _plain_step(p, g, v, c):
    eps, lr = c[4], c[5]
    return p - tl.div_rn(g * lr, tl.sqrt_rn(v) + eps)


@triton.jit
def _momentum_step(p, g, v, b, c):
    eps, lr, momentum = c[4], c[5], c[6]
    b = b * momentum + tl.div_rn(g, tl.sqrt_rn(v) + eps)
    return p - b * lr, b
