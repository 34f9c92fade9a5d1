"""Draws the figures of a run. Knows records; the files are readable on a light page and on a dark one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .handler import SAMPLE
from .workloads import WORKLOADS

Record = Mapping[str, Any]

#: A grey, and colours of much the same lightness, that stand out on white as well as on black, and from each other for
#: the colour-blind too (after Okabe and Ito). No bar and no line is told by its colour alone: each has its name on it.
INK = "#7b8087"
COLOURS = {
    "stock": INK,
    "request": "#3d8fd1",
    "process": "#1f9e77",
    "asgi": "#b565a7",
    "a2wsgi": "#a08c5b",
    "single_thread_context": INK,
    "shared_loop": INK,
}
DASHES: dict[str, tuple[float, ...]] = {"single_thread_context": (5, 2), "shared_loop": (1, 1.5)}
OURS = ("request", "process")
#: What the drawings call them, where they have little room.
SHORT = {
    "stock": "Django's handler",
    "request": "request",
    "process": "process",
    "asgi": "ASGIHandler",
    "a2wsgi": "a2wsgi",
    "single_thread_context": "single-thread context",
    "shared_loop": "… with one loop",
}
TITLES = {
    "sync_bare": "sync view, no middleware",
    "sync_default": "sync view, default middleware",
    "async_view": "async view",
    "stack": "async middleware, receivers and view",
    "async_to_sync": "3 async_to_sync calls in a sync view",
    "calls": "5 awaited sync calls that do nothing",
    "orm_sqlite": "5 awaited queries, SQLite",
    "orm_sync_sqlite": "5 queries in a sync view, SQLite",
    "orm_postgresql": "5 awaited queries, PostgreSQL",
    "gather": "a sync call of 0.1 s beside ten waits",
    "fanout": "10 concurrent HTTP calls",
    "redis": "5 awaited gets from Redis",
    "stream": "async stream of 50 MB (CPU time)",
    "growth": "aiterator()",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    # The same run draws the same file.
    "svg.hashsalt": "wsgi-loop",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar, with its name on the left."""

    name: str
    value: float
    colour: str


def draw(records: Sequence[Record], about: str, stem: Path) -> list[str]:
    """Draw what the records have figures for, and return the names of the drawings.

    Each is written twice, as `<stem>-<name>.png` and as `<stem>-<name>.svg`. about: what was run, to stand below it.
    """
    drawings = {"ratios": ratios(records), "growth": growth(records), "rps": rps(records)}
    drawn = {name: figure for name, figure in drawings.items() if figure is not None}
    for name, figure in drawn.items():
        figure.text(0.01, 0.06 / figure.get_size_inches()[1], about, fontsize=7.5, color=INK, va="bottom")
        for kind, metadata in (("png", None), ("svg", {"Date": None})):
            with mpl.rc_context(STYLE):
                path = stem.with_name(f"{stem.name}-{name}.{kind}")
                figure.savefig(path, dpi=160, transparent=True, metadata=metadata)
    return list(drawn)


def _of(records: Sequence[Record], where: str) -> dict[str, list[Record]]:
    """The records from there, by workload."""
    return {
        name: found
        for name in WORKLOADS
        if (found := [record for record in records if (record["where"], record["workload"]) == (where, name)])
    }


def ratios(records: Sequence[Record]) -> Figure | None:
    """Draw the time per request (of `stream` the CPU time) against that of Django's handler; None without figures."""
    shown = ("request", "process", "asgi", "a2wsgi")
    panels: dict[str, list[Bar]] = {}
    for workload, found in _of(records, "handler").items():
        figures = {record["contender"]: record["figures"] for record in found}
        figure = "cpu_ratio_to_stock" if workload == "stream" else "ratio_to_stock"
        values = {name: figures[name].get(figure) for name in shown if name in figures}
        bars = [Bar(SHORT[name], value, COLOURS[name]) for name, value in values.items() if value is not None]
        if bars:
            panels[workload] = bars
    title = "Time per request, Django's own handler = 1 (less is better)"
    return _panels(panels, title, ".2f", limit=2.0, line=1.0) if panels else None


def rps(records: Sequence[Record]) -> Figure | None:
    """Draw the requests per second of each contender's first server; None without figures."""
    shown = {
        ("gunicorn gthread", "stock"): "Django's handler",
        ("gunicorn gthread", "request"): "request",
        ("gunicorn gthread", "process"): "process",
        ("gunicorn asgi", "asgi"): "gunicorn asgi",
        ("uvicorn", "asgi"): "uvicorn",
    }
    panels: dict[str, list[Bar]] = {}
    for workload, found in _of(records, "server").items():
        values = {(record["server"], record["contender"]): record["figures"].get("rps") for record in found}
        bars = [Bar(name, values[key], COLOURS[key[1]]) for key, name in shown.items() if values.get(key) is not None]
        if bars:
            panels[workload] = bars
    title = "Requests per second at concurrency 32, WSGI under gunicorn gthread (more is better)"
    return _panels(panels, title, ",.0f") if panels else None


def _panels(
    panels: Mapping[str, Sequence[Bar]],
    title: str,
    form: str,
    limit: float | None = None,
    line: float | None = None,
) -> Figure:
    """Draw a panel of bars for each workload, in two columns.

    form: of the values. limit: where longer bars are cut off, if any are. line: a value that is marked.
    """
    rows = -(-len(panels) // 2)
    most = max(map(len, panels.values()))
    # In inches: of a panel with its title, and of what is above and below all panels.
    panel, above, below = 0.34 + 0.2 * most, 0.68, 0.27
    height = above + rows * panel + below - 0.2
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, height))
        figure.text(0.01, 1 - 0.26 / height, title, fontsize=11, fontweight="bold")
        grid = figure.add_gridspec(
            rows,
            2,
            left=0.155,
            right=0.985,
            top=1 - above / height,
            bottom=below / height,
            wspace=0.45,
            hspace=1.7 / (most + 1),
        )
        for index, (workload, bars) in enumerate(panels.items()):
            axes: Axes = figure.add_subplot(grid[index // 2, index % 2])
            axes.set_title(TITLES[workload], fontsize=9.5, fontweight="bold", loc="left", pad=3)
            _bars(axes, bars, form, limit, line)
    return figure


def _bars(axes: Axes, bars: Sequence[Bar], form: str, limit: float | None, line: float | None) -> None:
    end = limit or max(bar.value for bar in bars)
    for position, bar in enumerate(bars):
        length = min(bar.value, end)
        axes.barh(position, length, height=0.74, color=bar.colour, linewidth=0)
        text = f"{bar.value:{form}}" if length == bar.value else f"{bar.value:.1f} →"
        # What would be written across the line goes behind it.
        start = line if line is not None and length <= line < length + end * 0.14 else length
        axes.text(start + end * 0.02, position, text, va="center", fontsize=8.5)
    if line is not None:
        axes.axvline(line, color=INK, linewidth=1, linestyle=(0, (3, 2)), zorder=3)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], fontsize=8.5)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, end * 1.2)
    axes.set_xticks([])
    axes.tick_params(left=False, pad=2)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def growth(records: Sequence[Record]) -> Figure | None:
    """Draw each contender's time per request along the requests of one thread; None without figures."""
    samples = {
        record["contender"]: [value / 1000 for value in record["samples"]]
        for record in _of(records, "handler").get("growth", [])
        if record["contender"] in COLOURS and record.get("samples")
    }
    if not samples:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2))
        served = SAMPLE * max(map(len, samples.values()))
        title = f"Milliseconds per request, along {served:,} requests to one server thread (less is better)"
        figure.text(0.01, 0.94, title, fontsize=11, fontweight="bold")
        axes: Axes = figure.add_axes((0.06, 0.15, 0.72, 0.74))
        for name in sorted(samples, key=OURS.__contains__):
            values = samples[name]
            requests = [(index + 0.5) * SAMPLE for index in range(len(values))]
            (line,) = axes.plot(requests, values, color=COLOURS[name], linewidth=2.2 if name in OURS else 1.5)
            if name in DASHES:
                line.set_dashes(DASHES[name])
        axes.set_yscale("log")
        axes.set_xlim(0, served)
        axes.set_xlabel("requests that the thread has served")
        low, high = axes.get_ylim()
        ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        marks = range(0, served + 1, 500 if served > 1000 else 50)
        axes.set_xticks(marks, [f"{mark:,}" for mark in marks])
        axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
        axes.tick_params(left=False)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        _label_ends(axes, samples)
    return figure


def _label_ends(axes: Axes, samples: Mapping[str, Sequence[float]]) -> None:
    """Write each line's name and last value at its end, moved up where it would cover the one below it."""
    scale = axes.transAxes.inverted()
    below = -1.0
    for name in sorted(samples, key=lambda name: samples[name][-1]):
        last = samples[name][-1]
        height = scale.transform(axes.transData.transform((0, last)))[1]
        below = max(height, below + 0.062)
        axes.annotate(
            f"{SHORT[name]}: {last:.1f}",
            xy=(1, height),
            xytext=(1.035, below),
            xycoords="axes fraction",
            color=COLOURS[name],
            va="center",
            fontsize=9,
            fontweight="bold" if name in OURS else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": COLOURS[name],
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
        )
