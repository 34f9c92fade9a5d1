"""Event loops: the one of a request, the one of a process, how loop calls run on them and how they are closed well.

Knows asyncio and threads, and nothing of Django or asgiref: `bridge` turns what asgiref hands over into a `LoopCall`.

Who owns what: a `RequestLoop` belongs to the request that made it until `close()`, a `ProcessLoop` to the process until
`shut_down()`. From then on, and only then, the loop thread that runs it finishes it off, alone and within a bound, so a
thread that is interrupted while it waits leaves nothing behind. A loop thread belongs to `LoopThreads`, and is lent to
one loop at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import CancelledError, Future, InvalidStateError
from functools import partial
from typing import Any, Protocol

from .resources import AsyncContextFactory, drop_keepers, is_kept, keepers_of
from .threads import threads

logger = logging.getLogger("wsgi_loop")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

_UNSET: Any = object()
#: Of a clean loop, before it is closed.
_ROUNDS = 4
#: In place of a loop's executor: uvloop's loops do not show if they have one.
UNKNOWN = object()
_SHUT_DOWN = "wsgi-loop shut-down"


class NoLoop(RuntimeError):
    """There is no loop, or it takes no more calls. asgiref takes that for a closed loop, and makes one of its own."""


class CallsContext:
    """The context in which a request's loop calls run, one after another.

    It stays the same one from call to call, so that a token made in one can be used in a later one. Before each call
    it is brought in line with the caller's: what the caller has unset since then is unset here too.
    """

    __slots__ = ("__weakref__", "_tokens", "context", "follows")

    def __init__(self) -> None:
        #: How often it has been brought in line.
        self.follows = 0
        self.context = contextvars.Context()
        self._tokens: dict[contextvars.ContextVar[Any], contextvars.Token[Any]] = {}

    def follow(self, caller: contextvars.Context) -> None:
        """Make `context` the one to run a call in that `caller` makes."""
        self.follows += 1
        if not self.context.run(self._align, caller):
            # Async code set a variable that its caller has dropped, and only its own token could unset it.
            self.context = caller.copy()
            self._tokens = {}

    def _align(self, caller: contextvars.Context) -> bool:
        for var in contextvars.copy_context():
            if var not in caller:
                token = self._tokens.pop(var, None)
                if token is None:
                    return False
                var.reset(token)
        for var, value in caller.items():
            held = var.get(_UNSET)
            if held is _UNSET:
                self._tokens[var] = var.set(value)
            elif held is not value:
                var.set(value)
        return True


@types.coroutine
def run_in_context(context: contextvars.Context, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, None]:
    """Await `coroutine` in the current task, but in `context`."""
    step: Callable[[Any], Any] = coroutine.send
    value: Any = None
    while True:
        try:
            awaited = context.run(step, value)
        except StopIteration:
            return
        try:
            value = yield awaited
            step = coroutine.send
        except BaseException as exc:  # a cancellation, above all: it belongs to the coroutine
            value = exc
            step = coroutine.throw
        del awaited


class LoopCall:
    """One coroutine handed over to a loop, and what has to be done before its first step and after its last.

    request_task: that of its request, if it is a request's, which runs it in calls_context. Where there is none, or it
    runs another one, or has ended, the call gets a task of its own, in the context it was handed over in.
    """

    __slots__ = ("calls_context", "coroutine", "name", "request_task")

    #: One step of an async body, which goes on with the next one: so does the request for a cancellation.
    is_step = False
    #: That of calls_context, if it is in line with the caller's then.
    follows: int | None = None
    #: The end of an async body, which is not cut short by what came for a step.
    is_end = False

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        name: str,
        request_task: RequestTask | None,
        calls_context: CallsContext | None,
    ) -> None:
        self.coroutine = coroutine
        self.name = name
        self.request_task = request_task
        self.calls_context = calls_context

    def begin(self) -> None:
        """Called on the loop thread, before the coroutine is started."""

    def finish(self) -> None:
        """Called at most once, when the coroutine has ended, or can not be started any more."""

    def abandon(self, message: str) -> None:
        """Called in place of `finish`, on any thread, when nobody knows if the coroutine will ever end."""


def _without_generator_exit(exc: BaseException) -> Exception | None:
    """Return what an async generator's end failed with, out of the group in which a task group wraps GeneratorExit."""
    rest = exc.split(GeneratorExit)[1] if isinstance(exc, BaseExceptionGroup) else exc
    if rest is not None and not isinstance(rest, Exception):
        raise rest
    return rest


def name_of(found: Any) -> str:
    """What to call a coroutine, a generator or another object in logs."""
    return getattr(found, "__qualname__", None) or type(found).__qualname__


class Adapter(Protocol):
    """Makes loop calls of what comes to `loop.call_soon_threadsafe`, on the thread that calls it."""

    def recognizes(self, args: tuple[Any, ...]) -> bool: ...

    def adapt(self, coroutine: Coroutine[Any, Any, Any]) -> LoopCall: ...

    def lend(self, running: RunningLoop, executor: Any, function: Callable[[], Any]) -> asyncio.Future[Any] | None:
        """Have a waiting thread call a function, if that is what the executor is for."""


class RequestTask:
    """The one task in which the loop calls of a request run, one after another. Used on the loop thread alone."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.task: asyncio.Task[None] | None = None
        #: What the task runs.
        self.call: LoopCall | None = None
        #: Those of the nested calls.
        self.nested: set[asyncio.Task[None]] = set()
        self._next_call: asyncio.Future[None] | None = None
        #: The end of the body of which `call` is a step, and the context that it was handed over in.
        self._end: tuple[LoopCall, contextvars.Context] | None = None
        self._ending = False

    def take(self, call: LoopCall, running: RunningLoop) -> bool:
        """Run `call`. False: another one is running, which waits for this one; or the request is over."""
        if self._ending or call.calls_context is None:
            return False
        if self.call is not None:
            return call.is_end and self.call.is_step and self._cut_off(call)
        self.call = call
        if call.follows != call.calls_context.follows:
            call.calls_context.follow(contextvars.copy_context())
        if self.task is None or self.task.done():
            self.task = running.loop.create_task(
                self._serve(running), name="wsgi-loop request task", context=contextvars.Context()
            )
            # For when it is cancelled before its first step, when none of its own code runs.
            self.task.add_done_callback(lambda task: self._finish_task(task, running), context=contextvars.Context())
        elif self._next_call is not None and not self._next_call.done():
            self._next_call.set_result(None)
        return True

    def _cut_off(self, end: LoopCall) -> bool:
        """Cancel the step that is running. Its thread was interrupted, or the server has another one close the body."""
        assert self.task is not None
        logger.warning("%s: ended while its body %s made a chunk, which is cancelled.", self.owner, end.name)
        self._end = end, contextvars.copy_context()
        self.task.cancel()
        return True

    def running(self) -> dict[asyncio.Task[None], str]:
        """Return the tasks that run a loop call now, with what to call them in logs. May be called on any thread."""
        tasks = {task: task.get_name() for task in self.nested.copy()}
        # Each read once: the call may end meanwhile.
        task, call = self.task, self.call
        if task is not None and call is not None:
            tasks[task] = f"loop call {call.name}"
        return tasks

    def end(self) -> None:
        """Take no more calls, and let the task end with the one that it runs."""
        self._ending = True
        if self.call is None and self._next_call is not None and not self._next_call.done():
            self._next_call.set_result(None)

    async def _serve(self, running: RunningLoop) -> None:
        """Run one loop call after another.

        A cancellation that comes in between belongs to the next call, and is delivered to it as asyncio would: at
        its first suspension. What a call leaves behind of its own (a cancellation that it swallowed, or that came
        too late for it) ends with it. The steps of a body are one call in that: a step that is not suspended leaves
        it to the next one. The end of a body is told by the generator's end, and not by a cancellation as well.
        """
        task = asyncio.current_task()
        assert task is not None
        undelivered: asyncio.CancelledError | None = None
        # How many requests for cancellation the last step of a body has left.
        carried = 0
        while not self._ending or self.call is not None:
            if self.call is None:
                self._next_call = running.loop.create_future()
                try:
                    await self._next_call
                except asyncio.CancelledError as exc:
                    # With no request for it on the count it is the rest of one that a call has dealt with.
                    if task.cancelling():
                        undelivered = exc
                continue
            if not self.call.is_step and not self.call.is_end:
                for _ in range(carried):
                    task.uncancel()
            if undelivered is not None:
                if not self.call.is_end:
                    # Counted already when it came.
                    task.uncancel()
                    task.cancel(*undelivered.args)
                undelivered = None
            try:
                await self._run(self.call)
            finally:
                if self.call.is_step:
                    carried = task.cancelling()
                else:
                    carried = 0
                    while task.cancelling():
                        task.uncancel()
                # Last, and with nothing here that holds what the call held: its caller goes on at once.
                self._finish_call(running)

    def _finish_call(self, running: RunningLoop) -> None:
        call, self.call = self.call, None
        if self._end is not None:
            self.call, context = self._end
            self._end = None
            assert self.call.calls_context is not None
            self.call.calls_context.follow(context)
        if call is not None:
            running.finish(call)

    def _finish_task(self, task: asyncio.Task[None], running: RunningLoop) -> None:
        # These have been raised out of the loop as well, and asyncio would log that nobody has asked the task.
        exc = None if task.cancelled() else task.exception()
        if exc is not None and not isinstance(exc, KeyboardInterrupt | SystemExit):
            running.loop.call_exception_handler({"message": "A request task failed", "exception": exc, "task": task})
        self._finish_calls(running)

    def _finish_calls(self, running: RunningLoop) -> None:
        while self.call is not None:
            self._finish_call(running)

    async def _run(self, call: LoopCall) -> None:
        assert call.calls_context is not None
        try:
            await run_in_context(call.calls_context.context, call.coroutine)
        except Exception:
            logger.exception("%s: loop call %s could not be answered", self.owner, call.name)


class RunningLoop:
    """One event loop on one leased thread, from its first loop call until its end.

    factory: makes the loop. timeout: seconds that closing waits for cancelled tasks. owner: whom to name in logs.
    """

    def __init__(self, factory: LoopFactory, timeout: float, owner: str, adapter: Adapter) -> None:
        self.timeout = timeout
        self.owner = owner
        #: Done when the loop is closed and nothing of it runs any more.
        self.ended: Future[None] = Future()
        self.thread_id: int | None = None
        self._adapter = adapter
        self._threads = threads
        self._lock = threading.Lock()
        #: Held while it is logged that the loop is given up. Not the other one: a log handler may make a loop call.
        self._giving_up = threading.RLock()
        #: What was handed over and has not ended yet.
        self._calls: set[LoopCall] = set()
        #: Those of the requests that are on the loop now.
        self._request_tasks: set[RequestTask] = set()
        #: The tasks that end an async body, with the async generators that this has let go of.
        self._dropped: dict[asyncio.Task[Any] | None, list[Any]] = {}
        self._started = False
        self._accepting = True
        self._closing = False
        self._stopped = False
        self._given_up = False
        # In an empty context: a loop's own callbacks keep the context that they are made in.
        self.loop = contextvars.Context().run(factory)
        self._post: Callable[..., Any] = self.loop.call_soon_threadsafe
        self._run_in: Callable[..., Any] = self.loop.run_in_executor
        stand_ins: dict[str, Any] = {
            "call_soon_threadsafe": self._call_soon_threadsafe,
            "run_in_executor": self._run_in_executor,
        }
        self._sets_hooks = hasattr(self.loop, "_asyncgen_firstiter_hook")
        if self._sets_hooks:
            # asyncio's own loops set these whenever they begin to run. Others are told then: see `_begin`.
            found: Any = self.loop
            stand_ins["_asyncgen_firstiter_hook"] = partial(self._begin_generator, found._asyncgen_firstiter_hook)
            stand_ins["_asyncgen_finalizer_hook"] = partial(self._drop_generator, found._asyncgen_finalizer_hook)
        self.loop.__dict__.update(stand_ins)
        self._stand_ins = tuple(stand_ins)

    # --- on any thread -------------------------------------------------------------------------------------------

    def _call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        """Stands in for the loop's own method, to which asgiref hands a loop call, on the thread that makes it."""
        if self._adapter.recognizes(args):
            return self.submit(*args)
        return self._post(callback, *args, context=context)

    def _run_in_executor(self, executor: Any, function: Callable[..., Any], *args: Any) -> Any:
        """Stands in for the loop's own method, to which asgiref gives thread-sensitive calls."""
        lent = None if args else self._adapter.lend(self, executor, function)
        return self._run_in(executor, function, *args) if lent is None else lent

    def answer(self, function: Callable[..., object], *args: Any) -> None:
        """Have the loop call a function that sets the result of a future, on any thread."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self._post(function, *args, context=contextvars.Context())

    def submit(self, coroutine: Coroutine[Any, Any, Any], adapter: Adapter | None = None) -> None:
        """Make a loop call of a coroutine, and `hand_over` that. Raises NoLoop when the loop takes no more calls."""
        self.hand_over(lambda: (adapter or self._adapter).adapt(coroutine))

    def hand_over(self, make_call: Callable[[], LoopCall]) -> None:
        """Hand a loop call over, made only then; from here on it is certain to be answered.

        Raises NoLoop when the loop takes no more calls.
        """
        with self._lock:
            call = self._add(make_call)
            if self._started:
                self._post(self._accept, call)
            else:
                # Nobody is asleep in the loop yet who would have to be woken up, and with this waiting nobody will be.
                self.loop.call_soon(self._accept, call)
                self._start()

    def _add(self, make_call: Callable[[], LoopCall]) -> LoopCall:
        if not self._accepting:
            raise NoLoop(f"{self.owner}: its event loop takes no more calls")
        call = make_call()
        # Before the loop can see it, which may be done with it at once.
        self._calls.add(call)
        return call

    def has(self, call: LoopCall) -> bool:
        """Tell if a call was handed over and has not ended yet."""
        return call in self._calls

    def _start(self) -> None:
        try:
            self._threads.submit(self._run)
        except BaseException:
            self._accepting = False
            self._close_loop()
            raise
        self._started = True

    def close_soon(self) -> None:
        """Have the loop thread close the loop, and wait for nothing. Takes no lock: a finalizer may call it."""
        with contextlib.suppress(RuntimeError):  # it is closed already
            self._post(self._begin_shut_down)

    def _left_overs(self) -> set[asyncio.Task[Any]]:
        idle = {request_task.task for request_task in self._request_tasks.copy() if request_task.call is None}
        return asyncio.all_tasks(self.loop) - idle

    def give_up(self) -> None:
        """Take no more calls, and let those that run go. Logs what they are."""
        # Whoever else notices goes on only when it has been logged.
        with self._giving_up:
            with self._lock:
                if self._given_up or self.ended.done():
                    return
                self._given_up = True
                self._accepting = False
                calls = self._calls.copy()
                self._calls.clear()
            names = sorted(self._describe(task) for task in self._left_overs() if task.get_name() != _SHUT_DOWN)
            logger.error(
                "%s: gave up its event loop, because after %s s (SHUTDOWN_TIMEOUT) this was still running: %s. %sLet a "
                "cancelled task end, and keep blocking calls out of async code.",
                self.owner,
                self.timeout,
                ", ".join(names) or "an async generator, or a thread of the loop's default executor",
                self.consequence,
            )
        for call in calls:
            call.abandon(f"{self.owner}: its event loop was given up while loop call {call.name} was running")
        with contextlib.suppress(RuntimeError):  # it has just been closed after all
            self._post(self._stop)

    def _describe(self, task: asyncio.Task[Any]) -> str:
        for request_task in self._request_tasks.copy():
            if task is request_task.task:
                return request_task.running().get(task, "loop call")
        if task.get_name().startswith("loop call "):
            return task.get_name()
        coroutine = task.get_coro()
        where = getattr(coroutine, "__qualname__", None) or repr(coroutine)
        code = getattr(coroutine, "cr_code", None)
        line = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        return f"{task.get_name()} running {where}{line}"

    # --- on the loop thread --------------------------------------------------------------------------------------

    def _run(self) -> bool:
        self.thread_id = threading.get_ident()
        try:
            while not self._stopped:
                self._prepare()
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    # Raised by a task. asyncio has also stored it in the task, where whoever awaits the task gets it;
                    # the loop itself must go on, or its callers would wait for ever.
                    continue
        finally:
            self._end()
        return self._return_thread()

    def _return_thread(self) -> bool:
        return not self._given_up and self._threads.give_back()

    def _prepare(self) -> None:
        """Called when the loop is about to run, also after it was interrupted."""
        if not self._sets_hooks:
            self.loop.call_soon(self._begin, context=contextvars.Context())

    def _begin(self) -> None:
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(
            firstiter=partial(self._begin_generator, hooks.firstiter),
            finalizer=partial(self._drop_generator, hooks.finalizer),
        )

    def _begin_generator(self, of_loop: Callable[[Any], object] | None, generator: Any) -> None:
        """Called when an async generator takes its first step. of_loop: what the loop does then."""
        if of_loop is not None:
            of_loop(generator)

    def _drop_generator(self, of_loop: Callable[[Any], object] | None, generator: Any) -> None:
        """Called when an async generator is dropped before its end. of_loop: what the loop does then."""
        dropped = None
        if self._dropped and threading.get_ident() == self.thread_id:
            dropped = self._dropped.get(asyncio.current_task(self.loop))
        if dropped is not None:
            dropped.append(generator)
        elif of_loop is not None:
            of_loop(generator)

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

    def _accept(self, call: LoopCall) -> None:
        with self._lock:
            if call not in self._calls:
                return  # abandoned
            call.begin()
        request_task = call.request_task
        if request_task is not None and request_task.take(call, self):
            self._request_tasks.add(request_task)
            return
        task = self.loop.create_task(call.coroutine, name=f"loop call {call.name}")
        nested = set() if request_task is None else request_task.nested
        nested.add(task)

        def done(task: asyncio.Task[None]) -> None:
            nested.discard(task)
            self.finish(call)

        # Also when it is cancelled before its first step, when none of its own code runs.
        task.add_done_callback(done)

    def finish(self, call: LoopCall) -> None:
        """The call has ended: answer it, unless it was abandoned."""
        with self._lock:
            if call not in self._calls:
                return
            self._calls.remove(call)
        call.finish()

    def _begin_shut_down(self) -> None:
        if not self._closing:
            self._closing = True
            self.loop.create_task(self._shut_down(), name=_SHUT_DOWN, context=contextvars.Context())

    async def _shut_down(self) -> None:
        keepers = keepers_of(self.loop)
        try:
            await self._drain()
            deadline = self.loop.time() + self.timeout
            for request_task in self._request_tasks.copy():
                request_task.end()
            # What a task uses, and what keeps it open, goes after the task. A left-over task may make loop calls of its
            # own while it ends, so the door closes after that.
            await self._end_tasks(deadline)
            await keepers.leave(deadline)
            with self._lock:
                self._accepting = False
            await self._settle()
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

    def _need_thread(self) -> None:
        """Called when the end of the loop takes longer than was thought."""

    async def _drain(self) -> None:
        """Wait for what may take its time to end."""

    async def _release(self, deadline: float) -> None:
        """Give back what belongs to the loop, now that none of its tasks are left."""

    async def _settle(self) -> None:
        """Let everything that was handed over become a task, and take its first step: before that it can not answer."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _end_tasks(self, deadline: float) -> None:
        if self._given_up or not self._others():
            return
        self._need_thread()
        await self._settle()
        tasks = self._others()
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
            ", ".join(sorted(map(self._describe, tasks))),
            self.remedy,
        )

    #: What to do about left-over tasks.
    remedy = ""
    #: What it means that the loop is given up.
    consequence = "Its loop thread is not used again. "

    def _others(self) -> set[asyncio.Task[Any]]:
        tasks = self._left_overs() - {asyncio.current_task()}
        keepers = keepers_of(self.loop)
        return tasks if keepers.have_left else {task for task in tasks if not is_kept(task)}

    def _stop(self) -> None:
        self._stopped = True
        self.loop.stop()

    def _end(self) -> None:
        """Close the loop. A task that would not end is taken off it, so that it never meets a later request."""
        with self._lock:
            self._accepting = False
        for task in asyncio.all_tasks(self.loop):
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
        self._close_clean()

    def _close_clean(self) -> None:
        """Close the loop, on which nothing is left."""
        with self._lock:
            self._accepting = False
        self._request_tasks.clear()
        drop_keepers(self.loop)
        self._close_loop()
        self.ended.set_result(None)

    def _close_loop(self) -> None:
        self.loop.close()
        # A cycle otherwise: the loop would wait for the garbage collector. Not before it is closed: a call that comes
        # in between would be taken and never run.
        for name in self._stand_ins:
            self.loop.__dict__.pop(name, None)


class RequestLoop(RunningLoop):
    """The loop of one request: closed with it, and with whatever was left on it."""

    remedy = (
        "Await a task before the request ends, or start it with wsgi_loop.create_background_task() if it may outlive "
        "the request."
    )

    def __init__(self, factory: LoopFactory, timeout: float, owner: str, adapter: Adapter) -> None:
        self._given_back = False
        self._generators: weakref.WeakSet[Any] = weakref.WeakSet()
        super().__init__(factory, timeout, owner, adapter)

    def close(self, wait: Callable[[Future[None], float], bool]) -> None:
        """Close the loop. Returns at once if nothing is left on it, else waits for at most `timeout` seconds.

        wait: waits for the future, for so many seconds, and tells if it is done. What the loop's tasks need of this
        thread meanwhile is served there.
        """
        if not self._started:
            self._close_loop()
            return
        clean = self._is_clean()
        # UNKNOWN counts as used: the thread is then given back only when it is free.
        if clean and self._default_executor() is None:
            self._given_back = self._threads.give_back()
            self._post(self._end_clean, context=contextvars.Context())
            return
        self.close_soon()
        if not clean and not wait(self.ended, self.timeout):
            self.give_up()

    def _is_clean(self) -> bool:
        return not self._calls and not self._left_overs() and not self._open_generators()

    def _open_generators(self) -> bool:
        return bool(self._generators) and any(found.ag_frame is not None for found in self._generators.copy())

    def _default_executor(self) -> object:
        return getattr(self.loop, "_default_executor", UNKNOWN)

    def _end_clean(self, rounds: int = _ROUNDS) -> None:
        """Close the loop with no more ado, if it still is as clean as it was. Called on the loop thread."""
        for request_task in self._request_tasks:
            request_task.end()
        if rounds:
            # For what is about to end: that task, connections that were closed.
            self.loop.call_soon(self._end_clean, rounds - 1, context=contextvars.Context())
            return
        clean = not self._closing and self._is_clean() and self._default_executor() is None
        with self._lock:
            clean = clean and not self._calls
            if clean:
                self._accepting = False
        if clean:
            self._stop()
        else:
            self._begin_shut_down()

    def _return_thread(self) -> bool:
        return not self._given_up and (self._given_back or self._threads.give_back())

    def _begin_generator(self, of_loop: Callable[[Any], object] | None, generator: Any) -> None:
        self._generators.add(generator)
        super()._begin_generator(of_loop, generator)

    def _need_thread(self) -> None:
        if self._given_back:
            self._given_back = False
            self._threads.take_back()


class ProcessLoop(RunningLoop):
    """The loop of a whole process, on which many requests are at a time.

    lifespan: makes the async context manager that is open for as long as the loop takes calls. max_background_tasks:
    how many may be in flight. release: called when no task is left, and its future awaited; or when the loop is given
    up, and no more.
    """

    remedy = "They had SHUTDOWN_TIMEOUT seconds to end by themselves."

    def __init__(
        self,
        factory: LoopFactory,
        timeout: float,
        adapter: Adapter,
        lifespan: AsyncContextFactory | None,
        max_background_tasks: int,
        release: Callable[[], Future[Any] | None],
    ) -> None:
        #: Done when calls may come; fails with what the lifespan raised.
        self.ready: Future[None] = Future()
        self._lifespan = lifespan
        self._release_resources = release
        self._max_background_tasks = max_background_tasks
        #: What to call the background tasks in logs: by their futures, and by themselves.
        self._background: dict[Future[Any], str] = {}
        self._descriptions: dict[asyncio.Task[Any], str] = {}
        super().__init__(factory, timeout, "The process loop", adapter)

    # --- on any thread -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the loop's thread. Raises `NoThread` if it can not be started."""
        with self._lock:
            self._post(self._open_soon, context=contextvars.Context())
            self._start()

    def start_background_task(
        self,
        coroutine: Coroutine[Any, Any, Any],
        wrap: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]],
        name: str,
        description: str,
        context: contextvars.Context,
    ) -> Future[Any]:
        """Run `wrap(coroutine)` in a task, in `context`. Returns a future of what it returns.

        Raises RuntimeError when there are too many, or the loop takes no more.
        """
        future: Future[Any] = Future()

        def start() -> None:
            if future.cancelled():
                coroutine.close()
                self._settle_future(future, None)
                return
            task = self.loop.create_task(wrap(coroutine), name=name, context=context)
            self._descriptions[task] = description
            task.add_done_callback(lambda task: self._end_background_task(task, coroutine, future))
            # A future keeps its callbacks, and a task its context: whoever keeps the future is to keep no context.
            held = weakref.ref(task)
            future.add_done_callback(lambda future: self._cancel_soon(held()) if future.cancelled() else None)

        with self._lock:
            if not self._accepting:
                raise NoLoop(f"{self.owner} has ended, as this process is about to")
            if len(self._background) >= self._max_background_tasks:
                names = Counter(self._background.values()).most_common(3)
                raise RuntimeError(
                    f"{len(self._background)} background tasks are in flight in this process, as many as "
                    f"WSGI_LOOP['MAX_BACKGROUND_TASKS'] allows. Most: "
                    f"{', '.join(f'{number} x {name}' for name, number in names)}. Use a task queue, or raise it."
                )
            self._background[future] = description
            self._post(start, context=contextvars.Context())
        return future

    def _cancel_soon(self, task: asyncio.Task[Any] | None) -> None:
        if task is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._post(task.cancel, context=contextvars.Context())

    def give_up(self) -> None:
        super().give_up()
        for future in list(self._background):
            self._settle_future(future, CancelledError(f"{self.owner} was given up"))
        with contextlib.suppress(InvalidStateError):
            self.ready.set_exception(RuntimeError(f"{self.owner} was given up before it was ready"))
        self._release_resources()

    def _settle_future(self, future: Future[Any], exception: BaseException | None, result: Any = None) -> None:
        if self._background.pop(future, None) is None or not future.set_running_or_notify_cancel():
            return  # it was given up, or cancelled, of which concurrent.futures.wait() has been told just now
        if exception is None:
            future.set_result(result)
        else:
            future.set_exception(exception)

    def leave(self, request_task: RequestTask, wait: Callable[[Future[None], float], bool]) -> None:
        """End a request's task. Waits at most `timeout` seconds for a call in it, which nobody waits for any more."""
        if not request_task.running() or self._given_up:
            self.leave_soon(request_task)
            return
        ended: Future[None] = Future()
        try:
            self._post(self._end_request_task, request_task, ended, context=contextvars.Context())
        except RuntimeError:
            return  # the loop is closed
        if not wait(ended, self.timeout):
            logger.error(
                "%s: %s s (SHUTDOWN_TIMEOUT) after it was cancelled this was still running, and is given up: %s. "
                "Let a cancelled task end, and keep blocking calls out of async code.",
                request_task.owner,
                self.timeout,
                ", ".join(sorted(request_task.running().values())),
            )

    def leave_soon(self, request_task: RequestTask) -> None:
        """The same, and wait for nothing. Takes no lock: a finalizer may call it."""
        with contextlib.suppress(RuntimeError):  # it is closed already
            self._post(self._end_request_task, request_task, None, context=contextvars.Context())

    def shut_down(self) -> None:
        """Close the loop. Waits at most `timeout` seconds for what runs, and as long again for what it then cancels."""
        self.close_soon()
        try:
            self.ended.result(2 * self.timeout + 1)
        except TimeoutError:
            pass
        finally:
            # Also when a signal interrupts the waiting: what is lost then is named.
            self.give_up()

    # --- on the loop thread --------------------------------------------------------------------------------------

    def _open_soon(self) -> None:
        self.loop.create_task(self._open(), name="wsgi-loop start", context=contextvars.Context())

    async def _open(self) -> None:
        try:
            if self._lifespan is not None:
                await keepers_of(self.loop).get("LIFESPAN", self._lifespan)
        except BaseException as exc:
            logger.error("The process loop could not be started, because its LIFESPAN failed", exc_info=exc)
            with self._lock:
                self._accepting = False
            with contextlib.suppress(InvalidStateError):  # it was given up
                self.ready.set_exception(exc)
            self._begin_shut_down()
        else:
            with contextlib.suppress(InvalidStateError):
                self.ready.set_result(None)

    def _end_request_task(self, request_task: RequestTask, ended: Future[None] | None) -> None:
        """End it, and what it still runs. ended: for whoever waits for that."""
        cut_off = request_task.running()
        self._request_tasks.discard(request_task)
        request_task.end()
        if not cut_off:
            if ended is not None:
                ended.set_result(None)
            return
        names = ", ".join(sorted(cut_off.values()))
        logger.warning("%s: ended while %s still ran, which is cancelled.", request_task.owner, names)
        left = set(cut_off)

        def done(task: asyncio.Task[None]) -> None:
            left.discard(task)
            if not left and ended is not None:
                ended.set_result(None)

        for task in cut_off:
            task.add_done_callback(done)
            task.cancel()

    def _describe(self, task: asyncio.Task[Any]) -> str:
        return self._descriptions.get(task) or super()._describe(task)

    def _end_background_task(
        self, task: asyncio.Task[Any], coroutine: Coroutine[Any, Any, Any], future: Future[Any]
    ) -> None:
        description = self._descriptions.pop(task)
        # It was never started if the task was cancelled before its first step.
        coroutine.close()
        if task.cancelled():
            self._settle_future(future, CancelledError(f"The {description} was cancelled"))
            return
        exception = task.exception()
        if exception is not None:
            logger.error("The %s failed", description, exc_info=exception)
        self._settle_future(future, exception, None if exception else task.result())

    async def _drain(self) -> None:
        deadline = self.loop.time() + self.timeout
        while tasks := self._others():
            _, pending = await asyncio.wait(tasks, timeout=max(deadline - self.loop.time(), 0))
            if pending:
                return
            await self._settle()

    async def _release(self, deadline: float) -> None:
        released = self._release_resources()
        if released is not None:
            await asyncio.wait_for(asyncio.wrap_future(released), max(deadline - self.loop.time(), 0.001))
