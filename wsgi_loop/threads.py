"""The threads that event loops run on, and threads for sync code. Knows nothing of asyncio or Django."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from types import FrameType
from typing import Any

#: Python 3.12.0 and 3.12.1 start no thread when the end of the process has begun (CPython's issue 113964).
STARTS_NONE_AT_EXIT = (3, 12) <= sys.version_info < (3, 12, 2)

_numbers = itertools.count(1)


def check_threads() -> None:
    """Raise RuntimeError where gevent or eventlet have patched `threading`: an event loop in a greenlet would be seen
    as running by all of them."""
    gevent = sys.modules.get("gevent.monkey")
    eventlet = sys.modules.get("eventlet.patcher")
    for name, patched in (
        ("gevent", gevent is not None and gevent.is_module_patched("threading")),
        ("eventlet", eventlet is not None and eventlet.is_monkey_patched("thread")),
    ):
        if patched:
            raise RuntimeError(
                f"wsgi-loop needs real threads, and {name} has replaced them in this process: an event loop in one "
                "greenlet would look like a running loop to all others. Use gunicorn's sync or gthread workers "
                f"(--worker-class gthread) in place of the {name} worker."
            )


def new_thread(work: Callable[[], None]) -> threading.Thread:
    """Return a loop thread, which has not been started."""
    return threading.Thread(target=work, name=f"wsgi-loop-{next(_numbers)}", daemon=True)


def start(thread: threading.Thread) -> None:
    """Start a loop thread. Raises RuntimeError if that can not be done."""
    check_threads()
    try:
        # An empty context: from Python 3.14 on, a thread may inherit its starter's, here a request's.
        contextvars.Context().run(thread.start)
    except RuntimeError as exc:
        raise RuntimeError(f"A loop thread could not be started: {exc}") from exc


def has_started(thread: threading.Thread) -> bool:
    """Tell if a thread runs whose `start` was interrupted. Waits a moment for the thread."""
    deadline = time.monotonic() + 0.2
    while thread.ident is None and time.monotonic() < deadline:
        time.sleep(0.001)
    return thread.ident is not None


def frame_of(thread_id: int | None) -> FrameType | None:
    """Return what a thread runs now. None: there is no such thread any more, or not yet."""
    return sys._current_frames().get(thread_id or 0)


def stack_of(thread_id: int | None) -> str:
    """Return where a thread is now, as a traceback has it."""
    frame = frame_of(thread_id)
    return "".join(traceback.format_stack(frame)) if frame is not None else ""


class SyncThread(Executor):
    """One thread for sync code, started when it is first used. The end of the process does not wait for it.

    A thread of `ThreadPoolExecutor` would be waited for, for ever if what it runs blocks.
    """

    def __init__(self, name: str) -> None:
        self.is_used = False
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(self._jobs,), name=name, daemon=True)
        if STARTS_NONE_AT_EXIT:
            contextvars.Context().run(self._thread.start)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._thread.ident is None:
                contextvars.Context().run(self._thread.start)
            self.is_used = True
        self._jobs.put((future, functools.partial(function, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the thread end when it has run what it was given. Waits for nothing."""
        self._jobs.put(None)

    def __del__(self) -> None:
        # For a task that was never started.
        self.shutdown()

    @staticmethod
    def _work(jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
        while (job := jobs.get()) is not None:
            future, function = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as exc:
                    future.set_exception(exc)
            # While it waits for the next one, it is not to hold what this one held.
            del job, future, function


class SyncThreads(Executor):
    """Threads for sync code, started as they are needed, and kept. The end of the process does not wait for them.

    around: called on the thread before and after each call. end: called on a thread that was used, as its last thing.

    At most `MOST` calls run at a time. A call that waits for async code does not count, for what it waits for may need
    a thread too: however many do so, none of them waits for ever.
    """

    MOST = 64

    def __init__(
        self, name: str, around: Callable[[], object] = lambda: None, end: Callable[[], object] = lambda: None
    ) -> None:
        self._name = name
        self._around = around
        self._end = end
        #: Re-entrant, for finalizers.
        self._changed = threading.Condition()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: set[int | None] = set()
        self._starting = 0
        self._idle = 0
        self._waiting = 0
        self._is_over = False
        #: Done when no thread is left, after `shutdown`.
        self.ended: Future[None] = Future()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        job = (future, functools.partial(function, *args, **kwargs))
        with self._changed:
            if self._is_over:
                raise RuntimeError("The process loop has ended, and runs no sync code any more")
            self._jobs.append(job)
            try:
                self._see_to_jobs()
            except RuntimeError:
                if not self._threads and not self._starting:
                    self._jobs.remove(job)
                    raise
        return future

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Called by a thread that waits for async code. Does nothing on a thread that is none of these."""
        if threading.get_ident() not in self._threads:
            yield
            return
        with self._changed:
            self._waiting += 1
            with contextlib.suppress(RuntimeError):  # no more threads can be had
                self._see_to_jobs()
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and let the threads end with those that they have. Waits for nothing."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
            self._see_to_end()

    def _see_to_jobs(self) -> None:
        if self._idle >= len(self._jobs):
            self._changed.notify()
        elif self._jobs and len(self._threads) + self._starting - self._waiting < self.MOST:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._starting += 1
            try:
                contextvars.Context().run(thread.start)
            except BaseException:
                self._starting -= 1
                raise

    def _see_to_end(self) -> None:
        if self._is_over and not self._threads and not self._starting and not self.ended.done():
            self.ended.set_result(None)

    def _work(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._starting -= 1
            self._threads.add(me)
        try:
            while (job := self._next_job()) is not None:
                self._run(*job)
                # While it waits for the next one, it is not to hold what this one held.
                del job
            self._end()
        finally:
            with self._changed:
                self._threads.discard(me)
                self._see_to_end()

    def _next_job(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._changed:
            while not self._jobs:
                if self._is_over:
                    return None
                self._idle += 1
                try:
                    self._changed.wait()
                finally:
                    self._idle -= 1
            return self._jobs.popleft()

    def _run(self, future: Future[Any], function: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._around()
            try:
                result = function()
            finally:
                self._around()
        except BaseException as exc:
            future.set_exception(exc)
            # Its traceback leads here.
            del future, function
        else:
            future.set_result(result)
