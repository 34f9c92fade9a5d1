"""Writes the report of one or more stored runs, in Markdown, with the drawings of each. Every number is a run's own.

What to choose is said by people, in `summary.md`, which is put on top.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .contenders import CONTENDERS
from .plots import draw
from .workloads import WORKLOADS

SUMMARY = Path(__file__).with_name("summary.md")

Record = Mapping[str, Any]
Figures = Mapping[str, float | None]

#: wsgi-loop's scopes: their headings.
SCOPES = {"request": "request", "process": "process"}

INSTRUCTIONS, HANDLER, SERVER = "instructions", "handler", "server"
GTHREAD, GUNICORN_ASGI = "gunicorn gthread", "gunicorn asgi"

RATIO, CPU_RATIO, GROWTH = "ratio_to_stock", "cpu_ratio_to_stock", "growth"


class Row(NamedTuple):
    """A figure of a workload, and the most that it should be in each of the `SCOPES`; None where nobody said."""

    workload: str
    most: tuple[float | None, float | None] = (None, None)
    where: str = HANDLER
    figure: str = RATIO

    @property
    def title(self) -> str:
        what = {INSTRUCTIONS: " (instructions)", CPU_RATIO: " (CPU time)", GROWTH: ": growth"}
        return f"{WORKLOADS[self.workload].title}{what.get(self.where) or what.get(self.figure, '')}"

    def of_stock(self, figures: Figures) -> str:
        """What the ratios are to, out of stock's figures; its growth, which is a ratio as theirs are."""
        if self.where == INSTRUCTIONS:
            return INSTRUCTION_COLUMNS[0].write(figures)
        if self.figure == GROWTH:
            return GROWTH_COLUMN.write(figures)
        written = Column("ms", (CPU if self.figure == CPU_RATIO else MEDIAN).figure, ",.2f", 1000).write(figures)
        return written and f"{written} ms"


ROWS = (
    Row("sync_bare", (1.06, 1.06), INSTRUCTIONS),
    Row("sync_default", (1.02, 1.02), INSTRUCTIONS),
    Row("async_view", where=INSTRUCTIONS),
    Row("sync_bare"),
    Row("sync_default"),
    Row("async_view", (0.25, None)),
    Row("stack", (0.28, None)),
    Row("async_to_sync", (0.20, None)),
    Row("calls", (0.35, None)),
    Row("orm_sqlite"),
    Row("orm_sync_sqlite"),
    Row("orm_postgresql"),
    Row("gather", (1.05, 1.05)),
    Row("fanout"),
    Row("redis"),
    Row("stream", (1.1, None), figure=CPU_RATIO),
    Row("growth", (1.1, 1.1), figure=GROWTH),
)
#: Whose ratios stand beside wsgi-loop's: their headings.
BESIDE = {"asgi": "ASGI", "a2wsgi": "a2wsgi"}

#: A workload of async code, and that of sync code which it is held against: their headings.
AGAINST_SYNC = (
    ("async_view", "async view", "sync_bare", "sync view"),
    ("orm_sqlite", "5 queries, awaited", "orm_sync_sqlite", "5 queries, sync"),
)


class Column(NamedTuple):
    """A column of a table: its heading, the figure that stands in it, how it is written, and what it is divided by."""

    heading: str
    figure: str
    form: str
    divisor: float = 1

    def write(self, figures: Figures) -> str:
        """Return the figure out of these; "" if it is not there."""
        value = figures.get(self.figure)
        return "" if value is None else f"{value / self.divisor:{self.form}}"


HANDLER_COLUMNS = (
    Column("median µs", "median_us", ",.0f"),
    Column("p99 µs", "p99_us", ",.0f"),
    Column("to stock", RATIO, ".2f"),
    Column("to the floor", "ratio_to_floor", ".1f"),
    Column("CPU µs", "cpu_us", ",.0f"),
    Column("CPU to stock", CPU_RATIO, ".2f"),
    Column("threads started", "threads", ".2f"),
    Column("loops made", "loops", ".2f"),
    Column("system calls", "syscalls", ",.0f"),
    Column("memory MB", "memory_mb", ",.1f"),
)
GROWTH_COLUMN = Column("growth", GROWTH, ".2f")
INSTRUCTION_COLUMNS = (Column("instructions", "instructions", ",.0f"), Column("to stock", RATIO, ".4f"))
MEDIAN, CPU = HANDLER_COLUMNS[0], HANDLER_COLUMNS[4]
ENTRY_COLUMNS = (
    Column("entries", "entries", ",.0f"),
    Column("functions", "functions", ",.0f"),
    Column("modules", "modules", ",.0f"),
    Column("entries of asgiref", "asgiref_entries", ",.0f"),
)
SERVER_COLUMNS = (
    Column("requests/s", "rps", ",.1f"),
    Column("p50 ms", "p50_us", ",.1f", 1000),
    Column("p99 ms", "p99_us", ",.1f", 1000),
    Column("CPU µs", "cpu_us", ",.0f"),
    Column("memory MB", "peak_mb", ",.0f"),
)
#: Of the servers, those by which one loses.
LOSING_COLUMNS = tuple(column for column in SERVER_COLUMNS if column.figure in ("rps", "p99_us"))

READING = """\
**At the handler**, without a server: each contender is a process of its own, and they take turns request by request, in
an order that is shuffled each round. A time spans the call, the whole body and `close()`. *To stock* is the ratio of
medians to Django's own handler, *to the floor* that to one call to an idle loop that runs on another thread. Threads,
loops and system calls are counted per request, in the steady state and apart from the times; memory is by how much the
process's peak has grown. *growth* is the median of the last 50 of 3,000 requests to that of requests 51 to 100.

*CPU* is what all threads of the process take for a request, after the answer too, and *CPU to stock* its ratio. Of the
stream it is what counts: how long the stream takes is up to the client who reads it.

**Over HTTP**, wrk keeps 32 requests under way to two workers (gthread: of 16 threads each), for each turn to a server
that was started for it and has answered 64 requests. Each request has a connection of its own: those that are kept stay
with the worker that took them, which may be one worker for all. Latencies are those that clients saw, without wrk's
correction; they and memory are of all rounds, requests per second the rounds' median. CPU time is the workers' per
request, memory the sum of their peaks. Of the 50 MB stream, requests per second are bytes per second over 50 MB.

Where a contender can keep a client in a module, all requests share it; elsewhere each request makes its own."""


class Run:
    """A stored run."""

    def __init__(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text())
            self.machine: Mapping[str, Any] = stored["machine"]
            self.options: Mapping[str, Any] = stored["options"]
            self.records: list[Record] = stored["records"]
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ValueError(
                f"{path} is not a run that can be reported ({type(exc).__name__}: {exc}): name files that "
                "`python -m benchmarks` has written"
            ) from exc
        self.stem = path.stem
        self._figures: dict[tuple[str, str, str, str | None], Figures] = {
            (each["where"], each["workload"], each["contender"], each["server"]): each["figures"]
            for each in self.records
        }

    @property
    def title(self) -> str:
        versions = self.machine["packages"]
        only = "" if self.is_at_handler else ", over HTTP"
        return f"Python {self.machine['python']}, Django {versions['Django']}{only}"

    @property
    def is_at_handler(self) -> bool:
        """Whether anything was measured without a server."""
        return any(record["where"] == HANDLER for record in self.records)

    def figures(self, where: str, workload: str, contender: str, server: str | None = None) -> Figures:
        """The figures of one record; none if there is no such record."""
        return self._figures.get((where, workload, contender, server), {})

    def of(self, where: str, workload: str) -> list[Record]:
        """The records of a workload, in the order of `CONTENDERS`, those of one server next to one another."""
        found = [record for record in self.records if (record["where"], record["workload"]) == (where, workload)]
        servers = list(dict.fromkeys(sorted((record["server"] or "" for record in found), key=_server_order)))
        names = [*CONTENDERS, *sorted({record["contender"] for record in found} - set(CONTENDERS))]
        return sorted(
            found, key=lambda record: (servers.index(record["server"] or ""), names.index(record["contender"]))
        )


def _server_order(name: str) -> tuple[bool, str]:
    return name != GTHREAD, name


def write(json_paths: Sequence[Path], output_dir: Path) -> Path:
    """Write the report of these runs as README.md in the directory, with the drawings beside it, and return its path.

    Raises ValueError for a file that is no run.
    """
    runs = [Run(path) for path in json_paths]
    output_dir.mkdir(parents=True, exist_ok=True)
    drawings = {run.stem: draw(run.records, about(run), output_dir / run.stem) for run in runs}
    path = output_dir / "README.md"
    path.write_text(text(runs, drawings, SUMMARY.read_text()))
    return path


def about(run: Run) -> str:
    """One line that says what was run, and on what."""
    versions = run.machine["packages"]
    return f"{run.title}, asgiref {versions['asgiref']}, {run.machine['cores']} cores, {run.machine['date'][:10]}"


def text(runs: Sequence[Run], drawings: Mapping[str, Sequence[str]], summary: str) -> str:
    """Return the report. drawings: the names of those that there are, by the run's stem."""
    parts = ["# Benchmarks", summary.strip(), *targets(runs), "## How to read this", READING]
    for run in runs:
        parts += [f"## {run.title}", machine(run), *_left_out(run)]
        parts += [_drawing(run, name) for name in drawings[run.stem]]
        parts += ["### Where wsgi-loop loses", losses(run)]
        parts += [*against_sync(run), *entries(run)]
        parts += _tables(run)
    return "\n\n".join(parts) + "\n"


def _drawing(run: Run, name: str) -> str:
    title = {
        "ratios": "The time per request of each contender, against that of Django's own handler",
        "growth": "The time per request along the requests to one thread",
        "rps": "Requests per second at concurrency 32",
    }[name]
    return f"![{title}: the tables below have the numbers]({run.stem}-{name}.svg)"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """Return a table, the first columns of which are names."""
    lines = [heading, ["---"] * names + ["---:"] * (len(heading) - names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def targets(runs: Sequence[Run]) -> list[str]:
    """What was to be reached beside what was, for each run."""
    parts = ["## Ratios to Django's own handler, and the most they should be"]
    for run in runs:
        if not run.is_at_handler:
            continue
        rows = []
        for row in ROWS:
            figures = {
                name: run.figures(row.where, row.workload, name) for name in itertools.chain(["stock"], SCOPES, BESIDE)
            }
            rows.append(
                [
                    row.title,
                    row.of_stock(figures["stock"]),
                    *(
                        _reached(figures[scope].get(row.figure), most)
                        for scope, most in zip(SCOPES, row.most, strict=True)
                    ),
                    *(Column("", row.figure, ".2f").write(figures[name]) for name in BESIDE),
                ]
            )
        parts += [f"{run.title}:", _table(["workload", "stock", *SCOPES.values(), *BESIDE.values()], rows)]
    return parts


def _reached(value: float | None, most: float | None) -> str:
    """The value beside the most that it should be: of as many digits as tell on which side of it it is."""
    if most is None:
        return "" if value is None else f"{value:.2f}"
    if value is None:
        return f"not measured (≤ {most:.2f})"
    written = f"{value:.3f}" if most > 1 else f"{value:.2f}"
    if value > most:
        # Not rounded down to the target that was missed.
        while float(written) <= most:
            written = f"{value:.{len(written) - 1}f}"
        return f"**{written}** (missed: ≤ {most:.2f})"
    return f"{written} (≤ {most:.2f})"


def machine(run: Run) -> str:
    """Say what the run was made on."""
    known = run.machine
    packages = ", ".join(f"{name} {version}" for name, version in known["packages"].items() if version is not None)
    absent = ", ".join(name for name, version in known["packages"].items() if version is None)
    memory = f", {known['memory_mb'] / 1024:,.0f} GB" if known["memory_mb"] is not None else ""
    load = " ".join(map(str, known["load"]))
    lines = [
        f"{known['date']}, commit {known['commit'] or 'not known'}; load averages before the run: {load}.",
        f"{known['processor']}, {known['cores']} cores{memory}, {known['system']}.",
        f"{packages}{f' (not installed: {absent})' if absent else ''}.",
    ]
    if known["load"][0] > known["cores"] / 2:
        lines.append(
            "**The machine was busy when the run began**: times and ratios are not to be relied on. Have it run again "
            "on an idle one."
        )
    if run.options.get("quick"):
        lines.append("A quick run: a first look, with too few requests to compare by.")
    return "\n".join(lines)


def _left_out(run: Run) -> list[str]:
    left_out: Mapping[str, str] = run.options.get("left_out") or {}
    return ["\n".join(f"- {name} is left out: {why}" for name, why in left_out.items())] if left_out else []


def losses(run: Run) -> str:
    """Each workload and scope in which wsgi-loop does worse than a rival, by the run's numbers, however little.

    With uvloop it is compared with an ASGI worker that has it too.
    """
    rows = []
    for workload, (scope, title), (suffix, on) in itertools.product(
        WORKLOADS, SCOPES.items(), (("", ""), ("_uvloop", ", uvloop"))
    ):
        ours = run.figures(HANDLER, workload, f"{scope}{suffix}")
        compared = [
            (column, f"at the handler, {rival}", ours, run.figures(HANDLER, workload, rival))
            for column in ((MEDIAN, CPU) if workload == "stream" else (MEDIAN,))
            for rival in ("stock", "asgi", "a2wsgi")
        ]
        ours = run.figures(SERVER, workload, f"{scope}{suffix}", GTHREAD)
        compared += [
            (column, f"{server}, {rival}", ours, run.figures(SERVER, workload, rival, server))
            for column in LOSING_COLUMNS
            for server, rival in ((GTHREAD, "stock"), (f"{GUNICORN_ASGI}{on}", "asgi"))
        ]
        for column, against, here, there in compared:
            if ratio := _lost(column.figure, here, there):
                row = [f"{title}{on}", against, column.heading, column.write(here), column.write(there)]
                rows.append([workload, *row, f"{ratio:.2f}"])
    if not rows:
        return "Nowhere, in what was measured."
    return _table(["workload", "wsgi-loop", "against", "figure", "wsgi-loop's", "theirs", "ratio"], rows, names=4)


def _lost(figure: str, ours: Figures, theirs: Figures) -> float | None:
    """The ratio of our figure to theirs, if it is worse."""
    ratio = _ratio(figure, ours, theirs)
    if ratio is None or not (ratio < 1 if figure == "rps" else ratio > 1):
        return None
    return ratio


def _ratio(figure: str, ours: Figures, theirs: Figures) -> float | None:
    here, there = ours.get(figure), theirs.get(figure)
    return None if here is None or there is None else here / there


def against_sync(run: Run) -> list[str]:
    """What async code costs beside the same in a sync view, with each contender: none without figures."""
    rows = []
    for name, contender in CONTENDERS.items():
        cells: list[str] = []
        for workload, _, sync, _ in AGAINST_SYNC:
            here, there = (run.figures(HANDLER, each, name) for each in (workload, sync))
            ratio = _ratio(MEDIAN.figure, here, there)
            cells += [MEDIAN.write(there), MEDIAN.write(here), "" if ratio is None else f"{ratio:.2f}"]
        if contender.interface != "call" and any(cells):
            rows.append([contender.title, *cells])
    if not rows:
        return []
    headings = [[f"{sync}, µs", f"{title}, µs", "ratio"] for _, title, _, sync in AGAINST_SYNC]
    return ["### Against a sync view", _table(["", *itertools.chain(*headings)], rows)]


def entries(run: Run) -> list[str]:
    """How many functions of wsgi-loop are in the way of a request: none without figures."""
    found = [each for name in WORKLOADS for each in run.of(HANDLER, name) if "entries" in each["figures"]]
    if not found:
        return []
    rows = [[_title(record), *(column.write(record["figures"]) for column in ENTRY_COLUMNS)] for record in found]
    return [
        "### Functions of wsgi-loop that one warm async view enters",
        "An entry is a call, or a step of a coroutine, on any thread.",
        _table(["", *(column.heading for column in ENTRY_COLUMNS)], rows),
    ]


def _tables(run: Run) -> list[str]:
    parts: list[str] = []
    for name, workload in WORKLOADS.items():
        tables: list[str] = []
        at_handler = (*HANDLER_COLUMNS, GROWTH_COLUMN) if name == "growth" else HANDLER_COLUMNS
        by_place: list[tuple[str, str, tuple[Column, ...]]] = [
            (HANDLER, "At the handler", at_handler),
            (INSTRUCTIONS, "Instructions per request", INSTRUCTION_COLUMNS),
        ]
        for where, what, columns in by_place:
            if found := run.of(where, name):
                rows = [[_title(record), *(column.write(record["figures"]) for column in columns)] for record in found]
                tables += [f"{what}:", _table(["", *(column.heading for column in columns)], rows)]
        if found := run.of(SERVER, name):
            rows = [
                [
                    record["server"],
                    _title(record),
                    *(column.write(record["figures"]) for column in SERVER_COLUMNS),
                    _errors(record),
                    _spread(record),
                ]
                for record in found
            ]
            headings = [*(column.heading for column in SERVER_COLUMNS), "errors", "requests/s by round"]
            tables += ["Over HTTP:", _table(["server", "", *headings], rows, names=2)]
            if failures := [f"- Failed: {record['failed']}" for record in found if record["failed"]]:
                tables.append("\n".join(failures))
        if tables:
            parts += [f"### {workload.title[0].upper()}{workload.title[1:]} (`{name}`)", *tables]
    return parts


def _errors(record: Record) -> str:
    if record["failed"]:
        return "**failed** in some rounds" if record["samples"] else "**failed**"
    errors = record["figures"]["errors"]
    return f"**{errors}**" if errors else "0"


def _spread(record: Record) -> str:
    """The rounds' requests per second, from the lowest: how much they differ tells what a difference is worth."""
    return " ".join(f"{rate:,.0f}" for rate in sorted(record["samples"]))


def _title(record: Record) -> str:
    contender = CONTENDERS.get(record["contender"])
    return contender.title if contender else record["contender"]
