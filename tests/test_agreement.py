"""Noticing who wrote or moved a parameter, and who changed its state."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mpengine.agreement import Agreement, noted


def marked(count=3):
    params = [nn.Parameter(torch.randn(2, 2).half()) for _ in range(count)]
    agreement = Agreement()
    agreement.mark(params)
    return agreement, params


def write(params):
    with torch.no_grad():
        params[1].mul_(2)


def move(params):
    params[1].data = params[1].data.clone()


def test_all_agree_when_they_were_marked():
    agreement, params = marked()
    assert agreement.holds_all()
    assert all(map(agreement.holds, params))
    assert params[0] in agreement


@pytest.mark.parametrize("change", [write, move])
def test_one_that_was_written_or_moved_does_not(change):
    agreement, params = marked()
    change(params)
    assert not agreement.holds_all()
    assert [agreement.holds(p) for p in params] == [True, False, True]
    agreement.mark(params[1:2])
    assert agreement.holds_all()


def test_another_shape_in_the_same_memory_shows_one_by_one():
    agreement, params = marked()
    params[1].data = params[1].data.t()
    assert not agreement.holds(params[1])


@pytest.mark.parametrize("which", [slice(None), slice(1, 2)])
def test_our_own_writes_are_no_disagreement(which):
    agreement, params = marked()
    torch.autograd.graph.increment_version(params[which])
    assert not agreement.holds_all()
    agreement.written(params[which])
    assert agreement.holds_all()
    assert all(map(agreement.holds, params))


def test_doubted_and_forgotten_ones():
    agreement, params = marked()
    agreement.doubt(params[0])
    agreement.forget(params[1])
    assert not agreement.holds_all()
    assert [p in agreement for p in params] == [True, False, True]
    assert [agreement.holds(p) for p in params] == [False, False, True]
    agreement.forget(stranger := nn.Parameter(torch.zeros(1)))
    assert stranger not in agreement
    agreement.mark([*params, stranger])
    assert agreement.holds_all()


def test_every_change_but_our_own_writes_is_another_epoch():
    agreement, params = marked()
    for change in (agreement.doubt, agreement.forget, lambda p: agreement.mark([p])):
        before = agreement.epoch
        change(params[0])
        assert agreement.epoch != before
    before = agreement.epoch
    agreement.written(params)
    assert agreement.epoch == before


CHANGES = {
    "an entry": lambda d: d.__setitem__("step", 2),
    "deletion": lambda d: d.__delitem__("step"),
    "update": lambda d: d.update(step=2),
    "|=": lambda d: d.__ior__({"step": 2}),
    "pop": lambda d: d.pop("step"),
    "popitem": lambda d: d.popitem(),
    "clear": lambda d: d.clear(),
    "setdefault": lambda d: d.setdefault("other", 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_of_state_are_noted(change):
    agreement, _ = marked()
    ours, plain = noted({"step": 1}, agreement), {"step": 1}
    before = agreement.epoch
    assert ours == plain
    assert agreement.epoch == before
    assert change(ours) == change(plain)
    assert ours == plain
    assert agreement.epoch != before


def test_copies_are_plain_dicts():
    agreement, _ = marked()
    ours = noted({"step": 1}, agreement)
    assert noted(ours, agreement) is ours
    assert noted(ours, Agreement()) is not ours
    for copied in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), dict(ours)):
        assert type(copied) is dict
        assert copied == {"step": 1}
