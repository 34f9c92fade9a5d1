"""The panel for django-debug-toolbar: it shows the loop calls of its own request, and records no longer than that."""

from __future__ import annotations

import asyncio
import gc
import html
import json
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import AsyncToSync, async_to_sync
from django.core.checks.registry import registry
from django.core.handlers.wsgi import WSGIHandler as DjangoHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import include, path
from django.utils.decorators import async_only_middleware

import wsgi_loop
from wsgi_loop.bridge import watching

from .support import Server, here, in_thread, serve

ROOT = Path(__file__).parents[1]
PAGE = "<!doctype html><html><body>{}</body></html>"
TOOLBAR = "debug_toolbar.middleware.DebugToolbarMiddleware"
PANEL = "wsgi_loop.panel.LoopPanel"


@pytest.fixture(autouse=True)
def _toolbar(settings: Any) -> Iterator[None]:
    """The toolbar is installed, with this panel alone."""
    checks = registry.registered_checks.copy()
    # First: where another test has imported a part of the toolbar, to change the others imports its models.
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "django.contrib.staticfiles", "debug_toolbar"]
    settings.DEBUG_TOOLBAR_PANELS = [PANEL]
    settings.DEBUG_TOOLBAR_CONFIG = {"SHOW_TOOLBAR_CALLBACK": "tests.test_panel.always", "IS_RUNNING_TESTS": False}
    call, main_wrap = AsyncToSync.__call__, AsyncToSync.main_wrap
    yield
    # The toolbar's own checks fail where it is not installed.
    registry.registered_checks = checks
    assert watching.watchers == (), "the panel still records"
    assert (AsyncToSync.__call__, AsyncToSync.main_wrap) == (call, main_wrap)


def always(request: HttpRequest) -> bool:
    return True


@contextmanager
def served(views: Any, *, middleware: Any = (TOOLBAR,), handler: Any = wsgi_loop.WSGIHandler) -> Iterator[Server]:
    serving = serve(views, middleware=middleware, handler=handler)
    urls: Any = sys.modules["tests.served"]
    urls.urlpatterns.insert(0, path("__debug__/", include("debug_toolbar.urls")))
    with serving as server:
        yield server


def panel_of(server: Server, url: str = "/", **extra: Any) -> str:
    """The panel of a new request to `url`, as the browser gets it: without tags, in one line."""
    return text_of(markup_of(server, url, **extra))


def text_of(markup: str) -> str:
    return html.unescape(" ".join(re.sub(r"<[^>]+>", " ", markup).split()))


def markup_of(server: Server, url: str = "/", **extra: Any) -> str:
    return panel_in(server, server.get(url, **extra).decode())


def panel_in(server: Server, page: str) -> str:
    (request_id,) = re.findall(r'data-request-id="(\w+)"', page)
    query = f"request_id={request_id}&panel_id=LoopPanel"
    content: str = json.loads(server.get("/__debug__/render_panel/", QUERY_STRING=query))["content"]
    return content


def three_calls(request: HttpRequest) -> HttpResponse:
    for _ in range(3):
        async_to_sync(here)()
    return HttpResponse(PAGE.format("three"))


def test_each_loop_call_with_its_place(receive: Any) -> None:
    async def finished(**kwargs: Any) -> None:
        """Comes after the page."""

    receive(finished=finished)
    with served(three_calls) as server:
        page = server.get().decode()
        markup = panel_in(server, page)
    text = text_of(markup)
    assert "3 calls on 1 loop so far" in text_of(page)
    for words in ("4 loop calls", "1 event loop", "1 thread", "0 left-over tasks", "ms waited on the loop"):
        assert words in text
    assert len(re.findall(r"here tests/test_panel\.py:\d+ in three_calls MainThread, task 1", text)) == 3
    assert "asend" in text
    assert markup.count("<circle") == 4
    assert markup.count("<line") == 1
    assert "wl-alarm" not in markup
    assert "had not been closed" not in text


def test_djangos_own_handler_is_told_apart() -> None:
    with served(three_calls, handler=DjangoHandler) as server:
        markup = markup_of(server)
    text = text_of(markup)
    assert "3 event loops" in text
    assert "is this request served by wsgi_loop.WSGIHandler" in text
    assert markup.count("<line") == 3
    assert "wl-alarm" in markup
    # asyncio.run has ended them, and nobody knows what they were.
    assert "left-over" not in text


def test_left_over_tasks_are_named(caplog: Any) -> None:
    kept = set()

    async def forget() -> None:
        kept.add(asyncio.create_task(asyncio.sleep(60), name="forgotten <task>"))

    def view(request: HttpRequest) -> HttpResponse:
        async_to_sync(forget)()
        return HttpResponse(PAGE.format(""))

    with served(view) as server:
        text = panel_of(server)
    assert "1 left-over task" in text
    assert "forgotten <task> (sleep)" in text
    assert "create_background_task" in text


def test_a_request_without_loop_calls(no_gc: None) -> None:
    with served(lambda request: HttpResponse(PAGE.format("sync"))) as server:
        page = server.get().decode()
        assert "no loop call" in text_of(page)
        assert "made no loop call" in text_of(panel_in(server, page))


def test_requests_at_the_same_time_are_kept_apart() -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(request: HttpRequest) -> HttpResponse:
        async_to_sync(here)()
        inside.set()
        assert go_on.wait(30)
        return HttpResponse(PAGE.format(""))

    with served({"slow/": slow, "": three_calls}) as server:
        texts: list[str] = []
        other = Server(server.handler)
        thread = threading.Thread(target=lambda: texts.append(panel_of(other, "/slow/")))
        thread.start()
        assert inside.wait(30)
        text = panel_of(server)
        go_on.set()
        thread.join(30)
    assert "3 loop calls" in text
    assert "1 loop call 1 event loop" in texts[0]


def test_a_toolbar_in_async_middleware() -> None:
    @async_only_middleware
    def outer(get_response: Any) -> Any:
        async def call(request: HttpRequest) -> Any:
            return await get_response(request)

        return call

    with served(three_calls, middleware=[outer, TOOLBAR, outer]) as server:
        markup = markup_of(server)
    text = text_of(markup)
    assert "4 loop calls 1 event loop" in text
    assert "middleware and view" in text
    # What was called inside is indented.
    assert re.findall(r'<li class="wl-d(\d)">', markup) == ["0", "1", "1", "1"]


def test_many_loops_are_folded() -> None:
    def view(request: HttpRequest) -> HttpResponse:
        for _ in range(15):
            async_to_sync(here)()
        return HttpResponse(PAGE.format(""))

    with served(view, handler=DjangoHandler) as server:
        markup = markup_of(server)
    assert "15 event loops" in text_of(markup)
    assert markup.count("<line") == 12
    assert "stands for the 3 event loops that follow" in text_of(markup)


def test_a_disabled_panel_records_nothing() -> None:
    seen = []

    def view(request: HttpRequest) -> HttpResponse:
        seen.append(watching.watchers)
        return three_calls(request)

    with served(view) as server:
        server.get(HTTP_COOKIE="djdtLoopPanel=off")
        server.get()
    assert seen[0] == ()
    assert len(seen[1]) == 1


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_view_that_fails_ends_the_recording(error: Any, settings: Any) -> None:
    settings.DEBUG_PROPAGATE_EXCEPTIONS = True

    def view(request: HttpRequest) -> HttpResponse:
        raise error("no page")

    with served(view) as server, pytest.raises(error):
        server.get()
    assert watching.watchers == ()


def test_a_response_that_is_dropped_ends_the_recording() -> None:
    def drop(server: Server) -> None:
        server.open()

    with served(lambda request: HttpResponse(PAGE.format(""))) as server:
        in_thread(lambda: drop(server))
    gc.collect()
    assert watching.watchers == ()


def test_the_app_has_to_be_installed(settings: Any) -> None:
    # The toolbar asks its panels.
    from debug_toolbar.apps import check_panel_configs

    assert check_panel_configs(None) == []
    settings.INSTALLED_APPS = [app for app in settings.INSTALLED_APPS if app != "wsgi_loop"]
    (error,) = check_panel_configs(None)
    assert error.id == "wsgi_loop.E004"
    assert "INSTALLED_APPS" in error.hint


def test_it_costs_nothing_where_it_is_not_used() -> None:
    code = (
        "import sys, django; django.setup()\n"
        "from django.core.management import call_command; call_command('check')\n"
        "import wsgi_loop.wsgi\n"
        "assert not {'debug_toolbar', 'wsgi_loop.tools.panel', 'wsgi_loop.tools.report'} & set(sys.modules)"
    )
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_an_open_stream_keeps_nothing_of_later_requests() -> None:
    class Kept:
        """A dict can not be referred to weakly."""

    kept: list[weakref.ref[Kept]] = []

    async def chunks() -> AsyncIterator[str]:
        yield "first"
        yield "last"

    async def stream(request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(chunks())

    async def view(request: HttpRequest) -> HttpResponse:
        request.META["kept"] = found = Kept()
        kept.append(weakref.ref(found))
        return HttpResponse(PAGE.format(""))

    with served({"stream": stream, "": view}) as server:
        response = server.open("/stream")
        try:
            assert next(iter(response)).startswith(b"first")
            ((calls, _),) = watching.watchers
            before = len(calls)
            for _ in range(3):
                server.get()
            gc.collect()
            assert len(kept) == 3
            assert [reference() for reference in kept] == [None, None, None]
            assert len(calls) == before
        finally:
            response.close()
