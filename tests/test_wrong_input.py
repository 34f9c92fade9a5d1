"""Wrong input, from a server, a client or a view: Django's own error, and nothing left over."""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.core.handlers.wsgi import WSGIHandler as DjangoHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from hypothesis import given, settings
from hypothesis import strategies as st

import wsgi_loop

from .conftest import Connect
from .support import environ, eventually, serve, stock

LATIN = st.text(st.characters(max_codepoint=255, exclude_characters="\x00"), max_size=30)
TEXT = st.text(max_size=30)
#: What a server should not put into an environ, but may; None: the key is left out.
ODD = {
    "REQUEST_METHOD": st.sampled_from(["GET", "POST", "HEAD", "get", "", "BREW", "G\u00cbT", None]),
    "PATH_INFO": LATIN | TEXT | st.just(None),
    "SCRIPT_NAME": LATIN | st.just(None),
    "QUERY_STRING": LATIN | TEXT | st.just(None),
    "CONTENT_TYPE": LATIN
    | st.sampled_from(["multipart/form-data", "multipart/form-data; boundary=\xff", "text/plain;;"]),
    "CONTENT_LENGTH": st.sampled_from(["", "x", "-1", "5", "99999999999999999999", "1e3", " 3 ", None]),
    "HTTP_HOST": LATIN | st.sampled_from(["a" * 300, "[::1", "testserver:x", "..", None]),
    "SERVER_NAME": LATIN | st.just(None),
    "SERVER_PORT": st.sampled_from(["80", "", "x", None]),
    "SERVER_PROTOCOL": st.sampled_from(["HTTP/1.1", "HTTP/9", "", None]),
    "HTTP_COOKIE": LATIN | st.sampled_from(["=;=;", "a=b; " * 500]),
    "HTTP_X_LONG": st.just("x" * 100_000),
    "HTTP_TRANSFER_ENCODING": st.sampled_from(["chunked", "\xff"]),
    "wsgi.input": st.builds(io.BytesIO, st.binary(max_size=30)) | st.just(None),
    "wsgi.url_scheme": st.sampled_from(["http", "https", "", "ftp", None]),
    "wsgi.multithread": st.sampled_from([True, None]),
}
ENVIRONS = st.fixed_dictionaries({}, optional=ODD)


async def look(request: HttpRequest) -> HttpResponse:
    """Everything that Django makes of an environ, as far as it gets."""
    found = [request.method, request.path, sorted(request.GET.items()), sorted(request.COOKIES.items())]
    for look_at in (lambda: request.POST.dict(), lambda: request.body, lambda: request.get_host()):
        try:
            found.append(look_at())
        except Exception as exc:
            found.append(type(exc))
    await asyncio.sleep(0)
    return HttpResponse(repr(found))


def outcome(handler: Any, changes: dict[str, Any]) -> tuple[Any, ...]:
    """What a server gets for an environ with these changes: an answer, or an exception."""
    found = environ()
    for key, value in changes.items():
        if isinstance(value, io.BytesIO):
            value = io.BytesIO(value.getvalue())
        if value is None:
            found.pop(key, None)
        else:
            found[key] = value
    answer: list[Any] = []
    try:
        response = handler(found, lambda *args: answer.extend(args))
        try:
            return *answer, b"".join(response)
        finally:
            response.close()
    except Exception as exc:
        return type(exc), str(exc)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_malformed_environs_are_answered_as_by_django() -> None:
    open_loops: set[asyncio.AbstractEventLoop] = set()

    def make() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        open_loops.add(loop)
        return loop

    kinds: set[Any] = set()

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(ENVIRONS)
    def check(changes: dict[str, Any]) -> None:
        expected = outcome(theirs, changes)
        assert outcome(ours, changes) == expected
        kinds.add(expected[0])
        eventually(lambda: all(loop.is_closed() for loop in open_loops))
        open_loops.clear()

    with serve(look, DEBUG=False, ALLOWED_HOSTS=["*"]):
        theirs, ours = DjangoHandler(), wsgi_loop.WSGIHandler(loop_factory=make)
        check()
    # The environs are odd enough for more than one kind of answer, and not so odd that none comes through.
    assert "200 OK" in kinds
    assert len(kinds) > 2


#: What a view has returned in place of awaiting it.
coroutines: list[Any] = []


async def coroutine_function(request: HttpRequest) -> Any:
    return coroutine_function


async def none(request: HttpRequest) -> Any:
    return None


def unawaited(request: HttpRequest) -> Any:
    coroutines.append(none(request))
    return coroutines[-1]


def sync_none(request: HttpRequest) -> Any:
    return None


async def not_a_response(request: HttpRequest) -> Any:
    return "text"


async def not_iterable(request: HttpRequest) -> Any:
    return StreamingHttpResponse(42)  # type: ignore[arg-type]


async def raises_stop_iteration(request: HttpRequest) -> Any:
    raise StopIteration


async def raises_stop_async_iteration(request: HttpRequest) -> Any:
    raise StopAsyncIteration


class NotText:
    def __str__(self) -> str:
        raise ZeroDivisionError("no text")


def streams(*chunks: Any) -> Callable[[HttpRequest], StreamingHttpResponse]:
    def view(request: HttpRequest) -> StreamingHttpResponse:
        async def body() -> AsyncIterator[Any]:
            for chunk in chunks:
                await asyncio.sleep(0)
                yield chunk

        return StreamingHttpResponse(body())

    return view


def exhausted(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[bytes]:
        yield b"read already"

    async def read(generator: AsyncIterator[bytes]) -> None:
        async for _ in generator:
            pass

    generator = body()
    async_to_sync(read)(generator)
    return StreamingHttpResponse(generator)


def ask(serving: serve) -> tuple[Any, ...]:
    answer: list[Any] = []
    with serving as server, warnings.catch_warnings():
        # Django's own of the body, which ours does not give; and of coroutines, which both do.
        warnings.simplefilter("ignore")
        try:
            answer.extend(("answered", server.get(), server.status))
        except Exception as exc:
            # The view's name stands in the text with an address.
            answer.extend((type(exc), str(exc).partition(" at 0x")[0]))
        while coroutines:
            coroutines.pop().close()
    return tuple(answer)


@pytest.mark.parametrize(
    "view",
    [
        coroutine_function,
        none,
        unawaited,
        sync_none,
        not_a_response,
        not_iterable,
        raises_stop_iteration,
        raises_stop_async_iteration,
        streams("text", 1, None, memoryview(b"x")),
        streams(b"x", NotText()),
        streams(),
        exhausted,
    ],
)
@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("scope", ["request", "process"])
def test_a_wrong_view_gets_djangos_error(
    view: Any,
    propagate: bool,
    scope: str,
    receive: Connect,
    new_process_loop: None,
) -> None:
    made: list[asyncio.AbstractEventLoop] = []
    finished: list[bool] = []

    def make() -> asyncio.AbstractEventLoop:
        made.append(asyncio.new_event_loop())
        return made[-1]

    options = {"DEBUG_PROPAGATE_EXCEPTIONS": propagate}
    expected = ask(stock(view, **options))
    receive(finished=lambda **kwargs: finished.append(True))
    assert ask(serve(view, scope=scope, loop_factory=make, **options)) == expected
    if scope == "request":
        eventually(lambda: all(loop.is_closed() for loop in made))
    else:
        eventually(lambda: all(loop.is_closed() or not asyncio.all_tasks(loop) for loop in made))
    # With Django's own handler, nobody closes a request whose exception reaches the server.
    assert finished == ([] if expected[0] is not ZeroDivisionError and expected[0] != "answered" else [True])
