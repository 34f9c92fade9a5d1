"""Who is measured: ways to run Django's async code, each as an application made in this process. Knows no workload.

Nothing of Django is imported before an application is made, as the settings look here.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to serve.

    interface: of the application that `make` returns: "wsgi", "asgi", or "call" for what serves no request but is
    called with no argument. keeps_clients: whether a client that is kept in a module works in every request.
    runs_asgi: whether Django's `ASGIHandler` is what serves. needs: a package beyond those that are always there.
    """

    name: str
    title: str
    make: Callable[[], Callable[..., Any]]
    interface: str = "wsgi"
    keeps_clients: bool = False
    runs_asgi: bool = False
    needs: str = ""


def _stock() -> Callable[..., Any]:
    from django.core.wsgi import get_wsgi_application

    return get_wsgi_application()


def _wsgi_loop(**options: Any) -> Callable[..., Any]:
    from wsgi_loop import get_wsgi_application

    return get_wsgi_application(**options)


def _asgi() -> Callable[..., Any]:
    from django.core.asgi import get_asgi_application

    return get_asgi_application()


def _a2wsgi() -> Callable[..., Any]:
    from a2wsgi import ASGIMiddleware

    return ASGIMiddleware(_asgi())


class _SharedLoop:
    """Stands in for the executor of an `AsyncSingleThreadContext`, on which asgiref has `asyncio.run` run each call.

    Runs them all on one loop, which runs on between them: asgiref remembers it, and would wait for ever for one that
    stands still.
    """

    _thread: threading.Thread | None = None

    def submit(self, run: object, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        if self._thread is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def shutdown(self) -> None:
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


def _in_context(shares_loop: bool) -> Callable[..., Any]:
    """Django's handler inside asgiref's `AsyncSingleThreadContext`, until the response has been closed.

    The ticket's first patch; with `shares_loop` its second idea, one loop in that context.
    """
    from asgiref.sync import AsyncSingleThreadContext, AsyncToSync

    application = _stock()
    # asgiref has no types for it.
    make: Any = AsyncSingleThreadContext

    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        context = make()
        context.__enter__()
        if shares_loop:
            AsyncToSync.context_to_thread_executor[context] = _SharedLoop()  # type: ignore[assignment]
        try:
            response = application(environ, start_response)
        except BaseException:
            context.__exit__(None, None, None)
            raise
        close = response.close

        def close_both() -> None:
            try:
                close()
            finally:
                context.__exit__(None, None, None)

        response.close = close_both
        return response

    return serve


def _floor() -> Callable[[], None]:
    """One call to a loop that is running and idle on another thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def nothing() -> None:
        pass

    return lambda: asyncio.run_coroutine_threadsafe(nothing(), loop).result()


_UVLOOP = "uvloop.new_event_loop"


def _ours(name: str, title: str, keeps_clients: bool = False, **options: str) -> tuple[Contender, Contender]:
    """The contender, and the same on uvloop."""
    make = functools.partial(_wsgi_loop, **options)
    on_uvloop = functools.partial(make, loop_factory=_UVLOOP)
    return (
        Contender(name, title, make, keeps_clients=keeps_clients),
        Contender(f"{name}_uvloop", f"{title}, uvloop", on_uvloop, keeps_clients=keeps_clients, needs="uvloop"),
    )


_ALL = (
    Contender("stock", "Django's WSGIHandler", _stock),
    Contender("single_thread_context", "… in an AsyncSingleThreadContext", functools.partial(_in_context, False)),
    Contender("shared_loop", "… with one loop in the context", functools.partial(_in_context, True)),
    *_ours("request", "wsgi-loop, request", scope="request"),
    *_ours("process", "wsgi-loop, process", keeps_clients=True, scope="process"),
    Contender("a2wsgi", "a2wsgi over ASGIHandler", _a2wsgi, keeps_clients=True, runs_asgi=True, needs="a2wsgi"),
    Contender("asgi", "Django's ASGIHandler", _asgi, interface="asgi", keeps_clients=True, runs_asgi=True),
    Contender("floor", "one call to an idle loop", _floor, interface="call"),
)
CONTENDERS: dict[str, Contender] = {contender.name: contender for contender in _ALL}


def missing(contender: Contender) -> str:
    """Say what is not there that the contender needs; "" if it can serve."""
    if contender.needs and importlib.util.find_spec(contender.needs) is None:
        return f"{contender.needs} is not installed: pip install {contender.needs}"
    return ""
