"""`benchmarks.report`: tables, plots and the README's section; and that nothing made up is taken for measured."""

from __future__ import annotations

import pytest

from benchmarks import plots, report
from benchmarks.measure.results import MEASURED, PREDICTION, SMOKE, SYNTHETIC, Document, ResultError
from benchmarks.report import BEGIN, END, NOT_MEASURED, README, ROOT, section, with_section
from benchmarks.tables import (
    generic_table,
    number,
    provenance,
    stage_table,
    static_table,
    step_table,
    table,
    train_table,
)
from tests.benchmarks.speed_world import CPU_MACHINE, MACHINE, step_document, train_document


def static(origin=PREDICTION):
    path = {"bytes_per_parameter": 28.0, "instructions_per_parameter": 70.5, "bytes_in_flight": 2**16}
    path["predictions"] = [{"gpu": "H200", "ns": 0.00712}]
    row = {"case": "adam", "registers": 48, "spilled_bytes": 0, "blocks": 5}
    rows = [
        {**row, "arch": 80, "paths": []},
        {**row, "arch": 90, "paths": [{**path, "bytes_per_parameter": 26.0}, path]},
    ]
    return Document("static", origin, CPU_MACHINE, rows)


def host():
    return Document("host", MEASURED, CPU_MACHINE, [{"tensors": 150, "us": 98.765}])


def everything(origin=SYNTHETIC):
    return [step_document("cuda", origin), step_document("cpu", origin), train_document(origin), static(), host()]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (12.345, "12.3"), (0.012345, "0.0123"), (0, "0"), (None, "-"), (1e9, "1,000,000,000")],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_a_cell_cannot_break_its_table():
    assert table(["a", "b"], [["x|y", 1]]).splitlines()[-1] == "| x/y | 1 |"


def test_the_section_says_that_no_gpu_was_measured():
    assert section([]) == NOT_MEASURED
    assert section([static(), host()]).startswith(NOT_MEASURED)
    cpu = section([step_document("cpu", MEASURED)])
    assert cpu.startswith(NOT_MEASURED)
    assert "20M in 20 tensors, CPU" in cpu


def test_the_section_is_one_small_table_with_hardware_versions_and_date():
    text = section(everything(MEASURED))
    assert NOT_MEASURED not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 11
    by_name = {row.split(" | ")[0].lstrip("| "): row for row in rows}
    assert by_name["AdamW step with clipping, 1e9 in 64 tensors; torch.amp fused + clip"].endswith(
        "| 10.7 ms | 17.0 ms | 1.59 | 97% |"
    )
    assert "(captured) | 4.00 ms | 6.67 ms | 1.67 | - |" in text
    assert "GPT-2 124M, context 1024, batch 8 | 20.0 ms" in text  # not captured, and not called so
    for part in ("Imaginary GPU, driver 1.0, CUDA 99.0, torch 0.0", "2001-01-01", "Imaginary CPU, 2 threads"):
        assert part in text
    assert all(line in text for line in ("docs/speed.md",))
    assert "0.00712" not in text  # a prediction stays out


@pytest.mark.parametrize("origin", [SYNTHETIC, SMOKE, PREDICTION])
def test_nothing_but_measurements_enters_the_section(origin):
    documents = [step_document("cuda", origin), step_document("cpu", origin), train_document(origin)]
    text = section(documents)
    assert "|" not in text
    assert text.startswith(NOT_MEASURED)


@pytest.mark.parametrize("make", [step_document, train_document])
def test_what_was_made_up_says_so_above_its_table(make):
    show = step_table if make is step_document else train_table
    for origin, text in ((SYNTHETIC, "**SYNTHETIC"), (SMOKE, "**Smoke test**"), (PREDICTION, "**Prediction**")):
        assert show(make(origin=origin)).startswith(text)
    assert show(make(origin=MEASURED)).startswith("###")


def test_what_was_made_up_may_not_lie_among_the_results(tmp_path):
    for document in (static(), host()):
        document.write(tmp_path / document.name())
    assert len(report.committed(tmp_path)) == 2
    document = step_document()
    document.write(tmp_path / document.name())
    with pytest.raises(ResultError, match="a synthetic run: it does not belong there"):
        report.committed(tmp_path)


def test_the_tables_hold_what_was_measured():
    text = step_table(step_document("cuda", MEASURED))
    assert "### GPT-2 124M (124,439,808 parameters, 148 tensors)" in text
    assert (
        "| mpengine + clip | 10.7 (10.4 to 10.9) | 1.59 | 10.3 (10.2 to 10.4) | 2,913 | 97% | 4 + 1 | 115 | 0 |" in text
    )
    assert "flashoptim, defaults [24-bit weights, 8-bit moments]" in text
    assert text.count("Not installed:") == 1
    order = [line.split(" | ")[0] for line in text.split("###")[1].splitlines() if line.startswith("| ")]
    assert order.index("| mpengine + clip") < order.index("| torch.amp fused + clip")  # the fastest first
    text = train_table(train_document(MEASURED))
    assert "| mpengine, captured | 4.00 (3.88 to 4.08) | 250 | 2.00 | 5.00 | 2.50 | 1.67 |" in text
    assert "Not available: mpengine, captured (captured: not available)." in text


def test_other_programs_rows_are_shown_as_they_come():
    assert generic_table(host()).splitlines()[2].startswith("| ")
    text = static_table(static())
    assert "| adam | 28.0 | 70.5 | 48 | 0 | 5 | 64.0 |" in text
    assert "| H200 | 7.12 | - |" in text  # ms for 10^9
    text = report.printed([static(), host()])
    assert "Predictions from the compiled kernels" in text
    assert "**Prediction**, not measured" in text
    assert "Host time of a step, measured without a GPU" in text
    assert provenance(host()).startswith("Imaginary CPU, 2 threads of 2 cores, torch 0.0")


def test_stages_are_a_table():
    rows = [{"stage": "step", "status": "timed out", "seconds": 150.4, "summary": "stopped | late"}]
    assert stage_table(Document("stages", MEASURED, MACHINE, rows)).splitlines()[-1] == (
        "| step | timed out | 150 | stopped / late |"
    )


def test_a_report_of_another_folder_leaves_readme_and_docs_alone(tmp_path, capsys):
    before = README.read_bytes()
    for document in everything():
        document.write(tmp_path / document.name())
    assert report.main(["--from", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        "imaginary-gpu_step_size.png",
        "imaginary-gpu_step_engines.png",
        "imaginary-gpu_train.png",
        "imaginary-cpu_step_engines.png",
    }
    for name in names:
        assert f"]({name})" in text
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 300_000
    assert text.count("**SYNTHETIC") == 3
    assert "**SYNTHETIC" in capsys.readouterr().out
    assert NOT_MEASURED in text
    assert README.read_bytes() == before


def test_a_picture_of_made_up_numbers_says_so(tmp_path):
    import matplotlib.figure

    drawn = {}
    for origin in (SYNTHETIC, MEASURED):
        figure, _ = plots._figure(step_document("cpu", origin), "title", (4, 3))
        assert isinstance(figure, matplotlib.figure.Figure)
        drawn[origin] = [figure.get_suptitle(), *(text.get_text() for text in figure.texts)]
    assert any("SYNTHETIC: NOT MEASURED" in text for text in drawn[SYNTHETIC])
    assert not any("NOT MEASURED" in text for text in drawn[MEASURED])
    assert all("Imaginary CPU" in texts[0] for texts in drawn.values())


def test_the_section_replaces_what_was_between_the_comments():
    readme = f"a\n{BEGIN}\nold\n{END}\nb\n"
    assert with_section(readme, "new") == f"a\n{BEGIN}\nnew\n{END}\nb\n"
    assert with_section(with_section(readme, "new"), "new") == with_section(readme, "new")
    for wrong in ("no comments", f"{BEGIN} {BEGIN} {END}", f"{END} {BEGIN}"):
        with pytest.raises(ResultError, match="once each"):
            with_section(wrong, "new")


def test_what_is_out_of_date_is_noticed():
    documents = everything(MEASURED)
    readme = with_section(f"{BEGIN}\n{END}", section(documents))
    page = report.page(documents, report.pictures(documents))
    assert report.check(documents, readme, page) == []
    documents[0].rows[1]["ms"]["median"] *= 2
    documents[0].rows[1]["of_copy"] /= 2
    assert report.check(documents, readme, page) == ["README.md", "docs/speed.md"]
    assert report.check([], f"{BEGIN}\n{NOT_MEASURED}\n{END}", page) == ["docs/speed.md"]


def test_readme_and_docs_are_what_the_results_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_every_result_bears_its_own_name():
    folder = ROOT / "benchmarks" / "results"
    for path in folder.glob("*.json"):
        from benchmarks.measure.results import read

        assert path.name == read(path).name()
