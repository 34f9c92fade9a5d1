"""A Django project in one file, with what one loop for a whole worker is for: its settings, clients and views.

Served by `test_process_scope`, which tells it through the environment variable SITE where everything is. `folder` is
where it leaves files for the test.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import redis.asyncio
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path
from psycopg_pool import AsyncConnectionPool

from wsgi_loop import EventLoopContext, PerLoop, create_background_task, get_wsgi_application

SITE: dict[str, Any] = json.loads(os.environ["SITE"])
FOLDER = Path(SITE["folder"])


def leave_mark(name: str) -> None:
    (FOLDER / f"{name}-{os.getpid()}").touch()


# --- settings ----------------------------------------------------------------------------------------------------

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = __name__
USE_TZ = True
INSTALLED_APPS = ["django.contrib.sessions"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": FOLDER / "db.sqlite3"}}
# Django's default shows errors on the console only with DEBUG.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"]},
}
WSGI_LOOP = SITE["wsgi_loop"]

# --- the clients -------------------------------------------------------------------------------------------------

REDIS_MAX, POSTGRES_MAX, HTTP_MAX = 8, 4, 8

# On a busy machine 5 s, after which both give up or leave an idle connection by default, are not long.
counter = redis.asyncio.Redis.from_url(
    SITE["redis"], max_connections=REDIS_MAX, client_name=SITE["name"], socket_timeout=60, socket_connect_timeout=60
)
http = httpx.AsyncClient(
    limits=httpx.Limits(max_connections=HTTP_MAX, keepalive_expiry=None), timeout=60, trust_env=False
)


class Pool(AsyncConnectionPool):
    async def close(self, timeout: float = 5.0) -> None:
        await super().close(timeout)
        leave_mark("pool-closed")


def make_pool() -> AsyncConnectionPool:
    return Pool(
        SITE["postgres"],
        min_size=1,
        max_size=POSTGRES_MAX,
        open=False,
        kwargs={"application_name": SITE["name"], "options": SITE.get("postgres_options", ""), "connect_timeout": 30},
    )


postgres = PerLoop(make_pool)


async def use_the_pools(request: HttpRequest) -> HttpResponse:
    await counter.incr(SITE["name"])
    async with (await postgres()).connection() as connection:
        cursor = await connection.execute("SELECT pg_backend_pid()")
        row = await cursor.fetchone()
    return JsonResponse(where() | {"backend": row[0], "masters": masters})


async def use_http(request: HttpRequest) -> HttpResponse:
    response = await http.get(SITE["upstream"])
    return HttpResponse(response.content, status=response.status_code)


# --- overlapping requests ----------------------------------------------------------------------------------------


def where() -> dict[str, Any]:
    return {"process": os.getpid(), "loop": id(asyncio.get_running_loop()), "loop_thread": threading.get_ident()}


def note_thread(get_response: Any) -> Any:
    def middleware(request: Any) -> Any:
        request.thread = threading.get_ident()
        return get_response(request)

    return middleware


MIDDLEWARE = [f"{__name__}.note_thread"]


async def pass_the_gate() -> None:
    """Await an answer that the test gives when it has seen as many of us as it waits for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", SITE["gate"])
    await reader.read()
    writer.close()


async def overlap_in_io(request: Any) -> HttpResponse:
    await pass_the_gate()
    await asyncio.sleep(0.2)
    return JsonResponse(where() | {"request_thread": request.thread})


# None of them gets past it before all are in there at once.
everybody = threading.Barrier(SITE.get("everybody", 1), timeout=60)


def block() -> int:
    everybody.wait()
    time.sleep(0.2)
    return threading.get_ident()


async def overlap_in_sync_code(request: Any) -> HttpResponse:
    ran_on = await sync_to_async(block)()
    return JsonResponse(where() | {"request_thread": request.thread, "ran_on": ran_on})


# --- the end of a worker -----------------------------------------------------------------------------------------

#: gunicorn's, set by the test's configuration of gunicorn.
worker: Any = None


@atexit.register
def leave_proof() -> None:
    """A worker that is killed does not come here, and one that hangs at its end neither."""
    leave_mark("left")


async def two_seconds() -> None:
    from django.contrib.sessions.models import Session
    from django.utils import timezone

    await asyncio.sleep(2)
    await Session.objects.acreate(session_key="two seconds", session_data="", expire_date=timezone.now())


async def an_hour() -> None:
    await asyncio.sleep(3600)


async def blocking_hour() -> None:
    leave_mark("blocked")
    time.sleep(3600)  # what it is there to try


async def be_there_at_the_end(request: HttpRequest) -> HttpResponse:
    await pass_the_gate()
    while worker.alive:
        await asyncio.sleep(0.01)
    if request.GET:
        create_background_task(two_seconds())
        create_background_task(an_hour())
    return HttpResponse()


def block_the_loop(request: HttpRequest) -> HttpResponse:
    create_background_task(blocking_hour())
    return HttpResponse()


async def answer(request: HttpRequest) -> HttpResponse:
    await asyncio.sleep(0.01)
    return JsonResponse(where() | {"kind": type(asyncio.get_running_loop()).__module__})


async def call_the_loop() -> None:
    await asyncio.sleep(0)


def wait_for_the_loop(request: HttpRequest) -> HttpResponse:
    (FOLDER / f"waiting-{threading.get_ident()}").touch()
    async_to_sync(call_the_loop)()
    return HttpResponse()


# --- an application that has used the loop before gunicorn forks -------------------------------------------------

#: The master's process and loop.
masters: tuple[int, int] | None = None


async def call_in_the_master() -> None:
    global masters
    masters = os.getpid(), id(asyncio.get_running_loop())
    async with (await postgres()).connection() as connection:
        await connection.execute("SELECT 1")


def preloaded() -> Any:
    application = get_wsgi_application()
    with EventLoopContext(scope="process"):
        async_to_sync(call_in_the_master)()
    return application


# --- a lifespan --------------------------------------------------------------------------------------------------

#: Where the lifespan's server listens.
lifespan_port = 0


async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"hello")
    await writer.drain()
    writer.close()


async def serve_greetings(listening: asyncio.Event) -> None:
    global lifespan_port
    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        lifespan_port = server.sockets[0].getsockname()[1]
        listening.set()
        try:
            await server.serve_forever()
        finally:
            leave_mark("server-cancelled")


@asynccontextmanager
async def asyncio_lifespan() -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        listening = asyncio.Event()
        task = group.create_task(serve_greetings(listening))
        await listening.wait()
        yield
        task.cancel()
    leave_mark("lifespan-left")


@asynccontextmanager
async def anyio_lifespan() -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        listening = asyncio.Event()
        group.start_soon(serve_greetings, listening)
        await listening.wait()
        yield
        group.cancel_scope.cancel()
    leave_mark("lifespan-left")


async def be_greeted(request: HttpRequest) -> HttpResponse:
    reader, writer = await asyncio.open_connection("127.0.0.1", lifespan_port)
    greeting = await reader.read()
    writer.close()
    return HttpResponse(greeting)


urlpatterns = [
    path(function.__name__, function)
    for function in (
        use_the_pools,
        use_http,
        overlap_in_io,
        overlap_in_sync_code,
        be_there_at_the_end,
        block_the_loop,
        answer,
        wait_for_the_loop,
        be_greeted,
    )
]
