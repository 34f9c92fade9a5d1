"""The `WSGI_LOOP` setting: reads it, and says what is wrong with it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from .loops import LoopFactory

DEFAULTS: dict[str, Any] = {
    "SCOPE": "request",
    "THREAD": "own",
    "LOOP_FACTORY": None,
    "SHUTDOWN_TIMEOUT": 5.0,
}
ACCEPTED = {"SCOPE": ("request",), "THREAD": ("own",)}


@dataclass(frozen=True, slots=True)
class Options:
    """How requests get their event loops.

    loop_factory: makes an event loop. shutdown_timeout: seconds that closing a loop waits for cancelled tasks.
    """

    loop_factory: LoopFactory
    shutdown_timeout: float


def get_options(**overrides: Any) -> Options:
    """Return the options of the `WSGI_LOOP` setting, with `overrides` (in either case) winning over it.

    Raises ImproperlyConfigured, which names the key, its value and what is accepted.
    """
    configured = getattr(settings, "WSGI_LOOP", {})
    if not isinstance(configured, Mapping):
        raise ImproperlyConfigured(f"WSGI_LOOP is {configured!r}. It has to be a dict, such as {DEFAULTS!r}.")
    values = DEFAULTS | _known("WSGI_LOOP", configured) | _known("get_wsgi_application()", overrides, upper=True)
    for key, accepted in ACCEPTED.items():
        if values[key] not in accepted:
            raise _invalid(key, values[key], " or ".join(map(repr, accepted)))
    timeout = values["SHUTDOWN_TIMEOUT"]
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout < math.inf:
        raise _invalid("SHUTDOWN_TIMEOUT", timeout, "a number of seconds, 0 or more")
    return Options(_loop_factory(values["LOOP_FACTORY"]), float(timeout))


def _known(source: str, values: Mapping[Any, Any], upper: bool = False) -> dict[str, Any]:
    known = {key.upper() if upper else key: value for key, value in values.items()}
    for key, value in known.items():
        if key not in DEFAULTS:
            raise ImproperlyConfigured(
                f"{source} has an unknown key, {key!r} (its value is {value!r}). Accepted keys: {', '.join(DEFAULTS)}."
            )
    return known


def _loop_factory(value: Any) -> LoopFactory:
    accepted = "None, or a callable (or the dotted path of one) that takes nothing and returns an event loop"
    if value is None:
        return asyncio.new_event_loop
    factory = value
    if isinstance(value, str):
        try:
            factory = import_string(value)
        except ImportError as exc:
            raise _invalid("LOOP_FACTORY", value, accepted, f"It can't be imported: {exc}.") from exc
    if not callable(factory):
        raise _invalid("LOOP_FACTORY", value, accepted)
    try:
        loop = factory()
    except Exception as exc:
        raise _invalid("LOOP_FACTORY", value, accepted, f"It failed: {type(exc).__name__}: {exc}.") from exc
    if not isinstance(loop, asyncio.AbstractEventLoop):
        if asyncio.iscoroutine(loop):
            loop.close()
        raise _invalid("LOOP_FACTORY", value, accepted, f"It returned {loop!r}.")
    if loop.is_running() or loop.is_closed():
        raise _invalid("LOOP_FACTORY", value, accepted, f"It returned a loop that is not new: {loop!r}.")
    loop.close()
    return factory  # type: ignore[no-any-return]


def _invalid(key: str, value: Any, accepted: str, why: str = "") -> ImproperlyConfigured:
    return ImproperlyConfigured(f"WSGI_LOOP[{key!r}] is {value!r}. Accepted: {accepted}.{why and ' ' + why}")
