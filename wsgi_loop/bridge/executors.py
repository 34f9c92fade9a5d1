"""Run on a request's thread what its tasks need to run there: thread-sensitive calls, such as the ORM's."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, cast

from asgiref.current_thread_executor import CurrentThreadExecutor, _WorkItem
from asgiref.sync import AsyncToSync

from ..calls import name_of
from ..loops import RunningLoop
from ..threadless import Errand, ThreadlessLoop
from .storage import SCOPE, threadlocal


class RequestThreadExecutor(CurrentThreadExecutor):
    """At the bottom of a request's executors: takes the thread-sensitive calls that no loop call waits for.

    A task that outlives its loop call goes on with that call's executor, which has quit. asgiref then walks down
    `_old_executor` until one takes the work: at last this one, which passes it to the loop call that the request
    thread waits in now, or keeps it until there is one, or until `serve`.
    """

    def __init__(self, owner: str, options: Any) -> None:
        super().__init__(None)
        #: Of the request, for whoever finds this in a context: whom to name in logs, and its options.
        self.owner = owner
        self.options = options
        self._over = False
        self._call: CurrentThreadExecutor | None = None
        self.serving = False
        #: Those of the request's loop calls.
        self._calls: weakref.WeakSet[CurrentThreadExecutor] = weakref.WeakSet()
        self._work_items = _Passing(self)

    @property
    def _broken(self) -> bool:
        if self._over:
            raise RuntimeError(
                f"{self.owner} is over, and with it its thread for thread-sensitive calls (sync_to_async, the ORM), "
                "which a task that it left running has made. Await the task before the request ends, or start it with "
                "wsgi_loop.create_background_task(), which gives it a thread of its own."
            )
        return False

    @_broken.setter
    def _broken(self, value: bool) -> None:
        """CurrentThreadExecutor starts out not broken, and only its own run_until_future, not used here, breaks it."""

    def pass_on_to(self, call: CurrentThreadExecutor) -> None:
        """A loop call is about to wait on the request thread, with `call` to run what it is given."""
        self.watch(call)
        with self._work_ready:
            call._old_executor = self
            self._call = call
            while self._work_items:
                call._work_items.append(self._work_items.popleft())

    def watch(self, call: CurrentThreadExecutor) -> None:
        """Remember whom to take over from, should the thread be interrupted while it waits with `call`."""
        self._calls.add(call)

    def _take_over(self, call: CurrentThreadExecutor) -> None:
        with call._work_ready:
            call._broken = True
            items, call._work_items = call._work_items, deque()
        with self._work_ready:
            self._work_items.extend(items)

    def serve(self) -> None:
        """Run what is waiting, on this thread."""
        while self._work_items:
            self._run_one()

    def serve_until(self, future: Future[None], timeout: float) -> bool:
        """Run what comes until `future` is done, or `timeout` seconds have passed. Returns whether it is done."""
        self._take_all_over()
        future.add_done_callback(self._wake)
        deadline = time.monotonic() + timeout
        while True:
            with self._work_ready:
                while not self._work_items and not future.done():
                    remaining = deadline - time.monotonic()
                    if remaining <= 0:
                        return False
                    self._work_ready.wait(remaining)
                if not self._work_items:
                    return True
            self._run_one()

    def _take_all_over(self) -> None:
        with self._work_ready:
            # Not to a call that may be waiting further up this very thread.
            self._call = None
        for call in list(self._calls):
            # Nobody else runs what is given to it: an exception has ended its wait, or it is further up this thread.
            if call._work_thread is threading.current_thread():
                self._take_over(call)

    def quit(self) -> None:
        """Refuse what comes from now on, and what nobody has run."""
        with self._work_ready:
            self._over = True
            self._call = None
            items = list(self._work_items)
            self._work_items.clear()
        for item in items:
            item.future.cancel()

    def kept(self) -> None:
        """Called when something has come that waits for `serve_until`, with the lock held."""

    def _wake(self, _: Future[None]) -> None:
        with self._work_ready:
            self._work_ready.notify_all()

    def _run_one(self) -> None:
        try:
            with self._work_ready:
                item = self._work_items.popleft()
        except IndexError:
            return
        self.run_of_task(item.run)

    def run_of_task(self, run: Callable[[], None]) -> None:
        """Run what a task has asked for, and not a loop call."""
        found, self.serving = self.serving, True
        try:
            run()
        finally:
            self.serving = found


class _OfTask(_WorkItem):
    """What a task has given to the bottom executor, whichever one runs it."""

    executor: RequestThreadExecutor

    def run(self) -> None:
        self.executor.run_of_task(super().run)


class _Passing(deque[Any]):
    """The bottom executor's queue. asgiref appends to it, holding the executor's lock."""

    def __init__(self, executor: RequestThreadExecutor) -> None:
        super().__init__()
        self._executor = weakref.proxy(executor)

    def append(self, item: Any) -> None:
        item.__class__ = _OfTask
        item.executor = self._executor
        call = self._executor._call
        if call is not None:
            with call._work_ready:
                if not call._broken:
                    call._work_items.append(item)
                    call._work_ready.notify()
                    return
        super().append(item)
        self._executor.kept()


class Work:
    """A thread-sensitive call on its way to the thread that runs it: `asyncio.wrap_future` would take a step more."""

    def __init__(self, running: RunningLoop, function: Callable[[], Any]) -> None:
        self.future: asyncio.Future[Any] = running.loop.create_future()
        self._running = running
        self._function = function

    @property
    def name(self) -> str:
        """That of the function that `SyncToAsync` was given, which is in the last argument of its own."""
        function: Any = self._function
        with contextlib.suppress(AttributeError, LookupError):
            function = function.args[-1].func
        return name_of(function)

    def __call__(self) -> None:
        if self.future.cancelled():
            return
        try:
            result = self._function()
        except BaseException as exc:
            running, fail = self._running, self._fail
            # The exception leads here, and the future leads to the exception.
            del self
            running.answer(fail, exc)
            del fail
        else:
            self._running.answer(self._succeed, result)

    def _succeed(self, result: Any) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def _fail(self, exception: BaseException) -> None:
        if self.future.done():
            return
        if isinstance(exception, StopIteration):
            # No future takes one, for it would end the coroutine that awaits it.
            failure = RuntimeError(f"{self.name} raised StopIteration")
            failure.__cause__ = exception
            exception = failure
        self.future.set_exception(exception)

    def refuse(self, item: Future[None]) -> None:
        if item.cancelled():
            self._running.answer(self.future.cancel)


class _Threadless(CurrentThreadExecutor):
    """An executor of a request whose loop runs on the request thread: errands for the thread, which leaves the loop."""

    _running: ThreadlessLoop

    @property
    def _work_thread(self) -> Any:
        # asgiref refuses work from the thread that is to do it, which would wait for itself: not so inside the loop.
        return None if self._running.is_running_here() else self.__dict__["_work_thread"]

    @_work_thread.setter
    def _work_thread(self, thread: threading.Thread) -> None:
        self.__dict__["_work_thread"] = thread

    def are_waiting(self) -> bool:
        return bool(self._work_items)

    def run(self) -> list[Errand]:
        ran: list[Errand] = []
        while self._work_items:
            ran.append(cast(Work, self._work_items[0].fn))
            self._run_one()
        return ran

    def _run_one(self) -> None:
        with self._work_ready:
            item = self._work_items.popleft()
        item.run()

    def view(self) -> str:
        return str(threadlocal.__dict__[SCOPE].view)


class ThreadlessCallExecutor(_Threadless):
    """What the request thread waits in for one loop call. asgiref has made it, as one of its own class."""

    def run_until_future(self, future: Future[Any]) -> None:
        self._running.drive(future, self)
        with self._work_ready:
            self._broken = True


class ThreadlessExecutor(_Threadless, RequestThreadExecutor):
    """At the bottom of a request's executors, as `RequestThreadExecutor`."""

    def serve_until(self, future: Future[None], timeout: float) -> bool:
        self._take_all_over()
        return self._running.drive(future, self, timeout)

    def kept(self) -> None:
        self._running.interrupt()

    def _run_one(self) -> None:
        RequestThreadExecutor._run_one(self)


class Waking(deque[Any]):
    """The queue of a call's executor, to which asgiref appends."""

    def __init__(self, running: ThreadlessLoop) -> None:
        super().__init__()
        self._running = running

    def append(self, item: Any) -> None:
        super().append(item)
        self._running.interrupt()


def request_executor() -> RequestThreadExecutor | None:
    """Return the bottom executor of the request that the current context belongs to, if any."""
    executor = getattr(AsyncToSync.executors, "current", None)
    while executor is not None and not isinstance(executor, RequestThreadExecutor):
        executor = executor._old_executor
    return executor
