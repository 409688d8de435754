"""200 steps of SGD, Adam and AdamW in every option against torch.optim, and against the equations in float64.

The bound on each weight is derived, not chosen: `tests.oracle` follows every rounding of every step. It comes to a few
ULP a step, as `test_the_bound_is_a_few_ulp_a_step` says in numbers; and whatever changes the update must break it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpengine import MixedPrecisionOptimizer, backend, reference, rules
from mpengine.kernels import layout
from tests.harness import BRAIN, HALF, SINGLE, feed, parameters, same_bits, twins_of
from tests.oracle import Oracle, U, clip_of, norm_of

STEPS = 200


def _sgd_options() -> Iterator[dict[str, Any]]:
    for weight_decay, maximize in itertools.product((0.0, 0.02), (False, True)):
        shared = {"weight_decay": weight_decay, "maximize": maximize}
        yield {"momentum": 0.0, **shared}
        for kind in ({}, {"nesterov": True}, {"dampening": 0.3}):
            yield {"momentum": 0.9, **kind, **shared}


def _adam_options() -> Iterator[dict[str, Any]]:
    decays = ({}, {"weight_decay": 0.002}, {"weight_decay": 0.02, "decoupled_weight_decay": True})
    for amsgrad, maximize, decay in itertools.product((False, True), (False, True), decays):
        yield {"amsgrad": amsgrad, "maximize": maximize, **decay}
    yield {"betas": (0.5, 0.9)}
    yield {"betas": (0.0, 0.99)}
    yield {"betas": (0.3, 0.999), "amsgrad": True}
    yield {"eps": 1e-3}


def _adamw_options() -> Iterator[dict[str, Any]]:
    for amsgrad, maximize in itertools.product((False, True), (False, True)):
        yield {"amsgrad": amsgrad, "maximize": maximize}
    yield {"weight_decay": 0.3, "betas": (0.5, 0.99)}
    yield {"weight_decay": 0.0}


CASES = [
    *((torch.optim.SGD, options) for options in _sgd_options()),
    *((torch.optim.Adam, options) for options in _adam_options()),
    *((torch.optim.AdamW, options) for options in _adamw_options()),
]


def _name(case: Any) -> str:
    cls, options = case
    return "-".join([cls.__name__, *(f"{key}={value}" for key, value in options.items())])


every_case = pytest.mark.parametrize("case", CASES, ids=_name)


def few_parameters() -> list[Tensor]:
    """One of each dtype, in one of the three shapes."""
    vector, _, _, _, matrix, _, _, _, scalar = parameters((HALF, SINGLE, BRAIN))
    return [vector, matrix, scalar]


def gradients_of(params: list[Tensor], step: int) -> list[Tensor | None]:
    """Gradients of every size, in the dtype of their parameter; now and then one is missing."""
    generator = torch.Generator().manual_seed(step)
    size = 10.0 ** (torch.rand((), generator=generator).item() * 3 - 2)
    grads: list[Tensor | None] = [(torch.randn(p.shape, generator=generator) * size).to(p.dtype) for p in params]
    if step % 7 == 3:
        grads[step % len(grads)] = None
    return grads


class Race:
    """Our optimizer, torch's on FP32, and the equations, side by side."""

    def __init__(
        self,
        cls: type[torch.optim.Optimizer],
        options: dict[str, Any],
        lr: float | Tensor = 0.01,
        max_grad_norm: float | None = None,
    ) -> None:
        self.params = few_parameters()
        self.twins = twins_of(self.params)
        mine, yours = (lr.clone() if isinstance(lr, Tensor) else lr for _ in range(2))
        self.ours = MixedPrecisionOptimizer(cls(self.params, lr=mine, **options), max_grad_norm=max_grad_norm)
        self.theirs = cls(self.twins, lr=yours, foreach=False, **options)
        self.oracle = Oracle(self.twins, "sgd" if cls is torch.optim.SGD else "adam")
        self.max_grad_norm = max_grad_norm
        self.norms: list[tuple[float, float, float]] = []
        self.path = 0.0  # what the weight that moved most has moved, step by step

    def run(self, steps: range = range(STEPS)) -> Race:
        for step in steps:
            self._set_lr(0.02 * (1.0 + math.cos(step / 15.0)) + 1e-4)
            grads = gradients_of(self.params, step)
            for param, twin, grad in zip(self.params, self.twins, grads, strict=True):
                param.grad = None if grad is None else grad.clone()
                twin.grad = None if grad is None else grad.to(SINGLE, copy=True)
            before = self.oracle.p.value
            self._step(grads)
            self.path += float(np.abs(self.oracle.p.value - before).max())
            self.check()
        return self

    def _set_lr(self, value: float) -> None:
        for group in (*self.ours.param_groups, *self.theirs.param_groups):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def _step(self, grads: list[Tensor | None]) -> None:
        # The clip coefficient is off, relatively, by: ours, 1 U of the squares and of the root, + 1e-6, max_norm and
        # the quotient; torch's, a rounding of each sum as well, of all n elements.
        numel = sum(grad.numel() for grad in grads if grad is not None)
        clip_error = np.array([[6.0], [2.0 * numel + 16.0]]) * U
        self.oracle.step(grads, self.theirs.param_groups[0], clip_of(grads, self.max_grad_norm), clip_error)
        if self.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.twins, self.max_grad_norm, foreach=False)
        self.ours.step()
        self.theirs.step()
        if self.max_grad_norm is not None:
            self.norms.append((self.ours.last_grad_norm, float(norm), norm_of(grads)))

    def check(self) -> None:
        """Raises AssertionError where a weight lies beyond its bound, or is not its master rounded."""
        masters = list(self.ours.master_params())
        for param, master in zip(self.params, masters, strict=True):
            assert same_bits(param, master.to(param.dtype)), "the parameter is not its master, rounded"
        assert self.oracle.distance(masters, 0) <= 1.0, "ours is beyond its bound"
        assert self.oracle.distance(self.twins, 1) <= 1.0, "torch's is beyond its bound"


@every_case
def test_200_steps_stay_within_the_bound(case):
    """And that bound is small: of the largest weight and the path's length, 1/4 ULP a step for SGD, 1 ULP for Adam."""
    cls, options = case
    race = Race(cls, options).run()
    ulp = 2.0 * U * (np.abs(race.oracle.p.value).max() + race.path)
    bound = race.oracle.p.error[0].max() / (STEPS * ulp)
    assert bound <= (0.25 if cls is torch.optim.SGD else 1.0)


@pytest.mark.parametrize("case", CASES[::5], ids=_name)
def test_200_clipped_steps_stay_within_the_bound(case):
    cls, options = case
    race = Race(cls, options, max_grad_norm=1.0).run()
    assert 20 < sum(exact > 1.0 for _, _, exact in race.norms) < STEPS - 20  # some are clipped, some are not
    for ours, theirs, exact in race.norms:
        assert abs(ours - exact) <= 2 * U * exact
        assert abs(theirs - exact) <= 100 * U * exact


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_the_learning_rate_may_be_a_tensor(cls):
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {"weight_decay": 0.1}
    race = Race(cls, options, lr=torch.tensor(0.01)).run()
    (group,) = race.ours.param_groups
    assert isinstance(group["lr"], Tensor)


def test_betas_may_be_tensors():
    params = parameters()
    oracle = Oracle(params, "adam")
    betas = (torch.tensor(0.75), torch.tensor(0.875))
    inner = torch.optim.Adam(params, lr=torch.tensor(0.0625), betas=betas, foreach=False)
    optimizer = MixedPrecisionOptimizer(inner)
    for step in range(20):
        grads = gradients_of(params, step)
        feed(params, grads)
        optimizer.step()
        oracle.step(grads, optimizer.param_groups[0])
        assert oracle.distance(list(optimizer.master_params()), 0) <= 1.0


@pytest.mark.parametrize(
    ("cls", "options", "key"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, "momentum"),
        (torch.optim.Adam, {}, "betas"),
        (torch.optim.AdamW, {"amsgrad": True}, "betas"),
        (torch.optim.Adam, {"weight_decay": 0.002}, "weight_decay"),
        (torch.optim.SGD, {"momentum": 0.9}, "nesterov"),
        (torch.optim.AdamW, {}, "eps"),
    ],
)
def test_any_hyperparameter_may_change_every_step(cls, options, key):
    """As OneCycleLR cycles momentum and betas; the bias correction is that of today's betas, as in torch."""
    values = {
        "momentum": lambda x: 0.95 - 0.1 * x,
        "betas": lambda x: (0.95 - 0.5 * x, 0.999),
        "weight_decay": lambda x: 0.01 * x,
        "nesterov": lambda x: x > 0.5,
        "eps": lambda x: 10.0 ** (-8 + 4 * x),
    }
    race = Race(cls, options)
    for step in range(60):
        for group in (*race.ours.param_groups, *race.theirs.param_groups):
            group[key] = values[key]((1 + math.sin(step)) / 2)
        race.run(range(step, step + 1))


def test_groups_keep_their_own_options():
    params = parameters()
    twins = twins_of(params)

    def groups(own):
        return [
            {"params": own[:2], "lr": 0.1, "amsgrad": True},
            {"params": own[2:5], "weight_decay": 0.1},
            {"params": own[5:], "betas": (0.5, 0.9), "maximize": True},
        ]

    optimizer = MixedPrecisionOptimizer(torch.optim.Adam(groups(params)))
    theirs = torch.optim.Adam(groups(twins), foreach=False)
    oracles = [Oracle(group["params"], "adam") for group in theirs.param_groups]
    for step in range(STEPS):
        grads = gradients_of(params, step)
        feed(params, grads)
        feed(twins, [None if grad is None else grad.to(SINGLE, copy=True) for grad in grads])
        for oracle, group in zip(oracles, theirs.param_groups, strict=True):
            oracle.step([p.grad for p in group["params"]], group)
        optimizer.step()
        theirs.step()
    masters = list(optimizer.master_params())
    for oracle, part in zip(oracles, (slice(2), slice(2, 5), slice(5, None)), strict=True):
        assert oracle.distance(masters[part], 0) <= 1.0
        assert oracle.distance(twins[part], 1) <= 1.0
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert set(optimizer.state[params[5]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_first_moment_without_memory_is_the_gradient():
    """beta1 = 0, as GANs train: m = g exactly, however much larger the last gradient was."""
    (param,) = parameters([SINGLE])[:1]
    optimizer = MixedPrecisionOptimizer(torch.optim.Adam([param], betas=(0.0, 0.99)))
    for grad in (torch.full((7,), 1e6), torch.linspace(1e-4, 3e-4, 7)):
        param.grad = grad
        optimizer.step()
        assert same_bits(optimizer.state[param]["exp_avg"], grad)


# Sabotage: each of these must be noticed by the comparison above.


def _rules(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Replaces every rule by `change(rule, p, g, slots, c)`."""

    def install(monkeypatch):
        for name, rule in list(reference.RULES.items()):
            monkeypatch.setitem(
                reference.RULES, name, lambda p, g, slots, c, rule=rule: change(rule, p.clone(), g, slots, c)
            )

    return install


def _scalars(change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Replaces the scalars' functions by what `change(function, h, step)` returns."""

    def install(monkeypatch):
        for name, function in list(reference.SCALAR_FUNCTIONS.items()):
            monkeypatch.setitem(reference.SCALAR_FUNCTIONS, name, lambda h, step, f=function: change(f, h.copy(), step))

    return install


def _with(h: np.ndarray, index: int, value: float) -> np.ndarray:
    h[index] = value
    return h


def _flipped(rule, p, g, slots, c):
    new, state = rule(p, g, slots, c)
    return p + (p - new), state


def _skipped(rule, p, g, slots, c):
    return p, rule(p, g, slots, c)[1]


def _doubled(rule, p, g, slots, c):
    new, state = rule(p, g, slots, c)
    return p + (new - p) * 2, state


def _state_forgotten(rule, p, g, slots, c):
    return rule(p, g, slots, c)[0], slots


def _a_thousandth_more(rule, p, g, slots, c):
    new, state = rule(p, g, slots, c)
    return p + (new - p) * 1.001, state


def _without_largest(p, g, slots, c):
    new, moments = rules.ADAM.update(p, g, slots[:2], c)
    return new, (*moments, slots[2])


def _no_clip(monkeypatch):
    decide = reference.decide

    def without(table, *args, **kwargs):
        decide(table, *args, **kwargs)
        table.decision[layout.CLIP] = 1.0

    monkeypatch.setattr(reference, "decide", without)


def _no_write_back(monkeypatch):
    update = reference.update

    def without(table, *args):
        kept = [entry.param.detach().clone() for entry in table.entries]
        update(table, *args)
        for entry, param in zip(table.entries, kept, strict=True):
            if entry.write_back:
                entry.param.data.copy_(param)

    monkeypatch.setattr(reference, "update", without)


SGD = (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02})
NESTEROV = (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})
ADAM = (torch.optim.Adam, {"weight_decay": 0.02, "amsgrad": True})
ADAMW = (torch.optim.AdamW, {"weight_decay": 0.02, "eps": 1e-4})
SABOTAGE = {
    "sign flipped": (_rules(_flipped), [SGD, ADAM, ADAMW]),
    "update skipped": (_rules(_skipped), [SGD, ADAM, ADAMW]),
    "rate doubled": (_rules(_doubled), [SGD, ADAM, ADAMW]),
    "rate a thousandth too high": (_rules(_a_thousandth_more), [SGD, ADAM, ADAMW]),
    "state forgotten": (_rules(_state_forgotten), [SGD, ADAM, ADAMW]),
    "clip dropped": (_no_clip, [SGD, ADAM]),
    "no bias correction": (_scalars(lambda f, h, step: f(h, step * 0 + 2**30)), [ADAM, ADAMW]),
    "step counted twice": (_scalars(lambda f, h, step: f(h, 2 * step)), [ADAM, ADAMW]),
    "step off by one": (_scalars(lambda f, h, step: f(h, step + 1)), [SGD, ADAM, ADAMW]),
    "no weight decay in SGD": (_scalars(lambda f, h, step: f(_with(h, 3, 0.0), step)), [SGD]),
    "no weight decay in Adam": (_scalars(lambda f, h, step: f(_with(h, 4, 0.0), step)), [ADAM, ADAMW]),
    "weight decay of the other kind": (_scalars(lambda f, h, step: f(_with(h, 6, 1.0 - h[6]), step)), [ADAM, ADAMW]),
    "no momentum": (_scalars(lambda f, h, step: f(_with(h, 1, 0.0), step)), [SGD, NESTEROV]),
    "no dampening": (_scalars(lambda f, h, step: f(_with(h, 2, 0.0), step)), [SGD]),
    "no nesterov": (_scalars(lambda f, h, step: f(_with(h, 4, 0.0), step)), [NESTEROV]),
    "no eps": (_scalars(lambda f, h, step: f(_with(h, 3, 0.0), step)), [ADAMW]),
    "maximize": (_scalars(lambda f, h, step: f(_with(h, 5, 1.0), step)), [SGD, ADAM, ADAMW]),
    "no largest moment": (
        lambda monkeypatch: monkeypatch.setitem(reference.RULES, "adam_amsgrad", _without_largest),
        [ADAM],
    ),
    "parameter not written": (_no_write_back, [SGD, ADAM]),
}


@pytest.mark.parametrize(
    ("sabotage", "case"),
    [
        pytest.param(install, case, id=f"{name}-{case[0].__name__}")
        for name, (install, cases) in SABOTAGE.items()
        for case in cases
    ],
)
def test_a_sabotaged_update_is_noticed(sabotage, case, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_module", reference)
    cls, options = case
    race = Race(cls, options, max_grad_norm=1.0)
    sabotage(monkeypatch)
    with pytest.raises(AssertionError, match=r"beyond its bound|not its master"):
        race.run(range(20))


def test_without_sabotage_the_same_race_is_clean():
    for cls, options in (SGD, NESTEROV, ADAM, ADAMW):
        Race(cls, options, max_grad_norm=1.0).run(range(20))


def test_a_gradient_of_zeros_and_tiny_gradients():
    """No moment has filled: 0 / (0 + eps) is 0; and FP32's smallest numbers do not become NaN."""
    for cls in (torch.optim.Adam, torch.optim.AdamW):
        params = parameters()
        oracle = Oracle(params, "adam")
        optimizer = MixedPrecisionOptimizer(cls(params))
        for size in (0.0, 2.0**-24, 0.0, 1.0):
            grads = [torch.full_like(p, size) for p in params]
            feed(params, grads)
            optimizer.step()
            oracle.step(grads, optimizer.param_groups[0])
            assert oracle.distance(list(optimizer.master_params()), 0) <= 1.0
