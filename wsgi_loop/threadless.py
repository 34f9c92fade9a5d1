"""A request's loop with no thread of its own: it runs on the request thread, while that waits for what runs on it.

Knows asyncio and threads, and nothing of Django or asgiref.

Who owns what: between two waits the loop belongs to nobody, and stands still. A thread that waits has the turn, runs
the loop, and leaves it for whatever else it has to do: sync code runs where no loop is running, so it may wait in its
turn, one level deeper. Another thread of the request waits for the turn. Whoever has it last closes the loop.
"""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, Protocol

from .calls import Adapter, LoopCall, NoLoop
from .loops import UNKNOWN, LoopFactory, RequestLoop
from .threads import NoThread, check_threads

logger = logging.getLogger("wsgi_loop")

#: Seconds of sync code after which it is looked for what that has held up.
HOLD_UP = 0.1
_MAX_REPORTED = 1000
#: Seconds after which a thread that waits for its turn looks if it still has to.
_PATIENCE = 0.01

_reported: set[str] = set()


class Errand(Protocol):
    """A function that async code has this thread call."""

    @property
    def name(self) -> str: ...


class Errands(Protocol):
    """What a thread that waits for its loop has to do in between."""

    def are_waiting(self) -> bool: ...

    def run(self) -> list[Errand]:
        """Run what has come up. Returns what was run."""

    def view(self) -> str:
        """Return what to report a hold-up for, once."""


class Request(Protocol):
    """Whose loop it is.

    dropped: has the loop close async generators that were dropped while it stood still. They may hold the request.
    """

    dropped: list[Callable[[], object]]

    def let_go_of_dropped(self) -> None: ...


class ThreadlessLoop(RequestLoop):
    """The loop of one request, run by the threads that wait for it. See `RunningLoop` for the arguments."""

    consequence = ""

    def __init__(self, factory: LoopFactory, timeout: float, owner: str, adapter: Adapter) -> None:
        super().__init__(factory, timeout, owner, adapter)
        #: Held by the thread that runs the loop, or that has left it for its errands. A finalizer may ask for it.
        self._turn = threading.RLock()
        self._depth = 0
        self._stopped_at = 0.0
        #: Those of the errands that are being run.
        self._answers: list[Callable[[], object]] | None = None
        #: Of whom there may be nothing but garbage left. The loop does not hold it, nor what it would be held by.
        self.request: Callable[[], Request | None] = lambda: None
        #: Done when nothing is left on the loop but to close it, of one that has more to do for that.
        self._over: Future[None] | None = None
        self._closing_soon = False
        self._finishing = False
        #: Whether an async generator was dropped before its end, for which the loop then makes a task.
        self._has_dropped = False
        self._wake: Callable[..., Any] = self._post
        self._post = self._post_here

    # --- on any thread -------------------------------------------------------------------------------------------

    def _post_here(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
        if not self._turn.acquire(blocking=False):
            return self._wake(callback, *args, context=context)
        # Nobody is asleep in the loop who would have to be woken up.
        try:
            return self.loop.call_soon(callback, *args, context=context)
        finally:
            self._turn.release()

    def hand_over(self, make_call: Callable[[], LoopCall]) -> None:
        if not self._turn.acquire(blocking=False):
            super().hand_over(make_call)
            return
        try:
            if self.is_running_here():
                super().hand_over(make_call)
                return
            with self._lock:
                call = self._add(make_call)
                if not self._started:
                    self._start()
            # Here, and not by way of a callback: the loop stands still.
            self._accept(call)
        finally:
            self._turn.release()

    def _start(self) -> None:
        check_threads()
        self._started = True

    def answer(self, function: Callable[..., object], *args: Any) -> None:
        if not self._turn.acquire(blocking=False):
            super().answer(function, *args)
            return
        try:
            if self._answers is not None:
                self._answers.append(partial(function, *args))
            elif not self.loop.is_closed():
                function(*args)
        finally:
            self._turn.release()

    def is_running_here(self) -> bool:
        """Tell if this thread is inside the loop, in async code or a callback."""
        return asyncio._get_running_loop() is self.loop

    def is_driven_here(self) -> bool:
        """Tell if this thread has the turn, in the loop or on an errand."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            return self._depth > 0
        finally:
            self._turn.release()

    def interrupt(self) -> None:
        """Have the thread that runs the loop leave it, to see what it has to do."""
        if not self._turn.acquire(blocking=False):
            with contextlib.suppress(RuntimeError):  # it is closed
                self._wake(self.loop.stop)
            return
        try:
            if self.is_running_here():
                self.loop.stop()
        finally:
            self._turn.release()

    def drive(self, future: Future[Any], errands: Errands, timeout: float | None = None) -> bool:
        """Run the loop here until `future` is done, or `timeout` seconds have passed. Returns whether it is done."""
        done = False

        def stop(_: object) -> None:
            nonlocal done
            done = True
            self.interrupt()

        future.add_done_callback(stop)
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._turn.acquire(timeout=_PATIENCE):
            # Another thread of the request runs it, and what runs on it may need this one.
            if done or (deadline is not None and time.monotonic() >= deadline):
                return done
            if errands.are_waiting():
                errands.run()
        self._depth += 1
        try:
            if (request := self.request()) is not None:
                request.let_go_of_dropped()
                del request
            while True:
                if errands.are_waiting():
                    self._run_errands(errands)
                if done or self.loop.is_closed():
                    return done
                if deadline is None:
                    self._run_loop()
                elif (remaining := deadline - time.monotonic()) > 0:
                    timer = self.loop.call_later(remaining, self.loop.stop, context=contextvars.Context())
                    self._run_loop()
                    timer.cancel()
                else:
                    return False
        finally:
            self._depth -= 1
            try:
                if not self._depth and self._closing_soon:
                    # From the inside, or by a thread that has not got its turn.
                    self._finish_off(lambda future, timeout: self.drive(future, errands, timeout))
            finally:
                self._turn.release()

    def _run_errands(self, errands: Errands) -> None:
        began = time.perf_counter()
        found, self._answers = self._answers, []
        try:
            ran = errands.run()
        except BaseException:
            ran = []
            raise
        finally:
            answers, self._answers = self._answers, found
            # A nested loop call may have run the loop meanwhile.
            seconds = time.perf_counter() - max(began, self._stopped_at)
            if ran and seconds >= HOLD_UP and (view := errands.view()) not in _reported:
                self._look_for_hold_up(seconds, ran, view, answers)
            else:
                for answer in answers:
                    answer()

    def _run_loop(self) -> None:
        self.thread_id = threading.get_ident()
        self._prepare()
        try:
            self.loop.run_forever()
        finally:
            self._stopped_at = time.perf_counter()

    # --- the end -------------------------------------------------------------------------------------------------

    def close(self, wait: Callable[[Future[None], float], bool]) -> None:
        if asyncio._get_running_loop() is not None:
            # Another one than this, which can not run inside of it.
            self._finish_off_elsewhere()
        elif self._take_turn():
            try:
                self._finish_off(wait)
            finally:
                self._turn.release()
            return
        else:
            self.close_soon()
        try:
            self.ended.result(self.timeout)
        except TimeoutError:
            self.give_up()

    def _take_turn(self) -> bool:
        """Take the turn, unless it is that of a thread that waits for the loop: who only posts has it for a moment."""
        return self._turn.acquire(blocking=False) or (not self._depth and self._turn.acquire(timeout=1))

    def close_soon(self) -> None:
        """Have it closed by the thread whose turn it is, or at once if it is nobody's. A finalizer may call it."""
        self._closing_soon = True
        if not self._take_turn():
            super().close_soon()
            return
        try:
            if self._depth:
                super().close_soon()
            elif not self._started or (self._is_clean() and self._default_executor() is None and not self._has_dropped):
                self._end()
            else:
                self._finish_off_elsewhere()
        finally:
            self._turn.release()

    def _finish_off_elsewhere(self) -> None:
        # By way of a bare thread: a finalizer may come while this one holds a lock that it takes to get another.
        try:
            _thread.start_new_thread(self._find_thread, ())
        except RuntimeError:  # none can be started
            self._end()

    def _find_thread(self) -> None:
        try:
            self._threads.submit(self._finish_off_there)
        except NoThread:
            self._finish_off_here()

    def _finish_off_there(self) -> bool:
        self._finish_off_here()
        return self._threads.give_back()

    def _finish_off_here(self) -> None:
        with self._turn:
            self._finish_off(self._wait_alone, alone=True)

    def _wait_alone(self, future: Future[None], timeout: float) -> bool:
        return self.drive(future, _NoErrands(), timeout)

    def _finish_off(self, wait: Callable[[Future[None], float], bool], alone: bool = False) -> None:
        """Close the loop, in this thread's turn. alone: on a thread of its own, which nobody waits for."""
        if self._finishing or self.ended.done():
            return
        if not self._started:
            self._close_clean()
            return
        self._finishing = True
        try:
            if not self._closing and not self._given_up:
                for request_task in self._request_tasks:
                    request_task.end()
                # Once, for what is ready to run: the end of that task, and of connections that were closed.
                self.loop.stop()
                self._run_loop()
            executor = self._default_executor()
            if not self._closing and not self._given_up and self._is_clean():
                if executor is None:
                    self._close_clean()
                    return
                if executor is not UNKNOWN and not alone:
                    # Only its threads are left, which `asyncio.to_thread` has started. They may take their time.
                    self._finishing = False
                    self._finish_off_elsewhere()
                    return
            over = self._over = Future()
            if not self._given_up:
                self._begin_shut_down()
                if not self._stopped and not wait(over, self.timeout):
                    self.give_up()
        except (KeyboardInterrupt, SystemExit):
            self._finishing = False
            self._finish_off_elsewhere()
            raise
        self._end()

    def _drop_generator(self, of_loop: Callable[[Any], object] | None, generator: Any) -> None:
        self._has_dropped = True
        drop = partial(super()._drop_generator, of_loop, generator)
        request = self.request()
        if self._depth or request is None:
            drop()
        else:
            request.dropped.append(drop)

    def _stop(self) -> None:
        self._stopped = True
        if self._over is not None:
            with contextlib.suppress(InvalidStateError):
                self._over.set_result(None)

    def _close_loop(self) -> None:
        super()._close_loop()
        # Cycles: the adapter leads to the executors, and they lead here.
        self._post = self._wake
        self._adapter = _CLOSED

    # --- what sync code holds up ---------------------------------------------------------------------------------

    def _look_for_hold_up(
        self, seconds: float, ran: list[Errand], view: str, answers: list[Callable[[], object]]
    ) -> None:
        """Report the tasks that could have gone on meanwhile: those that do in the next rounds, before the answers."""
        most = Counter(errand.name for errand in ran).most_common(3)
        names = ", ".join(name if number == 1 else f"{number} x {name}" for name, number in most)
        before = {task: _awaited_by(task) for task in asyncio.all_tasks(self.loop)}

        def look() -> None:
            held_up = [task for task, awaited in before.items() if task.done() or _awaited_by(task) is not awaited]
            if held_up and view not in _reported and len(_reported) < _MAX_REPORTED:
                _reported.add(view)
                logger.warning(
                    "%s: %s ran for %.2f s on the request thread, and held up %d of its tasks that could have gone on: "
                    "%s. With WSGI_LOOP['THREAD'] = 'request' the event loop stands still while thread-sensitive sync "
                    "code runs; with 'own' it does not. (Logged once for %s.)",
                    self.owner,
                    names,
                    seconds,
                    len(held_up),
                    ", ".join(sorted(map(self._describe, held_up))),
                    view,
                )
            for answer in answers:
                answer()

        # What was ready takes a step in the first round of the loop, what waited for a time or a socket in the second.
        context = contextvars.Context()
        self.loop.call_soon(
            lambda: self.loop.call_soon(lambda: self.loop.call_soon(look, context=context), context=context),
            context=context,
        )


class _Closed:
    """In place of the adapter of a loop that is closed."""

    def recognizes(self, args: tuple[Any, ...]) -> bool:
        return False

    def adapt(self, coroutine: Any) -> Any:
        raise NoLoop("The event loop is closed")

    def lend(self, running: Any, executor: Any, function: Any) -> None:
        return None


_CLOSED = _Closed()


class _NoErrands:
    def are_waiting(self) -> bool:
        return False

    def run(self) -> list[Errand]:
        return []

    def view(self) -> str:
        return ""


def _awaited_by(task: asyncio.Task[Any]) -> object:
    """Return what a task waits for, which is another object at each `await`."""
    awaited: Any = task.get_coro()
    while (inner := _inner(awaited)) is not None:
        awaited = inner
    return awaited


def _inner(awaitable: Any) -> Any:
    for name in ("cr_await", "ag_await", "gi_yieldfrom"):
        if (inner := getattr(awaitable, name, None)) is not None:
            return inner
    return None
