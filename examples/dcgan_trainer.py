"""One DCGAN run: the networks, the engine that trains them, one iteration of training, and checkpoints."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from dcgan_engines import ENGINES, FAKE, GENERATOR, REAL, Hyperparameters
from dcgan_history import History, LapTimer
from dcgan_model import build_networks
from dcgan_ranks import Ranks
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

CHECKPOINT_FORMAT = 1
GRID_IMAGES = 64


class CheckpointError(ValueError):
    """A checkpoint cannot be used as asked; the message says what to do."""


@dataclass(frozen=True)
class Config:
    """Everything that fixes a run's numbers, named like the options; a resumed run must have the same."""

    engine: str
    dataset: str
    images: int  # in the dataset
    nc: int
    imageSize: int
    batchSize: int
    nz: int
    ngf: int
    ndf: int
    lr: float
    beta1: float
    init_scale: float
    growth_interval: int
    manualSeed: int


def _mean_probability(logits: Tensor) -> Tensor:
    return torch.sigmoid(logits.detach().float()).mean()


def _loss(logits: Tensor, real: bool) -> Tensor:
    """Binary cross-entropy in FP32, whatever the networks computed in."""
    logits = logits.float()
    target = torch.ones_like(logits) if real else torch.zeros_like(logits)
    return binary_cross_entropy_with_logits(logits, target)


class Trainer:
    """The state of a run and what moves it by one iteration.

    From one seed, every engine starts with the same FP32 weights and sees the same noise, drawn on the CPU. Of several
    processes each draws all of it and takes its share.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        net_g: Path | None = None,
        net_d: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.device = device
        self.iteration = 0
        self.net_g, self.net_d = build_networks(
            config.imageSize, config.nc, nz=config.nz, ngf=config.ngf, ndf=config.ndf, seed=config.manualSeed
        )
        for network, path, key in ((self.net_g, net_g, "netG"), (self.net_d, net_d, "netD")):
            if path is not None:
                _load_weights(network, path, key)
            network.to(device)
        hyper = Hyperparameters(config.lr, config.beta1, config.init_scale, config.growth_interval)
        self.engine = ENGINES[config.engine](self.net_d, self.net_g, device, hyper)
        self._averaged_d, self._averaged_g = self.ranks.wrap(self.net_d), self.ranks.wrap(self.net_g)
        self._parameters_d = list(self.net_d.parameters())
        self._parameters_g = list(self.net_g.parameters())
        # Two streams beside the weights' own: the same noise in every engine, and the same test noise in every run.
        self._noise = torch.Generator().manual_seed(config.manualSeed + 1)
        self._fixed_noise = self._draw(GRID_IMAGES, torch.Generator().manual_seed(config.manualSeed + 2))
        self.history = History(self.engine.scales()[0])
        self.timer = LapTimer(device)

    def _draw(self, count: int, stream: torch.Generator) -> Tensor:
        pinned = self.device.type == "cuda"
        noise = torch.randn(count, self.config.nz, 1, 1, generator=stream, pin_memory=pinned)
        return noise.to(self.device, non_blocking=True)

    def train_step(self, images: Tensor) -> None:
        """One iteration on a batch of real pictures; reads nothing back from the device.

        Maximises log D(x) + log(1 - D(G(z))) over D's weights, then log D(G(z)) over G's, as the paper does.
        """
        engine, net_d, net_g = self.engine, self._averaged_d, self._averaged_g
        engine.optimizer_d.zero_grad()
        engine.optimizer_g.zero_grad()
        real = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        noise = self.ranks.share_of(self._draw(len(real) * self.ranks.size, self._noise))

        with engine.autocast():
            real_logits = net_d(real)
        loss_real = _loss(real_logits, real=True)
        engine.backward(loss_real, REAL, self._parameters_d)
        with engine.autocast():
            generated = net_g(noise)
            fake_logits = net_d(generated.detach())
        loss_fake = _loss(fake_logits, real=False)
        engine.backward(loss_fake, FAKE, self._parameters_d)
        engine.step(engine.optimizer_d)

        with engine.autocast():
            fooled_logits = self.net_d(generated)  # D's own gradients of this loss are not wanted: nothing to average
        loss_g = _loss(fooled_logits, real=True)
        engine.backward(loss_g, GENERATOR, self._parameters_g)
        engine.step(engine.optimizer_g)

        engine.update()
        self.iteration += 1
        probabilities = [_mean_probability(logits) for logits in (real_logits, fake_logits, fooled_logits)]
        self.history.add(torch.stack([(loss_real + loss_fake).detach(), loss_g.detach(), *probabilities]))
        self.timer.lap()

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Pictures from the fixed noise, FP32 on the CPU, (64, channels, size, size) in [-1, 1]; changes no state."""
        self.net_g.eval()  # BatchNorm's running statistics, which a forward in training mode would move
        with self.engine.autocast():
            images = self.net_g(self._fixed_noise)
        self.net_g.train()
        return images.float().cpu()

    def record(self) -> None:
        """Reads metrics, times and scales back; waits for the device."""
        self.history.flush()
        self.history.seconds.extend(self.timer.drain())
        self.record_scales()

    def record_scales(self) -> None:
        """Reads the scales back, at most once an iteration; waits for the device."""
        if self.history.scale_rows[-1][0] != self.iteration:
            self.history.add_scales(self.iteration, *self.engine.scales())

    def steps(self) -> dict[str, dict[str, int]]:
        """Steps taken and skipped by each network's optimizer."""
        engine = self.engine
        taken = {"D": engine.steps_taken(engine.optimizer_d), "G": engine.steps_taken(engine.optimizer_g)}
        return {net: {"taken": count, "skipped": self.iteration - count} for net, count in taken.items()}

    def save(self, path: Path) -> None:
        """Writes a checkpoint; a reader sees the old file or the new one, never a part."""
        self.record()
        state = {
            "format": CHECKPOINT_FORMAT,
            "config": asdict(self.config),
            "iteration": self.iteration,  # the data's order follows from it and the seed
            "netD": self.net_d.state_dict(),
            "netG": self.net_g.state_dict(),
            "engine": self.engine.state_dict(),
            "noise": self._noise.get_state(),
            "history": self.history.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def resume(self, path: Path) -> None:
        """Continues where a checkpoint was written, bit for bit.

        Raises:
            CheckpointError: No such file, not a checkpoint of this program, or one of another configuration.
        """
        state = _read_checkpoint(path)
        if state.get("format") != CHECKPOINT_FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of this version: start anew without --resume")
        for name, value in asdict(self.config).items():
            saved = state["config"][name]
            if saved != value:
                option = f"dataset with {saved} images" if name == "images" else f"--{name.replace('_', '-')} {saved}"
                raise CheckpointError(f"{path} was made with {option}, this run has {value}: use the same")
        self.net_d.load_state_dict(state["netD"])
        self.net_g.load_state_dict(state["netG"])
        self.engine.load_state_dict(state["engine"])
        self.history.load_state_dict(state["history"])
        self._noise.set_state(state["noise"])
        self.iteration = state["iteration"]


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: check the path")
    if not zipfile.is_zipfile(path):  # torch.load raises nearly anything for those
        raise CheckpointError(f"{path} was not written by torch.save: choose another file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({error}): choose another file") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint: choose another file")
    return state


def _load_weights(network: torch.nn.Module, path: Path, key: str) -> None:
    """Starts a network from the weights in a checkpoint, or in a file that holds its state_dict alone."""
    state = _read_checkpoint(path)
    try:
        network.load_state_dict(state.get(key, state))
    except RuntimeError as error:
        raise CheckpointError(f"--{key} {path} does not fit this network ({error}): use the same sizes") from error
