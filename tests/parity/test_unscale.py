"""`unscale_` on gradients of every memory layout, dtype and place of an overflow, beside torch's."""

import pytest
import torch
from torch import nn

import mpengine
from tests.parity.harness import INF, NAN, bits, make_scaler

SCALE = 4.0  # its inverse is exact, so that every execution gives the same bits
FLOATS = (torch.float32, torch.float64, torch.bfloat16)


def dense(*shape):
    """Values k/8, exact in every dtype used here."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(-60, 60, shape, generator=generator) / 8.0


LAYOUTS = {
    "contiguous": lambda: dense(4, 6),
    "transposed": lambda: dense(6, 4).t(),
    "channels last": lambda: dense(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "channels last 3d": lambda: dense(1, 2, 3, 2, 2).contiguous(memory_format=torch.channels_last_3d),
    "permuted": lambda: dense(3, 4, 5).permute(2, 0, 1),
    "scalar": lambda: dense(),
    "empty": lambda: dense(0, 3),
    "at an odd offset": lambda: dense(25)[1:].view(4, 6),
    "rows with gaps": lambda: dense(4, 12)[:, ::2],
    "a column": lambda: dense(7, 3)[:, 1],
    "larger than a block": lambda: dense(65537),
    "unit dimensions": lambda: dense(1, 5, 1).transpose(0, 2),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def alike(tensor, dtype=None):
    """A copy with the same strides, gaps and offset."""
    room = tensor.untyped_storage().nbytes() // tensor.element_size()
    copy = torch.full((room,), NAN, dtype=dtype or tensor.dtype)
    return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


def spoilt(grad, index, value):
    """A copy with one bad element, by its number in logical order."""
    copy = alike(grad)
    copy[torch.unravel_index(torch.tensor(index), grad.shape)] = value
    return copy


def optimizer_of(kind, params, scaler):
    inner = torch.optim.SGD(params, lr=1.0)
    return mpengine.MixedPrecisionOptimizer(inner, scaler) if kind == "wrapped" else inner


def unscaled(kind, grads, dtypes=None):
    """The gradients after `unscale_`, and found_inf."""
    scaler = make_scaler(kind, init_scale=SCALE)
    scaler.scale(torch.ones((), requires_grad=True))
    dtypes = dtypes or [g.dtype for g in grads]
    params = [nn.Parameter(torch.zeros(g.shape, dtype=dtype)) for g, dtype in zip(grads, dtypes, strict=True)]
    optimizer = optimizer_of(kind, params, scaler)
    for param, grad in zip(params, grads, strict=True):
        param.grad = alike(grad, param.dtype)
    scaler.unscale_(optimizer)
    (found,) = scaler._found_inf_per_device(optimizer).values()
    return [p.grad for p in params], float(found)


@every_layout
@pytest.mark.parametrize("kind", ["plain", "wrapped"])
def test_a_layout_is_unscaled_as_torch_does_it(kind, layout):
    grad = layout()
    (theirs,), clean = unscaled("torch", [grad])
    (ours,), found = unscaled(kind, [grad])
    assert found == clean == 0.0
    assert bits(ours) == bits(theirs) == bits(grad / SCALE)


@every_layout
@pytest.mark.parametrize("kind", ["plain", "wrapped"])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_an_overflow_at_either_end_of_any_layout_is_found(kind, layout, bad):
    grad = layout()
    for index in (0, grad.numel() // 2, grad.numel() - 1) if grad.numel() else ():
        assert unscaled("torch", [spoilt(grad, index, bad)])[1] == 1.0
        assert unscaled(kind, [spoilt(grad, index, bad)])[1] == 1.0


@pytest.mark.parametrize("kind", ["plain", "wrapped"])
def test_all_layouts_at_once(kind):
    """One list of gradients, as torch's foreach call gets them; one of them spoilt in turn."""
    grads = [layout() for layout in LAYOUTS.values()]
    ours, found = unscaled(kind, grads)
    theirs, _ = unscaled("torch", grads)
    assert found == 0.0
    assert bits(ours) == bits(theirs)
    for i, grad in enumerate(grads):
        if grad.numel():
            bad = [*grads[:i], spoilt(grad, grad.numel() - 1, INF), *grads[i + 1 :]]
            assert unscaled(kind, bad)[1] == unscaled("torch", bad)[1] == 1.0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@every_layout
def test_plain_gradients_of_every_dtype(layout, dtype):
    grad = layout().to(dtype)
    assert bits(unscaled("plain", [grad])) == bits(unscaled("torch", [grad]))


@pytest.mark.parametrize("bad", [None, 0, 1, 2])
def test_gradients_of_several_dtypes_in_one_optimizer(bad):
    grads = [dense(3, 5).to(dtype) for dtype in FLOATS]
    if bad is not None:
        grads[bad][1, 2] = NAN
    ours, theirs = (unscaled(kind, grads) for kind in ("plain", "torch"))
    assert bits(ours) == bits(theirs)
    assert ours[1] == (bad is not None)


@every_layout
def test_fp16_gradients_of_every_layout_become_fp32(layout):
    """torch refuses these; the wrapper's unscaled gradient is FP32 and has the exact value."""
    grad = layout()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        unscaled("torch", [grad], [torch.float16])
    (ours,), found = unscaled("wrapped", [grad], [torch.float16])
    assert found == 0.0
    assert bits(ours) == bits(grad / SCALE)


def test_a_mixed_wrapped_optimizer_finds_an_overflow_in_any_dtype():
    dtypes = [torch.float16, torch.float32, torch.bfloat16]
    for bad in (None, 0, 1, 2):
        grads = [dense(4, 6) for _ in dtypes]
        if bad is not None:
            grads[bad][3, 5] = -INF
        ours, found = unscaled("wrapped", grads, dtypes)
        assert found == (bad is not None)
        assert all(g.dtype == torch.float32 for g in ours)


@pytest.mark.parametrize("scale", [3.0, 1000.0, 0.7])
def test_the_inverse_is_rounded_from_float64_as_torchs_is(scale):
    """g * float32(1 / float64(scale)): at scales that are no power of two this is not g / scale."""
    grads = [torch.linspace(-9.0, 9.0, 1001)]
    results = []
    for kind in ("torch", "plain", "wrapped"):
        scaler = make_scaler(kind, init_scale=scale)
        scaler.scale(torch.ones((), requires_grad=True))
        param = nn.Parameter(torch.zeros(1001))
        optimizer = optimizer_of(kind, [param], scaler)
        param.grad = grads[0].clone()
        scaler.unscale_(optimizer)
        results.append(bits(param.grad))
    assert results[0] == results[1] == results[2]
    assert results[0] != bits(grads[0] / scale)


@pytest.mark.parametrize("kind", ["torch", "plain", "wrapped"])
def test_the_stages_of_an_iteration(kind):
    scaler = make_scaler(kind, init_scale=SCALE)
    param = nn.Parameter(torch.ones(3))
    optimizer = optimizer_of(kind, [param], scaler)
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.unscale_(optimizer)
    for _ in range(2):
        scaler.scale(param.sum()).backward()
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match="already been called on this optimizer since the last update"):
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        with pytest.raises(RuntimeError, match=r"unscale_\(\) is being called after step\(\)"):
            scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError, match=r"step\(\) has already been called since the last update"):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert param.tolist() == [-1.0] * 3


@pytest.mark.parametrize("kind", ["torch", "plain", "wrapped"])
def test_a_product_that_overflows_as_it_is_unscaled(kind):
    """A finite gradient of 2^10 at a scale of 2^-120: unscaled it is inf, and torch steps on it."""
    scaler = make_scaler(kind, init_scale=2.0**-120)
    scaler.scale(torch.ones((), requires_grad=True))
    param = nn.Parameter(torch.ones(1))
    optimizer = optimizer_of(kind, [param], scaler)
    param.grad = torch.full((1,), 2.0**10)
    scaler.step(optimizer)
    assert param.item() == (-INF if kind == "torch" else 1.0)


@pytest.mark.parametrize("kind", ["plain", "wrapped"])
def test_a_sabotaged_inverse_is_noticed(kind, monkeypatch):
    from mpengine import reference

    check, inverse = torch._amp_foreach_non_finite_check_and_unscale_, reference.inverse
    (theirs,), _ = unscaled("torch", [dense(4, 6)])
    monkeypatch.setattr(
        torch, "_amp_foreach_non_finite_check_and_unscale_", lambda grads, found, inv: check(grads, found, inv * 2)
    )
    monkeypatch.setattr(reference, "inverse", lambda scale: inverse(scale) * 2)
    (ours,), _ = unscaled(kind, [dense(4, 6)])
    assert bits(ours) != bits(theirs)
