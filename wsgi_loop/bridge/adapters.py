"""Make loop calls of what asgiref hands over to a loop."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import AsyncToSync

from ..calls import CallsContext, RequestTask
from ..loops import RunningLoop
from ..threadless import ThreadlessLoop
from .calls import AsgirefCall
from .executors import RequestThreadExecutor, ThreadlessCallExecutor, Waking, Work
from .storage import LOOP, SCOPE, threadlocal

_MAIN_WRAP = AsyncToSync.main_wrap.__code__


class Adapter:
    """Makes an `AsgirefCall` of a coroutine that asgiref hands over, on the thread that makes the call."""

    def recognizes(self, args: tuple[Any, ...]) -> bool:
        return len(args) == 1 and getattr(args[0], "cr_code", None) is _MAIN_WRAP

    def adapt(self, coroutine: Coroutine[Any, Any, Any]) -> AsgirefCall:
        raise NotImplementedError

    def lend(self, running: RunningLoop, executor: Any, function: Callable[[], Any]) -> asyncio.Future[Any] | None:
        if not isinstance(executor, CurrentThreadExecutor):
            return None
        work = Work(running, function)
        executor.submit(work).add_done_callback(work.refuse)
        return work.future


class RequestAdapter(Adapter):
    """For the calls of one request."""

    def __init__(
        self, executor: RequestThreadExecutor, task: RequestTask, calls_context: weakref.ref[CallsContext]
    ) -> None:
        self._executor = executor
        self._task = task
        self._calls_context = calls_context
        self._first = True
        self._base: CurrentThreadExecutor | None = None

    def prepare(self, executor: CurrentThreadExecutor) -> None:
        """Make an executor that a request thread waits in, which is as asgiref makes it, one for this loop."""

    def begin(self, base: CurrentThreadExecutor | None) -> None:
        """Told of a first call, which is never nested in another one of its request: in one of an outer one it may."""
        if self._first:
            self._first = False
            self._base = base

    def adapt(self, coroutine: Coroutine[Any, Any, Any]) -> AsgirefCall:
        # It has not been started, so these are its arguments.
        arguments = inspect.getcoroutinelocals(coroutine)
        call_result, awaitable = arguments["call_result"], arguments["awaitable"]
        current = AsyncToSync.executors.current
        thread = threadlocal.__dict__
        scope = thread.get(SCOPE, thread.get(LOOP))
        # Elsewhere than inside the request it is sync code that a task runs on a thread of its own, with any executor.
        is_inside = getattr(getattr(scope, "calls", None), "adapter", None) is self
        if is_inside:
            self.begin(current._old_executor)
        # A call that is made below another one, or by sync code that a task runs, finds that one's executor instead.
        if is_inside and current._old_executor is self._base and not self._executor.serving:
            self._executor.pass_on_to(current)
            calls_context = self._calls_context()
            if calls_context is not None:
                if arguments["task_context"] is not None:
                    # asgiref never takes what the thread's last sync_to_async call has left there off the thread. When
                    # that call is cancelled it would cancel this one, and wait for the request's whole task.
                    coroutine.close()
                    coroutine = AsyncToSync.main_wrap(**arguments | {"task_context": None})
                return AsgirefCall(coroutine, call_result, awaitable, self._task, calls_context)
        self._executor.watch(current)
        return AsgirefCall(coroutine, call_result, awaitable, self._task)


class ThreadlessAdapter(RequestAdapter):
    """For the calls of a request whose loop runs on the request thread."""

    running: ThreadlessLoop

    def adapt(self, coroutine: Coroutine[Any, Any, Any]) -> AsgirefCall:
        calls = getattr(threadlocal.__dict__.get(SCOPE), "calls", None)
        # Not so on a thread of the loop's default executor: that waits for the request thread to run the loop. A scope
        # that is being closed has let go of its calls.
        if (calls is not None and calls.adapter is self) or self.running.is_driven_here():
            self.prepare(AsyncToSync.executors.current)
        return super().adapt(coroutine)

    def prepare(self, executor: Any) -> None:
        executor.__class__ = ThreadlessCallExecutor
        executor._running = self.running
        executor._work_items = Waking(self.running)
