"""Loop calls as asgiref makes them, and the steps and the end of an async body."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, NamedTuple

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import AsyncToSync, _restore_context

from ..calls import CallsContext, LoopCall, RequestTask, name_of

_NO_ANSWER = "This call or its event loop was ended before it had an answer"


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
            held = False, asyncio.CancelledError(_NO_ANSWER)
        if held[0]:
            super().set_result(held[1])
        else:
            super().set_exception(held[1])


class AsgirefCall(LoopCall):
    """A call of async_to_sync."""

    __slots__ = ("_answer", "_awaitable", "_begun", "is_step")

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        answer: Future[Any],
        awaitable: Any,
        request_task: RequestTask | None = None,
        calls_context: CallsContext | None = None,
    ) -> None:
        self.is_step = getattr(awaitable, "cr_code", None) is ADVANCE
        named = inspect.getcoroutinelocals(awaitable)["iterator"] if self.is_step else awaitable
        super().__init__(coroutine, name_of(named), request_task, calls_context)
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


async def _advance(iterator: AsyncIterator[Any], loop_of: Callable[[], asyncio.AbstractEventLoop | None]) -> Any:
    if asyncio.get_running_loop() is not loop_of():
        # asgiref's own one, where there is none of the request's any more: to go on would look like the body's end.
        raise RuntimeError(f"The event loop of the body {name_of(iterator)} has ended before it was read to its end")
    return await anext(iterator, END)


ADVANCE = _advance.__code__
#: What `advance` returns when there is nothing left.
END = object()
#: A step of a body by way of async_to_sync, where a `BodyStep` will not do.
advance = AsyncToSync(_advance)


class BodyCall(LoopCall):
    """What a request's loop does for an async body, while the request thread waits for it."""

    __slots__ = ("ended",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ended: Future[None] = Future()

    def finish(self) -> None:
        self.coroutine.close()
        self.ended.set_result(None)

    def abandon(self, message: str) -> None:
        if inspect.getcoroutinestate(self.coroutine) == inspect.CORO_CREATED:
            self.coroutine.close()
        self.ended.set_result(None)


class BodyEnd(BodyCall):
    """The last one, for which the request thread waits within a bound."""

    __slots__ = ()

    is_end = True


class LinedUp(NamedTuple):
    """How a step of a body left things: with the caller's context in line with that of the request's calls.

    follows: that of the latter. executor: for the thread-sensitive calls of the next step.
    """

    caller: contextvars.Context
    calls: contextvars.Context
    follows: int
    executor: CurrentThreadExecutor


class BodyStep(BodyCall):
    """A step of it, without what a call of async_to_sync makes anew for each."""

    __slots__ = ("_outcome", "context", "follows", "is_apart", "was_in_line")

    is_step = True

    def __init__(
        self,
        iterator: AsyncIterator[Any],
        request_task: RequestTask,
        calls_context: CallsContext,
        executor: CurrentThreadExecutor,
        follows: int | None,
    ) -> None:
        coroutine = self._advance(iterator, calls_context, executor, contextvars.copy_context())
        super().__init__(coroutine, name_of(iterator), request_task, calls_context)
        self.follows = follows
        self.was_in_line = False
        #: Whether it has a task of its own.
        self.is_apart = False
        self._outcome: tuple[Any, BaseException | None] | None = None
        #: The one that it ended in.
        self.context: contextvars.Context | None = None

    async def _advance(
        self,
        iterator: AsyncIterator[Any],
        calls_context: CallsContext,
        executor: CurrentThreadExecutor,
        caller: contextvars.Context,
    ) -> None:
        assert self.request_task is not None
        self.is_apart = asyncio.current_task() is not self.request_task.task
        self.was_in_line = not self.is_apart and self.follows == calls_context.follows
        if not self.was_in_line:
            _restore_context(caller)
            AsyncToSync.executors.current = executor
        try:
            self._outcome = await anext(iterator, END), None
        except GeneratorExit:
            raise
        except BaseException as exc:
            self._outcome = None, exc
        finally:
            self.follows = calls_context.follows
            self.context = contextvars.copy_context()

    def abandon(self, message: str) -> None:
        self._outcome = None, RuntimeError(message)
        super().abandon(message)

    def take_result(self) -> Any:
        (chunk, exc), self._outcome = self._outcome or (None, asyncio.CancelledError(_NO_ANSWER)), None
        if exc is None:
            return chunk
        try:
            raise exc
        finally:
            # Its traceback leads here.
            del exc


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
