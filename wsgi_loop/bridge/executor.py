"""Where thread-sensitive calls of async code wait for the thread that has to run them. Knows asgiref's executors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine
from contextvars import Context
from queue import Empty, SimpleQueue
from threading import get_ident
from typing import Any, Protocol, cast

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.local import _Storage
from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, sync_to_async

from ..threads import SyncThread
from .storage import threadlocal

#: Where sync_to_async looks for an executor.
CURRENT = AsyncToSync.executors._storage._data
#: By loop, for async code with no executor in its context.
loop_executors = cast(dict[Any, Any], AsyncToSync.loop_thread_executors)


class Waited(Protocol):
    """What a thread waits for. Whoever ends that calls `Executor.ring` afterwards."""

    def done(self) -> bool: ...


class Executor(CurrentThreadExecutor):
    """What a thread runs while it waits for a loop call.

    The outermost calls of a request share one, the `bottom` executor. A nested call has its own, so what an outer call
    asks for waits until the sync code below it has ended. A task that outlives its call goes on with that call's
    executor, which passes the work on: to the enclosing one, and at last to the bottom, where the work waits for the
    request's next loop call, its next body step or its end.

    A `SimpleQueue` takes no lock of Python's, so a finalizer or a signal handler may come at any moment.

    owner, options: those of the request. outer: the enclosing executor. wake: called on any thread, when there is work.
    """

    # For asgiref's own executors, which walk down to this one.
    _work_ready = threading.Condition()
    #: When it ended, on the clock of `time.monotonic()`.
    over_since = 0.0

    def __init__(self, owner: str, options: Any, outer: Executor | None, wake: Callable[[], object]) -> None:
        self.owner = owner
        self.options = options
        self.outer = outer
        self.over = False
        #: One object for each thread that waits with it: nearly always one at most.
        self._waiting: set[object] = set()
        self.jobs: SimpleQueue[Any] = SimpleQueue()
        self._wake = wake
        self.thread_id = get_ident()
        #: What to set `CURRENT` to.
        self.storage: Any = _Storage(self.thread_id, {"current": self})

    def move_here(self) -> None:
        """Make this thread the one that runs what comes."""
        self.thread_id = get_ident()
        self.storage = _Storage(self.thread_id, {"current": self})

    @property
    def _work_thread(self) -> Any:  # type: ignore[override]
        """asgiref's `submit` compares it with the current thread, and refuses work of the thread that waits."""
        return threading.current_thread() if get_ident() == self.thread_id else None

    @property
    def bottom(self) -> Executor:
        executor = self
        while executor.outer is not None:
            executor = executor.outer
        return executor

    @property
    def _old_executor(self) -> Any:  # type: ignore[override]
        return self.outer

    @property
    def _broken(self) -> Any:  # type: ignore[override]
        if self.over and self.outer is None:
            raise RuntimeError(
                f"{self.owner} is over, and with it its thread for thread-sensitive calls (sync_to_async, the ORM), "
                "which a task that it left running has made. Await the task before the request ends, or start it with "
                "wsgi_loop.create_background_task(), which gives it a thread of its own."
            )
        return self.over

    @property
    def _work_items(self) -> Any:  # type: ignore[override]
        return self

    def append(self, item: Any) -> None:
        """asgiref's `submit` calls this, for async code that runs on another loop than the request's."""
        self.put(item)

    def living(self) -> Executor:
        """Return the executor that runs what is put here now. Raises RuntimeError when there is none any more."""
        executor = self
        while executor._broken:
            assert executor.outer is not None
            executor = executor.outer
        return executor

    def put(self, job: Any) -> None:
        """Have the waiting thread call `job.run()`."""
        executor = self.living()
        executor.jobs.put(job)
        if executor.over:
            # It has ended in between, and may have looked for work already.
            executor.quit()
        executor._wake()

    def ring(self) -> None:
        """Let the waiting thread see if what it waits for is done."""
        self.jobs.put(None)

    def serve_until(self, waited: Waited, timeout: float | None = None) -> bool:
        """Run what comes until `waited` is done, or `timeout` seconds have passed. Returns whether it is done."""
        deadline = None if timeout is None else time.monotonic() + timeout
        me = object()
        self._waiting.add(me)
        try:
            while not waited.done():
                try:
                    job = self.jobs.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
                except Empty:
                    return waited.done()
                if job is not None:
                    run_here(job.run)
                elif len(self._waiting) > 1 and not waited.done():
                    # It may have rung for another thread of the request, which waits here too.
                    self.ring()
                    time.sleep(0.001)
                del job
            return True
        finally:
            self._waiting.discard(me)
            if self._waiting:
                self.ring()

    def serve(self) -> None:
        """Run what is waiting."""
        while not self.jobs.empty():
            job = self.jobs.get()
            if job is not None:
                run_here(job.run)

    def quit(self) -> None:
        """Run nothing from now on. What is waiting is passed on, or refused where there is nobody to pass it to."""
        self.over_since = time.monotonic()
        self.over = True
        self.storage = None  # a cycle
        while not self.jobs.empty():
            job = self.jobs.get()
            if job is None:
                continue
            if self.outer is not None:
                self.outer.put(job)
            else:
                getattr(job, "refuse", job.future.cancel)()
        if self._waiting:
            # What has rung for them was taken above.
            self.ring()


def run_here(function: Callable[[], Any]) -> Any:
    """Call sync code for async code, on the thread of a request.

    asgiref leaves the loop and a `task_context` on the thread: a later loop call would be tied to them.
    """
    thread = threadlocal.__dict__
    found = thread.copy()
    try:
        return function()
    finally:
        thread.clear()
        thread.update(found)


def enclosing_executor(context: Context | None = None) -> Executor | None:
    """Return the executor of the loop call that a context, the current one, belongs to, if it is a request's."""
    storage = CURRENT.get(None) if context is None else context.get(CURRENT)
    executor = None if storage is None else storage.data.get("current")
    while executor is not None and not isinstance(executor, Executor):
        executor = executor._old_executor
    return executor


def current_executor(context: Context | None = None) -> Executor | None:
    """Return the bottom executor of the request that a context, the current one, belongs to, if any."""
    executor = enclosing_executor(context)
    return None if executor is None else executor.bottom


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
