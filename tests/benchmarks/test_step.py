"""`benchmarks.step`: byte models, shapes, gradients, and the run itself on small tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import step
from benchmarks.measure import results
from benchmarks.measure.devices import Cpu
from benchmarks.measure.results import MEASURED, SMOKE, Document
from benchmarks.optimizers import engines, peers, traffic
from benchmarks.optimizers.gradients import FLOOR, Gradients
from benchmarks.optimizers.peers import ENGINES
from benchmarks.optimizers.shapes import SHAPES, Shape, for_device
from benchmarks.tables import step_table
from tests.benchmarks.speed_world import CPU_MACHINE, MACHINE, Pretend

# Byte models and shapes: what is promised, and what was counted from source.


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        ("mpengine", 30),
        ("mpengine + clip", 30),
        ("torch.amp fused", 40),
        ("torch.amp fused + clip", 48),
        ("torch.amp foreach", 88),
        ("torch.amp foreach + clip", 100),
        ("bitsandbytes AdamW 32-bit", 22),
        ("torch-optimi, Kahan", 18),
    ],
)
def test_bytes_of_a_parameter(engine, count):
    assert traffic.bytes_of(ENGINES[engine].passes) == count


def test_normalisation_layers_of_mpengine_are_float32():
    spec = ENGINES["mpengine"]
    assert spec.step_bytes([Shape((10,)), Shape((3,), norm=True)]) == 10 * 30 + 3 * 32


@pytest.mark.parametrize(
    ("name", "tensors", "numel"),
    [
        ("gpt2", 148, 124_439_808),
        ("resnet50", 161, 25_557_032),
        ("billion", 64, 10**9),
        ("small", 1000, 1_024_000),
        ("tiny-tensors", 10_000, 640_000),
    ],
)
def test_the_sets_are_those_of_the_models(name, tensors, numel):
    assert len(SHAPES[name].shapes) == tensors
    assert SHAPES[name].numel == numel


def test_the_cpu_has_a_set_of_its_own_size():
    assert for_device("cpu") == ["twenty-million"]
    assert SHAPES["twenty-million"].numel == 20_000_000
    assert "smoke" not in for_device("cuda")


def test_every_engine_says_what_it_keeps_and_lacks():
    for spec in ENGINES.values():
        assert spec.state
        assert spec.weights in ("fp16", "bf16", "FP32")
        assert spec.package is None or spec.lacks
    equal = [spec.name for spec in peers.PEERS if spec.full_state]
    assert equal == ["apex FusedAdam", "DeepSpeed FusedAdam", "TransformerEngine FusedAdam"]


# Gradients.


def params(dtype=torch.float16):
    return [torch.zeros(size, dtype=dtype, requires_grad=True) for size in ((33, 7), (1025,), (5,))]


def test_gradients_are_fresh_and_never_zero_or_subnormal():
    own = params()
    gradients = Gradients(own, torch.Generator().manual_seed(0))
    seen = []
    for turn in range(4):
        gradients.draw(turn)
        for param in own:
            param.grad = None
        gradients.bring(turn, lambda loss: loss)
        flat = torch.cat([param.grad.flatten() for param in own]).float()
        assert bool((flat.abs() >= FLOOR).all())
        assert 0.9 < float(flat.std()) < 1.1
        seen.append((own[0].grad.data_ptr(), flat))
    assert seen[0][0] != seen[1][0]
    assert seen[0][0] == seen[2][0]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(seen[i][1], seen[j][1])


def test_a_backward_pass_hands_the_gradients_over_uncopied():
    own = params()
    gradients = Gradients(own)
    gradients.draw(0)
    gradients.bring(0, lambda loss: loss * 4.0)
    for param, view in zip(own, gradients.views(0), strict=True):
        assert param.grad.data_ptr() == view.data_ptr()
        assert param.grad.data_ptr() % 64 == 0 or view.storage_offset() * 2 % 512 == 0
        assert torch.equal(param.grad, view)


@pytest.mark.parametrize("name", peers.for_device("cpu"))
def test_every_step_of_every_engine_is_taken(name):
    """A step that is skipped, or that finds no gradient, would be fast."""
    bench = step.Bench(ENGINES[name], SHAPES["smoke"], Cpu())
    before = [param.detach().clone() for param in bench.engine.params]
    for _ in range(30):
        bench.prepare()
        bench.engine.step()
    for param, old in zip(bench.engine.params, before, strict=True):
        assert param.dtype in (torch.float32, torch.float16)
        assert not torch.equal(param, old)
    if name.startswith("mpengine"):
        assert bench.engine.optimizer.steps_taken == 30 + step.WARMUPS
        assert bench.engine.optimizer.steps_skipped == 0
        norm = bench.engine.optimizer.last_grad_norm
        assert norm == pytest.approx(SHAPES["smoke"].numel ** 0.5 / engines.INIT_SCALE, rel=0.1)


# The run.


def run(specs, sets=("smoke",), device=None, budget=1e9, rounds=2, machine=CPU_MACHINE):
    document = Document("step", MEASURED, machine)
    saved = []
    device = device or Cpu()
    device.copy_gbs = lambda: [10.0, 12.0]
    benchmark = step.Benchmark(
        document, device, sets, list(specs), 0.0, budget, specs, save=lambda: saved.append(len(document.rows))
    )
    benchmark.run(rounds)
    return document, saved


def own(*names):
    return {name: ENGINES[name] for name in names}


def test_a_run_on_the_cpu_has_the_fields_that_a_cpu_has():
    document, saved = run(own("mpengine + clip", "torch.amp fused + clip"))
    assert saved[-1] == 2
    for row in document.rows:
        assert row["status"] == "measured"
        assert row["ms"]["count"] == 2 * step.MIN_REPEATS
        assert len(row["rounds_ms"]) == 2
        assert row["gbs"] == pytest.approx(row["step_bytes"] / row["ms"]["median"] / 1e6)
        for name in ("of_copy", "queued_ms", "host_us", "launches", "syncs", "transient_bytes", "held_bytes"):
            assert row[name] is None, name
    assert "queued" not in step_table(document)


def test_a_run_on_a_gpu_has_every_field():
    """The same code, with a device that answers as a GPU does."""
    device = Pretend()
    document, _ = run(own("mpengine + clip"), device=device, machine=MACHINE)
    (row,) = document.rows
    assert row["queued_ms"]["count"] == 2 * step.MIN_REPEATS
    assert row["gbs"] == pytest.approx(row["step_bytes"] / row["queued_ms"]["median"] / 1e6)
    assert row["of_copy"] == pytest.approx(row["gbs"] / 11.0)
    assert row["host_us"]["median"] == 100.0
    assert row["launches"] == {"kernels": 4, "copies": 1, "memsets": 0, "kernel_ms": 0.1}
    assert (row["syncs"], row["transient_bytes"]) == (0, 2048)
    assert row["held_bytes"] is not None
    said = [what for what in device.log if what != "synchronize"]
    assert said[0] == "alone"
    assert "queued behind 350 us" in said  # two and a half times the host's 100 us, and 100
    assert said[-1] == "launches"  # the profiler comes last
    table = step_table(document)
    for column in ("queued ms", "launches", "host µs", "syncs", "transient KiB", "held B/param"):
        assert column in table
    assert "| 4 + 1 |" in table


def broken(shapes, device):
    raise RuntimeError("no such kernel\n for this card")


def test_an_engine_that_raises_is_reported_and_the_others_go_on():
    specs = own("torch.amp fused") | {"broken": replace(ENGINES["mpengine"], name="broken", make=broken)}
    document, _ = run(specs)
    by_name = {row["engine"]: row for row in document.rows}
    assert by_name["torch.amp fused"]["status"] == "measured"
    assert by_name["broken"]["status"] == "failed"
    assert by_name["broken"]["reason"] == "RuntimeError: no such kernel for this card"
    assert "Failed: broken (RuntimeError: no such kernel for this card)." in step_table(document)


def test_an_engine_that_raises_at_its_step_is_reported():
    class Dies(engines.TorchAmp):
        def step(self):
            raise ValueError("died")

    spec = replace(ENGINES["torch.amp fused"], name="dies", make=lambda s, d: Dies(s, d, False))
    document, _ = run({"dies": spec})
    assert document.rows[0]["reason"] == "ValueError: died"
    assert "ms" not in document.rows[0]


def test_a_profiler_that_fails_leaves_the_timings():
    device = Pretend()

    def launches(run):
        raise RuntimeError("no CUPTI")

    device.launches = launches
    document, _ = run(own("torch.amp fused"), device=device)
    assert document.rows[0]["status"] == "measured"
    assert document.rows[0]["launches"] is None
    assert document.notes == ["smoke test, torch.amp fused: launches not counted (RuntimeError: no CUPTI)"]


def test_what_is_not_installed_or_does_not_fit_is_named():
    absent = replace(ENGINES["apex FusedAdam"], package="surely-not-installed")
    device = Pretend()
    device.free_bytes = lambda: 2**31
    document, _ = run({"absent": absent, "mpengine": ENGINES["mpengine"]}, ("billion",), device)
    status = {row["engine"]: (row["status"], row["reason"]) for row in document.rows}
    assert status["apex FusedAdam"] == ("not installed", "surely-not-installed")
    assert status["mpengine"] == ("skipped", "needs 18 GiB of 2 GiB free")
    table = step_table(document)
    assert "Not installed: apex FusedAdam." in table
    assert "Skipped: mpengine (needs 18 GiB of 2 GiB free)." in table


def test_what_there_is_no_time_for_is_named():
    document, _ = run(own("mpengine", "torch.amp fused"), budget=0.0)
    assert document.rows == []
    assert sorted(document.notes)[0] == "smoke test, mpengine: not measured, out of time"
    assert "out of time" in step_table(document)


def test_the_program_on_the_cpu(tmp_path, capsys):
    options = ["--device", "cpu", "--shapes", "smoke", "--rounds", "1", "--seconds", "0", "--out", str(tmp_path)]
    assert step.main([*options, "--engines", "mpengine + clip", "torch.amp foreach + clip"]) == 0
    (document,) = results.read_all(tmp_path)
    assert (document.kind, document.origin, len(document.rows)) == ("step", SMOKE, 2)
    printed = capsys.readouterr().out
    assert "Smoke test" in printed
    assert "| mpengine + clip |" in printed


def test_a_failing_engine_of_our_own_fails_the_program(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(ENGINES, "mpengine", replace(ENGINES["mpengine"], make=broken))
    options = ["--device", "cpu", "--shapes", "smoke", "--rounds", "1", "--seconds", "0", "--out", str(tmp_path)]
    assert step.main([*options, "--engines", "mpengine"]) == 1
    assert "no such kernel" in capsys.readouterr().out
