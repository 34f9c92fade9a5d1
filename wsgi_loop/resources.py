"""Async resources that live as long as their event loop: `PerLoop`, and the keepers that hold them open.

Knows asyncio, and nothing of Django, requests or threads. A loop of ours closes its keepers when its tasks have ended
(`Keepers.leave`). `asyncio.run`, or an ASGI server, cancels all tasks at the loop's end, and with them the keepers.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")
AsyncContextFactory = Callable[[], AbstractAsyncContextManager[Any]]

logger = logging.getLogger("wsgi_loop")


class PerLoop(Generic[T]):
    """An async resource of which each event loop has its own, opened at its first use and closed with the loop.

    factory: called on the loop, with nothing; returns an async context manager, such as a client of httpx or redis. It
    is entered and left in one task, so it may hold a task group, and in an empty context.

        client = PerLoop(httpx.AsyncClient)

        async def view(request):
            response = await (await client()).get("https://example.com/")

    In scope "request" that is one client for each request, in scope "process" one for each worker. Under
    `asyncio.run`, or an ASGI server, it is one for each loop as well.
    """

    def __init__(self, factory: Callable[[], AbstractAsyncContextManager[T]]) -> None:
        if not callable(factory):
            raise TypeError(
                f"PerLoop() takes a callable that returns an async context manager, such as httpx.AsyncClient, not "
                f"{factory!r}."
            )
        self._factory = factory

    def __repr__(self) -> str:
        # A copy that is being made has none yet.
        factory = self.__dict__.get("_factory")
        return f"PerLoop({getattr(factory, '__qualname__', factory)})"

    def __await__(self) -> NoReturn:
        raise TypeError(f"{self!r} is called for the running loop's resource: await client(), not await client.")

    def __getattr__(self, name: str) -> NoReturn:
        # Names with an underscore are asked of any object, such as by copy and inspect.
        hint = "" if name.startswith("_") else f" It is called for the running loop's resource: (await client()).{name}"
        raise AttributeError(f"{self!r} has no attribute {name!r}.{hint}", name=name, obj=self)

    async def __call__(self) -> T:
        """Return the running loop's resource: what its `async with` gives.

        Raises what the factory raises, which is then called again at the next use; TypeError if it returns no async
        context manager; and RuntimeError when the loop is closing and has closed its resources.
        """
        value: T = await keepers_of(asyncio.get_running_loop()).get(self, self._factory)
        return value


class Keeper:
    """A task that enters an async context manager, holds it open, and leaves it."""

    def __init__(self, keepers: Keepers, key: Hashable, factory: AsyncContextFactory) -> None:
        loop = asyncio.get_running_loop()
        self.entered: asyncio.Future[Any] = loop.create_future()
        self._time_to_leave: asyncio.Future[None] = loop.create_future()
        context = contextvars.Context()
        context.run(kept.set, loop)
        self.task = loop.create_task(self._keep(keepers, key, factory), name=f"keeper of {key}", context=context)
        # Also when it is cancelled before its first step, when none of its own code runs.
        self.task.add_done_callback(lambda _: self._end(keepers, key), context=contextvars.Context())

    def leave(self) -> None:
        """Ask it to end; what has not been entered yet is cancelled."""
        if self.entered.done():
            if not self._time_to_leave.done():
                self._time_to_leave.set_result(None)
        else:
            self.task.cancel()

    def _end(self, keepers: Keepers, key: Hashable) -> None:
        self.entered.cancel()
        keepers.forget(key, self)

    async def _keep(self, keepers: Keepers, key: Hashable, factory: AsyncContextFactory) -> None:
        try:
            try:
                manager = factory()
            except StopIteration as exc:
                # Which a future refuses to hold.
                raise RuntimeError(f"The factory of {key} raised StopIteration") from exc
            if not hasattr(manager, "__aenter__") or not hasattr(manager, "__aexit__"):
                if asyncio.iscoroutine(manager):
                    manager.close()
                raise TypeError(f"The factory of {key} returned {manager!r}, which is not an async context manager.")
            async with manager as value:
                self.entered.set_result(value)
                del value
                keepers.put_last(key)
                try:
                    await self._time_to_leave
                except asyncio.CancelledError:
                    # By whoever ends all tasks of the loop: what was entered later may use this one.
                    later = {keeper.task for keeper in keepers.entered_after(self) if keeper.task.cancelling()}
                    if later:
                        await asyncio.wait(later)
                    raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # Else something that the resource waited for was cancelled.
                if keepers.end_with_tasks:
                    keepers.closed = True
                elif not keepers.closed:
                    logger.error(
                        "%s was closed, because its task was cancelled. Cancel tasks of your own alone, and not all "
                        "those of asyncio.all_tasks().",
                        key,
                    )
            self.entered.cancel()
            raise
        except BaseException as exc:
            if not self.entered.done():
                self.entered.set_exception(exc)
            else:
                logger.exception("%s failed while it was open, or when it was closed", key)
            if not isinstance(exc, Exception):
                raise
        finally:
            keepers.forget(key, self)


class Keepers:
    """The keepers of one loop, in the order in which they were entered. Used by whoever runs the loop, alone."""

    def __init__(self) -> None:
        #: Whoever cancels them ends the loop. Not so where the loop's end is by `leave`, and many share it.
        self.end_with_tasks = True
        #: Nothing can be entered any more.
        self.closed = False
        #: And all that was entered has been left.
        self.have_left = False
        self._keepers: dict[Hashable, Keeper] = {}

    async def get(self, key: Hashable, factory: AsyncContextFactory) -> Any:
        """Return what the async context manager gives, which the first use enters."""
        keeper = self._keepers.get(key)
        if keeper is None:
            if self.closed:
                raise RuntimeError(
                    f"{key} was used when its event loop had closed it. Use it before the request or the process ends."
                )
            keeper = Keeper(self, key, factory)
            if not keeper.task.done():  # an eager one may have failed
                self._keepers[key] = keeper
        if keeper.entered.done():
            return keeper.entered.result()
        # One that waits may be cancelled; the others go on waiting.
        return await asyncio.shield(keeper.entered)

    async def leave(self, deadline: float) -> None:
        """Leave them all, the last one first. Raises TimeoutError at `deadline`, a time of the loop."""
        self.closed = True
        while self._keepers:
            keepers = list(self._keepers.values())
            # One that is still being entered may use what has been entered.
            keeper = ([keeper for keeper in keepers if not keeper.entered.done()] or keepers)[-1]
            keeper.leave()
            await asyncio.wait({keeper.task}, timeout=max(deadline - asyncio.get_running_loop().time(), 0))
            if not keeper.task.done():
                raise TimeoutError
        self.have_left = True

    def idle(self) -> set[asyncio.Task[Any]]:
        return {keeper.task for keeper in self._keepers.values() if keeper.entered.done()}

    def entered_after(self, keeper: Keeper) -> list[Keeper]:
        keepers = list(self._keepers.values())
        return keepers[keepers.index(keeper) + 1 :]

    def put_last(self, key: Hashable) -> None:
        """It has been entered: after all that it has used for that."""
        if key in self._keepers:  # not yet, with eager tasks
            self._keepers[key] = self._keepers.pop(key)

    def forget(self, key: Hashable, keeper: Keeper) -> None:
        if self._keepers.get(key) is keeper:
            del self._keepers[key]

    def drop(self) -> None:
        """The loop is closed; what has not been left by now never will be."""
        self.closed = True
        self._keepers.clear()


#: The loop, in a keeper's context, and so in that of all tasks which its resource starts.
kept: contextvars.ContextVar[asyncio.AbstractEventLoop | None] = contextvars.ContextVar("wsgi_loop.kept", default=None)

# No lock: only a loop's own thread asks for its keepers. A loop is held by its keepers until they have left.
_keepers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Keepers] = weakref.WeakKeyDictionary()


def keepers_of(loop: asyncio.AbstractEventLoop) -> Keepers:
    """Return the keepers of `loop`. To be called on its thread."""
    keepers = _keepers.get(loop)
    if keepers is None:
        keepers = _keepers[loop] = Keepers()
    return keepers


def drop_keepers(loop: asyncio.AbstractEventLoop) -> None:
    """Have the keepers of a loop that is about to be closed let go of what they hold, if it has any."""
    keepers = _keepers.get(loop)
    if keepers is not None:
        keepers.drop()


def idle_keepers(loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
    """Return the keepers that wait for nothing but the loop's end."""
    keepers = _keepers.get(loop)
    return set() if keepers is None else keepers.idle()


def context_of(task: asyncio.Task[Any]) -> contextvars.Context | None:
    if hasattr(task, "get_context"):  # from Python 3.12 on
        return task.get_context()  # type: ignore[no-any-return]
    # Python 3.11 does not tell, but a task holds its context.
    return next((held for held in gc.get_referents(task) if isinstance(held, contextvars.Context)), None)


def is_kept(task: asyncio.Task[Any]) -> bool:
    """Tell if the task is a keeper, or was started by what a keeper holds open."""
    context = context_of(task)
    return context is not None and context.get(kept) is not None
