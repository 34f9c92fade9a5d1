"""Event loops: how loop calls run on them and how they are closed well; the one of a request.

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
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any

from .calls import Adapter, LoopCall, NoLoop, RequestTask, name_of
from .resources import drop_keepers, is_kept, keepers_of
from .threads import threads

logger = logging.getLogger("wsgi_loop")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

#: Of a clean loop, before it is closed.
_ROUNDS = 4
#: In place of a loop's executor: uvloop's loops do not show if they have one.
UNKNOWN = object()
_SHUT_DOWN = "wsgi-loop shut-down"


def _without_generator_exit(exc: BaseException) -> Exception | None:
    """Return what an async generator's end failed with, out of the group in which a task group wraps GeneratorExit."""
    rest = exc.split(GeneratorExit)[1] if isinstance(exc, BaseExceptionGroup) else exc
    if rest is not None and not isinstance(rest, Exception):
        raise rest
    return rest


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
