"""`EventLoop`: asyncio's own loop, which makes its selector and its sockets when it first waits."""

from __future__ import annotations

import asyncio
import gc
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from wsgi_loop.event_loop import EventLoop, default_factory

from .support import in_child, in_thread


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of the selectors and socket pairs that are made."""
    made: list[str] = []

    def watch(module: Any, name: str) -> None:
        make = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (made.append(name), make(*args))[1])

    watch(selectors, "DefaultSelector")
    watch(socket, "socketpair")
    return made


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# --- what it makes, and when -----------------------------------------------------------------------------------------


def test_for_ready_callbacks_alone_it_asks_nothing_of_the_kernel(made: list[str]) -> None:
    before = descriptors()
    loop = EventLoop()

    async def work() -> int:
        await asyncio.sleep(0)
        await asyncio.gather(*(asyncio.sleep(0) for _ in range(3)))
        async with asyncio.timeout(60):
            await asyncio.sleep(0)
        return 3

    assert loop.run_until_complete(work()) == 3
    loop.call_soon_threadsafe(int)
    loop.call_later(60, int).cancel()
    loop.run_until_complete(loop.shutdown_asyncgens())
    assert descriptors() == before
    loop.close()
    assert descriptors() == before
    assert made == []


def test_it_makes_them_once_when_it_waits_and_closes_them(made: list[str]) -> None:
    before = descriptors()
    loop = EventLoop()
    for _ in range(3):
        loop.run_until_complete(asyncio.sleep(0.1))
    assert made == ["DefaultSelector", "socketpair"]
    assert len(descriptors() - before) == 3
    loop.close()
    assert descriptors() == before


def test_a_timer_that_has_expired_is_nothing_to_wait_for(made: list[str], loop: EventLoop) -> None:
    seen: list[int] = []
    loop.call_later(0.001, seen.append, 1)
    time.sleep(0.01)
    loop.run_until_complete(asyncio.sleep(0))
    assert seen == [1]
    assert made == []


def test_it_waits_for_as_long_as_asyncio_does(loop: EventLoop) -> None:
    for seconds in (0.05, 0.05):
        began = loop.time()
        loop.run_until_complete(asyncio.sleep(seconds))
        assert loop.time() - began >= seconds - 0.001


@pytest.mark.parametrize("name", ["SelectSelector", "PollSelector", "EpollSelector"])
def test_it_takes_the_selector_that_is_the_default_then(
    monkeypatch: pytest.MonkeyPatch, loop: EventLoop, name: str
) -> None:
    monkeypatch.setattr(selectors, "DefaultSelector", getattr(selectors, name))
    loop.run_until_complete(asyncio.sleep(0.1))
    assert type(loop._selector).__name__ == name


@pytest.mark.parametrize("is_used", [False, True])
def test_it_is_closed_without_a_warning_and_closing_it_again_does_nothing(is_used: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop = EventLoop()
        if is_used:
            loop.run_until_complete(asyncio.sleep(0.001))
        loop.close()
        loop.close()
        assert loop.is_closed()
        for function, *args in ((loop.call_soon, int), (loop.call_soon_threadsafe, int), (loop.run_forever,)):
            with pytest.raises(RuntimeError, match="closed"):
                function(*args)
        del loop, function
        gc.collect()


@pytest.mark.parametrize("is_used", [False, True])
def test_one_that_is_dropped_without_being_closed_is_warned_of_as_asyncios(is_used: bool) -> None:
    before = descriptors()
    with pytest.warns(ResourceWarning, match="unclosed event loop"):  # noqa: PT031
        loop: Any = EventLoop()
        if is_used:
            loop.run_until_complete(asyncio.sleep(0.001))
        del loop
        gc.collect()
    assert descriptors() == before


@pytest.mark.parametrize("is_used", [False, True])
def test_when_it_is_closed_it_is_freed_by_its_reference_count(no_gc: None, is_used: bool) -> None:
    loop: Any = EventLoop()
    if is_used:
        loop.run_until_complete(asyncio.sleep(0.001))
    loop.close()
    found = weakref.ref(loop)
    del loop
    assert found() is None


def test_a_child_that_is_forked_before_it_waits_has_a_selector_of_its_own(loop: EventLoop) -> None:
    def run() -> None:
        assert loop.run_until_complete(asyncio.sleep(0.001, 3)) == 3
        loop.close()

    in_child(run)
    assert loop.run_until_complete(asyncio.sleep(0.001, 4)) == 4


# --- other threads ---------------------------------------------------------------------------------------------------


def post_later(loop: asyncio.AbstractEventLoop, seconds: float, callback: Any, *args: Any) -> threading.Thread:
    def post() -> None:
        time.sleep(seconds)
        loop.call_soon_threadsafe(callback, *args)

    thread = threading.Thread(target=post)
    thread.start()
    return thread


@pytest.mark.parametrize("is_used", [False, True])
def test_another_thread_wakes_it_up(loop: EventLoop, is_used: bool) -> None:
    async def wait() -> str:
        if is_used:
            await asyncio.sleep(0.001)
        future = loop.create_future()
        thread = post_later(loop, 0.02, future.set_result, "posted")
        try:
            return str(await asyncio.wait_for(future, 60))
        finally:
            thread.join()

    began = time.monotonic()
    assert loop.run_until_complete(wait()) == "posted"
    assert time.monotonic() - began < 30


class PostsAtTheWorstMoment(EventLoop):
    """Something is posted when the loop has seen that nothing is ready, and before it can be woken up."""

    def make_selector(self) -> Any:
        in_thread(lambda: self.call_soon_threadsafe(self.stop))
        return super().make_selector()


def test_what_is_posted_before_there_is_a_socket_to_wake_it_up_by_is_seen() -> None:
    loop = PostsAtTheWorstMoment()
    began = time.monotonic()
    loop.call_later(60, int)
    loop.run_forever()
    assert time.monotonic() - began < 30
    loop.close()


@pytest.mark.parametrize("name", ["DefaultSelector", "socketpair"])
def test_what_is_posted_while_it_makes_what_it_waits_with_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module: Any = selectors if name == "DefaultSelector" else socket
    make, loop = getattr(module, name), EventLoop()
    made: list[Any] = []

    def make_and_post(*args: Any) -> Any:
        made.append(make(*args))
        in_thread(lambda: loop.call_soon_threadsafe(loop.stop))
        return made[-1]

    monkeypatch.setattr(module, name, make_and_post)
    loop.call_later(60, int)
    began = time.monotonic()
    loop.run_forever()
    assert time.monotonic() - began < 30
    assert len(made) == 1
    loop.close()


def test_two_thousand_posts_that_race_with_new_loops_going_to_sleep() -> None:
    """Each loop is posted to once, at another moment, by a thread that is there already."""
    loops: list[EventLoop] = []
    begun, ended = threading.Semaphore(0), threading.Event()

    def post() -> None:
        while begun.acquire() and not ended.is_set():
            for _ in range(len(loops) % 50 * 4):
                pass
            loops[-1].call_soon_threadsafe(loops[-1].stop)

    thread = threading.Thread(target=post)
    thread.start()
    began = time.monotonic()
    try:
        for _ in range(2000):
            loop = EventLoop()
            loops.append(loop)
            loop.call_later(60, int)
            begun.release()
            loop.run_forever()
            loop.close()
            assert time.monotonic() - began < 55, "a post was not seen"
    finally:
        ended.set()
        begun.release()
        thread.join()


def test_two_thousand_posts_of_four_threads_to_one_loop_are_all_run(loop: EventLoop) -> None:
    seen: list[int] = []

    def post() -> None:
        for number in range(500):
            loop.call_soon_threadsafe(seen.append, number)
            if number % 7 == 0:
                time.sleep(0)

    async def wait() -> None:
        threads = [threading.Thread(target=post) for _ in range(4)]
        for thread in threads:
            thread.start()
        async with asyncio.timeout(60):
            while len(seen) < 2000:
                await asyncio.sleep(0.0001)
        for thread in threads:
            thread.join()

    loop.run_until_complete(wait())
    assert sorted(seen) == sorted([*range(500)] * 4)


def test_it_may_be_run_on_one_thread_after_the_other(loop: EventLoop) -> None:
    for _ in range(3):
        assert in_thread(lambda: loop.run_until_complete(asyncio.sleep(0.001, "x"))) == "x"
        assert loop.run_until_complete(asyncio.sleep(0.001, "y")) == "y"


# --- what asks for the selector --------------------------------------------------------------------------------------


def test_readers_and_writers(loop: EventLoop) -> None:
    ours, theirs = socket.socketpair()
    seen: list[str] = []
    with ours, theirs:
        ours.setblocking(False)
        # Nothing has asked for a selector so far.
        assert not loop.remove_reader(ours)
        loop.add_reader(ours, lambda: (seen.append(f"read {ours.recv(1)!r}"), loop.stop()))
        loop.add_writer(ours, lambda: (seen.append("write"), loop.remove_writer(ours), theirs.send(b"x")))
        loop.run_forever()
        assert seen == ["write", "read b'x'"]
        assert loop.remove_reader(ours)
        assert not loop.remove_writer(ours)


def test_a_connection_to_a_server_on_the_same_loop(loop: EventLoop) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def call() -> bytes:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"hello\n")
        line = await reader.readline()
        writer.close()
        await writer.wait_closed()
        server.close()
        await server.wait_closed()
        return line

    assert loop.run_until_complete(asyncio.wait_for(call(), 60)) == b"hello\n"


@pytest.mark.parametrize("is_used", [False, True])
def test_signal_handlers(loop: EventLoop, is_used: bool) -> None:
    async def wait() -> str:
        if is_used:
            await asyncio.sleep(0.001)
        future = loop.create_future()
        loop.add_signal_handler(signal.SIGUSR2, future.set_result, "signal")
        timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGUSR2))
        timer.start()
        try:
            return str(await asyncio.wait_for(future, 60))
        finally:
            timer.join()
            assert loop.remove_signal_handler(signal.SIGUSR2)

    assert loop.run_until_complete(wait()) == "signal"


def test_an_interrupt_while_it_waits(loop: EventLoop, interruptible: None) -> None:
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    loop.call_later(60, int)
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    timer.join()
    assert loop.run_until_complete(asyncio.sleep(0.001, 3)) == 3


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_subprocesses(loop: EventLoop) -> None:
    async def run() -> bytes:
        program = "import sys; print(sys.stdin.read())"
        pipe = subprocess.PIPE
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdin=pipe, stdout=pipe)
        out, _ = await process.communicate(b"hello")
        assert process.returncode == 0
        return out

    assert loop.run_until_complete(asyncio.wait_for(run(), 60)) == b"hello\n"


def test_threads_of_the_default_executor_and_names(loop: EventLoop) -> None:
    async def run() -> Any:
        await asyncio.to_thread(time.sleep, 0.01)
        found = await loop.getaddrinfo("127.0.0.1", 80, type=socket.SOCK_STREAM)
        await loop.shutdown_default_executor()
        return found[0][4]

    assert loop.run_until_complete(run()) == ("127.0.0.1", 80)


def test_debug_mode(loop: EventLoop, caplog: pytest.LogCaptureFixture) -> None:
    loop.set_debug(True)

    async def run() -> str:
        await asyncio.sleep(0.001)
        future = loop.create_future()
        post_later(loop, 0.01, future.set_result, "posted").join()
        with pytest.raises(RuntimeError, match="Non-thread-safe operation"):
            in_thread(lambda: loop.call_soon(int))
        return str(await future)

    caplog.set_level("ERROR", "asyncio")
    assert loop.run_until_complete(run()) == "posted"
    assert "EventLoop" in repr(loop)


def test_it_is_what_asyncio_run_may_use() -> None:
    async def run() -> str:
        await asyncio.sleep(0.001)
        return await asyncio.to_thread(str, 3)

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        assert runner.run(run()) == "3"
        assert runner.run(asyncio.sleep(0, 4)) == 4


# --- which loop is the default ---------------------------------------------------------------------------------------


def test_the_default_is_this_loop_where_asyncios_own_policy_stands() -> None:
    assert default_factory() is EventLoop


@pytest.mark.parametrize(("platform", "default"), [("linux", EventLoop), ("win32", asyncio.new_event_loop)])
def test_the_default_where_there_are_no_policies(monkeypatch: pytest.MonkeyPatch, platform: str, default: Any) -> None:
    for module, name in ((asyncio.events, "_get_event_loop_policy"), (asyncio, "get_event_loop_policy")):
        monkeypatch.delattr(module, name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    assert default_factory() is default


@pytest.mark.filterwarnings("ignore:.*policy:DeprecationWarning")
def test_a_policy_of_somebody_elses_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return uvloop.new_event_loop()

    found = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(Policy())
    try:
        loop = default_factory()()
        loop.close()
        assert type(loop) is uvloop.Loop
    finally:
        asyncio.set_event_loop_policy(found)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="this system has no pidfd_open")
def test_it_asks_for_no_descriptor_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # From Python 3.14 on each loop of asyncio asks once if it could wait for child processes so.
    asked: list[int] = []
    pidfd_open = os.pidfd_open
    monkeypatch.setattr(os, "pidfd_open", lambda pid, *args: (asked.append(pid), pidfd_open(pid, *args))[1])
    for _ in range(3):
        EventLoop().close()
    assert asked == []
