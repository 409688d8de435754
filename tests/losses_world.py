"""Two optimizers, several losses, and a model that says what each gradient and each scale should be.

`World` makes every call twice: on the engine, and on a bookkeeping of its own that keeps the gradient of every pass
under the scale that made it, and adds them up in float64. Coefficients are small integers and scales powers of two, so
that sums are exact and the two may be compared for equality.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpengine import GradScaler, MixedPrecisionOptimizer
from tests.scale_model import CLEAN, OVERFLOW, ScaleModel

SIZES = (3, 1, 2)  # elements of each parameter
OWNED = ((0, 1), (2,))  # the parameters of each optimizer
KINDS = ("masters", "watched", "mixed")
READY, UNSCALED, STEPPED = "ready", "unscaled", "stepped"
POLICY = {"init_scale": 8.0, "growth_interval": 2, "min_scale": 0.25, "max_scale": 1024.0}


class Broken(torch.autograd.Function):
    """The identity, whose gradient cannot be computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ZeroDivisionError("broken on purpose")


@dataclass(eq=False)
class Tag:
    """A loss under one value of its scale; None: unscaled already."""

    loss: int
    scale: float | None
    counted: bool = False
    again: Tag | None = None

    def of_pass(self) -> Tag:
        """A pass through a graph that is older than an update counts like any other."""
        if not self.counted:
            return self
        if self.again is None or self.again.counted:
            self.again = Tag(self.loss, self.scale)
        return self.again


ZEROS = Tag(0, None, counted=True)


@dataclass(eq=False)
class Graph:
    tag: Tag
    scaled: Tensor
    coefficients: dict[int, list[float]]
    broken: int | None


@dataclass
class Votes:
    """What an optimizer has said since the last update."""

    stage: str = READY
    consumed: dict[int, list[Tag]] = field(default_factory=dict)
    cast: dict[int, list[Tag | str]] = field(default_factory=dict)  # CLEAN, OVERFLOW, or the old tags that overflowed
    looked: set[int] = field(default_factory=set)  # the losses that overflowed as unscale_ looked
    spoilt: bool = False  # whether what unscale_ found forbids the step
    found: bool = False  # whether unscale_ saw any gradient


class World:
    def __init__(self, kind: str, num_losses: int = 3, **policy: Any) -> None:
        policy = {**POLICY, **policy}
        self.kind = kind
        self.num_losses = num_losses
        self.has_masters = {"masters": (True, True), "watched": (False, False), "mixed": (True, False)}[kind]
        dtypes = [torch.float16 if self.has_masters[o] else torch.float32 for o in (0, 0, 1)]
        self.model = nn.ParameterList([torch.zeros(n, dtype=d) for n, d in zip(SIZES, dtypes, strict=True)])
        self.params = list(self.model)
        self.scaler = GradScaler("cpu", num_losses=num_losses, max_consecutive_skips=None, **policy)
        self.optimizers = [self._optimizer(o) for o in range(len(OWNED))]
        self.scaler.scale(self.params[0].float().sum())
        self.losses = [
            ScaleModel(
                policy["init_scale"],
                interval=policy["growth_interval"],
                floor=policy["min_scale"],
                ceiling=policy["max_scale"],
                patience=policy.get("hysteresis", 1),
            )
            for _ in range(num_losses)
        ]
        self.tags = [Tag(k, self.losses[k].scale) for k in range(num_losses)]
        self.pending: list[dict[Tag, Tensor]] = [{} for _ in SIZES]
        self.votes = [Votes() for _ in OWNED]
        self.edited: set[int] = set()  # parameters edited while several gradients were pending
        self.foreign: set[int] = set()  # parameters whose gradient came from nowhere
        self.arrived: list[tuple[int, Tensor]] = []
        for i, param in enumerate(self.params):
            param.register_hook(lambda grad, i=i: self.arrived.append((i, grad.clone())))

    def _optimizer(self, o: int) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD([self.params[i] for i in OWNED[o]], lr=1.0)
        if self.has_masters[o]:
            return MixedPrecisionOptimizer(optimizer, self.scaler)
        self.scaler.watch(optimizer)
        return optimizer

    def owner(self, i: int) -> int:
        return next(o for o, owned in enumerate(OWNED) if i in owned)

    def masters(self, o: int) -> list[Tensor]:
        optimizer = self.optimizers[o]
        return list(optimizer.master_params()) if self.has_masters[o] else [self.params[i] for i in OWNED[o]]

    # Passes.

    def scale(self, k: int, coefficients: dict[int, list[float]], broken: int | None = None) -> Graph:
        """loss_k = sum of coefficient * parameter; the pass through parameter `broken` raises."""
        terms = []
        for i, values in coefficients.items():
            x = self.params[i].float()
            terms.append(((Broken.apply(x) if i == broken else x) * torch.tensor(values[: SIZES[i]])).sum())
        return Graph(self.tags[k], self.scaler.scale(sum(terms), k), coefficients, broken)

    def backward(self, graph: Graph) -> None:
        """Runs the pass, and expects the error that is due."""
        self._run(graph, lambda: graph.scaled.backward(retain_graph=True))

    def grad(self, graph: Graph) -> None:
        """`torch.autograd.grad`: a pass that leaves `.grad` alone."""
        params = [self.params[i] for i in graph.coefficients]
        before = [dict(pending) for pending in self.pending]
        grads = self._run(
            graph, lambda: torch.autograd.grad(graph.scaled, params, retain_graph=True), accumulates=False
        )
        for i, grad in zip(graph.coefficients, grads or (), strict=grads is not None):
            expected = torch.tensor(graph.coefficients[i][: SIZES[i]]) * graph.tag.scale
            assert torch.equal(grad.float().nan_to_num(7.0), expected.nan_to_num(7.0))
        assert all(set(b) - {ZEROS} <= set(now) for b, now in zip(before, self.pending, strict=True))

    def _run(self, graph: Graph, run: Callable[[], Any], accumulates: bool = True) -> Any:
        self.arrived.clear()
        if self.edited or self.foreign:
            self.refused(run, RuntimeError)
            return None
        result = None
        if graph.broken is None:
            result = run()
        else:
            try:
                run()
            except ZeroDivisionError:
                pass
            else:
                raise AssertionError("the pass should have broken")
        tag = graph.tag.of_pass()
        for pending in self.pending:
            if ZEROS in pending:
                pending[tag] = pending.pop(ZEROS)
        for i, grad in self.arrived if accumulates else ():
            pending = self.pending[i]
            pending[tag] = pending[tag] + grad if tag in pending else grad
        self.check()
        return result

    def refused(self, call: Callable[[], Any], *errors: type[Exception]) -> Exception:
        """Expects one of these errors, and that nothing has changed."""
        before = self.values()
        try:
            call()
        except errors as error:
            assert self.values() == before, "an error came too late"
            return error
        except Exception as error:
            raise AssertionError(f"one of {errors} was due") from error
        raise AssertionError(f"one of {errors} was due")

    def values(self) -> list[Any]:
        tensors = [*self.params, *(p.grad for p in self.params), *self.masters(0), *self.masters(1)]
        return [None if t is None else [str(v) for v in t.tolist()] for t in tensors] + self.scaler.statistics()

    # What the user does to gradients.

    def zero(self, which: str, set_to_none: bool) -> None:
        """`which`: "model", or the number of an optimizer."""
        if which == "model":
            self.model.zero_grad(set_to_none=set_to_none)
            self._zeroed(range(len(SIZES)), set_to_none)
            return
        o = int(which)
        self.optimizers[o].zero_grad(set_to_none=set_to_none)
        if self.has_masters[o] and not set_to_none:
            for i in OWNED[o]:
                if self.pending[i] or i in self.foreign:
                    self.pending[i] = {ZEROS: torch.zeros(SIZES[i])}
            self._forgive(OWNED[o])
        else:
            self._zeroed(OWNED[o], set_to_none)
        self.check()

    def _zeroed(self, params: Iterable[int], set_to_none: bool) -> None:
        for i in params:
            if set_to_none:
                self.pending[i] = {}
                self._forgive([i])
            else:
                self._edit(i, lambda grad: torch.zeros_like(grad))

    def _forgive(self, params: Iterable[int]) -> None:
        self.edited -= set(params)
        self.foreign -= set(params)

    def edit(self, i: int) -> None:
        """Halves `.grad` in place."""
        if self.params[i].grad is not None:
            self.params[i].grad.mul_(0.5)
            self._edit(i, lambda grad: grad * 0.5)

    def _edit(self, i: int, change: Callable[[Tensor], Tensor]) -> None:
        if len(self.pending[i]) > 1:
            self.edited.add(i)
        if ZEROS in self.pending[i] and self.votes[self.owner(i)].stage == UNSCALED:
            self.pending[i] = {Tag(0, None, counted=True): self.pending[i][ZEROS]}  # written by hand now
        for tag, grad in self.pending[i].items():
            self.pending[i][tag] = change(grad)

    def assign(self, i: int) -> None:
        """Puts a new gradient of ones there."""
        self.params[i].grad = torch.ones_like(self.params[i])
        self._forgive([i])
        self.pending[i] = {}
        if self.votes[self.owner(i)].stage == UNSCALED:
            self.pending[i] = {Tag(0, None, counted=True): torch.ones(SIZES[i])}
        else:
            self.foreign.add(i)

    # Steps.

    def unscale(self, o: int) -> None:
        call = lambda: self.scaler.unscale_(self.optimizers[o])  # noqa: E731
        if self.votes[o].stage != READY or self.edited or self.foreign & set(OWNED[o]):
            self.refused(call, RuntimeError)
            return
        totals = self.totals(o)
        call()
        self._unscaled(o)
        for i, master in zip(OWNED[o], self.masters(o), strict=True):
            for grad in (self.params[i].grad, master.grad):
                assert (grad is None) == (totals[i] is None)
                if grad is not None:
                    assert grad.dtype == torch.float32
                    if bool(torch.isfinite(totals[i]).all()):
                        assert grad.double().tolist() == totals[i].tolist()
        self.check()

    def step(self, o: int, by_itself: bool = False) -> None:
        votes, optimizer = self.votes[o], self.optimizers[o]
        owned = [self.pending[i] for i in OWNED[o]]
        call = optimizer.step if by_itself and self.has_masters[o] else lambda: self.scaler.step(optimizer)
        if votes.stage == STEPPED or self.edited or self.foreign & set(OWNED[o]):
            self.refused(call, RuntimeError)
            return
        if self.has_masters[o] and votes.found and not any(owned):
            self._step_on_nothing(o, call)
            return
        looks = self.has_masters[o] or votes.stage == READY or any(t.scale is not None for p in owned for t in p)
        if not (looks and any(owned)) and not (votes.found and not self.has_masters[o]):
            self.refused(call, AssertionError)
            if not self.has_masters[o]:
                votes.stage = UNSCALED  # as torch
            return
        with torch.no_grad():
            for tensor in (*self.masters(o), *(self.params[i] for i in OWNED[o])):
                tensor.zero_()
        totals = self.totals(o)
        call()
        skip = votes.spoilt
        if self.has_masters[o]:
            skip |= bool(self._overflowed(o))
            self._look(o)
        elif looks:
            skip |= bool(self._overflowed(o))
            self._unscaled(o)
        votes.stage = STEPPED
        for i, master in zip(OWNED[o], self.masters(o), strict=True):
            expected = torch.zeros(SIZES[i]) if skip or totals[i] is None else 0.0 - totals[i]
            assert master.tolist() == expected.tolist(), f"parameter {i}: {master.tolist()} is not {expected.tolist()}"
            if self.has_masters[o]:
                assert self.params[i].tolist() == master.half().tolist()
        if self.has_masters[o]:
            assert optimizer.last_step_skipped == skip
        self.check()

    def _step_on_nothing(self, o: int, call: Callable[[], Any]) -> None:
        """What unscale_ has found was dropped since: the step is one in name alone."""
        before = [tensor.tolist() for tensor in (*self.masters(o), *(self.params[i] for i in OWNED[o]))]
        call()
        assert [tensor.tolist() for tensor in (*self.masters(o), *(self.params[i] for i in OWNED[o]))] == before
        self.votes[o].stage = STEPPED
        self.check()

    def totals(self, o: int) -> dict[int, Tensor | None]:
        """The true gradient of each parameter of an optimizer, float64."""
        return {i: self.total(i) for i in OWNED[o]}

    def total(self, i: int) -> Tensor | None:
        if not self.pending[i]:
            return None
        return torch.stack([grad.double() / (tag.scale or 1.0) for tag, grad in self.pending[i].items()]).sum(dim=0)

    def _overflowed(self, o: int) -> set[int]:
        """The losses whose pending gradients are not finite."""
        return {
            tag.loss for i in OWNED[o] for tag, grad in self.pending[i].items() if not bool(torch.isfinite(grad).all())
        }

    def _look(self, o: int) -> set[int]:
        """Casts the votes, and consumes what is pending."""
        votes = self.votes[o]
        overflowed = votes.looked or self._overflowed(o)
        pending = list(dict.fromkeys(tag for i in OWNED[o] for tag in self.pending[i]))
        votes.cast = {}
        for k in range(self.num_losses):
            tags = [*votes.consumed.get(k, []), *(tag for tag in pending if tag.loss == k)]
            if any(not tag.counted for tag in tags):
                votes.cast[k] = [OVERFLOW if k in overflowed else CLEAN]
            elif k in overflowed:
                votes.cast[k] = [tag for tag in tags if tag.scale is not None]
        for tag in pending:
            if tag.scale is not None or not tag.counted:
                votes.consumed.setdefault(tag.loss, []).append(tag)
        return overflowed

    def _unscaled(self, o: int) -> None:
        """All that was pending is one unscaled gradient now."""
        votes = self.votes[o]
        totals = self.totals(o)
        votes.found |= any(self.pending[i] for i in OWNED[o])
        spoilt = bool(self._overflowed(o))
        overflowed = self._look(o)
        votes.looked = {k for k in overflowed if votes.cast.get(k, []) not in ([], [CLEAN])}
        votes.spoilt |= bool(votes.looked) if self.has_masters[o] else spoilt
        for i, total in totals.items():
            if total is not None:
                first = min(tag.loss for tag in self.pending[i])
                self.pending[i] = {Tag(first, None, counted=True): total}
        votes.stage = UNSCALED

    # Updates.

    def update(self, loss_id: int | None = None) -> None:
        losses = range(self.num_losses) if loss_id is None else [loss_id]
        recorded = any(k in votes.consumed for votes in self.votes for k in losses)
        if loss_id is None:
            recorded |= any(votes.consumed or votes.stage == STEPPED or votes.found for votes in self.votes)
        if not recorded:
            self.refused(lambda: self.scaler.update(loss_id=loss_id), AssertionError)
            return
        self.scaler.update(loss_id=loss_id)
        for k in losses:
            self._move(k, [vote for votes in self.votes for vote in votes.cast.get(k, [])])
            consumed = [tag for votes in self.votes for tag in votes.consumed.get(k, [])]
            for tag in consumed:
                tag.counted = True
            if consumed:
                self.tags[k] = Tag(k, self.losses[k].scale)
        self._renew(losses)
        self.check()

    def _move(self, k: int, cast: list[Tag | str]) -> None:
        """One update of one loss. Of overflows under several old scales either may speak."""
        loss = self.losses[k]
        old = [tag.scale <= loss.scale for tag in cast if isinstance(tag, Tag)]
        overflowed = OVERFLOW in cast or (any(old) and all(old))
        if any(old) and not all(old) and not overflowed:
            overflowed = self.scaler.statistics()[k].overflows > loss.overflows
        if overflowed:
            loss.see(OVERFLOW)
        elif CLEAN in cast:
            loss.see(CLEAN)

    def _renew(self, losses: Iterable[int]) -> None:
        for o, votes in enumerate(self.votes):
            for k in losses:
                votes.consumed.pop(k, None)
                votes.cast.pop(k, None)
            if not votes.consumed:
                self.votes[o] = Votes(cast=votes.cast)

    def set_scale(self, value: float, loss_id: int | None = None) -> None:
        self.scaler.update(value, loss_id=loss_id)
        losses = range(self.num_losses) if loss_id is None else [loss_id]
        for k in losses:
            self.losses[k].scale = value
            self.tags[k] = Tag(k, value)
        self._renew(losses)
        self.check()

    def save(self) -> tuple[dict[str, Any], list[ScaleModel]]:
        return self.scaler.state_dict(), copy.deepcopy(self.losses)

    def load(self, saved: tuple[dict[str, Any], list[ScaleModel]]) -> None:
        self.scaler.load_state_dict(saved[0])
        self.losses = copy.deepcopy(saved[1])
        self.tags = [Tag(k, loss.scale) for k, loss in enumerate(self.losses)]
        self.check()

    def check(self) -> None:
        """What can be seen without a step."""
        ours = [(s.scale, s.growth_tracker, s.overflows, s.consecutive_overflows) for s in self.scaler.statistics()]
        assert ours == [(m.scale, m.tracker, m.overflows, m.streak) for m in self.losses]
        for i, param in enumerate(self.params):
            assert (param.grad is not None) == bool(self.pending[i] or i in self.foreign), f"parameter {i}"
            if self.pending[i] and not self.edited and not math.isnan(float(param.grad.sum())):
                shown = param.grad.double().tolist()
                assert shown in [grad.double().tolist() for grad in self.pending[i].values()], f"parameter {i}"
