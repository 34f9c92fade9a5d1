"""A task that is suspended inside a greenlet keeps its thread: its loop is not promoted, and stands still meanwhile."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import greenlet
from asgiref.sync import sync_to_async
from django.http import HttpResponse

from .support import here, serve


async def spawn(function: Callable[[], Any]) -> Any:
    """Run sync code that awaits, as SQLAlchemy's asyncio extension does."""
    inner = greenlet.greenlet(function)
    result = inner.switch()
    while not inner.dead:
        try:
            value = await result
        except BaseException:
            result = inner.throw(*sys.exc_info())
        else:
            result = inner.switch(value)
    return result


def wait_for(awaitable: Awaitable[Any]) -> Any:
    return greenlet.getcurrent().parent.switch(awaitable)


def test_a_query_of_django_beside_one_of_sqlalchemy() -> None:
    seen: list[Any] = []

    def query() -> None:
        seen.append(wait_for(asyncio.sleep(0.01, "slept")))
        seen.append(wait_for(here()).thread)

    async def view(request: Any) -> HttpResponse:
        await asyncio.gather(spawn(query), sync_to_async(lambda: seen.append(threading.get_ident()))())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert server.status == "200 OK"
    me = threading.get_ident()
    assert seen == [me, "slept", me]


def test_a_left_over_task_in_a_greenlet_is_ended_by_the_request_thread() -> None:
    seen: list[Any] = []
    tasks: list[Any] = []

    def query() -> None:
        try:
            wait_for(asyncio.sleep(60))
        finally:
            seen.append(threading.get_ident())

    async def view(request: Any) -> HttpResponse:
        tasks.append(asyncio.ensure_future(spawn(query)))
        await asyncio.sleep(0)
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert server.status == "200 OK"
    assert seen == [threading.get_ident()]


def test_a_promotion_keeps_nothing_that_async_code_has_let_go_of() -> None:
    # Up to Python 3.12, to look at a frame's locals was to keep them for as long as the frame lives.
    class Big:
        pass

    left: list[Any] = []

    async def view(request: Any) -> HttpResponse:
        big = Big()
        reference = weakref.ref(big)
        await asyncio.gather(sync_to_async(int)(), asyncio.sleep(0))
        del big
        left.append(reference())
        return HttpResponse(threading.current_thread().name)

    with serve(view) as server:
        assert server.get().startswith(b"wsgi-loop")
    assert left == [None]
