"""The site that every contender serves: views, middleware, signal receivers and data. Knows nothing of contenders."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.core.signals import request_finished, request_started
from django.db import connection
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.urls import path
from django.utils.decorators import async_only_middleware
from redis.asyncio import Redis

from .settings import CONTENDER, RUN, SLOW_URL, WORKLOAD
from .workloads import CHUNK_SIZE, REDIS_URL, STREAM_SIZE, redis_keys

GetResponse = Callable[[HttpRequest], Awaitable[HttpResponseBase]]

USERS = 10
CALLS = 10
KEYS = redis_keys(RUN)

#: To make one takes some 20 ms, and it is bound to no loop: whoever makes a client per request would keep it.
_tls = functools.cache(httpx.create_ssl_context)


def sync_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse("plain")


async def async_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse("plain")


async def nothing() -> None:
    pass


def calls_of_async(request: HttpRequest) -> HttpResponse:
    for _ in range(3):
        async_to_sync(nothing)()
    return HttpResponse("plain")


async def calls(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(sum([await sync_to_async(int)("1") for _ in range(5)])))


async def orm(request: HttpRequest) -> HttpResponse:
    first = await User.objects.aget(username="user0")
    second = await User.objects.aget(pk=first.pk)
    third = await User.objects.aget(username="user1")
    assert first == second != third
    return HttpResponse(str(await User.objects.acount() + await User.objects.acount()))


def sync_orm(request: HttpRequest) -> HttpResponse:
    """The queries of `orm`, in a sync view."""
    first = User.objects.get(username="user0")
    second = User.objects.get(pk=first.pk)
    third = User.objects.get(username="user1")
    assert first == second != third
    return HttpResponse(str(User.objects.count() + User.objects.count()))


async def gather(request: HttpRequest) -> HttpResponse:
    await asyncio.gather(sync_to_async(time.sleep)(0.1), _wait_ten_times())
    return HttpResponse("plain")


async def _wait_ten_times() -> None:
    for _ in range(10):
        await asyncio.sleep(0.01)


def http_client() -> httpx.AsyncClient:
    return httpx.AsyncClient(verify=_tls(), timeout=30, trust_env=False)


kept_http_client = functools.cache(http_client)


async def fanout(request: HttpRequest) -> HttpResponse:
    if CONTENDER.keeps_clients:
        return await _call_out(kept_http_client())
    async with http_client() as client:
        return await _call_out(client)


async def _call_out(client: httpx.AsyncClient) -> HttpResponse:
    answers = await asyncio.gather(*(client.get(SLOW_URL) for _ in range(CALLS)))
    return HttpResponse(str(sum(answer.text == "ok" for answer in answers)))


def redis_client() -> Redis:
    return Redis.from_url(REDIS_URL)


kept_redis_client = functools.cache(redis_client)


async def redis(request: HttpRequest) -> HttpResponse:
    if CONTENDER.keeps_clients:
        return await _get_all(kept_redis_client())
    async with redis_client() as client:
        return await _get_all(client)


async def _get_all(client: Redis) -> HttpResponse:
    return HttpResponse([await client.get(key) for key in KEYS])


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(STREAM_SIZE // CHUNK_SIZE):
            # Made anew each time, as a stream's data would be: who keeps them all has to have the memory.
            yield b"." * CHUNK_SIZE

    return StreamingHttpResponse(chunks())


async def growth(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(len([user async for user in User.objects.all().aiterator()])))


urlpatterns = [
    path("sync/", sync_view),
    path("async/", async_view),
    path("async-to-sync/", calls_of_async),
    path("calls/", calls),
    path("orm/", orm),
    path("orm-sync/", sync_orm),
    path("gather/", gather),
    path("fanout/", fanout),
    path("redis/", redis),
    path("stream/", stream),
    path("growth/", growth),
]


@async_only_middleware
def async_middleware(get_response: GetResponse) -> GetResponse:
    async def middleware(request: HttpRequest) -> HttpResponseBase:
        return await get_response(request)

    return middleware


async def first_receiver(**kwargs: Any) -> None:
    pass


async def second_receiver(**kwargs: Any) -> None:
    pass


if WORKLOAD.middleware == "stack":
    for signal in (request_started, request_finished):
        signal.connect(first_receiver)
        signal.connect(second_receiver)


def make_data() -> None:
    """Make the database anew, with its users."""
    connection.creation.create_test_db(verbosity=0, autoclobber=True, serialize=False)
    User.objects.bulk_create(User(username=f"user{number}") for number in range(USERS))
    connection.close()


def remove_data() -> None:
    connection.creation.destroy_test_db(verbosity=0)
