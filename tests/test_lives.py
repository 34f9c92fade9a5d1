"""Random lives: requests that do anything, served by servers that do anything with them, in any order.

hypothesis draws what each request is to do (a `Plan`), and what the server does with it (the rules of `Lives`). What is
certain whatever happens is checked as it happens, and what is left over after each example: see `Lives.teardown`.

The suite runs a few hundred lives, the same ones each time. WSGI_LOOP_TEST_LIVES=20000 runs so many of each sort, other
ones each time; `-s` shows how many there were.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import gc
import gzip
import io
import itertools
import logging
import os
import queue
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from wsgiref.util import FileWrapper

import anyio
import pytest
from asgiref.sync import AsyncToSync, SyncToAsync, async_to_sync, sync_to_async
from django.core.signals import request_finished, request_started
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule, run_state_machine_as_test

from wsgi_loop import PerLoop, process
from wsgi_loop.event_loop import EventLoop

from .support import Server, environ, here, in_thread, loop_threads, serve

#: How many lives a long run has, of each sort; 0: the suite's few.
LIVES = int(os.environ.get("WSGI_LOOP_TEST_LIVES", "0"))
#: Seconds after which whoever waits for a life takes it for hanging.
HANGS = 60


class Boom(Exception):
    """What code of a request raises."""


class Bang(BaseException):
    """The same, and not an Exception."""


#: The life that a context belongs to. Set when its request starts, and never again.
current: contextvars.ContextVar[Life | None] = contextvars.ContextVar("current", default=None)
#: Set by any code of a request, at any time.
scratch: contextvars.ContextVar[object] = contextvars.ContextVar("scratch", default=None)

# --- what a request does -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """One thing that a request's code does, below so many changes from sync code to async code and back."""

    name: str
    depth: int = 0
    #: What a request that is made inside this one does.
    plan: Plan | None = None

    def __repr__(self) -> str:
        return f"{self.name}*{self.depth}" + (f"({self.plan})" if self.plan else "")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """hypothesis' own way to show what it has drawn takes a second, for a few plans."""
        printer.text(repr(self))


Acts = tuple[Act, ...]


@dataclass(frozen=True)
class Body:
    """kind: plain, file, sync or async (generators), iterator (async, with aclose()).

    held: the async context manager that an async body is in across its chunks. steps: what it does before each chunk.
    """

    kind: str
    steps: tuple[Acts, ...] = ()
    held: str = "nothing"
    end: Acts = ()
    in_finally: Acts = ()


@dataclass(frozen=True)
class Plan:
    """What one request does, from its start to its end. handler: which middleware is around its view."""

    handler: str
    is_async: bool
    started: Acts
    view: Acts
    body: Body
    after: Acts
    finished: Acts
    async_finished: Acts

    def __repr__(self) -> str:
        body = self.body
        parts = {
            "started": self.started,
            "view": self.view,
            "steps": body.steps,
            "end": body.end,
            "finally": body.in_finally,
            "after": self.after,
            "finished": self.finished,
            "async finished": self.async_finished,
        }
        kind = f"{'async' if self.is_async else 'sync'} view, {body.kind} body in {body.held}"
        return f"<{self.handler}, {kind}, " + ", ".join(f"{name} {acts}" for name, acts in parts.items() if acts) + ">"

    _repr_pretty_ = Act._repr_pretty_


PLAIN_ACTS = ("note", "note", "note", "set", "timeout", "resource")
#: Something else can go on while sync code runs, or comes from another thread: a request's loop gets a thread.
SIDE_BY_SIDE = ("gather", "other thread", "to thread", "post", "bound", "task beside")
ROUGH_ACTS = ("raise", "raise base", "cancel", "cancel late", "task", "generator", "dropped generator")


def some_acts(*names: str, most: int = 3) -> st.SearchStrategy[Acts]:
    act = st.tuples(st.sampled_from(names), st.integers(0, 4)).map(lambda drawn: Act(*drawn))
    return st.lists(act, max_size=most).map(tuple)


rough_acts = some_acts(*PLAIN_ACTS, *SIDE_BY_SIDE, *ROUGH_ACTS)
#: Where nobody but the log hears of an exception, or an exception would leave nothing to look at.
mild_acts = some_acts(*PLAIN_ACTS, *SIDE_BY_SIDE, "cancel", "task")
#: Nothing can go on while sync code runs.
calm_acts = some_acts("note", "note", "set", "raise", "dropped generator")
bodies = st.builds(
    Body,
    kind=st.sampled_from(["plain", "file", "sync", "sync", "async", "async", "async", "iterator"]),
    steps=st.lists(rough_acts, max_size=4).map(tuple),
    held=st.sampled_from(["nothing", "timeout", "short timeout", "group", "endless group", "cancel scope"]),
    end=st.sampled_from([(), (), (Act("raise"),), (Act("raise base"),)]),
    in_finally=some_acts(*PLAIN_ACTS, *SIDE_BY_SIDE, "raise", "cancel", "task"),
)
handlers = st.sampled_from(["bare", "sync middleware", "async middleware", "gzip"])


def plans(view_acts: st.SearchStrategy[Acts]) -> st.SearchStrategy[Plan]:
    return st.builds(
        Plan,
        handler=handlers,
        is_async=st.booleans(),
        started=mild_acts,
        view=view_acts,
        body=bodies,
        after=mild_acts,
        finished=rough_acts,
        async_finished=mild_acts,
    )


calm_plans = st.builds(
    Plan,
    handler=handlers,
    is_async=st.booleans(),
    started=some_acts("note", "set"),
    view=calm_acts,
    body=st.builds(
        Body,
        kind=st.sampled_from(["plain", "file", "sync", "async", "iterator"]),
        steps=st.lists(calm_acts, max_size=4).map(tuple),
        in_finally=calm_acts,
    ),
    after=some_acts("note", "set"),
    finished=calm_acts,
    async_finished=st.just(()),
)
inner_plans = plans(rough_acts) | calm_plans
requests_inside = st.builds(
    Act, st.sampled_from(["request", "request left open"]), st.sampled_from([0, 2, 4]), plan=inner_plans
)
all_plans = calm_plans | plans(
    st.tuples(rough_acts, st.none() | st.none() | requests_inside).map(lambda p: (*p[0], *filter(None, p[1:])))
)


@dataclass(eq=False)
class Life:
    """One request: what it is to do, and what was seen of it."""

    plan: Plan
    machine: Lives
    #: Where its loop calls ran that the request thread made outside of any other, and those below them.
    direct: set[tuple[Any, ...]] = field(default_factory=set)
    nested: set[tuple[Any, ...]] = field(default_factory=set)
    #: The thread that its loop was promoted to.
    loop_thread: int | None = None
    #: The threads that a server is in it with.
    inside: list[int] = field(default_factory=list)
    #: Acts that were begun and have not ended. A set is changed by one operation that no other thread gets between.
    busy: set[acting] = field(default_factory=set)
    #: What may come out of it, because some act has raised it.
    may_raise: set[type[BaseException]] = field(default_factory=set)
    #: Those that it leaves. A task holds its context, and that may lead to the request.
    tasks: list[weakref.ref[asyncio.Task[Any]]] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    opened: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    request: weakref.ref[HttpRequest] | None = None
    finished: int = 0
    is_open: bool = False
    is_closed: bool = False
    is_dropped: bool = False
    #: It has closed itself on the loop thread, which waits for nothing: who drops the body then may come too late.
    is_interrupted: bool = False
    #: Two threads close it at once: nobody knows which is first.
    is_raced: bool = False
    #: It was closed while code of it was running: so much is cut off that little is certain but its end.
    is_disturbed: bool = False
    #: The next step of its body waits until it is cut off.
    hold: threading.Event | None = None

    @property
    def is_calm(self) -> bool:
        """Tell if nothing in it can go on while its sync code runs."""
        plan, body = self.plan, self.plan.body
        acts = (*plan.started, *plan.view, *plan.after, *plan.finished, *sum(body.steps, ()), *body.in_finally)
        # The end of an async body that was not read to its end is waited for within a bound.
        return (
            body.kind in ("plain", "file", "sync")
            and not plan.async_finished
            and not body.end
            and ({act.name for act in acts} <= {"note", "set", "raise", "request", "request left open"})
        )

    @property
    def is_certain(self) -> bool:
        return not (self.is_disturbed or self.is_dropped or self.machine.is_stubborn)

    def require(self, condition: object, message: str) -> None:
        """Not an assertion: Django would make an answer of it."""
        if not condition:
            self.machine.failures.append(f"{message}: {self.plan}")

    def accept(self, exc: BaseException) -> None:
        """Require that an exception which a server meets is one that an act has raised."""
        if isinstance(exc, BaseExceptionGroup):
            for part in exc.exceptions:
                self.accept(part)
        elif self.is_certain:
            self.require(type(exc) in self.may_raise, f"{exc!r} is nobody's")


class acting:
    """Around each act: it is counted, and is in the context of its own request."""

    def __init__(self, life: Life, act: Act, is_sync: bool) -> None:
        self.life, self.act, self.is_sync = life, act, is_sync

    def __enter__(self) -> None:
        life = self.life
        life.busy.add(self)
        if life.is_certain:
            found = current.get()
            life.require(found is life, f"{self.act} is in the context of {found and found.plan}")
            if self.is_sync:
                life.require(threading.get_ident() in life.inside, "sync code is not on the request thread")

    def __exit__(self, *exc_info: object) -> None:
        self.life.busy.discard(self)


def do(life: Life, acts: Acts, is_direct: bool = True) -> None:
    """Do these acts in sync code. is_direct: no loop call is waiting further up."""
    for act in acts:
        do_one(life, act, act.depth, is_direct)


async def ado(life: Life, acts: Acts, is_direct: bool = True) -> None:
    """Do these acts in async code."""
    for act in acts:
        await ado_one(life, act, act.depth, is_direct)


def do_one(life: Life, act: Act, depth: int, is_direct: bool) -> None:
    with acting(life, act, True):
        if depth == 0 and act.name in SYNC:
            SYNC[act.name](life, act, is_direct)
        else:
            async_to_sync(ado_one)(life, act, max(depth - 1, 0), is_direct)


async def ado_one(life: Life, act: Act, depth: int, is_direct: bool) -> None:
    with acting(life, act, False):
        if depth == 0 and act.name in ASYNC:
            await ASYNC[act.name](life, is_direct)
        else:
            await sync_to_async(do_one)(life, act, max(depth - 1, 0), False)


async def note(life: Life, is_direct: bool) -> None:
    """See which loop this is, which thread, and in which task."""
    place = await here()
    if life.is_certain:
        life.require(not place.loop.is_closed(), "the loop is closed")
        if not life.machine.is_process:
            look_at_thread(life, place.thread)
            # The request thread is another one at times, as the server likes.
            place = place._replace(thread=0)
        (life.direct if is_direct else life.nested).add(place if is_direct else place[:2])


def look_at_thread(life: Life, thread: int) -> None:
    """Async code runs on a request thread, and from the loop's promotion on on one loop thread."""
    if thread not in life.inside and life.loop_thread is None:
        life.loop_thread = thread
    elif life.loop_thread is not None:
        life.require(thread == life.loop_thread, "async code is not on the loop thread that it was on")


async def gather(life: Life, is_direct: bool) -> None:
    await asyncio.gather(note(life, False), sync_to_async(note_in_sync)(life), note(life, False))


def note_in_sync(life: Life) -> None:
    async_to_sync(note)(life, False)


async def other_thread(life: Life, is_direct: bool) -> None:
    try:
        await sync_to_async(note_in_sync, thread_sensitive=False)(life)
    except asyncio.CancelledError:
        # Nobody waits for its thread, which may not have made its call yet.
        life.is_disturbed = True
        raise


async def bound(life: Life, is_direct: bool) -> None:
    """Have a timer beside sync code."""
    async with asyncio.timeout(HANGS):
        await sync_to_async(note_in_sync)(life)
    await note(life, is_direct)


async def task_beside(life: Life, is_direct: bool) -> None:
    """Have a task go on beside sync code, and end after it."""
    task = asyncio.create_task(note(life, False))
    try:
        await sync_to_async(note_in_sync)(life)
    finally:
        await task
    await note(life, is_direct)


async def to_thread(life: Life, is_direct: bool) -> None:
    """Wait for a thread of the loop's executor, which makes no loop call."""
    await asyncio.to_thread(int)


async def timeout(life: Life, is_direct: bool) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0):
            await asyncio.sleep(HANGS)


async def cancel(life: Life, is_direct: bool) -> None:
    """Swallow a cancellation of its own."""
    life.may_raise.add(asyncio.CancelledError)
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)


async def cancel_late(life: Life, is_direct: bool) -> None:
    """Cancel itself, and not wait for anything."""
    life.may_raise.add(asyncio.CancelledError)
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def leave_task(life: Life, is_direct: bool) -> None:
    """Leave a task that makes calls of all sorts while it ends."""

    async def left_over() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await note(life, False)
            if not life.machine.is_process:
                try:
                    await sync_to_async(note_in_sync)(life)
                except BaseException as exc:
                    # It is certain to be served only while somebody is there to close the request.
                    life.require(not life.is_certain, f"{exc!r} in a task that was left, {life.is_closed=}")

    async def stubborn() -> None:
        # On a loop of asgiref's own, which a call gets when its request's is given up, the call waits for it for ever.
        while isinstance(asyncio.get_running_loop(), CountedLoop) and not life.machine.released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    life.machine.is_quiet = False
    task = asyncio.create_task(stubborn() if life.machine.is_stubborn else left_over())
    life.tasks.append(weakref.ref(task))
    await asyncio.sleep(0)


async def leave_generator(life: Life, is_direct: bool) -> None:
    life.generators.append(an_async_generator(life))
    await anext(life.generators[-1])


async def drop_generator(life: Life, is_direct: bool) -> None:
    async for _ in an_async_generator(life):
        break


async def an_async_generator(life: Life) -> AsyncIterator[int]:
    life.opened.append("generator")
    try:
        yield 1
        yield 2
    finally:
        await asyncio.sleep(0)
        life.left.append("generator")


@contextlib.asynccontextmanager
async def make_resource() -> AsyncIterator[None]:
    opened_resources.append(1)
    try:
        async with asyncio.timeout(3600):
            yield
        await asyncio.sleep(0)
    finally:
        left_resources.append(1)


resource = PerLoop(make_resource)
opened_resources: list[int] = []
left_resources: list[int] = []


async def use_resource(life: Life, is_direct: bool) -> None:
    await resource()


async def ado_post(life: Life, is_direct: bool) -> None:
    """Have sync code wait for a task of the loop that runs it."""
    await sync_to_async(post)(life, asyncio.get_running_loop())


def post(life: Life, loop: asyncio.AbstractEventLoop) -> None:
    future = asyncio.run_coroutine_threadsafe(note(life, False), loop)
    try:
        future.result(HANGS)
    except TimeoutError:
        life.require(False, "what was posted to the loop has no answer")
    except CancelledError:
        # The request was closed meanwhile.
        life.require(not life.is_certain, "what was posted to the loop was cancelled")


async def ado_set(life: Life, is_direct: bool) -> None:
    scratch.set(object())


async def ado_raise(life: Life, is_direct: bool) -> None:
    do_raise(life, Act("raise"), is_direct)


async def ado_raise_base(life: Life, is_direct: bool) -> None:
    do_raise(life, Act("raise base"), is_direct)


ASYNC: dict[str, Callable[[Life, bool], Awaitable[None]]] = {
    "note": note,
    "set": ado_set,
    "gather": gather,
    "other thread": other_thread,
    "to thread": to_thread,
    "post": ado_post,
    "bound": bound,
    "task beside": task_beside,
    "timeout": timeout,
    "resource": use_resource,
    "raise": ado_raise,
    "raise base": ado_raise_base,
    "cancel": cancel,
    "cancel late": cancel_late,
    "task": leave_task,
    "generator": leave_generator,
    "dropped generator": drop_generator,
}


def do_set(life: Life, act: Act, is_direct: bool) -> None:
    scratch.set(object())


def do_raise(life: Life, act: Act, is_direct: bool) -> None:
    kind = Boom if act.name == "raise" else Bang
    life.may_raise.add(kind)
    if "body" in life.left:
        life.machine.is_quiet = False
    raise kind


def do_request(life: Life, act: Act, is_direct: bool) -> None:
    """Serve another request inside this one, on this thread."""
    assert act.plan is not None
    inner = life.machine.begin(act.plan)
    life.machine.open(inner)
    if act.name == "request":
        while life.machine.step(inner):
            pass
        life.machine.close(inner)


SYNC: dict[str, Callable[[Life, Act, bool], None]] = {
    "set": do_set,
    "raise": do_raise,
    "raise base": do_raise,
    "request": do_request,
    "request left open": do_request,
}

# --- the site ------------------------------------------------------------------------------------------------------


def start(sender: Any, environ: dict[str, Any], **kwargs: Any) -> None:
    life: Life = environ["test.life"]
    current.set(life)
    scratch.set(None)
    do(life, life.plan.started)


def finish(**kwargs: Any) -> None:
    life = current.get()
    # None: a second close() is Django's alone, in no request's context.
    if life is not None:
        life.finished += 1
        do(life, life.plan.finished)


async def afinish(**kwargs: Any) -> None:
    life = current.get()
    if life is not None:
        # Django gathers these, so it is a task of its own.
        await ado(life, life.plan.async_finished, is_direct=False)


def view(request: HttpRequest) -> HttpResponseBase:
    life: Life | None = request.META.get("test.life")
    if life is None:  # the first request of a thread
        return HttpResponse()
    life.request = weakref.ref(request)
    is_direct = life.plan.handler != "async middleware"
    if life.plan.is_async:
        return async_to_sync(aview)(life, is_direct)
    do(life, life.plan.view, is_direct)
    return respond(life)


async def aview(life: Life, is_direct: bool) -> HttpResponseBase:
    await ado(life, life.plan.view, is_direct)
    return respond(life)


def middleware(get_response: Any) -> Any:
    def wrap(request: HttpRequest) -> HttpResponseBase:
        response: HttpResponseBase = get_response(request)
        do(request.META["test.life"], request.META["test.life"].plan.after)
        return response

    return wrap


def async_middleware(get_response: Any) -> Any:
    async def wrap(request: HttpRequest) -> HttpResponseBase:
        response: HttpResponseBase = await get_response(request)
        await ado(request.META["test.life"], request.META["test.life"].plan.after)
        return response

    return wrap


async_middleware.async_capable = True  # type: ignore[attr-defined]
async_middleware.sync_capable = False  # type: ignore[attr-defined]

MIDDLEWARE: dict[str, list[Any]] = {
    "bare": [],
    "sync middleware": [middleware],
    "async middleware": [async_middleware],
    "gzip": ["django.middleware.gzip.GZipMiddleware"],
}


def chunk(number: int) -> bytes:
    # Long enough for gzip, and not so uniform that gzip would keep it all to itself.
    return b"%d " % number + bytes((7 * position * position + number) % 251 for position in range(300))


def respond(life: Life) -> HttpResponseBase:
    body = life.plan.body
    if body.kind == "plain":
        return HttpResponse(b"".join(map(chunk, range(len(body.steps)))))
    if body.kind == "file":
        return FileResponse(io.BytesIO(b"".join(map(chunk, range(len(body.steps))))))
    return StreamingHttpResponse({"sync": sync_body, "async": async_body, "iterator": AsyncBody}[body.kind](life))


def sync_body(life: Life) -> Iterator[bytes]:
    body = life.plan.body
    life.opened.append("body")
    try:
        for number, acts in enumerate(body.steps):
            if life.hold is not None:
                async_to_sync(wait_if_held)(life)
            do(life, acts)
            yield chunk(number)
        do(life, body.end)
    finally:
        life.left.append("body")
        if not life.is_dropped:  # it would be outside of the request
            do(life, body.in_finally)


async def async_body(life: Life) -> AsyncIterator[bytes]:
    body = life.plan.body
    life.opened.append("body")
    try:
        async with hold_open(life, body.held) as held:
            for number, acts in enumerate(body.steps):
                await wait_if_held(life)
                await ado(life, acts)
                yield chunk(number)
            await ado(life, body.end)
            if body.held == "endless group":
                held.cancel()
    finally:
        life.left.append("body")
        await ado(life, body.in_finally)


class AsyncBody:
    """The same, and not a generator."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.steps = iter(enumerate(life.plan.body.steps))
        life.opened.append("body")

    def __aiter__(self) -> AsyncBody:
        return self

    async def __anext__(self) -> bytes:
        await wait_if_held(self.life)
        for number, acts in self.steps:
            await ado(self.life, acts)
            return chunk(number)
        await ado(self.life, self.life.plan.body.end)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.life.left.append("body")
        await ado(self.life, self.life.plan.body.in_finally)


async def wait_if_held(life: Life) -> None:
    if life.hold is not None:
        life.hold.set()
        await asyncio.sleep(3600)


@contextlib.asynccontextmanager
async def hold_open(life: Life, held: str) -> AsyncIterator[Any]:
    """What an async body is in from its first chunk to its last."""
    if held == "timeout":
        async with asyncio.timeout(3600):
            yield
    elif held == "short timeout":
        life.may_raise |= {TimeoutError, asyncio.CancelledError}
        async with asyncio.timeout(0.002):
            yield
    elif held == "group":
        async with asyncio.TaskGroup() as group:
            group.create_task(sync_to_async(note_in_sync)(life))
            yield
    elif held == "endless group":
        async with asyncio.TaskGroup() as group:
            yield group.create_task(asyncio.sleep(3600))
    elif held == "cancel scope":
        with anyio.CancelScope():
            yield
    else:
        yield


# --- the server ----------------------------------------------------------------------------------------------------


class ServerThread:
    """A thread of a server, which serves many requests."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any], Any]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def start(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        # From Python 3.14 on it may be a context's own what becomes of warnings.
        shown = [(var, value) for var, value in contextvars.copy_context().items() if var.name == "_warnings_context"]
        self._jobs.put((future, lambda: function(*args), shown))
        return future

    def _work(self) -> None:
        while True:
            future, function, shown = self._jobs.get()
            for var, value in shown:
                var.set(value)
            before = contextvars.copy_context(), dict(SyncToAsync.threadlocal.__dict__)
            try:
                result = function()
                after = contextvars.copy_context(), dict(SyncToAsync.threadlocal.__dict__)
                changed = {var.name for var, value in after[0].items() if before[0].get(var, after) is not value}
                assert not changed, f"the server thread's context has changed after {function}"
                assert after[1] == before[1], "something of asgiref shows on the server thread"
            except BaseException as exc:
                future.set_exception(exc)
                del exc
            else:
                future.set_result(result)
                del result, after
            del future, function, shown, before


def apply(function: Callable[[], Any]) -> Any:
    return function()


def wait_until(condition: Callable[[], Any], otherwise: str) -> None:
    deadline = time.monotonic() + HANGS
    while not condition():
        if time.monotonic() > deadline:
            show_stacks()
            closes = [loop.closes for loop in made_loops]
            raise AssertionError(f"{otherwise}: {loop_threads()}, {other_threads()}, loops closed {closes} times")
        time.sleep(0.001)


def show_stacks() -> None:
    """For whoever has to find out why something hangs."""
    faulthandler.dump_traceback()
    for loop in made_loops:
        for task in () if loop.is_closed() else asyncio.all_tasks(loop):
            task.print_stack(file=sys.stderr)
            print(f"{task.get_name()} awaits {task._fut_waiter}", file=sys.stderr)


def wait_for(future: Future[Any]) -> Any:
    try:
        return future.result(HANGS)
    except TimeoutError:
        show_stacks()
        raise AssertionError("a life hangs") from None


class CountedLoop(EventLoop):
    """A loop that knows whether it was closed, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.closes = 0
        made_loops.append(self)

    def close(self) -> None:
        self.closes += 1
        super().close()


class CountedPlainLoop(CountedLoop):
    """The same, with its selector from the start, as those of asyncio have it."""

    def __init__(self) -> None:
        super().__init__()
        self.make_selector()


made_loops: list[CountedLoop] = []
server_threads = {name: ServerThread(f"server {name}") for name in "ABC"}
server_names = st.sampled_from(sorted(server_threads))
counts: Counter[str] = Counter()


class Records(logging.Handler):
    """What is logged, as text: a record holds frames, and those a request. So does what pytest keeps of it."""

    loggers = tuple(map(logging.getLogger, ("wsgi_loop", "asyncio", "django.request")))

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[tuple[str, str]] = []
        for logger in self.loggers:
            logger.addHandler(self)
            logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append((record.name, self.format(record)))

    def of(self, name: str) -> list[str]:
        return [text for found, text in self.texts if found == name]

    def close(self) -> None:
        for logger in self.loggers:
            logger.removeHandler(self)
            logger.propagate = True
        super().close()


class Watched:
    """Around an example: what must not be there after it."""

    def __init__(self, is_stubborn: bool, is_process: bool) -> None:
        self.is_stubborn = is_stubborn
        self.is_process = is_process
        for found in (made_loops, opened_resources, left_resources, AsyncToSync.loop_thread_executors):
            found.clear()  # type: ignore[attr-defined]
        self.files = open_files()
        self.records = Records()
        self.unraisable: list[Any] = []
        self._hooks = sys.unraisablehook, threading.excepthook
        sys.unraisablehook = self.note
        threading.excepthook = lambda args: self.unraisable.append(f"{args.exc_value!r} in {args.thread!r}")
        self._catcher = warnings.catch_warnings(record=True)
        self.warnings: list[Any] = self._catcher.__enter__()  # type: ignore[assignment]
        warnings.simplefilter("always")

    def note(self, args: Any) -> None:
        # From Python 3.13 on a file that is dropped tells what its close() raised: here receivers of request_finished.
        if not isinstance(args.object, io.IOBase):
            self.unraisable.append(f"{args.exc_value!r} in {args.object!r}")

    def end(self) -> None:
        """Wait for the end of all that was begun, and require that nothing is left over."""
        try:
            gc.collect()
            wait_until(lambda: all(loop.closes for loop in made_loops), "a loop is not closed")
            wait_until(lambda: not loop_threads(), "a loop thread is left over")
            wait_until(lambda: not other_threads(), "a thread is left over")
            gc.collect()
            wait_until(lambda: open_files() <= self.files, "a descriptor is left open")
        finally:
            self._catcher.__exit__(None, None, None)
            sys.unraisablehook, threading.excepthook = self._hooks
            self.records.close()
        assert [loop.closes for loop in made_loops] == [1] * len(made_loops), "a loop was closed twice"
        tasks = [task for loop in made_loops for task in asyncio.all_tasks(loop)]
        # One that was given up stays pending for whoever still holds it, and can not run. So does the request task of a
        # response that was dropped, where it has no thread of its own to end on.
        can_run = [task for task in tasks if task.get_coro().cr_frame is not None]
        assert not (tasks if self.is_process and not self.is_stubborn else can_run), "a task is left"
        if not self.is_stubborn:  # a process loop that was given up stays there
            assert not AsyncToSync.loop_thread_executors, "asgiref was not left as it was found"
        assert self.is_stubborn or len(opened_resources) == len(left_resources), "a resource is left open"
        assert not self.unraisable


def open_files() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/dev/fd"))


def other_threads() -> list[threading.Thread]:
    expected = {*_threads_before, *loop_threads()}
    # Of a thread that `threading` has not started, a trace is left there up to Python 3.12, dead or alive.
    return [thread for thread in threading.enumerate() if thread not in expected and not is_dummy(thread)]


def is_dummy(thread: threading.Thread) -> bool:
    return isinstance(thread, threading._DummyThread)  # type: ignore[attr-defined]


_threads_before: list[threading.Thread] = []

# --- lives ---------------------------------------------------------------------------------------------------------


class Lives(RuleBasedStateMachine):
    """What servers do with requests."""

    scope = "request"
    #: Left-over tasks never end, and are given up after a moment: then little else is certain.
    is_stubborn = False
    handlers: dict[str, Any]

    lives = Bundle("lives")

    def __init__(self) -> None:
        super().__init__()
        self.is_process = self.scope == "process"
        self.failures: list[str] = []
        self.all: list[Life] = []
        #: What the server holds of each. Not held by the life: what is dropped has to be freed.
        self.responses: dict[Life, Any] = {}
        self.chunks: dict[Life, Any] = {}
        self.received: dict[Life, list[bytes]] = {}
        self.released = threading.Event()
        #: Nothing has been done that is logged.
        self.is_quiet = True
        self.drops = 0
        self.watched = Watched(self.is_stubborn, self.is_process)

    @initialize(with_async_receivers=st.booleans())
    def begin_example(self, with_async_receivers: bool) -> None:
        request_started.connect(start, weak=False)
        request_finished.connect(finish, weak=False)
        if with_async_receivers:
            request_finished.connect(afinish, weak=False)

    # --- rules

    @rule(target=lives, plan=all_plans, at=server_names)
    def a_request_comes(self, plan: Plan, at: str) -> Life:
        life = self.begin(plan)
        self.on(at, self.open, life)
        return life

    @rule(life=lives, at=server_names)
    def the_server_takes_a_step(self, life: Life, at: str) -> None:
        self.on(at, self.step, life)

    @rule(life=lives, at=server_names)
    def the_server_takes_all_steps(self, life: Life, at: str) -> None:
        while self.on(at, self.step, life):
            pass

    @rule(life=lives, at=server_names)
    def the_server_closes(self, life: Life, at: str) -> None:
        self.on(at, self.close, life)

    @rule(life=consumes(lives), at=server_names)
    def the_server_forgets(self, life: Life, at: str) -> None:
        self.on(at, self.drop, life)

    @rule(life=lives, threads=st.permutations("ABC"))
    def the_server_closes_while_another_thread_is_in_the_body(self, life: Life, threads: list[str]) -> None:
        if life.is_open and not life.is_closed and life.plan.body.kind not in ("plain", "file"):
            life.is_disturbed = True
            self.is_quiet = False
            life.hold = threading.Event()
            step = server_threads[threads[0]].start(self.step, life)
            wait_until(lambda: life.hold.is_set() or step.done(), "a step hangs")  # type: ignore[union-attr]
            self.on(threads[1], self.close, life)
            wait_for(step)
            life.hold = None

    @rule(life=lives, threads=st.permutations("ABC"))
    def two_threads_close_at_once(self, life: Life, threads: list[str]) -> None:
        life.is_raced = not life.is_closed
        for future in [server_threads[name].start(self.close, life) for name in threads[:2]]:
            wait_for(future)

    @rule(plans=st.lists(all_plans, min_size=2, max_size=3))
    def requests_come_at_once(self, plans: list[Plan]) -> None:
        lives = [self.begin(plan) for plan in plans]
        for future in [
            thread.start(self.serve, life) for thread, life in zip(server_threads.values(), lives, strict=False)
        ]:
            wait_for(future)

    # --- what a server does, on its own thread

    def begin(self, plan: Plan) -> Life:
        counts["lives"] += 1
        life = Life(plan, self)
        self.all.append(life)
        return life

    def on(self, at: str, function: Callable[[Life], Any], life: Life) -> Any:
        return wait_for(server_threads[at].start(function, life))

    def serve(self, life: Life) -> None:
        self.open(life)
        while self.step(life):
            pass
        self.close(life)

    @contextlib.contextmanager
    def inside(self, life: Life) -> Iterator[None]:
        counts["entries"] += 1
        life.inside.append(threading.get_ident())
        try:
            yield
        except StopIteration:
            raise
        except BaseException as exc:
            life.accept(exc)
            # It holds frames, and with them the response.
            exc.__traceback__ = None
            if isinstance(exc, AssertionError):
                raise
        finally:
            life.inside.remove(threading.get_ident())

    def open(self, life: Life) -> None:
        given = environ("/", **{"test.life": life, "HTTP_ACCEPT_ENCODING": "gzip", "wsgi.file_wrapper": FileWrapper})
        with self.inside(life):
            self.responses[life] = self.handlers[life.plan.handler](given, lambda *args: None)
            life.is_open = True

    def step(self, life: Life) -> bool:
        """Ask for the next chunk. Returns whether there may be another one."""
        response = self.responses.get(life)
        if response is None:
            return False
        go_on = False
        # A body that has closed its own response goes on outside of the request, where asgiref leaves its marks.
        run = in_thread if life.is_disturbed and life.is_closed else apply
        try:
            with self.inside(life):
                if life not in self.chunks:
                    self.chunks[life] = iter(response)
                found = run(partial(next, self.chunks[life]))
                self.received.setdefault(life, []).append(found)
                go_on = True
        except StopIteration:
            self.look_at_all(life)
        return go_on

    def look_at_all(self, life: Life) -> None:
        """All chunks have come: each once, in order."""
        response = self.responses[life]
        if life.is_closed or life.may_raise or not life.is_certain or getattr(response, "status_code", 200) != 200:
            return
        content = b"".join(self.received.get(life, ()))
        if getattr(response, "headers", {}).get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        life.require(content == b"".join(map(chunk, range(len(life.plan.body.steps)))), "its body is not all there")

    def close(self, life: Life) -> None:
        response = self.responses.get(life)
        if response is None:
            return
        # The second one is Django's alone, and leaves asgiref's marks in the server thread's context, as in stock.
        is_second = life.is_closed or life.is_raced
        close = partial(contextvars.Context().run, response.close) if is_second else response.close
        life.is_closed = True
        if life.plan.body.kind == "file":
            life.may_raise.add(ValueError)  # for reading on
        with self.inside(life):
            close()

    def drop(self, life: Life) -> None:
        if life.is_open and not life.is_closed:
            life.is_dropped = True
            self.is_quiet = False
        self.chunks.pop(life, None)
        self.responses.pop(life, None)

    # --- the end

    def teardown(self) -> None:
        """Nothing is left over, and what is certain was so."""
        try:
            for life in self.all:
                if not life.is_closed:
                    self.on("A", self.close, life)
            self.responses.clear()
            self.chunks.clear()
            if self.is_process:
                self.end_tasks()
                process.shut_down()
            self.released.set()
        finally:
            for receiver in (start, finish, afinish):
                request_started.disconnect(receiver)
                request_finished.disconnect(receiver)
            self.watched.end()
        for life in self.all:
            self.look_at(life)
        assert not self.failures, "\n".join(self.failures)
        if not self.is_stubborn:
            assert not [text for text in self.watched.records.of("wsgi_loop") if "gave up" in text]
            if all(life.is_certain for life in self.all):
                assert self.watched.records.of("asyncio") == []
            if self.is_quiet:
                assert self.watched.records.of("wsgi_loop") == []
        others = [w for w in self.watched.warnings if "dropped without close()" not in str(w.message)]
        assert not others, "\n".join(str(warning.message) for warning in others)
        assert len(self.watched.warnings) <= sum(life.is_dropped for life in self.all)

    def end_tasks(self) -> None:
        """Those on the process loop go on without their requests, and would be waited for."""
        if not self.is_stubborn:
            for task in (task for life in self.all for ref in life.tasks if (task := ref()) is not None):
                with contextlib.suppress(RuntimeError):  # its loop is closed: the request was dropped
                    task.get_loop().call_soon_threadsafe(task.cancel)

    def never_ended(self, life: Life) -> list[Act]:
        """Those of a loop that was given up are cut off where they stand; but sync code has had its answers."""
        return [acting.act for acting in life.busy if acting.is_sync or not self.is_stubborn]

    def look_at(self, life: Life) -> None:
        life.require(not life.busy, "a loop call was not answered")
        # A file closes itself when it is collected, and its close() may be the response's.
        may_finish = life.is_dropped and life.plan.body.kind == "file"
        finished = life.is_open and not life.is_dropped
        life.require(
            life.finished == finished or (may_finish and life.finished == 1), f"{life.finished} x request_finished"
        )
        life.require(life.request is None or life.request() is None, "its request is not freed")
        life.require(all(task.done() for ref in life.tasks if (task := ref()) is not None), "a task is left over")
        opened, left = Counter(life.opened), Counter(life.left)
        if life.plan.body.kind == "iterator" and (life.plan.handler == "gzip" or not life.is_certain):
            left["body"] = opened["body"]  # Nobody calls aclose() of what a middleware's generator iterates over.
        life.require(
            opened == left or life.is_interrupted or self.is_stubborn, f"{life.opened} were opened, {life.left} left"
        )
        if not self.is_process:
            counts["calm"] += life.is_calm
            counts["promoted"] += life.loop_thread is not None
            if life.is_certain and life.is_calm:
                life.require(life.loop_thread is None, "its loop was promoted for nothing")
        if life.is_certain:
            life.require(len(life.direct) <= 1, f"its loop calls were in several places: {life.direct}")
            places = {place[:2] for place in life.direct} | life.nested
            life.require(len(places) <= 1, f"its loop calls were on several loops or threads: {places}")


@settings(max_examples=1, database=None)
@given(st.none())
def use_hypothesis(_: None) -> None:
    """Its first use asks the collector who refers to an object of its own, which does not look at what is frozen."""


def run_lives(machine: Any, seconds: float = 540) -> None:
    """Run the suite's examples of a machine; or other ones, until there were as many lives as were asked for."""
    few = settings(
        max_examples=machine.examples,
        stateful_step_count=12,
        deadline=None,
        database=None,
        derandomize=not LIVES,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    # asgiref's own, for what has no thread to run on; it never ends.
    SyncToAsync.single_thread_executor.submit(int).result()
    _threads_before[:] = [thread for thread in threading.enumerate() if thread not in loop_threads()]
    logging.disable(logging.NOTSET)
    counts.clear()
    deadline = time.monotonic() + seconds
    use_hypothesis()
    gc.collect()
    # What is there now need not be looked at after each example.
    gc.freeze()
    try:
        for number in itertools.count(int(time.time())):
            run_state_machine_as_test(seed(number)(machine) if LIVES else machine, settings=few)
            if counts["lives"] >= LIVES or time.monotonic() > deadline:
                break
    finally:
        gc.unfreeze()
        print(f"{machine.__name__} in scope {machine.scope}: {dict(counts)}")


# Tasks that never end are for the long runs: what is certain then depends on how fast the machine is.
@pytest.mark.parametrize("is_stubborn", [False, True] if LIVES else [False], ids=["", "stubborn"][: 1 + bool(LIVES)])
@pytest.mark.parametrize("scope", ["request", "process"])
def test_lives(scope: str, is_stubborn: bool, new_process_loop: None) -> None:
    options = {
        "scope": scope,
        "shutdown_timeout": 0.05 if is_stubborn else 30,
    }
    factories = {name: CountedPlainLoop if "middleware" in name else CountedLoop for name in MIDDLEWARE}
    with contextlib.ExitStack() as stack:
        handlers = {
            name: stack.enter_context(
                serve(view, middleware=functions, loop_factory=factories[name], **options)
            ).handler
            for name, functions in MIDDLEWARE.items()
        }
        for thread in server_threads.values():  # the first request of each prepares it
            thread.start(Server(handlers["bare"]).get)
        attributes = {
            "scope": scope,
            "is_stubborn": is_stubborn,
            "handlers": handlers,
            "examples": 5 if is_stubborn else 40,
        }
        run_lives(type("Lives", (Lives,), attributes))
