"""What a request does to event loops: counted for one request, and for the same one through two handlers.

Knows Django's handlers and ours, and plays their server. What is counted is what `bridge.watching` has seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from asgiref.sync import async_to_sync
from django.core.handlers import wsgi
from django.db import connections
from django.http.response import HttpResponseBase

from ..bridge.storage import scope_here
from ..bridge.watching import WatchedCall, watch_calls
from ..calls import name_of
from ..handler import WSGIHandler
from ..resources import is_kept
from ..responses import call_after_close
from ..threads import SyncThread

#: Timed requests are many, and what they log was logged by the counted ones.
LOGGERS = ("django.request", "wsgi_loop", "asyncio")


def own_calls(watched: list[WatchedCall], environ: dict[str, Any]) -> list[WatchedCall]:
    """Return those of the watched calls that the request with this environ made."""
    return [call for call in watched.copy() if call.environ is environ]


def left_over_tasks(loop: asyncio.AbstractEventLoop, known: Sequence[asyncio.Task[Any] | None] = ()) -> list[str]:
    """Name the tasks that are not done on a loop, but what `PerLoop` and the lifespan hold open there."""
    tasks = asyncio.all_tasks(loop) - set(known)
    return sorted(f"{task.get_name()} ({name_of(task.get_coro())})" for task in tasks if not is_kept(task))


async def _find_left_over_tasks() -> list[str]:
    # What is about to end by itself is given its last steps.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return left_over_tasks(asyncio.get_running_loop(), [asyncio.current_task()])


def own_left_over_tasks() -> list[str]:
    """Name what the current request leaves running on its loop of wsgi-loop. Called after its end, as a loop call."""
    return async_to_sync(_find_left_over_tasks)()


@dataclass
class Side:
    """What one handler made of a request. milliseconds: of each timed one."""

    status: str = ""
    loop_calls: int = 0
    loops: int = 0
    threads: int = 0
    tasks: int = 0
    #: All calls on one loop, and that one of wsgi-loop's.
    one_loop: bool = False
    left_over: list[str] = field(default_factory=list)
    #: How many more contextvars the server thread has after each request.
    leaked: float = 0.0
    milliseconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds) if self.milliseconds else 0.0


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
    """Sends requests through Django's own handler and through wsgi-loop, in this process. A context manager.

    Each handler has a thread to itself, which stands for a server's, with a context of its own.

    Raises ImproperlyConfigured, when it is made, where wsgi-loop can't run.
    """

    def __init__(self) -> None:
        self._handlers: list[Any] = [wsgi.WSGIHandler(), WSGIHandler()]
        self._threads = [SyncThread(f"wsgi-loop-report-{number}") for number in (1, 2)]

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for thread in self._threads:
            thread.submit(connections.close_all).result()
            thread.shutdown()

    def compare(self, request: Request, repeat: int, step: Callable[[], object] = lambda: None) -> tuple[Side, Side]:
        """Send `request` once through each handler to count, and then `repeat` times, by turns, to take the time.

        step: called after each request. Returns what Django's own handler made of it, and what wsgi-loop did.
        """
        sides = Side(), Side()
        calls = []
        for handler, thread, side in zip(self._handlers, self._threads, sides, strict=True):
            calls.append((handler, thread, side))
            thread.submit(_count, handler, request, side).result()
            step()
        before = [thread.submit(_held).result() for thread in self._threads]
        with _quiet():
            for number in range(repeat):
                # By turns in who is first, too.
                for handler, thread, side in calls[:: -1 if number % 2 else 1]:
                    side.milliseconds.append(thread.submit(_take_time, handler, request).result())
                    step()
        for thread, side, held in zip(self._threads, sides, before, strict=True):
            side.leaked = (thread.submit(_held).result() - held) / repeat
        return sides


def _held() -> int:
    return len(contextvars.copy_context())


def _count(handler: Any, request: Request, side: Side) -> None:
    environ = request.environ()
    found: list[WatchedCall] | None = None
    with watch_calls() as watched, _watched_ends() as ends:

        def look() -> None:
            nonlocal found
            found = own_calls(watched, environ)
            if scope_here() is not None and any(call.loop is not None for call in found):
                side.left_over += own_left_over_tasks()

        side.status = _serve(handler, environ, look)
        if found is None:
            # What was closed is not Django's response, or there is none.
            found = own_calls(watched, environ)
        if not isinstance(handler, WSGIHandler):
            side.left_over += [name for names in ends for name in names]
    ran = [call for call in found if call.loop is not None]
    side.loop_calls = len(found)
    side.loops = len({call.loop for call in ran})
    side.threads = len({call.thread for call in ran})
    side.tasks = len({call.task for call in ran})
    side.one_loop = side.loops <= 1 and all(call.served for call in ran)


def _take_time(handler: Any, request: Request) -> float:
    environ = request.environ()
    start = time.perf_counter()
    _serve(handler, environ)
    return (time.perf_counter() - start) * 1000


def _serve(handler: Any, environ: dict[str, Any], after_close: Callable[[], object] | None = None) -> str:
    """Do what a server does. Returns the status, or the exception for which there is none."""
    told = ""

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        nonlocal told
        told = status
        return lambda data: None

    try:
        response = handler(environ, start_response)
        if after_close is not None and isinstance(response, HttpResponseBase):
            call_after_close(response, after_close)
        try:
            for _ in response:
                pass
        finally:
            response.close()
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return told


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
