"""What is logged: apex's words, once for each overflow, and nothing where verbosity is 0."""

from __future__ import annotations

import logging

import pytest
import torch

from mpengine import amp
from mpengine.amp.overflow_log import OverflowLog
from mpengine.kernels import layout
from tests.amp.world import FIRST, INF, backward, weights

SKIP = "Gradient overflow.  Skipping step, loss scaler {} {} {}"


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="mpengine.amp")
    return lambda: [r.getMessage() for r in caplog.records if "overflow" in r.getMessage()]


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_each_overflow_is_told_once(level, messages):
    model, optimizer = weights(level, num_losses=2)
    for k, bad in ((0, False), (1, True), (0, True), (1, True), (0, False)):
        optimizer.zero_grad()
        backward(model, optimizer, [INF if bad else 1.0] * 3, loss_id=k)
        optimizer.step()
    moved = "reducing loss scale to"
    expected = [SKIP.format(1, moved, FIRST / 2), SKIP.format(0, moved, FIRST / 2), SKIP.format(1, moved, FIRST / 4)]
    assert messages() == expected


def test_a_static_scale_stays(messages):
    model, optimizer = weights("O2", loss_scale=128.0)
    backward(model, optimizer, [INF] * 3)
    assert messages() == [SKIP.format(0, "keeping loss scale at", 128.0)]


def test_verbosity_0_is_silent(caplog):
    caplog.set_level(logging.INFO, logger="mpengine.amp")
    model, optimizer = weights("O2", verbosity=0)
    backward(model, optimizer, [INF] * 3)
    assert caplog.records == []


def test_nobody_listens_nobody_reads(monkeypatch):
    """At the default level the scales are not even looked at."""
    logging.getLogger("mpengine.amp").setLevel(logging.NOTSET)
    model, optimizer = weights("O2")
    monkeypatch.setattr(OverflowLog, "_tell", lambda *args: pytest.fail("it looked"))
    assert not logging.getLogger("mpengine.amp").isEnabledFor(logging.INFO)
    backward(model, optimizer, [INF] * 3)


def test_the_level_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="mpengine.amp")
    weights("O2")
    assert caplog.records[0].getMessage().startswith("Selected optimization level O2: ")


def test_loading_begins_anew(messages):
    model, optimizer = weights("O2")
    backward(model, optimizer, [INF] * 3)
    amp.load_state_dict({"loss_scaler0": {"loss_scale": 64.0, "unskipped": 3}})
    backward(model, optimizer, [1.0] * 3)
    assert len(messages()) == 1
    backward(model, optimizer, [INF] * 3)
    assert messages()[1:] == [SKIP.format(0, "reducing loss scale to", 32.0)]


def test_several_overflows_that_arrive_at_once(messages):
    """A GPU's numbers come late: the newest scale is told."""
    log = OverflowLog()
    log.begin([8.0, 8.0], [0, 0])
    counters = torch.zeros(2, layout.COUNTERS, dtype=torch.int32)
    counters[1, layout.OVERFLOWS] = 2
    for _ in range(2):
        log.look(torch.tensor([8.0, 2.0]), counters)
    assert messages() == [SKIP.format(1, "reducing loss scale to", 2.0)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_it_is_told_later_without_waiting(messages):
    log = OverflowLog()
    log.begin([8.0], [0])
    counters = torch.zeros(1, layout.COUNTERS, dtype=torch.int32, device="cuda")
    counters[0, layout.OVERFLOWS] = 1
    scales = torch.tensor([4.0], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        log.look(scales, counters)
        assert messages() == []
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        log.look(scales, counters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert messages() == [SKIP.format(0, "reducing loss scale to", 4.0)]


def test_sabotage_is_noticed(monkeypatch, messages):
    monkeypatch.setattr(OverflowLog, "_tell", lambda *args: None)
    with pytest.raises(AssertionError):
        test_a_static_scale_stays(messages)
