"""A site for the report, whose processes import it: settings, URLs and views, and what it keeps in the module."""

import asyncio
import os

import redis.asyncio
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

import wsgi_loop
from wsgi_loop.bridge.storage import scope_here

from .settings import *  # noqa: F403
from .settings import REDIS_URL

ROOT_URLCONF = __name__
WSGI_LOOP = {"SCOPE": os.environ["REPORT_SCOPE"], "SHUTDOWN_TIMEOUT": 0.5}

client = redis.asyncio.Redis.from_url(REDIS_URL)
left: set[asyncio.Task[None]] = set()
served: list[HttpRequest] = []


async def make_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


future = asyncio.run(make_future())


async def kept_client(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(await client.ping()))


async def imported(request: HttpRequest) -> HttpResponse:
    """Waits for what was made on a loop that ended when this module was imported."""
    await future
    return HttpResponse()


async def own_state(request: HttpRequest) -> HttpResponse:
    """Fails in the process that was started as the report, where what it keeps would be there for both handlers."""
    return HttpResponse(status=503 if os.getppid() == int(os.environ["REPORT_PARENT"]) else 200)


async def background(request: HttpRequest) -> HttpResponse:
    wsgi_loop.create_background_task(asyncio.sleep(600), name="in the background")
    return HttpResponse()


async def leave(request: HttpRequest) -> HttpResponse:
    left.add(asyncio.create_task(asyncio.sleep(600), name="left"))
    return HttpResponse()


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def body():  # type: ignore[no-untyped-def]
        yield b"chunk"

    return StreamingHttpResponse(body())


def worse(request: HttpRequest) -> HttpResponse:
    """Fails with wsgi-loop, but for the first request, which is the one that is counted."""
    served.append(request)
    fails = len(served) > 1 and scope_here() is not None
    return HttpResponse(status=500 if fails else 200)


def end(request: HttpRequest) -> HttpResponse:
    os._exit(7)


urlpatterns = [
    path("kept-client/", kept_client),
    path("own-state/", own_state),
    path("imported/", imported),
    path("background/", background),
    path("leave/", leave),
    path("stream/", stream),
    path("worse/", worse),
    path("end/", end),
]
