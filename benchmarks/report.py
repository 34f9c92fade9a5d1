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

#: wsgi-loop's modes: their headings.
MODES = {"own": "own thread", "process": "process", "request": "on the request thread"}

INSTRUCTIONS, HANDLER, SERVER = "instructions", "handler", "server"
GTHREAD, GUNICORN_ASGI = "gunicorn gthread", "gunicorn asgi"


class Target(NamedTuple):
    """What wsgi-loop is to reach: a figure of a workload that may be at most so much in each of the `MODES`."""

    title: str
    where: str
    workload: str
    figure: str
    most: tuple[float, float, float]


TARGETS = (
    Target("sync view, bare (instructions)", INSTRUCTIONS, "sync_bare", "ratio_to_stock", (1.06, 1.06, 1.06)),
    Target(
        "sync view, default middleware (instructions)",
        INSTRUCTIONS,
        "sync_default",
        "ratio_to_stock",
        (1.02, 1.02, 1.02),
    ),
    Target("async view", HANDLER, "async_view", "ratio_to_stock", (0.70, 0.42, 0.45)),
    Target("stack", HANDLER, "stack", "ratio_to_stock", (0.50, 0.42, 0.30)),
    Target("ORM, 5 queries (SQLite)", HANDLER, "orm_sqlite", "ratio_to_stock", (0.85, 0.70, 0.45)),
    Target("5 sync calls that do nothing", HANDLER, "calls", "ratio_to_stock", (0.85, 0.70, 0.45)),
    Target("growth: request 3,000 against request 100", HANDLER, "growth", "growth", (1.1, 1.1, 1.1)),
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
    Column("to stock", "ratio_to_stock", ".2f"),
    Column("to the floor", "ratio_to_floor", ".1f"),
    Column("CPU µs", "cpu_us", ",.0f"),
    Column("threads started", "threads", ".2f"),
    Column("loops made", "loops", ".2f"),
    Column("system calls", "syscalls", ",.0f"),
    Column("memory MB", "memory_mb", ",.1f"),
)
GROWTH_COLUMN = Column("growth", "growth", ".2f")
INSTRUCTION_COLUMNS = (Column("instructions", "instructions", ",.0f"), Column("to stock", "ratio_to_stock", ".4f"))
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
        for target in TARGETS:
            cells = []
            for mode, most in zip(MODES, target.most, strict=True):
                value = run.figures(target.where, target.workload, mode).get(target.figure)
                cells.append(_reached(value, most))
            rows.append([target.title, *cells])
        parts += [f"{run.title}:", _table(["workload", *MODES.values()], rows)]
    return parts


def _reached(value: float | None, most: float) -> str:
    """The value beside its target: of as many digits as tell on which side of it it is."""
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
    """Each workload and mode in which wsgi-loop does worse than a rival, by the run's numbers, however little.

    With uvloop it is compared with an ASGI worker that has it too.
    """
    rows = []
    for workload, (mode, title), (suffix, on) in itertools.product(
        WORKLOADS, MODES.items(), (("", ""), ("_uvloop", ", uvloop"))
    ):
        ours = run.figures(HANDLER, workload, f"{mode}{suffix}")
        compared = [
            (column, f"at the handler, {rival}", ours, run.figures(HANDLER, workload, rival))
            for column in HANDLER_COLUMNS[:1]
            for rival in ("stock", "asgi", "a2wsgi")
        ]
        ours = run.figures(SERVER, workload, f"{mode}{suffix}", GTHREAD)
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
    here, there = ours.get(figure), theirs.get(figure)
    if here is None or there is None or not (here < there if figure == "rps" else here > there):
        return None
    return here / there


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
