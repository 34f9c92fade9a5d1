"""The event loop of one request: run by hand on the request thread, and on a thread of its own after a promotion.

Knows asyncio and threads, and nothing of Django. `loops` says how calls run on a loop that has a thread.

A loop has no thread at first. Whichever thread of its request makes a loop call has the *turn*, and runs the loop *by
hand*: that thread takes the first step of the call on its own stack, and runs the loop only while the call waits. While
sync code runs, nobody has the turn, and the loop stands still. As soon as something on the loop could go on meanwhile,
the loop is *promoted*: it gets a thread of its own, for the rest of its life. A loop without a thread is closed by the
request thread, if nothing is left on the loop.

Each step of a task that serves loop calls is taken by the thread that waits, outside of the loop's own `_run_once`. So
the loop may be run again below a step, by sync code that makes a nested call. A promoted loop takes all steps itself,
as asyncio does. What is used of asyncio here was read in Python 3.11 to 3.15.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import gc
import logging
import sys
import threading
from asyncio import _get_running_loop, _set_running_loop
from asyncio.tasks import _enter_task, _leave_task
from collections import deque
from collections.abc import Callable, Coroutine
from functools import partial
from threading import get_ident
from typing import Any

from .bridge.executor import Executor, loop_executors, run_here
from .bridge.storage import move_here
from .calls import LoopCall, RequestTask
from .event_loop import EventLoop
from .loops import Door, LoopFactory, RunningLoop, all_tasks, fail, succeed
from .resources import context_of, idle_keepers

logger = logging.getLogger("wsgi_loop")

#: How many rounds of the loop are waited for what is about to end: a task, a connection that was closed.
_ROUNDS = 4
#: Seconds for which a thread has the turn that is not to run the loop, at most.
_MOMENT = 0.5
#: What running a loop by hand relies on. uvloop's loops do not have it.
_BY_HAND = ("_ready", "_scheduled", "_timer_cancelled_count", "_thread_id", "_stopping", "_asyncgen_firstiter_hook")


def _is_bound_to_thread(task: asyncio.Task[Any]) -> bool:
    """Tell if a task is suspended inside a greenlet, which keeps its thread: SQLAlchemy's asyncio extension does so."""
    greenlet: Any = sys.modules.get("greenlet")
    awaited: Any = task.get_coro() if greenlet is not None else None
    while awaited is not None:
        # Not by `f_locals`: up to Python 3.12 a frame would keep what that has found, for as long as the frame lives.
        if any(isinstance(found, greenlet.greenlet) for found in gc.get_referents(awaited)):
            return True
        awaited = next(
            filter(None, (getattr(awaited, name, None) for name in ("cr_await", "ag_await", "gi_yieldfrom"))), None
        )
    return False


class _Task(asyncio.Task[Any]):
    """A task whose steps are taken by hand."""

    #: That of a nested call, for which sync code waits below a step of this one.
    nested: asyncio.Task[Any] | None = None

    def cancel(self, msg: Any = None) -> bool:
        if self.nested is not None and not self.nested.done():
            # This one waits for that one, as asgiref has it.
            return self.nested.cancel(msg)
        return super().cancel(msg)


class _StepIsDue(SystemExit):
    """Raised through a loop that is run by hand: asyncio lets it pass. What is ready after the step stays so."""


class RequestLoop(RunningLoop):
    """The loop of one request, closed with the request, and with whatever was left on the loop. See `RunningLoop`."""

    remedy = (
        "Await a task before the request ends, or start it with wsgi_loop.create_background_task() if it may outlive "
        "the request."
    )
    #: How often it was taken by the thread that has the turn, who will look for what was posted before it ends.
    _held = 0
    #: The thread that runs loop calls by hand, and how many, one below the other.
    driver: int | None = None
    depth = 0
    _makes_task = False
    _has_other_tasks = False
    #: How many calls are on threads of executors.
    _in_executors = 0
    #: What to do when the step that is being taken has ended.
    _after_step: Callable[[], None] | None = None

    def __init__(self, factory: LoopFactory, timeout: float, owner: str, door: Door) -> None:
        super().__init__(factory, timeout, owner, door)
        self._turn = threading.RLock()
        #: Steps that are to be taken by hand; the tasks whose steps are; and those whose steps are being taken.
        self._steps: deque[tuple[Any, tuple[Any, ...], Any]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stepping: list[_Task] = []
        self.can_run_by_hand = type(self.loop) is EventLoop or all(hasattr(self.loop, name) for name in _BY_HAND)
        self._call_soon: Callable[..., Any] = self.loop.call_soon
        if self.can_run_by_hand:
            self.loop.__dict__["call_soon"] = self._call_soon_by_hand
            self.loop.__dict__["create_task"] = partial(self._create_task, self.loop.create_task)

    def begin(self, executor: Executor) -> None:
        # For what runs with no executor in its context: asgiref would send all of it to one thread of the process.
        loop_executors[self.loop] = executor
        if not self.can_run_by_hand:
            self.promote()

    # --- who runs the loop ---------------------------------------------------------------------------------------

    def is_inside(self) -> bool:
        return super().is_inside() or (self.depth > 0 and self.driver == get_ident())

    def take(self) -> bool:
        """Take the turn, to run the loop by hand. False: it has a thread, or another thread has the turn."""
        if self.is_promoted or not self._turn.acquire(blocking=False):
            return False
        if self.is_promoted or not self._accepting or (self.depth and self.driver != get_ident()):
            self._turn.release()
            return False
        self._held += 1
        if not self.depth and self._stepping:
            # Left by an interrupt.
            self._stepping.clear()
            self.loop._thread_id = None
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
            self._held -= 1
            self._turn.release()
            # Posted when the turn was held.
            if not self.is_promoted and not self._held and (self.loop._ready or self._steps):
                self.promote()

    def promote(self) -> None:
        """Give the loop a thread of its own, if that can be.

        Not so while another thread runs it by hand, or this one does so further up its stack, as when a finalizer makes
        a loop call; nor while a task of it can not change its thread. Raises RuntimeError if no thread can be started.
        """
        # Another thread may run it, or has just looked if it may.
        if not self._turn.acquire(blocking=False) and (self._held or not self._turn.acquire(timeout=_MOMENT)):
            return
        try:
            if self.is_promoted or self._stopped or self._held > 1 or self.loop.is_closed():
                return
            if not any(map(_is_bound_to_thread, all_tasks(self.loop))):
                for name in ("call_soon", "create_task"):
                    self.loop.__dict__.pop(name, None)
                while self._steps:
                    callback, args, context = self._steps.popleft()
                    self._call_soon(callback, *args, context=context)
                for request_task in self._request_tasks:
                    request_task.watch()
                self.start()
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
                    task: Any = request_task.task
                else:
                    task = self.new_task(*self._prepare(call, request_task))
                    if self._stepping:
                        self._stepping[-1].nested = task
            except BaseException:
                self._calls.discard(call)
                raise
            while not call.is_done and not self.is_promoted:
                if self._steps:
                    self._take_step()
                elif task.done():
                    # It has failed by itself, and not the coroutine that it ran.
                    call.exception = None if task.cancelled() else task.exception()
                    if request_task is not None and request_task.call is call:
                        request_task.finish_call()
                    self.finish(call)
                elif not call.executor.jobs.empty():
                    # The loop goes on while that runs, if it can.
                    self.promote()
                    if not self.is_promoted:
                        call.executor.serve()
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
        # A step that an interrupt has left may make nested calls.
        self.depth += 1
        self.driver = get_ident()
        try:
            for _ in range(_ROUNDS):
                if self._steps:
                    self._take_step()
                elif self.loop._ready:
                    self._take_round()
                else:
                    break
        finally:
            self.depth -= 1

    def new_task(
        self, coroutine: Coroutine[Any, Any, Any], name: str, context: contextvars.Context, make: Any = asyncio.Task
    ) -> Any:
        if self.is_promoted:
            return super().new_task(coroutine, name, context, make)
        self._makes_task = True
        try:
            task = super().new_task(coroutine, name, context, _Task)
        finally:
            self._makes_task = False
        self._tasks.add(task)
        return task

    def hand_over(self, call: LoopCall, request_task: RequestTask | None = None) -> None:
        if self._stepping and self.driver == get_ident():
            call.below = self._stepping[-1]
        super().hand_over(call, request_task)

    def _create_task(self, create_task: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stands in for the loop's own method. An eager task asks the loop for nothing before it has waited once."""
        self._has_other_tasks = True
        return create_task(*args, **kwargs)

    def _call_soon_by_hand(self, callback: Any, *args: Any, context: Any = None) -> Any:
        """Stands in for the loop's own method, by way of which asyncio's tasks take their steps."""
        task = getattr(callback, "__self__", None)
        if isinstance(task, asyncio.Task):
            if self._makes_task or task in self._tasks:
                if self.loop._ready or (self._stepping and not self._makes_task):
                    # What was ready before comes before. A task that asks for its next step lets the loop have a turn.
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
            # Also for when an interrupt comes in place of what is raised.
            self.loop.stop()
            raise _StepIsDue

    def _take_step(self) -> None:
        """Take a step of a task on this thread's stack. For that time, the loop is the running one of the thread."""
        loop = self.loop
        callback, args, context = self._steps.popleft()
        task = callback.__self__
        hooks = sys.get_asyncgen_hooks()
        try:
            try:
                sys.set_asyncgen_hooks(loop._asyncgen_firstiter_hook, loop._asyncgen_finalizer_hook)
                loop._thread_id = get_ident()
                _set_running_loop(loop)
                self._stepping.append(task)
                context.run(callback, *args)
            finally:
                _set_running_loop(None)
        finally:
            # Twice, should an interrupt come right there: later requests of the thread would all fail.
            _set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)
            # Of a loop that has been promoted below the step: its thread.
            loop._thread_id = self.thread_id
            self._stepping.pop()
            if task.done():
                self._tasks.discard(task)
            if self._after_step is not None:
                self._after_step()

    def _others(self) -> set[asyncio.Task[Any]]:
        """Return the tasks that could go on while this thread runs sync code."""
        return all_tasks(self.loop) - self._tasks - idle_keepers(self.loop)

    # --- thread-sensitive calls ----------------------------------------------------------------------------------

    def _run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> Any:
        if isinstance(executor, Executor) and not args:
            if self._may_run_inline(executor):
                return self._run_inline(function)
            return super()._run_in_executor(executor, function)
        future = super()._run_in_executor(executor, function, *args)
        self._in_executors += 1
        future.add_done_callback(self._come_back)
        return future

    def _come_back(self, _: object) -> None:
        self._in_executors -= 1

    def _may_run_inline(self, executor: Executor) -> bool:
        """Tell if a task, a step of which this thread takes by hand, wants sync code while nothing else could go on."""
        loop: Any = self.loop
        task: Any = self._stepping[-1] if self._stepping else None
        return (
            task is not None
            and not self.is_promoted
            and _get_running_loop() is self.loop
            and not task._must_cancel
            and asyncio.current_task() is task
            and executor.living().thread_id == get_ident()
            and not loop._ready
            and not self._steps
            and len(loop._scheduled) <= loop._timer_cancelled_count
            and not (self._has_other_tasks and self._others())
        )

    def _run_inline(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Run sync code right here, below the step of the task that wants it, outside of the loop."""
        loop, task = self.loop, self._stepping[-1]
        future: asyncio.Future[Any] = loop.create_future()
        give: Callable[..., None] = succeed
        outcome: Any
        hooks = sys.get_asyncgen_hooks()
        _leave_task(loop, task)
        _set_running_loop(None)
        loop._thread_id = None
        sys.set_asyncgen_hooks(None, None)
        held, self._held = self._held, 0
        for _ in range(held):
            self._turn.release()
        try:
            if loop._ready:
                # Posted when the turn was held.
                self.promote()
            outcome = run_here(function)
        except BaseException as exc:
            give, outcome = fail, exc
        finally:
            # Nobody else has it for long: this thread's call is further up the stack.
            for _ in range(held):
                self._turn.acquire()
            self._held = held
            is_promoted = self.is_promoted
            interrupt = self._hold() if is_promoted else None
            if interrupt is not None:
                give, outcome = fail, interrupt
                del interrupt
            sys.set_asyncgen_hooks(*hooks)
            loop._thread_id = get_ident()
            _set_running_loop(loop)
            _enter_task(loop, task)
        try:
            if is_promoted:
                # Not before the step has ended: the task goes on elsewhere.
                self._after_step = partial(self._end_step, self._after_step, give, future, outcome)
            else:
                give(future, outcome)
            return future
        finally:
            # An exception's traceback leads here.
            del outcome, future

    def _end_step(self, let_go: Callable[[], None] | None, *answer: Any) -> None:
        self._after_step = None
        if let_go is not None:
            let_go()
        self.post_to_open(*answer)

    def _hold(self) -> BaseException | None:
        """Have the loop's thread stand still, until this one has taken to its end a step that it had begun before.

        Returns what has interrupted the waiting for that: the step has to be ended first.
        """
        stands, may_go_on = threading.Lock(), threading.Lock()
        stands.acquire()
        may_go_on.acquire()
        interrupt = None

        def stand_still() -> None:
            stands.release()
            may_go_on.acquire()

        is_posted = self.post_to_open(stand_still)
        while is_posted and not self._is_closed:
            try:
                if stands.acquire(timeout=0.1):
                    break
            except BaseException as exc:
                interrupt = exc
        self._after_step = may_go_on.release
        return interrupt

    def _see_to_posts(self) -> None:
        # Nobody would run that while the request thread is in sync code.
        if not self.is_promoted and not self._held:
            self.promote()

    def interrupt(self) -> None:
        if not self.is_promoted:
            self.post_to_open(self.loop.stop)

    def _begin_work(self) -> None:
        """Let what waits on the loop see what `Local`s hold, as it did on the thread that ran the loop by hand."""
        if not self.can_run_by_hand:
            return
        # Left by an interrupt at the end of a step.
        self.loop._thread_id = None
        contexts = [context_of(task) for task in all_tasks(self.loop)]
        contexts += [handle._context for handle in [*self.loop._ready, *self.loop._scheduled]]
        contexts += [request_task.context for request_task in self._request_tasks]
        for context in contexts:
            if context is not None:
                with contextlib.suppress(RuntimeError):  # a thread is inside
                    move_here(context)

    # --- the end -------------------------------------------------------------------------------------------------

    def leave(self, request_task: RequestTask, executor: Executor) -> None:
        """Close the loop: at once if nothing is left on it, else within `timeout` seconds.

        executor: runs on this thread what the loop's tasks need to run here meanwhile.
        """
        if _get_running_loop() is None and self.take():
            try:
                if self._close_by_hand(request_task, executor):
                    return
            finally:
                self._held -= 1
                self._turn.release()
        self.promote()
        is_clean = not self._calls and not self._open_generators() and not self._left_overs()
        self.close_soon()
        if not is_clean:
            self.ended.add_done_callback(lambda _: executor.ring())
            if not executor.serve_until(self.ended, self.timeout):
                self.give_up()

    def _close_by_hand(self, request_task: RequestTask, executor: Executor | None) -> bool:
        """Close the loop, if nothing but resources of `PerLoop` is left on it. In this thread's turn.

        executor: serves these resources; without one they are left too. Returns whether the loop is closed.
        """
        if not self._calls:
            request_task.end()
        if self._steps or self.loop._ready:
            self._settle()
        left = all_tasks(self.loop) - self._tasks if self._has_other_tasks else set()
        is_used = self._calls or self._in_executors or (self._generators is not None and self._open_generators())
        if not left and not is_used:
            self._close()
            return True
        if executor is None:
            return False
        if is_used or left - idle_keepers(self.loop):
            # A bound holds only where another thread runs what it bounds.
            self.promote()
        if not self.is_promoted:
            self._closing = True
            self.drive(LoopCall(self._shut_down(), self._shut_down, executor, contextvars.Context()))
        if not self.is_promoted:
            self._end()
        return not self.is_promoted

    def _close(self) -> None:
        self._tasks.clear()
        self._steps.clear()
        if not self.is_promoted:
            # For whoever has put a `close` of his own on the loop, which runs the loop once more.
            self.loop._stopping = False
        super()._close()

    def leave_soon(self, request_task: RequestTask) -> None:
        """Close the loop, and wait for nothing. Takes no lock: a finalizer may call it."""
        if self.is_promoted:
            self.close_soon()
            return
        if _get_running_loop() is None and not self.depth and self.take():
            try:
                if self._close_by_hand(request_task, None):
                    return
            finally:
                self._held -= 1
                self._turn.release()
        # By way of a bare thread: this one may hold a lock that is taken to start another one.
        with contextlib.suppress(RuntimeError):
            _thread.start_new_thread(self._close_elsewhere, ())

    def _close_elsewhere(self) -> None:
        try:
            self.promote()
        except RuntimeError as exc:
            logger.error("%s: its event loop was not closed well: %s", self.owner, exc)
        if self._stopped and not self.is_promoted:
            # An interrupt came when it was about to be closed.
            self._close()
        else:
            self.close_soon()
