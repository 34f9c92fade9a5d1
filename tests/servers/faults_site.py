"""A Django project in one file, whose views answer well, and do to their worker whatever a view can do.

Served by `test_faults`, which tells it through the environment variable SITE where everything is, and asks a worker for
its state with SIGUSR2, so that no request is there to be counted. `folder` is where it leaves files for the test.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import gc
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import types
import weakref
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import redis.asyncio
from asgiref.sync import async_to_sync, sync_to_async
from django.core.handlers.wsgi import WSGIRequest
from django.core.signals import request_finished
from django.db.backends.base.base import BaseDatabaseWrapper
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.urls import path

from wsgi_loop import PerLoop, stats
from wsgi_loop.resources import is_kept

SITE: dict[str, Any] = json.loads(os.environ["SITE"])
FOLDER = Path(SITE["folder"])
STOCK: bool = SITE["stock"]
#: How long what is left behind goes on: for longer than SHUTDOWN_TIMEOUT, and not for ever.
STUBBORN = 1.5
ROWS = 100
CHUNK, CHUNKS = 1 << 16, 64


# --- the loops ---------------------------------------------------------------------------------------------------

loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
_loops_lock = threading.Lock()
_loops_made = 0
_new_event_loop = asyncio.new_event_loop


def make_loop() -> asyncio.AbstractEventLoop:
    global _loops_made
    loop = _new_event_loop()
    with _loops_lock:
        _loops_made += 1
        loops.add(loop)
    return loop


if STOCK:
    # It has no factory to set, and its loops are only to be counted.
    asyncio.events.new_event_loop = make_loop  # type: ignore[assignment]


# --- settings ----------------------------------------------------------------------------------------------------

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = __name__
USE_TZ = True
INSTALLED_APPS = ["django.contrib.sessions"]
MIDDLEWARE = [f"{__name__}.stamp"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": SITE["database"]}}
# Django's default shows errors on the console only with DEBUG.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"]},
}
WSGI_LOOP = {"LOOP_FACTORY": make_loop} | SITE["wsgi_loop"]


# --- what each request carries along -----------------------------------------------------------------------------

token: contextvars.ContextVar[str] = contextvars.ContextVar("token")
loop_of_request: contextvars.ContextVar[int] = contextvars.ContextVar("loop_of_request")


async def greet() -> None:
    await asyncio.sleep(0)
    loop_of_request.set(id(asyncio.get_running_loop()))


def stamp(get_response: Any) -> Any:
    """Each request has a token of its own. All but those to sync views make a loop call here already."""

    def middleware(request: HttpRequest) -> Any:
        token.set(request.GET["token"])
        if not request.path.endswith("_sync"):
            async_to_sync(greet)()
        return get_response(request)

    return middleware


def one_loop() -> bool:
    return loop_of_request.get() == id(asyncio.get_running_loop())


def row_of(request: HttpRequest) -> str:
    """The key of a row of the database, which holds data of its own."""
    return f"key-{int(request.GET['token'].rpartition('-')[2]) % ROWS}"


def connect() -> redis.asyncio.Redis:
    # Its own 5 s would be one more fault, on a busy machine.
    return redis.asyncio.Redis.from_url(
        SITE["redis"], client_name=SITE["name"], socket_timeout=60, socket_connect_timeout=60
    )


connected = PerLoop(connect)


@asynccontextmanager
async def client() -> AsyncIterator[redis.asyncio.Redis]:
    if STOCK:
        async with connect() as opened:
            yield opened
    else:
        yield await connected()


# --- good requests -----------------------------------------------------------------------------------------------


def good_sync(request: HttpRequest) -> HttpResponse:
    from django.contrib.sessions.models import Session

    session = Session.objects.get(pk=row_of(request))
    return JsonResponse({"context": token.get(), "row": session.session_data, "process": os.getpid()})


async def good_async(request: HttpRequest) -> HttpResponse:
    from django.contrib.sessions.models import Session

    async with client() as store:
        key = f"{SITE['name']}:{request.GET['token']}"
        await store.set(key, token.get(), ex=60)
        session = await Session.objects.aget(pk=row_of(request))
        stored = await store.getdel(key)
    return JsonResponse(
        {
            "context": token.get(),
            "row": session.session_data,
            "redis": stored.decode(),
            "one_loop": one_loop(),
            "process": os.getpid(),
        }
    )


async def good_stream(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        from django.contrib.sessions.models import Session

        async with asyncio.timeout(60):
            found = Session.objects.filter(session_key__gte=row_of(request)).order_by("session_key")[:5]
            async for session in found.aiterator(chunk_size=2):
                yield f"{token.get()} {session.session_data} {one_loop()}\n"
        yield f"end of {token.get()}\n"

    return StreamingHttpResponse(body(), content_type="text/plain")


# --- requests that raise -----------------------------------------------------------------------------------------


class MeantToFail(Exception):
    pass


def raise_sync(request: HttpRequest) -> HttpResponse:
    raise MeantToFail


async def raise_async(request: HttpRequest) -> HttpResponse:
    async with client() as store, asyncio.TaskGroup() as group:
        group.create_task(store.ping())
        group.create_task(asyncio.sleep(60))
        await asyncio.sleep(0.001)
        raise MeantToFail


async def raise_in_stream(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        yield f"{token.get()}\n"
        await asyncio.sleep(0.001)
        raise MeantToFail

    return StreamingHttpResponse(body(), content_type="text/plain")


# --- what has begun, and what of it has come to its end -----------------------------------------------------------

counts: Counter[str] = Counter()
_counts_lock = threading.Lock()


def count(event: str) -> None:
    with _counts_lock:
        counts[event] += 1


# --- requests that leave something behind ------------------------------------------------------------------------


async def rest(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def rest_and_use_the_database(seconds: float) -> None:
    from django.contrib.sessions.models import Session

    count("tasks_begun")
    try:
        await asyncio.sleep(seconds)
    finally:
        if SITE["scope"] != "process":  # where it outlives its request, and can not
            await Session.objects.acount()
        count("tasks_ended")


async def leave_tasks(request: HttpRequest) -> HttpResponse:
    async def numbers() -> AsyncIterator[int]:
        for number in itertools.count():
            try:
                yield number
            finally:
                await asyncio.sleep(0)

    generator = numbers()
    await anext(generator)
    tasks = {asyncio.create_task(rest(STUBBORN)), asyncio.create_task(rest_and_use_the_database(STUBBORN))}
    await asyncio.wait(tasks, timeout=0.001)
    return HttpResponse(token.get())


async def ignore_cancellation() -> None:
    # For as long as it is let, where a loop is given up with all that is on it. Stock waits for its end.
    end = time.monotonic() + (STUBBORN if STOCK or SITE["scope"] == "process" else 3600)
    while (remaining := end - time.monotonic()) > 0:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(remaining)


async def ignore_everything() -> None:
    end = time.monotonic() + STUBBORN
    while (remaining := end - time.monotonic()) > 0:
        with suppress(BaseException):
            await asyncio.sleep(remaining)


async def block_when_cancelled() -> None:
    try:
        await asyncio.sleep(STUBBORN)
    except asyncio.CancelledError:
        time.sleep(STUBBORN)


STUBBORN_TASKS: dict[str, Any] = {
    function.__name__: function for function in (ignore_cancellation, ignore_everything, block_when_cancelled)
}


async def leave_stubborn_task(request: HttpRequest) -> HttpResponse:
    task = asyncio.create_task(STUBBORN_TASKS[request.GET["how"]]())
    await asyncio.wait({task}, timeout=0.001)
    return HttpResponse(token.get())


async def swallow(request: HttpRequest) -> HttpResponse:
    """Swallow a cancellation at an await in the view itself, of a timeout and of one that nobody counts off."""
    try:
        async with asyncio.timeout(0.001):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(0.001)
    except TimeoutError:
        pass
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        await asyncio.sleep(0.001)
    return HttpResponse(token.get())


# --- streams whose client goes away ------------------------------------------------------------------------------

_open_bodies: set[str] = set()


def count_body(event: str) -> None:
    count(f"bodies_{event}")
    if event == "begun":
        _open_bodies.add(token.get())
    else:
        _open_bodies.discard(token.get())


def look_for_late_bodies(**kwargs: Any) -> None:
    """Called when a request is finished: what its body has to end has ended."""
    if token.get(None) in _open_bodies:
        count_body("late")


async def long_stream(request: HttpRequest) -> StreamingHttpResponse:
    stubborn = "stubborn" in request.GET

    async def body() -> AsyncIterator[bytes]:
        count_body("begun")
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(rest(60))
                try:
                    for number in range(CHUNKS):
                        yield f"{token.get()} {number:6}".encode().ljust(CHUNK)
                        await asyncio.sleep(0.002)
                finally:
                    await asyncio.sleep(0.001)
                    task.cancel()
                    if stubborn:
                        count_body("ended")
                        await ignore_cancellation()
        finally:
            if not stubborn:
                count_body("ended")

    return StreamingHttpResponse(body(), content_type="application/octet-stream")


# --- requests that hang ------------------------------------------------------------------------------------------


def hang_sync(request: HttpRequest) -> HttpResponse:
    time.sleep(3600)
    raise AssertionError


async def hang_async(request: HttpRequest) -> HttpResponse:
    await asyncio.sleep(3600)
    raise AssertionError


async def hang_and_block(request: HttpRequest) -> HttpResponse:
    time.sleep(3600)
    raise AssertionError


async def hang_in_sync_code(request: HttpRequest) -> HttpResponse:
    await sync_to_async(time.sleep)(3600)
    raise AssertionError


async def hang_in_stream(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        yield f"{token.get()}\n"
        await asyncio.sleep(3600)

    return StreamingHttpResponse(body(), content_type="text/plain")


async def hang_and_ignore_cancellation(request: HttpRequest) -> HttpResponse:
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)


urlpatterns = [
    path(function.__name__, function)
    for function in (
        good_sync,
        good_async,
        good_stream,
        raise_sync,
        raise_async,
        raise_in_stream,
        leave_tasks,
        leave_stubborn_task,
        swallow,
        long_stream,
        hang_sync,
        hang_async,
        hang_and_block,
        hang_in_sync_code,
        hang_in_stream,
        hang_and_ignore_cancellation,
    )
]


# --- what a worker tells of itself: called by gunicorn's configuration -------------------------------------------

_log: dict[int, int] = {}


def note(event: str, subject: str = "-") -> None:
    """Add a line to what this process has done. One write, so that it is whole whoever is killed."""
    pid = os.getpid()
    if pid not in _log:
        _log[pid] = os.open(FOLDER / f"did-{pid}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(_log[pid], f"{event} {subject} {time.monotonic()}\n".encode())


def state() -> dict[str, Any]:
    """Count what is alive in this process."""
    gc.collect()
    found: Counter[str] = Counter()
    tasks = []
    objects = gc.get_objects()
    for item in objects:
        # Not isinstance(), which would wake up lazy objects.
        cls = type(item)
        if issubclass(cls, WSGIRequest):
            found["requests"] += 1
        elif issubclass(cls, HttpResponseBase):
            found["responses"] += 1
        elif issubclass(cls, contextvars.Context):
            found["contexts"] += 1
        elif issubclass(cls, BaseDatabaseWrapper):
            found["database_wrappers"] += 1
        elif issubclass(cls, socket.socket):
            found["sockets"] += 1
        elif cls is types.AsyncGeneratorType and item.ag_code.co_filename == __file__:
            found["generators"] += 1
        elif cls is types.CoroutineType and item.cr_code.co_filename == __file__:
            found["coroutines"] += 1
        elif issubclass(cls, asyncio.Task) and not item.done() and not is_kept(item):
            tasks.append(repr(item))
    return dict(found) | {
        "process": os.getpid(),
        "loops_open": sum(not loop.is_closed() for loop in loops.copy()),
        "loops": len(loops),
        "loops_made": _loops_made,
        "tasks": sorted(tasks),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "os_threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "objects": len(objects),
        "counts": counts,
        "modules": len(sys.modules),
        "stats": dataclasses.asdict(stats()),
    }


def start_worker() -> None:
    global _loops_made
    _loops_made = 0  # one was made to see if the factory works
    turns = itertools.count()

    def tell(*_: Any) -> None:
        turn = next(turns)
        written = FOLDER / f"state-{os.getpid()}-{turn}.part"
        written.write_text(json.dumps(state()))
        written.rename(written.with_suffix(".json"))

    request_finished.connect(look_for_late_bodies)
    signal.signal(signal.SIGUSR2, tell)
    note("started")
