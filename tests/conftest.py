"""Fixtures: a connected signal receiver, and the check that no test leaves a loop open."""

from __future__ import annotations

import _thread
import asyncio
import gc
import signal as signals
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.core.signals import request_finished, request_started
from django.dispatch import Signal

from wsgi_loop import process

from . import support
from .support import eventually

Connect = Callable[..., None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: pytest-xdist needs the same name in each process: give it ids")


def pytest_configure() -> None:
    """Let servers end by SIGINT. A shell's background job ignores SIGINT, and what the job starts would do so too."""
    if signals.getsignal(signals.SIGINT) is signals.SIG_IGN:
        signals.signal(signals.SIGINT, signals.default_int_handler)


@pytest.fixture(autouse=True)
def _requests_may_close_connections(django_db_blocker: Any) -> Iterator[None]:
    """Each request closes old connections, before and after, which pytest-django would refuse."""
    with django_db_blocker.unblock():
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_loop_threads_of_other_modules() -> None:
    """What counts loop threads counts those of its own module."""
    support.leave_loop_threads_behind()


@pytest.fixture
def receive() -> Iterator[Connect]:
    """Connect receivers of request_started and request_finished until the end of the test."""
    connected: list[tuple[Signal, Any]] = []

    def connect(*, started: Any = None, finished: Any = None) -> None:
        for signal, receiver in ((request_started, started), (request_finished, finished)):
            if receiver is not None:
                signal.connect(receiver, weak=False)
                connected.append((signal, receiver))

    yield connect
    for signal, receiver in connected:
        signal.disconnect(receiver)


@pytest.fixture
def loops() -> Iterator[list[asyncio.AbstractEventLoop]]:
    """A list to put loops in. They have to be closed at the end of the test."""
    seen: list[asyncio.AbstractEventLoop] = []
    yield seen
    eventually(lambda: all(loop.is_closed() for loop in seen))


@pytest.fixture
def new_process_loop() -> Iterator[None]:
    """The process loop that the test starts is its own, and ends with it. Earlier tests' threads do not count."""
    support.leave_loop_threads_behind()
    yield
    process.shut_down()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of the threads that are started, by their names."""
    names: list[str] = []
    start, start_new_thread = threading.Thread.start, _thread.start_new_thread

    def count_thread(thread: threading.Thread) -> None:
        names.append(thread.name)
        start(thread)

    def count_new_thread(function: Any, *args: Any) -> int:
        names.append(function.__qualname__)
        return start_new_thread(function, *args)

    monkeypatch.setattr(threading.Thread, "start", count_thread)
    monkeypatch.setattr(_thread, "start_new_thread", count_new_thread)
    return names


@pytest.fixture
def no_gc() -> Iterator[None]:
    """The garbage collector is off: what is freed is freed by its reference count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGUSR1 raises KeyboardInterrupt. Not SIGINT, which is ignored where the tests run in a shell's background."""
    found = signals.signal(signals.SIGUSR1, signals.default_int_handler)
    yield
    signals.signal(signals.SIGUSR1, found)
