"""The loop of apex's documentation, at each level."""

from __future__ import annotations

import pytest
import torch

import mpengine
from mpengine import MixedPrecisionOptimizer, amp
from tests.amp.world import INF, LEVELS, batch, network, scales, unskipped
from tests.harness import frozen


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", [False, True])
def test_the_loop(level, clip):
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer = amp.initialize(model, optimizer, opt_level=level, loss_scale="dynamic", max_loss_scale=2.0**10)
    assert isinstance(optimizer, MixedPrecisionOptimizer)
    losses = []
    for i in range(8):
        loss = model(batch(0)).square().mean() * (INF if i == 3 else 1.0)
        optimizer.zero_grad()
        with amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 1.0)
        before = [p.clone() for p in model.parameters()]
        optimizer.step()
        changed = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert changed is (i != 3)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (7, 1)
    assert (scales(), unskipped()) == ([512.0], [4])
    assert amp._amp_state.loss_scalers[0].loss_scale() == 512.0


def test_o2_is_the_engine():
    """The same bits as prepare and GradScaler give, overflow and accumulation included."""
    results = []
    for face in ("amp", "engine"):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if face == "amp":
            model, optimizer = amp.initialize(model, optimizer, opt_level="O2", max_loss_scale=2.0**10)
        else:
            scaler = mpengine.GradScaler(init_scale=2.0**10, max_scale=2.0**10)
            optimizer = mpengine.prepare(model, optimizer, scaler)
        for i in range(12):
            x, factor = batch(i), INF if i == 5 else 1.0
            if face == "amp":
                with amp.scale_loss(model(x).square().mean() * factor, optimizer) as scaled:
                    scaled.backward()
            else:
                scaler.scale(model(x.half()).float().square().mean() * factor).backward()
            optimizer.step()
            if face == "engine":
                scaler.update()
            optimizer.zero_grad()
        results.append(frozen([list(optimizer.master_params()), optimizer.state_dict()["state"]]))
        results.append((optimizer.steps_taken, optimizer.scaler.get_scale()))
    assert results[:2] == results[2:]
    assert results[1] == (11, 512.0)
