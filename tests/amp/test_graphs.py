"""apex's loop inside one CUDA graph: on the emulator of tests/graphs, bit for bit as without."""

from __future__ import annotations

import pytest
import torch

from mpengine import amp, plain
from mpengine.graphs import GraphedIteration
from tests.amp.world import DYNAMIC, INF, LEVELS, batch, network
from tests.graphs.emulator import emulated
from tests.harness import frozen


def trained(level, graphed):
    model = network()
    model, optimizer = amp.initialize(
        model, torch.optim.Adam(model.parameters(), lr=0.01), opt_level=level, num_losses=2, **DYNAMIC
    )

    def iteration(x, factors):
        for k in (0, 1):
            with amp.scale_loss(model(x).square().mean() * factors[k], optimizer, loss_id=k) as scaled:
                scaled.backward()
        optimizer.step()
        optimizer.zero_grad()

    run = GraphedIteration(iteration, optimizer) if graphed else iteration
    for i in range(9):
        run(batch(i), torch.tensor([INF if i in (1, 5) else 1.0, INF if i in (5, 7) else 1.0]))
    return frozen([list(optimizer.master_params()), amp.state_dict(), optimizer.steps_taken, optimizer.steps_skipped])


@pytest.mark.parametrize("level", LEVELS)
def test_a_captured_loop_skips_and_moves_its_scales(level, monkeypatch):
    monkeypatch.setattr(plain, "_may_overflow", lambda labelled: True)  # a CPU looks at the scale, a GPU cannot
    expected = trained(level, graphed=False)
    assert expected[1:] == [
        {"loss_scaler0": {"loss_scale": 256.0, "unskipped": 3}, "loss_scaler1": {"loss_scale": 256.0, "unskipped": 1}},
        6,
        3,
    ]
    with emulated():
        assert trained(level, graphed=True) == expected
