"""Promise 1: one loop, one thread, one task, and what a cancellation between two loop calls does."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

import anyio
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.http import HttpResponse, StreamingHttpResponse
from django.template import Context, Engine, Library
from django.utils.decorators import async_only_middleware

from .conftest import Connect
from .support import Place, call_here, call_here_nested, eventually, here, serve, stock

call = async_to_sync


def recording_middleware(places: list[Place]) -> Any:
    @async_only_middleware
    def middleware(get_response: Any) -> Any:
        async def record(request: Any) -> Any:
            places.append(await here())
            response = await get_response(request)
            places.append(await here())
            return response

        return record

    return middleware


def journey(places: list[Place], receive: Connect) -> Any:
    """A request that makes loop calls wherever Django lets it. Returns its view."""

    async def receiver(**kwargs: Any) -> None:
        places.append(await here())

    def sync_receiver(**kwargs: Any) -> None:
        places.append(call_here())

    receive(started=receiver, finished=receiver)
    receive(started=sync_receiver, finished=sync_receiver)

    library = Library()
    library.simple_tag(lambda: places.append(call_here()) or "", name="tag")
    engine = Engine()
    engine.template_builtins.append(library)

    async def view(request: Any) -> Any:
        places.append(await here())
        places.append(await call_here_nested())
        await sync_to_async(engine.from_string("{% tag %}").render)(Context())

        def body() -> Any:
            for _ in range(3):
                places.append(call_here())
                yield b"x"

        return StreamingHttpResponse(body())

    return view


def test_every_loop_call_of_a_request_sees_one_loop_and_one_thread(receive: Connect) -> None:
    places: list[Place] = []
    with serve(journey(places, receive), middleware=[recording_middleware(places)] * 2) as server:
        assert server.get() == b"xxx"
    assert len(places) == 14
    assert len({place.loop for place in places}) == 1
    assert len({place.thread for place in places}) == 1


def test_djangos_own_handler_fails_the_same_test(receive: Connect) -> None:
    places: list[Place] = []
    with stock(journey(places, receive), middleware=[recording_middleware(places)] * 2) as server:
        server.get()
    assert len({place.loop for place in places}) > 5


def test_two_requests_never_share_a_loop(receive: Connect) -> None:
    places: list[Place] = []
    with serve(lambda request: HttpResponse(places.append(call_here()))) as server:
        server.get()
        server.get()
    assert places[0].loop is not places[1].loop
    eventually(places[0].loop.is_closed)


def test_loop_calls_that_are_not_nested_share_one_task_with_orm_calls_in_between() -> None:
    places: list[Place] = []
    nested: list[Place] = []

    async def with_sync_code() -> None:
        places.append(await here())
        nested.append(await call_here_nested())

    def view(request: Any) -> Any:
        places.append(call_here())
        # After this, asgiref hands calls to the loop itself.
        call(with_sync_code)()
        places.append(call_here())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert len({place.task for place in places}) == 1
    assert nested[0].task is not places[0].task


def test_an_exception_handler_and_process_view_share_the_loop() -> None:
    places: list[Place] = []

    class Middleware:
        async_capable = False

        def __init__(self, get_response: Any) -> None:
            self.get_response = get_response

        def __call__(self, request: Any) -> Any:
            return self.get_response(request)

        async def process_view(self, *args: Any) -> None:
            places.append(await here())

        async def process_exception(self, request: Any, exception: Exception) -> Any:
            places.append(await here())
            return HttpResponse("handled")

    async def view(request: Any) -> Any:
        places.append(await here())
        raise ValueError

    with serve(view, middleware=[Middleware]) as server:
        assert server.get() == b"handled"
    assert len(places) == 3
    assert len({(place.loop, place.thread, place.task) for place in places}) == 1


def test_code_in_a_thread_of_the_loops_executor_reaches_the_same_loop() -> None:
    places: list[Place] = []

    async def view(request: Any) -> Any:
        places.append(await here())
        places.append(await sync_to_async(call_here, thread_sensitive=False)())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert len({place.loop for place in places}) == 1


def test_an_exception_in_a_loop_call_reaches_its_caller() -> None:
    async def fail() -> None:
        raise ValueError("as it was")

    def view(request: Any) -> Any:
        with pytest.raises(ValueError, match="as it was"):
            call(fail)()
        return HttpResponse()

    with serve(view) as server:
        server.get()


def test_system_exit_in_a_child_task_reaches_the_caller_and_the_loop_goes_on() -> None:
    async def leave() -> None:
        raise SystemExit(3)

    async def gather() -> None:
        await asyncio.gather(leave())

    places: list[Place] = []

    def view(request: Any) -> Any:
        places.append(call_here())
        with pytest.raises(SystemExit):
            call(gather)()
        places.append(call_here())
        return HttpResponse()

    with serve(view) as server:
        server.get()
    assert places[0] == places[1]


def test_loop_stop_in_user_code_does_not_end_the_loop() -> None:
    async def stop() -> None:
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)

    with serve(lambda request: HttpResponse(str(call(stop)()))) as server:
        assert server.get() == b"None"


# --- one task: context managers that are entered in one call and left in another ---------------------------------


def in_view(function: Any, caplog: Any = None) -> Any:
    """Run sync code inside a request, and return what it returns."""
    outcome: list[Any] = []
    with serve(lambda request: HttpResponse(str(outcome.append(function())))) as server:
        server.get(**{"wsgi.errors": None})
    return outcome[0] if outcome else pytest.fail(f"the view failed: {server.status}")


async def make(factory: Any) -> Any:
    return factory()


async def enter(manager: Any) -> Any:
    return await manager.__aenter__()


async def leave(manager: Any, *exc_info: Any) -> Any:
    return await manager.__aexit__(*(exc_info or (None, None, None)))


async def cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


def query() -> None:
    """Sync code on the request thread, from async code, as an ORM call is."""
    call(sync_to_async(lambda: None))()


async def expire_soon(timeout: asyncio.Timeout) -> None:
    timeout.reschedule(asyncio.get_running_loop().time() + 0.01)


def test_a_timeout_entered_in_one_call_and_left_in_another() -> None:
    def view() -> Any:
        timeout = call(make)(lambda: asyncio.timeout(10))
        call(enter)(timeout)
        query()
        call(leave)(timeout)
        return timeout.expired()

    assert in_view(view) is False


def test_a_timeout_that_expires_between_two_calls_cancels_the_next_one() -> None:
    def view() -> Any:
        timeout = call(make)(lambda: asyncio.timeout(None))
        call(enter)(timeout)
        query()
        call(expire_soon)(timeout)
        threading.Event().wait(0.1)
        with pytest.raises(asyncio.CancelledError) as caught:
            call(asyncio.sleep)(10)
        with pytest.raises(TimeoutError):
            call(leave)(timeout, asyncio.CancelledError, caught.value, None)
        return call(cancellations)()

    assert in_view(view) == 0


def test_a_timeout_that_expires_during_a_call() -> None:
    def view() -> Any:
        timeout = call(make)(lambda: asyncio.timeout(0.05))
        call(enter)(timeout)
        with pytest.raises(asyncio.CancelledError) as caught:
            call(asyncio.sleep)(10)
        with pytest.raises(TimeoutError):
            call(leave)(timeout, asyncio.CancelledError, caught.value, None)
        return call(cancellations)()

    assert in_view(view) == 0


def test_a_task_group_entered_in_one_call_and_left_in_another() -> None:
    async def start(group: asyncio.TaskGroup) -> asyncio.Task[int]:
        return group.create_task(asyncio.sleep(0.01, 7))

    def view() -> Any:
        group = asyncio.TaskGroup()
        call(enter)(group)
        task = call(start)(group)
        query()
        call(leave)(group)
        return task.result()

    assert in_view(view) == 7


def test_a_task_group_whose_child_fails_between_two_calls() -> None:
    async def fail() -> None:
        raise ValueError("child")

    async def start(group: asyncio.TaskGroup) -> Any:
        return group.create_task(fail())

    def view() -> Any:
        group = asyncio.TaskGroup()
        call(enter)(group)
        query()
        call(start)(group)
        threading.Event().wait(0.05)
        with pytest.raises(BaseExceptionGroup) as caught:
            call(leave)(group)
        assert isinstance(caught.value.exceptions[0], ValueError)
        # What has been dealt with must not reach the next one.
        call(asyncio.sleep)(0.01)
        return call(cancellations)()

    assert in_view(view) == 0


def test_a_task_group_whose_child_fails_cancels_the_next_call() -> None:
    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise ValueError("child")

    async def start(group: asyncio.TaskGroup) -> Any:
        return group.create_task(fail())

    def view() -> Any:
        group = asyncio.TaskGroup()
        call(enter)(group)
        call(start)(group)
        threading.Event().wait(0.1)
        with pytest.raises(asyncio.CancelledError) as cancelled:
            call(asyncio.sleep)(10)
        with pytest.raises(BaseExceptionGroup):
            call(leave)(group, asyncio.CancelledError, cancelled.value, None)
        call(asyncio.sleep)(0.01)
        return call(cancellations)()

    assert in_view(view) == 0


async def enter_sync(manager: Any) -> Any:
    return manager.__enter__()


async def leave_sync(manager: Any, *exc_info: Any) -> Any:
    return manager.__exit__(*(exc_info or (None, None, None)))


async def scope_expires_soon(scope: anyio.CancelScope) -> None:
    scope.deadline = anyio.current_time() + 0.01


def test_an_anyio_cancel_scope_entered_in_one_call_and_left_in_another() -> None:
    def view() -> Any:
        scope = call(make)(lambda: anyio.CancelScope())
        call(enter_sync)(scope)
        query()
        call(leave_sync)(scope)
        return scope.cancelled_caught

    assert in_view(view) is False


def test_an_anyio_cancel_scope_that_expires_between_two_calls() -> None:
    def view() -> Any:
        scope = call(make)(lambda: anyio.CancelScope())
        call(enter_sync)(scope)
        query()
        call(scope_expires_soon)(scope)
        threading.Event().wait(0.05)
        with pytest.raises(asyncio.CancelledError) as caught:
            call(asyncio.sleep)(10)
        assert call(leave_sync)(scope, asyncio.CancelledError, caught.value, None) is True
        call(asyncio.sleep)(0.01)
        return scope.cancelled_caught, call(cancellations)()

    assert in_view(view) == (True, 0)


def test_a_call_that_cancels_its_own_task_fails_alone() -> None:
    async def cancel_itself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(10)

    def view() -> Any:
        first = call_here()
        with pytest.raises(asyncio.CancelledError):
            call(cancel_itself)()
        call(asyncio.sleep)(0.01)
        assert call_here() == first
        return call(cancellations)()

    assert in_view(view) == 0


def test_a_call_that_cancels_its_own_task_and_returns_answers_and_leaves_nothing_behind() -> None:
    async def cancel_and_return() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return "answer"

    def view() -> Any:
        assert call(cancel_and_return)() == "answer"
        call(asyncio.sleep)(0.01)
        return call(cancellations)()

    assert in_view(view) == 0


def test_a_call_that_swallows_a_cancellation_leaves_nothing_behind() -> None:
    async def swallow() -> str:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.01, task.cancel)
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return "swallowed"
        return "not cancelled"

    def view() -> Any:
        assert call(swallow)() == "swallowed"
        call(asyncio.sleep)(0.01)
        return call(cancellations)()

    assert in_view(view) == 0


def test_a_cancellation_between_two_calls_keeps_its_message() -> None:
    async def cancel_later() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.01, task.cancel, "why")

    def view() -> Any:
        call(cancel_later)()
        threading.Event().wait(0.1)
        with pytest.raises(asyncio.CancelledError, match="why"):
            call(asyncio.sleep)(10)
        # Once only, and the request task goes on.
        call(asyncio.sleep)(0.01)
        return call(cancellations)()

    assert in_view(view) == 0


# --- the context of loop calls -------------------------------------------------------------------------------------

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


async def read() -> str:
    return variable.get()


def test_a_token_made_in_one_call_can_be_used_in_another() -> None:
    async def assign() -> Any:
        return variable.set("async")

    async def reset(token: Any) -> None:
        variable.reset(token)

    other: contextvars.ContextVar[str] = contextvars.ContextVar("other")

    def view() -> Any:
        token = call(assign)()
        # Set and unset in between, as middleware does.
        mine = other.set("mine")
        call(read)()
        other.reset(mine)
        call(reset)(token)
        return variable.get()

    # asgiref can set a variable for the caller of async_to_sync, but not unset it.
    assert in_view(view) in ("async", "unset")


def test_what_sync_code_unsets_between_two_calls_is_unset_in_the_next() -> None:
    def view() -> Any:
        token = variable.set("sync")
        assert call(read)() == "sync"
        variable.reset(token)
        assert call(read)() == "unset"
        return variable.get()

    assert in_view(view) == "unset"


def test_what_a_call_sets_inside_a_context_of_its_own_stays_there() -> None:
    async def assign() -> None:
        variable.set("inner")

    places = []

    def view() -> Any:
        places.append(call_here())
        contextvars.copy_context().run(call(assign))
        places.append(call_here())
        return variable.get(), call(read)()

    assert in_view(view) == ("unset", "unset")
    assert places[0].task is places[1].task


def test_what_a_call_sets_is_seen_by_its_caller_and_the_next_call() -> None:
    async def assign() -> None:
        variable.set("async")

    def view() -> Any:
        call(assign)()
        return variable.get(), call(read)()

    assert in_view(view) == ("async", "async")
