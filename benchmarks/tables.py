"""Markdown tables from result documents. What was not measured by its document says so in the table itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.measure.results import MEASURED, PREDICTION, SMOKE, SYNTHETIC, Document

NOTHING = "-"
BASELINE = "torch.amp fused + clip"  # what a step is measured against
_LABELS = {
    PREDICTION: "**Prediction**, not measured",
    SMOKE: "**Smoke test**: tiny sizes, no claim",
    SYNTHETIC: "**SYNTHETIC: made-up numbers, nothing was measured**",
}
_TRAIN_ORDER = ("fp32", "fp32, TF32", "torch.amp", "mpengine", "mpengine, captured")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table; the first column is text, the others are numbers."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *[list(map(str, row)) for row in rows]]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """With that many significant digits, and no exponent; a dash for None."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - _exponent(value))
    return f"{value:,.{decimals}f}"


def _exponent(value: float) -> int:
    return int(f"{abs(value):e}".partition("e")[2])


def timed(measured: Mapping[str, Any] | None) -> str:
    """A median with its quartiles."""
    if measured is None:
        return NOTHING
    return f"{number(measured['median'])} ({number(measured['low'])} to {number(measured['high'])})"


def label(document: Document) -> str:
    """What a table must say above itself where it does not hold measurements; empty where it does."""
    return "" if document.origin == MEASURED else _LABELS[document.origin]


def provenance(document: Document) -> str:
    """Hardware, versions, commit and date, on one line."""
    m = document.machine
    parts = [document.hardware]
    if document.device == "cuda":
        parts += [f"driver {m.get('driver')}", f"CUDA {m.get('cuda')}"]
    elif "threads" in m:
        parts.append(f"{m['threads']} threads of {m.get('cores')} cores")
    parts += [
        f"{name} {m[key]}"
        for name, key in (("torch", "torch"), ("Triton", "triton"), ("Python", "python"))
        if m.get(key)
    ]
    if m.get("commit"):
        parts.append(f"commit {m['commit']}")
    return ", ".join([*parts, document.date])


def titled(document: Document, body: str) -> str:
    """A table under its label, if it needs one."""
    return f"{label(document)}\n\n{body}" if label(document) else body


def launched(row: Mapping[str, Any]) -> str:
    """Kernels, and copies and memsets beside them."""
    found = row.get("launches")
    if found is None:
        return NOTHING
    others = int(found["copies"] + found["memsets"])
    return f"{int(found['kernels'])}" + (f" + {others}" if others else "")


_STEP_COLUMNS = {
    "ms": lambda row: timed(row["ms"]),
    "x fused + clip": lambda row: NOTHING if row["times"] is None else f"{row['times']:.2f}",
    "queued ms": lambda row: timed(row["queued_ms"]),
    "GB/s": lambda row: number(row["gbs"]),
    "of copy": lambda row: NOTHING if row["of_copy"] is None else f"{row['of_copy']:.0%}",
    "launches": launched,
    "host µs": lambda row: NOTHING if row["host_us"] is None else number(row["host_us"]["median"]),
    "syncs": lambda row: NOTHING if row.get("syncs") is None else str(row["syncs"]),
    "transient KiB": lambda row: number(_over(row.get("transient_bytes"), 1024)),
    "held B/param": lambda row: number(_over(row.get("held_bytes"), row["parameters"])),
}


def _over(value: float | None, by: float) -> float | None:
    return None if value is None else value / by


def step_table(document: Document) -> str:
    """Every set of tensors: its engines, fastest first; then what was not measured, and why."""
    blocks = []
    for title in dict.fromkeys(row["title"] for row in document.rows):
        rows = [row for row in document.rows if row["title"] == title]
        timed_rows = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"]["median"])
        base = next((row["ms"]["median"] for row in timed_rows if row["engine"] == BASELINE), None)
        timed_rows = [row | {"times": base and base / row["ms"]["median"]} for row in timed_rows]
        shown = {name: show for name, show in _STEP_COLUMNS.items() if any(show(row) != NOTHING for row in timed_rows)}
        lines = [[name_of(row), *(show(row) for show in shown.values())] for row in timed_rows]
        parts = [f"### {title} ({rows[0]['parameters']:,} parameters, {rows[0]['tensors']:,} tensors)"]
        if lines:
            parts.append(table(["AdamW step", *shown], lines))
        parts += missing(row for row in rows if row["status"] != "not installed")
        blocks.append("\n\n".join(parts))
    absent = {row["engine"]: row for row in document.rows if row["status"] == "not installed"}
    blocks += missing(absent.values())
    copy = document.settings.get("copy_gbs")
    if copy:
        blocks.append(f"Copy within the device's memory, bytes read and written: {timed(copy)} GB/s.")
    return titled(document, "\n\n".join([*blocks, *document.notes]))


def name_of(row: Mapping[str, Any]) -> str:
    """An engine, and the state it keeps where that is of less precision."""
    return row["engine"] if row["full_state"] else f"{row['engine']} [{row['state']}]"


def missing(rows: Iterable[Mapping[str, Any]], name: str = "engine") -> list[str]:
    """A line for every status that is not "measured"; a failure keeps its error."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "measured":
            reason = "" if row["status"] == "not installed" else f" ({row['reason']})"
            found.setdefault(row["status"], []).append(f"{row[name]}{reason}")
    return [f"{status.capitalize()}: {'; '.join(names)}." for status, names in found.items()]


def train_table(document: Document) -> str:
    """Every workload: its engines, each against FP32, FP32 with TF32 and torch.amp."""
    blocks = []
    for title in dict.fromkeys(row["title"] for row in document.rows):
        rows = sorted(
            (row for row in document.rows if row["title"] == title), key=lambda row: _TRAIN_ORDER.index(row["engine"])
        )
        speed = {row["engine"]: row["iterations_per_second"] for row in rows if "ms" in row}
        lines = [
            [
                row["engine"],
                timed(row["ms"]),
                number(row["iterations_per_second"]),
                number(_over(row["peak_bytes"], 2**30)),
                *(times(speed[row["engine"]], speed.get(other)) for other in _TRAIN_ORDER[:3]),
            ]
            for row in rows
            if "ms" in row
        ]
        parts = [f"### {title}"]
        if lines:
            against = [f"x {other}" for other in _TRAIN_ORDER[:3]]
            parts.append(table(["training", "ms an iteration", "iterations/s", "peak GiB", *against], lines))
        parts += missing(rows)
        blocks.append("\n\n".join(parts))
    return titled(document, "\n\n".join([*blocks, *document.notes]))


def times(speed: float, other: float | None) -> str:
    """How many times as fast."""
    return NOTHING if other is None else f"{speed / other:.2f}"


def static_table(document: Document, arch: int = 90) -> str:
    """What each kernel is on one architecture, and how long the AdamW step must take on each GPU."""
    if not all("paths" in row for row in document.rows):
        return generic_table(document)  # of another version
    lines, predicted, cases = [], {}, ("adam", "inspect")
    for row in document.rows:
        path = max(row["paths"], key=lambda path: path["bytes_per_parameter"], default=None)
        if path is None:
            continue
        if row["case"] in cases:
            for prediction in path["predictions"]:
                predicted.setdefault(prediction["gpu"], {})[row["case"]] = prediction["ns"]
        if row["arch"] == arch:
            instructions, flight = path["instructions_per_parameter"], _over(path["bytes_in_flight"], 2**10)
            counts = [str(row[key]) for key in ("registers", "spilled_bytes", "blocks")]
            lines.append(
                [row["case"], number(path["bytes_per_parameter"]), number(instructions), *counts, number(flight)]
            )
    counted = ["kernel", "B/param", "instructions/param", "registers", "spilled", "blocks/SM", "KB in flight"]
    # ns a parameter are ms for 10^6 of them
    steps = [
        [gpu, *(number(_over(ns.get(case), 1e-3)) for case in ("adam", "inspect"))] for gpu, ns in predicted.items()
    ]
    blocks = [
        f"Counted in the code for sm_{arch}:",
        table(counted, lines),
        "**Prediction**, by published bandwidth and clocks: ms for 10^9 fp16 parameters.",
        table(["GPU", "AdamW update", "inspect"], steps),
    ]
    return titled(document, "\n\n".join(blocks))


def generic_table(document: Document, limit: int = 12) -> str:
    """The rows of a program whose columns are not known here: their plain values, as they come."""
    columns = [key for key, value in document.rows[0].items() if not isinstance(value, (dict, list))][:limit]
    rows = [[_plain(row.get(column)) for column in columns] for row in document.rows]
    return titled(document, table(columns, rows))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return NOTHING if value is None or isinstance(value, (dict, list)) else str(value)


def stage_table(document: Document) -> str:
    """How each stage of a run ended."""
    rows = [[row["stage"], row["status"], f"{row['seconds']:.0f}", row["summary"]] for row in document.rows]
    lines = [["stage", "outcome", "seconds", "last words"], ["---", "---", "---:", "---"], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
