"""Labels of gradients: which loss made a gradient, at which value of its scale; and what is pending on a parameter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mpengine import distributed


class Label:
    """One value of one loss's scale.

    Attributes:
        loss_id: The loss.
        scale: float32, 0-dim: the scale that scaled the gradients under this label. The scaler moves it to a copy
            before the value changes. None: the gradients are unscaled already.
        parts: The uncounted labels that were folded into this one, which is counted when they are.
        own_memory: Whether no backward pass writes the memory of its gradients, though they be views.
    """

    def __init__(self, loss_id: int, scale: Tensor | None, counted: bool = False, *, own_memory: bool = False) -> None:
        self.loss_id = loss_id
        self.scale = scale
        self.parts: list[Label] = []
        self.own_memory = own_memory
        self._counted = counted
        self._again: Label | None = None

    @property
    def counted(self) -> bool:
        """Whether an `update()` has dealt with this backward pass already."""
        return all(part.counted for part in self.parts) if self.parts else self._counted

    @counted.setter
    def counted(self, value: bool) -> None:
        self._counted = value
        for part in self.parts:
            part.counted = value

    def of_pass(self) -> Label:
        """The label of a pass that begins now: this one, or where an `update()` has dealt with it, another like it."""
        if not self.counted:
            return self
        if self._again is None or self._again.counted:
            assert self.scale is not None
            self._again = Label(self.loss_id, self.scale.clone())
        return self._again


Labelled = tuple[Label, Tensor]
_version = attrgetter("_version")


ZEROS = Label(0, None, counted=True)
UNSCALED = Label(0, None, counted=True)


class Pending(Sequence[list[Labelled]]):
    """The gradients that wait on an optimizer's parameters: for each, (label, gradient) pairs in order of loss_id.

    Args:
        rows: Them, for each parameter.
        grads: Instead, `.grad` of each parameter, where `label` is the label of all of them.
        label: See `grads`.
    """

    def __init__(
        self,
        rows: list[list[Labelled]] | None = None,
        *,
        grads: list[Tensor | None] | None = None,
        label: Label | None = None,
    ) -> None:
        self._rows, self._grads, self._label = rows, grads, label

    @property
    def column(self) -> tuple[Label, list[Tensor | None]] | None:
        """The one label and the gradients, where there is one."""
        return None if self._grads is None or self._label is None else (self._label, self._grads)

    @property
    def rows(self) -> list[list[Labelled]]:
        """The pairs of each parameter."""
        if self._rows is None:
            assert self._grads is not None
            assert self._label is not None
            self._rows = [[] if grad is None else [(self._label, grad)] for grad in self._grads]
        return self._rows

    @property
    def labels(self) -> list[Label]:
        """Every label that occurs."""
        if self._grads is not None and self._label is not None:
            return [self._label] if any(grad is not None for grad in self._grads) else []
        return list({id(label): label for labelled in self.rows for label, _ in labelled}.values())

    @property
    def active(self) -> Sequence[int]:
        """The positions of the parameters on which something is pending."""
        if self._grads is not None:
            return [i for i, grad in enumerate(self._grads) if grad is not None]
        return [i for i, labelled in enumerate(self.rows) if labelled]

    def __getitem__(self, position: int) -> list[Labelled]:  # type: ignore[override]  # no slices
        return self.rows[position]

    def __len__(self) -> int:
        return len(self.rows if self._grads is None else self._grads)

    def __iter__(self) -> Iterator[list[Labelled]]:
        return iter(self.rows)


class Snapshot:
    """What a list of `Record` would say of gradients of one label, noted for all of them in a few calls.

    Args:
        params: The parameters.
        label: What made `.grad` of each.
        spent: See `Record`.
        local: The ids of those that `no_sync()` kept from being averaged over ranks.
    """

    def __init__(self, params: Sequence[Tensor], label: Label, spent: bool, local: set[int]) -> None:
        grads: list[Any] = [param.grad for param in params]
        try:
            self._grads = list(map(weakref.ref, grads))
        except TypeError:  # there is no reference to None
            params = [param for param, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
            self._grads = list(map(weakref.ref, grads))
        self._params = params
        self._versions = list(map(_version, grads))
        self._label, self._spent, self._local = label, spent, local

    def records(self) -> Iterator[tuple[int, Record]]:
        """(id of the parameter, record) of those gradients that are still there."""
        for param, reference, version in zip(self._params, self._grads, self._versions, strict=True):
            grad: Tensor | None = reference()
            if grad is not None and param.grad is grad:
                record = Record(param)
                record.note(grad, self._label, self._spent)
                record.version = version
                record.local = id(param) in self._local
                yield id(param), record


class Record:
    """What is known about one parameter's gradients: the label of `.grad`, and those set aside."""

    __slots__ = ("aside", "blank", "grad", "label", "local", "local_aside", "param", "spent", "version")

    def __init__(self, param: Tensor) -> None:
        self.param = weakref.ref(param)
        self.aside: list[tuple[Label, Tensor]] = []
        self.label: Label | None = None
        self.grad: Callable[[], Tensor | None] = lambda: None
        self.version = 0
        self.spent = False  # zeros, or stepped already: what somebody writes there later is a new gradient
        self.blank = False  # whether `.grad` was zeros when the first pass under its label began to add to it
        self.local = False  # whether no_sync() kept `.grad` from being averaged over ranks
        self.local_aside: list[Tensor] = []  # those set aside of which the same is true

    def note(self, grad: Tensor, label: Label, spent: bool = False) -> None:
        """Notes the label of `.grad`, and its version: who writes it later is noticed."""
        self.label, self.grad, self.version, self.spent = label, weakref.ref(grad), grad._version, spent

    def holds(self, param: Tensor, grad: Tensor) -> bool:
        """Whether `.grad` is the tensor that was noted, or took its place in a new bucket."""
        if self.grad() is not grad and self.label is not None and distributed.was_moved(param, grad):
            self.note(grad, self.label, self.spent)
        return self.grad() is grad

    def is_scaled(self) -> bool:
        """Whether `.grad`, as it was noted, carries a scale and waits to be stepped."""
        return self.label is not None and self.label.scale is not None and not self.spent

    def is_blank(self, grad: Tensor) -> bool:
        """Whether `.grad` was zeros when a pass began, and that has not reached it."""
        return self.blank and self.grad() is grad and self.version == grad._version

    def reached(self, grad: Tensor, label: Label, local: bool) -> None:
        """A backward pass is over; where it wrote this gradient, it left it local or averaged it over all ranks."""
        if self.grad() is not grad or self.version != grad._version:
            self.local = local
        self.note(grad, label)

    def is_local(self, grad: Tensor) -> bool:
        """Whether a pending gradient is this rank's alone, though DistributedDataParallel averages others."""
        if any(grad is aside for _, aside in self.aside):
            return any(grad is local for local in self.local_aside)
        return self.local

    def set_aside(self, pending: list[Labelled], kept: Tensor | None, limit: int) -> None:
        """Keeps gradients until the step: copies where the next pass may write, fewer than `limit` of them.

        Args:
            pending: The gradients.
            kept: What stays in `.grad`, or comes back there.
            limit: How many they may be, together with that of the next pass.
        """
        local = [self.is_local(grad) for _, grad in pending]
        self.local = kept is not None and self.is_local(kept)
        if len(pending) >= limit:
            pending, folded = fold(pending, limit), pending
            ids = [label.loss_id for label, _ in pending]
            local = [any(own for own, (old, _) in zip(local, folded, strict=True) if old.loss_id == k) for k in ids]
        self.aside = [
            (label, grad if label.own_memory or not distributed.is_bucket_view(grad) else grad.clone())
            for label, grad in pending
        ]
        self.local_aside = [grad for own, (_, grad) in zip(local, self.aside, strict=True) if own]

    def restore(self) -> Labelled:
        """Takes back what was set aside last, for `.grad`."""
        label, grad = self.aside[-1]
        self.local = self.is_local(grad)
        self.local_aside = [local for local in self.local_aside if local is not grad]
        del self.aside[-1]
        return label, grad

    def forget_aside(self) -> None:
        """Drops what was set aside."""
        self.aside.clear()
        self.local_aside.clear()


def fold(aside: list[Labelled], limit: int) -> list[Labelled]:
    """Adds up, unscaled and in FP32 at least, the gradients of each loss that waits under several old scales.

    What is counted stays apart from what is not, so that an overflow is not counted twice, unless `limit` or more would
    be left then.
    """
    kinds: list[Any] = [(label.loss_id, label.counted) for label, _ in aside]
    if len(set(kinds)) >= limit:
        kinds = [label.loss_id for label, _ in aside]
    folded: dict[Any, Labelled] = {}
    for kind, (label, grad) in zip(kinds, aside, strict=True):
        share = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if label.scale is not None:
            share = share * label.scale.double().reciprocal().float().to(grad.device)
        if kind in folded:
            kept, total = folded[kind]
            total.add_(share)
        else:
            kept = Label(label.loss_id, None, counted=True)
            folded[kind] = kept, share
        kept.parts += [part for part in label.parts or [label] if not part.counted]
    return list(folded.values())
