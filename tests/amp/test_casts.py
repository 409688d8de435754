"""O1's casts: decorated and registered functions, and turning them off."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from mpengine import amp
from mpengine.amp import casts
from tests.amp.world import weights

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16
KINDS = {
    "half": (amp.half_function, amp.register_half_function),
    "float": (amp.float_function, amp.register_float_function),
    "promote": (amp.promote_function, amp.register_promote_function),
}


def dtypes(*args, **kwargs):
    """What a function was called with."""
    return [t.dtype if isinstance(t, torch.Tensor) else t for t in [*args, *kwargs.values()]]


def tensors(*kinds):
    return [torch.ones(2, dtype=kind) for kind in kinds]


def module_of(function):
    module = types.ModuleType("extension")
    module.f = function
    return module


CASES = [
    ("half", (SINGLE, HALF), [HALF, HALF]),
    ("half", (torch.int64, SINGLE, torch.bool), [torch.int64, HALF, torch.bool]),
    ("float", (SINGLE, HALF, BRAIN), [SINGLE, SINGLE, SINGLE]),
    ("promote", (HALF, SINGLE), [SINGLE, SINGLE]),
    ("promote", (HALF, HALF), [HALF, HALF]),
    ("promote", (HALF, BRAIN), [SINGLE, SINGLE]),
    ("promote", (torch.float64, HALF), [torch.float64, torch.float64]),
    ("promote", (torch.int64,), [torch.int64]),
]


@pytest.mark.parametrize(("kind", "given", "expected"), CASES)
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_decorated_functions_cast_under_o1_alone(kind, given, expected, level):
    function = KINDS[kind][0](dtypes)
    assert function.__name__ == "dtypes"
    args = tensors(*given)
    assert function(*args) == list(given)  # nothing was initialized
    weights(level)
    assert function(*args) == (expected if level == "O1" else list(given))
    assert function(x=args[0], *args[1:]) == dtypes_in_order(expected if level == "O1" else list(given))  # noqa: B026
    amp.initialize(nn.Linear(1, 1), enabled=False)
    assert function(*args) == list(given)


def dtypes_in_order(expected):
    return [*expected[1:], expected[0]]


@pytest.mark.parametrize(("kind", "given", "expected"), CASES)
def test_registered_functions_are_patched_by_o1_and_undone_by_the_next(kind, given, expected):
    module = module_of(dtypes)
    KINDS[kind][1](module, "f")
    args = tensors(*given)
    for level in ("O1", "O0", "O1", "O1", "O2"):
        weights(level)
        assert module.f(*args) == (expected if level == "O1" else list(given))
        assert (module.f is dtypes) is (level != "O1")
    weights("O1")
    assert module.f.__wrapped__ is dtypes  # not nested
    amp.initialize(nn.Linear(1, 1), enabled=False)
    assert module.f is dtypes


def test_a_function_that_somebody_else_has_patched_since_is_left_alone():
    module = module_of(dtypes)
    amp.register_half_function(module, "f")
    weights("O1")
    theirs = module.f = lambda *args: "theirs"
    weights("O0")
    assert module.f is theirs


class Functions:
    @staticmethod
    def static(*args):
        return dtypes(*args)

    def method(self, *args):
        return dtypes(*args)


class Inherits(Functions):
    pass


@pytest.mark.parametrize("owner", [Functions, Inherits])
@pytest.mark.parametrize("name", ["static", "method"])
def test_methods_can_be_registered(owner, name):
    before = dict(vars(owner))
    amp.register_half_function(owner, name)
    for level in ("O1", "O0"):
        weights(level)
        expected = HALF if level == "O1" else SINGLE
        assert getattr(owner(), name)(torch.ones(1)) == [expected]
    assert {k: v for k, v in vars(owner).items() if k in ("static", "method")} == {
        k: v for k, v in before.items() if k in ("static", "method")
    }


@pytest.mark.parametrize("register", [pair[1] for pair in KINDS.values()])
@pytest.mark.parametrize("name", ["missing", "__name__"])
def test_what_cannot_be_registered(register, name):
    with pytest.raises(ValueError, match=f"No function named {name} in module"):
        register(module_of(dtypes), name)


def test_nested_arguments_are_cast():
    @amp.half_function
    def f(pair, mapping):
        return pair[0].dtype, mapping["x"].dtype

    weights("O1")
    assert f((torch.ones(1), 2), {"x": torch.ones(1)}) == (HALF, HALF)


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.inner = inner

    def forward(self, x):
        self.seen = self.inner(self, x)
        return x


def test_a_float_function_in_forward_computes_in_fp32():
    @amp.float_function
    def wide(net, x):
        return net.linear(x).dtype

    @amp.half_function
    def half(net, x):
        return net.linear(x).dtype

    for inner, expected in ((wide, SINGLE), (half, HALF)):
        net = amp.initialize(Net(inner), opt_level="O1")
        net(torch.ones(2, 2))
        assert net.seen == expected


def test_disable_casts_within_forward():
    def inner(net, x):
        seen = [net.linear(x).dtype, half(x)]
        with amp.disable_casts():
            seen += [net.linear(x).dtype, half(x)]
        return [*seen, net.linear(x).dtype, half(x)]

    half = amp.half_function(lambda x: x.dtype)
    net = amp.initialize(Net(inner), opt_level="O1")
    net(torch.ones(2, 2))
    assert net.seen == [HALF, HALF, SINGLE, SINGLE, HALF, HALF]


def test_disable_casts_around_forward():
    net = amp.initialize(Net(lambda net, x: net.linear(x).dtype), opt_level="O1")
    with amp.disable_casts():
        net(torch.ones(2, 2))
        assert net.seen == SINGLE
        with amp.disable_casts():
            pass
        net(torch.ones(2, 2))
        assert net.seen == SINGLE
    net(torch.ones(2, 2))
    assert net.seen == HALF


def fails():
    with amp.disable_casts():
        raise ZeroDivisionError


@pytest.mark.parametrize("outside", [True, False])
def test_an_exception_restores_the_casts(outside):
    weights("O1")
    with torch.autocast("cpu", HALF, enabled=outside):
        with pytest.raises(ZeroDivisionError):
            fails()
        assert torch.is_autocast_enabled("cpu") is outside
    assert casts.are_active()


def test_the_step_is_not_under_autocast():
    """apex had to turn its casts off in every step."""
    model, optimizer = weights("O1")
    with torch.autocast("cpu", HALF):
        loss = model(torch.ones(3))
        with amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        optimizer.step()
    assert model.weight.tolist() == [-1.0] * 3


def test_sabotage_of_the_decorators_is_noticed(monkeypatch):
    monkeypatch.setattr(casts, "are_active", lambda: False)
    with pytest.raises(AssertionError):
        test_decorated_functions_cast_under_o1_alone(*CASES[0], "O1")
    monkeypatch.setattr(casts, "are_active", lambda: True)
    with pytest.raises(AssertionError):
        test_decorated_functions_cast_under_o1_alone(*CASES[0], "O0")
