"""Async bodies: sent chunk by chunk, in one task of the request's loop, and closed before request_finished."""

from __future__ import annotations

import asyncio
import contextvars
import gzip
import os
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
from asgiref.local import Local
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.db import connection
from django.http import HttpResponse, StreamingHttpResponse

from wsgi_loop import process
from wsgi_loop.bridge.storage import scope_here
from wsgi_loop.responses import call_after_close

from .conftest import Connect
from .support import Place, Server, call_here, eventually, here, in_child, in_thread, serve

var: contextvars.ContextVar[Any] = contextvars.ContextVar("var", default=None)


def streaming(body: Any) -> Any:
    """A view whose response is what `body()` gives."""
    return lambda request: StreamingHttpResponse(body())


def read_slowly(server: Server) -> list[bytes]:
    """What comes after the first chunk, of which the client takes its time to read it."""
    response = server.open()
    chunks = iter(response)
    next(chunks)
    time.sleep(0.1)
    rest = [*chunks]
    response.close()
    return rest


def test_chunks_are_made_when_the_server_asks_for_them() -> None:
    made: list[int] = []

    async def body() -> AsyncIterator[bytes]:
        for number in range(3):
            await asyncio.sleep(0)
            made.append(number)
            yield b"%d" % number

    with serve(streaming(body)) as server:
        response = server.open()
        assert made == []
        chunks = iter(response)
        for number in range(3):
            assert next(chunks) == b"%d" % number
            assert made == list(range(number + 1))
        assert list(chunks) == []
        assert list(chunks) == []
        response.close()


def test_what_is_not_bytes_is_encoded_as_django_does() -> None:
    async def body() -> AsyncIterator[Any]:
        yield "ä"
        yield 1
        yield memoryview(b"x")

    with serve(streaming(body)) as server:
        assert server.get() == "ä1x".encode()


def test_all_steps_run_in_the_requests_task_and_context(
    receive: Connect, loops: list[asyncio.AbstractEventLoop]
) -> None:
    places: list[Place] = []
    seen: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        token = var.set("body")
        for _ in range(3):
            places.append(await here())
            places.append(await sync_to_async(call_here)())
            yield b"x"
        var.reset(token)
        seen.append(var.get())
        var.set("end of body")

    def view(request: Any) -> StreamingHttpResponse:
        var.set("view")
        places.append(call_here())
        return StreamingHttpResponse(body())

    def finished(**kwargs: Any) -> None:
        seen.append(var.get())
        places.append(call_here())

    receive(finished=finished)
    with serve(view) as server:
        assert server.get() == b"xxx"
    assert seen == ["view", "end of body"]
    assert len({place.loop for place in places}) == 1
    assert len({place.thread for place in places}) == 1
    # The nested calls are the ones that have tasks of their own.
    assert len({places[number].task for number in (0, 1, 3, 5, 7)}) == 1
    loops.append(places[0].loop)


class Sync(StreamingHttpResponse):
    """Calls a function in the request's context after each step, as Django encodes the chunk there."""

    after_step: Any

    def make_bytes(self, value: Any) -> bytes:
        self.after_step()
        return super().make_bytes(value)


def test_what_a_step_sets_and_what_is_set_between_two_goes_over_to_the_other_side() -> None:
    local = Local()
    seen: list[Any] = []

    def look(side: str) -> None:
        seen.append((side, var.get(), getattr(local, "value", None)))

    async def body() -> AsyncIterator[bytes]:
        for number in range(8):
            # Twice nothing, then one side, then nothing, then the other one.
            look("body")
            if number == 2:
                var.set("of body")
                local.value = "of body"
            # Sync code sees it too, and can set it as well.
            await sync_to_async(look)("sync")
            if number == 6:
                await sync_to_async(var.set)("of sync code")
            yield b"%d" % number

    def after_step() -> None:
        look("request")
        if len(seen) == 12:
            var.set("of request")
            local.value = "of request"

    def view(request: Any) -> StreamingHttpResponse:
        response = Sync(body())
        response.after_step = after_step
        return response

    with serve(view) as server:
        assert server.get() == b"01234567"
    sides = ("body", "sync", "request")
    nothing, of_body, of_request = ((None, None), ("of body",) * 2, ("of request",) * 2)
    assert [place[0] for place in seen] == list(sides) * 8
    assert [place[1:] for place in seen] == [
        *[nothing] * 3,
        *[nothing] * 3,
        *[nothing, of_body, of_body],
        *[of_body] * 3,
        *[of_request] * 3,
        *[of_request] * 3,
        *[of_request] * 2,
        *[("of sync code", "of request")] * 4,
    ]


def test_a_call_between_two_steps_that_is_made_in_another_context() -> None:
    seen: list[Any] = []

    async def nothing() -> None:
        pass

    async def body() -> AsyncIterator[bytes]:
        for _ in range(6):
            seen.append(var.get())
            yield b"x"

    def after_step() -> None:
        if len(seen) == 3:
            context = contextvars.copy_context()
            context.run(var.set, "of copy")
            context.run(async_to_sync(nothing))

    def view(request: Any) -> StreamingHttpResponse:
        var.set("of request")
        response = Sync(body())
        response.after_step = after_step
        return response

    with serve(view) as server:
        server.get()
    assert seen == ["of request"] * 6


def test_a_step_amid_a_call_has_a_task_of_its_own_and_leaves_the_next_one_its_context() -> None:
    seen: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        for number in range(4):
            seen.append((number, var.get()))
            await sync_to_async(lambda: None)()
            var.set(f"body {number}")
            yield b"%d" % number

    body_ = body()

    def step() -> Any:
        scope = scope_here()
        assert scope is not None
        return scope.advance(body_)

    async def view(request: Any) -> HttpResponse:
        chunks = [await sync_to_async(step)(), await sync_to_async(step)()]
        seen.append(var.get())
        var.set("view")
        return HttpResponse(b"".join(chunks))

    def middleware(get_response: Any) -> Any:
        def middleware(request: Any) -> Any:
            before = step()
            response = get_response(request)
            seen.append(var.get())
            return HttpResponse(before + response.content + step())

        return middleware

    with serve(view, middleware=[middleware]) as server:
        assert server.get() == b"0123"
    assert seen == [(0, None), (1, "body 0"), (2, "body 1"), "body 2", "view", (3, "view")]


def test_a_body_that_is_read_while_an_exception_is_handled_sees_it() -> None:
    async def body() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0)
            yield repr(sys.exc_info()[1]).encode()

    with serve(streaming(body)) as server:
        response = server.open()
        chunks = iter(response)
        assert next(chunks) == next(chunks) == b"None"
        try:
            raise LookupError("of the server")
        except LookupError:
            assert next(chunks) == b"LookupError('of the server')"
        assert next(chunks) == b"None"
        response.close()


def test_a_body_can_not_be_read_on_a_thread_whose_own_loop_is_running() -> None:
    async def body() -> AsyncIterator[bytes]:
        while True:
            yield b"x"

    async def read(chunks: Iterator[bytes]) -> bytes:
        return next(chunks)

    with serve(streaming(body)) as server:
        response = server.open()
        chunks = iter(response)
        for _ in range(2):
            assert next(chunks) == b"x"
            with pytest.raises(RuntimeError, match="same thread as an async event loop"):
                asyncio.run(read(chunks))
        response.close()


def test_an_exception_of_any_step_leaves_nothing_for_the_collector(no_gc: None) -> None:
    kept: list[Any] = []

    class Failure(Exception):
        """Which, unlike the built-in ones, can be referred to weakly."""

    async def body(chunks: int) -> AsyncIterator[bytes]:
        for _ in range(chunks):
            yield b"x"
        exc = Failure("in the body")
        kept.append(weakref.ref(exc))
        try:
            raise exc
        finally:
            del exc

    for chunks in range(4):
        with serve(streaming(partial(body, chunks))) as server:
            response = server.open()
            with suppress(Failure):
                list(response)
            response.close()
    del response
    eventually(lambda: [ref() for ref in kept] == [None] * 4, 2)


@pytest.mark.parametrize("is_read", [False, True])
def test_a_nested_call_of_the_body_that_is_the_first_of_its_request(receive: Connect, is_read: bool) -> None:
    places: list[Place] = []

    class Body:
        async def __anext__(self) -> bytes:
            places.append(await here())
            await sync_to_async(call_here)()
            raise StopAsyncIteration

        async def aclose(self) -> None:
            places.append(await here())
            await sync_to_async(call_here)()

        def __aiter__(self) -> AsyncIterator[bytes]:
            return self

    receive(finished=lambda **kwargs: places.append(call_here()))
    with serve(streaming(Body)) as server:
        response = server.open()
        if is_read:
            assert list(response) == []
        response.close()
    assert len(places) == 2 + is_read
    assert len({(place.loop, place.task) for place in places}) == 1


def test_two_steps_on_other_threads_are_the_same_task() -> None:
    places: list[Place] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            for _ in range(3):
                places.append(await here())
                yield b"x"
        finally:
            places.append(await here())

    with serve(streaming(body)) as server:
        response = server.open()
        chunks = iter(response)
        in_thread(lambda: next(chunks))
        next(chunks)
        in_thread(response.close)
    assert len(places) == 3
    assert len({(place.loop, place.task) for place in places}) == 1


@pytest.mark.django_db(transaction=True)
def test_orm_calls_run_on_the_request_thread() -> None:
    threads: list[int] = []

    def note(execute: Any, *args: Any) -> Any:
        threads.append(threading.get_ident())
        return execute(*args)

    async def body() -> AsyncIterator[bytes]:
        async for user in User.objects.order_by("pk").aiterator(chunk_size=2):
            yield user.username.encode()

    User.objects.bulk_create([User(username=str(number)) for number in range(7)])
    with serve(streaming(body)) as server, connection.execute_wrapper(note):
        assert server.get() == b"0123456"
    assert set(threads) == {threading.get_ident()}


def test_gzip_middleware() -> None:
    made: list[int] = []
    ended: list[Place] = []
    # As much as it takes for Django 6.0, which does not flush after each chunk, to send some of it before the end.
    content = [os.urandom(10_000) for _ in range(100)]

    async def body() -> AsyncIterator[bytes]:
        try:
            for number in range(100):
                made.append(number)
                yield content[number]
        finally:
            await asyncio.sleep(0)
            ended.append(await here())

    with serve(streaming(body), middleware=["django.middleware.gzip.GZipMiddleware"]) as server:
        response = server.open(HTTP_ACCEPT_ENCODING="gzip")
        chunks = iter(response)
        assert gzip.decompress(b"".join(chunks)) == b"".join(content)
        response.close()
        assert len(ended) == 1

        response = server.open(HTTP_ACCEPT_ENCODING="gzip")
        chunks = iter(response)
        made.clear()
        while not made:
            next(chunks)
        assert len(made) < 100
        response.close()
        assert len(ended) == 2


def test_nested_generators_end_in_the_requests_task_when_the_server_closes_early(
    receive: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    order: list[Any] = []
    places: list[Place] = []

    async def inner() -> AsyncIterator[bytes]:
        async with anyio.create_task_group():
            try:
                places.append(await here())
                yield b"x"
                yield b"y"
            finally:
                with anyio.CancelScope(shield=True):
                    await asyncio.sleep(0.01)
                places.append(await here())
                order.append("inner")

    async def body() -> AsyncIterator[bytes]:
        try:
            async for chunk in inner():
                yield chunk
        finally:
            await asyncio.sleep(0.01)
            order.append("outer")

    receive(finished=lambda **kwargs: order.append("request_finished"))
    with serve(streaming(body)) as server:
        response = server.open()
        call_after_close(response, lambda: order.append("after close"))
        assert next(iter(response)) == b"x"
        response.close()
        # The frame of the outer one lets the inner one go when it has ended.
        assert order == ["outer", "inner", "request_finished", "after close"]
        response.close()
    assert order.count("outer") == 1
    assert caplog.records == []
    assert len({(place.loop, place.task) for place in places}) == 1


def test_an_iterator_that_has_aclose_is_closed_whether_it_was_read_or_not(receive: Connect) -> None:
    order: list[str] = []

    class Body:
        def __init__(self) -> None:
            self.left = 2

        def __aiter__(self) -> Body:
            return self

        async def __anext__(self) -> bytes:
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            return b"x"

        async def aclose(self) -> None:
            await asyncio.sleep(0)
            order.append("closed")

    receive(finished=lambda **kwargs: order.append("request_finished"))
    with serve(streaming(Body)) as server:
        assert server.get() == b"xx"
        server.open().close()
        response = server.open()
        next(iter(response))
        response.close()
    assert order == ["closed", "request_finished"] * 3


def test_a_generator_that_was_never_started_costs_no_loop() -> None:
    made: list[asyncio.AbstractEventLoop] = []

    async def body() -> AsyncIterator[bytes]:
        yield b"x"  # pragma: no cover

    def make() -> asyncio.AbstractEventLoop:
        made.append(asyncio.new_event_loop())
        return made[-1]

    with serve(streaming(body), scope="request", loop_factory=make) as server:
        made.clear()  # the one that the check of the option has made
        response = server.open()
        chunks = iter(response)
        response.close()
        assert list(chunks) == []
        assert list(response) == []
        server.open().close()
    assert made == []


def test_the_finally_of_a_generator_may_use_the_orm_and_make_nested_calls(receive: Connect) -> None:
    seen: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"x"
        finally:
            seen.append(await sync_to_async(threading.get_ident)())
            seen.append((await sync_to_async(call_here)()).loop is asyncio.get_running_loop())
            var.set("finally")

    receive(finished=lambda **kwargs: seen.append(var.get()))
    with serve(streaming(body)) as server:
        response = server.open()
        next(iter(response))
        response.close()
    assert seen == [threading.get_ident(), True, "finally"]


def test_an_exception_reaches_the_server_once_with_its_traceback(receive: Connect) -> None:
    finished: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(0)
        raise ZeroDivisionError("in the body")

    receive(finished=lambda **kwargs: finished.append(True))
    with serve(streaming(body)) as server:
        response = server.open()
        chunks = iter(response)
        assert next(chunks) == b"x"
        with pytest.raises(ZeroDivisionError) as caught:
            next(chunks)
        assert "body" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert list(chunks) == []
        response.close()
    assert finished == [True]


def test_an_exception_in_a_finally_is_logged_and_the_response_closed(
    receive: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    finished: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"x"
        finally:
            raise ZeroDivisionError("in the finally")

    receive(finished=lambda **kwargs: finished.append(True))
    with serve(streaming(body)) as server:
        response = server.open("/there/")
        next(iter(response))
        response.close()
    assert finished == [True]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "GET '/there/'" in caplog.text
    assert "body" in caplog.records[0].getMessage()
    assert "ZeroDivisionError: in the finally" in caplog.text


def test_a_timeout_across_yields() -> None:
    seen: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            async with asyncio.timeout(0.05):
                yield b"a"
                yield b"b"
                await asyncio.sleep(60)
        except TimeoutError:
            seen.append(asyncio.current_task().cancelling())  # type: ignore[union-attr]
            yield b"timeout"
        await asyncio.sleep(0)
        yield b"end"

    with serve(streaming(body)) as server:
        assert server.get() == b"abtimeoutend"
        response = server.open()
        chunks = iter(response)
        assert next(chunks) == b"a"
        time.sleep(0.2)  # a slow client
        # asyncio delivers it where the generator next waits, as it does in any task.
        assert [*chunks] == [b"b", b"timeout", b"end"]
        response.close()
    assert seen == [0, 0]


def test_a_timeout_that_comes_while_a_slow_client_reads_outlasts_steps_that_never_wait() -> None:
    async def body() -> AsyncIterator[bytes]:
        try:
            async with asyncio.timeout(0.02):
                for _ in range(5):
                    yield b"x"
                await asyncio.sleep(0)
                yield b"never"
        except TimeoutError:
            yield b"timeout"

    with serve(streaming(body)) as server:
        assert read_slowly(server) == [b"x"] * 4 + [b"timeout"]


def test_two_timeouts_that_come_while_a_slow_client_reads() -> None:
    async def body() -> AsyncIterator[bytes]:
        try:
            async with asyncio.timeout(0.02):
                async with asyncio.timeout(0.01):
                    yield b"a"
                    await asyncio.sleep(60)
        except TimeoutError:
            yield b"timeout"

    with serve(streaming(body)) as server:
        assert read_slowly(server) == [b"timeout"]


def test_a_server_that_closes_after_a_timeout_has_come_lets_the_finally_run(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            async with asyncio.timeout(0.02):
                yield b"a"
        finally:
            await asyncio.sleep(0.01)
            seen.append("finally")

    with serve(streaming(body)) as server:
        response = server.open()
        next(iter(response))
        time.sleep(0.1)
        response.close()
    assert seen == ["finally"]
    assert caplog.records == []


def test_a_cancellation_that_the_body_swallows_does_not_reach_request_finished(receive: Connect) -> None:
    seen: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        yield b"a"
        # As in any task that does not call uncancel().
        seen.append(task.cancelling())
        task.cancel()
        yield b"b"
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
            seen.append("not cancelled")

    async def look() -> None:
        seen.append(asyncio.current_task().cancelling())  # type: ignore[union-attr]
        await asyncio.sleep(0)

    receive(finished=lambda **kwargs: async_to_sync(look)())
    with serve(streaming(body)) as server:
        assert server.get() == b"ab"
    assert seen == [1, 0]


@pytest.mark.parametrize("slow", [False, True])
def test_a_task_group_across_yields(slow: bool) -> None:
    async def child(queue: asyncio.Queue[bytes]) -> None:
        for number in range(3):
            await queue.put(b"%d" % number)
            await asyncio.sleep(0.001)

    async def body() -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            group.create_task(child(queue))
            for _ in range(3):
                yield await queue.get()

    with serve(streaming(body)) as server:
        response = server.open()
        chunks = []
        for chunk in response:
            chunks.append(chunk)
            time.sleep(0.05 * slow)
        response.close()
    assert chunks == [b"0", b"1", b"2"]


def test_a_child_that_fails_between_two_chunks() -> None:
    async def child() -> None:
        await asyncio.sleep(0.01)
        raise ZeroDivisionError

    async def body() -> AsyncIterator[bytes]:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
                yield b"a"
                await asyncio.sleep(60)
                yield b"never"
        except* ZeroDivisionError:
            pass
        yield b"failed"

    with serve(streaming(body)) as server:
        assert read_slowly(server) == [b"failed"]


def test_a_child_that_failed_before_the_server_closes_early(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    async def child() -> None:
        raise ZeroDivisionError

    async def body() -> AsyncIterator[bytes]:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(child())
                yield b"a"
        finally:
            await asyncio.sleep(0.01)
            seen.append("finally")

    with serve(streaming(body)) as server:
        response = server.open()
        next(iter(response))
        time.sleep(0.1)
        response.close()
    assert seen == ["finally"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("early", [False, True])
def test_an_anyio_task_group_across_yields(early: bool) -> None:
    ended: list[str] = []

    async def child(send: Any) -> None:
        async with send:
            try:
                for number in range(5):
                    await send.send(b"%d" % number)
            except (anyio.BrokenResourceError, asyncio.CancelledError):
                ended.append("cut off")
                raise

    async def body() -> AsyncIterator[bytes]:
        send, receive = anyio.create_memory_object_stream[bytes]()
        try:
            async with anyio.create_task_group() as group, receive:
                group.start_soon(child, send)
                async for chunk in receive:
                    yield chunk
        finally:
            ended.append("body")

    with serve(streaming(body)) as server:
        response = server.open()
        chunks = iter(response)
        if early:
            assert next(chunks) == b"0"
        else:
            assert [*chunks] == [b"0", b"1", b"2", b"3", b"4"]
        response.close()
    assert ended == (["cut off", "body"] if early else ["body"])


@pytest.mark.parametrize("slow", [False, True])
def test_an_anyio_cancel_scope_across_yields(slow: bool) -> None:
    async def body() -> AsyncIterator[bytes]:
        with anyio.move_on_after(0.05) as scope:
            yield b"a"
            await anyio.sleep(60)
            yield b"never"
        assert scope.cancelled_caught
        await anyio.sleep(0.01)
        yield b"end"

    with serve(streaming(body)) as server:
        response = server.open()
        chunks = iter(response)
        next(chunks)
        time.sleep(0.2 * slow)
        assert [*chunks] == [b"end"]
        response.close()


@pytest.mark.django_db(transaction=True)
def test_a_child_that_uses_the_orm_across_chunks() -> None:
    threads: set[int] = set()

    def create(number: int) -> None:
        threads.add(threading.get_ident())
        User.objects.create(username=str(number))

    async def child(queue: asyncio.Queue[int]) -> None:
        for number in range(5):
            await sync_to_async(create)(number)
            await queue.put(await User.objects.acount())

    async def body() -> AsyncIterator[bytes]:
        queue: asyncio.Queue[int] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            group.create_task(child(queue))
            for _ in range(5):
                yield b"%d" % await queue.get()

    with serve(streaming(body)) as server:
        assert server.get() == b"12345"
    assert threads == {threading.get_ident()}


def test_a_child_that_is_cancelled_in_a_nested_call_does_not_wait_for_the_requests_task() -> None:
    async def body() -> AsyncIterator[bytes]:
        async with asyncio.TaskGroup() as group:
            group.create_task(sync_to_async(call_here)())
            yield b"x"
            raise ValueError

    with serve(streaming(body)) as server:
        for _ in range(20):
            response = in_thread(server.open)
            chunks = iter(response)
            in_thread(lambda chunks=chunks: next(chunks))
            with pytest.raises(ExceptionGroup):
                in_thread(lambda chunks=chunks: next(chunks))
            in_thread(response.close)


def test_a_finally_that_takes_too_long_is_cancelled_and_named(
    receive: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    order: list[str] = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            yield b"x"
        finally:
            try:
                await asyncio.sleep(3600)
            finally:
                order.append("cancelled")

    receive(finished=lambda **kwargs: order.append("request_finished"))
    with serve(streaming(endless), shutdown_timeout=0.5) as server:
        response = server.open()
        next(iter(response))
        response.close()
        assert order == ["cancelled", "request_finished"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "endless" in caplog.text
    assert "SHUTDOWN_TIMEOUT" in caplog.text


def test_an_interrupted_end_of_a_body_closes_the_response_all_the_same(receive: Connect, interruptible: None) -> None:
    finished: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"x"
        finally:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]
            await asyncio.sleep(3600)

    receive(finished=lambda **kwargs: finished.append(True))
    with serve(streaming(body), shutdown_timeout=0.5) as server:
        response = server.open()
        next(iter(response))
        with pytest.raises(KeyboardInterrupt):
            response.close()
    assert finished == [True]


def test_a_response_of_two_requests_is_ended_by_the_one_that_reads_it() -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x"

    shared = StreamingHttpResponse(body())
    with serve(lambda request: shared) as server:
        first = server.open()
        chunks = iter(first)
        next(chunks)
        server.open().close()
        assert [*chunks] == [b"x", b"x"]
        first.close()


def stubborn(released: threading.Event) -> Any:
    async def swallows_cancellation() -> AsyncIterator[bytes]:
        try:
            yield b"x"
        finally:
            while not released.is_set():
                with suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

    return swallows_cancellation


def blocking(released: threading.Event) -> Any:
    async def blocks_its_thread() -> AsyncIterator[bytes]:
        try:
            yield b"x"
        finally:
            released.wait(30)

    return blocks_its_thread


def check_that_a_finally_does_not_hold_the_request(make: Any, receive: Connect, log: pytest.LogCaptureFixture) -> None:
    released = threading.Event()
    order: list[Any] = []

    async def finished(**kwargs: Any) -> None:
        order.append("request_finished")

    receive(finished=finished)
    try:
        with serve(streaming(make(released)), scope="request", shutdown_timeout=0.1) as server:
            response = server.open()
            next(iter(response))
            response.close()
            assert order == ["request_finished"]
            assert make(released).__name__ in log.text
            assert server.open().status_code == 200
    finally:
        released.set()


def test_a_finally_that_will_not_end_does_not_hold_the_request(
    receive: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    check_that_a_finally_does_not_hold_the_request(stubborn, receive, caplog)


def test_a_finally_that_blocks_its_loop_thread_does_not_hold_the_request(
    receive: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    check_that_a_finally_does_not_hold_the_request(blocking, receive, caplog)


def test_an_early_end_while_another_thread_takes_a_step(receive: Connect, caplog: pytest.LogCaptureFixture) -> None:
    inside = threading.Event()
    ended: list[str] = []

    async def slow() -> AsyncIterator[bytes]:
        try:
            inside.set()
            await asyncio.sleep(3600)
            yield b"never"
        finally:
            await asyncio.sleep(0.01)
            ended.append("finally")

    receive(finished=lambda **kwargs: ended.append("request_finished"))

    outcome: list[BaseException] = []

    def step(chunks: Iterator[bytes]) -> None:
        try:
            next(chunks)
        except BaseException as exc:
            outcome.append(exc)

    with serve(streaming(slow)) as server:
        response = server.open()
        thread = threading.Thread(target=step, args=[iter(response)])
        thread.start()
        inside.wait(60)
        response.close()
        assert ended == ["finally", "request_finished"]
        thread.join(60)
        assert [type(exc) for exc in outcome] == [asyncio.CancelledError]
    assert "slow" in caplog.text


def test_sync_code_of_a_step_stays_on_its_thread_while_another_one_closes_the_response() -> None:
    threads: list[int] = []
    entered = threading.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        try:
            entered.set()
            await asyncio.sleep(60)
        finally:
            for _ in range(20):
                await sync_to_async(lambda: threads.append(threading.get_ident()))()

    with serve(streaming(body)) as server:
        response = server.open()
        chunks = iter(response)
        next(chunks)

        def read() -> int:
            with pytest.raises(asyncio.CancelledError):
                next(chunks)
            return threading.get_ident()

        reader: list[int] = []
        thread = threading.Thread(target=lambda: reader.append(read()))
        thread.start()
        assert entered.wait(60)
        response.close()
        thread.join(60)
    assert threads == reader * 20


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_a_step_is_handed_over(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    ended: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            for _ in range(3):
                yield b"x"
                await asyncio.sleep(0.01)
        finally:
            ended.append(asyncio.current_task())

    with serve(streaming(body)) as server:
        response = server.open()
        chunks = iter(response)
        next(chunks)
        running = response._wsgi_loop_scope.calls.running
        name = "hand_over" if running.is_promoted else "drive"
        function = getattr(running, name)

        def interrupted(*args: Any) -> None:
            setattr(running, name, function)
            if moment == "after":
                function(*args)
            raise KeyboardInterrupt

        setattr(running, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
        response.close()
    assert len(ended) == 1
    assert ended[0] is not None


def test_a_thread_that_is_interrupted_in_a_step_ends_the_body_before_request_finished(
    receive: Connect, caplog: pytest.LogCaptureFixture, interruptible: None
) -> None:
    order: list[str] = []
    places: list[Place] = []
    waits = threading.Event()
    main: Any = threading.main_thread().ident

    def interrupt() -> None:
        waits.wait(60)
        # Again, as a signal that comes just before the thread begins to wait does not wake it.
        while not interrupted.wait(0.1):
            signal.pthread_kill(main, signal.SIGUSR1)

    interrupted = threading.Event()

    async def slow() -> AsyncIterator[bytes]:
        try:
            places.append(await here())
            yield b"x"
            waits.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            places.append(await here())
            order.append("finally")

    receive(finished=lambda **kwargs: order.append("request_finished"))
    with serve(streaming(slow)) as server:
        response = server.open()
        chunks = iter(response)
        next(chunks)
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
        interrupted.set()
        interrupter.join()
        response.close()
    assert order == ["finally", "request_finished"]
    assert len({(place.loop, place.task) for place in places}) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "slow made a chunk" in caplog.text


def test_a_generator_that_closes_its_own_response(caplog: pytest.LogCaptureFixture) -> None:
    made: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"a"
        finally:
            await asyncio.sleep(0)
            made[0].close()

    def view(request: Any) -> StreamingHttpResponse:
        made.append(StreamingHttpResponse(body()))
        return made[0]

    with serve(view) as server:
        assert server.get() == b"a"
        made.clear()
        response = server.open()
        next(iter(response))
        response.close()
    assert caplog.records == []


def test_a_body_that_is_never_closed_gives_its_loop_back(loops: list[asyncio.AbstractEventLoop], no_gc: None) -> None:
    async def body() -> AsyncIterator[bytes]:
        loops.append(asyncio.get_running_loop())
        yield b"x"
        yield b"y"

    with serve(streaming(body), scope="request") as server:
        response = server.open()
        next(iter(response))
        with pytest.warns(ResourceWarning, match="dropped without close"):
            del response


@pytest.mark.parametrize("early", [False, True])
def test_the_response_is_freed_without_the_collector(early: bool, no_gc: None) -> None:
    kept: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(0)
        yield b"y"

    def view(request: Any) -> StreamingHttpResponse:
        response = StreamingHttpResponse(body())
        kept.extend((weakref.ref(request), weakref.ref(response), weakref.ref(response._iterator)))  # type: ignore[attr-defined]
        return response

    with serve(view) as server:
        response = server.open()
        if early:
            next(iter(response))
        else:
            assert [*response] == [b"x", b"y"]
        response.close()
        del response
        eventually(lambda: [ref() for ref in kept] == [None] * 3, 2)


def test_a_body_that_was_begun_before_a_fork_does_not_hang_the_child() -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        yield b"y"

    with serve(streaming(body)) as server:
        response = server.open()
        chunks = iter(response)
        next(chunks)

        def child() -> None:
            with pytest.raises(RuntimeError, match="has ended before it was read"):
                next(chunks)
            response.close()

        in_child(child)
        assert next(chunks) == b"y"
        response.close()


def test_a_body_whose_loop_has_ended_is_not_taken_for_complete(new_process_loop: None) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        yield b"y"

    with serve(streaming(body), scope="process", shutdown_timeout=1) as server:
        response = server.open()
        chunks = iter(response)
        next(chunks)
        process.shut_down()
        with pytest.raises(RuntimeError, match=r"body .*body has ended before it was read"):
            next(chunks)
        response.close()


def test_a_tool_that_wraps_the_response_streams_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from django.core.handlers.wsgi import WSGIHandler

    made: list[int] = []
    call = WSGIHandler.__call__

    class Wrapped:
        def __init__(self, response: Any) -> None:
            self.response = response

        def __iter__(self) -> Iterator[bytes]:
            yield from self.response

        def close(self) -> None:
            self.response.close()

    async def body() -> AsyncIterator[bytes]:
        try:
            for number in range(3):
                made.append(number)
                yield b"x"
        finally:
            await asyncio.sleep(0)
            made.append(-1)

    monkeypatch.setattr(WSGIHandler, "__call__", lambda *args: Wrapped(call(*args)))
    with serve(streaming(body)) as server:
        response = server.open()
        next(iter(response))
        assert made == [0]
        response.close()
        assert made == [0, -1]


def test_eight_threads_stream_at_a_time() -> None:
    async def body() -> AsyncIterator[bytes]:
        task = asyncio.current_task()
        for number in range(50):
            await asyncio.sleep(0)
            assert asyncio.current_task() is task
            yield b"%d," % number

    expected = b"".join(b"%d," % number for number in range(50))
    with serve(streaming(body)) as server:
        outcomes: list[Any] = []
        threads = [threading.Thread(target=lambda: outcomes.append(server.get())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert outcomes == [expected] * 8


def test_a_sync_body_is_not_touched() -> None:
    async def no(*args: Any) -> None:
        raise AssertionError

    def body() -> Iterator[bytes]:
        yield b"x"

    with serve(streaming(body)) as server:
        assert server.get() == b"x"
    with serve(lambda request: HttpResponse(b"x")) as server:
        assert server.get() == b"x"
