"""A Django project in one file: the requests that `test_matrix` sends to each WSGI server.

The test tells it through the environment variable SITE where everything is. A request with `?key=...` is recorded in
the file of that name in `folder`: an object for each loop call, with where it ran.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from asgiref.sync import async_to_sync, sync_to_async
from django.core.signals import request_finished, request_started
from django.http import FileResponse, HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

SITE: dict[str, Any] = json.loads(os.environ["SITE"])
FOLDER = Path(SITE["folder"])

# --- settings ----------------------------------------------------------------------------------------------------

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = __name__
USE_TZ = True
TIME_ZONE = "UTC"
MIDDLEWARE = [
    "django.middleware.http.ConditionalGetMiddleware",
    "django.middleware.common.CommonMiddleware",
    f"{__name__}.call_the_loop",
]
WSGI_APPLICATION = "wsgi_loop.wsgi.application"
# Django's default shows errors on the console only with DEBUG.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"levels": {"format": "{levelname} {name} {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "levels"}},
    "root": {"handlers": ["console"]},
}
WSGI_LOOP = {"SCOPE": SITE["scope"], "LIFESPAN": f"{__name__}.lifespan" if SITE["scope"] == "process" else None}

# --- what is recorded --------------------------------------------------------------------------------------------

#: That of the request. Seen in the body and in request_finished only if all of it runs in the request's context.
key: ContextVar[str] = ContextVar("key")
# Kept, so that a new one can not have an old one's id.
loops: list[asyncio.AbstractEventLoop] = []
tasks: list[asyncio.Task[Any]] = []
_lock = threading.Lock()


def number(found: Any, known: list[Any]) -> int:
    with _lock:
        if found not in known:
            known.append(found)
        return known.index(found)


def write(name: str, event: dict[str, Any]) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(json.dumps(event) + "\n")


async def note(event: str, *, calls: bool = True, **more: Any) -> None:
    """Record a loop call. In a request without a key, do nothing. calls: make a thread-sensitive call, too."""
    if name := key.get(""):
        where = {
            "loop": number(asyncio.get_running_loop(), loops),
            "thread": threading.get_ident(),
            "task": number(asyncio.current_task(), tasks),
        }
        if calls:
            where["sync_thread"] = await sync_to_async(threading.get_ident)()
        write(name, {"event": event} | where | more)


def call(event: str, **more: Any) -> None:
    if key.get(""):
        async_to_sync(note)(event, caller=threading.get_ident(), **more)


def started(environ: dict[str, Any], **kwargs: Any) -> None:
    if names := parse_qs(environ["QUERY_STRING"]).get("key"):
        key.set(names[0])
        call("request_started", wrapper="wsgi.file_wrapper" in environ)


async def started_async(**kwargs: Any) -> None:
    # A thread-sensitive call would promote the request: Django gathers async receivers.
    await note("request_started, async", calls=False)


def finished(**kwargs: Any) -> None:
    call("request_finished")


async def finished_async(**kwargs: Any) -> None:
    await note("request_finished, async", calls=False)


request_started.connect(started)
request_started.connect(started_async)
request_finished.connect(finished)
request_finished.connect(finished_async)


def call_the_loop(get_response: Any) -> Any:
    def middleware(request: HttpRequest) -> Any:
        call("before the view")
        response = get_response(request)
        call("after the view")
        return response

    return middleware


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    write("lifespan", {"event": "entered"})
    yield
    await asyncio.sleep(0)
    write("lifespan", {"event": "left"})


# --- what is requested -------------------------------------------------------------------------------------------

#: More than the buffers of sockets and servers hold.
FLOOD = [b"x" * 65536] * 2000


def is_released(turn: int) -> bool:
    """Whether the test has let the body of this request go on, which it asks for at each turn."""
    return (FOLDER / f"{key.get()}-{turn}").exists()


def plain(request: HttpRequest) -> HttpResponse:
    return HttpResponse("plain")


async def asynchronous(request: HttpRequest) -> HttpResponse:
    await note("view")
    return HttpResponse("asynchronous")


async def gathering(request: HttpRequest) -> HttpResponse:
    """What is waited for can go on, while the request thread runs the other: it gets a loop thread."""
    await note("view")
    goes_on = threading.Event()

    async def wait() -> None:
        await asyncio.sleep(0.001)
        goes_on.set()

    _, has_gone_on = await asyncio.gather(wait(), sync_to_async(goes_on.wait)(60))
    return HttpResponse("gathering" if has_gone_on else "stood still")


def file(request: HttpRequest) -> FileResponse:
    return FileResponse((FOLDER / "served").open("rb"))


async def error(request: HttpRequest) -> HttpResponse:
    await note("view")
    raise ValueError("raised by the view")


async def chunks(names: list[str]) -> AsyncIterator[str]:
    """One chunk at a time, the next when the test says so; an empty name fails."""
    how = "exhausted"
    try:
        for turn, name in enumerate(names):
            await note("chunk")
            if not name:
                raise ValueError("raised by the body")
            yield name
            while not is_released(turn):
                await asyncio.sleep(0.01)
    except BaseException as exc:
        how = type(exc).__name__
        raise
    finally:
        await asyncio.sleep(0.01)
        await note("end of the body", how=how)


def sync_chunks(names: list[str]) -> Iterator[str]:
    how = "exhausted"
    try:
        for turn, name in enumerate(names):
            call("chunk")
            yield name
            while not is_released(turn):
                time.sleep(0.01)
    except BaseException as exc:
        how = type(exc).__name__
        raise
    finally:
        call("end of the body", how=how)


async def flood(first: str) -> AsyncIterator[bytes]:
    """More than is ever sent, of which the client reads the beginning."""
    how = "exhausted"
    sent = 0
    try:
        await note("chunk")
        yield first.encode()
        while not is_released(0):
            await asyncio.sleep(0.01)
        for chunk in FLOOD:
            sent += 1
            yield chunk
            await asyncio.sleep(0)
    except BaseException as exc:
        how = type(exc).__name__
        raise
    finally:
        await asyncio.sleep(0.01)
        await note("end of the body", how=how, sent=sent)


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    await note("view")
    return StreamingHttpResponse(chunks(["one\n", "two\n", "three\n"]))


def sync_stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(sync_chunks(["one\n", "two\n", "three\n"]))


async def error_in_stream(request: HttpRequest) -> StreamingHttpResponse:
    await note("view")
    return StreamingHttpResponse(chunks(["one\n", ""]))


async def endless(request: HttpRequest) -> StreamingHttpResponse:
    await note("view")
    return StreamingHttpResponse(flood("one\n"))


async def events(request: HttpRequest) -> StreamingHttpResponse:
    await note("view")
    response = StreamingHttpResponse(flood("data: one\n\n"), content_type="text/event-stream")
    response["Cache-Control"] = "no-cache"
    return response


def state(request: HttpRequest) -> JsonResponse:
    """What there is now: open loops, how many tasks run on them, and loop threads."""
    open_loops = [loop for loop in loops if not loop.is_closed()]
    return JsonResponse(
        {
            "pid": os.getpid(),
            "loops": len(loops),
            "open": [loops.index(loop) for loop in open_loops],
            "tasks": [repr(task) for task in tasks if not task.done()],
            "threads": [thread.name for thread in threading.enumerate() if thread.name.startswith("wsgi-loop")],
        }
    )


VIEWS = (plain, asynchronous, gathering, file, error, stream, sync_stream, error_in_stream, endless, events, state)
urlpatterns = [path(function.__name__, function) for function in VIEWS]
