"""The report's pictures. One that does not show measurements says so across itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure.facts import slug
from benchmarks.measure.results import MEASURED, Document
from benchmarks.optimizers.traffic import MPENGINE_HALF, bytes_of
from benchmarks.tables import BASELINE, name_of

Make = Callable[[Path], None]
_LINES = {"mpengine": "o-", "mpengine + clip": "s-", "torch.amp fused": "o--", BASELINE: "s--"}
_COLOURS = {"mpengine": "#1f77b4", "torch.amp": "#d95f02"}
_OTHER = "#8c8c8c"


def planned(documents: Sequence[Document]) -> dict[str, tuple[str, Make]]:
    """From a file name to its title and what draws it."""
    found: dict[str, tuple[str, Make]] = {}
    for document in documents:
        stem = f"{slug(document.hardware)}_{document.kind}"
        where = f"{document.hardware}, {document.date}"
        timed = [row for row in document.rows if "ms" in row]
        if document.kind == "step" and timed:
            if document.device == "cuda":
                found[f"{stem}_size.png"] = f"Step time by parameters, {where}", partial(by_size, document)
            found[f"{stem}_engines.png"] = f"Step time by engine, {where}", partial(by_engine, document)
        elif document.kind == "train" and timed:
            found[f"{stem}.png"] = f"Training speed, {where}", partial(by_engine, document)
    return found


def by_size(document: Document, path: Path) -> None:
    """Time against the number of parameters, and the time in which a copy moves mpengine's bytes."""
    figure, axes = _figure(document, "AdamW step by number of parameters", (8, 5))
    sets = sorted({(row["parameters"], row["title"]) for row in document.rows if "ms" in row})
    for engine, style in _LINES.items():
        rows = sorted((r for r in document.rows if "ms" in r and r["engine"] == engine), key=lambda r: r["parameters"])
        if rows:
            times = [row["ms"]["median"] for row in rows]
            axes.plot([row["parameters"] for row in rows], times, style, color=_colour(engine), label=engine, ms=5)
    copy = document.settings["copy_gbs"]["median"]
    per_parameter = bytes_of(MPENGINE_HALF)
    ends = [sets[0][0], sets[-1][0]]
    limit = [n * per_parameter / copy / 1e6 for n in ends]
    axes.plot(
        ends, limit, ":", color="black", label=f"copy limit: {per_parameter:.0f} B a parameter at {copy:,.0f} GB/s"
    )
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel="ms from an idle device (median)")
    for count, title in sets:
        axes.annotate(
            title,
            (count, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=7,
            color="black",
            ha="center",
            va="bottom",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        axes.axvline(count, color=_OTHER, lw=0.4, zorder=0)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    _save(figure, path)


def by_engine(document: Document, path: Path) -> None:
    """A bar for every engine, a panel for every set of tensors or workload."""
    titles = list(dict.fromkeys(row["title"] for row in document.rows if "ms" in row))
    panels = [[row for row in document.rows if row["title"] == title and "ms" in row] for title in titles]
    heights = [len(rows) + 1.6 for rows in panels]
    size = (8.0, 0.31 * sum(heights) + 0.8)
    step = document.kind == "step"
    figure, axes = _figure(document, "AdamW step" if step else "Training, an iteration", size, heights)
    unit = "ms from an idle device" if step and document.device == "cuda" else "ms"
    for panel, title, rows in zip(axes, titles, panels, strict=True):
        names = [name_of(row) if step else row["engine"] for row in rows]
        times = [(row["ms"]["median"], row["ms"]["low"], row["ms"]["high"]) for row in rows]
        _bars(panel, [(name, *time) for name, time in zip(names, times, strict=True)], title)
        panel.set_xlabel(f"{unit} (median, quartiles)", fontsize=8)
    _save(figure, path)


def _bars(axes: Any, rows: Sequence[tuple[str, float, float, float]], title: str) -> None:
    rows = sorted(rows, key=lambda row: -row[1])
    names = [name.replace(" [", "\n[") for name, *_ in rows]
    medians = [median for _, median, *_ in rows]
    errors = [[m - low for _, m, low, _ in rows], [high - m for _, m, _, high in rows]]
    axes.barh(names, medians, xerr=errors, color=[_colour(name) for name in names], height=0.7, error_kw={"lw": 0.8})
    for i, (_, median, _, high) in enumerate(rows):
        axes.text(max(median, high), i, f"  {median:.3g}", va="center", fontsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)


def _colour(engine: str) -> str:
    return next((colour for name, colour in _COLOURS.items() if engine.startswith(name)), _OTHER)


def _figure(
    document: Document, title: str, size: tuple[float, float], heights: Sequence[float] = ()
) -> tuple[Any, Any]:
    """A figure with its provenance; one panel, or one for each of `heights`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    mark = "" if document.origin == MEASURED else f"{document.origin.upper()}: NOT MEASURED"
    where = f"{document.hardware}, torch {document.machine.get('torch')}, {document.date}"
    figure.suptitle("\n".join(filter(None, [mark, title, where])), fontsize=10, color="red" if mark else "black")
    if mark:
        style: dict[str, Any] = {"fontsize": 26, "color": "red", "alpha": 0.35, "rotation": 20, "zorder": 10}
        figure.text(0.5, 0.5, mark, ha="center", va="center", **style)
    if not heights:
        return figure, figure.subplots()
    return figure, figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))[:, 0]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})
