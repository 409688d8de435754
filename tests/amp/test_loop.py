"""The loop of apex's documentation, at each level."""

from __future__ import annotations

import pytest
import torch

from mpengine import MixedPrecisionOptimizer, amp
from tests.amp.world import INF, LEVELS, batch, network, scales, unskipped


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
