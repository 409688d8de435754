"""Sets of parameters: shapes as real models have them, and shapes that stress one end of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One parameter; `norm` marks a normalisation layer's, which mpengine.prepare keeps in FP32."""

    size: tuple[int, ...]
    norm: bool = False

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.size)


@dataclass(frozen=True)
class ShapeSet:
    """A model's parameters, and the devices that they are meant for."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    devices: tuple[str, ...] = ("cuda",)

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(shape.numel for shape in self.shapes)


def _norm(width: int) -> list[Shape]:
    return [Shape((width,), norm=True)] * 2


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [Shape((inputs, outputs)), Shape((outputs,))]


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257, context: int = 1024) -> tuple[Shape, ...]:
    """GPT-2's parameters as its published weights have them; the defaults are the 124M model, 148 tensors."""
    block = [*_norm(width), *_linear(width, 3 * width), *_linear(width, width)]
    block += [*_norm(width), *_linear(width, 4 * width), *_linear(4 * width, width)]
    return (Shape((vocabulary, width)), Shape((context, width)), *(block * layers), *_norm(width))


def resnet50(classes: int = 1000) -> tuple[Shape, ...]:
    """ResNet-50's 161 parameters (He et al. 2016, arXiv:1512.03385), as torchvision has them."""
    shapes = [Shape((64, 3, 7, 7)), *_norm(64)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for outputs, channels, kernel in ((width, inputs, 1), (width, width, 3), (4 * width, width, 1)):
                shapes += [Shape((outputs, channels, kernel, kernel)), *_norm(outputs)]
            if block == 0:
                shapes += [Shape((4 * width, inputs, 1, 1)), *_norm(4 * width)]
            inputs = 4 * width
    return (*shapes, *_linear(classes, inputs)[:1], Shape((classes,)))


_SETS = (
    ShapeSet("billion", "1e9 in 64 tensors", (Shape((15_625_000,)),) * 64),
    ShapeSet("small", "1000 x 1024", (Shape((1024,)),) * 1000),
    ShapeSet("gpt2", "GPT-2 124M", gpt2()),
    ShapeSet("resnet50", "ResNet-50", resnet50()),
    ShapeSet("tiny-tensors", "10,000 x 64", (Shape((64,)),) * 10_000),
    ShapeSet("twenty-million", "20M in 20 tensors", (Shape((1000, 1000)),) * 20, ("cpu",)),
    ShapeSet("smoke", "smoke test", (Shape((33, 7)), Shape((1025,)), Shape((5,), norm=True)), ()),
)
SHAPES = {shapes.name: shapes for shapes in _SETS}


def for_device(kind: str) -> list[str]:
    """The names of the sets that are measured there by default, the most telling first."""
    return [name for name, shapes in SHAPES.items() if kind in shapes.devices]
