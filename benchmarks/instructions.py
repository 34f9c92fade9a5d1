"""Counts the instructions that a request executes, with valgrind, for `python -m benchmarks` and for a test.

They tell the same on every machine, busy or not, where a clock does not. Knows what `benchmarks.instructions_app`
prints.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

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
