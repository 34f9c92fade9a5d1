"""A loop call made by sync code that a task runs is nested, whatever executor that code has in its context."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpRequest, HttpResponse

from wsgi_loop import PerLoop

from .support import call_here, serve

thread = sync_to_async(threading.get_ident)


async def nothing() -> None: ...


def run_view(code: Callable[[], Awaitable[None]], **options: Any) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        await asyncio.wait_for(code(), 5)
        return HttpResponse()

    with serve(view, **options) as server:
        server.get()
    assert server.status == "200 OK"


def test_a_factory_whose_sync_code_makes_a_loop_call_can_make_thread_sensitive_calls_after_it() -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[int]:
        await sync_to_async(call_here)()
        yield await thread()

    client = PerLoop(factory)
    seen = []

    async def code() -> None:
        seen.append(await client())

    run_view(code)
    assert seen == [threading.get_ident()]


def test_a_task_without_a_context_can_make_thread_sensitive_calls_after_a_nested_loop_call() -> None:
    seen = []

    async def work() -> None:
        await sync_to_async(call_here)()
        seen.append(await thread())

    async def code() -> None:
        await asyncio.get_running_loop().create_task(work(), context=contextvars.Context())

    run_view(code)
    assert seen == [threading.get_ident()]


def test_a_loop_call_on_a_thread_of_the_default_executor_takes_nothing_from_the_request_thread() -> None:
    @asynccontextmanager
    async def factory() -> AsyncIterator[int]:
        yield await thread()

    client = PerLoop(factory)
    seen = []

    async def code() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        # asgiref leaves the loop on that thread, where to_thread brings a context whose executor is hidden there.
        await sync_to_async(threading.get_ident, thread_sensitive=False)()
        await asyncio.to_thread(async_to_sync(nothing))
        seen.append(await client())

    run_view(code)
    assert seen == [threading.get_ident()]


def test_a_cancellation_reaches_a_loop_call_on_another_thread() -> None:
    seen = []

    async def code() -> None:
        started = asyncio.Event()

        async def slow() -> None:
            started.set()
            try:
                await asyncio.sleep(3)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        def sync_code() -> None:
            async_to_sync(slow)()

        # As below asgiref's ThreadSensitiveContext(executor=...): no executor in its context.
        context = contextvars.Context()
        run = sync_to_async(sync_code, thread_sensitive=False)
        task = asyncio.get_running_loop().create_task(run(), context=context)
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seen.append("awaited")

    run_view(code)
    assert seen == ["cancelled", "awaited"]


def test_a_task_that_outlives_its_call_keeps_the_request_thread_while_another_thread_waits_in_a_loop_call() -> None:
    seen = []
    tasks: list[asyncio.Task[None]] = []
    go: list[asyncio.Event] = []

    async def leave_task() -> None:
        go.append(asyncio.Event())

        async def work() -> None:
            await go[0].wait()
            seen.append(await thread())

        tasks.append(asyncio.create_task(work()))

    def middleware(get_response: Any) -> Any:
        def call(request: HttpRequest) -> HttpResponse:
            async_to_sync(leave_task)()
            return get_response(request)

        return call

    async def use_task() -> None:
        go[0].set()
        await tasks[0]

    async def code() -> None:
        run = sync_to_async(async_to_sync(use_task), thread_sensitive=False)
        await asyncio.get_running_loop().create_task(run(), context=contextvars.Context())

    run_view(code, middleware=[middleware])
    assert seen == [threading.get_ident()]
