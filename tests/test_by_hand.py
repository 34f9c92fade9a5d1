"""Scope "request": the request thread runs the loop by hand. What that has to get right, trap by trap.

A loop that can not be run by hand, as uvloop's, has to keep the same promises: it is promoted at the first loop call.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import uvloop
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.db import connection, transaction
from django.http import HttpResponse, StreamingHttpResponse
from django.template import engines

from wsgi_loop import EventLoopContext, PerLoop, create_background_task
from wsgi_loop.event_loop import EventLoop

from .conftest import Connect
from .support import Place, call_here, call_here_nested, eventually, here, in_child, in_thread, loop_threads, serve

Loops = list[asyncio.AbstractEventLoop]
ident = threading.get_ident


def debug_loop() -> asyncio.AbstractEventLoop:
    loop = EventLoop()
    loop.set_debug(True)
    return loop


loops_by_hand = [EventLoop, asyncio.new_event_loop, debug_loop]
by_hand = pytest.mark.parametrize("factory", loops_by_hand)
all_loops = pytest.mark.parametrize("factory", [*loops_by_hand, uvloop.new_event_loop])
both_loops = pytest.mark.parametrize("factory", [EventLoop, uvloop.new_event_loop])


def drop(held: list[Any]) -> None:
    """Let go of a response, which nobody but this list holds."""
    with pytest.warns(ResourceWarning, match="dropped without close"):  # noqa: PT031
        held.clear()
        gc.collect()


async def leave(request: Any, coroutine: Any) -> asyncio.Task[Any]:
    """Start a task, and have it take its first step. Somebody has to hold it."""
    task = request.META["test.task"] = asyncio.ensure_future(coroutine)
    await asyncio.sleep(0)
    return task


# --- one loop, one thread, one task --------------------------------------------------------------------------------


def serve_calls_from_everywhere(
    receive: Connect, factory: Any, take: Callable[[str, Any], None], gathers: bool = False
) -> Any:
    """Serve a request that makes loop calls wherever it can, and has `take` look at each: with its name and place.

    gathers: the view has sync code run while there are other tasks, as the last thing but one.
    """

    def at(name: str) -> None:
        take(name, call_here())

    async def aat(name: str) -> None:
        take(name, await here())
        take(f"nested in {name}", await call_here_nested())

    def middleware(get_response: Any) -> Any:
        def wrap(request: Any) -> Any:
            at("middleware")
            return get_response(request)

        return wrap

    async def view(request: Any) -> Any:
        await aat("view")
        if gathers:
            await asyncio.gather(call_here_nested(), call_here_nested())
        await aat("view again")
        template = engines["django"].from_string("{{ call.loop }}")
        await sync_to_async(template.render)({"call": lambda: take("nested in template", call_here())})

        async def body() -> Any:
            try:
                for name in "ab":
                    await aat(f"step {name}")
                    yield b"x"
            finally:
                await aat("end of body")

        return StreamingHttpResponse(body())

    async def finished(**kwargs: Any) -> None:
        # Django gathers these, so it is a task of its own.
        take("nested in receiver", await here())

    receive(started=lambda **kwargs: at("request_started"), finished=lambda **kwargs: at("request_finished"))
    receive(finished=finished)
    templates = [{"BACKEND": "django.template.backends.django.DjangoTemplates"}]
    return serve(view, middleware=[middleware], loop_factory=factory, TEMPLATES=templates)


def assert_one_loop_and_one_task(places: dict[str, Place]) -> None:
    assert len({place.loop for place in places.values()}) == 1
    assert len({place.task for name, place in places.items() if not name.startswith("nested")}) == 1
    assert len(places) == 15


@by_hand
def test_every_loop_call_is_on_the_request_thread_on_one_loop_and_in_one_task(receive: Connect, factory: Any) -> None:
    places: dict[str, Place] = {}
    with serve_calls_from_everywhere(receive, factory, places.__setitem__) as server:
        assert server.get() == b"xx"
    assert_one_loop_and_one_task(places)
    assert {place.thread for place in places.values()} == {ident()}


@by_hand
def test_from_its_promotion_on_every_loop_call_is_on_one_loop_thread(receive: Connect, factory: Any) -> None:
    places: dict[str, Place] = {}
    with serve_calls_from_everywhere(receive, factory, places.__setitem__, gathers=True) as server:
        assert server.get() == b"xx"
    assert_one_loop_and_one_task(places)
    threads = [place.thread for place in places.values()]
    before = list(places).index("view again")
    assert set(threads[:before]) == {ident()}
    assert len(set(threads[before:])) == 1
    assert ident() not in threads[before:]


@pytest.mark.parametrize("gathers", [False, True])
def test_every_loop_call_is_on_one_loop_thread_if_the_loop_can_not_be_run_by_hand(
    receive: Connect, gathers: bool
) -> None:
    places: dict[str, Place] = {}
    with serve_calls_from_everywhere(receive, uvloop.new_event_loop, places.__setitem__, gathers) as server:
        assert server.get() == b"xx"
    assert_one_loop_and_one_task(places)
    [thread] = {place.thread for place in places.values()}
    assert thread != ident()


def test_eight_request_threads_at_once(receive: Connect, no_gc: None) -> None:
    places: dict[int, set[Any]] = {}
    together = threading.Barrier(8)

    def take(name: str, place: Place) -> None:
        places.setdefault(ident(), set()).add((place.loop, place.thread))

    with serve_calls_from_everywhere(receive, None, take) as server:

        def run() -> None:
            together.wait(60)
            for _ in range(5):
                assert server.get() == b"xx"

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(places) == 8
    for thread_id, seen in places.items():
        assert {found for _, found in seen} == {thread_id}
        assert len({loop for loop, _ in seen}) == 5


@pytest.mark.parametrize("view", ["by_hand", "promoted"])
def test_in_pythons_development_mode(view: str) -> None:
    """In a process of its own, which has asyncio's debug mode and all warnings."""
    code = (
        "import django; django.setup()\n"
        "import logging\n"
        "from tests.support import *\n"
        "from django.http import HttpResponse\n"
        # It does not tell then of what a busy machine makes slow.
        "logging.getLogger('asyncio').setLevel('ERROR')\n"
        "loops = []\n"
        "async def by_hand(request):\n"
        "    loops.append(asyncio.get_running_loop())\n"
        "    await asyncio.sleep(0.001)\n"
        "    return HttpResponse(f'{(await call_here_nested()).thread == threading.get_ident()}'.encode())\n"
        "async def promoted(request):\n"
        "    thread = threading.get_ident()\n"
        "    await asyncio.gather(call_here_nested(), asyncio.to_thread(int), sync_to_async(call_here)())\n"
        "    assert thread != threading.get_ident()\n"
        "    return await by_hand(request)\n"
        f"with serve({view}) as server:\n"
        "    for _ in range(3):\n"
        "        print(server.get())\n"
        "eventually(lambda: all(loop.is_closed() for loop in loops))\n"
        "assert len(set(loops)) == 3\n"
    )
    env = os.environ | {"PYTHONDEVMODE": "1", "DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONWARNINGS": "error"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (found.stdout, found.stderr, found.returncode) == ("b'True'\n" * 3, "", 0)


def serve_and_keep_loops(receive: Connect, factory: Any, loops: Loops, gathers: bool = False) -> Any:
    def make() -> Any:
        loops.append(factory())
        return loops[-1]

    return serve_calls_from_everywhere(receive, make, lambda name, place: None, gathers)


@by_hand
def test_no_thread_is_started_and_one_loop_made_which_is_closed_when_close_returns(
    receive: Connect, started: list[str], loops: Loops, factory: Any
) -> None:
    with serve_and_keep_loops(receive, factory, loops) as server:
        loops.clear()
        for _ in range(3):
            response = server.open()
            assert b"".join(response) == b"xx"
            assert not loops[-1].is_closed()
            response.close()
            assert loops[-1].is_closed()
    assert len(loops) == 3
    assert started == []


@pytest.mark.parametrize(("factory", "gathers"), [(EventLoop, True), (uvloop.new_event_loop, False)])
def test_one_thread_is_started_and_one_loop_made_for_a_request_that_is_promoted(
    receive: Connect, started: list[str], loops: Loops, factory: Any, gathers: bool
) -> None:
    with serve_and_keep_loops(receive, factory, loops, gathers) as server:
        loops.clear()
        started.clear()
        for number in range(1, 4):
            assert server.get() == b"xx"
            assert len(started) == number
    assert len(loops) == 3
    eventually(lambda: not loop_threads())


def test_a_request_that_makes_no_loop_call_makes_no_loop(started: list[str]) -> None:
    made: list[int] = []

    def make() -> asyncio.AbstractEventLoop:
        made.append(1)
        return asyncio.new_event_loop()

    with serve(lambda request: HttpResponse(), loop_factory=make) as server:
        made.clear()
        server.get()
    assert made == []
    assert started == []


# --- thread-sensitive calls ----------------------------------------------------------------------------------------


def no_loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


@all_loops
def test_thread_sensitive_calls_run_on_the_request_thread_outside_the_loop(factory: Any) -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.append((ident(), no_loop_is_running()))

    async def view(request: Any) -> Any:
        await sync_to_async(look)()
        await asyncio.gather(*(sync_to_async(look)() for _ in range(3)))
        await sync_to_async(lambda: async_to_sync(sync_to_async(look))())()
        return HttpResponse()

    with serve(view, loop_factory=factory) as server:
        server.get()
    assert seen == [(ident(), True)] * 5


@pytest.mark.django_db(transaction=True)
def test_the_orm_below_a_transaction_of_sync_code_below_async_code(started: list[str]) -> None:
    seen: list[Any] = []

    def look() -> Any:
        return ident(), connection.in_atomic_block, id(connection.connection)

    async def create(name: str) -> None:
        await User.objects.acreate(username=name)
        seen.append(await sync_to_async(look)())

    def roll_back() -> None:
        with transaction.atomic():
            seen.append(look())
            async_to_sync(create)("rolled back")
            assert User.objects.count() == 1
            transaction.set_rollback(True)

    async def view(request: Any) -> Any:
        await sync_to_async(roll_back)()
        assert [user.username async for user in User.objects.all()] == []
        await User.objects.acreate(username="kept")
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert seen[0] == seen[1] == (ident(), True, seen[0][2])
    assert [user.username for user in User.objects.all()] == ["kept"]
    assert started == []


def test_what_an_outer_call_queues_waits_for_the_sync_code_below_it() -> None:
    """It would run inside a transaction that is none of its business."""
    seen: list[str] = []

    async def view(request: Any) -> Any:
        other_may_go, other_has_asked = asyncio.Event(), asyncio.Event()

        async def nested() -> None:
            other_may_go.set()
            await other_has_asked.wait()
            # Time for the other one's call to run here, if it would.
            for _ in range(5):
                await asyncio.sleep(0)
            await sync_to_async(seen.append)("nested")
            await asyncio.sleep(0.01)

        def sync_code() -> None:
            seen.append("begin")
            async_to_sync(nested)()
            seen.append("end")

        async def other() -> None:
            await other_may_go.wait()
            asked = asyncio.ensure_future(sync_to_async(seen.append)("other"))
            await asyncio.sleep(0)
            other_has_asked.set()
            await asked

        await asyncio.gather(sync_to_async(sync_code)(), other())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert seen == ["begin", "nested", "end", "other"]


def test_a_nested_call_goes_on_while_the_outer_one_is_cancelled() -> None:
    seen: list[str] = []
    timeouts: list[asyncio.Timeout] = []

    async def nested() -> None:
        timeouts[0].reschedule(asyncio.get_running_loop().time() + 0.01)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("nested is cancelled")
            raise

    def sync_code() -> None:
        try:
            async_to_sync(nested)()
        finally:
            seen.append("sync code ends")

    async def view(request: Any) -> Any:
        try:
            async with asyncio.timeout(60) as timeout:
                timeouts.append(timeout)
                await sync_to_async(sync_code)()
        except TimeoutError:
            seen.append("timeout")
        seen.append(await sync_to_async(lambda: "goes on")())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert seen == ["nested is cancelled", "sync code ends", "timeout", "goes on"]


def test_a_queued_call_that_is_cancelled_never_runs() -> None:
    seen: list[str] = []

    async def view(request: Any) -> Any:
        async def cancel() -> None:
            second.cancel()
            # The cancellation takes its time to go down to the call.
            await asyncio.sleep(0.01)

        first = asyncio.ensure_future(sync_to_async(lambda: (seen.append("first"), async_to_sync(cancel)()))())
        second = asyncio.ensure_future(sync_to_async(seen.append)("second"))
        await asyncio.gather(first, second, return_exceptions=True)
        assert second.cancelled()
        seen.append(await sync_to_async(lambda: "third")())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert seen == ["first", "third"]


@pytest.mark.parametrize("exception", [ValueError, StopIteration, asyncio.CancelledError, KeyError])
def test_what_sync_code_raises_reaches_its_caller(exception: type[BaseException]) -> None:
    def fail() -> None:
        raise exception("from sync code")

    async def view(request: Any) -> Any:
        try:
            await sync_to_async(fail)()
        except BaseException as exc:
            return HttpResponse(repr(exc))

    with serve(view) as server:
        found = server.get()
    if exception is StopIteration:
        assert b"raised StopIteration" in found
    else:
        assert found == repr(exception("from sync code")).encode()


def test_tasks_that_outlive_their_loop_call_are_served_by_the_next_one_a_step_and_close() -> None:
    seen: list[Any] = []

    async def call_later(name: str, turn: Any) -> None:
        await turn()
        seen.append((name, await sync_to_async(ident)()))

    def view(request: Any) -> Any:
        events = {name: asyncio.Event() for name in ("next call", "step")}

        async def start() -> list[Any]:
            # asyncio.Event has nothing to do with a loop before somebody waits for it.
            tasks = [asyncio.ensure_future(call_later(name, event.wait)) for name, event in events.items()]
            tasks.append(asyncio.ensure_future(call_later("close", at_the_end)))
            await asyncio.sleep(0)
            return tasks

        async def at_the_end() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

        async def go_on(name: str) -> None:
            events[name].set()
            while name not in dict(seen):
                await asyncio.sleep(0)

        request.META["test.tasks"] = async_to_sync(start)()
        async_to_sync(go_on)("next call")

        async def body() -> Any:
            await go_on("step")
            yield b"x"

        return StreamingHttpResponse(body())

    with serve(view) as server:
        response = server.open()
        assert seen == [("next call", ident())]
        assert b"".join(response) == b"x"
        assert [name for name, _ in seen] == ["next call", "step"]
        response.close()
    assert seen == [(name, ident()) for name in ("next call", "step", "close")]


def test_a_call_after_the_request_gets_an_error_that_says_what_to_do(loops: Loops) -> None:
    """The loop of a response that was dropped ends on another thread, and may take a moment for it."""
    errors: list[BaseException] = []

    async def left_over() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            try:
                await sync_to_async(ident)()
            except RuntimeError as exc:
                errors.append(exc)

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        await leave(request, left_over())
        return HttpResponse()

    with serve(view) as server:
        drop([server.open("/dropped")])
    eventually(lambda: errors)
    assert "GET '/dropped' is over" in str(errors[0])
    assert "create_background_task" in str(errors[0])


def test_a_left_over_task_makes_loop_calls_from_sync_code_while_close_serves_it(loops: Loops) -> None:
    seen: list[Any] = []

    async def left_over() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append(await sync_to_async(lambda: (ident(), call_here().loop))())

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        await leave(request, left_over())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert seen == [(ident(), loops[0])]


# --- asyncio's order -----------------------------------------------------------------------------------------------


@all_loops
def test_a_callback_that_a_future_was_given_before_it_was_awaited_runs_before_the_task_goes_on(factory: Any) -> None:
    seen: list[str] = []

    async def view(request: Any) -> Any:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        future.add_done_callback(lambda _: seen.append("callback"))
        loop.call_later(0.001, future.set_result, None)
        await future
        seen.append("task")
        return HttpResponse()

    with serve(view, loop_factory=factory) as server:
        server.get()
    assert seen == ["callback", "task"]


@all_loops
def test_what_was_called_soon_before_a_task_was_woken_up_runs_before_it_and_the_rest_after_it(factory: Any) -> None:
    seen: list[str] = []

    async def view(request: Any) -> Any:
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def wake_up() -> None:
            loop.call_soon(seen.append, "before")
            future.set_result(None)
            loop.call_soon(seen.append, "after")

        loop.call_later(0.001, wake_up)
        await future
        seen.append("task")
        await asyncio.sleep(0.01)
        return HttpResponse()

    with serve(view, loop_factory=factory) as server:
        server.get()
    assert seen == ["before", "task", "after"]


@all_loops
def test_tasks_and_the_one_that_has_made_them_take_turns_as_in_asyncio(factory: Any) -> None:
    async def take_turns() -> list[str]:
        seen: list[str] = []

        async def other(name: str) -> None:
            for _ in range(3):
                seen.append(name)
                await asyncio.sleep(0)

        tasks = [asyncio.ensure_future(other(name)) for name in "ab"]
        for _ in range(4):
            await asyncio.sleep(0)
            seen.append("task")
        await asyncio.gather(*tasks)
        return seen

    async def view(request: Any) -> Any:
        return HttpResponse("".join(await take_turns()))

    with serve(view, loop_factory=factory) as server:
        assert server.get().decode() == "".join(asyncio.run(take_turns()))


@all_loops
def test_a_task_that_asks_again_and_again_holds_nothing_up(factory: Any) -> None:
    """`asyncio.sleep(0)` lets tasks, timers, other threads and sockets have their turn."""
    ours, theirs = socket.socketpair()

    async def view(request: Any) -> Any:
        loop = asyncio.get_running_loop()
        ours.setblocking(False)
        loop.call_later(0.05, theirs.send, b"x")
        waited_for = [
            asyncio.ensure_future(asyncio.sleep(0)),
            asyncio.ensure_future(asyncio.sleep(0.001)),
            asyncio.ensure_future(asyncio.to_thread(int)),
            asyncio.ensure_future(loop.sock_recv(ours, 1)),
        ]
        began = time.monotonic()
        for future in waited_for:
            while not future.done():
                assert time.monotonic() - began < 5
                await asyncio.sleep(0)
        return HttpResponse(b"served")

    with ours, theirs, serve(view, loop_factory=factory) as server:
        assert server.get() == b"served"


@all_loops
def test_a_task_that_never_waits_is_cancelled_by_its_timeout(factory: Any) -> None:
    async def view(request: Any) -> Any:
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                while time.monotonic() - began < 5:
                    await asyncio.sleep(0)
                raise AssertionError("it was not cancelled")
        return HttpResponse(b"served")

    with serve(view, loop_factory=factory) as server:
        assert server.get() == b"served"


# --- ends ----------------------------------------------------------------------------------------------------------


def streams(loops: Loops, step: Callable[[], Awaitable[object]]) -> Any:
    """A view that makes an async body, which awaits `step()` before its second chunk."""

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())

        async def body() -> Any:
            yield b"1"
            await step()
            yield b"2"

        return StreamingHttpResponse(body())

    return view


def close_while_inside(server: Any, is_inside: threading.Event) -> tuple[float, Any]:
    """Close a response while another thread is in its body. Returns how long that took, and what the body raised."""
    response = server.open()
    outcome: list[Any] = []

    def read() -> None:
        try:
            outcome.append(b"".join(response))
        except BaseException as exc:
            outcome.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    assert is_inside.wait(60)
    began = time.monotonic()
    response.close()
    seconds = time.monotonic() - began
    reader.join(60)
    assert not reader.is_alive()
    return seconds, outcome[0]


def test_close_while_the_first_thread_is_in_the_loop(caplog: pytest.LogCaptureFixture, loops: Loops) -> None:
    is_inside = threading.Event()

    async def step() -> None:
        is_inside.set()
        await asyncio.sleep(60)

    with serve(streams(loops, step)) as server:
        seconds, raised = close_while_inside(server, is_inside)
    assert seconds < 2
    assert isinstance(raised, asyncio.CancelledError)
    assert "gave up" not in caplog.text


def test_a_loop_call_of_a_second_thread_while_the_first_is_in_the_loop(receive: Connect) -> None:
    """It is answered there, and its own sync code runs on its own thread meanwhile."""
    is_inside = threading.Event()
    seen: list[Any] = []

    async def wait() -> None:
        is_inside.set()
        await asyncio.sleep(60)

    def body() -> Iterator[bytes]:
        yield b"x"
        async_to_sync(wait)()
        yield b"y"

    async def use_thread() -> int:
        return await sync_to_async(threading.get_ident)()

    def finished(**kwargs: Any) -> None:
        seen.append(async_to_sync(use_thread)())

    receive(finished=finished)
    with serve(lambda request: StreamingHttpResponse(body())) as server:
        seconds, raised = close_while_inside(server, is_inside)
    assert seen == [threading.get_ident()]
    assert seconds < 5
    assert isinstance(raised, asyncio.CancelledError)


def test_close_while_the_first_thread_is_in_a_call_that_would_not_end(
    caplog: pytest.LogCaptureFixture, loops: Loops
) -> None:
    """The thread sleeps in its loop, of which nothing comes any more: it has to be woken up."""
    is_inside = threading.Event()

    async def step() -> None:
        while True:
            is_inside.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    with serve(streams(loops, step), shutdown_timeout=0.1) as server:
        seconds, raised = close_while_inside(server, is_inside)
    assert seconds < 2
    assert isinstance(raised, RuntimeError | asyncio.CancelledError)
    assert "GET '/': gave up its event loop" in caplog.text


def test_close_while_the_first_thread_is_in_sync_code_for_too_long(
    caplog: pytest.LogCaptureFixture, loops: Loops
) -> None:
    is_inside = threading.Event()

    async def step() -> None:
        await sync_to_async(lambda: (is_inside.set(), time.sleep(3)))()

    def run() -> tuple[float, str]:
        with serve(streams(loops, step), shutdown_timeout=0.1) as server:
            seconds, raised = close_while_inside(server, is_inside)
        told = str(raised)
        # Up to Python 3.12 the body that was given up is not closed before it is collected, and asgiref sets then in
        # the context of whichever thread does that what it would set in the caller's.
        del raised
        gc.collect()
        return seconds, told

    seconds, told = in_thread(run)
    assert seconds < 2.5
    assert "was running" in told
    assert "GET '/': gave up its event loop" in caplog.text


@pytest.mark.parametrize("is_sync", [False, True], ids=["in the loop", "in sync code below it"])
def test_close_from_inside(loops: Loops, is_sync: bool) -> None:
    holder: list[Any] = []
    cleaned_up: list[int] = []

    async def left_over() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await sync_to_async(cleaned_up.append)(ident())

    async def step() -> None:
        task = asyncio.ensure_future(left_over())
        await asyncio.sleep(0)
        if is_sync:
            await sync_to_async(holder[0].close)()
        else:
            holder[0].close()
        assert task

    with serve(streams(loops, step)) as server:
        response = server.open()
        holder.append(response)
        began = time.monotonic()
        with contextlib.suppress(asyncio.CancelledError, RuntimeError):
            b"".join(response)
        response.close()
    assert time.monotonic() - began < 2
    eventually(loops[0].is_closed)


def test_close_twice(receive: Connect) -> None:
    sent: list[int] = []
    receive(finished=lambda **kwargs: sent.append(1))

    async def view(request: Any) -> Any:
        return HttpResponse()

    with serve(view) as server:
        response = server.open()
        response.close()
        response.close()
    assert len(sent) == 2  # the second one is Django's alone


@both_loops
def test_a_response_that_is_dropped_gives_its_loop_back(loops: Loops, factory: Any) -> None:
    """On a thread of its own, where its left-over tasks have no request thread."""
    ended: list[Any] = []

    async def left_over() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append(ident())

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        await leave(request, left_over())
        return HttpResponse()

    with serve(view, loop_factory=factory) as server:
        drop([server.open()])
    eventually(loops[0].is_closed)
    assert len(ended) == 1
    assert ended != [ident()]


@both_loops
def test_a_response_that_is_dropped_with_nothing_left_logs_nothing(
    caplog: pytest.LogCaptureFixture, loops: Loops, factory: Any
) -> None:
    """Also not that its task was destroyed while it waited for the next call."""

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        return HttpResponse()

    with serve(view, loop_factory=factory) as server:
        drop([server.open()])
        eventually(loops[0].is_closed)
        gc.collect()
    assert caplog.text == ""


def test_where_no_thread_can_be_started_the_loop_of_a_dropped_response_is_closed_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, loops: Loops
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def generate() -> Any:
        yield 1
        yield 2

    generator = generate()

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        # A loop on which a generator is open has to be closed on a thread.
        await anext(generator)
        return HttpResponse(b"served")

    with serve(view) as server, monkeypatch.context() as patch:
        response = [server.open("/dropped")]
        patch.setattr(threading.Thread, "start", fail)
        drop(response)
        eventually(loops[0].is_closed)
        eventually(lambda: "GET '/dropped': its event loop was not closed well: " in caplog.text)
        assert "can't start new thread" in caplog.text


def test_close_inside_another_loop_on_this_thread(loops: Loops) -> None:
    ended: list[int] = []

    async def left_over() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            ended.append(1)

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        await leave(request, left_over())
        return HttpResponse()

    async def close(response: Any) -> None:
        response.close()
        assert loops[0].is_closed()

    with serve(view) as server:
        asyncio.run(close(server.open()))
    assert ended == [1]


@pytest.mark.parametrize("is_promoted", [False, True], ids=["by hand", "promoted"])
@pytest.mark.parametrize("is_dropped", [False, True], ids=["closed", "dropped"])
def test_a_thread_that_posts_to_the_loop_as_it_ends(
    caplog: pytest.LogCaptureFixture, loops: Loops, is_dropped: bool, is_promoted: bool
) -> None:
    """As an executor's does with what a function has returned. It is not to be taken for one that runs the loop."""
    posts, may_go_on = threading.Event(), threading.Event()
    posters: list[threading.Thread] = []

    class Loop(asyncio.SelectorEventLoop):
        def call_soon(self, *args: Any, **kwargs: Any) -> Any:
            return self._held(super().call_soon, *args, **kwargs)

        def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> Any:
            return self._held(super().call_soon_threadsafe, *args, **kwargs)

        def _held(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() in posters:
                posts.set()
                may_go_on.wait(60)
            with contextlib.suppress(RuntimeError):  # it is closed, as it may be
                return function(*args, **kwargs)

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        if is_promoted:
            await leave(request, asyncio.sleep(60))
        return HttpResponse()

    with serve(view, loop_factory=Loop, shutdown_timeout=20) as server:
        responses = [server.open()]
        posters.append(threading.Thread(target=lambda: loops[0].call_soon_threadsafe(int)))
        posters[0].start()
        assert posts.wait(60)
        letting_go = threading.Timer(0.1, may_go_on.set)
        letting_go.start()
        began = time.monotonic()
        if is_dropped:
            drop(responses)
        else:
            responses[0].close()
        assert time.monotonic() - began < 10
        letting_go.join()
        posters[0].join()
    eventually(loops[0].is_closed)
    assert "gave up" not in caplog.text


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Have the main thread interrupted in a moment, and require that it is, at once."""
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    began = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    assert time.monotonic() - began < 2
    timer.join()


def wait_busily() -> None:
    began = time.monotonic()
    while time.monotonic() - began < 5:
        pass


async def interrupted_in_select() -> None:
    await asyncio.sleep(60)


async def interrupted_in_a_coroutine() -> None:
    wait_busily()


async def interrupted_in_sync_code() -> None:
    await sync_to_async(wait_busily)()


async def interrupted_below_sync_code() -> None:
    await sync_to_async(lambda: async_to_sync(asyncio.sleep)(60))()


@both_loops
@pytest.mark.parametrize(
    "wait",
    [
        interrupted_in_select,
        interrupted_in_a_coroutine,
        interrupted_in_sync_code,
        interrupted_below_sync_code,
    ],
)
def test_an_interrupt_passes_through_and_the_loop_is_closed(
    loops: Loops, interruptible: None, factory: Any, wait: Callable[[], Awaitable[None]]
) -> None:
    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        await wait()
        return HttpResponse()

    # On a loop thread, a coroutine that waits busily is not interrupted.
    with serve(view, loop_factory=factory, shutdown_timeout=0.5) as server, interrupted():
        server.get()
    eventually(loops[0].is_closed)
    assert no_loop_is_running()


def test_an_interrupt_where_sync_code_ends_waits_for_the_loop_thread(loops: Loops, interruptible: None) -> None:
    """The loop was promoted below the sync code, and its thread is busy: the step has to be ended first."""
    may_go_on = threading.Event()

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        post = asyncio.get_running_loop().call_soon_threadsafe
        await sync_to_async(lambda: (post(may_go_on.wait, 60), 0)[1])()
        return HttpResponse()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.2)
        may_go_on.set()

    timer = threading.Timer(0.5, interrupt)
    with serve(view, shutdown_timeout=5) as server:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            server.get()
    timer.join()
    eventually(loops[0].is_closed)
    assert no_loop_is_running()


@both_loops
def test_an_interrupt_while_close_waits_leaves_the_rest_to_another_thread(
    loops: Loops, interruptible: None, factory: Any
) -> None:
    ended: list[int] = []
    may_end = asyncio.Event()

    async def left_over() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            # Nothing runs meanwhile, lest the interrupt comes in a callback, which would be lost.
            await may_end.wait()
            ended.append(ident())

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        await leave(request, left_over())
        return HttpResponse()

    with serve(view, loop_factory=factory) as server:
        response = server.open()
        with interrupted():
            response.close()
        loops[0].call_soon_threadsafe(may_end.set)
    eventually(loops[0].is_closed)
    assert ended
    assert ended != [ident()]


def test_an_exit_while_a_loop_ends_that_was_closed_from_inside(loops: Loops) -> None:
    holder: list[Any] = []

    async def left_over() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise SystemExit

    async def step() -> None:
        task = asyncio.ensure_future(left_over())
        await asyncio.sleep(0)
        holder[0].close()
        assert task

    with serve(streams(loops, step)) as server:
        response = server.open()
        holder.append(response)
        with contextlib.suppress(SystemExit, asyncio.CancelledError, RuntimeError):
            b"".join(response)
    eventually(loops[0].is_closed)


def test_system_exit_of_a_child_task_leaves_the_loop_as_asyncio_has_it(loops: Loops) -> None:
    """And later calls of the request run on it all the same."""
    seen: list[Any] = []

    async def leave_at_once() -> None:
        raise SystemExit(3)

    async def call() -> None:
        loops.append(asyncio.get_running_loop())
        with contextlib.suppress(SystemExit):
            await asyncio.ensure_future(leave_at_once())

    def view(request: Any) -> Any:
        with pytest.raises(SystemExit):
            async_to_sync(call)()
        seen.append(call_here())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert [place.loop for place in seen] == loops


def test_a_task_that_ignores_its_cancellation_is_given_up_and_never_met_again(
    caplog: pytest.LogCaptureFixture, loops: Loops
) -> None:
    steps: list[int] = []

    async def stubborn() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.001)
            steps.append(1)

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        await leave(request, stubborn())
        return HttpResponse()

    async def patient(request: Any) -> Any:
        await asyncio.sleep(0.05)
        return HttpResponse()

    with serve({"stubborn": view, "patient": patient}, shutdown_timeout=0.1) as server:
        began = time.monotonic()
        server.get("/stubborn")
        assert time.monotonic() - began < 1
        eventually(loops[0].is_closed)
        taken = len(steps)
        server.get("/patient")
    assert len(steps) == taken
    assert "gave up" in caplog.text
    assert "stubborn" in caplog.text


@both_loops
def test_the_default_executor_is_shut_down_and_slow_threads_of_it_do_not_hold_the_request(
    loops: Loops, factory: Any
) -> None:
    may_end = threading.Event()
    threads: list[threading.Thread] = []

    def wait() -> None:
        threads.append(threading.current_thread())
        may_end.wait(60)

    async def idle(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        threads.append(await asyncio.to_thread(threading.current_thread))
        return HttpResponse()

    async def slow(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        # Nobody waits for it: there is no task.
        request.META["test.future"] = asyncio.get_running_loop().run_in_executor(None, wait)
        return HttpResponse()

    with serve({"idle": idle, "slow": slow}, loop_factory=factory, shutdown_timeout=3) as server:
        server.get("/idle")
        eventually(lambda: not threads[0].is_alive())
        began = time.monotonic()
        server.get("/slow")
        assert time.monotonic() - began < 1
        may_end.set()
        eventually(lambda: len(threads) == 2 and not threads[1].is_alive())


@both_loops
@pytest.mark.parametrize("is_first", [False, True], ids=["in a call", "first after sync code"])
def test_async_generators_that_are_left_over_are_closed(loops: Loops, factory: Any, is_first: bool) -> None:
    left: list[int] = []
    held: list[Any] = []

    async def generate() -> Any:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            left.append(1)

    async def begin() -> None:
        held.append(generate())
        await anext(held[-1])

    async def view(request: Any) -> Any:
        loops.append(asyncio.get_running_loop())
        if is_first:
            # It is ready when the sync code begins, and so the first to run after that.
            task = asyncio.ensure_future(begin())
            await sync_to_async(int)()
            await task
        else:
            await begin()
        return HttpResponse()

    with serve(view, loop_factory=factory) as server:
        server.get()
    assert left == [1]


@both_loops
def test_a_connection_that_is_closed_just_before_the_end(factory: Any, loops: Loops) -> None:
    """That it is, is a matter of one more round of the loop. Else a ResourceWarning fails this."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        async def view(request: Any) -> Any:
            loops.append(asyncio.get_running_loop())
            _, writer = await asyncio.open_connection(*listening.getsockname())
            writer.close()
            return HttpResponse()

        with serve(view, loop_factory=factory) as server:
            for _ in range(3):
                server.get()
    gc.collect()


@both_loops
def test_nothing_is_left_for_the_garbage_collector(no_gc: None, factory: Any) -> None:
    found: list[weakref.ref[Any]] = []

    async def view(request: Any) -> Any:
        found.append(weakref.ref(request))
        await sync_to_async(call_here)()
        return HttpResponse()

    with serve(view, loop_factory=factory) as server:
        server.get()
        # A loop thread may take a moment.
        eventually(lambda: found[0]() is None, 0 if factory is EventLoop else 60)


def test_the_loop_is_freed_by_its_reference_count(no_gc: None) -> None:
    found: list[weakref.ref[Any]] = []

    async def view(request: Any) -> Any:
        found.append(weakref.ref(asyncio.get_running_loop()))
        await sync_to_async(call_here)()
        return HttpResponse()

    with serve(view) as server:
        server.get()
        assert found[0]() is None


# --- forks ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@both_loops
def test_a_fork_in_the_middle_of_a_request(factory: Any) -> None:
    """The child has the parent's loop in its stack: it serves requests of its own, and leaves that one alone."""
    seen: list[Place] = []

    async def inner(request: Any) -> Any:
        seen.append(await here())
        assert (await call_here_nested()).loop is seen[-1].loop
        return HttpResponse(b"inner")

    with serve({"outer": lambda request: outer(request), "": inner}, loop_factory=factory) as server:

        def in_the_child() -> None:
            assert server.get("/") == b"inner"
            eventually(seen[-1].loop.is_closed)
            assert not seen[0].loop.is_closed()
            assert call_here().loop not in [place.loop for place in seen]

        async def view(request: Any) -> Any:
            seen.append(await here())
            await sync_to_async(in_child)(in_the_child)
            assert (await call_here_nested()).loop is seen[0].loop
            return HttpResponse(b"outer")

        def outer(request: Any) -> Any:
            return async_to_sync(view)(request)

        assert server.get("/outer") == b"outer"
        assert server.get("/") == b"inner"


# --- other loops, threads and requests -----------------------------------------------------------------------------


def test_a_loop_of_its_own_in_sync_code_refuses_what_would_wait_for_itself() -> None:
    refused: list[str] = []

    async def call() -> str:
        for function in (sync_to_async(int), sync_to_async(call_here)):
            with pytest.raises(RuntimeError) as info:
                await function()
            refused.append(str(info.value))
        with pytest.raises(RuntimeError, match="same thread as an async event loop"):
            call_here()
        return "done"

    def sync_code() -> Any:
        assert asyncio.run(call()) == "done"
        with asyncio.Runner() as runner:
            assert runner.run(call()) == "done"
        return call_here().loop

    async def view(request: Any) -> Any:
        assert await sync_to_async(sync_code)() is asyncio.get_running_loop()
        return HttpResponse()

    with serve(view) as server:
        server.get()
        assert server.status == "200 OK"
    assert len(refused) == 4
    assert {message.partition(" submit")[0] for message in refused} == {"You cannot"}


def test_sync_code_on_other_threads_of_the_request_uses_its_loop() -> None:
    async def view(request: Any) -> Any:
        places = await asyncio.gather(*(sync_to_async(call_here, thread_sensitive=False)() for _ in range(3)))
        assert {place[:2] for place in places} == {(await here())[:2]}
        return HttpResponse()

    with serve(view) as server:
        server.get()
        assert server.status == "200 OK"


def test_a_thread_of_the_users_own_has_no_part_in_the_request() -> None:
    places: list[Place] = []

    async def view(request: Any) -> Any:
        places.append(await here())
        # Also while the loop stands still, because the request thread waits for it.
        places.append(await sync_to_async(in_thread)(call_here))
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert len({place.loop for place in places}) == 2


def test_an_event_loop_context_alone_in_threads_and_in_a_request() -> None:
    def run() -> set[Any]:
        with EventLoopContext():
            return {call_here() for _ in range(3)} | {async_to_sync(call_here_nested)()[:2]}

    for places in (run(), in_thread(run)):
        assert len({place[0] for place in places}) == 1
        assert all(place[0].is_closed() for place in places)
    assert {place[1] for place in run()} == {ident()}
    with ThreadPoolExecutor(4) as pool:
        found = [future.result(60) for future in [pool.submit(run) for _ in range(8)]]
    assert len({place[0] for places in found for place in places}) == 8

    async def view(request: Any) -> Any:
        assert {place[0] for place in await sync_to_async(run_inside)()} == {asyncio.get_running_loop()}
        return HttpResponse()

    def run_inside() -> Any:
        with EventLoopContext(), EventLoopContext():
            return {call_here()}

    with serve(view) as server:
        server.get()
        assert server.status == "200 OK"


def test_a_resource_per_loop_is_left_before_the_loop_is_closed() -> None:
    seen: list[Any] = []

    @contextlib.asynccontextmanager
    async def make() -> Any:
        seen.append(ident())
        yield object()
        seen.append(await sync_to_async(ident)())

    resource = PerLoop(make)

    async def view(request: Any) -> Any:
        assert await resource() is await resource()
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert seen == [ident(), ident()]


def test_a_background_task_runs_on_the_process_loop(new_process_loop: None) -> None:
    seen: list[Any] = []

    async def background() -> None:
        await asyncio.sleep(0.01)
        seen.append(((await here()).thread, await sync_to_async(ident)()))

    async def view(request: Any) -> Any:
        create_background_task(background())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    eventually(lambda: seen)
    assert ident() not in seen[0]


@pytest.mark.parametrize("inner", ["request", "process"])
@pytest.mark.parametrize("outer", ["request", "process"])
def test_a_request_inside_another_one(outer: Any, inner: Any, new_process_loop: None) -> None:
    places: list[Place] = []

    async def inner_view(request: Any) -> Any:
        places.append(await here())
        assert (await call_here_nested()).loop is places[-1].loop
        return HttpResponse(b"inner")

    async def view(request: Any) -> Any:
        if request.path == "/inner":
            return await inner_view(request)
        assert await sync_to_async(inner_server.get)("/inner") == b"inner"
        found = await call_here_nested()
        assert found.loop is asyncio.get_running_loop()
        assert (found.loop is places[0].loop) == (outer == inner == "process")
        return HttpResponse(b"outer")

    with serve(view, scope=inner) as inner_server, serve(view, scope=outer) as server:
        assert server.get() == b"outer"
        assert server.status == "200 OK"
    assert (places[0].thread == ident()) == (inner == "request")


def test_three_requests_in_one_another(new_process_loop: None) -> None:
    servers: list[Any] = []
    places: list[Place] = []

    async def view(request: Any) -> Any:
        depth = int(request.path[1:])
        places.append(await here())
        if depth < 2:
            await sync_to_async(servers[depth + 1].get)(f"/{depth + 1}")
        assert (await call_here_nested()).loop is places[depth].loop
        return HttpResponse()

    with contextlib.ExitStack() as stack:
        servers += [stack.enter_context(serve(view, scope=scope)) for scope in ("process", "request", "request")]
        servers[0].get("/0")
        assert [server.status for server in servers] == ["200 OK"] * 3
    assert [place.thread == ident() for place in places] == [False, True, True]
    assert len({place.loop for place in places}) == 3
