"""The loop, thread and task of a request where there is no request: commands, task workers, scripts."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Never, TypeVar, Unpack

from . import forks
from .bridge.storage import LOOP, LOOP_PID, SCOPE, threadlocal
from .conf import GivenOptions, Options, get_options
from .scope import RequestScope
from .threads import check_threads

F = TypeVar("F", bound=Callable[..., Any])


class EventLoopContext(contextlib.ContextDecorator):
    """Run every `async_to_sync` call of a `with` block, or of a sync function, on one event loop and in one task.

    For management commands, Celery tasks, workers of `django.tasks` and scripts. Takes the options of
    `get_wsgi_application`: in scope "request" the loop is closed at the end of the block, in scope "process" it is the
    process loop, and stays. Where a loop is there already, in a request or inside another block, that one is joined. A
    block does not have a context of its own: what is set in it in a contextvar stays set.

    Raises ImproperlyConfigured, when it is made, for an option that is not accepted.
    """

    # What is accepted by position is only there to be refused.
    __signature__ = inspect.Signature([inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD)])

    def __init__(self, *args: Never, **options: Unpack[GivenOptions]) -> None:
        if args:
            raise TypeError(
                f"EventLoopContext() takes its options by name, not {args[0]!r}. As a decorator it is written with "
                "parentheses: @EventLoopContext()."
            )
        check_threads()
        self._options = get_options("EventLoopContext()", **options)
        #: On each thread, what has been entered and not been left.
        self._entered = threading.local()

    def __call__(self, function: F) -> F:
        """Decorate a sync function. Raises TypeError for an async one, which runs on the loop that awaits it."""
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"EventLoopContext() decorates sync functions, and {function.__qualname__} is async: decorate what "
                "calls it with async_to_sync()."
            )
        return super().__call__(function)

    def __enter__(self) -> None:
        stack: list[contextlib.ExitStack] = self._entered.__dict__.setdefault("stack", [])
        exits = contextlib.ExitStack()
        if not _has_loop():
            scope = _BlockScope(self._options)
            exits.enter_context(_standing_on_thread(scope))
            exits.callback(scope.close)
        stack.append(exits)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stack: list[contextlib.ExitStack] = self._entered.__dict__.get("stack", [])
        if not stack:
            raise RuntimeError("EventLoopContext() was left on another thread than the one that it was entered on")
        stack.pop().close()


class _BlockScope(RequestScope):
    """No code runs in its context, which a `with` block can not enter."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.subject = f"EventLoopContext on thread {threading.current_thread().name!r}"
        self.calls = None
        self.home = threadlocal.__dict__
        self._context = contextvars.Context()


@contextlib.contextmanager
def _standing_on_thread(scope: RequestScope) -> Iterator[None]:
    """Make the scope what async_to_sync finds on this thread, which is left as it was found."""
    thread = threadlocal.__dict__
    found = thread.copy()
    thread.clear()
    thread[LOOP] = thread[SCOPE] = scope
    thread[LOOP_PID] = forks.pid
    try:
        yield
    finally:
        thread.clear()
        thread.update(found)


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        thread = threadlocal.__dict__
        loop = thread.get(LOOP)
        # A forked child does not have its parent's. asgiref leaves a closed loop on a thread that has run sync code.
        return thread.get(LOOP_PID) == os.getpid() and (
            # A loop that runs on this very thread stands still while sync code runs.
            isinstance(thread.get(SCOPE, loop), RequestScope) or (loop is not None and loop.is_running())
        )
    return True
