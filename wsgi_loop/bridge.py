"""Everything that depends on asgiref's internals. Knows nothing of Django.

`async_to_sync` looks for a running loop in thread-locals of `SyncToAsync`. What a request puts there stands in for a
loop that is made by the first call. From then on each loop call, whichever way it comes, arrives as asgiref's
own coroutine (`AsyncToSync.main_wrap`) at the loop's `call_soon_threadsafe`, on the thread that makes the call, and
becomes a `LoopCall` there.

Nothing of asgiref is patched. What is read or set here was read in asgiref 3.12.1 and 3.13.0.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, Self

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.local import _Storage
from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, _restore_context, sync_to_async

from .conf import Options
from .loops import CallsContext, LoopCall, NoLoop, ProcessLoop, RequestLoop, RequestTask, RunningLoop
from .resources import kept
from .threads import SyncThread

_MAIN_WRAP = AsyncToSync.main_wrap.__code__

#: What asgiref keeps on a thread. Its `__dict__` is one and the same for as long as the thread lives.
threadlocal = SyncToAsync.threadlocal
#: There async_to_sync finds its loop, of which it calls `call_soon_threadsafe(loop.create_task, coroutine)`, ...
LOOP = "main_event_loop"
#: ... provided that this process has put it there, and not the one that it was forked from.
LOOP_PID = "main_event_loop_pid"
#: Where the scope that a thread is in stands on it once it has a loop; before that, it is the loop.
SCOPE = "wsgi_loop.scope"
pid = os.getpid()


def _after_fork() -> None:
    global pid
    pid = os.getpid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
        with self._work_ready:
            # Not to a call that may be waiting further up this very thread.
            self._call = None
        for call in list(self._calls):
            # Nobody else runs what is given to it: an exception has ended its wait, or it is further up this thread.
            if call._work_thread is threading.current_thread():
                self._take_over(call)
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

    def quit(self) -> None:
        """Refuse what comes from now on, and what nobody has run."""
        with self._work_ready:
            self._over = True
            self._call = None
            items = list(self._work_items)
            self._work_items.clear()
        for item in items:
            item.future.cancel()

    def _wake(self, _: Future[None]) -> None:
        with self._work_ready:
            self._work_ready.notify_all()

    def _run_one(self) -> None:
        try:
            with self._work_ready:
                item = self._work_items.popleft()
        except IndexError:
            return
        self.serving = True
        try:
            item.run()
        finally:
            self.serving = False


class _Passing(deque[Any]):
    """The bottom executor's queue. asgiref appends to it, holding the executor's lock."""

    def __init__(self, executor: RequestThreadExecutor) -> None:
        super().__init__()
        self._executor = weakref.proxy(executor)

    def append(self, item: Any) -> None:
        call = self._executor._call
        if call is not None:
            with call._work_ready:
                if not call._broken:
                    call._work_items.append(item)
                    call._work_ready.notify()
                    return
        super().append(item)


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
            held = False, asyncio.CancelledError("This call or its event loop was ended before it had an answer")
        if held[0]:
            super().set_result(held[1])
        else:
            super().set_exception(held[1])


class AsgirefCall(LoopCall):
    """A call of async_to_sync."""

    __slots__ = ("_answer", "_awaitable", "_begun")

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        answer: Future[Any],
        awaitable: Any,
        request_task: RequestTask | None = None,
        calls_context: CallsContext | None = None,
    ) -> None:
        name = getattr(awaitable, "__qualname__", None) or type(awaitable).__qualname__
        super().__init__(coroutine, name, request_task, calls_context)
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


class RequestCalls:
    """A request's loop as asgiref meets it, made by its first loop call. Held by the request alone.

    So when a request is dropped without `close()`, this is collected, and gives the loop back.
    """

    def __init__(self, owner: str, options: Options) -> None:
        self.executor = RequestThreadExecutor(owner, options)
        self._context = CallsContext()
        self._task = RequestTask(owner)
        self.adapter = RequestAdapter(self.executor, self._task, weakref.ref(self._context))
        self._closed = False
        self._pid = pid

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

    def close(self) -> None:
        """Leave the loop, and meanwhile run on this thread what its tasks need to run here."""
        self._closed = True
        if self._is_inherited():
            return
        try:
            self._leave()
        finally:
            self._let_go()

    def _leave(self) -> None:
        raise NotImplementedError

    def _leave_soon(self) -> None:
        raise NotImplementedError

    def _let_go(self) -> None:
        self.executor.quit()

    def _is_inherited(self) -> bool:
        """Tell if this was made before a fork: what it stands for is the parent's."""
        return self._pid != pid

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and not self._is_inherited():
            self._leave_soon()
            self._let_go()
            message = f"{self.executor.owner}: its response was dropped without close()"
            warnings.warn(message, ResourceWarning, source=self, stacklevel=2)


class OwnLoop(RequestCalls):
    """Scope "request": the request has a loop to itself, and closes it."""

    def __init__(self, owner: str, options: Options) -> None:
        super().__init__(owner, options)
        self._closed = True  # for as long as there is no loop to close
        self.running = RequestLoop(options.loop_factory, options.shutdown_timeout, owner, self.adapter)
        self._closed = False
        # For what runs with no executor in its context: asgiref would send all of it to one thread of the process.
        AsyncToSync.loop_thread_executors[self.running.loop] = self.executor

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self.running.submit(coroutine)

    def _leave(self) -> None:
        self.running.close(self.executor.serve_until)

    def _leave_soon(self) -> None:
        self.running.close_soon()

    def _let_go(self) -> None:
        super()._let_go()
        AsyncToSync.loop_thread_executors.pop(self.running.loop, None)

    def _is_inherited(self) -> bool:
        if not super()._is_inherited():
            return False
        if self.running not in _inherited:
            _inherited.append(self.running)
        return True


class SharedLoop(RequestCalls):
    """Scope "process": the request's calls run on the process loop, along with those of others."""

    def __init__(self, owner: str, options: Options, running: ProcessLoop) -> None:
        super().__init__(owner, options)
        self._running = running

    def _submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._running.submit(coroutine, self.adapter)

    def _leave(self) -> None:
        self._running.leave(self._task, self.executor.serve_until)

    def _leave_soon(self) -> None:
        self._running.leave_soon(self._task)


#: Not even to be collected in a forked child: to close a loop there would take the parent's descriptors apart.
_inherited: list[RunningLoop] = []


class _Adapter:
    """Makes an `AsgirefCall` of a coroutine that asgiref hands over, on the thread that makes the call."""

    def recognizes(self, args: tuple[Any, ...]) -> bool:
        return len(args) == 1 and getattr(args[0], "cr_code", None) is _MAIN_WRAP

    def adapt(self, coroutine: Coroutine[Any, Any, Any]) -> AsgirefCall:
        raise NotImplementedError


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

    def adapt(self, coroutine: Coroutine[Any, Any, Any]) -> AsgirefCall:
        # It has not been started, so these are its arguments.
        arguments = inspect.getcoroutinelocals(coroutine)
        call_result, awaitable = arguments["call_result"], arguments["awaitable"]
        current = AsyncToSync.executors.current
        if self._first:
            # A request's first call is never nested in another one of its own. In one of an outer request it may be.
            self._first = False
            self._base = current._old_executor
        # A call that is made below another one, or by sync code that a task runs, finds that one's executor instead.
        if current._old_executor is self._base and not self._executor.serving:
            self._executor.pass_on_to(current)
            calls_context = self._calls_context()
            if calls_context is not None:
                return AsgirefCall(coroutine, call_result, awaitable, self._task, calls_context)
        self._executor.watch(current)
        return AsgirefCall(coroutine, call_result, awaitable, self._task)


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

    async def release() -> None:
        AsyncToSync.loop_thread_executors.pop(running.loop, None)
        if executor.is_used:
            await asyncio.wrap_future(executor.submit(end_thread))
        executor.shutdown()

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
