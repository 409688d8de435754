"""`make gpu` and `make bench`: stages within their time, failures that are named, and the command lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import drive
from benchmarks.measure import results
from benchmarks.measure.facts import ROOT
from benchmarks.stages import FAILED, NOT_AVAILABLE, NOT_INSTALLED, PASSED, TIMED_OUT, Stage, last_words, run, run_all
from tests.benchmarks.speed_world import step_document


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def undone(monkeypatch):
    """The driver sets the environment and the folder of its process."""
    for name in ("PYTHONPATH", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTHONUNBUFFERED"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(Path.cwd())


@pytest.mark.parametrize(
    ("stage", "status", "summary"),
    [
        (Stage("a", python("print('one'); print('== 3 passed =='); print()"), 60), PASSED, "3 passed"),
        (Stage("a", python("print('why'); raise SystemExit(3)"), 60), FAILED, "exit status 3; why"),
        (Stage("a", None, 60, (NOT_INSTALLED, "compute-sanitizer")), NOT_INSTALLED, "compute-sanitizer"),
        (
            Stage("a", python("print('Device not supported'); raise SystemExit(1)"), 60, excuses=("not supported",)),
            NOT_AVAILABLE,
            "not supported",
        ),
    ],
    ids=["passes", "fails", "absent", "excused"],
)
def test_how_a_stage_ends(tmp_path, stage, status, summary):
    outcome = run(stage, tmp_path / "log", 60.0)
    assert (outcome.status, outcome.summary) == (status, summary)
    assert outcome.bad == (status == FAILED)


def test_a_stage_that_takes_too_long_ends_with_its_children(tmp_path):
    child = f"import subprocess; subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)'])"
    code = f"{child}; print('started', flush=True); import time; time.sleep(60)"
    started = time.monotonic()
    outcome = run(Stage("slow", python(code), 60), tmp_path / "log", 3.0)
    assert outcome.status == TIMED_OUT
    assert outcome.summary.endswith("started")
    assert time.monotonic() - started < 30


def test_stages_share_the_time_of_the_run(tmp_path):
    stages = [Stage("slow", python("import time; time.sleep(60)"), 60), Stage("late", python("1"), 60)]
    stages.append(Stage("absent", None, 60, (NOT_AVAILABLE, "no CUDA device")))
    outcomes = list(run_all(stages, tmp_path / "log", 2.0))
    assert [outcome.status for outcome in outcomes] == [TIMED_OUT, TIMED_OUT, NOT_AVAILABLE]
    assert outcomes[1].summary == "not started: the run's time was used up"


def test_standard_output_may_go_to_a_file(tmp_path):
    code = "import sys; print('data'); print('note', file=sys.stderr)"
    outcome = run(Stage("a", python(code), 60, stdout=tmp_path / "out"), tmp_path / "log", 60.0)
    assert (tmp_path / "out").read_text() == "data\n"
    assert outcome.summary == "note"


def test_last_words():
    assert last_words("a\n==== 5 passed in 3s ====\n\n-----\n") == "5 passed in 3s"
    assert last_words("") == ""
    assert len(last_words("x" * 500)) < 120


def test_a_failed_stage_is_named_last_and_fails_the_run(tmp_path, capsys, undone):
    made = step_document()
    write = f"import shutil; shutil.copy({str(tmp_path / 'in.json')!r}, {str(tmp_path / 'out' / made.name())!r})"
    made.write(tmp_path / "in.json")
    stages = [
        Stage("step", python(write), 60),
        Stage("broken", python("print('no such kernel'); raise SystemExit(1)"), 60),
        Stage("slow", python("import time; time.sleep(60)"), 1),
        Stage("absent", None, 60, (NOT_INSTALLED, "compute-sanitizer")),
        Stage("after", python("print('ran')"), 60),
    ]
    assert drive.drive("gpu", tmp_path / "out", stages=stages) == 1
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("FAILED: broken, slow")
    last = printed[printed.rindex("| stage |") :]
    for name in ("step", "broken", "slow", "absent", "after"):
        assert f"| {name} |" in last
    assert "SYNTHETIC" in printed  # the tables of what there is come before
    assert printed.index("SYNTHETIC") < printed.rindex("| stage |")
    assert "no such kernel" in printed
    stored = next(d for d in results.read_all(tmp_path / "out") if d.kind == "stages")
    assert [row["status"] for row in stored.rows] == [PASSED, FAILED, TIMED_OUT, NOT_INSTALLED, PASSED]
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_a_run_whose_stages_pass_passes(tmp_path, capsys, undone):
    stages = [Stage("a", python("1"), 60), Stage("b", None, 60, (NOT_AVAILABLE, "no benchmarks.static"))]
    assert drive.drive("bench", tmp_path, stages=stages) == 0
    assert capsys.readouterr().out.rstrip().endswith("No stage failed.")


def test_a_result_that_cannot_be_read_fails_the_run(tmp_path, capsys, undone):
    (tmp_path / "x_step.json").write_text("{")
    assert drive.drive("bench", tmp_path, stages=[Stage("a", python("1"), 60)]) == 1
    assert "FAILED: report" in capsys.readouterr().out


def test_what_static_and_host_print_becomes_results(tmp_path, capsys, undone):
    stages = [
        Stage("static", python('print(\'{"rows": [{"ns": 1.25}]}\')'), 60, stdout=tmp_path / "static.raw"),
        Stage("host", python("print('no JSON')"), 60, stdout=tmp_path / "host.raw"),
    ]
    assert drive.drive("bench", tmp_path, stages=stages) == 0
    found = {d.kind: d for d in results.read_all(tmp_path)}
    assert set(found) == {"static", "stages"}
    assert (found["static"].origin, found["static"].rows) == ("prediction", [{"ns": 1.25}])
    assert "**Prediction**" in capsys.readouterr().out


def test_wheels_go_into_a_folder_each_for_itself(tmp_path, undone):
    def wheel(name, good=True):
        path = tmp_path / f"{name}-1.0-py3-none-any.whl"
        if not good:
            path.write_bytes(b"no zip")
            return
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}.py", "value = 1\n")
            info = f"{name}-1.0.dist-info"
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")

    wheel("surely_absent")
    wheel("surely_broken", good=False)
    wheel("torch")  # there already: stays out
    site = tmp_path / "site"
    outcomes = list(drive.install(tmp_path, site, tmp_path / "log"))
    assert {o.stage: o.status for o in outcomes} == {"wheel surely_absent": PASSED, "wheel surely_broken": FAILED}
    assert (site / "surely_absent.py").is_file()
    assert not (site / "torch.py").exists()


def test_the_gpu_run_fits_into_nine_minutes(tmp_path):
    assert drive.GPU_SECONDS <= 540 - 15  # for starting, and for the report
    assert [stage.name for stage in drive.gpu_stages(tmp_path)] == [
        "GPU tests",
        "step",
        "train",
        "memcheck",
        "racecheck",
    ]
    for stage in drive.gpu_stages(tmp_path):
        assert 0 < stage.seconds < 200


def test_the_gpu_tests_are_found():
    found = drive.gpu_tests()
    assert found[0] == "tests/kernels"
    assert "tests/test_cuda.py" in found
    assert all((ROOT / path).exists() for path in found)


def test_the_selection_of_the_sanitizers_selects(undone):
    command = drive.pytest_command(drive._SANITIZED, "--collect-only", "-k", drive._SELECTION, parallel=False)
    command[command.index("gpu and not fuzz")] = "not fuzz"  # there is no GPU for which they would be marked
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("::") >= 15
    for path in drive._SANITIZED:
        assert f"{path}::" in run.stdout


def test_files_that_need_what_is_missing_are_left_out(monkeypatch):
    monkeypatch.setattr(drive, "installed", lambda module: module != "hypothesis")
    command = drive.pytest_command(["tests/kernels"])
    assert "--ignore=tests/kernels/test_random.py" in command
    assert "xdist.plugin" in command
    monkeypatch.setattr(drive, "installed", lambda module: module == "hypothesis")
    assert not [part for part in drive.pytest_command(["tests/kernels"]) if "ignore" in part or "xdist" in part]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_is_one_command():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": environment}
    run = subprocess.run(["make", "-n", "gpu", "OUT=x", "WHEELS=w", "PYTHON=python3.12"], **options)
    assert run.returncode == 0, run.stderr
    assert "python3.12 -m benchmarks.drive gpu --out x --wheels w" in run.stdout
    assert "pip" not in run.stdout
    assert "venv" not in run.stdout
    run = subprocess.run(["make", "gpu"], **options)
    assert run.returncode == 2
    assert "make gpu OUT=dir" in run.stdout
    run = subprocess.run(["make", "-n", "bench"], **options)
    assert "-m benchmarks.drive bench --out out/bench" in run.stdout


def test_without_a_gpu_the_gpu_run_says_so_and_fails(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.drive", "gpu", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 1
    assert "| step | not available | 0 | no CUDA device |" in run.stdout
    assert run.stdout.rstrip().endswith("finds no CUDA device, and nothing could be measured.")
