"""RMSprop, Adagrad and Adadelta in every option."""

from __future__ import annotations

import pytest
import torch

RMSPROP, ADAGRAD, ADADELTA = torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta
VARIANTS = [
    (RMSPROP, {}),
    (RMSPROP, {"momentum": 0.9}),
    (RMSPROP, {"centered": True}),
    (RMSPROP, {"centered": True, "momentum": 0.9}),
    (ADAGRAD, {}),
    (ADADELTA, {}),
]
OTHERS = [
    (RMSPROP, {"alpha": 0.5, "eps": 1e-3}),
    (RMSPROP, {"alpha": 0.3, "centered": True}),
    (ADAGRAD, {"lr_decay": 0.1}),
    (ADAGRAD, {"initial_accumulator_value": 0.3, "eps": 1e-3}),
    (ADADELTA, {"rho": 0.5}),
    (ADADELTA, {"eps": 1e-3}),
]
CASES = [
    *((cls, {**options, **more}) for cls, options in VARIANTS for more in ({}, {"weight_decay": 0.02})),
    *((cls, {**options, "weight_decay": 0.02, "maximize": True}) for cls, options in VARIANTS),
    *OTHERS,
]
STATE = {RMSPROP: {"square_avg"}, ADAGRAD: {"sum"}, ADADELTA: {"square_avg", "acc_delta"}}


def name(case):
    cls, options = case
    return "-".join([cls.__name__, *(f"{key}={value}" for key, value in options.items())])


every_variant = pytest.mark.parametrize("case", VARIANTS, ids=name)
every_case = pytest.mark.parametrize("case", CASES, ids=name)
