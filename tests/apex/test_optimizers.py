"""apex's optimizers: its constructors, and its CUDA kernels' equations written in float64."""

import copy
import inspect
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from mpengine import MixedPrecisionOptimizer, rules
from mpengine.apex.optimizers import FusedAdagrad, FusedAdam, FusedLAMB, FusedNovoGrad, FusedSGD
from mpengine.optim import LAMB, NovoGrad
from tests.harness import SINGLE, feed, frozen, gradients, parameters, same_bits
from tests.rules.properties import check_equations, check_kernels, check_learns, check_run

REQUIRED = None
SIGNATURES = {
    FusedAdam: {
        "lr": 1e-3,
        "bias_correction": True,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "adam_w_mode": True,
        "weight_decay": 0.0,
        "amsgrad": False,
        "set_grad_none": True,
        "capturable": False,
        "master_weights": False,
    },
    FusedSGD: {
        "lr": REQUIRED,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "wd_after_momentum": False,
        "materialize_master_grads": True,
        "set_grad_none": False,
    },
    FusedLAMB: {
        "lr": 1e-3,
        "bias_correction": True,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.01,
        "amsgrad": False,
        "adam_w_mode": True,
        "grad_averaging": True,
        "set_grad_none": True,
        "max_grad_norm": 1.0,
        "use_nvlamb": False,
    },
    FusedNovoGrad: {
        "lr": 1e-3,
        "bias_correction": True,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "reg_inside_moment": False,
        "grad_averaging": True,
        "norm_type": 2,
        "init_zero": False,
        "set_grad_none": True,
    },
    FusedAdagrad: {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0, "set_grad_none": True, "adagrad_w_mode": False},
}
every_class = pytest.mark.parametrize("cls", SIGNATURES, ids=lambda cls: cls.__name__)


def build(cls, params, **options):
    return cls(params, **({"lr": 0.1, "momentum": 0.9} if cls is FusedSGD else {}), **options)


@every_class
def test_the_constructor_is_apexs(cls):
    """In order, too: scripts pass arguments by position."""
    (first, *others) = inspect.signature(cls).parameters.values()
    assert first.name == "params"
    assert {parameter.name: parameter.default for parameter in others} == SIGNATURES[cls]
    assert [parameter.name for parameter in others] == list(SIGNATURES[cls])
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in others)


@pytest.mark.parametrize("cls", [FusedAdam, FusedLAMB, FusedNovoGrad])
def test_amsgrad_is_refused_as_apex_refuses_it(cls):
    with pytest.raises(RuntimeError, match=f"{cls.__name__} does not support the AMSGrad variant"):
        cls([torch.zeros(1)], amsgrad=True)


def test_what_else_is_refused():
    with pytest.raises(RuntimeError, match="master_weights is True and capturable False"):
        FusedAdam([torch.zeros(1)], master_weights=True)
    FusedAdam([torch.zeros(1)], master_weights=True, capturable=True)
    for norm_type in (0, 1):
        with pytest.raises(RuntimeError, match=f"norm_type is {norm_type}; .* only norm_type=2"):
            FusedNovoGrad([torch.zeros(1)], norm_type=norm_type)
    for wrong in ({"momentum": 0.0}, {"dampening": 0.1}):
        with pytest.raises(ValueError, match="nesterov needs a momentum above 0 and no dampening"):
            FusedSGD([torch.zeros(1)], **{"lr": 0.1, "momentum": 0.9, "nesterov": True, **wrong})
    with pytest.raises(ValueError, match="lr is -1"):
        FusedAdam([torch.zeros(1)], lr=-1.0)


def test_the_rate_of_fused_sgd_is_required_as_apex_has_it():
    with pytest.raises(ValueError, match="FusedSGD has no lr"):
        FusedSGD([torch.zeros(1)])
    with pytest.raises(ValueError, match="FusedSGD has no lr"):
        FusedSGD([{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)]}])
    groups = FusedSGD([{"params": [torch.zeros(1)], "lr": rate} for rate in (0.1, 0.2)]).param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.2]
    with pytest.raises(TypeError):
        FusedSGD(torch.zeros(1), lr=0.1)


@every_class
def test_flags_may_be_numbers(cls):
    """Scripts pass on what a command line gave them: 1 for True."""
    flag = "wd_after_momentum" if cls is FusedSGD else "adagrad_w_mode" if cls is FusedAdagrad else "bias_correction"
    assert build(cls, [torch.zeros(1)], **{flag: 1}).param_groups[0][flag] is True


@every_class
def test_zero_grad_does_as_the_constructor_said(cls):
    params = [nn.Parameter(torch.ones(3))]
    for set_to_none in (True, False):
        optimizer = build(cls, params, set_grad_none=set_to_none)
        for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            (param,) = each.param_groups[0]["params"]
            param.grad = torch.ones(3)
            each.zero_grad()
            assert (param.grad is None) == set_to_none
            param.grad = torch.ones(3)
            each.zero_grad(set_to_none=not set_to_none)
            assert (param.grad is None) != set_to_none


# The equations of apex's CUDA kernels, in float64.


def adam(p, grads, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, bias_correction=True, adam_w_mode=True):
    """csrc/multi_tensor_adam.cu."""
    (beta1, beta2), m, v, path = betas, 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        first, second = (1 - beta1**t, 1 - beta2**t) if bias_correction else (1.0, 1.0)
        if not adam_w_mode:
            g = g + weight_decay * p
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = (m / first) / (np.sqrt(v / second) + eps)
        if adam_w_mode:
            update = update + weight_decay * p
        p = p - lr * update
        path.append(p)
    return path


def sgd(p, grads, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, wd_after_momentum=False):
    """csrc/multi_tensor_sgd_kernel.cu."""
    moment, path = None, []
    for g in grads:
        if not wd_after_momentum:
            g = g + weight_decay * p
        if momentum != 0.0:
            moment = g if moment is None else moment * momentum + (1 - dampening) * g
            g = g + momentum * moment if nesterov else moment
        if wd_after_momentum:
            g = g + weight_decay * p
        p = p - lr * g
        path.append(p)
    return path


def adagrad(p, grads, lr=1e-2, eps=1e-10, weight_decay=0.0, adagrad_w_mode=False):
    """csrc/multi_tensor_adagrad.cu."""
    h, path = 0.0, []
    for g in grads:
        if not adagrad_w_mode:
            g = g + weight_decay * p
        h = h + g * g
        update = g / (np.sqrt(h) + eps)
        if adagrad_w_mode:
            update = update + weight_decay * p
        p = p - lr * update
        path.append(p)
    return path


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=2)), ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam(flags, weight_decay):
    options = dict(zip(("bias_correction", "adam_w_mode"), flags, strict=True)) | {"weight_decay": weight_decay}
    check_equations(lambda p: FusedAdam(p, **options), adam, **options)
    options |= {"betas": (0.5, 0.9), "eps": 1e-3, "lr": 0.01}
    check_equations(lambda p: FusedAdam(p, **options), adam, sizes=(1, 50), **options)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("wd_after_momentum", [False, True])
def test_sgd(options, wd_after_momentum):
    options = {**options, "lr": 0.01, "weight_decay": 0.1, "wd_after_momentum": wd_after_momentum}
    check_equations(lambda p: FusedSGD(p, **options), sgd, **options)
    if not options.get("nesterov"):
        options["dampening"] = 0.3
        check_equations(lambda p: FusedSGD(p, **options), sgd, **options)


@pytest.mark.parametrize("adagrad_w_mode", [False, True])
def test_adagrad(adagrad_w_mode):
    options = {"adagrad_w_mode": adagrad_w_mode, "weight_decay": 0.1}
    check_equations(lambda p: FusedAdagrad(p, **options), adagrad, **options)
    check_equations(lambda p: FusedAdagrad(p, eps=1e-2, lr=0.1), adagrad, eps=1e-2, lr=0.1)


def test_lamb_and_novograd_are_mpengines():
    """Their own tests compare them with apex's kernels."""
    cases = (
        (FusedLAMB, LAMB, {"weight_decay": 0.1, "adam_w_mode": False, "use_nvlamb": True, "max_grad_norm": 0.5}),
        (FusedNovoGrad, NovoGrad, {"weight_decay": 0.1, "reg_inside_moment": True, "init_zero": True}),
        (FusedLAMB, LAMB, {}),
        (FusedNovoGrad, NovoGrad, {}),
    )
    for fused, own, options in cases:
        assert issubclass(fused, own)
        params, twins = parameters((SINGLE,)), parameters((SINGLE,))
        for optimizer, mine in ((fused(params, **options), params), (own(twins, **options), twins)):
            for step in range(4):
                feed(mine, gradients(mine, step))
                optimizer.step()
        assert same_bits(params, twins)


@pytest.mark.parametrize(
    ("cls", "groups"),
    [
        (FusedAdam, ({"weight_decay": 0.1}, {"adam_w_mode": False, "bias_correction": False, "weight_decay": 0.1})),
        (FusedAdagrad, ({"weight_decay": 0.1}, {"adagrad_w_mode": True, "weight_decay": 0.1})),
        (FusedSGD, ({"momentum": 0.9, "weight_decay": 0.1, "wd_after_momentum": True},)),
        (FusedSGD, ({"momentum": 0.9, "weight_decay": 0.1, "wd_after_momentum": True, "nesterov": True},)),
    ],
)
def test_the_kernels_have_the_same_bits(cls, groups):
    for group in groups:
        check_kernels(cls, group)


@every_class
def test_in_a_run(cls):
    check_run(lambda params: build(cls, params, weight_decay=0.05))


def test_in_a_run_where_the_decay_comes_last():
    check_run(lambda params: FusedSGD(params, 0.1, 0.9, weight_decay=0.05, wd_after_momentum=True, nesterov=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda params: FusedAdam(params, lr=0.01),
        lambda params: FusedSGD(params, lr=0.1, momentum=0.9),
        lambda params: FusedAdagrad(params, lr=0.05),
    ],
)
def test_it_learns(make):
    check_learns(make)


def test_fused_sgd_counts_no_steps():
    """Its state is torch.optim.SGD's, whose checkpoints it takes and whose steps it then goes on with."""
    params, twins = parameters((SINGLE,)), parameters((SINGLE,))
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01}
    fused, plain = FusedSGD(params, **options), torch.optim.SGD(twins, **options, foreach=False)
    for step in range(2):
        feed(params, gradients(params, step))
        fused.step()
    assert all(set(fused.state[p]) == {"momentum_buffer"} for p in params)
    plain.load_state_dict(copy.deepcopy(fused.state_dict()))  # torch would share its tensors
    with torch.no_grad():
        for param, twin in zip(params, twins, strict=True):
            twin.copy_(param)
    prepared = MixedPrecisionOptimizer(fused)
    for step in range(2, 5):
        feed(params, gradients(params, step))
        feed(twins, gradients(twins, step))
        prepared.step()
        plain.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-7)
    again = FusedSGD(parameters((SINGLE,)), **options)
    again.load_state_dict(prepared.torch_state_dict())
    assert frozen(again.state_dict()["state"]) == frozen(prepared.torch_state_dict()["state"])


def as_apex_saves(state_dict):
    """The steps of a group stand in the group; flags that apex's optimizers keep for themselves are left out."""
    saved = copy.deepcopy(state_dict)
    for group in saved["param_groups"]:
        steps = [saved["state"][key].pop("step") for key in group["params"] if "step" in saved["state"][key]]
        if steps:
            group["step"] = int(steps[0])
        for flag in ("adam_w_mode", "use_nvlamb", "wd_after_momentum", "adagrad_w_mode"):
            group.pop(flag, None)
    return saved


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("cls", [FusedAdam, FusedSGD, FusedLAMB, FusedAdagrad], ids=lambda cls: cls.__name__)
def test_what_apex_saved_goes_on(cls, prepared):
    """As if it had never stopped, whatever copies were made of the optimizer before."""
    whole, params = parameters((SINGLE,)), parameters((SINGLE,))
    through, first = build(cls, whole, weight_decay=0.1), build(cls, params, weight_decay=0.1)
    second = copy.deepcopy(build(cls, params, weight_decay=0.1))
    for step in range(6):
        for mine, optimizer in ((whole, through), (params, first)):
            if step == 3 and optimizer is first:
                with torch.no_grad():
                    for param, value in zip(second.param_groups[0]["params"], params, strict=True):
                        param.copy_(value)
                saved, params = as_apex_saves(first.state_dict()), second.param_groups[0]["params"]
                first = MixedPrecisionOptimizer(second) if prepared else second
                first.load_state_dict(saved)
                mine, optimizer = params, first
            feed(mine, gradients(mine, step))
            optimizer.step()
    assert same_bits(params, whole)


def test_a_state_of_apexs_novograd_is_refused():
    """Its second moments stand in the group, by the order of gradients that there were."""
    params = parameters((SINGLE,))
    optimizer = MixedPrecisionOptimizer(FusedNovoGrad(params))
    saved = optimizer.torch_state_dict()
    for own in saved["state"].values():
        del own["exp_avg_sq"], own["step"]
    saved["param_groups"][0].update(step=3, exp_avg_sq=[torch.zeros(0), torch.ones(3)])
    with pytest.raises(ValueError, match=r"missing: \['exp_avg_sq'\]"):
        optimizer.load_state_dict(saved)


def test_an_existing_rule_is_used_where_its_arithmetic_is_the_same():
    def rule(**options):
        group = FusedSGD([torch.zeros(1)], lr=0.1, **options).param_groups[0]
        return FusedSGD.family.variant(group)

    assert rule() is rules.SGD
    assert rule(wd_after_momentum=True) is rules.SGD
    assert rule(momentum=0.9) is rules.SGD_MOMENTUM
    assert rule(momentum=0.9, wd_after_momentum=True) is rules.APEX_SGD_MOMENTUM


# Sabotage: each of these must be noticed.


def changed(rule, change):
    update = rule.update
    return lambda p, g, slots, c: change(p, slots, *update(p, g, slots, c))


SABOTAGE = {
    "sign flipped": lambda p, old, new, slots: (p + (p - new), slots),
    "update skipped": lambda p, old, new, slots: (p, slots),
    "rate doubled": lambda p, old, new, slots: (p - (p - new) * 2, slots),
    "state forgotten": lambda p, old, new, slots: (new, old),
}
CASES = {
    "adam": (rules.APEX_ADAM, lambda p: FusedAdam(p), adam, {}),
    "adagrad": (rules.APEX_ADAGRAD, lambda p: FusedAdagrad(p), adagrad, {}),
    "sgd": (
        rules.APEX_SGD_MOMENTUM,
        lambda p: FusedSGD(p, 0.1, 0.9, weight_decay=0.1, wd_after_momentum=True),
        sgd,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "wd_after_momentum": True},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("change", SABOTAGE.values(), ids=SABOTAGE)
def test_a_sabotaged_rule_is_noticed(change, case, monkeypatch):
    rule, make, equations, options = case
    check_equations(make, equations, **options)
    monkeypatch.setitem(rule.__dict__, "update", changed(rule, change))
    with pytest.raises(AssertionError):
        check_equations(make, equations, **options)


@pytest.mark.parametrize("wrong", [{"adam_w_mode": False}, {"bias_correction": False}, {"weight_decay": 0.0}], ids=str)
def test_another_option_of_adam_is_noticed(wrong):
    with pytest.raises(AssertionError):
        check_equations(lambda p: FusedAdam(p, weight_decay=0.1), adam, **{"weight_decay": 0.1, **wrong})


def test_another_place_of_the_decay_is_noticed():
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    with pytest.raises(AssertionError):
        check_equations(lambda p: FusedSGD(p, **options, wd_after_momentum=True), sgd, **options)
    with pytest.raises(AssertionError):
        check_equations(lambda p: FusedAdagrad(p, weight_decay=0.1, adagrad_w_mode=True), adagrad, weight_decay=0.1)
