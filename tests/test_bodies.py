"""Bodies of requests in scope "process": read on the request thread, before the loop could be held up by them."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.http import HttpRequest, HttpResponse, UnreadablePostError

from wsgi_loop.testing import Client

from .support import call_here, serve

pytestmark = pytest.mark.usefixtures("new_process_loop")

BODY = bytes(range(256)) * 1000
Connect = Callable[..., None]


class Input(io.BytesIO):
    """The threads that read from it are noted."""

    def __init__(self, content: bytes = BODY) -> None:
        super().__init__(content)
        self.threads: set[int] = set()

    def read(self, size: Any = -1, /) -> bytes:
        self.threads.add(threading.get_ident())
        return super().read(size)

    def readline(self, size: Any = -1, /) -> bytes:
        self.threads.add(threading.get_ident())
        return super().readline(size)


def post(body: io.BytesIO, length: int = len(BODY)) -> dict[str, Any]:
    return {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": str(length), "wsgi.input": body}


async def read_body(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.body)


async def read_in_pieces(request: HttpRequest) -> HttpResponse:
    return HttpResponse(b"".join(iter(lambda: request.read(1000), b"")))


async def read_lines(request: HttpRequest) -> HttpResponse:
    return HttpResponse(b"".join(request))


async def read_environ(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.META["wsgi.input"].read())


@pytest.mark.parametrize("view", [read_body, read_in_pieces, read_lines, read_environ])
@pytest.mark.parametrize("in_memory", [0, 10**9])
def test_async_code_reads_what_the_request_thread_has_read(view: Any, in_memory: int) -> None:
    body = Input()
    with serve(view, scope="process", FILE_UPLOAD_MAX_MEMORY_SIZE=in_memory) as server:
        assert server.get(**post(body)) == BODY
    assert body.threads == {threading.get_ident()}


@pytest.mark.parametrize("scope", ["request", "process"])
def test_files(scope: str, settings: Any) -> None:
    settings.WSGI_LOOP = {"SCOPE": scope}

    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(request.FILES["file"].read() + request.POST["name"].encode())

    with serve(view):
        file = io.BytesIO(BODY)
        file.name = "file"
        assert Client().post("/", {"file": file, "name": "ada"}).content == BODY + b"ada"


def test_the_rest_of_what_a_middleware_has_begun_to_read() -> None:
    body = Input()

    def middleware(get_response: Any) -> Any:
        def begin(request: Any) -> Any:
            request.begun = request.read(1000)
            return get_response(request)

        return begin

    async def view(request: Any) -> HttpResponse:
        return HttpResponse(request.begun + request.read())

    with serve(view, middleware=[middleware], scope="process") as server:
        assert server.get(**post(body)) == BODY


def test_a_receiver_of_request_started_comes_before_there_is_a_request(receive: Connect) -> None:
    async def on_started(**kwargs: Any) -> None:
        pass

    receive(started=on_started)
    body = Input()
    with serve(read_body, scope="process") as server:
        assert server.get(**post(body)) == BODY
    assert body.threads == {threading.get_ident()}


def test_a_client_that_goes_away_is_told_to_who_reads() -> None:
    class Broken(Input):
        def read(self, size: Any = -1, /) -> bytes:
            raise ConnectionResetError("gone")

    async def view(request: HttpRequest) -> HttpResponse:
        try:
            return HttpResponse(request.body)
        except UnreadablePostError as exc:
            return HttpResponse(repr(exc))

    async def careless(request: HttpRequest) -> HttpResponse:
        return HttpResponse("has not read it")

    with serve({"careless": careless, "": view}, scope="process") as server:
        assert server.get(**post(Broken())) == b"UnreadablePostError('gone')"
        assert server.get("/careless", **post(Broken())) == b"has not read it"


def test_a_body_that_is_shorter_than_was_said() -> None:
    with serve(read_body, scope="process") as server:
        assert server.get(**post(Input(), 2 * len(BODY))) == BODY


@pytest.mark.parametrize("length", ["", "0", "-1"])
def test_no_length_is_no_body(length: str) -> None:
    body = Input()
    with serve(read_body, scope="process") as server:
        assert server.get(**post(body) | {"CONTENT_LENGTH": length}) == b""
    assert body.threads == set()


def test_a_sync_request_is_left_alone() -> None:
    body = Input()
    with serve(lambda request: HttpResponse("not read"), scope="process") as server:
        assert server.get(**post(body)) == b"not read"
    assert body.threads == set()


def test_what_is_read_already_stays_read() -> None:
    def view(request: HttpRequest) -> HttpResponse:
        before = request.body
        call_here()
        return HttpResponse(before if request.body is before else b"")

    with serve(view, scope="process") as server:
        assert server.get(**post(Input())) == BODY


def test_a_loop_call_of_a_body_reads_nothing() -> None:
    async def nothing() -> None:
        pass

    def view(request: HttpRequest) -> Any:
        from django.http import StreamingHttpResponse

        def chunks() -> Any:
            async_to_sync(nothing)()
            yield request.read()

        return StreamingHttpResponse(chunks())

    with serve(view, scope="process") as server:
        assert server.get(**post(Input())) == BODY
