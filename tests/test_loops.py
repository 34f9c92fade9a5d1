"""The half that knows no Django: loop threads, and the context that a coroutine runs in."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import uvloop
from django.http import HttpResponse

from wsgi_loop.calls import run_in_context
from wsgi_loop.threads import new_thread, start

from .support import call_here, eventually, loop_threads, serve

variable: contextvars.ContextVar[Any] = contextvars.ContextVar("variable")


def test_a_loop_thread_that_can_not_be_started_fails_the_call_and_not_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """uvloop's loops need one for the first call."""

    def refuse(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    def view(request: Any) -> Any:
        try:
            return HttpResponse(str(call_here().thread))
        except RuntimeError as exc:
            return HttpResponse(str(exc), status=500)

    with serve(view, loop_factory=uvloop.new_event_loop) as server:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            assert server.get() == b"A loop thread could not be started: can't start new thread"
        assert server.status.startswith("500")
        # And nothing is said to have been dropped.
        gc.collect()
        server.get()
        assert server.status.startswith("200")


def test_a_loop_thread_ends_with_its_work_and_keeps_no_process_alive() -> None:
    may_end = threading.Event()
    before = set(loop_threads())
    start(new_thread(lambda: may_end.wait(60) and None))
    [thread] = set(loop_threads()) - before
    assert thread.daemon
    may_end.set()
    eventually(lambda: not thread.is_alive())


def test_a_loop_thread_has_nothing_of_its_starters_context() -> None:
    """From Python 3.14 on, a thread may inherit that."""
    seen: list[str] = []
    token = variable.set("the starter's")
    start(new_thread(lambda: seen.append(variable.get("unset"))))
    eventually(lambda: seen)
    variable.reset(token)
    assert seen == ["unset"]


def test_a_coroutine_that_is_run_in_a_context_sees_and_sets_its_variables() -> None:
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


def test_where_processes_are_not_forked() -> None:
    """As on Windows."""
    code = """
import os
del os.fork, os.register_at_fork
import django
django.setup()
from tests.support import call_here, here, serve
from django.http import HttpResponse

async def view(request):
    await here()
    return HttpResponse("answered")

for scope in ("request", "process"):
    with serve(view, scope=scope) as server:
        print(server.get())
"""
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "tests.settings"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "b'answered'\n" * 2, done.stderr
