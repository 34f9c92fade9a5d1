"""Pages that the toolbar can be inserted in, which the example's streamed ones are not."""

import asyncio

from asgiref.sync import async_to_sync
from django.http import HttpRequest, HttpResponse
from django.urls import include, path
from example_site.work import async_work, sync_work

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
</head><body><h1>{title}</h1></body></html>"""
kept: set[asyncio.Task[None]] = set()


def always(request: HttpRequest) -> bool:
    return True


async def asynchronous(request: HttpRequest) -> HttpResponse:
    await async_work()
    return HttpResponse(PAGE.format(title="An async view"))


def sync(request: HttpRequest) -> HttpResponse:
    sync_work()
    return HttpResponse(PAGE.format(title="A sync view"))


async def forget() -> None:
    task = asyncio.create_task(asyncio.sleep(3600), name="forgotten")
    kept.add(task)
    task.add_done_callback(kept.discard)


def leaky(request: HttpRequest) -> HttpResponse:
    async_to_sync(forget)()
    return HttpResponse(PAGE.format(title="A view that leaves a task running"))


urlpatterns = [
    path("toolbar/async/", asynchronous),
    path("toolbar/sync/", sync),
    path("toolbar/leaky/", leaky),
    path("__debug__/", include("debug_toolbar.urls")),
    path("", include("example_site.urls")),
]
