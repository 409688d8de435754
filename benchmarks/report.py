"""Tables and plots of what was measured: `python -m benchmarks.report`.

It reads the result files in benchmarks/results/ and writes docs/speed.md, its plots, and the README's section between
the two `measured` comments. With --from DIR it reads that folder instead, writes report.md and the plots there, and
prints the tables; README and docs stay as they are. With --check it writes nothing and fails where README or
docs/speed.md are not what the results say.

Only measurements enter the README. Predictions (benchmarks.static) bear that word wherever they appear.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import results
from benchmarks.measure.facts import ROOT
from benchmarks.measure.results import MEASURED, PREDICTION, Document, ResultError, of_kind
from benchmarks.tables import (
    BASELINE,
    NOTHING,
    generic_table,
    number,
    provenance,
    static_table,
    step_table,
    table,
    train_table,
)

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "speed.md"
NOT_MEASURED = "GPU: not measured."
_OURS = "mpengine + clip"
_DEFAULT = "torch.amp for-loop + clip"  # what torch.optim.AdamW does on a CPU, if it is not told otherwise
_README_TRAINING = ("dcgan-64", "dcgan-512", "resnet", "gpt2")
_TITLES = {
    "step": "The optimizer step",
    "train": "Training end to end",
    "host": "Host time of a step, measured without a GPU",
    "static": "Predictions from the compiled kernels",
}
_TABLES = {"step": step_table, "train": train_table, "host": generic_table, "static": static_table}
_INTRO = """# Speed

Written by `python -m benchmarks.report` from the files in benchmarks/results/; do not edit. `make gpu OUT=dir` measures
on a machine with an NVIDIA GPU, `make bench` what any machine can.

- **ms**: from an idle device to the end of the step, median and quartiles; **queued ms**: the same behind other work,
  where the host has run ahead. Gradients are fresh for every step, caches displaced before it.
- **GB/s**: the bytes that the engine's own algorithm must move (benchmarks/optimizers/traffic.py) over the time;
  **of copy**: against a copy within the device's memory in the same run.
- **launches**: kernels, and copies and memsets beside them, by torch's profiler; **syncs**: warnings of
  `torch.cuda.set_sync_debug_mode`; **held**: parameters and state, gradients aside.
- In brackets: the state of an engine that keeps less than 32 bits of weight or FP32 moments.
"""


class Measured:
    """Looks up numbers in the measurements of one device."""

    def __init__(self, documents: Iterable[Document], device: str) -> None:
        known = [d for d in documents if d.origin == MEASURED and d.device == device]
        self.step, self.train = _newest(of_kind(known, "step")), _newest(of_kind(known, "train"))

    def step_row(self, name: str, engine: str) -> Mapping[str, Any] | None:
        """A row that was measured."""
        return _find(self.step, set=name, engine=engine)

    def train_row(self, workload: str, engine: str) -> Mapping[str, Any] | None:
        """A row that was measured."""
        return _find(self.train, workload=workload, engine=engine)


def _newest(documents: Sequence[Document]) -> Document | None:
    return max(documents, key=lambda document: document.date, default=None)


def _find(document: Document | None, **wanted: str) -> Mapping[str, Any] | None:
    rows = document.rows if document else []
    return next((r for r in rows if "ms" in r and all(r[key] == value for key, value in wanted.items())), None)


def section(documents: Sequence[Document]) -> str:
    """The README's section, without its comments."""
    gpu, cpu = Measured(documents, "cuda"), Measured(documents, "cpu")
    lines = [*_step_lines(gpu, "", [BASELINE]), *_train_lines(gpu), *_step_lines(cpu, ", CPU", [_DEFAULT, BASELINE])]
    sources = [d for d in (gpu.step, gpu.train, cpu.step) if d is not None]
    where = [f"Measured on: {text}." for text in dict.fromkeys(map(provenance, sources))]
    parts = [] if gpu.step or gpu.train else [NOT_MEASURED]
    if lines:
        parts.append(table(["", "mpengine", "torch.amp", "times as fast", "device time, of a copy's speed"], lines))
    parts += where
    if documents:
        parts.append("All numbers, other libraries, and how they were taken: [docs/speed.md](docs/speed.md).")
    return "\n\n".join(parts)


def _step_lines(measured: Measured, suffix: str, baselines: Sequence[str]) -> list[list[str]]:
    lines = []
    names = dict.fromkeys(row["set"] for row in measured.step.rows) if measured.step else []
    for name, baseline in itertools.product(names, baselines):
        ours, theirs = measured.step_row(name, _OURS), measured.step_row(name, baseline)
        if ours is not None:
            of_copy = NOTHING if ours["of_copy"] is None else f"{ours['of_copy']:.0%}"
            times = NOTHING if theirs is None else f"{theirs['ms']['median'] / ours['ms']['median']:.2f}"
            what = f"AdamW step with clipping, {ours['title']}{suffix}; {baseline}"
            lines.append([what, _ms(ours), _ms(theirs), times, of_copy])
    return lines


def _train_lines(measured: Measured) -> list[list[str]]:
    lines = []
    for name in _README_TRAINING:
        captured, eager = (measured.train_row(name, e) for e in ("mpengine, captured", "mpengine"))
        ours, theirs = captured or eager, measured.train_row(name, "torch.amp")
        if ours is not None:
            how = " (captured)" if captured else ""
            times = NOTHING if theirs is None else f"{theirs['ms']['median'] / ours['ms']['median']:.2f}"
            lines.append([f"iteration, {ours['title']}{how}", _ms(ours), _ms(theirs), times, NOTHING])
    return lines


def _ms(row: Mapping[str, Any] | None) -> str:
    return NOTHING if row is None else f"{number(row['ms']['median'])} ms"


def body(document: Document) -> str:
    """One document: heading, where it is from, table."""
    title = _TITLES[document.kind] + (f", {document.device.upper()}" if document.kind in ("step", "train") else "")
    return f"## {title}\n\n{provenance(document)}.\n\n{_TABLES[document.kind](document)}"


def _ordered(documents: Iterable[Document]) -> list[Document]:
    kinds = list(_TABLES)
    shown = [d for d in documents if d.kind in kinds and d.rows]
    return sorted(shown, key=lambda d: (d.device != "cuda", kinds.index(d.kind), d.hardware))


def printed(documents: Sequence[Document]) -> str:
    """All tables, for a terminal."""
    return "\n\n".join(map(body, _ordered(documents))) or "Nothing was measured."


def page(documents: Sequence[Document], pictures: Sequence[tuple[str, str]]) -> str:
    """The page of all numbers; `pictures` are (title, path as the page sees it)."""
    gpu = any(d.device == "cuda" and d.origin == MEASURED for d in documents)
    parts = [_INTRO.rstrip(), *([] if gpu else [NOT_MEASURED])]
    if not any(d.kind == "static" and d.origin == PREDICTION for d in documents):
        parts.append("Predictions: none here; `python -m benchmarks.static` makes them.")
    parts += [f"![{title}]({path})" for title, path in pictures]
    return "\n\n".join([*parts, *map(body, _ordered(documents))]) + "\n"


def with_section(readme: str, text: str) -> str:
    """The README with this section between its comments.

    Raises:
        ResultError: The two comments are not there, once each and in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ResultError(f"the README needs {BEGIN} and {END}, once each and in this order.")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def committed(folder: Path) -> list[Document]:
    """What benchmarks/results/ holds.

    Raises:
        ResultError: A file there is of made-up or tiny runs.
    """
    documents = results.read_all(folder)
    for document in documents:
        if document.origin not in (MEASURED, PREDICTION):
            raise ResultError(f"{folder} holds {document.name()}, a {document.origin} run: it does not belong there.")
    return documents


def draw(documents: Sequence[Document], folder: Path, seen_from: Path) -> list[tuple[str, str]]:
    """Draws the plots into a folder; their titles and their paths as a page in `seen_from` names them."""
    from benchmarks import plots  # needs matplotlib

    drawn = plots.planned(_ordered(documents))
    for name, (_, make) in drawn.items():
        folder.mkdir(parents=True, exist_ok=True)
        make(folder / name)
    return [(title, str((folder / name).relative_to(seen_from))) for name, (title, _) in drawn.items()]


def pictures(documents: Sequence[Document]) -> list[tuple[str, str]]:
    """What `draw` returns for docs/speed.md, without drawing."""
    from benchmarks import plots

    return [(title, f"speed/{name}") for name, (title, _) in plots.planned(_ordered(documents)).items()]


def check(documents: Sequence[Document], readme: str, speed: str) -> list[str]:
    """What is not as the results say."""
    stale = []
    if with_section(readme, section(documents)) != readme:
        stale.append("README.md")
    if page(documents, pictures(documents)) != speed:
        stale.append("docs/speed.md")
    return stale


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes, prints or checks; 1 where something is out of date or cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, help="another folder of results; its report is put there")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.source is not None and not chosen.source.is_dir():
        parser.error(f"--from {chosen.source} is no folder")
    try:
        if chosen.source is not None:
            documents = results.read_all(chosen.source)
            drawn = draw(documents, chosen.source, chosen.source)
            (chosen.source / "report.md").write_text(page(documents, drawn), encoding="utf-8")
            print(printed(documents))
            return 0
        documents = committed(ROOT / "benchmarks" / "results")
        readme = README.read_text(encoding="utf-8")
        if chosen.check:
            stale = check(documents, readme, PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "")
            if stale:
                print(f"{' and '.join(stale)}: not what benchmarks/results/ says; run python -m benchmarks.report.")
            return 1 if stale else 0
        README.write_text(with_section(readme, section(documents)), encoding="utf-8")
        drawn = draw(documents, PAGE.parent / "speed", PAGE.parent)
        PAGE.write_text(page(documents, drawn), encoding="utf-8")
    except ResultError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
