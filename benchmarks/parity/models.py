"""The networks: an MLP, a convnet in channels_last, and a GPT of four layers. DCGAN's are those of examples/."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from dcgan_model import build_networks

CONTEXT = 32  # characters that the GPT sees
NOISE = 8  # length of the vectors that the DCGAN draws digits from


def mlp() -> nn.Module:
    """(n, 1, 8, 8) to 10 logits."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def convnet() -> nn.Module:
    """(n, 1, 8, 8) to 10 logits, with BatchNorm, in channels_last."""
    layers: list[nn.Module] = []
    for narrow, wide, stride in ((1, 8, 1), (8, 16, 2), (16, 32, 2)):
        layers += [nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 2 * 2, 10))
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and added to the residual stream, (n, CONTEXT, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds both branches."""
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Characters, int64[n, CONTEXT], to logits of the next one; four layers, GPT-2's order and initialisation."""

    def __init__(self, vocabulary: int, width: int = 32, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits (n, CONTEXT, vocabulary)."""
        # Not self.tokens(characters): what `prepare` keeps in FP32 still returns fp16, and the residual stream with it.
        x = F.embedding(characters, self.tokens.weight) + self.positions.weight
        return self.head(self.norm(self.blocks(x)))


def dcgan(seed: int) -> list[nn.Module]:
    """Generator and discriminator for pictures of 8 x 8."""
    return list(build_networks(8, 1, nz=NOISE, ngf=16, ndf=16, seed=seed))
