"""asyncio's own event loops, made of the spare parts of closed ones.

Knows asyncio alone. Most of what a loop costs is what it asks of the kernel: a selector, and two sockets by which other
threads wake it up. Each loop here is a new one; only these three are used again, and only those of a loop that never
watched anything else: to a selector a descriptor may seem gone that the kernel still watches. What is read or set of
asyncio's was read in Python 3.11 to 3.13; with later ones loops are made from scratch.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import selectors
import socket
import sys
from collections import deque
from typing import Any

from . import forks

MAX_SPARES = 8
_USES_SPARES = sys.version_info < (3, 14) and sys.platform != "win32"

_spares: deque[tuple[selectors.BaseSelector, socket.socket, socket.socket]] = deque()


#: To tell which loops are older than a fork. A child that closes one of them takes its parent's apart.
_forks = 0


def close_spares() -> None:
    """Close what is kept."""
    while _spares:
        for part in _spares.pop():
            part.close()


def _count_fork() -> None:
    global _forks
    _forks += 1


@forks.in_child
def _after_fork() -> None:
    # To the kernel they are one and the same as the parent's.
    close_spares()
    _count_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_count_fork)


@atexit.register
def _keep_none() -> None:
    global MAX_SPARES
    MAX_SPARES = 0
    close_spares()


class EventLoop(asyncio.SelectorEventLoop):
    """One that gives its parts back when it is closed."""

    # asyncio's types do not have these.
    _selector: Any
    _ssock: Any
    _csock: Any
    _internal_fds: int
    _read_from_self: Any
    _signal_handlers: Any

    def __init__(self) -> None:
        self._forks = _forks
        self._keeps_parts = False
        try:
            self._parts: Any = _spares.pop()
        except IndexError:
            self._parts = (None,)
        super().__init__(self._parts[0])
        # From now on, until it is told to watch something.
        self._keeps_parts = True

    def __del__(self) -> None:
        # The parts of a loop that nobody has closed may be garbage as it is.
        self._keeps_parts = False
        super().__del__()

    def _add_reader(self, *args: Any) -> Any:
        self._keeps_parts = False
        return super()._add_reader(*args)  # type: ignore[misc]

    def _add_writer(self, *args: Any) -> Any:
        self._keeps_parts = False
        return super()._add_writer(*args)  # type: ignore[misc]

    def _make_self_pipe(self) -> None:
        parts, self._parts = self._parts, None
        if parts[0] is None:
            super()._make_self_pipe()  # type: ignore[misc]
            return
        _, self._ssock, self._csock = parts
        self._internal_fds += 1
        self._add_reader(self._ssock.fileno(), self._read_from_self)

    def _close_self_pipe(self) -> None:
        keeps = self._keeps_parts and self._forks == _forks and not self._signal_handlers
        if not keeps or len(_spares) >= MAX_SPARES:
            super()._close_self_pipe()  # type: ignore[misc]
            return
        # Still watched, but for nobody.
        self._selector.modify(self._ssock, selectors.EVENT_READ, (None, None))
        parts = self._selector, self._ssock, self._csock
        # asyncio's own close() then finds nothing to close.
        self._selector = self._ssock = self._csock = None
        self._internal_fds -= 1
        _spares.append(parts)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop, of the kind that `asyncio.new_event_loop()` makes."""
    if _USES_SPARES and type(asyncio.get_event_loop_policy()) is asyncio.DefaultEventLoopPolicy:
        return EventLoop()
    return asyncio.new_event_loop()
