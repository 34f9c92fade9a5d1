"""A grid of 200 columns from PostgreSQL, exported under a real gunicorn: memory, order, early ends and throughput.

The site is `streaming_site`. The long tests run with 100,000 rows; `pytest -m long -rP` prints what they measured.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import select
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ..servers.support import ROOT, eventually, free_port, running
from .support import made_database

MODULE = "tests.services.streaming_site"
OURS = "wsgi_loop.wsgi:application"
STOCK = "django.core.wsgi:get_wsgi_application()"
#: How many rows the suite exports, and how many the long tests.
FEW = 20_000
MANY = int(os.environ.get("WSGI_LOOP_TEST_ROWS", "100000"))
#: How often the long test measures the throughput.
ROUNDS = int(os.environ.get("WSGI_LOOP_TEST_ROUNDS", "1"))
MB = 1_000_000

ROWS = pytest.mark.parametrize("rows", [FEW, pytest.param(MANY, marks=pytest.mark.long)])
numbers = itertools.count()
#: For each way, which is a site's name and a path: the exports, and the seconds of CPU that each took the worker.
Found = dict[tuple[str, str], list[tuple["Export", float]]]


@pytest.fixture(scope="module")
def database(postgres_server: psycopg.Connection[Any], request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database with the grid, of as many rows as the tests that were selected ask for."""
    environment = {"folder": "", "postgres": "", "wsgi_loop": {}}
    long = any(item.get_closest_marker("long") for item in request.session.items if item.module is request.module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SITE", json.dumps(environment))
        from .streaming_site import make_table
    with made_database(postgres_server) as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(make_table(MANY if long else FEW))
        yield url


@dataclass
class Export:
    """What a client got, and when: `first` and `seconds` since its request."""

    size: int
    checksum: int
    first: float
    seconds: float


@dataclass
class Site:
    """One worker with one thread, so that each request finds the database connection of the one before it."""

    port: int
    folder: Path

    def connect(self, timeout: float = 120) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def look(self, path: str = "/look") -> Any:
        with closing(self.connect()) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200
            return json.loads(response.read())

    def export(self, path: str) -> Export:
        size = checksum = 0
        first = 0.0
        with closing(self.connect()) as connection:
            began = time.monotonic()
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200
            while data := response.read1(MB):
                first = first or time.monotonic() - began
                size += len(data)
                checksum = zlib.crc32(data, checksum)
        return Export(size, checksum, first, time.monotonic() - began)

    def note(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


@contextmanager
def served(
    folder: Path, database: str, application: str = OURS, scope: str = "request", worker: str = "gthread"
) -> Iterator[Site]:
    port = free_port()
    folder = folder / str(next(numbers))
    folder.mkdir()
    told = {"folder": str(folder), "postgres": database, "wsgi_loop": {"SCOPE": scope}}
    environment = {
        "SITE": json.dumps(told),
        "DJANGO_SETTINGS_MODULE": MODULE,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        # gunicorn may put a socket there.
        "HOME": str(folder),
    }
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--timeout", "300"]
    command += ["--workers", "1", "--threads", "1", "--worker-class", worker, application]
    site = Site(port, folder)

    def is_up() -> bool:
        try:
            return bool(site.look())
        except OSError:
            return False

    with running(command, folder, folder / "output.txt", environment, is_up):
        yield site


def memory(process: int, which: str) -> float:
    """VmRSS, what it has now, or VmHWM, the most that it had since `forget_peak`; in MB."""
    match = re.search(rf"^{which}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024 / MB


def forget_peak(process: int) -> None:
    Path(f"/proc/{process}/clear_refs").write_text("5")


def growth(site: Site, path: str) -> tuple[Export, float]:
    """What the export was, and by how many MB the worker grew at most, after one of three rows."""
    process = site.look()["process"]
    site.export(re.sub(r"rows=\d+", "rows=3", path))
    forget_peak(process)
    before = memory(process, "VmRSS")
    export = site.export(path)
    return export, memory(process, "VmHWM") - before


@ROWS
def test_the_body_is_never_in_memory(tmp_path: Path, database: str, rows: int) -> None:
    path = f"/export?rows={rows}"
    with served(tmp_path, database) as site:
        ours, grown = growth(site, path)
    with served(tmp_path, database, STOCK) as site:
        stock, stock_grown = growth(site, path)
    with served(tmp_path, database) as site:
        sync, sync_grown = growth(site, f"/export_sync?rows={rows}")
    print(f"{rows} rows, {ours.size / MB:.1f} MB: grown by {grown:.1f} MB, stock by {stock_grown:.1f} MB, ", end="")
    print(f"a sync generator by {sync_grown:.1f} MB")
    assert (ours.size, ours.checksum) == (stock.size, stock.checksum) == (sync.size, sync.checksum)
    assert ours.size > rows * 1600
    assert grown < 20
    # What is not is to be seen.
    assert stock_grown > stock.size / MB / 2


def test_the_first_byte_arrives_while_the_last_chunk_is_not_made(tmp_path: Path, database: str) -> None:
    path = f"/export_with_a_gate?rows={FEW}"
    with served(tmp_path, database) as site, closing(site.connect(30)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        first = response.read(1)
        assert first == b"1"
        (site.folder / "open").touch()
        body = first + response.read()
        assert body.count(b"\r\n") == FEW
        assert (site.folder / "at-the-gate").exists()


def test_stock_sends_nothing_until_the_last_chunk_is_made(tmp_path: Path, database: str) -> None:
    """So the test above can fail."""
    with served(tmp_path, database, STOCK) as site, closing(site.connect()) as connection:
        connection.request("GET", f"/export_with_a_gate?rows={FEW}")
        eventually((site.folder / "at-the-gate").exists)
        assert not select.select([connection.sock], [], [], 0)[0]
        (site.folder / "open").touch()
        assert connection.getresponse().read().count(b"\r\n") == FEW


@pytest.mark.parametrize(("worker", "scope"), [("sync", "request"), ("gthread", "request"), ("gthread", "process")])
def test_a_client_that_goes_away(tmp_path: Path, database: str, worker: str, scope: str) -> None:
    with served(tmp_path, database, scope=scope, worker=worker) as site:
        before = site.look()
        with closing(site.connect()) as connection:
            connection.request("GET", f"/export_until_the_end?rows={FEW}")
            response = connection.getresponse()
            assert len(response.read(MB)) == MB
            response.close()
        left = time.monotonic()
        eventually((site.folder / "finished").exists)
        note = site.note("finished")
        print(f"{worker}, {scope}: the finally had run {note['finally'] - left:.3f} s after the client had left")
        # Of what the client has not read, only what the sockets hold was made.
        assert note["made"] < FEW
        # While it streamed there was one to be seen, in request_finished and after it there is none, ...
        assert note["streaming"] == 1
        assert note["cursors"] == 0
        assert site.look() == before
        # ... and it was looked for where one that is left open is seen.
        assert site.look("/leave_a_cursor") == site.look() == before | {"cursors": 1}
        assert site.export(f"/export?rows={FEW}").size > MB


def cpu_seconds(process: int) -> float:
    """What a process has used, in user and in kernel mode."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_turns(sites: dict[str, Site], ways: list[tuple[str, str]]) -> Found:
    """Export each way, one after another, as often as ROUNDS says."""
    processes = {name: site.look()["process"] for name, site in sites.items()}
    for name, path in ways:
        sites[name].export(re.sub(r"rows=\d+", "rows=3", path))
    found: Found = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for name, path in ways:
            before = cpu_seconds(processes[name])
            export = sites[name].export(path)
            found[name, path].append((export, cpu_seconds(processes[name]) - before))
    return found


def tell(found: Found, record_property: Callable[[str, object], None]) -> None:
    """Tell the medians, which are not asserted: what is, is that each way sends the same."""
    for (name, path), measured in found.items():
        speed = statistics.median(export.size / MB / export.seconds for export, _ in measured)
        first = statistics.median(export.first for export, _ in measured)
        cpu = statistics.median(seconds for _, seconds in measured)
        told = f"{name} {path}: {speed:.1f} MB/s, the first byte after {first:.2f} s, {cpu:.2f} s of CPU"
        print(f"{told} (median of {ROUNDS})")
        record_property(f"{name} {path}", told)
    assert len({(export.size, export.checksum) for measured in found.values() for export, _ in measured}) == 1


@pytest.mark.long
def test_throughput(tmp_path: Path, database: str, record_property: Callable[[str, object], None]) -> None:
    ways = [(name, f"/{view}?rows={MANY}") for name in ("stock", "request") for view in ("export", "export_sync")]
    ways.append(("process", f"/export?rows={MANY}"))
    with ExitStack() as stack:
        sites = {"stock": stack.enter_context(served(tmp_path, database, STOCK))}
        for scope in ("request", "process"):
            sites[scope] = stack.enter_context(served(tmp_path, database, scope=scope))
        tell(in_turns(sites, ways), record_property)


@pytest.mark.long
def test_what_chunks_cost(tmp_path: Path, database: str, record_property: Callable[[str, object], None]) -> None:
    sizes = [1, *(4**exponent * 1024 for exponent in range(1, 6))]
    ways = [("request", f"/export?rows={FEW}&chunk={size}") for size in sizes]
    ways += [("stock", f"/export_sync?rows={FEW}&chunk={size}") for size in sizes]
    with served(tmp_path, database) as ours, served(tmp_path, database, STOCK) as stock:
        tell(in_turns({"request": ours, "stock": stock}, ways), record_property)
