"""What the compiler makes of the kernels for every architecture: what `benchmarks.static --check` counts, and more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpengine import rules

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SLOTS = {rule.name: len(rule.slots) for rule in rules.BUILT_IN}
MEASURED = {f"measure {rule.name}": len(rule.slots) for rule in rules.BUILT_IN if rule.measure is not None}
CASES = {
    *SLOTS,
    *MEASURED,
    *(f"settle {rule.name}" for rule in rules.BUILT_IN if rule.settle is not None),
    *(f"{kernel}{kinds}" for kernel in ("inspect", "adam") for kinds in ("", " fp16+fp32", " bf16", " fp32")),
    *(f"{kernel} {kinds}, several losses" for kernel in ("inspect", "adam") for kinds in ("fp16", "any kind")),
    *(f"decide {family}" for family in (*(f.name for f in rules.FAMILIES), "no family", "adam scheduled")),
    "update_scale",
}
# Those that are compiled for every architecture here; the others, which differ from them in a rule's arithmetic alone,
# for two. `python -m benchmarks.static --check` compiles all for all, in minutes.
EVERYWHERE = {case for case in CASES if case.startswith(("inspect", "adam", "update_scale", "sgd"))} | {
    *("assign", "lamb", "measure lamb", "settle lamb"),
    *("decide adam", "decide sgd", "decide no family", "decide adam scheduled"),
}
TWO = (75, 90)
USUAL = {"inspect", *SLOTS, *MEASURED, "inspect fp16+fp32", "adam fp16+fp32", "decide adam", "update_scale"}


def run_without_interpreter(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def checked():
    """The runs of it that `make test` relies on."""
    command = ("-m", "benchmarks.static", "--check", "--json", "--case")
    return [
        run_without_interpreter(*command, *sorted(EVERYWHERE)),
        run_without_interpreter(*command, *sorted(CASES - EVERYWHERE), "--arch", *map(str, TWO)),
    ]


@pytest.fixture(scope="module")
def rows(checked):
    """{(case, architecture): row}."""
    assert all(run.stdout for run in checked), [run.stderr for run in checked]
    return {(row["case"], row["arch"]): row for run in checked for row in json.loads(run.stdout)["rows"]}


def test_no_bound_is_broken(checked):
    assert [run.returncode for run in checked] == [0, 0], [run.stderr for run in checked]


def test_every_case_was_compiled(rows):
    every = {(case, arch) for case in EVERYWHERE for arch in ARCHITECTURES}
    assert set(rows) == every | {(case, arch) for case in CASES for arch in TWO}


def test_there_is_no_case_that_nobody_compiles():
    done = run_without_interpreter("-c", "from benchmarks import aot; print(*aot.cases(), sep='\\n')")
    assert set(done.stdout.splitlines()) == set(CASES), done.stderr


SAME_BINARIES = """
from benchmarks import aot
small, large = aot.cases(), aot.cases(numel=50_001, copies=33)
for case in small:
    first, second = small[case], large[case]
    assert aot.specialisation(first) == aot.specialisation(second), case
    options = [{k: v for k, v in l.kwargs.items() if k != "grid"} for l in (first, second)]
    assert options[0] == options[1], case
"""


def test_sizes_and_numbers_of_tensors_select_no_binary():
    done = run_without_interpreter("-c", SAME_BINARIES)
    assert done.returncode == 0, done.stderr


def count(row, *prefixes):
    return sum(n for name, n in row["ptx"].items() if name.startswith(prefixes))


def test_registers_leave_room_for_four_blocks_of_threads(rows):
    """1,024 threads of 64 registers on a multiprocessor keep more bytes in flight than its memory needs."""
    assert {key: row["registers"] for key, row in rows.items() if key[0] in USUAL and row["registers"] > 64} == {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_full_blocks_of_update_move_each_tensor_once(rows, arch):
    for case, slots in SLOTS.items():
        if (case, arch) not in rows:
            continue
        path = rows[case, arch]["paths"][0]
        states = [[16, slots + (case != "assign")]]  # it does not look at the master
        assert path["loads"] == [[8, 1]] + (states if states[0][1] else []), case
        assert path["stores"] == [[8, 1], [16, slots + 1]], case
    single = rows["adam fp32", arch]["paths"]
    assert [(path["loads"], path["stores"]) for path in single] == [([[16, 4]], [[16, 3]])]
    assert rows["adam bf16", arch]["paths"][0]["loads"] == [[8, 1], [16, 3]]
    assert rows["adam fp16, several losses", arch]["paths"][0]["loads"] == [[8, 2], [16, 3]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_measure_reads_each_tensor_once(rows, arch):
    for case, slots in MEASURED.items():
        if (case, arch) not in rows:
            continue
        path = rows[case, arch]["paths"][0]
        assert path["bytes_per_parameter"] <= 2 + 4 + 4 * slots, case  # what it does not use is not read
        assert path["stores"] == [], case


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_mixed_binary_has_a_path_for_each_pair_of_kinds(rows, arch):
    """Gradient and parameter: halves, FP32 that is its own master, and halves with FP32 gradients from `unscale_`."""
    paths = [(path["loads"], path["stores"]) for path in rows["adam fp16+fp32", arch]["paths"]]
    for expected in (
        ([[8, 1], [16, 3]], [[8, 1], [16, 3]]),
        ([[16, 4]], [[16, 3]]),
        ([[16, 4]], [[8, 1], [16, 3]]),
    ):
        assert expected in paths


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_inspect_reads_each_gradient_once_in_16_bytes(rows, arch):
    expected = {"inspect": [2], "inspect bf16": [2], "inspect fp32": [4], "inspect fp16+fp32": [4, 2]}
    for case, sizes in expected.items():
        paths = rows[case, arch]["paths"]
        assert [path["bytes_per_parameter"] for path in paths] == sizes, case
        assert all([width for width, _ in path["loads"]] == [16] and path["stores"] == [] for path in paths), case
    path = rows["inspect fp16, several losses", arch]["paths"][0]
    assert path["bytes_per_parameter"] - path["cached_bytes_per_parameter"] == 4  # two losses


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_division_and_root_round_to_nearest(rows, arch):
    adam, decide = rows["adam", arch], rows["decide adam", arch]
    assert count(adam, "sqrt.rn.f32") == 4 + 1  # of the elements of a thread in a full block, and in another
    assert count(adam, "div.rn.f32") == (4 + 1) + 2  # and 1 / scale
    for rule, roots in (("rmsprop_centered", 1), ("adagrad", 1), ("adadelta", 2)) if arch in TWO else ():
        assert count(rows[rule, arch], "sqrt.rn.f32") == roots * (4 + 1)
        assert count(rows[rule, arch], "div.rn.f32") == (4 + 1) + 2
    assert count(decide, "div.rn.f64") == 2
    assert count(decide, "sqrt.rn.f64") == 2
    assert count(decide, "div.rn.f32") == 1


def test_no_float_atomics(rows):
    assert {key for key, row in rows.items() if count(row, "atom", "red.")} == set()
