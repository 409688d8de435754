"""DCGAN's two networks, for any power-of-two image size (Radford et al. 2016, arXiv:1511.06434).

At 64 pixels they are the networks of PyTorch's and apex's DCGAN examples. Another size has one block more or less
for every factor of two; the channels double with every halving of the picture and stop at 8 times the base.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

MIN_IMAGE_SIZE = 8
MAX_WIDTH = 8  # times ngf or ndf: DCGAN's widest layer


def _widths(image_size: int) -> list[int]:
    """Channel multipliers from the largest feature map (image_size / 2) to the smallest (4 x 4)."""
    if image_size < MIN_IMAGE_SIZE or image_size & (image_size - 1):
        raise ValueError(f"image size {image_size} is not a power of two from {MIN_IMAGE_SIZE} up: use 16, 32, 64 ...")
    blocks = image_size.bit_length() - 3  # 8 -> 1 block, 16 -> 2, 64 -> 4
    return [min(2**block, MAX_WIDTH) for block in range(blocks)]


class Generator(nn.Module):
    """Noise to pictures: (batch, nz, 1, 1) to (batch, channels, image_size, image_size) in [-1, 1]."""

    def __init__(self, image_size: int, channels: int, nz: int, ngf: int) -> None:
        super().__init__()
        widths = [ngf * width for width in reversed(_widths(image_size))]
        layers: list[nn.Module] = [nn.ConvTranspose2d(nz, widths[0], 4, 1, 0, bias=False)]
        for wide, narrow in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
            layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)]
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise)


class Discriminator(nn.Module):
    """Pictures to logits: (batch, channels, image_size, image_size) to (batch,); positive means "real"."""

    def __init__(self, image_size: int, channels: int, ndf: int) -> None:
        super().__init__()
        widths = [ndf * width for width in _widths(image_size)]
        # The first layer has no BatchNorm: with it D oscillates (section 3 of the paper).
        layers: list[nn.Module] = [nn.Conv2d(channels, widths[0], 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 4, 2, 1, bias=False), nn.BatchNorm2d(wide)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 0, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten()


def _initialise(network: nn.Module, generator: torch.Generator) -> None:
    """DCGAN's initialisation: weights from N(0, 0.02), BatchNorm's from N(1, 0.02)."""
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                layer.weight.normal_(0.0, 0.02, generator=generator)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.weight.normal_(1.0, 0.02, generator=generator)
                layer.bias.zero_()


def build_networks(
    image_size: int, channels: int, *, nz: int, ngf: int, ndf: int, seed: int
) -> tuple[Generator, Discriminator]:
    """Makes both networks in FP32 on the CPU; the same seed gives the same weights on every machine.

    They are channels_last: tensor cores want that layout, and fp16 convolutions on a CPU are up to four times
    faster in it.

    Args:
        image_size: Height and width of the pictures; a power of two from 8 up.
        channels: 1 for grey pictures, 3 for colour.
        nz: Length of the noise vector.
        ngf: Width of the generator's last hidden layer.
        ndf: Width of the discriminator's first layer.
        seed: Of the weights; nothing else draws from this stream of random numbers.

    Returns:
        The generator and the discriminator.

    Raises:
        ValueError: The image size is not a power of two from 8 up.
    """
    stream = torch.Generator().manual_seed(seed)
    net_g = Generator(image_size, channels, nz, ngf)
    net_d = Discriminator(image_size, channels, ndf)
    for network in (net_g, net_d):
        _initialise(network, stream)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return net_g, net_d
