"""Writes docs/parity.md from the results of a run."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

import torch

from benchmarks.parity import data
from benchmarks.parity.engines import ALL_HALF, AMP, FP32, FP32_ALL, MPENGINE, NUDGED, NUDGED_AGAIN, PER_LOSS
from benchmarks.parity.run import FREE, PLANNED, Result
from benchmarks.parity.tasks import TASKS, Task
from benchmarks.parity.verdict import (
    MAX_ULP_A_STEP,
    SPREADS,
    Check,
    checks,
    differences,
    distance,
    first_difference,
    parts_at,
    ratio,
    same_history,
)

Results = Mapping[str, Sequence[Result]]  # of each model, in order of the seeds

_INTRO = """# Parity with torch.amp

Written by `make parity`; do not edit. Four small models are trained for {steps} iterations on a CPU, from {seeds} seeds
each, with FP32, with torch.amp (FP32 weights, autocast, `torch.amp.GradScaler`) and with mpengine (fp16 weights, FP32
masters). From one seed all engines start from the same FP32 weights and see the same batches.

{verdict}

"""

_HOW_TO_READ = """
## How to read it

**Same gradients.** torch.amp trains; each of its scaled gradients, rounded to the dtype of mpengine's parameter, goes
into torch's for-loop optimizer under `torch.amp.GradScaler` and into mpengine's optimizer. The scale starts at
2^{free_scale}, far too large, and doubles after {free_interval} clean steps until a gradient overflows again. Scales,
growth trackers and skipped steps must be the same bits in every iteration. The weights may differ by {ulp} ULP a step
taken; a ULP is that of the largest value which the weight has had.

**Own gradients.** Each engine trains by itself. Two losses in every 40 iterations are made to overflow, and the scale
doubles after {planned_interval} clean steps, so that it moves between 2^{low} and 2^{high}, where gradients of these
models do not overflow by themselves. Scales and skipped steps must be the same in every iteration.

**Distance ratio.** Of every iteration take |loss - FP32's loss|; the distance of an engine is the median. FP32 leaves
out the steps that torch.amp skipped: otherwise the distance would count skipped steps, not roundings. The ratio is
mpengine's distance over torch.amp's, the median over the seeds; 1 means equally far from FP32. Training is chaotic:
after some dozen iterations a rounding anywhere has moved everything. So torch.amp is compared with itself as well:
after each step one weight in 16 is moved to a neighbouring FP32 number, which takes the weights about as far from
torch.amp's as mpengine's are on the same gradients. The ratio may be up to exp({spreads:g} s), where s is the root mean
square, over the seeds and two such runs of each, of the logarithm of *that* ratio: rounding alone stays below it in
about 99 cases of 100. A limit far above 1 says that the model amplifies roundings so much that its curves would show
large faults only. The rows of the same gradients do not suffer from that.

**First difference** is that of the first iteration's losses, from the same weights: the forward pass alone, before
chaos. mpengine computes with the numbers that torch.amp casts to, and has its first difference.

**Scale left to itself** is shown, not judged: whether a gradient near 65504 overflows may hang on its last bit, and two
runs that differ by a rounding then part. "torch.amp, rounded otherwise" shows how often torch.amp parts from itself.
One difference is not chance: with one scale for several backward passes, as in the DCGAN, mpengine adds their gradients
in fp16, where the sum can overflow; torch.amp adds in FP32, and so does mpengine when the losses have their own scales.

## What it does not show

Speed, memory, and anything about a GPU: fp16 on a CPU is emulated or slow, and the Triton kernels did not run (the
reference did; the kernels are tested to give its bits). Large models and long runs. bf16.
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _verdict(passed: bool) -> str:
    return "pass" if passed else "**FAIL**"


def _summary(found: Mapping[str, list[Check]]) -> str:
    rows = [
        [f"[{TASKS[name].title}](#{name})", check.what, check.found, check.wanted, _verdict(check.passed)]
        for name, its in found.items()
        for check in its
    ]
    return _table(["model", "row", "found", "wanted", ""], rows)


def _final(curves: Sequence[Sequence[float]]) -> str:
    return " / ".join(f"{value:.4f}" for value in curves[-1])


def _engines(task: Task, results: Sequence[Result]) -> str:
    """A row for each engine, own gradients."""
    rows = []
    for name in (FP32_ALL, FP32, AMP, NUDGED, NUDGED_AGAIN, MPENGINE, PER_LOSS, ALL_HALF):
        if name not in results[0].planned:
            continue
        runs = [(result.planned[name], result) for result in results]
        row = [name, *(_final(run.curves) for run, _ in runs)]
        if name in (FP32, FP32_ALL):
            rows.append([*row, "", "", "", "", "", "" if name == FP32_ALL else "as torch.amp"])
            continue
        references = [result.planned[FP32] for result in results]
        pairs = [(run, reference) for (run, _), reference in zip(runs, references, strict=True)]
        compared = name in (NUDGED, NUDGED_AGAIN, MPENGINE, ALL_HALF)
        same = sum(same_history(run, result.planned[AMP]) for run, result in runs)
        rows.append(
            [
                *row,
                " ".join(f"{first_difference(*pair):.0e}" for pair in pairs),
                f"{max(max(differences(*pair)) for pair in pairs):.1e}",
                " ".join(f"{distance(*pair):.1e}" for pair in pairs),
                "1" if name == AMP else " ".join(f"{ratio(result, name):.2f}" for result in results),
                f"{same} of {len(results)}" if compared else "",
                " ".join(str(sum(map(sum, run.skipped))) for run, _ in runs),
            ]
        )
    finals = [f"final {' / '.join(task.curves)}, seed {result.seed}" for result in results]
    columns = ["first difference", "largest difference", "distance", "ratio", "scale history", "skipped"]
    return _table(["", *finals, *columns], rows)


def _free(results: Sequence[Result]) -> str:
    """In which iterations the histories part where the scale is left to itself."""
    parted = []
    for name in (MPENGINE, NUDGED):
        parts = [parts_at(result.free[AMP], result.free[name]) for result in results]
        where = ", ".join("never" if at is None else str(at) for at in parts)
        parted.append(f"{name}: {where}")
    return f"Scale left to itself, iteration in which the history parts from torch.amp's: {'; '.join(parted)}.\n"


def _race(results: Sequence[Result]) -> str:
    rows = [
        [
            str(result.seed),
            "identical" if result.race.same_history else "**differs**",
            str(result.race.skipped),
            str(result.race.growths),
            f"{result.race.ulp_a_step:.3f} ULP a step, {result.race.taken} steps taken",
        ]
        for result in results
    ]
    return _table(["same gradients, seed", "scale history", "skipped", "growths", "weights differ by"], rows)


def _section(task: Task, results: Sequence[Result], picture: str) -> str:
    parts = [
        f'<a id="{task.name}"></a>\n## {task.title}\n',
        f"{task.setting[0].upper()}{task.setting[1:]}. Of seed {results[0].seed}:\n",
        f"![{task.title}: losses, distances from FP32, scales]({picture})\n",
        _race(results),
        "Own gradients:\n",
        _engines(task, results),
        _free(results),
    ]
    if task.num_losses > 1:
        parts.append(
            "With a scale for each loss every scale probes for growth by itself, and losses that never overflow keep "
            "theirs: another history, and other skipped steps, by design. It is shown, not compared.\n"
        )
    if task.keep_fp32:
        parts.append(
            "torch.amp leaves embeddings in FP32, and FP32 embeddings promote the residual stream to FP32. mpengine "
            "does the same in the rows above, by `prepare(..., keep_fp32=[torch.nn.Embedding])`. With fp16 embeddings, "
            "which `prepare` makes unless told otherwise, the residual stream is fp16: more roundings than torch.amp "
            "has. The embeddings' gradients, sums over all occurrences of a token, are fp16 too and overflow at a "
            "smaller scale. Those runs are shown, not judged; such a comparison may fail.\n"
        )
    return "\n".join(parts)


def _setting(steps: int, seeds: Sequence[int], seconds: float) -> str:
    packages = ("torch", "numpy", "scikit-learn")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        "\n## Where it was run\n\n"
        f"{datetime.date.today()}, {platform.system()} on {platform.machine()} "
        f"({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, one thread a run; "
        f"Python {platform.python_version()}, {versions}. {steps} iterations, seeds {', '.join(map(str, seeds))}, "
        f"{seconds / 60:.1f} minutes.\n\n"
        f"Digits: scikit-learn's. Text: the licences of the installed {', '.join(data.TEXT_PACKAGES)} "
        f"({len(data.text())} characters, {data.text_digest()}).\n"
    )


def render(results: Results, pictures: Mapping[str, str], steps: int, seconds: float) -> str:
    """The page.

    Args:
        results: Of every model.
        pictures: Where each model's picture is, as seen from the page.
        steps: Iterations of each run.
        seconds: That the runs took.
    """
    found = {name: checks(its) for name, its in results.items()}
    failed = sum(not check.passed for its in found.values() for check in its)
    count = sum(map(len, found.values()))
    seeds = [result.seed for result in next(iter(results.values()))]
    verdict = f"All {count} rows pass." if not failed else f"**{failed} of {count} rows FAIL.**"
    exponent = PLANNED.init_scale.hex().partition("p+")[2]
    return (
        _INTRO.format(steps=steps, seeds=len(seeds), verdict=verdict)
        + _summary(found)
        + "".join("\n" + _section(TASKS[name], its, pictures[name]) for name, its in results.items())
        + _HOW_TO_READ.format(
            free_scale=FREE.init_scale.hex().partition("p+")[2],
            free_interval=FREE.growth_interval,
            planned_interval=PLANNED.growth_interval,
            ulp=f"{MAX_ULP_A_STEP:g}",
            low=int(exponent) - 2,
            high=exponent,
            spreads=SPREADS,
        )
        + _setting(steps, seeds, seconds)
    )
