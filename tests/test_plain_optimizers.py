"""torch's own optimizers on FP32 parameters under our scaler: as under torch's, sparse gradients included."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from mpengine import GradScaler, plain

INF, NAN = math.inf, math.nan

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "adamw foreach": lambda params: torch.optim.AdamW(params, lr=0.01, foreach=True, amsgrad=True),
    "fused adam": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "fused sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def train(scaler, make, steps: int, unscaled: bool = False, overflow_at: frozenset = frozenset({3, 4, 9})):
    """The weights, the optimizer's state and the scale after some steps, overflows among them."""
    net = model()
    optimizer = make(net.parameters())
    data = torch.Generator().manual_seed(1)
    scales = []
    for n in range(steps):
        x = torch.randn(4, 5, generator=data)
        loss = net(x).square().mean() * (INF if n in overflow_at else 1.0)
        scaler.scale(loss).backward()
        if unscaled:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append((scaler.get_scale(), scaler._get_growth_tracker()))
    return [p.tolist() for p in net.parameters()], copy.deepcopy(optimizer.state_dict()["state"]), scales


def assert_same_state(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for i in ours:
        assert ours[i].keys() == theirs[i].keys()
        for name, value in ours[i].items():
            assert value is theirs[i][name] is None or torch.equal(value, theirs[i][name])


class TestAsUnderTorchsScaler:
    @pytest.mark.parametrize("unscaled", [False, True])
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
    @pytest.mark.parametrize("init_scale", [2.0**16, 3.7])
    def test_bit_for_bit(self, make, unscaled, init_scale):
        if init_scale == 3.7 and not unscaled and make(model().parameters()).defaults.get("fused"):
            init_scale = 4.0  # torch's fused kernels divide by the scale, we multiply by its inverse
        arguments = {"init_scale": init_scale, "growth_interval": 4}
        ours = train(GradScaler("cpu", **arguments), make, 15, unscaled)
        theirs = train(torch.amp.GradScaler("cpu", **arguments), make, 15, unscaled)
        assert ours[0] == theirs[0]
        assert_same_state(ours[1], theirs[1])
        assert ours[2] == theirs[2]
        assert len(set(ours[2])) > 4

    @pytest.mark.parametrize("init_scale", [2.0**16, 2.0**-3])
    def test_a_sabotaged_inverse_is_noticed(self, init_scale, monkeypatch):
        check = torch._amp_foreach_non_finite_check_and_unscale_
        theirs = train(torch.amp.GradScaler("cpu", init_scale), OPTIMIZERS["sgd"], 3)
        monkeypatch.setattr(
            torch, "_amp_foreach_non_finite_check_and_unscale_", lambda grads, found, inv: check(grads, found, inv * 2)
        )
        assert train(GradScaler("cpu", init_scale), OPTIMIZERS["sgd"], 3)[0] != theirs[0]

    def test_bf16_and_float64_parameters(self):
        for dtype in (torch.bfloat16, torch.float64):
            results = []
            for scaler in (GradScaler("cpu", 1024.0), torch.amp.GradScaler("cpu", 1024.0)):
                param = nn.Parameter(torch.tensor([1.0, -2.0, 0.3], dtype=dtype))
                optimizer = torch.optim.SGD([param], lr=0.37)
                for _ in range(3):
                    scaler.scale((param.square() * 1.1).sum()).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                results.append(param.tolist())
            assert results[0] == results[1]

    def test_several_dtypes_in_one_optimizer(self):
        dtypes = (torch.float32, torch.float64, torch.bfloat16)
        params = [nn.Parameter(torch.ones(2, dtype=d)) for d in dtypes]
        scaler = GradScaler("cpu", 8.0)
        optimizer = torch.optim.SGD(params, lr=1.0)
        scaler.scale(sum(p.float().sum() for p in params)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert [p.tolist() for p in params] == [[0.0, 0.0]] * 3
        optimizer.zero_grad()
        scaler.scale(sum((p.float() * (INF if p is params[2] else 1.0)).sum() for p in params)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert [p.tolist() for p in params] == [[0.0, 0.0]] * 3
        assert scaler.get_scale() == 4.0

    def test_parameters_without_a_gradient_are_left_alone(self):
        params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        scaler = GradScaler("cpu", 8.0)
        optimizer = torch.optim.SGD(params, lr=1.0, weight_decay=0.5)
        scaler.scale(params[0].sum()).backward()
        scaler.step(optimizer)
        assert params[1].tolist() == [1.0, 1.0]
        assert params[1].grad is None

    def test_step_returns_what_the_optimizer_returns(self):
        class Returning(torch.optim.SGD):
            def step(self, closure=None, *, extra=None):
                super().step(closure)
                return extra

        param = nn.Parameter(torch.ones(2))
        scaler = GradScaler("cpu", 8.0)
        optimizer = Returning([param], lr=1.0)
        for factor, expected in ((1.0, "here"), (INF, None)):
            scaler.scale((param * factor).sum()).backward()
            assert scaler.step(optimizer, extra="here") == expected
            scaler.update()
            optimizer.zero_grad()

    def test_found_inf_is_where_other_libraries_look_for_it(self):
        param = nn.Parameter(torch.ones(2))
        scaler = GradScaler("cpu", 8.0)
        optimizer = torch.optim.SGD([param], lr=1.0)
        scaler.scale((param * NAN).sum()).backward()
        scaler.unscale_(optimizer)
        assert {str(d): float(v) for d, v in scaler._found_inf_per_device(optimizer).items()} == {"cpu": 1.0}


class TestFused:
    """torch's fused kernels skip only where found_inf is 1 exactly, and forget their first momentum."""

    @pytest.mark.parametrize("overflowing", [1, 2])
    def test_an_overflow_of_any_number_of_losses_is_skipped(self, overflowing):
        param = nn.Parameter(torch.ones(2))
        scaler = GradScaler("cpu", 8.0, num_losses=2)
        optimizer = torch.optim.Adam([param], lr=1.0, fused=True)
        scaler.watch(optimizer)
        for k in range(2):
            scaler.scale((param * (INF if k < overflowing else 1.0)).sum(), k).backward()
        scaler.step(optimizer)
        scaler.update()
        assert param.tolist() == [1.0, 1.0]
        assert [scaler.get_scale(k) for k in range(2)] == ([4.0, 8.0] if overflowing == 1 else [4.0, 4.0])

    def test_nothing_is_left_on_the_optimizer(self):
        param = nn.Parameter(torch.ones(2))
        scaler = GradScaler("cpu", 8.0)
        optimizer = torch.optim.Adam([param], lr=1.0, fused=True)
        scaler.scale(param.sum()).backward()
        scaler.step(optimizer)
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")

    def test_nothing_is_left_on_it_after_an_exception(self):
        class Failing(torch.optim.Adam):
            def step(self, closure=None):
                assert float(self.found_inf) == 0.0
                raise ZeroDivisionError

        param = nn.Parameter(torch.ones(2))
        scaler = GradScaler("cpu", 8.0)
        optimizer = Failing([param], lr=1.0, fused=True)
        scaler.scale(param.sum()).backward()
        with pytest.raises(ZeroDivisionError):
            scaler.step(optimizer)
        assert not hasattr(optimizer, "found_inf")


def embedding(sparse: bool = True) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(6, 3, sparse=sparse)


class TestSparse:
    def run(self, scaler, rows: list[list[int]], factors: list[float], uncoalesced: bool = True):
        net = embedding()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        scales = []
        for indices, factor in zip(rows, factors, strict=True):
            scaler.scale((net(torch.tensor(indices)) * factor).sum()).backward()
            assert net.weight.grad.is_sparse
            if not uncoalesced:
                net.weight.grad = net.weight.grad.coalesce()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        return net.weight.tolist(), scales

    @pytest.mark.parametrize("uncoalesced", [True, False])
    def test_as_under_torchs_scaler(self, uncoalesced):
        """Rows that occur several times, an overflow, and an empty batch."""
        rows = [[0, 2, 2], [5, 5, 5], [1], [0, 1, 2, 3, 4, 5]]
        factors = [1.5, INF, 0.25, 1.0]
        ours = self.run(GradScaler("cpu", 1024.0, growth_interval=2), rows, factors, uncoalesced)
        theirs = self.run(torch.amp.GradScaler("cpu", 1024.0, growth_interval=2), rows, factors, uncoalesced)
        assert ours == theirs
        assert ours[1] == [1024.0, 512.0, 512.0, 1024.0]

    def test_beside_dense_parameters(self):
        net = nn.ModuleList([embedding(), nn.Linear(3, 1)])
        scaler = GradScaler("cpu", 1024.0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        before = [p.clone() for p in net.parameters()]
        for factor in (INF, 1.0):
            scaler.scale(net[1](net[0](torch.tensor([1, 4]))).sum() * factor).backward()
            grads = [p.grad.to_dense() / scaler.get_scale() for p in net.parameters()]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        for param, old, grad in zip(net.parameters(), before, grads, strict=True):
            assert torch.equal(param, old - 0.5 * grad)

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_two_losses_of_different_scales(self, order):
        net = embedding()
        nn.init.zeros_(net.weight)
        scaler = GradScaler("cpu", 8.0, num_losses=2)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        scaler.watch(optimizer)
        scaler.scale(net.weight.sum())
        scaler.update(512.0, loss_id=1)
        indices = {0: [0, 2, 2], 1: [2, 4]}
        for k in order:
            scaler.scale((net(torch.tensor(indices[k])) * (k + 1)).sum(), k).backward()
        scaler.step(optimizer)
        assert net.weight.tolist() == [[-v] * 3 for v in (1.0, 0.0, 4.0, 0.0, 2.0, 0.0)]

    def test_the_overflow_of_one_of_two_losses(self):
        net = embedding()
        before = net.weight.tolist()
        scaler = GradScaler("cpu", 8.0, num_losses=2)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        scaler.watch(optimizer)
        for k in range(2):
            scaler.scale((net(torch.tensor([1, 1])) * (INF if k == 1 else 1.0)).sum(), k).backward()
        scaler.step(optimizer)
        scaler.update()
        assert net.weight.tolist() == before
        assert [scaler.get_scale(k) for k in range(2)] == [8.0, 4.0]

    def test_sparse_adam(self):
        results = []
        for scaler in (GradScaler("cpu", 64.0), torch.amp.GradScaler("cpu", 64.0)):
            net = embedding()
            optimizer = torch.optim.SparseAdam(list(net.parameters()), lr=0.1)
            for _ in range(3):
                scaler.scale(net(torch.tensor([0, 3, 3])).square().sum()).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            results.append(net.weight.tolist())
        assert results[0] == results[1]

    def test_masters_refuse_them_and_name_the_remedy(self):
        from mpengine import prepare

        net = embedding()
        scaler = GradScaler("cpu", 8.0)
        optimizer = prepare(net, torch.optim.SGD(net.parameters(), lr=1.0), scaler)
        scaler.scale(net(torch.tensor([0, 2])).float().sum()).backward()
        before = net.weight.tolist()
        for call in (optimizer.step, lambda: scaler.unscale_(optimizer)):
            with pytest.raises(RuntimeError, match=r"parameter 'weight'.*sparse=False"):
                call()
        assert net.weight.tolist() == before


class TestRefusals:
    def test_fp16_gradients_are_refused_before_anything_changed(self):
        params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float16))]
        scaler = GradScaler("cpu", 8.0)
        optimizer = torch.optim.SGD(params, lr=1.0)
        scaler.scale(sum(p.float().sum() for p in params)).backward()
        for call in (scaler.unscale_, scaler.step):
            with pytest.raises(ValueError, match=re.escape("parameter 1 of this SGD is fp16 and has no FP32 master")):
                call(optimizer)
        assert [p.grad.tolist() for p in params] == [[8.0, 8.0], [8.0, 8.0]]
        assert [p.tolist() for p in params] == [[1.0, 1.0], [1.0, 1.0]]
        optimizer.param_groups[0]["params"].pop()
        scaler.step(optimizer)
        assert params[0].tolist() == [0.0, 0.0]


class TestOverflowNames:
    def test_which_gradients_are_not_finite(self):
        net = nn.ModuleList([embedding(), nn.Linear(3, 1)])
        optimizer = torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[1].parameters()}], lr=1.0)
        net[1](net[0](torch.tensor([1]))).sum().backward()
        assert plain.tally(optimizer)[1] == {}
        net[0].weight.grad._values().fill_(NAN)
        net[1].bias.grad.fill_(INF)
        names = ["group 0, parameter 0 of shape (6, 3)", "group 1, parameter 1 of shape (1,)"]
        assert list(plain.tally(optimizer)[1]) == names
