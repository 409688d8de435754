"""DCGAN's command line. The options are those of PyTorch's and apex's DCGAN, and the engines'."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from dcgan_engines import ENGINES
from dcgan_model import MIN_IMAGE_SIZE
from dcgan_ranks import Ranks


class OptionError(ValueError):
    """Options that do not go together; the message says what to do."""


def _between(kind: type[int] | type[float], low: float, high: float, wanted: str) -> Callable[[str], float]:
    """An argparse type: a number from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not low <= value <= high:  # NaN too
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}: give {wanted}")
        return value

    return parse


_count = _between(int, 1, 2**31, "a whole number from 1 up")


def _image_size(text: str) -> int:
    size = int(text) if text.isdecimal() else 0
    if size < MIN_IMAGE_SIZE or size & (size - 1):
        raise argparse.ArgumentTypeError(f"{text} is not a power of two from {MIN_IMAGE_SIZE} up: use 16, 32, 64 ...")
    return size


def parser(description: str) -> argparse.ArgumentParser:
    """Makes the parser; the description's first line heads the help and the rest ends it."""
    summary, _, epilog = description.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    cli = argparse.ArgumentParser(description=summary, epilog=epilog, formatter_class=formatter, allow_abbrev=False)
    _add_data(cli.add_argument_group("data"))
    _add_networks(cli.add_argument_group("networks"))
    _add_training(cli.add_argument_group("training"))
    _add_engine(cli.add_argument_group("engine"))
    _add_output(cli.add_argument_group("output"))
    return cli


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    workers = _between(int, 0, 1024, "a whole number from 0 to 1024")
    batch = _between(int, 2, 2**31, "a whole number from 2 up (BatchNorm needs two pictures)")
    add("--dataset", default="digits", help="digits | folder:PATH | hub:NAME | fake (default: digits)")
    add("--dataroot", type=Path, default=Path("."), help="where a relative PATH starts (default: ./)")
    add("--workers", type=workers, default=2, help="processes that read pictures from files (default: 2)")
    add("--batchSize", type=batch, default=64, help="pictures in a batch, of all processes (default: 64)")
    add("--imageSize", type=_image_size, default=64, help="height and width; a power of two from 8 up (default: 64)")
    add("--nc", type=int, choices=(1, 3), help="1 for grey, 3 for colour (default: digits 1, the others 3)")


def _add_networks(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--nz", type=_count, default=100, help="length of the noise vector (default: 100)")
    add("--ngf", type=_count, default=64, help="width of G's last hidden layer (default: 64)")
    add("--ndf", type=_count, default=64, help="width of D's first layer (default: 64)")
    add("--netG", type=Path, metavar="FILE", help="start G from the weights in a checkpoint")
    add("--netD", type=Path, metavar="FILE", help="start D from the weights in a checkpoint")


def _add_training(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    rate = _between(float, 1e-12, 1e6, "a positive number")
    beta = _between(float, 0.0, 1.0 - 1e-9, "a number from 0 to below 1")
    seed = _between(int, 0, 2**31, "a whole number from 0 to 2147483648")
    add("--niter", type=_count, default=25, help="epochs (default: 25)")
    add("--iterations", type=_count, metavar="N", help="train for N iterations, whatever --niter says")
    add("--lr", type=rate, default=2e-4, help="Adam's learning rate (default: 0.0002)")
    add("--beta1", type=beta, default=0.5, help="Adam's beta1 (default: 0.5)")
    add("--manualSeed", type=seed, default=2809, help="of weights, noise and the data's order (default: 2809)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto, cuda where there is one)")


def _add_engine(group: argparse._ArgumentGroup) -> None:
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--engine", choices=tuple(ENGINES), default="mpengine", help="(default: mpengine)")
    choice.add_argument("--compare", action="store_true", help="train with every engine from one seed and compare")
    scale = _between(float, 2.0**-126, 2.0**127, "a positive FP32 number")
    group.add_argument("--init-scale", type=scale, default=65536.0, help="the first loss scale (default: 65536)")
    help_growth = "iterations without an overflow until a scale doubles (default: 2000)"
    group.add_argument("--growth-interval", type=_count, default=2000, metavar="N", help=help_growth)


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    help_log = "iterations between readings of the figures, which wait for the device (default: 10)"
    add("--outf", type=Path, default=Path("out"), help="folder of pictures, tables, checkpoints (default: out)")
    add("--resume", type=Path, metavar="CKPT", help="continue a checkpoint bit for bit, with the same options")
    add("--sample-every", type=_count, default=100, metavar="N", help="iterations between samples (default: 100)")
    add("--log-every", type=_count, default=10, metavar="N", help=help_log)


def check_options(args: argparse.Namespace, ranks: Ranks) -> torch.device:
    """Refuses options that do not go together, or not with so many processes, and chooses the device.

    Raises:
        OptionError: With the remedy.
    """
    if args.compare and args.resume:
        raise OptionError(f"--resume {args.resume} continues one engine: give --engine instead of --compare")
    if args.resume and (args.netG or args.netD):
        raise OptionError(f"--resume {args.resume} brings its own weights: leave --netG and --netD out")
    if ranks.size > 1 and args.compare:
        raise OptionError(
            f"--compare times engines in one process, not in {ranks.size}: give --engine, or start it without torchrun"
        )
    if args.batchSize % ranks.size or args.batchSize < 2 * ranks.size:
        raise OptionError(
            f"--batchSize {args.batchSize} cannot be shared by {ranks.size} processes, two pictures or more for each: "
            f"use a multiple of {ranks.size} from {2 * ranks.size} up"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: torch sees no CUDA device: use --device cpu, or install torch's CUDA build")
    if args.device != "auto":
        return torch.device(args.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resume_command(program: str, argv: Sequence[str], engine: str, folder: Path) -> str:
    """The command line that continues one engine's run from its checkpoint."""
    kept, words = [], iter(argv)
    for word in words:
        option, joined, _ = word.partition("=")
        if option in ("--engine", "--outf", "--resume", "--netG", "--netD"):
            if not joined:
                next(words, None)  # the option's value
        elif option != "--compare":
            kept.append(word)
    own = ["--engine", engine, "--outf", str(folder), "--resume", str(folder / "checkpoint.pt")]
    return shlex.join(["python", program, *kept, *own])
