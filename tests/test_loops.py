"""The half that knows no Django: loop threads, and calls that can not be handed over."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from django.http import HttpResponse

from wsgi_loop import loops
from wsgi_loop.calls import run_in_context
from wsgi_loop.threads import MAX_IDLE_THREADS, LoopThreads

from .support import call_here, eventually, loop_threads, serve


@pytest.fixture
def pool() -> Iterator[LoopThreads]:
    """A pool of the test's own, the idle threads of which end with it."""
    before = len(loop_threads())
    pool = LoopThreads()
    yield pool
    eventually(lambda: pool._free == len(loop_threads()) - before)
    for _ in range(pool._free):
        pool._jobs.put(lambda: False)
    eventually(lambda: len(loop_threads()) == before)


def test_a_loop_thread_that_can_not_be_started_fails_the_call_and_not_in_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, pool: LoopThreads
) -> None:
    def start(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(loops, "threads", pool)
    with serve(lambda request: HttpResponse(str(call_here().thread))) as server:
        monkeypatch.setattr(threading.Thread, "start", start)
        server.get()
        assert server.status.startswith("500")
        assert "A loop thread could not be started: can't start new thread" in caplog.text
        monkeypatch.undo()
        monkeypatch.setattr(loops, "threads", pool)
        server.get()
        assert server.status.startswith("200")


def test_at_most_eight_threads_stay_idle(pool: LoopThreads) -> None:
    barrier = threading.Barrier(12)
    before = set(threading.enumerate())

    def job() -> bool:
        barrier.wait(30)
        return pool.give_back()

    for _ in range(12):
        pool.submit(job)
    eventually(lambda: len(set(threading.enumerate()) - before) == MAX_IDLE_THREADS)
    assert pool.started == 12


def test_an_idle_thread_is_used_again(pool: LoopThreads) -> None:
    seen: list[int] = []
    done = threading.Event()

    def job() -> bool:
        seen.append(threading.get_ident())
        kept = pool.give_back()
        done.set()
        return kept

    for _ in range(5):
        done.clear()
        pool.submit(job)
        assert done.wait(30)
    assert len(set(seen)) == 1


def test_a_thread_that_was_given_back_too_early_does_not_hold_up_the_next_job(pool: LoopThreads) -> None:
    release, taken, next_ran = threading.Event(), threading.Event(), threading.Event()

    def slow() -> bool:
        assert pool.give_back()
        taken.wait(30)
        pool.take_back()
        release.wait(30)
        return False

    def following() -> bool:
        next_ran.set()
        return False

    pool.submit(slow)
    eventually(lambda: pool._free == 1)
    pool.submit(following)
    taken.set()
    assert next_ran.wait(30)
    release.set()


def test_a_coroutine_that_is_run_in_a_context_sees_and_sets_its_variables() -> None:
    import asyncio

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    context = contextvars.Context()
    context.run(variable.set, "given")
    seen: list[Any] = []

    async def work() -> None:
        seen.append(variable.get())
        await asyncio.sleep(0)
        variable.set("changed")
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def main() -> None:
        async def runner() -> None:
            await run_in_context(context, work())

        task = asyncio.ensure_future(runner())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        seen.append(variable.get("not here"))

    asyncio.run(main())
    assert seen == ["given", "cancelled", "not here"]
    assert context[variable] == "changed"
