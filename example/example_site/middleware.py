"""Two async-only middlewares: the first and the last one of the settings."""

from collections.abc import Awaitable, Callable

from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.decorators import async_only_middleware

from . import journey

GetResponse = Callable[[HttpRequest], Awaitable[HttpResponseBase]]


@async_only_middleware
def journey_header(get_response: GetResponse) -> GetResponse:
    """Tell the client under which id its request was recorded."""

    async def middleware(request: HttpRequest) -> HttpResponseBase:
        async with journey.step("middleware", "journey_header, in"):
            journey_id = journey.current.get().id
        response = await get_response(request)
        async with journey.step("middleware", "journey_header, out"):
            response["Journey-Id"] = journey_id
        return response

    return middleware


@async_only_middleware
def server_timing(get_response: GetResponse) -> GetResponse:
    """Tell the client how long the view took."""

    async def middleware(request: HttpRequest) -> HttpResponseBase:
        async with journey.step("middleware", "server_timing, in"):
            start = journey.current.get().milliseconds()
        response = await get_response(request)
        async with journey.step("middleware", "server_timing, out"):
            response["Server-Timing"] = f"view;dur={journey.current.get().milliseconds() - start:.1f}"
        return response

    return middleware
