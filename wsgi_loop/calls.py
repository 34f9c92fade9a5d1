"""Loop calls: what is run on an event loop, in which context and in which task.

Knows asyncio and contexts, and nothing of Django, nor of who runs the loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import types
from collections.abc import Callable, Coroutine, Generator
from operator import is_
from threading import get_ident
from typing import Any

from .bridge.executor import Executor
from .bridge.storage import is_same_value, move_here, rehomed

logger = logging.getLogger("wsgi_loop")

_UNSET: Any = object()
#: What a step of an async body gives when there is nothing left.
END = object()


class NoLoop(RuntimeError):
    """There is no loop, or the loop takes no more calls. asgiref then makes a loop of its own."""


def name_of(found: Any) -> str:
    """What to call a coroutine, a generator or another object in logs."""
    return getattr(found, "__qualname__", None) or type(found).__qualname__


def close_unbegun(awaitable: Any) -> None:
    """Close a coroutine that nobody will begin any more, so that it does not warn that it was never awaited.

    Another awaitable is left alone: its `close()` may be anything, such as that of a connection.
    """
    if inspect.iscoroutine(awaitable) and inspect.getcoroutinestate(awaitable) == inspect.CORO_CREATED:
        awaitable.close()


def are_same(a: contextvars.Context, b: contextvars.Context) -> bool:
    """Tell if two contexts hold the same objects. `==` would ask the objects, some of which are lazy."""
    return len(a) == len(b) and all(map(is_, a, b)) and all(map(is_, a.values(), b.values()))


@types.coroutine
def run_in_context(context: contextvars.Context, coroutine: Any) -> Generator[Any, Any, Any]:
    """Await `coroutine` in the current task, but in `context`."""
    step: Callable[[Any], Any] = coroutine.send
    value: Any = None
    while True:
        try:
            awaited = context.run(step, value)
        except StopIteration as stop:
            return stop.value
        try:
            value = yield awaited
            step = coroutine.send
        except GeneratorExit:
            # Also from the collector, which may have closed the coroutine first.
            context.run(coroutine.close)
            raise
        except BaseException as exc:  # a cancellation, above all: it belongs to the coroutine
            value = exc
            step = coroutine.throw
        del awaited


class LoopCall:
    """One coroutine for a loop, and what became of it.

    named: what it is called after in logs. executor: what its caller waits with. caller: the context of the latter.
    is_in_line: that context holds what it held when the request's last call had ended. task_context: where to tell of a
    task of the call's own.

    A step of an async body leaves a request for a cancellation to the next step. The end of a body is not cut short by
    one that came for a step.
    """

    # The context that it runs in, and a copy of that, taken before it was begun.
    context: contextvars.Context | None = None
    before: contextvars.Context | None = None
    result: Any = _UNSET
    exception: BaseException | None = None
    is_done = False
    #: The task that was begun by hand, in sync code below a step of which the call is made.
    below: Any = None

    def __init__(
        self,
        coroutine: Any,
        named: Any,
        executor: Executor,
        caller: contextvars.Context,
        is_in_line: bool = False,
        task_context: list[Any] | None = None,
        is_step: bool = False,
        is_end: bool = False,
    ) -> None:
        self.coroutine = coroutine
        self._named = named
        self.executor = executor
        self.caller = caller
        self.is_in_line = is_in_line
        self.task_context = task_context
        self.is_step = is_step
        self.is_end = is_end

    @property
    def name(self) -> str:
        return name_of(self._named)

    def done(self) -> bool:
        return self.is_done

    async def run(self) -> None:
        """Run it in a task of its own."""
        task = asyncio.current_task()
        if self.task_context is not None:
            self.task_context.append(task)
        try:
            self.result = await self.coroutine
        except GeneratorExit:
            raise
        except BaseException as exc:
            self.exception = exc
        finally:
            if self.task_context is not None:
                self.task_context.remove(task)

    def end(self, exception: BaseException | None = None) -> None:
        """Called once, when it has ended, or nobody knows if it ever will."""
        if exception is not None:
            self.exception = exception
        if self.result is _UNSET:
            # It may not have been begun: its task was cancelled before its first step, or there never was one.
            close_unbegun(self.coroutine)
            if self.exception is None:
                self.exception = asyncio.CancelledError("This call or its event loop was ended before it had an answer")
        self.coroutine = self._named = None
        self.is_done = True

    def take_result(self) -> Any:
        exc, self.exception = self.exception, None
        if exc is None:
            return self.result
        try:
            raise exc
        finally:
            # Its traceback leads here.
            del exc

    def bring_back(self) -> None:
        """Set in the current context what the call has set in its own."""
        before, after = self.before, self.context
        if before is None or after is None:
            return
        thread_id = get_ident()
        for var, value in after.items():
            if not is_same_value(before.get(var, _UNSET), value):
                var.set(rehomed(value, thread_id))


class RequestTask:
    """The one task in which the loop calls of a request run, one after another. Used by whoever runs the loop.

    They run in one context, so that a token made in one can be used in a later one. Before each call the context is
    brought in line with the caller's: what the caller has unset since then is unset there too.

    new_task: makes a task of a coroutine, a name and a context. finish: told of each call that has ended.
    """

    task: asyncio.Task[None] | None = None
    #: What the task runs.
    call: LoopCall | None = None
    _next_call: asyncio.Future[None] | None = None
    #: The end of the body of which `call` is a step.
    _end: LoopCall | None = None
    _ending = False
    _watched: asyncio.Task[None] | None = None

    def __init__(
        self,
        owner: str,
        new_task: Callable[[Coroutine[Any, Any, Any], str, contextvars.Context], asyncio.Task[Any]],
        finish: Callable[[LoopCall], object],
    ) -> None:
        self.owner = owner
        self._new_task = new_task
        self._finish = finish
        self.context = contextvars.Context()
        self._tokens: dict[contextvars.ContextVar[Any], contextvars.Token[Any]] = {}
        #: Calls that are nested, or of another thread, by their tasks.
        self.others: dict[asyncio.Task[Any], LoopCall] = {}

    def take(self, call: LoopCall) -> bool:
        """Run `call`. False: another call is running, which waits for this one; or the request is over."""
        if self._ending:
            return False
        if self.call is not None:
            return call.is_end and self.call.is_step and self._cut_off(call)
        self._begin(call)
        if self.task is None or self.task.done():
            self.task = self._new_task(self._serve(self.context), "wsgi-loop request task", self.context)
        elif self._next_call is not None and not self._next_call.done():
            self._next_call.set_result(None)
        return True

    def _begin(self, call: LoopCall, inside: contextvars.Context | None = None) -> None:
        """inside: the context that this is called in, if it is the task's."""
        self.call = call
        if not call.is_in_line:
            caller = call.caller
            if call.executor.thread_id != get_ident():
                caller = caller.copy()
                move_here(caller)
            is_inside = inside is self.context
            if not (self._align(caller) if is_inside else self.context.run(self._align, caller)):
                # Async code set a variable that its caller has dropped, and only its own token could unset it.
                self.context = caller.copy()
                self._tokens = {}
        call.context = self.context
        call.before = self.context.copy()

    def _align(self, caller: contextvars.Context) -> bool:
        """Make the current context hold what `caller` holds. False: that can not be done."""
        tokens = self._tokens
        if self.task is None and not tokens:
            # The context is empty: 10,000 instructions less than to compare.
            for var, value in caller.items():
                tokens[var] = var.set(value)
            return True
        for var in contextvars.copy_context():
            if var not in caller:
                token = tokens.pop(var, None)
                if token is None:
                    return False
                var.reset(token)
        for var, value in caller.items():
            held = var.get(_UNSET)
            if held is not value:
                token = var.set(value)
                if held is _UNSET:
                    tokens[var] = token
        return True

    def _cut_off(self, end: LoopCall) -> bool:
        """Cancel the step that is running. Its thread was interrupted, or the server has another one close the body."""
        assert self.task is not None
        logger.warning("%s: ended while its body %s made a chunk, which is cancelled.", self.owner, end.name)
        self._end = end
        self.task.cancel()
        return True

    def running(self) -> dict[asyncio.Task[Any], str]:
        """Return the tasks that run a loop call now, with what to call them in logs. May be called on any thread."""
        tasks = {task: f"loop call {call.name}" for task, call in self.others.copy().items()}
        # Each read once: the call may end meanwhile.
        task, call = self.task, self.call
        if task is not None and call is not None:
            tasks[task] = f"loop call {call.name}"
        return tasks

    def watch(self) -> None:
        """See to it that the call is answered when the task fails. (A step that is taken by hand is looked at.)"""
        if self.task is not None and self.task is not self._watched:
            self._watched = self.task
            self.task.add_done_callback(self._notice_end, context=contextvars.Context())

    def _notice_end(self, task: asyncio.Task[None]) -> None:
        exc = None if task.cancelled() else task.exception()
        # These have been raised out of the loop as well, and asyncio would log that nobody has asked the task.
        if exc is not None and not isinstance(exc, KeyboardInterrupt | SystemExit):
            task.get_loop().call_exception_handler({"message": "A request task failed", "exception": exc, "task": task})
        while self.call is not None:
            self.finish_call()

    def end(self) -> None:
        """Take no more calls, and let the task end with the one that it runs."""
        self._ending = True
        if self.call is None and self._next_call is not None and not self._next_call.done():
            self._next_call.set_result(None)

    async def _serve(self, context: contextvars.Context) -> None:
        """Run one loop call after another. context: that of the task, in which nearly all of the calls run.

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
            call = self.call
            if call is None:
                self._next_call = task.get_loop().create_future()
                try:
                    await self._next_call
                except asyncio.CancelledError as exc:
                    # With no request for it on the count it is the rest of one that a call has dealt with.
                    if task.cancelling():
                        undelivered = exc
                continue
            if carried and not call.is_step and not call.is_end:
                for _ in range(carried):
                    task.uncancel()
            if undelivered is not None:
                if not call.is_end:
                    # Counted already when it came.
                    task.uncancel()
                    task.cancel(*undelivered.args)
                undelivered = None
            try:
                if self.context is context:
                    call.result = await call.coroutine
                else:
                    call.result = await run_in_context(self.context, call.coroutine)
            except GeneratorExit as exc:
                if not self._ending and not call.is_done:
                    # Not that of a task which is closed.
                    call.exception = exc
                raise
            except BaseException as exc:
                call.exception = exc
            finally:
                carried = task.cancelling()
                if carried and not call.is_step:
                    for _ in range(carried):
                        task.uncancel()
                    carried = 0
                # Last, and with nothing here that holds what the call held: its caller goes on at once.
                del call
                self.finish_call(context)

    def finish_call(self, inside: contextvars.Context | None = None) -> None:
        """Answer the call that the task runs. The end of a body follows its last step. inside: as for `_begin`."""
        call, self.call = self.call, None
        if self._end is not None:
            end, self._end = self._end, None
            self._begin(end, inside)
        if call is not None:
            self._finish(call)
