"""`apex.multi_tensor_apply` with the functions of `amp_C`."""

import pytest
import torch

from mpengine.apex import amp_c
from mpengine.apex.multi_tensor_apply import MultiTensorApply, multi_tensor_applier

SHAPES = [(), (0,), (1,), (31,), (7, 5)]
DTYPES = [torch.float16, torch.float32]


def tensors(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-8, 9, shape, generator=generator).to(dtype) for shape in SHAPES]


def empty(dtype):
    return [torch.full(shape, float("nan"), dtype=dtype) for shape in SHAPES]


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("in_dtype", DTYPES)
def test_scale(in_dtype, out_dtype):
    flag, inputs, outputs = torch.zeros(1, dtype=torch.int), tensors(in_dtype, 0), empty(out_dtype)
    multi_tensor_applier(amp_c.multi_tensor_scale, flag, [inputs, outputs], 0.25)
    assert all(
        torch.equal(out, (value.float() * 0.25).to(out_dtype)) for value, out in zip(inputs, outputs, strict=True)
    )
    assert flag.item() == 0


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_scale_flags_what_is_not_finite(bad):
    flag, inputs = torch.zeros(1, dtype=torch.int), tensors(torch.float16, 0)
    inputs[3][7] = bad
    multi_tensor_applier(amp_c.multi_tensor_scale, flag, [inputs, inputs], 0.5)
    assert flag.item() == 1
    assert torch.equal(inputs[3][7].isnan(), torch.tensor(bad != bad))
    assert torch.equal(inputs[4], tensors(torch.float16, 0)[4] * 0.5)


@pytest.mark.parametrize(("checked", "flags"), [(-1, (1, 1)), (0, (1, 0)), (1, (0, 1))])
def test_axpby(checked, flags):
    x, y, outputs = tensors(torch.float16, 0), tensors(torch.float32, 1), empty(torch.float32)
    flag = torch.zeros(1, dtype=torch.int)
    multi_tensor_applier(amp_c.multi_tensor_axpby, flag, [x, y, outputs], 0.5, -2.0, checked)
    assert all(torch.equal(o, 0.5 * a.float() - 2.0 * b) for a, b, o in zip(x, y, outputs, strict=True))
    assert flag.item() == 0
    for spoiled, expected in zip((x, y), flags, strict=True):
        flag.zero_()
        kept = spoiled[2][0].item()
        spoiled[2][0] = float("inf")
        multi_tensor_applier(amp_c.multi_tensor_axpby, flag, [x, y, outputs], 0.5, -2.0, checked)
        assert flag.item() == expected
        spoiled[2][0] = kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_l2norm(dtype):
    values, flag = tensors(dtype, 0), torch.zeros(1, dtype=torch.int)
    true = torch.cat([v.double().reshape(-1) for v in values]).norm()
    norm, none = multi_tensor_applier(amp_c.multi_tensor_l2norm, flag, [values])
    assert (norm.shape, norm.dtype, none.numel()) == ((1,), torch.float32, 0)
    assert abs(norm.item() - true) <= 4 * 2.0**-24 * true  # two roots and the sum of squared roots, rounded
    _, each = multi_tensor_applier(amp_c.multi_tensor_l2norm, flag, [values], True)
    assert each.tolist() == pytest.approx([v.double().norm().item() for v in values], rel=2.0**-23)
    assert flag.item() == 0


def test_l2norm_does_not_overflow_in_fp16():
    norm, _ = amp_c.multi_tensor_l2norm(1, torch.zeros(1), [[torch.full((4,), 60000.0).half()]])
    assert norm.item() == 2 * torch.tensor(60000.0).half().item()


def test_no_tensors():
    assert amp_c.multi_tensor_l2norm(1, torch.zeros(1), [[]])[0].item() == 0.0


def test_it_is_available():
    assert MultiTensorApply.available
    assert multi_tensor_applier.available
    multi_tensor_applier.check_avail()


def test_a_flag_that_is_never_set_would_be_noticed(monkeypatch):
    monkeypatch.setattr(amp_c, "_flag", lambda *_: None)
    with pytest.raises(AssertionError):
        test_scale_flags_what_is_not_finite(float("inf"))
