"""What asgiref keeps on threads and in contexts, and where its calls find their loop."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterable
from typing import Any, Self

try:
    from asgiref.local import _Storage
except ImportError as exc:
    raise ImportError("wsgi-loop needs asgiref 3.12.1 or later: pip install 'asgiref>=3.12.1'") from exc
from asgiref.sync import AsyncToSync, SyncToAsync, _restore_context

from ..resources import kept

#: What asgiref keeps on a thread. Its `__dict__` is one and the same for as long as the thread lives.
threadlocal = SyncToAsync.threadlocal
#: There async_to_sync finds its loop, of which it calls `call_soon_threadsafe(loop.create_task, coroutine)`, ...
LOOP = "main_event_loop"
#: ... provided that this process has put it there, and not the one that it was forked from.
LOOP_PID = "main_event_loop_pid"
#: Where the scope that a thread is in stands on it once it has a loop; before that, it is the loop.
SCOPE = "wsgi_loop.scope"


def is_taken(exc: RuntimeError) -> bool:
    """Whether `Context.run` raised this, called where it is caught, because another thread is inside the context."""
    assert exc.__traceback__ is not None
    return exc.__traceback__.tb_next is None and str(exc).startswith("cannot enter context")


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


def move_here(context: contextvars.Context, per_thread: Iterable[Any]) -> contextvars.Context:
    """Make what the `Local`s hold in `context` visible on this thread, to which they hide it otherwise.

    per_thread: `Local`s that are kept per thread on purpose. What this thread has in them replaces what is there.
    Returns the context, or a copy of it when another thread is inside it.
    """
    own = [(var := local._storage._data, var.get(None)) for local in per_thread]
    moved = context.copy()

    def rehome() -> None:
        _restore_context(moved)
        for var, storage in own:
            var.set(storage or _Storage(threading.get_ident(), {}))

    try:
        context.run(rehome)
    except RuntimeError as exc:
        if not is_taken(exc):
            raise
        context = moved.copy()
        context.run(rehome)
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
