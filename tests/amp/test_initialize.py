"""initialize: what each level does to models and optimizers, every override, and every refusal."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import pickle
import weakref
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from mpengine import MixedPrecisionOptimizer, amp
from mpengine.amp import modules
from tests.amp.world import DYNAMIC, FIRST, LEVELS, Weights, backward, batch, master, network, scales, sgd, weights
from tests.harness import frozen

HALF, SINGLE, BRAIN = torch.float16, torch.float32, torch.bfloat16


class Spy(nn.Module):
    """Keeps what it is called with, and returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("mask", torch.full((2,), 0.1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = args, kwargs
        return args[0] if len(args) == 1 and not kwargs else (args, kwargs)


def spy(level: str, **kwargs: Any) -> Spy:
    return amp.initialize(Spy(), opt_level=level, **kwargs)


# Shapes of what goes in and comes out.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("models", ["one", list, tuple])
@pytest.mark.parametrize("optimizers", [None, "one", list, tuple])
def test_what_is_returned_mirrors_what_was_given(level, models, optimizers):
    given = [Weights(), Weights()]
    made = [sgd(m) for m in given]
    first = given[0] if models == "one" else models(given)
    second = None if optimizers is None else made[0] if optimizers == "one" else optimizers(made)
    result = amp.initialize(first, second, opt_level=level)
    got_models, got_optimizers = (result, None) if optimizers is None else result
    assert (got_models is given[0]) if models == "one" else (got_models == given and type(got_models) is list)
    if optimizers == "one":
        assert isinstance(got_optimizers, MixedPrecisionOptimizer)
    elif optimizers is not None:
        assert type(got_optimizers) is list
        assert all(isinstance(o, (MixedPrecisionOptimizer, torch.optim.Optimizer)) for o in got_optimizers)
        assert [o._inner for o in got_optimizers] == made


def test_no_optimizers_at_all():
    model, optimizers = amp.initialize(Weights(), [], opt_level="O2")
    assert optimizers == []
    assert model(torch.ones(3)).dtype == SINGLE


@pytest.mark.parametrize("enabled", [True, False])
def test_disabled_lets_everything_pass(enabled):
    model = Weights()
    optimizer = sgd(model)
    before = model.weight.dtype, optimizer.step
    assert amp.initialize(model, enabled=False) is model
    assert amp.initialize(model, optimizer, enabled=False, opt_level="O9") == (model, optimizer)
    assert (model.weight.dtype, optimizer.step) == before
    loss = model(torch.tensor([1.0, 2.0, 3.0]))
    with amp.scale_loss(loss, optimizer) as scaled:
        assert scaled is loss
        scaled.backward()
    assert list(amp.master_params(optimizer)) == [model.weight]
    assert amp.state_dict() == {}
    amp.load_state_dict({"loss_scaler0": {}})
    assert amp._amp_state.loss_scalers == []
    optimizer.step()
    assert model.weight.tolist() == [-1.0, -2.0, -3.0]


# The levels.


@pytest.mark.parametrize(
    ("level", "overrides", "linear", "norm"),
    [
        ("O0", {}, SINGLE, SINGLE),
        ("O1", {}, SINGLE, SINGLE),
        ("O2", {}, HALF, SINGLE),
        ("O3", {}, HALF, HALF),
        ("O2", {"keep_batchnorm_fp32": False}, HALF, HALF),
        ("O2", {"keep_batchnorm_fp32": "False"}, HALF, HALF),
        ("O3", {"keep_batchnorm_fp32": True}, HALF, SINGLE),
        ("O3", {"keep_batchnorm_fp32": "True"}, HALF, SINGLE),
        ("O2", {"cast_model_type": BRAIN}, BRAIN, SINGLE),
        ("O2", {"cast_model_type": SINGLE}, SINGLE, SINGLE),
        ("O2", {"cast_model_type": False}, SINGLE, SINGLE),
        ("O0", {"cast_model_type": HALF}, HALF, HALF),
        ("O0", {"cast_model_type": HALF, "keep_batchnorm_fp32": True}, HALF, SINGLE),
        ("O1", {"cast_model_type": SINGLE}, SINGLE, SINGLE),
        ("O1", {"patch_torch_functions": False}, SINGLE, SINGLE),
        ("O2", {"master_weights": False}, HALF, SINGLE),
        ("O2", {"master_weights": "True"}, HALF, SINGLE),
        ("O2", {"patch_torch_functions": False}, HALF, SINGLE),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_dtypes_of_weights_and_buffers(level, overrides, linear, norm, trained):
    model = network()
    original = copy.deepcopy(model.state_dict())
    if trained:
        model, optimizer = amp.initialize(model, sgd(model), opt_level=level, **overrides)
        assert frozen(list(optimizer.master_params())) == frozen([original[k] for k, _ in model.named_parameters()])
        assert optimizer.has_masters == (linear != SINGLE)
    else:
        model = amp.initialize(model, opt_level=level, **overrides)
    assert {m.weight.dtype for m in model if isinstance(m, nn.Linear)} == {linear}
    assert {p.dtype for m in model if isinstance(m, (nn.BatchNorm1d, nn.LayerNorm)) for p in m.parameters()} == {norm}
    assert model[1].running_mean.dtype == norm
    assert model[1].num_batches_tracked.dtype == torch.int64
    out = model(batch(0))
    assert out.dtype == SINGLE
    out.sum().backward()


@pytest.mark.parametrize(
    ("level", "inputs", "outputs"),
    [("O0", SINGLE, SINGLE), ("O1", None, SINGLE), ("O2", HALF, SINGLE), ("O3", HALF, SINGLE)],
)
@pytest.mark.parametrize("override", [None, HALF, torch.float64])
@pytest.mark.parametrize("given", [HALF, SINGLE, torch.float64, torch.int64, torch.bool])
def test_inputs_and_outputs(level, inputs, outputs, override, given):
    model = spy(level, cast_model_outputs=override)
    x = torch.ones(2, dtype=given)
    out = model(x)
    seen = model.seen[0][0]
    floating = given.is_floating_point
    assert seen.dtype == (inputs if floating and inputs else given)
    assert out.dtype == ((override or outputs) if floating else given)


Pair = namedtuple("Pair", ["a", "b"])


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    name: str = "n"


class Output(OrderedDict):
    """As transformers' ModelOutput: entries are attributes too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Batch:
    """A class of the user's with a `.to` of its own."""

    def __init__(self, x):
        self.x = x

    def to(self, dtype):
        return Batch(self.x.to(dtype))


@pytest.mark.parametrize("level", ["O2", "O3"])
def test_nested_inputs_and_outputs_are_cast(level):
    x = torch.ones(2)
    output = Output()
    output["logits"] = x
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])
    given = [x, (x, 1), {"k": [x, "s", None]}, Pair(x, 2), Record(x), output, Batch(x), packed, torch.arange(2)]
    model = spy(level)
    args, kwargs = model(*given, by_name={"deep": (x,)})
    seen, seen_kwargs = model.seen
    for values, dtype in ((seen, HALF), (args, SINGLE)):
        assert values[0].dtype == dtype
        assert values[1][0].dtype == dtype
        assert values[1][1] == 1
        assert values[2]["k"][0].dtype == dtype
        assert values[2]["k"][1:] == ["s", None]
        assert isinstance(values[3], Pair)
        assert values[3].a.dtype == dtype
        assert isinstance(values[4], Record)
        assert (values[4].x.dtype, values[4].name) == (dtype, "n")
        assert isinstance(values[5], Output)
        assert values[5].logits.dtype == values[5]["logits"].dtype == dtype
        assert values[6].x.dtype == dtype
        assert isinstance(values[7], nn.utils.rnn.PackedSequence)
        assert values[7].data.dtype == dtype
        assert values[8].dtype == torch.int64
    assert seen_kwargs["by_name"]["deep"][0].dtype == HALF
    assert kwargs["by_name"]["deep"][0].dtype == SINGLE
    assert given[4].x.dtype == output["logits"].dtype == SINGLE  # what the script holds is as it was


def test_o1_runs_forward_under_autocast():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            y = self.linear(x)
            self.seen = y.dtype
            return y

    model = amp.initialize(Net(), opt_level="O1")
    assert model(torch.ones(2, 2)).dtype == SINGLE
    assert model.seen == HALF
    assert not torch.is_autocast_enabled("cpu")
    model = amp.initialize(Net(), opt_level="O1", patch_torch_functions=False)
    assert model(torch.ones(2, 2)).dtype == SINGLE
    assert model.seen == SINGLE


@pytest.mark.parametrize("level", LEVELS)
def test_forward_called_by_name_casts_too(level):
    model = spy(level)
    assert model.forward(torch.ones(2, dtype=HALF)).dtype == SINGLE
    assert str(inspect.signature(model.forward)) == "(*args: 'Any', **kwargs: 'Any') -> 'Any'"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_runs_itself(level, how):
    model, optimizer = weights(level)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        twin.weight.fill_(5.0)
    assert twin(torch.ones(3)).item() == 15.0
    assert model(torch.ones(3)).item() == 0.0
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    assert twin.weight.tolist() == [5.0] * 3


# Loss scales.


@pytest.mark.parametrize(
    ("level", "kwargs", "expected", "dynamic"),
    [
        ("O0", {}, 1.0, False),
        ("O1", {}, 65536.0, True),
        ("O2", {}, 65536.0, True),
        ("O3", {}, 1.0, False),
        ("O2", {"loss_scale": 128.0}, 128.0, False),
        ("O2", {"loss_scale": "128.0"}, 128.0, False),
        ("O2", {"loss_scale": 128}, 128.0, False),
        ("O0", {"loss_scale": "dynamic"}, 65536.0, True),
        ("O2", {"max_loss_scale": 1024.0}, 1024.0, True),
        ("O2", {"min_loss_scale": 2.0**20}, 2.0**20, True),
        ("O2", {"max_loss_scale": None}, 65536.0, True),
        ("O2", {"loss_scale": 64.0, "min_loss_scale": 128.0, "max_loss_scale": 32.0}, 64.0, False),
    ],
)
def test_first_scales(level, kwargs, expected, dynamic):
    weights(level, **{"loss_scale": None, "max_loss_scale": 2.0**24, **kwargs}, num_losses=2)
    assert scales() == [expected] * 2
    assert [s.dynamic for s in amp._amp_state.loss_scalers] == [dynamic] * 2
    assert [s._loss_scale for s in amp._amp_state.loss_scalers] == [expected] * 2
    assert [s._unskipped for s in amp._amp_state.loss_scalers] == [0] * 2


@pytest.mark.parametrize("floor", [None, 0, 256.0])
def test_the_floor(floor):
    model, optimizer = weights("O2", min_loss_scale=floor)
    for _ in range(4):
        backward(model, optimizer, [float("inf")] * 3)
    assert scales() == [max(FIRST / 16, floor or 0.0)]


# Refusals: nothing has changed.


def refused(error, match, models=None, optimizers=None, **kwargs):
    model = Weights()
    optimizer = sgd(model)
    models = model if models is None else models
    optimizers = optimizer if optimizers is None else optimizers
    before = amp.initialize(Weights(), opt_level="O3", loss_scale=4.0) and amp.state_dict()
    with pytest.raises(error, match=match):
        amp.initialize(models, optimizers, **{"opt_level": "O2", **kwargs})
    assert amp.state_dict() == before
    assert model.weight.dtype == SINGLE
    assert not modules.is_patched(model)
    assert "step" not in optimizer.__dict__


@pytest.mark.parametrize("level", ["00", "O4", "o1", "02", 1, None, "fp16"])
def test_an_unknown_level(level):
    refused(RuntimeError, "Unexpected optimization level .*the letter O, not the number zero", opt_level=level)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"cast_model_type": HALF}, "O1 inserts casts around Torch functions"),
        ({"keep_batchnorm_fp32": True}, "keep_batchnorm_fp32 should be None. keep_batchnorm_fp32 was True"),
        ({"keep_batchnorm_fp32": "False"}, "keep_batchnorm_fp32 should be None. keep_batchnorm_fp32 was False"),
        ({"master_weights": True}, "It doesn't make sense to use master_weights with O1"),
        ({"master_weights": False}, "It doesn't make sense to use master_weights with O1"),
    ],
)
def test_what_o1_does_not_allow(kwargs, match):
    refused(RuntimeError, match, opt_level="O1", **kwargs)


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_patching_is_for_o1(level):
    refused(RuntimeError, "only be set by selecting opt_level='O1'", opt_level=level, patch_torch_functions=True)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"cast_model_type": torch.int8},
        {"cast_model_type": "fp16"},
        {"cast_model_type": True},
        {"keep_batchnorm_fp32": "yes"},
        {"keep_batchnorm_fp32": 1},
        {"master_weights": "no"},
        {"patch_torch_functions": 0},
        {"loss_scale": "fast"},
        {"loss_scale": 0},
        {"loss_scale": -1.0},
        {"loss_scale": float("inf")},
        {"loss_scale": float("nan")},
        {"loss_scale": True},
        {"cast_model_outputs": torch.int64},
        {"cast_model_outputs": "fp32"},
        {"num_losses": 0},
        {"num_losses": 1.5},
        {"min_loss_scale": -1.0},
        {"min_loss_scale": "1"},
        {"max_loss_scale": float("nan")},
        {"min_loss_scale": 8.0, "max_loss_scale": 4.0},
    ],
)
def test_values_out_of_range_are_named(kwargs):
    refused(ValueError, next(iter(kwargs)), **kwargs)


def test_models_and_optimizers_of_wrong_types():
    refused(TypeError, "models must be either a single model or a list of models, not str", models="model")
    refused(TypeError, "models must be either .*, not dict", models=[nn.Linear(1, 1), {}])
    refused(TypeError, "optimizers must be either .*, not str", optimizers="adam")
    refused(TypeError, "optimizers must be either .*, not NoneType", optimizers=[None])
    model = Weights()
    refused(TypeError, "LBFGS", models=model, optimizers=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("level", LEVELS)
def test_a_model_that_is_half_already(level):
    refused(
        RuntimeError,
        "Found param weight with type torch.HalfTensor.*do not need",
        models=Weights().half(),
        opt_level=level,
    )
    model = nn.BatchNorm1d(2, affine=False).half()
    refused(RuntimeError, "Found buffer running_mean with type torch.HalfTensor", models=model, opt_level=level)


@pytest.mark.parametrize("level", LEVELS)
def test_a_model_in_a_parallel_wrapper(level):
    refused(
        RuntimeError, "DataParallel. Parallel wrappers should only", models=nn.DataParallel(Weights()), opt_level=level
    )


def test_a_weight_that_does_not_fit():
    refused(ValueError, "parameter 'weight' holds 70000.*opt_level='O1'", models=Weights(value=7e4))
    weights("O1", value=7e4)


@pytest.mark.parametrize("level", LEVELS)
def test_an_optimizer_passes_once(level):
    model = Weights()
    optimizer = sgd(model)
    message = "A given optimizer should only be passed through amp.initialize once"
    refused(RuntimeError, message, models=model, optimizers=[optimizer, optimizer], opt_level=level)
    _, wrapped = amp.initialize(model, optimizer, opt_level=level, **DYNAMIC)
    for again in (optimizer, wrapped):
        with pytest.raises(RuntimeError, match=message):
            amp.initialize(Weights(), again, opt_level=level)
    backward(model, optimizer, [1.0] * 3)
    wrapped.step()
    assert master(wrapped) == [-1.0] * 3


def test_a_parameter_in_two_optimizers():
    model = Weights()
    refused(
        ValueError,
        "parameter 'weight' of shape .* is in optimizers 0 and 1",
        models=model,
        optimizers=[sgd(model), sgd(model)],
    )


def test_the_oldest_api():
    with pytest.raises(RuntimeError, match=r"call model, optimizer = amp\.initialize"):
        amp.init(enabled=True)


def test_before_initialize_there_is_no_state():
    for call in (amp.state_dict, lambda: amp.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"before amp\.initialize"):
            call()
    assert not hasattr(amp._amp_state, "loss_scalers")
    assert not hasattr(amp._amp_state, "opt_properties")


# Several models and optimizers.


@pytest.mark.parametrize("level", LEVELS)
def test_one_optimizer_for_several_models_and_several_for_one(level):
    a, b = Weights(), Weights()
    [a, b], optimizer = amp.initialize([a, b], sgd(a, b), opt_level=level, **DYNAMIC)
    loss = a(torch.ones(3)) + b(torch.full((3,), 2.0))
    with amp.scale_loss(loss, optimizer) as scaled:
        scaled.backward()
    optimizer.step()
    assert [master(optimizer, i) for i in (0, 1)] == [[-1.0] * 3, [-2.0] * 3]
    assert optimizer.overflowed_parameters() == []

    net = network()
    net, [head, body] = amp.initialize(net, [sgd(net[4]), sgd(net[0])], opt_level=level, **DYNAMIC)
    with amp.scale_loss(net(batch(0)).square().mean(), [head, body]) as scaled:
        scaled.backward()
    before = [list(map(frozen, o.master_params())) for o in (head, body)]
    head.step()
    assert list(map(frozen, head.master_params())) != before[0]
    assert list(map(frozen, body.master_params())) == before[1]
    body.step()
    assert list(map(frozen, body.master_params())) != before[1]
    assert net[1].weight.dtype == (HALF if level == "O3" else SINGLE)  # trained by none, and cast all the same


@pytest.mark.parametrize("level", LEVELS)
def test_names_of_several_models(level):
    a, b = Weights(), Weights()
    _, optimizer = amp.initialize([a, b], sgd(a, b), opt_level=level, **DYNAMIC)
    backward(b, optimizer, [float("inf")] * 3)
    optimizer.step()
    assert optimizer.overflowed_parameters() == ["parameter 'model 1: weight'"]


# The optimizer that the script made goes on to work.


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_the_original_optimizer_is_the_same_as_the_returned_one(level, make):
    results = []
    for use in ("returned", "original"):
        model = network()
        original = make(model.parameters(), lr=0.01)
        model, returned = amp.initialize(model, original, opt_level=level, **DYNAMIC)
        optimizer = returned if use == "returned" else original
        for i in range(3):
            optimizer.zero_grad()
            loss = model(batch(i)).square().mean() * (float("inf") if i == 1 else 1.0)
            with amp.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
            torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
            optimizer.step()
        assert (returned.steps_taken, returned.steps_skipped) == (2, 1)
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)
        results.append(frozen([list(model.parameters()), saved["state"], saved["param_groups"]]))
    assert results[0] == results[1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("on", ["original before", "original", "returned"])
def test_schedulers(level, on):
    """Warnings are errors: none says that the order of steps is wrong, or that step was replaced."""
    model = Weights()
    original = sgd(model)
    make = lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)  # noqa: E731
    scheduler = make(original) if on == "original before" else None
    model, returned = amp.initialize(model, original, opt_level=level, **DYNAMIC)
    scheduler = scheduler or make(returned if on == "returned" else original)
    for _ in range(3):
        returned.zero_grad()
        backward(model, returned, [1.0] * 3)
        returned.step()
        scheduler.step()
    assert master(returned) == [-1.75] * 3


# A second initialize.


@pytest.mark.parametrize("first", LEVELS)
@pytest.mark.parametrize("second", LEVELS)
def test_a_fresh_start(first, second):
    model, old = weights(first, value=0.1)
    backward(model, old, [0.125] * 3)
    old.step()
    value = master(old)
    model, new = amp.initialize(model, sgd(model), opt_level=second, **DYNAMIC)
    assert master(new) == value
    assert model.weight.dtype == (HALF if second in ("O2", "O3") else SINGLE)
    new.zero_grad()
    backward(model, new, [1.0] * 3)
    new.step()
    expected = (torch.tensor(value) - 1.0).tolist()
    assert master(new) == expected
    assert not isinstance(model.__dict__["forward"].own, modules.Forward)
    with pytest.raises(RuntimeError, match="belongs to an earlier"):
        old.step()
    with pytest.raises(RuntimeError, match="belongs to an earlier"), amp.scale_loss(model(torch.ones(3)), old):
        pass
    assert master(new) == expected
    assert scales() == [FIRST]


def test_a_fresh_start_undoes_norms_and_buffers():
    model = amp.initialize(network(), opt_level="O2")
    before = len(model[3]._forward_hooks), len(model._state_dict_hooks)
    model = amp.initialize(model, opt_level="O0")
    assert {t.dtype for t in [*model.parameters(), *model.buffers()]} == {SINGLE, torch.int64}
    assert (len(model[3]._forward_hooks), len(model._state_dict_hooks)) == (0, 0)
    model = amp.initialize(model, opt_level="O2")
    assert (len(model[3]._forward_hooks), len(model._state_dict_hooks)) == before


def test_a_fresh_start_of_one_of_several_models_ends_the_others():
    """They shared a call; what the others do next is their own."""
    a, b = Weights(value=0.1), Weights(value=0.1)
    [a, b], old = amp.initialize([a, b], sgd(a, b), opt_level="O2", **DYNAMIC)
    a, opt_a = amp.initialize(a, sgd(a), opt_level="O2", **DYNAMIC)
    assert (a.weight.dtype, b.weight.dtype) == (HALF, SINGLE)
    assert not modules.is_patched(b)
    b, opt_b = amp.initialize(b, sgd(b), opt_level="O2", **DYNAMIC)
    a, again = amp.initialize(a, sgd(a), opt_level="O3", **DYNAMIC)
    with pytest.raises(RuntimeError, match=r"passed through amp\.initialize once"):
        amp.initialize(a, old)
    with pytest.raises(TypeError, match="LBFGS"):
        amp.initialize(a, torch.optim.LBFGS(a.parameters()))
    for model, optimizer in ((b, opt_b), (a, again)):
        backward(model, optimizer, [1.0] * 3)
        optimizer.step()
        assert master(optimizer) == (torch.tensor([0.1] * 3) - 1.0).tolist()
    for optimizer in (old, opt_a):
        with pytest.raises(RuntimeError, match="belongs to an earlier"):
            optimizer.step()


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_a_second_call_for_the_same_model_and_other_weights(level):
    """Without casts the optimizers of both calls go on."""
    net = network()
    net, first = amp.initialize(net, sgd(net[0]), opt_level=level, **DYNAMIC)
    net, second = amp.initialize(net, sgd(net[4]), opt_level=level, **DYNAMIC)
    for optimizer in (first, second):
        with amp.scale_loss(net(batch(0)).square().mean(), optimizer) as scaled:
            scaled.backward()
        optimizer.step()
        assert optimizer.steps_taken == 1
        optimizer.zero_grad()


def test_calls_for_different_models_stand_side_by_side():
    a, opt_a = weights("O2", num_losses=2)
    b, opt_b = weights("O1")
    backward(a, opt_a, [float("inf")] * 3, loss_id=1)
    backward(b, opt_b, [1.0] * 3)
    opt_a.step()
    opt_b.step()
    assert (master(opt_a), master(opt_b)) == ([0.0] * 3, [-1.0] * 3)
    assert scales() == [FIRST]  # of the latest
    assert [s.scale for s in opt_a.scaler.statistics()] == [FIRST, FIRST / 2]


def test_nothing_is_kept_alive():
    model, optimizer = weights("O2")
    backward(model, optimizer, [1.0] * 3)
    optimizer.step()
    seen = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [s() for s in seen] == [None, None]


# Checkpoints of models.


@pytest.mark.parametrize("level", LEVELS)
def test_state_dict_is_fp32_and_holds_the_masters(level):
    model = network()
    model, optimizer = amp.initialize(model, sgd(model, lr=0.1), opt_level=level, **DYNAMIC)
    with amp.scale_loss(model(batch(0)).square().mean(), optimizer) as scaled:
        scaled.backward()
    optimizer.step()
    saved = model.state_dict()
    assert {v.dtype for v in saved.values()} == {SINGLE, torch.int64}
    assert frozen([saved[k] for k, _ in model.named_parameters()]) == frozen(list(optimizer.master_params()))
    assert frozen(model[0].state_dict()["weight"]) == frozen(saved["0.weight"])
    assert all(
        value is model.get_parameter(k) for k, value in model.state_dict(keep_vars=True).items() if "weight" in k
    )
    if level in ("O2", "O3"):
        assert frozen(optimizer.fp32_state_dict(model)) == frozen(saved)
    kept = copy.deepcopy(saved)
    with amp.scale_loss(model(batch(1)).square().mean(), optimizer) as scaled:
        scaled.backward()
    optimizer.step()
    halves = [k for k, p in model.named_parameters() if p.dtype == HALF]  # FP32 entries are references, as in torch
    if halves:
        assert frozen([saved[k] for k in halves]) == frozen([kept[k] for k in halves])
    model.load_state_dict(kept)
    assert frozen(list(optimizer.master_params())) == frozen([kept[k] for k, _ in model.named_parameters()])
    plain = network(1)
    plain.load_state_dict(kept)
    assert frozen(plain.state_dict()) == frozen(kept)


# Sabotage.


def test_sabotage_of_the_casts_is_noticed(monkeypatch):
    monkeypatch.setattr("mpengine.nested.cast", lambda value, dtype: value)
    with pytest.raises(AssertionError):
        test_inputs_and_outputs("O2", HALF, SINGLE, None, SINGLE)
    with pytest.raises(AssertionError):
        test_nested_inputs_and_outputs_are_cast("O2")


def test_sabotage_of_the_fresh_start_is_noticed(monkeypatch):
    monkeypatch.setattr(modules, "undo", lambda model: None)
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_fresh_start("O2", "O0")


def test_sabotage_of_the_masters_is_noticed(monkeypatch):
    monkeypatch.setattr(modules, "cast_params", lambda models, properties: [m.half() for m in models] and {})
    with pytest.raises(AssertionError):
        test_dtypes_of_weights_and_buffers("O2", {"keep_batchnorm_fp32": False}, HALF, HALF, True)
