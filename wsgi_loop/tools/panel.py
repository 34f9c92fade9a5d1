"""A panel for django-debug-toolbar: the loop calls of a request, and the event loops that they ran on.

Only `DEBUG_TOOLBAR_PANELS = [..., "wsgi_loop.panel.LoopPanel"]` imports this, and so the toolbar.

What is made before the toolbar's middleware is reached is not seen. What is made after it (the streamed body, signal
receivers) is, until the response is closed: a panel is shown from the toolbar's store, which has it by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from debug_toolbar.panels import Panel
from django.apps import apps
from django.core.checks import CheckMessage, Error
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from ..bridge.storage import scope_here
from ..bridge.watching import WatchedCall, watch_calls
from ..responses import call_after_close
from .recording import Numbers
from .report import own_left_over_tasks

ROW = 30
LANE = 16
RADIUS = 8
#: Lanes are told apart by so many colours, in turns.
COLOURS = 6
#: More lanes than these would push the text away. The last one stands for all others.
MOST_LANES = 12


class LoopPanel(Panel):
    """Draws each loop call of the request as a dot in its event loop's lane."""

    template = "wsgi_loop/panel.html"
    title = "Event loops"
    nav_icon: Any = "wsgi_loop/panel.svg"

    _watched: list[WatchedCall] | None = None
    _around: WatchedCall | None = None

    @property
    def nav_subtitle(self) -> str:
        stats: dict[str, Any] = self.get_stats()  # type: ignore[no-untyped-call]
        if not stats.get("rows"):
            return "no loop call"
        # The page that shows it is made before the request is over.
        when = "" if stats["closed"] else " so far"
        return f"{_several(len(stats['rows']), 'call')} on {_several(stats['loops'], 'loop')}{when}"

    @classmethod
    def run_checks(cls) -> list[CheckMessage]:
        if apps.is_installed("wsgi_loop"):
            return []
        return [
            Error(
                "The panel wsgi_loop.panel.LoopPanel has its template and its styles in the app wsgi_loop, which is "
                "not installed.",
                hint="Add 'wsgi_loop' to INSTALLED_APPS.",
                id="wsgi_loop.E004",
            )
        ]

    def enable_instrumentation(self) -> None:
        if self._watched is not None:
            return
        # To be collected ends it too, for a response that nobody closes.
        self._recording = contextlib.ExitStack()
        self._watched = self._recording.enter_context(watch_calls(self.toolbar.request.META))
        self._start = time.perf_counter()
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            self._around = WatchedCall(_middleware_and_view, None, None)
            self._around.location = ""
            self._around.arrive()

    def disable_instrumentation(self) -> None:
        if sys.exc_info()[0] is not None:
            # There will be no response to wait for.
            self._end()

    def generate_stats(self, request: HttpRequest, response: HttpResponseBase) -> None:
        if self._watched is None:
            return
        if self._around is not None:
            self._around.leave()
        self._record(None)
        call_after_close(response, self._finish)

    def _finish(self) -> None:
        if self._watched is None:
            return
        left_over = None
        if scope_here() is not None:
            # With its calls recorded before this one, which is not the request's own.
            self._record(None)
            calls = self._calls()
            left_over = own_left_over_tasks() if any(call.served for call in calls) else []
            self._record(left_over, calls)
        else:
            self._record(None, closed=True)
        self._end()

    def _end(self) -> None:
        self._recording.close()
        self._watched = None

    def _calls(self) -> list[WatchedCall]:
        assert self._watched is not None
        around = [] if self._around is None else [self._around]
        return around + self._watched

    def _record(
        self,
        left_over: list[str] | None,
        calls: Sequence[WatchedCall] | None = None,
        closed: bool = False,
    ) -> None:
        stats = describe(self._calls() if calls is None else calls, self._start, self._around)
        stats |= {"left_over": left_over, "closed": closed or left_over is not None}
        self.record_stats(stats)  # type: ignore[no-untyped-call]


async def _middleware_and_view() -> None:
    """What a loop call that was there before the toolbar's middleware is called."""


_middleware_and_view.__qualname__ = "middleware and view"


def describe(calls: Sequence[WatchedCall], start: float, around: WatchedCall | None = None) -> dict[str, Any]:
    """Return what the template draws: plain values only, as the toolbar stores them as JSON.

    around: the call that those which began before its end were made in.
    """
    loops, threads, tasks = Numbers(), Numbers(), Numbers()
    rows: list[dict[str, Any]] = []
    for index, call in enumerate(calls):
        number = loops.number(call.loop)
        lane = None if number is None else min(number, MOST_LANES)
        inside = around is not None and call is not around and (around.end is None or call.start < around.end)
        rows.append(
            {
                "name": call.name,
                "location": call.location,
                "depth": call.depth + inside,
                "loop": number,
                "colour": (lane or 0) % COLOURS,
                "thread": threads.number(call.thread),
                "thread_name": call.thread_name,
                "task": tasks.number(call.task),
                "served": call.served,
                "at": (call.start - start) * 1000,
                "took": None if call.end is None else (call.end - call.start) * 1000,
                "x": ((lane or 1) - 1) * LANE + RADIUS + 4,
                "y": index * ROW + ROW // 2,
            }
        )
    drawn = [row for row in rows if row["loop"] is not None]
    return {
        "rows": rows,
        "loops": len(loops),
        "threads": len(threads),
        "tasks": len(tasks),
        "served": bool(drawn) and all(row["served"] for row in drawn),
        # Nested calls are part of what the outermost one was waited for.
        "waited": sum(row["took"] or 0 for row in rows if row["depth"] == 0),
        "width": min(len(loops) or 1, MOST_LANES) * LANE + RADIUS,
        "height": len(rows) * ROW,
        "row_height": ROW,
        "radius": RADIUS,
        "folded": len(loops) - MOST_LANES if len(loops) > MOST_LANES else 0,
        "lanes": _lanes(drawn),
        "way": [
            f"M{a['x']} {a['y']} C{a['x']} {a['y'] + ROW * 0.6:g} {b['x']} {b['y'] - ROW * 0.6:g} {b['x']} {b['y']}"
            for a, b in pairwise(drawn)
        ],
    }


def _lanes(rows: list[dict[str, Any]]) -> list[dict[str, int]]:
    lanes: dict[int, dict[str, int]] = {}
    for row in rows:
        lane = lanes.setdefault(row["x"], {"x": row["x"], "top": row["y"], "colour": row["colour"]})
        lane["bottom"] = row["y"]
    return list(lanes.values())


def _several(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
