"""Training under autocast with every optimizer and option, on every side.

Where a side performs torch's own operations (`plain`), weights are equal bit for bit. A wrapped one gets torch's
gradients and must stay within 4 ULP a step; and left to itself it must learn, with torch's history of scales.
"""

import itertools

import pytest
import torch

from tests.parity.harness import Reach, Side, assert_close_in_ulp, batches, bits, network

STEPS, OVERFLOW = 12, (0, 4, 5)
SCALER = {"init_scale": 2.0**10, "growth_interval": 3}


def _options():
    sgd, adam, adamw = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
    for momentum, weight_decay, maximize in itertools.product((0.0, 0.9), (0.0, 0.02), (False, True)):
        yield sgd, {"lr": 0.05, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
    yield sgd, {"lr": 0.05, "momentum": 0.9, "nesterov": True}
    yield sgd, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}
    yield sgd, {"lr": torch.tensor(0.05), "momentum": 0.9}
    for cls, amsgrad, weight_decay, maximize in itertools.product(
        (adam, adamw), (False, True), (0.0, 0.02), (False, True)
    ):
        yield cls, {"lr": 0.01, "amsgrad": amsgrad, "weight_decay": weight_decay, "maximize": maximize}
    yield adam, {"lr": 0.01, "betas": (0.0, 0.9)}
    yield adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}
    yield adamw, {"lr": torch.tensor(0.01), "eps": 1e-4}
    rmsprop, adagrad, adadelta = torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta
    for momentum, centered, weight_decay in itertools.product((0.0, 0.9), (False, True), (0.0, 0.02)):
        yield rmsprop, {"lr": 0.01, "momentum": momentum, "centered": centered, "weight_decay": weight_decay}
    yield rmsprop, {"lr": torch.tensor(0.01), "alpha": 0.5, "maximize": True}
    yield adagrad, {"lr": 0.05}
    yield adagrad, {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.02, "initial_accumulator_value": 0.3}
    yield adagrad, {"lr": torch.tensor(0.05), "eps": 1e-4, "maximize": True}
    yield adadelta, {"lr": 1.0}
    yield adadelta, {"lr": 1.0, "rho": 0.5, "weight_decay": 0.02, "maximize": True}


OPTIONS = list(_options())
LOOPS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def _tensor_lr(case):
    return isinstance(case[1]["lr"], torch.Tensor)


def _name(case):
    shown = {k: v for k, v in case[1].items() if k != "lr"} | ({"lr": "tensor"} if _tensor_lr(case) else {})
    return "-".join([case[0].__name__, *(f"{k}={v}" for k, v in shown.items())])


every_option = pytest.mark.parametrize("case", OPTIONS, ids=_name)


def maker(case, loop):
    cls, options = case
    if cls in (torch.optim.RMSprop, torch.optim.Adadelta) and "fused" in loop:
        loop = {}  # torch has no such loop for them
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return lambda params: cls(params, **own, **loop)


@every_option
@pytest.mark.parametrize("loop", LOOPS)
def test_our_scaler_gives_torchs_weights_bit_for_bit(case, loop):
    """Plain optimizers, fused ones too: weights, optimizer state and scales.

    The first step overflows, but for torch's fused momentum, which does not survive that: see test_defects.
    """
    if loop == "foreach" and case[0] is not torch.optim.SGD and _tensor_lr(case):
        loop = "for-loop"  # torch refuses a tensor lr there, unless capturable
    results = []
    for kind in ("torch", "plain"):
        overflow = (1, 4, 5) if case[1].get("momentum") and loop == "fused" else OVERFLOW
        side = Side(kind, network(), maker(case, LOOPS[loop]), **SCALER)
        side.train(batches(STEPS), overflow)
        state = [side.optimizer.state[p] for p in side.params]
        results.append((side.history, bits(side.weights()), bits(state)))
    assert results[0] == results[1]
    assert len(set(results[0][0])) > 4


@every_option
@pytest.mark.parametrize("kind", ["wrapped", "wrapped fp16", "inside torch's"])
def test_a_wrapped_optimizer_follows_torchs_gradients(kind, case):
    """The gradients of torch's run, overflows included, on both: equal scales, weights within 4 ULP a step."""
    theirs = Side("torch", network(), maker(case, LOOPS["for-loop"]), **SCALER)
    ours = Side(kind, network(), maker(case, LOOPS["for-loop"]), **SCALER)
    reach = Reach(theirs.weights())
    for n, (x, y) in enumerate(batches(STEPS)):
        theirs.backward(theirs.loss(x, y), n in OVERFLOW)
        ours.feed([p.grad for p in theirs.params])
        for side in (theirs, ours):
            side.step()
            side.update()
        reach.follow(theirs.weights())
    assert ours.history == theirs.history
    assert_close_in_ulp(ours.weights(), theirs.weights(), reach, STEPS - len(OVERFLOW))
    assert (ours.optimizer.steps_taken, ours.optimizer.steps_skipped) == (STEPS - len(OVERFLOW), len(OVERFLOW))


@pytest.mark.parametrize("case", [c for c in OPTIONS if not c[1].get("maximize")][::2], ids=_name)
@pytest.mark.parametrize(
    ("kind", "loop"), [("wrapped", "for-loop"), ("wrapped fp16", "fused"), ("inside torch's", "foreach")]
)
def test_a_wrapped_optimizer_left_to_itself(kind, loop, case):
    """Its own forward and backward passes: torch's history of scales, and the loss falls as far, within a half."""
    if _tensor_lr(case):
        loop = "for-loop"
    falls, histories = [], []
    for one in ("torch", kind):
        side = Side(one, network(), maker(case, LOOPS[loop]), **SCALER)
        losses = side.train(batches(1) * 30, (1, 4, 5))
        falls.append(losses[0] - losses[-1])
        histories.append(side.history)
    assert histories[0] == histories[1]
    assert falls[0] > 0.0
    assert 0.5 < falls[1] / falls[0] < 1.5


def test_capturable_is_for_devices_that_capture():
    """On a CPU torch refuses to step; wrapped, the option has no say: nothing is read on the host either way."""
    import mpengine

    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(2)
    theirs = torch.optim.Adam([params[0]], capturable=True, foreach=False)
    with pytest.raises(AssertionError, match="capturable=True, params and state_steps must be on supported devices"):
        theirs.step()
    ours = mpengine.MixedPrecisionOptimizer(torch.optim.Adam([params[1]], capturable=True))
    plain = torch.nn.Parameter(torch.ones(2))
    plain.grad = torch.ones(2)
    mpengine.MixedPrecisionOptimizer(torch.optim.Adam([plain])).step()
    ours.step()
    assert bits(params[1]) == bits(plain)


@pytest.mark.parametrize("sabotage", ["sign", "skip", "rate"])
def test_a_sabotaged_update_is_noticed(sabotage, monkeypatch):
    """The 4 ULP a step must be able to fail: the sign flipped, the update left out, lr 1e-5 too large."""
    from mpengine import backend, reference

    monkeypatch.setattr(backend, "_cpu_module", reference)
    change = {
        "sign": lambda p, new: p + (p - new),
        "skip": lambda p, new: p,
        "rate": lambda p, new: p + (new - p) * 1.00001,
    }[sabotage]
    for name, rule in list(reference.RULES.items()):
        if name == "assign":
            continue

        def changed(p, g, slots, c, rule=rule):
            new, state = rule(p, g, slots, c)
            return change(p, new), state

        monkeypatch.setitem(reference.RULES, name, changed)
    for case in (OPTIONS[0], OPTIONS[4], OPTIONS[11], OPTIONS[19]):
        with pytest.raises(AssertionError, match="ULP a step"):
            test_a_wrapped_optimizer_follows_torchs_gradients("wrapped fp16", case)
