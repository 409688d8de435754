"""Fresh random gradients for every step, brought by a real backward pass.

Two sets lie in two flat buffers, used in turn: so the gradients' addresses change from step to step, as they do in
training, and an engine that keeps tables of pointers must write them anew. Elements are normal with a floor on their
magnitude: none is zero or subnormal, whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SETS = 2
STD = 1.0  # of the scaled gradient
FLOOR = 2.0**-10  # added to every magnitude; 16 times fp16's smallest normal number
_ALIGNMENT = 512  # bytes, as torch's allocator places tensors
_PIECE = 2**26  # elements drawn at once, so that temporary memory stays small


class Gradients:
    """The gradients of these parameters.

    Args:
        params: Their shapes, dtypes and device.
        generator: Draws them; None: torch's default.
    """

    def __init__(self, params: Sequence[Tensor], generator: torch.Generator | None = None) -> None:
        self._params = list(params)
        self._generator = generator
        ends: dict[torch.dtype, int] = {}
        self._starts: list[int] = []
        for param in self._params:
            start = ends.get(param.dtype, 0)
            self._starts.append(start)
            step = _ALIGNMENT // param.element_size()
            ends[param.dtype] = start + -(-param.numel() // step) * step
        device = self._params[0].device
        self._flat = [
            {dtype: torch.empty(end, dtype=dtype, device=device) for dtype, end in ends.items()} for _ in range(SETS)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all sets."""
        return sum(flat.nbytes for one in self._flat for flat in one.values())

    def draw(self, turn: int) -> None:
        """Fills the set of this turn."""
        for flat in self._flat[turn % SETS].values():
            for piece in flat.split(_PIECE):
                piece.normal_(0.0, STD, generator=self._generator)
                piece.add_(torch.copysign(torch.full_like(piece, FLOOR), piece))

    def views(self, turn: int) -> list[Tensor]:
        """New tensors over the set of this turn, shaped as the parameters."""
        flat = self._flat[turn % SETS]
        return [
            flat[param.dtype][start : start + param.numel()].view(param.shape)
            for param, start in zip(self._params, self._starts, strict=True)
        ]

    def bring(self, turn: int, scale: Callable[[Tensor], Tensor]) -> None:
        """A backward pass of the scaled loss: every parameter's `.grad` becomes its part of the set, uncopied."""
        loss = _Bring.apply(lambda: self.views(turn), *self._params)
        scale(loss).backward()


class _Bring(torch.autograd.Function):
    """A loss whose gradients are what `supply` returns, already scaled."""

    @staticmethod
    def forward(ctx: Any, supply: Callable[[], list[Tensor]], *params: Tensor) -> Tensor:
        ctx.supply = supply
        return torch.ones((), device=params[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.supply())  # nobody else holds them: autograd takes them over as they are
