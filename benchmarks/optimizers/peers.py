"""Other libraries' fused and low-precision AdamW, where they are installed.

Each entry says what state it keeps and what mpengine's step does that it does not. None of them is needed: what is not
installed is reported as such, and what raises is reported with its error. Written against flashoptim 0.1.4,
torch-optimi 0.3.3, torchao 0.18 and the current sources of the others; their byte counts are read from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.optimizers import traffic
from benchmarks.optimizers.engines import AMP, BRAIN, HALF, LR, OWN, SINGLE, Engine, Peer, Spec
from benchmarks.optimizers.shapes import Shape
from benchmarks.optimizers.traffic import Passes

_NEITHER = "no overflow check, no clipping"
_NO_MASTER = "no overflow check, no clipping, no master weights"


def _flashoptim(params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(params, lr=LR, **options)


def _optimi(params: list[Tensor]) -> torch.optim.Optimizer:
    from optimi import AdamW

    return AdamW(params, lr=LR, betas=(0.9, 0.999), eps=1e-8)  # Kahan sums and Triton are its defaults for bf16


def _torchao_8bit(params: list[Tensor]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=LR, bf16_stochastic_round=True)


def _bitsandbytes(params: list[Tensor], bits: int) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW(params, lr=LR, optim_bits=bits)


def _apex(params: list[Tensor]) -> torch.optim.Optimizer:
    from apex.optimizers import FusedAdam

    return FusedAdam(params, lr=LR, weight_decay=0.01, capturable=True, master_weights=True)


def _deepspeed(params: list[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam(params, lr=LR, weight_decay=0.01, adam_w_mode=True)


def _transformer_engine(params: list[Tensor]) -> torch.optim.Optimizer:
    from transformer_engine.pytorch.optimizers import FusedAdam

    return FusedAdam(params, lr=LR, weight_decay=0.01, capturable=True, master_weights=True)


def _peer(
    name: str,
    package: str,
    make: Any,
    dtype: torch.dtype,
    state: str,
    passes: Passes,
    held: float,
    lacks: str,
    full_state: bool = False,
    scaled: bool = False,
) -> Spec:
    def build(shapes: Sequence[Shape], device: torch.device) -> Engine:
        return Peer(shapes, device, dtype, make, scaled)

    return Spec(
        name=name,
        make=build,
        weights={HALF: "fp16", BRAIN: "bf16", SINGLE: "FP32"}[dtype],
        state=state,
        full_state=full_state,
        checks=scaled,
        clips=False,
        passes=passes,
        norm_passes=passes,
        held=held,
        gradient=dtype.itemsize,
        lacks=lacks,
        package=package,
    )


def _capturable(name: str, package: str, make: Any) -> Spec:
    """A FusedAdam with masters that torch.amp.GradScaler hands its scale and its verdict."""
    passes, state = traffic.CAPTURABLE_MASTER, "FP32 master and moments"
    return _peer(name, package, make, HALF, state, passes, 14, "no clipping", full_state=True, scaled=True)


PEERS = (
    _peer(
        "flashoptim, 32-bit weights",
        "flashoptim",
        partial(_flashoptim, master_weight_bits=32, quantize=False),
        BRAIN,
        "bf16 + 16-bit correction, bf16 moments",
        traffic.FLASH_32,
        8,
        _NEITHER,
    ),
    _peer(
        "flashoptim, defaults",
        "flashoptim",
        _flashoptim,
        BRAIN,
        "24-bit weights, 8-bit moments",
        traffic.FLASH_24,
        5.125,
        _NEITHER,
    ),
    _peer(
        "torch-optimi, Kahan",
        "torch-optimi",
        _optimi,
        BRAIN,
        "bf16 + bf16 Kahan sum, bf16 moments",
        traffic.HALF_KAHAN,
        8,
        _NEITHER,
    ),
    _peer(
        "torchao AdamW8bit",
        "torchao",
        _torchao_8bit,
        BRAIN,
        "no master (stochastic rounding), 8-bit moments from 4096 elements on",
        traffic.HALF_ADAM_8BIT,
        4,
        _NO_MASTER,
    ),
    _peer(
        "bitsandbytes AdamW 32-bit",
        "bitsandbytes",
        partial(_bitsandbytes, bits=32),
        HALF,
        "no master, FP32 moments",
        traffic.HALF_ADAM,
        10,
        _NO_MASTER,
    ),
    _peer(
        "bitsandbytes AdamW 8-bit",
        "bitsandbytes",
        partial(_bitsandbytes, bits=8),
        HALF,
        "no master, 8-bit moments from 4096 elements on",
        traffic.HALF_ADAM_8BIT,
        4,
        _NO_MASTER,
    ),
    _capturable("apex FusedAdam", "apex", _apex),
    _peer(
        "DeepSpeed FusedAdam",
        "deepspeed",
        _deepspeed,
        SINGLE,
        "FP32 weights and moments",
        traffic.SINGLE_ADAM,
        12,
        "no overflow check, no clipping, no fp16 weights: its FP16_Optimizer adds them outside",
        full_state=True,
    ),
    _capturable("TransformerEngine FusedAdam", "transformer-engine", _transformer_engine),
)
ENGINES = {spec.name: spec for spec in (*OWN, *AMP, *PEERS)}


def for_device(kind: str) -> list[str]:
    """The names of the engines that run there, mpengine's first, peers last."""
    return [name for name, spec in ENGINES.items() if kind in spec.devices]
