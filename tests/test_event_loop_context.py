"""`EventLoopContext`: the loop, thread and task of a request where there is no request."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpResponse

from wsgi_loop import EventLoopContext, PerLoop, process

from .support import Place, call_here, call_here_nested, eventually, here, in_child, in_thread, serve

SCOPES = pytest.mark.parametrize("scope", ["request", "process"])
THREADS = 8


@pytest.fixture(autouse=True)
def _no_process_loop_is_left() -> Iterator[None]:
    yield
    process.shut_down()


def as_block(scope: str, function: Callable[[], Any]) -> Any:
    with EventLoopContext(scope=scope):
        return function()


def as_decorator(scope: str, function: Callable[[], Any]) -> Any:
    @EventLoopContext(scope=scope)
    def decorated() -> Any:
        return function()

    return decorated()


@SCOPES
@pytest.mark.parametrize("run", [as_block, as_decorator])
def test_its_calls_share_one_loop_one_thread_and_one_task(run: Any, scope: str) -> None:
    def work() -> list[Place]:
        nested = async_to_sync(call_here_nested)()
        places = [call_here(), call_here(), call_here()]
        assert nested[:2] == places[0][:2]
        return places

    places = run(scope, work)
    assert len(set(places)) == 1
    assert (places[0].thread == threading.get_ident()) == (scope == "request")
    # What it is for: without it, each call has its own.
    assert len({call_here().loop for _ in range(3)}) == 3


@SCOPES
def test_thread_sensitive_code_runs_on_the_thread_of_the_block(scope: str) -> None:
    async def work() -> int:
        return await sync_to_async(threading.get_ident)()

    def block() -> None:
        with EventLoopContext(scope=scope):
            assert async_to_sync(work)() == threading.get_ident()

    block()
    in_thread(block)


def test_what_it_returns_and_raises_goes_through() -> None:
    @EventLoopContext()
    def give(number: int, *, fail: bool = False) -> int:
        """Its own words."""
        if fail:
            raise LookupError(number)
        return number + async_to_sync(asyncio.sleep)(0, number)

    assert give(2) == 4
    assert (give.__name__, give.__doc__) == ("give", "Its own words.")
    with pytest.raises(LookupError):
        give(2, fail=True)


@pytest.mark.parametrize("error", [None, LookupError, KeyboardInterrupt, SystemExit])
def test_the_loop_of_scope_request_is_closed_at_the_end(error: type[BaseException] | None) -> None:
    places: list[Place] = []

    def block() -> None:
        with EventLoopContext():
            places.append(call_here())
            assert not places[0].loop.is_closed()
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(error):
            block()
    assert places[0].loop.is_closed()
    assert threading.get_ident() == places[0].thread


def test_the_process_loop_stays_and_each_block_has_a_task_of_its_own() -> None:
    places = []
    for _ in range(3):
        with EventLoopContext(scope="process"):
            places += [call_here(), call_here()]
    assert len({place.loop for place in places}) == 1
    assert len({place.task for place in places}) == 3
    assert not places[0].loop.is_closed()
    eventually(lambda: all(place.task is not None and place.task.done() for place in places), 30)
    process.shut_down()
    assert places[0].loop.is_closed()


@SCOPES
def test_a_block_without_a_loop_call_makes_no_loop(scope: str) -> None:
    with EventLoopContext(scope=scope, loop_factory=Factory()):
        pass


class Factory:
    """Makes the one loop that the options' check asks for, and no other."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> asyncio.AbstractEventLoop:
        self.made += 1
        assert self.made == 1, "a loop was made"
        return asyncio.SelectorEventLoop()


@SCOPES
def test_a_task_that_is_left_running(scope: str, caplog: pytest.LogCaptureFixture) -> None:
    tasks = []

    async def leave_one() -> None:
        tasks.append(asyncio.create_task(asyncio.sleep(3600), name="the left one"))
        await asyncio.sleep(0)

    with EventLoopContext(scope=scope, shutdown_timeout=0.5):
        async_to_sync(leave_one)()
        call_here()
        assert not tasks[0].done()
    if scope == "process":
        assert not tasks[0].done()
        process.shut_down()
    assert tasks[0].cancelled()
    assert "the left one" in caplog.text
    if scope == "request":
        assert f"EventLoopContext on thread {threading.current_thread().name!r}: ended while 1" in caplog.text


def test_blocks_in_a_block_join_it() -> None:
    outer, inner = EventLoopContext(), EventLoopContext(scope="process")
    with outer:
        places = [call_here()]
        with outer, outer:
            places.append(call_here())
        places.append(call_here())
        with inner:
            places.append(call_here())
        places.append(call_here())
    assert len(set(places)) == 1
    eventually(places[0].loop.is_closed, 30)


def test_a_decorated_function_may_call_itself() -> None:
    places = []

    @EventLoopContext()
    def down(depth: int) -> None:
        places.append(call_here())
        if depth:
            down(depth - 1)
            places.append(call_here())

    down(3)
    assert len(places) == 7
    assert len(set(places)) == 1
    down(0)
    assert places[7].loop is not places[0].loop


@SCOPES
@pytest.mark.parametrize("used_before", [True, False])
def test_in_a_request_it_joins_the_requests_loop(scope: str, used_before: bool) -> None:
    places: list[Place] = []

    def view(request: Any) -> HttpResponse:
        if used_before:
            places.append(call_here())
        # Its own options do not count: the request has a loop, or will have one.
        with EventLoopContext(scope="process" if scope == "request" else "request"):
            places.append(call_here())
        places.append(call_here())
        assert not places[-1].loop.is_closed()
        return HttpResponse()

    async def async_view(request: Any) -> HttpResponse:
        places.append(await here())
        with EventLoopContext():
            places.append(await here())
        await sync_to_async(block)()
        return HttpResponse()

    def block() -> None:
        with EventLoopContext():
            place = call_here()
        assert place[:2] == call_here()[:2] == places[0][:2]

    for served in (view, async_view):
        with serve(served, scope=scope) as server:
            server.get()
            assert server.status.startswith("200")
        assert len(set(places)) == 1
        assert len(places) == 2 + (served is view and used_before)
        if scope == "request":
            eventually(places[0].loop.is_closed, 30)
        else:
            assert not places[0].loop.is_closed()
        places.clear()


def test_in_async_code_it_joins_the_running_loop() -> None:
    def block() -> Place:
        with EventLoopContext():
            assert call_here()[:2] == call_here()[:2]
            return call_here()

    async def main() -> None:
        own = await here()
        with EventLoopContext():
            assert await here() == own
        assert (await sync_to_async(block)())[:2] == own[:2]
        # And what is not thread-sensitive.
        assert (await sync_to_async(block, thread_sensitive=False)())[:2] == own[:2]
        assert not own.loop.is_closed()

    asyncio.run(main())


@SCOPES
def test_a_decorated_function_may_run_on_many_threads_at_once(scope: str) -> None:
    together = threading.Barrier(THREADS)

    @EventLoopContext(scope=scope)
    def work() -> list[Place]:
        places = [call_here()]
        together.wait(30)
        places.append(call_here())
        together.wait(30)
        return [*places, call_here()]

    with ThreadPoolExecutor(THREADS) as pool:
        found = [future.result(60) for future in [pool.submit(work) for _ in range(THREADS)]]
    assert all(len(set(places)) == 1 for places in found)
    assert len({places[0].task for places in found}) == THREADS
    loops = {places[0].loop for places in found}
    assert len(loops) == (THREADS if scope == "request" else 1)
    if scope == "request":
        eventually(lambda: all(loop.is_closed() for loop in loops), 30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scop": "process"}, r"EventLoopContext\(\) has an unknown key, 'SCOP' \(its value is 'process'\)"),
        ({"scope": "worker"}, r"EventLoopContext\(scope=…\) is 'worker'. Accepted: 'request' or 'process'"),
        ({"lifespan": contextvars.Context}, r"EventLoopContext\(lifespan=…\) is .*None in scope 'request'"),
    ],
)
def test_a_wrong_option_is_refused_when_it_is_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        EventLoopContext(**options)


def test_its_options_are_those_of_the_setting_and_its_own_win(settings: Any) -> None:
    settings.WSGI_LOOP = {"SCOPE": "process"}
    with EventLoopContext():
        first = call_here()
    with EventLoopContext():
        assert call_here().loop is first.loop
    with EventLoopContext(scope="request"):
        assert call_here().loop is not first.loop


@SCOPES
@pytest.mark.parametrize("error", [False, True])
def test_what_asgiref_keeps_on_the_thread_is_left_as_it_was(scope: str, error: bool) -> None:
    def check() -> None:
        thread = SyncToAsync.threadlocal.__dict__
        for found in ({}, {"task_context": [], "main_event_loop": None}):
            thread.clear()
            thread.update(found)
            before = thread.copy()
            try:
                with EventLoopContext(scope=scope):
                    call_here()
                    async_to_sync(call_here_nested)()
                    if error:
                        raise LookupError
            except LookupError:
                assert error
            assert thread == before

    # A thread of its own, for what is on this one is not ours to change.
    in_thread(check)


def test_what_is_set_in_a_contextvar_stays_set() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def set_it() -> None:
        variable.set("in async code")

    def check() -> None:
        with EventLoopContext():
            async_to_sync(set_it)()
            assert variable.get() == "in async code"
        assert variable.get() == "in async code"

    contextvars.copy_context().run(check)


@SCOPES
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_child_that_is_forked_in_a_block_does_not_touch_its_parents_loop(scope: str) -> None:
    selector_of_parent: list[Any] = []

    def child() -> None:
        # The end of the block that the parent is in, as code that is forked in a `with` block meets it.
        block.__exit__(None, None, None)
        with EventLoopContext(scope=scope):
            own = [call_here(), call_here()]
        assert len(set(own)) == 1
        assert own[0].loop is not before.loop
        assert not before.loop.is_closed()
        process.shut_down()
        assert not before.loop.is_closed()
        # The selector, which the two share: to close it, or to take a descriptor off it, breaks the parent's.
        assert selector_of_parent[0].get_map() is not None

    def child_in_the_block() -> None:
        with EventLoopContext(scope=scope):
            assert call_here().loop is not before.loop
        assert call_here().loop is not before.loop
        assert not before.loop.is_closed()

    block = EventLoopContext(scope=scope)
    with block:
        before = call_here()
        selector_of_parent.append(before.loop._selector)  # type: ignore[attr-defined]
        in_child(child, seconds=30)
        in_child(child_in_the_block, seconds=30)
        assert call_here() == before
    with EventLoopContext(scope=scope):
        assert (call_here().loop is before.loop) == (scope == "process")
    if scope == "request":
        eventually(before.loop.is_closed, 30)


def test_it_decorates_no_async_function() -> None:
    async def command() -> None: ...

    with pytest.raises(TypeError, match=r"EventLoopContext\(\) decorates sync functions, and .*command is async"):
        EventLoopContext()(command)


def test_a_block_that_is_left_on_another_thread_is_an_error_that_says_so() -> None:
    context = EventLoopContext()
    with context, pytest.raises(RuntimeError, match="left on another thread"):
        in_thread(lambda: context.__exit__(None, None, None))


@SCOPES
def test_a_closed_loop_that_asgiref_has_left_on_the_thread_is_not_joined(scope: str) -> None:
    def before_and_inside() -> list[Any]:
        async_to_sync(sync_to_async(lambda: None))()
        with EventLoopContext(scope=scope):
            return [call_here(), call_here()]

    first, second = in_thread(before_and_inside)
    assert first == second


def test_a_decorator_without_parentheses_is_told_of_them() -> None:
    with pytest.raises(TypeError, match=r"written with parentheses: @EventLoopContext\(\)\."):

        @EventLoopContext
        def function() -> None: ...


def test_a_resource_that_is_not_called_is_told_so() -> None:
    client: Any = PerLoop(threading.Lock)  # type: ignore[arg-type]

    async def await_it() -> None:
        await client

    with pytest.raises(TypeError, match=r"await client\(\), not await client"):
        asyncio.run(await_it())
    with pytest.raises(AttributeError, match=r"no attribute 'get'\. It is called .* \(await client\(\)\)\.get"):
        client.get("https://example.com")
    assert not hasattr(client, "__wrapped__")
    assert copy.copy(client)._factory is client._factory
