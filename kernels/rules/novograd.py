"""NovoGrad on the device; `mpengine.rules.novograd` specifies it."""

import triton
import triton.language as tl

from .arithmetic import power


@triton.jit
def novograd_scalars(h, step):
    """From (lr, betas, eps, weight_decay, bias_correction, reg_inside, grad_averaging, init_zero) and the step."""
    lr, beta1, beta2, eps, weight_decay = h[0], h[1], h[2], h[3], h[4]
    corrects, inside, averages, from_zero = h[5], h[6], h[7], h[8]
    bias_correction1 = tl.where(corrects != 0.0, 1.0 - power(beta1, step), 1.0)
    bias_correction2 = tl.where(corrects != 0.0, 1.0 - power(beta2, step), 1.0)
    replaced = (step == 1) & (from_zero == 0.0)
    return (
        tl.where(inside != 0.0, weight_decay, 0.0),
        beta1,
        tl.where(averages != 0.0, 1.0 - beta1, 1.0),
        1.0 / bias_correction1,
        tl.where(inside != 0.0, 0.0, weight_decay),
        lr,
        tl.where(replaced, 0.0, beta2),
        tl.where(replaced, 1.0, 1.0 - beta2),
        tl.sqrt(bias_correction2),
        eps,
        inside,
    )


@triton.jit
def novograd_measure(p, g, slots, c):
    """The gradient."""
    return (g,)


@triton.jit
def novograd_settle(c, norms, cells):
    """The second moment; d divides the gradient, or the first moment, and 1 the other."""
    second = cells[0] * c[6] + (norms[0] * norms[0]) * c[7]
    d = tl.sqrt(second) / c[8] + c[9]
    inner, outer = tl.where(c[10] != 0.0, d, 1.0), tl.where(c[10] != 0.0, 1.0, d)
    return (c[0], c[1], c[2], c[3], c[4], c[5], inner, outer), (second,)


@triton.jit
def novograd(p, g, slots, c):
    """The step, with the norms in the two divisors."""
    g = tl.div_rn(g, c[6]) + p * c[0]
    m = slots[0] * c[1] + g * c[2]
    return p - (tl.div_rn(m * c[3], c[7]) + p * c[4]) * c[5], (m,)
