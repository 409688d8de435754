"""Telling, in one call, whether tensors are of the kinds that others were."""

import pytest
import torch
from torch import nn

from mpengine import alike
from mpengine.alike import Alike

T = torch.zeros(2, 3, 2, 2)
DIFFERENT = {
    "dtype": T.half(),
    "shape": torch.zeros(2, 2, 3, 2),
    "fewer rows": T[:1],
    "strides": T.contiguous(memory_format=torch.channels_last),
    "class": nn.Parameter(T.clone()),
    "device": T.to("meta"),
    "sparse": T.to_sparse(),
    "nothing": None,
    "a number": 1.0,
}


def compared(monkeypatch):
    """As with a torch that has no native guards."""
    monkeypatch.setattr(torch._C, "_dynamo", None)


@pytest.fixture(params=["native", "compared"])
def make(request, monkeypatch):
    if request.param == "compared":
        compared(monkeypatch)
        assert isinstance(Alike([T])._check.__self__, alike._Compared)
    return Alike


def test_other_values_are_alike(make):
    assert make([T, T.half()]).holds([torch.ones(2, 3, 2, 2), torch.ones(2, 3, 2, 2).half()])


@pytest.mark.parametrize("other", DIFFERENT.values(), ids=DIFFERENT)
def test_what_differs_is_not(make, other):
    assert not make([T, T]).holds([T, other])


def test_the_number_counts(make):
    assert not make([T]).holds([T, T])
    assert not make([T, T]).holds([T])
    assert make([]).holds([])


def test_it_keeps_no_tensor_alive():
    import gc
    import weakref

    tensor = torch.zeros(3)
    kinds, reference = Alike([tensor]), weakref.ref(tensor)
    del tensor
    gc.collect()
    assert reference() is None
    assert kinds.holds([torch.ones(3)])
