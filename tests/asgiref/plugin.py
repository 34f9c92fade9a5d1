"""Runs each test of a pytest session as the view of a request that wsgi-loop serves, in place of pytest-asyncio.

A pytest plugin, for asgiref's own tests. Sync tests are called by the view, so that their loop calls are the request's.
Async ones run on the request's loop, each wholly in one loop call, or in a task that knows of no sync caller.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import multiprocessing
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.context import SpawnProcess
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync
from django.http import HttpRequest, HttpResponse

from tests.support import serve

OPTIONS = "--wsgi-loop-options"
ASYNC_TESTS = "--async-tests"
#: The name of a test's property: how often it has used wsgi-loop's loops.
USES = "uses of the request's loop"

#: What has been done with those loops, since the current test began.
uses: list[str] = []
#: Seconds after which a test is taken for hanging. The longest one sleeps for three.
PATIENCE = 10


class Hanging(BaseException):
    """Raised on the request thread. asgiref's tests catch what they expect, and may not catch this."""


class Loop(asyncio.SelectorEventLoop):
    """A loop of wsgi-loop, which makes it by its own setting. Nobody else makes one."""

    def __init__(self) -> None:
        super().__init__()
        # A request's is made for its first loop call, which the request thread may run to its end.
        uses.append("made")

    def create_task(self, *args: Any, **kwargs: Any) -> asyncio.Task[Any]:
        uses.append("task")
        return super().create_task(*args, **kwargs)

    def call_soon_threadsafe(self, *args: Any, **kwargs: Any) -> asyncio.Handle:
        # A loop that has a thread gets its loop calls this way.
        uses.append("posted")
        return super().call_soon_threadsafe(*args, **kwargs)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTIONS, type=json.loads, help="the options of wsgi-loop's handler, in JSON")
    parser.addoption(ASYNC_TESTS, choices=["call", "task"], help="what an async test runs in")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "asyncio: asgiref marks its async tests with it")
    signal.signal(signal.SIGALRM, interrupt)
    django.setup()


def interrupt(*_: object) -> None:
    raise Hanging(f"after {PATIENCE} seconds")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        item.runtest = partial(run_test, item, item.runtest)


def run_test(item: Any, run: Callable[[], None]) -> None:
    signal.alarm(PATIENCE)
    try:
        used, exc = run_in_request(item.config.getoption(OPTIONS), run)
    finally:
        signal.alarm(0)
    item.user_properties.append((USES, used))
    if exc is not None:
        raise exc


def run_in_request(
    options: dict[str, Any], function: Callable[..., None], *args: Any
) -> tuple[int, BaseException | None]:
    """Call a sync function in a request's view.

    Returns how often it has used wsgi-loop's loops, and what it has raised.
    """
    used = 0
    raised: BaseException | None = None

    def view(request: HttpRequest) -> HttpResponse:
        nonlocal used, raised
        uses.clear()
        try:
            function(*args)
        except BaseException as exc:
            raised = exc
        used = len(uses)
        return HttpResponse()

    with serve(view, loop_factory=Loop, **options) as server:
        server.get()
    return used, raised


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        return None
    in_task = pyfuncitem.config.getoption(ASYNC_TESTS) == "task"
    args = {name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}

    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop), f"the test runs on {loop!r}"
        if in_task:
            await loop.create_task(test(**args), context=contextvars.Context())
        else:
            await test(**args)

    async_to_sync(run)()
    return True


@pytest.fixture(autouse=True)
def _spawned_children_serve_requests(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """What a test runs in a new Python process, lest it hang its own one, is to run in a request there."""

    def make_process(*, target: Callable[..., None], args: tuple[Any, ...] = ()) -> SpawnProcess:
        return SpawnProcess(target=run_in_child, args=(pytestconfig.getoption(OPTIONS), target, *args))

    monkeypatch.setattr(multiprocessing.get_context("spawn"), "Process", make_process)


def run_in_child(options: dict[str, Any], target: Callable[..., None], *args: Any) -> None:
    django.setup()
    _, exc = run_in_request(options, target, *args)
    if exc is not None:
        raise exc
