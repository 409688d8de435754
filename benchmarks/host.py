"""What one step costs the host: the microseconds of its Python, with the driver stubbed. Needs Triton, and no GPU.

Every kernel is compiled for sm_90 and launched through Triton as on a GPU, but the driver's calls do nothing, and the
"device" is this machine's memory. So what is measured is mpengine's and Triton's Python, the least that an iteration
costs the host; the driver's own time for four launches comes on top, and an upload where a pointer has changed. From
the repository's root:

    python -m benchmarks.host                  # 150 tensors, and the number of tensors of other shapes
    python -m benchmarks.host --tensors 1000 --profile
    python -m benchmarks.host --check          # exits with 1 where step + update exceed the bound

`--new-memory` gives every iteration gradients at other addresses; by default they come back to the same ones, as
those that torch's caching allocator hands to autograd do.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions do not compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import mpengine
from mpengine import backend
from mpengine.kernels import launch

BOUND = 120.0  # microseconds of step + update at 150 tensors
BOUND_TENSORS = 150
STAGES = ("scale", "backward", "step", "update", "zero_grad")


class StubUtils:
    """What Triton asks of a device when it loads a binary."""

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        """(module, function, registers, spills, most threads of a block)."""
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Of an H200."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class StubDriver:
    """A driver that loads and launches nothing; `launches` counts."""

    def __init__(self) -> None:
        self.utils = StubUtils()
        self.launches = 0

    def get_current_target(self) -> GPUTarget:
        """Whom Triton compiles for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors lie."""
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What launches a binary."""

        def launcher(*arguments: Any) -> None:
            self.launches += 1

        return launcher


@contextmanager
def stubbed() -> Iterator[StubDriver]:
    """CPU tensors go through the compiled kernels' launches, which do nothing."""
    stub = _STUB
    before, backend._cpu_module = backend._cpu_module, launch
    active = driver._active
    driver.set_active(stub)  # type: ignore[arg-type]
    try:
        yield stub
    finally:
        backend._cpu_module = before
        driver._active = active


_STUB = StubDriver()  # one, since Triton keeps the launchers of the first


class Loop:
    """A training loop without a model: each parameter's gradient comes from one elementwise loss.

    Args:
        tensors: How many fp16 parameters, of 2,000 elements each.
        new_memory: Whether gradients come to other addresses every time.
    """

    def __init__(self, tensors: int, new_memory: bool) -> None:
        self.model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(100, 20)) for _ in range(tensors)])
        self.scaler = mpengine.GradScaler("cpu", max_consecutive_skips=None)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.optimizer = mpengine.prepare(self.model, optimizer, self.scaler, max_grad_norm=1.0)
        self.params = list(self.model.parameters())
        self.memory = [torch.randn(2, *p.shape).half() for p in self.params]
        self.turns = 2 if new_memory else 1
        self.iterations = 0

    def run(self) -> dict[str, float]:
        """Microseconds of each stage of one iteration."""
        optimizer, scaler = self.optimizer, self.scaler
        turn = self.iterations % self.turns
        self.iterations += 1
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-3 / (1 + i + self.iterations)  # as a scheduler does
        grads = [memory[turn] for memory in self.memory]  # new tensors, as autograd's are
        times = [time.perf_counter()]
        loss = scaler.scale(_One.apply(self.params[0]))
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        del grads
        begun = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - begun + times[-1])
        begun += times[-1] - times[-2]
        scaler.update()
        times.append(time.perf_counter() - begun + times[-1])
        begun = time.perf_counter()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun + times[-1])
        return {stage: (b - a) * 1e6 for stage, a, b in zip(STAGES, times, times[1:], strict=False)}


class _One(torch.autograd.Function):
    """A loss whose backward pass costs next to nothing."""

    @staticmethod
    def forward(ctx: Any, param: torch.Tensor) -> torch.Tensor:
        return torch.ones(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


def measure(tensors: int, new_memory: bool, iterations: int) -> dict[str, Any]:
    """Medians and quartiles over the iterations, after a warm-up."""
    torch.set_num_threads(1)
    with stubbed() as stub:
        loop = Loop(tensors, new_memory)
        for _ in range(20):
            loop.run()
        launches = stub.launches
        runs = [loop.run() for _ in range(iterations)]
        launches = stub.launches - launches
    for run in runs:
        run["step + update"] = run["step"] + run["update"]
    row: dict[str, Any] = {
        "tensors": tensors,
        "gradient memory": "new" if new_memory else "same",
        "launches": launches / iterations,
    }
    for stage in (*STAGES, "step + update"):
        low, row[f"{stage} us"], high = statistics.quantiles([run[stage] for run in runs], n=4)
        row[f"{stage} quartiles"] = [low, high]
    return row


def show(row: dict[str, Any]) -> None:
    """Prints a row of the table."""
    numbers = "".join(f"{row[f'{stage} us']:14.1f}" for stage in (*STAGES, "step + update"))
    print(f"{row['tensors']:8}{row['gradient memory']:>8}{row['launches']:10.0f}{numbers}", flush=True)


def main() -> int:
    """Prints the table, or what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, nargs="*", default=[BOUND_TENSORS, 1000])
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--new-memory", action="store_true")
    parser.add_argument("--profile", action="store_true", help="where the time of step and update goes, instead")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    if not chosen.tensors or min(chosen.tensors) < 1 or chosen.iterations < 2:
        parser.error("it takes --tensors of at least 1, and at least 2 --iterations")
    if chosen.profile:
        profile(chosen.tensors[0], chosen.new_memory, chosen.iterations)
        return 0
    memories = [True] if chosen.new_memory else [False, True]
    rows = []
    if not chosen.json:
        print(f"Median microseconds of the host, driver stubbed: {_machine()}")
        print(f"{'tensors':>8}{'memory':>8}{'launches':>10}" + "".join(f"{s:>14}" for s in (*STAGES, "step + update")))
    for tensors in chosen.tensors:
        for new_memory in memories:
            rows.append(measure(tensors, new_memory, chosen.iterations))
            if not chosen.json:
                show(rows[-1])
    if chosen.json:
        print(json.dumps({"machine": _machine(), "bound": BOUND, "bound_tensors": BOUND_TENSORS, "rows": rows}))
    bounded = [row for row in rows if row["tensors"] == BOUND_TENSORS and row["gradient memory"] == "same"]
    over = [row for row in bounded if row["step + update us"] > BOUND]
    if chosen.check and over:
        print(f"step + update at {BOUND_TENSORS} tensors exceed {BOUND:g} us", file=sys.stderr)
    return 1 if chosen.check and over else 0


def profile(tensors: int, new_memory: bool, iterations: int) -> None:
    """Prints the functions that cost most of a whole iteration."""
    torch.set_num_threads(1)
    profiler = cProfile.Profile()
    with stubbed():
        loop = Loop(tensors, new_memory)
        for _ in range(20):
            loop.run()
        profiler.enable()
        for _ in range(iterations):
            loop.run()
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def _machine() -> str:
    versions = f"torch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}"
    return f"{platform.processor() or platform.machine()}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
