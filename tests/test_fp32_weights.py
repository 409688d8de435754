"""FP32 weights reach the masters exactly as they are loaded, and come out exactly, in every order and by any door."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import weakref

import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler
from tests.harness import (
    BRAIN,
    EVERY,
    FUSED,
    GENERAL,
    HALF,
    SINGLE,
    frozen,
    network,
    prepared,
    same_bits,
    snapshot,
    train,
)

one_of_each_path = pytest.mark.parametrize("make", [FUSED["adam"], GENERAL["Adamax"]], ids=["fused", "general"])


def masters_of(optimizer):
    return [m.detach().clone() for m in optimizer.master_params()]


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def nudged(state, seed=9):
    """Other FP32 weights that round to the same fp16 ones, nearly all of them, and differ from them in FP32."""
    generator = torch.Generator().manual_seed(seed)
    return {k: v + v * torch.randn(v.shape, generator=generator) * 2.0**-13 for k, v in state.items()}


# Loading.


def _whole(model, weights):
    model.load_state_dict(weights)


def _by_parts(model, weights):
    for name, child in model.named_children():
        child.load_state_dict({k.split(".", 1)[1]: v for k, v in weights.items() if k.startswith(f"{name}.")})


def _in_a_parent(model, weights):
    parent = nn.ModuleDict({"head": nn.Linear(1, 1), "model": model})
    parent.load_state_dict({f"model.{k}": v for k, v in weights.items()}, strict=False)


def _compiled(model, weights):
    torch.compile(model, backend="eager").load_state_dict({f"_orig_mod.{k}": v for k, v in weights.items()})


def _from_a_file(model, weights):
    stream = io.BytesIO()
    torch.save(weights, stream)
    stream.seek(0)
    model.load_state_dict(torch.load(stream, weights_only=True, mmap=False))


DOORS = {"whole": _whole, "parts": _by_parts, "parent": _in_a_parent, "compiled": _compiled, "file": _from_a_file}


@pytest.mark.parametrize("load", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@one_of_each_path
def test_masters_take_fp32_weights_as_they_are(make, dtype, load):
    source = network(seed=5)
    model = network()
    optimizer = mpengine.prepare(model, make(model.parameters()), dtype=dtype)
    load(model, source.state_dict())
    assert same_bits(masters_of(optimizer), values(source))
    for param, value in zip(model.parameters(), source.parameters(), strict=True):
        assert same_bits(param, value.to(param.dtype))


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_training_goes_on_as_if_prepared_with_them(make):
    source = network(seed=5)
    model, optimizer, scaler = prepared(make)
    model.load_state_dict(source.state_dict())
    other_scaler = GradScaler(init_scale=2.0**10, growth_interval=3)
    other = mpengine.prepare(source, make(source.parameters()), other_scaler)
    train(model, optimizer, scaler, range(4), overflow=[0])
    train(source, other, other_scaler, range(4), overflow=[0])
    assert snapshot(optimizer) == snapshot(other)


def test_without_the_hooks_they_would_be_rounded():
    """What the tests above look for is there to be found."""
    source = network(seed=5)
    model, optimizer, _ = prepared()
    for module in model.modules():
        module._load_state_dict_pre_hooks.clear()
    model.load_state_dict(source.state_dict())
    got = masters_of(optimizer)
    assert not same_bits(got, values(source))
    assert same_bits(got[0], source[0].weight.detach().half().float())


def test_in_the_middle_of_a_run():
    """Moments go on; the next step starts from the loaded weights."""
    model, optimizer, scaler = prepared(FUSED["sgd"], max_grad_norm=None)
    train(model, optimizer, scaler, range(3))
    source = network(seed=5)
    model.load_state_dict(source.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, scaler, [3])
    assert same_bits(masters_of(optimizer), values(source))
    assert optimizer.steps_taken == 4


@pytest.mark.parametrize("dtype", [torch.float64, BRAIN])
def test_weights_of_other_widths(dtype):
    """float64 is rounded to FP32 once, and to fp16 from there; bfloat16 is exact in FP32."""
    source = network(seed=5).to(torch.float64)
    with torch.no_grad():
        source[0].weight[0, 0] = 1.0 + 2.0**-11 + 2.0**-40  # a tie of fp16, once it is FP32
    weights = {k: v.to(dtype) for k, v in source.state_dict().items()}
    model, optimizer, scaler = prepared()
    model.load_state_dict(weights)
    optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, scaler, [0])
    assert same_bits(masters_of(optimizer), [weights[k].float() for k, _ in model.named_parameters()])


def test_other_weights_are_not_touched():
    """strict=False with some keys, and another model beside."""
    model, optimizer, _ = prepared()
    _, bystander, _ = prepared(seed=1)
    before, others = masters_of(optimizer), frozen(masters_of(bystander))
    source = network(seed=5)
    model.load_state_dict({"0.weight": source[0].weight.detach()}, strict=False)
    assert same_bits(masters_of(optimizer), [source[0].weight.detach(), *before[1:]])
    assert frozen(masters_of(bystander)) == others


def test_each_optimizer_of_a_model_gets_its_own():
    def build(seed):
        torch.manual_seed(seed)
        return nn.ModuleDict({"g": nn.Linear(2, 3), "d": nn.Linear(3, 1)})

    model, source = build(0), build(1)
    scaler = GradScaler(num_losses=2)
    first = mpengine.prepare(model, torch.optim.SGD(model["g"].parameters(), lr=0.1), scaler)
    second = mpengine.prepare(model, torch.optim.Adam(model["d"].parameters()), scaler)
    assert len(model["g"]._load_state_dict_pre_hooks) == 1  # prepared twice, hooked once
    model.load_state_dict(source.state_dict())
    assert same_bits([*masters_of(first), *masters_of(second)], values(source))
    assert same_bits(first.fp32_state_dict(model), source.state_dict())
    assert same_bits(second.fp32_state_dict(model), source.state_dict())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("narrow", [None, "embed.weight", "head.weight"])
def test_tied_weights(narrow):
    """The parameter takes the last entry, and so does its one master; that entry may be fp16."""
    model, source = Tied(), Tied()
    optimizer = mpengine.prepare(model, torch.optim.Adam(model.parameters()))
    weights = source.state_dict()
    if narrow:
        weights[narrow] = weights[narrow].half()
    model.load_state_dict(weights)
    assert same_bits(masters_of(optimizer), values(source))
    exported = optimizer.fp32_state_dict(model)
    assert exported["embed.weight"] is exported["head.weight"]
    differing = {"embed.weight": torch.full((5, 4), 0.1), "head.weight": torch.full((5, 4), 0.3)}
    model.load_state_dict(differing)
    assert same_bits(masters_of(optimizer), [differing["head.weight"]])


def test_channels_last_and_scalars_and_old_scalars():
    torch.manual_seed(0)
    model = nn.ParameterDict({"w": torch.randn(3, 2, 2, 2), "s": torch.tensor(0.1)})
    optimizer = mpengine.prepare(model, torch.optim.Adam(model.parameters()))
    with torch.no_grad():
        model["w"].data = model["w"].data.to(memory_format=torch.channels_last)
    weights = {"w": torch.randn(3, 2, 2, 2), "s": torch.tensor([0.7])}  # as torch 0.3 saved scalars
    model.load_state_dict(weights)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert same_bits(masters_of(optimizer), [weights["s"][0], weights["w"]])


def test_what_has_no_master_or_no_hook_is_rounded():
    """Frozen layers, and those of an optimizer that was wrapped without `prepare`: from the fp16 weights, as before."""
    model, source = network(), network(seed=5)
    model[0].requires_grad_(False)
    optimizer = mpengine.prepare(model, FUSED["adam"](model.parameters()))
    model.load_state_dict(source.state_dict())
    exported = optimizer.fp32_state_dict(model)
    assert same_bits(exported["0.weight"], source[0].weight.detach().half().float())
    assert same_bits(exported["3.weight"], source[3].weight)
    model = network().half()
    optimizer = mpengine.MixedPrecisionOptimizer(FUSED["adam"](model.parameters()))
    model.load_state_dict(source.state_dict())
    assert same_bits(masters_of(optimizer)[0], source[0].weight.detach().half().float())


def test_a_compiled_model_may_be_prepared():
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = mpengine.prepare(compiled, FUSED["adam"](compiled.parameters()))
    source = network(seed=5)
    compiled.load_state_dict({f"_orig_mod.{k}": v for k, v in source.state_dict().items()})
    assert same_bits(masters_of(optimizer), values(source))
    assert list(optimizer.fp32_state_dict(compiled)) == list(compiled.state_dict())
    assert same_bits(optimizer.fp32_state_dict(model), source.state_dict())


# Orders: FP32 weights win over the masters of a state, whole; fp16 weights leave them alone.


@pytest.mark.parametrize("order", list(itertools.permutations(["model", "optimizer", "scaler"])), ids="-".join)
@one_of_each_path
def test_resuming_from_exported_weights_is_never_having_stopped(make, order):
    model, optimizer, scaler = prepared(make)
    train(model, optimizer, scaler, range(4), overflow=[1])
    state = copy.deepcopy([optimizer.fp32_state_dict(model), optimizer.state_dict(), scaler.state_dict()])
    again = prepared(make, seed=3)
    train(*again, range(20, 22))
    for part in order:
        which = ["model", "optimizer", "scaler"].index(part)
        again[which].load_state_dict(state[which])
    assert snapshot(again[1]) == snapshot(optimizer)
    for run in (again, (model, optimizer, scaler)):
        train(*run, range(4, 8), overflow=[5])
    assert snapshot(again[1]) == snapshot(optimizer)


def _states(make=FUSED["adam"]):
    """fp16 weights and optimizer's state of a run, and FP32 weights that differ from its masters but hardly in fp16."""
    model, optimizer, scaler = prepared(make)
    train(model, optimizer, scaler, range(3))
    with torch.no_grad():
        model[0].bias.zero_()  # its masters are 0 or tiny, and 0 in fp16
        for master in list(optimizer.master_params())[1:2]:
            master.fill_(1e-9)
    state = copy.deepcopy({"w16": model.state_dict(), "opt": optimizer.state_dict()})
    state["w32"] = nudged(optimizer.fp32_state_dict(model))
    state["w32"]["0.bias"] = torch.full_like(state["w32"]["0.bias"], -1e-9)
    return state, [m.detach().clone() for m in optimizer.master_params()]


FROM_WEIGHTS = [("w32", "opt"), ("opt", "w32"), ("w16", "opt", "w32"), ("w32", "opt", "opt"), ("w32", "opt", "w32")]
FROM_STATE = [
    ("opt",),
    ("w16", "opt"),
    ("opt", "w16"),
    ("w32", "w16", "opt"),
    ("w32", "opt", "w16"),
    ("opt", "w32", "opt", "w16"),
    ("w32", "w16", "w16", "opt"),
    ("w32", "opt", "opt", "w16"),
]


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize("order", FROM_WEIGHTS + FROM_STATE[1:], ids="-".join)
def test_which_masters_the_next_step_starts_from(order, look):
    """Whether somebody looks at masters and states in between makes no difference."""
    state, masters = _states()
    model, optimizer, scaler = prepared(seed=4)
    for part in order:
        (optimizer if part == "opt" else model).load_state_dict(copy.deepcopy(state[part]))
        if look:
            snapshot(optimizer), optimizer.fp32_state_dict(model)
    expected = list(state["w32"].values()) if order in FROM_WEIGHTS else masters
    assert same_bits(optimizer.fp32_state_dict(model), dict(zip(state["w16"], expected, strict=True)))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, scaler, [0])
    assert same_bits(masters_of(optimizer), expected)
    assert optimizer._loaded == {}


def test_a_step_ends_the_memory_of_loaded_weights():
    """FP32 weights, steps, then a checkpoint in the order optimizer, model: the checkpoint's masters."""
    state, masters = _states()
    model, optimizer, scaler = prepared(seed=4)
    model.load_state_dict(network(seed=6).state_dict())
    train(model, optimizer, scaler, range(2))
    optimizer.load_state_dict(state["opt"])
    assert not optimizer._loaded
    model.load_state_dict(state["w16"])
    assert same_bits(list(optimizer.fp32_state_dict(model).values()), masters)


def test_masters_that_are_put_aside_are_copies():
    state, masters = _states()
    model, optimizer, _ = prepared(seed=4)
    model.load_state_dict(state["w32"])
    optimizer.load_state_dict(state["opt"])
    assert optimizer._loaded[model[0].weight] is not None
    for own in state["opt"]["state"].values():
        own.get("master", torch.zeros(())).fill_(9.0)
    model.load_state_dict(state["w16"])
    assert same_bits(list(optimizer.fp32_state_dict(model).values()), masters)


def test_masters_that_were_put_aside_are_used_once():
    """Another state then counts as after any fp16 weights, though its masters round to the same."""
    state, masters = _states()
    model, optimizer, _ = prepared(seed=4)
    for part in ("w32", "opt", "w16"):
        (optimizer if part == "opt" else model).load_state_dict(state[part])
    assert same_bits(masters_of(optimizer), masters)
    state["opt"]["state"][1]["master"] = -masters[1]
    optimizer.load_state_dict(state["opt"])
    assert same_bits(masters_of(optimizer), [masters[0], -masters[1], *masters[2:]])


def test_weights_written_by_hand_after_fp32_weights():
    """They are the last word, and the state's masters stay where they round to them."""
    state, masters = _states()
    model, optimizer, _ = prepared(seed=4)
    model.load_state_dict(network(seed=5).state_dict())
    with torch.no_grad():
        for param, value in zip(model.parameters(), state["w16"].values(), strict=True):
            param.copy_(value)
        model[0].weight[0, 0] = masters[0][0, 0] = 0.25
    optimizer.load_state_dict(state["opt"])
    assert same_bits(list(optimizer.fp32_state_dict(model).values()), masters)


# Hooks.


def test_an_entry_that_a_later_hook_takes_away():
    """The parameter is not written; then its master may not stay what it is not."""
    model, optimizer, _ = prepared()
    params = values(model)
    model[0].register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.pop(prefix + "weight"))
    model.load_state_dict(network(seed=5).state_dict(), strict=False)
    got = masters_of(optimizer)[0]
    assert same_bits(got.half(), params[0])
    assert same_bits(optimizer.state_dict()["state"][0]["master"], got)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_the_model_writes_no_masters_but_its_own(duplicate):
    model, optimizer, _ = prepared()
    before = frozen(masters_of(optimizer))
    twin, source = duplicate(model), network(seed=5)
    twin.load_state_dict(source.state_dict())
    assert frozen(masters_of(optimizer)) == before
    assert [len(m._load_state_dict_pre_hooks) for m in twin.modules()] == [1] * 5
    own = mpengine.prepare(twin, FUSED["adam"](twin.parameters()))
    twin.load_state_dict(source.state_dict())
    assert same_bits(masters_of(own), values(source))
    assert [len(m._load_state_dict_pre_hooks) for m in twin.modules()] == [1] * 5


def test_a_model_copied_with_its_optimizer():
    model, optimizer, _ = prepared()
    twin, own = copy.deepcopy([model, optimizer])
    before, source = frozen(masters_of(optimizer)), network(seed=5)
    twin.load_state_dict(source.state_dict())
    assert same_bits(masters_of(own), values(source))
    assert frozen(masters_of(optimizer)) == before


def test_the_hooks_hold_neither_optimizer_nor_model():
    model, optimizer, scaler = prepared()
    train(model, optimizer, scaler, [0])
    gone = weakref.ref(optimizer)
    del optimizer, scaler
    gc.collect()
    assert gone() is None
    model.load_state_dict(network(seed=5).state_dict())
    model_gone = weakref.ref(model)
    del model
    gc.collect()
    assert model_gone() is None


def test_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, optimizer, scaler = prepared()
        ddp, source = nn.parallel.DistributedDataParallel(model), network(seed=5)
        ddp.load_state_dict({f"module.{k}": v for k, v in source.state_dict().items()})
        assert same_bits(masters_of(optimizer), values(source))
        train(ddp, optimizer, scaler, range(2))
        exported = optimizer.fp32_state_dict(ddp)
        assert list(exported) == [f"module.{k}" for k in source.state_dict()]
        assert same_bits(list(exported.values()), masters_of(optimizer))
    finally:
        torch.distributed.destroy_process_group()


def test_a_scripted_part_is_left_alone():
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(nn.Linear(3, 3))
    model = nn.Sequential(scripted, nn.Linear(3, 1))
    optimizer = mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(list(optimizer.master_params())) == 4
    assert len(model[1]._load_state_dict_pre_hooks) == 1


# Refusals.


@pytest.mark.parametrize("part", ["whole", "submodule"])
def test_assign_is_refused_and_nothing_changed(part):
    model, optimizer, _ = prepared()
    target, source = (model, network(seed=5)) if part == "whole" else (model[3], network(seed=5)[3])
    before, params = snapshot(optimizer), list(model.parameters())
    with pytest.raises(
        RuntimeError, match=r"assign=True\) would put .* parameter '(0\.)?weight'.*before mpengine\.prep"
    ):
        target.load_state_dict(source.state_dict(), assign=True)
    assert snapshot(optimizer) == before
    assert all(p is q for p, q in zip(params, model.parameters(), strict=True))


def test_weights_beyond_fp16_are_refused():
    """As `prepare` refuses them; torch would make them inf. The other entries are loaded, as torch always does it."""
    model, optimizer, _ = prepared()
    before, source = masters_of(optimizer), network(seed=5)
    with torch.no_grad():
        source[0].weight[1, 2] = 70000.0
    with pytest.raises(RuntimeError, match=r"parameter '0\.weight' holds 70000 .*65504.*keep_fp32="):
        model.load_state_dict(source.state_dict())
    assert same_bits(masters_of(optimizer), [before[0], *values(source)[1:]])
    assert model[0].weight.isfinite().all()


@pytest.mark.parametrize("entry", [torch.zeros(2), torch.zeros(9, 6, dtype=torch.int32).to_sparse(), 3.0])
def test_entries_that_torch_refuses_leave_the_master(entry):
    model, optimizer, _ = prepared()
    before = snapshot(optimizer)
    weights = {"0.weight": entry}
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        model.load_state_dict(weights, strict=False)
    assert snapshot(optimizer) == before


def test_missing_and_surplus_keys_are_for_torch_to_refuse():
    model, _, _ = prepared()
    weights = network(seed=5).state_dict()
    weights["stranger"] = weights.pop("3.bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.bias[\s\S]*Unexpected key.*stranger"):
        model.load_state_dict(weights)


# Exporting.


class Mixed(nn.Module):
    """What a state dict may hold: weights of every kind, buffers of every kind, extra state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("exact", torch.tensor([0.5, 3.0]))
        self.register_buffer("inexact", torch.tensor([0.1]))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.register_buffer("narrow", torch.tensor([0.1], dtype=BRAIN))

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        self.version = state["version"]

    def forward(self, x):
        return self.frozen(self.norm(self.linear(x)))


def test_an_export_has_the_masters_and_loads_into_the_fp32_model():
    model = Mixed()
    optimizer = mpengine.prepare(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1))
    for seed in range(3):
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).half()).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    exported = optimizer.fp32_state_dict(model)
    assert list(exported) == list(Mixed().state_dict())
    assert exported._metadata == model.state_dict()._metadata
    masters = masters_of(optimizer)
    assert same_bits([exported[k] for k in ("linear.weight", "linear.bias", "norm.weight", "norm.bias")], masters)
    assert not same_bits(exported["linear.weight"], model.linear.weight.float())
    assert same_bits(exported["frozen.weight"], Mixed().frozen.weight.detach().half().float())
    assert same_bits(exported["norm.running_var"], model.norm.running_var)
    for name in ("exact", "inexact", "count"):
        assert same_bits(exported[name], getattr(Mixed(), name))
    assert same_bits(exported["narrow"], model.narrow.float())
    assert all(t.dtype in (SINGLE, torch.int64) for t in exported.values() if isinstance(t, torch.Tensor))
    fresh = Mixed()
    stream = io.BytesIO()
    torch.save(exported, stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    assert fresh.version == 3
    assert same_bits([p for p in fresh.parameters() if p.requires_grad], masters)
    assert same_bits(fresh.narrow, model.narrow)
    again = mpengine.prepare(fresh, torch.optim.Adam(p for p in fresh.parameters() if p.requires_grad))
    assert same_bits(masters_of(again), masters)


def test_an_export_is_a_copy_and_changes_nothing():
    model, optimizer, scaler = prepared()
    train(model, optimizer, scaler, range(2))
    before = snapshot(optimizer)
    exported = optimizer.fp32_state_dict(model)
    assert not any(t.requires_grad for t in exported.values())
    for tensor in exported.values():
        tensor.fill_(7.0)
    assert snapshot(optimizer) == before
    exported = optimizer.fp32_state_dict(model)
    kept = frozen(exported)
    train(model, optimizer, scaler, range(2, 4))
    assert frozen(exported) == kept


def test_an_export_of_a_part():
    model, optimizer, _ = prepared()
    assert same_bits(list(optimizer.fp32_state_dict(model[3]).values()), masters_of(optimizer)[4:])
    assert list(optimizer.fp32_state_dict(model[3])) == ["weight", "bias"]


def test_an_export_sees_what_was_written_since_the_last_step():
    """The FP32 weights are those that the next step starts from, and asking moves nothing."""
    model, optimizer, scaler = prepared()
    train(model, optimizer, scaler, range(2))
    masters = masters_of(optimizer)
    with torch.no_grad():
        model[0].weight[0, 0] = 0.25
    masters[0][0, 0] = 0.25
    assert same_bits(list(optimizer.fp32_state_dict(model).values()), masters)
    state = copy.deepcopy(optimizer.state_dict())
    other, its_optimizer, _ = prepared(seed=1)
    weights = values(other)
    its_optimizer.load_state_dict(state)  # the weights may be yet to come; as things stand they would win
    assert same_bits(list(its_optimizer.fp32_state_dict(other).values())[:2], [w.float() for w in weights[:2]])
    other.load_state_dict(model.state_dict())
    assert same_bits(list(its_optimizer.fp32_state_dict(other).values()), masters)


def _replaced(state):
    return {key: value + 0 for key, value in state.items()}


def _renamed(state):
    return {f"new.{key}": state.pop(key) for key in list(state)}


def _swapped(state):
    return {"0.bias": state["1.weight"], "1.weight": state["0.bias"]}


@pytest.mark.parametrize("change", [_replaced, _renamed, _swapped])
def test_a_hook_of_the_model_may_change_the_state_dict(change):
    model, optimizer, _ = prepared()
    expected = optimizer.fp32_state_dict(model)
    expected.update(change(expected))
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(change(state)))
    exported = optimizer.fp32_state_dict(model)
    assert list(exported) == list(expected)
    assert same_bits(exported, expected)


def test_exports_that_are_refused():
    model, optimizer, _ = prepared()
    with pytest.raises(TypeError, match=r"model is a OrderedDict; give the torch\.nn\.Module"):
        optimizer.fp32_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="this Linear has none of the optimizer's parameters; give the model"):
        optimizer.fp32_state_dict(nn.Linear(2, 2))
    model.float()
    with pytest.raises(RuntimeError, match=r"parameter '0\.weight' became torch\.float32 after it was wrapped"):
        optimizer.fp32_state_dict(model)


LOOKS = {
    "nobody": lambda optimizer, model: None,
    "state_dict": lambda optimizer, model: optimizer.state_dict(),
    "torch_state_dict": lambda optimizer, model: optimizer.torch_state_dict(),
    "fp32_state_dict": lambda optimizer, model: optimizer.fp32_state_dict(model),
    "master_params": lambda optimizer, model: list(optimizer.master_params()),
    "deepcopy": lambda optimizer, model: copy.deepcopy(optimizer),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_that_are_swapped_in_and_out_cost_the_masters_nothing(dtype, look):
    """An average is evaluated, perhaps saved, and the fp16 weights come back: bitwise as if nothing had been."""
    model, optimizer, scaler = prepared()
    train(model, optimizer, scaler, [0, 1])
    before = snapshot(optimizer)
    backup = copy.deepcopy(model.state_dict())
    average = {name: (value.float() * 1.01).to(dtype) for name, value in optimizer.fp32_state_dict(model).items()}
    for _ in range(2):
        model.load_state_dict(average)
        look(optimizer, model)
        assert torch.equal(model[0].weight, average["0.weight"].half())
        model.load_state_dict(backup)
        look(optimizer, model)
    assert snapshot(optimizer) == before
    train(model, optimizer, scaler, [2])
    assert not optimizer._before


def test_what_is_saved_while_other_weights_are_in_belongs_to_these():
    model, optimizer, scaler = prepared()
    train(model, optimizer, scaler, [0, 1])
    backup = copy.deepcopy(model.state_dict())
    other = {name: value + 1 for name, value in backup.items()}
    model.load_state_dict(other)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    model.load_state_dict(backup)
    for param, state in zip(model.parameters(), saved[1]["state"].values(), strict=True):
        if "master" in state:
            assert torch.equal(state["master"].to(param.dtype), param + 1)
    model.load_state_dict(other)
    train(model, optimizer, scaler, [2])  # stepped with, they are the weights
    again, optimizer2, scaler2 = prepared(seed=1)
    again.load_state_dict(saved[0])
    optimizer2.load_state_dict(saved[1])
    scaler2.load_state_dict(GradScaler("cpu", init_scale=2.0**10, growth_interval=3).state_dict())
    train(again, optimizer2, scaler2, [2])
    assert same_bits(list(model.parameters()), list(again.parameters()))
