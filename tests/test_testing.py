"""wsgi_loop.testing and the pytest plugin. In a project of its own, from the wheel: test_project.py."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import django.test
import pytest
from asgiref.local import Local
from asgiref.sync import AsyncToSync, async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.core.cache import caches
from django.core.signals import request_finished
from django.db import close_old_connections, connection
from django.http import FileResponse, HttpResponse, HttpResponseRedirect, StreamingHttpResponse
from django.utils import translation
from django.utils.translation import gettext_lazy

from wsgi_loop import EventLoopContext, testing
from wsgi_loop.responses import call_after_close
from wsgi_loop.testing import Client, LiveServerTestCase, record_loop_calls

from .conftest import Connect
from .support import Place, call_here, call_here_nested, eventually, here, in_thread, run_django_tests, serve, stock

ROOT = Path(__file__).parents[1]
#: Given to the runs of pytest, unless the environment's wsgi-loop has it for an entry point.
PLUGIN = () if entry_points(group="pytest11", name="wsgi_loop") else ("-p", "wsgi_loop.tools.pytest_plugin")

variable: ContextVar[str] = ContextVar("variable")


@pytest.fixture(autouse=True)
def _asgiref_is_left_as_found() -> Iterator[None]:
    found = AsyncToSync.__dict__["__call__"], AsyncToSync.__dict__["main_wrap"]
    yield
    assert (AsyncToSync.__dict__["__call__"], AsyncToSync.__dict__["main_wrap"]) == found


async def nothing(**kwargs: Any) -> None:
    pass


def line_of(function: Any, text: str) -> str:
    """Where `text` stands in a function of this module, as a record's location says it."""
    first = function.__code__.co_firstlineno
    lines = Path(__file__).read_text().splitlines()
    number = next(number for number, line in enumerate(lines[first:], first + 1) if text in line)
    return f"tests/test_testing.py:{number} in {function.__qualname__}"


@contextlib.contextmanager
def live(base: Any) -> Iterator[str]:
    """The server of a live server test case."""

    class Case(base):  # type: ignore[misc]
        pass

    Case._start_server_thread()
    try:
        yield Case.live_server_url
    finally:
        Case.doClassCleanups()


# --- What is recorded ------------------------------------------------------------------------------------------------


def sync_view(request: Any) -> HttpResponse:
    call_here()
    async_to_sync(call_here_nested)()  # nested
    return HttpResponse()


def test_what_a_record_says(receive: Connect) -> None:
    receive(started=nothing, finished=nothing)
    with serve(sync_view) as server, record_loop_calls() as calls:
        server.get("/caf\xc3\xa9", SCRIPT_NAME="/shop")
    started, first, second, nested, finished = calls
    send = "Signal.send.<locals>.asend"
    assert [call.name for call in calls] == [send, "here", "call_here_nested", "here", send]
    assert [call.depth for call in calls] == [0, 0, 0, 1, 0]
    assert {(call.loop_id, call.thread_id, call.request_id, call.path) for call in calls} == {(1, 1, 1, "/shop/café")}
    assert [call.task_id for call in calls] == [1, 1, 1, 2, 1]
    assert all(call.served and call.thread_name == threading.current_thread().name for call in calls)
    # The server that closes the response is nobody's place either.
    assert all(signal.location.startswith("django/dispatch/dispatcher.py:") for signal in (started, finished))
    assert first.location.startswith("tests/support.py:")
    assert first.location.endswith(" in call_here")
    assert second.location == line_of(sync_view, "# nested")
    # The nested call lies inside the other one, and those that are not lie after each other.
    durations = [call.duration or 0 for call in calls]
    assert all(durations)
    assert 0 < started.start < first.start + durations[1] < second.start < nested.start
    assert nested.start + durations[3] < second.start + durations[2]


def test_an_async_view_is_found_where_it_is_written() -> None:
    async def view(request: Any) -> HttpResponse:
        return HttpResponse()

    class View:
        async def __call__(self, request: Any) -> HttpResponse:
            return HttpResponse()

        @functools.partial
        async def wrapped(self: Any) -> None: ...

    with serve(view) as server, record_loop_calls() as calls:
        server.get()
        async_to_sync(View())(None)
        async_to_sync(functools.partial(View.wrapped, None))()
    assert [call.name.rpartition(".")[2] for call in calls] == ["view", "View", "wrapped"]
    (location, *_) = [call.location for call in calls]
    assert re.fullmatch(r"tests/test_testing\.py:\d+ in test_an_async_view_is.*<locals>\.view", location)


def test_a_body_is_named_after_its_generator() -> None:
    async def pages() -> Any:
        yield b"a"
        yield b"b"

    with serve(lambda request: StreamingHttpResponse(pages())) as server, record_loop_calls() as calls:
        assert server.get("/book") == b"ab"
    assert {call.name.rpartition(".")[2] for call in calls} == {"pages"}
    assert len(calls) == 3
    assert {(call.path, call.request_id) for call in calls} == {("/book", 1)}
    calls.assert_one_loop()


def test_with_djangos_handler_each_call_has_a_loop_thread_and_task_of_its_own() -> None:
    """Numbers, not ids: those of things that are gone are used again."""
    with record_loop_calls() as calls:
        for _ in range(50):
            call_here()
            gc.collect(0)
    assert calls.loops == calls.threads == 50
    assert {call.task_id for call in calls} == set(range(1, 51))
    assert not any(call.served for call in calls)
    assert {call.path for call in calls} == {None}


def test_loops_and_tasks_are_not_kept_alive() -> None:
    with record_loop_calls() as calls:
        place = call_here()
        loop, task = weakref.ref(place.loop), weakref.ref(place.task)
        del place
        gc.collect()
        assert (loop(), task()) == (None, None)
    assert calls[0].loop_id == 1


def test_calls_of_djangos_handler_are_put_down_to_their_request(receive: Connect) -> None:
    receive(started=nothing, finished=nothing)
    with stock(sync_view), record_loop_calls() as calls:
        client = django.test.Client()
        client.get("/a")
        client.get("/a")
    assert [call.request_id for call in calls] == [1] * 5 + [2] * 5
    assert {call.path for call in calls} == {"/a"}


async def streaming_view(request: Any) -> StreamingHttpResponse:
    async def body() -> Any:
        yield b"a"

    return StreamingHttpResponse(body())


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume asynchronous iterators")
def test_so_are_those_of_a_body_and_of_the_end_of_the_request(receive: Connect) -> None:
    with stock(streaming_view), record_loop_calls() as calls:
        list(django.test.Client().get("/client"))
        receive(finished=nothing)
        # Read to its end, which comes after that of the request.
        with live(django.test.LiveServerTestCase) as url, urlopen(f"{url}/server") as answer:
            answer.read()
    names = ["streaming_view", "to_list", "streaming_view", "to_list", "asend"]
    assert [call.name.rpartition(".")[2] for call in calls] == names
    assert [call.path for call in calls] == ["/client"] * 2 + ["/server"] * 3
    assert [call.request_id for call in calls] == [1] * 2 + [2] * 3


def test_a_call_below_a_thread_that_is_not_the_requests_is_nested() -> None:
    async def view(request: Any) -> HttpResponse:
        await sync_to_async(call_here, thread_sensitive=False)()
        return HttpResponse()

    for kind in (serve, stock):
        with kind(view) as server, record_loop_calls() as calls:
            server.get("/a")
        assert [(call.depth, call.path) for call in calls] == [(0, "/a"), (1, "/a")]


def test_a_call_that_is_not_done_has_no_duration() -> None:
    entered, leave = threading.Event(), threading.Event()

    async def wait() -> None:
        entered.set()
        await asyncio.to_thread(leave.wait, 30)

    with record_loop_calls() as calls:
        thread = threading.Thread(target=async_to_sync(wait))
        thread.start()
        assert entered.wait(30)
        assert calls[0].duration is None
        assert "..." in calls.table()
        leave.set()
        thread.join()
        assert calls[0].duration is not None


def test_a_call_that_is_refused_is_none() -> None:
    async def call() -> None:
        with pytest.raises(RuntimeError, match="same thread as an async event loop"):
            call_here()

    with record_loop_calls() as calls:
        asyncio.run(call())
    assert not calls


def test_a_method_that_was_taken_before_the_recording() -> None:
    class View:
        @async_to_sync
        async def method(self) -> Place:
            return await here()

    method = View().method
    with record_loop_calls() as calls:
        method()
        kept = View().method
    kept()
    (call,) = calls
    assert call.name.endswith("View.method")
    assert call.duration is not None


def test_calls_of_all_threads_are_recorded() -> None:
    barrier = threading.Barrier(4)

    def make_calls() -> None:
        barrier.wait(30)
        for _ in range(5):
            call_here()

    with record_loop_calls() as calls:
        threads = [threading.Thread(target=make_calls) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(calls) == calls.loops == 20
    starts = [call.start for call in calls]
    assert starts == sorted(starts)


# --- Recordings, and what they leave alone ---------------------------------------------------------------------------


def test_recordings_may_overlap() -> None:
    outer, inner = record_loop_calls(), record_loop_calls()
    first = outer.__enter__()
    call_here()
    second = inner.__enter__()
    call_here()
    outer.__exit__(None, None, None)
    call_here()
    inner.__exit__(None, None, None)
    call_here()
    assert (len(first), len(second)) == (2, 2)
    assert [call.loop_id for call in second] == [1, 2]


def test_asgiref_is_put_back_after_an_error() -> None:
    with pytest.raises(LookupError), record_loop_calls():
        raise LookupError


def test_what_somebody_else_has_wrapped_meanwhile_is_left_alone() -> None:
    found = AsyncToSync.__call__
    with record_loop_calls() as calls:
        ours = AsyncToSync.__call__
        theirs = lambda self, *args, **kwargs: ours(self, *args, **kwargs)  # noqa: E731
        AsyncToSync.__call__ = theirs  # type: ignore[method-assign, assignment]
    try:
        assert AsyncToSync.__call__ is theirs
        call_here()
        assert len(calls) == 0
        with record_loop_calls() as again:
            call_here()
        assert len(again) == 1
    finally:
        AsyncToSync.__call__ = found  # type: ignore[method-assign]


@pytest.mark.parametrize("block", [EventLoopContext, record_loop_calls], ids=["wsgi-loop", "stock"])
def test_a_call_does_what_it_does_otherwise(block: Any) -> None:
    error = LookupError()

    async def fail(value: str) -> None:
        variable.set(value)
        raise error

    async def cancel() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(30)

    def in_context() -> None:
        variable.set("caller's")
        async_to_sync(here)()
        known = set(copy_context())
        with record_loop_calls(), block():
            assert isinstance(async_to_sync(here)(), Place)
            with pytest.raises(LookupError) as caught:
                async_to_sync(fail)("callee's")
            with pytest.raises(asyncio.CancelledError):
                async_to_sync(cancel)()
        assert caught.value is error
        assert variable.get() == "callee's"
        assert set(copy_context()) == known

    copy_context().run(in_context)


# --- assert_one_loop -------------------------------------------------------------------------------------------------


def test_requests_pass_with_a_loop_for_each(receive: Connect) -> None:
    receive(started=nothing, finished=nothing)
    with serve(sync_view) as server, record_loop_calls() as calls:
        server.get("/a")
        call_here()
        call_here()
        server.get("/b")
    assert calls.loops == 4
    calls.assert_one_loop()
    assert ">" not in re.sub("<locals>", "", calls.table())


def test_a_request_of_djangos_handler_fails(receive: Connect) -> None:
    receive(started=nothing)
    with stock(sync_view) as server, record_loop_calls() as calls:
        server.get("/a")
    with pytest.raises(AssertionError) as caught:
        calls.assert_one_loop()
    told = str(caught.value)
    assert "Request 1 to /a: 4 loop calls ran on 3 event loops, and wsgi-loop did not serve 4 of them." in told
    assert told.count("\n> ") == 4
    assert line_of(sync_view, "# nested") in told


def test_one_call_of_djangos_handler_fails() -> None:
    """It has one loop as well; but that is no reuse."""
    with stock(lambda request: HttpResponse(str(call_here()))) as server, record_loop_calls() as calls:
        server.get("/a")
    with pytest.raises(AssertionError, match="ran on one event loop, and wsgi-loop did not serve 1 of them"):
        calls.assert_one_loop()


def odd_view(request: Any) -> HttpResponse:
    call_here()
    async_to_sync(here, force_new_loop=True)()  # odd
    call_here()
    return HttpResponse()


def test_the_odd_one_out_is_marked() -> None:
    with serve(odd_view) as server, record_loop_calls() as calls:
        server.get("/odd")
        server.get("/odd")
    with pytest.raises(AssertionError) as caught:
        calls.assert_one_loop()
    told = str(caught.value)
    assert "Request 1 to /odd: 3 loop calls ran on 2 event loops" in told
    assert "Request 2 to /odd: 3 loop calls ran on 2 event loops" in told
    marked = [line for line in told.splitlines() if line.startswith(">")]
    assert len(marked) == 2
    assert all(line.endswith(line_of(odd_view, "# odd")) and "asgiref" in line for line in marked)
    assert calls.table() in told


def test_without_any_call_there_is_nothing_to_assert() -> None:
    with serve(lambda request: HttpResponse()) as server, record_loop_calls() as calls:
        server.get()
    with pytest.raises(AssertionError, match="No loop call was recorded"):
        calls.assert_one_loop()
    calls.assert_one_loop(allow_no_calls=True)


def test_outside_of_requests() -> None:
    with record_loop_calls() as calls, EventLoopContext():
        call_here()
        call_here()
    calls.assert_one_loop()
    with record_loop_calls() as calls:
        with EventLoopContext():
            call_here()
        call_here()
    with pytest.raises(AssertionError, match=r"Outside of any request: 2 loop calls ran on 2 event loops"):
        calls.assert_one_loop()


def test_calls_are_a_sequence() -> None:
    with record_loop_calls() as calls:
        call_here()
        call_here()
    assert calls[-1] == list(calls)[1] == calls[1:][0]
    assert next(reversed(calls)) == calls[1]
    assert repr(calls) == "<LoopCalls: 2 calls on 2 event loops and 2 threads>"


# --- The client ------------------------------------------------------------------------------------------------------


def test_a_request_has_a_loop_and_a_context_of_its_own(
    loops: list[asyncio.AbstractEventLoop], receive: Connect
) -> None:
    seen: list[Any] = []

    async def finished(**kwargs: Any) -> None:
        seen.append((await here(), variable.get()))
        assert not loops[0].is_closed()

    receive(finished=finished)

    def view(request: Any) -> HttpResponse:
        seen.append((call_here(), variable.get()))
        loops.append(seen[0][0].loop)
        variable.set("view's")
        return HttpResponse("body")

    def request() -> None:
        variable.set("test's")
        assert Client().get("/").content == b"body"
        assert variable.get() == "test's"

    with serve(view):
        copy_context().run(request)
    (first, before), (second, after) = seen
    assert (before, after) == ("test's", "view's")
    assert first.loop is second.loop


@pytest.mark.django_db
def test_the_view_works_in_the_tests_connection_and_transaction() -> None:
    async def view(request: Any) -> HttpResponse:
        await User.objects.acreate(username="grace")
        seen.append(await sync_to_async(lambda: (threading.current_thread(), connection.connection))())
        return HttpResponse(str(await User.objects.acount()))

    seen: list[Any] = []
    User.objects.create(username="ada")
    with serve(view):
        assert Client().get("/").content == b"2"
    assert seen == [(threading.current_thread(), connection.connection)]
    assert connection.in_atomic_block
    assert connection.is_usable()


def test_what_stands_between_the_test_and_its_connection_is_connected_again() -> None:
    with serve(lambda request: HttpResponse()):
        Client().get("/")
        assert request_finished.disconnect(close_old_connections)
        try:
            Client().get("/")
            assert not request_finished.disconnect(close_old_connections)
        finally:
            request_finished.connect(close_old_connections)


def test_cache_connections_stay_with_the_tests_thread() -> None:
    connections = []

    def view(request: Any) -> HttpResponse:
        connections.append(caches["default"])
        return HttpResponse()

    with serve(view, CACHES={"default": {"BACKEND": "django.core.cache.backends.dummy.DummyCache"}}):
        Client().get("/")
        Client().get("/")
        assert connections == [caches["default"]] * 2


def test_what_a_view_raises_is_raised(loops: list[asyncio.AbstractEventLoop]) -> None:
    def view(request: Any) -> HttpResponse:
        loops.append(call_here().loop)
        raise {"/error": LookupError, "/interrupt": KeyboardInterrupt}[request.path]

    with serve(view):
        with pytest.raises(LookupError):
            Client().get("/error")
        assert Client(raise_request_exception=False).get("/error").status_code == 500
        with pytest.raises(KeyboardInterrupt) as caught:
            Client().get("/interrupt")
    assert len(loops) == 3
    # While what was raised still holds what it went through.
    eventually(lambda: loops[-1].is_closed())
    del caught


def test_redirects_are_requests_too(loops: list[asyncio.AbstractEventLoop]) -> None:
    def view(request: Any) -> HttpResponse:
        call_here()
        return HttpResponseRedirect("/b") if request.path == "/a" else HttpResponse("there")

    with serve(view), record_loop_calls() as calls:
        assert Client().get("/a", follow=True).content == b"there"
    assert [(call.path, call.loop_id) for call in calls] == [("/a", 1), ("/b", 2)]
    calls.assert_one_loop()


def test_the_setting_is_used(new_process_loop: None) -> None:
    with serve(sync_view, WSGI_LOOP={"SCOPE": "process"}), record_loop_calls() as calls:
        client = Client()
        client.get("/a")
        client.get("/b")
    assert calls.loops == 1
    assert {call.request_id for call in calls} == {1, 2}
    calls.assert_one_loop()


def test_after_close_hooks_are_called() -> None:
    called: list[bool] = []

    def view(request: Any) -> HttpResponse:
        response = HttpResponse()
        call_after_close(response, lambda: called.append(response.closed))
        return response

    with serve(view):
        Client().get("/")
    assert called == [True]


READ: dict[str, Callable[[Any], bytes]] = {
    "iterated": lambda response: b"".join(response),
    "streaming_content": lambda response: b"".join(response.streaming_content),
    "getvalue": lambda response: response.getvalue(),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_a_streamed_body(read: Callable[[Any], bytes], receive: Connect, loops: Any) -> None:
    receive(finished=nothing)
    ended: list[str] = []
    receive(finished=lambda **kwargs: ended.append("finished"))

    def view(request: Any) -> StreamingHttpResponse:
        loops.append(call_here().loop)

        def body() -> Iterator[bytes]:
            try:
                for number in range(3):
                    call_here()
                    yield str(number).encode()
            finally:
                call_here()
                ended.append("body")

        return StreamingHttpResponse(body())

    with serve(view), record_loop_calls() as calls:
        response = Client().get("/a")
        assert not ended
        assert read(response) == b"012"
        assert ended == ["body", "finished"]
        assert response.closed
    assert len(calls) == 6
    assert {call.request_id for call in calls} == {1}
    calls.assert_one_loop()


def async_view(loops: list[asyncio.AbstractEventLoop], ended: list[str]) -> Callable[[Any], Any]:
    async def view(request: Any) -> StreamingHttpResponse:
        first = await here()
        loops.append(first.loop)

        async def body() -> Any:
            try:
                for number in range(3):
                    assert await here() == first
                    yield str(number).encode()
            finally:
                place = await here()
                assert (place.loop, place.task) == (first.loop, first.task)
                ended.append("body")

        return StreamingHttpResponse(body())

    return view


def test_an_async_body(receive: Connect, loops: Any) -> None:
    ended: list[str] = []
    receive(finished=nothing)
    receive(finished=lambda **kwargs: ended.append("finished"))
    with serve(async_view(loops, ended)), record_loop_calls() as calls:
        response: Any = Client().get("/a")
        assert response.is_async
        steps = iter(response)
        assert next(steps) == b"0"
        assert not ended
        assert list(steps) == [b"1", b"2"]
        assert ended == ["body", "finished"]
        assert response.closed
    calls.assert_one_loop()


def test_an_async_body_that_fails(loops: Any) -> None:
    async def view(request: Any) -> StreamingHttpResponse:
        loops.append((await here()).loop)

        async def body() -> Any:
            yield b"a"
            raise LookupError

        return StreamingHttpResponse(body())

    with serve(view):
        response = Client().get("/a")
        with pytest.raises(LookupError):
            list(response)
        assert response.closed


def test_an_async_body_that_is_closed_half_way(receive: Connect, loops: Any) -> None:
    ended: list[str] = []
    receive(finished=lambda **kwargs: ended.append("finished"))
    with serve(async_view(loops, ended)):
        response = Client().get("/a")
        assert next(iter(response)) == b"0"
        response.close()
        assert ended == ["body", "finished"]


def test_a_streamed_body_of_no_interest(receive: Connect, loops: Any) -> None:
    with serve(async_view(loops, [])):
        response = Client().head("/a")
        assert b"".join(response) == b""
        assert response.closed


def test_a_body_that_nobody_reads_is_not_complained_about(loops: Any, recwarn: pytest.WarningsRecorder) -> None:
    for view in (
        async_view(loops, []),
        lambda request: StreamingHttpResponse(iter([str(loops.append(call_here().loop)).encode()])),
    ):
        with serve(view):
            response = Client().get("/a")
        del response
        gc.collect()
    assert len(loops) == 2
    eventually(lambda: all(loop.is_closed() for loop in loops))
    assert not recwarn.list


def test_a_file(tmp_path: Path, loops: Any) -> None:
    (tmp_path / "file").write_bytes(b"content")

    def view(request: Any) -> FileResponse:
        loops.append(call_here().loop)
        return FileResponse((tmp_path / "file").open("rb"))

    with serve(view):
        assert Client().get("/").getvalue() == b"content"


def test_a_client_of_another_class() -> None:
    class Handler(django.test.client.ClientHandler):
        def get_response(self, request: Any) -> Any:
            request.user = "ada"
            return super().get_response(request)

    class OwnClient(django.test.Client):
        def __init__(self, **defaults: Any) -> None:
            super().__init__(**defaults)
            self.handler = Handler()

    class Ours(testing.ClientMixin, OwnClient):
        pass

    def view(request: Any) -> HttpResponse:
        call_here()
        call_here()
        return HttpResponse(request.user)

    with serve(view), record_loop_calls() as calls:
        for client in (Ours(), testing.serve_client(testing.serve_client(OwnClient()))):
            assert isinstance(client.handler, Handler)
            assert client.get("/").content == b"ada"
        assert type(Ours().handler) is type(Ours().handler)
    calls.assert_one_loop()


def test_a_client_of_another_thread() -> None:
    with serve(sync_view), record_loop_calls() as calls:
        in_thread(lambda: Client().get("/"))
    calls.assert_one_loop()


# --- The live server -------------------------------------------------------------------------------------------------


class TestLiveServer(LiveServerTestCase):
    def test_one_loop_and_the_tests_data(self) -> None:
        async def view(request: Any) -> HttpResponse:
            return HttpResponse(str(await User.objects.acount()))

        User.objects.create(username="ada")
        with self.served(view), record_loop_calls() as calls, urlopen(f"{self.live_server_url}/a") as response:
            assert response.read() == b"1"
        assert [call.path for call in calls] == ["/a"]
        calls.assert_one_loop()

    def test_the_client_is_ours_too(self) -> None:
        with self.served(sync_view), record_loop_calls() as calls:
            self.client.get("/")
        calls.assert_one_loop()

    def served(self, view: Any) -> serve:
        return serve(view)


def test_static_and_media_files_are_served(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("content")

    folder = {"STATIC_URL": "/static/", "STATIC_ROOT": tmp_path, "MEDIA_URL": "/media/", "MEDIA_ROOT": tmp_path}
    with serve(sync_view, **folder), record_loop_calls() as calls, live(LiveServerTestCase) as url:
        for path in ("/static/file.txt", "/media/file.txt"):
            with urlopen(url + path) as response:
                assert response.read() == b"content"
        urlopen(f"{url}/a").close()
    assert {call.path for call in calls} == {"/a"}
    calls.assert_one_loop()


# --- The plugin, and the page of the documentation -------------------------------------------------------------------


def run_pytest(directory: Path, *arguments: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "DJANGO"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *PLUGIN, "-p", "no:cacheprovider", "-W", "error", *arguments],
        cwd=directory,
        env=kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SETTINGS = """
SECRET_KEY = "not a secret"
ROOT_URLCONF = "urls"
STATIC_URL = "static/"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
"""
URLS = """
import asyncio
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.urls import path

def view(request):
    async_to_sync(asyncio.sleep)(0)
    async_to_sync(asyncio.sleep)(0)
    assert request.get_host()
    return HttpResponse("hello")

urlpatterns = [path("", view)]
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "settings.py").write_text(SETTINGS)
    (tmp_path / "urls.py").write_text(URLS)
    return tmp_path


def test_the_fixtures_work_without_pytest_django(project: Path) -> None:
    (project / "test_it.py").write_text("""
import os
from urllib.request import urlopen

os.environ["DJANGO_SETTINGS_MODULE"] = "settings"

def test_client(wsgi_loop_client, loop_calls):
    from django.core import mail

    assert mail.outbox == []
    assert wsgi_loop_client.get("/").content == b"hello"
    loop_calls.assert_one_loop()

def test_live_server(wsgi_loop_live_server, loop_calls):
    assert str(wsgi_loop_live_server) == wsgi_loop_live_server.url
    with urlopen(wsgi_loop_live_server + "/") as response:
        assert response.read() == b"hello"
    assert len(loop_calls) == 2
    loop_calls.assert_one_loop()
""")
    assert "2 passed" in run_pytest(project, "-p", "no:django", "-o", "wsgi_loop_serve=true")


def test_the_live_server_has_the_database_of_pytest_django(project: Path) -> None:
    """Outside of a transaction, which other threads would not see, whatever else the test asks for."""
    (project / "test_it.py").write_text("""
from urllib.request import urlopen

from django.db import connection

def test_live_server(wsgi_loop_live_server):
    assert not connection.in_atomic_block
    urlopen(wsgi_loop_live_server.url).close()

def test_both(db, wsgi_loop_live_server):
    assert not connection.in_atomic_block
""")
    assert "2 passed" in run_pytest(project, "-o", "DJANGO_SETTINGS_MODULE=settings")


def test_the_option_leaves_clients_of_other_kinds_alone(project: Path) -> None:
    (project / "test_it.py").write_text("""
import pytest

@pytest.fixture
def client():
    return "of some server"

def test_client(client):
    assert client == "of some server"
""")
    arguments = ("-o", "wsgi_loop_serve=true", "-o", "DJANGO_SETTINGS_MODULE=settings")
    assert "1 passed" in run_pytest(project, *arguments)


def without_times(table: str) -> str:
    """With no names of threads either, which are numbered in the order of the tests."""
    return re.sub(r" +", " ", re.sub(r"\d+\.\d |(?<=[a-z]-)\d+(_\d+)?", "", table))


def test_the_page_of_the_documentation(tmp_path: Path) -> None:
    """Its blocks are the files that they say they are, and its tests pass."""
    page = (ROOT / "docs" / "testing.md").read_text()
    blocks = re.findall(r"^```(?:python|ini)\n# (\S+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == len(re.findall(r"^```(?:python|ini)$", page, re.MULTILINE)), "a block does not say what it is"
    for name, code in blocks:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    (tmp_path / "mysite" / "__init__.py").touch()
    output = run_pytest(tmp_path, "-v", "-s")
    tests = sum(len(re.findall(r"^ *def test_", code, re.MULTILINE)) for _, code in blocks)
    assert tests > 5
    assert f"{tests} passed" in output, output
    (printed,) = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert without_times(printed) in without_times(output)
    assert "OK" in run_django_tests(tmp_path, "mysite.settings")


def test_the_plugin_imports_django_only_when_a_fixture_is_used(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("""
import sys

def test_nothing():
    assert "wsgi_loop.tools.pytest_plugin" in sys.modules
    assert not [name for name in sys.modules if name.partition(".")[0] in ("django", "asgiref")]
""")
    assert "1 passed" in run_pytest(tmp_path, "-p", "no:django", "-o", "wsgi_loop_serve=true")


@pytest.mark.parametrize("read", ["getvalue", "streaming_content", "iteration"])
def test_lazy_strings_of_a_stream_are_those_of_the_request(read: str) -> None:
    def in_german(get_response: Any) -> Any:
        def middleware(request: Any) -> Any:
            with translation.override("de"):
                translation.activate("de")
                response = get_response(request)
            translation.activate("de")
            return response

        return middleware

    def view(request: Any) -> StreamingHttpResponse:
        return StreamingHttpResponse([gettext_lazy("Yes"), "/", gettext_lazy("No")])

    with serve(view, middleware=[in_german], USE_I18N=True):
        response = Client().get("/")
        assert translation.get_language() != "de"
        if read == "getvalue":
            assert response.getvalue() == b"Ja/Nein"
        else:
            assert b"".join(response.streaming_content if read == "streaming_content" else response) == b"Ja/Nein"
    assert response.closed


@pytest.mark.parametrize("kind", ["sync", "async", "stream"])
def test_what_depends_on_the_request_can_be_evaluated_after_it(kind: str, receive: Connect) -> None:
    tenant = Local()

    def set_tenant(sender: Any, environ: Any, **kwargs: Any) -> None:
        tenant.name = environ["PATH_INFO"]

    def respond() -> Any:
        translation.activate("de")
        return StreamingHttpResponse([b"x"]) if kind == "stream" else HttpResponse(b"x")

    async def respond_async(request: Any) -> Any:
        return respond()

    receive(started=set_tenant)
    with serve(respond_async if kind == "async" else lambda request: respond(), USE_I18N=True):
        response: Any = Client().get("/acme/")
        assert b"".join(response) == b"x"
        label = gettext_lazy("Yes")
        assert (str(label), hasattr(tenant, "name")) == ("Yes", False)
        context = response.request_context
        assert context.run(str, label) == "Ja"
        assert context.run(getattr, tenant, "name") == "/acme/"
        assert (str(label), hasattr(tenant, "name")) == ("Yes", False)


def enqueued() -> None: ...


@pytest.mark.parametrize("name", ["django.tasks", "django_tasks"])
def test_a_backend_of_tasks_that_a_test_sets_is_the_one_that_a_view_uses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = pytest.importorskip(name, reason="django.tasks comes with Django 6.0, django_tasks with the extra `tests`")
    if name == "django_tasks":
        # What its AppConfig imports.
        importlib.import_module("django_tasks.signals")

    task = tasks.task(enqueued)
    # Which is looked up by its name.
    monkeypatch.setitem(globals(), "enqueued", task)

    def view(request: Any) -> HttpResponse:
        task.enqueue()
        return HttpResponse()

    for _ in range(2):
        with serve(view, TASKS={"default": {"BACKEND": f"{name}.backends.dummy.DummyBackend"}}):
            Client().get("/")
            assert len(tasks.default_task_backend.results) == 1
