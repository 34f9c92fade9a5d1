"""Promotion: a loop gets a thread of its own when something on it could go on while the request thread runs sync code.

No test measures time. Sync code waits for a `threading.Event` that only the loop can set.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import selectors
import socket
import sys
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvloop
from asgiref.local import Local
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.http import HttpResponse, StreamingHttpResponse
from django.utils import translation
from django.utils.decorators import async_only_middleware, sync_only_middleware

from wsgi_loop import EventLoopContext, PerLoop
from wsgi_loop.event_loop import EventLoop

from .conftest import Connect
from .support import Place, call_here, call_here_nested, eventually, here, in_thread, loop_threads, serve

ident = threading.get_ident
#: Seconds in which what is waited for comes, on a machine that is busy.
SOON = 20


def debug_loop() -> asyncio.AbstractEventLoop:
    loop = EventLoop()
    loop.set_debug(True)
    return loop


HIDDEN = {"_ready", "_scheduled", "_selector", "_ssock", "_csock", "_stopping", "_timer_cancelled_count"}


class ClosedLoop(asyncio.SelectorEventLoop):
    """A loop that does not show what is in it, as loops that are not asyncio's own."""

    def __getattribute__(self, name: str) -> Any:
        if name in HIDDEN and sys._getframe(1).f_globals["__name__"].startswith("wsgi_loop"):
            raise AttributeError(name)
        return super().__getattribute__(name)


loops_by_hand = [EventLoop, debug_loop, asyncio.SelectorEventLoop]
by_hand = pytest.mark.parametrize("factory", loops_by_hand)
all_loops = pytest.mark.parametrize("factory", [*loops_by_hand, uvloop.new_event_loop, ClosedLoop])


@pytest.fixture(autouse=True)
def _quiet_about_what_is_slow(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio's debug mode tells of what sync code holds up, and of what a busy machine makes slow."""
    caplog.set_level("ERROR", "asyncio")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    before = set(loop_threads())
    yield
    left.clear()
    eventually(lambda: set(loop_threads()) <= before)


def run_view(code: Callable[[], Awaitable[object]], **options: Any) -> None:
    """Have an async view await `code()`, and require that this raises nothing."""

    async def view(request: Any) -> Any:
        await code()
        return HttpResponse(b"served")

    with serve(view, **options) as server:
        assert server.get() == b"served"


async def promote() -> None:
    """Have sync code run while there are two tasks."""
    await asyncio.gather(sync_to_async(int)(), asyncio.sleep(0))


# --- what goes on ----------------------------------------------------------------------------------------------------


@all_loops
def test_timers_go_on_while_sync_code_of_the_same_gather_runs(factory: Any) -> None:
    seen: list[Any] = []

    async def code() -> None:
        ticks = [threading.Event() for _ in range(10)]

        async def tick(event: threading.Event) -> None:
            await asyncio.sleep(0.001)
            event.set()

        def query() -> None:
            seen.append((ident(), [event.wait(SOON) for event in ticks]))

        await asyncio.gather(sync_to_async(query)(), *map(tick, ticks))

    run_view(code, loop_factory=factory)
    assert seen == [(ident(), [True] * 10)]


@all_loops
def test_a_task_goes_on_through_many_waits_while_sync_code_runs(factory: Any) -> None:
    async def code() -> None:
        ended = threading.Event()

        async def walk() -> None:
            for _ in range(50):
                await asyncio.sleep(0)
                await asyncio.sleep(0.0001)
            ended.set()

        task = asyncio.ensure_future(walk())
        assert await sync_to_async(ended.wait)(SOON)
        await task

    run_view(code, loop_factory=factory)


async def by_call_soon(set_event: Callable[[], None]) -> None:
    for _ in range(5):
        await asyncio.sleep(0)
    set_event()


async def by_timer(set_event: Callable[[], None]) -> None:
    await asyncio.sleep(0.01)
    set_event()


async def by_another_thread(set_event: Callable[[], None]) -> None:
    await asyncio.to_thread(threading.Event().wait, 0.01)
    set_event()


async def by_socket(set_event: Callable[[], None]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        threading.Timer(0.02, theirs.send, [b"x"]).start()
        assert await asyncio.get_running_loop().sock_recv(ours, 1) == b"x"
    set_event()


async def by_subprocess(set_event: Callable[[], None]) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    assert await process.wait() == 0
    set_event()


async def by_stream(set_event: Callable[[], None]) -> None:
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    with theirs:
        threading.Timer(0.02, theirs.send, [b"x"]).start()
        assert await reader.readexactly(1) == b"x"
    writer.close()
    await writer.wait_closed()
    set_event()


waits = [by_call_soon, by_timer, by_another_thread, by_socket, by_stream]
all_waits = pytest.mark.parametrize("wait", waits)


@all_loops
@all_waits
def test_a_task_goes_on_while_sync_code_below_async_code_waits_for_it(factory: Any, wait: Any) -> None:
    async def code() -> None:
        event = threading.Event()
        task = asyncio.ensure_future(wait(event.set))
        await asyncio.sleep(0)
        assert await sync_to_async(event.wait)(SOON)
        await task

    run_view(code, loop_factory=factory)


@all_loops
@all_waits
def test_a_task_that_a_loop_call_has_left_goes_on_while_sync_middleware_waits_for_it(factory: Any, wait: Any) -> None:
    event = threading.Event()
    tasks: list[Any] = []

    @sync_only_middleware
    def middleware(get_response: Any) -> Any:
        def handle(request: Any) -> Any:
            response = get_response(request)
            assert event.wait(SOON)
            return response

        return handle

    async def view(request: Any) -> Any:
        tasks.append(asyncio.ensure_future(wait(event.set)))
        await asyncio.sleep(0)
        return HttpResponse(b"served")

    async def finish() -> None:
        await tasks.pop()

    @sync_only_middleware
    def outermost(get_response: Any) -> Any:
        def handle(request: Any) -> Any:
            response = get_response(request)
            async_to_sync(finish)()
            return response

        return handle

    with serve(view, middleware=[outermost, middleware], loop_factory=factory) as server:
        assert server.get() == b"served"


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("factory", [EventLoop, asyncio.SelectorEventLoop])
def test_a_task_that_waits_for_a_process_goes_on_while_sync_code_waits_for_it(factory: Any) -> None:
    async def code() -> None:
        event = threading.Event()
        task = asyncio.ensure_future(by_subprocess(event.set))
        await asyncio.sleep(0)
        assert await sync_to_async(event.wait)(SOON)
        await task
        await by_subprocess(int)

    run_view(code, loop_factory=factory)


@all_loops
def test_a_task_that_a_body_step_has_left_goes_on_between_the_steps(factory: Any) -> None:
    event = threading.Event()
    tasks: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        tasks.append(asyncio.ensure_future(by_timer(event.set)))
        yield b"1"
        await tasks.pop()
        yield b"2"

    async def view(request: Any) -> Any:
        return StreamingHttpResponse(body())

    with serve(view, loop_factory=factory) as server:
        response = server.open()
        chunks = iter(response)
        assert next(chunks) == b"1"
        assert event.wait(SOON)
        assert list(chunks) == [b"2"]
        response.close()


@all_loops
def test_a_bare_timer_goes_on_while_sync_code_below_async_code_waits_for_it(factory: Any) -> None:
    async def code() -> None:
        event = threading.Event()
        asyncio.get_running_loop().call_later(0.01, event.set)
        assert await sync_to_async(event.wait)(SOON)

    run_view(code, loop_factory=factory)


@all_loops
def test_a_bare_callback_goes_on_while_sync_code_below_async_code_waits_for_it(factory: Any) -> None:
    async def code() -> None:
        event = threading.Event()
        asyncio.get_running_loop().call_soon(event.set)
        assert await sync_to_async(event.wait)(SOON)

    run_view(code, loop_factory=factory)


@all_loops
def test_what_a_thread_of_an_executor_has_returned_is_seen_while_sync_code_waits_for_it(factory: Any) -> None:
    async def code() -> None:
        event, may_end = threading.Event(), threading.Event()
        future = asyncio.get_running_loop().run_in_executor(None, may_end.wait, SOON)
        future.add_done_callback(lambda _: event.set())
        assert await sync_to_async(lambda: (may_end.set(), event.wait(SOON)))() == (None, True)
        assert await future

    run_view(code, loop_factory=factory)


@all_loops
def test_a_timeout_around_a_row_of_thread_sensitive_calls_fires_while_one_of_them_waits(factory: Any) -> None:
    seen: list[Any] = []

    async def code() -> None:
        fired = threading.Event()
        try:
            async with asyncio.timeout(60) as timeout:
                for _ in range(3):
                    await sync_to_async(int)()
                timeout.reschedule(asyncio.get_running_loop().time() + 0.1)
                await sync_to_async(lambda: seen.append(fired.wait(SOON)))()
        except TimeoutError:
            fired.set()
        seen.append(await sync_to_async(ident)())

    run_view(code, loop_factory=factory)
    assert seen == [True, ident()]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no eager tasks")
@pytest.mark.parametrize("wait", [by_timer, by_another_thread, by_socket, by_stream])
def test_an_eager_task_goes_on_while_sync_code_waits_for_it(wait: Any) -> None:
    """asyncio asks the loop for nothing before such a task has waited once."""

    def factory() -> asyncio.AbstractEventLoop:
        loop = EventLoop()
        loop.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        return loop

    async def code() -> None:
        event = threading.Event()
        task = asyncio.ensure_future(wait(event.set))
        assert await sync_to_async(event.wait)(SOON)
        await task

    run_view(code, loop_factory=factory)


def test_a_task_of_a_factory_of_the_users_own_goes_on() -> None:
    class OwnTask(asyncio.Task[Any]):
        pass

    def factory() -> asyncio.AbstractEventLoop:
        loop = EventLoop()
        loop.set_task_factory(lambda loop, coro, **kwargs: OwnTask(coro, loop=loop, **kwargs))  # type: ignore[arg-type]
        return loop

    async def code() -> None:
        event = threading.Event()
        task = asyncio.ensure_future(by_socket(event.set))
        assert type(task) is OwnTask
        assert await sync_to_async(event.wait)(SOON)
        await task

    run_view(code, loop_factory=factory)


@pytest.mark.parametrize("name", ["SelectSelector", "PollSelector", "EpollSelector"])
def test_with_each_selector(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(selectors, "DefaultSelector", getattr(selectors, name))

    async def code() -> None:
        for wait in (by_timer, by_another_thread, by_socket, by_stream):
            event = threading.Event()
            task = asyncio.ensure_future(wait(event.set))
            assert await sync_to_async(event.wait)(SOON)
            await task
        await call_here_nested()

    run_view(code)


# --- what is posted --------------------------------------------------------------------------------------------------


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0.001)
    return a + b


def post_and_wait(loop: asyncio.AbstractEventLoop) -> int:
    return asyncio.run_coroutine_threadsafe(add(1, 2), loop).result(SOON)


@all_loops
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread"])
def test_run_coroutine_threadsafe_in_sync_code_below_async_code(factory: Any, elsewhere: bool) -> None:
    seen: list[Any] = []

    async def code() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def sync_code() -> int:
            return in_thread(lambda: post_and_wait(loop)) if elsewhere else post_and_wait(loop)

        seen.append(await sync_to_async(sync_code)())
        assert asyncio.current_task() is task
        assert loop.is_running()
        seen.append(await sync_to_async(sync_code)())
        seen.append(await sync_to_async(ident)())

    run_view(code, loop_factory=factory)
    assert seen == [3, 3, ident()]


@all_loops
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread"])
def test_run_coroutine_threadsafe_in_sync_code_between_two_loop_calls(factory: Any, elsewhere: bool) -> None:
    places: list[Place] = []

    def view(request: Any) -> Any:
        places.append(call_here())
        loop = places[0].loop
        result = in_thread(lambda: post_and_wait(loop)) if elsewhere else post_and_wait(loop)
        places.append(call_here())
        return HttpResponse(str(result))

    with serve(view, loop_factory=factory) as server:
        assert server.get() == b"3"
    assert places[0].loop is places[1].loop
    assert places[0].task is places[1].task
    assert places[1].thread != ident()


@all_loops
def test_run_coroutine_threadsafe_of_another_thread_between_two_body_steps(factory: Any) -> None:
    loops: list[Any] = []

    async def body() -> AsyncIterator[bytes]:
        loops.append(asyncio.get_running_loop())
        for chunk in (b"1", b"2"):
            yield chunk

    async def view(request: Any) -> Any:
        return StreamingHttpResponse(body())

    with serve(view, loop_factory=factory) as server:
        response = server.open()
        chunks = iter(response)
        assert next(chunks) == b"1"
        assert in_thread(lambda: post_and_wait(loops[0])) == 3
        assert list(chunks) == [b"2"]
        response.close()


@all_loops
def test_run_coroutine_threadsafe_while_the_loop_waits(factory: Any) -> None:
    async def code() -> None:
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def post() -> None:
            threading.Event().wait(0.01)
            loop.call_soon_threadsafe(future.set_result, post_and_wait(loop))

        thread = threading.Thread(target=post)
        thread.start()
        assert await future == 3
        await sync_to_async(thread.join)()

    run_view(code, loop_factory=factory)


@all_loops
def test_what_another_thread_posts_at_any_moment_is_answered(factory: Any) -> None:
    """Between loop calls, in them, in sync code below them, and as the request is about to end."""
    results: list[int] = []

    def view(request: Any) -> Any:
        loop = call_here().loop
        has_ended = threading.Event()

        def post() -> None:
            try:
                while not has_ended.is_set():
                    results.append(post_and_wait(loop))
            finally:
                has_ended.set()

        thread = threading.Thread(target=post)
        thread.start()
        for _ in range(20):
            async_to_sync(call_here_nested)()
            async_to_sync(asyncio.sleep)(0)
        has_ended.set()
        thread.join()
        return HttpResponse(b"served")

    with serve(view, loop_factory=factory) as server:
        for _ in range(5):
            assert server.get() == b"served"
    assert set(results) == {3}


@all_loops
def test_one_post_at_any_moment_is_answered(factory: Any) -> None:
    """Each request is promoted at another moment: by the only thing that is posted to it."""

    def view(request: Any) -> Any:
        place = call_here()
        moment = int(request.path[1:])
        results: list[int] = []

        def post() -> None:
            threading.Event().wait(moment / 20_000)
            results.append(post_and_wait(place.loop))

        thread = threading.Thread(target=post)
        thread.start()
        for _ in range(10):
            found = async_to_sync(call_here_nested)()
            assert found.loop is place.loop
        assert call_here()[::2] == place[::2]
        thread.join()
        return HttpResponse(repr(results))

    with serve(view, loop_factory=factory) as server:
        for moment in range(60):
            assert server.get(f"/{moment}") == b"[3]"


@all_loops
@pytest.mark.parametrize("target", ["outer", "inner", "both"])
def test_sync_code_of_a_request_inside_another_one_posts_to_their_loops(factory: Any, target: str) -> None:
    loops: dict[str, Any] = {}

    async def view(request: Any) -> Any:
        name = request.path[1:]
        place = await here()
        loops[name] = place.loop
        await sync_to_async(inside if name == "outer" else post)()
        assert await here() == (place.loop, (await here()).thread, place.task)
        await sync_to_async(int)()
        return HttpResponse(b"served")

    def inside() -> None:
        assert server.get("/inner") == b"served"
        assert call_here().loop is loops["outer"]

    def post() -> None:
        for name in ("outer", "inner") if target == "both" else (target,):
            assert post_and_wait(loops[name]) == 3

    with serve(view, loop_factory=factory) as server:
        assert server.get("/outer") == b"served"


# --- below nested calls ----------------------------------------------------------------------------------------------

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
local, critical = Local(), Local(thread_critical=True)


async def nothing() -> None:
    """Sync code runs below the step that is taken by hand."""
    await sync_to_async(int)()


async def by_gather() -> None:
    event = threading.Event()

    async def tick() -> None:
        await asyncio.sleep(0.001)
        event.set()

    waited, _ = await asyncio.gather(sync_to_async(event.wait)(SOON), tick())
    assert waited


async def by_post() -> None:
    loop = asyncio.get_running_loop()
    assert await sync_to_async(post_and_wait)(loop) == 3


async def by_post_of_another_thread() -> None:
    loop = asyncio.get_running_loop()
    assert await sync_to_async(in_thread)(lambda: post_and_wait(loop)) == 3


#: Tasks that nobody else holds.
left: list[asyncio.Task[None]] = []


async def by_left_over() -> None:
    """It is promoted after this has returned."""
    left.append(asyncio.ensure_future(asyncio.sleep(0.01)))


ways = pytest.mark.parametrize("way", [nothing, by_gather, by_post, by_post_of_another_thread])


@pytest.mark.django_db(transaction=True)
@ways
@all_loops
def test_below_async_middleware_sync_code_and_a_nested_call(
    factory: Any, way: Callable[[], Awaitable[None]], started: list[str]
) -> None:
    """Promoted or not: the coroutine above sees the same task, loop, context and thread-sensitive state."""
    seen: list[Any] = []

    def state() -> tuple[Any, ...]:
        return translation.get_language(), variable.get(), local.value

    @async_only_middleware
    def middleware(get_response: Any) -> Any:
        async def handle(request: Any) -> Any:
            place = await here()
            token = variable.set("outer")
            local.value = "outer"
            translation.activate("de")
            seen.append(state())
            response = await get_response(request)
            # As with asgiref: what sync code has set is set here.
            seen.append(state())
            after = await here()
            assert (after.loop, after.task) == (place.loop, place.task)
            variable.reset(token)
            assert variable.get() == "unset"
            assert not await sync_to_async(lambda: connection.in_atomic_block)()
            assert await sync_to_async(state)() == ("fr", "unset", "nested")
            return response

        return handle

    async def nested() -> None:
        seen.append(state())
        token = variable.set("nested")
        local.value = "nested"
        translation.activate("fr")
        await User.objects.acreate(username="rolled back")
        task = asyncio.current_task()
        await way()
        assert asyncio.current_task() is task
        seen.append(state())
        seen.append(await sync_to_async(lambda: (ident(), connection.in_atomic_block, state()))())
        variable.reset(token)
        seen.append(state())

    def view(request: Any) -> Any:
        seen.append(state())
        critical.value = "request thread"
        with transaction.atomic():
            async_to_sync(nested)()
            seen.append((ident(), connection.in_atomic_block, User.objects.count(), critical.value))
            transaction.set_rollback(True)
        assert not connection.in_atomic_block
        seen.append(state())
        return HttpResponse(b"served")

    languages = {"USE_I18N": True, "LANGUAGE_CODE": "en"}
    with serve(view, middleware=[middleware], loop_factory=factory, **languages) as server:
        started.clear()
        assert server.get() == b"served"
    assert seen == [
        ("de", "outer", "outer"),
        ("de", "outer", "outer"),
        ("de", "outer", "outer"),
        ("fr", "nested", "nested"),
        (ident(), True, ("fr", "nested", "nested")),
        ("fr", "outer", "nested"),
        (ident(), True, 1, "request thread"),
        ("fr", "outer", "nested"),
        ("fr", "outer", "nested"),
    ]
    assert not User.objects.exists()
    is_promoted = way is not nothing or factory in (uvloop.new_event_loop, ClosedLoop)
    assert len([name for name in started if name.startswith("wsgi-loop")]) == is_promoted


async def nest(depth: int, ways: dict[int, Callable[[], Awaitable[None]]], seen: list[str]) -> None:
    """Go down through async and sync code, with one of `ways` before and after, and check what stands above."""
    place, token = await here(), variable.set(f"depth {depth}")
    way = ways.get(depth, nothing)
    await way()
    if depth:

        def sync_code() -> None:
            assert variable.get() == f"depth {depth}"
            async_to_sync(nest)(depth - 1, ways, seen)
            async_to_sync(nest)(depth - 1, ways, seen)
            assert variable.get() == f"depth {depth}"
            seen.append(f"sync {depth} on the request thread: {ident() == main[0]}")

        await sync_to_async(sync_code)()
    await way()
    after = await here()
    assert (after.loop, after.task) == (place.loop, place.task)
    assert variable.get() == f"depth {depth}"
    variable.reset(token)
    seen.append(f"async {depth}")


main: list[int] = []


@all_loops
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("way", [by_gather, by_post, by_post_of_another_thread, by_left_over])
@pytest.mark.parametrize("where", ["outermost", "innermost", "everywhere"])
def test_promotions_that_are_nested(
    started: list[str], factory: Any, depth: int, way: Callable[[], Awaitable[None]], where: str
) -> None:
    main[:] = [ident()]
    ways = {"outermost": {depth: way}, "innermost": {0: way}, "everywhere": dict.fromkeys(range(depth + 1), way)}[where]
    promoted: list[str] = []
    not_promoted: list[str] = []
    run_view(lambda: nest(depth, {}, not_promoted), loop_factory=factory)
    started.clear()
    run_view(lambda: nest(depth, ways, promoted), loop_factory=factory)
    assert promoted == not_promoted
    assert not any(line.endswith("False") for line in promoted)
    assert len([name for name in started if name.startswith("wsgi-loop")]) == 1


@all_loops
@pytest.mark.parametrize("is_promoted", [False, True])
@pytest.mark.parametrize("exception", [ValueError, StopIteration, asyncio.CancelledError, SystemExit])
def test_what_sync_code_raises_after_the_promotion_reaches_the_coroutine_above(
    factory: Any, is_promoted: bool, exception: type[BaseException]
) -> None:
    async def code() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def fail() -> None:
            if is_promoted:
                post_and_wait(loop)
            raise exception("from sync code")

        expected = RuntimeError if exception is StopIteration else exception
        with pytest.raises(expected):
            await sync_to_async(fail)()
        assert asyncio.current_task() is task
        assert await sync_to_async(ident)() == thread
        assert await asyncio.sleep(0, "goes on") == "goes on"

    thread = ident()
    run_view(code, loop_factory=factory)


@all_loops
@pytest.mark.parametrize("way", [nothing, by_gather, by_post])
def test_a_cancellation_reaches_a_nested_call_that_was_begun_before_the_promotion(
    factory: Any, way: Callable[[], Awaitable[None]]
) -> None:
    seen: list[str] = []

    async def nested(outer: asyncio.Task[Any]) -> None:
        await way()
        asyncio.get_running_loop().call_later(0.01, outer.cancel)
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            seen.append("nested")
            raise

    async def code() -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await sync_to_async(async_to_sync(nested))(task)
        except asyncio.CancelledError:
            seen.append("outer")
            task.uncancel()
        await sync_to_async(int)()

    run_view(code, loop_factory=factory)
    assert seen == ["nested", "outer"]


@all_loops
def test_a_task_group_of_the_coroutine_above_whose_child_fails_cancels_a_nested_call(factory: Any) -> None:
    """The child was begun by the nested call, below a step of the task that the group belongs to."""
    seen: list[str] = []

    async def fail() -> None:
        raise ValueError

    async def nested(group: asyncio.TaskGroup) -> None:
        group.create_task(fail())
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            seen.append("nested is cancelled")
            raise

    async def group_and_nested() -> None:
        async with asyncio.TaskGroup() as group:
            await sync_to_async(async_to_sync(nested))(group)

    async def code() -> None:
        with pytest.raises(ExceptionGroup):
            await group_and_nested()
        await sync_to_async(int)()

    run_view(code, loop_factory=factory)
    assert seen == ["nested is cancelled"]


@all_loops
def test_a_task_group_and_a_timeout_that_were_entered_before_the_promotion_are_left_after_it(factory: Any) -> None:
    async def fail() -> None:
        raise ValueError

    async def fail_in_a_group() -> None:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            await by_post()
            group.create_task(promote())
            group.create_task(fail())
            await asyncio.sleep(60)

    async def code() -> None:
        with pytest.raises(ExceptionGroup):
            await fail_in_a_group()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)

    run_view(code, loop_factory=factory)


@all_loops
def test_an_async_context_manager_of_one_loop_call_is_left_in_another_one_after_the_promotion(factory: Any) -> None:
    async def enter(stack: contextlib.AsyncExitStack) -> None:
        await stack.enter_async_context(asyncio.timeout(60))
        stack.callback(variable.reset, variable.set("entered"))

    def view(request: Any) -> Any:
        stack = contextlib.AsyncExitStack()
        variable.set("outer")
        async_to_sync(enter)(stack)
        assert variable.get() == "entered"
        post_and_wait(call_here().loop)
        async_to_sync(promote)()
        assert variable.get() == "entered"
        async_to_sync(stack.aclose)()
        assert variable.get() == "outer"
        return HttpResponse(b"served")

    with serve(view, loop_factory=factory) as server:
        assert server.get() == b"served"


@all_loops
def test_what_waits_on_the_loop_sees_its_locals_after_the_promotion(factory: Any) -> None:
    """They were filled on the request thread, and hide from all others what they hold."""
    seen: list[Any] = []

    async def code() -> None:
        local.value = "set on the request thread"
        loop = asyncio.get_running_loop()
        event = threading.Event()

        def look(name: str) -> None:
            seen.append((name, getattr(local, "value", "hidden"), translation.get_language()))

        async def wait() -> None:
            await asyncio.sleep(0.01)
            look("task")
            event.set()

        with translation.override("de"):
            task = asyncio.ensure_future(wait())
            loop.call_soon(look, "callback")
            loop.call_later(0.001, look, "timer")
            await sync_to_async(event.wait)(SOON)
            await task
            look("request task")
            await sync_to_async(look)("sync code")

    run_view(code, loop_factory=factory)
    assert {name for name, *_ in seen} == {"callback", "timer", "task", "request task", "sync code"}
    assert {tuple(found) for _, *found in seen} == {("set on the request thread", "de")}


@all_loops
def test_async_generators_that_were_begun_on_both_sides_are_closed(factory: Any) -> None:
    closed: list[str] = []
    held: list[Any] = []

    async def generate(name: str) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.sleep(0)
            await sync_to_async(closed.append)(name)

    async def begin(name: str) -> None:
        held.append(generate(name))
        await anext(held[-1])

    async def code() -> None:
        await begin("held, begun before")
        await begin("dropped, begun before")
        await by_post()
        held.pop()
        await begin("held, begun after")
        await begin("dropped, begun after")
        held.pop()
        await asyncio.sleep(0.01)

    run_view(code, loop_factory=factory)
    eventually(lambda: len(closed) == 4)
    held.clear()
    assert set(closed[:2]) == {"dropped, begun before", "dropped, begun after"}


# --- threads ---------------------------------------------------------------------------------------------------------


@by_hand
def test_no_thread_is_started_for_a_request_on_which_nothing_else_could_go_on(started: list[str], factory: Any) -> None:
    async def ended() -> None:
        """A task that has ended is none that could go on."""

    async def code() -> None:
        await asyncio.ensure_future(ended())
        await asyncio.sleep(0.001)
        await sync_to_async(int)()
        asyncio.get_running_loop().call_later(60, int).cancel()
        async with asyncio.timeout(60):
            await asyncio.sleep(0)
        await call_here_nested()

    run_view(code, loop_factory=factory)
    assert started == []


async def by_shield() -> None:
    await asyncio.shield(asyncio.ensure_future(asyncio.sleep(0.001)))


async def by_gather_of_coroutines() -> None:
    await asyncio.gather(asyncio.sleep(0.001), asyncio.sleep(0))


async def by_wait_for() -> None:
    await asyncio.wait_for(asyncio.sleep(0.001), 60)


async def by_task_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(0.001))
        group.create_task(asyncio.sleep(0))


@pytest.mark.parametrize(
    "wait",
    [*waits, by_shield, by_gather_of_coroutines, by_wait_for, by_task_group],
)
@by_hand
def test_no_thread_is_started_for_sync_code_after_something_that_was_waited_for(
    started: list[str], factory: Any, wait: Any
) -> None:
    """What asyncio itself has yet to tidy up is nothing that could go on."""

    async def code() -> None:
        await (wait(int) if wait in waits else wait())
        await sync_to_async(int)()

    run_view(code, loop_factory=factory)
    assert [name for name in started if name.startswith("wsgi-loop")] == []


@all_loops
def test_one_thread_is_started_however_often_there_is_a_reason_and_it_ends_with_the_request(
    started: list[str], factory: Any
) -> None:
    threads: set[threading.Thread] = set()

    async def look() -> None:
        threads.add(threading.current_thread())

    def view(request: Any) -> Any:
        for way in (by_gather, by_post, by_post_of_another_thread, by_left_over, by_gather):
            async_to_sync(way)()
            async_to_sync(look)()
        threads.discard(threading.current_thread())
        return HttpResponse(b"served")

    with serve(view, loop_factory=factory) as server:
        started.clear()
        response = server.open()
        [thread] = threads
        assert thread.is_alive()
        response.close()
        thread.join(SOON)
        assert not thread.is_alive()
    assert len([name for name in started if name.startswith("wsgi-loop")]) == 1


@all_loops
def test_eight_request_threads_at_once_of_which_some_are_promoted(factory: Any) -> None:
    together = threading.Barrier(8)
    all_ways = [nothing, by_gather, by_post, by_post_of_another_thread]
    served: list[tuple[int, Any]] = []

    async def view(request: Any) -> Any:
        number = int(request.path[1:])
        thread = await sync_to_async(ident)()
        token = variable.set(request.path)
        place = await here()
        await nest(2, {0: all_ways[number % 4], 1: all_ways[number // 4]}, [])
        await all_ways[number % 4]()
        assert (await here())[::2] == place[::2]
        assert await sync_to_async(lambda: (ident(), variable.get()))() == (thread, request.path)
        variable.reset(token)
        served.append((thread, place.loop))
        return HttpResponse(request.path.encode())

    with serve(view, loop_factory=factory) as server:

        def run(number: int) -> None:
            together.wait(60)
            for _ in range(5):
                assert server.get(f"/{number}") == f"/{number}".encode()

        threads = [threading.Thread(target=run, args=[number]) for number in range(8)]
        main[:] = [0]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert len(served) == len({loop for _, loop in served}) == 40
    assert len({thread for thread, _ in served}) == 8


@all_loops
def test_what_async_code_leaves_in_a_thread_local_is_seen_by_no_other_request(factory: Any) -> None:
    mine = threading.local()
    seen: list[Any] = []

    async def view(request: Any) -> Any:
        await promote()
        assert ident() != await sync_to_async(ident)()
        seen.append(getattr(mine, "value", None))
        mine.value = request.path
        return HttpResponse()

    async def plain(request: Any) -> Any:
        seen.append(getattr(mine, "value", None))
        return HttpResponse()

    with serve({"plain": plain, "": view}, loop_factory=factory) as server:
        for path in ("/a", "/b", "/plain", "/c"):
            server.get(path)
    assert seen == [None] * 4


@all_loops
def test_two_requests_never_share_a_thread_or_a_loop(factory: Any) -> None:
    places: list[Place] = []

    async def view(request: Any) -> Any:
        await promote()
        places.append(await here())
        places.append(Place(places[-1].loop, id(threading.current_thread()), None))
        held.append(threading.current_thread())
        return HttpResponse()

    held: list[Any] = []
    with serve(view, loop_factory=factory) as server:
        for _ in range(4):
            server.get()
    assert len(set(held)) == len({place.loop for place in places}) == 4


def test_a_promoted_loop_is_closed_when_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what waits for it gets an error."""
    loops: list[Any] = []

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        await promote()
        return HttpResponse(b"served")

    with serve(view) as server:
        with monkeypatch.context() as patch, warnings.catch_warnings():
            # Coroutines that nobody could begin any more.
            warnings.simplefilter("ignore", RuntimeWarning)
            patch.setattr(threading.Thread, "start", fail)
            server.get()
            gc.collect()
        assert server.status.startswith("500")
        assert "A loop thread could not be started: can't start new thread" in caplog.text
        assert loops[0].is_closed()
        assert server.get() == b"served"


# --- resources -------------------------------------------------------------------------------------------------------


class Client:
    """An async resource that tells where it is entered and left."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    async def __aenter__(self) -> Client:
        self.seen.append(("entered", ident()))
        return self

    async def __aexit__(self, *args: object) -> None:
        await asyncio.sleep(0)
        self.seen.append(("left", ident()))

    @contextlib.asynccontextmanager
    async def by_generator(self) -> AsyncIterator[Client]:
        async with self:
            yield self


@by_hand
@pytest.mark.parametrize("is_generator", [False, True])
def test_no_thread_is_started_for_a_client_per_loop_beside_which_nothing_is_left(
    started: list[str], factory: Any, is_generator: bool
) -> None:
    made = Client()
    client = PerLoop(made.by_generator if is_generator else lambda: made)

    async def code() -> None:
        assert await client() is await client()
        # It waits for nothing but the loop's end.
        await sync_to_async(int)()
        await call_here_nested()

    run_view(code, loop_factory=factory)
    assert made.seen == [("entered", ident()), ("left", ident())]
    assert started == []


@all_loops
def test_a_client_per_loop_that_was_entered_before_the_promotion_is_the_same_one_after_it(factory: Any) -> None:
    made = Client()
    client = PerLoop(made.by_generator)

    async def code() -> None:
        found = await client()
        await by_post()
        assert await client() is found

    run_view(code, loop_factory=factory)
    eventually(lambda: [name for name, _ in made.seen] == ["entered", "left"])
    assert made.seen[1][1] != ident()


def test_an_event_loop_context_in_sync_code_of_a_promoted_loop_joins_it() -> None:
    async def code() -> None:
        loop = asyncio.get_running_loop()

        def sync_code() -> None:
            post_and_wait(loop)
            with EventLoopContext():
                assert call_here().loop is loop

        await sync_to_async(sync_code)()
        await sync_to_async(sync_code)()

    run_view(code)


# --- ends ------------------------------------------------------------------------------------------------------------


@all_loops
@pytest.mark.parametrize("way", [by_gather, by_post, by_post_of_another_thread, by_left_over])
def test_nothing_of_a_promoted_request_is_left_for_the_garbage_collector(
    no_gc: None, factory: Any, way: Callable[[], Awaitable[None]]
) -> None:
    found: list[weakref.ref[Any]] = []

    async def view(request: Any) -> Any:
        found.append(weakref.ref(request))
        found.append(weakref.ref(asyncio.get_running_loop()))
        await sync_to_async(async_to_sync(way))()
        await way()
        return HttpResponse()

    with serve(view, loop_factory=factory) as server:
        server.get()
    left.clear()
    eventually(lambda: [ref() for ref in found] == [None, None], 5)


@all_loops
def test_the_loop_of_a_promoted_request_is_closed_after_request_finished(receive: Connect, factory: Any) -> None:
    places: list[Place] = []

    async def view(request: Any) -> Any:
        await promote()
        places.append(await here())
        return HttpResponse()

    def finished(**kwargs: Any) -> None:
        places.append(call_here())
        assert not places[0].loop.is_closed()

    receive(finished=finished)
    with serve(view, loop_factory=factory) as server:
        server.get()
    assert places[0] == places[1]
    eventually(places[0].loop.is_closed)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock of `threading`, and require that nothing in the block waits for it."""
    lock, is_over, failed = getattr(threading, name), threading.Event(), threading.Event()

    def let_go() -> None:
        if not is_over.wait(SOON):
            failed.set()
            lock.release()

    thread = threading.Thread(target=let_go)
    thread.start()
    with lock if "limbo" in name else contextlib.nullcontext():
        if "limbo" not in name:
            lock.acquire()
        yield
        is_over.set()
        if "limbo" not in name and not failed.is_set():
            lock.release()
    thread.join()
    assert not failed.is_set()


@all_loops
@pytest.mark.parametrize(
    "lock", [name for name in ("_active_limbo_lock", "_shutdown_locks_lock") if hasattr(threading, name)]
)
def test_a_generator_that_is_dropped_while_a_thread_is_being_started_does_not_wait_for_that(
    factory: Any, lock: str
) -> None:
    """The garbage collector may come at any moment, also when this thread holds a lock of all threads."""
    closed = threading.Event()

    async def generate() -> AsyncIterator[None]:
        try:
            yield
        finally:
            closed.set()

    async def begin(held: list[Any]) -> None:
        held.append(generate())
        await anext(held[0])

    def view(request: Any) -> Any:
        held: list[Any] = []
        async_to_sync(begin)(held)
        with locked(lock):
            held.clear()
        async_to_sync(asyncio.sleep)(0)
        return HttpResponse(b"served")

    with serve(view, loop_factory=factory) as server:
        assert server.get() == b"served"
    assert closed.wait(SOON)
