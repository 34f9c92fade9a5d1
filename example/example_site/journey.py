"""Records a request's way through async code: a step for each place, with the loop, thread and task that it ran on.

Knows asyncio and threads, and not which handler serves the request: a step writes down what it finds.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

#: Set by a receiver of request_started, in the request thread: so all of the request sees it, with any handler.
current: ContextVar[Journey] = ContextVar("example_site.journey")

KEPT = 500
_journeys: dict[str, Journey] = {}
_lock = threading.Lock()
_count = itertools.count(1)
_numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def number(thing: Any) -> int:
    """Return a number that nothing else in this process has had. An `id()`, or a thread's, is used again."""
    with _lock:
        if thing not in _numbers:
            _numbers[thing] = next(_count)
        return _numbers[thing]


@dataclass
class Step:
    """One piece of async code. place: where in the request. Times are in milliseconds from the request's start."""

    place: str
    what: str
    loop: int
    thread: int
    task: int
    start: float
    duration: float = 0.0


@dataclass
class Journey:
    """One request. handler: the class that serves it."""

    handler: type
    path: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: int = field(default_factory=os.getpid)
    request_thread: int = field(default_factory=lambda: number(threading.current_thread()))
    steps: list[Step] = field(default_factory=list)
    #: request_finished has been received.
    finished: bool = False
    _started: float = field(default_factory=time.perf_counter)

    def milliseconds(self) -> float:
        return (time.perf_counter() - self._started) * 1000

    @property
    def handler_path(self) -> str:
        return f"{self.handler.__module__}.{self.handler.__qualname__}"

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "handler": self.handler_path,
            "process": self.process,
            "request_thread": self.request_thread,
            "finished": self.finished,
            "steps": [vars(step) for step in self.steps],
        }


def begin(handler: type, path: str) -> Journey:
    """Start recording the current request."""
    journey = Journey(handler, path)
    current.set(journey)
    with _lock:
        _journeys[journey.id] = journey
        while len(_journeys) > KEPT:
            del _journeys[next(iter(_journeys))]
    return journey


def find(journey_id: str) -> Journey | None:
    """Return one of this process's latest journeys."""
    return _journeys.get(journey_id)


@asynccontextmanager
async def step(place: str, what: str) -> AsyncIterator[None]:
    """Record the block as a step of the current request."""
    journey = current.get()
    taken = Step(
        place,
        what,
        loop=number(asyncio.get_running_loop()),
        thread=number(threading.current_thread()),
        task=number(asyncio.current_task()),
        start=journey.milliseconds(),
    )
    journey.steps.append(taken)
    try:
        yield
    finally:
        taken.duration = journey.milliseconds() - taken.start
