"""Compiles the kernels ahead of time, for any architecture and without a GPU. `benchmarks.static` counts what came out.

Every case goes through the real tables and the real launchers, whose launches are recorded instead of made; so what is
compiled here is what a GPU would run.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions do not compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mpengine import rules
from mpengine.kernels import launch, layout
from mpengine.masters import DeviceSchedule, Entry, TensorTable, arena
from mpengine.sources import Ballot, Source, SourceTable

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
LOSSES = 2  # of the cases with several
_CPU = torch.device("cpu")
_BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass
class Launch:
    """A recorded launch."""

    kernel: JITFunction
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def cases(numel: int = 1024, copies: int = 1) -> dict[str, Launch]:
    """Every rule and family in the usual specialisation, and the most general one of each kernel.

    Args:
        numel: The size of every tensor.
        copies: How many tensors there are of each kind.
    """
    half, single = torch.float16, torch.float32
    found: dict[str, Launch] = {}
    for rule in rules.BUILT_IN:
        table, sources = _problem(rule, [half], 1, numel, copies)
        if rule.measure is not None:
            found[f"measure {rule.name}"] = _record(launch.measure, table, sources, rule, table.decision)
        if rule.settle is not None:
            found[f"settle {rule.name}"] = _record(launch.settle, table, sources, rule, table.decision)
        found[rule.name] = _record(launch.update, table, sources, rule, table.decision)
    found["inspect"] = _record(launch.inspect, table, sources)
    for name, dtypes in (("fp16+fp32", [half, single]), ("bf16", [torch.bfloat16]), ("fp32", [single])):
        table, sources = _problem(rules.ADAM, dtypes, 1, numel, copies)
        found[f"inspect {name}"] = _record(launch.inspect, table, sources)
        found[f"adam {name}"] = _record(launch.update, table, sources, rules.ADAM, table.decision)
    every = [half, torch.bfloat16, single]
    for name, dtypes in (("fp16, several losses", [half]), ("any kind, several losses", every)):
        table, sources = _problem(rules.ADAM, dtypes, LOSSES, numel, copies)
        found[f"inspect {name}"] = _record(launch.inspect, table, sources)
        found[f"adam {name}"] = _record(launch.update, table, sources, rules.ADAM, table.decision)
    hyper, max_norm = torch.zeros(1, layout.HYPER, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found_inf, votes = torch.zeros(1), torch.zeros(1, layout.VOTE)
    families = {family.name: family for family in rules.FAMILIES}
    for family in (*families.values(), None):
        outside = found_inf if family is None else None
        found[f"decide {family.name if family else 'no family'}"] = _record(
            launch.decide, table, sources, table.found[None], table.partials, hyper, max_norm, family, outside, votes
        )
    schedule = DeviceSchedule(torch.zeros(layout.SCHEDULE, dtype=torch.int64), torch.zeros(9, 1, 1).double())
    arguments = (table, sources, table.found[None], table.partials, hyper, max_norm)
    found["decide adam scheduled"] = _record(launch.decide, *arguments, families["adam"], None, votes, schedule)
    counters, policy = torch.zeros(1, layout.COUNTERS, dtype=torch.int32), torch.zeros(layout.POLICY).double()
    found["update_scale"] = _record(launch.update_scale, torch.ones(1), torch.ones(1), counters, votes[None], policy)
    return found


def _problem(
    rule: rules.Rule, dtypes: list[torch.dtype], losses: int, numel: int, copies: int
) -> tuple[TensorTable, SourceTable]:
    entries, pending = [], []
    scale = torch.ones(1)
    for dtype in dtypes * copies:
        param = torch.zeros(numel, dtype=dtype)
        state = arena([param] * (1 + len(rule.slots)))
        cells = tuple(torch.zeros(()) for _ in rule.cells)
        own = dtype is torch.float32
        entries.append(Entry(param, param if own else state[0], tuple(state[1:]), 0, rule, not own, cells))
        pending.append([Source(torch.zeros(numel, dtype=dtype), scale, loss) for loss in range(losses)])
    sources = SourceTable(_CPU)
    sources.set(pending, [Ballot(layout.FRESH, scale)] * losses)
    return TensorTable(entries, losses, _CPU), sources


def _record(launcher: Any, *args: Any) -> Launch:
    recorded: list[Launch] = []
    run = JITFunction.run
    JITFunction.run = lambda kernel, *args, **kwargs: recorded.append(Launch(kernel, args, kwargs))
    try:
        launcher(*args)
    finally:
        JITFunction.run = run
    (only,) = recorded  # a launcher launches once
    return only


def specialisation(launched: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """(signature, constants, attributes): what of a launch's arguments selects the binary."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    values = dict(zip(launched.kernel.arg_names, launched.args, strict=False))
    values |= {k: v for k, v in launched.kwargs.items() if k in launched.kernel.arg_names}
    for i, param in enumerate(launched.kernel.params):
        value = values[param.name]
        if param.is_constexpr or value is None:
            signature[param.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = _TYPES[value.dtype]
            loose = param.do_not_specialize or param.do_not_specialize_on_alignment
            if value.data_ptr() % 16 == 0 and not loose:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32"
            if not param.do_not_specialize:  # Triton would make a constant of 1, and tell multiples of 16 from others
                raise TypeError(f"{param.name} of {launched.kernel.__name__} selects a binary by its value, {value}")
    return signature, constants, attributes


def compile_launch(launched: Launch, arch: int) -> Any:
    """The compiled kernel that Triton would make for this launch on this architecture."""
    options = {k: v for k, v in launched.kwargs.items() if k not in (*launched.kernel.arg_names, "grid", "warmup")}
    source = ASTSource(launched.kernel, *specialisation(launched))
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """What ptxas gave a thread: REG registers, STACK and LOCAL bytes."""
    output = _run("cuobjdump", "--dump-resource-usage", cubin=cubin)
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", output)}


def sass(cubin: bytes) -> str:
    """The machine code, as `nvdisasm` lists it."""
    return _run("nvdisasm", "-c", cubin=cubin)


def _run(tool: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_BIN / tool, option, file.name], check=True, capture_output=True, text=True).stdout
