"""Event loops: how loop calls run on them, and how they are closed well.

Knows asyncio and threads, and nothing of Django.

Who owns what: a `RequestLoop` belongs to the request that made it until `leave()`, a `ProcessLoop` to the process until
`shut_down()`. A loop that has a thread is closed by that thread, alone and within a bound: a thread that is interrupted
while it waits leaves nothing behind. A loop thread serves one loop, and ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
import weakref
from asyncio import _get_running_loop, _set_running_loop
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from functools import partial
from threading import get_ident
from typing import Any

from .bridge.executor import Executor, current_executor, loop_executors
from .bridge.storage import is_loop_call, move_here
from .calls import LoopCall, NoLoop, RequestTask, name_of
from .counters import counters
from .resources import drop_keepers, is_kept, keepers_of, kept
from .threads import has_started, new_thread, start

logger = logging.getLogger("wsgi_loop")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
#: Called with a loop and asgiref's coroutine for a loop call, on the thread that makes the call.
Door = Callable[["RunningLoop", Coroutine[Any, Any, Any]], None]

_SHUT_DOWN = "wsgi-loop shut-down"
#: How many left-over tasks a record names.
_MOST_NAMES = 10
#: What is put in the place of a loop's own methods, until the loop is closed.
_STAND_INS = (
    "call_soon",
    "call_soon_threadsafe",
    "create_task",
    "run_in_executor",
    "set_default_executor",
    "_asyncgen_firstiter_hook",
    "_asyncgen_finalizer_hook",
)
_ANOTHER = asyncio.AbstractEventLoop()  # type: ignore[abstract]


def all_tasks(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    """Return the unfinished tasks of a loop."""
    running = _get_running_loop()
    if running is not loop:
        return asyncio.all_tasks(loop)
    # From Python 3.14 on, where the loop is running these are only the tasks that were made on this thread. Not None in
    # its place: a finalizer that comes in between is not to run another loop here, in the middle of a task.
    _set_running_loop(_ANOTHER)
    try:
        return asyncio.all_tasks(loop)
    finally:
        _set_running_loop(running)


def _listed(names: Iterable[str]) -> str:
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


def succeed(future: asyncio.Future[Any], result: Any) -> None:
    """Set the result of a future that sync code has come to, unless somebody has cancelled it."""
    if not future.done():
        future.set_result(result)


def fail(future: asyncio.Future[Any], exc: BaseException) -> None:
    """Set the exception that sync code has raised, unless somebody has cancelled the future."""
    if isinstance(exc, StopIteration):
        # No future takes one, for it would end the coroutine that awaits it.
        failure = RuntimeError("sync code raised StopIteration")
        failure.__cause__ = exc
        exc = failure
    if not future.done():
        future.set_exception(exc)


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
            self._running.post_to_open(fail, self.future, exc)
            # The exception leads here, and the future leads to the exception.
            del self
        else:
            self._running.post_to_open(succeed, self.future, result)

    def refuse(self) -> None:
        self._running.post_to_open(self.future.cancel)


class RunningLoop:
    """One event loop, from its first loop call until its end.

    factory: makes the loop. timeout: seconds that closing waits for cancelled tasks. owner: whom to name in logs. door:
    takes what asgiref hands to the loop.
    """

    #: What to do about left-over tasks.
    remedy = ""
    #: Whether the loop has a thread of its own, and that one.
    is_promoted = False
    thread_id: int | None = None
    #: Async generators that have begun, with the request in which they did.
    _generators: weakref.WeakKeyDictionary[Any, Executor | None] | None = None
    _ended: Future[None] | None = None
    _is_closed = False
    _accepting = True
    _closing = False
    _stopped = False
    _given_up = False

    def __init__(self, factory: LoopFactory, timeout: float, owner: str, door: Door) -> None:
        self.owner = owner
        self.timeout = timeout
        self._door = door
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
        loop: Any = contextvars.Context().run(factory)
        self.loop = loop
        counters.loops_made += 1
        self.post: Callable[..., Any] = self.loop.call_soon_threadsafe
        self._run_in: Callable[..., Any] = self.loop.run_in_executor
        self._sets_hooks = hasattr(self.loop, "_asyncgen_firstiter_hook")
        methods = self.loop.__dict__
        methods["call_soon_threadsafe"] = self._call_soon_threadsafe
        methods["run_in_executor"] = self._run_in_executor
        if self._sets_hooks:
            # asyncio's own loops set these whenever they begin to run. Others are told then: see `_set_hooks`.
            methods["_asyncgen_firstiter_hook"] = partial(self._begin_generator, loop._asyncgen_firstiter_hook)
            methods["_asyncgen_finalizer_hook"] = self._drop_generator

    # --- on any thread -------------------------------------------------------------------------------------------

    def begin(self, executor: Executor) -> None:
        """A request is about to make its first loop call, and waits for its calls with `executor`."""

    def is_inside(self) -> bool:
        """Tell if this thread is in the middle of what it would wait for."""
        return self.thread_id == get_ident()

    def _call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        """Stands in for the loop's own method, to which asgiref hands a loop call, on the thread that makes it."""
        if is_loop_call(args):
            return self._door(self, args[0])
        handle = self.post(callback, *args, context=context)
        self._see_to_posts()
        return handle

    def _see_to_posts(self) -> None:
        """Called when something was posted."""

    def _run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> Any:
        """Stands in for the loop's own method, to which asgiref gives thread-sensitive calls."""
        if isinstance(executor, Executor) and not args:
            work = Work(self, function)
            executor.put(work)
            return work.future
        return self._run_in(executor, function, *args)

    def post_to_open(
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> bool:
        """Post a callback, unless the loop is closed. Returns whether that was done. context: an empty one by default.

        Any other RuntimeError is raised, such as the RecursionError at the end of the stack.
        """
        try:
            self.post(callback, *args, context=context or contextvars.Context())
        except RuntimeError:
            if not self.loop.is_closed():
                raise
            return False
        return True

    def interrupt(self) -> None:
        """Called when there is work for a thread that waits for a loop call."""

    def hand_over(self, call: LoopCall, request_task: RequestTask | None = None) -> None:
        """Give a loop call to whoever runs the loop. From here on it is certain to be answered.

        Raises NoLoop when the loop takes no more calls.
        """
        with self._lock:
            if not self._accepting:
                raise NoLoop(f"{self.owner}: its event loop takes no more calls")
            # Before the loop can see it, which may be done with it at once.
            self._calls.add(call)
            if not self.post_to_open(self._accept, call, request_task):
                self._calls.discard(call)
                raise NoLoop(f"{self.owner}: its event loop is closed")
        self._see_to_posts()

    def give_up(self) -> None:
        """Take no more calls, and let those that run go. Logs what they are."""
        # Whoever else notices goes on only when it has been logged.
        with self._giving_up:
            with self._lock:
                if self._given_up or self._stopped:
                    return
                self._given_up = True
                counters.loops_given_up += 1
                self._accepting = False
            left = [task for task in self._left_overs() if task.get_name() != _SHUT_DOWN]
            logger.error(
                "%s: gave up its event loop, because after %s s (SHUTDOWN_TIMEOUT) this was still running: %s. Let a "
                "cancelled task end, and keep blocking calls out of async code.",
                self.owner,
                self.timeout,
                _listed(map(self._describe, left)) or "an async generator, or a thread of the loop's default executor",
            )
        self._abandon_calls("its event loop was given up")
        self.post_to_open(self._stop)

    def _abandon_calls(self, why: str) -> None:
        """Answer every call with an error, as nobody knows if it will ever end. Take no more."""
        with self._lock:
            self._accepting = False
            calls = self._calls.copy()
            self._calls.clear()
        for call in calls:
            if not call.is_done:
                call.end(RuntimeError(f"{self.owner}: {why} while loop call {call.name} was running"))
                call.executor.ring()

    def close_soon(self) -> None:
        """Have the loop's thread close the loop, and wait for nothing. Takes no lock: a finalizer may call it."""
        self.post_to_open(self._begin_shut_down)

    @property
    def ended(self) -> Future[None]:
        """Done when the loop is closed, and nothing of it runs any more."""
        with self._lock:
            if self._ended is None:
                self._ended = Future()
                if self._is_closed:
                    self._ended.set_result(None)
            return self._ended

    def _left_overs(self) -> set[asyncio.Task[Any]]:
        idle = {request_task.task for request_task in self._request_tasks.copy() if request_task.call is None}
        return all_tasks(self.loop) - idle

    def _open_generators(self) -> bool:
        return self._generators is not None and any(found.ag_frame is not None for found in list(self._generators))

    def _describe(self, task: asyncio.Task[Any]) -> str:
        for request_task in self._request_tasks.copy():
            if (name := request_task.running().get(task)) is not None:
                return name
        if task in self._ends or task.get_name().startswith("loop call "):
            return task.get_name()
        coroutine = task.get_coro()
        code = getattr(coroutine, "cr_code", None)
        line = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        return f"{task.get_name()} running {getattr(coroutine, '__qualname__', None) or repr(coroutine)}{line}"

    # --- on the thread that runs the loop ------------------------------------------------------------------------

    def new_task(
        self, coroutine: Coroutine[Any, Any, Any], name: str, context: contextvars.Context, make: Any = asyncio.Task
    ) -> Any:
        """Make a task that serves loop calls. Not by `create_task`: a user's task factory has no part in it."""
        try:
            return make(coroutine, loop=self.loop, name=name, context=context)
        except BaseException:
            coroutine.close()
            raise

    def _accept(self, call: LoopCall, request_task: RequestTask | None) -> None:
        if call not in self._calls:
            return  # abandoned
        try:
            if request_task is not None and request_task.take(call):
                self._request_tasks.add(request_task)
                if self.is_promoted:
                    request_task.watch()
                return
            task = RunningLoop.new_task(self, *self._prepare(call, request_task))
            if call.below is not None:
                call.below.nested = task
            # When it is cancelled before its first step, none of its own code runs.
            task.add_done_callback(lambda _: self.finish(call), context=contextvars.Context())
        except BaseException as exc:
            self._calls.discard(call)
            call.end(exc)
            call.executor.ring()

    def _prepare(self, call: LoopCall, request_task: RequestTask | None) -> tuple[Any, str, contextvars.Context]:
        """Return what makes a task for a call alone: the request's is busy, or the call is no request's."""
        call.context = context = call.caller.copy()
        move_here(context)
        call.before = context.copy()
        return self._run_alone(call, request_task), f"loop call {call.name}", context

    async def _run_alone(self, call: LoopCall, request_task: RequestTask | None) -> None:
        task = asyncio.current_task()
        if request_task is not None and task is not None:
            request_task.others[task] = call
        try:
            await call.run()
        finally:
            if request_task is not None and task is not None:
                del request_task.others[task]
            self.finish(call)

    def finish(self, call: LoopCall) -> None:
        """The call has ended: answer it, unless it was abandoned."""
        if not call.is_done:
            self._calls.discard(call)
            call.end()
            if call.executor.thread_id != get_ident():
                call.executor.ring()

    def _begin_generator(self, of_loop: Callable[[Any], object] | None, generator: Any) -> None:
        """Called when an async generator takes its first step. of_loop: what the loop does then."""
        if kept.get() is None:  # else a keeper closes it
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
        if self.post_to_open(self._end_generator, generator, context=context):
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

    # --- on the loop's thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Give the loop its thread. Raises RuntimeError if that can not be started."""
        thread = new_thread(self._work)
        try:
            self.is_promoted = True
            start(thread)
        except BaseException as exc:
            # An interrupt may come when the thread runs already, and then it ends the loop.
            if not has_started(thread):
                self._abandon_calls(f"its event loop was not run any more ({exc})")
                self._end()
            raise

    def _work(self) -> None:
        self.thread_id = get_ident()
        counters.loop_threads += 1
        try:
            self._begin_work()
            while not self._stopped:
                if not self._sets_hooks:
                    self.loop.call_soon(self._set_hooks, context=contextvars.Context())
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    # Raised by a task. asyncio has also stored it in the task, where whoever awaits the task gets it;
                    # the loop itself must go on, or its callers would wait for ever.
                    continue
        except BaseException as exc:
            logger.exception("%s: its event loop broke", self.owner)
            self._abandon_calls(f"its event loop broke ({exc!r})")
        finally:
            counters.loop_threads -= 1
            self._end()

    def _begin_work(self) -> None:
        """Called before the loop runs on its thread."""

    def _set_hooks(self) -> None:
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(partial(self._begin_generator, hooks.firstiter), self._drop_generator)

    def _begin_shut_down(self) -> None:
        if not self._closing:
            self._closing = True
            RunningLoop.new_task(self, self._shut_down(), _SHUT_DOWN, contextvars.Context())

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
                # Not wait_for(), which makes a task up to Python 3.11: a task factory of the user's may refuse to.
                async with asyncio.timeout(max(deadline - self.loop.time(), 0.001)):
                    await shut_down()
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
        if ends := self._ends & self._unended():
            # The end of a generator that was dropped is no left-over: it is completed.
            await asyncio.wait(ends, timeout=max(deadline - self.loop.time(), 0))
        tasks = self._unended()
        if not tasks:
            return
        logger.warning(
            "%s: ended while %d of its tasks still ran, which are cancelled: %s. %s",
            self.owner,
            len(tasks),
            _listed(map(self._describe, tasks)),
            self.remedy,
        )
        counters.tasks_cut_off += len(tasks)
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

    def _unended(self) -> set[asyncio.Task[Any]]:
        tasks: set[asyncio.Task[Any]] = self._left_overs() - {asyncio.current_task()}
        keepers = keepers_of(self.loop)
        return tasks if keepers.have_left else {task for task in tasks if not is_kept(task)}

    def _stop(self) -> None:
        self._stopped = True
        self.loop.stop()

    def _end(self) -> None:
        """Close the loop. A task that would not end is taken off it, so that it never meets a later request."""
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
        drop_keepers(self.loop)
        self._close()

    def _close(self) -> None:
        """Close the loop, on which nothing is left."""
        self._accepting = False
        self._stopped = True
        self._request_tasks.clear()
        loop_executors.pop(self.loop, None)
        try:
            self.loop.close()
        except Exception:
            # Whoever waits for the end of a broken loop is to be told all the same.
            logger.exception("%s: closing its event loop failed", self.owner)
        # A cycle otherwise: the loop would wait for the garbage collector. Not before it is closed: a call that comes
        # in between would be taken and never run.
        for name in _STAND_INS:
            self.loop.__dict__.pop(name, None)
        with self._lock:
            if not self._is_closed:
                counters.loops_closed += 1
            self._is_closed = True
        # Its callbacks lead back here.
        ended, self._ended = self._ended, None
        if ended is not None and not ended.done():
            ended.set_result(None)
