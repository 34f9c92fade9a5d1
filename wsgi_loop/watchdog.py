"""Notices that the process loop stands still, and who blocks it. Knows asyncio and threads, and nothing of Django.

A thread of its own looks where the loop's thread is, a few times a second at most. When that is busy, it asks the loop
to come round. So no call and no request pays for it. When the loop has been idle for long, the thread sleeps until the
loop wakes up.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from .counters import counters
from .threads import frame_of

logger = logging.getLogger("wsgi_loop")

#: How often the loop has to be seen idle before the thread sleeps.
_IDLE = 4
#: By how many functions a place is told: a helper that blocks is named for each of its callers.
_DEPTH = 4
#: How many places are remembered, to name each of them once.
_MOST_PLACES = 1000


class Watchdog:
    """Logs what blocks a loop for `seconds` or more.

    post: hands a callback to the loop, and returns False if the loop is closed. thread_id: returns that of the loop's
    thread. describe: names the task that the loop is running now.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        seconds: float,
        post: Callable[[Callable[[], object]], bool],
        thread_id: Callable[[], int | None],
        describe: Callable[[], str],
    ) -> None:
        self._loop: Any = loop
        self._seconds = seconds
        self._post = post
        self._thread_id = thread_id
        self._describe = describe
        self._places: set[tuple[tuple[str, str], ...]] = set()
        self._is_over = False
        self._wake = threading.Event()

    def start(self) -> None:
        """Start the thread. Where none can be started, nothing is watched."""
        thread = threading.Thread(target=self._watch, name="wsgi-watchdog", daemon=True)
        with contextlib.suppress(RuntimeError):
            contextvars.Context().run(thread.start)

    def stop(self) -> None:
        self._is_over = True
        self._loop.__dict__.pop("_process_events", None)
        self._wake.set()

    def _pause(self, seconds: float | None) -> bool:
        """Wait, and return whether to go on."""
        self._wake.wait(seconds)
        self._wake.clear()
        return not self._is_over

    def _watch(self) -> None:
        idle = 0
        while self._pause(max(self._seconds / 2, 0.05)):
            frame = frame_of(self._thread_id())
            if frame is None:
                continue
            if not _is_waiting(frame):
                idle = 0
                del frame
                self._ask()
                continue
            del frame
            idle += 1
            if idle == _IDLE:
                self._post(self._arm)
            elif idle > _IDLE and "_process_events" in self._loop.__dict__:
                # It was idle also after it was armed: nothing that blocks it can come unnoticed.
                if not self._pause(None):
                    return
                idle = 0

    def _arm(self) -> None:
        """Have the loop call `_notice` when something happens. Not possible with others than asyncio's."""
        if isinstance(self._loop, asyncio.BaseEventLoop) and not self._is_over:
            self._loop.__dict__["_process_events"] = self._notice

    def _notice(self, events: Any) -> None:
        self._loop.__dict__.pop("_process_events", None)
        self._wake.set()
        self._loop._process_events(events)

    def _ask(self) -> None:
        """Ask the loop to come round, and log what keeps it from that."""
        asked = time.monotonic()
        came = threading.Event()
        if not self._post(came.set):
            return
        blocker = None
        if not came.wait(self._seconds):
            blocker = self._report()
            while not came.wait(1):
                if self._is_over:
                    return
        took = time.monotonic() - asked
        counters.longest_block = max(counters.longest_block, took)
        if blocker is not None:
            logger.warning("%s: has blocked the process loop for %.1f s", blocker, took)

    def _report(self) -> str | None:
        """Log what the loop's thread does now. None: the place was named before."""
        frame = frame_of(self._thread_id())
        if frame is None:
            return None
        place = _place_of(frame)
        if place in self._places or len(self._places) >= _MOST_PLACES:
            return None
        self._places.add(place)
        blocker = self._describe()
        logger.warning(
            "%s: blocks the process loop, and with it all async code of the process, for %s s (BLOCKED_AFTER) or more. "
            "It is here. Use asyncio.to_thread() or sync_to_async() for what blocks.\n%s",
            blocker,
            self._seconds,
            "".join(traceback.format_stack(frame)),
        )
        return blocker


def _is_waiting(frame: FrameType) -> bool:
    """Tell if the loop waits: in a selector, or, if the loop is not asyncio's, in C code that `RunningLoop` runs."""
    return frame.f_code.co_filename == selectors.__file__ or frame.f_globals.get("__name__") == f"{__package__}.loops"


def _place_of(frame: FrameType) -> tuple[tuple[str, str], ...]:
    """Return the innermost functions that are not Python's own."""
    place: list[tuple[str, str]] = []
    found: FrameType | None = frame
    while found is not None and len(place) < _DEPTH:
        module = found.f_globals.get("__name__") or ""
        if module.partition(".")[0] not in sys.stdlib_module_names:
            place.append((found.f_code.co_filename, found.f_code.co_qualname))
        found = found.f_back
    return tuple(place)
