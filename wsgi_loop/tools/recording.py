"""What loop calls were made, and on which loops: for tests, reports and panels.

Knows neither Django nor asyncio, and leaves it to `bridge.watching` to see the calls.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from ..bridge.watching import WatchedCall, watch_calls


@dataclass(frozen=True, slots=True)
class LoopCallRecord:
    """One loop call: a call of `async_to_sync`, or a step of an async response body.

    Loops, the threads that they run on, tasks and requests are numbered in the order in which they were met; None where
    the call never got as far, or is no request's. start: seconds since the recording began. duration: seconds that the
    caller waited, None until it has its answer. depth: how many other loop calls this one was made in. served: by
    wsgi-loop. location: where in the project's code it was made.
    """

    name: str
    loop_id: int | None
    thread_id: int | None
    thread_name: str
    task_id: int | None
    request_id: int | None
    path: str | None
    start: float
    duration: float | None
    depth: int
    served: bool
    location: str


class LoopCalls(Sequence[LoopCallRecord]):
    """Loop calls in the order in which they were made, as they stand at the time that they are looked at."""

    def __init__(self, watched: list[WatchedCall]) -> None:
        self._watched = watched
        self._began = time.perf_counter()

    def __len__(self) -> int:
        return len(self._watched)

    @overload
    def __getitem__(self, index: int) -> LoopCallRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[LoopCallRecord]: ...
    def __getitem__(self, index: int | slice) -> LoopCallRecord | list[LoopCallRecord]:
        return self._records()[index]

    def __iter__(self) -> Iterator[LoopCallRecord]:
        return iter(self._records())

    def __repr__(self) -> str:
        return f"<LoopCalls: {len(self)} calls on {self.loops} event loops and {self.threads} threads>"

    @property
    def loops(self) -> int:
        """On how many event loops they ran."""
        return len({call.loop_id for call in self} - {None})

    @property
    def threads(self) -> int:
        """On how many threads these event loops ran."""
        return len({call.thread_id for call in self} - {None})

    def table(self) -> str:
        """Return a table of the calls, with those marked that `assert_one_loop` would complain about."""
        records = self._records()
        return _table(records, _odd_ones(records))

    def assert_one_loop(self, *, allow_no_calls: bool = False) -> None:
        """Raise AssertionError, with the table, unless the calls of each request ran on one event loop of wsgi-loop.

        Calls that no request made are looked at where there was no request. That there was no call at all is an error
        too, as then nothing was tested, unless allow_no_calls.
        """
        __tracebackhide__ = True
        records = self._records()
        if not records:
            if allow_no_calls:
                return
            raise AssertionError(
                "No loop call was recorded, so this tests nothing: the code made none, or made it before or after the "
                "recording. If that is as it should be: assert_one_loop(allow_no_calls=True)."
            )
        odd = _odd_ones(records)
        if odd:
            raise AssertionError(f"{_complaint(records, odd)}\n\n{_table(records, odd)}\n")

    def _records(self) -> list[LoopCallRecord]:
        loops, threads, tasks, requests = Numbers(), Numbers(), Numbers(), Numbers()
        return [
            LoopCallRecord(
                name=call.name,
                loop_id=loops.number(call.loop),
                thread_id=threads.number(call.thread),
                thread_name=call.thread_name,
                task_id=tasks.number(call.task),
                request_id=requests.number(call.request),
                path=call.path,
                start=call.start - self._began,
                duration=None if call.end is None else call.end - call.start,
                depth=call.depth,
                served=call.served,
                location=call.location,
            )
            for call in self._watched.copy()
        ]


@contextlib.contextmanager
def record_loop_calls() -> Iterator[LoopCalls]:
    """Record every loop call that is made in the process, on any thread, until the end of the block.

        with record_loop_calls() as calls:
            client.get("/")
        calls.assert_one_loop()

    Meanwhile asgiref is wrapped. Recordings may overlap.
    """
    with watch_calls() as watched:
        yield LoopCalls(watched)


class Numbers(dict[int, int]):
    """Small numbers in the place of large ones: from 1 on, in the order of their first use."""

    def number(self, key: int | None) -> int | None:
        return None if key is None else self.setdefault(key, len(self) + 1)


def _odd_ones(records: Sequence[LoopCallRecord]) -> set[int]:
    """Return the indices of the calls that did not run on their request's loop."""
    groups: dict[int | None, list[int]] = {}
    for index, call in enumerate(records):
        if call.loop_id is not None:
            groups.setdefault(call.request_id, []).append(index)
    if len(groups) > 1:
        # What the test itself calls, between its requests.
        groups.pop(None, None)
    odd = set()
    for indices in groups.values():
        usual = _usual_loop(records[index] for index in indices)
        odd |= {index for index in indices if records[index].loop_id != usual}
    return odd


def _usual_loop(calls: Iterable[LoopCallRecord]) -> int | None:
    """Return the loop of wsgi-loop that most of the calls ran on, if any."""
    counted = Counter(call.loop_id for call in calls if call.served)
    return counted.most_common(1)[0][0] if counted else None


def _complaint(records: Sequence[LoopCallRecord], odd: set[int]) -> str:
    told = []
    for request in dict.fromkeys(records[index].request_id for index in sorted(odd)):
        calls = [call for call in records if call.request_id == request and call.loop_id is not None]
        loops = len({call.loop_id for call in calls})
        strangers = sum(not call.served for call in calls)
        whose = f"Request {request} to {calls[0].path}" if request is not None else "Outside of any request"
        on = f"{loops} event loops" if loops > 1 else "one event loop"
        unserved = f", and wsgi-loop did not serve {strangers} of them" if strangers else ""
        told.append(f"{whose}: {len(calls)} loop calls ran on {on}{unserved}.")
    if not any(call.served for call in records):
        told.append("Does the test use the client or the live server of wsgi_loop.testing?")
    return "\n".join(told)


def _table(records: Sequence[LoopCallRecord], odd: set[int]) -> str:
    rows = [("", "loop call", "loop of", "loop", "thread", "task", "ms", "request", "made at")]
    for index, call in enumerate(records):
        rows.append(
            (
                ">" if index in odd else "",
                "  " * call.depth + call.name,
                "-" if call.loop_id is None else "wsgi-loop" if call.served else "asgiref",
                _shown(call.loop_id),
                f"{_shown(call.thread_id)} {call.thread_name}".strip(),
                _shown(call.task_id),
                "..." if call.duration is None else f"{call.duration * 1000:.1f}",
                _shown(call.request_id) + (f" {call.path}" if call.path is not None else ""),
                call.location,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _shown(number: int | None) -> str:
    return "-" if number is None else str(number)
