"""Promises 8 and 9: thread-sensitive code runs on the request thread, and a fork takes no loop along."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.http import HttpResponse, StreamingHttpResponse

from .conftest import Connect
from .support import call_here, eventually, here, in_child, in_thread, serve

ident = threading.get_ident


@pytest.mark.django_db(transaction=True)
def test_orm_calls_from_async_code_are_in_the_connection_and_transaction_of_the_request_thread() -> None:
    seen: list[Any] = []

    async def create() -> None:
        await User.objects.acreate(username="rolled back")
        seen.append(await sync_to_async(lambda: (ident(), connection.in_atomic_block, id(connection.connection)))())

    def view(request: Any) -> Any:
        with transaction.atomic():
            seen.append((ident(), connection.in_atomic_block, id(connection.connection)))
            async_to_sync(create)()
            transaction.set_rollback(True)
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert seen[0] == seen[1]
    assert not User.objects.exists()


def test_a_task_that_outlives_its_loop_call_waits_for_the_next_one() -> None:
    seen: list[Any] = []

    async def start() -> Any:
        async def later() -> None:
            await asyncio.sleep(0.01)
            seen.append(await sync_to_async(ident)())

        return asyncio.ensure_future(later())

    def view(request: Any) -> Any:
        task = async_to_sync(start)()
        threading.Event().wait(0.05)
        assert seen == []

        async def wait() -> None:
            await task

        async_to_sync(wait)()
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert seen == [ident()]


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread"])
def test_a_task_that_outlives_its_loop_call_is_served_by_a_body_step(elsewhere: bool) -> None:
    seen: list[Any] = []

    async def view(request: Any) -> Any:
        async def later() -> None:
            await asyncio.sleep(0.01)
            seen.append(await sync_to_async(ident)())

        request.environ["test.task"] = asyncio.ensure_future(later())

        def body() -> Any:
            while not seen:
                threading.Event().wait(0.01)
                yield b""
            threads.append(ident())

        return StreamingHttpResponse(body())

    threads: list[int] = []
    with serve(view) as server:
        response = server.open()
        in_thread(lambda: b"".join(response)) if elsewhere else b"".join(response)
        response.close()
    assert seen == threads


def test_a_task_without_an_executor_in_its_context_uses_the_request_thread_too() -> None:
    import contextvars

    seen: list[Any] = []

    async def view(request: Any) -> Any:
        async def work() -> None:
            seen.append(await sync_to_async(ident)())

        await asyncio.get_running_loop().create_task(work(), context=contextvars.Context())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert seen == [ident()]


def test_a_call_made_after_the_request_gets_an_error_that_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[BaseException] = []
    release = threading.Event()

    async def stubborn() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            release.wait(30)  # until its request has gone on
            try:
                await sync_to_async(ident)()
            except RuntimeError as exc:
                errors.append(exc)

    async def view(request: Any) -> Any:
        request.environ["test.task"] = asyncio.ensure_future(stubborn())
        await asyncio.sleep(0)
        return HttpResponse()

    with serve(view, shutdown_timeout=0.5) as server:
        server.get("/late")
        release.set()
    eventually(lambda: errors)
    assert "GET '/late' is over" in str(errors[0])


def test_a_nested_call_does_not_run_work_that_was_meant_for_an_outer_one() -> None:
    """Work queued by a task of the outer call must not run in the middle of sync code below a nested one."""
    order: list[str] = []

    async def view(request: Any) -> Any:
        def sync() -> None:
            order.append("sync begins")
            async_to_sync(asyncio.sleep)(0.1)
            order.append("sync ends")

        async def other() -> None:
            await asyncio.sleep(0.02)
            await sync_to_async(order.append)("other")

        await asyncio.gather(sync_to_async(sync)(), other())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert order == ["sync begins", "sync ends", "other"]


def test_cancelling_async_code_cancels_the_nested_call_below_it_and_not_the_request_task() -> None:
    cancelled: list[Any] = []
    started: list[bool] = []

    async def nested() -> None:
        started.append(True)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(asyncio.current_task())
            raise

    async def start() -> Any:
        task = asyncio.ensure_future(sync_to_async(async_to_sync(nested))())
        while not started:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return asyncio.current_task()

    def view(request: Any) -> Any:
        first = async_to_sync(start)()
        assert call_here().task is first
        return HttpResponse("fine")

    with serve(view) as server:
        assert server.get() == b"fine"
    assert len(cancelled) == 1


def test_eight_threads_with_their_own_loops() -> None:
    places: list[Any] = []
    barrier = threading.Barrier(8)

    async def view(request: Any) -> Any:
        await sync_to_async(barrier.wait)(30)
        place = await here()
        places.append((place.loop, place.thread, await sync_to_async(ident)()))
        await sync_to_async(barrier.wait)(30)
        return HttpResponse()

    with serve(view) as server:
        threads = [threading.Thread(target=server.get) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(places) == len({loop for loop, _, _ in places}) == 8
    assert len({thread for _, thread, _ in places}) == 8
    assert {request_thread for _, _, request_thread in places} == {thread.ident for thread in threads}


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_serves_requests_after_its_parent_has_used_loops() -> None:
    with serve(lambda request: HttpResponse(str(call_here().thread))) as server:
        server.get()
        in_child(server.get)
        server.get()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_in_the_middle_of_a_request_does_not_touch_the_parents_loop(receive: Connect) -> None:
    places: list[Any] = []

    def view(request: Any) -> Any:
        if request.path == "/other":
            return HttpResponse(str(call_here().thread))
        places.append(call_here())
        async_to_sync(sync_to_async(ident))()
        in_child(lambda: (child_view(), server.get("/other")))
        places.append(call_here())
        return HttpResponse()

    def child_view() -> None:
        place = call_here()
        assert place.loop is not places[0].loop

    with serve(view) as server:
        response = server.open()
        # And between the view and close().
        in_child(response.close)
        response.close()
    assert places[0] == places[1]
    eventually(places[0].loop.is_closed)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_does_not_wait_for_its_parents_tasks() -> None:
    async def view(request: Any) -> Any:
        request.environ["test.task"] = asyncio.ensure_future(asyncio.sleep(3600))
        await asyncio.sleep(0)
        return HttpResponse()

    # Longer than a child is given.
    with serve(view, shutdown_timeout=60) as server:
        response = server.open()
        in_child(response.close)
        response.close()
