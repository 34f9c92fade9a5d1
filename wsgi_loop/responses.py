"""What a WSGI server does with a response, iterating and closing it, done inside its request; and after-close hooks.

Knows Django's responses, and of a request's scope only that it can `run` a function, take a step of an async iterator,
and be closed.

Django sends request_finished as the last act of `HttpResponseBase.close()`, and has no hook after it. Ways to get one:

- `_resource_closers` run before request_finished, and a receiver can not be the last one, for async ones come after it.
- A function set on the instance (`response.close = ...`) closes over the response: a cycle, that keeps response and
  request until the garbage collector comes. With a weak reference to the response there is none, but then nothing
  keeps the response alive where a server holds only `file_to_stream.close`. Nor could it cover `__iter__`.
- A wrapper around the response is no longer Django's response, as a drop-in has to return it.
- A patch of `HttpResponseBase.close` would be everybody's.

So the response's class is replaced by a subclass of it made here, one for each response class, once: `isinstance`, the
attributes and a subclass's own `close()` are as they were, `file_to_stream.close = response.close` is a bound method of
it, and what is wrapped around the response ends up in it. A `close` that a middleware has set on the instance is called
in its place. A copy or a pickle (the cache middleware makes them) is of the plain class, with no hooks. A response that
another request has not closed yet is served as a copy, so that each request has its own.

Django reads an async body to its end under WSGI. Here each step is a loop call, so that all run in the request's task.
What has to be closed at the end is found in the response: a server may have dropped the iterator by then.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from types import AsyncGeneratorType
from typing import Any, Protocol, TypeVar

from django.http import HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.template.response import SimpleTemplateResponse

from .calls import END

logger = logging.getLogger("wsgi_loop")

Response = TypeVar("Response", bound=HttpResponseBase)

_SCOPE = "_wsgi_loop_scope"
_HOOKS = "_wsgi_loop_hooks"
_CLOSE = "_wsgi_loop_close"
_STARTED = "_wsgi_loop_started"


class Scope(Protocol):
    def run(self, function: Callable[..., Any], /, *args: Any) -> Any: ...

    def finish(self, function: Callable[[Any], object], argument: Any, /) -> None: ...

    def advance(self, iterator: AsyncIterator[Any]) -> Any: ...

    def end_body(self, iterator: Any) -> None: ...


def call_after_close(response: HttpResponseBase, hook: Callable[[], object]) -> None:
    """Call `hook` once, after the next `response.close()` has done all of its work, request_finished included.

    Hooks run in the order in which they were registered, inside the request and before its event loop is closed. One
    that raises an Exception is logged, and the next one runs.
    """
    _adopt(response).setdefault(_HOOKS, deque()).append(hook)


def serve_in(response: Response, scope: Scope) -> Response:
    """Have `response` iterated and closed inside `scope`, and `scope` closed after that. Returns what to serve."""
    served = _served_classes.get(type(response))
    attributes = response.__dict__
    if served is None or "close" in attributes:
        _adopt(response)
    else:
        # All that `_adopt` does for nearly every request, which a call of it would make dearer.
        response.__class__ = served
    if attributes.setdefault(_SCOPE, scope) is not scope:
        response = _plain_copy(response)
        _adopt(response)[_SCOPE] = scope
    return response


class ScopedIterator:
    """Takes each step of an iterator inside a scope."""

    def __init__(self, scope: Scope, iterator: Iterator[Any]) -> None:
        self._run = scope.run
        self._iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._run(next, self._iterator)


class AsyncBody:
    """Takes each step of a response's async iterator inside a scope, when the server asks for it."""

    def __init__(self, scope: Scope, response: Any) -> None:
        self._scope = scope
        self._response = response
        self._iterator = response._iterator

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return self._scope.run(self._step)  # type: ignore[no-any-return]

    def _step(self) -> bytes:
        self._response.__dict__[_STARTED] = True
        chunk = self._scope.advance(self._iterator)
        if chunk is END:
            raise StopIteration
        return self._response.make_bytes(chunk)  # type: ignore[no-any-return]


class ScopedIterable:
    """Something else than Django's response, which a tool that patches the handler returns: run and closed the same."""

    def __init__(self, scope: Scope, iterable: Iterable[bytes]) -> None:
        self._scope = scope
        self._iterable = iterable

    def __iter__(self) -> Iterator[bytes]:
        return ScopedIterator(self._scope, self._scope.run(iter, self._iterable))

    def close(self) -> None:
        self._scope.finish(lambda iterable: getattr(iterable, "close", lambda: None)(), self._iterable)


def _adopt(response: Any) -> dict[str, Any]:
    """Make the response one that can be served in a scope. Returns its attributes."""
    cls = type(response)
    served = _served_classes.get(cls)
    if served is None:
        if "_wsgi_loop_plain_class" in cls.__dict__:
            return response.__dict__  # type: ignore[no-any-return]
        served = _make_served_class(cls)
    response.__class__ = served
    attributes: dict[str, Any] = response.__dict__
    if "close" in attributes:
        attributes[_CLOSE] = attributes.pop("close")
    return attributes


_served_classes: dict[type, type] = {}


def _make_served_class(cls: Any) -> type[Any]:
    """Return the subclass of `cls` for responses that are served in a scope.

    `__class__` can be assigned only if the new class has the old one as its single base.
    """
    close_plain = cls.close
    streams = issubclass(cls, StreamingHttpResponse)

    def close(self: HttpResponseBase) -> None:
        # Taken, not read: a close() inside this one, a second one and one on another thread are Django's alone.
        attributes = self.__dict__
        scope: Scope | None = attributes.pop(_SCOPE, None)
        function = _close_and_call if _HOOKS in attributes or _CLOSE in attributes else close_plain
        if scope is None:
            function(self)
        elif streams and self.is_async:  # type: ignore[attr-defined]
            scope.finish(partial(_end_body_and_close, scope, function), self)
        else:
            scope.finish(function, self)

    namespace: dict[str, Any] = {
        "__slots__": (),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": lambda self, protocol: (copy.copy, (_plain_copy(self),)),
        "_wsgi_loop_plain_class": cls,
        "close": close,
    }
    # These two only hand out a list, and run nobody's code.
    if getattr(cls, "__iter__", None) not in (HttpResponse.__iter__, SimpleTemplateResponse.__iter__):
        namespace["__iter__"] = _iter
    served: type[Any] = type(cls)(cls.__name__, (cls,), namespace)
    if len(_served_classes) >= 128:
        # Classes that are made anew in each request must not be kept for ever.
        _served_classes.clear()
    _served_classes[cls] = served
    return served


def _end_body_and_close(scope: Scope, close: Callable[[Any], object], response: Any) -> None:
    """Close an async body before anything else, as the end of the loop that would run it is too late for that."""
    iterator = response._iterator
    try:
        if isinstance(iterator, AsyncGeneratorType):
            open_ = iterator.ag_frame is not None and response.__dict__.pop(_STARTED, False)
        else:
            open_ = hasattr(iterator, "aclose")
        if open_:
            scope.end_body(iterator)
    finally:
        close(response)


def _close_and_call(response: Any) -> None:
    attributes = response.__dict__
    hooks = attributes.pop(_HOOKS, None) or deque()
    try:
        if _CLOSE in attributes:
            attributes[_CLOSE]()
        else:
            response._wsgi_loop_plain_class.close(response)
    finally:
        # With those that receivers of request_finished have registered.
        hooks.extend(attributes.pop(_HOOKS, ()))
        while hooks:
            hook = hooks.popleft()
            try:
                hook()
            except Exception:
                logger.exception("After-close hook %r failed", hook)
            # Hooks that this one has registered are part of the same close.
            hooks.extend(attributes.pop(_HOOKS, ()))


def _iter(self: Any) -> Iterator[Any]:
    scope: Scope | None = self.__dict__.get(_SCOPE)
    iterate = self._wsgi_loop_plain_class.__iter__
    is_async = iterate is StreamingHttpResponse.__iter__ and self.is_async
    if scope is None:
        # A body that is closed is at its end, as a sync generator's is.
        return iter(()) if is_async and self.closed else iterate(self)
    return AsyncBody(scope, self) if is_async else ScopedIterator(scope, scope.run(iterate, self))


def _plain_copy(response: Any) -> Any:
    """Return a shallow copy in the response's plain class, without scope and hooks."""
    plain = object.__new__(response._wsgi_loop_plain_class)
    plain.__dict__.update(response.__dict__)
    for key in (_SCOPE, _HOOKS, _STARTED):
        plain.__dict__.pop(key, None)
    if _CLOSE in plain.__dict__:
        plain.__dict__["close"] = plain.__dict__.pop(_CLOSE)
    return plain
