"""asyncio's own event loop, which asks nothing of the kernel before there is something to wait for.

Knows asyncio alone. Most of what a loop costs is a selector, and two sockets by which other threads wake the loop up.
Most requests end before their loop needs either. What is overridden here was read in Python 3.11 to 3.15.
"""

from __future__ import annotations

import asyncio
import selectors
import sys
from collections import deque
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet, WeakValueDictionary

#: What asyncio's `__init__` gives to a loop: what all loops can have in common, and what each makes for itself. To copy
#: the former saves 27,000 instructions a loop.
_shared: dict[str, Any] = {}
_own: list[tuple[str, Callable[[], Any]]] = []


class _NoSelector(SimpleNamespace):
    """Stands in for the selector of `loop`, until there is something to wait for."""

    loop: EventLoop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is not None and timeout <= 0:
            return []
        selector = self.loop.make_selector()
        # Another thread may have posted a callback just before there was a socket to wake the loop up by.
        return selector.select(0 if self.loop._ready else timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop.make_selector(), name)


class EventLoop(asyncio.SelectorEventLoop):
    """A loop that makes its selector and its sockets when it first waits."""

    # asyncio's types do not have these.
    _selector: Any
    _ssock: Any = None
    _csock: Any = None
    _ready: Any
    _scheduled: Any
    _thread_id: int | None
    _default_executor: Any

    #: asyncio's `__init__` calls this, and `make_selector` does the work.
    _make_self_pipe: Any = staticmethod(int)

    def __init__(self) -> None:
        attributes = self.__dict__
        attributes.update(_shared)
        for name, make in _own:
            attributes[name] = make()
        self._selector = _NoSelector(loop=self)

    def make_selector(self) -> selectors.BaseSelector:
        self._selector = selectors.DefaultSelector()
        super()._make_self_pipe()  # type: ignore[misc]
        return self._selector  # type: ignore[no-any-return]

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:  # type: ignore[override]
        # By way of the sockets signals wake the loop up.
        if self._csock is None:
            self.make_selector()
        super().add_signal_handler(sig, callback, *args)

    def close(self) -> None:
        if self._csock is None and self._thread_id is None and self._default_executor is None:
            # Never used for more than to hold what is ready: 13,000 instructions less than to ask asyncio.
            self._closed = self._executor_shutdown_called = True
            self._selector = None
            self._ready.clear()
            self._scheduled.clear()
        else:
            super().close()

    def _close_self_pipe(self) -> None:
        if self._csock is not None:
            super()._close_self_pipe()  # type: ignore[misc]
        else:
            # So that asyncio closes none.
            self._selector = None


def _made_late(make: Callable[[], Any]) -> cached_property[Any]:
    return cached_property(lambda _: make())


def _learn() -> None:
    """Find out what a loop consists of. `_asyncgens` and `_transports` are made when a loop first uses them."""
    loop = EventLoop.__new__(EventLoop)
    asyncio.SelectorEventLoop.__init__(loop, _NoSelector(loop=loop))  # type: ignore[arg-type]
    for name, value in vars(loop).items():
        if isinstance(value, WeakSet | WeakValueDictionary):
            late = _made_late(type(value))
            late.__set_name__(EventLoop, name)
            setattr(EventLoop, name, late)
        elif isinstance(value, list | dict | set | deque):
            _own.append((name, type(value)))
        else:
            _shared[name] = value
    del _shared["_selector"]
    loop.close()


_learn()


def default_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes loops of the kind that `asyncio.new_event_loop()` makes now."""
    # From Python 3.14 on policies are deprecated, and from 3.16 on there are none.
    get_policy = getattr(asyncio.events, "_get_event_loop_policy", None)
    get_policy = get_policy or getattr(asyncio, "get_event_loop_policy", None)
    if get_policy is None:
        return EventLoop if sys.platform != "win32" else asyncio.new_event_loop
    return EventLoop if type(get_policy()).__module__ == "asyncio.unix_events" else asyncio.new_event_loop
