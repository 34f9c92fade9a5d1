"""Promise 7 and the after-close hooks: what a server, a middleware and a cache see of a response."""

from __future__ import annotations

import copy
import pickle
import threading
import uuid
from typing import Any

import pytest
from django.core.cache import cache
from django.http import FileResponse, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.template.response import TemplateResponse

import wsgi_loop
from wsgi_loop.responses import call_after_close

from .conftest import Connect
from .support import call_here, eventually, in_thread, serve


class Custom(HttpResponse):
    closes = 0

    def close(self) -> None:
        Custom.closes += 1
        super().close()


class Slotted(HttpResponse):
    __slots__ = ("extra",)


@pytest.mark.parametrize("cls", [HttpResponse, Custom, Slotted, StreamingHttpResponse])
def test_the_response_is_djangos(cls: type[HttpResponseBase]) -> None:
    made: list[Any] = []

    def view(request: Any) -> Any:
        made.append(cls(b"content", headers={"X-Test": "1"}))
        return made[0]

    with serve(view) as server:
        response = server.open()
        assert response is made[0]
        assert isinstance(response, cls)
        assert type(response).__name__ == cls.__name__
        assert response.status_code == 200
        assert response["X-Test"] == "1"
        if not response.streaming:
            assert bytes(response).endswith(b"content")
            assert response.content == b"content"
        response.close()


def test_hooks_run_once_in_order_after_request_finished_and_before_the_loop_is_closed(receive: Connect) -> None:
    order: list[Any] = []
    loops: list[Any] = []

    def view(request: Any) -> Any:
        loops.append(call_here().loop)
        response = HttpResponse()
        call_after_close(response, lambda: order.append("first"))
        call_after_close(response, lambda: order.append(call_here().loop is loops[0]))
        return response

    async def finished(**kwargs: Any) -> None:
        order.append("request_finished")

    receive(finished=finished)
    with serve(view) as server:
        response = server.open()
        call_after_close(response, lambda: order.append("last"))
        response.close()
        assert order == ["request_finished", "first", True, "last"]
        response.close()
    assert order == ["request_finished", "first", True, "last", "request_finished"]
    eventually(loops[0].is_closed)


def test_a_hook_that_fails_is_logged_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    called = []
    response = HttpResponse()

    def fail() -> None:
        raise ValueError("hook")

    call_after_close(response, fail)
    call_after_close(response, lambda: called.append(1))
    response.close()
    assert called == [1]
    assert "After-close hook" in caplog.text
    assert "ValueError: hook" in caplog.text


def test_a_hook_that_is_registered_by_a_receiver_or_a_hook_belongs_to_the_same_close(receive: Connect) -> None:
    called: list[str] = []
    response = HttpResponse()

    def register(**kwargs: Any) -> None:
        call_after_close(response, lambda: called.append("by a receiver"))

    receive(finished=register)
    call_after_close(response, lambda: call_after_close(response, lambda: called.append("by a hook")))
    response.close()
    assert sorted(called) == ["by a hook", "by a receiver"]


def test_hooks_run_when_close_raises(receive: Connect) -> None:
    called = []

    def fail(**kwargs: Any) -> None:
        raise ValueError("receiver")

    receive(finished=fail)
    response = HttpResponse()
    call_after_close(response, lambda: called.append(1))
    with pytest.raises(ValueError, match="receiver"):
        response.close()
    assert called == [1]


def test_a_close_of_the_responses_own_class_is_called() -> None:
    Custom.closes = 0
    loops: list[Any] = []
    with serve(lambda request: Custom(loops.append(call_here().loop))) as server:
        server.get()
    assert Custom.closes == 1
    eventually(loops[0].is_closed)


def test_a_close_that_a_middleware_has_set_on_the_instance_is_called_inside_the_request() -> None:
    places: list[Any] = []

    def middleware(get_response: Any) -> Any:
        def wrap(request: Any) -> Any:
            response = get_response(request)
            close = response.close

            def closing() -> None:
                places.append(call_here())
                close()

            response.close = closing
            return response

        return wrap

    with serve(lambda request: HttpResponse(places.append(call_here())), middleware=[middleware]) as server:
        response = server.open()
        response.close()
        eventually(places[0].loop.is_closed)
        response.close()
    assert places[0] == places[1]
    # The second close() is still the middleware's.
    assert len(places) == 3


def test_a_response_that_is_served_twice() -> None:
    kept = HttpResponse(b"kept")
    loops: list[Any] = []

    def view(request: Any) -> Any:
        loops.append(call_here().loop)
        return kept

    with serve(view) as server:
        assert [server.get(), server.get()] == [b"kept", b"kept"]
        eventually(lambda: all(loop.is_closed() for loop in loops))


def test_a_response_that_is_served_by_two_requests_at_once(receive: Connect) -> None:
    kept = HttpResponse(b"kept")
    loops: list[Any] = []
    finished: list[Any] = []

    def view(request: Any) -> Any:
        loops.append(call_here().loop)
        return kept

    receive(finished=lambda **kwargs: finished.append(call_here().loop))
    with serve(view) as server:
        first = server.open()
        second = server.open()
        assert b"".join(second) == b"kept"
        first.close()
        assert not loops[1].is_closed()
        second.close()
    assert finished == loops
    eventually(lambda: all(loop.is_closed() for loop in loops))


def test_a_response_with_hooks_can_be_pickled_without_them(settings: Any) -> None:
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    response = HttpResponse(b"cached")
    call_after_close(response, lambda: None)
    cache.set("response", response)
    cached = cache.get("response")
    assert type(cached) is HttpResponse
    assert cached.content == b"cached"
    assert "wsgi_loop" not in repr(pickle.dumps(response))
    assert type(copy.copy(response)) is HttpResponse
    assert not [key for key in vars(cached) if "wsgi_loop" in key]


def test_the_cache_middleware_stores_what_it_is_given(settings: Any) -> None:
    count = []

    def view(request: Any) -> Any:
        count.append(call_here())
        response = HttpResponse(b"view")
        call_after_close(response, lambda: None)
        return response

    names = ["django.middleware.cache.UpdateCacheMiddleware", "django.middleware.cache.FetchFromCacheMiddleware"]
    caches = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache", "LOCATION": str(uuid.uuid4())}}
    with serve(view, middleware=names, CACHES=caches) as server:
        assert [server.get(), server.get()] == [b"view", b"view"]
    assert len(count) == 1


def test_a_template_response_is_served() -> None:
    from django.template import engines

    template = engines["django"].from_string("hello {{ name }}")
    with serve(lambda request: TemplateResponse(request, template, {"name": "you"})) as server:
        assert server.get() == b"hello you"


def test_file_responses_are_the_servers_file_wrapper(tmp_path: Any) -> None:
    class FileWrapper:
        """As gunicorn's: it takes the file's close() when it is made."""

        def __init__(self, file: Any, size: int) -> None:
            self.file = file
            self.close = file.close

        def __iter__(self) -> Any:
            return iter([self.file.read()])

    path = tmp_path / "file"
    path.write_bytes(b"content")
    opened: list[Any] = []

    def view(request: Any) -> Any:
        opened.append(path.open("rb"))
        return FileResponse(opened[0])

    with serve(view) as server:
        response = server.open(**{"wsgi.file_wrapper": FileWrapper})
        assert type(response) is FileWrapper
        assert b"".join(response) == b"content"
        response.close()
    assert opened[0].closed


def test_a_tool_that_wraps_what_the_handler_returns_is_inside_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Sentry does: the handler's __call__ is patched, and returns something that is not a response."""
    from django.core.handlers.wsgi import WSGIHandler

    places: list[Any] = []
    original = WSGIHandler.__call__

    class Wrapper:
        def __init__(self, response: Any) -> None:
            self.response = response

        def __iter__(self) -> Any:
            places.append(call_here())
            yield from self.response

        def close(self) -> None:
            places.append(call_here())
            self.response.close()
            places.append(call_here())

    monkeypatch.setattr(WSGIHandler, "__call__", lambda *args: Wrapper(original(*args)))
    with serve(lambda request: HttpResponse(places.append(call_here()))) as server:
        server.get()
    assert len(places) == 4
    assert len({place.loop for place in places}) == 1
    eventually(places[0].loop.is_closed)


def test_response_classes_that_are_made_in_a_view_are_not_kept(no_gc: None) -> None:
    from wsgi_loop import responses

    def view(request: Any) -> Any:
        return type("Local", (HttpResponse,), {})(b"")

    with serve(view) as server:
        for _ in range(300):
            server.get()
    assert len(responses._served_classes) <= 128


def test_a_body_that_is_iterated_on_another_thread() -> None:
    places: list[Any] = []

    def view(request: Any) -> Any:
        def body() -> Any:
            places.append((call_here(), threading.get_ident()))
            yield b"x"
            places.append((call_here(), threading.get_ident()))

        return StreamingHttpResponse(body())

    with serve(view) as server:
        response = server.open()
        iterator = iter(response)
        next(iterator)
        in_thread(lambda: next(iterator, None))
        response.close()
    assert places[0][0].loop is places[1][0].loop
    assert places[0][1] != places[1][1]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_handler_in_the_place_of_djangos_does_not_call_itself(
    streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As somebody does whose tool makes Django's handler by its name, as LiveServerThread does.
    monkeypatch.setattr("django.core.handlers.wsgi.WSGIHandler", wsgi_loop.WSGIHandler)

    def view(request: Any) -> Any:
        call_here()
        return StreamingHttpResponse([b"content"]) if streaming else HttpResponse(b"content")

    with serve(view) as server:
        assert server.get() == b"content"
