"""The process loop, and background tasks, as asgiref meets them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, sync_to_async

from ..conf import Options
from ..process_loop import ProcessLoop
from ..threads import SyncThread
from .adapters import Adapter
from .calls import AsgirefCall
from .requests import SharedLoop
from .storage import SCOPE, threadlocal


class ProcessAdapter(Adapter):
    """For all calls on a process loop: those of requests, each in its own way, and those of background tasks."""

    def adapt(self, coroutine: Coroutine[Any, Any, Any]) -> AsgirefCall:
        calls = getattr(threadlocal.__dict__.get(SCOPE), "calls", None)
        if isinstance(calls, SharedLoop):
            return calls.adapter.adapt(coroutine)
        arguments = inspect.getcoroutinelocals(coroutine)
        return AsgirefCall(coroutine, arguments["call_result"], arguments["awaitable"])


def make_process_loop(options: Options, end_thread: Callable[[], object]) -> ProcessLoop:
    """Return a process loop, not started, with one thread for the thread-sensitive calls of what its keepers hold.

    end_thread: called on that thread, if it was used, as the last thing.
    """
    executor = SyncThread("wsgi-sync-resources")

    def release() -> Future[Any] | None:
        if AsyncToSync.loop_thread_executors.pop(running.loop, None) is None:
            return None
        ended = executor.submit(end_thread) if executor.is_used else None
        executor.shutdown()
        return ended

    running = ProcessLoop(
        options.loop_factory,
        options.shutdown_timeout,
        ProcessAdapter(),
        options.lifespan,
        options.max_background_tasks,
        release,
    )
    AsyncToSync.loop_thread_executors[running.loop] = executor  # type: ignore[assignment]
    return running


async def run_on_thread(
    executor: SyncThread, end_thread: Callable[[], object], coroutine: Coroutine[Any, Any, Any]
) -> Any:
    """Await `coroutine`, with `executor` for its thread-sensitive calls.

    end_thread: called on that thread, if it was used, as the last thing.
    """
    async with ThreadSensitiveContext() as context:
        SyncToAsync.context_to_thread_executor[context] = executor
        try:
            return await coroutine
        finally:
            try:
                if executor.is_used:
                    await sync_to_async(end_thread)()
            finally:
                # Not left to asgiref, which starts one more thread to wait for the end of this one.
                SyncToAsync.context_to_thread_executor.pop(context, None)
                executor.shutdown()
