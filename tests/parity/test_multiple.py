"""Several models, optimizers and losses on one scaler: each optimizer skips on its own, one scale serves them all."""

import itertools

import pytest
import torch
from torch import nn

import mpengine
from tests.parity.harness import INF, batches, bits, float_bits, make_scaler, network, wrap

FORMS = ("torch", "plain", "wrapped", "wrapped fp16")
MAKE = (
    lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False),
    lambda params: torch.optim.Adam(params, lr=0.01, foreach=False),
)


class Pair:
    """Two networks of two optimizers, trained by two losses that both reach both."""

    def __init__(self, kind, num_losses=1, **arguments):
        if num_losses > 1:
            arguments["num_losses"] = num_losses
        self.kind, self.scaler = kind, make_scaler(kind, **arguments)
        self.models = [network(0), network(1)]
        inner = [make(model.parameters()) for make, model in zip(MAKE, self.models, strict=True)]
        self.optimizers = [wrap(kind, m, o, self.scaler) for m, o in zip(self.models, inner, strict=True)]
        if kind == "plain" and num_losses > 1:
            for optimizer in self.optimizers:
                self.scaler.watch(optimizer)
        self.history = []

    def losses(self, x, y):
        with torch.autocast("cpu", torch.float16):
            first, second = (model(x).float() for model in self.models)
        return (first + 2.0 * second - y).square().mean(), (0.6 * first - second - y).square().mean()

    def iteration(self, x, y, bad=None, unscale=()):
        """`bad` is a parameter's number: its gradient is inf."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        one, two = self.losses(x, y)
        self.scaler.scale(one).backward(retain_graph=True)
        self.scaler.scale(two).backward()
        if bad is not None:
            self.params()[bad].grad.view(-1)[-1] = INF
        for i in unscale:
            self.scaler.unscale_(self.optimizers[i])
            nn.utils.clip_grad_norm_(self.models[i].parameters(), 0.5, foreach=False)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self.history.append((float_bits(self.scaler.get_scale()), self.scaler._get_growth_tracker()))

    def params(self):
        return [p for model in self.models for p in model.parameters()]

    def states(self):
        return [[dict(o.state[p]) for g in o.param_groups for p in g["params"]] for o in self.optimizers]


@pytest.mark.parametrize("unscale", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("bad", [{}, {2: 0}, {2: 5}, {0: 1, 3: 6}])
def test_two_models_two_optimizers_and_two_losses_equal_torchs_bit_for_bit(unscale, bad):
    results = []
    for kind in ("torch", "plain"):
        pair = Pair(kind, init_scale=128.0, growth_interval=2)
        for n, (x, y) in enumerate(batches(6)):
            pair.iteration(x, y, bad.get(n), unscale)
        results.append((pair.history, bits(pair.params()), bits(pair.states())))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["wrapped", "wrapped fp16"])
@pytest.mark.parametrize("unscale", [(), (0, 1)])
@pytest.mark.parametrize("bad", [{2: 0}, {2: 5}, {0: 1, 3: 6}])
def test_two_wrapped_optimizers_have_torchs_scales(kind, unscale, bad):
    theirs, ours = (Pair(one, init_scale=128.0, growth_interval=2) for one in ("torch", kind))
    for n, (x, y) in enumerate(batches(6)):
        for pair in (theirs, ours):
            pair.iteration(x, y, bad.get(n), unscale)
    assert ours.history == theirs.history
    for i, optimizer in enumerate(ours.optimizers):
        skipped = sum(i == (which >= 4) for which in bad.values())  # each network has 4 parameters
        assert (optimizer.steps_taken, optimizer.steps_skipped) == (6 - skipped, skipped)


@pytest.mark.parametrize("kind", FORMS)
def test_the_overflow_of_one_optimizer_skips_that_one_alone(kind):
    """And backs off the one scale for both, as torch does it."""
    pair = Pair(kind, init_scale=128.0)
    (batch,) = batches(1)
    before = bits(pair.params())
    pair.iteration(*batch, bad=5)
    after = bits(pair.params())
    assert after[4:] == before[4:]
    assert all(a != b for a, b in zip(after[:4], before[:4], strict=True))
    assert pair.scaler.get_scale() == 64.0


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_one_loss_may_be_a_list(kind, order):
    """`scale` of several outputs at once, nested as torch accepts it, run one after the other."""
    scaler = make_scaler(kind, init_scale=8.0)
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = wrap(kind, model, torch.optim.SGD(model.parameters(), lr=1.0), scaler)
    losses = [(model.weight.float() * factor).sum() for factor in (1.0, 2.0, 4.0)]
    first, (second, third) = scaler.scale([losses[0], (losses[1], losses[2])])
    scaled = [first, second, third]
    for i in order:
        scaled[i].backward()
    scaler.step(optimizer)
    assert model.weight.tolist() == [[-7.0, -7.0]]


@pytest.mark.parametrize("kind", FORMS)
def test_update_between_two_steps_of_one_pass(kind):
    """Two optimizers fed by one loss, `update()` after each step: the pass counts once; with torch twice."""
    scaler = make_scaler(kind, init_scale=8.0, growth_interval=100)
    models = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    optimizers = [wrap(kind, m, torch.optim.SGD(m.parameters(), lr=1.0), scaler) for m in models]
    if kind == "plain":
        for optimizer in optimizers:
            scaler.watch(optimizer)
    scaler.scale(sum(m.weight.float().sum() for m in models)).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
        scaler.update()
    assert scaler._get_growth_tracker() == (2 if kind == "torch" else 1)


class TestLossesWithScalesOfTheirOwn:
    """What torch has no counterpart to, against the same losses with one scale."""

    @pytest.mark.parametrize("kind", ["plain", "wrapped"])
    def test_without_overflows_it_is_the_same_training(self, kind):
        """Scales 2^7 and 2^10, or 2^7 for both: powers of two scale exactly, and two summands add in one rounding."""
        results = []
        for num_losses in (1, 2):
            pair = Pair(kind, num_losses, init_scale=128.0)
            if num_losses == 2:
                pair.scaler.scale(torch.ones((), requires_grad=True), 1)
                pair.scaler.update(1024.0, loss_id=1)
            for x, _ in batches(5):
                for k, factor in enumerate((0.5, 0.3)):
                    loss = sum((p * (factor * float(x.sum()))).sum() for p in pair.params())
                    pair.scaler.scale(loss, *((k,) if num_losses == 2 else ())).backward()
                for optimizer in pair.optimizers:
                    pair.scaler.step(optimizer)
                pair.scaler.update()
                for optimizer in pair.optimizers:
                    optimizer.zero_grad()
            results.append(bits(pair.params()))
        assert results[0] == results[1]

    @pytest.mark.parametrize("kind", ["plain", "wrapped", "wrapped fp16"])
    @pytest.mark.parametrize("bad", [0, 1])
    def test_each_scale_moves_as_torchs_would_alone(self, kind, bad):
        """Two losses, two scales: each one's history is that of a torch scaler which sees that loss only."""
        overflows = [(n % 3 == 1 and bad == 0, n % 4 == 2 and bad == 1) for n in range(10)]
        scaler = make_scaler(kind, init_scale=256.0, growth_interval=2, num_losses=2)
        model = network()
        optimizer = wrap(kind, model, MAKE[0](model.parameters()), scaler)
        scaler.watch(optimizer)
        ours = []
        for (x, _), bads in zip(batches(10), overflows, strict=True):
            for k, spoilt in enumerate(bads):
                with torch.autocast("cpu", torch.float16):
                    loss = model(x).float().square().mean()
                scaler.scale(loss * INF if spoilt else loss, k).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ours.append([scaler.get_scale(k) for k in range(2)])
        for k in range(2):
            theirs = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
            param = nn.Parameter(torch.ones(1))
            alone = torch.optim.SGD([param], lr=0.1)
            for n, bads in enumerate(overflows):
                theirs.scale((param * (INF if bads[k] else 1.0)).sum()).backward()
                theirs.step(alone)
                theirs.update()
                alone.zero_grad()
                assert ours[n][k] == theirs.get_scale()


def test_a_model_shared_by_two_scalers_is_refused():
    """Two of torch's scalers on one optimizer go wrong in silence, see test_defects; a wrapper knows its own."""
    scalers = [mpengine.GradScaler("cpu", 8.0) for _ in range(2)]
    model = network()
    optimizer = mpengine.prepare(model, MAKE[0](model.parameters()), scalers[0])
    (batch,) = batches(1)
    scalers[1].scale(model(batch[0].half()).float().mean()).backward()
    with pytest.raises(RuntimeError, match="prepared with another GradScaler"):
        scalers[1].step(optimizer)
