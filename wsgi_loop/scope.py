"""The life of one request: its context, its loop calls if there are any, and its end, exactly once.

Knows nothing of HTTP, and leaves the loop to `loops` and `process`, and what asgiref needs to `bridge`.

Who owns what: the request's handler and response own the scope. The scope owns the request context, and `RequestCalls`,
which owns the loop. Each entry (`run`) takes the context and this thread's thread-locals for its own time only, so that
a server may open and close requests on its threads in any order.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
import warnings
from asyncio import _get_running_loop
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import nullcontext
from threading import get_ident
from typing import Any, TypeVar

from asgiref.sync import async_to_sync

from . import forks
from .bridge import watching
from .bridge.executor import CURRENT, Executor, enclosing_executor
from .bridge.storage import LOOP, LOOP_PID, SCOPE, enter_here, is_taken, scope_here, take_apart, threadlocal
from .calls import END, LoopCall, NoLoop, RequestTask, are_same, close_unbegun, name_of
from .conf import Options
from .counters import counters
from .loops import RunningLoop
from .process import get_process_loop
from .process_loop import ProcessLoop
from .request_loop import RequestLoop
from .threads import check_threads

logger = logging.getLogger("wsgi_loop")

R = TypeVar("R")
T = TypeVar("T")
ThreadState = dict[str, Any]

_NOTHING = contextvars.Context()
#: Not even to be collected in a forked child: to close a loop there would take the parent's descriptors apart.
_inherited: list[RunningLoop] = []

# Re-entrant: the garbage collector may close a response while this thread is making a loop.
_making_loop = threading.RLock()


@forks.in_child
def _after_fork() -> None:
    global _making_loop
    _making_loop = threading.RLock()


class RequestScope:
    """What one request runs in, from before request_started until after request_finished.

    Until the first loop call, it also stands where asgiref looks for the request's loop.
    """

    #: asgiref passes it back to `call_soon_threadsafe`.
    create_task = None
    is_scope = True

    # Whoever makes a scope sets these four; `start` sets the rest. None has a default in the class: Python 3.11 takes
    # 1,000 instructions a request more to find, behind one, what an instance has.
    options: Options
    subject: Any
    calls: RequestCalls | None
    #: The thread on which what the context's `Local`s hold can be seen: at first this one. Threads are told apart by
    #: what asgiref keeps on them, which costs less to get than an identifier.
    home: ThreadState

    _context: contextvars.Context | None

    @property
    def owner(self) -> str:
        """Whom to name in logs."""
        return str(self.subject)

    def per_thread(self) -> Iterable[Any]:
        """The `Local`s whose content belongs to a thread, and not to a request."""
        return ()

    def begin_on_process_loop(self) -> None:
        """Called on the request's thread, before the first loop call on a loop that others wait for too."""

    # `start` and `finish` are `run` for the first and the last entry. A request that makes no loop call pays for little
    # else, so they do themselves what `run` does where nothing stands on the thread: some 5,000 instructions less.

    def start(self, function: Callable[..., R], a: Any, b: Any, c: Any, /) -> R:
        """Begin the request, in a copy of the current context, and call `function` in it with three arguments."""
        self._context = context = contextvars.copy_context()
        thread = self.home
        if thread:
            return self.run(function, a, b, c)
        thread[LOOP] = self
        thread[LOOP_PID] = forks.pid
        try:
            return context.run(function, a, b, c)
        finally:
            thread.clear()

    def run(self, function: Callable[..., R], /, *args: Any) -> R:
        """Call `function` inside the request, and return what it returns.

        On a thread that is inside already it is just called. While another thread is inside, it gets a copy of the
        request context. After `close` it gets a context of its own, and no loop.
        """
        thread = threadlocal.__dict__
        context = self._context
        found = None
        if context is None:
            return contextvars.copy_context().run(function, *args)
        if thread:
            if thread.get(SCOPE, thread.get(LOOP)) is self:
                return function(*args)
            found = thread.copy()
        try:
            # Nothing of what is found shows in between: `task_context`, above all, would tie loop calls to whatever
            # `sync_to_async` call has last run on this thread.
            thread.clear()
            if thread is not self.home:
                moved = enter_here(context, self.per_thread())
                if moved is context:
                    self.home = thread
                context = moved
            thread[LOOP] = self
            thread[LOOP_PID] = forks.pid
            if self.calls is not None:
                thread[SCOPE] = self
                if not self.calls.executor.jobs.empty():
                    self.calls.serve()
            try:
                return context.run(function, *args)
            except RuntimeError as exc:
                if not is_taken(exc):
                    raise
            return enter_here(context.copy(), self.per_thread()).run(function, *args)
        finally:
            thread.clear()
            if found:
                thread.update(found)

    def finish(self, function: Callable[[T], object], argument: T, /) -> None:
        """Call `function` inside the request, with one argument, and `close` it."""
        thread = threadlocal.__dict__
        context = self._context
        if thread or thread is not self.home or self.calls is not None or context is None:
            try:
                self.run(function, argument)
            finally:
                self.close()
            return
        thread[LOOP] = self
        thread[LOOP_PID] = forks.pid
        try:
            context.run(function, argument)
        except RuntimeError as exc:
            if not is_taken(exc):
                raise
            context.copy().run(function, argument)
        finally:
            thread.clear()
            self._context = None
            if self.calls is not None:
                self.close()

    def close(self) -> None:
        """Close the request's loop, if it has one, and let go of its context. Further calls do nothing."""
        # What the request stored in the context may lead back to this scope: the request itself, the response.
        self._context = None
        if self.calls is not None:
            with _making_loop:
                calls, self.calls = self.calls, None
            if calls is not None:
                calls.close()

    def advance(self, iterator: AsyncIterator[Any]) -> Any:
        """Return the next item of an async iterator, or `END`: after `close`, always. Called inside `run`."""
        if self._context is None:
            return END
        return self.get_calls().advance(iterator)

    def end_body(self, iterator: Any) -> None:
        """Await `iterator.aclose()`, within a bound. Called inside `run`."""
        try:
            self.get_calls().end_body(iterator)
        except Exception:
            logger.exception("%s: its body %s could not be closed", self.owner, name_of(iterator))

    def call_soon_threadsafe(self, callback: Any, coroutine: Any) -> None:
        """Take asgiref's coroutine for a loop call, and run it. The first one makes the request's loop.

        Raises RuntimeError when there is no loop any more: asgiref then makes one of its own.
        """
        try:
            calls = self.calls or self.get_calls()
        except NoLoop:
            raise
        except BaseException as exc:
            # Not raised here: asgiref would take a RuntimeError for a closed loop.
            handed_over = take_apart(coroutine)
            coroutine.close()
            close_unbegun(handed_over.awaitable)
            handed_over.call_result.set_exception(exc)
            return
        _call(coroutine, calls.running, calls)

    def get_calls(self) -> RequestCalls:
        if self.calls is not None:
            return self.calls
        if self._context is None:
            raise NoLoop("The request is over")
        options = self.options
        check_threads()
        process_loop = None
        if options.scope == "process":
            self.begin_on_process_loop()
            process_loop = get_process_loop(lambda: options, door)
        with _making_loop:
            if self.calls is None:
                # asgiref puts the loop itself in this scope's place as soon as it runs sync code on the thread.
                threadlocal.__dict__[SCOPE] = self
                owner = self.owner
                made = RequestCalls(
                    owner,
                    options,
                    process_loop or RequestLoop(options.loop_factory, options.shutdown_timeout, owner, door),
                )
                if self.calls is None:
                    self.calls = made
                else:
                    # A finalizer has made a loop call meanwhile.
                    made.close()
                if self._context is None:
                    # Closed by another thread, which looked for a loop before there was one.
                    calls, self.calls = self.calls, None
                    calls.close()
                    raise NoLoop("The request is over")
            return self.calls


class RequestCalls:
    """The loop calls of one request, and its loop. Held by the request alone.

    So when a request is dropped without `close()`, this is collected, and gives the loop back.
    """

    #: Whether to warn when the response was dropped without `close()`.
    tells_of_drop = True
    #: For as long as there is no loop to close.
    _closed = True

    def __init__(self, owner: str, options: Options, running: RequestLoop | ProcessLoop) -> None:
        self.running = running
        self.pid = forks.pid
        self.executor = Executor(owner, options, None, running.interrupt)
        #: The executor, while no call waits with it: of the outermost calls, one at a time.
        self._free = [self.executor]
        self._task = RequestTask(owner, running.new_task, running.finish)
        #: What the context held in which the last outermost call was made, when the call had ended.
        self._seen: contextvars.Context | None = None
        self._closes_soon = False
        self._closed = False
        counters.requests += 1
        try:
            running.begin(self.executor)
        except BaseException:
            # There is no response.
            self.tells_of_drop = False
            raise

    @property
    def owner(self) -> str:
        return self.executor.owner

    def advance(self, iterator: AsyncIterator[Any]) -> Any:
        """Return the next item of an async iterator, or `END`."""
        if watching.watchers or self.is_inherited() or _get_running_loop() or sys.exc_info()[1]:
            # As an unusual call, by way of asgiref.
            return _advance_by_asgiref(iterator, lambda: self.running.loop)
        step = _advance(iterator)
        try:
            return self.wait(step, iterator, is_step=True).take_result()
        except NoLoop:
            step.close()
            return _advance_by_asgiref(iterator, lambda: self.running.loop)

    def wait(
        self,
        coroutine: Any,
        named: Any,
        task_context: list[Any] | None = None,
        hand_on: list[contextvars.Context] | None = None,
        is_step: bool = False,
        is_end: bool = False,
        timeout: float | None = None,
    ) -> LoopCall:
        """Run a coroutine as a loop call, and on this thread what that needs to run here.

        named, task_context, is_step, is_end: as `LoopCall` has them. hand_on: where to put the caller's context.
        timeout: seconds after which the call is waited for no longer. Raises NoLoop when the loop takes no more calls.
        """
        running = self.running
        free = self._free
        try:
            executor = free.pop()
        except IndexError:
            # Nested, or another thread of the request waits.
            executor = Executor(self.owner, self.executor.options, self._enclosing(), running.interrupt)
        is_outermost = executor is self.executor
        if executor.thread_id != get_ident():
            executor.move_here()
        token = CURRENT.set(executor.storage)
        try:
            caller = contextvars.copy_context()
            if hand_on is not None:
                hand_on[0] = caller
            is_in_line = is_outermost and self._seen is not None and are_same(caller, self._seen)
            call = LoopCall(coroutine, named, executor, caller, is_in_line, task_context, is_step, is_end)
            task = self._task
            if isinstance(running, RequestLoop) and running.take():
                depth = running.depth
                try:
                    running.drive(call, task)
                except RuntimeError:
                    # Another thread has given the loop up meanwhile, and answered the call.
                    if not call.is_done:
                        raise
                finally:
                    # An interrupt may have come where this was about to be done.
                    running.depth = depth
                    running.release()
            else:
                running.hand_over(call, task)
            if call.is_done or executor.serve_until(call, timeout):
                if call.before and call.context:
                    # Held here: a finalizer's loop call may change the context, and CPython 3.11 has the collector run
                    # before an iterator owns what it goes through.
                    call.context = call.context.copy()
                    if not are_same(call.before, call.context):
                        call.bring_back()
                if is_outermost:
                    self._seen = contextvars.copy_context()
            return call
        except NoLoop:
            raise
        except BaseException:
            # Interrupted, perhaps before the call was begun.
            close_unbegun(coroutine)
            raise
        finally:
            CURRENT.reset(token)
            if is_outermost:
                free.append(executor)
                if self._closes_soon:
                    self._finish()
            else:
                executor.quit()

    def _enclosing(self) -> Executor:
        found = enclosing_executor()
        return found if found is not None and found.bottom is self.executor else self.executor

    def serve(self) -> None:
        """Run what its tasks wait for on this thread."""
        if self.is_inherited():
            return
        try:
            executor = self._free.pop()
        except IndexError:
            return  # somebody is at it
        try:
            executor.serve()
        finally:
            self._free.append(executor)

    def end_body(self, iterator: Any) -> None:
        """Close an async iterator, and meanwhile run on this thread what that needs to run here.

        Waits for at most twice `SHUTDOWN_TIMEOUT`: after the first half it is cancelled, after the second given up.
        """
        running = self.running
        # The generator itself may close its response: its thread can not wait for itself.
        if self._closed or self.is_inherited() or running.is_inside():
            return
        if isinstance(running, RequestLoop):
            # A bound holds only where another thread runs what it bounds.
            running.promote()
        ending = running.end_body(iterator, self.owner)
        try:
            call = self.wait(ending, iterator, is_end=True, timeout=2 * running.timeout)
        except NoLoop:
            ending.close()
            raise
        if not call.is_done and isinstance(running, RequestLoop):
            # Leaving the process loop will tell: it is not this request's to give up.
            running.give_up()

    def close(self) -> None:
        """Leave the loop, and meanwhile run on this thread what its tasks need to run here."""
        if self._closed:
            # Of a cycle that was dropped, the collector may find this before the file that closes its response.
            return
        try:
            self._closed = True
            if self.pid != forks.pid and self.is_inherited():
                return
            if not self.running.is_inside():
                self._finish()
            elif self.running.is_promoted:
                # In this order: what is asked for from now on is refused, with the reason.
                self.executor.quit()
                self.running.leave_soon(self._task)
            else:
                # Its loop is run further up this stack.
                self._closes_soon = True
        except BaseException:
            # Interrupted: another thread does the rest.
            self.running.leave_soon(self._task)
            raise

    def _finish(self) -> None:
        self._closes_soon = False
        try:
            self.running.leave(self._task, self.executor)
        finally:
            self.executor.quit()

    def is_inherited(self) -> bool:
        """Tell if this was made before a fork: what it stands for is the parent's."""
        if self.pid == forks.pid:
            return False
        if self.running not in _inherited:
            _inherited.append(self.running)
        return True

    def drop(self) -> bool:
        """Give the loop back and wait for nothing. Returns whether there was one to give back."""
        if self.is_inherited():
            return False
        self._closed = True
        self.executor.quit()
        self.running.leave_soon(self._task)
        return True

    def __del__(self) -> None:
        if not self._closed and self.drop() and self.tells_of_drop:
            message = f"{self.owner}: its response was dropped without close()"
            warnings.warn(message, ResourceWarning, source=self, stacklevel=2)


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def _advance(iterator: AsyncIterator[Any]) -> Any:
    # Not anext(): with a default it crashes where `__anext__` raises before it has returned an awaitable.
    try:
        return await iterator.__anext__()
    except StopAsyncIteration:
        return END


async def _advance_watched(iterator: AsyncIterator[Any], loop_of: Callable[[], Any]) -> Any:
    if asyncio.get_running_loop() is not loop_of():
        # asgiref's own one, where there is none of the request's any more: to go on would look like the body's end.
        raise RuntimeError(f"The event loop of the body {name_of(iterator)} has ended before it was read to its end")
    return await _advance(iterator)


_advance_by_asgiref = async_to_sync(_advance_watched)
watching.STEP = _advance_watched.__code__


def door(running: RunningLoop, coroutine: Coroutine[Any, Any, Any]) -> None:
    """Take what asgiref hands to the loop itself: as its request's, or as what another thread calls on its own."""
    calls = getattr(scope_here(), "calls", None)
    if calls is not None and calls.running is running:
        _call(coroutine, running, calls)
    else:
        _call(coroutine, running, None)


def _call(coroutine: Coroutine[Any, Any, Any], running: RunningLoop, calls: RequestCalls | None) -> None:
    """Run a loop call that asgiref hands over, and answer it. When this returns, the call is over."""
    call_result, exc_info, task_context, context, awaitable = take_apart(coroutine)
    # asgiref's own coroutine does what is needed for the others: it raises what its caller is handling, in the task.
    is_plain = calls is not None and exc_info[1] is None and not watching.watchers
    work = coroutine
    if is_plain:
        work = awaitable if asyncio.iscoroutine(awaitable) else _await(awaitable)
    try:
        if calls is None:
            call = _wait_on_other_thread(coroutine, awaitable, context, running)
        elif calls.pid != forks.pid and calls.is_inherited():
            raise NoLoop(f"{calls.owner}: its event loop is the one of the process that was forked")
        elif is_plain:
            call = calls.wait(work, awaitable, task_context)
        else:
            call = calls.wait(work, awaitable, hand_on=context)
    except NoLoop:
        if work is not coroutine and work is not awaitable:
            work.close()
        raise
    except BaseException as exc:
        # Not raised here: asgiref would take a RuntimeError for a closed loop, and begin anew.
        failure: BaseException | None = exc
        result = None
    else:
        failure, result = call.exception, call.result
    if is_plain:
        # What the call has set in contextvars stands in the current context already.
        context[0] = _NOTHING
        coroutine.close()
    if not call_result.done():
        if failure is None:
            call_result.set_result(result)
        else:
            close_unbegun(coroutine)
            close_unbegun(awaitable)
            call_result.set_exception(failure)


def _wait_on_other_thread(
    coroutine: Coroutine[Any, Any, Any], named: Any, hand_on: list[contextvars.Context], running: RunningLoop
) -> LoopCall:
    """Run a loop call of sync code that async code runs on a thread of an executor. It has a task of its own."""
    outer = enclosing_executor()
    executor = Executor(running.owner, outer and outer.options, outer, running.interrupt)
    token = CURRENT.set(executor.storage)
    try:
        hand_on[0] = contextvars.copy_context()
        call = LoopCall(coroutine, named, executor, hand_on[0])
        running.hand_over(call)
        with running.threads.waiting() if isinstance(running, ProcessLoop) else nullcontext():
            executor.serve_until(call)
        return call
    finally:
        CURRENT.reset(token)
        executor.quit()
