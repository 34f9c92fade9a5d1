"""Measures contenders without a server: each is a child process that is told when to serve.

Knows how a request is made and timed. All contenders of a workload are alive at the same time and have their turns one
after the other, in an order that is shuffled anew each round, so that whatever else the machine does befalls all alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

from wsgi_loop.event_loop import EventLoop

from . import entries
from .contenders import Contender
from .workloads import Workload, environment, processes

Record = dict[str, Any]
Serve = Callable[[], int]

#: Seconds that a child has for one turn.
TIMEOUT = 60
WARM_UP = 3
SEED = 1
#: Of the growth curve: how many requests a point stands for.
SAMPLE = 50
#: Seconds in which what goes on after an answer comes to its end.
QUIET = 0.05
#: Requests of which threads, loops and system calls are counted, at most.
COUNTED = 20
#: The workload of which the functions are counted that a request enters.
ENTERED = "async_view"

HEADERS = {
    "host": "localhost",
    "user-agent": "Mozilla/5.0 (X11; Linux x86_64; rv:133.0) Gecko/20100101 Firefox/133.0",
    "accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "accept-language": "en-US,en;q=0.5",
    "connection": "keep-alive",
    "cookie": "csrftoken=vQ9xJmY3n2kq8rT5wZ7bL1dF4gH6jKsA; sessionid=k3x9w2m8q7z5v1n4b6c0l2j8h5g3f7d9",
}


class Failed(Exception):
    """A contender gave a wrong answer, or none."""


# What runs in a child.


class Answer:
    """Takes what is sent for one request, and says what is wrong with it."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.status = ""
        self.start = b""
        self.size = 0

    def add(self, chunk: bytes) -> None:
        if self.size < len(self.workload.body):
            self.start += chunk
        self.size += len(chunk)

    def check(self) -> None:
        expected = self.workload
        if self.status[:3] != "200":
            raise Failed(f"it answered {self.status or 'nothing'} where 200 is expected: {self.start[:200]!r}")
        if not self.start.startswith(expected.body) or self.size != expected.expected_size:
            raise Failed(
                f"it answered {self.size} bytes that begin with {self.start[:200]!r}, "
                f"where {expected.expected_size} that begin with {expected.body!r} are expected"
            )


def _wsgi(application: Callable[..., Any], workload: Workload) -> Serve:
    base = {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": workload.path,
        "QUERY_STRING": "",
        "REMOTE_ADDR": "127.0.0.1",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    } | {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in HEADERS.items()}

    def serve() -> int:
        answer = Answer(workload)

        def start_response(status: str, headers: Any, exc_info: Any = None) -> None:
            answer.status = status

        environ = {**base, "wsgi.input": io.BytesIO()}
        start = time.perf_counter_ns()
        response = application(environ, start_response)
        for chunk in response:
            answer.add(chunk)
        response.close()
        taken = time.perf_counter_ns() - start
        answer.check()
        return taken

    return serve


def _asgi(application: Callable[..., Any], workload: Workload) -> Serve:
    loop = asyncio.new_event_loop()
    base = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": workload.path,
        "raw_path": workload.path.encode(),
        "query_string": b"",
        "root_path": "",
        "client": ("127.0.0.1", 51234),
        "server": ("localhost", 80),
    }
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    def serve() -> int:
        answer = Answer(workload)
        received = iter([{"type": "http.request", "body": b"", "more_body": False}])
        gone = loop.create_future()

        async def receive() -> dict[str, Any]:
            for message in received:
                return message
            # Nobody goes away: Django waits for that beside the view.
            await gone
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status = str(message["status"])
            else:
                answer.add(message.get("body", b""))

        scope = {**base, "headers": headers.copy()}
        start = time.perf_counter_ns()
        loop.run_until_complete(application(scope, receive, send))
        taken = time.perf_counter_ns() - start
        answer.check()
        return taken

    return serve


def _call(function: Callable[[], Any], workload: Workload) -> Serve:
    def serve() -> int:
        start = time.perf_counter_ns()
        function()
        return time.perf_counter_ns() - start

    return serve


_SERVE = {"wsgi": _wsgi, "asgi": _asgi, "call": _call}


def _peak_memory() -> int:
    """In bytes. (Only macOS tells it so, others in KiB.)"""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Server:
    """Serves in a child, on its main thread. Its methods are what the parent may ask for."""

    def __init__(self, contender: Contender, workload: Workload) -> None:
        self._serve = _SERVE[contender.interface](contender.make(), workload)
        if contender.interface != "call":
            # Django would import it in the first request, whose memory is counted.
            from . import site  # noqa: F401
        self._peak = _peak_memory()
        #: CPU time that the parent's questions took, and where this thread's stood after the last answer. In ns.
        self._asked = 0
        self._thread_time = 0
        self._requests = 0
        self._cpu = 0

    def turn(self, cold: int, counted: int) -> list[int]:
        """Serve, and tell what each of the counted requests took, in ns."""
        thread_time = time.thread_time_ns()
        if self._requests:
            self._asked += thread_time - self._thread_time
        else:
            self._cpu = time.process_time_ns()
        for _ in range(cold):
            self._serve()
        taken = [self._serve() for _ in range(counted)]
        self._requests += cold + counted
        self._thread_time = time.thread_time_ns()
        return taken

    def cpu_time(self) -> float:
        """In ns per request of all turns, what other threads do after the answer included."""
        asked = self._asked + time.thread_time_ns() - self._thread_time
        return (time.process_time_ns() - self._cpu - asked) / self._requests

    def memory(self) -> int:
        """By how many bytes the most that was ever in use has grown since before the first request."""
        return _peak_memory() - self._peak

    def count(self, requests: int) -> tuple[float, float]:
        """Threads that are started and loops that are made per request. This slows down all that follows."""
        threads = loops = 0

        def counted_thread(thread: threading.Thread) -> None:
            nonlocal threads
            threads += 1
            start(thread)

        def counted_loop(init: Any) -> Any:
            def count_and_init(*args: Any, **kwargs: Any) -> None:
                nonlocal loops
                loops += 1
                init(*args, **kwargs)

            return count_and_init

        start, threading.Thread.start = threading.Thread.start, counted_thread  # type: ignore[assignment, method-assign]
        # The second does not call the first.
        classes: list[Any] = [asyncio.BaseEventLoop, EventLoop]
        if "uvloop" in sys.modules:
            classes.append(sys.modules["uvloop"].Loop)
        for cls in classes:
            cls.__init__ = counted_loop(cls.__init__)
        self.warm_up(requests)
        threads = loops = 0
        self.warm_up(requests)
        return threads / requests, loops / requests

    def entries(self) -> dict[str, int]:
        """Functions that one request enters. For a child that has served nothing, and is not asked for more."""
        return entries.count(self._serve)

    def traced(self, requests: int) -> None:
        """Serve between two calls of getppid(), for whoever reads what strace writes."""
        os.getppid()
        self.warm_up(requests)
        os.getppid()

    def warm_up(self, requests: int) -> None:
        """Serve, and wait until what goes on after an answer has come to its end too."""
        for _ in range(requests):
            self._serve()
        time.sleep(QUIET)


def _run_child(connection: Connection, contender: Contender, workload: Workload, environ: dict[str, str]) -> None:
    # Ctrl-C is for the parent, which ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Of Django's own handler, that it reads the stream to its end: that is what is measured.
    warnings.filterwarnings("ignore", "StreamingHttpResponse must consume")
    os.environ.update(environ)
    try:
        server = _Server(contender, workload)
        connection.send((None, None))
        with contextlib.suppress(EOFError):
            while True:
                name, arguments = connection.recv()
                connection.send((getattr(server, name)(*arguments), None))
    except Exception as exc:
        told = str(exc) if isinstance(exc, Failed) else f"it failed:\n{traceback.format_exc()}"
        connection.send((None, told))
    # Not by way of the interpreter's end: what a contender leaves behind there is measured nowhere.
    os._exit(0)


# What runs in the parent.


class Child:
    """A process that serves one workload with one contender."""

    def __init__(self, contender: Contender, workload: Workload, environ: dict[str, str]) -> None:
        self.contender = contender
        self.workload = workload
        self._connection, theirs = processes.Pipe()
        environ = environ | environment(workload, contender.name)
        self._process = processes.Process(target=_run_child, args=(theirs, contender, workload, environ), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have the child's server do something, and return what it says."""
        self.tell(name, *arguments)
        return self.answer()

    def tell(self, name: str, *arguments: Any) -> None:
        self._connection.send((name, arguments))

    def answer(self) -> Any:
        if not self._connection.poll(TIMEOUT):
            raise Failed(f"{self.contender.name} has not answered {self.workload.name} for {TIMEOUT} seconds.")
        try:
            answer, error = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise Failed(f"{self.contender.name} died in {self.workload.name}, with exit code {code}.") from None
        if error is not None:
            raise Failed(f"{self.contender.name} fails in {self.workload.name}: {error}")
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def children(
    contenders: Sequence[Contender], workload: Workload, environ: dict[str, str]
) -> Iterator[dict[str, Child]]:
    """Start them all; they are ready when this gives them."""
    started: dict[str, Child] = {}
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            started[contender.name] = child = Child(contender, workload, environ)
            stack.callback(child.close)
        for child in started.values():
            child.answer()
        yield started


def requests(workload: Workload, quick: bool) -> int:
    """How many requests each contender is sent in its turns."""
    return (workload.quick_rounds if quick else workload.rounds) * (workload.cold + workload.counted)


def measure(
    workload: Workload,
    contenders: Sequence[Contender],
    environ: dict[str, str],
    *,
    quick: bool = False,
    progress: Callable[[int], object] = lambda requests: None,
) -> list[Record]:
    """Measure each contender with one workload.

    environ: what `workloads.prepared` gives. progress: is told of requests as they have been served.

    Raises Failed for a contender that gives a wrong answer, or none.
    """
    rounds = workload.quick_rounds if quick else workload.rounds
    order = random.Random(SEED)
    with children(contenders, workload, environ) as started:
        taken: dict[str, list[int]] = {name: [] for name in started}
        turns = list(started)
        if workload.cold:
            ask_all(started, "warm_up", WARM_UP)
        for _ in range(rounds):
            order.shuffle(turns)
            for name in turns:
                taken[name] += started[name].ask("turn", workload.cold, workload.counted)
            progress(len(turns) * (workload.cold + workload.counted))
        time.sleep(QUIET)
        # Of all of them, before what slows them down.
        cpu = ask_all(started, "cpu_time")
        memory = ask_all(started, "memory")
        few = max(1, min(COUNTED, rounds // 10))
        syscalls = count_syscalls(started, few)
        made = ask_all(started, "count", few)
    entered = count_entries(contenders, workload, environ) if workload.name == ENTERED else {}
    records = []
    for name, times in taken.items():
        threads, loops = made[name]
        figures = {
            "median_us": median(times) / 1000,
            "p99_us": quantiles(times, n=100, method="inclusive")[98] / 1000,
            "cpu_us": cpu[name] / 1000,
            "threads": threads,
            "loops": loops,
            "syscalls": syscalls[name],
            "memory_mb": memory[name] / 1e6,
            "requests": len(times),
        }
        figures |= entered.get(name, {})
        for base in ("stock", "floor"):
            figures[f"ratio_to_{base}"] = median(times) / median(taken[base]) if base in taken else None
        figures["cpu_ratio_to_stock"] = cpu[name] / cpu["stock"] if "stock" in cpu else None
        record: Record = {
            "where": "handler",
            "server": None,
            "workload": workload.name,
            "contender": name,
            "figures": figures,
        }
        if workload.name == "growth":
            samples = [median(times[at : at + SAMPLE]) / 1000 for at in range(0, len(times), SAMPLE)]
            record["samples"] = samples
            # The last 50 requests against those from 51 to 100: the first ones import what is imported late.
            figures["growth"] = samples[-1] / samples[1]
        records.append(record)
    return records


def ask_all(started: dict[str, Child], name: str, *arguments: Any) -> dict[str, Any]:
    """Ask all children at the same time, what is not timed."""
    for child in started.values():
        child.tell(name, *arguments)
    return {name: child.answer() for name, child in started.items()}


def count_entries(
    contenders: Sequence[Contender], workload: Workload, environ: dict[str, str]
) -> dict[str, dict[str, int]]:
    """Count the functions that a request enters, in children of their own, for each contender that serves requests."""
    with children([each for each in contenders if each.interface != "call"], workload, environ) as started:
        return ask_all(started, "entries")


def count_syscalls(started: dict[str, Child], requests: int) -> dict[str, float | None]:
    """Count what a request of each child, with all of its threads, asks of the kernel; None where strace can't."""
    unknown: dict[str, float | None] = dict.fromkeys(started)
    if shutil.which("strace") is None:
        return unknown
    with tempfile.NamedTemporaryFile("r") as told:
        pids = [argument for child in started.values() for argument in ("-p", str(child.pid))]
        command = ["strace", "-f", "-e", "raw=all", "-e", "signal=none", "-o", told.name, *pids]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            try:
                if not all("attached" in strace.stderr.readline() for _ in started):
                    return unknown
                for child in started.values():
                    child.ask("traced", requests)
            finally:
                strace.send_signal(signal.SIGINT)
                strace.communicate()
        lines = re.findall(r"^(\d+) +(\w+)\(", told.read(), re.MULTILINE)
    calls: dict[str, float | None] = {}
    for name, child in started.items():
        first, last = (at for at, line in enumerate(lines) if line == (str(child.pid), "getppid"))
        # One is the child's pause at the end.
        calls[name] = (last - first - 2) / requests
    return calls
