"""Promise 2, in instructions: they tell the same on every machine, busy or not, where a clock does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
FEW, MANY = 20, 60

pytestmark = pytest.mark.instructions


def instructions_per_request(workload: str, seed: int) -> dict[str, float]:
    """Count for both handlers, in processes that are alike up to the first request."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_", "COVERAGE_"))
    } | {"PYTHONHASHSEED": str(seed)}
    valgrind = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
    arguments = (workload, str(seed), str(FEW), str(MANY))
    ran = subprocess.run(
        [*valgrind, sys.executable, "-m", "tests.instructions_app", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    collected = dict(re.findall(r"^==(\d+)== Collected : (\d+)", ran.stderr, re.MULTILINE))
    counts = {}
    for line in ran.stdout.splitlines():
        pid, which, requests = line.split()
        counts[which, int(requests)] = int(collected[pid])
    return {which: (counts[which, MANY] - counts[which, FEW]) / (MANY - FEW) for which in ("stock", "wsgi-loop")}


@pytest.mark.parametrize(("workload", "seeds", "bound"), [("bare", 4, 1.06), ("default", 8, 1.02)])
def test_a_sync_request_executes_hardly_more_instructions_than_stock(
    workload: str, seeds: int, bound: float, record_property: Callable[[str, object], None]
) -> None:
    if shutil.which("valgrind") is None:
        reason = "there is no valgrind to count instructions with: install the package valgrind"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        counted = list(executor.map(lambda seed: instructions_per_request(workload, seed), range(seeds)))
    stock, ours = (mean(each[which] for each in counted) for which in ("stock", "wsgi-loop"))
    told = f"{workload}: stock {stock:,.0f}, wsgi-loop {ours:,.0f} instructions a request ({ours / stock:.4f} times)"
    record_property("instructions", told)
    print(told)
    assert ours <= bound * stock, f"{told}; at most {bound} times is promised"
