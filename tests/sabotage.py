"""Ways to break the arithmetic of the reference, which the tests must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mpengine import reference
from mpengine.kernels import layout


def every_rule(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Replaces every rule by `change(rule, p, g, slots, c)`."""

    def install(monkeypatch):
        for name, rule in list(reference.RULES.items()):
            monkeypatch.setitem(
                reference.RULES, name, lambda p, g, slots, c, rule=rule: change(rule, p.clone(), g, slots, c)
            )

    return install


def every_scalars(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Replaces the scalars' functions by what `change(function, h, step)` returns."""

    def install(monkeypatch):
        for name, function in list(reference.SCALAR_FUNCTIONS.items()):
            monkeypatch.setitem(reference.SCALAR_FUNCTIONS, name, lambda h, step, f=function: change(f, h.copy(), step))

    return install


def replaced(h: np.ndarray, index: int, value: float) -> np.ndarray:
    h[index] = value
    return h


def flipped(rule, p, g, slots, c):
    new, state = rule(p, g, slots, c)
    return p + (p - new), state


def skipped(rule, p, g, slots, c):
    return p, rule(p, g, slots, c)[1]


def doubled(rule, p, g, slots, c):
    new, state = rule(p, g, slots, c)
    return p + (new - p) * 2, state


def state_forgotten(rule, p, g, slots, c):
    return rule(p, g, slots, c)[0], slots


def a_thousandth_more(rule, p, g, slots, c):
    new, state = rule(p, g, slots, c)
    return p + (new - p) * 1.001, state


def no_clip(monkeypatch):
    decide = reference.decide

    def without(table, *args, **kwargs):
        decide(table, *args, **kwargs)
        table.decision[layout.CLIP] = 1.0

    monkeypatch.setattr(reference, "decide", without)
