"""Serve a view through a handler in this process, as a WSGI server would; and look at what is left over."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from asgiref.sync import async_to_sync, sync_to_async
from django.core.handlers.wsgi import WSGIHandler as DjangoHandler
from django.test import override_settings
from django.urls import path, re_path

import wsgi_loop


class Place(NamedTuple):
    """Where async code runs. Loops and tasks are kept, so that a new one can not have an old one's id."""

    loop: asyncio.AbstractEventLoop
    thread: int
    task: asyncio.Task[Any] | None


async def here() -> Place:
    return Place(asyncio.get_running_loop(), threading.get_ident(), asyncio.current_task())


def call_here() -> Place:
    return async_to_sync(here)()


async def call_here_nested() -> Place:
    return await sync_to_async(call_here)()


def environ(url: str = "/", **extra: Any) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": url,
        "QUERY_STRING": "",
        "SERVER_NAME": "testserver",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "testserver",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **extra,
    }


@dataclass
class Server:
    """A WSGI server of one thread: whichever calls it."""

    handler: Any
    status: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)

    def open(self, url: str = "/", **extra: Any) -> Any:
        return self.handler(environ(url, **extra), self.start_response)

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[..., Any]:
        self.status, self.headers = status, headers
        return lambda data: None

    def get(self, url: str = "/", **extra: Any) -> bytes:
        response = self.open(url, **extra)
        try:
            return b"".join(response)
        finally:
            response.close()


#: Options of the handler in tests that give none.
default_options: dict[str, Any] = {}


class serve(override_settings):
    """Serve `view` at every URL, with `middleware` around it; a context manager that gives a `Server`.

    handler: `wsgi_loop.WSGIHandler`, made with `options`, unless another class is given.
    """

    def __init__(
        self, view: Any, *, middleware: Iterable[Any] = (), handler: Any = wsgi_loop.WSGIHandler, **options: Any
    ) -> None:
        module = types.ModuleType("tests.served")
        views = view if isinstance(view, dict) else {"": view}
        module.urlpatterns = [  # type: ignore[attr-defined]
            path(name, served) if name else re_path("^", served) for name, served in views.items()
        ]
        names = []
        for number, function in enumerate(middleware):
            if isinstance(function, str):
                names.append(function)
            else:
                setattr(module, f"middleware{number}", function)
                names.append(f"tests.served.middleware{number}")
        sys.modules["tests.served"] = module
        settings = {key: options.pop(key) for key in list(options) if key.isupper()}
        if handler is wsgi_loop.WSGIHandler:
            options = default_options | options
        self._make = lambda: Server(handler(**options))
        super().__init__(ROOT_URLCONF=module, MIDDLEWARE=names, **settings)

    def __enter__(self) -> Server:  # type: ignore[override]
        super().__enter__()
        return self._make()


def stock(view: Any, **options: Any) -> serve:
    """The same, with Django's own handler."""
    return serve(view, handler=DjangoHandler, **options)


class Hangs(AssertionError):
    """What a test calls takes too long."""


def in_thread(function: Callable[[], Any], seconds: float = 60) -> Any:
    """Call `function` on a new thread, and return or raise what it does. Raises Hangs if it takes longer."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome[:] = [function(), None]
        except BaseException as exc:
            outcome[:] = [None, exc]

    # Not waited for by the end of the process.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise Hangs(f"{function} takes more than {seconds} s")
    result, exc = outcome
    if exc is not None:
        raise exc
    return result


def in_child(function: Callable[[], Any], seconds: int = 20) -> None:
    """Fork, call `function` in the child, and require that it ends well there, within so many seconds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(seconds)  # a child that hangs is killed
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def eventually(condition: Callable[[], Any], seconds: float = 60, pause: float = 0.005) -> Any:
    """Wait until `condition` holds, and return what it returned: for what goes on after a request has gone on."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(pause)
    return result


_threads_of_others: set[threading.Thread] = set()


def leave_loop_threads_behind() -> None:
    """End the process loop, and count no loop thread that is there by now.

    A loop that was given up ends later than its request, and a test that failed may have left a thread for good.
    """
    wsgi_loop.process.shut_down()
    _threads_of_others.update(threading.enumerate())


def loop_threads() -> list[threading.Thread]:
    """Return the loop threads that there are since the last `leave_loop_threads_behind()`."""
    found = set(threading.enumerate()) - _threads_of_others
    return [thread for thread in found if thread.name.startswith("wsgi-loop")]


def run_django_tests(folder: Path, settings: str, *arguments: str) -> str:
    """Run the tests of a project in `folder` with Django's runner, warnings as errors. Returns what that has told."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "django", "test", "--settings", settings, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[1])])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr
