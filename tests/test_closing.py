"""Promises 4 and 5: the loop is closed last and once, and leaves nothing running and nobody waiting."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import logging
import threading
import time
from typing import Any
from wsgiref.util import FileWrapper

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.core.signals import request_finished
from django.http import FileResponse, HttpResponse, StreamingHttpResponse

from wsgi_loop import process

from .conftest import Connect
from .support import Place, call_here, environ, eventually, here, in_thread, loop_threads, serve

Loops = list[asyncio.AbstractEventLoop]


def opens_a_loop(loops: Loops) -> Place:
    place = call_here()
    loops.append(place.loop)
    return place


def test_the_loop_is_open_in_every_receiver_of_request_finished_and_closed_after_them(
    receive: Connect, loops: Loops
) -> None:
    places: list[Any] = []

    async def last(**kwargs: Any) -> None:
        places.append(await here())

    receive(finished=last)
    receive(finished=lambda **kwargs: places.append(call_here()))
    with serve(lambda request: HttpResponse(str(opens_a_loop(loops)))) as server:
        server.get()
    assert {place.loop for place in places} == set(loops)


def test_the_loop_is_closed_when_the_view_raises(settings: Any, loops: Loops) -> None:
    settings.DEBUG_PROPAGATE_EXCEPTIONS = True

    def view(request: Any) -> Any:
        opens_a_loop(loops)
        raise ValueError("view")

    with serve(view) as server, pytest.raises(ValueError, match="view"):
        server.get()


def test_the_loop_is_closed_when_start_response_raises(loops: Loops) -> None:
    def start_response(*args: Any) -> Any:
        raise OSError("start_response")

    with serve(lambda request: HttpResponse(str(opens_a_loop(loops)))) as server:
        server.start_response = start_response  # type: ignore[method-assign]
        with pytest.raises(OSError, match="start_response"):
            server.get()


def test_the_loop_is_closed_when_the_request_can_not_be_made(receive: Connect, loops: Loops) -> None:
    receive(started=lambda **kwargs: opens_a_loop(loops))
    with serve(lambda request: HttpResponse()) as server, pytest.raises(UnicodeDecodeError):
        server.get(**{"PATH_INFO": "/\xff", "SCRIPT_NAME": "\xff"})


def test_the_loop_is_closed_when_the_body_raises(loops: Loops) -> None:
    def view(request: Any) -> Any:
        def body() -> Any:
            opens_a_loop(loops)
            yield b"x"
            raise ValueError("body")

        return StreamingHttpResponse(body())

    with serve(view) as server, pytest.raises(ValueError, match="body"):
        server.get()


def test_the_loop_is_closed_when_a_receiver_raises(receive: Connect, loops: Loops) -> None:
    def fail(**kwargs: Any) -> None:
        opens_a_loop(loops)
        raise ValueError("receiver")

    with serve(lambda request: HttpResponse()) as server:
        response = server.open()
        receive(finished=fail)
        with pytest.raises(ValueError, match="receiver"):
            response.close()
    eventually(loops[0].is_closed)


def test_the_loop_is_closed_when_the_client_goes_away_in_the_body(loops: Loops) -> None:
    ended = []

    def view(request: Any) -> Any:
        def body() -> Any:
            try:
                while True:
                    opens_a_loop(loops)
                    yield b"x"
            finally:
                ended.append(opens_a_loop(loops))

        return StreamingHttpResponse(body())

    with serve(view) as server:
        response = server.open()
        iterator = iter(response)
        next(iterator)
        next(iterator)
        response.close()
    assert len(set(loops)) == 1
    assert ended


def test_a_second_close_is_djangos_alone(receive: Connect, loops: Loops) -> None:
    sent = []
    receive(finished=lambda **kwargs: sent.append(1))
    with serve(lambda request: HttpResponse(str(opens_a_loop(loops)))) as server:
        response = server.open()
        response.close()
        eventually(loops[0].is_closed)
        response.close()
    assert len(sent) == 2


def test_close_on_another_thread(receive: Connect, loops: Loops) -> None:
    places = []
    receive(finished=lambda **kwargs: places.append(call_here()))
    with serve(lambda request: HttpResponse(str(opens_a_loop(loops)))) as server:
        response = server.open()
        in_thread(response.close)
    assert [place.loop for place in places] == loops


def test_close_while_another_thread_is_inside_the_body(caplog: pytest.LogCaptureFixture, loops: Loops) -> None:
    inside = threading.Event()
    errors: list[BaseException] = []

    def view(request: Any) -> Any:
        async def wait() -> None:
            inside.set()
            await asyncio.sleep(60)

        def body() -> Any:
            opens_a_loop(loops)
            try:
                async_to_sync(wait)()
            except asyncio.CancelledError as exc:
                errors.append(exc)
            yield b"x"

        return StreamingHttpResponse(body())

    with serve(view) as server:
        response = server.open()
        reader = threading.Thread(target=lambda: next(iter(response)))
        reader.start()
        assert inside.wait(60)
        response.close()
        reader.join(60)
        assert not reader.is_alive()
    assert len(errors) == 1
    assert "<locals>.wait" in caplog.text


def test_a_body_whose_own_finally_closes_the_response(receive: Connect, loops: Loops) -> None:
    sent = []
    holder: list[Any] = []

    def view(request: Any) -> Any:
        def body() -> Any:
            try:
                opens_a_loop(loops)
                yield b"x"
            finally:
                holder[0].close()

        return StreamingHttpResponse(body())

    with serve(view) as server:
        response = server.open()
        holder.append(response)
        receive(finished=lambda **kwargs: sent.append(call_here().loop))
        assert b"".join(response) == b"x"
        eventually(loops[0].is_closed)
    assert sent == loops


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_base_exception_passes_through(exception: type[BaseException], loops: Loops) -> None:
    def view(request: Any) -> Any:
        opens_a_loop(loops)
        raise exception

    with serve(view) as server, pytest.raises(exception):
        server.get()


def test_a_base_exception_that_interrupts_a_waiting_loop_call(caplog: pytest.LogCaptureFixture, loops: Loops) -> None:
    """As a signal handler of a server does that ends a worker which takes too long."""
    import signal

    def interrupt(*args: Any) -> None:
        raise SystemExit(1)

    async def wait() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        await asyncio.sleep(60)

    def view(request: Any) -> Any:
        opens_a_loop(loops)
        async_to_sync(wait)()

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with serve(view) as server, pytest.raises(SystemExit):
            server.get()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert "<locals>.wait" in caplog.text


def test_a_response_that_is_dropped_without_close_gives_its_loop_back(loops: Loops) -> None:
    with serve(lambda request: HttpResponse(str(opens_a_loop(loops)))) as server:
        response = server.open("/dropped")
        with pytest.warns(ResourceWarning, match="GET '/dropped': its response was dropped without close"):
            del response
        eventually(loops[0].is_closed)
        server.get()


def test_a_response_without_a_loop_is_dropped_in_silence() -> None:
    with serve(lambda request: HttpResponse()) as server:
        response = server.open()
        del response
        gc.collect()


def test_a_file_response_is_closed_through_the_servers_file_wrapper(tmp_path: Any, loops: Loops) -> None:
    from wsgiref.util import FileWrapper

    file = tmp_path / "file"
    file.write_bytes(b"content")

    def view(request: Any) -> Any:
        opens_a_loop(loops)
        return FileResponse(file.open("rb"))

    with serve(view) as server:
        response = server.open(**{"wsgi.file_wrapper": FileWrapper})
        assert isinstance(response, FileWrapper)
        assert b"".join(response) == b"content"
        assert not loops[0].is_closed()
        response.close()
    eventually(loops[0].is_closed)


def test_the_body_can_not_open_another_loop_after_close(loops: Loops) -> None:
    def view(request: Any) -> Any:
        def body() -> Any:
            while True:
                yield str(opens_a_loop(loops)).encode()

        return StreamingHttpResponse(body())

    with serve(view) as server:
        response = server.open()
        iterator = iter(response)
        next(iterator)
        response.close()
        with pytest.raises(StopIteration):  # close() has closed the generator
            next(iterator)
    assert len(loops) == 1


# --- left-overs ----------------------------------------------------------------------------------------------------


async def left_over_view(request: Any, coroutine: Any) -> HttpResponse:
    request.environ["test.task"] = asyncio.create_task(coroutine, name="left-over")
    await asyncio.sleep(0)
    return HttpResponse()


def test_a_left_over_task_is_cancelled_awaited_and_named(caplog: pytest.LogCaptureFixture) -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.05)
            ended.append(1)

    with serve(lambda request: async_to_sync(left_over_view)(request, work())) as server:
        server.get("/left")
    assert ended == [1]
    (record,) = [record for record in caplog.records if record.name == "wsgi_loop"]
    assert record.levelno == logging.WARNING
    assert "GET '/left'" in record.getMessage()
    assert "left-over" in record.getMessage()
    assert "work" in record.getMessage()


@pytest.mark.django_db(transaction=True)
def test_an_orm_call_in_the_finally_of_a_left_over_task_runs_on_the_request_thread() -> None:
    threads = []

    def create() -> None:
        threads.append(threading.get_ident())
        User.objects.create(username="from finally")

    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await sync_to_async(create)()

    with serve(lambda request: async_to_sync(left_over_view)(request, work())) as server:
        server.get()
    assert threads == [threading.get_ident()]
    assert User.objects.filter(username="from finally").exists()


def test_a_loop_call_in_the_finally_of_a_left_over_task_reaches_its_own_loop() -> None:
    loops_seen = []

    async def work() -> None:
        loops_seen.append(asyncio.get_running_loop())
        try:
            await asyncio.sleep(3600)
        finally:
            loops_seen.append((await sync_to_async(call_here)()).loop)

    with serve(lambda request: async_to_sync(left_over_view)(request, work())) as server:
        server.get()
    assert len(set(loops_seen)) == 1


def test_a_left_over_task_that_fails_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise ValueError("in its finally")

    with serve(lambda request: async_to_sync(left_over_view)(request, work())) as server:
        server.get()
    assert "in its finally" in caplog.text


def test_a_task_that_swallows_cancellation_is_named_in_an_error_and_meets_no_later_request(
    caplog: pytest.LogCaptureFixture, loops: Loops
) -> None:
    steps: list[int] = []

    async def stubborn() -> None:
        loops.append(asyncio.get_running_loop())
        while True:
            try:
                steps.append(1)
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass

    views = {
        "stubborn": lambda request: async_to_sync(left_over_view)(request, stubborn()),
        "": lambda request: HttpResponse(str(opens_a_loop(loops))),
    }
    with serve(views, shutdown_timeout=0.1) as server:
        server.get("/stubborn")
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert "GET '/stubborn'" in errors[0]
        assert "stubborn" in errors[0]
        assert "0.1 s" in errors[0]
        eventually(loops[0].is_closed)
        taken = len(steps)
        server.get("/")
        assert loops[1] is not loops[0]
    assert len(steps) == taken


def test_a_left_over_task_that_blocks_its_loop_thread_does_not_hold_up_later_requests(
    caplog: pytest.LogCaptureFixture, loops: Loops
) -> None:
    release = threading.Event()

    async def blocking() -> None:
        await asyncio.sleep(0.01)
        loops.append(asyncio.get_running_loop())
        release.wait(30)

    async def view(request: Any) -> HttpResponse:
        tasks.append(asyncio.ensure_future(blocking()))
        return HttpResponse()

    tasks: list[Any] = []
    with serve(
        {"blocking": view, "": lambda request: HttpResponse(str(opens_a_loop(loops)))}, shutdown_timeout=0.2
    ) as s:
        response = s.open("/blocking")
        eventually(lambda: loops)
        response.close()
        assert "gave up" in caplog.text
        assert "blocking" in caplog.text
        for _ in range(3):
            s.get("/")
        assert not loops[0].is_closed()
        assert len({*loops}) == 4
        release.set()
        eventually(loops[0].is_closed)


def test_left_over_async_generators_are_closed() -> None:
    closed = []
    kept = []

    async def generator() -> Any:
        try:
            yield 1
            yield 2
        finally:
            await sync_to_async(lambda: closed.append(threading.get_ident()))()

    async def view(request: Any) -> HttpResponse:
        kept.append(generator())
        await anext(kept[0])
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert closed == [threading.get_ident()]


def test_a_clean_loop_is_not_waited_for(loops: Loops) -> None:
    """The loop thread is kept busy while close() returns: nothing of it can have waited."""
    release = threading.Event()
    blocked = threading.Event()

    def block() -> None:
        blocked.set()
        release.wait(30)

    async def end_soon() -> None:
        await asyncio.sleep(0.01)
        asyncio.get_running_loop().call_soon(block)

    async def view(request: Any) -> HttpResponse:
        loops.append(asyncio.get_running_loop())
        request.META["test.task"] = asyncio.ensure_future(end_soon())
        return HttpResponse()

    with serve(view, shutdown_timeout=30) as server:
        response = server.open()
        assert blocked.wait(60)
        response.close()
        assert not loops[0].is_closed()
        release.set()


def test_a_slow_thread_of_the_default_executor_does_not_hold_up_the_next_request(loops: Loops) -> None:
    release = threading.Event()

    async def view(request: Any) -> HttpResponse:
        loops.append(asyncio.get_running_loop())
        if request.path == "/slow":
            asyncio.get_running_loop().run_in_executor(None, release.wait, 30)
        return HttpResponse()

    with serve(view) as server:
        server.get("/slow")
        server.get("/")
        assert not loops[0].is_closed()
        release.set()


def test_a_left_over_loop_call_of_another_thread_gets_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Any] = []
    running = threading.Event()

    async def wait() -> None:
        running.set()
        await asyncio.sleep(3600)

    def elsewhere() -> None:
        try:
            answers.append(async_to_sync(wait)())
        except asyncio.CancelledError as exc:
            answers.append(exc)

    async def view(request: Any) -> HttpResponse:
        # Not awaited: an executor thread makes a loop call that nobody waits for.
        request.environ["test.task"] = asyncio.ensure_future(sync_to_async(elsewhere, thread_sensitive=False)())
        while not running.is_set():
            await asyncio.sleep(0.01)
        return HttpResponse()

    with serve(view) as server:
        server.get()
    eventually(lambda: answers)
    assert isinstance(answers[0], asyncio.CancelledError)


def test_loop_calls_that_race_with_closing_are_all_answered() -> None:
    """A thread of the user's own pool goes on calling while the request's loop is closed."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(4)
    counts = {"answered": 0, "other loop": 0}

    def hammer(loop: Any) -> None:
        for _ in range(30):
            try:
                place = call_here()
            except asyncio.CancelledError:
                continue
            counts["answered" if place.loop is loop else "other loop"] += 1

    async def view(request: Any) -> HttpResponse:
        loop = asyncio.get_running_loop()
        for _ in range(4):
            asyncio.ensure_future(sync_to_async(hammer, thread_sensitive=False, executor=pool)(loop))  # noqa: RUF006
        await asyncio.sleep(0.005)
        return HttpResponse()

    with serve(view) as server:
        for _ in range(10):
            server.get()
    pool.shutdown(wait=True)
    assert counts["answered"]


def test_a_loop_thread_ends_with_its_request(new_process_loop: None) -> None:
    barrier = threading.Barrier(12)

    async def view(request: Any) -> HttpResponse:
        await asyncio.gather(sync_to_async(barrier.wait)(30), asyncio.sleep(0))
        return HttpResponse()

    with serve(view, scope="request") as server:
        threads = [threading.Thread(target=server.get) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    eventually(lambda: not loop_threads())


def test_request_finished_is_sent_once_by_a_close_that_has_left_overs(receive: Connect) -> None:
    sent = []

    def finished(**kwargs: Any) -> None:
        sent.append(1)

    async def work() -> None:
        await asyncio.sleep(3600)

    request_finished.connect(finished)
    with serve(lambda request: async_to_sync(left_over_view)(request, work())) as server:
        server.get()
    request_finished.disconnect(finished)
    assert sent == [1]


def test_close_is_bounded_when_a_task_never_stops_making_thread_sensitive_calls(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def stubborn() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await sync_to_async(time.sleep)(0.001)

    with serve(lambda request: async_to_sync(left_over_view)(request, stubborn()), shutdown_timeout=0.1) as server:
        server.get()
    assert "gave up" in caplog.text


def test_environ_of_the_request_is_not_changed() -> None:
    given = environ()
    with serve(lambda request: HttpResponse(str(call_here()))) as server:
        response = server.handler(given, server.start_response)
        response.close()
    assert {key for key in given if "wsgi_loop" in key} == set()


@pytest.mark.parametrize("scope", ["request", "process"])
@pytest.mark.parametrize("is_promoted", [False, True])
def test_a_library_may_run_the_loop_once_more_when_it_is_closed(
    is_promoted: bool, scope: str, new_process_loop: None, caplog: pytest.LogCaptureFixture
) -> None:
    """As channels_redis does, to close its connections."""
    ended: list[str] = []

    async def end() -> None:
        await asyncio.wait_for(asyncio.sleep(0.01), 60)
        await asyncio.gather(asyncio.sleep(0), asyncio.sleep(0))
        ended.append("ended")

    async def call() -> None:
        loop: Any = asyncio.get_running_loop()
        close = loop.close

        def run_and_close() -> None:
            # Once: a loop may be closed twice.
            loop.close = close
            loop.run_until_complete(end())
            close()

        loop.close = run_and_close
        if is_promoted:
            await asyncio.gather(sync_to_async(int)(), asyncio.sleep(0))

    def view(request: Any) -> HttpResponse:
        async_to_sync(call)()
        return HttpResponse()

    with serve(view, scope=scope) as server:
        server.get()
    process.shut_down()
    eventually(lambda: ended == ["ended"])
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:.*dropped without close:ResourceWarning")
def test_a_dropped_response_ends_its_loop_thread(new_process_loop: None) -> None:
    async def view(request: Any) -> FileResponse:
        await asyncio.gather(sync_to_async(int)(), asyncio.sleep(0))
        return FileResponse(io.BytesIO(b"x"))

    with serve(view, scope="request") as server:
        for _ in range(10):
            # Django's response and the file that closes it hold each other, so the collector closes it.
            server.open(**{"wsgi.file_wrapper": FileWrapper})
            assert len(loop_threads()) == 1
            # Once more while the loop's thread, which has just answered the call, still has the response in its hands.
            eventually(lambda: gc.collect() >= 0 and not loop_threads())
