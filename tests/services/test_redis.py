"""Promise 3, on a real redis: a request does not open its own cache connections."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import pytest
import redis
from django.conf import settings
from django.core.cache import cache, caches
from django.core.handlers.wsgi import WSGIHandler as DjangoHandler
from django.http import HttpRequest, HttpResponse

import wsgi_loop

from ..support import in_thread, serve

REQUESTS = 500

CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": settings.REDIS_URL,
        "KEY_PREFIX": "wsgi-loop-tests",
    }
}


class NaiveHandler(DjangoHandler):
    """A context for each request, and no thought given to what Django keeps per thread."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        return contextvars.copy_context().run(super().__call__, environ, start_response)


def sync_view(request: HttpRequest) -> HttpResponse:
    cache.get("key")
    return HttpResponse()


async def async_view(request: HttpRequest) -> HttpResponse:
    await cache.aget("key")
    return HttpResponse()


def opened_connections(redis_server: redis.Redis, handler: Any, view: Any) -> int:
    """The connections opened by many requests on one new server thread."""

    def one_thread() -> int:
        with serve(view, handler=handler, CACHES=CACHES) as application:
            before = redis_server.info("stats")["total_connections_received"]
            for _ in range(REQUESTS):
                application.get()
            return redis_server.info("stats")["total_connections_received"] - before

    # Another user of the same redis can only add to the count.
    return min(in_thread(one_thread) for _ in range(2))


@pytest.mark.parametrize("view", [sync_view, async_view])
def test_requests_open_no_more_connections_than_with_djangos_handler(redis_server: redis.Redis, view: Any) -> None:
    stock = opened_connections(redis_server, DjangoHandler, view)
    ours = opened_connections(redis_server, wsgi_loop.WSGIHandler, view)
    assert ours <= stock, f"{ours} connections for {REQUESTS} requests, stock: {stock}"


def test_a_context_of_its_own_alone_would_open_a_connection_for_each_request(redis_server: redis.Redis) -> None:
    # What the test above is there to notice.
    assert opened_connections(redis_server, NaiveHandler, sync_view) >= REQUESTS


def test_each_thread_has_one_cache_object_that_all_of_its_requests_share(redis_server: redis.Redis) -> None:
    seen: list[Any] = []

    def look(request: HttpRequest) -> HttpResponse:
        caches["default"].set("key", "value")
        seen.append(caches["default"])
        return HttpResponse()

    def on_one_thread() -> None:
        for _ in range(2):
            application.get()

    with serve(look, CACHES=CACHES) as application:
        in_thread(on_one_thread)
        in_thread(on_one_thread)
        in_thread(lambda: caches["default"].delete("key"))
    first, second, third, fourth = seen
    assert first is second
    assert third is fourth
    assert first is not third
