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
from itertools import chain

import torch
from torch import Tensor

from mpengine import distributed
from mpengine.kernels import layout
from mpengine.labels import UNSCALED, ZEROS, Label, Labelled, Pending, Record, Snapshot
from mpengine.sources import Source


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

    Attributes:
        zeros_drop: Whether `.grad` that somebody has set to zeros in place, as `model.zero_grad(set_to_none=False)`
            does, drops what else was pending on its parameter; else such an edit is refused like any other. Zeros that
            a pass does not reach are then nobody's; else they are that pass's.
        refuses_replaced: Whether another tensor in the place of a pending, scaled `.grad` is an error; else it is a
            gradient without a record.
    """

    def __init__(self, several: bool, name_of: Callable[[Tensor], str]) -> None:
        self.several = several
        self.zeros_drop = False
        self.refuses_replaced = False
        self.latest: Label | None = None
        self.passes = 0  # backward passes of scaled losses so far
        self._name_of = name_of
        self.optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        # At which pass a scale last changed, and the label of what is assigned by hand: UNSCALED between unscale_ and
        # step; None: the label in force up to the next pass, then that pass's.
        self._by_hand: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, Label | None]]
        self._by_hand = weakref.WeakKeyDictionary()
        self._records: dict[int, Record] = {}
        self._snapshots: weakref.WeakKeyDictionary[torch.optim.Optimizer, Snapshot] = weakref.WeakKeyDictionary()
        self._pass: Callable[[], _Pass | None] = lambda: None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Follows the gradients of this optimizer's parameters from here on."""
        self.optimizers.add(optimizer)

    def watches(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it does."""
        return optimizer in self.optimizers

    def label_others(self, optimizer: torch.optim.Optimizer, label: Label) -> None:
        """From now on a gradient of this optimizer that no scaled loss has made is under `label`."""
        self._by_hand[optimizer] = (self.passes, label)

    def begin(self, label: Label) -> None:
        """Called by the first node of a scaled loss's backward pass."""
        label = label.of_pass()
        task = torch._C._current_graph_task_id()
        running = self._pass()
        if running is not None and running.open:
            if running.task == task and running.label is label:
                return
            running.end()  # not when it is collected: the traceback of this error may keep it for long
            if running.task == task:
                raise RuntimeError(
                    f"two scaled losses in one backward pass (loss_id {running.label.loss_id} and {label.loss_id}): "
                    "their scales differ, so their sum has no scale. Call backward() on each scaled loss, or add "
                    "the losses first and scale the sum."
                )
        self._expand()
        self._check_edits()
        if self.latest is not label or self._records or self._all_recorded():
            self._set_aside(label)
        self.latest = label
        self.passes += 1
        started = _Pass(self, label, task)
        self._pass = weakref.ref(started)
        distributed.call_last(started.end)

    def sources(self, optimizer: torch.optim.Optimizer, current: Label) -> Pending:
        """The pending gradients of each parameter, as (label, gradient) in order of loss_id.

        Args:
            optimizer: A watched optimizer.
            current: The label in force of loss 0.

        Raises:
            RuntimeError: A gradient was edited while others were set aside, was not made by a scaled loss though
                there are several, or waits beside more than `layout.MAX_SOURCES` others.
        """
        pending = self.peek(optimizer, current)
        if pending.column is None:
            self._check_averaged(optimizer, pending)
        return pending

    def peek(self, optimizer: torch.optim.Optimizer, current: Label) -> Pending:
        """What `sources` gives, also while DistributedDataParallel has yet to average a part of it."""
        self._close_pass()
        self._expand()
        default = self._default_label(optimizer, current)
        if not self._records and default is not None:
            return Pending(grads=[param.grad for param in parameters(optimizer)], label=default)
        self._check_edits()
        return Pending([self._pending(param, default) for param in parameters(optimizer)])

    def unscaled(self, optimizer: torch.optim.Optimizer, pending: Pending, own_memory: bool = False) -> None:
        """Every `.grad` has become the unscaled sum of what was pending, in memory of its own or in the old one."""
        for param, labelled in zip(parameters(optimizer), pending, strict=True):
            if labelled and param.grad is not None:
                label = Label(labelled[0][0].loss_id, None, counted=True, own_memory=own_memory)
                record = self._record(param)
                local = record.local or bool(record.local_aside)  # what was pending is all averaged, or all local
                self._forget_aside(param).note(param.grad, label)
                record.local = local
        at, _ = self._by_hand.get(optimizer, (0, None))
        self._by_hand[optimizer] = (at, UNSCALED)

    def settle(self, current: Label, stepped: Iterable[torch.optim.Optimizer]) -> None:
        """A scale is about to change: gradients without a record get one now, those that appear later are new.

        Args:
            current: The label of loss 0 that is still in force.
            stepped: The optimizers whose gradients are spent.
        """
        spent = set(map(id, stepped))
        local = distributed.unsynchronised()
        if self._snapshots:
            self._expand()
        for optimizer in self.optimizers:
            default = self._default_label(optimizer, current)
            if self._records or default is None:
                self._record_all(optimizer, default, id(optimizer) in spent)
            else:
                self._snapshots[optimizer] = Snapshot(
                    list(parameters(optimizer)), default, id(optimizer) in spent, local
                )
            _, by_hand = self._by_hand.get(optimizer, (0, None))
            self._by_hand[optimizer] = (self.passes, by_hand)

    def renewed(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped: what is assigned by hand from here on is scaled again."""
        at, by_hand = self._by_hand.get(optimizer, (0, None))
        if by_hand is not None:
            self._expand()
            self._record_all(optimizer, by_hand, spent=True)
            self._by_hand[optimizer] = (at, None)

    def _expand(self) -> None:
        """Turns what was noted of many gradients at once into records of those that are still there."""
        if self._snapshots:
            for snapshot in self._snapshots.values():
                self._records.update(snapshot.records())
            self._snapshots.clear()

    def _record_all(self, optimizer: torch.optim.Optimizer, default: Label | None, spent: bool) -> None:
        """Gives every gradient a record, where `default` says what those without one are."""
        local = distributed.unsynchronised()
        for param in parameters(optimizer) if default is not None else ():
            grad = param.grad
            if grad is None:
                continue
            record, label = self._records.get(id(param)), default
            if record is None or not record.holds(param, grad):
                record = self._records[id(param)] = Record(param)
                record.local = id(param) in local
            elif record.aside:
                continue
            else:
                label = self._label_of(param, default)
            if label is not None:
                record.note(grad, label, spent)

    def zeroed(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer zeroed its gradients: what was set aside goes too; a `.grad` of zeros fits any scale."""
        self._expand()
        for param in parameters(optimizer):
            if param.grad is None:
                self._records.pop(id(param), None)
            else:
                if param.grad.dtype != param.dtype:  # left by unscale_; DistributedDataParallel refuses to add to it
                    param.grad = torch.zeros_like(param)
                self._forget_aside(param).note(param.grad, ZEROS, spent=True)

    def dropped(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer set all of its gradients to None."""
        self._snapshots.pop(optimizer, None)
        if self._records:
            for param in parameters(optimizer):
                self._records.pop(id(param), None)

    def discard(self, loss_id: int) -> None:
        """Drops what a loss has made since its scale last moved, as if it had not been: what was set aside returns."""
        self._close_pass()
        self._expand()
        for key, record in list(self._records.items()):
            param = record.param()
            if param is None or param.grad is None or not record.holds(param, param.grad):
                continue
            record.aside = [(old, grad) for old, grad in record.aside if old.loss_id != loss_id or old.counted]
            if record.label is None or record.label.loss_id != loss_id or record.label.counted:
                continue
            if record.blank:
                param.grad.detach().zero_()
                record.note(param.grad, ZEROS, spent=True)
                continue
            param.grad = None
            if record.aside:
                _restore(param, record)
            else:
                del self._records[key]

    def edited(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether somebody has written a gradient since it was noted, or put another in its place."""
        self._expand()
        for param in parameters(optimizer):
            record, grad = self._records.get(id(param)), param.grad
            if grad is not None and (
                record is None or not record.holds(param, grad) or record.version != grad._version
            ):
                return True
        return False

    def forget_edited(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradients have been stepped: who writes one from here on drops what else was pending on its parameter."""
        self._expand()
        for param in parameters(optimizer):
            record = self._records.get(id(param))
            if record is not None:
                record.spent = True

    def _forget_aside(self, param: Tensor) -> Record:
        record = self._record(param)
        record.forget_aside()
        record.local = False
        return record

    def _record(self, param: Tensor) -> Record:
        record = self._records.get(id(param))
        if record is None or record.param() is not param:
            record = self._records[id(param)] = Record(param)
        return record

    def _default_label(self, optimizer: torch.optim.Optimizer, current: Label) -> Label | None:
        """The label of a gradient without a record; None where it is unknown."""
        at, by_hand = self._by_hand.get(optimizer, (0, None))
        if by_hand is not None:
            return by_hand
        if self.several:
            return None
        return current if at == self.passes else self.latest

    def _all_recorded(self) -> bool:
        """Whether every gradient of a pass needs a record: one without could be something else."""
        return self.several or any(by_hand is not None for _, by_hand in self._by_hand.values())

    def _label_of(self, param: Tensor, default: Label | None) -> Label | None:
        """The label of `.grad`."""
        record = self._records.get(id(param))
        if record is None or param.grad is None:
            return default
        rewritten = record.spent and param.grad._version != record.version
        return default if rewritten and default is not None else record.label

    def _pending(self, param: Tensor, default: Label | None) -> list[Labelled]:
        if param.grad is None:
            return []
        record = self._records.get(id(param))
        label = self._label_of(param, default)
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

    def _check_averaged(self, optimizer: torch.optim.Optimizer, pending: Pending) -> None:
        """Refuses gradients of which DistributedDataParallel averaged a part alone: nothing would average the rest."""
        if not distributed.is_used():
            return
        for param, labelled in zip(parameters(optimizer), pending, strict=True):
            record = self._records.get(id(param))
            local = [label for label, grad in labelled if record is not None and record.is_local(grad)]
            if 0 < len(local) < len(labelled):
                raise RuntimeError(
                    f"the gradient of loss {local[0].loss_id} on {self._name_of(param)} was accumulated under "
                    "no_sync() and set aside when another loss or another scale followed, so it is this rank's alone, "
                    "while others are averaged over all ranks. Let the last backward pass of each loss run outside "
                    "of no_sync(), and call scaler.update() only between whole accumulations; with "
                    "amp.scale_loss, give all but the last delay_unscale=True."
                )

    def _set_aside(self, label: Label) -> None:
        """Leaves in `.grad` only what was made under `label`."""
        pending: list[tuple[Tensor, Label | None, list[Labelled]]] = []
        for optimizer in self.optimizers:  # all errors come first
            default = self._default_label(optimizer, label)
            waiting = [param for param in parameters(optimizer) if param.grad is not None]
            pending += [(p, self._label_of(p, default), self._pending(p, default)) for p in waiting]
        for param, own, labelled in pending:
            if not labelled or own is label:
                continue
            record = self._record(param)
            record.blank = own is ZEROS
            if record.blank:
                continue
            kept = next((grad for old, grad in labelled if old is label), None)
            record.set_aside([(old, grad) for old, grad in labelled if old is not label], kept, layout.MAX_SOURCES)
            param.grad = kept

    def _end(self, label: Label) -> None:
        """The pass is over, or was broken off by an exception."""
        all_recorded, local = self._all_recorded(), distributed.unsynchronised()
        if all_recorded:
            for watched in self._watched():
                if watched.grad is not None:
                    self._record(watched)
        for key, record in list(self._records.items()):
            param = record.param()
            if param is None:
                del self._records[key]
                continue
            if param.grad is not None:
                if not (self.zeros_drop and record.is_blank(param.grad)):
                    record.reached(param.grad, label, local=key in local)
            elif record.aside:
                _restore(param, record)
            if param.grad is None or (not all_recorded and not record.aside and record.label is label):
                del self._records[key]

    def _check_edits(self) -> None:
        """Drops what was set aside where the user zeroed `.grad`; refuses an edit that several losses leave unclear."""
        for key, record in list(self._records.items()):
            param = record.param()
            grad = None if param is None else param.grad
            if param is None or grad is None or not record.holds(param, grad):
                if param is not None and grad is not None and self.refuses_replaced:
                    self._check_replaced(param, grad, record)
                del self._records[key]
            elif record.aside and grad._version != record.version and (record.spent or self._was_zeroed(grad)):
                record.forget_aside()
            elif record.aside and grad._version != record.version:
                raise RuntimeError(
                    f"the gradient of {self._name_of(param)} was edited while gradients of {len(record.aside) + 1} "
                    "losses are pending on it; an edit of one of them has no clear meaning. To zero all: "
                    "zero_grad(set_to_none=True), or optimizer.zero_grad(). To clip or edit the sum: "
                    "scaler.unscale_(optimizer) first."
                )

    def _check_replaced(self, param: Tensor, grad: Tensor, record: Record) -> None:
        if record.is_scaled():
            raise RuntimeError(
                f"the gradient of {self._name_of(param)} was replaced by another {grad.dtype} tensor since its "
                "backward pass; that one carried the loss's scale, and whether this one does is unknown. Edit it in "
                "place, or edit the unscaled gradients of amp.master_params(optimizer); to drop it, "
                "optimizer.zero_grad()."
            )

    def has_edited_scaled(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether somebody has written, in place, a scaled gradient that is still to be stepped."""
        self._expand()
        for param in parameters(optimizer):
            record, grad = self._records.get(id(param)), param.grad
            if record is None or grad is None or not record.is_scaled():
                continue
            if record.holds(param, grad) and record.version != grad._version:
                return bool(grad.any())  # one sync: zeroing in place is no edit
        return False

    def _was_zeroed(self, grad: Tensor) -> bool:
        return self.zeros_drop and not bool(grad.any())  # one sync, where several gradients were pending

    def _close_pass(self) -> None:
        running = self._pass()
        if running is not None:
            running.end()

    def _watched(self) -> Iterator[Tensor]:
        for optimizer in self.optimizers:
            yield from parameters(optimizer)


def _restore(param: Tensor, record: Record) -> None:
    """Puts what was set aside last back into `.grad`."""
    label, grad = record.restore()
    if grad.dtype != param.dtype:
        param.grad_dtype = None  # an fp16 parameter may then hold an FP32 gradient
    param.grad = grad
    record.note(grad, label)


def parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """All parameters of an optimizer, group by group."""
    return chain.from_iterable([group["params"] for group in optimizer.param_groups])


def as_sources(pending: Iterable[list[Labelled]], device: torch.device) -> list[list[Source]]:
    """Labelled gradients as a step reads them, for each of several parameters on one device."""
    scales: dict[Label, Tensor | None] = {}

    def scale(label: Label) -> Tensor | None:
        if label not in scales:
            scales[label] = None if label.scale is None else label.scale.to(device, non_blocking=True)
        return scales[label]

    return [[Source(grad, scale(label), label.loss_id) for label, grad in labelled] for labelled in pending]
