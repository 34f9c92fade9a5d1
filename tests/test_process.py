"""Scope "process": what a process loop does that a request's own loop does not, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import AsyncToSync, async_to_sync, sync_to_async
from django.http import HttpResponse, StreamingHttpResponse

from wsgi_loop import EventLoopContext, PerLoop, WSGIHandler, create_background_task, process
from wsgi_loop.bridge.executor import current_executor
from wsgi_loop.resources import context_of
from wsgi_loop.threads import STARTS_NONE_AT_EXIT, SyncThreads

from .support import Place, call_here, eventually, here, in_thread, loop_threads, serve

ROOT = Path(__file__).parent.parent
Connect = Callable[..., None]


pytestmark = pytest.mark.usefixtures("new_process_loop")


def on_threads(number: int, function: Callable[[], Any]) -> list[Any]:
    """Call `function` on so many threads at once."""
    barrier = threading.Barrier(number)

    def run(_: int) -> Any:
        barrier.wait(30)
        return function()

    with ThreadPoolExecutor(number) as executor:
        return list(executor.map(run, range(number)))


def run_script(code: str, *flags: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script of its own process, with Django set up, and wait for its end."""
    preamble = "import django, asyncio, logging, time, threading, wsgi_loop\ndjango.setup()\n"
    # It would warn of what a busy machine makes slow.
    preamble += "logging.getLogger('asyncio').setLevel(logging.ERROR)\n"
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *flags, "-c", preamble + textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_all_threads_share_one_loop_and_each_request_has_its_task_and_its_thread() -> None:
    def view(request: Any) -> Any:
        first, second = call_here(), call_here()
        sync = async_to_sync(sync_to_async(threading.get_ident))()
        return first, second, sync, threading.get_ident()

    seen: list[Any] = []

    def respond(request: Any) -> HttpResponse:
        seen.append(view(request))
        return HttpResponse()

    with serve(respond, scope="process") as server:
        on_threads(8, server.get)
    assert len(seen) == 8
    assert len({first.loop for first, *_ in seen}) == len({first.thread for first, *_ in seen}) == 1
    assert all(first == second for first, second, *_ in seen)
    assert len({first.task for first, *_ in seen}) == 8
    assert all(sync == own for *_, sync, own in seen)


def test_a_sync_request_starts_no_process_loop() -> None:
    threads = set(threading.enumerate())
    with serve(lambda request: HttpResponse(), scope="process") as server:
        server.get()
    assert process._loop is None
    assert set(threading.enumerate()) <= threads


def test_a_request_leaves_nothing_on_the_loop() -> None:
    with serve(lambda request: HttpResponse(str(call_here().thread)), scope="process") as server:
        for _ in range(50):
            server.get()
        running = process._loop
        assert running is not None
        eventually(lambda: not running._request_tasks)
        eventually(lambda: not asyncio.all_tasks(running.loop))
        assert not running._calls


def test_a_task_left_running_goes_on_and_gets_an_error_for_a_thread_sensitive_call() -> None:
    over = threading.Event()
    outcome: list[Any] = []

    async def left() -> None:
        outcome.append(await sync_to_async(threading.get_ident)())
        while not over.is_set():
            await asyncio.sleep(0.01)
        try:
            await sync_to_async(threading.get_ident)()
        except RuntimeError as exc:
            outcome.append(str(exc))

    tasks: list[Any] = []

    async def view(request: Any) -> HttpResponse:
        tasks.append(asyncio.create_task(left()))
        while not outcome:
            await asyncio.sleep(0.01)
        return HttpResponse()

    with serve(view, scope="process") as server:
        server.get("/left/")
        assert not tasks[0].done()
        over.set()
        eventually(lambda: tasks[0].done())
    assert outcome[0] == threading.get_ident()
    assert "GET '/left/' is over" in outcome[1]
    assert "create_background_task" in outcome[1]


class Interrupt(BaseException):
    """What a worker's timeout raises in a request thread."""


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("scope", "swallows"), [("process", False), ("process", True), ("request", False)])
def test_a_call_whose_request_was_interrupted_is_cancelled_and_named(
    scope: str, swallows: bool, nested: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """And what it makes its thread do meanwhile is done there, before the request is over."""
    cleaned_up_on: list[int] = []
    ended = threading.Event()
    let_go = threading.Event()
    started = threading.Event()

    async def hang() -> None:
        started.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            while swallows and not let_go.is_set():
                await asyncio.sleep(0.01)
            if not swallows:
                cleaned_up_on.append(await sync_to_async(threading.get_ident)())
            raise
        finally:
            ended.set()

    def view(request: Any) -> HttpResponse:
        async_to_sync(sync_to_async(async_to_sync(hang)) if nested else hang)()
        return HttpResponse()

    interrupted = threading.Event()

    def interrupt(signum: int, frame: Any) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise Interrupt

    def send() -> None:
        started.wait(30)
        # More than once: one that comes just before the thread goes to sleep does not wake it.
        while not interrupted.wait(0.05):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        timeout = 0.3 if swallows else 30
        with serve(view, scope=scope, shutdown_timeout=timeout) as server:
            sender = threading.Thread(target=send)
            sender.start()
            with pytest.raises(Interrupt):
                server.get("/hangs/")
            sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "GET '/hangs/': ended while" in caplog.text
    assert "hang" in caplog.text
    assert cleaned_up_on == ([] if swallows else [threading.get_ident()])
    if swallows:
        assert not ended.is_set()
        assert "is given up" in caplog.text
        let_go.set()
    assert ended.wait(30)


def test_a_call_that_is_cancelled_before_its_first_step_gets_an_answer() -> None:
    """As whoever cancels all tasks of the loop may do."""
    about_to_call = threading.Event()
    outcomes: list[Any] = []

    def hold_and_cancel() -> None:
        assert about_to_call.wait(30)
        running = process._loop
        assert running is not None
        eventually(lambda: running._calls)
        # Called when the call has become a task, which has not taken a step: with the lock it has been posted.
        with running._lock:
            running.loop.call_soon(lambda: [task.cancel() for task in asyncio.all_tasks()])

    async def hold_and_cancel_later() -> None:
        asyncio.get_running_loop().call_soon(hold_and_cancel)

    def view(request: Any) -> HttpResponse:
        about_to_call.set()
        try:
            call_here()
        except asyncio.CancelledError:
            outcomes.append("cancelled")
        outcomes.append(call_here() == call_here())
        return HttpResponse()

    with EventLoopContext(scope="process"):
        async_to_sync(hold_and_cancel_later)()
    with serve(view, scope="process") as server:
        in_thread(server.get)
        assert server.status == "200 OK"
    assert outcomes == ["cancelled", True]


def test_a_response_that_is_dropped_without_close_leaves_the_loop(no_gc: None) -> None:
    async def view(request: Any) -> HttpResponse:
        return HttpResponse()

    with serve(view, scope="process") as server:
        responses = [server.open("/dropped/")]
        running = process._loop
        assert running is not None
        assert running._request_tasks

        def drop() -> None:
            responses.clear()
            # The loop thread, which had it for an answer, may be the last to let it go.
            eventually(lambda: not running._request_tasks)

        with pytest.warns(ResourceWarning, match="GET '/dropped/': its response was dropped without close"):
            drop()


def test_a_nested_request_is_on_the_same_loop_in_a_task_of_its_own() -> None:
    inner: list[Place] = []
    outer: list[Place] = []

    def view(request: Any) -> HttpResponse:
        if request.path == "/inner/":
            inner.append(call_here())
        else:
            outer.append(call_here())
            server.get("/inner/")
            outer.append(call_here())
        return HttpResponse()

    with serve(view, scope="process") as server:
        server.get("/outer/")
    assert outer[0] == outer[1]
    assert inner[0].loop is outer[0].loop
    assert inner[0].task is not outer[0].task


class Lifespan:
    """Counts how often it is entered and left, and fails when it is told to."""

    def __init__(self) -> None:
        self.fails = 0
        self.entered = 0
        self.left = 0
        self.tasks: list[Any] = []

    @contextlib.asynccontextmanager
    async def __call__(self) -> AsyncIterator[None]:
        self.entered += 1
        self.tasks.append(asyncio.current_task())
        await asyncio.sleep(0.05)
        if self.fails:
            self.fails -= 1
            raise RuntimeError("no connection to the broker")
        yield
        self.tasks.append(asyncio.current_task())
        self.left += 1


def test_the_lifespan_is_open_before_the_first_call_and_left_at_the_end() -> None:
    lifespan = Lifespan()
    seen: list[Any] = []

    async def view(request: Any) -> HttpResponse:
        seen.append((lifespan.entered, len(lifespan.tasks), lifespan.left))
        return HttpResponse()

    with serve(view, scope="process", lifespan=lifespan) as server:
        on_threads(8, server.get)
    assert seen == [(1, 1, 0)] * 8
    process.shut_down()
    assert lifespan.left == 1
    assert lifespan.tasks[0] is lifespan.tasks[1]


@contextlib.asynccontextmanager
async def noted(seen: list[str]) -> AsyncIterator[None]:
    seen.append("entered")
    yield
    seen.append("left")


def test_start_opens_what_the_last_application_has_in_its_options() -> None:
    seen: list[str] = []
    WSGIHandler(scope="process", lifespan=lambda: noted(seen))
    process.start()
    process.start()
    assert seen == ["entered"]
    process.shut_down()
    assert seen == ["entered", "left"]
    # And another one, as every use after the end starts one.
    process.start()
    assert seen == ["entered", "left", "entered"]


def test_start_reads_the_setting_where_there_is_no_application(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "application_options", None)
    seen: list[str] = []
    settings.WSGI_LOOP = {"SCOPE": "process", "LIFESPAN": lambda: noted(seen)}
    process.start()
    assert seen == ["entered"]


def test_start_does_nothing_in_scope_request() -> None:
    WSGIHandler(scope="request")
    process.start()
    assert process._loop is None


def test_start_raises_what_the_lifespan_raises() -> None:
    failures: list[BaseException] = [OSError("no database"), TimeoutError("of the database")]

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        if failures:
            raise failures.pop(0)
        yield

    WSGIHandler(scope="process", lifespan=lifespan)
    with pytest.raises(OSError, match="no database"):
        process.start()
    with pytest.raises(TimeoutError, match="of the database"):
        process.start()
    process.start()


@pytest.mark.parametrize("ends", [asyncio.CancelledError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_ends_a_lifespan_reaches_its_caller_as_an_exception(ends: type[BaseException]) -> None:
    class Lifespan:
        async def __aenter__(self) -> None:
            raise ends("from inside")

        async def __aexit__(self, *exc_info: Any) -> None:
            pass

    with serve(here_view, scope="process", lifespan=Lifespan) as server:
        server.get()
        assert server.status == "500 Internal Server Error"
    WSGIHandler(scope="process", lifespan=Lifespan)
    with pytest.raises(RuntimeError, match=rf"^LIFESPAN .* was ended by {ends.__name__}"):
        process.start()


async def here_view(request: Any) -> HttpResponse:
    return HttpResponse()


def test_a_lifespan_that_returns_no_context_manager_is_found_by_start() -> None:
    WSGIHandler(scope="process", lifespan=lambda: 3)
    with pytest.raises(TypeError, match="The factory of LIFESPAN returned 3"):
        process.start()


def test_a_lifespan_that_hangs_is_bounded_and_named(caplog: pytest.LogCaptureFixture) -> None:
    hangs = [True]
    ended: list[str] = []

    @contextlib.asynccontextmanager
    async def connecting() -> AsyncIterator[None]:
        if hangs.pop(0):
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append("cancelled")
        yield

    with serve(here_view, scope="process", lifespan=connecting, startup_timeout=0.3) as server:
        server.get()
        assert server.status == "500 Internal Server Error"
        assert "connecting) was not entered within 0.3 s (STARTUP_TIMEOUT). Bound what it waits for" in caplog.text
        eventually(lambda: ended == ["cancelled"])
        hangs.append(False)
        server.get()
        assert server.status == "200 OK"


def test_a_lifespan_that_blocks_its_thread_is_bounded_and_named(caplog: pytest.LogCaptureFixture) -> None:
    let_go = threading.Event()
    gone_on: list[bool] = []

    @contextlib.asynccontextmanager
    async def blocking() -> AsyncIterator[None]:
        gone_on.append(let_go.wait(60))  # the line that is named
        yield

    try:
        with serve(here_view, scope="process", lifespan=blocking, startup_timeout=0.3) as server:
            server.get()
            assert server.status == "500 Internal Server Error"
            assert not gone_on
        assert "blocking) was not entered within 0.3 s" in caplog.text
        assert "# the line that is named" in caplog.text
    finally:
        let_go.set()
    eventually(lambda: not loop_threads())


def test_a_lifespan_that_raises_fails_the_call_and_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    lifespan = Lifespan()
    lifespan.fails = 1

    async def view(request: Any) -> HttpResponse:
        return HttpResponse("served")

    def call() -> str:
        with EventLoopContext(scope="process", lifespan=lifespan):
            try:
                return str(call_here().thread)
            except RuntimeError as exc:
                return str(exc)

    assert call() == "no connection to the broker"
    assert "its LIFESPAN failed" in caplog.text
    assert "no connection to the broker" in caplog.text
    with serve(view, scope="process", lifespan=lifespan) as server:
        assert server.get() == b"served"
    assert lifespan.entered == 2


def test_what_a_lifespan_starts_on_its_sync_thread_does_not_wait_for_the_lifespan() -> None:
    ran: list[str] = []

    async def work() -> None:
        ran.append("background")

    def start() -> None:
        create_background_task(work())
        with serve(view, scope="process") as server:
            ran.append(server.get().decode())

    async def view(request: Any) -> HttpResponse:
        return HttpResponse("request")

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        await sync_to_async(start)()
        yield

    with EventLoopContext(scope="process", lifespan=lifespan):
        call_here()
    assert sorted(ran) == ["background", "request"]


@pytest.mark.parametrize("how", ["before its first step", "from inside"])
def test_a_resource_whose_opening_is_cancelled_can_be_opened_again(how: str) -> None:
    opened: list[int] = []

    @contextlib.asynccontextmanager
    async def manager() -> AsyncIterator[str]:
        opened.append(1)
        if len(opened) == 1:
            raise asyncio.CancelledError
        yield "open"

    resource = PerLoop(manager)

    async def use() -> str:
        if how == "before its first step":
            opened.append(1)
            first = asyncio.ensure_future(resource())
            await asyncio.sleep(0)
            for task in asyncio.all_tasks():
                if task.get_name().startswith("keeper of"):
                    task.cancel()
        else:
            first = asyncio.ensure_future(resource())
        (outcome,) = await asyncio.gather(first, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError)
        return await resource()

    with EventLoopContext(scope="process"):
        outcome = async_to_sync(use)()
    assert outcome == "open"


def test_threads_that_wait_for_a_lifespan_that_raises_all_get_its_error() -> None:
    lifespan = Lifespan()
    lifespan.fails = 100

    def call() -> str:
        with EventLoopContext(scope="process", lifespan=lifespan), pytest.raises(RuntimeError) as caught:
            call_here()
        return str(caught.value)

    assert set(on_threads(8, call)) == {"no connection to the broker"}


def test_what_is_held_open_is_left_in_reverse_order_after_the_tasks_have_ended() -> None:
    order: list[str] = []

    def resource(name: str) -> PerLoop[str]:
        @contextlib.asynccontextmanager
        async def manager() -> AsyncIterator[str]:
            yield name
            # As a pool does that gives its connections back.
            await sync_to_async(order.append)(name)

        return PerLoop(manager)

    first, second = resource("first"), resource("second")

    async def user() -> None:
        assert await first() == "first"
        assert await second() == "second"
        assert await first() == "first"
        await asyncio.sleep(0.1)
        order.append("task")

    async def view(request: Any) -> HttpResponse:
        create_background_task(user())
        return HttpResponse()

    with serve(view, scope="process", lifespan=resource("lifespan")._factory) as server:
        server.get()
    process.shut_down()
    assert order == ["task", "second", "first", "lifespan"]


def test_what_does_not_end_in_time_is_cancelled_and_named(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await sync_to_async(ended.append)("cancelled")

    async def view(request: Any) -> HttpResponse:
        create_background_task(endless(), name="report")
        request.task = asyncio.create_task(asyncio.sleep(3600), name="plain")
        return HttpResponse()

    with serve(view, scope="process", shutdown_timeout=0.3) as server:
        server.get("/reports/")
    process.shut_down()
    assert ended == ["cancelled"]
    assert "background task report of GET '/reports/'" in caplog.text
    assert "plain running sleep" in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_a_blocked_loop_is_given_up_and_those_who_wait_for_it_get_an_error(caplog: pytest.LogCaptureFixture) -> None:
    blocked, unblock = threading.Event(), threading.Event()

    async def block() -> None:
        blocked.set()
        unblock.wait(60)

    async def view(request: Any) -> HttpResponse:
        return HttpResponse()

    with serve(view, scope="process", shutdown_timeout=0.2) as server:
        with EventLoopContext(scope="process", shutdown_timeout=0.2):
            future = create_background_task(block())
        assert blocked.wait(30)
        statuses: list[str] = []

        def get() -> None:
            server.get()
            statuses.append(server.status)

        waiting = threading.Thread(target=get)
        waiting.start()
        running = process._loop
        assert running is not None
        eventually(lambda: running._calls)
        process.shut_down()
        waiting.join(30)
        assert not waiting.is_alive()
        assert statuses == ["500 Internal Server Error"]
        with pytest.raises(BaseException, match="given up"):
            future.result(30)
    assert "gave up its event loop" in caplog.text
    assert "background task" in caplog.text
    assert "block" in caplog.text
    unblock.set()
    eventually(lambda: running.ended.done())


def test_contexts_are_never_mixed_up_and_none_is_kept() -> None:
    class Value:
        def __init__(self, path: str) -> None:
            self.path = path

    var: contextvars.ContextVar[Value] = contextvars.ContextVar("var")
    wrong: list[Any] = []
    kept: list[weakref.ref[Value]] = []
    finished: list[str] = []
    in_background: list[str] = []

    def check(path: str) -> None:
        if var.get().path != path:
            wrong.append((path, var.get().path))

    def middleware(get_response: Any) -> Any:
        def set_value(request: Any) -> Any:
            value = Value(request.path)
            kept.append(weakref.ref(value))
            var.set(value)
            return get_response(request)

        return set_value

    async def later(path: str) -> None:
        await asyncio.sleep(0)
        check(path)
        in_background.append(path)

    async def view(request: Any) -> HttpResponse:
        for _ in range(3):
            await asyncio.sleep(0)
            check(request.path)
        await sync_to_async(check)(request.path)
        create_background_task(later(request.path))
        return HttpResponse()

    async def on_finished(**kwargs: Any) -> None:
        await asyncio.sleep(0)
        finished.append(var.get().path)

    from django.core.signals import request_finished

    request_finished.connect(on_finished)
    try:
        with (
            serve(view, middleware=[middleware], scope="process", max_background_tasks=5000) as server,
            ThreadPoolExecutor(16) as executor,
        ):
            paths = [f"/{number}/" for number in range(5000)]
            list(executor.map(server.get, paths))
    finally:
        request_finished.disconnect(on_finished)
    eventually(lambda: len(in_background) == 5000, 60)
    assert wrong == []
    assert sorted(finished) == sorted(in_background) == sorted(paths)
    assert process._loop is not None
    gc.collect()
    eventually(lambda: not [reference for reference in kept if reference() is not None])


def test_a_forked_child_has_a_process_loop_of_its_own() -> None:
    def place() -> tuple[int, int]:
        with EventLoopContext(scope="process"):
            call = call_here()
            return id(call.loop), call.thread

    parent = place()
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        try:
            places = [place(), place(), parent]
            os.write(write, b"ok" if places[0] == places[1] and places[0][0] != parent[0] else repr(places).encode())
            process.shut_down()
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        assert pipe.read() == b"ok"
    assert os.waitpid(pid, 0)[1] == 0
    assert place() == parent


def test_a_fork_in_the_middle_of_a_request_leaves_the_process_loop_to_the_parent() -> None:
    outcomes: list[bytes] = []

    def view(request: Any) -> HttpResponse:
        before = call_here()
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            signal.alarm(60)
            try:
                other = call_here()
                os.write(write, b"ok" if other.loop is not before.loop else b"the parent's loop")
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            outcomes.append(pipe.read())
        os.waitpid(pid, 0)
        assert call_here() == before
        return HttpResponse()

    with serve(view, scope="process") as server:
        server.get()
        assert server.status == "200 OK"
    assert outcomes == [b"ok"]


@pytest.mark.parametrize("scope", ["request", "process"])
def test_a_child_that_is_forked_in_a_view_may_finish_the_request(scope: str) -> None:
    outcomes: list[bytes] = []
    read, write = os.pipe()
    pids: list[int] = []

    def view(request: Any) -> Any:
        before = call_here()
        pids.append(os.fork())

        def body() -> Iterator[str]:
            yield "same" if call_here().loop is before.loop else "other"

        return StreamingHttpResponse(body())

    with serve(view, scope=scope) as server:
        try:
            if threading.current_thread() is threading.main_thread():
                signal.alarm(60)
            body = server.get()
            if pids == [0]:
                os.write(write, body)
        finally:
            if pids == [0]:
                os._exit(0)
            signal.alarm(0)
    os.close(write)
    with open(read, "rb") as pipe:
        outcomes.append(pipe.read())
    assert os.waitpid(pids[0], 0)[1] == 0
    assert (body, outcomes) == (b"same", [b"other"])


def test_a_loop_that_is_given_up_lets_go_of_the_thread_of_its_resources(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[threading.Thread] = []
    closed: list[threading.Thread] = []
    blocked, unblock = threading.Event(), threading.Event()

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        used.append(await sync_to_async(threading.current_thread)())
        yield

    async def block() -> None:
        blocked.set()
        unblock.wait(60)

    def close_all() -> None:
        closed.append(threading.current_thread())

    monkeypatch.setattr(process.connections, "close_all", close_all)
    with EventLoopContext(scope="process", lifespan=lifespan, shutdown_timeout=0.2):
        create_background_task(block())
    assert blocked.wait(30)
    running = process._loop
    assert running is not None
    process.shut_down()
    try:
        assert "gave up its event loop" in caplog.text
        assert running.loop not in AsyncToSync.loop_thread_executors
        used[0].join(30)
        assert not used[0].is_alive()
        # As its last act, and once.
        assert closed == used
    finally:
        unblock.set()
    eventually(lambda: running.ended.done())
    assert closed == used


def test_a_log_handler_may_make_a_loop_call_when_a_loop_is_given_up() -> None:
    handled: list[str] = []
    let_go = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "gave up" in record.getMessage():
                with EventLoopContext(scope="process"):
                    call_here()
                handled.append(record.getMessage())

    async def block() -> None:
        let_go.wait(60)

    handler = Handler()
    logging.getLogger("wsgi_loop").addHandler(handler)
    try:
        with EventLoopContext(shutdown_timeout=0.2):
            create_background_task(block())
        in_thread(process.shut_down)
    finally:
        logging.getLogger("wsgi_loop").removeHandler(handler)
        let_go.set()
    assert len(handled) == 1


@pytest.mark.parametrize("factory", [None, "uvloop.new_event_loop"])
@pytest.mark.parametrize("last", ["asyncio.sleep(0)", "asyncio.get_running_loop().getaddrinfo('localhost', 80)"])
def test_the_end_of_a_process_waits_for_background_tasks_and_closes_what_is_open(
    last: str, factory: str | None
) -> None:
    if STARTS_NONE_AT_EXIT and "getaddrinfo" in last:
        pytest.skip("Python 3.12.0 and 3.12.1 start no thread at the end of a process: use a later 3.12")
    done = run_script(
        f"""
        from contextlib import asynccontextmanager
        from asgiref.sync import sync_to_async
        from django.db import connection

        @asynccontextmanager
        async def resource():
            yield 1
            await {last}
            print("closed", flush=True)

        per_loop = wsgi_loop.PerLoop(resource)

        def query():
            with connection.cursor() as cursor:
                cursor.execute("SELECT 42")
                return cursor.fetchone()[0]

        async def work():
            await per_loop()
            await asyncio.sleep(0.5)
            print(await sync_to_async(query)(), type(asyncio.get_running_loop()).__module__.split(".")[0], flush=True)

        with wsgi_loop.EventLoopContext(scope="process", loop_factory={factory!r}):
            wsgi_loop.create_background_task(work())
        """,
        "-X",
        "dev",
        "-W",
        "error",
    )
    module = "uvloop" if factory else "wsgi_loop"
    assert (done.returncode, done.stdout.split("\n")) == (0, [f"42 {module}", "closed", ""]), done.stderr
    assert done.stderr == ""


def test_a_blocked_loop_does_not_keep_a_process_from_ending() -> None:
    done = run_script(
        """
        from asgiref.sync import async_to_sync

        async def block():
            time.sleep(3600)

        def wait():
            with wsgi_loop.EventLoopContext(scope="process"):
                try:
                    async_to_sync(asyncio.sleep)(0)
                except RuntimeError as exc:
                    print(exc, flush=True)

        with wsgi_loop.EventLoopContext(scope="process", shutdown_timeout=0.5):
            wsgi_loop.create_background_task(block())
        # Not a daemon: the process waits for it.
        threading.Thread(target=wait).start()
        time.sleep(0.5)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "gave up its event loop" in done.stderr
    assert "background task block of EventLoopContext on thread 'MainThread'" in done.stderr


def test_a_blocked_thread_does_not_keep_a_process_from_ending() -> None:
    done = run_script(
        """
        from asgiref.sync import sync_to_async

        with wsgi_loop.EventLoopContext(shutdown_timeout=0.5):
            wsgi_loop.create_background_task(sync_to_async(time.sleep)(3600), name="query")
        time.sleep(0.5)
        """
    )
    assert done.returncode == 0, done.stderr
    assert "gave up its event loop" in done.stderr
    assert "background task query" in done.stderr


def test_a_lifespan_that_blocks_does_not_keep_a_process_from_ending() -> None:
    done = run_script(
        """
        from contextlib import asynccontextmanager
        from asgiref.sync import async_to_sync

        entered = threading.Event()

        @asynccontextmanager
        async def lifespan():
            entered.set()
            time.sleep(3600)
            yield

        def wait():
            with wsgi_loop.EventLoopContext(scope="process", lifespan=lifespan, shutdown_timeout=0.5):
                try:
                    async_to_sync(asyncio.sleep)(0)
                except RuntimeError as exc:
                    print(exc, flush=True)

        threading.Thread(target=wait).start()
        entered.wait(30)
        """
    )
    assert (done.returncode, done.stdout) == (0, "The process loop was given up before it was ready\n"), done.stderr


def test_the_loop_thread_of_an_ended_process_loop_ends_with_it() -> None:
    def call() -> int:
        with EventLoopContext(scope="process"):
            return call_here().thread

    before = call()
    assert [thread.ident for thread in loop_threads()] == [before]
    process.shut_down()
    eventually(lambda: not loop_threads())


def test_a_closed_process_loop_is_not_what_a_new_thread_finds() -> None:
    def call() -> Place:
        with EventLoopContext(scope="process"):
            return async_to_sync(here)()

    first = in_thread(call)
    process.shut_down()
    assert first.loop.is_closed()
    second = in_thread(call)
    assert second.loop is not first.loop
    assert not second.loop.is_closed()


def test_a_script_that_ends_at_once_is_not_held_up() -> None:
    started = time.monotonic()
    done = run_script(
        """
        with wsgi_loop.EventLoopContext(scope="process", shutdown_timeout=30):
            wsgi_loop.create_background_task(asyncio.sleep(0)).result()
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.monotonic() - started < 30


def test_the_end_waits_for_what_a_request_has_left_for_a_while_after_the_request(
    new_process_loop: None, caplog: pytest.LogCaptureFixture
) -> None:
    readers, ended = [], []

    async def work() -> None:
        await asyncio.sleep(0.3)
        ended.append("of a request")

    async def view(request: Any) -> HttpResponse:
        if request.path == "/client/":
            # As a client in a module, which reads for as long as it lives.
            readers.append(asyncio.create_task(asyncio.Event().wait(), name="reader"))
        else:
            readers.append(asyncio.create_task(work()))
        return HttpResponse()

    with serve(view, scope="process", shutdown_timeout=100) as server:
        server.get("/client/")
        server.get("/")
        future = create_background_task(asyncio.sleep(0.2, "of the background"))
    executor = current_executor(context_of(readers[0]) or contextvars.Context())
    assert executor is not None
    assert executor.over
    executor.over_since -= 100
    started = time.monotonic()
    process.shut_down()
    assert time.monotonic() - started < 100
    assert [*ended, future.result(0)] == ["of a request", "of the background"]
    [record] = caplog.records
    assert "1 of its tasks still ran" in record.getMessage()
    assert "reader running" in record.getMessage()


# --- threads for sync code ---------------------------------------------------------------------------------------


def test_forty_blocking_calls_run_at_once_and_a_look_up_does_not_wait_for_them() -> None:
    all_in = threading.Barrier(41)

    async def view(request: Any) -> HttpResponse:
        calls = [asyncio.create_task(asyncio.to_thread(all_in.wait, 60)) for _ in range(40)]
        await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        all_in.wait(60)
        await asyncio.gather(*calls)
        return HttpResponse("looked up")

    with serve(view, scope="process") as server:
        assert server.get() == b"looked up"


def test_a_look_up_waits_for_no_thread_of_the_users() -> None:
    let_go = threading.Event()

    async def view(request: Any) -> HttpResponse:
        most = process._loop.threads.MOST  # type: ignore[union-attr]
        calls = [asyncio.create_task(asyncio.to_thread(let_go.wait, 60)) for _ in range(most + 10)]
        await asyncio.sleep(0)
        await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        busy = sum(thread.name == "wsgi-sync" for thread in threading.enumerate())
        let_go.set()
        await asyncio.gather(*calls)
        return HttpResponse(str(busy <= most))

    with serve(view, scope="process") as server:
        assert server.get() == b"True"


def test_threads_that_wait_for_async_code_leave_room_for_what_that_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SyncThreads, "MOST", 3)
    all_in = threading.Barrier(3)

    async def deeper() -> str:
        await asyncio.get_running_loop().getaddrinfo("localhost", 80)
        return await asyncio.to_thread(lambda: "deeper")

    def sync() -> str:
        with contextlib.suppress(threading.BrokenBarrierError):
            all_in.wait(5)  # all threads are taken
        return async_to_sync(deeper)()

    async def view(request: Any) -> HttpResponse:
        calls = [sync_to_async(sync, thread_sensitive=False)() for _ in range(9)]
        return HttpResponse(", ".join(set(await asyncio.gather(*calls))))

    with serve(view, scope="process") as server:
        assert server.get() == b"deeper"


def test_a_default_executor_of_ones_own_is_used() -> None:
    with ThreadPoolExecutor(1, "own") as executor:

        @contextlib.asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            asyncio.get_running_loop().set_default_executor(executor)
            yield

        async def view(request: Any) -> HttpResponse:
            return HttpResponse(await asyncio.to_thread(lambda: threading.current_thread().name))

        with serve(view, scope="process", lifespan=lifespan) as server:
            assert server.get().startswith(b"own")
        process.shut_down()


def test_the_end_of_the_loop_waits_for_threads_and_ends_them() -> None:
    seen: list[Any] = []

    async def work() -> None:
        await asyncio.sleep(0)
        asyncio.get_running_loop().run_in_executor(None, lambda: (time.sleep(0.3), seen.append("done")))

    with EventLoopContext(scope="process"):
        async_to_sync(work)()
    process.shut_down()
    assert seen == ["done"]
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("wsgi-")])


@pytest.mark.parametrize("scope", ["request", "process"])
def test_threads_that_can_not_be_started_leave_no_entry_behind(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def view(request: Any) -> HttpResponse:
        task = asyncio.create_task(asyncio.sleep(0))
        await sync_to_async(time.sleep)(0)
        await task
        return HttpResponse("fine")

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = len(AsyncToSync.loop_thread_executors)
    with serve(view, scope=scope) as server:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", fail)
            for _ in range(3):
                server.get()
                assert server.status == "500 Internal Server Error"
                # Fewer, where a loop that another test had left was collected meanwhile.
                assert len(AsyncToSync.loop_thread_executors) <= before
        assert server.get() == b"fine"


def test_a_call_for_a_thread_that_can_not_be_started_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = SyncThreads("wsgi-sync")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda thread: (_ for _ in ()).throw(RuntimeError("no thread")))
        with pytest.raises(RuntimeError, match="no thread"):
            threads.submit(int)
    assert threads.submit(int).result(30) == 0
    threads.shutdown()
    threads.ended.result(30)
    with pytest.raises(RuntimeError, match="has ended"):
        threads.submit(int)


def test_a_loop_that_breaks_fails_its_callers_and_the_next_request_starts_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    raised: list[BaseException] = []
    loops: list[Any] = []

    async def wait() -> None:
        await asyncio.sleep(60)

    def waiting(request: Any) -> HttpResponse:
        try:
            async_to_sync(wait)()
        except BaseException as exc:
            raised.append(exc)
        return HttpResponse()

    async def breaking(request: Any) -> HttpResponse:
        loop: Any = asyncio.get_running_loop()
        loops.append(loop)
        loop._selector._selector.close()
        await asyncio.sleep(60)
        return HttpResponse()

    async def view(request: Any) -> HttpResponse:
        loops.append(asyncio.get_running_loop())
        return HttpResponse("fine")

    views = {"waiting": waiting, "breaking": breaking, "": view}
    with serve(views, scope="process") as server, ThreadPoolExecutor(4) as threads:
        assert server.get() == b"fine"
        sent = [threads.submit(server.get, "/waiting") for _ in range(3)]
        eventually(lambda: process._loop and len(process._loop._calls) == 3)
        server.get("/breaking")
        assert server.status == "500 Internal Server Error"
        for future in sent:
            future.result(60)
        assert [type(exc) for exc in raised] == [RuntimeError] * 3
        assert all("its event loop broke" in str(exc) for exc in raised)
        assert server.get() == b"fine"
        assert server.get() == b"fine"
    assert "The process loop: its event loop broke" in caplog.text
    assert loops[0] is loops[1] is not loops[2]
    assert loops[2] is loops[3] is process._loop.loop  # type: ignore[union-attr]
    # What asyncio could not close.
    loops[0]._ssock.close()
    loops[0]._csock.close()
    loops[0]._closed = True


def test_a_view_that_cancels_all_tasks_closes_no_resource_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    entered: list[int] = []

    @contextlib.asynccontextmanager
    async def resource() -> AsyncIterator[int]:
        entered.append(len(entered))
        yield entered[-1]

    client = PerLoop(resource)

    async def cancelling(request: Any) -> HttpResponse:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        return HttpResponse()

    async def view(request: Any) -> HttpResponse:
        return HttpResponse(str(await client()))

    with serve({"cancel": cancelling, "": view}, scope="process") as server:
        assert server.get() == b"0"
        server.get("/cancel")
        assert server.get() == b"1"
        assert server.get() == b"1"
    assert "was closed, because its task was cancelled" in caplog.text
    caplog.clear()
    process.shut_down()
    assert not caplog.records
