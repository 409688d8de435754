"""Gradient descent on the device; `mpengine.rules.sgd` specifies it."""

import triton
import triton.language as tl


@triton.jit
def sgd_scalars(h, step):
    """From (lr, momentum, dampening, weight_decay, nesterov, maximize)."""
    lr, momentum, dampening, weight_decay, nesterov, maximize = h[0], h[1], h[2], h[3], h[4], h[5]
    sign = 1.0 - 2.0 * maximize
    grad_factor = tl.where(step == 1, 1.0, 1.0 - dampening)  # the first momentum buffer is the gradient
    return sign, weight_decay, lr, momentum, grad_factor, nesterov


@triton.jit
def sgd(p, g, slots, c):
    """Gradient descent: `p -= lr * (g + weight_decay * p)`. Semantics: `torch.optim.SGD`."""
    sign, weight_decay, lr = c[0], c[1], c[2]
    g = g * sign + p * weight_decay
    return p - g * lr, slots


@triton.jit
def sgd_momentum(p, g, slots, c):
    """Gradient descent with (Nesterov) momentum. Semantics: `torch.optim.SGD`."""
    sign, weight_decay, lr, momentum, grad_factor, nesterov = c[0], c[1], c[2], c[3], c[4], c[5]
    g = g * sign + p * weight_decay
    buffer = slots[0] * momentum + g * grad_factor
    direction = tl.where(nesterov != 0.0, g + buffer * momentum, buffer)
    return p - direction * lr, (buffer,)
