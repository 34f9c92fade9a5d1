"""The event loop of a process, on which many requests are at a time.

Knows asyncio and threads, and nothing of Django or asgiref. `process` keeps the one that there is, and `loops` says who
owns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import socket
import time
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any

from .bridge.executor import Executor, enclosing_executor
from .calls import NoLoop, RequestTask, name_of
from .counters import counters
from .loops import Door, LoopFactory, RunningLoop
from .resources import AsyncContextFactory, context_of, keepers_of
from .threads import SyncThreads, stack_of
from .watchdog import Watchdog

logger = logging.getLogger("wsgi_loop")

#: Seconds for what is to happen at once, on a busy machine.
_MOMENT = 1.0


def _executor_of(task: asyncio.Task[Any]) -> Executor | None:
    """Return the executor of the request's loop call that a task belongs to, if there is one."""
    context = context_of(task)
    return None if context is None else enclosing_executor(context)


class ProcessLoop(RunningLoop):
    """The loop of a whole process, on which many requests are at a time.

    lifespan: makes the async context manager that is open for as long as the loop takes calls. startup_timeout: seconds
    that it has to be entered. max_background_tasks: how many may be in flight. blocked_after: seconds after which it is
    logged that the loop stands still. threads: run sync code. release: called when no task is left, and its future
    awaited; or when the loop is given up, and no more.
    """

    #: Whether it is ready, and not closed.
    is_open = False
    _has_users_executor = False
    remedy = "They had SHUTDOWN_TIMEOUT seconds to end by themselves."

    def __init__(
        self,
        factory: LoopFactory,
        timeout: float,
        door: Door,
        lifespan: AsyncContextFactory | None,
        startup_timeout: float,
        max_background_tasks: int,
        blocked_after: float | None,
        threads: SyncThreads,
        release: Callable[[], Future[Any] | None],
    ) -> None:
        #: Done when calls may come; fails with what the lifespan raised.
        self.ready: Future[None] = Future()
        self._lifespan = lifespan
        self._startup_timeout = startup_timeout
        self._release_resources = release
        #: For sync code that may run on any thread. And for looking up host names, which is not to wait for that.
        self.threads = threads
        self._lookups = SyncThreads("wsgi-lookup")
        self._max_background_tasks = max_background_tasks
        #: What to call the background tasks in logs: by their futures, and by themselves.
        self._background: dict[Future[Any], str] = {}
        self._descriptions: dict[asyncio.Task[Any], str] = {}
        super().__init__(factory, timeout, "The process loop", door)
        keepers_of(self.loop).end_with_tasks = False
        self.watchdog = blocked_after and Watchdog(
            self.loop, blocked_after, self.post_to_open, lambda: self.thread_id, self._describe_current
        )
        self._set_default_executor: Callable[[Any], None] = self.loop.set_default_executor
        self.loop.__dict__["set_default_executor"] = self._let_default_executor

    # --- on any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the loop's thread. Raises RuntimeError if it can not be started."""
        self.post(self._open_soon, context=contextvars.Context())
        super().start()
        if self.watchdog:
            self.watchdog.start()

    @property
    def has_failed(self) -> bool:
        """Whether another one has to take its place: it could not be started, or has ended."""
        return self._is_closed or (self.ready.done() and self.ready.exception() is not None)

    def wait_until_ready(self) -> None:
        """Wait for the lifespan. Raises what that raises, or RuntimeError when it takes too long."""
        try:
            self.ready.result(self._startup_timeout + _MOMENT)
        except TimeoutError:
            if self.ready.done():
                raise  # the lifespan's own
            # Its thread does not come to it.
            stack = stack_of(self.thread_id)
            self._fail(RuntimeError(f"{self._too_slow()} It blocks the loop's thread:\n{stack}"))
            self.close_soon()
            self.ready.result()

    def _too_slow(self) -> str:
        return (
            f"LIFESPAN ({name_of(self._lifespan)}) was not entered within {self._startup_timeout} s (STARTUP_TIMEOUT)."
        )

    def _fail(self, exc: Exception) -> None:
        with self._lock:
            self._accepting = False
        if self.ready.done():
            return  # it was given up
        logger.error("The process loop could not be started, because its LIFESPAN failed", exc_info=exc)
        with contextlib.suppress(InvalidStateError):
            self.ready.set_exception(exc)

    def start_background_task(
        self,
        coroutine: Coroutine[Any, Any, Any],
        wrap: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]],
        name: str,
        description: str,
        context: contextvars.Context,
    ) -> Future[Any]:
        """Run `wrap(coroutine)` in a task, in `context`. Returns a future of what it returns.

        Raises RuntimeError when there are too many, or the loop takes no more.
        """
        future: Future[Any] = Future()

        def start() -> None:
            if future.cancelled():
                coroutine.close()
                self._settle_future(future, None)
                return
            try:
                task = self.loop.create_task(wrap(coroutine), name=name, context=context)
            except BaseException as exc:  # a task factory of the user's
                coroutine.close()
                self._settle_future(future, exc)
                return
            self._descriptions[task] = description
            task.add_done_callback(lambda task: self._end_background_task(task, coroutine, future))
            # A future keeps its callbacks, and a task its context: whoever keeps the future is to keep no context.
            held = weakref.ref(task)
            future.add_done_callback(lambda future: self._cancel_soon(held()) if future.cancelled() else None)

        with self._lock:
            if not self._accepting:
                raise NoLoop(f"{self.owner} has ended, as this process is about to")
            if len(self._background) >= self._max_background_tasks:
                names = Counter(self._background.values()).most_common(3)
                raise RuntimeError(
                    f"{len(self._background)} background tasks are in flight in this process, as many as "
                    f"WSGI_LOOP['MAX_BACKGROUND_TASKS'] allows. Most: "
                    f"{', '.join(f'{number} x {name}' for name, number in names)}. Use a task queue, or raise it."
                )
            self._background[future] = description
            counters.background_started += 1
            self.post(start, context=contextvars.Context())
        return future

    def _cancel_soon(self, task: asyncio.Task[Any] | None) -> None:
        if task is None:
            return
        self.post_to_open(task.cancel)

    def give_up(self) -> None:
        super().give_up()
        for future in list(self._background):
            self._settle_future(future, CancelledError(f"{self.owner} was given up"))
        with contextlib.suppress(InvalidStateError):
            self.ready.set_exception(RuntimeError(f"{self.owner} was given up before it was ready"))
        self.threads.shutdown()
        self._lookups.shutdown()
        self._release_resources()

    def _settle_future(self, future: Future[Any], exception: BaseException | None, result: Any = None) -> None:
        if self._background.pop(future, None) is None:
            return  # it was given up
        counters.background_ended += 1
        if not future.set_running_or_notify_cancel():
            counters.background_cancelled += 1
            return  # of which concurrent.futures.wait() has been told just now
        if isinstance(exception, CancelledError):
            counters.background_cancelled += 1
        elif exception is not None:
            counters.background_failed += 1
        if exception is None:
            future.set_result(result)
        else:
            future.set_exception(exception)

    def leave(self, request_task: RequestTask, executor: Executor) -> None:
        """End a request's task. Waits at most `timeout` seconds for a call in it, which nobody waits for any more.

        executor: runs on this thread what the call needs to run here meanwhile.
        """
        if not request_task.running() or self._given_up:
            self.leave_soon(request_task)
            return
        ended: Future[None] = Future()
        ended.add_done_callback(lambda _: executor.ring())
        if not self.post_to_open(self._end_request_task, request_task, ended):
            return
        if not executor.serve_until(ended, self.timeout):
            logger.error(
                "%s: %s s (SHUTDOWN_TIMEOUT) after it was cancelled this was still running, and is given up: %s. "
                "Let a cancelled task end, and keep blocking calls out of async code.",
                request_task.owner,
                self.timeout,
                ", ".join(sorted(request_task.running().values())),
            )

    def leave_soon(self, request_task: RequestTask) -> None:
        """The same, and wait for nothing. Takes no lock: a finalizer may call it."""
        self.post_to_open(self._end_request_task, request_task, None)

    def shut_down(self) -> None:
        """Close the loop. Waits at most `timeout` seconds for what runs, and as long again for what it then cancels."""
        self.close_soon()
        try:
            self.ended.result(2 * self.timeout + 1)
        except TimeoutError:
            pass
        finally:
            # Also when a signal interrupts the waiting: what is lost then is named.
            self.give_up()

    def _let_default_executor(self, executor: Any) -> None:
        """Stands in for the loop's own method: from now on, what the user has set runs sync code."""
        self._has_users_executor = True
        self._set_default_executor(executor)

    def _run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> Any:
        if executor is None:
            if function in (socket.getaddrinfo, socket.getnameinfo, getattr(self.loop, "_getaddrinfo_debug", None)):
                executor = self._lookups
            elif not self._has_users_executor:
                executor = self.threads
        return super()._run_in_executor(executor, function, *args)

    # --- on the loop thread --------------------------------------------------------------------------------------

    def _open_soon(self) -> None:
        self.new_task(self._open(), "wsgi-loop start", contextvars.Context())

    async def _open(self) -> None:
        try:
            if self._lifespan is not None:
                async with asyncio.timeout(self._startup_timeout) as bound:
                    await keepers_of(self.loop).get("LIFESPAN", self._lifespan)
        except BaseException as exc:
            failure: Any = exc
            if bound.expired():
                failure = RuntimeError(f"{self._too_slow()} Bound what it waits for, or raise STARTUP_TIMEOUT.")
            elif not isinstance(exc, Exception):
                # A server would take it for its own end.
                failure = RuntimeError(f"LIFESPAN ({name_of(self._lifespan)}) was ended by {exc!r}")
                failure.__cause__ = exc
            self._fail(failure)
            self._begin_shut_down()
        else:
            with contextlib.suppress(InvalidStateError):
                self.ready.set_result(None)
                self.is_open = True

    def _end_request_task(self, request_task: RequestTask, ended: Future[None] | None) -> None:
        """End it, and what it still runs. ended: for whoever waits for that."""
        cut_off = request_task.running()
        self._request_tasks.discard(request_task)
        request_task.end()
        if not cut_off:
            if ended is not None:
                ended.set_result(None)
            return
        counters.tasks_cut_off += len(cut_off)
        names = ", ".join(sorted(cut_off.values()))
        logger.warning("%s: ended while %s still ran, which is cancelled.", request_task.owner, names)
        left = set(cut_off)

        def done(task: asyncio.Task[None]) -> None:
            left.discard(task)
            if not left and ended is not None:
                ended.set_result(None)

        for task in cut_off:
            task.add_done_callback(done)
            task.cancel()

    def _describe_current(self) -> str:
        """Name the task that runs now, and whose it is. Called on any thread."""
        task = asyncio.current_task(self.loop)
        if task is None:
            return f"{self.owner}: a callback"
        owner = next((found.owner for found in self._request_tasks.copy() if task in found.running()), None)
        if owner is None:
            executor = _executor_of(task)
            owner = self.owner if executor is None else executor.owner
        return f"{owner}: {self._describe(task)}"

    def _close(self) -> None:
        if self.watchdog:
            self.watchdog.stop()
        self.is_open = False
        super()._close()

    def _describe(self, task: asyncio.Task[Any]) -> str:
        return self._descriptions.get(task) or super()._describe(task)

    def _end_background_task(
        self, task: asyncio.Task[Any], coroutine: Coroutine[Any, Any, Any], future: Future[Any]
    ) -> None:
        description = self._descriptions.pop(task)
        # It was never started if the task was cancelled before its first step.
        coroutine.close()
        if task.cancelled():
            self._settle_future(future, CancelledError(f"The {description} was cancelled"))
            return
        exception = task.exception()
        if exception is not None:
            logger.error("The %s failed", description, exc_info=exception)
        self._settle_future(future, exception, None if exception else task.result())

    async def _drain(self) -> None:
        """Wait for background tasks, and for tasks that requests have left, until they had their time.

        So what lives as long as a client in a module, such as the reader of its connection, is rarely waited for: the
        request that opened the client has long ended.
        """
        end = time.monotonic() + self.timeout
        while True:
            now = time.monotonic()
            until = {task: at for task in self._unended() if (at := self._may_run_until(task, end)) > now}
            if not until:
                return
            await asyncio.wait(until, timeout=min(until.values()) - now)
            await self._settle_tasks()

    def _may_run_until(self, task: asyncio.Task[Any], end: float) -> float:
        """Return when a task will have had `timeout` seconds from its request's end on, at most `end`."""
        executor = None if task in self._descriptions else _executor_of(task)
        if executor is None or not executor.bottom.over:
            return end
        return min(executor.bottom.over_since + self.timeout, end)

    async def _release(self, deadline: float) -> None:
        self.threads.shutdown()
        self._lookups.shutdown()
        for ended in (self.threads.ended, self._lookups.ended, self._release_resources()):
            if ended is not None:
                await asyncio.wait_for(asyncio.wrap_future(ended), max(deadline - self.loop.time(), 0.001))
