"""Promises 2 and 3: a sync request makes nothing, and each request has a context of its own."""

from __future__ import annotations

import contextvars
import weakref
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.core.cache import caches
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import get_urlconf, set_urlconf
from django.utils import timezone, translation

from .conftest import Connect
from .support import call_here, eventually, in_thread, loop_threads, serve, stock

variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable", default="unset")


def test_a_thousand_sync_requests_make_no_loop_and_no_thread(started: list[str]) -> None:
    made: list[Any] = []

    def factory() -> Any:
        import asyncio

        made.append(1)
        return asyncio.new_event_loop()

    with serve(lambda request: HttpResponse("sync"), loop_factory=factory) as server:
        made.clear()
        for _ in range(1000):
            server.get()
    assert started == []
    assert made == []


def test_a_thousand_requests_with_loop_calls_start_no_thread(started: list[str]) -> None:
    async def view(request: Any) -> Any:
        await sync_to_async(call_here)()
        return HttpResponse()

    with serve(view) as server:
        server.get()
        # That of the process loop, in scope "process".
        started.clear()
        for _ in range(1000):
            server.get()
    assert started == []


def test_a_variable_is_seen_throughout_its_request_and_by_no_other(receive: Connect) -> None:
    seen: list[Any] = []

    async def view(request: Any) -> Any:
        seen.append(variable.get())
        variable.set(request.path)

        def body() -> Any:
            seen.append(variable.get())
            yield b""

        return StreamingHttpResponse(body())

    async def finished(**kwargs: Any) -> None:
        seen.append(variable.get())

    receive(finished=lambda **kwargs: seen.append(variable.get()))
    receive(finished=finished)
    with serve(view) as server:
        server.get("/a")
        server.get("/b")
    assert seen == ["unset", "/a", "/a", "/a", "unset", "/b", "/b", "/b"]
    assert variable.get() == "unset"


@pytest.mark.parametrize("with_loop", [False, True], ids=["sync", "with a loop call"])
def test_a_sync_request_on_a_new_server_thread_has_a_context_of_its_own(receive: Connect, with_loop: bool) -> None:
    """On a thread that asgiref has not touched, where a request takes the shortest way."""
    seen: list[Any] = []

    def view(request: Any) -> Any:
        seen.append(variable.get())
        variable.set(request.path)
        if with_loop:
            call_here()
        return HttpResponse()

    def on_a_new_thread() -> str:
        server.get("/a")
        server.get("/b")
        return str(variable.get())

    receive(finished=lambda **kwargs: seen.append(variable.get()))
    with serve(view) as server:
        assert in_thread(on_a_new_thread) == "unset"
    assert seen == ["unset", "/a", "unset", "/b"]


def test_the_first_loop_call_of_a_request_may_be_made_in_request_finished(receive: Connect) -> None:
    loops: list[Any] = []
    receive(finished=lambda **kwargs: loops.append(call_here().loop))
    receive(finished=lambda **kwargs: loops.append(call_here().loop))
    with serve(lambda request: HttpResponse()) as server:
        in_thread(server.get)
    assert loops[0] is loops[1]
    eventually(loops[0].is_closed)


def test_requests_that_are_interleaved_on_one_thread_do_not_see_each_others_variables() -> None:
    def view(request: Any) -> Any:
        variable.set(request.path)

        def body() -> Any:
            for _ in range(2):
                yield variable.get().encode()

        return StreamingHttpResponse(body())

    with serve(view) as server:
        a, b = server.open("/a"), server.open("/b")
        assert [*zip(a, b, strict=True)] == [(b"/a", b"/b")] * 2
        a.close()
        b.close()


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same thread", "another thread"])
def test_language_time_zone_and_urlconf_hold_until_close_and_not_longer(receive: Connect, elsewhere: bool) -> None:
    def state() -> tuple[Any, ...]:
        return translation.get_language(), timezone.get_current_timezone_name(), get_urlconf()

    seen: list[Any] = []
    before = in_thread(state)

    def view(request: Any) -> Any:
        if request.path == "/plain":
            seen.append(state())
            return HttpResponse()
        translation.activate("de")
        timezone.activate("Asia/Tokyo")
        set_urlconf("tests.urls")
        call_here()

        def body() -> Any:
            seen.append(state())
            yield b""

        return StreamingHttpResponse(body())

    def finished(**kwargs: Any) -> None:
        # Without the urlconf, which a receiver of Django's has reset by now.
        seen.append(state()[:2])

    with serve(view) as server:
        response = server.open("/set")
        receive(finished=finished)

        def rest() -> None:
            b"".join(response)
            response.close()

        if elsewhere:
            in_thread(rest)
        else:
            rest()
        assert seen == [("de", "Asia/Tokyo", "tests.urls"), ("de", "Asia/Tokyo")]
        seen.clear()
        server.get("/plain")
        assert seen[0][:2] == before[:2]
        assert seen[0][2] == "tests.served" or seen[0][2].__name__ == "tests.served"
    assert state() == before


def test_caches_stay_with_their_thread() -> None:
    seen: list[Any] = []

    def view(request: Any) -> Any:
        seen.append(caches["default"])
        return HttpResponse()

    with serve(view) as server:
        server.get()
        server.get()
        in_thread(server.get)
    assert seen[0] is seen[1]
    assert seen[0] is caches["default"]
    assert seen[0] is not seen[2]


@pytest.mark.parametrize("setting", ["CACHES", "TASKS"])
def test_what_is_configured_anew_stays_with_its_thread_too(setting: str) -> None:
    if setting == "CACHES":
        handler, backend = caches, "django.core.cache.backends.locmem.LocMemCache"
    else:
        tasks = pytest.importorskip("django.tasks", reason="Django 5.2 has no tasks")
        handler, backend = tasks.task_backends, "django.tasks.backends.dummy.DummyBackend"
    seen: list[Any] = []

    def view(request: Any) -> Any:
        seen.append(handler["default"])
        return HttpResponse()

    for _ in range(2):
        with serve(view, **{setting: {"default": {"BACKEND": backend}}}) as server:
            server.get()
            server.get()
    assert seen[0] is seen[1]
    assert seen[1] is not seen[2]
    assert seen[2] is seen[3]


def test_a_request_that_goes_on_elsewhere_uses_the_caches_of_the_thread_that_it_is_on() -> None:
    seen: list[Any] = []

    def view(request: Any) -> Any:
        seen.append(caches["default"])

        def body() -> Any:
            seen.append(caches["default"])
            yield b""

        return StreamingHttpResponse(body())

    with serve(view) as server:
        response = server.open()

        def elsewhere() -> None:
            server.get()
            b"".join(response)

        in_thread(elsewhere)
        response.close()
    first, other, other_body, first_body_elsewhere = seen
    assert other is other_body
    assert first_body_elsewhere is other
    assert first is not other


def test_the_server_threads_context_does_not_grow() -> None:
    async def view(request: Any) -> Any:
        contextvars.ContextVar("new").set(request)
        return HttpResponse()

    with serve(view) as server:
        server.get()
        before = dict(contextvars.copy_context())
        for _ in range(20):
            server.get()
        assert dict(contextvars.copy_context()) == before


async def aiterator_view(request: Any) -> HttpResponse:
    return HttpResponse(str([user.username async for user in User.objects.all().aiterator()]))


@pytest.mark.django_db(transaction=True)
def test_the_leak_that_started_the_project(record_property: Any) -> None:
    """Contextvars held by the server thread after requests whose async view uses aiterator()."""

    def held(make: Any) -> tuple[int, int]:
        def run() -> tuple[int, int]:
            with make(aiterator_view) as server:
                server.get()
                first = len(contextvars.copy_context())
                for _ in range(60):
                    server.get()
                return first, len(contextvars.copy_context())

        return in_thread(run)  # type: ignore[no-any-return]

    ours, theirs = held(serve), held(stock)
    record_property("contextvars", f"wsgi-loop {ours}, stock {theirs}")
    assert ours[0] == ours[1]
    assert theirs[1] >= theirs[0] + 60


def test_what_a_variable_holds_is_freed_with_its_request(no_gc: None) -> None:
    class Value:
        pass

    values: list[Any] = []

    async def view(request: Any) -> Any:
        value = Value()
        values.append(weakref.ref(value))
        variable.set(value)
        return HttpResponse()

    with serve(view) as server:
        server.get()
    eventually(lambda: values[0]() is None)


def test_the_threads_asgiref_state_is_left_as_it_was() -> None:
    def on_a_new_thread() -> None:
        state = SyncToAsync.threadlocal.__dict__
        assert state == {}
        server.get()
        assert state == {}
        state["main_event_loop"] = marker = object()
        state["task_context"] = []
        server.get()
        assert state == {"main_event_loop": marker, "task_context": []}

    async def view(request: Any) -> Any:
        # Sync code that runs for async code is what makes asgiref write to the thread.
        return HttpResponse(str(await sync_to_async(call_here)()))

    for served in (view, lambda request: HttpResponse()):
        with serve(served) as server:
            in_thread(on_a_new_thread)


def test_requests_that_overlap_on_one_thread_leave_asgiref_alone() -> None:
    """Open A, open B, close A, close B: then a call outside of any request gets asgiref's own new loop."""

    def view(request: Any) -> Any:
        place = call_here()
        return StreamingHttpResponse([str(id(place.loop))])

    def on_a_new_thread() -> Any:
        a = server.open()
        b = server.open()
        a.close()
        b.close()
        assert SyncToAsync.threadlocal.__dict__ == {}
        return call_here()

    with serve(view) as server:
        place = in_thread(on_a_new_thread)
    assert place.loop.is_closed()
    assert place.thread not in {thread.ident for thread in loop_threads()}


def test_a_nested_request_has_its_own_loop_and_gives_the_outer_one_back() -> None:
    places: dict[str, Any] = {}

    def inner(request: Any) -> Any:
        places["inner"] = call_here()
        return HttpResponse()

    def outer(request: Any) -> Any:
        places["before"] = call_here()
        server.get("/inner")
        places["after"] = call_here()
        return HttpResponse()

    with serve({"inner": inner, "": outer}) as server:
        server.get("/")
        # And from async code, where the request thread is waiting in a loop call of the outer request.
        assert places["before"] == places["after"]
        assert places["inner"].loop is not places["before"].loop

        async def outer_async(request: Any) -> Any:
            await sync_to_async(outer)(request)
            return HttpResponse()

        with serve({"inner": inner, "": outer_async}) as server:
            server.get("/")
    assert places["before"].loop is places["after"].loop
    assert places["inner"].loop is not places["before"].loop


def test_async_to_sync_with_a_new_loop_gets_a_new_loop() -> None:
    from .support import here

    places = []

    def view(request: Any) -> Any:
        places.append(call_here())
        places.append(async_to_sync(here, force_new_loop=True)())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert places[0].loop is not places[1].loop
