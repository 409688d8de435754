"""A loss scale that has collapsed says so, with the names of the loss and of the parameters at fault."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mpengine
from mpengine import GradScaler, LossScaleCollapse
from mpengine.kernels import layout
from mpengine.report import LossReport
from mpengine.watchdog import Watchdog

INF = float("inf")


def counters(*streaks: int) -> torch.Tensor:
    table = torch.zeros(len(streaks), layout.COUNTERS, dtype=torch.int32)
    table[:, layout.CONSECUTIVE_OVERFLOWS] = torch.tensor(streaks, dtype=torch.int32)
    return table


class Run:
    """Two losses on a prepared two-layer model; the second layer's gradient overflows where a loss is spoilt."""

    def __init__(self, limit: int | None, **kwargs) -> None:
        self.net = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        self.scaler = GradScaler("cpu", 64.0, num_losses=2, max_consecutive_skips=limit, **kwargs)
        self.optimizer = mpengine.prepare(self.net, torch.optim.SGD(self.net.parameters(), lr=0.0), self.scaler)

    def iterate(self, spoilt: int | None, losses=(0, 1)) -> None:
        for k in losses:
            y = self.net["head"](self.net["trunk"](torch.ones(1, 2, dtype=torch.float16)).detach())
            loss = y.float().sum() * (INF if k == spoilt else 1.0) + self.net["trunk"].weight.float().sum()
            self.scaler.scale(loss, k).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scaler.update()


class TestCollapse:
    @pytest.mark.parametrize("spoilt", [0, 1])
    def test_names_the_loss_and_the_parameters(self, spoilt):
        run = Run(limit=3)
        run.iterate(spoilt)
        run.iterate(spoilt)
        with pytest.raises(LossScaleCollapse) as caught:
            run.iterate(spoilt)
        error = caught.value
        assert (error.loss_id, error.skips, error.scale) == (spoilt, 3, 8.0)
        assert error.parameters == ["parameter 'head.weight'", "parameter 'head.bias'"]
        for part in (
            f"loss {spoilt} has overflowed 3 times in a row",
            "scale is down to 8",
            "'head.weight'",
            "None turns",
        ):
            assert part in str(error)
        assert isinstance(error, RuntimeError)

    def test_a_clean_update_starts_the_count_again(self):
        run = Run(limit=3)
        for spoilt in (1, 1, None, 1, 1, None):
            run.iterate(spoilt)
        assert run.scaler.get_scale(1) == 4.0

    def test_idle_updates_do_not(self):
        run = Run(limit=3)
        run.iterate(1)
        run.iterate(None, losses=(0,))
        run.iterate(1)
        with pytest.raises(LossScaleCollapse):
            run.iterate(1)

    def test_overflows_of_different_losses_do_not_add_up(self):
        run = Run(limit=3)
        for spoilt in (0, 1) * 4:
            run.iterate(spoilt)

    def test_none_turns_it_off(self):
        run = Run(limit=None)
        for _ in range(150):
            run.iterate(0)
        assert run.scaler.get_scale(0) == 2.0**-126

    def test_fifty_unless_said_otherwise(self):
        param = nn.Parameter(torch.zeros(2))
        scaler = GradScaler("cpu")
        optimizer = torch.optim.SGD([param], lr=1.0)
        for n in range(1, 51):
            scaler.scale((param * INF).sum()).backward()
            scaler.step(optimizer)
            if n < 50:
                scaler.update()
        with pytest.raises(LossScaleCollapse, match=r"50 times in a row.*group 0, parameter 0 of shape \(2,\)"):
            scaler.update()

    def test_a_static_scale_collapses_too(self):
        run = Run(limit=3, min_scale=64.0, max_scale=64.0)
        run.iterate(0)
        run.iterate(0)
        with pytest.raises(LossScaleCollapse):
            run.iterate(0)

    def test_the_iteration_is_over_when_it_is_raised(self):
        """Who catches it may go on: nothing hangs between two stages."""
        run = Run(limit=1)
        with pytest.raises(LossScaleCollapse):
            run.iterate(0)
        assert run.scaler.get_scale(0) == 32.0
        run.iterate(None)
        assert run.scaler.statistics()[0].consecutive_overflows == 0
        assert (run.optimizer.steps_taken, run.optimizer.steps_skipped) == (1, 1)

    def test_it_is_raised_once_for_every_overflow(self):
        """A loss that was given up must not stop the others."""
        run = Run(limit=2)
        run.iterate(0)
        with pytest.raises(LossScaleCollapse):
            run.iterate(0)
        for _ in range(3):
            run.iterate(None, losses=(1,))
        run.scaler.scale(run.net["trunk"].weight.float().sum(), 1).backward()
        run.optimizer.step()
        run.scaler.update(loss_id=1)
        run.optimizer.zero_grad()
        with pytest.raises(LossScaleCollapse, match="loss 0 has overflowed 3 times"):
            run.iterate(0)

    def test_new_scale_does_not_judge(self):
        run = Run(limit=2)
        run.iterate(0)
        with pytest.raises(LossScaleCollapse):
            run.iterate(0)
        run.scaler.update(16.0)

    def test_a_load_brings_its_own_count(self):
        run = Run(limit=3)
        healthy = run.scaler.state_dict()
        run.iterate(0)
        run.iterate(0)
        sick = run.scaler.state_dict()
        run.scaler.load_state_dict(healthy)
        run.iterate(0)
        run.scaler.load_state_dict(sick)
        with pytest.raises(LossScaleCollapse):
            run.iterate(0)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"]
    )
    def test_copies_keep_the_limit(self, copied):
        scaler = copied(GradScaler("cpu", max_consecutive_skips=1))
        param = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([param], lr=1.0)
        scaler.scale((param * INF).sum()).backward()
        scaler.step(optimizer)
        with pytest.raises(LossScaleCollapse):
            scaler.update()

    def test_names_of_several_optimizers(self):
        scaler = GradScaler("cpu", max_consecutive_skips=1)
        net = nn.Linear(2, 1)
        bias = nn.Parameter(torch.zeros(1))
        prepared = mpengine.prepare(net, torch.optim.SGD(net.parameters(), lr=1.0), scaler)
        plain = torch.optim.SGD([bias], lr=1.0)
        loss = (net(torch.ones(1, 2, dtype=torch.float16)).float() + bias).sum() * INF
        scaler.scale(loss).backward()
        prepared.step()
        scaler.step(plain)
        with pytest.raises(LossScaleCollapse) as caught:
            scaler.update()
        assert sorted(caught.value.parameters) == [
            "group 0, parameter 0 of shape (1,) of optimizer 1",
            "parameter 'bias' of optimizer 0",
            "parameter 'weight' of optimizer 0",
        ]


class TestTheError:
    def test_many_parameters_are_counted(self):
        error = LossScaleCollapse(0, 1.0, 50, [f"p{i}" for i in range(11)])
        assert "p0, p1, p2, p3, p4, p5, p6, p7 and 3 more" in str(error)
        assert len(error.parameters) == 11

    def test_no_name_is_known(self):
        assert "not finite: unknown" in str(LossScaleCollapse(0, 1.0, 50, []))

    def test_it_can_be_pickled(self):
        """It crosses processes in distributed training."""
        error = pickle.loads(pickle.dumps(LossScaleCollapse(2, 0.5, 7, ["a"])))
        assert (error.loss_id, error.scale, error.skips, error.parameters) == (2, 0.5, 7, ["a"])
        assert "loss 2 has overflowed 7 times" in str(error)


class TestLook:
    @pytest.mark.parametrize(("streaks", "guilty"), [((0, 4), None), ((5, 0), 0), ((0, 6), 1), ((4, 5), 1)])
    def test_at_the_limit(self, streaks, guilty):
        watchdog = Watchdog(5)
        asked = []

        def report_of(loss_id):
            asked.append(loss_id)
            return LossReport(loss_id, 0.25, 0, 9, 0, {"somebody": 3})

        if guilty is None:
            watchdog.look(counters(*streaks), report_of)
        else:
            with pytest.raises(LossScaleCollapse, match=f"loss {guilty} .*0.25 .*somebody") as caught:
                watchdog.look(counters(*streaks), report_of)
            assert caught.value.report == report_of(asked.pop())
        assert asked == ([] if guilty is None else [guilty])

    def test_off(self):
        Watchdog(None).look(counters(10**6), lambda k: pytest.fail("nobody asked"))

    def test_a_sabotaged_limit_is_noticed(self, monkeypatch):
        judge = Watchdog._judge

        def later(self, *args):
            limit, self.limit = self.limit, self.limit + 1
            try:
                judge(self, *args)
            finally:
                self.limit = limit

        monkeypatch.setattr(Watchdog, "_judge", later)
        with pytest.raises(pytest.fail.Exception):
            TestCollapse().test_names_the_loss_and_the_parameters(0)
