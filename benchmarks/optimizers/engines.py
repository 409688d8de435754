"""The step of mpengine and of torch.amp: parameters, optimizer, scaler, and the calls that the time is taken of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mpengine
from benchmarks.optimizers import traffic
from benchmarks.optimizers.shapes import Shape
from benchmarks.optimizers.traffic import Passes

LR = 1e-4
MAX_NORM = 1.0
INIT_SCALE = 1024.0  # no gradient overflows, and it does not grow within a run
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def parameters(shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype, norms: torch.dtype) -> list[Tensor]:
    """Random parameters from N(0, 0.02); `norms` is the dtype of normalisation layers."""
    made: list[Tensor] = []
    for shape in shapes:
        values = torch.empty(shape.size, device=device, dtype=norms if shape.norm else dtype).normal_(0.0, 0.02)
        made.append(torch.nn.Parameter(values))
    return made


class Engine:
    """An optimizer over its own parameters; the step of one without a scaler is the optimizer's alone."""

    params: list[Tensor]
    optimizer: torch.optim.Optimizer
    scaler: Any = None

    def scale(self, loss: Tensor) -> Tensor:
        """The loss whose backward pass brings the gradients."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def step(self) -> None:
        """What is timed: check, unscale, clip, update, and the scale's own update, as far as the engine does them."""
        if self.scaler is None:
            self.optimizer.step()
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def zero_grad(self) -> None:
        """Lets go of the gradients."""
        self.optimizer.zero_grad()


class Mpengine(Engine):
    """fp16 parameters and gradients, FP32 normalisation layers, FP32 masters and moments."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device, clip: bool) -> None:
        self.params = parameters(shapes, device, HALF, SINGLE)
        self.scaler = mpengine.GradScaler(device.type, init_scale=INIT_SCALE)
        inner = torch.optim.AdamW(self.params, lr=LR)
        self.optimizer = mpengine.MixedPrecisionOptimizer(inner, self.scaler, max_grad_norm=MAX_NORM if clip else None)


class TorchAmp(Engine):
    """FP32 parameters and gradients under torch.amp.GradScaler, as its documentation shows it."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device, clip: bool, **options: bool) -> None:
        self.params = parameters(shapes, device, SINGLE, SINGLE)
        self.clip = clip
        self.scaler = torch.amp.GradScaler(device.type, init_scale=INIT_SCALE)
        self.optimizer = torch.optim.AdamW(self.params, lr=LR, **options)

    def step(self) -> None:
        """Unscales and clips first where it is to clip."""
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        super().step()


class Peer(Engine):
    """Another library's optimizer.

    Args:
        shapes: Of the parameters.
        device: Where they lie.
        dtype: Of parameters and gradients, normalisation layers included.
        make: From the parameters to the optimizer; imports the library.
        scaled: Whether torch.amp.GradScaler drives it.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: torch.device,
        dtype: torch.dtype,
        make: Callable[[list[Tensor]], torch.optim.Optimizer],
        scaled: bool = False,
    ) -> None:
        self.params = parameters(shapes, device, dtype, dtype)
        self.optimizer = make(self.params)
        if scaled:
            # The GradScaler says at each step that it hands itself over: that is how these take the scale.
            warnings.filterwarnings("ignore", "GradScaler is going to stop passing itself", FutureWarning)
            self.scaler = torch.amp.GradScaler(device.type, init_scale=INIT_SCALE)


@dataclass(frozen=True)
class Spec:
    """An engine as the tables show it: what it keeps, what its step does, and what that moves."""

    name: str
    make: Callable[[Sequence[Shape], torch.device], Engine]
    weights: str  # dtype of parameters and gradients
    state: str  # masters and moments, and their precision
    full_state: bool  # 32 bits of weight, FP32 moments: of equal precision to mpengine
    checks: bool  # skips a step whose gradients are not finite
    clips: bool
    passes: Passes  # of parameters in `weights`
    norm_passes: Passes  # of normalisation layers
    held: float  # bytes a parameter that parameters and state take, gradients aside
    gradient: int  # bytes of a gradient's element
    lacks: str = ""  # what mpengine's step does and this does not
    package: str | None = None  # the distribution it needs
    devices: tuple[str, ...] = ("cuda",)
    scratch: float = 0.0  # bytes a parameter that its step needs beside

    def step_bytes(self, shapes: Sequence[Shape]) -> float:
        """Bytes that a step must move by this engine's algorithm."""
        return traffic.total(self.passes, self.norm_passes, shapes)


def _mpengine(clip: bool) -> Spec:
    return Spec(
        name="mpengine" + (" + clip" if clip else ""),
        make=lambda shapes, device: Mpengine(shapes, device, clip),
        weights="fp16",
        state="FP32 master and moments",
        full_state=True,
        checks=True,
        clips=clip,
        passes=traffic.MPENGINE_HALF,
        norm_passes=traffic.MPENGINE_SINGLE,
        held=14,
        gradient=2,
        devices=("cuda", "cpu"),
    )


def _amp(kind: str, clip: bool, passes: Passes, devices: tuple[str, ...] = ("cuda", "cpu")) -> Spec:
    options = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}[kind]
    return Spec(
        name=f"torch.amp {kind}" + (" + clip" if clip else ""),
        make=lambda shapes, device: TorchAmp(shapes, device, clip, **options),
        weights="FP32",
        state="FP32 weights and moments",
        full_state=True,
        checks=True,
        clips=clip,
        passes=passes,
        norm_passes=passes,
        held=12,
        gradient=4,
        lacks="no fp16 weights: casts them in every forward pass, not counted here",
        devices=devices,
        scratch=0.0 if kind == "fused" else 8.0,
    )


OWN = tuple(_mpengine(clip) for clip in (False, True))
AMP = (
    _amp("fused", False, traffic.AMP_FUSED),
    _amp("fused", True, traffic.AMP_FUSED_CLIP),
    _amp("foreach", False, traffic.AMP_FOREACH),
    _amp("foreach", True, traffic.AMP_FOREACH_CLIP),
    _amp("for-loop", False, traffic.AMP_FOREACH, ("cpu",)),
    _amp("for-loop", True, traffic.AMP_FOREACH_CLIP, ("cpu",)),
)
