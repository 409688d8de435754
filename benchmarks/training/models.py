"""GPT-2 and a ResNet-50 in plain PyTorch, and the sizes at which they are trained. DCGAN's are those of examples/."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.parity.models import Block


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), but for its exact GELU; the defaults are the 124M model, its head the embedding."""

    def __init__(
        self, vocabulary: int = 50257, context: int = 1024, width: int = 768, heads: int = 12, layers: int = 12
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.ln_f = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens, int64 (n, context), to the logits of the next one."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        return F.linear(self.ln_f(self.blocks(x)), self.wte.weight)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm around a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch = nn.Sequential(
            *_conv(inputs, width, 1, 1),
            nn.ReLU(inplace=True),
            *_conv(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *_conv(width, outputs, 1, 1),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, 4 * width, h / stride, w / stride)."""
        return F.relu(self.branch(x) + self.shortcut(x))


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def resnet(blocks: tuple[int, ...] = (3, 4, 6, 3), base: int = 64, classes: int = 1000) -> nn.Module:
    """ResNet-50 (He et al. 2016, arXiv:1512.03385; the stride in the 3x3 convolution), in channels_last."""
    layers: list[nn.Module] = [*_conv(3, base, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = base
    for stage, count in enumerate(blocks):
        width = base * 2**stage
        for block in range(count):
            layers.append(Bottleneck(inputs, width, 2 if block == 0 and stage > 0 else 1))
            inputs = 4 * width
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
