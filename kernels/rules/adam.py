"""Adam, AMSGrad and AdamW on the device; `mpengine.rules.adam` specifies them."""

import triton
import triton.language as tl

from .arithmetic import lerp, power


@triton.jit
def adam_scalars(h, step):
    """From (lr, beta1, beta2, eps, weight_decay, maximize, decoupled, uncorrected)."""
    lr, beta1, beta2, eps, weight_decay, maximize, decoupled, uncorrected = (
        h[0],
        h[1],
        h[2],
        h[3],
        h[4],
        h[5],
        h[6],
        h[7],
    )
    bias_correction1 = tl.where(uncorrected != 0.0, 1.0, 1.0 - power(beta1, step))
    bias_correction2 = tl.where(uncorrected != 0.0, 1.0, 1.0 - power(beta2, step))
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
    m = lerp(m, g, one_minus_beta1)
    v = v * beta2 + (g * one_minus_beta2) * g
    return p, m, v


@triton.jit
def _adam_step(p, m, v, c):
    inverse_root_correction, step_size, eps = c[6], c[7], c[8]
    return p - tl.div_rn(m, tl.sqrt_rn(v) * inverse_root_correction + eps) * step_size
