"""What projects do, and what attacks have found: each is an error or an answer, and meets no later request.

Each test serves through the handler, and most of them in both scopes.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar

import pytest
from asgiref.sync import AsyncToSync, SyncToAsync, async_to_sync, sync_to_async
from django.core.cache.backends.locmem import LocMemCache
from django.core.handlers.wsgi import WSGIHandler as DjangoHandler
from django.db import connection, transaction
from django.http import HttpResponse, StreamingHttpResponse
from django.utils import translation
from django.utils.asyncio import async_unsafe
from django.utils.functional import SimpleLazyObject

import wsgi_loop
from wsgi_loop import loops as loops_module
from wsgi_loop import process

from .conftest import Connect
from .support import Hangs, Server, call_here, eventually, here, in_thread, loop_threads, serve

pytestmark = pytest.mark.usefixtures("new_process_loop")

Loops = list[asyncio.AbstractEventLoop]
ident = threading.get_ident
both_scopes = pytest.mark.parametrize("scope", ["request", "process"])

user: contextvars.ContextVar[str | None] = contextvars.ContextVar("user", default=None)


def get(server: Server, url: str = "/") -> bytes:
    """Serve a request on a thread of its own, and require that it has an answer."""
    answer: bytes = in_thread(lambda: server.get(url), 20)
    return answer


async def plain(request: Any) -> HttpResponse:
    await asyncio.sleep(0)
    return HttpResponse("plain")


async def calls(request: Any) -> HttpResponse:
    """Go from async code to sync code and back, and use a task."""
    place = await sync_to_async(call_here)()
    await asyncio.gather(here(), sync_to_async(int)())
    return HttpResponse("calls" if place.loop is asyncio.get_running_loop() else "another loop")


async def stream(request: Any) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[bytes]:
        yield b"1"
        await asyncio.sleep(0)
        yield b"2"

    return StreamingHttpResponse(body())


ORDINARY = {"plain": plain, "calls": calls, "stream": stream}


def assert_that_others_are_served(server: Server) -> None:
    assert [get(server, f"/{name}") for name in ORDINARY] == [b"plain", b"calls", b"12"]


# --- async iterators -----------------------------------------------------------------------------------------------


class Borrowing:
    """An iterator whose `__anext__` is no coroutine function: it hands out somebody else's awaitable, or raises."""

    def __init__(self, end: type[Exception]) -> None:
        self.chunks = [b"a", b"b"]
        self.end = end

    def __aiter__(self) -> Borrowing:
        return self

    def __anext__(self) -> Any:
        if not self.chunks:
            raise self.end("the source has gone")
        return asyncio.sleep(0, self.chunks.pop(0))


@both_scopes
def test_a_body_whose_anext_raises_before_it_has_returned_an_awaitable(scope: str) -> None:
    def view(request: Any, end: str) -> StreamingHttpResponse:
        return StreamingHttpResponse(Borrowing({"end": StopAsyncIteration, "error": ConnectionError}[end]))

    with serve({"<str:end>": view}, scope=scope) as server:
        assert get(server, "/end") == b"ab"
        with pytest.raises(ConnectionError, match="the source has gone"):
            get(server, "/error")
        assert get(server, "/end") == b"ab"


class FailingHook(asyncio.SelectorEventLoop):
    def _asyncgen_firstiter_hook(self, generator: Any) -> None:
        raise ConnectionError("the hook fails")


@both_scopes
def test_a_body_whose_first_step_fails_in_the_hook_for_async_generators(scope: str) -> None:
    with serve(ORDINARY, scope=scope, loop_factory=FailingHook) as server:
        for _ in range(2):
            with pytest.raises(ConnectionError, match="the hook fails"):
                get(server, "/stream")
            assert get(server, "/plain") == b"plain"


@both_scopes
def test_a_generator_that_was_broken_off_completes_its_finally(scope: str) -> None:
    ended: list[str] = []

    async def rows() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            ended.append("begun")
            await asyncio.sleep(0.001)
            await sync_to_async(time.sleep)(0.001)
            ended.append("completed")

    async def view(request: Any) -> HttpResponse:
        async for _ in rows():
            break
        return HttpResponse()

    with serve(view, scope=scope) as server:
        for _ in range(20):
            get(server)
        if scope == "process":
            # It was closed in a task of the loop's own.
            eventually(lambda: len(ended) == 40)
    assert Counter(ended) == {"begun": 20, "completed": 20}


@both_scopes
def test_a_generator_that_was_broken_off_and_will_not_end_is_named(
    scope: str, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()

    async def rows_without_end() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            while not released.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

    async def view(request: Any) -> HttpResponse:
        async for _ in rows_without_end():
            break
        return HttpResponse("x")

    with serve({"broken": view, **ORDINARY}, scope=scope, shutdown_timeout=0.1) as server:
        assert get(server, "/broken") == b"x"
        assert_that_others_are_served(server)
        process.shut_down()
    released.set()
    assert "rows_without_end" in caplog.text
    assert caplog.text.count("gave up") == 1


@both_scopes
def test_what_one_request_has_left_is_never_closed_as_another_one(scope: str) -> None:
    """An async generator of the first, in a cycle, which is collected while the second is in a transaction."""
    seen: list[Any] = []
    threads: list[threading.Thread] = []

    def look() -> None:
        seen.append((user.get(), threading.current_thread(), connection.in_atomic_block))
        connection.close()

    async def rows() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            seen.append(user.get())
            await sync_to_async(look)()

    async def first(request: Any) -> HttpResponse:
        user.set("alice")
        generator = rows()
        await anext(generator)
        cycle: dict[str, Any] = {"generator": generator}
        cycle["cycle"] = cycle
        return HttpResponse("first")

    async def collect() -> None:
        gc.collect()
        await asyncio.sleep(0.05)
        await sync_to_async(int)()

    def second(request: Any) -> HttpResponse:
        user.set("bob")
        threads.append(threading.current_thread())
        with transaction.atomic():
            async_to_sync(collect)()
        return HttpResponse("second")

    with serve({"first": first, "second": second}, scope=scope) as server:
        gc.disable()
        try:
            assert get(server, "/first") == b"first"
            assert get(server, "/second") == b"second"
        finally:
            gc.enable()
        eventually(lambda: len(seen) == 2)
    inside, (whose, thread, is_in_transaction) = seen
    assert inside in (None, "alice")
    assert whose in (None, "alice")
    assert [thread] != threads
    assert not is_in_transaction


# --- what a request leaves behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [0, 1, 3, 4, 7, 30])
def test_a_callback_that_was_left_never_runs_in_a_later_request(rounds: int) -> None:
    ran: list[int] = []

    async def leave(request: Any) -> HttpResponse:
        loop = asyncio.get_running_loop()

        def tick(left: int) -> None:
            ran.append(ident())
            if left:
                loop.call_soon(tick, left - 1)
            else:
                time.sleep(0.1)

        loop.call_later(0, tick, rounds)
        loop.call_soon(tick, rounds)
        return HttpResponse("left")

    with serve({"leave": leave, **ORDINARY}, shutdown_timeout=5) as server:

        def serve_both() -> None:
            assert server.get("/leave") == b"left"
            eventually(lambda: not loop_threads())
            ran.clear()
            for name in ORDINARY:
                server.get(f"/{name}")

        in_thread(serve_both, 20)
    assert ran == []


@pytest.mark.parametrize("rounds", [*range(1, 12), 40])
def test_work_for_the_default_executor_that_is_begun_as_the_request_ends_holds_up_no_later_one(
    rounds: int, receive: Connect, loops: Loops
) -> None:
    released, finished = threading.Event(), threading.Event()
    receive(finished=lambda **kwargs: finished.set())

    async def leave(request: Any) -> HttpResponse:
        loop = asyncio.get_running_loop()
        loops.append(loop)

        def tick(left: int) -> None:
            if finished.is_set():
                left -= 1
            if left > 0:
                loop.call_soon(tick, left)
            else:
                loop.run_in_executor(None, released.wait, 60)

        loop.call_soon(tick, rounds)
        return HttpResponse("left")

    logging.getLogger("asyncio").addFilter(is_not_about_the_executor)
    try:
        with serve({"leave": leave, **ORDINARY}, shutdown_timeout=0.2) as server:
            assert get(server, "/leave") == b"left"
            assert_that_others_are_served(server)
            assert not released.is_set()
            released.set()
            eventually(lambda: not loop_threads())
    finally:
        released.set()
        logging.getLogger("asyncio").removeFilter(is_not_about_the_executor)


def is_not_about_the_executor(record: logging.LogRecord) -> bool:
    """It may come so late that the executor is shut down: asyncio logs that."""
    return "tick" not in record.getMessage()


def see_thread_locals(promotes: bool, **options: Any) -> list[str]:
    """Serve three requests on one thread, and return what each finds in a threading.local of async code."""
    local = threading.local()

    async def view(request: Any) -> HttpResponse:
        if promotes:
            await asyncio.gather(sync_to_async(time.sleep)(0), asyncio.sleep(0))
        found = getattr(local, "user", "nobody")
        local.user = request.GET["user"]
        return HttpResponse(found)

    with serve(view, **options) as server:
        return in_thread(lambda: [server.get(QUERY_STRING=f"user={name}").decode() for name in ("a", "b", "c")], 20)  # type: ignore[no-any-return]


def test_what_async_code_leaves_in_a_threading_local_of_a_loop_thread_ends_with_its_request() -> None:
    assert see_thread_locals(promotes=True) == ["nobody"] * 3


def test_what_async_code_leaves_in_a_threading_local_of_the_request_thread_stays_as_sync_codes_does() -> None:
    assert see_thread_locals(promotes=False) == ["nobody", "a", "b"]


def test_in_scope_process_all_async_code_shares_the_threading_locals_of_the_loop_thread_as_under_asgi() -> None:
    assert see_thread_locals(promotes=False, scope="process") == ["nobody", "a", "b"]


@both_scopes
def test_what_goes_on_after_a_request_is_in_its_own_context_and_in_no_transaction(
    scope: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")
    seen: list[Any] = []
    tasks: list[Any] = []

    async def late() -> None:
        seen.append((user.get(), translation.get_language()))
        try:
            seen.append(await sync_to_async(lambda: connection.in_atomic_block)())
        except RuntimeError as exc:
            seen.append("create_background_task" in str(exc))
        seen.append("end")

    async def wait_and_look() -> None:
        await asyncio.sleep(0.1)
        await late()

    async def first(request: Any) -> HttpResponse:
        user.set("alice")
        translation.activate("de")
        tasks.append(asyncio.create_task(wait_and_look()))
        asyncio.get_running_loop().call_later(0.1, lambda: tasks.append(asyncio.ensure_future(late())))
        return HttpResponse("first")

    def hold_a_transaction() -> None:
        with transaction.atomic():
            time.sleep(0.3)
        connection.close()

    async def second(request: Any) -> HttpResponse:
        found = user.get(), translation.get_language()
        user.set("bob")
        await sync_to_async(hold_a_transaction)()
        return HttpResponse(f"{found} {user.get()}")

    with serve({"first": first, "second": second}, scope=scope) as server:
        assert get(server, "/first") == b"first"
        assert get(server, "/second") == b"(None, 'en-us') bob"
        if scope == "process":
            eventually(lambda: seen.count("end") == 2)
    if scope == "request":
        assert seen == []
    else:
        # True: the error says what to do.
        assert Counter(seen) == {("alice", "de"): 2, True: 2, "end": 2}


@pytest.mark.parametrize("is_elsewhere", [False, True], ids=["by the same thread", "by another thread"])
def test_a_task_that_a_loop_call_of_sync_code_has_left_is_cancelled_and_named(
    is_elsewhere: bool, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[str] = []
    tasks: list[asyncio.Task[None]] = []

    async def left_over() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            events.append("cleaned up")

    async def work() -> None:
        tasks.append(asyncio.create_task(left_over(), name="left over"))
        await asyncio.sleep(0)

    def view(request: Any) -> HttpResponse:
        async_to_sync(asyncio.sleep)(0)
        async_to_sync(work)()
        return HttpResponse()

    with serve(view) as server:
        response = server.open()
        if is_elsewhere:
            in_thread(response.close, 20)
        else:
            response.close()
    assert events == ["cleaned up"]
    assert tasks[0].cancelled()
    assert "left over running" in caplog.text


@both_scopes
def test_two_thousand_tasks_that_were_left_are_one_warning_of_bounded_length(
    scope: str, caplog: pytest.LogCaptureFixture
) -> None:
    tasks: list[asyncio.Task[None]] = []

    async def view(request: Any) -> HttpResponse:
        for number in range(2_000):
            tasks.append(asyncio.create_task(asyncio.sleep(60), name=f"task {number} of a great many"))
        await asyncio.sleep(0)
        return HttpResponse()

    with serve(view, scope=scope, shutdown_timeout=5 if scope == "request" else 0.2) as server:
        get(server)
        process.shut_down()
    [record] = [record for record in caplog.records if record.name == "wsgi_loop"]
    assert "2000 of its tasks" in record.getMessage()
    assert "and 1990 more" in record.getMessage()
    assert len(record.getMessage()) < 3_000
    assert all(task.cancelled() for task in tasks)


@both_scopes
@pytest.mark.parametrize("seconds", [0.01, 0.15])
def test_a_thread_sensitive_call_of_another_loop_of_the_request_has_its_answer(scope: str, seconds: float) -> None:
    def query() -> str:
        time.sleep(seconds)
        return "rows"

    async def work() -> str:
        return await sync_to_async(query)()

    async def view(request: Any) -> HttpResponse:
        return HttpResponse(await sync_to_async(lambda: asyncio.run(work()), thread_sensitive=False)())

    with serve(view, scope=scope) as server:
        assert get(server) == b"rows"


# --- what code does to its loop ------------------------------------------------------------------------------------


async def close_in_sync_code(request: Any) -> HttpResponse:
    await sync_to_async(asyncio.get_running_loop().close)()
    return HttpResponse()


def close_between_calls(request: Any) -> HttpResponse:
    call_here().loop.close()
    return HttpResponse(f"{call_here().loop.is_closed()}")


async def close_in_async_code(request: Any) -> HttpResponse:
    asyncio.get_running_loop().close()
    return HttpResponse()


async def close_in_a_callback(request: Any) -> HttpResponse:
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.close)
    await asyncio.sleep(0.01)
    return HttpResponse()


async def close_on_another_thread(request: Any) -> HttpResponse:
    await asyncio.to_thread(asyncio.get_running_loop().close)
    return HttpResponse()


async def stop(request: Any) -> HttpResponse:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.01)
    return HttpResponse("stopped")


async def stop_in_sync_code(request: Any) -> HttpResponse:
    await sync_to_async(asyncio.get_running_loop().stop)()
    await asyncio.sleep(0.01)
    return HttpResponse("stopped")


def stop_between_calls(request: Any) -> HttpResponse:
    call_here().loop.stop()
    async_to_sync(asyncio.sleep)(0.01)
    return HttpResponse("stopped")


async def stop_at_the_end(request: Any) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[bytes]:
        try:
            yield b"x"
        finally:
            asyncio.get_running_loop().stop()

    return StreamingHttpResponse(body())


async def set_an_old_task_factory(request: Any) -> HttpResponse:
    asyncio.get_running_loop().set_task_factory(lambda loop, coroutine: asyncio.Task(coroutine, loop=loop))
    return HttpResponse()


async def set_an_exception_handler_that_exits(request: Any) -> HttpResponse:
    def handle(loop: Any, context: Any) -> None:
        raise SystemExit(3)

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(handle)
    loop.call_soon(lambda: 1 / 0)
    await asyncio.sleep(0.01)
    # In scope "process" it would go on being everybody's.
    loop.set_exception_handler(None)
    return HttpResponse()


async def set_another_loop(request: Any) -> HttpResponse:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    request.META["test.loop"].append(loop)
    return HttpResponse()


async def exit_in_a_call(request: Any) -> HttpResponse:
    sys.exit(3)


async def exit_in_a_task(request: Any) -> HttpResponse:
    async def leave() -> None:
        sys.exit(3)

    task = asyncio.create_task(leave())
    with contextlib.suppress(SystemExit):
        await task
    return HttpResponse()


async def exit_in_a_callback(request: Any) -> HttpResponse:
    asyncio.get_running_loop().call_soon(sys.exit, 3)
    await asyncio.sleep(0.01)
    return HttpResponse()


MISDEEDS = {
    function.__name__: function
    for function in (
        close_in_sync_code,
        close_between_calls,
        close_in_async_code,
        close_in_a_callback,
        close_on_another_thread,
        stop,
        stop_in_sync_code,
        stop_between_calls,
        stop_at_the_end,
        set_an_old_task_factory,
        set_an_exception_handler_that_exits,
        set_another_loop,
        exit_in_a_call,
        exit_in_a_task,
        exit_in_a_callback,
    )
}


@both_scopes
@pytest.mark.parametrize("name", MISDEEDS)
def test_what_a_view_does_to_its_loop_is_its_own_affair(scope: str, name: str, loops: Loops) -> None:
    """It has an answer or an error, and the next requests are served."""
    extra: Loops = []
    with serve({**MISDEEDS, **ORDINARY}, scope=scope, shutdown_timeout=1) as server:

        def misbehave() -> bytes:
            try:
                return server.get(f"/{name}", **{"test.loop": extra})
            finally:
                asyncio.set_event_loop(None)

        for _ in range(2):
            with contextlib.suppress(SystemExit):
                answer = in_thread(misbehave, 20)
                if name.startswith("stop"):
                    assert answer in (b"stopped", b"x")
            assert_that_others_are_served(server)
        in_thread(process.shut_down, 20)
        eventually(lambda: not loop_threads())
    for loop in extra:
        loop.close()


async def set_a_task_factory_that_fails(request: Any) -> HttpResponse:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    asyncio.get_running_loop().set_task_factory(fail)
    return HttpResponse("set")


# The coroutines of the view, for which asyncio could make no task.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@both_scopes
def test_a_task_factory_that_fails_makes_nobody_wait(scope: str) -> None:
    with serve({"set": set_a_task_factory_that_fails, **ORDINARY}, scope=scope, shutdown_timeout=1) as server:
        assert get(server, "/set") == b"set"
        if scope == "request":
            assert_that_others_are_served(server)
        else:
            # It is everybody's loop, and what makes no task of its own goes on.
            assert [get(server, "/plain"), get(server, "/stream")] == [b"plain", b"12"]
            assert b"Server Error" in get(server, "/calls")
        in_thread(process.shut_down, 20)
        assert_that_others_are_served(server)
    # Here, and not in a test that comes later.
    gc.collect()


def make_a_loop_with_an_old_task_factory() -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop()
    # What asyncio's documentation has shown up to Python 3.10: it knows nothing of a context.
    loop.set_task_factory(lambda loop, coroutine: asyncio.Task(coroutine, loop=loop))
    return loop


def make_a_loop_with_eager_tasks() -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop()
    loop.set_task_factory(asyncio.eager_task_factory)
    return loop


def make_a_loop_with_a_task_factory_that_fails() -> asyncio.AbstractEventLoop:
    loop = asyncio.SelectorEventLoop()
    loop.set_task_factory(lambda *args, **kwargs: 1 / 0)  # type: ignore[arg-type, return-value]
    return loop


@both_scopes
@pytest.mark.parametrize(
    "factory",
    [
        make_a_loop_with_an_old_task_factory,
        pytest.param(
            make_a_loop_with_eager_tasks,
            marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no eager tasks"),
        ),
    ],
)
def test_a_loop_factory_with_a_task_factory_of_its_own(scope: str, factory: Any) -> None:
    with serve(ORDINARY, scope=scope, loop_factory=factory) as server:
        assert_that_others_are_served(server)
        in_thread(process.shut_down, 20)


# The views' own coroutines, for which asyncio could make no task. They may be collected at any time.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@both_scopes
def test_a_loop_factory_whose_task_factory_fails_makes_nobody_wait(scope: str, silence: None) -> None:
    factory = make_a_loop_with_a_task_factory_that_fails
    with serve(ORDINARY, scope=scope, loop_factory=factory, shutdown_timeout=1) as server:
        for name in ORDINARY:
            with contextlib.suppress(ZeroDivisionError):
                get(server, f"/{name}")
        in_thread(process.shut_down, 20)
    eventually(lambda: not loop_threads())
    gc.collect()
    with serve(ORDINARY, scope=scope) as server:
        assert_that_others_are_served(server)


def make_no_loop() -> Any:
    return None


def fail_to_make_a_loop() -> Any:
    raise LookupError("no loop today")


@both_scopes
@pytest.mark.parametrize("factory", [fail_to_make_a_loop, make_no_loop])
def test_a_loop_factory_that_fails_is_an_error_for_its_request(scope: str, factory: Any) -> None:
    factories = [factory, factory, *[asyncio.new_event_loop] * 9]

    def make() -> Any:
        return factories.pop(0)()

    with serve(ORDINARY, scope=scope, DEBUG_PROPAGATE_EXCEPTIONS=True) as server:
        # Not from the start: an option that makes no loop is refused.
        server.handler._options = server.handler._options.__class__(
            **{**vars_of(server.handler._options), "loop_factory": make}
        )
        for _ in range(2):
            with pytest.raises((LookupError, AttributeError, TypeError)):
                get(server, "/plain")
        assert_that_others_are_served(server)


def vars_of(options: Any) -> dict[str, Any]:
    fields = getattr(options, "__dataclass_fields__", None) or options._fields
    return {name: getattr(options, name) for name in fields}


# --- errors --------------------------------------------------------------------------------------------------------


async def cancel_itself(request: Any) -> HttpResponse:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(1)
    return HttpResponse()


async def raise_a_cancellation(request: Any) -> HttpResponse:
    raise asyncio.CancelledError("as a value")


@pytest.mark.parametrize(
    ("handler", "options"),
    [
        (DjangoHandler, {}),
        (wsgi_loop.WSGIHandler, {}),
        (wsgi_loop.WSGIHandler, {"scope": "process"}),
    ],
    ids=["stock", "request", "process"],
)
@pytest.mark.parametrize("view", [cancel_itself, raise_a_cancellation])
def test_a_view_that_was_cancelled_raises_that_as_with_djangos_own_handler(
    handler: Any, options: Any, view: Any
) -> None:
    with serve({"cancelled": view, "plain": plain}, handler=handler, **options) as server:
        for _ in range(2):
            with pytest.raises(asyncio.CancelledError):
                get(server, "/cancelled")
            assert get(server, "/plain") == b"plain"


class Touchy:
    """Compared with anything, it fails."""

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError("compared")

    __hash__ = None  # type: ignore[assignment]


current: contextvars.ContextVar[Any] = contextvars.ContextVar("current", default=None)


@async_unsafe
def load_user() -> str:
    return "me"


@both_scopes
@pytest.mark.parametrize("make", [lambda: SimpleLazyObject(load_user), Touchy], ids=["lazy", "touchy"])
@pytest.mark.parametrize("is_handling", [False, True], ids=["plain", "while an exception is handled"])
def test_a_context_variable_that_must_not_be_looked_at(scope: str, make: Any, is_handling: bool) -> None:
    """asgiref 3.12 compares it with itself, on the loop: before the view's coroutine has begun."""

    def middleware(get_response: Any) -> Any:
        def wrap(request: Any) -> Any:
            token = current.set(make())
            try:
                if not is_handling:
                    return get_response(request)
                try:
                    raise LookupError
                except LookupError:
                    return get_response(request)
            finally:
                current.reset(token)

        return wrap

    with serve(ORDINARY, middleware=[middleware], scope=scope) as server:
        for name, answer in (("plain", b"plain"), ("calls", b"calls"), ("stream", b"12")):
            assert get(server, f"/{name}") == answer or server.status.startswith("500")


class Connection:
    """Awaited to connect, and kept: as asyncpg.create_pool() and aiosqlite.connect() are."""

    def __init__(self) -> None:
        self.is_closed = False

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        return self

    def close(self) -> None:
        self.is_closed = True


class NoConnection(Connection):
    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        raise ConnectionError


@both_scopes
@pytest.mark.parametrize("is_handling", [False, True], ids=["plain", "while an exception is handled"])
@pytest.mark.filterwarnings("ignore:async_to_sync was passed a non-async-marked callable")
def test_an_awaitable_object_is_not_closed(scope: str, is_handling: bool) -> None:
    made: list[Connection] = []

    def connect(kind: type[Connection]) -> Connection:
        made.append(kind())
        return made[-1]

    def connect_to_both() -> None:
        assert async_to_sync(connect)(Connection) is made[0]
        with pytest.raises(ConnectionError):
            async_to_sync(connect)(NoConnection)

    def view(request: Any) -> HttpResponse:
        if is_handling:
            try:
                raise LookupError
            except LookupError:
                connect_to_both()
        else:
            connect_to_both()
        return HttpResponse("connected")

    with serve(view, scope=scope) as server:
        assert get(server) == b"connected"
    assert [connection.is_closed for connection in made] == [False, False]


@both_scopes
@pytest.mark.filterwarnings("ignore:async_to_sync was passed a non-async-marked callable")
def test_an_awaitable_object_whose_call_never_began_is_not_closed(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Connection] = []

    def connect() -> Connection:
        made.append(Connection())
        return made[-1]

    def fail(*args: Any) -> Any:
        raise MemoryError

    def view(request: Any) -> HttpResponse:
        with monkeypatch.context() as patched:
            patched.setattr("wsgi_loop.scope.LoopCall", fail)
            async_to_sync(connect)()
        return HttpResponse()

    with serve(view, scope=scope, DEBUG_PROPAGATE_EXCEPTIONS=True) as server, pytest.raises(MemoryError):
        get(server)
    assert not made[0].is_closed


# --- any moment ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_is_left() -> Iterator[None]:
    """Loops, threads, descriptors and what asgiref keeps: as many afterwards as before."""
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    loops = len(AsyncToSync.loop_thread_executors)
    yield

    def nothing_more() -> bool:
        gc.collect()
        return (
            threading.active_count() <= threads
            and len(os.listdir("/proc/self/fd")) <= descriptors
            and len(AsyncToSync.loop_thread_executors) <= loops
        )

    eventually(nothing_more, 20, 0.02)


@pytest.fixture
def silence() -> Iterator[None]:
    """Nothing is logged: a thousand frames take their time, and a record keeps what its traceback holds."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def to_depth(levels: int) -> int:
    return async_to_sync(ato_depth)(levels - 1) + 1 if levels else 0


async def ato_depth(levels: int) -> int:
    return await sync_to_async(to_depth)(levels - 1) + 1 if levels else 0


@both_scopes
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_calls_that_are_nested_too_deep_are_an_error(scope: str, silence: None) -> None:
    def view(request: Any, levels: int) -> HttpResponse:
        return HttpResponse(f"{to_depth(levels)}")

    def sink(levels: int, function: Callable[[], Any]) -> Any:
        return sink(levels - 1, function) if levels else function()

    answers: Counter[str] = Counter()
    views = {"<int:levels>": view, **ORDINARY}
    with serve(views, scope=scope, shutdown_timeout=1) as server, nothing_is_left():
        get(server, "/calls")
        for levels in (4, 60, 90, 120, 200, 400):
            # The end of the stack comes at another line each time.
            for more in range(0, 24, 2):
                with contextlib.suppress(RecursionError):
                    in_thread(lambda levels=levels, more=more: sink(more, lambda: server.get(f"/{levels}")), 20)  # type: ignore[misc]
                    answers[server.status[:3]] += 1
        assert_that_others_are_served(server)
        process.shut_down()
    assert set(answers) <= {"200", "500"}
    assert answers["200"] >= 12


class TimeLimit(Exception):
    """As task queues raise it, in a signal handler: SoftTimeLimitExceeded, JobTimeoutException."""


@pytest.fixture
def limit() -> Iterator[Callable[[float, type[BaseException]], Any]]:
    """A context manager: that many seconds after it was entered, a signal handler raises an exception."""
    kind: list[type[BaseException]] = []

    def interrupt(*args: Any) -> None:
        raise kind[0]("limit")

    @contextlib.contextmanager
    def limit_to(seconds: float, exception: type[BaseException]) -> Iterator[None]:
        kind[:] = [exception]
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    found = signal.signal(signal.SIGALRM, interrupt)
    yield limit_to
    signal.signal(signal.SIGALRM, found)


interruptions = pytest.mark.parametrize("exception", [TimeLimit, SystemExit, KeyboardInterrupt])


@interruptions
def test_a_time_limit_that_comes_while_close_waits_lets_the_tasks_end(
    exception: Any, limit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ended: list[int] = []

    async def slow_to_end() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.2)
            ended.append(1)

    async def view(request: Any) -> HttpResponse:
        request.META["test.task"] = asyncio.create_task(slow_to_end())
        await asyncio.sleep(0)
        return HttpResponse()

    with serve({"slow": view, **ORDINARY}) as server, nothing_is_left():
        for number in range(1, 4):
            response = server.open("/slow")
            with pytest.raises(exception), limit(0.05, exception):
                response.close()
            eventually(lambda number=number: len(ended) == number)  # type: ignore[misc]
            assert_that_others_are_served(server)


@both_scopes
@interruptions
@pytest.mark.parametrize("promotes", [False, True], ids=["by hand", "promoted"])
def test_a_time_limit_that_comes_in_a_loop_call_is_raised_in_the_request(
    scope: str, exception: Any, promotes: bool, limit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def view(request: Any) -> HttpResponse:
        if promotes:
            await asyncio.gather(asyncio.sleep(0), sync_to_async(int)())
        await asyncio.sleep(60)
        return HttpResponse()

    options: dict[str, Any] = {"scope": scope, "shutdown_timeout": 1, "DEBUG_PROPAGATE_EXCEPTIONS": True}
    with serve({"slow": view, **ORDINARY}, **options) as server, nothing_is_left():
        for _ in range(3):
            with pytest.raises(exception), limit(0.05, exception):
                server.get("/slow")
            assert_that_others_are_served(server)
            assert server.get("/plain") == b"plain"
        process.shut_down()


@both_scopes
@interruptions
def test_an_interrupt_while_a_loop_thread_is_started(
    scope: str, exception: Any, monkeypatch: pytest.MonkeyPatch, loops: Loops
) -> None:
    """`Thread.start` waits for the thread, which is running by then."""
    start = loops_module.start
    interrupts = [exception("limit")]

    def start_and_be_interrupted(thread: threading.Thread) -> None:
        start(thread)
        # As long as a busy machine takes.
        time.sleep(0.05)
        if interrupts:
            raise interrupts.pop()

    def make() -> asyncio.AbstractEventLoop:
        loops.append(asyncio.new_event_loop())
        return loops[-1]

    monkeypatch.setattr(loops_module, "start", start_and_be_interrupted)
    options: dict[str, Any] = {"scope": scope, "loop_factory": make, "DEBUG_PROPAGATE_EXCEPTIONS": True}
    with serve(ORDINARY, **options) as server, nothing_is_left():
        interrupts.clear()
        get(server, "/calls")
        process.shut_down()
        interrupts[:] = [exception("limit")]
        with pytest.raises(exception):
            get(server, "/calls")
        assert_that_others_are_served(server)
        process.shut_down()


@both_scopes
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
# A loop that asyncio has begun to make, and not ended.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_answer_that_meets_the_end_of_the_stack_is_not_lost(scope: str, silence: None) -> None:
    """RecursionError is a RuntimeError, which a closed loop raises as well."""

    def use_up(stack: int) -> None:
        if stack:
            use_up(stack - 1)
        else:
            raise ValueError

    async def view(request: Any, stack: int) -> HttpResponse:
        await asyncio.gather(asyncio.sleep(0), sync_to_async(int)())  # promoted
        with contextlib.suppress(ValueError, RecursionError):
            await sync_to_async(use_up)(0)
        return HttpResponse("answered")

    def sink(levels: int, function: Callable[[], Any]) -> Any:
        return sink(levels - 1, function) if levels else function()

    answers: Counter[str] = Counter()
    with serve({"<int:stack>": view, **ORDINARY}, scope=scope, shutdown_timeout=1) as server:
        get(server, "/calls")
        deep = sys.getrecursionlimit()
        for levels in range(deep - 170, deep - 20):
            with contextlib.suppress(RecursionError):
                in_thread(lambda levels=levels: sink(levels, lambda: server.get("/0")), 20)  # type: ignore[misc]
                answers[server.status[:3]] += 1
        assert_that_others_are_served(server)
        process.shut_down()
    assert set(answers) <= {"200", "500"}
    assert answers["200"]


async def close_a_client() -> None:
    await asyncio.sleep(0)


def holds_asgirefs_lock() -> bool:
    """Tell if this is inside asgiref, with the lock of a `Local` that all threads wait for: who waits there hangs.

    Django's own handler hangs too. The collector comes there from Python 3.12 on, when it comes between any two lines.
    """
    attributes = vars(AsyncToSync.executors)
    # As asgiref 3.13.0 calls it, and 3.12.1.
    lock = attributes["_lock" if "_lock" in attributes else "_thread_lock"]
    return lock._is_owned()  # type: ignore[no-any-return]


class Client:
    """In a cycle, so the collector finds it at any moment: and then it closes itself by a loop call."""

    ends: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        if holds_asgirefs_lock():
            self.ends["would hang"] += 1
            return
        try:
            async_to_sync(close_a_client)()
        except RuntimeError as exc:
            # Where a loop is running on the thread, as with Django's own handler.
            self.ends[str(exc)[:24]] += 1
        else:
            self.ends["closed"] += 1


class Dropped:
    """A WSGI middleware's iterable, dropped in a cycle: its generator closes the response when it is collected."""

    def __init__(self, response: Any) -> None:
        self.cycle = self
        self.generator = self.iterate(response)
        next(self.generator)

    @staticmethod
    def iterate(response: Any) -> Iterator[bytes]:
        try:
            yield from response
        finally:
            if not holds_asgirefs_lock():
                response.close()


def sync_view_with_clients(request: Any) -> HttpResponse:
    for _ in range(3):
        Client()
        call_here()
    return HttpResponse("x")


async def view_with_clients(request: Any) -> HttpResponse:
    for _ in range(3):
        Client()
        await sync_to_async(int)()
    return HttpResponse("x")


async def stream_with_clients(request: Any) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            Client()
            yield b"x"

    return StreamingHttpResponse(body())


async def stream_of_two(request: Any) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(2):
            await asyncio.sleep(0)
            yield b"x"

    return StreamingHttpResponse(body())


@contextlib.contextmanager
def collecting_all_the_time() -> Iterator[None]:
    found = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(1, 2, 2)
    try:
        yield
    finally:
        gc.set_threshold(*found)
        gc.unfreeze()
        gc.collect()


def serve_on_three_threads(serve_one: Callable[[int], None], count: int) -> None:
    def serve_many() -> None:
        for number in range(count):
            serve_one(number)

    def serve_all() -> None:
        failed: list[BaseException] = []

        def run() -> None:
            try:
                serve_many()
            except BaseException as exc:
                failed.append(exc)

        threads = [threading.Thread(target=run, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed

    in_thread(serve_all, 60)


@both_scopes
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
def test_finalizers_that_make_loop_calls_at_any_moment(scope: str) -> None:
    views = {"0": sync_view_with_clients, "1": view_with_clients, "2": stream_with_clients}
    Client.ends.clear()
    with serve(views, scope=scope, shutdown_timeout=5) as server, nothing_is_left():
        get(server, "/0")

        def serve_one(number: int) -> None:
            own = Server(server.handler)
            assert own.get(f"/{number % 3}") == (b"xxx" if number % 3 == 2 else b"x"), own.status

        with collecting_all_the_time():
            serve_on_three_threads(serve_one, 60)
        process.shut_down()
    # The last is asyncio's own, where a finalizer comes when a loop has begun to run and is not the running one yet.
    assert set(Client.ends) <= {"closed", "You cannot use AsyncToSy", "would hang", "This event loop is alrea"}
    assert Client.ends["closed"]


@both_scopes
@pytest.mark.filterwarnings("ignore:.*its response was dropped without close")
def test_responses_that_finalizers_close_at_any_moment(scope: str, caplog: pytest.LogCaptureFixture) -> None:
    views = {"dropped": stream_of_two, **ORDINARY}
    with serve(views, scope=scope, shutdown_timeout=5) as server, nothing_is_left():
        get(server, "/calls")

        def serve_one(number: int) -> None:
            own = Server(server.handler)
            Dropped(own.open("/dropped"))
            for name, answer in (("plain", b"plain"), ("calls", b"calls"), ("stream", b"12")):
                assert own.get(f"/{name}") == answer, own.status

        with collecting_all_the_time():
            serve_on_three_threads(serve_one, 40)
        process.shut_down()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@both_scopes
@pytest.mark.parametrize("is_cycle", [False, True], ids=["by reference count", "by the collector"])
@pytest.mark.filterwarnings("ignore:.*its response was dropped without close")
def test_a_response_that_is_dropped_in_async_code_leaves_its_loop_running(scope: str, is_cycle: bool) -> None:
    held: list[Any] = []

    async def drop(request: Any) -> HttpResponse:
        loop = asyncio.get_running_loop()
        held.clear()
        gc.collect()
        return HttpResponse("as before" if asyncio._get_running_loop() is loop else "not running")

    with serve({"drop": drop, **ORDINARY}, scope=scope) as server:
        for name in ORDINARY:

            def open_and_drop(name: str = name) -> bytes:
                response = server.open(f"/{name}")
                held.append(response)
                if name == "stream":
                    next(iter(response))
                if is_cycle:
                    response.test_cycle = response
                del response
                return server.get("/drop")

            assert in_thread(open_and_drop, 20) == b"as before"
        assert_that_others_are_served(server)


@pytest.mark.filterwarnings("ignore:.*its response was dropped without close")
def test_a_response_that_is_dropped_in_a_loop_of_asyncios_own_leaves_that_running() -> None:
    with serve(ORDINARY) as server:
        held = [server.open("/plain")]

        async def drop() -> bool:
            loop = asyncio.get_running_loop()
            held.clear()
            gc.collect()
            return asyncio._get_running_loop() is loop

        assert in_thread(lambda: asyncio.run(drop()), 20)


# --- an exception at each line -------------------------------------------------------------------------------------


async def ask_the_database(request: Any) -> HttpResponse:
    for _ in range(2):
        await sync_to_async(query)()
    return HttpResponse()


def query() -> None:
    with connection.cursor() as cursor:
        cursor.execute("select 1")


def call_five_times(request: Any) -> HttpResponse:
    for _ in range(5):
        call_here()
    return HttpResponse()


def call_nested(request: Any) -> HttpResponse:
    async_to_sync(sync_to_async(call_here))()
    return HttpResponse()


async def stream_with_an_end(request: Any) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[bytes]:
        try:
            for number in range(4):
                yield b"x"
                await (sync_to_async(int)() if number % 2 else asyncio.sleep(0))
        finally:
            await asyncio.sleep(0)

    return StreamingHttpResponse(body())


def stream_in_sync_code(request: Any) -> StreamingHttpResponse:
    def body() -> Iterator[bytes]:
        for _ in range(3):
            call_here()
            yield b"x"

    return StreamingHttpResponse(body())


async def gather(request: Any) -> HttpResponse:
    waits = [asyncio.sleep(0.001) for _ in range(2)]
    await asyncio.gather(sync_to_async(int)(), sync_to_async(int)(), *waits)
    return HttpResponse()


async def leave_a_task(request: Any) -> HttpResponse:
    task = asyncio.create_task(asyncio.sleep(30 if request.META["test.scope"] == "request" else 0.02))
    request.META["test.tasks"].add(task)
    return HttpResponse()


async def use_a_thread(request: Any) -> HttpResponse:
    await asyncio.to_thread(int)
    return HttpResponse()


EACH_LINE = {
    function.__name__: function
    for function in (
        plain,
        ask_the_database,
        call_five_times,
        call_nested,
        stream_with_an_end,
        stream_in_sync_code,
        gather,
        leave_a_task,
        use_a_thread,
    )
}
EXCEPTIONS = {"KeyboardInterrupt": KeyboardInterrupt, "SystemExit": SystemExit, "MemoryError": MemoryError}
EXCEPTIONS["TimeLimit"] = TimeLimit  # type: ignore[assignment]
Line = tuple[str, int]
#: What the loop itself calls: asyncio logs what is raised there, and goes on, as in all its callbacks.
#: So does concurrent.futures with a callback of a thread's future.
CALLBACKS = {"_stop_for_step", "_call_set_state", "_set_state", "_copy_future_state"}


class WatchedLoop(asyncio.SelectorEventLoop):
    made: ClassVar[weakref.WeakSet[WatchedLoop]] = weakref.WeakSet()

    def __init__(self) -> None:
        super().__init__()
        self.made.add(self)


class Interrupter:
    """Raises an exception when this thread comes to a line of wsgi_loop, once; without one it notes the lines."""

    def __init__(self, exception: type[BaseException]) -> None:
        self.exception = exception
        self.lines: dict[Line, None] = {}
        self.target: Line | None = None
        self._package = os.path.dirname(wsgi_loop.__file__) + os.sep

    def trace(self, frame: Any, event: str, arg: Any) -> Any:
        if any(found.f_code.co_name in CALLBACKS for found in (frame, frame.f_back, frame.f_back.f_back)):
            return None
        return self.trace_lines if frame.f_code.co_filename.startswith(self._package) else None

    def trace_lines(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            line = os.path.relpath(frame.f_code.co_filename, self._package), frame.f_lineno
            if line == self.target:
                self.target = None
                raise self.exception("injected")
            self.lines.setdefault(line)
        return self.trace_lines


def interrupt_at_each_line(scope: str, exception: str, kind: str, step: int) -> list[str]:
    """Serve a view once for each line, or each `step`th one. Returns what was wrong, with the line."""
    tasks: set[Any] = set()
    extra = {"test.scope": scope, "test.tasks": tasks}
    interrupter = Interrupter(EXCEPTIONS[exception])
    problems: list[str] = []
    with serve({**EACH_LINE, **ORDINARY}, scope=scope, loop_factory=WatchedLoop, shutdown_timeout=0.5) as server:

        def attempt(limit: int | None) -> None:
            sys.settrace(interrupter.trace)
            try:
                response = server.open(f"/{kind}", **extra)
                try:
                    for _, _ in zip(range(100 if limit is None else limit), response, strict=False):
                        pass
                finally:
                    response.close()
            except BaseException as exc:
                # It holds frames, and with them the response.
                exc.__traceback__ = None
            finally:
                sys.settrace(None)

        def attempt_and_go_on(limit: int | None) -> list[str]:
            attempt(limit)
            found = [] if asyncio._get_running_loop() is None else ["a running loop is left on the thread"]
            left = SyncToAsync.threadlocal.__dict__.get("main_event_loop")
            if getattr(left, "_context", None) is not None:
                found.append("a request is left on the thread")
            for name, answer in (("plain", b"plain"), ("calls", b"calls"), ("stream", b"12")):
                try:
                    if server.get(f"/{name}") != answer:
                        found.append(f"the next one, {name}: {server.status}")
                except BaseException as exc:
                    found.append(f"the next one, {name}: {exc!r}")
            return found

        def leaks() -> tuple[int, int, int, int]:
            loops = [loop for loop in WatchedLoop.made if not loop.is_closed()]
            on_process_loop = len(asyncio.all_tasks(process._loop.loop)) if process._loop is not None else 0
            return len(loops), len(loop_threads()), len(os.listdir("/proc/self/fd")), on_process_loop

        def leaks_more_than(before: tuple[int, int, int, int]) -> bool:
            return any(now > then for now, then in zip(leaks(), before, strict=True))

        def settle(before: tuple[int, int, int, int]) -> list[str]:
            deadline = time.monotonic() + 3
            while leaks_more_than(before):
                tasks.clear()
                gc.collect()
                if time.monotonic() > deadline:
                    return [f"leaked: loops, loop threads, descriptors, tasks: {before} -> {leaks()}"]
                time.sleep(0.005)
            return []

        for limit in (2, None) if kind == "stream_with_an_end" else (None,):
            for _ in range(2):
                in_thread(functools.partial(attempt_and_go_on, limit), 20)
            interrupter.lines.clear()
            in_thread(functools.partial(attempt_and_go_on, limit), 20)
            lines = list(interrupter.lines)
            assert len(lines) > 50
            gc.collect()
            gc.freeze()
            for line in lines[::step]:
                before = leaks()
                interrupter.target = line
                try:
                    found = in_thread(functools.partial(attempt_and_go_on, limit), 20)
                except Hangs:
                    return [*problems, f"{kind} {line}: hangs"]
                found += settle(before)
                if found:
                    problems.append(f"{kind} {line}: {'; '.join(found)}")
    return problems


def interrupt(scope: str, exception: str, kinds: str, step: str) -> None:
    """Run in a process of its own: what goes wrong here does so for all that comes later."""
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda args: None
    for kind in kinds.split(","):
        for problem in interrupt_at_each_line(scope, exception, kind, int(step)):
            print(problem, flush=True)
    print("done", flush=True)
    os._exit(0)


def interrupt_elsewhere(scope: str, exception: str, kinds: list[str], step: int, seconds: float) -> str:
    arguments = [scope, exception, ",".join(kinds), str(step)]
    code = f"import django; django.setup(); from tests.test_cases import interrupt; interrupt(*{arguments})"
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    return done.stdout + done.stderr


@both_scopes
def test_an_exception_at_some_lines_of_ours_is_an_error_and_nothing_else(scope: str) -> None:
    assert interrupt_elsewhere(scope, "TimeLimit", ["ask_the_database", "stream_with_an_end"], 7, 120) == "done\n"


@pytest.mark.skipif(not os.environ.get("WSGI_LOOP_TEST_EACH_LINE"), reason="an hour: set WSGI_LOOP_TEST_EACH_LINE=1")
@both_scopes
@pytest.mark.parametrize("kind", EACH_LINE)
@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_an_exception_at_each_line_of_ours_is_an_error_and_nothing_else(scope: str, exception: str, kind: str) -> None:
    assert interrupt_elsewhere(scope, exception, [kind], 1, 300) == "done\n"


# --- cache connections ---------------------------------------------------------------------------------------------


class CountedCache(LocMemCache):
    """In a process of its own: a cache that counts its connections."""

    made: ClassVar[list[int]] = []

    def __init__(self, *args: Any) -> None:
        self.made.append(ident())
        super().__init__(*args)


def count_cache_connections(kind: str) -> None:
    from django.core.cache import cache

    def view(request: Any) -> HttpResponse:
        cache.get("x")
        return HttpResponse()

    caches = {"default": {"BACKEND": "tests.test_cases.CountedCache"}}
    handler = DjangoHandler if kind == "stock" else wsgi_loop.WSGIHandler
    with serve(view, handler=handler, CACHES=caches) as server:
        server.get()
        thread = threading.Thread(target=lambda: [server.get() for _ in range(10)])
        thread.start()
        thread.join()
    print(len(CountedCache.made))


def cache_connections(kind: str, *options: str) -> int:
    code = f"import django; django.setup(); from tests.test_cases import count_cache_connections as c; c({kind!r})"
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "tests.settings"}
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)


def test_a_thread_that_was_started_where_requests_were_served_makes_as_many_cache_connections_as_stock() -> None:
    assert cache_connections("ours") == cache_connections("stock")


@pytest.mark.skipif(sys.version_info < (3, 14), reason="before Python 3.14 no thread inherits its starter's context")
def test_the_same_where_a_thread_inherits_the_context_of_its_starter() -> None:
    option = ["-X", "thread_inherit_context=1"]
    assert cache_connections("ours", *option) == cache_connections("stock", *option)
