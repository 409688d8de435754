"""The pictures DCGAN learns from, and the order it sees them in.

Every dataset gives FP32 tensors of shape (channels, image_size, image_size) in [-1, 1]:

    digits        the 1,797 handwritten digits (8 x 8) inside scikit-learn; nothing to download
    folder:PATH   every picture below a folder, read with Pillow
    hub:NAME      a dataset of the Hugging Face hub, or a local folder or .parquet file in its format
    fake          random noise, to measure speed without reading anything
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dcgan_ranks import Ranks
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

FAKE_IMAGES = 4096
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_MODES = {1: "L", 3: "RGB"}


class DataError(ValueError):
    """The dataset cannot be used as asked; the message says what to do."""


class Images(Dataset[Tensor]):
    """A dataset of pictures; `decodes` says that reading one costs enough to want worker processes."""

    decodes = False

    def __init__(self, image_size: int, channels: int) -> None:
        self.image_size = image_size
        self.channels = channels

    def __len__(self) -> int:
        raise NotImplementedError


def to_tensor(picture: Image.Image, image_size: int, channels: int) -> Tensor:
    """Crops the middle square, resizes it and maps 0..255 to [-1, 1].

    Returns:
        FP32, shape (channels, image_size, image_size).
    """
    fitted = ImageOps.fit(picture.convert(_MODES[channels]), (image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(fitted)).reshape(image_size, image_size, channels)
    return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1.0)


class Digits(Images):
    """scikit-learn's digits, all in memory: 1,797 x image_size^2 x 4 B."""

    def __init__(self, image_size: int, channels: int) -> None:
        super().__init__(image_size, channels)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError("--dataset digits needs scikit-learn: pip install scikit-learn") from error
        grey = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16.0
        size = (image_size, image_size)
        # Bicubic overshoots at the edges of a stroke: clamp back into the range of a picture.
        resized = F.interpolate(grey, size, mode="bicubic", align_corners=False).clamp_(0.0, 1.0)
        self._images = (resized * 2.0 - 1.0).expand(-1, channels, -1, -1)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


class Folder(Images):
    """Every picture below a folder, in the order of the sorted paths."""

    decodes = True

    def __init__(self, folder: Path, image_size: int, channels: int) -> None:
        if not folder.is_dir():
            raise DataError(f"--dataset folder: {folder} is not a folder: check the path (relative to --dataroot)")
        super().__init__(image_size, channels)
        self._paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not self._paths:
            raise DataError(f"--dataset folder: no picture below {folder}: it reads {', '.join(sorted(SUFFIXES))}")

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self._paths[index]
        try:
            with Image.open(path) as picture:
                return to_tensor(picture, self.image_size, self.channels)
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{path} cannot be read as a picture ({error}): repair or remove it") from error


class Table(Images):
    """Adapts a `datasets.Dataset`, or any sequence of dicts, of which one column holds pictures.

    A picture may be a Pillow image, an array (height, width) or (height, width, channels) of 0..255, or what the
    hub's parquet files hold: {"bytes": ..., "path": ...}.
    """

    decodes = True

    def __init__(self, rows: Sequence[dict[str, Any]], image_size: int, channels: int, name: str) -> None:
        if len(rows) == 0:
            raise DataError(f"--dataset hub:{name} is empty: choose another dataset")
        super().__init__(image_size, channels)
        self._rows = rows
        self._column = self._find_column(rows[0], name)

    @staticmethod
    def _find_column(row: dict[str, Any], name: str) -> str:
        for column, value in row.items():
            if not isinstance(value, (str, int, float)) and _as_picture(value) is not None:
                return column
        raise DataError(f"--dataset hub:{name} has no column of pictures, only {sorted(row)}: choose another dataset")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        picture = _as_picture(self._rows[index][self._column])
        if picture is None:
            raise DataError(f"row {index}, column {self._column!r}, holds no picture: remove the row")
        return to_tensor(picture, self.image_size, self.channels)


def _as_picture(value: Any) -> Image.Image | None:
    """The picture that a cell of a table holds, or None."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return Image.open(io.BytesIO(value["bytes"]))
    if isinstance(value, dict) and isinstance(value.get("path"), str):
        return Image.open(value["path"])
    pixels = np.asarray(value)
    is_picture = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    return Image.fromarray(pixels.astype(np.uint8)) if is_picture and pixels.dtype.kind in "ui" else None


class Fake(Images):
    """Uniform noise; picture i is the same in every run."""

    def __len__(self) -> int:
        return FAKE_IMAGES

    def __getitem__(self, index: int) -> Tensor:
        stream = torch.Generator().manual_seed(index)
        return torch.rand(self.channels, self.image_size, self.image_size, generator=stream) * 2.0 - 1.0


def _load_hub(name: str, dataroot: Path) -> Sequence[dict[str, Any]]:
    """Loads the train split with Hugging Face `datasets`; a local folder or .parquet file wins over the hub's name."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("--dataset hub: needs the package datasets: pip install datasets") from error
    local = dataroot / name
    try:
        if local.is_file():
            return datasets.load_dataset("parquet", data_files=str(local), split="train")
        return datasets.load_dataset(str(local) if local.is_dir() else name, split="train")
    except Exception as error:  # what it raises for a wrong name, a missing split, no network differs by release
        remedy = "check the name, that it has a train split, and the network"
        raise DataError(f"--dataset hub:{name} cannot be loaded ({error}): {remedy}") from error


def load_images(spec: str, *, dataroot: Path, image_size: int, channels: int | None) -> Images:
    """Makes the dataset that `--dataset` names.

    Args:
        spec: digits, folder:PATH, hub:NAME or fake.
        dataroot: What a relative PATH starts from.
        image_size: Height and width of the tensors.
        channels: 1, 3, or None for the dataset's own (digits 1, the others 3).

    Returns:
        A map-style dataset of FP32 tensors (channels, image_size, image_size) in [-1, 1].

    Raises:
        DataError: An unknown name, a missing or empty folder, a missing package.
    """
    kind, _, name = spec.partition(":")
    if kind == "digits" and not name:
        return Digits(image_size, channels or 1)
    if kind == "fake" and not name:
        return Fake(image_size, channels or 3)
    if kind == "folder" and name:
        return Folder(dataroot / name, image_size, channels or 3)
    if kind == "hub" and name:
        return Table(_load_hub(name, dataroot), image_size, channels or 3, name)
    raise DataError(f"--dataset {spec} is unknown: use digits, folder:PATH, hub:NAME or fake")


class BatchOrder(Sampler[list[int]]):
    """The batches of iterations start..stop-1, straight through the epochs; the last short batch is dropped.

    Epoch e's order depends on (seed, e) alone, so a run resumed at any iteration sees what it would have seen,
    and a checkpoint needs no more than the iteration's number. Of several processes each takes its share of a batch.
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, start: int, stop: int, ranks: Ranks | None = None
    ) -> None:
        self.per_epoch = self.batches_per_epoch(images, batch_size)
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._start, self._stop = start, stop
        self._ranks = ranks or Ranks()

    @staticmethod
    def batches_per_epoch(images: int, batch_size: int) -> int:
        """Full batches in an epoch.

        Raises:
            DataError: The dataset has less than one batch.
        """
        if images < batch_size:
            raise DataError(
                f"--batchSize {batch_size} is more than the dataset's {images} pictures: use {images} or less"
            )
        return images // batch_size

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[list[int]]:
        order: list[int] = []
        for iteration in range(self._start, self._stop):
            epoch, batch = divmod(iteration, self.per_epoch)
            if batch == 0 or not order:
                order = self._epoch_order(epoch)
            yield list(self._ranks.share(order[batch * self._batch_size : (batch + 1) * self._batch_size]))

    def _epoch_order(self, epoch: int) -> list[int]:
        # The CPU generator keeps 32 bits of its seed: mix both numbers into those.
        stream = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch + 1) % 2**32)
        return torch.randperm(self._images, generator=stream).tolist()
