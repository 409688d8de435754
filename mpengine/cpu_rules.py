"""The update rules on blocks of NumPy arrays, in place: bit for bit those of `mpengine.reference`.

`rule(p, g, slots, c, t)`: master, gradient and state are float32[n], all of them overwritten (`g` with what is left
of it); `c` are the tensor's scalars, each float32[], and `t` is float32[n] of scratch. Each line is one FP32 operation,
rounded once, in the reference's order. NumPy contracts nothing, and its square root is correctly rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from mpengine.rules.declaration import Update

_PIECE = 1 << 15  # elements: PyTorch works on as many on the thread that asks for it
Arrays = Sequence[np.ndarray]


def assign(p: np.ndarray, g: np.ndarray, slots: Arrays, c: Sequence[np.ndarray], t: np.ndarray) -> None:
    """The gradient itself."""
    np.copyto(p, g)


def sgd(p: np.ndarray, g: np.ndarray, slots: Arrays, c: Sequence[np.ndarray], t: np.ndarray) -> None:
    """Gradient descent: `p -= lr * (g + weight_decay * p)`."""
    sign, weight_decay, lr = c[:3]
    _decay_into(g, p, sign, weight_decay, t)
    np.multiply(g, lr, g)
    np.subtract(p, g, p)


def sgd_momentum(p: np.ndarray, g: np.ndarray, slots: Arrays, c: Sequence[np.ndarray], t: np.ndarray) -> None:
    """Gradient descent with (Nesterov) momentum."""
    sign, weight_decay, lr, momentum, grad_factor, nesterov = c[:6]
    (buffer,) = slots
    _decay_into(g, p, sign, weight_decay, t)
    np.multiply(buffer, momentum, buffer)
    np.multiply(g, grad_factor, t)
    np.add(buffer, t, buffer)
    if nesterov:
        np.multiply(buffer, momentum, t)
        np.add(g, t, t)
        np.multiply(t, lr, t)
    else:
        np.multiply(buffer, lr, t)
    np.subtract(p, t, p)


def adam(p: np.ndarray, g: np.ndarray, slots: Arrays, c: Sequence[np.ndarray], t: np.ndarray) -> None:
    """Adam and AdamW."""
    _adam_moments(p, g, slots[0], slots[1], c, t)
    _adam_step(p, slots[0], slots[1], c, t)


def adam_amsgrad(p: np.ndarray, g: np.ndarray, slots: Arrays, c: Sequence[np.ndarray], t: np.ndarray) -> None:
    """Adam with the largest second moment so far."""
    _adam_moments(p, g, slots[0], slots[1], c, t)
    np.maximum(slots[2], slots[1], out=slots[2])
    _adam_step(p, slots[0], slots[2], c, t)


def _decay_into(g: np.ndarray, p: np.ndarray, sign: np.ndarray, weight_decay: np.ndarray, t: np.ndarray) -> None:
    """`g = g * sign + p * weight_decay`. A product with 1.0 is left out; one with 0.0 has a sign, and NaN of inf."""
    if sign != 1.0:
        np.multiply(g, sign, g)
    np.multiply(p, weight_decay, t)
    np.add(g, t, g)


def _adam_moments(
    p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, c: Sequence[np.ndarray], t: np.ndarray
) -> None:
    sign, coupled_decay, decay_factor, one_minus_beta1, beta2, one_minus_beta2 = c[:6]
    if coupled_decay != 0.0 or one_minus_beta1 >= 0.5 or not _is_finite(p):
        _decay_into(g, p, sign, coupled_decay, t)
    elif sign != 1.0:
        np.multiply(g, sign, g)
    # Else `g + p * 0.0` is g, or +0.0 for -0.0. Neither moment can tell: with m != 0 the way is -m either way; with
    # m = 0 (of either sign) m + way * w is +0.0 or keeps m's sign alike; and a square has no sign.
    if decay_factor != 1.0:
        np.multiply(p, decay_factor, p)
    np.subtract(g, m, t)
    if one_minus_beta1 >= 0.5:
        np.multiply(t, np.float32(1.0 - float(one_minus_beta1)), t)
        np.subtract(g, t, m)
    else:
        np.multiply(t, one_minus_beta1, t)
        np.add(m, t, m)
    np.multiply(g, one_minus_beta2, t)
    np.multiply(t, g, t)
    np.multiply(v, beta2, v)
    np.add(v, t, v)


def _is_finite(x: np.ndarray) -> bool:
    """Two reductions, which write nothing; the maximum of what has a NaN is NaN."""
    return bool(np.maximum.reduce(x) < np.inf) and bool(np.minimum.reduce(x) > -np.inf)


def _adam_step(p: np.ndarray, m: np.ndarray, v: np.ndarray, c: Sequence[np.ndarray], t: np.ndarray) -> None:
    inverse_root_correction, step_size, eps = c[6:9]
    np.sqrt(v, t)
    np.multiply(t, inverse_root_correction, t)
    np.add(t, eps, t)
    np.divide(m, t, t)
    np.multiply(t, step_size, t)
    np.subtract(p, t, p)


def in_place(update: Update) -> Callable[..., None]:
    """The reference's function of a rule that has none here, on pieces that PyTorch leaves on one thread."""

    def run(p: np.ndarray, g: np.ndarray, slots: Arrays, c: Sequence[np.ndarray], t: np.ndarray) -> None:
        numbers = [float(value) for value in c]
        for start in range(0, len(p), _PIECE):
            here = slice(start, start + _PIECE)
            old = tuple(torch.from_numpy(slot[here]) for slot in slots)
            master = torch.from_numpy(p[here])
            value, new = update(master, torch.from_numpy(g[here]), old, numbers)
            master.copy_(value)
            for slot, changed in zip(old, new, strict=True):
                slot.copy_(changed)

    return run


RULES = {"assign": assign, "sgd": sgd, "sgd_momentum": sgd_momentum, "adam": adam, "adam_amsgrad": adam_amsgrad}
