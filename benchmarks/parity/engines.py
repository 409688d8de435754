"""FP32, torch.amp and mpengine behind one interface, so that a comparison is of the engines alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import mpengine

if TYPE_CHECKING:
    from benchmarks.parity.race import Race

OUTLIER = 2.0**100  # no fp16 gradient of a loss that large is finite
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Engine:
    """Plain FP32 training, and the interface of the others.

    Args:
        networks: With FP32 weights.
        make_optimizer: Makes each network's optimizer.
        num_losses: How many losses are scaled.
        init_scale: What every scale starts from.
        growth_interval: Steps without an overflow until a scale doubles.
        keep_fp32: Layers that mpengine is told to keep in FP32.
    """

    def __init__(
        self,
        networks: list[nn.Module],
        make_optimizer: MakeOptimizer,
        num_losses: int,
        init_scale: float,
        growth_interval: int,
        keep_fp32: tuple[type[nn.Module], ...] = (),
    ) -> None:
        self.networks = networks
        self.num_losses = num_losses
        self.keep_fp32 = keep_fp32
        self.options: dict[str, Any] = {"init_scale": init_scale, "growth_interval": growth_interval}
        self.optimizers: list[Any] = [make_optimizer(network.parameters()) for network in networks]
        self.taken = [0] * len(networks)
        self.outliers: set[int] = set()  # the losses that are to overflow in this iteration
        self.left_out: Sequence[Sequence[bool]] = ()  # [iteration][network]; SameSteps reads it
        for i, optimizer in enumerate(self.optimizers):
            optimizer.register_step_post_hook(self._counter(i))
        self._start()

    def _start(self) -> None:
        """Makes what an engine adds to networks and optimizers."""

    def _counter(self, which: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.taken[which] += 1

        return count

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of every forward pass."""
        return nullcontext()

    def watch(self, race: Race) -> None:
        """Gives a race the scaled gradients of every step."""
        step, update = self.step, self.update

        def step_both(which: int) -> None:
            race.step(which, self.networks[which])
            step(which)

        def update_both() -> None:
            race.update()
            update()

        self.step, self.update = step_both, update_both  # type: ignore[method-assign]

    def zero_grad(self, which: int) -> None:
        """Drops the gradients of one network."""
        self.optimizers[which].zero_grad()

    def backward(self, loss: Tensor, loss_id: int, network: nn.Module | None = None) -> None:
        """Adds the loss's gradients to those of one network, or of all."""
        loss.backward(inputs=None if network is None else list(network.parameters()))

    def step(self, which: int) -> None:
        """Steps one network's optimizer, or skips where its gradients overflowed."""
        self.optimizers[which].step()

    def update(self) -> None:
        """Ends an iteration: the scales grow, wait or back off."""

    def scales(self) -> list[float]:
        """The scales in force now."""
        return []

    def steps_taken(self) -> list[int]:
        """For each network the steps that changed its weights."""
        return list(self.taken)


class SameSteps(Engine):
    """FP32 that leaves out the steps that another engine skipped: what remains of a difference is rounding."""

    iteration = 0

    def step(self, which: int) -> None:
        """Steps, unless the other engine did not."""
        if not self.left_out[self.iteration][which]:
            super().step(which)

    def update(self) -> None:
        """Goes on to the next iteration."""
        self.iteration += 1


class TorchAmp(Engine):
    """torch.amp as its documentation shows it: FP32 weights, autocast, one scale for all losses."""

    def _start(self) -> None:
        self.scaler: Any = torch.amp.GradScaler("cpu", **self.options)

    def autocast(self) -> AbstractContextManager[Any]:
        """fp16 where torch.amp deems it safe."""
        return torch.autocast("cpu", torch.float16)

    def backward(self, loss: Tensor, loss_id: int, network: nn.Module | None = None) -> None:
        """Of the loss times the scale."""
        super().backward(self.scaler.scale(self._inflated(loss, loss_id)), loss_id, network)

    def _inflated(self, loss: Tensor, loss_id: int) -> Tensor:
        return loss * OUTLIER if loss_id in self.outliers else loss

    def step(self, which: int) -> None:
        """Steps, unless a gradient overflowed."""
        self.scaler.step(self.optimizers[which])

    def update(self) -> None:
        """Moves the scale."""
        self.scaler.update()

    def scales(self) -> list[float]:
        """The one scale."""
        return [self.scaler.get_scale()]


class Nudged(TorchAmp):
    """torch.amp that rounds otherwise: after each step one weight in 16 goes to a neighbouring FP32 number.

    What rounding alone does to a run. At that rate the weights drift about as far from torch.amp's as mpengine's do on
    the same gradients.
    """

    stream = 0
    share = 1 / 16

    def _start(self) -> None:
        super()._start()
        self.generator = torch.Generator().manual_seed(self.stream)
        for optimizer in self.optimizers:
            optimizer.register_step_post_hook(self._nudge)

    @torch.no_grad()
    def _nudge(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            chance = torch.rand(param.shape, generator=self.generator)
            neighbour = torch.nextafter(param, torch.where(chance < self.share / 2, torch.inf, -torch.inf))
            param.copy_(torch.where(chance < self.share, neighbour, param))


class NudgedAgain(Nudged):
    """The same with other choices."""

    stream = 1


class Mpengine(TorchAmp):
    """fp16 weights and FP32 masters; one scale, as torch.amp has it."""

    shared = True

    def _start(self) -> None:
        num_losses = 1 if self.shared else self.num_losses
        self.scaler = mpengine.GradScaler("cpu", num_losses=num_losses, **self.options)
        modules = zip(self.networks, self.optimizers, strict=True)
        self.optimizers = [
            mpengine.prepare(network, optimizer, self.scaler, keep_fp32=self.keep_fp32)
            for network, optimizer in modules
        ]

    def backward(self, loss: Tensor, loss_id: int, network: nn.Module | None = None) -> None:
        """Of the loss times its scale."""
        scaled = self.scaler.scale(self._inflated(loss, loss_id), loss_id=0 if self.shared else loss_id)
        Engine.backward(self, scaled, loss_id, network)

    def scales(self) -> list[float]:
        """One for all losses, or one for each."""
        return [record.scale for record in self.scaler.statistics()]

    def steps_taken(self) -> list[int]:
        """As the optimizers count them."""
        return [optimizer.steps_taken for optimizer in self.optimizers]


class MpenginePerLoss(Mpengine):
    """The same with a scale for every loss."""

    shared = False


class MpengineAllHalf(Mpengine):
    """As `prepare` does it unless told otherwise: fp16 embeddings."""

    def _start(self) -> None:
        self.keep_fp32 = ()
        super()._start()


FP32, FP32_ALL, AMP = "fp32", "fp32, no step left out", "torch.amp"
NUDGED, NUDGED_AGAIN = "torch.amp, rounded otherwise", "torch.amp, rounded otherwise again"
MPENGINE, PER_LOSS, ALL_HALF = "mpengine", "mpengine, a scale for each loss", "mpengine, fp16 embeddings"
ENGINES: dict[str, type[Engine]] = {
    FP32: SameSteps,
    FP32_ALL: Engine,
    AMP: TorchAmp,
    NUDGED: Nudged,
    NUDGED_AGAIN: NudgedAgain,
    MPENGINE: Mpengine,
    PER_LOSS: MpenginePerLoss,
    ALL_HALF: MpengineAllHalf,
}
