"""What an optimizer holds for each parameter that it trains: FP32 master, state, step count; and keeping them true.

A parameter has them from the moment that it is wrapped, or was frozen then, from the step at which it first has a
gradient. Users may change parameters, state and groups between steps: `is_current` notices, `register` and `entries`
set things right, `adopt_outside_changes` lets masters follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mpengine import distributed, validation
from mpengine.agreement import is_noted, memory_of, noted
from mpengine.alike import Alike
from mpengine.execution import Execution
from mpengine.gradients import parameters
from mpengine.masters import Entry, arena, same_layout
from mpengine.rules import ASSIGN, Family, Rule

if TYPE_CHECKING:
    from mpengine.optimizer import MixedPrecisionOptimizer


@torch.no_grad()
def register(optimizer: MixedPrecisionOptimizer, originals: Mapping[Tensor, Tensor], also: Set[Tensor]) -> None:
    """Gives a master and state to every parameter that needs them now and has none.

    Args:
        optimizer: Whose parameters.
        originals: FP32 values of parameters that were cast; their masters start from them.
        also: Parameters that get theirs though they are frozen.
    """
    held, masters = optimizer._steps, optimizer._masters
    new = [p for p in parameters(optimizer) if p not in held and (p.requires_grad or p.grad is not None or p in also)]
    for device in dict.fromkeys(p.device for p in new):
        local = [p for p in new if p.device == device]
        halves = [p for p in local if p.dtype != torch.float32]
        for param, master in zip(halves, arena(halves, fill=None), strict=True):
            masters[param] = torch.nn.Parameter(master.copy_(originals.get(param, param)))
        for param in local:
            filled = optimizer.state.get(param, {}).get("momentum_buffer") is not None  # SGD's counts from then
            held[param] = torch.full((), int(filled), dtype=torch.int32, device=device)
    fresh = set(new)
    if new:
        optimizer._agreed.mark(new)
    if optimizer._family is not None:
        for g, group in enumerate(optimizer.param_groups):
            params = [p for p in group["params"] if p in held]
            rule, initial = _rule(optimizer, g), optimizer._family.initial(group)
            _fill_exactly(optimizer, [p for p in params if p in fresh], initial)
            _make_state(optimizer, params, rule, initial)
            _forget_unfilled(optimizer, params, optimizer._family, rule)
            if optimizer._family.counts_steps:
                _share_counts(optimizer, params)


def _fill_exactly(optimizer: MixedPrecisionOptimizer, params: list[Tensor], initial: Mapping[str, float]) -> None:
    """What torch's constructor filled in the parameter's own type (Adagrad's sum) loses the rounding."""
    for param in params:
        for name, value in initial.items():
            state = optimizer.state.get(param, {}).get(name)
            if isinstance(state, Tensor) and param.dtype != state.dtype:
                rounded = float(torch.tensor(value, dtype=param.dtype))
                if rounded != value and bool((state == rounded).all()):
                    state.fill_(value)


def _make_state(
    optimizer: MixedPrecisionOptimizer, params: list[Tensor], rule: Rule, initial: Mapping[str, float]
) -> None:
    """Puts the state of the rule into tensors that the kernels can step: what is there is kept, else as at first."""
    family = optimizer._family
    assert family is not None
    for param in params if rule.slots or rule.cells or family.counts_steps else ():
        if param not in optimizer.state:
            optimizer.state[param] = noted({}, optimizer._agreed)
    for name in (*rule.slots, *rule.cells):
        for device in dict.fromkeys(p.device for p in params):
            local = [(p, _shaped_as(p, name, rule)) for p in params if p.device == device]
            unfit = [(p, like) for p, like in local if not _fits(optimizer.state[p].get(name), like)]
            fresh = arena([like for _, like in unfit], fill=initial.get(name, 0.0))
            for (param, like), tensor in zip(unfit, fresh, strict=True):
                before = optimizer.state[param].get(name)
                if before is not None:
                    validation.check_slot(param, name, before, like.shape, optimizer._name_of)
                    tensor.copy_(before)
                elif not family.counts_steps:
                    optimizer._steps[param].zero_()  # torch's first momentum buffer is the gradient itself
                optimizer.state[param][name] = tensor


def _shaped_as(param: Tensor, name: str, rule: Rule) -> Tensor:
    """A tensor of the shape, strides and device of a slot, or of a cell."""
    return param if name in rule.slots else param.new_empty(())


def _fits(tensor: Any, like: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype == torch.float32
        and tensor.device == like.device
        and same_layout(tensor, like)
    )


def _forget_unfilled(optimizer: MixedPrecisionOptimizer, params: list[Tensor], family: Family, rule: Rule) -> None:
    """Drops state that the rule does not keep and no step has filled: momentum set to 0 before the first step."""
    for param in params:
        for name in set(family.slots).difference(rule.slots).intersection(optimizer.state.get(param, {})):
            if int(optimizer._steps[param]) == 0:
                del optimizer.state[param][name]


def _share_counts(optimizer: MixedPrecisionOptimizer, params: list[Tensor]) -> None:
    """`state["step"]` is the count that the device advances; a value that the user put there is taken over."""
    for param in params:
        state, count = optimizer.state[param], optimizer._steps[param]
        if state.get("step") is not count:
            count.fill_(int(state.get("step", 0)))
            state["step"] = count


def entries(optimizer: MixedPrecisionOptimizer) -> dict[int, Entry]:
    """The tensors by their position among all parameters; masters are brought into their parameter's layout."""
    found: dict[int, Entry] = {}
    position = 0
    for g, group in enumerate(optimizer.param_groups):
        rule = _rule(optimizer, g)
        for param in group["params"]:
            if param in optimizer._steps:
                master = optimizer._masters.get(param, param)
                if not same_layout(master, param):  # the model went to channels_last after it was wrapped
                    (moved,) = arena([param], fill=None)
                    master.data = moved.copy_(master.detach())
                slots = tuple(optimizer.state[param][name] for name in rule.slots)
                cells = tuple(optimizer.state[param][name] for name in rule.cells)
                found[position] = Entry(param, master, slots, g, rule, master is not param, cells)
            position += 1
    return found


class Known(NamedTuple):
    """What an optimizer was when its tables were found to describe it."""

    epoch: int  # of its agreement
    params: list[Tensor]
    kinds: Alike  # of the parameters
    frozen: list[Tensor]  # those without a master
    sizes: list[int]  # of the groups
    rules: list[Rule]
    state: list[tuple[Tensor, Any]]


def known(optimizer: MixedPrecisionOptimizer) -> Known | None:
    """For `is_unchanged` of a later step; None where a quick look would not do."""
    agreed = optimizer._agreed
    agreed.mark(p for p in optimizer._steps if p.dtype is torch.float32)  # each is its own master
    if optimizer._family is not None and not all(not own or is_noted(own, agreed) for own in optimizer.state.values()):
        return None  # somebody put a dict of his own there, and may change it unnoticed
    params = list(parameters(optimizer))
    return Known(
        agreed.epoch,
        params,
        Alike(params),
        [param for param in params if param not in optimizer._steps],
        [len(group["params"]) for group in optimizer.param_groups],
        [_rule(optimizer, g) for g in range(len(optimizer.param_groups))],
        list(optimizer.state.items()),
    )


def is_unchanged(optimizer: MixedPrecisionOptimizer, before: Known) -> bool:
    """Whether groups, rules, state and parameters are what they were, without a look at the device or at each tensor.

    All are then as the tables and the masters have them.
    """
    groups = optimizer.param_groups
    return (
        before.epoch == optimizer._agreed.epoch
        and [len(group["params"]) for group in groups] == before.sizes
        and all(map(is_, parameters(optimizer), before.params))
        and [_rule(optimizer, g) for g in range(len(groups))] == before.rules
        and (optimizer._family is None or _same_state(optimizer.state, before.state))
        and all(param.grad is None for param in before.frozen)
        and optimizer._agreed.holds_all()
        and before.kinds.holds(before.params)
    )


def _same_state(now: dict[Tensor, Any], before: list[tuple[Tensor, Any]]) -> bool:
    """Whether the same parameters have the same dicts; what is put into those is noted."""
    return len(now) == len(before) and all(map(is_, chain.from_iterable(now.items()), chain.from_iterable(before)))


def is_current(optimizer: MixedPrecisionOptimizer, execution: Execution) -> bool:
    """Whether the tables describe the parameters, their memory, their state and their rules as they are."""
    position = 0
    for g, group in enumerate(optimizer.param_groups):
        rule = _rule(optimizer, g)
        for param in group["params"]:
            entry = execution.entries.get(position)
            if entry is None:
                if param.grad is not None:  # it was unfrozen
                    return False
            elif (
                entry.param is not param
                or entry.group != g
                or entry.rule != rule
                or memory_of(param) != execution.memory[position]
            ):
                return False
            elif optimizer._family is not None:
                state, count = optimizer.state.get(param, {}), optimizer._steps[param]
                names, tensors = (*rule.slots, *rule.cells), (*entry.slots, *entry.cells)
                if state.get("step", count) is not count or any(
                    state.get(name) is not tensor for name, tensor in zip(names, tensors, strict=True)
                ):
                    return False
            position += 1
    return all(i < position for i in execution.entries)


def _rule(optimizer: MixedPrecisionOptimizer, g: int) -> Rule:
    """The rule of a param group, which a schedule may change."""
    if optimizer._family is None:
        return ASSIGN
    scheduled = optimizer._timetable.rule(g) if optimizer._timetable is not None else None
    return scheduled or optimizer._family.variant(optimizer.param_groups[g])


def check_unmoved(optimizer: MixedPrecisionOptimizer) -> None:
    """Raises RuntimeError where a parameter has another device, dtype or shape than its master was made for."""
    for param, count in optimizer._steps.items():
        validation.check_unmoved(param, optimizer._masters.get(param, param), count.device, optimizer._name_of)


def _is_foreign(param: Tensor, master: Tensor) -> bool:
    low = param.dtype in (torch.float16, torch.bfloat16)
    return param.shape != master.shape or param.device != master.device or not low


def settled(optimizer: MixedPrecisionOptimizer, param: Tensor) -> Tensor:
    """The FP32 value that the next step of this parameter starts from, shape and strides of its master.

    The master, if nobody else wrote the parameter. Else, element by element, the master where it still rounds to the
    parameter, and the parameter elsewhere; a master that was loaded and put aside counts as the master then.
    """
    master = optimizer._masters[param].detach()
    if optimizer._agreed.holds(param):
        return master
    aside = optimizer._loaded.get(param)
    master = master if aside is None else aside
    return torch.where(master.to(param.dtype) == param, master, param.to(torch.float32))


def seen(optimizer: MixedPrecisionOptimizer, param: Tensor) -> Tensor:
    """The master for who looks at it between steps; looking changes nothing.

    Weights that are swapped in, looked at and swapped back must not cost the master what fp16 does not hold.
    """
    master = optimizer._masters[param].detach()
    # Of masters that were loaded the model's weights may be yet to come; what is beyond recognition, the step refuses.
    if param not in optimizer._agreed or _is_foreign(param, master):
        return master
    return settled(optimizer, param)


@torch.no_grad()
def adopt_outside_changes(optimizer: MixedPrecisionOptimizer, loaded: bool = True) -> None:
    """Where somebody else wrote a parameter, its master follows, element by element.

    The master stays where it still rounds to the parameter, so loading the model's weights of a checkpoint leaves
    the masters of that checkpoint alone, whichever of the two was loaded first.

    Args:
        optimizer: Whose masters.
        loaded: Whether masters that were loaded settle now too: the model's weights may be yet to come.
    """
    for param, master in optimizer._masters.items():
        if not loaded and (param not in optimizer._agreed or _is_foreign(param, master)):
            continue  # and what was changed beyond recognition is for the step to refuse
        if not optimizer._agreed.holds(param):
            if not loaded:
                _keep(optimizer, param, master)
            master.copy_(settled(optimizer, param))
            if optimizer._loaded.get(param) is not None:
                del optimizer._loaded[param]
            optimizer._agreed.mark([param])
    if loaded:
        optimizer._loaded.clear()
        optimizer._before.clear()
        distributed.share_masters(optimizer, optimizer._masters)


@torch.no_grad()
def take_weights(optimizer: MixedPrecisionOptimizer, param: Tensor, value: Tensor) -> None:
    """The master becomes FP32 weights that are about to be loaded into the parameter, rounded."""
    _keep(optimizer, param, settled(optimizer, param))
    optimizer._masters[param].copy_(value)
    optimizer._loaded[param] = None
    optimizer._agreed.doubt(param)  # so that the parameter is looked at, even if it is not written after all


def _keep(optimizer: MixedPrecisionOptimizer, param: Tensor, master: Tensor) -> None:
    """Until the next step a trained master that other weights replace is kept: its fp16 weights may come back."""
    if param not in optimizer._before and optimizer.steps_taken > 0:
        optimizer._before[param] = master.detach().clone()


@torch.no_grad()
def expect_weights(optimizer: MixedPrecisionOptimizer, param: Tensor) -> None:
    """Weights in the parameter's own dtype are about to be loaded into it; the next look settles it with its master."""
    if optimizer._loaded.get(param) is not None:
        return  # with the one of a saved state
    optimizer._loaded.pop(param, None)  # FP32 weights that came before are no longer the last word
    if param in optimizer._before:
        optimizer._masters[param].copy_(optimizer._before.pop(param))
        optimizer._agreed.doubt(param)


@torch.no_grad()
def take_master(optimizer: MixedPrecisionOptimizer, param: Tensor, value: Tensor) -> None:
    """The master becomes the one in an optimizer's state, for the next step to settle with the parameter.

    FP32 weights that were loaded before win, whole: the saved master is put aside then, in case that the rounded
    weights that belong to it are yet to come.
    """
    master = optimizer._masters[param]
    optimizer._before.pop(param, None)
    if param in optimizer._loaded and bool((master.to(param.dtype) == param).all()):
        optimizer._loaded[param] = torch.empty_like(master.detach()).copy_(value)
        optimizer._agreed.mark([param])
        return
    optimizer._loaded.pop(param, None)
    master.copy_(value)
    optimizer._agreed.forget(param)
