"""Optimizers that unscale and skip by themselves: torch's fused ones under our scaler, ours in their place."""

import pytest
import torch
from torch import nn

import mpengine
from tests.parity.harness import INF, NAN, Reach, assert_close_in_ulp, bits, make_scaler

CASES = {
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.25}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "maximize": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
}
every_case = pytest.mark.parametrize(("cls", "options"), CASES.values(), ids=CASES)


def some_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).half().to(dtype)) for s in ((5,), (3, 4), ())]


def some_grads(step, size=1.0):
    """Now and then a parameter is frozen or idle; never at the first step, see below."""
    generator = torch.Generator().manual_seed(step)
    grads = [torch.randn(s, generator=generator) * size for s in ((5,), (3, 4), ())]
    idle = {2: (0,), 3: (0, 2), 5: (1,), 6: (0, 1, 2), 7: (2,)}.get(step, ())
    return [None if i in idle else grad for i, grad in enumerate(grads)]


def assign(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None
        if grad is not None:
            param.grad_dtype = None  # an fp16 parameter may then hold an FP32 gradient
            param.grad = grad.clone()


def masters(optimizer):
    return [m.detach().clone() for m in optimizer.master_params()]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_fused_for_loop_and_ours_agree(cls, options, dtype):
    """The same gradients, some None, with freezing in between: torch's two and our two within 4 ULP a step.

    Ours does not depend on the loop that the wrapped optimizer was asked for: bit for bit.
    """
    loops = {"fused": {"fused": True}, "for-loop": {"foreach": False}}
    theirs = {name: cls(some_params(), **options, **loop) for name, loop in loops.items()}
    ours = {
        name: mpengine.MixedPrecisionOptimizer(cls(some_params(dtype), **options, **loop))
        for name, loop in loops.items()
    }
    params = {name: o.param_groups[0]["params"] for name, o in theirs.items()}
    reach = Reach([p.detach() for p in params["for-loop"]])
    for step in range(10):
        grads = some_grads(step)
        for optimizer in (*theirs.values(), *ours.values()):
            for i, param in enumerate(optimizer.param_groups[0]["params"]):
                param.requires_grad_(grads[i] is not None or step % 2 == 0)  # frozen, or only idle
            assign(optimizer.param_groups[0]["params"], grads)
            optimizer.step()
        reach.follow([p.detach() for p in params["for-loop"]])
    loop = [p.detach() for p in params["for-loop"]]
    assert bits(masters(ours["fused"])) == bits(masters(ours["for-loop"]))
    assert_close_in_ulp(masters(ours["fused"]), loop, reach, 10)
    assert_close_in_ulp([p.detach() for p in params["fused"]], loop, reach, 10)


def test_a_parameter_that_joins_late_stops_torchs_fused_momentum_but_not_ours():
    """No gradient at the first step, one at the second: torch's fused SGD raises, its for-loop and ours go on."""
    weights = {}
    for name, loop in (("fused", {"fused": True}), ("for-loop", {"foreach": False}), ("ours", {"fused": True})):
        params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = torch.optim.SGD(params, lr=0.125, momentum=0.5, **loop)
        if name == "ours":
            optimizer = mpengine.MixedPrecisionOptimizer(optimizer)
        assign(params, [torch.ones(2), None])
        optimizer.step()
        assign(params, [torch.ones(2), torch.ones(2)])
        if name == "fused":
            with pytest.raises(TypeError, match="expected Tensor"):
                optimizer.step()
            continue
        optimizer.step()
        weights[name] = bits(params)
    assert weights["ours"] == weights["for-loop"]


@every_case
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_found_inf_decides_on_the_device(cls, options, found_inf):
    """With found_inf 1 nothing changes, not even the step count; with 0 it is a step. torch's and ours."""
    for wrap in (lambda o: o, mpengine.MixedPrecisionOptimizer):
        params = some_params()
        optimizer = wrap(cls(params, **options, fused=True))
        assign(params, some_grads(0))
        optimizer.step()
        before = bits([params, [optimizer.state[p] for p in params]])
        assign(params, some_grads(1))
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found_inf)
        optimizer.step()
        after = bits([params, [optimizer.state[p] for p in params]])
        assert (after == before) == (found_inf == 1.0)


@every_case
@pytest.mark.parametrize("found_inf", [2.0, 3.0, NAN, 0.5, -1.0])
def test_any_other_verdict_skips_ours(cls, options, found_inf):
    """What `torch.amp.GradScaler` adds up over devices; `_amp_update_scale_` backs off for each of these."""
    params = some_params(torch.float16)
    optimizer = mpengine.MixedPrecisionOptimizer(cls(params, **options))
    before = bits([params, masters(optimizer)])
    assign(params, some_grads(0))
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(found_inf)
    optimizer.step()
    assert bits([params, masters(optimizer)]) == before
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (0, 1)


@every_case
@pytest.mark.parametrize("scale", [2.0**16, 2.0**-4])
def test_grad_scale_unscales(cls, options, scale):
    """Gradients times the scale, and `grad_scale` preset: the same step as without either, to the bit in ours."""
    results = []
    for preset in (None, torch.tensor(scale)):
        params = some_params()
        optimizer = mpengine.MixedPrecisionOptimizer(cls(params, **options))
        for step in range(3):
            assign(params, [None if g is None else g * (1.0 if preset is None else scale) for g in some_grads(step)])
            optimizer.grad_scale, optimizer.found_inf = preset, torch.tensor(0.0)
            optimizer.step()
        results.append(bits([params, [optimizer.state[p] for p in params]]))
    assert results[0] == results[1]


FORMS = {
    "torch": ("torch", lambda o: o),
    "plain": ("plain", lambda o: o),
    "inside torch's": ("torch", mpengine.MixedPrecisionOptimizer),
}


@every_case
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scale_of_the_users_own(cls, options, form, unscale):
    """`optimizer.grad_scale` preset to 4: gradients are 4 times as large, beside a loss scale of 8. Used once."""
    results = []
    for preset in (None, 4.0):
        kind, wrap = FORMS[form]
        scaler = make_scaler(kind, init_scale=8.0)
        scaler.scale(torch.ones((), requires_grad=True))
        params = some_params()
        optimizer = wrap(cls(params, **options, fused=True))
        for step in range(3):
            assign(params, [None if g is None else g * 8.0 * (preset or 1.0) for g in some_grads(step)])
            if preset is not None:
                optimizer.grad_scale = torch.tensor(preset)
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            assert not hasattr(optimizer, "grad_scale")
            assert not hasattr(optimizer, "found_inf")
        results.append(bits(params))
    assert results[0] == results[1]


# An optimizer that wants to see the scaler, or the tensors that torch puts on it.


class Asking(torch.optim.SGD):
    """The older contract: the scaler itself is passed to `step`."""

    _step_supports_amp_scaling = True
    seen = None

    def step(self, closure=None, *, grad_scaler=None):
        self.seen = grad_scaler
        grad_scaler.unscale_(self)
        if not any(float(found) for found in grad_scaler._found_inf_per_device(self).values()):
            super().step(closure)


@pytest.mark.parametrize("kind", ["torch", "plain"])
def test_a_scaler_passes_itself_to_an_optimizer_that_asks_for_it(kind):
    scaler = make_scaler(kind, init_scale=8.0)
    param = nn.Parameter(torch.ones(2))
    optimizer = Asking([param], lr=0.125)
    for factor in (1.0, INF, 2.0):
        scaler.scale((param * factor).sum()).backward()
        with pytest.warns(FutureWarning, match="GradScaler is going to stop passing itself"):
            scaler.step(optimizer)
        with pytest.raises(RuntimeError, match="already been called since the last update"):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.seen is scaler
    assert param.tolist() == [1.0 - 3.0 * 0.125] * 2
    assert scaler.get_scale() == 4.0


class Reading(torch.optim.SGD):
    """Today's contract: `grad_scale` (None: unscaled already) and `found_inf` are set on the optimizer."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure=None):
        factor = 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)
        self.factors = [*getattr(self, "factors", []), factor]
        if float(self.found_inf) == 0.0:
            for group in self.param_groups:
                for param in group["params"]:
                    param -= group["lr"] * factor * param.grad


@pytest.mark.parametrize("kind", ["torch", "plain"])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_hands_over_what_torchs_does(kind, unscale):
    """torch hands over scaled gradients with their scale, or unscaled ones with None; ours always the latter."""
    scaler = make_scaler(kind, init_scale=8.0)
    param = nn.Parameter(torch.ones(2))
    optimizer = Reading([param], lr=0.125)
    for factor in (1.0, INF, 2.0):
        scaler.scale((param * factor).sum()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert param.tolist() == [1.0 - 3.0 * 0.125] * 2
    assert optimizer.factors == ([1 / 8, 1 / 8, 1 / 4] if kind == "torch" and not unscale else [1.0] * 3)
    assert scaler.get_scale() == 4.0
