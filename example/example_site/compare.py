"""Sends the request for a page again, through both handlers, and puts both journeys side by side.

The page's own request is not one of the two: it waits for them. Everything shown is counted from what the steps
have recorded.
"""

from __future__ import annotations

import contextvars
import io
import threading
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

from django.core.handlers.wsgi import WSGIHandler as DjangoHandler
from django.http import HttpRequest

import wsgi_loop

from .journey import Journey, Step, find

SENT_AGAIN = "example_site.sent_again"

ROW = 30
LANE = 16
RADIUS = 8
#: How often each handler is sent the request.
TURNS = 5

_warm: dict[tuple[type, str], Any] = {}


def is_sent_again(request: HttpRequest) -> bool:
    return SENT_AGAIN in request.META


def compare(request: HttpRequest) -> dict[str, Any]:
    """Send the request through each handler, and return the context of the comparison's template."""
    handlers = [warm_handler(handler, request) for handler in (DjangoHandler, wsgi_loop.WSGIHandler)]
    turns = [[send(handler, request) for handler in handlers] for _ in range(TURNS)]
    # Whatever else the machine does meanwhile is to make neither of them look slow.
    stock, ours = (sorted(journeys, key=took)[TURNS // 2] for journeys in zip(*turns, strict=True))
    sides = [make_side(stock, "Django's own handler"), make_side(ours, "wsgi-loop")]
    return {
        "sides": sides,
        "turns": TURNS,
        "table": list(zip_longest(*(side.rows for side in sides))),
        "radius": RADIUS,
    }


def took(journey: Journey) -> float:
    return journey.steps[-1].start


def send(handler: Any, request: HttpRequest) -> Journey:
    """Send the request through a handler, on a thread of its own that stands for a server's."""
    environ = {key: value for key, value in request.META.items() if isinstance(value, str) or key.startswith("wsgi.")}
    environ |= {"wsgi.input": io.BytesIO(), SENT_AGAIN: True}
    # A context of its own too, or async_to_sync would find this request's loop in it.
    thread = ServerThread(handler, environ)
    contextvars.Context().run(thread.start)
    thread.join()
    journey = find(thread.headers["Journey-Id"])
    assert journey is not None
    return journey


def warm_handler(handler: type, request: HttpRequest) -> Any:
    """Return a handler that has served this path before, as a server's has when it has run for a while."""
    key = handler, request.path
    if key not in _warm:
        made = handler()
        send(made, request)
        _warm[key] = made
    return _warm[key]


class ServerThread(threading.Thread):
    """Serves one request as a WSGI server does: call, iterate, close."""

    def __init__(self, application: Any, environ: dict[str, Any]) -> None:
        super().__init__(name="example-server", daemon=True)
        self.application = application
        self.environ = environ
        self.headers: dict[str, str] = {}

    def run(self) -> None:
        response = self.application(self.environ, self.start_response)
        try:
            for _ in response:
                pass
        finally:
            response.close()

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
        self.headers = dict(headers)


@dataclass
class Row:
    """A step as it is shown: its loop, thread and task numbered from 1 within the request."""

    step: Step
    loop: int
    thread: int
    task: int
    x: int
    y: int
    hue: int


@dataclass
class Side:
    """One request's half of the comparison."""

    journey: Journey
    title: str
    ours: bool
    rows: list[Row]

    @property
    def loops(self) -> int:
        return len({row.loop for row in self.rows})

    @property
    def threads(self) -> int:
        return len({row.thread for row in self.rows})

    @property
    def tasks(self) -> int:
        return len({row.task for row in self.rows})

    @property
    def width(self) -> int:
        return self.loops * LANE + RADIUS

    @property
    def height(self) -> int:
        return len(self.rows) * ROW

    @property
    def way(self) -> list[str]:
        """Curves from each step to the next, as SVG paths."""
        return [
            f"M{a.x} {a.y} C{a.x} {a.y + ROW * 0.6:g} {b.x} {b.y - ROW * 0.6:g} {b.x} {b.y}"
            for a, b in pairwise(self.rows)
        ]

    @property
    def lanes(self) -> list[tuple[int, int, int, int]]:
        """For each loop: x, its first and its last step's y, its hue."""
        lanes: dict[int, list[Row]] = {}
        for row in self.rows:
            lanes.setdefault(row.loop, []).append(row)
        return [(rows[0].x, rows[0].y, rows[-1].y, rows[0].hue) for rows in lanes.values()]


def make_side(journey: Journey, title: str) -> Side:
    loops: dict[int, int] = {}
    threads: dict[int, int] = {}
    tasks: dict[int, int] = {}
    rows = []
    for index, step in enumerate(journey.steps):
        loop = loops.setdefault(step.loop, len(loops) + 1)
        rows.append(
            Row(
                step,
                loop,
                threads.setdefault(step.thread, len(threads) + 1),
                tasks.setdefault(step.task, len(tasks) + 1),
                x=(loop - 1) * LANE + RADIUS + 4,
                y=index * ROW + ROW // 2,
                hue=(160 + (loop - 1) * 110) % 360,
            )
        )
    return Side(journey, title, issubclass(journey.handler, wsgi_loop.WSGIHandler), rows)
