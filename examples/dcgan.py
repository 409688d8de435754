"""Trains a DCGAN in mixed precision: three losses, two optimizers, each loss with its own dynamic scale.

Examples:
  python examples/dcgan.py --imageSize 16 --nz 4 --ngf 24 --ndf 12 --lr 5e-4 --iterations 800
  python examples/dcgan.py --dataset hub:cifar10 --imageSize 32 --device cuda
  python examples/dcgan.py --dataset folder:photos --engine torch-amp
  python examples/dcgan.py --compare --imageSize 16 --nz 4 --ngf 24 --ndf 12 --lr 5e-4 --iterations 800
  torchrun --standalone --nproc-per-node 2 examples/dcgan.py --dataset hub:cifar10 --imageSize 32

--compare trains the same networks on the same data three times, with mpengine, torch.amp and FP32, and puts
figures and pictures side by side.

torchrun starts several processes that share each batch. The first one writes and prints, and its figures are those of
its share. Ctrl-C then ends all at once, without a checkpoint; --resume goes on from that of the last epoch.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Self

import torch
from dcgan_data import BatchOrder, DataError, Images, load_images
from dcgan_engines import ENGINES
from dcgan_history import METRICS, History
from dcgan_options import OptionError, check_options, parser, resume_command
from dcgan_plots import save_comparison, save_grid, save_losses, save_scales
from dcgan_ranks import Ranks, joined, local_device, ranks_of_environment
from dcgan_report import CPU_NOTE, Result, write
from dcgan_trainer import GRID_IMAGES, CheckpointError, Config, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


class Interrupt:
    """Makes the first Ctrl-C a request that the loop honours between two iterations; a second one ends at once."""

    requested = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, _signal: int, _frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _ignore_interrupts(_worker: int) -> None:
    """Ctrl-C reaches the loader's processes too, which must live on until the loop has written its checkpoint.

    A forked process inherits the loop's handler and would survive one Ctrl-C; a spawned one has none.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Run:
    """One engine's training, in its own folder."""

    def __init__(
        self,
        args: argparse.Namespace,
        images: Images,
        device: torch.device,
        engine: str,
        folder: Path,
        ranks: Ranks | None = None,
    ) -> None:
        self.args, self.images, self.folder = args, images, folder
        self.ranks = ranks or Ranks()
        names = ("dataset", "imageSize", "batchSize", "nz", "ngf", "ndf", "lr", "beta1", "manualSeed")
        options = {name: getattr(args, name) for name in (*names, "init_scale", "growth_interval")}
        config = Config(engine=engine, images=len(images), nc=images.channels, **options)
        self.trainer = Trainer(config, device, net_g=args.netG, net_d=args.netD, ranks=self.ranks)
        if args.resume:
            self.trainer.resume(args.resume)
        start = self.trainer.iteration
        self.stop = args.iterations or args.niter * BatchOrder.batches_per_epoch(len(images), args.batchSize)
        if start >= self.stop:
            raise OptionError(f"{args.resume} has done {start} iterations: give --iterations {start + 1} or more")
        self.order = BatchOrder(len(images), args.batchSize, args.manualSeed, start, self.stop, self.ranks)
        if self.ranks.leads:
            folder.mkdir(parents=True, exist_ok=True)

    def train(self, interrupt: Interrupt) -> None:
        """Trains to the end or to the first Ctrl-C; writes a checkpoint every epoch and at the end."""
        trainer = self.trainer
        loader = DataLoader(
            self.images,
            batch_sampler=self.order,
            num_workers=self.args.workers if self.images.decodes else 0,
            pin_memory=trainer.device.type == "cuda",
            worker_init_fn=_ignore_interrupts,
        )
        interval = 0.1 if sys.stderr.isatty() else 20.0  # a log file needs few lines
        shown = {"initial": trainer.iteration, "mininterval": interval, "disable": not self.ranks.leads}
        with tqdm(loader, trainer.engine.name, self.stop, **shown) as bar:
            trainer.timer.restart()
            for batch in bar:
                trainer.train_step(batch)
                self._keep_books(batch, bar, interrupt)
                if interrupt.requested:
                    break

    @property
    def finished(self) -> bool:
        """No iteration is left."""
        return self.trainer.iteration == self.stop

    def _keep_books(self, batch: Tensor, bar: tqdm, interrupt: Interrupt) -> None:
        """What is due after an iteration: figures, pictures, a checkpoint."""
        args, trainer, done = self.args, self.trainer, self.trainer.iteration
        if done % args.log_every == 0 or self.finished:
            trainer.record()
            bar.set_postfix(self._figures(), refresh=False)
        elif trainer.device.type == "cpu":  # on CUDA, reading the scales waits for the device: only with the figures
            trainer.record_scales()
        if self.ranks.leads:
            if done % args.sample_every == 0 or self.finished:
                self._save_pictures(batch)
            if done % self.order.per_epoch == 0 or self.finished or interrupt.requested:
                trainer.save(self.folder / "checkpoint.pt")
        trainer.timer.restart()

    def _figures(self) -> dict[str, str]:
        """What the progress bar shows: the last iteration's metrics and the scales."""
        history, names = self.trainer.history, self.trainer.engine.scale_names
        figures = {name: f"{value:.2f}" for name, value in zip(METRICS, history.metrics[-1].tolist(), strict=True)}
        if names:
            figures["scale"] = "/".join(f"{scale:g}" for scale in history.scale_rows[-1][1 : 1 + len(names)])
        return figures

    def _save_pictures(self, batch: Tensor) -> None:
        """A grid of real pictures, one of generated ones, and the scales so far."""
        trainer = self.trainer
        trainer.record()
        save_grid(batch[:GRID_IMAGES], self.folder / "real_samples.png")
        save_grid(trainer.samples(), self.folder / f"fake_samples_{trainer.iteration:06d}.png")
        if trainer.engine.scale_names:
            save_scales(trainer.history, trainer.engine.scale_names, self.folder / "scales.png")


def _stopped(run: Run, argv: Sequence[str]) -> int:
    """Says how to continue an interrupted run; returns the exit status."""
    trainer = run.trainer
    print(f"\nStopped after iteration {trainer.iteration} of {run.stop}; the checkpoint is written. Continue with:")
    print("  " + resume_command(sys.argv[0], argv, trainer.engine.name, run.folder))
    return INTERRUPTED


def train_one(args: argparse.Namespace, argv: Sequence[str], images: Images, device: torch.device, ranks: Ranks) -> int:
    """Trains with one engine; returns the exit status."""
    interrupt = Interrupt()
    with interrupt if ranks.size == 1 else nullcontext():  # processes that stop apart would wait for each other
        run = Run(args, images, device, args.engine, args.outf, ranks)
        run.train(interrupt)
    if not ranks.leads:
        return 0
    if not run.finished:
        return _stopped(run, argv)
    figures = ", ".join(f"{name} {value:.3f}" for name, value in run.trainer.history.final().items())
    print(f"{run.trainer.iteration} iterations: {figures}\nPictures and checkpoint: {args.outf}")
    return 0


def compare(args: argparse.Namespace, argv: Sequence[str], images: Images, device: torch.device) -> int:
    """Trains with every engine from the same seed, then writes table and pictures; returns the exit status."""
    results: list[Result] = []
    histories: dict[str, History] = {}
    samples = {"real": torch.stack([images[index] for index in range(min(GRID_IMAGES, len(images)))])}
    for engine in ENGINES:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        with Interrupt() as interrupt:
            run = Run(args, images, device, engine, args.outf / engine)
            run.train(interrupt)
        if not run.finished:
            return _stopped(run, argv)
        results.append(Result.of(run.trainer))
        histories[engine] = run.trainer.history
        samples[engine] = run.trainer.samples()
        del run
        gc.collect()  # one engine's tensors must not count in the next one's peak memory
    save_comparison(samples, args.outf / "comparison_samples.png")
    save_losses(histories, args.outf / "comparison_losses.png")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    print("\n" + write(results, options, device, args.outf))
    print(f"Table, pictures and checkpoints: {args.outf}")
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    cli = parser(__doc__ or "")
    args = cli.parse_args(argv)
    ranks = ranks_of_environment()
    try:
        device = local_device(check_options(args, ranks))
        images = load_images(args.dataset, dataroot=args.dataroot, image_size=args.imageSize, channels=args.nc)
        if device.type == "cpu" and (args.compare or args.engine != "fp32") and ranks.leads:
            print(CPU_NOTE)
        if device.type == "cuda":
            torch.backends.cudnn.deterministic = True  # a resumed run must repeat what it would have computed
        if args.compare:
            return compare(args, argv, images, device)
        with joined(ranks, device):
            return train_one(args, argv, images, device, ranks)
    except (OptionError, DataError, CheckpointError) as error:
        cli.error(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
