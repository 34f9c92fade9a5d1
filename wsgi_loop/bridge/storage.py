"""What asgiref keeps on threads and in contexts, and what it hands over to a loop."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple, Self

from asgiref.local import _Storage
from asgiref.sync import AsyncToSync, SyncToAsync

from .. import forks
from ..resources import kept

#: What asgiref keeps on a thread. Its `__dict__` is one and the same for as long as the thread lives.
threadlocal = SyncToAsync.threadlocal
#: There async_to_sync finds its loop, of which it calls `call_soon_threadsafe(loop.create_task, coroutine)`, ...
LOOP = "main_event_loop"
#: ... provided that this process has put it there, and not the one that it was forked from.
LOOP_PID = "main_event_loop_pid"
#: Where the scope that a thread is in stands on the thread, once the scope has a loop. Before that it is the loop.
SCOPE = "wsgi_loop.scope"

#: How the message of `Context.run` begins.
_TAKEN = "cannot enter context"
_MAIN_WRAP = AsyncToSync.main_wrap.__code__


class HandedOver(NamedTuple):
    """What asgiref's coroutine for a call of async_to_sync was made with.

    call_result: the future that the caller looks at. task_context: where the caller looks for the call's task. context:
    a list, through which the caller gives its context, and finds the one to take over.
    """

    call_result: Any
    exc_info: Any
    task_context: list[Any] | None
    context: list[contextvars.Context]
    awaitable: Any


def is_loop_call(args: tuple[Any, ...]) -> bool:
    """Tell if this is what asgiref gives to a loop's `call_soon_threadsafe`, beside `create_task`."""
    return len(args) == 1 and getattr(args[0], "cr_code", None) is _MAIN_WRAP


def take_apart(coroutine: Coroutine[Any, Any, Any]) -> HandedOver:
    """Look into asgiref's coroutine, which has not been started."""
    arguments: Any = coroutine.cr_frame.f_locals  # type: ignore[attr-defined]
    return HandedOver(*map(arguments.__getitem__, HandedOver._fields))


def scope_here() -> Any:
    """Return the scope of the request that this thread is in, or None."""
    thread = threadlocal.__dict__
    found = thread.get(SCOPE) or thread.get(LOOP)
    # A forked child is not in its parent's requests. A loop stands there where asgiref has put it.
    return found if thread.get(LOOP_PID) == forks.pid and getattr(type(found), "is_scope", False) else None


def is_taken(exc: RuntimeError) -> bool:
    """Whether `Context.run` raised this, called where it is caught, because another thread is inside the context."""
    assert exc.__traceback__ is not None
    return exc.__traceback__.tb_next is None and str(exc).startswith(_TAKEN)


class _KeptOnThread(dict[str, Any]):
    """What a thread keeps in a `Local`, however many contexts look at it.

    A `Local` that is not thread-critical replaces its data by a changed copy, in the current context. With this for
    data, what one request adds is there for the next one on the thread.
    """

    def copy(self) -> Self:
        return self


def keep_on_thread(locals_: Iterable[Any]) -> None:
    """Let what is put in these `Local`s stay on this thread, in the current context and all that are copied from it."""
    for local in locals_:
        var = local._storage._data
        found = var.get(None)
        ident = threading.get_ident()
        data = found.data if found is not None and found.thread_id == ident else {}
        var.set(_Storage(ident, _KeptOnThread(data)))


def rehomed(value: Any, thread_id: int) -> Any:
    """Return what a `Local` holds so that a thread can see it. Anything else is returned as it is."""
    if type(value) is _Storage and value.thread_id != thread_id:
        return _Storage(thread_id, value.data)
    return value


def is_same_value(a: Any, b: Any) -> bool:
    """Tell if two values of a contextvar are the same. What a `Local` holds may be made visible on another thread."""
    return a is b or (type(a) is type(b) is _Storage and a.data is b.data)


def move_here(context: contextvars.Context) -> None:
    """Make what the `Local`s hold in `context` visible on this thread, to which they hide it otherwise.

    Raises RuntimeError while a thread is inside the context.
    """
    thread_id = threading.get_ident()

    def move() -> None:
        for var, value in contextvars.copy_context().items():
            if (moved := rehomed(value, thread_id)) is not value:
                var.set(moved)

    context.run(move)


def enter_here(context: contextvars.Context, per_thread: Iterable[Any]) -> contextvars.Context:
    """Move the context of a request to this thread, where it is about to go on.

    per_thread: `Local`s that are kept per thread on purpose. What this thread has in them replaces what is there.
    Returns the context, or a copy of it when another thread is inside it.
    """
    own = [(var := local._storage._data, var.get(None)) for local in per_thread]

    def move() -> None:
        for var, storage in own:
            var.set(storage or _Storage(threading.get_ident(), {}))

    try:
        move_here(context)
    except RuntimeError as exc:
        if not str(exc).startswith(_TAKEN):
            raise
        context = context.copy()
        move_here(context)
    context.run(move)
    return context


def detached_context(thread_id: int, is_connection: Callable[[object], bool]) -> contextvars.Context:
    """Return a copy of the current context in which nothing of asgiref ties what runs in it to a request.

    thread_id: the thread on which what `Local`s hold is to be visible. is_connection: tells what is not to be shared;
    a `Local` that holds such a thing is left out.
    """
    left_out = {
        AsyncToSync.executors._storage._data,
        SyncToAsync.thread_sensitive_context,
        SyncToAsync.deadlock_context,
        AsyncToSync.async_single_thread_context,
        kept,
    }
    detached = contextvars.Context()
    for var, value in contextvars.copy_context().items():
        if var in left_out:
            continue
        if isinstance(value, _Storage):
            if isinstance(value.data, _KeptOnThread) or any(map(is_connection, value.data.values())):
                continue
            value = _Storage(thread_id, value.data)
        detached.run(var.set, value)
    return detached
