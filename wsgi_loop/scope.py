"""The life of one request: its context, its event loop if a loop call ever asks for one, and its end, exactly once.

Knows nothing of HTTP, and leaves the loop to `loops` and `process`, and what asgiref needs to `bridge`.

Who owns what: the request's handler and response own the scope, the scope owns the request context and the loop. Each
entry (`run`) takes the context and this thread's thread-locals for its own time only, so that a server may open and
close requests on its threads in any order.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, TypeVar

from . import forks
from .bridge.calls import END, advance, answer
from .bridge.requests import OwnLoop, RequestCalls, SharedLoop, ThreadlessCalls
from .bridge.storage import LOOP, LOOP_PID, SCOPE, is_taken, move_here, threadlocal
from .calls import NoLoop, name_of
from .conf import Options
from .process import get_process_loop
from .threads import NoThread

logger = logging.getLogger("wsgi_loop")

R = TypeVar("R")
T = TypeVar("T")
ThreadState = dict[str, Any]

# Re-entrant: the garbage collector may close a response while this thread is making a loop.
_making_loop = threading.RLock()


@forks.in_child
def _after_fork() -> None:
    global _making_loop
    _making_loop = threading.RLock()


class RequestScope:
    """What one request runs in, from before request_started until after request_finished.

    It also stands in for the request's loop until the first loop call.
    """

    #: asgiref passes it back to `call_soon_threadsafe`.
    create_task = None

    # Whoever makes a scope sets these three; `start` sets the rest. None has a default in the class: Python 3.11 takes
    # 1,000 instructions a request more to find, behind one, what an instance has.
    options: Options
    subject: Any
    calls: RequestCalls | None

    _context: contextvars.Context | None
    #: The thread on which what the context's `Local`s hold can be seen. Threads are told apart by what asgiref keeps on
    #: them, which costs less to get than an identifier.
    _home: ThreadState

    @property
    def owner(self) -> str:
        """Whom to name in logs."""
        return str(self.subject)

    @property
    def view(self) -> str:
        """What the request runs, by a name that other requests for the same share."""
        return self.owner

    def per_thread(self) -> Iterable[Any]:
        """The `Local`s whose content belongs to a thread, and not to a request."""
        return ()

    # `start` and `finish` are `run` for the first and the last entry. A request that makes no loop call pays for little
    # else, so they do themselves what `_enter` does, in the usual case, where they find nothing on the thread.

    def start(self, function: Callable[..., R], a: Any, b: Any, c: Any, /) -> R:
        """Begin the request, in a copy of the current context, and call `function` in it with three arguments."""
        self._context = context = contextvars.copy_context()
        self._home = thread = threadlocal.__dict__
        if thread:
            return self._enter(thread, context, function, (a, b, c))
        thread[LOOP] = self
        thread[LOOP_PID] = forks.pid
        try:
            return context.run(function, a, b, c)
        finally:
            thread.clear()

    def finish(self, function: Callable[[T], object], argument: T, /) -> None:
        """Call `function` inside the request, with one argument, and `close` it."""
        thread = threadlocal.__dict__
        context = self._context
        if thread or thread is not self._home or self.calls is not None or context is None:
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

    def run(self, function: Callable[..., R], /, *args: Any) -> R:
        """Call `function` inside the request, and return what it returns.

        On a thread that is inside already it is just called. While another thread is inside, it gets a copy of the
        request context. After `close` it gets a context of its own, and no loop.
        """
        thread = threadlocal.__dict__
        context = self._context
        if context is None:
            return contextvars.copy_context().run(function, *args)
        if thread.get(SCOPE, thread.get(LOOP)) is self:
            return function(*args)
        if thread is not self._home:
            moved = move_here(context, self.per_thread())
            if moved is context:
                self._home = thread
            context = moved
        return self._enter(thread, context, function, args)

    def _enter(
        self, thread: ThreadState, context: contextvars.Context, function: Callable[..., R], args: tuple[Any, ...]
    ) -> R:
        with self.standing_on(thread):
            if self.calls is not None:
                self.calls.serve()
            try:
                return context.run(function, *args)
            except RuntimeError as exc:
                if not is_taken(exc):
                    raise
            context = move_here(context, self.per_thread())
            return context.run(function, *args)

    @contextlib.contextmanager
    def standing_on(self, thread: ThreadState) -> Iterator[None]:
        """Make this what async_to_sync finds on the thread, which is left as it was found.

        Nothing of that shows in between: `task_context`, which asgiref never takes off a thread, would tie this
        request's loop calls to whatever `sync_to_async` call last ran here.
        """
        found = thread.copy()
        thread.clear()
        thread[LOOP] = thread[SCOPE] = self
        thread[LOOP_PID] = forks.pid
        try:
            yield
        finally:
            thread.clear()
            thread.update(found)

    def advance(self, iterator: AsyncIterator[Any]) -> Any:
        """Return the next item of an async iterator, or `END`: after `close`, always. Called inside `run`."""
        if self._context is None:
            return END
        try:
            calls = self.calls or self._make_calls()
        except NoLoop:
            return advance(iterator, self._loop)
        return calls.advance(iterator)

    def _loop(self) -> asyncio.AbstractEventLoop | None:
        calls = self.calls
        return None if calls is None else calls.loop

    def end_body(self, iterator: Any) -> None:
        """Await `iterator.aclose()`, within a bound. Called inside `run`."""
        try:
            (self.calls or self._make_calls()).end_body(iterator)
        except Exception:
            logger.exception("%s: its body %s could not be closed", self.owner, name_of(iterator))

    def close(self) -> None:
        """Close the request's loop, if it has one, and let go of its context. Further calls do nothing."""
        # What the request stored in the context may lead back to this scope: the request itself, the response.
        self._context = None
        if self.calls is not None:
            with _making_loop:
                calls, self.calls = self.calls, None
            if calls is not None:
                with self.standing_on(threadlocal.__dict__):
                    calls.close()

    def call_soon_threadsafe(self, callback: Any, coroutine: Any) -> None:
        """Hand asgiref's coroutine to the request's loop, and make the loop if this is the first one.

        Raises RuntimeError when there is no loop any more: asgiref then makes one of its own.
        """
        calls = self.calls
        if calls is None:
            try:
                calls = self._make_calls()
            except NoLoop:
                raise
            except BaseException as exc:
                # Not raised here: asgiref would take a RuntimeError for a closed loop.
                answer(coroutine, exc)
                return
        try:
            calls.submit(coroutine)
        except NoThread as exc:
            answer(coroutine, exc)

    def _make_calls(self) -> RequestCalls:
        if self._context is None:
            raise NoLoop("The request is over")
        options = self.options
        process_loop = get_process_loop(lambda: options) if options.scope == "process" else None
        with _making_loop:
            if self.calls is None:
                # asgiref puts the loop itself in this scope's place as soon as it runs sync code on the thread.
                threadlocal.__dict__[SCOPE] = self
                if process_loop is not None:
                    self.calls = SharedLoop(self.owner, options, process_loop)
                else:
                    calls_class = OwnLoop if options.thread == "own" else ThreadlessCalls
                    self.calls = calls_class(self.owner, options)
                if self._context is None:
                    # Closed by another thread, which looked for a loop before there was one.
                    calls, self.calls = self.calls, None
                    calls.close()
                    raise NoLoop("The request is over")
            return self.calls


def current_scope() -> RequestScope | None:
    """The scope that this thread is in, if it is of this process, and not of the one that it was forked from."""
    thread = threadlocal.__dict__
    scope = thread.get(SCOPE, thread.get(LOOP))
    return scope if isinstance(scope, RequestScope) and thread.get(LOOP_PID) == forks.pid else None
