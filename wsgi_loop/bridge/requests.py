"""A request's event loop as asgiref meets it: one to itself, on a loop thread or on its own, or the process's."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from operator import is_
from typing import Any

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import AsyncToSync, _restore_context

from .. import forks
from ..calls import CallsContext, LoopCall, NoLoop, RequestTask, name_of
from ..conf import Options
from ..loops import RequestLoop, RunningLoop
from ..process_loop import ProcessLoop
from ..threadless import ThreadlessLoop
from ..threads import NoThread
from . import watching
from .adapters import RequestAdapter, ThreadlessAdapter
from .calls import BodyEnd, BodyStep, LinedUp, advance
from .executors import RequestThreadExecutor, ThreadlessExecutor

#: Not even to be collected in a forked child: to close a loop there would take the parent's descriptors apart.
_inherited: list[RunningLoop] = []


def _are_same(a: contextvars.Context, b: contextvars.Context) -> bool:
    """Tell if two contexts hold the same objects. (`==` asks the objects if they are equal, and may take its time.)"""
    return len(a) == len(b) and all(map(is_, a, b)) and all(map(is_, a.values(), b.values()))


class RequestCalls:
    """A request's loop as asgiref meets it, made by its first loop call. Held by the request alone.

    So when a request is dropped without `close()`, this is collected, and gives the loop back.
    """

    _running: RunningLoop
    _executor_class = RequestThreadExecutor

    @property
    def _adapter_class(self) -> type[RequestAdapter]:
        return RequestAdapter

    def __init__(self, owner: str, options: Options) -> None:
        self.executor = self._executor_class(owner, options)
        self._context = CallsContext()
        self._task = RequestTask(owner)
        self.adapter = self._adapter_class(self.executor, self._task, weakref.ref(self._context))
        self._closed = False
        self._pid = forks.pid
        self._lined_up: LinedUp | None = None

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Hand over asgiref's coroutine. Raises RuntimeError when the loop takes no more calls."""
        if self._is_inherited():
            raise NoLoop(f"{self.executor.owner}: its event loop is the one of the process that was forked")
        self._submit(coroutine)

    def serve(self) -> None:
        """Run what its tasks wait for on this thread."""
        if not self._is_inherited():
            self.executor.serve()

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        raise NotImplementedError

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._running.loop

    def advance(self, iterator: AsyncIterator[Any]) -> Any:
        """Return the next item of an async iterator, or `END`, and meanwhile run here what needs to run here."""
        if (
            watching.watchers
            or asyncio._get_running_loop()
            or sys.exc_info()[1]
            or self._task.call
            or self._is_inherited()
        ):
            return advance(iterator, lambda: self.loop)
        executors: Any = AsyncToSync.executors
        found = getattr(executors, "current", None)
        self.adapter.begin(found)
        caller = contextvars.copy_context()
        # Taken, not read: another thread may come.
        lined_up, self._lined_up = self._lined_up, None
        executor = self._begin_step(lined_up)
        is_in_line = lined_up is not None and _are_same(caller, lined_up.caller)
        step = BodyStep(
            iterator, self._task, self._context, executor, lined_up.follows if lined_up and is_in_line else None
        )
        try:
            self._hand_over(step)
        except NoLoop:
            return advance(iterator, lambda: self.loop)
        try:
            executor.run_until_future(step.ended)
        finally:
            if step.context is not None and not (
                lined_up is not None and step.was_in_line and _are_same(step.context, lined_up.calls)
            ):
                _restore_context(step.context)
                executors.current = found
                caller = contextvars.copy_context()
        if step.context is not None and not step.is_apart:
            self._lined_up = LinedUp(caller, step.context, step.follows, executor)
        return step.take_result()

    def _begin_step(self, lined_up: LinedUp | None) -> CurrentThreadExecutor:
        """Return what is to run the thread-sensitive calls of a step on this thread."""
        if lined_up is None:
            executor = CurrentThreadExecutor(self.executor)
            self.adapter.prepare(executor)
        else:
            executor = lined_up.executor
            executor._work_thread = threading.current_thread()
            executor._broken = False
        self.executor.pass_on_to(executor)
        return executor

    def _hand_over(self, call: LoopCall) -> None:
        try:
            self._running.hand_over(lambda: call)
        except BaseException as exc:
            # An interrupt may have come when the loop had it already.
            if isinstance(exc, NoThread) or not self._running.has(call):
                call.coroutine.close()
            raise

    def end_body(self, iterator: Any) -> None:
        """Close an async iterator, and meanwhile run on this thread what that needs to run here.

        Waits for at most twice `SHUTDOWN_TIMEOUT`: after the first half it is cancelled, after the second given up.
        """
        running = self._running
        # The generator itself may close its response: its thread can not wait for itself.
        if self._is_inherited() or self._is_on_loop_thread():
            return
        executors: Any = AsyncToSync.executors
        found = getattr(executors, "current", None)
        self.adapter.begin(found)
        executors.current = self.executor
        context = contextvars.copy_context()

        async def end_body() -> None:
            _restore_context(context)
            await running.end_body(iterator, self.executor.owner)

        call = BodyEnd(end_body(), name_of(iterator), self._task, self._context)
        try:
            self._hand_over(call)
            if self.executor.serve_until(call.ended, 2 * running.timeout):
                _restore_context(self._context.context)
            else:
                self._give_up()
        finally:
            executors.current = found

    def _give_up(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Leave the loop, and meanwhile run on this thread what its tasks need to run here."""
        if self._closed:
            # Of a cycle that was dropped, the collector may find this before the file that closes its response.
            return
        self._closed = True
        if self._is_inherited():
            return
        try:
            if self._is_on_loop_thread():
                self._leave_soon()
            else:
                self._leave()
        finally:
            self._let_go()

    def _leave(self) -> None:
        raise NotImplementedError

    def _leave_soon(self) -> None:
        raise NotImplementedError

    def _let_go(self) -> None:
        self.executor.quit()

    def _is_on_loop_thread(self) -> bool:
        return self._running.thread_id == threading.get_ident()

    def _is_inherited(self) -> bool:
        """Tell if this was made before a fork: what it stands for is the parent's."""
        return self._pid != forks.pid

    def drop(self) -> bool:
        """Give the loop back and wait for nothing. Returns whether there was one to give back."""
        if getattr(self, "_closed", True) or self._is_inherited():
            return False
        self._closed = True
        self._leave_soon()
        self._let_go()
        return True

    def __del__(self) -> None:
        if self.drop():
            message = f"{self.executor.owner}: its response was dropped without close()"
            warnings.warn(message, ResourceWarning, source=self, stacklevel=2)


class OwnLoop(RequestCalls):
    """Scope "request": the request has a loop to itself, and closes it."""

    _loop_class: type[RequestLoop] = RequestLoop

    def __init__(self, owner: str, options: Options) -> None:
        super().__init__(owner, options)
        self._closed = True  # for as long as there is no loop to close
        self._running: RequestLoop = self._loop_class(
            options.loop_factory, options.shutdown_timeout, owner, self.adapter
        )
        self._closed = False
        # For what runs with no executor in its context: asgiref would send all of it to one thread of the process.
        AsyncToSync.loop_thread_executors[self._running.loop] = self.executor

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._running.submit(coroutine)

    def _leave(self) -> None:
        self._running.close(self.executor.serve_until)

    def _leave_soon(self) -> None:
        self._running.close_soon()

    def _give_up(self) -> None:
        self._running.give_up()

    def _let_go(self) -> None:
        super()._let_go()
        AsyncToSync.loop_thread_executors.pop(self._running.loop, None)

    def _is_inherited(self) -> bool:
        if not super()._is_inherited():
            return False
        if self._running not in _inherited:
            _inherited.append(self._running)
        return True


class ThreadlessCalls(OwnLoop):
    """Scope "request", the loop of which runs on the request thread."""

    _executor_class = ThreadlessExecutor
    _loop_class = ThreadlessLoop
    executor: ThreadlessExecutor
    adapter: ThreadlessAdapter
    _running: ThreadlessLoop

    @property
    def _adapter_class(self) -> type[RequestAdapter]:
        return ThreadlessAdapter

    def __init__(self, owner: str, options: Options) -> None:
        super().__init__(owner, options)
        self.dropped: list[Callable[[], object]] = []
        self._running.request = weakref.ref(self)
        self.executor._running = self.adapter.running = self._running
        # Till then, what asgiref finds for a task that is left over says that its request is over.
        forget: Any = AsyncToSync.loop_thread_executors.pop
        loop = self._running.loop
        self._running.ended.add_done_callback(lambda _: forget(loop, None))

    def let_go_of_dropped(self) -> None:
        while self.dropped:
            self.dropped.pop()()

    def _leave(self) -> None:
        self.let_go_of_dropped()
        super()._leave()

    def _leave_soon(self) -> None:
        self.let_go_of_dropped()
        super()._leave_soon()

    def _let_go(self) -> None:
        self.executor.quit()

    def _is_on_loop_thread(self) -> bool:
        return self._running.is_running_here()


class SharedLoop(RequestCalls):
    """Scope "process": the request's calls run on the process loop, along with those of others."""

    def __init__(self, owner: str, options: Options, running: ProcessLoop) -> None:
        super().__init__(owner, options)
        self._running: ProcessLoop = running

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._running.submit(coroutine, self.adapter)

    def _leave(self) -> None:
        self._running.leave(self._task, self.executor.serve_until)

    def _leave_soon(self) -> None:
        self._running.leave_soon(self._task)

    def _give_up(self) -> None:
        """Leaving the loop will: it is not this request's."""
