"""The update rules on the device, operation for operation those of `mpengine.reference`, which specifies them.

`rule(p, g, slots, c) -> (p, slots)`: master, unscaled and clipped gradient, state and the tensor's scalars, all FP32.
Division and root are the correctly rounded ones: Triton's `/` and `tl.sqrt` are not.

`scalars(h, step) -> c`: from the columns of a group's hyperparameters and the tensors' step counts, in float64 (where
`/` and `tl.sqrt` are correctly rounded); decide rounds the results to FP32 once.
"""

import triton
import triton.language as tl


@triton.jit
def assign(p, g, slots, c):
    """The gradient itself."""
    return g, slots


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


@triton.jit
def power(base, exponent):
    """base**exponent in float64 by repeated squaring, the reference's multiplications.

    It ends at the highest bit of any exponent: the reference's further squarings never reach a result.
    """
    result = tl.full(base.shape, 1.0, tl.float64)
    factor = base
    while tl.max(exponent) > 0:
        result = tl.where((exponent & 1) == 1, result * factor, result)
        factor = factor * factor
        exponent = exponent >> 1
    return result


@triton.jit
def adam_scalars(h, step):
    """From (lr, beta1, beta2, eps, weight_decay, maximize, decoupled)."""
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled = h[0], h[1], h[2], h[3], h[4], h[5], h[6]
    bias_correction1 = 1.0 - power(beta1, step)
    bias_correction2 = 1.0 - power(beta2, step)
    return (
        1.0 - 2.0 * maximize,
        tl.where(decoupled != 0.0, 0.0, weight_decay),
        tl.where(decoupled != 0.0, 1.0 - lr * weight_decay, 1.0),
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        1.0 / tl.sqrt(bias_correction2),
        lr / bias_correction1,
        eps,
    )


@triton.jit
def adam(p, g, slots, c):
    """Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019). Semantics: `torch.optim.Adam`, `AdamW`."""
    p, m, v = _adam_moments(p, g, slots[0], slots[1], c)
    return _adam_step(p, m, v, c), (m, v)


@triton.jit
def adam_amsgrad(p, g, slots, c):
    """Adam with the largest second moment so far (Reddi et al. 2018)."""
    p, m, v = _adam_moments(p, g, slots[0], slots[1], c)
    largest = tl.maximum(slots[2], v, propagate_nan=tl.PropagateNan.ALL)
    return _adam_step(p, m, largest, c), (m, v, largest)


@triton.jit
def _adam_moments(p, g, m, v, c):
    sign, coupled_decay, decay_factor, one_minus_beta1, beta2, one_minus_beta2 = c[0], c[1], c[2], c[3], c[4], c[5]
    g = g * sign + p * coupled_decay
    p = p * decay_factor
    way = g - m  # torch's lerp: from the nearer end, so that beta1 = 0 gives g itself
    m = tl.where(one_minus_beta1 >= 0.5, g - way * (1.0 - one_minus_beta1), m + way * one_minus_beta1)
    v = v * beta2 + (g * one_minus_beta2) * g
    return p, m, v


@triton.jit
def _adam_step(p, m, v, c):
    inverse_root_correction, step_size, eps = c[6], c[7], c[8]
    return p - tl.div_rn(m, tl.sqrt_rn(v) * inverse_root_correction + eps) * step_size


SCALAR_FUNCTIONS = {"sgd": sgd_scalars, "adam": adam_scalars}
RULES = {"assign": assign, "sgd": sgd, "sgd_momentum": sgd_momentum, "adam": adam, "adam_amsgrad": adam_amsgrad}
