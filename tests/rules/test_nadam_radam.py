"""NAdam and RAdam against torch.optim's, and against the equations: within the bound that `tests.oracle` derives."""

import itertools

import pytest
import torch
from torch import nn

from mpengine import GradScaler, MixedPrecisionOptimizer, backend, reference, rules
from tests.harness import SINGLE, feed, gradients, parameters, same_bits, started
from tests.kernels.harness import Problem, Spec, check
from tests.oracle import Oracle
from tests.rules.properties import check_kernels, check_learns, check_resume, check_skip
from tests.test_against_torch import SABOTAGE, Race

NADAM, RADAM = torch.optim.NAdam, torch.optim.RAdam
DECAYS = ({}, {"weight_decay": 0.002}, {"weight_decay": 0.02, "decoupled_weight_decay": True})
SHARED = [{**decay, "maximize": maximize} for decay, maximize in itertools.product(DECAYS, (False, True))]
CASES = [
    *((NADAM, options) for options in SHARED),
    *((RADAM, options) for options in SHARED),
    (NADAM, {"momentum_decay": 0.1, "betas": (0.5, 0.9)}),
    (NADAM, {"momentum_decay": 0.0, "eps": 1e-3}),
    (NADAM, {"betas": (0.0, 0.99)}),
    (RADAM, {"betas": (0.5, 0.9), "eps": 1e-3}),
    (RADAM, {"betas": (0.9, 0.6)}),  # rho is 4: never rectified, and the quotient behind r has a 0
    (RADAM, {"betas": (0.0, 0.0)}),
]


def name(case):
    cls, options = case
    return "-".join([cls.__name__, *(f"{key}={value}" for key, value in options.items())])


def race_of(cls, options, **kwargs):
    race = Race(cls, options, **kwargs)
    race.oracle = Oracle.of(race.twins, race.theirs)
    return race


@pytest.mark.parametrize("case", CASES, ids=name)
def test_60_steps_stay_within_the_bound(case):
    race_of(*case).run(range(60))


@pytest.mark.parametrize("cls", [NADAM, RADAM])
def test_with_a_clipped_gradient(cls):
    race_of(cls, {"weight_decay": 0.01}, max_grad_norm=1.0).run(range(30))


@pytest.mark.parametrize("cls", [NADAM, RADAM])
def test_lr_may_be_a_tensor(cls):
    race_of(cls, {}, lr=torch.tensor(0.01)).run(range(20))


def test_the_rectified_step_begins_when_torchs_does():
    """With beta2 = 0.999 at the sixth step: before, the step is lr * m / (1 - beta1^t), whatever v is."""
    params = [nn.Parameter(torch.zeros(1))]
    optimizer = MixedPrecisionOptimizer(RADAM(params, lr=1.0))
    moved = []
    for _ in range(7):
        before = params[0].item()
        feed(params, [torch.full((1,), 100.0)])
        optimizer.step()
        moved.append(before - params[0].item())
    assert all(abs(way - 100.0) < 1e-3 for way in moved[:5])
    assert all(0.0 < way < 1.0 for way in moved[5:])


@pytest.mark.parametrize(
    "case",
    [
        (NADAM, {}),
        (NADAM, {"weight_decay": 0.1, "maximize": True, "momentum_decay": 0.1}),
        (NADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.4, 0.9)}),
        (RADAM, {}),
        (RADAM, {"weight_decay": 0.1, "maximize": True, "betas": (0.3, 0.5)}),
        (RADAM, {"weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.9, 0.6)}),
    ],
    ids=name,
)
def test_the_kernels_have_the_same_bits(case):
    cls, options = case
    check_kernels(cls, options)


def test_the_rectified_step_on_the_device():
    """Seven steps: from the sixth on the other branch."""
    check(Problem((Spec((70,)),), RADAM), steps=7)


@pytest.mark.parametrize("cls", [NADAM, RADAM])
def test_in_a_run(cls):
    make = lambda params: cls(params, lr=0.01)  # noqa: E731
    check_skip(make)
    check_resume(make)
    check_learns(make)


@pytest.mark.parametrize("cls", [NADAM, RADAM])
def test_states_go_to_torch_and_back(cls):
    """Bit for bit, mu_product and step too; and both go on alike."""
    ours, theirs = parameters((SINGLE,)), parameters((SINGLE,))
    prepared, plain = MixedPrecisionOptimizer(cls(ours, lr=0.01)), cls(theirs, lr=0.01, foreach=False)
    for step in range(4):
        feed(theirs, gradients(theirs, step))
        plain.step()
    saved = plain.state_dict()
    prepared.load_state_dict(saved)
    back = prepared.torch_state_dict()
    assert same_bits(back["state"], saved["state"])
    again = cls(parameters((SINGLE,)), lr=0.01)
    again.load_state_dict(back)
    assert same_bits(again.state_dict()["state"], saved["state"])


def test_mu_product_starts_at_one_and_is_torchs():
    ours, theirs = parameters((SINGLE,)), parameters((SINGLE,))
    prepared, plain = MixedPrecisionOptimizer(NADAM(ours)), NADAM(theirs, foreach=False)
    for step in range(5):
        for params, optimizer in ((ours, prepared), (theirs, plain)):
            feed(params, gradients(params, step))
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            assert same_bits(prepared.state[p]["mu_product"], plain.state[q]["mu_product"])


def test_a_state_without_mu_product_is_refused():
    optimizer = MixedPrecisionOptimizer(NADAM(parameters((SINGLE,))))
    saved = optimizer.state_dict()
    del saved["state"][1]["mu_product"]
    with pytest.raises(ValueError, match=r"missing: \['mu_product'\]"):
        optimizer.load_state_dict(saved)


def test_a_schedule_of_lr_and_betas():
    """Laid out ahead, as the same scheduler sets it step by step."""

    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, cycle_momentum=True)

    ours, theirs = parameters((SINGLE,)), parameters((SINGLE,))
    scaler = started(GradScaler(init_scale=1.0, min_scale=1.0, max_scale=1.0))
    laid = MixedPrecisionOptimizer(NADAM(ours), scaler)
    laid.schedule(schedule, steps=10)
    stepped = MixedPrecisionOptimizer(NADAM(theirs))
    scheduler = schedule(stepped)
    for step in range(10):
        feed(ours, gradients(ours, step))
        feed(theirs, gradients(theirs, step))
        laid.step()
        scaler.update()
        stepped.step()
        if step < 9:
            scheduler.step()
    assert same_bits(ours, theirs)


# Sabotage: each of these must be noticed.

NOTICED = ["sign flipped", "update skipped", "rate doubled", "state forgotten", "clip dropped", "step off by one"]
NOTICED += ["no weight decay in Adam", "rate a thousandth too high", "parameter not written"]


@pytest.mark.parametrize("cls", [NADAM, RADAM])
@pytest.mark.parametrize("sabotage", NOTICED)
def test_a_sabotaged_update_is_noticed(sabotage, cls, monkeypatch):
    monkeypatch.setattr(backend, "_cpu_module", reference)
    race = race_of(cls, {"weight_decay": 0.02}, max_grad_norm=1.0)
    SABOTAGE[sabotage][0](monkeypatch)
    with pytest.raises(AssertionError, match=r"beyond its bound|not its master"):
        race.run(range(20))


def test_a_forgotten_mu_product_is_noticed(monkeypatch):
    monkeypatch.setattr(backend, "_cpu_module", reference)
    race = race_of(NADAM, {})
    settle = reference.settle

    def without(table, *args):
        settle(table, *args)
        for entry in table.entries:
            entry.cells[0].fill_(1.0)

    monkeypatch.setattr(reference, "settle", without)
    with pytest.raises(AssertionError, match="beyond its bound"):
        race.run(range(20))


def test_they_take_the_fused_path_but_subclasses_do_not():
    class Own(NADAM):
        pass

    assert rules.family_of(NADAM([torch.zeros(1)])) is rules.nadam.FAMILY
    assert rules.family_of(RADAM([torch.zeros(1)])) is rules.radam.FAMILY
    assert rules.family_of(Own([torch.zeros(1)])) is None
