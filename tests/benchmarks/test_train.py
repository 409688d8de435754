"""`benchmarks.train`: tiny models on the CPU; nothing is claimed of their speed."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import train
from benchmarks.measure import results
from benchmarks.measure.devices import Cpu
from benchmarks.measure.results import SMOKE
from benchmarks.train import Missing, Training, order, precision, run_one
from benchmarks.training.engines import ENGINES
from benchmarks.training.models import GPT2, resnet
from benchmarks.training.workloads import WORKLOADS
from tests.benchmarks.speed_world import Pretend

SMOKES = [name for name, workload in WORKLOADS.items() if workload.smoke]
EAGER = [name for name, kind in ENGINES.items() if not kind.captured]


@pytest.mark.parametrize(("build", "tensors", "numel"), [(GPT2, 148, 124_439_808), (resnet, 161, 25_557_032)])
def test_the_models_have_their_papers_parameters(build, tensors, numel):
    with torch.device("meta"):
        network = build()
    params = list(network.parameters())
    assert (len(params), sum(param.numel() for param in params)) == (tensors, numel)


@pytest.mark.parametrize("engine", EAGER)
@pytest.mark.parametrize("name", SMOKES)
def test_every_engine_trains_every_model(name, engine):
    training = Training(WORKLOADS[name], engine, Cpu())
    weights = [group["params"][0] for optimizer in training.engine.optimizers for group in optimizer.param_groups]
    before = [weight.detach().clone() for weight in weights]
    losses = training.iterations(3)
    assert len(losses) == WORKLOADS[name].losses
    assert all(math.isfinite(float(loss)) for loss in losses)
    for weight, old in zip(weights, before, strict=True):
        assert not torch.equal(weight, old)


@pytest.mark.parametrize("name", SMOKES)
def test_the_engines_compute_the_same_losses(name):
    first = {engine: Training(WORKLOADS[name], engine, Cpu()).iterations(1) for engine in EAGER}
    for engine in EAGER:
        for loss, reference in zip(first[engine], first["fp32"], strict=True):
            assert float(loss) == pytest.approx(float(reference), rel=2e-2), engine  # fp16 through a few layers


def test_a_row_says_how_fast_and_what_it_held():
    row = run_one("gpt2-smoke", "mpengine", Pretend(), 0.0)
    assert row["status"] == "measured", row["reason"]
    assert row["iterations_per_second"] == pytest.approx(1e3 / row["ms"]["median"])
    assert row["peak_bytes"] == 12345
    assert row["skipped"] == [0]


def test_the_captured_engine_is_not_available_without_a_gpu():
    row = run_one("gpt2-smoke", "mpengine, captured", Cpu(), 0.0)
    assert (row["status"], row["reason"]) == ("not available", "captured: not available without a GPU")


class Graph:
    """Has the face of mpengine.graphs.GraphedIteration, and runs eagerly."""

    def __init__(self, iteration, optimizers):
        self.iteration, self.calls = iteration, 0
        Graph.optimizers = optimizers

    def __call__(self, *inputs):
        self.calls += 1
        return self.iteration(*inputs)


def test_the_captured_engine_goes_through_a_graph(monkeypatch):
    monkeypatch.setattr(train, "graphs", lambda: type("graphs", (), {"GraphedIteration": Graph}))
    training = Training(WORKLOADS["dcgan-smoke"], "mpengine, captured", Pretend())
    losses = training.iterations(5)
    assert len(losses) == 3
    assert training._iterate.calls == 5
    assert Graph.optimizers == training.engine.optimizers
    assert [optimizer.steps_taken for optimizer in Graph.optimizers] == [5, 5]


def test_captured_engines_run_last():
    pairs = order(["gpt2", "resnet"], list(ENGINES))
    assert len(pairs) == len(set(pairs)) == 10
    assert [engine for _, engine in pairs[-2:]] == ["mpengine, captured"] * 2
    assert [name for name, _ in pairs[:8]] == ["gpt2"] * 4 + ["resnet"] * 4


def test_without_the_module_the_captured_engine_is_not_available(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(train.importlib, "import_module", absent)
    with pytest.raises(Missing, match=r"captured: not available \(No module named 'mpengine.graphs'\)"):
        train.graphs()


def test_an_engine_that_raises_is_reported(monkeypatch):
    def broken(*_):
        raise RuntimeError("boom")

    monkeypatch.setattr(ENGINES["torch.amp"], "step", broken)
    row = run_one("gpt2-smoke", "torch.amp", Cpu(), 0.0)
    assert (row["status"], row["reason"]) == ("failed", "RuntimeError: boom")


def test_tf32_is_set_and_put_back():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    for tf32 in (True, False):
        with precision(tf32, Pretend()):
            assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (tf32, tf32, True)
    assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == before


def test_the_program_on_the_cpu(tmp_path, capsys):
    assert train.main(["--device", "cpu", "--workloads", "gpt2-smoke", "--seconds", "0", "--out", str(tmp_path)]) == 0
    (document,) = results.read_all(tmp_path)
    assert (document.kind, document.origin) == ("train", SMOKE)
    assert {row["engine"] for row in document.rows} == {"fp32", "torch.amp", "mpengine", "mpengine, captured"}
    printed = capsys.readouterr().out
    assert "Smoke test" in printed
    assert "twice as fast" in printed
    assert "Not available: mpengine, captured" in printed


def test_what_there_is_no_time_for_is_named(tmp_path, capsys):
    train.main(["--device", "cpu", "--workloads", "gpt2-smoke", "--budget", "0", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("not measured, out of time") == 4
