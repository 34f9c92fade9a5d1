"""`wsgi_loop.stats()` agrees with what has happened."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import pytest
from django.http import HttpResponse

from wsgi_loop import create_background_task, process, stats

from .support import eventually, in_child, serve

pytestmark = pytest.mark.usefixtures("new_process_loop")


@pytest.fixture
def grown() -> Any:
    """What has grown, or shrunk, since the test began."""
    before = asdict(stats())
    return lambda: {name: now - before[name] for name, now in asdict(stats()).items() if now != before[name]}


async def view(request: Any) -> HttpResponse:
    return HttpResponse()


def test_a_sync_request_counts_nothing(grown: Any) -> None:
    with serve(lambda request: HttpResponse()) as server:
        server.get()
    assert grown() == {}


def test_requests_and_their_loops(grown: Any) -> None:
    with serve(view, scope="request") as server, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: server.get(), range(200)))
    assert grown() == {"requests": 200, "loops_made": 200}


def test_a_process_loop(grown: Any) -> None:
    with serve(view, scope="process", blocked_after=None) as server, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: server.get(), range(200)))
    assert grown() == {"requests": 200, "loops_made": 1, "loops_open": 1, "loop_threads": 1}
    process.shut_down()
    eventually(lambda: grown() == {"requests": 200, "loops_made": 1})


def test_tasks_that_are_cut_off_and_loops_that_are_given_up(grown: Any) -> None:
    async def leaves(request: Any) -> HttpResponse:
        for _ in range(3):
            request.task = asyncio.create_task(asyncio.sleep(60))
        await asyncio.sleep(0)
        return HttpResponse()

    with serve(leaves, scope="request") as server:
        server.get()
    eventually(lambda: grown() == {"requests": 1, "loops_made": 1, "tasks_cut_off": 3})

    let_go = threading.Event()

    async def blocks() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            let_go.wait(60)

    async def swallows(request: Any) -> HttpResponse:
        request.task = asyncio.create_task(blocks())
        await asyncio.sleep(0)
        return HttpResponse()

    with serve(swallows, scope="request", shutdown_timeout=0.1) as server:
        server.get()
    assert grown()["loops_given_up"] == 1
    assert (grown()["loops_open"], grown()["loop_threads"]) == (1, 1)
    let_go.set()
    eventually(lambda: "loops_open" not in grown() and "loop_threads" not in grown())


def test_background_tasks(grown: Any) -> None:
    let_go = threading.Event()

    async def wait() -> None:
        while not let_go.is_set():
            await asyncio.sleep(0.01)

    async def fail() -> None:
        raise ValueError("failed")

    futures = [create_background_task(wait()) for _ in range(3)]
    failing, cancelled = create_background_task(fail()), create_background_task(wait())
    assert cancelled.cancel()
    with pytest.raises(ValueError, match="failed"):
        failing.result(30)
    eventually(lambda: grown().get("background_cancelled") == 1)
    assert {name: number for name, number in grown().items() if name.startswith("background")} == {
        "background_started": 5,
        "background_in_flight": 3,
        "background_failed": 1,
        "background_cancelled": 1,
    }
    let_go.set()
    for future in futures:
        future.result(30)
    eventually(lambda: "background_in_flight" not in grown())
    last = create_background_task(asyncio.sleep(60), name="last")
    assert process._loop is not None
    process._loop.timeout = 0.1
    threading.Thread(target=process.shut_down).start()
    with contextlib.suppress(CancelledError):
        last.result(60)
    eventually(lambda: grown().get("background_cancelled") == 2)
    assert "background_in_flight" not in grown()


def test_a_forked_child_begins_anew() -> None:
    with serve(view, scope="request") as server:
        server.get()

        def child() -> None:
            assert stats().requests == 0
            server.get()
            assert (stats().requests, stats().loops_made, stats().loops_open) == (1, 1, 0)

        in_child(child)
