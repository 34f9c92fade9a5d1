"""Promise 6: with the garbage collector off, response and request are freed by close(), and so is the loop."""

from __future__ import annotations

import contextvars
import weakref
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse

import wsgi_loop

from .support import Server, call_here, eventually, here, serve

request_var: contextvars.ContextVar[HttpRequest] = contextvars.ContextVar("request")


def plain(request: Any) -> Any:
    call_here()
    return HttpResponse("plain")


async def asynchronous(request: Any) -> Any:
    await sync_to_async(call_here)()
    return HttpResponse("async")


def streaming(request: Any) -> Any:
    def body() -> Any:
        for _ in range(3):
            call_here()
            yield b"x"

    return StreamingHttpResponse(body())


def file(request: Any) -> Any:
    call_here()
    return FileResponse(open(__file__, "rb"))


def in_contextvar(request: Any) -> Any:
    request_var.set(request)
    call_here()
    return HttpResponse()


VIEWS = [plain, asynchronous, streaming, file, in_contextvar]


def freed(server: Server, seen: list[Any]) -> None:
    """Serve a request, and require that everything in `seen` is freed then."""
    response = server.open()
    seen.append(weakref.ref(response))
    b"".join(response)
    response.close()
    del response
    # The loop thread may be a moment behind.
    eventually(lambda: all(ref() is None for ref in seen), seconds=5)


@pytest.mark.parametrize("view", VIEWS)
def test_response_and_request_are_freed(view: Any, no_gc: None) -> None:
    seen: list[Any] = []

    def middleware(get_response: Any) -> Any:
        def remember(request: Any) -> Any:
            seen.append(weakref.ref(request))
            return get_response(request)

        return remember

    with serve(view, middleware=[middleware]) as server:
        for _ in range(3):
            freed(server, seen)
    assert len(seen) == 6


@pytest.mark.parametrize("view", VIEWS)
def test_a_closure_on_close_would_fail_this(view: Any, no_gc: None) -> None:
    class Handler(wsgi_loop.WSGIHandler):
        def get_response(self, request: Any) -> Any:
            response = super().get_response(request)
            close = response.close
            response.close = lambda: close()  # type: ignore[method-assign]
            return response

    with serve(view, handler=Handler) as server:
        response = server.open()
        ref = weakref.ref(response)
        b"".join(response)
        response.close()
        del response
    assert ref() is not None


def test_the_loop_is_freed(no_gc: None) -> None:
    loops: list[Any] = []

    async def view(request: Any) -> Any:
        loops.append(weakref.ref((await here()).loop))
        await sync_to_async(call_here)()
        return HttpResponse()

    with serve(view) as server:
        server.get()
        server.get()
    eventually(lambda: all(ref() is None for ref in loops))


def test_a_dropped_response_is_freed_without_the_collector(no_gc: None) -> None:
    with serve(plain) as server:
        response = server.open()
        ref = weakref.ref(response)
        with pytest.warns(ResourceWarning, match="dropped without close"):
            del response
        eventually(lambda: ref() is None)
