"""What the report says is what the runs say, and what wrk corrected is taken back."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the report draws with it: pip install -e '.[benchmarks]'")

from benchmarks import machine, report, servers
from benchmarks.handler import Failed
from benchmarks.servers import CONCURRENCY, Load, _Loads, percentile, uncorrected
from benchmarks.workloads import WORKLOADS


def record(where: str, workload: str, contender: str, server: str | None = None, **figures: float) -> dict[str, Any]:
    samples = [figures["rps"] * 0.9, figures["rps"] * 1.1] if "rps" in figures else None
    return {
        "where": where,
        "server": server,
        "workload": workload,
        "contender": contender,
        "figures": figures,
        "samples": samples or [],
        "failed": "" if figures else "it answered 500",
    }


RECORDS = [
    record("handler", "async_view", "stock", median_us=600.0, p99_us=900.0, ratio_to_stock=1.0, entries=0),
    record("handler", "async_view", "request", median_us=300.0, p99_us=700.0, ratio_to_stock=0.5, entries=1234),
    record("handler", "async_view", "process", median_us=252.1, p99_us=400.0, ratio_to_stock=0.4202),
    record("handler", "async_view", "asgi", median_us=290.0, p99_us=400.0, ratio_to_stock=0.4833),
    record("handler", "sync_bare", "stock", median_us=80.0, ratio_to_stock=1.0),
    record("handler", "sync_bare", "request", median_us=75.0, ratio_to_stock=0.9375),
    record("handler", "gather", "process", median_us=106000.0, ratio_to_stock=1.0502),
    record("handler", "stream", "stock", median_us=9000.0, cpu_us=8000.0, cpu_ratio_to_stock=1.0),
    record("handler", "stream", "request", median_us=8000.0, cpu_us=10000.0, cpu_ratio_to_stock=1.25),
    record("instructions", "sync_bare", "stock", instructions=119616.0, ratio_to_stock=1.0),
    record("instructions", "sync_bare", "request", instructions=123456.0, ratio_to_stock=1.0321),
    record("server", "async_view", "stock", "gunicorn gthread", rps=1000.0, p50_us=20000, p99_us=41234, errors=0),
    record("server", "async_view", "request", "gunicorn gthread", rps=1500.0, p50_us=20000, p99_us=50000, errors=0),
    record("server", "async_view", "asgi", "gunicorn asgi", rps=1600.0, p50_us=20000, p99_us=60000, errors=3),
    record("server", "async_view", "a2wsgi", "gunicorn sync"),
    record("server", "async_view", "asgi", "uvicorn", rps=500.0, errors=0) | {"failed": "timed out"},
]


def stored(directory: Path, name: str = "py311-django52.json", records: list[dict[str, Any]] | None = None) -> Path:
    path = directory / name
    run = {"machine": machine.describe(), "options": {"left_out": {"redis": "no Redis"}}, "records": records or RECORDS}
    path.write_text(json.dumps(run))
    return path


def rows(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    table = re.search(r"^\|.*\|$(?:\n^\|.*\|$)+", text[text.index(heading) :], re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[0].splitlines()[2:]]


@pytest.fixture
def text(tmp_path: Path) -> str:
    return report.write([stored(tmp_path)], tmp_path / "out").read_text()


def test_targets_stand_beside_what_was_measured(text: str) -> None:
    table = {name: cells for name, *cells in rows(text, "## Ratios to Django's own handler")}
    assert table["async view"] == ["0.60 ms", "**0.50** (missed: ≤ 0.25)", "0.42", "0.48", ""]
    assert table["sync view, no middleware"] == ["0.08 ms", "0.94", "", "", ""]
    bare = table["sync view, no middleware (instructions)"]
    assert bare == ["119,616", "1.032 (≤ 1.06)", "not measured (≤ 1.06)", "", ""]
    assert table[WORKLOADS["stack"].title] == ["", "not measured (≤ 0.28)", "", "", ""]
    assert table[WORKLOADS["gather"].title] == ["", "not measured (≤ 1.05)", "**1.0502** (missed: ≤ 1.05)", "", ""]
    assert table["async stream of 50 MB (CPU time)"] == ["8.00 ms", "**1.250** (missed: ≤ 1.10)", "", "", ""]


def test_tables_have_the_runs_numbers(text: str) -> None:
    tables = text[text.index("(`async_view`)") :]
    assert ["wsgi-loop, request", "300", "700", "0.50"] in [row[:4] for row in rows(tables, "At the handler:")]
    assert [row[:5] + row[-2:] for row in rows(tables, "Over HTTP:")] == [
        ["gunicorn gthread", "Django's WSGIHandler", "1,000.0", "20.0", "41.2", "0", "900 1,100"],
        ["gunicorn gthread", "wsgi-loop, request", "1,500.0", "20.0", "50.0", "0", "1,350 1,650"],
        ["gunicorn asgi", "Django's ASGIHandler", "1,600.0", "20.0", "60.0", "**3**", "1,440 1,760"],
        ["gunicorn sync", "a2wsgi over ASGIHandler", "", "", "", "**failed**", ""],
        ["uvicorn", "Django's ASGIHandler", "500.0", "", "", "**failed** in some rounds", "450 550"],
    ]
    assert "- Failed: timed out\n" in tables
    assert "- Failed: it answered 500\n" in tables
    assert ["wsgi-loop, request", "123,456", "1.0321"] in rows(text, "Instructions per request:")


def test_losses_are_found(text: str) -> None:
    assert rows(text, "### Where wsgi-loop loses") == [
        ["async_view", "request", "at the handler, asgi", "median µs", "300", "290", "1.03"],
        ["async_view", "request", "gunicorn asgi, asgi", "requests/s", "1,500.0", "1,600.0", "0.94"],
        ["async_view", "request", "gunicorn gthread, stock", "p99 ms", "50.0", "41.2", "1.21"],
        ["stream", "request", "at the handler, stock", "CPU µs", "10,000", "8,000", "1.25"],
    ]


def test_async_views_stand_beside_sync_ones(text: str) -> None:
    assert rows(text, "### Against a sync view") == [
        ["Django's WSGIHandler", "80", "600", "7.50", "", "", ""],
        ["wsgi-loop, request", "75", "300", "4.00", "", "", ""],
        ["wsgi-loop, process", "", "252", "", "", "", ""],
        ["Django's ASGIHandler", "", "290", "", "", "", ""],
    ]


def test_functions_that_are_entered_are_told(text: str) -> None:
    found = rows(text, "### Functions of wsgi-loop that one warm async view enters")
    assert found == [["Django's WSGIHandler", "0", "", "", ""], ["wsgi-loop, request", "1,234", "", "", ""]]


def test_nothing_is_lost_where_nothing_is_worse(tmp_path: Path) -> None:
    path = stored(tmp_path, records=RECORDS[:2])
    assert "Nowhere, in what was measured." in report.write([path], tmp_path).read_text()


def test_it_says_what_it_was_run_on_and_what_was_left_out(text: str) -> None:
    versions = machine.describe()["packages"]
    assert isinstance(versions, dict)
    assert f"Django {versions['Django']}, asgiref {versions['asgiref']}" in text
    assert "- redis is left out: no Redis" in text


@pytest.mark.parametrize(("load", "is_busy"), [(1.9, False), (2.1, True)])
def test_it_says_when_the_machine_was_busy(tmp_path: Path, load: float, is_busy: bool) -> None:
    path = stored(tmp_path)
    run = json.loads(path.read_text())
    run["machine"] |= {"load": [load, 0, 0], "cores": 4}
    path.write_text(json.dumps(run))
    assert ("The machine was busy" in report.write([path], tmp_path).read_text()) is is_busy


def test_the_summary_is_on_top(text: str) -> None:
    assert text.startswith(f"# Benchmarks\n\n{report.SUMMARY.read_text().strip()}\n\n## ")


def test_every_drawing_that_it_shows_is_there(tmp_path: Path) -> None:
    paths = [stored(tmp_path), stored(tmp_path, "py313-django61.json", RECORDS[:4])]
    text = report.write(paths, tmp_path).read_text()
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert shown == ["py311-django52-ratios.svg", "py311-django52-rps.svg", "py313-django61-ratios.svg"]
    for name in shown:
        assert (tmp_path / name).read_text().count("<svg") == 1
        assert (tmp_path / name).with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", ["", "[]", '{"records": []}'])
def test_a_file_that_is_no_run_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.json is not a run.*`python -m benchmarks`"):
        report.write([path], tmp_path)


def corrected_as_by_wrk(latencies: Counter[int], interval: int) -> Counter[int]:
    corrected = latencies.copy()
    for latency in range(2 * interval, max(latencies) + 1):
        for earlier in range(latency - interval, interval, -interval):
            corrected[earlier] += latencies[latency]
    return corrected


def test_latencies_are_those_that_were_seen() -> None:
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    seen = Counter(chance.randrange(50, 150) if chance.random() < 0.9 else chance.randrange(5000) for _ in range(2000))
    duration = 20_000
    corrected = corrected_as_by_wrk(seen, duration // (2000 // CONCURRENCY))
    assert corrected.total() > 2100, seed
    assert uncorrected(corrected, 2000, duration) == seen, seed


def test_latencies_that_were_corrected_in_another_way_are_refused() -> None:
    with pytest.raises(Failed, match="64 requests, but of its 65 latencies 65 are left"):
        uncorrected(Counter({100: 65}), 64, 1000)


def test_figures_are_of_all_rounds() -> None:
    first = Load(100, 1_000_000, 1, Counter({10: 99, 500: 1}), 2000, 50.0)
    second = Load(300, 1_000_000, 2, Counter({20: 298, 600: 2}), 6000, 40.0)
    assert _Loads([first, second]).figures() == {
        "rps": 200,
        "p50_us": 20,
        "p99_us": 20,
        "cpu_us": 20,
        "peak_mb": 50.0,
        "errors": 3,
    }


def test_percentiles_without_requests() -> None:
    assert percentile(Counter(), 0.99) is None


@pytest.mark.skipif(bool(servers.missing()), reason=f"{servers.missing()}")
def test_servers_are_measured() -> None:
    pytest.importorskip("gunicorn", reason="it is a server that is measured")
    (measured,) = servers.measure(["stock", "asgi"], ["sync_bare"], rounds=1, seconds=1, servers=["gunicorn sync"])
    assert (measured["where"], measured["server"], measured["workload"], measured["contender"]) == (
        "server",
        "gunicorn sync",
        "sync_bare",
        "stock",
    )
    figures = measured["figures"]
    assert figures["errors"] == 0
    assert measured["samples"] == [figures["rps"]]
    # 32 clients, each of which waits for its answer, are told apart from one by Little's law.
    assert figures["rps"] * figures["p99_us"] / 1e6 > CONCURRENCY / 2


@pytest.mark.skipif(bool(servers.missing()), reason=f"{servers.missing()}")
def test_a_wrong_answer_over_http_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gunicorn", reason="it is a server that is measured")
    wrong = dataclasses.replace(WORKLOADS["sync_bare"], body=b"other")
    monkeypatch.setitem(WORKLOADS, "sync_bare", wrong)
    with pytest.raises(
        Failed, match=r"sync_bare: gunicorn sync, request: .* status 200 and 5 bytes .* b'plain', .* b'other'"
    ):
        servers.measure(["request"], ["sync_bare"], rounds=1, seconds=1, servers=["gunicorn sync"])
