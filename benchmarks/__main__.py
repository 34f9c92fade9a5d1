"""The command: `python -m benchmarks`, from the root of a checkout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import contenders, handler, instructions, machine, report, servers, workloads
from .contenders import CONTENDERS, Contender
from .workloads import WORKLOADS, Workload

#: Over HTTP, in a quick run, unless others are asked for.
QUICK_WORKLOADS = ("stack",)
QUICK_CONTENDERS = ("stock", "request", "process", "asgi")

#: What the table on the terminal shows of each contender, as a heading and a format.
COLUMNS = {
    "median_us": ("median µs", ",.0f"),
    "p99_us": ("p99 µs", ",.0f"),
    "cpu_us": ("CPU µs", ",.0f"),
    "ratio_to_stock": ("to stock", ".2f"),
    "cpu_ratio_to_stock": ("CPU to stock", ".2f"),
    "ratio_to_floor": ("to floor", ".1f"),
    "threads": ("threads", ".2f"),
    "loops": ("loops", ".2f"),
    "syscalls": ("syscalls", ",.0f"),
    "memory_mb": ("memory MB", ",.1f"),
    "growth": ("growth", ".2f"),
    "entries": ("entries", ",.0f"),
}


def table(records: Sequence[handler.Record]) -> str:
    """Return the records of one workload in columns."""
    columns = [key for key in COLUMNS if any(record["figures"].get(key) is not None for record in records)]
    rows = [["", *(COLUMNS[key][0] for key in columns)]]
    for record in records:
        figures = record["figures"]
        rows.append(
            [
                record["contender"],
                *("" if figures.get(key) is None else f"{figures[key]:{COLUMNS[key][1]}}" for key in columns),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure wsgi-loop beside others.")
    parser.add_argument("--quick", action="store_true", help="a run of about a minute, for a first look")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, metavar="CONTENDER", help=f"of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--no-handler", action="store_true", help="leave out what is measured without a server")
    parser.add_argument("--no-http", action="store_true", help="leave out what is measured over HTTP")
    parser.add_argument(
        "--rounds", type=_positive, metavar="N", help="over HTTP, turns of each server: 3, or 1 if quick"
    )
    parser.add_argument("--seconds", type=_positive, metavar="N", help="over HTTP, length of a turn: 3, or 1 if quick")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="DIRECTORY")
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="JSON", help="measure nothing, and write the report of these runs"
    )
    return parser.parse_args(arguments)


def _positive(value: str) -> int:
    if not value.isdecimal() or value == "0":
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number, 1 or more")
    return int(value)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    paths = options.report
    if not paths:
        path = options.output / machine.file_name()
        # Beside those of a run at the handler, which may have been made at another, more quiet time.
        path = path.with_stem(f"{path.stem}-http") if options.no_handler else path
        paths = [path]
        options.output.mkdir(parents=True, exist_ok=True)

        def store(measured: dict[str, Any]) -> None:
            path.write_text(json.dumps(measured, indent=1) + "\n")

        store(run(options, store))
        print(path)
    report.write(paths, options.output)


def run(options: argparse.Namespace, store: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Measure what the options ask for, and return what is stored of it. store: keeps what there is before HTTP begins.

    What can not be measured here is left out: it is told, and stored with its reason.
    """
    wanted = [WORKLOADS[name] for name in options.only or WORKLOADS]
    among = [CONTENDERS[name] for name in options.contenders or CONTENDERS]
    left_out = {each.name: why for each in wanted if (why := workloads.missing(each))}
    left_out |= {each.name: why for each in among if (why := contenders.missing(each))}
    wanted = [each for each in wanted if each.name not in left_out]
    among = [each for each in among if each.name not in left_out]
    # As it is before the run: the load is of now.
    result: dict[str, Any] = {"machine": machine.describe()}
    records: list[handler.Record] = []
    if not options.no_handler:
        records += measure_handlers(wanted, among, options.quick)
        if options.quick:
            left_out["instructions"] = "they take some minutes: only a full run counts them"
        elif why := instructions.missing():
            left_out["instructions"] = why
        else:
            records += count_instructions(wanted)
    stored = {name: getattr(options, name) for name in ("quick", "only", "contenders", "rounds", "seconds")}
    result |= {"options": stored | {"left_out": left_out}, "records": records}
    if not options.no_http:
        store(result)
        if why := servers.missing():
            left_out["http"] = why
        else:
            records += measure_servers(wanted, among, options)
    for name, why in left_out.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    result["options"]["left_out"] = left_out
    return result


def measure_handlers(wanted: Sequence[Workload], among: Sequence[Contender], quick: bool) -> list[handler.Record]:
    records = []
    total = sum(handler.requests(workload, quick) for workload in wanted) * len(among)
    with workloads.prepared(wanted) as environ, tqdm(total=total, unit="request") as bar:
        for workload in wanted:
            bar.set_description(workload.name)
            measured = handler.measure(workload, among, environ, quick=quick, progress=bar.update)
            bar.write(f"\n{workload.title} ({workload.name})\n{table(measured)}")
            records += measured
    return records


def count_instructions(wanted: Sequence[Workload]) -> list[handler.Record]:
    counted = [workload.name for workload in wanted if workload.name in instructions.COUNTED]
    records = []
    for name in tqdm(counted, desc="instructions", unit="workload"):
        records += instructions.measure(name)
    return records


def measure_servers(
    wanted: Sequence[Workload], among: Sequence[Contender], options: argparse.Namespace
) -> list[handler.Record]:
    def progress(turns: list[servers.Turn]) -> Iterator[servers.Turn]:
        with tqdm(turns, unit="turn") as bar:
            for turn in bar:
                bar.set_description(str(turn))
                yield turn

    names = [contender.name for contender in among if not options.quick or contender.name in QUICK_CONTENDERS]
    if not options.only:
        wanted = [each for each in wanted if (each.name in QUICK_WORKLOADS if options.quick else each.over_http)]
    return servers.measure(
        names,
        [workload.name for workload in wanted],
        rounds=options.rounds or (1 if options.quick else 3),
        seconds=options.seconds or (1 if options.quick else 3),
        servers=servers.QUICK_SERVERS if options.quick else tuple(servers.SERVERS),
        progress=progress,
    )


if __name__ == "__main__":
    try:
        main()
    except (handler.Failed, ValueError) as exc:
        sys.exit(f"The benchmark failed: {exc}")
