"""apex's semantics in plain Python and float64, run beside `mpengine.amp`: what every scale and weight should be.

Every loss is linear in the weights, its coefficients are small integers, scales and learning rates are powers of two:
every gradient is exact in fp16 at every scale that occurs, unless it overflows, and so is every sum of them. SGD's
steps are then exact in FP32, and weights are compared for equality; Adam's lie within the bound of `tests.oracle`.

```
scale_loss(k, listed)   the new gradients of loss k on the listed optimizers are checked when the context ends
    overflow            scale[k] /= 2, not below min; unskipped[k] = 0; the listed optimizers' next step is skipped
    clean               unskipped[k] += 1; at 2000: scale[k] *= 2, not beyond max; unskipped[k] = 0
delay_unscale           they are checked with those of the next pass, or before a step that needs them
delay_overflow_check    the overflow is found, and the scale stays
step(o)                 skipped where an overflow was found, or where what is pending is not finite
zeroing                 drops what is pending, and with it what was found
```
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpengine import amp
from tests.oracle import Oracle

UNIT = 2.0**-6  # a factor of every loss, so that the gradient of a loss of scale 2^16 fits into fp16
BIG = 2.0**8  # a coefficient whose gradient overflows fp16 at scales of 2^14 and more
WINDOW = 2000
SIZES = (3, 2, 2)  # linear.weight, norm.weight, norm.bias
FP16_COMPUTED = {"O0": (), "O1": (0,), "O2": (0,), "O3": (0, 1, 2)}  # the parameters whose gradients pass through fp16
HALVES = {"O0": (), "O1": (), "O2": (0,), "O3": (0, 1, 2)}  # the parameters that are fp16
SMOOTH = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.25, momentum=0.5),
    "adam": lambda params: torch.optim.Adam(params, lr=0.125),
}


class Net(nn.Module):
    """A matrix, fp16 from O2 on, and a norm layer, FP32 but at O3."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.Linear(3, 1, bias=False)
        self.norm = nn.LayerNorm(2, eps=0.0)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randint(-8, 9, param.shape, generator=generator) / 8)

    def forward(self, x: Tensor, tilt: Tensor) -> tuple[Tensor, Tensor]:
        """d/dw = x, d/d norm.weight = (1, -1) * tilt, d/d norm.bias = tilt."""
        signs = torch.tensor([[2.0, -2.0]]).to(tilt.dtype)
        return self.linear(x), self.norm(signs) * tilt


class Nets(nn.Module):
    """Several in one model."""

    def __init__(self, nets: Iterable[Net]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, which: int, x: Tensor, tilt: Tensor) -> tuple[Tensor, Tensor]:
        return self.nets[which](x, tilt)


@dataclass
class LossScaler:
    """apex's; an overflow of a static scale starts the count again, for ours skips there, too."""

    scale: float = 2.0**16
    dynamic: bool = True
    floor: float = 2.0**-126
    ceiling: float = 2.0**24
    unskipped: int = 0

    def update(self, overflow: bool) -> None:
        if overflow:
            self.unskipped = 0
            if self.dynamic:
                self.scale = max(self.floor, self.scale / 2)
            return
        self.unskipped += 1
        if self.unskipped == WINDOW and self.dynamic:
            self.scale = min(self.ceiling, self.scale * 2)
            self.unskipped = 0


@dataclass
class Trained:
    """What should be true of one optimizer: its weights, the sums pending on each parameter, and what was found.

    `unchecked` has, for each loss with passes that nobody has checked, whether one of them has overflowed here.
    `unscaled`: nothing has been added since the gradients were unscaled; whatever a script makes of an inf after that,
    it was found.
    """

    exact: Oracle
    pending: list[np.ndarray | None] = field(default_factory=lambda: [None] * len(SIZES))
    unchecked: dict[int, bool] = field(default_factory=dict)
    unscaled: bool = False
    found: bool = False

    def overflowed(self) -> bool:
        return any(grad is not None and not np.isfinite(grad).all() for grad in self.pending)

    def step(self, group: dict[str, Any]) -> None:
        """SGD or Adam on the true gradients, unless skipped."""
        skip, self.found = self.found or self.overflowed(), False
        if not skip:
            self.exact.step([None if g is None else torch.from_numpy(g).float() for g in self.pending], group)

    def zero(self, set_to_none: bool) -> None:
        self.found = False
        self.pending = [None if g is None or set_to_none else np.zeros_like(g) for g in self.pending]
        self.unchecked.clear()


@dataclass(frozen=True)
class Spoilt:
    """The gradient of one parameter of one optimizer becomes inf or NaN, or grows beyond fp16 (BIG) by itself."""

    optimizer: int
    param: int
    value: float = math.inf


class World:
    """Models, optimizers and `amp`, and beside them what should become of them.

    Args:
        level: The opt_level.
        optimizers: How many, each over the parameters of one `Net`.
        num_losses: amp.initialize's.
        kind: A name in `SMOOTH`, or "plain": SGD without momentum, exact for as many steps as one likes.
        together: Whether the nets are one model.
        kwargs: For amp.initialize.
    """

    def __init__(
        self,
        level: str,
        optimizers: int = 1,
        num_losses: int = 1,
        kind: str = "sgd",
        together: bool = False,
        **kwargs: Any,
    ) -> None:
        self.level, self.kind, self.together = level, kind, together
        self.count, self.num_losses, self.kwargs = optimizers, num_losses, kwargs
        self._make()
        default = "dynamic" if level in ("O1", "O2") else 1.0
        chosen = kwargs.get("loss_scale") or default
        dynamic = chosen == "dynamic"
        ceiling = kwargs.get("max_loss_scale", 2.0**24)
        self.scalers = [
            LossScaler(
                scale=min(2.0**16, ceiling) if dynamic else float(chosen),
                dynamic=dynamic,
                floor=kwargs.get("min_loss_scale") or 2.0**-126,
                ceiling=ceiling,
            )
            for _ in range(num_losses)
        ]
        self.trained = [
            Trained(Oracle(list(Net(o).parameters()), "adam" if kind == "adam" else "sgd")) for o in range(optimizers)
        ]

    def _make(self) -> None:
        """New models and optimizers, as at the start of a script."""
        self.nets = [Net(seed) for seed in range(self.count)]
        make = SMOOTH.get(self.kind, lambda params: torch.optim.SGD(params, lr=0.25))
        optimizers = [make(list(net.parameters())) for net in self.nets]
        self.models = [Nets(self.nets)] if self.together else list(self.nets)
        models, optimizers = amp.initialize(
            self.models[0] if len(self.models) == 1 else self.models,
            optimizers[0] if self.count == 1 else optimizers,
            opt_level=self.level,
            num_losses=self.num_losses,
            verbosity=0,
            **self.kwargs,
        )
        self.models = models if isinstance(models, list) else [models]
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.spoilt: Spoilt | None = None
        for o, net in enumerate(self.nets):
            for i, param in enumerate(net.parameters()):
                param.register_hook(lambda grad, o=o, i=i: self._spoil(grad, o, i))

    def _spoil(self, grad: Tensor, o: int, i: int) -> Tensor | None:
        spoilt = self.spoilt
        if spoilt is None or (spoilt.optimizer, spoilt.param) != (o, i) or math.isfinite(spoilt.value):
            return None
        grad = grad.clone()
        grad.view(-1)[-1] = spoilt.value
        return grad

    # Backward passes.

    def loss(self, reach: Sequence[int], x: Sequence[float], tilt: Sequence[float]) -> Tensor:
        """A loss linear in the weights of the nets that it reaches, float32."""
        total = torch.zeros(())
        for o in reach:
            scale = 2.0 if o else 1.0  # each net has gradients of its own
            inputs = torch.tensor([[scale * v for v in x]]), torch.tensor([[scale * v for v in tilt]])
            if self.spoilt == Spoilt(o, 0, BIG):
                inputs = inputs[0] * BIG, inputs[1]
            outputs = self.models[0](o, *inputs) if self.together else self.models[o](*inputs)
            total = total + sum(output.sum() for output in outputs)
        return total * UNIT

    def gradients(self, o: int, scale: float, x: Sequence[float], tilt: Sequence[float]) -> list[np.ndarray]:
        """The true gradient of each parameter; inf or NaN where it is not finite under `scale`."""
        factor = UNIT * (2.0 if o else 1.0)
        parts = [np.array(x) * factor, np.array(tilt) * [factor, -factor], np.array(tilt) * factor]
        if self.spoilt is not None and self.spoilt.optimizer == o:
            if self.spoilt.value == BIG:
                parts[0] = parts[0] * BIG
            else:
                parts[self.spoilt.param][-1] = self.spoilt.value
        with np.errstate(over="ignore"):
            for i in FP16_COMPUTED[self.level]:
                scaled = (parts[i] * scale).astype(np.float16)
                parts[i] = np.where(np.isinf(scaled), scaled, parts[i])
        return parts

    def backward(
        self,
        k: int,
        reach: Sequence[int],
        listed: Sequence[int],
        spoilt: Spoilt | None = None,
        x: Sequence[float] = (1.0, -2.0, 3.0),
        tilt: Sequence[float] = (1.0, 2.0),
        **kwargs: Any,
    ) -> None:
        """One `scale_loss` of loss k."""
        optimizers = [self.optimizers[o] for o in listed]
        self.spoilt = spoilt
        with amp.scale_loss(
            self.loss(reach, x, tilt), optimizers[0] if len(optimizers) == 1 else optimizers, loss_id=k, **kwargs
        ) as scaled:
            scaled.backward()
        for o in reach:
            self._add(o, k, self.gradients(o, self.scalers[k].scale, x, tilt))
        self.spoilt = None
        if not kwargs.get("delay_unscale"):
            self._check(k, listed, moves_scale=not kwargs.get("delay_overflow_check"))
            for o in listed if not HALVES[self.level] else ():
                self._unscale(o)  # FP32 gradients at once
        self.check_scales()

    def _add(self, o: int, k: int, parts: list[np.ndarray]) -> None:
        trained = self.trained[o]
        trained.unscaled = False
        for i, part in enumerate(parts):
            old = trained.pending[i]
            with np.errstate(invalid="ignore"):  # inf - inf
                trained.pending[i] = part if old is None else old + part
        overflow = any(not np.isfinite(part).all() for part in parts)
        trained.unchecked[k] = trained.unchecked.get(k, False) or overflow

    def _check(self, k: int, listed: Sequence[int], moves_scale: bool = True) -> None:
        overflow = any([self.trained[o].unchecked.get(k, False) for o in listed])
        if moves_scale:
            self.scalers[k].update(overflow)
        for o in listed:
            self.trained[o].found |= overflow
        for trained in self.trained:  # a pass counts once, whomever else it has reached
            trained.unchecked.pop(k, None)

    def _check_rest(self, o: int) -> None:
        """What nobody has checked is checked now, on every optimizer that it has reached."""
        for k in sorted(self.trained[o].unchecked):
            self._check(k, [p for p in range(self.count) if k in self.trained[p].unchecked])

    def _unscale(self, o: int) -> None:
        self._check_rest(o)
        trained = self.trained[o]
        trained.found |= trained.overflowed() and not trained.unscaled
        trained.unscaled = True

    def broken(self, k: int, reach: Sequence[int], listed: Sequence[int], after_backward: bool) -> None:
        """An exception inside of the context: as though it had never been entered."""
        if any(k in trained.unchecked for trained in self.trained):
            after_backward = False  # what a pass has added to delayed ones stays
        loss = self.loss(reach, (1.0, 1.0, 1.0), (1.0, 1.0))
        optimizers = [self.optimizers[o] for o in listed]
        try:
            with amp.scale_loss(loss, optimizers, loss_id=k) as scaled:
                if after_backward:
                    scaled.backward()
                raise ZeroDivisionError("broken on purpose")
        except ZeroDivisionError:
            pass
        self.check_scales()
        for o in range(self.count):
            self.look(o)

    # What a script does besides.

    def zero(self, who: str = "model", set_to_none: bool = True, which: Iterable[int] | None = None) -> None:
        """`model.zero_grad()` or `optimizer.zero_grad()`; `which`: of these optimizers' parameters.

        A skip that is due goes with the gradients; where the model zeroes them in place, at the next pass, and a step
        before that is skipped, as in apex. Those are zeroed by the optimizer here.
        """
        which = range(self.count) if which is None else which
        for o in which:
            unseen = self.trained[o].found and not set_to_none
            zeroed = self.nets[o] if who == "model" and not unseen else self.optimizers[o]
            zeroed.zero_grad(set_to_none=set_to_none)
            self.trained[o].zero(set_to_none)

    def step(self, o: int) -> None:
        self.optimizers[o].step()
        self._check_rest(o)
        self.trained[o].step(self.optimizers[o].param_groups[0])
        self.check_weights(o)

    def masters(self, o: int) -> list[Tensor]:
        return list(self.optimizers[o].master_params())  # amp's would unscale

    def look(self, o: int) -> None:
        """`amp.master_params`: what is pending is there, unscaled and FP32."""
        masters = list(amp.master_params(self.optimizers[o]))
        self._unscale(o)
        self.check_scales()
        for master, expected in zip(masters, self.trained[o].pending, strict=True):
            assert (master.grad is None) == (expected is None)
            if expected is not None:
                assert master.grad.dtype == torch.float32
                actual = master.grad.double().numpy().reshape(-1)
                assert not np.isfinite(actual).all() if not np.isfinite(expected).all() else (actual == expected).all()

    def clip(self, o: int, value: float) -> None:
        """`clip_grad_value_` on the masters, which is exact."""
        self.look(o)
        if all(grad is None for grad in self.trained[o].pending):
            return  # torch refuses to clip nothing
        torch.nn.utils.clip_grad_value_(amp.master_params(self.optimizers[o]), value, foreach=False)
        trained = self.trained[o]
        trained.pending = [None if g is None else np.clip(g, -value, value) for g in trained.pending]

    # Checks.

    def check_scales(self) -> None:
        expected = {
            f"loss_scaler{k}": {"loss_scale": scaler.scale, "unskipped": scaler.unskipped}
            for k, scaler in enumerate(self.scalers)
        }
        assert amp.state_dict() == expected

    def check_weights(self, o: int) -> None:
        exact, masters = self.trained[o].exact, self.masters(o)
        if self.kind == "adam":
            assert exact.distance(masters, 0) <= 1.0
        else:
            assert np.concatenate([m.detach().double().numpy().reshape(-1) for m in masters]).tolist() == (
                exact.p.value.tolist()
            )
        for i, (param, master) in enumerate(zip(self.nets[o].parameters(), masters, strict=True)):
            assert param.dtype == (torch.float16 if i in HALVES[self.level] else torch.float32)
            assert torch.equal(param, master.to(param.dtype))

    def check(self) -> None:
        self.check_scales()
        for o in range(self.count):
            self.check_weights(o)

    # Saving and loading.

    def resume(self, order: Sequence[str] = ("model", "optimizer", "amp")) -> None:
        """Everything through a file into a fresh set of objects; pending gradients are lost."""
        stream = io.BytesIO()
        torch.save(self.saved(), stream)
        stream.seek(0)
        self._make()
        self.load(torch.load(stream, weights_only=True), order)
        for trained in self.trained:
            trained.zero(set_to_none=True)
        self.check()

    def saved(self) -> dict[str, Any]:
        return {
            "model": [model.state_dict() for model in self.models],
            "optimizer": [optimizer.state_dict() for optimizer in self.optimizers],
            "amp": amp.state_dict(),
        }

    def load(self, saved: dict[str, Any], order: Sequence[str]) -> None:
        loads: dict[str, Callable[[], None]] = {
            "model": lambda: self._load_each(self.models, saved["model"]),
            "optimizer": lambda: self._load_each(self.optimizers, saved["optimizer"]),
            "amp": lambda: amp.load_state_dict(saved["amp"]),
        }
        for name in order:
            loads[name]()

    @staticmethod
    def _load_each(objects: list[Any], states: list[Any]) -> None:
        for each, state in zip(objects, states, strict=True):
            each.load_state_dict(state)

    def set_unskipped(self, value: int) -> None:
        """So many clean passes have come already."""
        for scaler in self.scalers:
            scaler.unskipped = value
        amp.load_state_dict(
            {f"loss_scaler{k}": {"loss_scale": s.scale, "unskipped": value} for k, s in enumerate(self.scalers)}
        )
        self.check_scales()
