"""What is used of asgiref beyond its documentation, and an error at import where that is not as it is known."""

from __future__ import annotations

import inspect
from functools import reduce
from importlib import import_module
from typing import Any, NoReturn

import asgiref

#: The versions that the tests are run with.
LOWEST, NEWEST = "3.12.1", "3.13.0"

#: By the dotted name of something in asgiref. For a function: its parameters, or the set of what its code has to name.
USED: dict[str, tuple[str, ...] | set[str]] = {
    "current_thread_executor.CurrentThreadExecutor.submit": {
        "_broken",
        "_old_executor",
        "_work_items",
        "_work_ready",
        "_work_thread",
    },
    "local._Storage.__init__": ("self", "thread_id", "data"),
    "sync.AsyncToSync.__call__": {
        "call_soon_threadsafe",
        "create_task",
        "current",
        "executors",
        "main_event_loop",
        "main_event_loop_pid",
        "main_wrap",
        "task_context",
        "threadlocal",
    },
    "sync.AsyncToSync.async_single_thread_context": (),
    "sync.AsyncToSync.executors._storage._data": (),
    "sync.AsyncToSync.loop_thread_executors": (),
    "sync.AsyncToSync.main_wrap": ("self", "call_result", "exc_info", "task_context", "context", "awaitable"),
    "sync.SyncToAsync.__call__": {
        "context_to_thread_executor",
        "current",
        "executors",
        "loop_thread_executors",
        "run_in_executor",
        "thread_sensitive_context",
    },
    "sync.SyncToAsync.context_to_thread_executor": (),
    "sync.SyncToAsync.deadlock_context": (),
    "sync.SyncToAsync.thread_handler": {"main_event_loop", "main_event_loop_pid", "task_context", "threadlocal"},
    "sync.SyncToAsync.thread_sensitive_context": (),
    "sync.SyncToAsync.threadlocal": (),
}


def check() -> None:
    """Raise ImportError if asgiref is not as it is known here."""
    for name, known in USED.items():
        module, *path = name.split(".")
        try:
            found: Any = reduce(getattr, path, import_module(f"asgiref.{module}"))
        except (AttributeError, ImportError):
            found = None
        if found is None:
            _refuse(f"it has no asgiref.{name}")
        code = getattr(inspect.unwrap(found) if known else None, "__code__", None)
        # A tool may have put a function of its own in the place of asgiref's.
        if code is None or code.co_filename != import_module(f"asgiref.{module}").__file__:
            continue
        if isinstance(known, tuple):
            parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if parameters != known:
                _refuse(f"asgiref.{name} takes {', '.join(parameters)}, and not {', '.join(known)}")
        elif missing := known - {*code.co_names, *code.co_consts, *code.co_varnames, *code.co_cellvars}:
            _refuse(f"asgiref.{name} does not use {', '.join(sorted(missing))}")


def _refuse(why: str) -> NoReturn:
    raise ImportError(
        f"wsgi-loop can't work with the asgiref {asgiref.__version__} that is installed: {why}. The last version that "
        f"wsgi-loop was tested with is {NEWEST}: pip install 'asgiref>={LOWEST},<={NEWEST}', or a later wsgi-loop."
    )
