"""Optimizers that a rule makes: what they take, refuse, keep and hand on; by themselves and prepared."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import mpengine
from mpengine import optim
from mpengine.rules import Hyperparameter, Kernels, RuleOptimizer, declare, family_of
from tests.rules import own_rules
from tests.rules.own_rules import KERNELS, PARTS, RATE, Ratio, Steady, update


def weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_grads(params, seed):
    generator = torch.Generator().manual_seed(100 + seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def train(optimizer, steps=3, first=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for k in range(first, first + steps):
        give_grads(params, k)
        optimizer.step()
    return params


def flat_bits(params):
    return torch.cat([p.detach().flatten() for p in params]).view(torch.int32)


# Hyperparameters.


@pytest.mark.parametrize(
    ("hyperparameter", "value", "message"),
    [
        (RATE, -1e-9, "x is -1e-09; it must be finite and at least 0."),
        (RATE, float("inf"), "x is inf; it must be finite and at least 0."),
        (RATE, float("nan"), "x is nan; it must be finite and at least 0."),
        (RATE, "0.1", "x is '0.1'; it must be a number."),
        (RATE, True, "x is True; it must be a number."),
        (RATE, None, "x is None; it must be a number."),
        (RATE, torch.tensor(-1.0), "x is -1.0; it must be finite and at least 0."),
        (RATE, torch.ones(2), "x is tensor([1., 1.]); it must be a number."),
        (Hyperparameter(0.5, above=0.0, at_most=1.0), 0.0, "x is 0.0; it must be finite and above 0 and at most 1."),
        (Hyperparameter(0.5, above=0.0, at_most=1.0), 1.5, "x is 1.5; it must be finite and above 0 and at most 1."),
        (Hyperparameter(), float("nan"), "x is nan; it must be finite."),
        (Hyperparameter((0.9, 0.99), below=1.0), (0.9, 1.0), "x[1] is 1.0; it must be finite and below 1."),
        (Hyperparameter((0.9, 0.99)), (0.9,), "x is (0.9,); it must be 2 numbers, as (0.9, 0.99)."),
        (Hyperparameter((0.9, 0.99)), 0.9, "x is 0.9; it must be 2 numbers, as (0.9, 0.99)."),
        (Hyperparameter(False), 1, "x is 1; it must be True or False."),
    ],
)
def test_values_that_a_hyperparameter_refuses(hyperparameter, value, message):
    with pytest.raises((TypeError, ValueError)) as error:
        hyperparameter.check("x", value)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("hyperparameter", "value"),
    [
        (RATE, 0),
        (RATE, np.float32(0.5)),
        (RATE, torch.tensor([0.1])),
        (Hyperparameter(1, above=0.0, at_most=1.0), 1.0),
        (Hyperparameter((0.9, 0.99), below=1.0), [0.0, 0.5]),
        (Hyperparameter(False), True),
    ],
)
def test_values_that_a_hyperparameter_takes(hyperparameter, value):
    hyperparameter.check("x", value)


def test_a_default_out_of_its_own_bounds_is_refused():
    with pytest.raises(ValueError, match=r"the default is -1\.0; it must be finite and at least 0"):
        Hyperparameter(-1.0, at_least=0.0)


def test_constructors_take_defaults_and_positions_and_refuse_the_rest():
    (weight,) = weights((3,))
    assert Ratio([weight]).defaults == {"lr": 1e-2, "beta": 0.9, "eps": 1e-8, "maximize": False}
    assert Ratio([weight], 0.5, 0.8).defaults["beta"] == 0.8
    with pytest.raises(ValueError, match=r"beta is 1\.0; it must be finite and at least 0 and below 1\."):
        Ratio([weight], beta=1.0)
    with pytest.raises(TypeError, match="momentum"):
        Ratio([weight], momentum=0.5)
    with pytest.raises(
        TypeError, match=r"given the hyperparameters \['lr'\]; it has \['beta', 'eps', 'lr', 'maximize'"
    ):
        RuleOptimizer.__init__(Ratio.__new__(Ratio), [weight], {"lr": 0.1})


def test_a_hyperparameter_without_a_default_has_to_be_given():
    needy = declare("Needy", own_rules.plain_update, hyperparameters={"a": RATE, "lr": Hyperparameter(at_least=0.0)})
    with pytest.raises(TypeError, match="lr"):
        needy(weights((3,)))
    assert needy(weights((3,)), 0.1).defaults == {"lr": 0.1, "a": 1e-2}


def test_a_bad_value_set_between_steps_is_refused_before_any_group_steps():
    first, second = weights((3,), (4,))
    optimizer = Ratio([{"params": [first]}, {"params": [second], "lr": 0.1}])
    train(optimizer, 1)
    before, state = flat_bits([first, second]), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.param_groups[1]["beta"] = 2.0
    with pytest.raises(ValueError, match=r"beta of group 1 is 2\.0; it must be finite and at least 0 and below 1\."):
        train(optimizer, 1)
    assert torch.equal(flat_bits([first, second]), before)
    for own, was in zip(optimizer.state_dict()["state"].values(), state.values(), strict=True):
        assert all(torch.equal(own[name], was[name]) for name in was)
    del optimizer.param_groups[1]["beta"]
    with pytest.raises(ValueError, match="group 1 of this Ratio has no beta; set it there"):
        optimizer.step()


def test_a_bad_value_stops_a_prepared_step_before_the_scaler_hears_of_it():
    model, scaler = torch.nn.Linear(3, 2), mpengine.GradScaler("cpu", init_scale=256.0)
    optimizer = mpengine.prepare(model, Ratio(model.parameters()), scaler)
    scaler.scale(model(torch.ones(1, 3).half()).float().sum()).backward()
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"lr of group 0 is -1\.0"):
        optimizer.step()
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (0, 0)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()  # the very same gradients
    scaler.update()
    assert optimizer.steps_taken == 1


def test_a_schedule_that_leaves_the_bounds_is_refused():
    model = torch.nn.Linear(3, 2)
    bounded = declare("Bounded", own_rules.plain_update, hyperparameters={"lr": Hyperparameter(0.1, at_most=0.2)})
    optimizer = mpengine.prepare(model, bounded(model.parameters()), mpengine.GradScaler("cpu"))
    grow = torch.optim.lr_scheduler.LambdaLR
    with pytest.raises(ValueError, match=r"lr of the schedule is 0\.3.*at most 0\.2"):
        optimizer.schedule(lambda opt: grow(opt, lambda step: 1.0 + step), steps=3)
    optimizer.schedule(lambda opt: grow(opt, lambda step: 1.0 + step), steps=2)


# Declaring.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hyperparameters": {"beta": RATE}}, "lr must be one of them"),
        ({"hyperparameters": {"lr": 0.1}}, r"hyperparameter lr of rule 'X' is 0\.1; give Hyperparameter\(0\.1\)"),
        ({"hyperparameters": {"lr": RATE, "x": Hyperparameter((0.1,) * 10)}}, "declares 11 numbers.*room for 10"),
        ({"hyperparameters": {"lr": RATE, "params": RATE}}, "'params' of rule 'X' is no name, or one that torch needs"),
        ({"hyperparameters": {"lr": RATE, "not a name": RATE}}, "'not a name' of rule 'X'"),
        ({"slots": ("a", "b", "c", "d")}, "has 4 slots; there is room for 3"),
        ({"slots": ("a", "a")}, "keeps 'a' twice"),
        ({"slots": ("step",)}, r"keeps 'step' twice, or with the engine, which keeps \['master', 'step'\]"),
        ({"slots": ("a",), "cells": ("a",), "settle": print}, "keeps 'a' twice"),
        ({"cells": ("a",)}, "norms and cells are for settle to read"),
        ({"norms": 1, "settle": print}, "norms come from measure"),
        ({"initial": {"mean": 1.0, "other": 1.0}}, r"initial values of \['other'\]"),
        (
            {"kernels": Kernels(KERNELS.update)},
            r"'X' has scalars, and no Triton twin of it: give",
        ),
        ({"kernels": Kernels(KERNELS.update, KERNELS.scalars, print)}, "'X' has no measure, but a Triton twin of it"),
        ({"kernels": Kernels(None, KERNELS.scalars)}, "'X' has update, and no Triton twin"),
        ({"kernels": Kernels(update, KERNELS.scalars)}, "put @triton.jit above it"),
    ],
)
def test_declarations_that_are_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        declare("X", update, **{**PARTS, "kernels": KERNELS, **changes})


def test_a_class_needs_a_name():
    with pytest.raises(ValueError, match="'my rule' of rule 'my rule' is no name"):
        declare("my rule", update, **PARTS)


def test_a_declared_class_looks_like_one_that_was_written():
    assert (Ratio.__name__, Ratio.__module__) == ("Ratio", "tests.rules.own_rules")
    assert Ratio.__doc__ == "The mean gradient over the mean magnitude."
    assert issubclass(Ratio, torch.optim.Optimizer)
    assert family_of(Ratio(weights((1,)))) is Ratio.family


def test_the_name_of_a_built_in_rule_does_not_bring_its_functions():
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = mpengine.GradScaler("cpu", init_scale=1.0)
    optimizer = mpengine.prepare(model, own_rules.Adam(model.parameters(), lr=0.5), scaler)
    scaler.scale(model(torch.ones(1, 3).half()).float().sum()).backward()
    optimizer.step()
    for master, old in zip(optimizer.master_params(), before, strict=True):
        assert torch.equal(master, old - 0.5)


def test_a_subclass_with_a_step_of_its_own_is_stepped_by_it():
    class Twice(Ratio):
        def step(self, closure=None):
            super().step(closure)
            return super().step(closure)

    class Same(Ratio):
        pass

    assert family_of(Twice(weights((1,)))) is None
    assert family_of(Same(weights((1,)))) is Ratio.family


# By itself.


def test_by_itself_it_is_the_equations():
    params = weights((40,))
    optimizer, state = Ratio(params, lr=0.1), {}
    p = params[0].detach().double().numpy()
    for k in range(5):
        train(optimizer, 1, k)
        p, state = own_rules.paper(p, params[0].grad.double().numpy(), state, optimizer.param_groups[0])
        np.testing.assert_allclose(params[0].detach().numpy(), p, rtol=0, atol=5 * 2.0**-23 * 4 + 1e-6)


SHAPES = [(), (0,), (1,), (7, 3), (2, 3, 4, 5)]


@pytest.mark.parametrize("kind", [Ratio, Steady, optim.LAMB])
def test_weights_of_any_shape_and_layout_step_as_flat_ones(kind):
    """Norms are of the same numbers in another order: each step of Steady and LAMB within a few ULP."""
    shaped = weights(*SHAPES)
    shaped[-1].data = shaped[-1].data.contiguous(memory_format=torch.channels_last)
    lined = [torch.nn.Parameter(p.detach().flatten().clone()) for p in shaped]
    optimizers = kind(shaped, lr=1e-2), kind(lined, lr=1e-2)
    for k in range(3):
        give_grads(shaped, k)
        for p, line in zip(shaped, lined, strict=True):
            line.grad = p.grad.flatten()
        for optimizer in optimizers:
            optimizer.step()
        for p, line in zip(shaped, lined, strict=True):
            tolerance = 0.0 if kind is Ratio else 4 * 2.0**-23
            torch.testing.assert_close(p.detach().flatten(), line.detach(), rtol=tolerance, atol=0.0)
    assert shaped[-1].is_contiguous(memory_format=torch.channels_last)
    for p in shaped:
        for name in kind.family.slots:
            assert optimizers[0].state[p][name].dtype == torch.float32
            assert optimizers[0].state[p][name].stride() in (p.stride(), ())


def test_a_weight_without_a_gradient_is_left_alone():
    first, second = weights((3,), (4,))
    optimizer = Ratio([first, second])
    first.grad = torch.ones(3)
    optimizer.step()
    assert second not in optimizer.state
    assert int(optimizer.state[first]["step"]) == 1


def test_closures_hooks_and_what_step_returns():
    (weight,) = weights((3,))
    optimizer, seen = Ratio([weight]), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        seen.append("closure")
        return loss

    assert optimizer.step(closure).requires_grad
    assert seen == ["before", "closure", "after"]
    assert optimizer.step() is None


def test_gradients_and_weights_that_cannot_be_stepped_are_named():
    (fine,), table = weights((3,)), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = Ratio([("head.bias", fine), ("table.weight", table.weight)])
    table(torch.tensor([1])).sum().backward()
    fine.grad = torch.ones(3)
    before = flat_bits([fine])
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'table\.weight' is torch\.sparse_coo"):
        optimizer.step()
    assert torch.equal(flat_bits([fine]), before)
    half = torch.nn.Parameter(torch.ones(2, 5).half())
    half.grad = torch.ones(2, 5).half()
    with pytest.raises(
        RuntimeError, match=r"group 0, parameter 0 of shape \(2, 5\) is torch\.float16.*mpengine\.prepare"
    ):
        Ratio([half]).step()


def test_each_group_steps_with_its_own_hyperparameters_as_they_are():
    one, other = weights((5,), (5,), seed=1), weights((5,), (5,), seed=1)
    together = Ratio([{"params": one[:1], "lr": 0.1}, {"params": one[1:], "beta": 0.5}], lr=0.2)
    apart = Ratio(other[:1], lr=0.1), Ratio(other[1:], lr=0.2, beta=0.5)
    for k in range(4):
        give_grads(one, k)
        give_grads(other, k)
        for optimizer in (together, *apart):
            optimizer.step()
            optimizer.param_groups[-1]["lr"] *= 0.5  # of the second group, and of either alone
        apart[0].param_groups[0]["lr"] = 0.1
    assert torch.equal(flat_bits(one), flat_bits(other))


def test_a_flag_turns_the_direction():
    up, down = weights((9,)), weights((9,))
    optimizers = Ratio(up, maximize=True), Ratio(down)
    for k in range(3):
        give_grads(up, k)
        down[0].grad = -up[0].grad
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(flat_bits(up), flat_bits(down))


def test_clipping_by_itself():
    """max_grad_norm is no number of the rule's, and clips as clip_grad_norm_ does, within the rounding of the norm."""
    own, others = weights((30,), (4, 5)), weights((30,), (4, 5))
    optimizer, plain = Steady(own), Steady(others, max_grad_norm=0.0)
    assert Steady.family.hyperparameters(optimizer.param_groups[0]) == (1e-2, 0.9)
    for k in range(3):
        give_grads(own, k)
        give_grads(others, k)
        torch.nn.utils.clip_grad_norm_(others, 0.5)
        optimizer.step()
        plain.step()
    torch.testing.assert_close(flat_bits(own).view(torch.float32), flat_bits(others).view(torch.float32))
    assert not torch.equal(flat_bits(own), flat_bits(train(Steady(weights((30,), (4, 5)), max_grad_norm=0.0))))


def test_schedulers_of_torch_drive_it():
    (weight,) = weights((3,))
    optimizer = optim.LAMB([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=10)
    for k in range(9):
        train(optimizer, 1, k)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0.1
    assert optimizer.param_groups[0]["betas"][0] > 0.9


# Saving.


@pytest.mark.parametrize("kind", [Ratio, Steady, optim.LAMB])
def test_saved_loaded_pickled_and_copied_it_goes_on_bit_for_bit(kind):
    params = weights((3,), (4, 5))
    optimizer = kind(params, lr=0.05)
    train(optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded_params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    loaded = kind(loaded_params, lr=1.0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    pickled, copied = pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)
    assert type(pickled) is type(copied) is kind
    expected = flat_bits(train(optimizer, 2, 2))
    for other in (loaded, pickled, copied):
        assert torch.equal(flat_bits(train(other, 2, 2)), expected)
        for group in other.param_groups:
            for p in group["params"]:
                assert int(other.state[p]["step"]) == 4
                assert all(other.state[p][name].dtype == torch.float32 for name in kind.family.slots)


def saved_and_changed(change):
    optimizer = Steady(weights((3,)))
    train(optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (Steady, lambda s: s["param_groups"][0].update(lr=-1.0), r"lr of group 0 is -1\.0"),
        (Steady, lambda s: s["param_groups"][0].pop("beta"), "group 0 of this Steady has no beta"),
        (
            Steady,
            lambda s: s["state"][0].update(mean_norm=torch.ones(3)),
            r"mean_norm of group 0, parameter 0 .*\(3,\)",
        ),
        (Steady, lambda s: s["state"][0].pop("mean_norm"), "has the value None in the state"),
        (Ratio, lambda s: s["param_groups"][0].update(eps=0.5, maximize=False), r"the mean of group 0, parameter 0"),
    ],
)
def test_states_that_do_not_fit_are_refused_whole(kind, change, message):
    state = saved_and_changed(change)
    params = weights((3,), seed=5)
    optimizer = kind(params)
    train(optimizer, 1)
    before, groups = copy.deepcopy(optimizer.state_dict()["state"][0]), dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert dict(optimizer.param_groups[0]) == groups
    assert all(torch.equal(optimizer.state[params[0]][name], before[name]) for name in before)


def test_a_state_is_not_rounded_to_fp16_behind_ones_back():
    optimizer = Ratio(weights((3,)))
    train(optimizer, 1)
    half = Ratio([torch.nn.Parameter(torch.zeros(3).half())])
    with pytest.raises(ValueError, match=r"would be loaded as torch\.float16.*into what mpengine\.prepare returns"):
        half.load_state_dict(optimizer.state_dict())


def test_a_prepared_optimizer_keeps_cells_from_the_first_step_on():
    model, scaler = torch.nn.Linear(3, 2), mpengine.GradScaler("cpu", init_scale=1.0)
    optimizer = mpengine.prepare(model, Steady(model.parameters()), scaler)
    assert [float(optimizer.state[p]["mean_norm"]) for p in model.parameters()] == [1.0, 1.0]
    assert optimizer.max_grad_norm == 0.5
    scaler.scale(model(torch.ones(1, 3).half()).float().sum()).backward()
    optimizer.step()
    assert 0.9 < float(optimizer.state[model.weight]["mean_norm"]) < 1.0  # 0.9 + 0.1 * the norm, clipped to 0.5


@pytest.mark.parametrize("value", [1.0, (0.9, 2.0)])
def test_a_prepared_optimizer_refuses_a_saved_value_out_of_its_bounds_by_name(value):
    model = torch.nn.Linear(3, 2)
    optimizer = mpengine.prepare(model, Ratio(model.parameters()), mpengine.GradScaler("cpu"))
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["beta"] = value
    with pytest.raises(ValueError, match="beta of group 0 is"):
        optimizer.load_state_dict(state)


def test_a_class_that_cannot_be_found_by_its_name_says_so():
    hidden = declare("Hidden", update, **PARTS)
    with pytest.raises((pickle.PicklingError, AttributeError), match="Hidden"):
        pickle.dumps(hidden(weights((1,))))
    found = declare("Ratio", update, **PARTS, module="tests.rules.own_rules")
    assert found.__module__ == "tests.rules.own_rules"


# The tests above notice.


def test_the_tests_notice_a_check_that_is_left_out(monkeypatch):
    monkeypatch.setattr(Ratio, "check_group", lambda self, group, index: None)
    with pytest.raises(pytest.fail.Exception):
        test_a_bad_value_set_between_steps_is_refused_before_any_group_steps()
    with pytest.raises(pytest.fail.Exception):
        test_a_bad_value_stops_a_prepared_step_before_the_scaler_hears_of_it()


def test_the_tests_notice_hyperparameters_of_the_wrong_group(monkeypatch):
    row = RuleOptimizer._row
    monkeypatch.setattr(RuleOptimizer, "_row", lambda self, group: row(self, self.param_groups[0]))
    with pytest.raises(AssertionError):
        test_each_group_steps_with_its_own_hyperparameters_as_they_are()


def test_the_tests_notice_a_step_that_is_not_counted(monkeypatch):
    step_one = RuleOptimizer._step_one

    def uncounted(self, group, param, grad):
        step_one(self, group, param, grad)
        self.state[param]["step"] -= 1

    monkeypatch.setattr(RuleOptimizer, "_step_one", uncounted)
    with pytest.raises(AssertionError):
        test_by_itself_it_is_the_equations()
