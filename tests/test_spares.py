"""Event loops that are made of what closed ones have left."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop
from django.http import HttpRequest, HttpResponse

from wsgi_loop import spares
from wsgi_loop.spares import MAX_SPARES, close_spares, new_event_loop

from .support import eventually, in_child, serve

THREADS = pytest.mark.parametrize("thread", ["own", "request"])


@pytest.fixture(autouse=True)
def no_spares() -> Iterator[None]:
    close_spares()
    yield
    close_spares()


def descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def selector_of(loop: Any) -> int:
    return loop._selector.fileno()  # type: ignore[no-any-return]


@THREADS
def test_requests_have_loops_of_their_own_and_ask_the_kernel_for_one(thread: str) -> None:
    loops: list[asyncio.AbstractEventLoop] = []
    selectors: list[int] = []

    async def view(request: HttpRequest) -> HttpResponse:
        loop = asyncio.get_running_loop()
        loops.append(loop)
        selectors.append(selector_of(loop))
        # Woken up from another thread, and by time.
        assert await loop.run_in_executor(None, lambda: 42) == 42
        await asyncio.sleep(0.001)
        loop.call_soon_threadsafe(lambda: None)
        return HttpResponse("done")

    with serve(view, scope="request", thread=thread) as server:
        for _ in range(10):
            assert server.get() == b"done"
            eventually(loops[-1].is_closed)
    assert len(set(loops)) == 10
    # One, but for those that a loop thread of an earlier test may give back meanwhile.
    assert len(set(selectors)) < 4


@pytest.mark.parametrize("watch", ["add_reader", "add_writer"])
def test_a_loop_that_has_watched_something_gives_nothing_back(watch: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs, ours.dup():
        loop = new_event_loop()
        descriptor = ours.fileno()
        getattr(loop, watch)(descriptor, lambda: None)
        # The kernel goes on watching what the copy leads to.
        ours.close()
        getattr(loop, watch.replace("add", "remove"))(descriptor)
        loop.close()
        assert not spares._spares


def test_a_loop_with_a_signal_handler_gives_nothing_back() -> None:
    loop = new_event_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: None)
    loop.close()
    assert not spares._spares


def test_a_loop_that_was_never_closed_gives_nothing_back() -> None:
    loop: Any = new_event_loop()
    with pytest.warns(ResourceWarning, match="unclosed event loop"):
        # As the collector does, which may have closed the sockets before.
        loop.__del__()
    assert loop.is_closed()
    assert not spares._spares


def test_what_was_meant_for_a_closed_loop_does_not_reach_the_next_one() -> None:
    first = new_event_loop()
    called: list[str] = []
    first.call_soon(called.append, "first")
    first.call_soon_threadsafe(called.append, "first")
    selector = selector_of(first)
    first.close()
    second = new_event_loop()
    assert selector_of(second) == selector
    second.call_soon_threadsafe(called.append, "second")
    second.run_until_complete(asyncio.sleep(0.001))
    assert called == ["second"]
    for late in (first.call_soon_threadsafe, first.call_soon):
        with pytest.raises(RuntimeError, match="closed"):
            late(called.append, "late")
    # Wakes up from another thread, as a loop must.
    timer = threading.Timer(0.05, lambda: second.call_soon_threadsafe(second.stop))
    timer.start()
    second.run_forever()
    timer.join()
    second.close()


def test_nothing_of_a_closed_loop_is_kept() -> None:
    loop = new_event_loop()
    gone = weakref.ref(loop)
    loop.run_until_complete(asyncio.sleep(0))
    gc.collect()
    gc.disable()
    try:
        loop.close()
        assert len(spares._spares) == 1
        del loop
        assert gone() is None
    finally:
        gc.enable()


def test_no_more_than_eight_are_kept() -> None:
    before = descriptors()
    for loop in [new_event_loop() for _ in range(MAX_SPARES + 4)]:
        loop.close()
    assert len(spares._spares) == MAX_SPARES
    close_spares()
    assert descriptors() == before


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_uses_nothing_of_its_parents() -> None:
    open_, inherited = new_event_loop(), new_event_loop()
    new_event_loop().close()
    assert len(spares._spares) == 1

    def child() -> None:
        assert not spares._spares
        # It keeps nothing of what was its parent's, whose loop this breaks.
        inherited.close()
        assert not spares._spares
        loop = new_event_loop()
        loop.run_until_complete(asyncio.sleep(0.001))
        loop.close()
        assert len(spares._spares) == 1

    in_child(child)
    open_.run_until_complete(asyncio.sleep(0.001))
    for loop in open_, inherited:
        loop.close()
        assert len(spares._spares) == 1
    for _ in range(2):
        loop = new_event_loop()
        threading.Timer(0.05, loop.call_soon_threadsafe, [loop.stop]).start()
        loop.run_forever()
        loop.close()


def test_another_event_loop_policy_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Policy(asyncio.DefaultEventLoopPolicy):  # type: ignore[name-defined, misc]
        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return uvloop.new_event_loop()

    monkeypatch.setattr(asyncio, "get_event_loop_policy", Policy)
    monkeypatch.setattr(asyncio.events, "get_event_loop_policy", Policy)
    loop = new_event_loop()
    assert isinstance(loop, uvloop.Loop)
    loop.close()


@THREADS
def test_a_process_ends_without_a_warning(thread: str) -> None:
    script = f"""
        from django.conf import settings
        settings.configure()
        import django
        django.setup()
        import asyncio, logging
        from asgiref.sync import async_to_sync
        import wsgi_loop

        # It would warn of what a busy machine makes slow.
        logging.getLogger("asyncio").setLevel(logging.ERROR)

        async def nothing():
            pass

        for _ in range(3):
            with wsgi_loop.EventLoopContext(scope="request", thread={thread!r}):
                async_to_sync(nothing)()
        loop = wsgi_loop.spares.new_event_loop()
        import atexit
        atexit._run_exitfuncs()
        loop.close()
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
