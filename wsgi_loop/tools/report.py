"""What a request does to event loops: counted for one request, and for the same one through two handlers.

Knows Django's handlers and ours, and plays their servers. What is counted is what `bridge.watching` has seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import logging
import multiprocessing
import re
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import django
from asgiref.sync import async_to_sync
from django.core.handlers.wsgi import WSGIHandler as DjangoHandler
from django.core.signals import got_request_exception
from django.db import connections
from django.http.response import HttpResponseBase

from ..bridge.executor import current_executor
from ..bridge.storage import scope_here
from ..bridge.watching import WatchedCall, watch_calls
from ..calls import name_of
from ..conf import get_options
from ..handler import WSGIHandler
from ..loops import all_tasks
from ..resources import context_of, is_kept
from ..responses import call_after_close
from ..threads import SyncThread

#: Timed requests are many, and what they log was logged by the counted ones.
LOGGERS = ("django.request", "wsgi_loop", "asyncio")


def left_over_tasks(loop: asyncio.AbstractEventLoop, known: Sequence[asyncio.Task[Any] | None] = ()) -> list[str]:
    """Name the tasks that are not done on a loop, but what `PerLoop` and the lifespan hold open there."""
    tasks = all_tasks(loop) - set(known)
    return sorted(f"{task.get_name()} ({name_of(task.get_coro())})" for task in tasks if not is_kept(task))


async def _find_left_over_tasks(of_request: bool) -> list[str]:
    # What is about to end by itself is given its last steps.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    loop, others = asyncio.get_running_loop(), [asyncio.current_task()]
    if of_request:
        own = current_executor()
        others += [task for task in all_tasks(loop) if current_executor(context_of(task)) is not own]
    return left_over_tasks(loop, others)


def own_left_over_tasks() -> list[str]:
    """Name what the current request leaves running on its loop of wsgi-loop. Called after its end, as a loop call.

    On the process loop there are background tasks too, and what other requests have left.
    """
    return async_to_sync(_find_left_over_tasks)(of_request=scope_here().options.scope == "process")


#: How libraries, and asyncio itself, tell that something belongs to another event loop, or to one that is over.
_OF_ANOTHER_LOOP = re.compile(
    r"event loop is closed|(attached|bound) to a different (event )?loop|in (a )?different event loop"
    r"|event loop other than the current one",
    re.IGNORECASE,
)


@dataclass
class Answer:
    """What came of one request. status: its status line; or, if there is none, the exception."""

    status: str = ""
    has_failed: bool = False
    #: The message of an exception that tells of another event loop, handled or not.
    of_another_loop: str = ""
    #: Django has read the async body to its end before it was sent.
    is_read_first: bool = False
    milliseconds: float = 0.0


@dataclass
class Side:
    """What one handler made of a request. The counts are those of the first one of its requests."""

    loop_calls: int = 0
    loops: int = 0
    threads: int = 0
    tasks: int = 0
    #: All calls on one loop, and that one of wsgi-loop's.
    one_loop: bool = False
    left_over: list[str] = field(default_factory=list)
    #: How many more contextvars the server thread has after each request.
    leaked: float = 0.0
    #: The first one, which was counted, and all timed ones.
    answers: list[Answer] = field(default_factory=list)

    @property
    def status(self) -> str:
        return self.answers[0].status

    @property
    def statuses(self) -> Counter[str]:
        return Counter(answer.status for answer in self.answers)

    @property
    def failures(self) -> int:
        return sum(answer.has_failed for answer in self.answers)

    @property
    def of_another_loop(self) -> str:
        return next((answer.of_another_loop for answer in self.answers if answer.of_another_loop), "")

    @property
    def is_read_first(self) -> bool:
        return any(answer.is_read_first for answer in self.answers)

    @property
    def median(self) -> float:
        return statistics.median(answer.milliseconds for answer in self.answers[1:])


def is_worse(stock: Side, ours: Side) -> bool:
    """Tell if wsgi-loop failed more often, or gave an answer that Django's own handler, which never failed, did not."""
    return ours.failures > stock.failures or (not stock.failures and not ours.statuses.keys() <= stock.statuses.keys())


@dataclass(frozen=True)
class Request:
    """What to send. headers: as WSGI has them."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""

    def environ(self) -> dict[str, Any]:
        path, _, query = self.path.partition("?")
        host, _, port = self.headers["HTTP_HOST"].partition(":")
        scheme = self.headers.get("wsgi.url_scheme", "http")
        return {
            "REQUEST_METHOD": self.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path.encode().decode("latin-1"),
            "QUERY_STRING": query,
            "REMOTE_ADDR": "127.0.0.1",
            "SERVER_NAME": host,
            "SERVER_PORT": port or ("443" if scheme == "https" else "80"),
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_LENGTH": str(len(self.body)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": scheme,
            "wsgi.input": io.BytesIO(self.body),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            **self.headers,
        }


class Comparison:
    """Sends requests through Django's own handler and through wsgi-loop. A context manager.

    Each handler is in a process of its own, which imports the project anew, as a server's worker does. So what one of
    them leaves in the project's modules, the other one does not meet. in_process: both are in this process, each on a
    thread of its own.

    Raises ImproperlyConfigured, when it is made, for a wrong setting.
    """

    def __init__(self, in_process: bool = False) -> None:
        get_options()
        self._workers: list[Any] = [(_Thread if in_process else _Process)(ours) for ours in (False, True)]

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in self._workers:
            worker.close()

    def compare(self, request: Request, repeat: int, step: Callable[[], object] = lambda: None) -> tuple[Side, Side]:
        """Send `request` once through each handler to count, and then `repeat` times, by turns, to take the time.

        step: called after each request. Returns what Django's own handler made of it, and what wsgi-loop did.
        Raises WorkerEnded when a process has ended, or could not begin.
        """
        sides: list[Side] = []
        for worker in self._workers:
            sides.append(worker.ask("count", request))
            step()
        before = [worker.ask("held") for worker in self._workers]
        for number in range(repeat):
            # By turns in who is first, too.
            for worker, side in [*zip(self._workers, sides, strict=True)][:: -1 if number % 2 else 1]:
                side.answers.append(worker.ask("serve_quietly", request))
                step()
        for worker, side, held in zip(self._workers, sides, before, strict=True):
            side.leaked = (worker.ask("held") - held) / repeat
        return sides[0], sides[1]


class WorkerEnded(Exception):
    """A process that serves requests for the report has ended too early."""


class _Thread:
    """A thread of this process, with a handler."""

    def __init__(self, ours: bool) -> None:
        self._worker = Worker(ours)
        # Which stands for a server's, with a context of its own.
        self._thread = SyncThread(f"wsgi-loop-report-{1 + ours}")

    def ask(self, name: str, *args: Any) -> Any:
        return self._thread.submit(getattr(self._worker, name), *args).result()

    def close(self) -> None:
        self._thread.submit(connections.close_all).result()
        self._thread.shutdown()


class _Process:
    """A process with a handler."""

    def __init__(self, ours: bool) -> None:
        # Started anew and not forked: a fork would share what this process has opened.
        spawning = multiprocessing.get_context("spawn")
        self._pipe, other = spawning.Pipe()
        self._process = spawning.Process(target=_work, args=(other, ours), name=f"wsgi-loop-report-{1 + ours}")
        self._process.start()
        other.close()

    def ask(self, name: str, *args: Any) -> Any:
        try:
            self._pipe.send((name, args))
            has_failed, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise WorkerEnded(
                f"The process {self._process.name}, which imports the project and serves its requests, has ended with "
                f"the exit code {self._process.exitcode}. What it has written says why."
            ) from None
        if has_failed:
            raise WorkerEnded(f"The process {self._process.name}, which serves the requests, could not begin: {result}")
        return result

    def close(self) -> None:
        self._pipe.close()
        # Its end waits for the process loop's.
        self._process.join(2 * get_options().shutdown_timeout + 10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _work(pipe: Connection, ours: bool) -> None:
    """Serve as a process of its own, until the pipe is closed."""
    # Ctrl-C reaches this process too. The one that asks ends, and closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        django.setup()
        worker = Worker(ours)
    except Exception as exc:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            pipe.recv()
            pipe.send((True, f"{type(exc).__name__}: {exc}"))
        return
    with contextlib.suppress(EOFError, OSError):
        while True:
            name, args = pipe.recv()
            pipe.send((False, getattr(worker, name)(*args)))
    connections.close_all()


class Worker:
    """A server of one thread: whichever calls it. ours: whether it has wsgi-loop's handler, or Django's own."""

    def __init__(self, ours: bool) -> None:
        self._ours = ours
        self._handler: Any = WSGIHandler() if ours else DjangoHandler()

    def held(self) -> int:
        """Return how many contextvars the thread holds."""
        return len(contextvars.copy_context())

    def count(self, request: Request) -> Side:
        """Serve a request, and count what that does."""
        environ = request.environ()
        side = Side()
        found: list[WatchedCall] | None = None
        with watch_calls(environ) as watched, _watched_ends() as ends:

            def look() -> None:
                nonlocal found
                found = watched.copy()
                if scope_here() is not None and any(call.loop is not None for call in found):
                    side.left_over += own_left_over_tasks()

            side.answers.append(self.serve(environ, look))
            if found is None:
                # What was closed is not Django's response, or there is none.
                found = watched.copy()
            if not self._ours:
                side.left_over += [name for names in ends for name in names]
        ran = [call for call in found if call.loop is not None]
        side.loop_calls = len(found)
        side.loops = len({call.loop for call in ran})
        side.threads = len({call.thread for call in ran})
        side.tasks = len({call.task for call in ran})
        side.one_loop = side.loops <= 1 and all(call.served for call in ran)
        return side

    def serve_quietly(self, request: Request) -> Answer:
        with _quiet():
            return self.serve(request.environ())

    def serve(self, environ: dict[str, Any], after_close: Callable[[], object] | None = None) -> Answer:
        """Do what a server does."""
        answer = Answer()

        def start_response(
            status: str, headers: list[tuple[str, str]], exc_info: Any = None
        ) -> Callable[[bytes], object]:
            answer.status = status
            return lambda data: None

        def note(**kwargs: Any) -> None:
            answer.of_another_loop = answer.of_another_loop or _find_of_another_loop(sys.exc_info()[1])

        got_request_exception.connect(note)
        start = time.perf_counter()
        try:
            response = self._handler(environ, start_response)
            if after_close is not None and isinstance(response, HttpResponseBase):
                call_after_close(response, after_close)
            try:
                answer.is_read_first = not self._ours and getattr(response, "is_async", False)
                with warnings.catch_warnings():
                    if answer.is_read_first:
                        # The report tells it, in place of Django's warning, which would blame this file.
                        warnings.filterwarnings("ignore", "StreamingHttpResponse must consume asynchronous iterators")
                    for _ in response:
                        pass
            finally:
                response.close()
        except Exception as exc:
            answer.status = f"{type(exc).__name__}: {exc}"
            answer.has_failed = True
            answer.of_another_loop = answer.of_another_loop or _find_of_another_loop(exc)
        finally:
            answer.milliseconds = (time.perf_counter() - start) * 1000
            got_request_exception.disconnect(note)
        answer.has_failed = answer.has_failed or answer.status.startswith("5")
        return answer


def _find_of_another_loop(exc: BaseException | None) -> str:
    """Look for an exception that tells of another loop: this one, what led to it, and what it groups."""
    found, looked_at = [exc], set[int]()
    while found:
        exc = found.pop()
        if exc is None or id(exc) in looked_at:
            continue
        looked_at.add(id(exc))
        if _OF_ANOTHER_LOOP.search(str(exc)):
            return f"{type(exc).__name__}: {exc}"
        found += [exc.__cause__, exc.__context__, *(exc.exceptions if isinstance(exc, BaseExceptionGroup) else ())]
    return ""


@contextlib.contextmanager
def _watched_ends() -> Iterator[list[list[str]]]:
    """Give a list to which the left-over tasks of each loop that `asyncio.run` makes are added."""
    ends: list[list[str]] = []
    new_event_loop = asyncio.events.new_event_loop

    def new_watched_loop() -> asyncio.AbstractEventLoop:
        loop: Any = new_event_loop()
        run = loop.run_until_complete

        def run_until_complete(future: Any) -> Any:
            # The next ones, with which asyncio.run ends what is left, are not looked at.
            loop.__dict__.pop("run_until_complete", None)
            try:
                return run(future)
            finally:
                ends.append(left_over_tasks(loop))

        loop.run_until_complete = run_until_complete
        return loop  # type: ignore[no-any-return]

    # There asyncio.run looks for it.
    asyncio.events.new_event_loop = new_watched_loop
    try:
        yield ends
    finally:
        asyncio.events.new_event_loop = new_event_loop


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    found = [(logger, logger.disabled) for logger in map(logging.getLogger, LOGGERS)]
    for logger, _ in found:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, was in found:
            logger.disabled = was
