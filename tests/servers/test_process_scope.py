"""Scope "process" under a real gunicorn: the clients of a module serve all requests of a worker, and its end is clean.

The site is `process_site`.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings

from ..services.support import (
    connected_postgres,
    connected_redis,
    count_postgres_connections,
    count_redis_connections,
    made_database,
)
from .support import ROOT, ServerProcess, eventually, free_port, running

pytestmark = pytest.mark.long

#: How many requests the pools have to stand.
REQUESTS = int(os.environ.get("WSGI_LOOP_TEST_REQUESTS", "10000"))
REDIS_MAX, POSTGRES_MAX, HTTP_MAX = 8, 4, 8  # those of the site

MODULE = "tests.servers.process_site"
OURS = "wsgi_loop.wsgi:application"
STOCK = "django.core.wsgi:get_wsgi_application()"
# What stock's threads wait for never comes.
AT_ONCE = ["--graceful-timeout", "1"]

# The views ask the worker if it has been told to stop.
GUNICORN_CONFIGURATION = f"""
def post_worker_init(worker):
    import {MODULE} as site

    site.worker = worker
    site.leave_mark("started")
"""

numbers = itertools.count()


@dataclass
class Answers:
    """What came back for many requests: the status, or the exception, of each; and the bodies."""

    # Lists: threads can add to one without a lock.
    results: list[int | str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)

    @property
    def outcomes(self) -> Counter[int | str]:
        return Counter(self.results.copy())

    @property
    def lost(self) -> int:
        return len(self.results) - self.results.count(200)


@dataclass
class Site:
    server: ServerProcess
    port: int
    folder: Path

    def send(
        self,
        path: str,
        until: Callable[[Answers], bool],
        clients: int,
        keep_alive: int = 50,
        timeout: float = 90,
        answers: Answers | None = None,
    ) -> Answers:
        """Send requests, from several threads at once, until `until` is true.

        keep_alive: how many a connection is used for, which all go to the worker that has accepted it. answers: is
        filled meanwhile, and returned.
        """
        answers = answers or Answers()

        def run() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
            with closing(connection):
                for turn in itertools.count():
                    if until(answers):
                        break
                    if turn % keep_alive == 0:
                        connection.close()
                    try:
                        connection.request("GET", path)
                        response = connection.getresponse()
                        body = response.read()
                    except (OSError, http.client.HTTPException) as exc:
                        answers.results.append(type(exc).__name__)
                        connection.close()
                        continue
                    answers.results.append(response.status)
                    if response.status == 200:
                        answers.bodies.append(json.loads(body) if body.startswith(b"{") else body)

        with ThreadPoolExecutor(clients) as threads:
            for future in [threads.submit(run) for _ in range(clients)]:
                future.result()
        return answers

    def get(self, path: str, times: int = 1, clients: int = 1, keep_alive: int = 50) -> Answers:
        turns = itertools.count()
        return self.send(path, lambda _: next(turns) >= times, clients, keep_alive)

    def get_from_stock(self, path: str) -> Answers:
        """Send 200 requests, or fewer if they take long, because some never end."""
        patience = time.monotonic() + 5

        def enough(answers: Answers) -> bool:
            return len(answers.results) >= 200 or (answers.lost >= 50 and time.monotonic() > patience)

        return self.send(path, enough, 8, timeout=3)

    def workers(self) -> list[int]:
        """All that were ever started."""
        return [int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", self.server.log())]

    def started(self) -> set[int]:
        """The workers that have begun to take requests."""
        return marked(self.folder, "started")

    def left(self) -> set[int]:
        """The processes that have come to their end by themselves."""
        return marked(self.folder, "left")

    def terminate(self) -> None:
        """Stop it with SIGTERM, and see that all of it ends well."""
        self.server.process.terminate()
        self.ends_well()

    def ends_well(self) -> None:
        assert self.server.process.wait(90) == 0
        # The master would end so in any case. What it says of a worker, and what each worker leaves, tells of them.
        log = self.server.log()
        assert not re.search(r"was sent SIG|exited with code", log), log
        assert self.left() >= set(self.workers())


@contextmanager
def served(
    folder: Path,
    *options: str,
    application: str = OURS,
    wsgi_loop: dict[str, Any] | None = None,
    **site: Any,
) -> Iterator[Site]:
    """The site under gunicorn. site: what it is told about where everything is."""
    port = free_port()
    folder = folder / str(port)
    workers = int(options[options.index("--workers") + 1])
    folder.mkdir()
    (folder / "gunicorn.conf.py").write_text(GUNICORN_CONFIGURATION)
    environment = site_environment(folder, wsgi_loop or {}, **site)
    command = [sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--bind", f"127.0.0.1:{port}"]
    command += [*options, application]
    with running(
        command, folder, folder / "output.txt", environment, lambda: len(marked(folder, "started")) == workers
    ) as server:
        yield Site(server, port, folder)


def site_environment(folder: Path, wsgi_loop: dict[str, Any], **site: Any) -> dict[str, str]:
    told = {
        "folder": str(folder),
        "name": f"wsgi-loop-tests-{os.getpid()}-{next(numbers)}",
        "redis": settings.REDIS_URL,
        "postgres": settings.POSTGRES_URL,
        "wsgi_loop": {"SCOPE": "process"} | wsgi_loop,
    }
    return {
        "SITE": json.dumps(told | site),
        "DJANGO_SETTINGS_MODULE": MODULE,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        # gunicorn may put a socket there.
        "HOME": str(folder),
    }


def marked(folder: Path, mark: str) -> set[int]:
    """The processes (or threads) that have left a file of that name."""
    return {int(path.name.removeprefix(f"{mark}-")) for path in folder.glob(f"{mark}-*")}


def is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def threads(number: int, workers: int = 1) -> list[str]:
    return ["--workers", str(workers), "--threads", str(number), "--keep-alive", "60"]


@contextmanager
def repeated(function: Callable[[], None]) -> Iterator[None]:
    """Call `function` again and again on another thread, and raise what it raises."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.1):
            function()

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(run)
        try:
            yield
        finally:
            over.set()
        future.result()


class Gate:
    """A TCP server that answers nobody until it is opened."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listening.getsockname()[1]
        self.waiting: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self.waiting.append(self._listening.accept()[0])

    def open(self) -> None:
        for connection in self.waiting:
            connection.close()
        self.waiting.clear()

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(30)
        self.open()


@pytest.fixture
def gate() -> Iterator[Gate]:
    with closing(Gate()) as gate:
        yield gate


# --- shared clients ----------------------------------------------------------------------------------------------


class PostgresLogs:
    """What PostgreSQL logs from now on, of a server on this machine whose logs can be read."""

    #: What a session needs for an unclean end to be logged outside of a transaction; only a superuser may have it.
    options = "-c log_min_messages=debug1"

    def __init__(self) -> None:
        readable = [path for path in Path("/var/log/postgresql").glob("*.log") if os.access(path, os.R_OK)]
        self._lengths = {path: path.stat().st_size for path in readable}

    def unexpected_ends(self, backends: set[int]) -> list[str]:
        found = []
        for path, length in self._lengths.items():
            for line in path.read_bytes()[length:].decode(errors="replace").splitlines():
                if "unexpected EOF" in line and any(f"[{backend}]" in line for backend in backends):
                    found.append(line)
        return found


def test_the_pools_of_a_module_stand_ten_thousand_requests(tmp_path: Path) -> None:
    name = f"wsgi-loop-tests-pools-{os.getpid()}"
    with connected_redis() as redis, connected_postgres() as postgres, made_database(postgres) as database:
        logs = PostgresLogs()
        options = logs.options if postgres.info.parameter_status("is_superuser") == "on" else ""
        counts: list[tuple[int, int]] = []

        def count() -> None:
            counts.append((count_redis_connections(redis, name), count_postgres_connections(postgres, name)))

        try:
            told = {"name": name, "postgres": database, "postgres_options": options}
            with served(tmp_path, *threads(8, workers=2), **told) as site:
                began = time.monotonic()
                with repeated(count):
                    answers = site.get("/use_the_pools", REQUESTS, 32)
                print(f"{REQUESTS} requests took {time.monotonic() - began:.1f} s")
                assert answers.outcomes == {200: REQUESTS}
                assert int(redis.get(name)) == REQUESTS
                count()
                site.terminate()
        finally:
            redis.delete(name)
        loops = {(body["process"], body["loop"], body["loop_thread"]) for body in answers.bodies}
        assert len(loops) == 2
        assert {process for process, _, _ in loops} == set(site.workers()) == marked(site.folder, "pool-closed")
        print(f"{len(counts)} counts of connections: {sorted(set(counts))}")
        assert 0 < max(count[0] for count in counts) <= 2 * REDIS_MAX
        assert 0 < max(count[1] for count in counts) <= 2 * POSTGRES_MAX
        eventually(lambda: count_redis_connections(redis, name) == 0)
        eventually(lambda: count_postgres_connections(postgres, name) == 0)
        # The database is the test's own, so these sessions are all there ever were.
        query = "SELECT sessions, sessions_abandoned FROM pg_stat_database WHERE datname = %s"
        sessions, abandoned = postgres.execute(query, [database.rpartition("/")[2]]).fetchone() or (0, 0)
        backends = {body["backend"] for body in answers.bodies}
        assert len(backends) <= sessions <= 2 * POSTGRES_MAX
        assert abandoned == 0
        assert logs.unexpected_ends(backends) == []


LOOP_ERRORS = re.compile(r"^RuntimeError: .*(bound to a different|attached to a different|loop is closed)", re.M)


def test_the_same_site_fails_with_djangos_own_handler(tmp_path: Path) -> None:
    name = f"wsgi-loop-tests-stock-{os.getpid()}"
    with connected_redis() as redis, connected_postgres():
        with served(tmp_path, *threads(8, workers=2), *AT_ONCE, application=STOCK, name=name) as site:
            answers = site.get_from_stock("/use_the_pools")
        redis.delete(name)
        errors = Counter(LOOP_ERRORS.findall(site.server.log()))
        print(f"stock: {answers.outcomes}, {errors}")
        assert answers.lost >= 30
        assert errors.total() > 0


class Upstream(ThreadingHTTPServer):
    """An HTTP server that keeps connections alive, and counts them."""

    daemon_threads = True
    request_queue_size = 100
    opened = 0

    def get_request(self) -> Any:
        self.opened += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that just goes away, as stock's do, is no error of this server."""


class UpstreamHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream(("127.0.0.1", 0), UpstreamHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(30)


def test_an_http_client_of_a_module_keeps_its_connections(tmp_path: Path, upstream: Upstream) -> None:
    address = f"http://127.0.0.1:{upstream.server_port}/"
    with served(tmp_path, *threads(8), upstream=address) as site:
        ours = site.get("/use_http", 1000, 8)
        opened_by_ours = upstream.opened
        site.terminate()
    with served(tmp_path, *threads(8), *AT_ONCE, application=STOCK, upstream=address) as site:
        stock = site.get_from_stock("/use_http")
        opened_by_stock = upstream.opened - opened_by_ours
    print(f"ours: {opened_by_ours}, {ours.outcomes}; stock: {opened_by_stock}, {stock.outcomes}")
    assert ours.outcomes == {200: 1000}
    assert opened_by_ours <= HTTP_MAX
    # It can not use a connection again: each request opens one, or fails.
    assert opened_by_stock + stock.lost > 0.8 * len(stock.results)


# --- requests at once --------------------------------------------------------------------------------------------


def test_requests_wait_for_io_together_on_the_one_loop(tmp_path: Path, gate: Gate) -> None:
    with served(tmp_path, *threads(16), gate=gate.port) as site, ThreadPoolExecutor(1) as thread:
        began = time.monotonic()
        sent = thread.submit(site.get, "/overlap_in_io", 16, 16)
        eventually(lambda: len(gate.waiting) == 16)
        gate.open()
        answers = sent.result()
        print(f"16 requests took {time.monotonic() - began:.2f} s")
        assert answers.outcomes == {200: 16}
        assert len({body["loop"] for body in answers.bodies}) == 1
        assert len({body["request_thread"] for body in answers.bodies}) == 16
        site.terminate()


def test_thread_sensitive_calls_run_together_each_on_its_request_thread(tmp_path: Path) -> None:
    with served(tmp_path, *threads(16), everybody=16) as site:
        began = time.monotonic()
        answers = site.get("/overlap_in_sync_code", 16, 16)
        print(f"16 requests took {time.monotonic() - began:.2f} s")
        assert answers.outcomes == {200: 16}
        assert len({body["loop"] for body in answers.bodies}) == 1
        assert all(body["ran_on"] == body["request_thread"] for body in answers.bodies)
        assert len({body["ran_on"] for body in answers.bodies}) == 16
        site.terminate()


def test_uvloop(tmp_path: Path) -> None:
    with served(tmp_path, *threads(8), wsgi_loop={"LOOP_FACTORY": "uvloop.new_event_loop"}) as site:
        answers = site.get("/answer", 100, 8)
        assert answers.outcomes == {200: 100}
        assert {body["kind"] for body in answers.bodies} == {"uvloop"}
        assert len({body["loop"] for body in answers.bodies}) == 1
        site.terminate()


# --- the end of a worker -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the tables of the site."""
    folder = tmp_path_factory.mktemp("database")
    done = subprocess.run(
        [sys.executable, "-m", "django", "migrate"],
        env=os.environ | site_environment(folder, {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "db.sqlite3"


def sessions(folder: Path) -> list[str]:
    import sqlite3

    with closing(sqlite3.connect(folder / "db.sqlite3")) as connection:
        return [key for (key,) in connection.execute("SELECT session_key FROM django_session")]


def test_sigterm_lets_requests_and_background_tasks_end(tmp_path: Path, gate: Gate, migrated: Path) -> None:
    with served(tmp_path, *threads(16), gate=gate.port, wsgi_loop={"SHUTDOWN_TIMEOUT": 6}) as site:
        shutil.copy(migrated, site.folder)
        with ThreadPoolExecutor(2) as threads_:
            sent = [
                threads_.submit(site.get, "/be_there_at_the_end?tasks=1", 1, 1),
                threads_.submit(site.get, "/be_there_at_the_end", 15, 15),
            ]
            eventually(lambda: len(gate.waiting) == 16)
            site.server.process.terminate()
            gate.open()
            outcomes = sum((future.result().outcomes for future in sent), Counter())
        assert outcomes == {200: 16}
        site.ends_well()
        # It started when the worker had been told to stop, and so ended while that waited for it.
        assert sessions(site.folder) == ["two seconds"]
        log = site.server.log()
        assert re.search(r"ended while 1 of its tasks still ran.*: background task an_hour of GET '/be_there", log), log
        assert "gave up" not in log


def test_sigterm_ends_a_worker_with_a_blocked_loop(tmp_path: Path) -> None:
    with served(tmp_path, *threads(2), wsgi_loop={"SHUTDOWN_TIMEOUT": 1}) as site:
        assert site.get("/block_the_loop").outcomes == {200: 1}
        eventually(lambda: marked(site.folder, "blocked"))
        site.terminate()
        log = site.server.log()
        assert re.search(r"gave up its event loop.*: background task blocking_hour of GET '/block_the_loop'", log), log


def test_no_request_waits_for_ever_for_a_blocked_loop(tmp_path: Path) -> None:
    options = [*threads(4), "--graceful-timeout", "2"]
    with served(tmp_path, *options, wsgi_loop={"SHUTDOWN_TIMEOUT": 1}) as site, ThreadPoolExecutor(1) as thread:
        assert site.get("/block_the_loop").outcomes == {200: 1}
        eventually(lambda: marked(site.folder, "blocked"))
        sent = thread.submit(site.get, "/wait_for_the_loop", 3, 3)
        eventually(lambda: len(marked(site.folder, "waiting")) == 3)
        # As gunicorn does it itself for a reload: when it stops altogether, it kills a worker after graceful_timeout.
        (worker,) = site.workers()
        os.kill(worker, signal.SIGTERM)
        assert sent.result().outcomes == {500: 3}
        eventually(lambda: worker in site.left())
        log = site.server.log()
        assert "its event loop was given up while loop call call_the_loop was running" in log
        # And another worker takes its place, with a loop that nobody blocks.
        eventually(lambda: len(site.workers()) == 2)
        assert site.get("/answer").outcomes == {200: 1}
        site.terminate()


def reload_under_load(folder: Path, application: str) -> Answers:
    with (
        served(folder, *threads(8, workers=2), application=application) as site,
        ThreadPoolExecutor(1) as thread,
    ):
        over = threading.Event()
        answers = Answers()
        sent = thread.submit(site.send, "/answer", lambda _: over.is_set(), 16, 1, answers=answers)

        def wait_for_answers() -> None:
            before = len(answers.results)
            eventually(lambda: len(answers.results) >= before + 100)

        try:
            wait_for_answers()
            site.server.process.send_signal(signal.SIGHUP)
            eventually(lambda: len(site.started()) == 4)
            eventually(lambda: all(is_gone(worker) for worker in site.workers()[:2]))
            wait_for_answers()
        finally:
            over.set()
        sent.result()
        site.terminate()
    assert len({body["process"] for body in answers.bodies}) > 2
    return answers


def restart_under_load(folder: Path, application: str) -> Answers:
    options = [*threads(8, workers=2), "--max-requests", "50"]
    with served(folder, *options, application=application) as site:
        answers = site.get("/answer", 400, 16, 1)
        # One of them may be about to end, or to start, and so not take it well, as with stock.
        site.server.process.terminate()
        assert site.server.process.wait(90) == 0
    assert len({body["process"] for body in answers.bodies}) > 4
    return answers


@pytest.mark.parametrize("run", [reload_under_load, restart_under_load])
def test_new_workers_under_load_lose_no_more_requests_than_stock(
    tmp_path: Path, run: Callable[[Path, str], Answers]
) -> None:
    ours, stock = run(tmp_path, OURS), run(tmp_path, STOCK)
    print(f"ours: {ours.outcomes}, stock: {stock.outcomes}")
    assert ours.lost <= stock.lost


def test_workers_forked_from_a_master_with_a_loop_have_loops_of_their_own(tmp_path: Path) -> None:
    name = f"wsgi-loop-tests-preload-{os.getpid()}"
    options = [*threads(8, workers=2), "--preload"]
    with connected_redis() as redis, connected_postgres() as postgres:
        try:
            with served(tmp_path, *options, application=f"{MODULE}:preloaded()", name=name) as site:
                # Its own connection, which a worker that took it over would break.
                eventually(lambda: count_postgres_connections(postgres, name) >= 1)

                def enough(answers: Answers) -> bool:
                    # Which of the workers takes a connection is not for us to say.
                    seen = {body["process"] for body in answers.bodies.copy()}
                    return answers.lost > 0 or (len(seen) == 2 and len(answers.bodies) >= 200)

                answers = site.send("/use_the_pools", enough, 16, 1)
                assert answers.lost == 0
                loops = {(body["process"], body["loop"]) for body in answers.bodies}
                print(f"master {answers.bodies[0]['masters']}, workers {loops}")
                assert {process for process, _ in loops} == set(site.workers())
                assert len(loops) == 2
                (masters,) = {tuple(body["masters"]) for body in answers.bodies}
                assert masters[0] == site.server.process.pid
                assert masters[1] not in {loop for _, loop in loops}
                site.terminate()
                assert marked(site.folder, "pool-closed") == {masters[0], *site.workers()}
        finally:
            redis.delete(name)
        eventually(lambda: count_postgres_connections(postgres, name) == 0)


@pytest.mark.parametrize("library", ["asyncio", "anyio"])
def test_a_lifespan_with_a_task_group(tmp_path: Path, library: str) -> None:
    lifespan = f"{MODULE}.{library}_lifespan"
    with served(tmp_path, *threads(8), wsgi_loop={"LIFESPAN": lifespan}) as site:
        answers = site.get("/be_greeted", 100, 8)
        assert answers.outcomes == {200: 100}
        assert set(answers.bodies) == {b"hello"}
        site.terminate()
        (worker,) = site.workers()
        assert marked(site.folder, "server-cancelled") == marked(site.folder, "lifespan-left") == {worker}
        assert "wsgi_loop" not in site.server.log()
        assert "Traceback" not in site.server.log()
