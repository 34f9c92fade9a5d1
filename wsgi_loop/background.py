"""Background tasks: what may outlive its request, on the process loop. Knows Django's connections."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from asgiref.sync import async_to_sync
from django.core.cache.backends.base import BaseCache
from django.db import connections

from .bridge.executor import current_executor, run_on_thread
from .bridge.storage import detached_context, scope_here
from .conf import Options, get_options
from .process import get_process_loop
from .scope import door
from .threads import SyncThread

T = TypeVar("T")

#: For tests: how many want background tasks to be run where they are started.
inline = 0


def create_background_task(coro: Coroutine[Any, Any, T], *, name: str | None = None) -> Future[T]:
    """Run a coroutine on the process loop: it starts at once, and may outlive the request.

    It runs in a copy of the current context, as `asyncio.create_task` has it, but what it calls with `sync_to_async`,
    and its ORM calls, run on a thread of its own with a database connection of its own, which is closed with the task.
    So it is outside of the request's transaction: start it in `transaction.on_commit` if it reads what that writes.
    It is not a task queue: nothing is tried again, and what the end of the process interrupts is lost, with a warning
    that names it. There it has `SHUTDOWN_TIMEOUT` seconds to come to an end.

    name: for the log, and for the task itself; that of the coroutine if it is not given. An exception is logged.

    Returns a future, for whoever wants to wait or to cancel; in async code, `asyncio.wrap_future` makes it awaitable.
    Raises TypeError if it is not given a coroutine, RuntimeError if `MAX_BACKGROUND_TASKS` are in flight or the process
    is ending, and what the setting `LIFESPAN` raises if this is the first use of the process loop.
    """
    if not asyncio.iscoroutine(coro):
        raise TypeError(f"create_background_task() takes a coroutine, what calling an async def returns, not {coro!r}.")
    name = name or str(getattr(coro, "__qualname__", coro))
    description = f"background task {name}"
    request = scope_here() or current_executor()
    inline_tasks = None if request is None else request.options.inline_tasks
    if inline or inline_tasks is not None:
        return _run_inline(coro, name, inline_tasks)
    get: Callable[[], Options] = get_options
    if request is not None:
        options = request.options
        get = lambda: options  # noqa: E731
        description += f" of {request.owner}"
    thread = SyncThread("wsgi-sync-background")
    wrap = functools.partial(run_on_thread, thread, connections.close_all)
    try:
        running = get_process_loop(get, door)
        assert running.thread_id is not None
        context = detached_context(running.thread_id, _is_connection)
        return running.start_background_task(coro, wrap, name, description, context)
    except BaseException:
        coro.close()
        raise


def _run_inline(coro: Coroutine[Any, Any, T], name: str, tasks: list[asyncio.Task[Any]] | None) -> Future[T]:
    """Run it on this thread, in its connection and its transaction: at once, or as one of `tasks` in async code."""
    future: Future[T] = Future()

    async def run() -> None:
        try:
            future.set_result(await coro)
        except BaseException as exc:
            future.set_exception(exc)
            raise

    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        async_to_sync(run)()
        return future
    if tasks is None:
        coro.close()
        raise RuntimeError(
            f"background task {name}: is to be run inline, and was started by async code of no request of "
            "wsgi_loop.testing.Client. Start it in sync code, or leave inline_background_tasks() out."
        )
    tasks.append(loop.create_task(run(), name=f"background task {name}"))
    return future


def _is_connection(value: object) -> bool:
    # By its type and its own attributes alone: to ask a lazy object for anything else would evaluate it.
    cls = type(value)
    return issubclass(cls, BaseCache) or (hasattr(cls, "close") and "alias" in getattr(value, "__dict__", ()))
