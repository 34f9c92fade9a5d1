"""Promise 7: tools that patch Django's handler, wrap its response or look closely at it, and servers' own checks.

Sentry and OpenTelemetry patch Django for the rest of the process, so each of these tests runs a `child_...` function of
this module in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import io
import json
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, make_server
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest
from asgiref.sync import async_to_sync, markcoroutinefunction, sync_to_async
from django.conf import settings
from django.core.signals import request_finished
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from .support import call_here, eventually, here, serve, stock

ROOT = Path(__file__).parent.parent
HANDLERS = {"stock": stock, "wsgi-loop": serve}

both_handlers = pytest.mark.parametrize("handler", HANDLERS)
both_views = pytest.mark.parametrize("view", ["sync", "async"])


def in_child(function: Callable[..., Any], *args: str) -> Any:
    """Call a function of this module in a new process, where every warning is an error. Returns what it returns."""
    program = (
        "import json, sys\n"
        "import django\n"
        "django.setup()\n"
        f"from {__name__} import {function.__name__} as function\n"
        "print(json.dumps(function(*sys.argv[1:])))\n"
    )
    child = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    return json.loads(child.stdout)


def make_view(kind: str, function: Callable[[HttpRequest], Any]) -> Any:
    async def view(request: HttpRequest) -> Any:
        await asyncio.sleep(0)
        return function(request)

    return view if kind == "async" else function


# --- Sentry -----------------------------------------------------------------------------------------------------------


def record_events() -> list[tuple[str, Any]]:
    """Set Sentry up as a project's settings would. Returns the list of (message, tag) that events are put in."""
    import sentry_sdk
    from sentry_sdk.integrations.django import DjangoIntegration
    from sentry_sdk.transport import Transport

    events: list[tuple[str, Any]] = []

    class Recorder(Transport):
        def capture_envelope(self, envelope: Any) -> None:
            event = envelope.get_event()
            if event is not None:
                events.append((event["message"], event.get("tags", {}).get("set_in")))

    sentry_sdk.init(
        dsn="http://key@127.0.0.1:9/1",
        transport=Recorder,
        integrations=[DjangoIntegration()],
        auto_enabling_integrations=False,
    )
    return events


def child_tags(handler: str, view: str) -> Any:
    import sentry_sdk

    events = record_events()

    def body(request: HttpRequest) -> Iterator[str]:
        sentry_sdk.capture_message(f"body of {request.path}")
        yield "first"
        sentry_sdk.capture_message(f"body of {request.path}, later")

    def served(request: HttpRequest) -> StreamingHttpResponse:
        if request.path != "/untagged":
            sentry_sdk.set_tag("set_in", f"view of {request.path}")
        return StreamingHttpResponse(body(request))

    def receiver(**kwargs: Any) -> None:
        sentry_sdk.capture_message("request_finished")

    request_finished.connect(receiver)
    with HANDLERS[handler](make_view(view, served)) as server:
        for url in ("/1", "/2", "/untagged"):
            assert server.get(url) == b"first"
            sentry_sdk.capture_message(f"after {url}")
    return events


@both_views
@both_handlers
def test_a_sentry_tag_set_in_the_view_is_on_events_of_the_body_and_of_request_finished(handler: str, view: str) -> None:
    events = in_child(child_tags, handler, view)
    assert [tuple(event) for event in events] == [
        ("body of /1", "view of /1"),
        ("body of /1, later", "view of /1"),
        ("request_finished", "view of /1"),
        ("after /1", None),
        ("body of /2", "view of /2"),
        ("body of /2, later", "view of /2"),
        ("request_finished", "view of /2"),
        ("after /2", None),
        # Nothing comes over from an earlier request.
        ("body of /untagged", None),
        ("body of /untagged, later", None),
        ("request_finished", None),
        ("after /untagged", None),
    ]


def child_places() -> Any:
    record_events()
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    places: list[Any] = []
    values: list[Any] = []

    def look() -> None:
        places.append(call_here())
        values.append(variable.get("nothing"))

    def body() -> Iterator[str]:
        look()
        yield "first"
        look()

    def view(request: HttpRequest) -> StreamingHttpResponse:
        variable.set("the view's")
        look()
        return StreamingHttpResponse(body())

    def receiver(**kwargs: Any) -> None:
        look()

    request_finished.connect(receiver)
    with serve(view) as server:
        response = server.open()
        # Sentry's, in ours: with Django's response in hand, this would test nothing that other tests do not.
        assert not isinstance(response, HttpResponseBase)
        b"".join(response)
        response.close()
    eventually(places[0].loop.is_closed)
    return {"calls": len(places), "places": len(set(places)), "values": values}


def test_under_sentry_the_body_and_request_finished_are_still_part_of_the_request() -> None:
    assert in_child(child_places) == {"calls": 4, "places": 1, "values": ["the view's"] * 4}


def child_file_tags(handler: str) -> Any:
    import sentry_sdk

    events = record_events()

    def view(request: HttpRequest) -> FileResponse:
        sentry_sdk.set_tag("set_in", "view")
        return FileResponse(io.BytesIO(b"content"))

    def receiver(**kwargs: Any) -> None:
        sentry_sdk.capture_message("request_finished")

    request_finished.connect(receiver)
    with HANDLERS[handler](view) as server:
        assert server.get(**{"wsgi.file_wrapper": FileWrapper}) == b"content"
    return events


@both_handlers
def test_a_sentry_tag_is_on_the_event_of_request_finished_when_the_server_wraps_a_file(handler: str) -> None:
    assert in_child(child_file_tags, handler) == [["request_finished", "view"]]


# --- OpenTelemetry ----------------------------------------------------------------------------------------------------


def child_spans(handler: str, around: str, body: str) -> Any:
    """Return for each span the name of its parent, and how many traces there are.

    around: "django" instruments Django, "wsgi" wraps the application, "both" does both.
    """
    from opentelemetry.instrumentation.django import DjangoInstrumentor
    from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("tests")
    instrumented: list[Any] = []
    if around in ("django", "both"):
        DjangoInstrumentor().instrument(tracer_provider=provider)
        instrumented = settings.MIDDLEWARE

    async def work(name: str) -> None:
        with tracer.start_as_current_span(name):
            await asyncio.sleep(0)

    def sync_body() -> Iterator[str]:
        with tracer.start_as_current_span("body"):
            async_to_sync(work)("below body")
            yield "first"

    def middleware(get_response: Any) -> Any:
        async def call(request: HttpRequest) -> Any:
            with tracer.start_as_current_span("middleware"):
                return await get_response(request)

        return markcoroutinefunction(call)

    middleware.async_capable = True  # type: ignore[attr-defined]
    middleware.sync_capable = False  # type: ignore[attr-defined]

    async def view(request: HttpRequest) -> Any:
        await work("view")
        await sync_to_async(async_to_sync(work))("nested")
        return StreamingHttpResponse(sync_body()) if body == "streamed" else HttpResponse("first")

    async def receiver(**kwargs: Any) -> None:
        await work("request_finished")

    request_finished.connect(receiver)
    with HANDLERS[handler](view, middleware=[*instrumented, middleware]) as server:
        if around in ("wsgi", "both"):
            server.handler = OpenTelemetryMiddleware(server.handler, tracer_provider=provider)
        for _ in range(2):
            assert server.get() == b"first"
    spans = exporter.get_finished_spans()
    names = {span.context.span_id: span.name for span in spans}
    parents = sorted({(span.name, names[span.parent.span_id] if span.parent else "") for span in spans})
    return {"parents": dict(parents), "pairs": len(parents), "names": len({span.name for span in spans})}


@pytest.mark.parametrize(("around", "request_span"), [("django", "GET ^"), ("wsgi", "GET /"), ("both", "GET ^")])
@pytest.mark.parametrize("body", ["plain", "streamed"])
def test_opentelemetry_finds_the_parents_that_it_finds_with_stock_or_better_ones(
    around: str, request_span: str, body: str
) -> None:
    stocks, ours = (in_child(child_spans, handler, around, body) for handler in ("stock", "wsgi-loop"))
    # The same in both of the two requests.
    assert ours["pairs"] == ours["names"] == stocks["names"]
    parents = ours["parents"]
    assert parents["middleware"] == request_span
    assert parents["view"] == parents["nested"] == "middleware"
    if body == "streamed":
        assert parents["below body"] == "body"
    for name, parent in stocks["parents"].items():
        # Where stock has none, for Django's span is over before the body is, the server's span is better.
        assert parents[name] == parent or (parent == "" and parents[name] == "GET /"), name


def test_opentelemetrys_server_span_is_the_parent_of_body_and_request_finished() -> None:
    parents = in_child(child_spans, "wsgi-loop", "both", "streamed")["parents"]
    assert (parents["body"], parents["request_finished"]) == ("GET /", "GET /")


# --- wsgiref ----------------------------------------------------------------------------------------------------------

CONTENT = b"content " * 10_000


async def async_view(request: HttpRequest) -> HttpResponse:
    await here()
    return HttpResponse(CONTENT)


def streaming_view(request: HttpRequest) -> StreamingHttpResponse:
    def body() -> Iterator[bytes]:
        for start in range(0, len(CONTENT), 8_000):
            call_here()
            yield CONTENT[start : start + 8_000]

    return StreamingHttpResponse(body())


def file_view(request: HttpRequest) -> FileResponse:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the response closes it
    file.write(CONTENT)
    file.seek(0)
    return FileResponse(file)


def reading_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.body)


VIEWS = {
    "plain": lambda request: HttpResponse(CONTENT),
    "async": async_view,
    "streaming": streaming_view,
    "file": file_view,
    "reading": reading_view,
}


@pytest.fixture
def fetch() -> Iterator[Callable[..., Any]]:
    """Return a function that has a real wsgiref server serve one request, and returns (status, body, errors)."""
    threads: list[threading.Thread] = []

    def serve_one(application: Any, data: bytes | None = None, *, file_wrapper: Any = FileWrapper) -> Any:
        errors = io.StringIO()

        class Handler(WSGIRequestHandler):
            timeout = 30

            def handle(self) -> None:
                # As the inherited method does it, which leaves no choice of the class.
                self.raw_requestline = self.rfile.readline(65537)
                assert self.parse_request()
                handler = ServerHandler(self.rfile, self.wfile, errors, self.get_environ(), multithread=False)
                handler.wsgi_file_wrapper = file_wrapper
                handler.request_handler = self  # type: ignore[attr-defined]
                handler.run(application)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        with make_server("127.0.0.1", 0, application, handler_class=Handler) as server:
            server.timeout = 30
            thread = threading.Thread(target=server.handle_request)
            threads.append(thread)
            thread.start()
            url = f"http://127.0.0.1:{server.server_port}/"
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                with opener.open(url, data, timeout=30) as response:
                    answer = response.status, response.read()
            except urllib.error.HTTPError as exc:
                with exc:
                    answer = exc.code, exc.read()
            thread.join(30)
            return (*answer, errors.getvalue())

    yield serve_one
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("file_wrapper", [FileWrapper, None], ids=["file_wrapper", "no file_wrapper"])
@pytest.mark.parametrize("name", VIEWS)
def test_wsgirefs_validator_finds_nothing_wrong(
    fetch: Callable[..., Any], receive: Callable[..., None], name: str, file_wrapper: Any
) -> None:
    places: list[Any] = []
    receive(started=lambda **kwargs: places.append(call_here()), finished=lambda **kwargs: places.append(call_here()))
    with serve(VIEWS[name], DEBUG_PROPAGATE_EXCEPTIONS=True) as server:
        data = CONTENT if name == "reading" else None
        status, body, errors = fetch(validator(server.handler), data, file_wrapper=file_wrapper)
    assert (status, body == CONTENT, errors) == (200, True, "")
    # It tells of a body that was not closed when it is collected, on stderr and by an error there.
    gc.collect()
    started, finished = places
    assert started == finished
    eventually(started.loop.is_closed)


def test_a_file_reaches_wsgiref_in_its_own_file_wrapper(
    fetch: Callable[..., Any], receive: Callable[..., None]
) -> None:
    seen: list[type] = []
    places: list[Any] = []
    receive(started=lambda **kwargs: places.append(call_here()), finished=lambda **kwargs: places.append(call_here()))
    with serve(file_view) as server:

        def application(environ: Any, start_response: Any) -> Any:
            response = server.handler(environ, start_response)
            seen.append(type(response))
            return response

        status, body, errors = fetch(application)
    assert (status, body == CONTENT, errors) == (200, True, "")
    assert seen == [FileWrapper]
    started, finished = places
    assert started == finished
    eventually(started.loop.is_closed)


def test_the_validator_sees_what_is_wrong(fetch: Callable[..., Any]) -> None:
    # If errors got lost on their way here, the tests above could not fail.
    def application(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [CONTENT.decode()]

    status, _, errors = fetch(validator(application))
    assert status == 500
    assert "AssertionError" in errors
