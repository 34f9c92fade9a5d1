"""Django's WSGI handler, with one context, one event loop and one task for each request.

Knows Django's handlers. Opens and closes a request's scope, and leaves asyncio and threads to the scope.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import FrameType
from typing import IO, Any, Unpack, cast

import django
from django.conf import settings
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.wsgi import LimitedStream
from django.core.handlers.wsgi import WSGIHandler as DjangoHandler
from django.core.signals import setting_changed
from django.dispatch import receiver
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.urls import get_script_prefix, get_urlconf, set_script_prefix, set_urlconf

from . import forks, process
from .bridge.storage import keep_on_thread, scope_here, threadlocal
from .conf import GivenOptions, get_options
from .responses import ScopedIterable, serve_in
from .scope import RequestScope, ThreadState
from .threads import check_threads

#: Where there are backends of tasks: Django's own, from Django 6.0 on, and those of the package that it has them from.
_TASKS = ("django.tasks", "django_tasks")
with contextlib.suppress(ImportError):
    importlib.import_module(_TASKS[0])

#: How many bytes of a body are read at a time.
_CHUNK = 65536
#: The code of what has the request as its local variable `request`, once there is one.
entries = {DjangoHandler.__call__.__code__}
#: Set in a server thread's own context to what asgiref keeps on that thread, and on no other: from Python 3.14 on, a
#: thread may inherit the context of its starter.
_prepared: ContextVar[ThreadState | None] = ContextVar("wsgi_loop.prepared", default=None)


def get_wsgi_application(**options: Unpack[GivenOptions]) -> WSGIHandler:
    """Set Django up and return a WSGI application that serves each request on one event loop.

    In place of `django.core.wsgi.get_wsgi_application` in a project's `wsgi.py`. The options are the keys of the
    `WSGI_LOOP` setting, over which they win: `get_wsgi_application(shutdown_timeout=10)`.

    Raises ImproperlyConfigured for an option that is not accepted, and under gevent and eventlet.
    """
    django.setup(set_prefix=False)
    return WSGIHandler(**options)


class WSGIHandler(DjangoHandler):
    """Serves each request in a scope of its own: see `RequestScope`. Takes the options of `get_wsgi_application`."""

    def __init__(self, **options: Unpack[GivenOptions]) -> None:
        try:
            check_threads()
        except RuntimeError as exc:
            raise ImproperlyConfigured(str(exc)) from None
        self._options = process.application_options = get_options(**options)
        super().__init__()

    # Django's methods are called by name: super() would cost a request 2,000 instructions more on Python 3.11. The name
    # is bound here: who sets Django's own to this class, so that LiveServerThread takes it, would have it call itself.

    def __call__(  # type: ignore[override]
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        thread = threadlocal.__dict__
        if _prepared.get() is not thread:
            prepare(thread)
        scope = HTTPScope()
        scope.home = thread
        scope.options = self._options
        scope.subject = environ
        scope.calls = None
        try:
            response: Any = scope.start(DjangoHandler.__call__, self, environ, start_response)
        except BaseException:
            scope.close()
            raise
        if isinstance(response, HttpResponseBase):
            return serve_in(response, scope)
        if scope.serves_file and _is_made_by(environ["wsgi.file_wrapper"], response):
            # As it is, for servers look for their own: its close() is the response's.
            return response  # type: ignore[no-any-return]
        return ScopedIterable(scope, response)

    def get_response(self, request: HttpRequest) -> HttpResponseBase:
        response: HttpResponseBase = DjangoHandler.get_response(self, request)
        if response.streaming:
            scope = scope_here()
            # Of this very request: a view may make another one, and call this for it.
            if isinstance(scope, HTTPScope) and scope.subject is request.META:
                if getattr(response, "is_async", False):
                    # Before a tool that wraps the response could have Django read it to its end.
                    return serve_in(response, scope)
                if getattr(response, "file_to_stream", None) is not None and "wsgi.file_wrapper" in request.META:
                    # Before Django gives the response's close() to the file.
                    scope.serves_file = True
                    return serve_in(response, scope)
        return response


class HTTPScope(RequestScope):
    """The scope of an HTTP request. subject: its WSGI environ."""

    #: The server gets a file wrapper in place of the response.
    serves_file = False
    #: The request's body, once it was read before the process loop came to it.
    _body: IO[bytes] | None = None

    @property
    def owner(self) -> str:
        return f"{self.subject.get('REQUEST_METHOD', '')} {self.subject.get('PATH_INFO', '')!r}"

    def per_thread(self) -> list[Any]:
        return _per_thread()

    def begin_on_process_loop(self) -> None:
        """Read the request's body, if there is one, as Django does under ASGI.

        To read from a client that is slow to send would hold up the loop, and so all other requests.
        """
        environ = self.subject
        try:
            length = int(environ.get("CONTENT_LENGTH") or 0)
        except ValueError:
            return
        frame = _entry_frame() if length > 0 and self._body is None else None
        if frame is None:
            # The response is being sent, or this is another thread: the request could not be told of what is read.
            return
        # There is none yet when a receiver of request_started makes the call.
        request = frame.f_locals.get("request")
        source = LimitedStream(environ["wsgi.input"], length) if request is None else request._stream
        body = tempfile.SpooledTemporaryFile(  # noqa: SIM115 - `close` closes it
            max_size=settings.FILE_UPLOAD_MAX_MEMORY_SIZE or 1, mode="w+b", dir=settings.FILE_UPLOAD_TEMP_DIR
        )
        self._body = cast(IO[bytes], body)
        stream: Any = body
        try:
            while chunk := source.read(_CHUNK):
                body.write(chunk)
            length = body.tell()
            body.seek(0)
        except OSError as exc:
            # As it would be for whoever reads it.
            stream = _Unreadable(exc)
        environ["wsgi.input"] = stream
        if request is not None:
            request._stream = LimitedStream(stream, length)

    def close(self) -> None:
        super().close()
        if self._body is not None:
            self._body.close()


class _Unreadable:
    """Stands in for a body whose client has gone away."""

    def __init__(self, exc: OSError) -> None:
        self._exc = exc

    def read(self, size: int = -1) -> bytes:
        raise self._exc

    readline = read


def _entry_frame() -> FrameType | None:
    """Return the frame of the function that makes the request, if this thread is inside it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code not in entries:
        frame = frame.f_back
    return frame


def _is_made_by(file_wrapper: Any, iterable: object) -> bool:
    # uWSGI's is a function, and what it returns is not known; a tool that wraps that is the lesser evil.
    return isinstance(iterable, file_wrapper) if isinstance(file_wrapper, type) else True


def _per_thread() -> list[Any]:
    """Return the `Local`s in which Django keeps what belongs to a thread."""
    handlers = [caches, *(sys.modules[name].task_backends for name in _TASKS if name in sys.modules)]
    return [handler._connections for handler in handlers]


def prepare(thread: ThreadState) -> None:
    """Put into this thread's own context, of which each request gets a copy, what all of its requests share.

    Cache connections and task backends, as with Django's handler. The rest spares them work only. Does nothing where
    that is done. thread: what asgiref keeps on this thread.
    """
    if _prepared.get() is thread:
        return
    # Here, as each thread comes by once in its process: for uWSGI, which does not tell Python of its forks.
    forks.check()
    keep_on_thread(_per_thread())
    _prepared.set(thread)
    if sys.version_info >= (3, 12):
        # Django looks for each cache at the end of each request, and from Python 3.12 on not to find it costs 8,000
        # instructions more than to find it. They connect only when they are used.
        for alias in caches:
            with contextlib.suppress(Exception):  # then the request that asks for it is told
                caches[alias]
    # Each request sets these two, which takes 2,000 instructions less where they have been set before.
    set_script_prefix(get_script_prefix())
    urlconf = get_urlconf()
    set_urlconf(settings.ROOT_URLCONF)
    set_urlconf(urlconf)


@receiver(setting_changed)
def _forget_what_was_prepared(*, setting: str, **kwargs: Any) -> None:
    """Django has replaced the connections of CACHES or TASKS, as it does in tests."""
    global _prepared
    if setting in ("CACHES", "TASKS"):
        _prepared = ContextVar("wsgi_loop.prepared", default=None)
