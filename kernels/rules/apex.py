"""What apex's optimizers compute otherwise than torch's, on the device; `mpengine.rules.apex` specifies it."""

import triton
import triton.language as tl

from .arithmetic import power


@triton.jit
def apex_adam_scalars(h, step):
    """From (lr, betas, eps, weight_decay, bias_correction, adam_w_mode) and the step count."""
    lr, beta1, beta2, eps, weight_decay, corrects, decoupled = h[0], h[1], h[2], h[3], h[4], h[5], h[6]
    return (
        tl.where(decoupled != 0.0, 0.0, weight_decay),
        tl.where(decoupled != 0.0, weight_decay, 0.0),
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        tl.where(corrects != 0.0, 1.0 - power(beta1, step), 1.0),
        tl.where(corrects != 0.0, 1.0 - power(beta2, step), 1.0),
        eps,
        lr,
    )


@triton.jit
def apex_adam(p, g, slots, c):
    """FusedAdam."""
    coupled_decay, decay, beta1, one_minus_beta1, beta2, one_minus_beta2 = c[0], c[1], c[2], c[3], c[4], c[5]
    bias_correction1, bias_correction2, eps, lr = c[6], c[7], c[8], c[9]
    g = g + p * coupled_decay
    m = slots[0] * beta1 + g * one_minus_beta1
    v = slots[1] * beta2 + (g * one_minus_beta2) * g
    denominator = tl.sqrt_rn(tl.div_rn(v, bias_correction2)) + eps
    update = tl.div_rn(tl.div_rn(m, bias_correction1), denominator) + p * decay
    return p - update * lr, (m, v)


@triton.jit
def apex_adagrad_scalars(h, step):
    """From (lr, eps, weight_decay, adagrad_w_mode); the step count does not matter."""
    lr, eps, weight_decay, decoupled = h[0], h[1], h[2], h[3]
    return tl.where(decoupled != 0.0, 0.0, weight_decay), tl.where(decoupled != 0.0, weight_decay, 0.0), eps, lr


@triton.jit
def apex_adagrad(p, g, slots, c):
    """FusedAdagrad."""
    coupled_decay, decay, eps, lr = c[0], c[1], c[2], c[3]
    g = g + p * coupled_decay
    squares = slots[0] + g * g
    return p - (tl.div_rn(g, tl.sqrt_rn(squares) + eps) + p * decay) * lr, (squares,)


@triton.jit
def apex_sgd_momentum(p, g, slots, c):
    """FusedSGD with momentum, and the decay after it."""
    weight_decay, lr, momentum, grad_factor, nesterov = c[1], c[2], c[3], c[4], c[5]
    buffer = slots[0] * momentum + g * grad_factor
    direction = tl.where(nesterov != 0.0, g + buffer * momentum, buffer)
    return p - (direction + p * weight_decay) * lr, (buffer,)
