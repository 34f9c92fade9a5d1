"""`create_background_task`: what such a task has of its request, what it has of its own, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from asgiref.local import Local
from asgiref.sync import async_to_sync, sync_to_async
from django.core.cache import caches
from django.db import connection, connections
from django.http import HttpResponse
from django.utils import timezone, translation
from django.utils.functional import SimpleLazyObject

from wsgi_loop import EventLoopContext, create_background_task, process

from .support import eventually, here, serve

var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="unset")


pytestmark = pytest.mark.usefixtures("new_process_loop")


def start(*args: Any, shutdown_timeout: float = 0.3, **kwargs: Any) -> Any:
    """Start a background task, with a short bound at its end."""
    with EventLoopContext(shutdown_timeout=shutdown_timeout):
        return create_background_task(*args, **kwargs)


@pytest.mark.parametrize("scope", ["request", "process"])
@pytest.mark.parametrize("kind", ["sync", "async", "sync below async", "sync after async"])
def test_it_outlives_its_request_in_a_copy_of_its_context(scope: str, kind: str) -> None:
    may_end = threading.Event()
    futures: list[Any] = []

    async def work() -> Any:
        while not may_end.is_set():
            await asyncio.sleep(0.01)
        # Read before sync code is called: asgiref brings it all along with that.
        told = var.get(), translation.get_language(), timezone.get_current_timezone_name()
        in_thread = await sync_to_async(lambda: (var.get(), translation.get_language()))()
        return *told, in_thread, await here()

    def begin() -> None:
        var.set("of the request")
        translation.activate("de")
        timezone.activate("Asia/Tokyo")
        futures.append(create_background_task(work()))

    async def begin_async() -> None:
        begin()

    def sync(request: Any) -> HttpResponse:
        if kind == "sync after async":
            async_to_sync(here)()
        begin()
        return HttpResponse()

    async def asynchronous(request: Any) -> HttpResponse:
        if kind == "async":
            begin()
        else:
            await sync_to_async(begin)()
        return HttpResponse()

    with serve(sync if kind.startswith("sync a") or kind == "sync" else asynchronous, scope=scope) as server:
        server.get()
        assert server.status == "200 OK"
        may_end.set()
        *told, place = futures[0].result(30)
    assert told == ["of the request", "de", "Asia/Tokyo", ("of the request", "de")]
    assert process._loop is not None
    assert place.loop is process._loop.loop


@pytest.mark.parametrize("scope", ["request", "process"])
def test_it_has_a_thread_and_connections_of_its_own_and_closes_them(scope: str) -> None:
    futures: list[Any] = []
    of_request: list[Any] = []

    def use() -> Any:
        connection.ensure_connection()
        return threading.get_ident(), connections["default"], caches["default"]

    both = asyncio.Barrier(2)

    async def work() -> Any:
        used = [await sync_to_async(use)() for _ in range(2)]
        # The thread of one that has ended might be the other's, by its number.
        await both.wait()
        return used

    async def view(request: Any) -> HttpResponse:
        # Where what the loop thread keeps of connections is in the context, too.
        connection.vendor  # noqa: B018
        of_request.append(await sync_to_async(use)())
        futures.extend(create_background_task(work()) for _ in range(2))
        return HttpResponse()

    with serve(view, scope=scope) as server:
        server.get()
    (first, again), (second, _) = (future.result(30) for future in futures)
    assert first == again
    assert first[0] != threading.get_ident()
    for i in range(3):
        assert len({id(each[i]) if i else each[i] for each in (first, second, of_request[0])}) == 3
    for used in (first, second):
        eventually(lambda used=used: used[1].connection is None)


def test_the_connections_that_async_code_sees_are_not_the_requests() -> None:
    seen: list[Any] = []
    futures: list[Any] = []

    async def work() -> Any:
        return connections["default"]

    async def view(request: Any) -> HttpResponse:
        seen.append(connections["default"])
        seen.append(await asyncio.create_task(work()))
        futures.append(create_background_task(work()))
        return HttpResponse()

    with serve(view, scope="process") as server:
        server.get()
    assert seen[0] is seen[1]
    assert futures[0].result(30) is not seen[0]


def test_a_lazy_object_in_a_local_is_not_evaluated() -> None:
    local = Local()
    evaluated: list[int] = []

    async def work() -> Any:
        return local.user

    def view(request: Any) -> HttpResponse:
        local.user = SimpleLazyObject(lambda: evaluated.append(1))
        assert create_background_task(work()).result(30) is local.user
        return HttpResponse()

    with serve(view) as server:
        server.get()
        assert server.status == "200 OK"
    assert evaluated == []


def test_an_exception_is_logged_with_the_name_and_the_path(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("no such mailbox")

    futures: list[Any] = []

    def view(request: Any) -> HttpResponse:
        futures.append(create_background_task(fail(), name="send mail"))
        return HttpResponse()

    with serve(view) as server:
        server.get("/orders/")
    with pytest.raises(ValueError, match="no such mailbox"):
        futures[0].result(30)
    assert "The background task send mail of GET '/orders/' failed" in caplog.text
    assert "ValueError: no such mailbox" in caplog.text


def test_its_name_is_the_tasks_name() -> None:
    async def work() -> Any:
        task = asyncio.current_task()
        return task and task.get_name()

    assert start(work(), name="mine").result(30) == "mine"
    assert start(work()).result(30).endswith("<locals>.work")


def test_what_is_no_coroutine_is_refused() -> None:
    async def work() -> None: ...

    with pytest.raises(TypeError, match=r"create_background_task\(\) takes a coroutine.*function.*work"):
        create_background_task(work)  # type: ignore[arg-type]


def test_too_many_are_refused_and_those_that_end_make_room() -> None:
    may_end = threading.Event()

    async def work() -> None:
        while not may_end.is_set():
            await asyncio.sleep(0.01)

    with EventLoopContext(max_background_tasks=3):
        futures = [create_background_task(work(), name="mail") for _ in range(3)]
        with pytest.raises(RuntimeError, match=r"^3 background tasks.*MAX_BACKGROUND_TASKS.*3 x background task mail"):
            create_background_task(work())
        may_end.set()
        for future in futures:
            future.result(30)
        create_background_task(work()).result(30)


def test_it_can_be_cancelled_before_and_after_its_first_step() -> None:
    started, cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    future = start(work())
    assert started.wait(30)
    assert future.cancel()
    assert cancelled.wait(30)
    with pytest.raises(CancelledError):
        future.result()
    running = process._loop
    assert running is not None
    started.clear()
    gate = threading.Event()
    running.loop.call_soon_threadsafe(gate.wait, 30)
    # It is never awaited, which would be a warning, and so an error.
    assert start(work()).cancel()
    gate.set()
    eventually(lambda: not running._background and not running._descriptions)
    gc.collect()
    assert not started.is_set()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "wsgi-sync-background"])


def test_one_that_is_cut_off_is_named_and_its_future_does_not_wait_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    future = start(asyncio.sleep(3600), name="endless", shutdown_timeout=1)
    process.shut_down()
    with pytest.raises(CancelledError):
        future.result(30)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "background task endless of EventLoopContext" in warnings[0]


def test_one_may_start_another_one_also_while_the_process_ends() -> None:
    order: list[str] = []
    futures: list[Any] = []

    async def second() -> None:
        await asyncio.sleep(0.05)
        order.append("second")

    async def first() -> None:
        await asyncio.sleep(0.05)
        order.append("first")
        futures.append(create_background_task(second()))

    with EventLoopContext(shutdown_timeout=30):
        create_background_task(first())
    process.shut_down()
    assert order == ["first", "second"]


def test_one_that_the_lifespan_starts_is_waited_for_before_the_lifespan_is_left() -> None:
    order: list[str] = []

    async def work() -> None:
        await asyncio.sleep(0.2)
        order.append("task")

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        create_background_task(work())
        yield
        order.append("lifespan")

    with EventLoopContext(scope="process", lifespan=lifespan, shutdown_timeout=30):
        async_to_sync(here)()
    process.shut_down()
    assert order == ["task", "lifespan"]


def test_a_system_exit_in_one_does_not_stop_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    async def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        start(leave(), name="leaver").result(30)
    assert "background task leaver" in caplog.text

    async def work() -> str:
        return "works"

    assert start(work()).result(30) == "works"
