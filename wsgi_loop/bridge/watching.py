"""Record loop calls: the only place that wraps asgiref, for as long as somebody watches."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import AsyncToSync

from .. import forks
from ..calls import name_of
from .executor import enclosing_executor
from .storage import LOOP, SCOPE, threadlocal


class WatchedCall:
    """A call of async_to_sync that was made while somebody watched.

    The numbers of its loop, thread and task, and of its request, are those of no other one in this process, ever. Those
    of the first three, `thread_name` and `served` are set when its coroutine takes its first step.
    """

    loop: int | None = None
    thread: int | None = None
    task: int | None = None
    thread_name = ""
    #: Whether the loop is one of ours.
    served = False
    end: float | None = None
    depth = 0
    path: str | None = None
    #: Held, so that `request`, its identity, is no other one's.
    environ: dict[str, Any] | None = None

    def __init__(self, target: Any, parent: WatchedCall | None, frame: FrameType | None) -> None:
        self.name = name_of(target)
        self.location, environ = _look_around(frame, target)
        if parent is not None:
            self.depth, self.path, self.environ = parent.depth + 1, parent.path, parent.environ
        if environ is not None:
            self.environ = environ
            self.path = environ.get("SCRIPT_NAME", "") + environ["PATH_INFO"]
            with contextlib.suppress(UnicodeError):  # Django has decoded it, once it has made its request
                self.path = self.path.encode("latin-1").decode()
        self.start = time.perf_counter()

    @property
    def request(self) -> int | None:
        return None if self.environ is None else id(self.environ)

    def arrive(self) -> None:
        """Called in the call's own task."""
        loop, thread = asyncio.get_running_loop(), threading.current_thread()
        with _watching:
            self.loop, self.thread, self.task = map(_number_of, (loop, thread, asyncio.current_task()))
        self.thread_name = thread.name
        self.served = "call_soon_threadsafe" in loop.__dict__

    def leave(self, _: object = None) -> None:
        self.end = time.perf_counter()


class _WatchedContext:
    """Stands in for the list through which main_wrap takes its caller's context, as its first act, and returns it."""

    def __init__(self, call: WatchedCall, context: Any) -> None:
        self._call = call
        self._context = context

    def __getitem__(self, index: int) -> Any:
        self._call.arrive()
        return self._context[index]

    def __setitem__(self, index: int, value: Any) -> None:
        if (executor := enclosing_executor()) is not None:
            with _watching:
                _by_executor[executor] = self._call
        self._context[index] = value


# Re-entrant, as a finalizer may make a loop call.
_watching = threading.RLock()
#: A list for calls, and the environ of the request whose calls it takes: of all if that is None.
watchers: tuple[tuple[list[WatchedCall], dict[str, Any] | None], ...] = ()
#: The code of the coroutine that takes a step of an async body by way of asgiref. Its argument is `iterator`.
STEP: CodeType | None = None
_unwrapped: list[tuple[str, Any, Any]] = []
_numbers = itertools.count(1)
_numbered: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_by_executor: weakref.WeakKeyDictionary[CurrentThreadExecutor, WatchedCall] = weakref.WeakKeyDictionary()
#: `calls`: those that the thread is in, None for one that has not been handed over yet.
_here = threading.local()
#: Whose code is nobody's, and where that of a request begins.
_FOREIGN = {"asgiref", "django", "wsgi_loop"} | sys.stdlib_module_names
_ENTRIES = {("wsgi_loop.scope", name) for name in ("start", "finish", "run")}


@forks.in_child
def _watch_after_fork() -> None:
    global _watching
    _watching = threading.RLock()


def _number_of(found: Any) -> int:
    number = _numbered.get(found)
    if number is None:
        number = _numbered[found] = next(_numbers)
    return number


@contextlib.contextmanager
def watch_calls(environ: dict[str, Any] | None = None) -> Iterator[list[WatchedCall]]:
    """Give a list to which the loop calls of the process are added as they start, until the end of the block.

    environ: that of the request whose calls are wanted, where not all are.
    """
    global watchers
    calls: list[WatchedCall] = []
    with _watching:
        watchers = (*watchers, (calls, environ))
        if not _unwrapped:
            _wrap()
    try:
        yield calls
    finally:
        with _watching:
            watchers = tuple(watcher for watcher in watchers if watcher[0] is not calls)
            if not watchers:
                _unwrap()


def _wrap() -> None:
    call: Any = AsyncToSync.__call__
    main_wrap: Any = AsyncToSync.main_wrap

    @functools.wraps(call)
    def watched_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        __traceback_hide__ = True
        calls = _here.__dict__.setdefault("calls", [])
        calls.append(None)
        try:
            return call(self, *args, **kwargs)
        finally:
            watched = calls.pop()
            if watched is not None:
                watched.leave()

    # Called by __call__ in the same thread. What it returns has to be what it was: see `adapters.Adapter.recognizes`.
    @functools.wraps(main_wrap)
    def watched_main_wrap(
        self: Any, call_result: Any, exc_info: Any, task_context: Any, context: Any, awaitable: Any
    ) -> Any:
        watched = _watch(self, awaitable, sys._getframe(1)) if watchers else None
        if watched is not None:
            # For a bound method that was taken before the recording, the only end that is seen.
            call_result.add_done_callback(watched.leave)
            context = _WatchedContext(watched, context)
        return main_wrap(self, call_result, exc_info, task_context, context, awaitable)

    for name, wrapped in (("__call__", watched_call), ("main_wrap", watched_main_wrap)):
        _unwrapped.append((name, wrapped, AsyncToSync.__dict__[name]))
        setattr(AsyncToSync, name, wrapped)


def _unwrap() -> None:
    while _unwrapped:
        name, wrapped, unwrapped = _unwrapped.pop()
        # Else somebody has wrapped it once more, and goes on calling ours, which does nothing any more.
        if AsyncToSync.__dict__[name] is wrapped:
            setattr(AsyncToSync, name, unwrapped)


def _watch(called: AsyncToSync[Any, Any], awaitable: Any, frame: FrameType | None) -> WatchedCall:
    target: Any = called.awaitable
    if getattr(awaitable, "cr_code", None) is STEP:
        target = inspect.getcoroutinelocals(awaitable)["iterator"]
    while isinstance(target, functools.partial) or hasattr(target, "__wrapped__"):
        target = target.func if isinstance(target, functools.partial) else target.__wrapped__
    calls = _here.__dict__.get("calls", [])
    parent = next((call for call in reversed(calls) if call is not None), None)
    current = executor = AsyncToSync.executors.current
    with _watching:
        while parent is None and (executor := executor._old_executor) is not None:
            found = _by_executor.get(executor)
            parent = found if found is not None and found.end is None else None
        watched = WatchedCall(target, parent, frame)
        _by_executor[current] = watched
        for watcher, environ in watchers:
            if environ is None or watched.environ is environ:
                watcher.append(watched)
    if calls and calls[-1] is None:
        calls[-1] = watched
    return watched


def _look_around(frame: FrameType | None, target: Any) -> tuple[str, dict[str, Any] | None]:
    """Return where in the user's code a call is made, and the environ of the request that it is part of.

    The innermost line of the request that is neither asgiref's, Django's, Python's nor ours. Where there is none, as
    when Django calls an async view: what is called, if that is the user's; else the innermost line but asgiref's.
    """
    scope = threadlocal.__dict__.get(SCOPE, threadlocal.__dict__.get(LOOP))
    environ: Any = getattr(scope, "subject", None)
    environ = environ if isinstance(environ, dict) and "PATH_INFO" in environ else None
    inside = True
    users = others = None
    while frame is not None and (inside or environ is None):
        module = frame.f_globals.get("__name__") or ""
        found = _environ_in(frame, module)
        environ = environ or found
        if inside:
            if users is None and module.partition(".")[0] not in _FOREIGN:
                users = _place(frame.f_code, frame.f_lineno)
            if others is None and not module.startswith(("asgiref.", f"{__package__}.")):
                others = _place(frame.f_code, frame.f_lineno)
            # Further out are the server, or the test.
            inside = users is None and found is None and (module, frame.f_code.co_name) not in _ENTRIES
        frame = frame.f_back
    return users or _definition(target) or others or "", environ


def _environ_in(frame: FrameType, module: str) -> dict[str, Any] | None:
    if "environ" in frame.f_code.co_varnames:
        environ = frame.f_locals.get("environ")
    elif module in ("wsgiref.handlers", "django.http.response"):
        # A server has it, and the test client leaves the request on the response, of which the rest knows nothing.
        holder = frame.f_locals.get("self")
        environ = getattr(holder, "environ", None) or getattr(getattr(holder, "wsgi_request", None), "META", None)
    else:
        return None
    return environ if isinstance(environ, dict) and "PATH_INFO" in environ else None


def _definition(target: Any) -> str | None:
    generator = getattr(target, "ag_frame", None)
    module = generator.f_globals.get("__name__") if generator is not None else getattr(target, "__module__", None)
    if (module or "").partition(".")[0] in _FOREIGN:
        return None
    for found in (target, getattr(target, "__func__", None), type(target).__dict__.get("__call__")):
        code = getattr(found, "__code__", None) or getattr(found, "ag_code", None)
        if isinstance(code, CodeType):
            return _place(code, code.co_firstlineno)
    return None


def _place(code: CodeType, line: int) -> str:
    path = code.co_filename.rpartition(f"site-packages{os.sep}")[2].removeprefix(os.getcwd() + os.sep)
    return f"{path}:{line} in {code.co_qualname}"
