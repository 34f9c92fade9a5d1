"""Event loops: who runs them, how loop calls run on them, and how they are closed; the loop of a request.

Knows asyncio and threads, and nothing of Django.

Who owns what. A loop has no thread at first: whichever thread of its request makes a loop call has the *turn*, and runs
the loop *by hand*: it takes the first step of the call on its own stack, and runs the loop only while the call waits.
While sync code runs, nobody has the turn, and the loop stands still. As soon as something on it could go on meanwhile,
the loop is *promoted*: it gets a thread of its own, for the rest of its life. That thread closes the loop, and ends.
A loop without a thread is closed by the request thread, if nothing is left on it.

Each step of a task that serves loop calls is taken by the thread that waits, outside of the loop's own `_run_once`. So
the loop may be run again below a step. A promoted loop takes all steps itself, as asyncio does.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
import time
import weakref
from asyncio import _get_running_loop, _set_running_loop
from asyncio.tasks import _enter_task, _leave_task  # type: ignore[attr-defined]
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from threading import get_ident
from typing import Any

from .bridge.executor import Executor, current_executor, loop_executors, run_here
from .bridge.storage import is_loop_call, move_here
from .calls import LoopCall, NoLoop, RequestTask, name_of
from .event_loop import EventLoop
from .resources import context_of, drop_keepers, idle_keepers, is_kept, keepers_of
from .threads import start_thread

logger = logging.getLogger("wsgi_loop")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
#: Called with a loop and asgiref's coroutine for a loop call, on the thread that makes the call.
Door = Callable[["RunningLoop", Coroutine[Any, Any, Any]], None]

#: How many rounds of the loop are waited for what is about to end: a task, a connection that was closed.
_ROUNDS = 4
_SHUT_DOWN = "wsgi-loop shut-down"
#: How many left-over tasks a record names.
_MOST_NAMES = 10
_STAND_INS = (
    "call_soon",
    "call_soon_threadsafe",
    "run_in_executor",
    "_asyncgen_firstiter_hook",
    "_asyncgen_finalizer_hook",
)
#: What running a loop by hand relies on. uvloop's loops do not have it.
_BY_HAND = ("_ready", "_scheduled", "_timer_cancelled_count", "_thread_id", "_stopping", "_asyncgen_firstiter_hook")


def all_tasks(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    """Return the unfinished tasks of a loop."""
    # From Python 3.14 on, where the loop is running these are only the tasks that were made on this thread.
    running = _get_running_loop()
    _set_running_loop(None)
    try:
        return asyncio.all_tasks(loop)
    finally:
        _set_running_loop(running)


def _names(names: Any) -> str:
    """Return names for a log record, of bounded length."""
    found = sorted(names)
    more = len(found) - _MOST_NAMES
    return ", ".join(found[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _without_generator_exit(exc: BaseException) -> Exception | None:
    """Return what an async generator's end failed with, out of the group in which a task group wraps GeneratorExit."""
    rest = exc.split(GeneratorExit)[1] if isinstance(exc, BaseExceptionGroup) else exc
    if rest is not None and not isinstance(rest, Exception):
        raise rest
    return rest


def _succeed(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], exc: BaseException) -> None:
    if future.done():
        return
    if isinstance(exc, StopIteration):
        # No future takes one, for it would end the coroutine that awaits it.
        failure = RuntimeError("sync code raised StopIteration")
        failure.__cause__ = exc
        exc = failure
    future.set_exception(exc)


class _StepIsDue(SystemExit):
    """Raised through a loop that is run by hand: asyncio lets it pass. What is ready after the step stays so."""


class Work:
    """A thread-sensitive call on its way to the thread that runs it."""

    def __init__(self, running: RunningLoop, function: Callable[[], Any]) -> None:
        self.future: asyncio.Future[Any] = running.loop.create_future()
        self._running = running
        self._function = function

    def run(self) -> None:
        if self.future.cancelled():
            return
        try:
            result = self._function()
        except BaseException as exc:
            self._running.answer(_fail, self.future, exc)
            # The exception leads here, and the future leads to the exception.
            del self
        else:
            self._running.answer(_succeed, self.future, result)

    def refuse(self) -> None:
        self._running.answer(self.future.cancel)


class RunningLoop:
    """One event loop, from its first loop call until its end.

    factory: makes the loop. timeout: seconds that closing waits for cancelled tasks. owner: whom to name in logs. door:
    takes what asgiref hands to the loop.
    """

    #: What to do about left-over tasks.
    remedy = ""
    #: The thread of a promoted loop.
    thread_id: int | None = None
    is_promoted = False
    _ended: Future[None] | None = None
    _is_closed = False
    #: Whether somebody has the turn, who will look for what was posted before it ends.
    _is_held = False
    #: The thread that runs loop calls by hand, and how many, one below the other.
    driver: int | None = None
    depth = 0
    _makes_task = False
    _has_other_tasks = False
    #: How many calls are on threads of executors.
    _in_executors = 0
    _let_go: Callable[[], None] | None = None
    #: Async generators that have begun, with the request in which they did.
    _generators: weakref.WeakKeyDictionary[Any, Executor | None] | None = None
    _accepting = True
    _closing = False
    _stopped = False
    _given_up = False

    def __init__(self, factory: LoopFactory, timeout: float, owner: str, door: Door) -> None:
        self.owner = owner
        self.timeout = timeout
        self._door = door
        self._turn = threading.RLock()
        #: Steps that are to be taken by hand; those that are being taken; and the tasks whose steps are.
        self._steps: deque[tuple[Any, tuple[Any, ...], Any]] = deque()
        self._stepping: list[asyncio.Task[Any]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        # Re-entrant: a finalizer may come at any moment, and make a loop call.
        self._lock = threading.RLock()
        #: Held while it is logged that the loop is given up. Not the other one: a log handler may make a loop call.
        self._giving_up = threading.RLock()
        #: What was begun or handed over and has not ended yet.
        self._calls: set[LoopCall] = set()
        #: Those of the requests that are on the loop now.
        self._request_tasks: set[RequestTask] = set()
        #: The ends of async generators that were dropped.
        self._ends: set[asyncio.Task[Any]] = set()
        #: The tasks that end an async body, with the async generators that this has let go of.
        self._dropped: dict[asyncio.Task[Any] | None, list[Any]] = {}
        # In an empty context: a loop's own callbacks keep the context that they are made in.
        self.loop: Any = contextvars.Context().run(factory)
        self.can_run_by_hand = type(self.loop) is EventLoop or all(hasattr(self.loop, name) for name in _BY_HAND)
        self.post: Callable[..., Any] = self.loop.call_soon_threadsafe
        self._call_soon: Callable[..., Any] = self.loop.call_soon
        self._run_in: Callable[..., Any] = self.loop.run_in_executor
        stand_ins: dict[str, Any] = {
            "call_soon_threadsafe": self._call_soon_threadsafe,
            "run_in_executor": self._run_in_executor,
        }
        if self.can_run_by_hand:
            stand_ins["call_soon"] = self._call_soon_by_hand
            # asyncio's own loops set these whenever they begin to run. Others are told then: see `_set_hooks`.
            stand_ins["_asyncgen_firstiter_hook"] = partial(self._begin_generator, self.loop._asyncgen_firstiter_hook)
            stand_ins["_asyncgen_finalizer_hook"] = self._drop_generator
        self.loop.__dict__.update(stand_ins)

    # --- who runs the loop ---------------------------------------------------------------------------------------

    def take(self) -> bool:
        """Take the turn, to run the loop by hand. False: it has a thread, or another thread has the turn."""
        if self.is_promoted or not self._turn.acquire(blocking=False):
            return False
        if self.is_promoted or (self.depth and self.driver != get_ident()):
            self._turn.release()
            return False
        self._is_held = True
        return True

    def release(self) -> None:
        """Give the turn back. What a loop call has left on the loop gets a thread, if it could go on."""
        try:
            if not self.is_promoted:
                if self._steps or self.loop._ready:
                    self._settle()
                if self._stopped and not self.loop.is_closed() and not self.depth:
                    # It was shut down by another thread of the request, in this one's rounds.
                    self._end()
                elif (self._calls and not self.depth) or (self._has_other_tasks and self._others()):
                    self.promote()
        finally:
            self._is_held = False
            self._turn.release()
            # Posted when the turn was held.
            if not self.is_promoted and (self.loop._ready or self._steps) and not self.loop.is_closed():
                self.promote()

    def promote(self) -> None:
        """Give the loop a thread of its own. Does nothing while another thread runs it by hand.

        Raises RuntimeError if no thread can be started.
        """
        while not self._turn.acquire(blocking=False):
            if self._is_held:
                return
            # Another thread is about to run it, or has just looked if it may.
            time.sleep(0)
        try:
            if self.is_promoted or self._stopped or self.loop.is_closed():
                return
            self.is_promoted = True
            try:
                self.loop.__dict__.pop("call_soon", None)
                while self._steps:
                    callback, args, context = self._steps.popleft()
                    self._call_soon(callback, *args, context=context)
                for request_task in self._request_tasks:
                    request_task.watch()
                start_thread(self._work)
            except BaseException:
                self._end()
                raise
        finally:
            self._turn.release()

    def drive(self, call: LoopCall, request_task: RequestTask | None = None) -> None:
        """Begin a call on this thread's stack, and run the loop by hand until it has ended or the loop is promoted.

        In this thread's turn.
        """
        loop = self.loop
        self.depth += 1
        self.driver = get_ident()
        try:
            if loop._ready or (loop._scheduled and loop._scheduled[0]._when <= loop.time()):
                # What expired while the loop stood still comes first.
                self._take_round()
            self._calls.add(call)
            try:
                if request_task is not None and request_task.take(call):
                    self._request_tasks.add(request_task)
                    task = request_task.task
                else:
                    task = self._begin_alone(call, request_task, by_hand=True)
            except BaseException:
                self._calls.discard(call)
                raise
            while not call.is_done and not self.is_promoted:
                if self._steps:
                    self._take_step()
                elif task.done():
                    # It has failed by itself, and not the coroutine that it ran.
                    self._fail_call(call, task, request_task)
                elif not call.executor.jobs.empty():
                    # The loop goes on while that runs.
                    self.promote()
                else:
                    self._run_by_hand()
        finally:
            self.depth -= 1

    def _run_by_hand(self) -> None:
        """Run the loop until it is stopped: by a step that is to be taken, or by work for this thread."""
        try:
            self.loop.run_forever()
        except _StepIsDue:
            pass
        except (SystemExit, KeyboardInterrupt):
            # asyncio has also stored what a task raised in the task. Whoever awaits the task goes on first.
            self._settle()
            raise

    def _take_round(self) -> None:
        """Run what is ready."""
        self.loop.stop()
        with contextlib.suppress(_StepIsDue):
            self.loop.run_forever()

    def _settle(self) -> None:
        """Let what is about to end come to its end."""
        for _ in range(_ROUNDS):
            if self._steps:
                self._take_step()
            elif self.loop._ready:
                self._take_round()
            else:
                break

    def _call_soon_by_hand(self, callback: Any, *args: Any, context: Any = None) -> Any:
        """Stands in for the loop's own method, by way of which asyncio's tasks take their steps."""
        task = getattr(callback, "__self__", None)
        if isinstance(task, asyncio.Task):
            if self._makes_task or task in self._tasks:
                if self.loop._ready:
                    # What was ready before comes before.
                    return self._call_soon(self._stop_for_step, callback, args, context)
                self._steps.append((callback, args, context))
                self.loop.stop()
                return None
            self._has_other_tasks = True
        return self._call_soon(callback, *args, context=context)

    def _stop_for_step(self, callback: Any, args: tuple[Any, ...], context: contextvars.Context) -> None:
        if self.is_promoted:
            context.run(callback, *args)
        else:
            self._steps.append((callback, args, context))
            raise _StepIsDue

    def _take_step(self) -> None:
        """Take a step of a task on this thread's stack. For that time, the loop is the running one of the thread."""
        loop = self.loop
        callback, args, context = self._steps.popleft()
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(loop._asyncgen_firstiter_hook, loop._asyncgen_finalizer_hook)
        loop._thread_id = get_ident()
        _set_running_loop(loop)
        self._stepping.append(callback.__self__)
        try:
            context.run(callback, *args)
        finally:
            self._stepping.pop()
            _set_running_loop(None)
            loop._thread_id = None
            sys.set_asyncgen_hooks(*hooks)
            if self._let_go is not None:
                self._let_go()

    def _others(self) -> set[asyncio.Task[Any]]:
        """Return the tasks that could go on while this thread runs sync code."""
        return all_tasks(self.loop) - self._tasks - idle_keepers(self.loop)

    def _is_busy(self) -> bool:
        """Tell if anything could go on while this thread runs sync code. In this thread's turn."""
        loop = self.loop
        return bool(
            loop._ready
            or self._steps
            or len(loop._scheduled) > loop._timer_cancelled_count
            or (self._has_other_tasks and self._others())
        )

    # --- thread-sensitive calls ----------------------------------------------------------------------------------

    def _run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> Any:
        """Stands in for the loop's own method, to which asgiref gives thread-sensitive calls."""
        if isinstance(executor, Executor) and not args:
            if self._is_stepping() and executor.living().thread_id == get_ident() and not self._is_busy():
                return self._run_inline(function)
            work = Work(self, function)
            executor.put(work)
            return work.future
        future = self._run_in(executor, function, *args)
        self._in_executors += 1
        future.add_done_callback(self._come_back)
        return future

    def _come_back(self, _: object) -> None:
        self._in_executors -= 1

    def _is_stepping(self) -> bool:
        """Tell if this is called by a task whose step this thread takes by hand, and which nobody has cancelled."""
        if not self._stepping or self.is_promoted or _get_running_loop() is not self.loop:
            return False
        task: Any = self._stepping[-1]
        return asyncio.current_task() is task and not task._must_cancel

    def _run_inline(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Run sync code right here, below the step of the task that wants it, outside of the loop."""
        loop, task, future = self.loop, self._stepping[-1], self.loop.create_future()
        give: Callable[..., None] = _succeed
        outcome: Any
        hooks = sys.get_asyncgen_hooks()
        _leave_task(loop, task)
        _set_running_loop(None)
        loop._thread_id = None
        sys.set_asyncgen_hooks(None, None)
        try:
            self._is_held = False
            self._turn.release()
            try:
                if loop._ready:
                    self.promote()
                outcome = run_here(function)
            except BaseException as exc:
                give, outcome = _fail, exc
        finally:
            # Nobody else has it for long: this thread's call is further up the stack.
            self._turn.acquire()
            self._is_held = True
            is_promoted = self.is_promoted
            if is_promoted:
                self._hold()
            sys.set_asyncgen_hooks(*hooks)
            loop._thread_id = get_ident()
            _set_running_loop(loop)
            _enter_task(loop, task)
        try:
            if is_promoted:
                # Not before the step has ended: the task goes on elsewhere.
                self._let_go = partial(self._let_go_and_answer, self._let_go, give, future, outcome)
            else:
                give(future, outcome)
            return future
        finally:
            # An exception's traceback leads here.
            del outcome, future

    def _let_go_and_answer(self, let_go: Callable[[], None] | None, *answer: Any) -> None:
        self._let_go = None
        if let_go is not None:
            let_go()
        self.answer(*answer)

    def _hold(self) -> None:
        """Have the loop's thread stand still, until this one has taken to its end a step that it had begun before."""
        stands, may_go_on = threading.Lock(), threading.Lock()
        stands.acquire()
        may_go_on.acquire()

        def stand_still() -> None:
            stands.release()
            may_go_on.acquire()

        try:
            self.post(stand_still, context=contextvars.Context())
            while not stands.acquire(timeout=0.1) and not self.ended.done():
                pass
        except RuntimeError:  # it is closed
            pass
        except BaseException:
            may_go_on.release()
            raise
        self._let_go = may_go_on.release

    # --- on any thread -------------------------------------------------------------------------------------------

    def _call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        """Stands in for the loop's own method, to which asgiref hands a loop call, on the thread that makes it."""
        if is_loop_call(args):
            return self._door(self, args[0])
        handle = self.post(callback, *args, context=context)
        self._see_to_posts()
        return handle

    def _see_to_posts(self) -> None:
        """Something was posted. Nobody would run that while the loop's thread is in sync code."""
        if not self.is_promoted and not self._is_held:
            self.promote()

    def interrupt(self) -> None:
        """Have the thread that runs the loop by hand see what it has to do."""
        if not self.is_promoted:
            with contextlib.suppress(RuntimeError):  # it is closed
                self.post(self.loop.stop)

    def answer(self, function: Callable[..., object], *args: Any) -> None:
        """Have the loop call a function that sets the result of a future."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self.post(function, *args, context=contextvars.Context())

    def hand_over(self, call: LoopCall, request_task: RequestTask | None = None) -> None:
        """Give a loop call to whoever runs the loop. From here on it is certain to be answered.

        Raises NoLoop when the loop takes no more calls.
        """
        with self._lock:
            if not self._accepting:
                raise NoLoop(f"{self.owner}: its event loop takes no more calls")
            # Before the loop can see it, which may be done with it at once.
            self._calls.add(call)
            try:
                self.post(self._accept, call, request_task, context=contextvars.Context())
            except RuntimeError as exc:
                self._calls.discard(call)
                raise NoLoop(f"{self.owner}: its event loop is closed") from exc
        self._see_to_posts()

    def give_up(self) -> None:
        """Take no more calls, and let those that run go. Logs what they are."""
        # Whoever else notices goes on only when it has been logged.
        with self._giving_up:
            with self._lock:
                if self._given_up or self._stopped:
                    return
                self._given_up = True
                self._accepting = False
                calls = self._calls.copy()
                self._calls.clear()
            left = [task for task in self._left_overs() if task.get_name() != _SHUT_DOWN]
            logger.error(
                "%s: gave up its event loop, because after %s s (SHUTDOWN_TIMEOUT) this was still running: %s. Let a "
                "cancelled task end, and keep blocking calls out of async code.",
                self.owner,
                self.timeout,
                _names(map(self._describe, left))
                or "an async generator, or a thread of the loop's default executor",
            )
        for call in calls:
            self._abandon(call, f"{self.owner}: its event loop was given up while loop call {call.name} was running")
        with contextlib.suppress(RuntimeError):  # it has just been closed after all
            self.post(self._stop)

    def _abandon(self, call: LoopCall, message: str) -> None:
        if not call.is_done:
            call.end(RuntimeError(message))
            call.executor.ring()

    def close_soon(self) -> None:
        """Have the loop's thread close the loop, and wait for nothing. Takes no lock: a finalizer may call it."""
        with contextlib.suppress(RuntimeError):  # it is closed already
            self.post(self._begin_shut_down, context=contextvars.Context())

    def _left_overs(self) -> set[asyncio.Task[Any]]:
        idle = {request_task.task for request_task in self._request_tasks.copy() if request_task.call is None}
        return all_tasks(self.loop) - idle

    def _is_clean(self) -> bool:
        return not self._calls and not self._open_generators() and not self._left_overs()

    def _open_generators(self) -> bool:
        return self._generators is not None and any(found.ag_frame is not None for found in list(self._generators))

    def _describe(self, task: asyncio.Task[Any]) -> str:
        for request_task in self._request_tasks.copy():
            if (name := request_task.running().get(task)) is not None:
                return name
        coroutine = task.get_coro()
        where = getattr(coroutine, "__qualname__", None) or repr(coroutine)
        code = getattr(coroutine, "cr_code", None)
        line = f" ({code.co_filename}:{code.co_firstlineno})" if code and task not in self._ends else ""
        return f"{task.get_name()} running {where}{line}" if task not in self._ends else task.get_name()

    # --- on the thread that runs the loop ------------------------------------------------------------------------

    def new_task(self, coroutine: Coroutine[Any, Any, Any], name: str, context: contextvars.Context) -> Any:
        """Make a task that serves loop calls, by hand until the loop is promoted.

        Not by `create_task`: a user's task factory has no part in it.
        """
        self._makes_task = not self.is_promoted
        try:
            task = asyncio.Task(coroutine, loop=self.loop, name=name, context=context)
        finally:
            self._makes_task = False
        if not self.is_promoted:
            self._tasks.add(task)
        return task

    def _accept(self, call: LoopCall, request_task: RequestTask | None) -> None:
        if call not in self._calls:
            return  # abandoned
        try:
            if request_task is not None and request_task.take(call):
                self._request_tasks.add(request_task)
                if self.is_promoted:
                    request_task.watch()
            else:
                self._begin_alone(call, request_task, by_hand=False)
        except BaseException as exc:
            self._calls.discard(call)
            call.end(exc)
            call.executor.ring()

    def _begin_alone(self, call: LoopCall, request_task: RequestTask | None, by_hand: bool) -> asyncio.Task[Any]:
        """Run a call in a task of its own, because the request's is busy, or it is no request's."""
        call.context = context = call.caller.copy()
        move_here(context)
        call.before = context.copy()
        coroutine, name = self._run_alone(call, request_task), f"loop call {call.name}"
        task: asyncio.Task[Any]
        if by_hand:
            task = self.new_task(coroutine, name, context)
        else:
            task = asyncio.Task(coroutine, loop=self.loop, name=name, context=context)
        if request_task is not None:
            request_task.others[task] = call
        if not by_hand:
            # When it is cancelled before its first step, none of its own code runs.
            task.add_done_callback(lambda _: self._end_alone(task, call, request_task), context=contextvars.Context())
        return task

    async def _run_alone(self, call: LoopCall, request_task: RequestTask | None) -> None:
        task: Any = asyncio.current_task()
        try:
            await call.run()
        finally:
            self._end_alone(task, call, request_task)

    def _end_alone(self, task: asyncio.Task[Any], call: LoopCall, request_task: RequestTask | None) -> None:
        self._tasks.discard(task)
        if request_task is not None:
            request_task.others.pop(task, None)
        self.finish(call)

    def finish(self, call: LoopCall) -> None:
        """The call has ended: answer it, unless it was abandoned."""
        if call.is_done:
            return
        self._calls.discard(call)
        call.end()
        if call.executor.thread_id != get_ident():
            call.executor.ring()

    def _fail_call(self, call: LoopCall, task: asyncio.Task[Any], request_task: RequestTask | None) -> None:
        if not task.cancelled():
            call.exception = task.exception()
        if request_task is not None and request_task.call is call:
            request_task.finish_call()
        self.finish(call)

    def _begin_generator(self, of_loop: Callable[[Any], object] | None, generator: Any) -> None:
        """Called when an async generator takes its first step. of_loop: what the loop does then."""
        if self._generators is None:
            self._generators = weakref.WeakKeyDictionary()
        self._generators[generator] = current_executor()
        if of_loop is not None:
            of_loop(generator)

    def _drop_generator(self, generator: Any) -> None:
        """Called when an async generator is dropped before its end, by any code, on any thread."""
        begun_in = None if self._generators is None else self._generators.pop(generator, None)
        if self._dropped and get_ident() == self.thread_id:
            dropped = self._dropped.get(asyncio.current_task(self.loop))
            if dropped is not None:
                dropped.append(generator)
                return
        # A bystander's context is none of its business.
        context = contextvars.copy_context() if current_executor() is begun_in else contextvars.Context()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.post(self._end_generator, generator, context=context)
            self._see_to_posts()

    def _end_generator(self, generator: Any) -> None:
        async def end() -> None:
            await generator.aclose()

        task = self.loop.create_task(end(), name=f"end of async generator {name_of(generator)}")
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def end_body(self, iterator: Any, owner: str) -> None:
        """Close an async iterator, and then the async generators that it went through, in this same task.

        asyncio would close those that are dropped in tasks of their own, where no cancel scope or task group can be
        left. Those that do not end within `timeout` seconds are cancelled. Nothing is raised: it is logged.
        """
        task = asyncio.current_task()
        closing = self._dropped[task] = [iterator]
        del iterator
        try:
            async with asyncio.timeout(self.timeout):
                for found in closing:
                    name = name_of(found)
                    try:
                        await found.aclose()
                    except (Exception, BaseExceptionGroup) as exc:
                        failed = _without_generator_exit(exc)
                        if failed is not None:
                            logger.error("%s: the end of its body %s failed", owner, name, exc_info=failed)
        except TimeoutError:
            logger.error(
                "%s: its body %s was cancelled, because it did not end within %s s (SHUTDOWN_TIMEOUT).",
                owner,
                name,
                self.timeout,
            )
        finally:
            del self._dropped[task]

    # --- on the thread of a promoted loop ------------------------------------------------------------------------

    def _work(self) -> None:
        self.thread_id = get_ident()
        try:
            self._move_contexts_here()
            while not self._stopped:
                if not self.can_run_by_hand:
                    self.loop.call_soon(self._set_hooks, context=contextvars.Context())
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    # Raised by a task. asyncio has also stored it in the task, where whoever awaits the task gets it;
                    # the loop itself must go on, or its callers would wait for ever.
                    continue
        except BaseException as exc:
            logger.exception("%s: its event loop broke", self.owner)
            self._break(exc)
        finally:
            self._end()

    def _move_contexts_here(self) -> None:
        """What waits on the loop sees what `Local`s hold as it did on the thread that ran the loop by hand."""
        if not self.can_run_by_hand:
            return
        contexts = [context_of(task) for task in all_tasks(self.loop)]
        contexts += [handle._context for handle in [*self.loop._ready, *self.loop._scheduled]]
        contexts += [request_task.context for request_task in self._request_tasks]
        for context in contexts:
            if context is not None:
                with contextlib.suppress(RuntimeError):  # a thread is inside
                    move_here(context)

    def _set_hooks(self) -> None:
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(
            firstiter=partial(self._begin_generator, hooks.firstiter), finalizer=self._drop_generator
        )

    def _break(self, exc: BaseException) -> None:
        """The loop itself has failed: nothing on it will ever go on."""
        with self._lock:
            self._accepting = False
            calls = self._calls.copy()
            self._calls.clear()
        for call in calls:
            self._abandon(call, f"{self.owner}: its event loop broke while loop call {call.name} was running: {exc!r}")

    def _begin_shut_down(self) -> None:
        if not self._closing:
            self._closing = True
            # Not by hand: whoever runs the loop by hand waits for something else.
            asyncio.Task(self._shut_down(), loop=self.loop, name=_SHUT_DOWN, context=contextvars.Context())

    async def _shut_down(self) -> None:
        """Close the loop within `timeout` seconds, step by step. What a task uses goes after the task."""
        keepers = keepers_of(self.loop)
        try:
            await self._drain()
            deadline = self.loop.time() + self.timeout
            for request_task in self._request_tasks.copy():
                request_task.end()
            await self._end_tasks(deadline)
            await keepers.leave(deadline)
            # A left-over task may make loop calls of its own while it ends. The door closes after that.
            with self._lock:
                self._accepting = False
            await self._settle_tasks()
            await self._end_tasks(deadline)
            await self._release(deadline)
            for shut_down in (self.loop.shutdown_asyncgens, self.loop.shutdown_default_executor):
                await asyncio.wait_for(shut_down(), max(deadline - self.loop.time(), 0.001))
        except TimeoutError:
            self.give_up()
        except Exception:
            logger.exception("%s: closing its event loop failed", self.owner)
        finally:
            self._stop()

    async def _drain(self) -> None:
        """Wait for what may take its time to end."""

    async def _release(self, deadline: float) -> None:
        """Give back what belongs to the loop, now that none of its tasks are left."""

    async def _settle_tasks(self) -> None:
        """Let everything that was handed over become a task, and take its first step: before that it can not answer."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _end_tasks(self, deadline: float) -> None:
        if self._given_up or not self._unended():
            return
        await self._settle_tasks()
        if ends := set(self._ends) & self._unended():
            # The end of a generator that was dropped is no left-over: it is completed.
            await asyncio.wait(ends, timeout=max(deadline - self.loop.time(), 0))
        tasks = self._unended()
        if not tasks:
            return
        self._warn(tasks)
        for task in tasks:
            task.cancel()
        _, pending = await asyncio.wait(tasks, timeout=max(deadline - self.loop.time(), 0))
        if pending:
            self.give_up()
        for task in tasks:
            if task.done() and not task.cancelled() and (exc := task.exception()) is not None:
                self.loop.call_exception_handler(
                    {"message": "A task that was left running failed", "exception": exc, "task": task}
                )

    def _warn(self, tasks: set[asyncio.Task[Any]]) -> None:
        logger.warning(
            "%s: ended while %d of its tasks still ran, which are cancelled: %s. %s",
            self.owner,
            len(tasks),
            _names(map(self._describe, tasks)),
            self.remedy,
        )

    def _unended(self) -> set[asyncio.Task[Any]]:
        tasks: set[asyncio.Task[Any]] = self._left_overs() - {asyncio.current_task()}  # type: ignore[arg-type]
        keepers = keepers_of(self.loop)
        return tasks if keepers.have_left else {task for task in tasks if not is_kept(task)}

    def _stop(self) -> None:
        self._stopped = True
        self.loop.stop()

    def _end(self) -> None:
        """Close the loop. A task that would not end is taken off it, so that it never meets a later request."""
        with self._lock:
            self._accepting = False
        for task in all_tasks(self.loop):
            coroutine = task.get_coro()
            try:
                if coroutine is not None:
                    # What it sets in contextvars as it ends is not for this thread.
                    contextvars.Context().run(coroutine.close)
            except BaseException:
                logger.debug("%s: %s ignored its end", self.owner, task.get_name(), exc_info=True)
            # It was named in an error already; asyncio would name it once more.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        for call in list(self._calls):
            with contextlib.suppress(RuntimeError):  # it ignored its end
                self.finish(call)
        self._close()

    def _close(self) -> None:
        """Close the loop, on which nothing is left."""
        self._accepting = False
        self._request_tasks.clear()
        self._tasks.clear()
        # What is left is that of a task which was dropped.
        self._steps.clear()
        if self._has_other_tasks or self.is_promoted:
            drop_keepers(self.loop)
        loop_executors.pop(self.loop, None)
        self.loop.close()
        # A cycle otherwise: the loop would wait for the garbage collector. Not before it is closed: a call that comes
        # in between would be taken and never run.
        for name in _STAND_INS:
            self.loop.__dict__.pop(name, None)
        self._stopped = True
        with self._lock:
            self._is_closed = True
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    @property
    def ended(self) -> Future[None]:
        """Done when the loop is closed, and nothing of it runs any more."""
        with self._lock:
            if self._ended is None:
                self._ended = Future()
                if self._is_closed:
                    self._ended.set_result(None)
            return self._ended


class RequestLoop(RunningLoop):
    """The loop of one request: closed with it, and with whatever was left on it."""

    remedy = (
        "Await a task before the request ends, or start it with wsgi_loop.create_background_task() if it may outlive "
        "the request."
    )

    def leave(self, request_task: RequestTask, executor: Executor) -> None:
        """Close the loop: at once if nothing is left on it, else within `timeout` seconds.

        executor: runs on this thread what the loop's tasks need to run here meanwhile.
        """
        if _get_running_loop() is None and self.take():
            try:
                if self._close_by_hand(request_task, executor):
                    return
                self.promote()
            finally:
                self._is_held = False
                self._turn.release()
        self.promote()
        is_clean = self._is_clean()
        self.close_soon()
        if is_clean:
            return
        self.ended.add_done_callback(lambda _: executor.ring())
        if not executor.serve_until(self.ended, self.timeout):
            self.give_up()

    def _close_by_hand(self, request_task: RequestTask, executor: Executor | None) -> bool:
        """Close the loop, if that is all there is to do. In this thread's turn.

        executor: where there is one, resources of `PerLoop` are closed as well.
        """
        if self._steps or self.loop._ready:
            self._settle()
        if self._calls or self._in_executors or (self._generators is not None and self._open_generators()):
            return False
        if self._has_other_tasks and (left := all_tasks(self.loop) - self._tasks):
            if executor is None or left - idle_keepers(self.loop):
                return False
            self._closing = True
            self.drive(LoopCall(self._shut_down(), self._shut_down, executor, contextvars.Context()))
            if not self.is_promoted:
                self._end()
            return not self.is_promoted
        request_task.drop()
        self._close()
        return True

    def leave_soon(self, request_task: RequestTask) -> None:
        """Close the loop, and wait for nothing. Takes no lock: a finalizer may call it."""
        if self.is_promoted or not self.take():
            self.close_soon()
            return
        try:
            if not self.depth and self._close_by_hand(request_task, None):
                return
        finally:
            self._is_held = False
            self._turn.release()
        # By way of a bare thread: this one may hold a lock that is taken to start another one.
        with contextlib.suppress(RuntimeError):
            _thread.start_new_thread(self._close_elsewhere, ())

    def _close_elsewhere(self) -> None:
        try:
            self.promote()
        except RuntimeError as exc:
            logger.error("%s: its event loop was not closed well: %s", self.owner, exc)
        self.close_soon()
