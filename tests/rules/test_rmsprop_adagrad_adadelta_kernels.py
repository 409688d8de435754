"""RMSprop, Adagrad and Adadelta: the kernels and the CPU path give the reference's bits."""

from __future__ import annotations

import itertools
import math

import pytest

from mpengine.kernels import launch
from tests.harness import BRAIN, HALF, SINGLE
from tests.kernels.harness import Grad, Problem, Spec, check
from tests.rules.cases import every_case, every_variant

KERNELS = dict(launch.RULES)


@every_case
def test_kernels_at_odd_sizes(case):
    cls, options = case
    tensors = (*(Spec((n,)) for n in (0, 1, 31, 1023, 1025)), Spec((9,), grads=()))
    check(Problem(tensors, cls, (options,), max_norm=1.0), steps=3)


@every_variant
def test_kernels_of_every_kind_and_alignment(case):
    cls, options = case
    kinds = (HALF, BRAIN, SINGLE)
    several = tuple(Grad(loss, kind) for loss, kind in enumerate(kinds))
    tensors = (
        *(Spec((n,), kind, (Grad(0, kind),)) for n, kind in itertools.product((33, 2048), kinds)),
        Spec((20000,), grads=several),
        Spec((1100,), SINGLE, (Grad(1, HALF, misaligned=True),), misaligned=True),
        Spec((4, 7, 5, 3), channels_last=True),
    )
    groups = ({**options, "weight_decay": 0.1},)
    check(Problem(tensors, cls, groups, scales=(1024.0, 3.0, None), max_norm=1.0), steps=1)


@every_variant
def test_kernels_skip(case):
    cls, options = case
    problem = Problem((Spec((1025,)), Spec((31,))), cls, (options,)).with_spikes(1, 0, (30, math.inf))
    world = check(problem)
    assert world.table.counts.tolist() == [0, 2]
    assert world.table.steps.tolist() == [0, 0]


@every_variant
def test_a_kernel_that_computes_something_else_is_noticed(case, monkeypatch):
    cls, options = case
    other = {
        "rmsprop": "adagrad",
        "rmsprop_momentum": "adadelta",
        "rmsprop_centered": "rmsprop_momentum",
        "rmsprop_centered_momentum": "adam_amsgrad",
        "adagrad": "rmsprop",
        "adadelta": "rmsprop_momentum",
    }
    for rule, instead in other.items():
        monkeypatch.setitem(launch.RULES, rule, KERNELS[instead])
    with pytest.raises(AssertionError, match="elements differ"):
        check(Problem((Spec((31,)),), cls, (options,)), steps=1)
