"""Counts the instructions that a request executes, with valgrind, for `python -m benchmarks` and for a test.

They tell the same on every machine, busy or not, where a clock does not. Knows what `benchmarks.instructions_app`
prints.

python -m benchmarks.instructions PAGE

Counts, and writes what was counted into the table of this page, into the rows of this Python and this Django.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path
from statistics import mean
from typing import Any

import django

ROOT = Path(__file__).parents[1]
FEW, MANY = 20, 60

#: By the workload's name here: its name in the app, and how many seeds it takes for a mean that stands.
COUNTED = {"sync_bare": ("bare", 4), "sync_default": ("default", 8), "async_view": ("async", 2)}


def missing() -> str:
    """Say how to get valgrind; "" if it is there."""
    if shutil.which("valgrind"):
        return ""
    return "there is no valgrind to count instructions with: install the package valgrind"


def per_request(workload: str) -> dict[str, float]:
    """Count for each handler of the app, as the mean of some seeds."""
    name, seeds = COUNTED[workload]
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        counted = list(executor.map(lambda seed: _per_request(name, seed), range(seeds)))
    return {which: mean(each[which] for each in counted) for which in counted[0]}


def _per_request(name: str, seed: int) -> dict[str, float]:
    """Count for each handler, in processes that are alike up to the first request."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_", "COVERAGE_"))
    } | {"PYTHONHASHSEED": str(seed)}
    valgrind = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
    arguments = (name, str(seed), str(FEW), str(MANY))
    ran = subprocess.run(
        [*valgrind, sys.executable, "-m", "benchmarks.instructions_app", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"Counting instructions of {name!r} with seed {seed} failed:\n{ran.stderr}")
    collected = dict(re.findall(r"^==(\d+)== Collected : (\d+)", ran.stderr, re.MULTILINE))
    counts: dict[str, dict[int, int]] = {}
    for line in ran.stdout.splitlines():
        pid, which, requests = line.split()
        counts.setdefault(which, {})[int(requests)] = int(collected[pid])
    return {which: (count[MANY] - count[FEW]) / (MANY - FEW) for which, count in counts.items()}


def measure(workload: str) -> list[dict[str, Any]]:
    """Return a record for each handler, with its instructions per request and their ratio to Django's handler."""
    counted = per_request(workload)
    return [
        {
            "where": "instructions",
            "server": None,
            "workload": workload,
            "contender": which,
            "figures": {"instructions": count, "ratio_to_stock": count / counted["stock"]},
        }
        for which, count in counted.items()
    ]


TITLES = {"sync_bare": "sync view, no middleware", "sync_default": "sync view", "async_view": "async view"}
HEADING = "| Python | Django | request | `stock` | `request` | `process` |\n| --- | --- | --- | ---: | ---: | ---: |\n"


def with_rows(page: str, python: str, django_: str, counted: dict[str, dict[str, float]]) -> str:
    """Return a page whose table has these rows in place of those of the same two versions.

    counted: by workload and handler. Raises ValueError if there is no such table.
    """
    before, heading, rest = page.partition(HEADING)
    if not heading:
        raise ValueError(f"There is no table with the heading {HEADING.splitlines()[0]!r}.")
    rows = list(takewhile(lambda line: line.startswith("|"), rest.splitlines()))
    after = rest.splitlines()[len(rows) :]
    rows = [row for row in rows if not row.startswith(f"| {python} | {django_} |")]
    for workload, counts in counted.items():
        stock = counts["stock"]
        ours = [f"{counts[scope]:,.0f} ({counts[scope] / stock:.3f})" for scope in ("request", "process")]
        rows.append(f"| {python} | {django_} | {TITLES[workload]} | {stock:,.0f} | {' | '.join(ours)} |")
    # Stable: the workloads of two versions stay in order.
    rows.sort(key=lambda row: [int(number) for number in re.findall(r"\d+", " ".join(row.split("|")[1:3]))])
    return before + heading + "".join(f"{line}\n" for line in [*rows, *after])


def main(page: Path) -> None:
    if reason := missing():
        raise SystemExit(reason)
    text = page.read_text()
    # Before it counts, which takes minutes.
    with_rows(text, "0", "0", {})
    python, django_ = (f"{version[0]}.{version[1]}" for version in (sys.version_info, django.VERSION))
    counted = {workload: per_request(workload) for workload in COUNTED}
    # Another Python may have written its rows meanwhile.
    page.write_text(with_rows(page.read_text(), python, django_, counted))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
