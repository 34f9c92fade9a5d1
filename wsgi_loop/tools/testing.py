"""For tests: Django's test client and live server, serving each request as in production, and a recorder of loop calls.

Knows Django's test client and live server. What is not said here is as Django has it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
import weakref
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent import futures
from typing import Any, TypeVar

from asgiref.sync import async_to_sync
from django.contrib.staticfiles import testing as staticfiles_testing
from django.core.handlers.wsgi import WSGIRequest
from django.core.signals import request_finished, request_started
from django.db import close_old_connections
from django.dispatch import Signal
from django.http import HttpRequest
from django.test import client, testcases

from .. import background, process
from ..bridge.storage import threadlocal
from ..calls import END
from ..conf import Options, get_options
from ..handler import HTTPScope, WSGIHandler, entries, prepare
from ..responses import ScopedIterator, serve_in
from ..scope import RequestCalls
from .recording import LoopCallRecord, LoopCalls, record_loop_calls

__all__ = [
    "Client",
    "ClientHandler",
    "ClientHandlerMixin",
    "ClientMixin",
    "LiveServerTestCase",
    "LiveServerThread",
    "LoopCallRecord",
    "LoopCalls",
    "StaticLiveServerTestCase",
    "inline_background_tasks",
    "record_loop_calls",
    "serve_client",
    "wait_for_background_tasks",
]

C = TypeVar("C", bound=client.Client)


@contextlib.contextmanager
def _connections_stay_open(signal: Signal) -> Iterator[None]:
    """The request runs in the test's own connection, and in its transaction."""
    connected = signal.disconnect(close_old_connections)
    try:
        yield
    finally:
        if connected:
            signal.connect(close_old_connections)


class _ClientScope(HTTPScope):
    """Closes the response when its async body has been read, as no server does it here."""

    #: Weak: a test that reads no body and closes nothing is to free it, and the loop, by letting go of it.
    response: weakref.ref[Any]

    def advance(self, iterator: AsyncIterator[Any]) -> Any:
        try:
            chunk = super().advance(iterator)
        except BaseException:
            self.close_response()
            raise
        if chunk is END:
            self.close_response()
        return chunk

    def close_response(self) -> None:
        response = self.response()
        if response is not None and not response.closed:
            with _connections_stay_open(request_finished):
                try:
                    self.run(self._end_background_tasks)
                finally:
                    response.close()

    def _end_background_tasks(self) -> None:
        """Let the background tasks of the request's async code come to their end, and raise what they raise."""
        while tasks := self.options.inline_tasks:
            batch = tasks.copy()
            tasks.clear()
            async_to_sync(_gather)(batch)

    def get_calls(self) -> RequestCalls:
        calls = super().get_calls()
        # Django's test client never closes a response whose body was not read, and tells nobody: nor is this told.
        calls.tells_of_drop = False
        return calls


async def _gather(tasks: list[asyncio.Task[Any]]) -> None:
    await asyncio.wait(tasks)
    for task in tasks:
        task.result()


@contextlib.contextmanager
def inline_background_tasks() -> Iterator[None]:
    """Run what `create_background_task` is given to its end, on the thread that calls it, before it returns.

    For tests whose database is rolled back, around what starts background tasks outside of a request, such as
    `captureOnCommitCallbacks(execute=True)`. Requests of `Client` need no such thing. What a task raises is raised by
    the call. Raises RuntimeError for a task that async code outside of such a request starts.
    """
    background.inline += 1
    try:
        yield
    finally:
        background.inline -= 1


def wait_for_background_tasks(timeout: float = 30) -> None:
    """Wait until no background task is in flight in this process: for live servers, and `TransactionTestCase`.

    What a task raises is logged, as ever. Raises TimeoutError, which names what still runs after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while (running := process._loop) is not None and (tasks := dict(running._background)):
        futures.wait(tasks, max(deadline - time.monotonic(), 0), futures.FIRST_COMPLETED)
        if time.monotonic() >= deadline:
            raise TimeoutError(f"After {timeout} s these were still running: {', '.join(sorted(tasks.values()))}")


def _bytes(steps: Iterator[Any], response: weakref.ref[Any]) -> Iterator[Any]:
    """Make what a lazy string is, such as a translation, inside the request."""
    for chunk in steps:
        found = response()
        yield chunk if found is None else found.make_bytes(chunk)
        del found


def _closing(steps: Iterator[Any], scope: _ClientScope) -> Generator[Any, None, None]:
    try:
        yield from steps
    finally:
        scope.close_response()


class ClientHandlerMixin:
    """Makes the handler of a test client serve each request in a scope of its own, as `wsgi_loop.WSGIHandler` does.

    It takes the place of Django's `ClientHandler.__call__`. The `WSGI_LOOP` setting is read at the first request. A
    response has the context of its request as `request_context`, in whose `run` a test evaluates what depends on that.
    """

    _options: Options | None = None

    def __call__(self: Any, environ: dict[str, Any]) -> Any:
        if self._middleware_chain is None:
            self.load_middleware()
        if self._options is None:
            self._options = get_options()
        thread = threadlocal.__dict__
        prepare(thread)
        scope = _ClientScope()
        scope.home = thread
        # What its async code starts is to be found in its options, from wherever that runs.
        scope.options = dataclasses.replace(self._options, inline_tasks=[])
        scope.subject = environ
        scope.calls = None
        try:
            response = scope.start(ClientHandlerMixin._respond, self, environ, scope)
        except BaseException:
            scope.close()
            raise
        if not response.streaming:
            scope.close_response()
        return response

    def _respond(self: Any, environ: dict[str, Any], scope: _ClientScope) -> Any:
        with _connections_stay_open(request_started):
            request_started.send(sender=self.__class__, environ=environ)
        request: HttpRequest = WSGIRequest(environ)
        # What CsrfViewMiddleware looks at.
        request._dont_enforce_csrf_checks = not self.enforce_csrf_checks  # type: ignore[attr-defined]
        response = self.get_response(request)
        client.conditional_content_removal(request, response)
        response.wsgi_request = request
        response.request_context = scope._context
        response = serve_in(response, scope)
        scope.response = weakref.ref(response)
        if response.streaming and not response.is_async:
            # Tests read its streaming_content, where a server iterates over the response.
            steps = ScopedIterator(scope, _bytes(response._iterator, scope.response))
            response._iterator = _closing(steps, scope)
        return response


entries.add(ClientHandlerMixin._respond.__code__)


class ClientHandler(ClientHandlerMixin, client.ClientHandler):
    """Django's `ClientHandler`, serving each request on one event loop."""


@functools.cache
def _on_one_loop(handler_class: Any) -> Any:
    return type(handler_class.__name__, (ClientHandlerMixin, handler_class), {"__module__": handler_class.__module__})


def serve_client(client: C) -> C:
    """Make this very client serve its requests on one event loop each, from now on. Returns the client."""
    handler: Any = client.handler
    if not isinstance(handler, ClientHandlerMixin):
        handler.__class__ = _on_one_loop(type(handler))  # type: ignore[arg-type]
    return client


class ClientMixin:
    """Makes a test client serve its requests on one event loop each: `class Client(ClientMixin, APIClient): ...`"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        serve_client(self)  # type: ignore[type-var]


class Client(ClientMixin, client.Client):
    """Django's test client, serving each request on one event loop. For a test case: `client_class = Client`."""


class LiveServerThread(testcases.LiveServerThread):
    """Django's live server, with `wsgi_loop.WSGIHandler`."""

    def __init__(self, host: str, static_handler: Any, *args: Any, **kwargs: Any) -> None:
        def serve_ours(media_handler: Any) -> Any:
            # Django builds its own WSGIHandler by name; and without a MEDIA_URL, its handler of media serves all paths.
            media_handler.application = handler = WSGIHandler()
            return static_handler(handler if media_handler.base_url.path == "/" else media_handler)

        super().__init__(host, serve_ours, *args, **kwargs)  # type: ignore[arg-type]


class LiveServerTestCase(testcases.LiveServerTestCase):
    """Django's, with `LiveServerThread` and `Client`."""

    server_thread_class = LiveServerThread
    client_class = Client


class StaticLiveServerTestCase(staticfiles_testing.StaticLiveServerTestCase):
    """Django's, which serves static files without `collectstatic`, with `LiveServerThread` and `Client`."""

    server_thread_class = LiveServerThread
    client_class = Client
