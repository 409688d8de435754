"""Byte models: what each engine's algorithm must move through memory for one step, pass by pass.

A pass reads and writes every element once; what the caches may save is not subtracted. GB/s in the results are these
bytes over the measured time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.optimizers.shapes import Shape


class Pass(NamedTuple):
    """One sweep over the parameters: bytes read and written for each of them."""

    what: str
    read: float
    write: float


Passes = tuple[Pass, ...]

# mpengine: gradients twice, master and both moments once each way, the fp16 weight written.
MPENGINE_HALF: Passes = (Pass("inspect: g2", 2, 0), Pass("update: g2 master4 m4 v4, writes fp16 weight 2", 14, 14))
MPENGINE_SINGLE: Passes = (Pass("inspect: g4", 4, 0), Pass("update: g4 p4 m4 v4", 16, 12))

# torch.amp on FP32 weights and gradients. The check multiplies and stores even where it only checks.
AMP_CHECK = Pass("check and unscale: g4", 4, 4)
AMP_CLIP: Passes = (Pass("norm: g4", 4, 0), Pass("clip: g4", 4, 4))
FUSED_UNSCALING = Pass("fused AdamW: p4 g4 m4 v4, writes the unscaled g4 back", 16, 16)
FUSED = Pass("fused AdamW: p4 g4 m4 v4", 16, 12)
# _multi_tensor_adam, decoupled decay: p*=; lerp m; v*=; addcmul v; sqrt; /=; += eps; addcdiv.
FOREACH: Passes = (
    Pass("p *= 1 - lr * decay", 4, 4),
    Pass("m.lerp_(g)", 8, 4),
    Pass("v *= beta2", 4, 4),
    Pass("v.addcmul_(g, g)", 8, 4),
    Pass("sqrt(v)", 4, 4),
    Pass("/= bias correction", 4, 4),
    Pass("+= eps", 4, 4),
    Pass("p.addcdiv_(m, denominator)", 12, 4),
)

AMP_FUSED: Passes = (AMP_CHECK, FUSED_UNSCALING)
AMP_FUSED_CLIP: Passes = (AMP_CHECK, *AMP_CLIP, FUSED)
AMP_FOREACH: Passes = (AMP_CHECK, *FOREACH)
AMP_FOREACH_CLIP: Passes = (AMP_CHECK, *AMP_CLIP, *FOREACH)

# Peers. Scale factors of quantised blocks count with their share of an element.
SINGLE_ADAM: Passes = (Pass("FP32 Adam: p4 g4 m4 v4", 16, 12),)
HALF_ADAM: Passes = (Pass("Adam: p2 g2 m4 v4, no master", 12, 10),)
HALF_ADAM_8BIT: Passes = (Pass("Adam: p2 g2 m1 v1 and 2 scales a 256 elements", 6 + 8 / 256, 4 + 8 / 256),)
HALF_KAHAN: Passes = (Pass("Adam: p2 g2 m2 v2 kahan2", 10, 8),)
FLASH_24: Passes = (Pass("Adam: p2 g2 correction1 m1 v1 and 2 fp16 scales a 32", 7.125, 5.125),)
FLASH_32: Passes = (Pass("Adam: p2 g2 correction2 m2 v2", 10, 8),)
CAPTURABLE_MASTER: Passes = (
    Pass("check: g2", 2, 2),
    Pass("Adam: g2 p2 master4 m4 v4, writes the unscaled g2 back", 16, 16),
)


def bytes_of(passes: Passes) -> float:
    """Bytes that one parameter costs."""
    return sum(one.read + one.write for one in passes)


def total(half: Passes, single: Passes, shapes: Sequence[Shape]) -> float:
    """Bytes of a whole step; `single` is for the parameters that the engine keeps in FP32 beside the others."""
    norms = sum(shape.numel for shape in shapes if shape.norm)
    rest = sum(shape.numel for shape in shapes) - norms
    return rest * bytes_of(half) + norms * bytes_of(single)
