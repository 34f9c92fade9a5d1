"""The `WSGI_LOOP` setting: reads it, and says what is wrong with it."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from .event_loop import default_factory
from .loops import LoopFactory
from .resources import AsyncContextFactory

DEFAULTS: dict[str, Any] = {
    "SCOPE": "request",
    "LOOP_FACTORY": None,
    "SHUTDOWN_TIMEOUT": 5.0,
    "LIFESPAN": None,
    "STARTUP_TIMEOUT": 20.0,
    "MAX_BACKGROUND_TASKS": 100,
    "BLOCKED_AFTER": 1.0,
}
ACCEPTED = {"SCOPE": ("request", "process")}


class GivenOptions(TypedDict, total=False):
    """What can be given to a call. Capital letters, as in the setting, are accepted too."""

    scope: Literal["request", "process"]
    loop_factory: str | LoopFactory | None
    shutdown_timeout: float
    lifespan: str | AsyncContextFactory | None
    startup_timeout: float
    max_background_tasks: int
    blocked_after: float | None


@dataclass(frozen=True, slots=True)
class Options:
    """How requests get their event loops.

    scope: "request" or "process". loop_factory: makes an event loop. shutdown_timeout: seconds that closing a loop
    waits for cancelled tasks. lifespan: makes what is held open for as long as the process loop runs. startup_timeout:
    seconds that it has to be entered. max_background_tasks: how many may be in flight in a process. blocked_after:
    seconds that the process loop may stand still before that is logged; None if it may do so for ever.
    """

    scope: str
    loop_factory: LoopFactory
    shutdown_timeout: float
    lifespan: AsyncContextFactory | None
    startup_timeout: float
    max_background_tasks: int
    blocked_after: float | None
    #: For tests: where the background tasks go that async code of a request starts, who runs them inside the request.
    inline_tasks: list[asyncio.Task[Any]] | None = None


def get_options(source: str = "get_wsgi_application()", /, **overrides: Any) -> Options:
    """Return the options of the `WSGI_LOOP` setting, with `overrides` (in either case) winning over it.

    source: what the overrides were given to.

    Raises ImproperlyConfigured, which names the key, its value and what is accepted.
    """
    configured = getattr(settings, "WSGI_LOOP", {})
    if not isinstance(configured, Mapping):
        raise ImproperlyConfigured(f"WSGI_LOOP is {configured!r}. It has to be a dict, such as {DEFAULTS!r}.")
    given = _known(source, overrides, upper=True)
    values = DEFAULTS | _known("WSGI_LOOP", configured) | given
    #: What to call each in an error.
    names = {key: f"{source[:-1]}{key.lower()}=…)" if key in given else f"WSGI_LOOP[{key!r}]" for key in DEFAULTS}
    # What is configured is for the scope that is configured.
    if given.get("SCOPE") == "request" and "LIFESPAN" not in given:
        values["LIFESPAN"] = None
    for key, accepted in ACCEPTED.items():
        if values[key] not in accepted:
            raise _invalid(names[key], values[key], " or ".join(map(repr, accepted)))
    if not _is_number(values["SHUTDOWN_TIMEOUT"]):
        raise _invalid(names["SHUTDOWN_TIMEOUT"], values["SHUTDOWN_TIMEOUT"], "a number of seconds, 0 or more")
    if not _is_number(values["STARTUP_TIMEOUT"]) or values["STARTUP_TIMEOUT"] == 0:
        raise _invalid(names["STARTUP_TIMEOUT"], values["STARTUP_TIMEOUT"], "a number of seconds, more than 0")
    most = values["MAX_BACKGROUND_TASKS"]
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise _invalid(names["MAX_BACKGROUND_TASKS"], most, "a whole number, 1 or more")
    blocked_after = values["BLOCKED_AFTER"]
    if blocked_after is not None and (not _is_number(blocked_after) or blocked_after == 0):
        raise _invalid(names["BLOCKED_AFTER"], blocked_after, "a number of seconds, more than 0, or None")
    lifespan = values["LIFESPAN"]
    if lifespan is not None and values["SCOPE"] != "process":
        raise _invalid(
            names["LIFESPAN"], lifespan, "None in scope 'request', which has no process loop to hold it open"
        )
    return Options(
        scope=values["SCOPE"],
        loop_factory=_loop_factory(names["LOOP_FACTORY"], values["LOOP_FACTORY"]),
        shutdown_timeout=float(values["SHUTDOWN_TIMEOUT"]),
        lifespan=_lifespan(names["LIFESPAN"], lifespan),
        startup_timeout=float(values["STARTUP_TIMEOUT"]),
        max_background_tasks=most,
        blocked_after=blocked_after,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _known(source: str, values: Mapping[Any, Any], upper: bool = False) -> dict[str, Any]:
    known = {key.upper() if upper else key: value for key, value in values.items()}
    for key, value in known.items():
        if key not in DEFAULTS:
            raise ImproperlyConfigured(
                f"{source} has an unknown key, {key!r} (its value is {value!r}). Accepted keys: {', '.join(DEFAULTS)}."
            )
    return known


def _loop_factory(name: str, value: Any) -> LoopFactory:
    if value is None:
        return default_factory()
    accepted = "None, or a callable (or the dotted path of one) that takes nothing and returns an event loop"
    factory: LoopFactory = _callable(name, value, accepted)
    try:
        loop = factory()
    except Exception as exc:
        raise _invalid(name, value, accepted, f"It failed: {type(exc).__name__}: {exc}.") from exc
    if not isinstance(loop, asyncio.AbstractEventLoop):
        if asyncio.iscoroutine(loop):
            loop.close()
        raise _invalid(name, value, accepted, f"It returned {loop!r}.")
    if loop.is_running() or loop.is_closed():
        raise _invalid(name, value, accepted, f"It returned a loop that is not new: {loop!r}.")
    loop.close()
    return factory


def _lifespan(name: str, value: Any) -> AsyncContextFactory | None:
    """It is not called before the process loop starts: it may connect to other servers."""
    if value is None:
        return None
    accepted = "None, or a callable (or the dotted path of one) that takes nothing and returns an async context manager"
    lifespan: AsyncContextFactory = _callable(name, value, accepted)
    if inspect.isasyncgenfunction(lifespan):
        raise _invalid(name, value, accepted, "It lacks the decorator contextlib.asynccontextmanager.")
    if inspect.iscoroutinefunction(lifespan):
        raise _invalid(name, value, accepted, "It returns a coroutine.")
    if inspect.isgeneratorfunction(inspect.unwrap(lifespan)):
        raise _invalid(name, value, accepted, "It is sync: write it with async def.")
    if inspect.isclass(lifespan) and not issubclass(lifespan, AbstractAsyncContextManager):
        raise _invalid(name, value, accepted, "Objects of this class have no __aenter__ and __aexit__.")
    return lifespan


def _callable(name: str, value: Any, accepted: str) -> Any:
    found = value
    if isinstance(value, str):
        try:
            found = import_string(value)
        except ImportError as exc:
            raise _invalid(name, value, accepted, f"It can't be imported: {exc}.") from exc
    if not callable(found):
        raise _invalid(name, value, accepted)
    return found


def _invalid(name: str, value: Any, accepted: str, why: str = "") -> ImproperlyConfigured:
    return ImproperlyConfigured(f"{name} is {value!r}. Accepted: {accepted}.{why and ' ' + why}")
