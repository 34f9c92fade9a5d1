"""What blocks the process loop is logged, once for each place. Nothing is asked of a loop that is idle."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.http import HttpResponse

from wsgi_loop import create_background_task, process, stats

from .support import eventually, serve

pytestmark = pytest.mark.usefixtures("new_process_loop")

LOOPS = pytest.mark.parametrize("factory", [None, "uvloop.new_event_loop"])


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "wsgi_loop"]


def block_until_noticed(caplog: pytest.LogCaptureFixture, seconds: float = 30) -> None:
    before = len(messages(caplog))
    deadline = time.monotonic() + seconds
    while len(messages(caplog)) == before and time.monotonic() < deadline:
        time.sleep(0.01)  # the line that blocks


def watchdogs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "wsgi-watchdog"]


async def quick(request: Any) -> HttpResponse:
    return HttpResponse()


@LOOPS
def test_a_blocking_view_is_named_once_with_its_line_and_its_duration(
    factory: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def slow(request: Any) -> HttpResponse:
        block_until_noticed(caplog, 1 if messages(caplog) else 30)
        return HttpResponse()

    views = {"slow": slow, "": quick}
    with (
        serve(views, scope="process", blocked_after=0.2, loop_factory=factory) as server,
        ThreadPoolExecutor(4) as threads,
    ):
        for _ in range(2):
            sent = [threads.submit(server.get, "/slow"), *(threads.submit(server.get) for _ in range(3))]
            for future in sent:
                future.result(60)
            eventually(lambda: len(messages(caplog)) == 2)
        assert stats().longest_block >= 0.2
    blocks, over = messages(caplog)
    assert re.match(r"GET '/slow': loop call \S+\.slow: blocks the process loop", blocks)
    assert "# the line that blocks" in blocks
    match = re.fullmatch(r"GET '/slow': loop call \S+\.slow: has blocked the process loop for ([\d.]+) s", over)
    assert match
    assert float(match[1]) >= 0.2
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_tasks_of_requests_and_background_tasks_and_callbacks_are_named(caplog: pytest.LogCaptureFixture) -> None:
    async def child() -> None:
        block_until_noticed(caplog)

    async def work() -> None:
        block_until_noticed(caplog)

    async def gathers(request: Any) -> HttpResponse:
        await asyncio.gather(asyncio.create_task(child(), name="the child"))
        return HttpResponse()

    async def starts(request: Any) -> HttpResponse:
        create_background_task(work(), name="report")
        return HttpResponse()

    async def calls_back(request: Any) -> HttpResponse:
        asyncio.get_running_loop().call_soon(block_until_noticed, caplog)
        return HttpResponse()

    views = {"gathers": gathers, "starts": starts, "calls_back": calls_back}
    with serve(views, scope="process", blocked_after=0.1) as server:
        for number, path in enumerate(views, 1):
            server.get(f"/{path}")
            eventually(lambda number=number: len(messages(caplog)) == 2 * number)
    assert [message.partition(": blocks")[0].partition(" running")[0] for message in messages(caplog)[::2]] == [
        "GET '/gathers': the child",
        "The process loop: background task report of GET '/starts'",
        "The process loop: a callback",
    ]


def test_a_loop_that_is_idle_is_left_alone_and_watched_as_soon_as_it_wakes_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def slow(request: Any) -> HttpResponse:
        block_until_noticed(caplog)
        return HttpResponse()

    with serve({"slow": slow, "": quick}, scope="process", blocked_after=0.1) as server:
        server.get()
        running: Any = process._loop
        pauses: list[float | None] = []
        pause = running.watchdog._pause
        running.watchdog._pause = lambda seconds: (pauses.append(seconds), pause(seconds))[1]
        for _ in range(2):
            # From here on its thread sleeps, with no bound, and so does the loop's.
            eventually(lambda: pauses[-1:] == [None])
            number = len(pauses)
            time.sleep(0.5)
            assert len(pauses) == number
            server.get()
            eventually(lambda number=number: len(pauses) > number)
        eventually(lambda: pauses[-1] is None)
        server.get("/slow")
        eventually(lambda: len(messages(caplog)) == 2)


@pytest.mark.parametrize("blocked_after", [None, 0.1])
def test_it_ends_with_the_loop(blocked_after: float | None) -> None:
    with serve(quick, scope="process", blocked_after=blocked_after) as server:
        server.get()
        assert len(watchdogs()) == (blocked_after is not None)
    if blocked_after:
        eventually(lambda: "_process_events" in process._loop.loop.__dict__)  # type: ignore[union-attr]
    process.shut_down()
    eventually(lambda: not watchdogs())


def test_a_sync_request_starts_none() -> None:
    with serve(lambda request: HttpResponse(), scope="process", blocked_after=0.1) as server:
        server.get()
        assert watchdogs() == []
