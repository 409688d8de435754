"""`apex.normalization` against float64: every mixture of dtypes, gradients, autocast, and after `prepare`."""

import itertools

import pytest
import torch
from torch import nn

import mpengine
from mpengine.apex import normalization as N

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MIXTURES = list(itertools.product(DTYPES, DTYPES))
LAYERS = [N.FusedLayerNorm, N.FusedRMSNorm, N.MixedFusedLayerNorm, N.MixedFusedRMSNorm]
ROWS, WIDTH = 5, 31


def exact(x, weight, bias, rms, eps):
    """In float64, as the papers have it."""
    centred = x if rms else x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


def check(out, dtype, true):
    """One rounding to `dtype`, and FP32 sums of 31 numbers before it."""
    assert out.dtype == dtype
    bound = (torch.finfo(dtype).eps + 2 * WIDTH * 2.0**-23) * true.abs().clamp(min=1.0)
    assert ((out.double() - true).abs() <= bound).all()


def filled(layer, dtype):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return layer.to(dtype)


def wide(param):
    return None if param is None else param.detach().double().requires_grad_()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("of_input", "of_weight"), MIXTURES, ids=str)
def test_layers(kind, of_input, of_weight):
    torch.manual_seed(0)
    layer = filled(kind(WIDTH, eps=1e-3), of_weight)
    dtype = of_weight if "Mixed" in kind.__name__ else of_input
    x = (3 * torch.randn(ROWS, WIDTH) + 2).to(of_input).requires_grad_()
    out = layer(x)
    twin, weight, bias = wide(x), wide(layer.weight), wide(getattr(layer, "bias", None))
    true = exact(twin, weight, bias, "RMS" in kind.__name__, 1e-3)
    check(out, dtype, true.detach())
    seen = torch.randint(-2, 3, (ROWS, WIDTH), generator=torch.Generator().manual_seed(2))
    out.backward(seen.to(dtype))
    true.backward(seen.double())
    for ours, theirs in ((x, twin), (layer.weight, weight)):
        assert ours.grad.dtype == ours.dtype
        # Sums of products, each of size 8 at most, of normalised values that are rounded to the coarsest dtype once
        eps = max(torch.finfo(d).eps for d in (of_input, of_weight, torch.float32))
        assert (ours.grad.double() - theirs.grad).abs().max() <= 8 * ROWS * eps


FUNCTIONS = {
    "fused_layer_norm": (False, False),
    "fused_rms_norm": (True, False),
    "fused_layer_norm_affine": (False, True),
    "fused_rms_norm_affine": (True, True),
    "mixed_dtype_fused_layer_norm_affine": (False, True),
    "mixed_dtype_fused_rms_norm_affine": (True, True),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [WIDTH, (WIDTH,), torch.Size([WIDTH])], ids=["int", "tuple", "Size"])
def test_functions(name, shape):
    rms, affine = FUNCTIONS[name]
    x = torch.randn(ROWS, WIDTH).half()
    weight, bias = torch.randn(WIDTH), None if rms else torch.randn(WIDTH)
    params = [p for p in (weight, bias) if affine and p is not None]
    out = getattr(N, name)(x, *params, shape)
    true = exact(
        x.double(), weight.double() if affine else None, None if rms or not affine else bias.double(), rms, 1e-6
    )
    check(out, torch.float32 if "mixed" in name else torch.float16, true)


def test_manual_rms_norm():
    x, weight = torch.randn(ROWS, WIDTH).half(), torch.randn(WIDTH)
    check(
        N.manual_rms_norm(x, (WIDTH,), weight, 1e-5),
        torch.float32,
        exact(x.double(), weight.double(), None, True, 1e-5),
    )
    check(N.manual_rms_norm(x, (WIDTH,), None, 1e-5), torch.float16, exact(x.double(), None, None, True, 1e-5))


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_decides_the_dtype(kind):
    layer, x = kind(WIDTH), torch.randn(ROWS, WIDTH)
    with torch.autocast("cpu", torch.float16):
        assert layer(x).dtype == layer(x.half()).dtype == torch.float16
    assert layer(x).dtype == torch.float32


def test_arguments_are_apexs():
    assert N.FusedLayerNorm(3).eps == N.FusedRMSNorm(3).eps == 1e-5
    assert N.FusedLayerNorm([2, 3], 1e-3, False, True).weight is None
    assert N.FusedRMSNorm(3, elementwise_affine=False, memory_efficient=True).weight is None
    assert N.MixedFusedRMSNorm(3, memory_efficient=True, elementwise_affine=True).weight is not None


@pytest.mark.parametrize("kind", [N.MixedFusedLayerNorm, N.MixedFusedRMSNorm])
def test_mixed_layers_need_weights(kind):
    instead = kind.__name__.removeprefix("Mixed")
    with pytest.raises(RuntimeError, match=rf"{kind.__name__}.*elementwise_affine=False.*Use {instead}\."):
        kind(3, elementwise_affine=False)


@pytest.mark.parametrize("kind", LAYERS)
def test_prepare_keeps_them_fp32(kind):
    model = nn.Sequential(nn.Linear(4, WIDTH), kind(WIDTH), nn.Linear(WIDTH, 2))
    scaler = mpengine.GradScaler(init_scale=8.0)
    optimizer = mpengine.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler)
    assert [p.dtype for p in model[1].parameters()] == [torch.float32] * len(list(model[1].parameters()))
    out = model(torch.randn(3, 4).half())
    assert out.dtype == torch.float16
    scaler.scale(out.float().square().sum()).backward()
    before = model[1].weight.clone()
    optimizer.step()
    assert optimizer.steps_taken == 1
    assert not torch.equal(before, model[1].weight)


# The tests notice.


def test_an_eps_outside_of_the_root_would_be_noticed(monkeypatch):
    true = nn.functional.layer_norm
    monkeypatch.setattr(N.F, "layer_norm", lambda x, s, w, b, eps: true(x, s, w, b, 0.0) * (1 - eps))
    with pytest.raises(AssertionError):
        test_layers(N.FusedLayerNorm, torch.float32, torch.float32)


def test_a_weight_that_is_left_out_would_be_noticed(monkeypatch):
    true = nn.functional.rms_norm
    monkeypatch.setattr(N.F, "rms_norm", lambda x, s, w, eps: true(x, s, None, eps) + 0 * (0 if w is None else w))
    with pytest.raises(AssertionError):
        test_functions("fused_rms_norm_affine", WIDTH)
