"""Event loops, the threads that run them, and how a loop is closed well.

Knows asyncio and threads, and nothing of Django or asgiref: `bridge` turns what asgiref hands over into a `LoopCall`.

Who owns what: a `RequestLoop` belongs to the request that made it until `close()`. From then on, and only then, the
loop thread that runs it finishes it off, alone and within a bound, so a request thread that is interrupted while it
waits leaves nothing behind. A loop thread belongs to `LoopThreads`, and is lent to one `RequestLoop` at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

logger = logging.getLogger("wsgi_loop")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

MAX_IDLE_THREADS = 8
_UNSET: Any = object()
_SHUT_DOWN = "wsgi-loop shut-down"


class NoThread(Exception):
    """A loop thread can not be started.

    Not a RuntimeError: asgiref takes one for a closed loop, and goes on with a loop of its own.
    """


class UnsupportedThreads(NoThread):
    """Threads are greenlets here, so a loop in a "thread" would be seen as running by all of them."""


def check_threads() -> None:
    """Raise `UnsupportedThreads` where gevent or eventlet have patched `threading`."""
    gevent = sys.modules.get("gevent.monkey")
    eventlet = sys.modules.get("eventlet.patcher")
    for name, patched in (
        ("gevent", gevent is not None and gevent.is_module_patched("threading")),
        ("eventlet", eventlet is not None and eventlet.is_monkey_patched("thread")),
    ):
        if patched:
            raise UnsupportedThreads(
                f"wsgi-loop needs real threads, and {name} has replaced them in this process: an event loop in one "
                "greenlet would look like a running loop to all others. Use gunicorn's sync or gthread workers "
                f"(--worker-class gthread) in place of the {name} worker."
            )


class LoopThreads:
    """Lends threads to event loops, and keeps at most `MAX_IDLE_THREADS` that have nothing to do.

    A thread that is certain to be free in a moment may be given back early: what is submitted then waits for it in
    the queue, rather than starting one more.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every thread: a forked child has none of its parent's."""
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], bool]] = SimpleQueue()
        self._free = 0
        self.started = 0

    def submit(self, job: Callable[[], bool]) -> None:
        """Run `job` on a loop thread; the thread is used again if the job returns true."""
        with self._lock:
            if self._free:
                self._free -= 1
            else:
                self._start_thread()
            self._jobs.put(job)

    def give_back(self) -> bool:
        """Count the calling job's thread as free. False: there are enough, and the thread should end."""
        with self._lock:
            if self._free >= MAX_IDLE_THREADS:
                return False
            self._free += 1
            return True

    def take_back(self) -> None:
        """The thread was given back too early: something else has to run what may be waiting for it."""
        with self._lock:
            if self._free:
                self._free -= 1
            else:
                self._start_thread()

    def _start_thread(self) -> None:
        check_threads()
        self.started += 1
        thread = threading.Thread(target=self._work, args=(self._jobs,), name=f"wsgi-loop-{self.started}", daemon=True)
        # An empty context: from Python 3.14 on, a thread may inherit its starter's, here a request's.
        try:
            contextvars.Context().run(thread.start)
        except RuntimeError as exc:
            raise NoThread(f"A loop thread could not be started: {exc}") from exc

    @staticmethod
    def _work(jobs: SimpleQueue[Callable[[], bool]]) -> None:
        while jobs.get()():
            pass


threads = LoopThreads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=threads.reset)


class CallsContext:
    """The context in which a request's loop calls run, one after another.

    It stays the same one from call to call, so that a token made in one can be used in a later one. Before each call
    it is brought in line with the caller's: what the caller has unset since then is unset here too.
    """

    __slots__ = ("__weakref__", "_tokens", "context")

    def __init__(self) -> None:
        self.context = contextvars.Context()
        self._tokens: dict[contextvars.ContextVar[Any], contextvars.Token[Any]] = {}

    def follow(self, caller: contextvars.Context) -> None:
        """Make `context` the one to run a call in that `caller` makes."""
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

    calls_context: where the request task runs it; None: in a task of its own, in the context it was handed over in.
    """

    __slots__ = ("calls_context", "coroutine", "name")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], name: str, calls_context: CallsContext | None) -> None:
        self.coroutine = coroutine
        self.name = name
        self.calls_context = calls_context

    def begin(self) -> None:
        """Called on the loop thread, before the coroutine is started."""

    def finish(self) -> None:
        """Called once, when the coroutine has ended, or can not be started any more."""


class Adapter(Protocol):
    """Makes loop calls of what comes to `loop.call_soon_threadsafe`, on the thread that calls it."""

    def recognizes(self, args: tuple[Any, ...]) -> bool: ...

    def adapt(self, coroutine: Coroutine[Any, Any, Any]) -> LoopCall: ...


@dataclass(slots=True, eq=False)
class RequestLoop:
    """One event loop on one leased thread, from the first loop call of a request until its end.

    factory: makes the loop. timeout: seconds that closing waits for cancelled tasks. owner: whom to name in logs.
    """

    factory: LoopFactory
    timeout: float
    owner: str
    adapter: Adapter
    loop: asyncio.AbstractEventLoop = field(init=False)
    #: Done when the loop is closed and nothing of it runs any more.
    ended: Future[None] = field(init=False, default_factory=Future)
    _threads: LoopThreads = field(init=False, default_factory=lambda: threads)
    _post: Callable[..., Any] = field(init=False)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    #: What was handed over and has not ended yet.
    _calls: set[LoopCall] = field(init=False, default_factory=set)
    _started: bool = field(init=False, default=False)
    _accepting: bool = field(init=False, default=True)
    _closing: bool = field(init=False, default=False)
    _stopped: bool = field(init=False, default=False)
    _given_back: bool = field(init=False, default=False)
    _given_up: bool = field(init=False, default=False)
    _request_task: asyncio.Task[None] | None = field(init=False, default=None)
    #: What the request task runs.
    _call: LoopCall | None = field(init=False, default=None)
    _call_over: asyncio.Future[None] | None = field(init=False, default=None)
    _next_call: asyncio.Future[None] | None = field(init=False, default=None)
    _generators: weakref.WeakSet[Any] = field(init=False, default_factory=weakref.WeakSet)

    def __post_init__(self) -> None:
        # In an empty context: a loop's own callbacks keep the context that they are made in.
        self.loop = contextvars.Context().run(self.factory)
        self._post = self.loop.call_soon_threadsafe
        self.loop.call_soon_threadsafe = self._call_soon_threadsafe  # type: ignore[method-assign, assignment]

    # --- on any thread -------------------------------------------------------------------------------------------

    def _call_soon_threadsafe(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        """Stands in for the loop's own method, to which asgiref hands a loop call, on the thread that makes it."""
        if self.adapter.recognizes(args):
            return self.submit(*args)
        return self._post(callback, *args, context=context)

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Hand a loop call over; from here on its `finish` is certain to be called.

        Raises RuntimeError when the loop takes no more calls.
        """
        with self._lock:
            if not self._accepting:
                raise RuntimeError(f"{self.owner}: its event loop takes no more calls")
            call = self.adapter.adapt(coroutine)
            # Before the loop can see it, which may be done with it at once.
            self._calls.add(call)
            self._post(self._accept, call)
            if not self._started:
                # Only now, with its first call waiting, so that the thread does not go to sleep in between.
                try:
                    self._threads.submit(self._run)
                except BaseException:
                    self._accepting = False
                    self._close_loop()
                    raise
                self._started = True

    def close(self, wait: Callable[[Future[None], float], bool]) -> None:
        """Close the loop. Returns at once if nothing is left on it, else waits for at most `timeout` seconds.

        wait: waits for the future, for so many seconds, and tells if it is done. What the loop's tasks need of this
        thread meanwhile is served there.
        """
        if not self._started:
            self._close_loop()
            return
        clean = not self._calls and not self._left_overs() and not self._open_generators()
        # Unknown (a loop that hides it) counts as used: the thread is then given back only when it is free.
        if clean and getattr(self.loop, "_default_executor", self) is None:
            self._given_back = self._threads.give_back()
        self.close_soon()
        if not clean and not wait(self.ended, self.timeout):
            self._give_up()

    def close_soon(self) -> None:
        """Have the loop thread close the loop, and wait for nothing. Takes no lock: a finalizer may call it."""
        with contextlib.suppress(RuntimeError):  # it is closed already
            self._post(self._begin_shut_down)

    def _left_overs(self) -> set[asyncio.Task[Any]]:
        idle = {self._request_task} if self._call is None else set()
        return asyncio.all_tasks(self.loop) - idle

    def _open_generators(self) -> bool:
        return any(generator.ag_frame is not None for generator in self._generators.copy())

    def _give_up(self) -> None:
        # Also while it is logged: the other one that notices goes on only when it has been.
        with self._lock:
            if self._given_up or self.ended.done():
                return
            self._given_up = True
            names = sorted(self._describe(task) for task in self._left_overs() if task.get_name() != _SHUT_DOWN)
            logger.error(
                "%s: gave up its event loop, because after %s s (SHUTDOWN_TIMEOUT) this was still running: %s. Its "
                "loop thread is not used again. Let a cancelled task end, and keep blocking calls out of async code.",
                self.owner,
                self.timeout,
                ", ".join(names) or "an async generator, or a thread of the loop's default executor",
            )
        with contextlib.suppress(RuntimeError):  # it has just been closed after all
            self._post(self._stop)

    def _describe(self, task: asyncio.Task[Any]) -> str:
        if task is self._request_task:
            return f"loop call {self._call.name}" if self._call else "loop call"
        if task.get_name().startswith("loop call "):
            return task.get_name()
        coroutine = task.get_coro()
        where = getattr(coroutine, "__qualname__", None) or repr(coroutine)
        code = getattr(coroutine, "cr_code", None)
        line = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        return f"{task.get_name()} running {where}{line}"

    # --- on the loop thread --------------------------------------------------------------------------------------

    def _run(self) -> bool:
        try:
            while not self._stopped:
                self.loop.call_soon(self._begin, context=contextvars.Context())
                try:
                    self.loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    # Raised by a task. asyncio has also stored it in the task, where whoever awaits the task gets it;
                    # the loop itself must go on, or its callers would wait for ever.
                    continue
        finally:
            self._end()
        if self._given_up:
            return False
        return self._given_back or self._threads.give_back()

    def _begin(self) -> None:
        if self._request_task is None:
            self._request_task = self.loop.create_task(self._serve(), name="wsgi-loop request task")
        firstiter = sys.get_asyncgen_hooks().firstiter

        def watch(generator: Any) -> None:
            self._generators.add(generator)
            if firstiter is not None:
                firstiter(generator)

        sys.set_asyncgen_hooks(firstiter=watch)

    def _accept(self, call: LoopCall) -> None:
        call.begin()
        if call.calls_context is not None and self._call is None and not self._closing:
            self._call = call
            call.calls_context.follow(contextvars.copy_context())
            if self._next_call is not None and not self._next_call.done():
                self._next_call.set_result(None)
            return
        task = self.loop.create_task(call.coroutine, name=f"loop call {call.name}")
        # Also when it is cancelled before its first step, when none of its own code runs.
        task.add_done_callback(lambda _: self._finish(call))

    def _finish(self, call: LoopCall) -> None:
        self._calls.discard(call)
        call.finish()

    async def _serve(self) -> None:
        """The request task: one loop call after another, until the loop is closed.

        A cancellation that comes in between belongs to the next call, and is delivered to it as asyncio would: at
        its first suspension. What a call leaves behind of its own (a cancellation that it swallowed, or that came
        too late for it) ends with it.
        """
        task = asyncio.current_task()
        assert task is not None
        undelivered: asyncio.CancelledError | None = None
        while not self._closing or self._call is not None:
            if self._call is None:
                self._next_call = self.loop.create_future()
                try:
                    await self._next_call
                except asyncio.CancelledError as exc:
                    # With no request for it on the count it is the rest of one that a call has dealt with.
                    if task.cancelling():
                        undelivered = exc
                continue
            if undelivered is not None:
                # Counted already when it came.
                task.uncancel()
                task.cancel(*undelivered.args)
                undelivered = None
            try:
                await self._run_call(self._call)
            finally:
                while task.cancelling():
                    task.uncancel()
                if self._call_over is not None:
                    self._call_over.set_result(None)
                call, self._call = self._call, None
                # Last, and with nothing here that holds what the call held: its caller goes on at once.
                self._finish(call)
                del call

    async def _run_call(self, call: LoopCall) -> None:
        assert call.calls_context is not None
        try:
            await run_in_context(call.calls_context.context, call.coroutine)
        except Exception:
            logger.exception("%s: loop call %s could not be answered", self.owner, call.name)

    def _begin_shut_down(self) -> None:
        if not self._closing:
            self._closing = True
            self.loop.create_task(self._shut_down(), name=_SHUT_DOWN, context=contextvars.Context())

    async def _shut_down(self) -> None:
        deadline = self.loop.time() + self.timeout
        try:
            # A left-over task may make loop calls of its own while it ends, so the door closes after that.
            await self._end_tasks(deadline)
            with self._lock:
                self._accepting = False
            await self._settle()
            await self._end_tasks(deadline)
            if self._next_call is not None and not self._next_call.done():
                self._next_call.set_result(None)
                await self._settle()
            for shut_down in (self.loop.shutdown_asyncgens, self.loop.shutdown_default_executor):
                await asyncio.wait_for(shut_down(), max(deadline - self.loop.time(), 0.001))
        except TimeoutError:
            self._give_up()
        finally:
            self._stop()

    async def _settle(self) -> None:
        """Let everything that was handed over become a task, and take its first step: before that it can not answer."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _end_tasks(self, deadline: float) -> None:
        if self._given_up or not self._others():
            return
        if self._given_back:
            self._given_back = False
            self._threads.take_back()
        await self._settle()
        tasks = self._others()
        if not tasks:
            return
        logger.warning(
            "%s: ended while %d of its tasks still ran, which are cancelled: %s. Await a task before the request ends.",
            self.owner,
            len(tasks),
            ", ".join(sorted(map(self._describe, tasks))),
        )
        for task in tasks:
            task.cancel()
        waited_for: set[asyncio.Future[Any]] = set(tasks)
        if self._request_task in waited_for:
            self._call_over = self.loop.create_future()
            waited_for = (waited_for - {self._request_task}) | {self._call_over}
        _, pending = await asyncio.wait(waited_for, timeout=max(deadline - self.loop.time(), 0))
        if pending:
            self._give_up()
        for task in tasks:
            if task.done() and not task.cancelled() and (exc := task.exception()) is not None:
                self.loop.call_exception_handler(
                    {"message": "A task that its request left running failed", "exception": exc, "task": task}
                )

    def _others(self) -> set[asyncio.Task[Any]]:
        return self._left_overs() - {asyncio.current_task()}

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
                    coroutine.close()
            except BaseException:
                logger.debug("%s: %s ignored its end", self.owner, task.get_name(), exc_info=True)
            # It was named in an error already; asyncio would name it once more.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        for call in list(self._calls):
            self._finish(call)
        self._close_loop()
        self.ended.set_result(None)

    def _close_loop(self) -> None:
        self.loop.close()
        # A cycle otherwise: the loop would wait for the garbage collector. Not before it is closed: a call that comes
        # in between would be taken and never run.
        self.loop.__dict__.pop("call_soon_threadsafe", None)
