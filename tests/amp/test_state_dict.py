"""amp.state_dict and load_state_dict: apex's format, its errors, and the view that scripts print."""

from __future__ import annotations

import json

import pytest
import torch

from mpengine import amp
from mpengine.amp.scaler import LossScaler
from tests.amp.world import FIRST, INF, LEVELS, backward, master, scales, unskipped, weights


@pytest.mark.parametrize("level", LEVELS)
def test_the_format(level):
    model, optimizer = weights(level, num_losses=2)
    assert amp.state_dict() == {
        "loss_scaler0": {"loss_scale": FIRST, "unskipped": 0},
        "loss_scaler1": {"loss_scale": FIRST, "unskipped": 0},
    }
    backward(model, optimizer, [1.0] * 3)
    backward(model, optimizer, [INF] * 3, loss_id=1)
    saved = amp.state_dict()
    assert saved == {
        "loss_scaler0": {"loss_scale": FIRST, "unskipped": 1},
        "loss_scaler1": {"loss_scale": FIRST / 2, "unskipped": 0},
    }
    assert json.loads(json.dumps(saved)) == saved
    assert [(s.loss_scale(), s._unskipped) for s in amp._amp_state.loss_scalers] == [(FIRST, 1), (FIRST / 2, 0)]
    assert amp._amp_state.opt_properties.opt_level == level
    assert amp._amp_state.verbosity == 1


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("started", [False, True])
def test_a_round_trip(level, started):
    model, optimizer = weights(level, num_losses=2)
    saved = {
        "loss_scaler0": {"loss_scale": 8.0, "unskipped": 1999},
        "loss_scaler1": {"loss_scale": 256.0, "unskipped": 7},
    }
    if started:
        backward(model, optimizer, [INF] * 3)
        optimizer.step()
        optimizer.zero_grad()
    amp.load_state_dict(saved)
    assert amp.state_dict() == saved
    backward(model, optimizer, [1.0] * 3)
    backward(model, optimizer, [1.0] * 3, loss_id=1)
    assert (scales(), unskipped()) == ([16.0, 256.0], [0, 8])
    optimizer.step()
    assert master(optimizer) == [-2.0] * 3


def test_gradients_that_are_pending_keep_their_scale():
    model, optimizer = weights("O2")
    backward(model, optimizer, [1.0] * 3)
    backward(model, optimizer, [1.0] * 3, delay_unscale=True)
    amp.load_state_dict({"loss_scaler0": {"loss_scale": 2.0, "unskipped": 0}})
    optimizer.step()
    assert master(optimizer) == [-2.0] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_a_static_scale_counts_clean_passes(level):
    model, optimizer = weights(level, loss_scale=4.0)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, optimizer, [1.0] * 3)
        optimizer.step()
    assert amp.state_dict() == {"loss_scaler0": {"loss_scale": 4.0, "unskipped": 3}}
    amp.load_state_dict({"loss_scaler0": {"loss_scale": 4.0, "unskipped": 2000}})
    backward(model, optimizer, [1.0] * 3)
    assert unskipped() == [2001]  # there is no window where nothing grows


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"loss_scaler0": {"loss_scale": 8.0, "unskipped": 0}, "step": 3}, "Unexpected key.*'step'"),
        ({"scale": 8.0}, "Unexpected key.*'scale'"),
        ({"loss_scaler0": {"loss_scale": 8.0}}, "'loss_scaler0' is .*'unskipped'"),
        ({"loss_scaler0": {"loss_scale": "x", "unskipped": 0}}, "'loss_scaler0' is .*'loss_scale'"),
        ({"loss_scaler0": 8.0}, "'loss_scaler0' is 8.0"),
        ({"loss_scaler0": {"loss_scale": 2.0**20, "unskipped": 0}}, "loss_scale of loss_scaler0 is 1048576.0.*allows"),
        ({"loss_scaler0": {"loss_scale": float("nan"), "unskipped": 0}}, "loss_scale of loss_scaler0 is nan"),
        ({"loss_scaler0": {"loss_scale": 0.0, "unskipped": 0}}, "loss_scale of loss_scaler0 is 0.0"),
        ({"loss_scaler0": {"loss_scale": 8.0, "unskipped": -1}}, "unskipped of loss_scaler0 is -1"),
        ([8.0], "state_dict is a list"),
    ],
)
def test_what_cannot_be_loaded_changes_nothing(state, match):
    weights("O2")
    before = amp.state_dict()
    with pytest.raises(RuntimeError, match=match):
        amp.load_state_dict(state)
    assert amp.state_dict() == before


def test_another_static_scale_is_refused():
    weights("O2", loss_scale=128.0)
    with pytest.raises(RuntimeError, match=r"is 1024.0, and this amp.initialize allows \[128, 128\]"):
        amp.load_state_dict({"loss_scaler0": {"loss_scale": 1024.0, "unskipped": 0}})


@pytest.mark.parametrize(("saved", "used"), [(1, 3), (3, 1), (0, 2)])
def test_another_number_of_losses_is_a_warning(saved, used):
    weights("O2", num_losses=used)
    state = {f"loss_scaler{k}": {"loss_scale": 2.0**k, "unskipped": k} for k in range(saved)}
    with pytest.warns(UserWarning, match=f"contains {saved} entries, while {used} loss_scalers are used"):
        amp.load_state_dict(state)
    assert scales() == [2.0**k if k < saved else FIRST for k in range(used)]


def test_no_optimizers_no_matter():
    amp.initialize(torch.nn.Linear(1, 1), opt_level="O2", num_losses=2, loss_scale=8.0)
    assert scales() == [8.0, 8.0]
    amp.load_state_dict(amp.state_dict())


def test_sabotage_is_noticed(monkeypatch):
    monkeypatch.setattr(LossScaler, "load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        test_a_round_trip("O2", False)
