"""What has happened in this process, in numbers. Knows nothing of the rest, which counts here where things happen."""

from __future__ import annotations

from dataclasses import dataclass

from . import forks


@dataclass(frozen=True, slots=True)
class Stats:
    """What has happened in this process since its start. What is not said to be so *now* only grows.

    requests: that made loop calls, with blocks of `EventLoopContext`. loops_made, loops_open (now), loops_given_up:
    event loops, with the process loop. loop_threads (now): threads that run one. tasks_cut_off: tasks that were
    cancelled because their request, or the process, had ended. background_started, background_in_flight (now),
    background_failed, background_cancelled: tasks of `create_background_task`. longest_block: seconds that the process
    loop has stood still at a time, at most; 0.0 if `BLOCKED_AFTER` is None.
    """

    requests: int
    loops_made: int
    loops_open: int
    loops_given_up: int
    loop_threads: int
    tasks_cut_off: int
    background_started: int
    background_in_flight: int
    background_failed: int
    background_cancelled: int
    longest_block: float


class Counters:
    """Plain numbers: to add to one is a single step under Python's global lock."""

    def __init__(self) -> None:
        self.requests = 0
        self.loops_made = 0
        self.loops_closed = 0
        self.loops_given_up = 0
        self.loop_threads = 0
        self.tasks_cut_off = 0
        self.background_started = 0
        self.background_ended = 0
        self.background_failed = 0
        self.background_cancelled = 0
        self.longest_block = 0.0


counters = Counters()
# A forked child begins anew, in the same object, which is imported everywhere.
forks.in_child(lambda: counters.__init__())  # type: ignore[misc]


def stats() -> Stats:
    """Return what has happened in this process, in numbers. Cheap, and may be called on any thread."""
    now = counters
    return Stats(
        requests=now.requests,
        loops_made=now.loops_made,
        loops_open=now.loops_made - now.loops_closed,
        loops_given_up=now.loops_given_up,
        loop_threads=now.loop_threads,
        tasks_cut_off=now.tasks_cut_off,
        background_started=now.background_started,
        background_in_flight=now.background_started - now.background_ended,
        background_failed=now.background_failed,
        background_cancelled=now.background_cancelled,
        longest_block=now.longest_block,
    )
