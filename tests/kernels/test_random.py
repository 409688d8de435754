"""Random problems, whole steps, against the reference bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpengine.kernels import layout
from mpengine.optim import Lion
from tests.kernels.harness import BRAIN, HALF, SINGLE, Grad, Problem, Spec, check

KINDS = st.sampled_from([HALF, BRAIN, SINGLE])
SIZES = st.sampled_from([0, 1, 2, 31, 257, 1023, 1024, 1025, 2048, 3333])
NON_FINITE = [float("inf"), float("-inf"), float("nan")]

BETAS = {"betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5)])}
MOMENTUM = {"momentum": st.sampled_from([0.0, 0.9])}
OPTIONS = {
    torch.optim.SGD: {**MOMENTUM, "dampening": st.just(0.0), "nesterov": st.just(False)},
    torch.optim.Adam: {**BETAS, "amsgrad": st.booleans()},
    torch.optim.AdamW: {**BETAS, "amsgrad": st.booleans()},
    torch.optim.RMSprop: {**MOMENTUM, "centered": st.booleans(), "alpha": st.sampled_from([0.99, 0.3])},
    torch.optim.Adagrad: {"lr_decay": st.sampled_from([0.0, 0.1]), "eps": st.sampled_from([1e-10, 1e-3])},
    torch.optim.Adadelta: {"rho": st.sampled_from([0.9, 0.5]), "eps": st.sampled_from([1e-6, 1e-3])},
    Lion: BETAS,
}


@st.composite
def specs(draw, losses, groups):
    size = draw(SIZES)
    pending = sorted(draw(st.sets(st.integers(0, losses - 1), max_size=min(losses, layout.MAX_SOURCES))))
    grads = []
    for loss in pending:
        spikes = ()
        if size and draw(st.integers(0, 15)) == 0:
            spikes = ((draw(st.integers(0, size - 1)), draw(st.sampled_from([*NON_FINITE, 0.0, -0.0, 60000.0]))),)
        grads.append(Grad(loss, draw(KINDS), draw(st.booleans()), spikes))
    shape, channels_last = (size,), False
    if size % 3 == 0 and size and draw(st.booleans()):
        shape, channels_last = (1, 3, size // 3, 1), True
    return Spec(shape, draw(KINDS), tuple(grads), draw(st.integers(0, groups - 1)), draw(st.booleans()), channels_last)


@st.composite
def problems(draw):
    losses, groups = draw(st.sampled_from([1, 1, 2, 3, 8, 11])), draw(st.integers(1, 2))
    optimizer = draw(st.sampled_from(list(OPTIONS)))
    rates = {"lr": st.sampled_from([0.0, 1e-3, 0.1]), "weight_decay": st.sampled_from([0.0, 0.1])}
    options = rates | {"maximize": st.booleans()} | OPTIONS[optimizer]
    chosen = [draw(st.fixed_dictionaries(options)) for _ in range(groups)]
    for group in chosen:
        if optimizer is torch.optim.SGD and group["momentum"] and draw(st.booleans()):
            group |= draw(st.sampled_from([{"nesterov": True}, {"dampening": 0.25}]))
    scale = st.sampled_from([None, 1.0, 3.0, 0.1, 2.0**-126, 65536.0, 1e6])
    return Problem(
        tensors=tuple(draw(st.lists(specs(losses, groups), max_size=4))),
        optimizer=optimizer,
        groups=tuple(chosen),
        scales=tuple(draw(scale) for _ in range(losses)),
        kinds=tuple(draw(st.sampled_from([layout.ABSENT, layout.FRESH, layout.STALE])) for _ in range(losses)),
        max_norm=draw(st.sampled_from([float("inf"), 1.0, 1e-3])),
        found_inf=draw(st.sampled_from([None, None, None, 0.0, 1.0])),
        magnitude=draw(st.sampled_from([1e-3, 100.0, 30000.0])),
        seed=draw(st.integers(0, 1000)),
    )


NO_DEADLINE = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


@settings(max_examples=60, derandomize=True, **NO_DEADLINE)
@given(problems())
def test_random_problems(problem):
    check(problem)


@pytest.mark.fuzz
@settings(max_examples=1000, **NO_DEADLINE)
@given(problems())
def test_many_random_problems(problem):
    check(problem, steps=3)
