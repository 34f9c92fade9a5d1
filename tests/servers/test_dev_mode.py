"""Eight server threads under Python's development mode, where each left-over and each misuse is told, as an error.

Each test runs a `child_...` function of this module in a process of its own.
"""

from __future__ import annotations

import asyncio
import collections
import gc
import json
import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse

from ..support import Server, call_here, eventually, here, loop_threads, serve

ROOT = Path(__file__).parent.parent.parent
THREADS = 8
REQUESTS = 500
USERS = 5


def in_child(function: Callable[..., Any], folder: Path) -> Any:
    """Call a function of this module in a new process in development mode. Returns what it returns."""
    program = (
        "import json, sys\n"
        f"from {__name__} import {function.__name__} as function, set_up\n"
        "set_up(sys.argv[1])\n"
        "print(json.dumps(function()))\n"
    )
    # Everything that only warns is an error; what can not raise one, in a __del__, tells so on stderr.
    environment = os.environ | {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "error"}
    child = subprocess.run(
        [sys.executable, "-c", program, str(folder / "db.sqlite3")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-5000:]
    for word in ("Warning", "Exception ignored", "Traceback"):
        assert word not in child.stderr, child.stderr[-5000:]
    return json.loads(child.stdout)


def set_up(database: str) -> None:
    """Django, with a database in a file: each thread has its own connection, which SQLite binds to the thread."""
    from django.conf import settings
    from django.db import connections

    settings.DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": database}}
    django.setup()
    from django.contrib.auth.models import User
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    User.objects.bulk_create([User(username=f"user{number}") for number in range(USERS)])
    connections.close_all()


class Loops:
    """Makes loops and holds none of them."""

    def __init__(self) -> None:
        self.made = 0
        self._references: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    def __call__(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        self.made += 1
        self._references.append(weakref.ref(loop))
        return loop

    def open(self) -> list[asyncio.AbstractEventLoop]:
        loops = [reference() for reference in self._references]
        return [loop for loop in loops if loop is not None and not loop.is_closed()]


class Records(logging.Handler):
    """Counts log records, apart from what says no more than that the machine is slow."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counted: collections.Counter[str] = collections.Counter()

    def emit(self, record: logging.LogRecord) -> None:
        if not (record.name == "asyncio" and str(record.msg).startswith("Executing %s took")):
            self.counted[f"{record.name}: {record.getMessage()}"] += 1


def on_all_threads(function: Callable[[int], None]) -> list[str]:
    """Call `function` on each of the server threads. Returns what they raised."""
    raised: list[str] = []

    def run(number: int) -> None:
        try:
            function(number)
        except BaseException as exc:
            raised.append(repr(exc))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return raised + [f"{thread} hangs" for thread in threads if thread.is_alive()]


def sync_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse("sync")


async def async_view(request: HttpRequest) -> HttpResponse:
    await asyncio.sleep(0)
    return HttpResponse("async")


async def orm_view(request: HttpRequest) -> HttpResponse:
    from django.contrib.auth.models import User

    names = [user.username async for user in User.objects.order_by("pk").aiterator()]
    count, exists = await asyncio.gather(User.objects.acount(), User.objects.filter(username="user0").aexists())
    return HttpResponse(f"orm {len(names)} {count} {exists}")


def streaming_view(request: HttpRequest) -> StreamingHttpResponse:
    def body() -> Iterator[str]:
        first = call_here()
        yield "stream"
        yield "ing" if call_here() == first else "?"

    return StreamingHttpResponse(body())


def failing_view(request: HttpRequest) -> HttpResponse:
    async_to_sync(here)()
    raise ValueError("the view's own")


async def left_over_view(request: HttpRequest) -> HttpResponse:
    asyncio.create_task(asyncio.sleep(600), name="left over")  # noqa: RUF006 - that is what is tried here
    return HttpResponse("left over")


async def nested_view(request: HttpRequest) -> HttpResponse:
    inner = await sync_to_async(call_here)()
    same = inner.loop is asyncio.get_running_loop()
    return HttpResponse(f"nested {same}")


#: What each URL is served by, and answers.
SHAPES: dict[str, tuple[Any, str, bytes]] = {
    "sync": (sync_view, "200 OK", b"sync"),
    "async": (async_view, "200 OK", b"async"),
    "orm": (orm_view, "200 OK", f"orm {USERS} {USERS} True".encode()),
    "streaming": (streaming_view, "200 OK", b"streaming"),
    "failing": (failing_view, "500 Internal Server Error", b""),
    "left_over": (left_over_view, "200 OK", b"left over"),
    "nested": (nested_view, "200 OK", b"nested True"),
}


def child_mixed_requests() -> Any:
    loops, records = Loops(), Records()
    logging.getLogger().addHandler(records)
    logging.getLogger("django").handlers.clear()
    wrong: list[str] = []

    def requests(number: int) -> None:
        server = Server(handler)
        names = list(SHAPES)
        for turn in range(REQUESTS):
            name = names[(turn + number) % len(names)]
            _, status, body = SHAPES[name]
            answer = server.get(f"/{name}")
            if server.status != status or (body and answer != body):
                wrong.append(f"{name}: {server.status} {answer[:200]!r}")

    with serve({name: shape[0] for name, shape in SHAPES.items()}, loop_factory=loops) as server:
        handler = server.handler
        wrong += on_all_threads(requests)
    eventually(lambda: not loops.open(), 60)
    eventually(lambda: not loop_threads(), 60)
    # What is left to say in a __del__ is said now.
    gc.collect()
    return {"wrong": wrong, "made": loops.made, "logged": records.counted}


@pytest.mark.long
def test_thousands_of_mixed_requests_leave_nothing_behind(tmp_path: Path) -> None:
    result = in_child(child_mixed_requests, tmp_path)
    assert result["wrong"] == []
    sent = collections.Counter(
        list(SHAPES)[(turn + number) % len(SHAPES)] for number in range(THREADS) for turn in range(REQUESTS)
    )
    # One for each request that makes a loop call, and the one that the factory is tried with.
    assert result["made"] == THREADS * REQUESTS - sent["sync"] + 1
    logged = result["logged"]
    assert logged.pop("django.request: Internal Server Error: /failing") == sent["failing"]
    left_over = [message for message in logged if "GET '/left_over': ended while 1 of its tasks still ran" in message]
    assert sum(logged.pop(message) for message in left_over) == sent["left_over"]
    assert logged == {}


def child_orm_on_all_threads() -> Any:
    from django.contrib.auth.models import User
    from django.db import connection

    moved: list[str] = []

    def use_the_connection() -> tuple[int, int]:
        # Not closed and opened again below the same request, which would hide a change of threads.
        connection.ensure_connection()
        return threading.get_ident(), id(connection.connection)

    def middleware(get_response: Any) -> Any:
        def call(request: HttpRequest) -> Any:
            request.opened_by = use_the_connection()
            response = get_response(request)
            if use_the_connection() != request.opened_by:
                moved.append("the middleware's")
            return response

        return call

    async def view(request: Any) -> HttpResponse:
        async def query(number: int) -> None:
            if await sync_to_async(use_the_connection)() != request.opened_by:
                moved.append(f"the query's, {number}")
            user = await User.objects.aget(username=f"user{number}")
            await user.arefresh_from_db()

        await asyncio.gather(*map(query, range(USERS)))
        names = [user.username async for user in User.objects.aiterator(chunk_size=2)]
        return HttpResponse(str(len(names)))

    def requests(number: int) -> None:
        server = Server(handler)
        for _ in range(20):
            assert server.get() == str(USERS).encode(), server.status

    with serve(view, middleware=[middleware], DEBUG_PROPAGATE_EXCEPTIONS=True) as server:
        handler = server.handler
        raised = on_all_threads(requests)
    return {"moved": moved, "raised": raised}


@pytest.mark.long
def test_sqlites_check_of_the_thread_never_trips(tmp_path: Path) -> None:
    assert in_child(child_orm_on_all_threads, tmp_path) == {"moved": [], "raised": []}


def test_sync_calls_of_concurrent_requests_overlap_each_on_its_request_thread() -> None:
    # All of them get past it only if all are in there at once; on one shared thread the first would wait for ever.
    barrier = threading.Barrier(THREADS, timeout=60)
    seen: list[tuple[int, int]] = []

    def block(request: HttpRequest) -> None:
        barrier.wait()
        seen.append((threading.get_ident(), request.META["tests.thread"]))

    async def view(request: HttpRequest) -> HttpResponse:
        for _ in range(3):
            await sync_to_async(block)(request)
        return HttpResponse()

    def request(number: int) -> None:
        Server(handler).get(**{"tests.thread": threading.get_ident()})

    with serve(view, DEBUG_PROPAGATE_EXCEPTIONS=True) as server:
        handler = server.handler
        raised = on_all_threads(request)
    assert raised == []
    assert len(seen) == 3 * THREADS
    assert all(ran_on == request_thread for ran_on, request_thread in seen)
    assert len(set(seen)) == THREADS
