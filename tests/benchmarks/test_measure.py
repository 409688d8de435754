"""What benchmarks share: statistics, result files, and what is read off a GPU's own reports."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from benchmarks.measure import devices, facts, results
from benchmarks.measure.results import MEASURED, PREDICTION, Document, ResultError
from benchmarks.measure.statistics import ratio, spread


def test_a_spread_is_median_and_quartiles():
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.low, found.median, found.high, found.count) == (2.0, 3.0, 4.0, 5)
    assert found.iqr == 2.0
    assert spread([1.0, 2.0]).median == 1.5
    assert spread([7.0]).row() == {"median": 7.0, "low": 7.0, "high": 7.0, "count": 1}
    with pytest.raises(ValueError, match="nothing to summarise"):
        spread([])


def test_a_ratio_of_what_was_not_measured_is_none():
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(None, 2.0) is None
    assert ratio(3.0, None) is None


def test_the_machine_says_what_a_result_needs():
    machine = facts.machine("cpu")
    assert {"date", "commit", "hardware", "python", "torch", "cuda", "triton", "threads"} <= set(machine)
    assert machine["torch"] == torch.__version__
    assert machine["hardware"]
    json.dumps(machine)


def test_nvidia_smis_first_line_is_read():
    found = facts.parse_smi(
        "NVIDIA H200, 580.1, 143771 MiB, 1980 MHz, 3201 MHz, 40, 120.5 W\nother, 1, 2, 3, 4, 5, 6\n"
    )
    assert found["name"] == "NVIDIA H200"
    assert found["driver_version"] == "580.1"
    assert found["power.draw"] == "120.5 W"
    assert facts.parse_smi("") == {}


@pytest.mark.parametrize(
    ("name", "slug"), [("NVIDIA H200", "nvidia-h200"), ("AMD EPYC (TM) 9B14!", "amd-epyc-tm-9b14"), ("", "unknown")]
)
def test_hardware_names_fit_file_names(name, slug):
    assert facts.slug(name) == slug


def test_a_document_is_read_as_it_was_written(tmp_path):
    made = Document("step", MEASURED, facts.machine("cpu"), [{"ms": 1.5, "syncs": None}], {"seconds": 1.0}, ["note"])
    path = made.write(tmp_path / "deep" / made.name())
    assert results.read(path) == made
    assert path.name == f"{made.date}_{facts.slug(made.hardware)}_step.json"
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_the_later_file_of_a_machine_counts(tmp_path):
    for date, rows in (("2001-01-01", [{"a": 1}]), ("2001-01-02", [{"a": 2}])):
        made = Document("step", MEASURED, {"date": date, "hardware": "X", "device": "cuda"}, rows)
        made.write(tmp_path / made.name())
    other = Document("step", MEASURED, {"date": "2000-01-01", "hardware": "Y", "device": "cuda"}, [{"a": 3}])
    other.write(tmp_path / other.name())
    found = results.read_all(tmp_path)
    assert sorted(d.rows[0]["a"] for d in found) == [2, 3]
    assert results.of_kind(found, "train") == []
    assert len(results.of_kind(found, "step", "cuda")) == 2


@pytest.mark.parametrize(
    ("name", "kind", "origin"), [("static.json", "static", PREDICTION), ("a_host.json", "host", MEASURED)]
)
def test_bare_output_is_taken_by_its_name(tmp_path, name, kind, origin):
    (tmp_path / name).write_text('{"title": "x", "results": [{"a": 1}]}')
    (found,) = results.read_all(tmp_path)
    assert (found.kind, found.origin, found.rows) == (kind, origin, [{"a": 1}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ("{}", "neither a format"),
        ('{"format": 99}', "another format"),
        ('{"format": 1, "kind": "step"}', "no result of this version"),
        ('{"format": 1, "kind": "step", "origin": "guessed", "machine": {}}', "origin 'guessed'"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=message):
        results.read(path)


def test_launches_are_counted_in_a_trace():
    events = [("kernel", 5.0), ("kernel", 7.5), ("gpu_memcpy", 1.0), ("gpu_memset", 1.0), ("gpu_user_annotation", 99.0)]
    trace = {"traceEvents": [{"cat": cat, "dur": dur, "ph": "X"} for cat, dur in events] + [{"ph": "M"}]}
    assert devices.count_launches(trace) == {"kernels": 2, "copies": 1, "memsets": 1, "kernel_ms": 0.0125}
    assert devices.count_launches({})["kernels"] == 0


def test_only_warnings_of_synchronisation_count():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for text in ("called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)", "a prototype feature"):
            warnings.warn(text, stacklevel=1)
    assert devices.count_syncs(caught) == 1


def test_the_cpu_times_and_copies():
    cpu = devices.of("cpu")
    ms, host = cpu.alone(lambda: torch.ones(10).sum())
    assert ms > 0
    assert host is None
    assert cpu.queued(lambda: None, 1.0) is None
    assert all(gbs > 0 for gbs in cpu.copy_gbs(2**16, repeats=3))
    assert cpu.free_bytes() > 2**20


def test_both_devices_answer_the_same_questions():
    """So that a run on a GPU asks nothing that only the CPU's tests have seen answered."""
    own = {name for name, value in vars(devices.Cpu).items() if callable(value) and not name.startswith("__")}
    assert own - set(vars(devices.Cuda)) == {"flush"}  # one tensor of each, added to
