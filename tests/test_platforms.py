"""The promises that loops are to keep on systems on which nobody runs these tests: without epoll, and as on Windows."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

import pytest
from django.http import HttpResponse

from wsgi_loop import event_loop

from . import support, test_closing, test_nested_calls, test_one_loop, test_threads
from .support import serve
from .test_promotion import ClosedLoop


class ProactorLikeLoop(asyncio.SelectorEventLoop):
    """As Windows' own loop: it waits for its socket in a future, which is cancelled when the loop stops."""

    _reading: asyncio.Future[None] | None = None

    def run_forever(self) -> None:
        assert self._reading is None
        self.call_soon(self._read)
        try:
            super().run_forever()
        finally:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

    def _read(self, future: asyncio.Future[None] | None = None) -> None:
        if future is None or not future.cancelled():
            self._reading = self.create_future()
            self._reading.add_done_callback(self._read)


SELECTORS = {name: getattr(selectors, name) for name in ("SelectSelector", "PollSelector")}
LOOPS = {"proactor": ProactorLikeLoop, "closed": ClosedLoop}


#: Those of a loop that is not promoted. What a loop as on Windows leaves when it stops promotes a request that waits.
NOT_PROMOTED = {
    "test_a_call_that_cancels_its_own_task_fails_alone",
    "test_every_loop_call_of_a_request_sees_one_loop_and_one_thread",
    "test_system_exit_in_a_child_task_reaches_the_caller_and_the_loop_goes_on",
}


@pytest.fixture(params=[*SELECTORS, *LOOPS], autouse=True)
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "proactor" and request.function.__name__ in NOT_PROMOTED:
        pytest.skip("it is promoted")
    if name in SELECTORS:
        monkeypatch.setattr(selectors, "DefaultSelector", SELECTORS[name])
    else:
        monkeypatch.setitem(support.default_options, "loop_factory", LOOPS[name])
    return name


globals().update(
    (name, test)
    for module in (test_one_loop, test_nested_calls, test_threads, test_closing)
    for name, test in vars(module).items()
    if name.startswith("test_")
)


def test_the_loops_are_those(platform: str) -> None:
    made: list[Any] = []

    async def view(request: Any) -> Any:
        loop: Any = asyncio.get_running_loop()
        # On a busy machine the time may be over before the loop comes to wait.
        while type(loop._selector) is event_loop._NoSelector:
            await asyncio.sleep(0.001)
        made.append((type(loop), type(loop._selector)))
        return HttpResponse()

    with serve(view) as server:
        server.get()
    [(loop, selector)] = made
    assert loop is LOOPS.get(platform, event_loop.EventLoop)
    assert platform in LOOPS or selector is SELECTORS[platform]
