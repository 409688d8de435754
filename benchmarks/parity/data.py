"""What the models learn from: scikit-learn's digits, and the licences of installed packages. Nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TEXT_PACKAGES = ("numpy", "matplotlib", "pillow")  # their licences are long, and `make parity` needs them anyway
_CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(_CHARACTERS)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 handwritten digits: float32[1797, 1, 8, 8] in [-1, 1], and int64[1797] labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8.0 - 1.0
    return images, torch.from_numpy(data.target).long()


def digit_batches(seed: int, steps: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of digits and labels, drawn with replacement."""
    images, labels = digits()
    stream = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(images), (size,), generator=stream)
        yield images[chosen], labels[chosen]


def _licence(package: str) -> str:
    """The licence that lies in a package's metadata.

    Raises:
        FileNotFoundError: The package is installed without one.
    """
    for file in sorted(distribution(package).files or [], key=lambda file: len(str(file))):
        if file.stem.upper() == "LICENSE" and ".dist-info" in str(file):
            return Path(file.locate()).read_text(encoding="utf-8")
    raise FileNotFoundError(f"the installed {package} has no LICENSE in its metadata: reinstall it from a wheel")


@cache
def text() -> Tensor:
    """The licences' characters, int64[n] in [0, VOCABULARY); what is no printable ASCII is left out."""
    joined = "\n".join(_licence(package) for package in TEXT_PACKAGES)
    codes = {character: code for code, character in enumerate(_CHARACTERS)}
    return torch.tensor([codes[character] for character in joined if character in codes])


def text_digest() -> str:
    """A short hash of the text: other versions of the packages have other licences, and so other loss curves."""
    return hashlib.sha256(bytes(text().tolist())).hexdigest()[:12]


def text_batches(seed: int, steps: int, size: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of the text and the characters that follow, int64[size, length] each."""
    corpus = text()
    stream = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(corpus) - length, (size, 1), generator=stream)
        windows = corpus[starts + torch.arange(length + 1)]
        yield windows[:, :-1], windows[:, 1:]
