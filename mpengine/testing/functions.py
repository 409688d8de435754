"""Whether a rule's functions return what they must, leave their arguments alone, and work element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpengine.kernels import layout
from mpengine.rules import Family, Rule, RuleOptimizer

_SIZE, _CUT = 257, 100
_STEPS = np.array([1, 2, 1000])


def check_functions(optimizer: RuleOptimizer) -> None:
    """Calls the functions of every rule that occurs in the optimizer's groups, twice in a row.

    Raises:
        AssertionError: A function returns another number, shape or type of things than it must, edits an argument,
            returns one, or treats an element or a tensor otherwise among others than alone.
    """
    for group in optimizer.param_groups:
        family, rule = optimizer.family, optimizer.family.variant(group)
        row = np.zeros(layout.HYPER)
        values = [float(value) for value in family.hyperparameters(group)]
        row[: len(values)] = values
        with torch.no_grad(), np.errstate(all="ignore"):
            columns = _check_scalars(family, row)
            c = [float(np.float32(column[0])) for column in columns]
            _check_arithmetic(rule, family, group, c)


def _check_scalars(family: Family, row: np.ndarray) -> list[np.ndarray]:
    """The scalars of three tensors, of one group, at different steps."""
    h = np.repeat(row[:, None], len(_STEPS), axis=1)
    given, steps = h.copy(), _STEPS.copy()
    returned = _on_columns("scalars", family.scalars, given, steps)
    _require(np.array_equal(h, given) and np.array_equal(_STEPS, steps), "scalars edits its arguments; return new ones")
    columns = _columns("scalars", returned, len(_STEPS))
    for j, column in enumerate(columns):
        finite = np.isfinite(column)
        _require(finite.all(), f"scalars gives number {j} as {column} at steps {_STEPS}; it must be finite")
    for i, step in enumerate(_STEPS):
        alone = _columns("scalars", family.scalars(h[:, i : i + 1].copy(), np.array([step])), 1)
        for j, (column, one) in enumerate(zip(columns, alone, strict=True)):
            _require(
                column[i] == one[0],
                f"scalars gives number {j} at step {step} as {column[i]!r} among other tensors, {one[0]!r} alone; it "
                "works on columns of one number for each tensor",
            )
    return columns


def _on_columns(kind: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:  # of the rule's own function
        raise AssertionError(
            f"{kind} raises {type(error).__name__} ({error}). It gets columns of one number for each tensor, NumPy "
            "arrays: write np.where(condition, a, b) for `if`, and & for `and`."
        ) from error


def _columns(kind: str, returned: Any, count: int) -> list[np.ndarray]:
    _require(
        isinstance(returned, (tuple, list)) and len(returned) <= layout.SCALARS,
        f"{kind} returned {_told(returned)}; it must return at most {layout.SCALARS} columns in a tuple or list",
    )
    columns = []
    for j, column in enumerate(returned):
        array = np.asarray(column)
        _require(
            array.dtype.kind in "fiu" and array.shape in ((), (1,), (count,)),
            f"{kind} gives number {j} as {array.dtype}{list(array.shape)}; it must be float64[{count}], one for each "
            "tensor, or one number for all",
        )
        columns.append(np.broadcast_to(array, count).astype(np.float64))
    return columns


def _check_arithmetic(rule: Rule, family: Family, group: Any, c: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    initial = family.initial(group)
    p = torch.randn(_SIZE, generator=generator)
    slots = tuple(torch.full((_SIZE,), initial.get(name, 0.0)) for name in rule.slots)
    cells = [initial.get(name, 0.0) for name in rule.cells]
    for _ in range(2):
        g = torch.randn(_SIZE, generator=generator)
        g[:8] = 0.0  # fp16 gradients have many
        norms: Sequence[float] = ()
        if rule.measure is not None:
            measured = _measured(rule, p, g, slots, c)
            norms = [float((x * x).sum(dtype=torch.float64).sqrt()) for x in measured]
        settled = c
        if rule.settle is not None:
            settled, cells = _check_settle(rule, c, norms, cells)
        p, slots = _updated(rule, p, g, slots, settled)
        for what, tensor in (("p", p), *((f"slot '{n}'", t) for n, t in zip(rule.slots, slots, strict=True))):
            bad = (~tensor.isfinite()).nonzero().flatten()
            _require(
                len(bad) == 0, f"update gives {what} as {tensor[bad[:1]].tolist()} where g is {g[bad[:1]].tolist()}"
            )


def _measured(rule: Rule, p: Tensor, g: Tensor, slots: tuple[Tensor, ...], c: list[float]) -> tuple[Tensor, ...]:
    assert rule.measure is not None
    measured = _called("measure", rule.measure, p, g, slots, c)
    _require(
        isinstance(measured, tuple) and len(measured) == rule.norms,
        f"measure returned {_told(measured)}; it must return norms={rule.norms} tensors in a tuple",
    )
    for j, x in enumerate(measured):
        _check_tensor(f"measure: tensor {j}", x)
    _check_elements("measure", rule.measure, (p, g, slots, c), measured)
    return measured


def _check_settle(
    rule: Rule, c: list[float], norms: Sequence[float], cells: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Settles three tensors at once: the one at hand and two others."""
    spare = [np.full(3, np.nan)] * (layout.SCALARS - len(c))  # what is there beyond the rule's own numbers is no one's
    wide = [np.full(3, value) for value in c] + spare
    assert rule.settle is not None
    tensors = [np.array([norm, 0.5 * norm, 0.0]) for norm in norms]  # the last is of zeros
    arguments = wide, tensors, [np.full(3, cell) for cell in cells]
    before = [[column.copy() for column in one] for one in arguments]
    returned = _on_columns("settle", rule.settle, *arguments)
    for name, old, new in zip(("c", "norms", "cells"), before, arguments, strict=True):
        same = len(old) == len(new) and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(old, new, strict=True))
        _require(same, f"settle edits {name}; return new columns")
    _require(
        isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], (tuple, list)),
        f"settle returned {_told(returned)}; it must return (c, cells)",
    )
    _require(
        len(returned[1]) == len(rule.cells),
        f"settle returned {len(returned[1])} cells; the rule has {len(rule.cells)}: {list(rule.cells)}",
    )
    settled = _columns("settle", returned[0], 3)
    new_cells = _columns("settle", returned[1], 3)
    for j, column in enumerate([*settled[: len(c)], *new_cells]):
        _require(np.isfinite(column).all(), f"settle gives number {j} as {column}, of norms {before[1]}")
    for i in range(3):
        own = ([column[i : i + 1].copy() for column in one] for one in before)
        alone, alone_cells = rule.settle(*own)
        for a, b in zip(
            [*settled, *new_cells], [*_columns("settle", alone, 1), *_columns("settle", alone_cells, 1)], strict=True
        ):
            same = np.array_equal(a[i : i + 1], b, equal_nan=True)
            _require(same, f"settle gives {a[i]!r} for a tensor among others, {b[0]!r} alone; it works on columns")
    rounded = [float(np.float32(column[0])) for column in settled]
    return [*rounded, *c[len(rounded) :]], [float(np.float32(column[0])) for column in new_cells]


def _updated(
    rule: Rule, p: Tensor, g: Tensor, slots: tuple[Tensor, ...], c: list[float]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    returned = _called("update", rule.update, p, g, slots, c)
    _require(
        isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], (tuple, list)),
        f"update returned {_told(returned)}; it must return (p, slots), slots in a tuple",
    )
    stepped, new = returned[0], tuple(returned[1])
    _require(
        len(new) == len(rule.slots), f"update returned {len(new)} slots; the rule has {len(rule.slots)}: {rule.slots}"
    )
    _check_tensor("update: p", stepped)
    for name, tensor in zip(rule.slots, new, strict=True):
        _check_tensor(f"update: slot '{name}'", tensor)
    # The parameter is written first, then slot after slot: what lies in another's memory would be overwritten by then.
    for i, (name, tensor) in enumerate(zip(("p", *rule.slots), (stepped, *new), strict=True)):
        for other, old in zip(("p", *rule.slots), (p, *slots), strict=True):
            mine = other == ("p", *rule.slots)[i]
            _require(
                mine or tensor.untyped_storage().data_ptr() != old.untyped_storage().data_ptr(),
                f"update returned {name} in the memory of {other}; return a new tensor ({name} = {other}.clone())",
            )
    _check_elements("update", lambda *a: _flat(rule.update(*a)), (p, g, slots, c), (stepped, *new))
    return stepped.clone(), tuple(tensor.clone() for tensor in new)


def _flat(returned: Any) -> tuple[Tensor, ...]:
    return returned[0], *returned[1]


def _called(kind: str, function: Callable[..., Any], p: Tensor, g: Tensor, slots: Any, c: list[float]) -> Any:
    """What a function returns for tensors that it must leave alone."""
    arguments = {"p": p, "g": g, **{f"slot {i}": slot for i, slot in enumerate(slots)}}
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    numbers = list(c)
    returned = function(p, g, slots, numbers)
    for name, tensor in arguments.items():
        same = torch.equal(tensor.view(torch.int32), before[name].view(torch.int32))
        _require(same, f"{kind} edits its argument {name} in place; compute a new tensor")
    _require(numbers == list(c), f"{kind} edits its scalars c; leave them as they are")
    return returned


def _check_tensor(what: str, x: Any) -> None:
    told = f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    _require(
        told == f"torch.float32[{_SIZE}]", f"{what} is {told}; it must be torch.float32[{_SIZE}], as the arguments"
    )


def _check_elements(kind: str, function: Callable[..., Any], arguments: Any, whole: tuple[Tensor, ...]) -> None:
    """Large tensors are worked on in pieces, and on the device in blocks."""
    p, g, slots, c = arguments
    cuts = (slice(0, _CUT), slice(_CUT, None))
    halves = [function(p[cut], g[cut], tuple(slot[cut] for slot in slots), list(c)) for cut in cuts]
    for j, (tensor, parts) in enumerate(zip(whole, zip(*halves, strict=True), strict=True)):
        different = (torch.cat(parts).view(torch.int32) != tensor.view(torch.int32)).nonzero().flatten()
        _require(
            len(different) == 0,
            f"{kind} gives {len(different)} of {_SIZE} elements of its tensor {j} otherwise where it gets them in two "
            "pieces: it must work element by element, in + - * / and functions that round correctly (sqrt_rn)",
        )


def _told(returned: Any) -> str:
    many = isinstance(returned, (tuple, list))
    return f"a {type(returned).__name__}{f' of {len(returned)}' if many else ''}"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message + ".")
