"""Loop calls: what is run on an event loop, in which context and in which task.

Knows asyncio, and nothing of threads, Django or asgiref.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import types
from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .loops import RunningLoop

logger = logging.getLogger("wsgi_loop")

_UNSET: Any = object()


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
