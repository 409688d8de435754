"""Which loss, at which scale, made each gradient: how the gradients of several losses are kept apart.

Two losses of different scales may not add up in one `.grad`. So every gradient carries a label, and the ledger
of a scaler follows each backward pass of a scaled loss:

```
the pass begins   gradients under another label are set aside, no copy made, and .grad becomes None;
                  what was set aside under this very label comes back, so that autograd adds to it
the pass ends     every .grad that is there belongs to this pass; a parameter that it did not reach gets what
                  was set aside last back into .grad
```

So whenever a parameter has pending gradients, `.grad` holds one of them. That is how `model.zero_grad()`, which
nobody tells us about, is noticed: `.grad` is None or another tensor, and what was set aside is dropped too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from mpengine.kernels import layout
from mpengine.masters import Source


class Label:
    """One value of one loss's scale.

    Attributes:
        loss_id: The loss.
        scale: float32, 0-dim: the scale that scaled the gradients under this label. The scaler moves it to a copy
            before the value changes. None: the gradients are unscaled already.
        counted: Whether an `update()` has dealt with this backward pass already.
    """

    def __init__(self, loss_id: int, scale: Tensor | None, counted: bool = False) -> None:
        self.loss_id = loss_id
        self.scale = scale
        self.counted = counted


Labelled = tuple[Label, Tensor]


_ZEROS = Label(0, None, counted=True)


class _Record:
    """What is known about one parameter's gradients: the label of `.grad`, and those set aside."""

    __slots__ = ("aside", "grad", "label", "param", "version")

    def __init__(self, param: Tensor) -> None:
        self.param = weakref.ref(param)
        self.aside: list[tuple[Label, Tensor]] = []
        self.label: Label | None = None
        self.grad: Callable[[], Tensor | None] = lambda: None
        self.version = 0

    def note(self, grad: Tensor, label: Label) -> None:
        self.label, self.grad, self.version = label, weakref.ref(grad), grad._version


class _Pass:
    """A backward pass under way. An exception in it destroys the last reference, which ends it all the same."""

    def __init__(self, ledger: Ledger, label: Label, task: int) -> None:
        self.ledger, self.label, self.task = ledger, label, task
        self.open = True

    def end(self) -> None:
        if self.open:
            self.open = False
            self.ledger._end(self.label)

    def __del__(self) -> None:
        self.end()


class Ledger:
    """The labels of all gradients of the optimizers that a scaler watches.

    Args:
        several: Whether the scaler has several losses; then every gradient must come from a scaled loss.
        name_of: From a parameter to the name that errors use.
    """

    def __init__(self, several: bool, name_of: Callable[[Tensor], str]) -> None:
        self.several = several
        self.latest: Label | None = None
        self.passes = 0  # backward passes of scaled losses so far
        self._name_of = name_of
        self.optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._consumed: weakref.WeakKeyDictionary[torch.optim.Optimizer, Label] = weakref.WeakKeyDictionary()
        self._records: dict[int, _Record] = {}
        self._pass: Callable[[], _Pass | None] = lambda: None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Follows the gradients of this optimizer's parameters from here on."""
        self.optimizers.add(optimizer)

    def watches(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it does."""
        return optimizer in self.optimizers

    def begin(self, label: Label) -> None:
        """Called by the first node of a scaled loss's backward pass."""
        task = torch._C._current_graph_task_id()
        running = self._pass()
        if running is not None and running.open:
            if running.task == task and running.label is label:
                return
            if running.task == task:
                raise RuntimeError(
                    f"two scaled losses in one backward pass (loss_id {running.label.loss_id} and {label.loss_id}): "
                    "their scales differ, so their sum has no scale. Call backward() on each scaled loss, or add "
                    "the losses first and scale the sum."
                )
            running.end()
        self._check_edits()
        if self.latest is not label or self._records:
            self._set_aside(label)
        self.latest = label
        self.passes += 1
        started = _Pass(self, label, task)
        self._pass = weakref.ref(started)
        engine = torch.autograd.Variable._execution_engine
        # Other callbacks, DistributedDataParallel's among them, write into .grad after ours: look again after them.

        def finish() -> None:
            started.end()
            engine.queue_callback(self._note_versions)

        engine.queue_callback(finish)

    def sources(
        self, optimizer: torch.optim.Optimizer, current: Callable[[int], Label], unscaled_at: int | None
    ) -> list[list[Labelled]]:
        """The pending gradients of each parameter, as (label, gradient) in order of loss_id.

        Args:
            optimizer: A watched optimizer.
            current: From a loss_id to the label of the scale in force.
            unscaled_at: The value of `passes` when `unscale_` was called on this optimizer, if it was.

        Raises:
            RuntimeError: A gradient was edited while others were set aside, was not made by a scaled loss though
                there are several, or waits beside more than `layout.MAX_SOURCES` others.
        """
        self._close_pass()
        self._check_edits()
        default = self._default_label(optimizer, current, unscaled_at)
        return [self._pending(param, default) for param in parameters(optimizer)]

    def consumed(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped: gradients that appear without a scaled pass from here on are new ones."""
        if self.latest is not None:
            self._consumed[optimizer] = self.latest

    def unscaled(self, param: Tensor, label: Label) -> None:
        """`param.grad` has become the unscaled sum of all that was pending."""
        record = self._records.setdefault(id(param), _Record(param))
        record.aside.clear()
        record.note(_grad(param), label)

    def zeroed(self, params: Iterable[Tensor]) -> None:
        """The optimizer zeroed these gradients: what was set aside goes too; a `.grad` of zeros fits any scale."""
        for param in params:
            if param.grad is None:
                self._records.pop(id(param), None)
            else:
                self.unscaled(param, _ZEROS)

    def _default_label(
        self, optimizer: torch.optim.Optimizer, current: Callable[[int], Label], unscaled_at: int | None
    ) -> Label | None:
        """The label of a gradient without a record; None where it is unknown."""
        if unscaled_at == self.passes:
            return Label(0, None, counted=True)  # assigned after unscale_, so unscaled, as torch takes it
        if self.several:
            return None
        latest = self.latest
        if latest is None or (latest.counted and self._consumed.get(optimizer) is latest):
            return current(0)  # assigned by hand since: scaled by today's scale, as torch takes it
        return latest

    def _pending(self, param: Tensor, default: Label | None) -> list[Labelled]:
        if param.grad is None:
            return []
        record = self._records.get(id(param))
        label = record.label if record is not None else default
        if label is None:
            raise RuntimeError(
                f"the gradient of {self._name_of(param)} was not made by a scaled loss, and with several losses its "
                "scale is unknown. Call scaler.scale(loss, loss_id).backward(), edit .grad in place, or assign it "
                "after scaler.unscale_(optimizer)."
            )
        pending = [(label, param.grad), *(record.aside if record is not None else ())]
        if len(pending) > layout.MAX_SOURCES:
            raise RuntimeError(
                f"{len(pending)} losses are pending on {self._name_of(param)}; at most {layout.MAX_SOURCES} may be. "
                "Step or zero the gradients more often, or add losses before scaling them."
            )
        return sorted(pending, key=lambda pair: pair[0].loss_id)

    def _set_aside(self, label: Label) -> None:
        """Leaves in `.grad` only what was made under `label`."""
        default = None if self.several else self.latest or label
        pending = [(param, self._pending(param, default)) for param in self._watched()]  # all errors come first
        for param, labelled in pending:
            record = self._records.get(id(param))
            if not labelled or (record.label if record is not None else default) in (label, _ZEROS):
                continue
            if record is None:
                record = self._records[id(param)] = _Record(param)
            record.aside = [(old, grad) for old, grad in labelled if old is not label]
            if len(record.aside) >= layout.MAX_SOURCES:
                record.aside = _fold(record.aside)
            if _is_bucket_view(_grad(param)):
                record.aside = [(old, grad.clone() if grad is param.grad else grad) for old, grad in record.aside]
            param.grad = next((grad for old, grad in labelled if old is label), None)

    def _end(self, label: Label) -> None:
        """The pass is over, or was broken off by an exception."""
        if self.several:
            for watched in self._watched():
                if watched.grad is not None and id(watched) not in self._records:
                    self._records[id(watched)] = _Record(watched)
        for key, record in list(self._records.items()):
            param = record.param()
            if param is None:
                del self._records[key]
                continue
            if param.grad is not None:
                record.note(param.grad, label)
            elif record.aside:
                old, param.grad = record.aside.pop()
                record.note(_grad(param), old)
            if param.grad is None or (not self.several and not record.aside and record.label is label):
                del self._records[key]

    def _note_versions(self) -> None:
        for record in self._records.values():
            param = record.param()
            if param is not None and param.grad is not None and record.label is not None:
                record.note(param.grad, record.label)

    def _check_edits(self) -> None:
        """Drops what was set aside where the user zeroed `.grad`; refuses an edit that several losses leave unclear."""
        for key, record in list(self._records.items()):
            param = record.param()
            grad = None if param is None else param.grad
            if param is None or grad is None or grad is not record.grad():
                del self._records[key]
            elif record.aside and grad._version != record.version:
                raise RuntimeError(
                    f"the gradient of {self._name_of(param)} was edited while gradients of {len(record.aside) + 1} "
                    "losses are pending on it; an edit of one of them has no clear meaning. To zero all: "
                    "zero_grad(set_to_none=True), or optimizer.zero_grad(). To clip or edit the sum: "
                    "scaler.unscale_(optimizer) first."
                )

    def _close_pass(self) -> None:
        running = self._pass()
        if running is not None:
            running.end()

    def _watched(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers:
            yield from parameters(optimizer)


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """All parameters of an optimizer, group by group."""
    for group in optimizer.param_groups:
        yield from group["params"]


def as_sources(pending: list[Labelled], device: torch.device) -> list[Source]:
    """Labelled gradients as a step reads them."""
    return [
        Source(grad, None if label.scale is None else label.scale.to(device, non_blocking=True), label.loss_id)
        for label, grad in pending
    ]


def _grad(param: Tensor) -> Tensor:
    grad = param.grad
    if grad is None:
        raise RuntimeError("the parameter has no gradient")
    return grad


def _is_bucket_view(grad: Tensor) -> bool:
    """Whether the next backward pass may overwrite this memory (DistributedDataParallel's gradient_as_bucket_view)."""
    if grad.layout is not torch.strided:
        return False
    return grad.untyped_storage().nbytes() > grad.numel() * grad.element_size()


def _fold(aside: list[Labelled]) -> list[Labelled]:
    """Adds up, unscaled and in FP32, the gradients of each loss that waits under several old scales."""
    folded: dict[int, Labelled] = {}
    for label, grad in aside:
        share = grad.float()
        if label.scale is not None:
            share = share * label.scale.double().reciprocal().float().to(grad.device)
        if label.loss_id in folded:
            kept, total = folded[label.loss_id]
            kept.counted = kept.counted and label.counted
            total.add_(share)
        else:
            folded[label.loss_id] = (Label(label.loss_id, None, counted=label.counted), share)
    return list(folded.values())
