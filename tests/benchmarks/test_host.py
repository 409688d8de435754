"""The host's side of a step, through Triton's own launches with the driver stubbed: what is launched and compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_INTERPRETER = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=WITHOUT_INTERPRETER, capture_output=True, text=True
    )


def test_a_step_is_three_launches_and_an_update_one():
    done = run("-m", "benchmarks.host", "--tensors", "1", "150", "--iterations", "20", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [(row["tensors"], row["gradient memory"]) for row in result["rows"]] == [
        (1, "same"),
        (1, "new"),
        (150, "same"),
        (150, "new"),
    ]
    assert {row["launches"] for row in result["rows"]} == {4.0}
    for row in result["rows"]:
        low, high = row["step + update quartiles"]
        assert 0 < low <= row["step + update us"] <= high
        assert row["step us"] + row["update us"] > 0.5 * row["step + update us"]


STEPS = """
import torch, triton
import mpengine
from benchmarks import host

compiled = []
triton.knobs.compilation.listener = lambda src, **about: compiled.append(src.fn.__name__)  # also where it is cached

with host.stubbed() as stub:
    for size in (2000, 2001, 16, 1, 40000):
        model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(n)) for n in (70, 5, size)])
        scaler = mpengine.GradScaler("cpu", max_consecutive_skips=None)
        optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters()), scaler, max_grad_norm=1.0)
        loss = torch.ones((), requires_grad=True)
        before = stub.launches
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            scaler.scale(loss)
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
            optimizer._execution._devices[0].table.counts[0] += 1  # as decide would
            scaler.update()
            optimizer.zero_grad()
        assert stub.launches - before == 4 * 200, stub.launches - before
        print(len(compiled), sorted(set(compiled)))
"""


def test_a_thousand_steps_compile_each_kernel_once():
    """Learning rates, step counts, addresses and the last tensor's size change."""
    done = run("-c", STEPS)
    assert done.returncode == 0, done.stderr
    counts = {line.split()[0] for line in done.stdout.splitlines()}
    assert len(done.stdout.splitlines()) == 5
    assert counts == {"4"}, done.stdout


SAME_ARGUMENTS = """
import torch
import mpengine
from benchmarks import host
from mpengine.kernels import launch

seen = []
launcher = host.StubDriver.launcher_cls
host.StubDriver.launcher_cls = lambda self, source, metadata: lambda *arguments: seen.append((metadata.name, arguments))

def step(direct):
    if not direct:
        launch._binaries.clear()
        optimizer._execution._devices[0].table.launches.clear()
    scaler.scale(torch.ones((), requires_grad=True))
    for param, grad in zip(model.parameters(), grads):
        param.grad = grad
    optimizer.step()
    scaler.update()
    optimizer.zero_grad()
    found = [(name, arguments[:4], arguments[9:]) for name, arguments in seen]
    seen.clear()
    return found

with host.stubbed():
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(n)) for n in (70, 5, 2000)])
    scaler = mpengine.GradScaler("cpu", max_consecutive_skips=None)
    optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters()), scaler, max_grad_norm=1.0)
    grads = [torch.ones_like(p) for p in model.parameters()]
    step(True)
    triton_s, ours = step(False), step(True)
    kernels = ["_inspect_kernel", "_decide_kernel", "_update_kernel", "_update_scale_kernel"]
    assert [name for name, _, _ in ours] == kernels
    for (name, grid, arguments), (other, own_grid, own) in zip(triton_s, ours, strict=True):
        assert (name, grid) == (other, own_grid), (name, grid, own_grid)
        assert len(arguments) == len(own), name
        for a, b in zip(arguments, own):
            same = a is b or (torch.is_tensor(a) and a.data_ptr() == b.data_ptr()) or a == b
            assert same, (name, a, b)
"""


def test_direct_launches_pass_what_tritons_own_do():
    done = run("-W", "error", "-c", SAME_ARGUMENTS)
    assert done.returncode == 0, done.stderr


def test_the_check_fails_where_the_bound_is_broken():
    code = "import benchmarks.host as h, sys; h.BOUND = 0.001; sys.argv = ['host', '--check', '--tensors', '150', "
    done = run("-c", code + "'--iterations', '4']; sys.exit(h.main())")
    assert done.returncode == 1
    assert "exceed" in done.stderr
