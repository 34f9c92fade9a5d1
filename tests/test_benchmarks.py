"""`benchmarks/`: what is counted is exact, a wrong answer ends the run, and unknown names are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contenders, handler, instructions, workloads
from benchmarks.contenders import CONTENDERS
from benchmarks.workloads import WORKLOADS

from .support import eventually

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent


def few(name: str, **changes: Any) -> workloads.Workload:
    """A workload of some turns."""
    return dataclasses.replace(WORKLOADS[name], quick_rounds=4, **changes)


def measure(workload: workloads.Workload, *names: str) -> dict[str, dict[str, Any]]:
    """Return the figures of these contenders."""
    with workloads.prepared([workload]) as environ:
        records = handler.measure(workload, [CONTENDERS[name] for name in names], environ, quick=True)
    assert all(record["workload"] == workload.name and record["where"] == "handler" for record in records)
    return {record["contender"]: record["figures"] for record in records}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("tqdm", reason="the command needs the extra: pip install 'wsgi-loop[benchmarks]'")
    pytest.importorskip("matplotlib", reason="the command needs the extra: pip install 'wsgi-loop[benchmarks]'")
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def environ() -> Iterator[dict[str, str]]:
    with workloads.prepared([WORKLOADS["async_view"]]) as variables:
        yield variables


def test_threads_and_loops_are_counted() -> None:
    figures = measure(few("stack"), "stock", "shared_loop", "request", "process", "floor")
    counted = {name: (each["threads"], each["loops"]) for name, each in figures.items()}
    # Started and finished signals are one each; asgiref runs the view in the loop of the outermost middleware.
    assert counted == {
        "stock": (3, 3),
        "shared_loop": (1, 1),
        "request": (0, 1),
        "process": (0, 0),
        "floor": (0, 0),
    }


def test_times_are_told_with_their_ratios() -> None:
    figures = measure(few("async_view", counted=3), "stock", "request", "floor")
    for each in figures.values():
        assert each["requests"] == 12
        assert 0 < each["median_us"] <= each["p99_us"]
        assert each["ratio_to_stock"] == pytest.approx(each["median_us"] / figures["stock"]["median_us"])
        assert each["ratio_to_floor"] == pytest.approx(each["median_us"] / figures["floor"]["median_us"])
        assert each["cpu_us"] > 0
        assert each["cpu_ratio_to_stock"] == pytest.approx(each["cpu_us"] / figures["stock"]["cpu_us"])


def test_without_stock_there_is_no_ratio_to_it() -> None:
    figures = measure(few("sync_bare"), "request")["request"]
    assert figures["ratio_to_stock"] is figures["cpu_ratio_to_stock"] is None


@pytest.mark.parametrize("name", ["async_to_sync", "orm_sqlite", "orm_sync_sqlite"])
def test_every_contender_answers_the_same(name: str) -> None:
    there = [name for name, contender in CONTENDERS.items() if not contenders.missing(contender)]
    assert list(measure(few(name), *there)) == there


@pytest.mark.parametrize("name", ["request", "process"])
def test_what_is_gathered_with_a_sync_call_goes_on_beside_it(name: str) -> None:
    def median() -> float:
        took: float = measure(dataclasses.replace(WORKLOADS["gather"], counted=2), name)[name]["median_us"]
        assert took >= 100_000
        return took

    # One after the other they would always take 0.2 s. (A busy machine may take that now and then.)
    eventually(lambda: median() < 180_000)


def test_functions_are_counted_that_a_request_enters() -> None:
    figures = measure(few("async_view"), "stock", "request", "process", "floor")
    assert figures["stock"]["entries"] == figures["stock"]["functions"] == figures["stock"]["modules"] == 0
    for name in ("request", "process"):
        counted = figures[name]
        # `WSGIHandler.__call__` and what it calls are in other modules.
        assert 1 < counted["modules"] < counted["functions"] <= counted["entries"] < 500
    assert all(figures[name]["asgiref_entries"] > 0 for name in ("stock", "request", "process"))
    assert "entries" not in figures["floor"]
    assert "entries" not in measure(few("sync_bare"), "request")["request"]


def test_instructions_are_written_into_their_rows() -> None:
    page = f"before\n{instructions.HEADING}\nafter\n"
    counts = {"stock": 2_000.0, "request": 1_500.0, "process": 3_000.0}
    for python, workloads_ in (("3.14", ("sync_bare", "async_view")), ("3.9", ("sync_bare",))):
        page = instructions.with_rows(page, python, "6.1", dict.fromkeys(workloads_, counts))
    page = instructions.with_rows(page, "3.14", "6.1", {"sync_bare": counts | {"request": 2_100.0}})
    assert page == (
        f"before\n{instructions.HEADING}"
        "| 3.9 | 6.1 | sync view, no middleware | 2,000 | 1,500 (0.750) | 3,000 (1.500) |\n"
        "| 3.14 | 6.1 | sync view, no middleware | 2,000 | 2,100 (1.050) | 3,000 (1.500) |\n"
        "\nafter\n"
    )
    with pytest.raises(ValueError, match="no table with the heading"):
        instructions.with_rows("before\n", "3.14", "6.1", {})
    # That of the page.
    instructions.with_rows((ROOT / "docs" / "benchmarks.md").read_text(), "3.14", "6.1", {})


def test_a_stream_is_read_to_its_end() -> None:
    figures = measure(few("stream"), "stock", "request", "asgi")
    # Django's handler keeps all of it in memory, and ours a chunk.
    assert figures["stock"]["memory_mb"] > 50 > 10 > figures["request"]["memory_mb"]


def test_growth_has_a_point_for_every_fifty_requests() -> None:
    workload = dataclasses.replace(WORKLOADS["growth"], quick_rounds=15)
    with workloads.prepared([workload]) as environ:
        (record,) = handler.measure(workload, [CONTENDERS["request"]], environ, quick=True)
    assert len(record["samples"]) == 3
    assert record["figures"]["growth"] == record["samples"][2] / record["samples"][1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"path": "/nowhere/"}, r"stock fails in async_view: it answered 404 Not Found where 200 is expected"),
        ({"body": b"other"}, r"it answered 5 bytes that begin with b'plain', where 5 that begin with b'other'"),
        ({"size": 6}, r"it answered 5 bytes that begin with b'plain', where 6 that begin with b'plain'"),
    ],
)
def test_a_wrong_answer_ends_the_run(environ: dict[str, str], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(handler.Failed, match=told):
        handler.measure(few("async_view", **changes), [CONTENDERS["stock"]], environ, quick=True)


def test_a_contender_that_can_not_be_made_ends_the_run(environ: dict[str, str]) -> None:
    broken = dataclasses.replace(CONTENDERS["request"], make=_fail)
    with pytest.raises(handler.Failed, match=r"(?s)request fails in async_view: it failed:.*RuntimeError: not made"):
        handler.measure(few("async_view"), [broken], environ, quick=True)


def _fail() -> Any:
    raise RuntimeError("not made")


def test_a_contender_that_dies_ends_the_run(environ: dict[str, str]) -> None:
    broken = dataclasses.replace(CONTENDERS["request"], make=_die)
    with pytest.raises(handler.Failed, match=r"request died in async_view, with exit code 3"):
        handler.measure(few("async_view"), [broken], environ, quick=True)


def _die() -> Any:
    os._exit(3)


def test_the_command_stores_what_it_measured(tmp_path: Path) -> None:
    ran = run(
        *("--quick", "--no-http", "--only", "sync_bare", "--contenders", "stock", "request"), "--output", str(tmp_path)
    )
    assert ran.returncode == 0, ran.stderr
    (path,) = tmp_path.glob("*.json")
    stored = json.loads(path.read_text())
    assert [record["contender"] for record in stored["records"]] == ["stock", "request"]
    assert stored["options"]["quick"] is True
    assert "instructions" in stored["options"]["left_out"]
    for record in stored["records"]:
        assert f"{record['figures']['median_us']:,.0f}" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--only", "orm"), "invalid choice: 'orm' (choose from 'sync_bare', "),
        (("--contenders", "flask"), "invalid choice: 'flask' (choose from 'stock', "),
        (("--rounds", "0"), "'0' is not a whole number, 1 or more"),
        (("--report", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_is_not_accepted_is_told(arguments: tuple[str, ...], told: str) -> None:
    ran = run(*arguments)
    assert ran.returncode in (1, 2)
    assert told.replace("'", "") in ran.stderr.replace("'", "")
    assert "Traceback" not in ran.stderr
