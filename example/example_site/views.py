"""Two pages for people (an async view, a sync view), the same two as probes for tests, and what they recorded."""

import asyncio
import json
from collections.abc import Iterator

from django.http import Http404, HttpRequest, JsonResponse, StreamingHttpResponse
from django.template.loader import render_to_string
from django.utils.html import format_html

from . import journey
from .compare import compare, is_sent_again
from .work import async_work, stream_titles, sync_work


async def front_page(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(page(request, await async_work()))


def front_page_sync(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(page(request, sync_work()))


def page(request: HttpRequest, count: str) -> Iterator[str]:
    yield render_to_string("example_site/page_top.html", {"path": request.path, "count": count.strip()})
    for title in stream_titles():
        yield format_html("<li>{}</li>\n", title)
    yield "</ul>\n"
    if not is_sent_again(request):
        yield render_to_string("example_site/comparison.html", compare(request))
    yield render_to_string("example_site/page_end.html")


async def probe(request: HttpRequest) -> StreamingHttpResponse:
    await async_work()
    return StreamingHttpResponse(report(), content_type="application/jsonl")


def probe_sync(request: HttpRequest) -> StreamingHttpResponse:
    sync_work()
    return StreamingHttpResponse(report(), content_type="application/jsonl")


def report() -> Iterator[str]:
    """Stream the request's steps as lines of JSON, while further ones are made by reading the books."""
    steps = journey.current.get().steps
    told = 0
    for _ in stream_titles():
        for step in steps[told:]:
            yield json.dumps(vars(step)) + "\n"
            told += 1
    for step in steps[told:]:
        yield json.dumps(vars(step)) + "\n"


async def show_journey(request: HttpRequest, journey_id: str) -> JsonResponse:
    """Give all steps of an earlier request to this process, request_finished included."""
    return JsonResponse((await finished_journey(journey_id)).as_json())


async def finished_journey(journey_id: str) -> journey.Journey:
    """Find a journey, and wait for its end: a client has the whole body before the server closes the response."""
    found = journey.find(journey_id)
    if found is None:
        raise Http404("No such journey in this process")
    for _ in range(250):
        if found.finished:
            break
        await asyncio.sleep(0.02)
    return found
