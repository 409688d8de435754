"""Result files: one JSON document for each benchmark and machine, and what may be called measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import facts

FORMAT = 1
KINDS = ("step", "train", "host", "static", "stages")

# Where the numbers come from. Only the first may stand in a table of measurements.
MEASURED = "measured"
PREDICTION = "prediction"  # counted or modelled, without the hardware
SMOKE = "smoke"  # tiny shapes, to see that the program runs: no claim
SYNTHETIC = "synthetic"  # made up, to test the report
ORIGINS = (MEASURED, PREDICTION, SMOKE, SYNTHETIC)


@dataclass
class Document:
    """The results of one benchmark on one machine."""

    kind: str  # of KINDS
    origin: str  # of ORIGINS
    machine: dict[str, Any]  # facts.machine
    rows: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """Where it ran: cpu or cuda."""
        return str(self.machine.get("device", "cpu"))

    @property
    def hardware(self) -> str:
        """The name of the processor or the GPU."""
        return str(self.machine.get("hardware", "unknown hardware"))

    @property
    def date(self) -> str:
        """Year, month and day of the run."""
        return str(self.machine.get("date", "no date"))

    def name(self) -> str:
        """The file name that it goes by: date_hardware_kind.json."""
        return f"{self.date}_{facts.slug(self.hardware)}_{self.kind}.json"

    def write(self, path: Path) -> Path:
        """Writes the document; a reader sees the old file or the new one, never a part."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path


class ResultError(ValueError):
    """A file is not a result; the message says which, and why."""


def read(path: Path) -> Document:
    """Reads one file.

    A bare object with a list of rows, as `python -m benchmarks.static --json` and `benchmarks.host --json` print it,
    is taken by its name: what ends in static.json is a prediction, what ends in host.json a measurement of the host.

    Raises:
        ResultError: It is no JSON object, or of another format.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(raw, dict):
        raise ResultError(f"{path} holds a {type(raw).__name__}; a result is one JSON object.")
    if "format" not in raw:
        return bare(raw, path)
    if raw.pop("format") != FORMAT:
        raise ResultError(f"{path} has another format than {FORMAT}: measure again.")
    try:
        document = Document(**raw)
    except TypeError as error:
        raise ResultError(f"{path} is no result of this version ({error}).") from error
    if document.kind not in KINDS or document.origin not in ORIGINS:
        raise ResultError(f"{path} is of kind {document.kind!r} and origin {document.origin!r}, which are not known.")
    return document


def bare(raw: dict[str, Any], path: Path) -> Document:
    """A document around what another program printed."""
    kind = next((kind for kind in ("static", "host") if path.stem == kind or path.stem.endswith((f"_{kind}"))), None)
    rows = rows_of(raw)
    if kind is None or rows is None:
        raise ResultError(f"{path} is no result: it has neither a format nor, named static.json or host.json, rows.")
    return Document(kind, PREDICTION if kind == "static" else MEASURED, raw.get("machine", {}), rows)


def rows_of(raw: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The list of rows in a program's output: "rows", or its first list of objects."""
    lists = [raw.get("rows"), *raw.values()]
    found = [value for value in lists if isinstance(value, list) and value and all(isinstance(r, dict) for r in value)]
    return found[0] if found else None


def read_all(folder: Path) -> list[Document]:
    """Every result in a folder, by name; later files of a kind and a machine replace earlier ones."""
    newest: dict[tuple[str, str, str], Document] = {}
    for path in sorted(folder.glob("*.json")):
        document = read(path)
        newest[document.kind, document.device, document.hardware] = document
    return list(newest.values())


def of_kind(documents: Iterable[Document], kind: str, device: str | None = None) -> list[Document]:
    """The documents of one benchmark (on one kind of device)."""
    return [d for d in documents if d.kind == kind and device in (None, d.device)]
