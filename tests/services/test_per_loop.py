"""`PerLoop`: one async resource for each loop, with real redis and HTTP clients, and on loops of all kinds."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import anyio
import httpx
import pytest
import redis
import redis.asyncio
from asgiref.sync import async_to_sync
from django.conf import settings
from django.http import HttpRequest, HttpResponse

from wsgi_loop import PerLoop, process
from wsgi_loop.resources import _keepers

from ..support import eventually, serve
from .support import count_redis_connections

REQUESTS = 1000
THREADS = 8


@pytest.fixture(autouse=True)
def _no_process_loop_is_left() -> Iterator[None]:
    yield
    process.shut_down()


class HTTPServer(ThreadingHTTPServer):
    """Answers each request, keeps connections alive, and counts them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HTTPAnswer)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.opened = 0
        self.open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.opened += 1
        self.open.add(client_address)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.open.remove(client_address)


class HTTPAnswer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    #: In one piece: the second one would wait for the first one's acknowledgement.
    wbufsize = -1

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def http_server() -> Iterator[HTTPServer]:
    with HTTPServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.long
@pytest.mark.parametrize("scope", ["request", "process"])
def test_a_thousand_requests_with_clients_of_their_loop(
    redis_server: redis.Redis, http_server: HTTPServer, scope: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"wsgi-loop-tests-{uuid.uuid4().hex}"
    # Of their own accord, on a busy machine, clients give up after 5 s, and HTTP connections that idle as long are
    # opened anew.
    redis_client = PerLoop(
        lambda: redis.asyncio.Redis.from_url(
            settings.REDIS_URL,
            client_name=name,
            max_connections=THREADS,
            socket_timeout=60,
            socket_connect_timeout=60,
        )
    )
    limits = httpx.Limits(max_connections=THREADS, keepalive_expiry=None)
    # Of what a client does when it is made, reading certificates takes the longest by far.
    http_client = PerLoop(lambda: httpx.AsyncClient(trust_env=False, verify=False, limits=limits, timeout=60))
    loops: set[asyncio.AbstractEventLoop] = set()

    async def use(number: int) -> str:
        loops.add(asyncio.get_running_loop())
        cache, http = await redis_client(), await http_client()
        assert (await redis_client(), await http_client()) == (cache, http)
        pong, response = await asyncio.gather(cache.echo(str(number)), http.get(http_server.url))
        assert response.text == "ok"
        return str(pong.decode())

    def view(request: HttpRequest) -> HttpResponse:
        number = int(request.path[1:])
        # From one loop call to the next.
        assert [async_to_sync(use)(number), async_to_sync(use)(number)] == [str(number)] * 2
        return HttpResponse(str(number))

    with serve(view, scope=scope) as server, ThreadPoolExecutor(THREADS) as pool:
        requests = [pool.submit(server.get, f"/{number}") for number in range(REQUESTS)]
        assert [int(request.result(120)) for request in requests] == list(range(REQUESTS))
    if scope == "request":
        assert len(loops) == REQUESTS
        assert http_server.opened == REQUESTS
    else:
        assert len(loops) == 1
        assert http_server.opened <= THREADS
        assert 1 <= count_redis_connections(redis_server, name) <= THREADS
        process.shut_down()
    eventually(lambda: all(loop.is_closed() for loop in loops), 30)
    # The clients have closed them. To notice it, the servers may take a moment.
    eventually(lambda: count_redis_connections(redis_server, name) == 0, 30)
    eventually(lambda: not http_server.open, 30)
    assert not caplog.records, caplog.text


# --- on loops of all kinds --------------------------------------------------------------------------------------------


def run_in_request(work: Callable[[], Any]) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        await work()
        return HttpResponse()

    with serve(view) as server:
        server.get()
        assert server.status.startswith("200")


def run_in_process_loop(work: Callable[[], Any]) -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        await work()
        return HttpResponse()

    with serve(view, scope="process") as server:
        server.get()
        assert server.status.startswith("200")
    process.shut_down()


def run_by_asyncio(work: Callable[[], Any]) -> None:
    asyncio.run(work())


LOOPS = pytest.mark.parametrize("run", [run_in_request, run_in_process_loop, run_by_asyncio])


def recording(events: list[str], name: str) -> PerLoop[str]:
    @contextlib.asynccontextmanager
    async def resource() -> AsyncIterator[str]:
        task = asyncio.current_task()
        events.append(f"enter {name}")
        # What it needs to close may take several steps, and other resources.
        await asyncio.sleep(0)
        try:
            yield name
        finally:
            await asyncio.sleep(0.01)
            assert asyncio.current_task() is task
            events.append(f"leave {name}")

    return PerLoop(resource)


@LOOPS
def test_they_are_left_at_the_end_in_reverse_order(run: Any) -> None:
    events: list[str] = []
    resources = [recording(events, str(number)) for number in range(4)]

    async def work() -> None:
        for number in (2, 0, 3, 1, 2, 0):
            assert await resources[number]() == str(number)
        events.append("worked")

    run(work)
    eventually(lambda: len(events) == 9, 30)
    assert events[:5] == ["enter 2", "enter 0", "enter 3", "enter 1", "worked"]
    assert events[5:] == ["leave 1", "leave 3", "leave 0", "leave 2"]


@LOOPS
def test_one_that_uses_another_is_left_before_it(run: Any) -> None:
    events: list[str] = []
    inner = recording(events, "inner")

    @contextlib.asynccontextmanager
    async def outer_resource() -> AsyncIterator[None]:
        assert await inner() == "inner"
        events.append("enter outer")
        try:
            yield
        finally:
            events.append("leave outer")

    outer = PerLoop(outer_resource)

    async def work() -> None:
        await outer()

    run(work)
    eventually(lambda: len(events) == 4, 30)
    # The outer one came first and was entered last.
    assert events == ["enter inner", "enter outer", "leave outer", "leave inner"]


@LOOPS
def test_concurrent_first_uses_enter_it_once(run: Any) -> None:
    events: list[str] = []
    resource = recording(events, "one")

    async def work() -> None:
        assert await asyncio.gather(*(resource() for _ in range(50))) == ["one"] * 50

    run(work)
    eventually(lambda: "leave one" in events, 30)
    assert events == ["enter one", "leave one"]


def test_concurrent_first_uses_of_many_requests_enter_it_once() -> None:
    events: list[str] = []
    resource = recording(events, "one")
    together = threading.Barrier(THREADS)

    def view(request: HttpRequest) -> HttpResponse:
        together.wait(30)
        return HttpResponse(async_to_sync(resource)())

    with serve(view, scope="process") as server, ThreadPoolExecutor(THREADS) as pool:
        requests = [pool.submit(server.get) for _ in range(THREADS)]
        assert [request.result(60) for request in requests] == [b"one"] * THREADS
    assert events == ["enter one"]


@LOOPS
@pytest.mark.parametrize("where", ["factory", "enter"])
def test_one_that_fails_is_tried_again_at_the_next_use(run: Any, where: str) -> None:
    tries: list[int] = []

    @contextlib.asynccontextmanager
    async def failing() -> AsyncIterator[str]:
        await asyncio.sleep(0)
        tries.append(1)
        if len(tries) < 3:
            raise LookupError(len(tries))
        yield "open"

    def factory() -> Any:
        if where == "factory" and len(tries) < 2:
            tries.append(1)
            raise LookupError(len(tries))
        return failing()

    resource = PerLoop(factory)

    async def work() -> None:
        for number in (1, 2):
            # All who wait for it are told, and it has been tried once for all of them.
            results = await asyncio.gather(*(resource() for _ in range(3)), return_exceptions=True)
            assert [repr(result) for result in results] == [f"LookupError({number})"] * 3
        assert await resource() == "open"

    run(work)
    assert len(tries) == 3


def test_after_its_loop_has_closed_it_a_use_is_an_error_that_says_so() -> None:
    resource = recording([], "late")
    errors: list[BaseException] = []

    @contextlib.asynccontextmanager
    async def uses_it_at_its_end() -> AsyncIterator[None]:
        yield
        try:
            await resource()
        except RuntimeError as exc:
            errors.append(exc)

    early = PerLoop(uses_it_at_its_end)
    for run in (run_in_request, run_in_process_loop):
        run(early)
        eventually(lambda: errors, 30)
        message = r"PerLoop\(recording.<locals>.resource\) was used when its event loop had closed it"
        with pytest.raises(RuntimeError, match=message):
            raise errors.pop()


@LOOPS
def test_it_may_hold_a_task_group_of_asyncio(run: Any) -> None:
    events: list[str] = []

    @contextlib.asynccontextmanager
    async def server() -> AsyncIterator[asyncio.Queue[Any]]:
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def answer() -> None:
            try:
                while True:
                    (await queue.get()).set_result("answer")
            finally:
                events.append("answer() ended")

        async with asyncio.TaskGroup() as group:
            task = group.create_task(answer())
            try:
                yield queue
            finally:
                task.cancel()
        events.append("left")

    resource = PerLoop(server)

    async def work() -> None:
        for _ in range(3):
            question = asyncio.get_running_loop().create_future()
            (await resource()).put_nowait(question)
            assert await question == "answer"

    run(work)
    # asyncio.run cancels all tasks there are.
    expected = ["answer() ended"] if run is run_by_asyncio else ["answer() ended", "left"]
    eventually(lambda: events == expected, 30)


@LOOPS
def test_it_may_hold_a_task_group_of_anyio(run: Any) -> None:
    events: list[str] = []

    @contextlib.asynccontextmanager
    async def server() -> AsyncIterator[Any]:
        send, receive = anyio.create_memory_object_stream[Any](10)

        async def answer() -> None:
            try:
                async with receive:
                    async for question in receive:
                        question.set_result("answer")
            finally:
                events.append("answer() ended")

        async with anyio.create_task_group() as group, send:
            group.start_soon(answer)
            yield send
        events.append("left")

    resource = PerLoop(server)

    async def work() -> None:
        for _ in range(3):
            question = asyncio.get_running_loop().create_future()
            await (await resource()).send(question)
            assert await question == "answer"

    run(work)
    # asyncio.run cancels all tasks there are.
    expected = ["answer() ended"] if run is run_by_asyncio else ["answer() ended", "left"]
    eventually(lambda: events == expected, 30)


@LOOPS
def test_a_user_that_is_cancelled_while_it_waits_leaves_the_others_waiting(run: Any) -> None:
    entered: list[int] = []

    async def work() -> None:
        go_on = asyncio.Event()

        @contextlib.asynccontextmanager
        async def slow() -> AsyncIterator[str]:
            entered.append(1)
            await go_on.wait()
            yield "open"

        resource = PerLoop(slow)
        users = [asyncio.ensure_future(resource()) for _ in range(3)]
        while not entered:
            await asyncio.sleep(0)
        users[0].cancel()
        await asyncio.wait({users[0]})
        assert users[0].cancelled()
        go_on.set()
        assert await asyncio.gather(*users[1:]) == ["open"] * 2
        assert await resource() == "open"

    run(work)
    assert entered == [1]


class HalfAContextManager:
    async def __aenter__(self) -> None: ...


async def a_coroutine_function() -> None: ...


@pytest.mark.parametrize("factory", [dict, a_coroutine_function, HalfAContextManager, lambda: None])
def test_a_factory_that_returns_no_async_context_manager(factory: Any) -> None:
    async def work() -> None:
        for _ in range(2):
            with pytest.raises(
                TypeError, match=r"The factory of PerLoop\(.*\) returned .* not an async context manager"
            ):
                await PerLoop(factory)()

    asyncio.run(work())


@pytest.mark.parametrize("factory", [None, "httpx.AsyncClient", 3])
def test_a_factory_that_can_not_be_called(factory: Any) -> None:
    message = f"takes a callable that returns an async context manager, such as httpx.AsyncClient, not {factory!r}"
    with pytest.raises(TypeError, match=message):
        PerLoop(factory)


def test_a_client_that_was_made_already_is_no_factory() -> None:
    client = httpx.AsyncClient(trust_env=False)
    with pytest.raises(TypeError, match="takes a callable"):
        PerLoop(client)  # type: ignore[arg-type]
    asyncio.run(client.aclose())


# --- what they hold ---------------------------------------------------------------------------------------------------


class Value:
    """Something that a request holds, and that can be seen to be gone."""


def test_no_resource_holds_the_context_of_the_request_that_opened_it() -> None:
    variable: contextvars.ContextVar[Value] = contextvars.ContextVar("variable")
    seen: list[Any] = []
    values: list[weakref.ref[Value]] = []

    @contextlib.asynccontextmanager
    async def resource() -> AsyncIterator[str]:
        seen.append(variable.get(None))
        async with asyncio.TaskGroup() as group:
            task = group.create_task(asyncio.sleep(3600))
            yield "open"
            task.cancel()

    per_worker = PerLoop(resource)

    async def view(request: HttpRequest) -> HttpResponse:
        value = Value()
        values.append(weakref.ref(value))
        variable.set(value)
        return HttpResponse(await per_worker())

    with serve(view, scope="process") as server:
        for _ in range(10):
            assert server.get() == b"open"
    assert seen == [None]
    # The task of a request ends a moment after it.
    eventually(lambda: gc.collect() is not None and not any(value() for value in values), 30)
    assert len(values) == 10


def test_a_loop_that_is_closed_is_held_by_nothing_of_ours() -> None:
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []
    resource = recording([], "one")

    async def work() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        await resource()

    for run in (run_in_request, run_in_process_loop, run_by_asyncio):
        run(work)
    eventually(lambda: gc.collect() is not None and not any(loop() for loop in loops) and not _keepers, 30)


def test_a_use_after_asyncio_run_has_ended_it_is_an_error_too() -> None:
    events: list[str] = []
    resource = recording(events, "one")
    outcome: list[str] = []

    async def left_over() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            while "leave one" not in events:
                await asyncio.sleep(0.01)
            # The keeper has left, and now it ends.
            await asyncio.sleep(0.01)
            try:
                await resource()
            except RuntimeError as exc:
                outcome.append(str(exc))

    async def main() -> Any:
        await resource()
        task = asyncio.create_task(left_over())
        await asyncio.sleep(0.01)
        return task

    asyncio.run(main())
    assert events == ["enter one", "leave one"]
    assert "was used when its event loop had closed it" in outcome[0]
