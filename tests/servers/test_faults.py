"""Load on a real gunicorn, in which good requests go along with ones that do their worker harm.

The site is `faults_site`. Every good request has to be answered, and well, unless it was in flight on a worker that
gunicorn killed; and when the load is over, nothing of it may be left.

WSGI_LOOP_TEST_FAULTS_SECONDS is how long the load lasts in each configuration. With WSGI_LOOP_TEST_FAULTS_STOCK set,
Django's own handler gets the same load after ours, and both results are printed; nothing is required of it.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from django.conf import settings

from ..services.support import connected_redis
from .support import ROOT, ServerProcess, eventually, free_port, running

pytestmark = pytest.mark.long

SECONDS = float(os.environ.get("WSGI_LOOP_TEST_FAULTS_SECONDS", "5"))
STOCK_TOO = bool(os.environ.get("WSGI_LOOP_TEST_FAULTS_STOCK"))
CLIENTS = 16
#: How many requests a connection is used for, where the server keeps it.
KEEP_ALIVE = 50
ROWS = 100  # that of the site

MODULE = "tests.servers.faults_site"
OURS = "wsgi_loop.wsgi:application"
STOCK = "django.core.wsgi:get_wsgi_application()"

GUNICORN_CONFIGURATION = f"""
import os

import {MODULE} as site


def post_worker_init(worker):
    site.start_worker()


def pre_request(worker, request):
    site.note("began", request.query)


def post_request(worker, request, environ, response):
    site.note("ended", request.query)


def worker_abort(worker):
    site.note("aborted")
    (site.FOLDER / f"aborted-{{os.getpid()}}").touch()
"""


class Configuration(NamedTuple):
    scope: str
    workers: int
    #: Of each worker, for requests.
    threads: int
    options: list[str]
    hangs: bool
    #: Its SHUTDOWN_TIMEOUT, in seconds: what is in order has to end in it also where the machine is busy.
    patience: float = 0.5


GTHREAD = ["--worker-class", "gthread", "--threads", "4", "--keep-alive", "60"]
# Preloaded, so that a new worker is there at once, and not as late as to be taken for one that hangs.
SYNC = ["--worker-class", "sync", "--timeout", "2", "--preload"]
CONFIGURATIONS = {
    "gthread-request": Configuration("request", 2, 4, GTHREAD, hangs=False, patience=1.0),
    "gthread-process": Configuration("process", 2, 4, GTHREAD, hangs=False),
    "sync-request": Configuration("request", 3, 1, SYNC, hangs=True),
    "sync-process": Configuration("process", 3, 1, SYNC, hangs=True),
}


# --- the server --------------------------------------------------------------------------------------------------


@dataclass
class Site:
    server: ServerProcess
    port: int
    folder: Path
    _turns: Counter[int] = field(default_factory=Counter)

    def booted(self) -> set[int]:
        return {int(pid) for pid in re.findall(r"Booting worker with pid: (\d+)", self.server.log())}

    def killed(self) -> set[int]:
        """The workers that gunicorn has killed, because they took too long."""
        return {int(pid) for pid in re.findall(r"WORKER TIMEOUT \(pid:(\d+)\)", self.server.log())}

    def workers(self) -> set[int]:
        """Those that run, and take requests."""
        return {worker for worker in self._marked("did") - self._marked("aborted") if not is_gone(worker)}

    def _marked(self, mark: str) -> set[int]:
        return {int(path.name.removeprefix(f"{mark}-")) for path in self.folder.glob(f"{mark}-*")}

    def did(self, worker: int) -> list[Did]:
        """What a worker has noted, in its order."""
        file = self.folder / f"did-{worker}"
        lines = file.read_text().splitlines() if file.exists() else []
        return [Did(event, subject, float(at)) for event, subject, at in map(str.split, lines)]

    def began(self, worker: int) -> list[str]:
        """The tokens of the requests that a worker has read."""
        return [token_of(did.subject) for did in self.did(worker) if did.event == "began"]

    def served(self, worker: int) -> int:
        return len(self.began(worker))

    def state(self, worker: int) -> dict[str, Any]:
        """What a worker says is alive in it. Not to be asked for while it serves requests."""
        file = self.folder / f"state-{worker}-{self._turns[worker]}.json"
        self._turns[worker] += 1
        os.kill(worker, signal.SIGUSR2)
        eventually(file.exists)
        told: dict[str, Any] = json.loads(file.read_text())
        return told

    def settled(self, workers: int) -> dict[int, dict[str, Any]]:
        """Return the state of each worker, when what may take its time to end has had it."""
        eventually(lambda: len(self.workers()) == workers)
        states: dict[int, dict[str, Any]] = {}

        def are_at_rest() -> bool:
            states.update((worker, self.state(worker)) for worker in self.workers())
            return not any(left_over(told) for told in states.values())

        with suppress(AssertionError):  # what is left is told by the states
            eventually(are_at_rest, 20)
        return states


class Did(NamedTuple):
    event: str
    subject: str
    at: float


def is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@contextmanager
def served(folder: Path, database: Path, configuration: Configuration, application: str) -> Iterator[Site]:
    port = free_port()
    folder = folder / str(port)
    folder.mkdir()
    (folder / "gunicorn.conf.py").write_text(GUNICORN_CONFIGURATION)
    told = (configuration.scope, configuration.patience, application == STOCK)
    environment = site_environment(folder, database, *told)
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--graceful-timeout", "5"]
    command += ["--workers", str(configuration.workers), *configuration.options, application]

    def is_up() -> bool:
        return len(list(folder.glob("did-*"))) == configuration.workers

    with running(command, folder, folder / "output.txt", environment, is_up) as server:
        yield Site(server, port, folder)


def site_environment(
    folder: Path, database: Path, scope: str = "request", patience: float = 0.5, stock: bool = False
) -> dict[str, str]:
    told = {
        "folder": str(folder),
        "database": str(database),
        "name": f"wsgi-loop-tests-faults-{os.getpid()}",
        "redis": settings.REDIS_URL,
        "scope": scope,
        "wsgi_loop": {"SCOPE": scope, "SHUTDOWN_TIMEOUT": patience},
        "stock": stock,
    }
    return {
        "SITE": json.dumps(told),
        "DJANGO_SETTINGS_MODULE": MODULE,
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "default",
        # gunicorn may put a socket there.
        "HOME": str(folder),
    }


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the tables and the rows of the site."""
    folder = tmp_path_factory.mktemp("database")
    path = folder / "db.sqlite3"
    done = subprocess.run(
        [sys.executable, "-m", "django", "migrate"],
        env=os.environ | site_environment(folder, path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            "INSERT INTO django_session (session_key, session_data, expire_date) VALUES (?, ?, '2100-01-01')",
            [(f"key-{number}", f"data-{number}") for number in range(ROWS)],
        )
    return path


# --- the load ----------------------------------------------------------------------------------------------------

ANSWERED = "answered well"
#: What a request that goes away gets.
WENT = "went away"
#: What is expected of each kind of request, and how often one of it is sent, in 32.
KINDS = {
    "good_sync": (ANSWERED, 7),
    "good_async": (ANSWERED, 7),
    "good_stream": (ANSWERED, 6),
    "raise_sync": ("500", 1),
    "raise_async": ("500", 1),
    "raise_in_stream": ("IncompleteRead", 1),
    "leave_tasks": (ANSWERED, 2),
    "leave_stubborn_task": (ANSWERED, 1),
    "swallow": (ANSWERED, 2),
    "long_stream": (WENT, 3),
    "long_stream?stubborn": (WENT, 1),
}
STUBBORN_TASKS = itertools.cycle(["ignore_cancellation", "ignore_everything", "block_when_cancelled"])
HANGS = ["sync", "async", "and_block", "in_sync_code", "in_stream", "and_ignore_cancellation"]


@dataclass
class Sent:
    """A request, and what came of it."""

    kind: str
    token: str
    began: float
    ended: float = 0
    outcome: str = ""

    @property
    def is_good(self) -> bool:
        return self.kind.startswith("good")

    @property
    def is_as_expected(self) -> bool:
        if self.kind in KINDS:
            return self.outcome == KINDS[self.kind][0]
        return self.outcome != ANSWERED  # it hung until its worker was killed


class Client:
    """Sends requests one after another, over connections that it keeps for a while."""

    def __init__(self, port: int, number: int, seed: int) -> None:
        self._port = port
        self._number = number
        self._random = random.Random(f"{seed} {number}")
        self._turns = itertools.count()
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.sent: list[Sent] = []

    def send_until(self, deadline: float) -> None:
        kinds, weights = list(KINDS), [weight for _, weight in KINDS.values()]
        while time.monotonic() < deadline:
            (kind,) = self._random.choices(kinds, weights)
            self.send(kind)
        self._connection.close()

    def hang_until(self, deadline: float) -> None:
        for how in itertools.cycle(HANGS):
            if time.monotonic() >= deadline:
                break
            self.send(f"hang_{how}")
            time.sleep(0.2)

    def send(self, kind: str) -> None:
        turn = next(self._turns)
        token = f"{self._number}-{turn}-{self._random.randrange(ROWS)}"
        sent = Sent(kind, token, time.monotonic())
        self.sent.append(sent)
        path = f"/{kind}{'&' if '?' in kind else '?'}token={token}"
        if kind == "leave_stubborn_task":
            path += f"&how={next(STUBBORN_TASKS)}"
        try:
            if kind.startswith("long_stream"):
                self._go_away(path)
                sent.outcome = WENT
            else:
                if turn % KEEP_ALIVE == 0:
                    self._connection.close()
                sent.outcome = self._get(kind, path, token)
        except (OSError, http.client.HTTPException) as exc:
            sent.outcome = type(exc).__name__
            self._connection.close()
        sent.ended = time.monotonic()

    def _get(self, kind: str, path: str, token: str) -> str:
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        body = response.read()
        if response.status != 200:
            return str(response.status)
        # Each function raises, or is false, for what it does not expect: another request's token, or another loop.
        try:
            right = CHECKS.get(kind, is_token)(body, token)
        except (ValueError, KeyError, LookupError):
            right = False
        return ANSWERED if right else f"wrong: {body!r}"

    def _go_away(self, path: str) -> None:
        """Close a connection at once, or amid the body."""
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            remaining = self._random.choice([0, 1, 200_000])
            while remaining > 0 and (received := connection.recv(65536)):
                remaining -= len(received)


def is_token(body: bytes, token: str) -> bool:
    return body.decode() == token


def is_right(body: bytes, token: str) -> bool:
    answer = json.loads(body)
    process = answer.pop("process")
    return isinstance(process, int) and answer == {"context": token, "row": f"data-{token.rpartition('-')[2]}"}


def is_right_and_on_one_loop(body: bytes, token: str) -> bool:
    answer = json.loads(body)
    answer.pop("one_loop")
    return answer.pop("redis") == token and is_right(json.dumps(answer).encode(), token)


def is_whole_stream(body: bytes, token: str) -> bool:
    number = token.rpartition("-")[2]
    rows = sorted(f"key-{row}" for row in range(ROWS) if f"key-{row}" >= f"key-{number}")[:5]
    lines = body.decode().splitlines()
    read = [line.split(" ")[:2] for line in lines[:-1]]
    return read == [[token, row.replace("key", "data")] for row in rows] and lines[-1] == f"end of {token}"


CHECKS = {"good_sync": is_right, "good_async": is_right_and_on_one_loop, "good_stream": is_whole_stream}


@dataclass
class Watch:
    """What can be seen of the workers from outside, while the load lasts."""

    site: Site
    #: For each worker, when it was looked at, its resident memory in MB, and how many threads it had.
    seen: dict[int, list[tuple[float, float, int]]] = field(default_factory=lambda: defaultdict(list))

    def look_until(self, over: threading.Event) -> None:
        while not over.wait(0.5):
            self.look()

    def look(self) -> None:
        now = time.monotonic()
        for worker in self.site.workers():
            with suppress(OSError, ValueError, KeyError):  # it has just ended
                status = dict(line.split(":", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines())
                megabytes = int(status["VmRSS"].split()[0]) / 1024
                self.seen[worker].append((now, megabytes, int(status["Threads"])))

    def threads(self) -> int:
        return max(threads for seen in self.seen.values() for _, _, threads in seen)

    def memory(self, begin: float, end: float) -> float:
        """The most that one worker had between two times."""
        return max((memory for seen in self.seen.values() for at, memory, _ in seen if begin <= at <= end), default=0)


@dataclass
class Report:
    sent: list[Sent]
    unexcused: list[Sent]
    excused: list[Sent]
    killed: set[int]
    #: Workers that ended without being killed.
    lost: set[int]
    before: dict[int, dict[str, Any]]
    after: dict[int, dict[str, Any]]
    watch: Watch
    began: float
    ended: float
    log: str

    @property
    def good(self) -> list[Sent]:
        return [sent for sent in self.sent if sent.is_good]

    def outcomes(self) -> dict[str, Counter[str]]:
        outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        for sent in self.sent:
            outcomes[sent.kind][sent.outcome[:60]] += 1
        return dict(outcomes)

    def per_worker(self, name: str) -> str:
        return " ".join(
            f"{self.before[worker].get(name, 0) if worker in self.before else 'new'}→{told.get(name, 0)}"
            for worker, told in self.after.items()
        )

    def memory(self) -> list[float]:
        """The most that one worker had in each quarter of the load."""
        fractions = [self.began + (self.ended - self.began) * part / 4 for part in range(5)]
        return [self.watch.memory(*pair) for pair in itertools.pairwise(fractions)]

    def __str__(self) -> str:
        seconds = self.ended - self.began
        good = self.good
        answered = [sent.ended - sent.began for sent in good if sent.outcome == ANSWERED]
        done = sum(map(self.watch.site.served, self.after))
        lines = {
            "seconds": f"{seconds:.0f}",
            "sent": len(self.sent),
            "good answered": len(answered),
            "good failed": Counter(sent.outcome[:60] for sent in good if sent.outcome != ANSWERED),
            "good excused": len([sent for sent in self.excused if sent.is_good]),
            "good, median and worst s": f"{sorted(answered)[len(answered) // 2]:.3f} {max(answered):.2f}",
            "workers killed": len(self.killed),
            "workers lost": len(self.lost),
            "outcomes": {kind: dict(counts) for kind, counts in sorted(self.outcomes().items())},
            "gave up": self.log.count("gave up its event loop"),
            "loops made / requests of live workers": f"{sum(s['loops_made'] for s in self.after.values())} / {done}",
            "most MB, by quarters": " ".join(f"{megabytes:.0f}" for megabytes in self.memory()),
            "most threads": self.watch.threads(),
            "MB": " ".join(
                f"{next((m for at, m, _ in seen if at >= self.began), 0):.0f}→{seen[-1][1]:.0f}"
                for worker, seen in self.watch.seen.items()
                if worker in self.after
            ),
        }
        for name in ("loops_open", "loops", "os_threads", "files", "objects", "contexts", "requests", "responses"):
            lines[name] = self.per_worker(name)
        for name in ("generators", "coroutines", "database_wrappers"):
            lines[name] = self.per_worker(name)
        lines["counts"] = [told["counts"] for told in self.after.values()]
        lines["tasks"] = [told["tasks"] for told in self.after.values()]
        return "\n".join(f"  {name}: {value}" for name, value in lines.items())


def load(site: Site, configuration: Configuration, seconds: float, seed: int) -> list[Sent]:
    deadline = time.monotonic() + seconds
    clients = [Client(site.port, seed * 100 + number, seed) for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as threads:
        sending = [threads.submit(client.send_until, deadline) for client in clients[configuration.hangs :]]
        if configuration.hangs:
            sending.append(threads.submit(clients[0].hang_until, deadline))
        for future in sending:
            future.result()
    return [sent for client in clients for sent in client.sent]


def excuse(site: Site, failed: list[Sent]) -> list[Sent]:
    """Return those that were in flight on a worker when it was killed.

    A worker notes each request when it has read it and when it is done with it, and when it gets gunicorn's SIGABRT.
    Between the accepting of a connection and the reading there is no note: one sync worker may have one such request.
    """
    excused = []
    unread_until = []
    for worker in site.killed():
        in_flight: set[str] = set()
        killed_at = float("inf")
        for did in site.did(worker):
            if did.event == "aborted":
                killed_at = did.at
                break
            if did.event == "began":
                in_flight.add(token_of(did.subject))
            elif did.event == "ended":
                in_flight.discard(token_of(did.subject))
        excused += [sent for sent in failed if sent.token in in_flight]
        if not in_flight:
            unread_until.append(killed_at)
    read = {token_of(did.subject) for worker in site.booted() for did in site.did(worker) if did.event == "began"}
    for killed_at in unread_until:
        for sent in failed:
            if sent.token not in read and sent not in excused and sent.began <= killed_at:
                excused.append(sent)
                break
    return excused


def token_of(query: str) -> str:
    found = re.search(r"token=([\d-]+)", query)
    return found[1] if found else query


def put_under_load(folder: Path, database: Path, configuration: Configuration, application: str) -> Report:
    ours = application == OURS
    with served(folder, database, configuration, application) as site:
        watch = Watch(site)
        over = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            watching = thread.submit(watch.look_until, over)
            try:
                sent = load(site, configuration, max(3, SECONDS / 6), seed=1)
                before = site.settled(configuration.workers)
                began = time.monotonic()
                sent += load(site, configuration, SECONDS, seed=2)
                ended = time.monotonic()
                after = site.settled(configuration.workers)
                watch.look()
            finally:
                over.set()
            watching.result()
        killed, lost = site.killed(), site.booted() - set(after) - site.killed()
        failed = [request for request in sent if not request.is_as_expected]
        excused = excuse(site, failed)
        unexcused = [request for request in failed if request not in excused]
        report = Report(sent, unexcused, excused, killed, lost, before, after, watch, began, ended, site.server.log())
        print(f"{'ours' if ours else 'stock'}, {' '.join(configuration.options)}:\n{report}")
        return report


def left_over(told: dict[str, Any]) -> dict[str, Any]:
    names = ("requests", "responses", "generators", "coroutines", "tasks")
    return {name: told[name] for name in names if told.get(name)}


#: What the log must not hold: of asyncio, of asgiref, and of ours.
COMPLAINTS = re.compile(
    "Task was destroyed|never awaited|already quit|attached to a different|bound to a different|loop is closed"
    "|could not be answered|closing its event loop failed|could not be closed|dropped without close"
    "|unclosed (event loop|transport)"
)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_faults_under_load(tmp_path: Path, database: Path, name: str) -> None:
    configuration = CONFIGURATIONS[name]
    with connected_redis():
        report = put_under_load(tmp_path, database, configuration, OURS)
        if STOCK_TOO:
            put_under_load(tmp_path, database, configuration, STOCK)

    assert report.unexcused == []
    assert sum(sent.outcome == ANSWERED for sent in report.good) >= 30
    assert report.lost == set()
    if configuration.hangs:
        assert report.killed
    else:
        assert report.killed == set()
    assert {sent.kind for sent in report.sent} >= KINDS.keys()
    assert COMPLAINTS.search(report.log) is None

    for told in report.after.values():
        assert left_over(told) == {}
        # With an await in its end, and that of a body before request_finished.
        counts = Counter(told["counts"])
        assert counts["tasks_begun"] == counts["tasks_ended"]
        assert counts["bodies_begun"] == counts["bodies_ended"]
        assert counts["bodies_late"] == 0
        if configuration.scope == "process":
            assert told["loops_open"] == told["loops"] == told["loops_made"] <= 1
        else:
            assert told["loops_open"] == told["loops"] == 0
        assert told["database_wrappers"] <= configuration.threads + 1
        threads = Counter(re.sub(r"[-_][\d_-]+$", "", thread) for thread in told["threads"])
        assert (told["stats"]["loops_made"], told["stats"]["loops_open"]) == (told["loops_made"], told["loops_open"])
        assert told["stats"]["loop_threads"] == threads["wsgi-loop"]
        assert threads.total() == told["os_threads"]
        # A request takes its loop thread along.
        assert threads.pop("wsgi-loop", 0) <= {"process": 1, "request": 0}[configuration.scope]
        assert threads.pop("MainThread") == 1
        assert threads.pop("ThreadPoolExecutor", 0) <= configuration.threads
        assert threads.pop("wsgi-watchdog", 0) <= (configuration.scope == "process")
        # Some versions of Python can start none at their end, so that one is started early.
        assert threads.pop("wsgi-sync-resources", 0) <= (configuration.scope == "process")
        assert threads == {}

    if not configuration.hangs:  # a worker that is killed takes its numbers with it
        counted: Counter[str] = Counter()
        for told in report.after.values():
            counted.update(told["stats"])
        kinds = {sent.token: sent.kind for sent in report.sent}
        begun = [kinds[token] for worker in report.after for token in report.watch.site.began(worker)]
        assert counted["requests"] == sum(not kind.endswith("_sync") for kind in begun)
        assert counted["loops_given_up"] == report.log.count("gave up its event loop")
        # Of a request in scope "process", the call of its body's end.
        calls = report.log.count("still ran, which is cancelled.")
        tasks = sum(map(int, re.findall(r"ended while (\d+) of its tasks", report.log)))
        assert counted["tasks_cut_off"] == calls + tasks
        assert counted["tasks_cut_off"] >= (configuration.scope == "request") * 2 * begun.count("leave_tasks")
        assert counted["background_started"] == 0

    for worker in report.before.keys() & report.after.keys():
        before, after = report.before[worker], report.after[worker]
        assert after["files"] <= before["files"] + configuration.threads + 20
        served = report.watch.site.served(worker)
        if served >= 400:
            # One object that each request leaves behind would be seen; a thread's first request leaves some 50 as well.
            assert after["objects"] - before["objects"] < served / 2, report.after
    first, *_, last = filter(None, report.memory())  # none where nobody looked
    assert last < first + 25
