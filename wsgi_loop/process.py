"""The process loop: started at its first use, and closed when the process ends.

A forked child has no process loop until it uses one, and never touches its parent's.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - what it does at the end of the process is to come after ours
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from django.db import close_old_connections, connections
from django.utils.autoreload import DJANGO_AUTORELOAD_ENV

from . import forks
from .bridge.executor import loop_executors
from .calls import NoLoop
from .conf import Options, get_options
from .loops import Door
from .process_loop import ProcessLoop
from .resources import kept
from .threads import SyncThread, SyncThreads

#: Seconds, where somebody sits and waits.
_MOMENT = 0.1

_lock = threading.RLock()
_loop: ProcessLoop | None = None
#: Those of the application that this process has made last.
application_options: Options | None = None
#: A forked child's parent's: kept, for to collect it would close what the parent uses.
_inherited: list[ProcessLoop] = []
_ended = False


@forks.in_child
def _after_fork() -> None:
    global _lock, _loop
    _lock = threading.RLock()
    if _loop is not None:
        _inherited.append(_loop)
        _loop = None


def start() -> None:
    """Start the process loop, and wait until `LIFESPAN` has been entered.

    For the hook that a server calls in each of its workers, before the worker takes requests. The options are those of
    the application that was made last in this process, or of the setting. In scope "request", and where the loop runs
    already, nothing is done.

    Raises what `LIFESPAN` raises; RuntimeError if that takes longer than `STARTUP_TIMEOUT` or a thread can't be
    started; and ImproperlyConfigured for a setting that is not accepted.
    """
    from .scope import door  # which is made of what stands here

    options = application_options or get_options()
    if options.scope == "process":
        get_process_loop(lambda: options, door)


def get_process_loop(options: Callable[[], Options], door: Door) -> ProcessLoop:
    """Return the loop of this process. The first use starts it with `options`, and waits for its lifespan.

    door: takes the loop calls that asgiref hands to the loop.

    Raises what the lifespan raises, and the next use starts another loop; `NoLoop` when the process is ending.
    """
    global _loop
    forks.check()
    running = _loop
    if running is not None and running.is_open:
        return running
    if running is None or running.has_failed:
        with _lock:
            if _ended:
                raise NoLoop("The process is about to end")
            if _loop is None or _loop.has_failed:
                _loop = _start(options(), door)
            running = _loop
    # What the lifespan itself starts can not wait for it, nor can what it runs on other threads.
    if threading.get_ident() != running.thread_id and kept.get() is not running.loop:
        running.wait_until_ready()
    return running


def _start(options: Options, door: Door) -> ProcessLoop:
    # For the thread-sensitive calls of what the loop's keepers hold.
    executor = SyncThread("wsgi-sync-resources")

    def release() -> Future[Any] | None:
        if loop_executors.pop(running.loop, None) is None:
            return None
        ended = executor.submit(connections.close_all) if executor.is_used else None
        executor.shutdown()
        return ended

    running = ProcessLoop(
        options.loop_factory,
        options.shutdown_timeout,
        door,
        options.lifespan,
        options.startup_timeout,
        options.max_background_tasks,
        options.blocked_after,
        SyncThreads("wsgi-sync", close_old_connections, connections.close_all),
        release,
    )
    loop_executors[running.loop] = executor
    try:
        running.start()
    except BaseException:
        # Interrupted, when the thread runs perhaps.
        running.close_soon()
        raise
    return running


def shut_down() -> None:
    """Close the process loop, as at the end of the process: the next use starts another one."""
    global _loop
    running = _loop
    if running is not None:
        # It stays the process loop meanwhile: a background task may start another one.
        running.shut_down()
        with _lock:
            if _loop is running:
                _loop = None


def _at_exit() -> None:
    global _ended
    with _lock:
        _ended = True
        if _loop is not None and os.environ.get(DJANGO_AUTORELOAD_ENV) == "true":
            # The reloader waits for this process, or, after Ctrl-C, kills it in a quarter of a second.
            _loop.timeout = min(_loop.timeout, _MOMENT)
    shut_down()


# atexit is too late: by then no thread takes on work any more, which ORM calls and the resolving of host names need.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
