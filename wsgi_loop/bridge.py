"""Everything that depends on asgiref's internals. Knows nothing of Django.

`async_to_sync` looks for a running loop in thread-locals of `SyncToAsync`. What a request puts there stands in for a
loop that is made by the first call. From then on each call of async_to_sync, whichever way it comes, arrives as
asgiref's own coroutine (`AsyncToSync.main_wrap`) at the loop's `call_soon_threadsafe`, on the thread that makes the
call, and becomes a `LoopCall` there. A step of a body is one without that (`BodyStep`), but for unusual ones.

Nothing of asgiref is patched, but while somebody watches (at the end). What is read or set here was read in asgiref
3.12.1 and 3.13.0.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import itertools
import os
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from operator import is_
from types import CodeType, FrameType
from typing import Any, NamedTuple, Self, cast

from asgiref.current_thread_executor import CurrentThreadExecutor, _WorkItem

try:
    from asgiref.local import _Storage
except ImportError as exc:
    raise ImportError("wsgi-loop needs asgiref 3.12.1 or later: pip install 'asgiref>=3.12.1'") from exc
from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, _restore_context, sync_to_async

from . import forks
from .conf import Options
from .loops import CallsContext, LoopCall, NoLoop, ProcessLoop, RequestLoop, RequestTask, RunningLoop, name_of
from .resources import kept
from .threadless import Errand, ThreadlessLoop
from .threads import NoThread, SyncThread

_MAIN_WRAP = AsyncToSync.main_wrap.__code__

#: What asgiref keeps on a thread. Its `__dict__` is one and the same for as long as the thread lives.
threadlocal = SyncToAsync.threadlocal
#: There async_to_sync finds its loop, of which it calls `call_soon_threadsafe(loop.create_task, coroutine)`, ...
LOOP = "main_event_loop"
#: ... provided that this process has put it there, and not the one that it was forked from.
LOOP_PID = "main_event_loop_pid"
#: Where the scope that a thread is in stands on it once it has a loop; before that, it is the loop.
SCOPE = "wsgi_loop.scope"


def is_taken(exc: RuntimeError) -> bool:
    """Whether `Context.run` raised this, called where it is caught, because another thread is inside the context."""
    assert exc.__traceback__ is not None
    return exc.__traceback__.tb_next is None and str(exc).startswith("cannot enter context")


class _KeptOnThread(dict[str, Any]):
    """What a thread keeps in a `Local`, however many contexts look at it.

    A `Local` that is not thread-critical replaces its data by a changed copy, in the current context. With this for
    data, what one request adds is there for the next one on the thread.
    """

    def copy(self) -> Self:
        return self


def keep_on_thread(locals_: Iterable[Any]) -> None:
    """Let what is put in these `Local`s stay on this thread, in the current context and all that are copied from it."""
    for local in locals_:
        var = local._storage._data
        found = var.get(None)
        ident = threading.get_ident()
        data = found.data if found is not None and found.thread_id == ident else {}
        var.set(_Storage(ident, _KeptOnThread(data)))


def move_here(context: contextvars.Context, per_thread: Iterable[Any]) -> contextvars.Context:
    """Make what the `Local`s hold in `context` visible on this thread, to which they hide it otherwise.

    per_thread: `Local`s that are kept per thread on purpose. What this thread has in them replaces what is there.
    Returns the context, or a copy of it when another thread is inside it.
    """
    own = [(var := local._storage._data, var.get(None)) for local in per_thread]
    moved = context.copy()

    def rehome() -> None:
        _restore_context(moved)
        for var, storage in own:
            var.set(storage or _Storage(threading.get_ident(), {}))

    try:
        context.run(rehome)
    except RuntimeError as exc:
        if not is_taken(exc):
            raise
        context = moved.copy()
        context.run(rehome)
    return context


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


class _Waking(deque[Any]):
    """The queue of a call's executor, to which asgiref appends."""

    def __init__(self, running: ThreadlessLoop) -> None:
        super().__init__()
        self._running = running

    def append(self, item: Any) -> None:
        super().append(item)
        self._running.interrupt()


_NO_ANSWER = "This call or its event loop was ended before it had an answer"


class Answer(Future[Any]):
    """Holds back what a loop call returns until its coroutine has wholly ended.

    main_wrap answers before it has stored its contextvars for the caller, who would sometimes miss them; and what
    its frame holds (a response) would outlive the call by a moment.
    """

    _held: tuple[bool, Any] | None

    def set_result(self, result: Any) -> None:
        self._held = (True, result)

    def set_exception(self, exception: BaseException | None) -> None:
        self._held = (False, exception)

    def deliver(self) -> None:
        held, self._held = self._held, None
        if held is None or isinstance(held[1], GeneratorExit):
            held = False, asyncio.CancelledError(_NO_ANSWER)
        if held[0]:
            super().set_result(held[1])
        else:
            super().set_exception(held[1])


class AsgirefCall(LoopCall):
    """A call of async_to_sync."""

    __slots__ = ("_answer", "_awaitable", "_begun", "is_step")

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        answer: Future[Any],
        awaitable: Any,
        request_task: RequestTask | None = None,
        calls_context: CallsContext | None = None,
    ) -> None:
        self.is_step = getattr(awaitable, "cr_code", None) is _ADVANCE
        named = inspect.getcoroutinelocals(awaitable)["iterator"] if self.is_step else awaitable
        super().__init__(coroutine, name_of(named), request_task, calls_context)
        self._answer = answer
        self._awaitable = awaitable
        self._begun = False

    def begin(self) -> None:
        self._begun = True
        self._answer.__class__ = Answer
        self._answer._held = None  # type: ignore[attr-defined]

    def finish(self) -> None:
        if not self._begun:
            self.begin()
        try:
            # Neither may have been started: the task was cancelled before its first step, or there never was one.
            self.coroutine.close()
            close(self._awaitable)
        finally:
            self._awaitable = None
            self._answer.deliver()  # type: ignore[attr-defined]

    def abandon(self, message: str) -> None:
        if not self._begun:
            self.coroutine.close()
            self.begin()
            close(self._awaitable)
        self._answer.set_exception(RuntimeError(message))
        self._answer.deliver()  # type: ignore[attr-defined]


async def _advance(iterator: AsyncIterator[Any], loop_of: Callable[[], asyncio.AbstractEventLoop | None]) -> Any:
    if asyncio.get_running_loop() is not loop_of():
        # asgiref's own one, where there is none of the request's any more: to go on would look like the body's end.
        raise RuntimeError(f"The event loop of the body {name_of(iterator)} has ended before it was read to its end")
    return await anext(iterator, END)


_ADVANCE = _advance.__code__
#: What `advance` returns when there is nothing left.
END = object()
#: A step of a body by way of async_to_sync, where a `BodyStep` will not do.
advance = AsyncToSync(_advance)


class BodyCall(LoopCall):
    """What a request's loop does for an async body, while the request thread waits for it."""

    __slots__ = ("ended",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ended: Future[None] = Future()

    def finish(self) -> None:
        self.coroutine.close()
        self.ended.set_result(None)

    def abandon(self, message: str) -> None:
        if inspect.getcoroutinestate(self.coroutine) == inspect.CORO_CREATED:
            self.coroutine.close()
        self.ended.set_result(None)


class BodyEnd(BodyCall):
    """The last one, for which the request thread waits within a bound."""

    __slots__ = ()

    is_end = True


class LinedUp(NamedTuple):
    """How a step of a body left things: with the caller's context in line with that of the request's calls.

    follows: that of the latter. executor: for the thread-sensitive calls of the next step.
    """

    caller: contextvars.Context
    calls: contextvars.Context
    follows: int
    executor: CurrentThreadExecutor


class BodyStep(BodyCall):
    """A step of it, without what a call of async_to_sync makes anew for each."""

    __slots__ = ("_outcome", "context", "follows", "is_apart", "was_in_line")

    is_step = True

    def __init__(
        self,
        iterator: AsyncIterator[Any],
        request_task: RequestTask,
        calls_context: CallsContext,
        executor: CurrentThreadExecutor,
        follows: int | None,
    ) -> None:
        coroutine = self._advance(iterator, calls_context, executor, contextvars.copy_context())
        super().__init__(coroutine, name_of(iterator), request_task, calls_context)
        self.follows = follows
        self.was_in_line = False
        #: Whether it has a task of its own.
        self.is_apart = False
        self._outcome: tuple[Any, BaseException | None] | None = None
        #: The one that it ended in.
        self.context: contextvars.Context | None = None

    async def _advance(
        self,
        iterator: AsyncIterator[Any],
        calls_context: CallsContext,
        executor: CurrentThreadExecutor,
        caller: contextvars.Context,
    ) -> None:
        assert self.request_task is not None
        self.is_apart = asyncio.current_task() is not self.request_task.task
        self.was_in_line = not self.is_apart and self.follows == calls_context.follows
        if not self.was_in_line:
            _restore_context(caller)
            AsyncToSync.executors.current = executor
        try:
            self._outcome = await anext(iterator, END), None
        except GeneratorExit:
            raise
        except BaseException as exc:
            self._outcome = None, exc
        finally:
            self.follows = calls_context.follows
            self.context = contextvars.copy_context()

    def abandon(self, message: str) -> None:
        self._outcome = None, RuntimeError(message)
        super().abandon(message)

    def take_result(self) -> Any:
        (chunk, exc), self._outcome = self._outcome or (None, asyncio.CancelledError(_NO_ANSWER)), None
        if exc is None:
            return chunk
        try:
            raise exc
        finally:
            # Its traceback leads here.
            del exc


def close(awaitable: Any) -> None:
    """Close a coroutine, so that it does not warn that it was never awaited; nothing for another awaitable."""
    if hasattr(awaitable, "close"):
        awaitable.close()


def answer(coroutine: Coroutine[Any, Any, Any], exception: BaseException) -> None:
    """Let a call that asgiref has handed over, and that was not started, raise `exception`."""
    arguments = inspect.getcoroutinelocals(coroutine)
    coroutine.close()
    close(arguments["awaitable"])
    arguments["call_result"].set_exception(exception)


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
        if _watchers or asyncio._get_running_loop() or sys.exc_info()[1] or self._task.call or self._is_inherited():
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


#: Not even to be collected in a forked child: to close a loop there would take the parent's descriptors apart.
_inherited: list[RunningLoop] = []


class _Adapter:
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


class RequestAdapter(_Adapter):
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
        executor._work_items = _Waking(self.running)


class ProcessAdapter(_Adapter):
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


def detached_context(thread_id: int, is_connection: Callable[[object], bool]) -> contextvars.Context:
    """Return a copy of the current context in which nothing of asgiref ties what runs in it to a request.

    thread_id: the thread on which what `Local`s hold is to be visible. is_connection: tells what is not to be shared;
    a `Local` that holds such a thing is left out.
    """
    left_out = {
        AsyncToSync.executors._storage._data,
        SyncToAsync.thread_sensitive_context,
        SyncToAsync.deadlock_context,
        AsyncToSync.async_single_thread_context,
        kept,
    }
    detached = contextvars.Context()
    for var, value in contextvars.copy_context().items():
        if var in left_out:
            continue
        if isinstance(value, _Storage):
            if isinstance(value.data, _KeptOnThread) or any(map(is_connection, value.data.values())):
                continue
            value = _Storage(thread_id, value.data)
        detached.run(var.set, value)
    return detached


def request_executor() -> RequestThreadExecutor | None:
    """Return the bottom executor of the request that the current context belongs to, if any."""
    executor = getattr(AsyncToSync.executors, "current", None)
    while executor is not None and not isinstance(executor, RequestThreadExecutor):
        executor = executor._old_executor
    return executor


# --- Recording: the only place that wraps asgiref, for as long as somebody watches ------------------------------------


class WatchedCall:
    """A call of async_to_sync that was made while somebody watched.

    The numbers of its loop, thread and task, and of its request, are those of no other one in this process, ever. Those
    of the first three, `thread_name` and `served` are set when its coroutine takes its first step.
    """

    loop: int | None = None
    thread: int | None = None
    task: int | None = None
    thread_name = ""
    #: Whether the loop is one of ours.
    served = False
    end: float | None = None
    depth = 0
    request: int | None = None
    path: str | None = None

    def __init__(self, target: Any, parent: WatchedCall | None, frame: FrameType | None) -> None:
        self.name = name_of(target)
        self.location, environ = _look_around(frame, target)
        if parent is not None:
            self.depth, self.request, self.path = parent.depth + 1, parent.request, parent.path
        if environ is not None:
            # A dict can not be referred to weakly.
            self.request, _ = _environs.setdefault(id(environ), (next(_numbers), environ))
            self.path = environ.get("SCRIPT_NAME", "") + environ["PATH_INFO"]
            with contextlib.suppress(UnicodeError):  # Django has decoded it, once it has made its request
                self.path = self.path.encode("latin-1").decode()
        self.start = time.perf_counter()

    def arrive(self) -> None:
        """Called in the call's own task."""
        loop, thread = asyncio.get_running_loop(), threading.current_thread()
        with _watching:
            self.loop, self.thread, self.task = map(_number_of, (loop, thread, asyncio.current_task()))
        self.thread_name = thread.name
        self.served = isinstance(getattr(loop.call_soon_threadsafe, "__self__", None), RunningLoop)

    def leave(self, _: object = None) -> None:
        self.end = time.perf_counter()


class _WatchedContext:
    """Stands in for the list through which main_wrap takes its caller's context, as its first act, and returns it."""

    def __init__(self, call: WatchedCall, context: Any) -> None:
        self._call = call
        self._context = context

    def __getitem__(self, index: int) -> Any:
        self._call.arrive()
        return self._context[index]

    def __setitem__(self, index: int, value: Any) -> None:
        self._context[index] = value


# Re-entrant, as a finalizer may make a loop call.
_watching = threading.RLock()
_watchers: tuple[list[WatchedCall], ...] = ()
_unwrapped: list[tuple[str, Any, Any]] = []
_numbers = itertools.count(1)
_numbered: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
#: The requests that were met, by their environ's id, which is held here so that it stays the only one with it.
_environs: dict[int, tuple[int, dict[str, Any]]] = {}
_by_executor: weakref.WeakKeyDictionary[CurrentThreadExecutor, WatchedCall] = weakref.WeakKeyDictionary()
#: `calls`: those that the thread is in, None for one that has not been handed over yet.
_here = threading.local()
#: Whose code is nobody's, and where that of a request begins.
_FOREIGN = {"asgiref", "django", "wsgi_loop"} | sys.stdlib_module_names
_ENTRIES = {("wsgi_loop.scope", name) for name in ("start", "finish", "run", "_enter")}


@forks.in_child
def _watch_after_fork() -> None:
    global _watching
    _watching = threading.RLock()


def _number_of(found: Any) -> int:
    number = _numbered.get(found)
    if number is None:
        number = _numbered[found] = next(_numbers)
    return number


@contextlib.contextmanager
def watch_calls() -> Iterator[list[WatchedCall]]:
    """Give a list to which all loop calls of the process are added as they start, until the end of the block."""
    global _watchers
    calls: list[WatchedCall] = []
    with _watching:
        _watchers = (*_watchers, calls)
        if not _unwrapped:
            _wrap()
    try:
        yield calls
    finally:
        with _watching:
            _watchers = tuple(watcher for watcher in _watchers if watcher is not calls)
            if not _watchers:
                _environs.clear()
                _unwrap()


def _wrap() -> None:
    call: Any = AsyncToSync.__call__
    main_wrap: Any = AsyncToSync.main_wrap

    @functools.wraps(call)
    def watched_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        __traceback_hide__ = True
        calls = _here.__dict__.setdefault("calls", [])
        calls.append(None)
        try:
            return call(self, *args, **kwargs)
        finally:
            watched = calls.pop()
            if watched is not None:
                watched.leave()

    # Called by __call__ in the same thread. What it returns has to be what it was: see `_Adapter.recognizes`.
    @functools.wraps(main_wrap)
    def watched_main_wrap(
        self: Any, call_result: Any, exc_info: Any, task_context: Any, context: Any, awaitable: Any
    ) -> Any:
        watched = _watch(self, awaitable, sys._getframe(1)) if _watchers else None
        if watched is not None:
            # For a bound method that was taken before the recording, the only end that is seen.
            call_result.add_done_callback(watched.leave)
            context = _WatchedContext(watched, context)
        return main_wrap(self, call_result, exc_info, task_context, context, awaitable)

    for name, wrapped in (("__call__", watched_call), ("main_wrap", watched_main_wrap)):
        _unwrapped.append((name, wrapped, AsyncToSync.__dict__[name]))
        setattr(AsyncToSync, name, wrapped)


def _unwrap() -> None:
    while _unwrapped:
        name, wrapped, unwrapped = _unwrapped.pop()
        # Else somebody has wrapped it once more, and goes on calling ours, which does nothing any more.
        if AsyncToSync.__dict__[name] is wrapped:
            setattr(AsyncToSync, name, unwrapped)


def _watch(called: AsyncToSync[Any, Any], awaitable: Any, frame: FrameType | None) -> WatchedCall:
    target: Any = called.awaitable
    if getattr(awaitable, "cr_code", None) is _ADVANCE:
        target = inspect.getcoroutinelocals(awaitable)["iterator"]
    while isinstance(target, functools.partial) or hasattr(target, "__wrapped__"):
        target = target.func if isinstance(target, functools.partial) else target.__wrapped__
    calls = _here.__dict__.get("calls", [])
    parent = next((call for call in reversed(calls) if call is not None), None)
    current = executor = AsyncToSync.executors.current
    while parent is None and (executor := executor._old_executor) is not None:
        found = _by_executor.get(executor)
        parent = found if found is not None and found.end is None else None
    with _watching:
        watched = WatchedCall(target, parent, frame)
        _by_executor[current] = watched
        for watcher in _watchers:
            watcher.append(watched)
    if calls and calls[-1] is None:
        calls[-1] = watched
    return watched


def _look_around(frame: FrameType | None, target: Any) -> tuple[str, dict[str, Any] | None]:
    """Return where in the user's code a call is made, and the environ of the request that it is part of.

    The innermost line of the request that is neither asgiref's, Django's, Python's nor ours. Where there is none, as
    when Django calls an async view: what is called, if that is the user's; else the innermost line but asgiref's.
    """
    scope = threadlocal.__dict__.get(SCOPE, threadlocal.__dict__.get(LOOP))
    environ: Any = getattr(scope, "subject", None)
    environ = environ if isinstance(environ, dict) and "PATH_INFO" in environ else None
    inside = True
    users = others = None
    while frame is not None and (inside or environ is None):
        module = frame.f_globals.get("__name__") or ""
        found = _environ_in(frame, module)
        environ = environ or found
        if inside:
            if users is None and module.partition(".")[0] not in _FOREIGN:
                users = _place(frame.f_code, frame.f_lineno)
            if others is None and not module.startswith("asgiref.") and module != __name__:
                others = _place(frame.f_code, frame.f_lineno)
            # Further out are the server, or the test.
            inside = users is None and found is None and (module, frame.f_code.co_name) not in _ENTRIES
        frame = frame.f_back
    return users or _definition(target) or others or "", environ


def _environ_in(frame: FrameType, module: str) -> dict[str, Any] | None:
    if "environ" in frame.f_code.co_varnames:
        environ = frame.f_locals.get("environ")
    elif module in ("wsgiref.handlers", "django.http.response"):
        # A server has it, and the test client leaves the request on the response, of which the rest knows nothing.
        holder = frame.f_locals.get("self")
        environ = getattr(holder, "environ", None) or getattr(getattr(holder, "wsgi_request", None), "META", None)
    else:
        return None
    return environ if isinstance(environ, dict) and "PATH_INFO" in environ else None


def _definition(target: Any) -> str | None:
    generator = getattr(target, "ag_frame", None)
    module = generator.f_globals.get("__name__") if generator is not None else getattr(target, "__module__", None)
    if (module or "").partition(".")[0] in _FOREIGN:
        return None
    for found in (target, getattr(target, "__func__", None), type(target).__dict__.get("__call__")):
        code = getattr(found, "__code__", None) or getattr(found, "ag_code", None)
        if isinstance(code, CodeType):
            return _place(code, code.co_firstlineno)
    return None


def _place(code: CodeType, line: int) -> str:
    path = code.co_filename.rpartition(f"site-packages{os.sep}")[2].removeprefix(os.getcwd() + os.sep)
    return f"{path}:{line} in {code.co_qualname}"
