"""Triton functions from a module of the user's compile within the engine's kernels, for which no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
COMPILED = """
import torch, triton
from benchmarks import aot
from mpengine.kernels import launch, layout
from tests.rules.broken_rules import thirteen_kernel
from tests.rules.own_rules import Ratio, Steady, Trust

hyper, max_norm = torch.zeros(1, layout.HYPER).double(), torch.ones(1).double()
for kind in (Ratio, Trust, Steady):
    optimizer = kind([torch.nn.Parameter(torch.zeros(2))])
    rule = kind.family.variant(optimizer.param_groups[0])
    table, sources = aot._problem(rule, [torch.float16], 1, 1024, 1)
    found, partials = table.found[None], table.partials
    launches = [aot._record(launch.decide, table, sources, found, partials, hyper, max_norm, kind.family)]
    for call in ("measure", "settle", "update") if rule.settle else ("update",):
        launches.append(aot._record(getattr(launch, call), table, sources, rule, table.decision))
    for each in launches:
        aot.compile_launch(each, 90)
        print(kind.__name__, each.kernel.__name__)

launches[0].kwargs["FAMILY"] = thirteen_kernel
try:
    aot.compile_launch(launches[0], 90)
except triton.CompilationError as error:
    while error.__cause__ is not None:
        error = error.__cause__
    print("refused:", error)
"""


def test_declared_functions_compile_and_too_many_scalars_do_not():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[:10] == [
        "Ratio _decide_kernel",
        "Ratio _update_kernel",
        "Trust _decide_kernel",
        "Trust _measure_kernel",
        "Trust _settle_kernel",
        "Trust _update_kernel",
        "Steady _decide_kernel",
        "Steady _measure_kernel",
        "Steady _settle_kernel",
        "Steady _update_kernel",
    ]
    assert lines[10].startswith("refused:")
    assert "a rule's scalars are more than layout.SCALARS" in run.stdout
