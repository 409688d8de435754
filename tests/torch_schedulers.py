"""One of each of torch's learning-rate schedulers, and optimizers of two groups for them."""

from __future__ import annotations

import inspect

import torch
from torch.optim import lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from mpengine.unroll import unroll
from tests.harness import FUSED, SINGLE, parameters

STEPS = 20


class Sawtooth(LRScheduler):
    """A scheduler of the user's own, on torch's base class."""

    def get_lr(self):
        return [base * (1.0 - 0.1 * (self.last_epoch % 3)) for base in self.base_lrs]


def cycles(optimizer):
    """Whether there is a momentum to cycle."""
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


# Every one changes the lr within 20 steps, and after the 7th.
SCHEDULERS = {
    "LRScheduler": Sawtooth,
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9 + 0.001 * epoch),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.7),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 9, 15], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=11),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=13),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 12)], milestones=[5]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=13, eta_min=1e-4),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=1e-7),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=3, step_size_down=4, mode="triangular2", cycle_momentum=cycles(o)
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.5, 0.05], total_steps=20, cycle_momentum=cycles(o)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=17, power=2.0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=[0.005, 0.001], anneal_epochs=12),
}


def known_to_torch():
    """Names of the scheduler classes that this torch has."""
    found = set(lr_scheduler.__all__)
    for module in (lr_scheduler, swa_utils, torch.optim):
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and issubclass(cls, LRScheduler) and not name.startswith("_"):
                found.add(name)
    return found


def advance(scheduler, step=0):
    """Steps a scheduler; one that asks for a metric gets one that does not improve."""
    metric = [1.0 + step] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []
    scheduler.step(*metric)


def groups(params):
    """Two groups with different rates."""
    return [{"params": params[:1]}, {"params": params[1:], "lr": 0.03}]


def made(make=FUSED["momentum"]):
    return make(groups(parameters([SINGLE])))


def rows_of(optimizer, schedule, steps=STEPS):
    table = unroll(optimizer.param_groups, optimizer.defaults, schedule, steps)
    assert table.steps == steps
    return table, [table.row(step) for step in range(steps)]
