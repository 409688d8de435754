"""`prepare`: what becomes fp16, what stays FP32, how the two meet, and what is refused with nothing changed."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler
from tests.harness import BRAIN, FUSED, HALF, SINGLE, frozen, same_bits, snapshot

every_low = pytest.mark.parametrize("low", [HALF, BRAIN])
with_and_without_autocast = pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])


def sgd(model, **kw):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.125, "momentum": 0.5, **kw})


def prepare(model, low=HALF, **kw):
    return mpengine.prepare(model, sgd(model), dtype=low, **kw)


def dtypes(model):
    return {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}


class ScaleNorm(nn.Module):
    """A norm of one's own: known by its name. It would mix dtypes, were its input fp16."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.register_buffer("offset", torch.full((size,), 1e-3))

    def forward(self, x):
        assert x.dtype == self.weight.dtype
        return x / x.square().mean(-1, keepdim=True).add(1e-5).sqrt() * self.weight + self.offset


# Of each: the layer, and the shape of its input.
NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (6, 4)),
    "BatchNorm1d of sequences": (lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 2, 2)),
    "BatchNorm2d without affine": (lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 2, 2)),
    "BatchNorm2d without statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 2, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (3, 4)),
    "LayerNorm without affine": (lambda: nn.LayerNorm(4, elementwise_affine=False), (3, 4)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5)),
    "GroupNorm without affine": (lambda: nn.GroupNorm(2, 4, affine=False), (3, 4, 5)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (3, 4)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4), (3, 4, 5)),
    "InstanceNorm2d with affine": (lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 2, 2)),
    "InstanceNorm2d with statistics": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (3, 4, 2, 2)),
    "InstanceNorm2d with both": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 2, 2)),
    "ScaleNorm": (lambda: ScaleNorm(4), (3, 4)),
}
every_norm = pytest.mark.parametrize(("make", "shape"), NORMS.values(), ids=NORMS)


# Casting.


@every_low
def test_parameters_keep_their_identity_and_masters_the_original_values(low):
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    before = list(model.parameters())
    originals = [p.detach().clone() for p in before]
    optimizer = prepare(model, low)
    for param, old, original, master in zip(
        model.parameters(), before, originals, optimizer.master_params(), strict=True
    ):
        assert param is old
        assert param.requires_grad
        assert same_bits(master, original)
        assert same_bits(param, original.to(low))
    assert not all(same_bits(original, original.to(low).float()) for original in originals)


@every_norm
@every_low
@with_and_without_autocast
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_norm_layers_stay_fp32_and_take_and_return_fp16(make, shape, low, autocast, mode):
    """The result is the FP32 layer's on the same input, rounded, within one rounding of the low precision."""
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(shape[-1], 3))
    with torch.no_grad():
        for param in model[0].parameters():
            param.add_(torch.rand_like(param))
    exact = copy.deepcopy(model[0])
    prepare(model, low)
    assert {t.dtype for t in (*model[0].parameters(), *model[0].buffers())} <= {SINGLE, torch.int64}
    assert model[1].weight.dtype == low
    for one in (model, exact):
        one.train(mode == "train")
    x = torch.randn(shape).to(low).requires_grad_()
    twin = x.detach().float().requires_grad_()
    with torch.autocast("cpu", low, enabled=autocast):
        out = model[0](x)
        loss = model(x).float().square().sum()
    expected = exact(twin)
    assert out.dtype == low
    torch.testing.assert_close(out.float(), expected, rtol=2 * torch.finfo(low).eps, atol=2 * torch.finfo(low).eps)
    loss.backward()
    assert x.grad.dtype == low
    for param in model[0].parameters():
        assert param.grad.dtype == SINGLE
    for param in model[1].parameters():
        assert param.grad.dtype == low


@every_norm
def test_norm_layers_learn_as_in_fp32(make, shape):
    """Same gradient, same update: the FP32 norm of a prepared model is stepped like the FP32 model's."""
    torch.manual_seed(0)
    model = nn.ModuleList([make(), nn.Linear(1, 1)])
    exact = copy.deepcopy(model[0])
    params = list(exact.parameters())
    if not params:
        assert list(model[0].parameters()) == []
        return
    optimizer, theirs = prepare(model), torch.optim.SGD(params, lr=0.125, momentum=0.5)
    for step in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step)).half()
        model[0](x).float().square().sum().backward()
        for param, own in zip(params, model[0].parameters(), strict=True):
            param.grad = own.grad.clone()
        exact(x.float())
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
    for param, own in zip(params, model[0].parameters(), strict=True):
        torch.testing.assert_close(own, param, rtol=2**-22, atol=2**-22)
    for ours, buffer in zip(model[0].buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(ours, buffer, rtol=1e-5, atol=1e-6)


def test_what_a_convnet_becomes():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.PReLU(), nn.Flatten(), nn.Linear(2, 2))
    prepare(model)
    assert dtypes(model) == {
        "0.weight": HALF,
        "0.bias": HALF,
        "1.weight": SINGLE,
        "1.bias": SINGLE,
        "1.running_mean": SINGLE,
        "1.running_var": SINGLE,
        "1.num_batches_tracked": torch.int64,
        "2.weight": HALF,
        "4.weight": HALF,
        "4.bias": HALF,
    }


def test_buffers_stay_as_they_are():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("table", torch.tensor([0.5, -math.inf, math.nan]))
            self.register_buffer("mask", torch.tensor([0.0, -1e9]))
            self.register_buffer("index", torch.arange(3))
            self.register_buffer("wide", torch.ones(2, dtype=torch.float64))
            self.register_buffer("nothing", None)

    model = Masked()
    prepare(model)
    assert [model.table.dtype, model.mask.dtype, model.index.dtype] == [SINGLE, SINGLE, torch.int64]
    assert model.wide.dtype == torch.float64
    assert model.nothing is None
    assert model.mask[1] == -1e9


def test_a_counter_counts_beyond_2048():
    model = nn.Linear(4, 1)
    model.register_buffer("seen", torch.zeros(()))
    prepare(model)
    for _ in range(3000):
        model.seen += 1
    assert model.seen == 3000.0


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_it_can_be_compiled_with_autocast_inside(norm):
    model = nn.Sequential(nn.Linear(8, 8), norm(8))
    prepare(model)

    def forward(x):
        with torch.autocast("cpu", HALF):
            return model(x)

    x = torch.randn(2, 8)
    assert torch.equal(torch.compile(forward, backend="eager")(x), forward(x))


@pytest.mark.parametrize("keep_fp32", [nn.Linear, [nn.Linear], "0", ["0"]], ids=str)
def test_one_kind_or_several_of_what_stays_fp32(keep_fp32):
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    prepare(model, keep_fp32=keep_fp32)
    assert [module.weight.dtype for module in model] == [SINGLE, HALF]


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_of_a_kept_list_compute_in_fp32_though_the_list_itself_is_never_called(autocast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 4)]))
    head = copy.deepcopy(model[1][0])
    prepare(model, keep_fp32=["1"])
    x = torch.randn(2, 8).half()
    with torch.autocast("cpu", HALF, enabled=autocast):
        out = model[1][0](x)
    assert torch.equal(out, head(x.float()).half())
    with torch.autocast("cpu", HALF):
        assert not torch.equal(out, head(x))  # what autocast would have made of it


@pytest.mark.parametrize("keep_fp32", [3, [3], [None]], ids=str)
def test_what_names_no_module_is_refused(keep_fp32):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"keep_fp32 (is|holds) (3|None);"):
        prepare(model, keep_fp32=keep_fp32)
    assert model[0].weight.dtype == SINGLE


# keep_fp32.

KEEP = {
    "a class": [nn.Linear],
    "a name": ["1"],
    "a child's name": ["1.0", "1.2"],
    "a function": lambda name, module: name.startswith("1."),
}


@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
@with_and_without_autocast
def test_kept_layers_stay_fp32_and_work(keep, autocast):
    model = nn.Sequential(
        nn.Conv1d(2, 2, 1), nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), nn.Conv1d(2, 1, 1)
    )
    before = frozen(list(model[1].parameters()))
    optimizer = prepare(model, keep_fp32=keep)
    assert [p.dtype for p in model.parameters()] == [HALF] * 2 + [SINGLE] * 4 + [HALF] * 2
    assert frozen(list(model[1].parameters())) == before
    with torch.autocast("cpu", HALF, enabled=autocast):
        out = model(torch.randn(1, 2, 3).half())
    assert out.dtype == HALF
    out.float().sum().backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


@pytest.mark.parametrize("keep", [[], None, (), set()])
def test_nothing_kept(keep):
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    prepare(model, keep_fp32=keep)
    assert [p.dtype for p in model.parameters()] == [HALF, HALF, SINGLE, SINGLE]


def test_everything_kept():
    model = nn.Linear(2, 2)
    optimizer = prepare(model, keep_fp32=[""])
    assert model.weight.dtype == SINGLE
    assert [m is p for m, p in zip(optimizer.master_params(), model.parameters(), strict=True)] == [True, True]


@with_and_without_autocast
def test_kept_attention_and_recurrence_return_fp16_in_tuples(autocast):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.recurrent = nn.LSTM(4, 4, batch_first=True)
            self.last = nn.Linear(4, 1)

        def forward(self, x):
            x, weights = self.attention(x, x, x)
            x, (h, c) = self.recurrent(x, (x.new_zeros(1, len(x), 4), x.new_zeros(1, len(x), 4)))
            assert {t.dtype for t in (x, weights, h, c)} == {HALF}
            return self.last(x)

    model = Net()
    optimizer = prepare(model, keep_fp32=[nn.MultiheadAttention, nn.LSTM])
    assert {p.dtype for m in (model.attention, model.recurrent) for p in m.parameters()} == {SINGLE}
    with torch.autocast("cpu", HALF, enabled=autocast):
        out = model(torch.randn(2, 3, 4).half())
    assert out.dtype == HALF
    out.float().sum().backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


@with_and_without_autocast
def test_a_kept_embedding_returns_fp16(autocast):
    """It has no floating input to follow."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    prepare(model, keep_fp32=[nn.Embedding])
    assert model[0].weight.dtype == SINGLE
    with torch.autocast("cpu", HALF, enabled=autocast):
        embedded = model[0](torch.tensor([1, 2]))
        assert embedded.dtype == HALF
        assert model(torch.tensor([1, 2])).dtype == HALF
    assert torch.is_autocast_enabled("cpu") is False


def test_a_kept_block_computes_in_fp32_throughout():
    """What its layers hand to each other is not rounded, nor what it computes itself, in autocast or out of it."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.first(x)
            assert y.dtype == SINGLE
            z = self.second(y @ y.transpose(0, 1) @ y)
            assert z.dtype == SINGLE
            return {"out": [z, 5], "x": x}

    model = nn.ModuleList([Block(), nn.Linear(1, 1)])
    exact = copy.deepcopy(model[0])
    prepare(model, keep_fp32=[Block])
    x = torch.randn(4, 3).half()
    for autocast in (False, True):
        with torch.autocast("cpu", HALF, enabled=autocast):
            result = model[0](x)
            assert torch.is_autocast_enabled("cpu") is autocast
        assert same_bits(result["out"][0], exact(x.float())["out"][0].half())
        assert result["out"][1] == 5
        assert same_bits(result["x"], x)


def test_an_fp32_input_stays_fp32_through_a_norm():
    model = nn.Sequential(nn.LayerNorm(3))
    prepare(nn.ModuleList([model, nn.Linear(1, 1)]))
    assert model(torch.randn(2, 3)).dtype == SINGLE


# Whole models.


def test_tied_weights_have_one_master():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 3)
            self.head = nn.Linear(3, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = Tied()
    original = model.embed.weight.detach().clone()
    optimizer = prepare(model)
    assert model.head.weight is model.embed.weight
    (master,) = optimizer.master_params()
    assert same_bits(master, original)
    model(torch.tensor([1, 2])).float().square().sum().backward()
    optimizer.step()
    assert model.head.weight is model.embed.weight
    assert same_bits(model.embed.weight, master.half())
    assert not same_bits(master, original)


@with_and_without_autocast
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_transformer(autocast, mode):
    """eval mode takes torch's fused fast path, which reads the weights behind the modules' backs."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    exact = copy.deepcopy(model)
    optimizer = prepare(model)
    for one in (model, exact):
        one.train(mode == "train")
    x = torch.randn(2, 5, 8).half()
    with torch.autocast("cpu", HALF, enabled=autocast):
        with torch.inference_mode(mode == "eval"):
            out = model(x)
        expected = exact(x.float())
    assert out.dtype == HALF
    torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)
    model.train()
    model(x).float().square().sum().backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


def test_attention():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    exact = copy.deepcopy(attention)
    optimizer = prepare(attention)
    x = torch.randn(2, 5, 8).half()
    out, _ = attention(x, x, x)
    torch.testing.assert_close(out.float(), exact(x.float(), x.float(), x.float())[0], rtol=1e-2, atol=1e-2)
    out.float().sum().backward()
    optimizer.step()
    assert {p.dtype for p in attention.parameters()} == {HALF}


@with_and_without_autocast
def test_spectral_norm(autocast):
    """A parametrisation whose name ends in Norm: its vectors stay FP32, and it is computed in FP32."""
    torch.manual_seed(0)
    model = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 1))
    exact = copy.deepcopy(model)
    optimizer = prepare(model)
    x = torch.randn(5, 4).half()
    with torch.autocast("cpu", HALF, enabled=autocast):
        out = model(x)
    assert out.dtype == HALF
    torch.testing.assert_close(out.float(), exact(x.float()), rtol=1e-2, atol=1e-2)
    out.float().sum().backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


@with_and_without_autocast
def test_weight_norm(autocast):
    torch.manual_seed(0)
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 1))
    exact = copy.deepcopy(model)
    optimizer = prepare(model)
    x = torch.randn(5, 4).half()
    with torch.autocast("cpu", HALF, enabled=autocast):
        out = model(x)
    assert out.dtype == HALF
    torch.testing.assert_close(out.float(), exact(x.float()), rtol=1e-2, atol=1e-2)
    out.float().sum().backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


@every_low
def test_a_model_that_is_fp16_already(low):
    """Its norms, too: they are left as they are, and masters come from what there is."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(low)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = prepare(model, low)
    assert {p.dtype for p in model.parameters()} == {low}
    for master, old in zip(optimizer.master_params(), before, strict=True):
        assert same_bits(master, old.float())
    model(torch.randn(5, 3).to(low)).float().sum().backward()
    optimizer.step()
    assert optimizer.steps_taken == 1


def test_frozen_parameters_are_cast_and_have_no_master():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = prepare(model)
    assert {p.dtype for p in model.parameters()} == {HALF}
    assert not model[0].weight.requires_grad
    assert len(list(optimizer.master_params())) == 2
    trained = mpengine.prepare(part := nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), sgd(part[1]))
    assert [p.dtype for p in part.parameters()] == [SINGLE, SINGLE, HALF, HALF]  # another optimizer may train part[0]
    assert len(list(trained.master_params())) == 2


def test_two_optimizers_on_one_model():
    """A GAN in one module: each optimizer's part is cast when that one is prepared."""
    model = nn.ModuleDict(
        {"g": nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), "d": nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 1))}
    )
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    scaler = GradScaler(init_scale=16.0, num_losses=2)
    first = mpengine.prepare(model, sgd(model["g"]), scaler)
    assert model["d"][1].weight.dtype == SINGLE
    second = mpengine.prepare(model, sgd(model["d"]), scaler)
    assert [p.dtype for p in model.parameters()] == [HALF, HALF, SINGLE, SINGLE, SINGLE, SINGLE, HALF, HALF]
    masters = [*first.master_params(), *second.master_params()]
    assert all(same_bits(m, o) for m, o in zip(masters, originals.values(), strict=True))
    for seed in range(2):
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed)).half()
        scaler.scale(model["d"](model["g"](x).detach()).float().square().mean(), 0).backward()
        second.step()
        scaler.scale(model["d"](model["g"](x)).float().mean(), 1).backward()
        first.step()
        scaler.update()
        first.zero_grad()
        second.zero_grad()
    assert (first.steps_taken, second.steps_taken) == (2, 2)
    assert len(model["g"][1]._forward_pre_hooks) == 1  # prepared twice, hooked once


def test_two_models_and_one_scaler():
    generator, critic = nn.Linear(2, 3), nn.Linear(3, 1)
    scaler = GradScaler(init_scale=16.0, num_losses=2)
    first, second = mpengine.prepare(generator, sgd(generator), scaler), mpengine.prepare(critic, sgd(critic), scaler)
    x = torch.randn(4, 2).half()
    scaler.scale(critic(generator(x)).float().mean(), 1).backward()
    first.step()
    scaler.update()
    assert (first.steps_taken, second.steps_taken) == (1, 0)


def prepared_convnet():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), ScaleNorm(2), nn.Flatten(), nn.Linear(8, 1)
    )
    return model, prepare(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_prepared_model_can_be_copied(duplicate):
    model, _ = prepared_convnet()
    x = torch.randn(3, 1, 4, 4).half()
    model.eval()
    twin = duplicate(model)
    assert dtypes(twin) == dtypes(model)
    assert same_bits(twin(x), model(x))
    mpengine.prepare(twin, sgd(twin))
    assert same_bits(twin(x), model(x))
    assert len(twin[2]._forward_pre_hooks) == 1


def test_an_exception_in_a_norm_leaves_no_trace():
    norm = nn.LayerNorm(3)
    prepare(nn.ModuleList([norm, nn.Linear(1, 1)]))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.ones(2, 2).half())
    with torch.autocast("cpu", BRAIN):
        with pytest.raises(RuntimeError, match="normalized_shape"):
            norm(torch.ones(2, 2).half())
        assert torch.is_autocast_enabled("cpu")
    assert norm(torch.ones(2, 3)).dtype == SINGLE
    assert norm(torch.ones(2, 3).half()).dtype == HALF


def test_the_state_dict_of_a_prepared_model_has_the_same_keys():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    keys = list(model.state_dict())
    prepare(model)
    assert list(model.state_dict()) == keys


# Refusals: each names the culprit and the remedy, and changes nothing.


def _wrapped_before(model):
    model._wrapper = mpengine.MixedPrecisionOptimizer(sgd(model))
    return sgd(model)


def _stranger(model):
    return torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)


def _large(model):
    model[1].weight.data[0, 1] = 70000.0
    return sgd(model)


def _double(model):
    model[1].double()
    return sgd(model)


def _complex(model):
    model[1].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    return sgd(model)


def _expanded(model):
    model[1].bias = nn.Parameter(torch.ones(1).expand(2))
    return sgd(model)


REFUSED = {
    "wrapped already": (_wrapped_before, {}, ValueError, r"parameter '0\.weight' is wrapped by another.*Use that one"),
    "a wrapper": (lambda m: mpengine.MixedPrecisionOptimizer(sgd(m)), {}, TypeError, "MixedPrecisionOptimizer already"),
    "LBFGS": (lambda m: torch.optim.LBFGS(m.parameters()), {}, TypeError, "LBFGS evaluates its closure several times"),
    "SparseAdam": (
        lambda m: torch.optim.SparseAdam(m.parameters()),
        {},
        TypeError,
        "SparseAdam steps sparse gradients",
    ),
    "no optimizer": (lambda m: m, {}, TypeError, "must be a torch.optim.Optimizer, not Sequential"),
    "strangers": (_stranger, {}, ValueError, r"parameters \[4\] of this SGD do not belong to the model.*ModuleList"),
    "a large weight": (_large, {}, ValueError, r"parameter '1\.weight' holds 70000.*keep_fp32=\['1'\]"),
    "float64": (_double, {}, ValueError, r"parameter '1\.weight' is torch\.float64.*cast it first"),
    "complex": (_complex, {}, ValueError, r"parameter '1\.weight' is torch\.complex64"),
    "expanded": (_expanded, {}, ValueError, r"parameter '1\.bias' has strides \(0,\) for shape \(2,\).*contiguous"),
    "dtype": (sgd, {"dtype": torch.float32}, ValueError, "dtype is torch.float32; it must be torch.float16 or"),
    "torch's scaler": (sgd, {"scaler": torch.amp.GradScaler("cpu")}, TypeError, "give a mpengine.GradScaler, or None"),
    "no scaler": (sgd, {"scaler": 1024.0}, TypeError, "scaler is a builtins.float"),
    "keep_fp32 of nothing": (sgd, {"keep_fp32": ["1.fc"]}, ValueError, r"keep_fp32 names the module '1\.fc'"),
    "max_grad_norm": (sgd, {"max_grad_norm": 0.0}, ValueError, "max_grad_norm is 0.0; it must be a number > 0"),
}


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_nothing_changed(make, options, error, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = make(model)
    state = model.state_dict()
    before, hooks = frozen(state), [len(m._forward_pre_hooks) for m in model.modules()]
    groups = frozen(optimizer.state_dict()) if isinstance(optimizer, torch.optim.Optimizer) else None
    with pytest.raises(error, match=message):
        mpengine.prepare(model, optimizer, **options)
    assert frozen(model.state_dict()) == before
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert groups is None or frozen(optimizer.state_dict()) == groups


def test_an_empty_optimizer_is_refused():
    model = nn.Linear(2, 2)
    optimizer = sgd(model)
    optimizer.param_groups.clear()
    with pytest.raises(ValueError, match=r"this SGD has no parameters; give it model\.parameters\(\)"):
        mpengine.prepare(model, optimizer)
    assert model.weight.dtype == SINGLE


@with_and_without_autocast
def test_a_refused_model_can_be_prepared_after_all(autocast):
    """The layer computes in FP32, in autocast too: there its weight of 70000 would be inf."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = _large(model)
    with pytest.raises(ValueError, match="70000"):
        mpengine.prepare(model, optimizer)
    wrapper = mpengine.prepare(model, optimizer, keep_fp32=["1"])
    assert [p.dtype for p in model.parameters()] == [HALF, HALF, SINGLE, SINGLE]
    with torch.autocast("cpu", HALF, enabled=autocast):
        out = model(torch.full((1, 2), 1e-3).half())
    assert out.isfinite().all()
    (out.float().sum() * 0.01).backward()
    wrapper.step()
    assert wrapper.steps_taken == 1


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_wrapping_without_prepare(make):
    """`MixedPrecisionOptimizer` on parameters as they are: masters of fp16 ones hold their values."""
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (HALF, SINGLE, BRAIN)]
    optimizer = mpengine.MixedPrecisionOptimizer(make(params))
    masters = list(optimizer.master_params())
    assert masters[1] is params[1]
    assert [m.dtype for m in masters] == [SINGLE] * 3
    assert all(isinstance(m, nn.Parameter) for m in masters)
    before = snapshot(optimizer)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.steps_taken == 1
    if make is FUSED["sgd"]:
        assert snapshot(optimizer) == before
