"""LARC against apex's own loop over torch's optimizers, and against the paper's equations in float64."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler, MixedPrecisionOptimizer, rules
from mpengine.apex.optimizers import FusedAdam, FusedSGD
from mpengine.optim import LAMB, LARC
from tests.harness import SINGLE, feed, frozen, gradients, network, parameters, same_bits, started, static_scaler
from tests.rules.properties import U, check_equations, check_kernels, check_learns, check_run, exact, numbers

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
INNER = {
    "sgd": lambda params, **kw: SGD(params, **{"lr": 0.1, "weight_decay": 0.05, **kw}),
    "momentum": lambda params, **kw: SGD(params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, **kw}),
    "nesterov": lambda params, **kw: SGD(params, **{"lr": 0.1, "momentum": 0.9, "nesterov": True, **kw}),
    "dampened": lambda params, **kw: SGD(params, **{"lr": 0.1, "momentum": 0.9, "dampening": 0.25, **kw}),
    "adam": lambda params, **kw: ADAM(params, **{"lr": 0.01, "weight_decay": 0.05, **kw}),
    "amsgrad": lambda params, **kw: ADAM(params, **{"lr": 0.01, "amsgrad": True, "weight_decay": 0.05, **kw}),
    "adamw": lambda params, **kw: ADAMW(params, **{"lr": 0.01, "weight_decay": 0.05, **kw}),
    "fused adam": lambda params, **kw: FusedAdam(params, **{"lr": 0.01, "weight_decay": 0.05, **kw}),
    "fused sgd": lambda params, **kw: FusedSGD(
        params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "wd_after_momentum": True, **kw}
    ),
}
every_inner = pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
both_modes = pytest.mark.parametrize("clip", [True, False], ids=["clip", "scale"])


def adapted(p, g, lr, weight_decay, trust, eps, clip):
    """What apex.parallel.LARC makes of a gradient, in float64."""
    weight, grad = np.linalg.norm(p), np.linalg.norm(g)
    if weight == 0 or grad == 0:
        return g
    rate = trust * weight / (grad + weight * weight_decay + eps)
    if clip:
        rate = min(rate / lr, 1.0)
    return (g + weight_decay * p) * rate


def sgd(p, grads, lr=0.1, momentum=0.9, weight_decay=0.05, trust=0.02, eps=1e-8, clip=True):
    """LARC around momentum SGD."""
    buffer, path = None, []
    for g in grads:
        g = adapted(p, g, lr, weight_decay, trust, eps, clip)
        buffer = g if buffer is None else momentum * buffer + g
        p = p - lr * buffer
        path.append(p)
    return path


def adam(p, grads, lr=0.01, weight_decay=0.05, trust=0.02, eps=1e-8, clip=True):
    """LARC around Adam with torch's defaults."""
    m, v, path = 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        g = adapted(p, g, lr, weight_decay, trust, eps, clip)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        path.append(p)
    return path


@both_modes
@pytest.mark.parametrize("trust", [0.001, 0.02, 10.0])
def test_the_equations(clip, trust):
    options = {"clip": clip, "trust": trust}
    sizes = (1, 50, 3000) if trust == 0.02 else (50,)
    check_equations(lambda p: LARC(INNER["momentum"](p), trust, clip), sgd, sizes, **options)
    for name in ("adam", "adamw", "fused adam"):
        check_equations(lambda p, name=name: LARC(INNER[name](p), trust, clip), adam, sizes, **options)


def step_of_apex(optimizer, trust=0.02, clip=True, eps=1e-8):
    """apex.parallel.LARC.step, line for line."""
    with torch.no_grad():
        decays = []
        for group in optimizer.param_groups:
            decays.append(group["weight_decay"])
            group["weight_decay"] = 0
            for p in group["params"]:
                if p.grad is None:
                    continue
                weight, grad = torch.norm(p.data), torch.norm(p.grad.data)
                if weight != 0 and grad != 0:
                    rate = trust * weight / (grad + weight * decays[-1] + eps)
                    if clip:
                        rate = min(rate / group["lr"], 1)
                    p.grad.data += decays[-1] * p.data
                    p.grad.data *= rate
    optimizer.step()
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


@both_modes
@pytest.mark.parametrize("name", [name for name in INNER if "fused" not in name])
def test_apex_around_torchs_optimizer(name, clip):
    """30 steps, zero weights and zero gradients among them, each to 64 roundings of its way and one of the weight."""
    ours, theirs = ([*parameters((SINGLE,)), nn.Parameter(torch.zeros(4))] for _ in range(2))
    larc, twin = LARC(INNER[name](ours), clip=clip), INNER[name](theirs, foreach=False)
    ways, befores = [0.0] * len(theirs), [q.detach().clone() for q in theirs]
    for step in range(30):
        grads = gradients(ours, step, 10.0 ** (step % 3 - 1))
        grads[step % 4] = torch.zeros_like(grads[step % 4]) if step % 2 else None
        feed(ours, grads)
        feed(theirs, grads)
        larc.step()
        step_of_apex(twin, clip=clip)
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            ways[i] += float((q.detach() - befores[i]).abs().max())
            befores[i] = q.detach().clone()
            bound = U * (2 * (step + 1) * float(befores[i].abs().max()) + (128 + 4 * step) * ways[i])
            torch.testing.assert_close(p, q, rtol=0.0, atol=bound)


@pytest.mark.parametrize("name", ["momentum", "adam", "amsgrad", "fused adam", "sgd"])
def test_the_kernels_have_the_same_bits(name):
    check_kernels(lambda groups, lr: LARC(INNER[name](groups, lr=lr), clip=name != "momentum"))


@every_inner
def test_in_a_run(inner):
    check_run(lambda params: LARC(inner(params), trust_coefficient=0.1))


def test_it_learns():
    check_learns(lambda params: LARC(SGD(params, lr=0.5, momentum=0.9), trust_coefficient=0.05, clip=False))


def test_a_gradient_without_a_norm_is_left_as_it_is():
    """Its weight decay, too: apex leaves both."""
    start, grads = numbers(steps=1)

    def make(params):
        return LARC(SGD(params, lr=0.5, weight_decay=0.1))

    (moved,) = exact(make, start * 0.0, grads)
    np.testing.assert_allclose(moved, -0.5 * grads[0], rtol=1e-15)
    (kept,) = exact(make, start, grads * 0.0)
    np.testing.assert_array_equal(kept, start)


def test_with_lr_zero_nothing_moves():
    start, grads = numbers(steps=2)
    for clip in (True, False):
        for moved in exact(lambda params, clip=clip: LARC(SGD(params, lr=0.0, momentum=0.9), clip=clip), start, grads):
            np.testing.assert_array_equal(moved, start)


# It is an optimizer as any.


def test_it_shares_groups_and_state_with_the_optimizer_inside():
    params = parameters((SINGLE,))
    inner = INNER["momentum"](params)
    larc = LARC(inner)
    assert isinstance(larc, torch.optim.Optimizer)
    assert larc.optim is inner
    assert larc.param_groups is inner.param_groups
    feed(params, gradients(params, 0))
    larc.step()
    assert larc.state is inner.state
    assert set(inner.state) == set(params)
    assert set(inner.state[params[0]]) == {"momentum_buffer"}
    larc.zero_grad()
    assert all(p.grad is None for p in params)
    more = nn.Parameter(torch.ones(3))
    larc.add_param_group({"params": [more], "lr": 0.5})
    assert inner.param_groups[1]["params"] == [more]
    assert "momentum" in repr(larc)


@every_inner
def test_its_state_is_that_of_the_optimizer_inside(inner):
    """A checkpoint of the one loads into the other, and into the prepared one, and back."""
    params = parameters((SINGLE,))
    larc = LARC(inner(params))
    for step in range(2):
        feed(params, gradients(params, step))
        larc.step()
    saved = copy.deepcopy(larc.state_dict())
    bare = inner(parameters((SINGLE,)))
    bare.load_state_dict(saved)
    assert frozen(bare.state_dict()) == frozen(saved)
    again = LARC(inner(parameters((SINGLE,))))
    again.load_state_dict(bare.state_dict())
    assert again.param_groups is again.optim.param_groups
    assert frozen(again.state_dict()) == frozen(saved)
    prepared = MixedPrecisionOptimizer(LARC(inner(parameters((SINGLE,)))))
    prepared.load_state_dict(saved)
    kept = {key: own for key, own in saved["state"].items() if own}
    assert frozen(prepared.torch_state_dict()["state"]) == frozen(kept)


@every_inner
def test_copies_and_pickles_go_on_alike(inner):
    params = parameters((SINGLE,))
    larc = LARC(inner(params), 0.005, False, 1e-6)
    feed(params, gradients(params, 0))
    larc.step()
    params[0].grad = None
    for other in (copy.deepcopy(larc), pickle.loads(pickle.dumps(larc))):
        assert type(other.optim) is type(larc.optim)
        assert (other.trust_coefficient, other.clip, other.eps) == (0.005, False, 1e-6)
        own = other.param_groups[0]["params"]
        twin = copy.deepcopy(larc)
        for optimizer in (other, twin):
            mine = optimizer.param_groups[0]["params"]
            feed(mine, gradients(mine, 1))
            optimizer.step()
        assert same_bits(own, twin.param_groups[0]["params"])


def test_a_prepared_one_is_copied():
    model = network()
    optimizer = mpengine.prepare(model, LARC(INNER["momentum"](model.parameters())), GradScaler())
    other = copy.deepcopy(optimizer)
    params = other.param_groups[0]["params"]
    feed(params, gradients(params, 0))
    other._scaler = None
    other.step()
    assert other.steps_taken == 1
    assert optimizer.steps_taken == 0


@pytest.mark.parametrize("on", ["larc", "inside", "prepared"])
def test_schedulers_may_be_built_on_any_of_them(on):
    """And do not warn that nothing stepped."""
    params = parameters((SINGLE,))
    inner = INNER["sgd"](params)
    larc = LARC(inner)
    optimizer = MixedPrecisionOptimizer(larc, static_scaler(1.0)) if on == "prepared" else larc
    scheduler = torch.optim.lr_scheduler.StepLR({"larc": larc, "inside": inner, "prepared": optimizer}[on], 1, 0.5)
    for step in range(3):
        assert larc.param_groups[0]["lr"] == 0.1 * 0.5**step
        feed(params, gradients(params, step))
        optimizer.step()
        if on == "prepared":
            optimizer.scaler.update()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()


def test_a_schedule_is_laid_out():
    """The clip is by the lr of each step."""
    ours, theirs = parameters((SINGLE,)), parameters((SINGLE,))
    scaler = started(GradScaler(init_scale=1.0, min_scale=1.0, max_scale=1.0))
    laid = MixedPrecisionOptimizer(LARC(INNER["momentum"](ours), 10.0), scaler)
    laid.schedule(lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, 0.5), steps=6)
    stepped = LARC(INNER["momentum"](theirs), 10.0)
    for step in range(6):
        stepped.param_groups[0]["lr"] = 0.1 * 0.5 ** (step // 2)
        for params, optimizer in ((ours, laid), (theirs, stepped)):
            feed(params, gradients(params, step))
            optimizer.step()
        scaler.update()
    assert same_bits(ours, theirs)


def test_its_numbers_may_change():
    params, twins = parameters((SINGLE,)), parameters((SINGLE,))
    optimizer, other = MixedPrecisionOptimizer(LARC(INNER["sgd"](params))), LARC(INNER["sgd"](twins), 0.5)
    optimizer._inner.trust_coefficient = 0.5
    feed(params, gradients(params, 0))
    feed(twins, gradients(twins, 0))
    optimizer.step()
    other.step()
    assert same_bits(params, twins)


class Own(SGD):
    def step(self, closure=None):
        return None


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.NAdam, LAMB, Own, lambda params: None])
def test_around_another_optimizer_it_says_which_work(make):
    with pytest.raises(TypeError, match=r"works around torch\.optim\.SGD, Adam and AdamW, and around FusedSGD"):
        LARC(make(parameters((SINGLE,))))


def test_wrong_arguments_are_refused():
    params = parameters((SINGLE,))
    inner = INNER["sgd"](params)
    for wrong in ({"trust_coefficient": -1.0}, {"eps": -1e-8}, {"eps": float("nan")}, {"clip": "yes"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LARC(inner, **wrong)
    with pytest.raises(ValueError, match="maximize is True"):
        LARC(SGD(params, lr=0.1, maximize=True))
    larc = LARC(inner)
    with pytest.raises(ValueError, match="maximize is True"):
        larc.add_param_group({"params": [nn.Parameter(torch.ones(1))], "maximize": True})
    assert len(larc.param_groups) == 1
    with pytest.raises(TypeError, match="LARC is around a LARC"):
        LARC(larc)


# Sabotage: each of these must be noticed.


def patched(change):
    """Settles, and changes what comes of it."""
    return lambda c, norms, cells: (change(list(rules.larc.larc_settle(c, norms, cells)[0])), cells)


def replaced(at, value):
    return patched(lambda c: [*c[:at], np.array([value]), *c[at + 1 :]])


def on(change):
    """The update with its result changed."""

    def update(p, g, slots, c, momentum=rules.larc.RULES[rules.SGD_MOMENTUM].update):
        return change(p, slots, *momentum(p, g, slots, c))

    return update


SABOTAGE = {
    "trust ratio dropped": {"settle": replaced(11, 1.0)},
    "decay dropped": {"settle": replaced(10, 0.0)},
    "decay twice": {"settle": replaced(1, 0.05)},
    "rate doubled": {"settle": patched(lambda c: [*c[:11], c[11] * 2.0])},
    "norms exchanged": {"settle": lambda c, norms, cells: rules.larc.larc_settle(c, norms[::-1], cells)},
    "sign flipped": {"update": on(lambda p, old, new, slots: (p + (p - new), slots))},
    "momentum forgotten": {"update": on(lambda p, old, new, slots: (new, old))},
}


@pytest.mark.parametrize("changed", SABOTAGE.values(), ids=SABOTAGE)
def test_a_sabotaged_rule_is_noticed(changed, monkeypatch):
    rule = rules.larc.RULES[rules.SGD_MOMENTUM]
    for name, function in changed.items():
        monkeypatch.setitem(rule.__dict__, name, function)
    with pytest.raises(AssertionError):
        check_equations(lambda params: LARC(INNER["momentum"](params)), sgd)


@pytest.mark.parametrize("wrong", [{"clip": False}, {"eps": 0.5}, {"trust": 0.021}], ids=str)
def test_another_number_is_noticed(wrong):
    check_equations(lambda params: LARC(INNER["momentum"](params)), sgd)
    with pytest.raises(AssertionError):
        check_equations(lambda params: LARC(INNER["momentum"](params)), sgd, **wrong)
