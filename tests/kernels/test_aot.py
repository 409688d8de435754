"""What the compiler makes of the kernels, for every architecture, without a GPU."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
SLOTS = {"assign": 0, "sgd": 0, "sgd_momentum": 1, "adam": 2, "adam_amsgrad": 3}
USUAL = ["inspect", *SLOTS, "inspect fp16+fp32", "adam fp16+fp32", "decide adam", "update_scale"]
RARE = [
    "inspect bf16",
    "adam bf16",
    "inspect fp32",
    "adam fp32",
    "inspect fp16, several losses",
    "adam fp16, several losses",
    "inspect any kind, several losses",
    "adam any kind, several losses",
    "decide sgd",
    "decide no family",
    "decide adam scheduled",
]
RARE_ARCHITECTURES = (75, 90)


def run_without_interpreter(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def compiled(architectures, cases):
    done = run_without_interpreter("benchmarks/aot.py", "--json", "--arch", *map(str, architectures), "--case", *cases)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports():
    """{(case, architecture): report}; two processes."""
    jobs = [(ARCHITECTURES[::2], USUAL), (ARCHITECTURES[1::2], USUAL), (RARE_ARCHITECTURES, RARE)]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda job: compiled(*job), jobs)
        return {(r["case"], r["arch"]): r for batch in made for r in batch}


SAME_BINARIES = """
import sys; sys.path.insert(0, "benchmarks")
import aot
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


def count(report, *prefixes):
    return sum(n for name, n in report["instructions"].items() if name.startswith(prefixes))


def test_every_case_was_compiled_for_every_architecture(reports):
    expected = {(case, arch) for case in USUAL for arch in ARCHITECTURES}
    assert set(reports) == expected | {(case, arch) for case in RARE for arch in RARE_ARCHITECTURES}


def test_nothing_spills(reports):
    assert {key: r["spilled_bytes"] for key, r in reports.items() if r["spilled_bytes"]} == {}


def test_registers_leave_room_for_four_blocks_of_threads(reports):
    """1,024 threads of 64 registers on a multiprocessor keep more bytes in flight than its memory needs."""
    usual = {key: r["registers"] for key, r in reports.items() if key[0] in USUAL}
    assert {key: n for key, n in usual.items() if n > 64} == {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_full_blocks_move_float32_in_16_bytes_and_float16_in_8(reports, arch):
    for case, slots in SLOTS.items():
        instructions = reports[case, arch]["instructions"]
        reads = slots + (case != "assign")  # it does not look at the master
        assert instructions.get("ld.global.v4.b32", 0) == reads, case
        assert instructions.get("st.global.v4.b32", 0) == slots + 1, case
        assert instructions.get("ld.global.v2.b32", 0) == 1, case
        assert instructions.get("st.global.v2.b32", 0) == 1, case
    assert reports["adam fp16+fp32", arch]["instructions"]["ld.global.v4.b32"] == 4  # an FP32 gradient too


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_inspect_reads_16_bytes_at_a_time(reports, arch):
    assert reports["inspect", arch]["instructions"]["ld.global.v4.b32"] == 2  # two blocks of 8 fp16 a thread
    assert reports["inspect fp16+fp32", arch]["instructions"]["ld.global.v4.b32"] == 2 + 4


@pytest.mark.parametrize("arch", RARE_ARCHITECTURES)
def test_several_losses_and_other_kinds_keep_their_widths(reports, arch):
    assert reports["adam bf16", arch]["instructions"]["ld.global.v2.b32"] == 1
    assert reports["adam fp32", arch]["instructions"]["ld.global.v4.b32"] == 4
    assert reports["adam fp16, several losses", arch]["instructions"]["ld.global.v2.b32"] == 2
    assert reports["inspect fp16, several losses", arch]["instructions"]["ld.global.v4.b32"] == 4 + 1  # and the tallies


def test_arithmetic_is_ieee(reports):
    """No flush to zero, no contraction, no approximate division or root."""
    for key, report in reports.items():
        wrong = [
            i for i in report["instructions"] if ".ftz" in i or ".approx" in i or i.startswith(("fma.", "mad.f", "ex2"))
        ]
        assert wrong == [], key
        assert count(report, "div.full", "rcp", "rsqrt") == 0, key


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_division_and_root_round_to_nearest(reports, arch):
    adam, decide = reports["adam", arch], reports["decide adam", arch]
    assert count(adam, "sqrt.rn.f32") == 8  # 4 elements a thread, in either path
    assert count(adam, "div.rn.f32") == 8 + 2  # and 1 / scale
    assert count(decide, "div.rn.f64") == 2
    assert count(decide, "sqrt.rn.f64") == 2
    assert count(decide, "div.rn.f32") == 1


def test_no_float_atomics(reports):
    assert {key for key, r in reports.items() if count(r, "atom", "red.")} == set()
