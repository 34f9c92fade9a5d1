"""Receivers of both request signals. Django gathers the async ones of a signal in one loop call."""

import asyncio
from typing import Any

from django.core.signals import request_finished, request_started
from django.dispatch import receiver

from . import journey


@receiver(request_started)
def begin_journey(sender: type, environ: dict[str, Any], **kwargs: Any) -> None:
    journey.begin(sender, environ.get("PATH_INFO", ""))


@receiver(request_started)
async def started(**kwargs: Any) -> None:
    async with journey.step("request_started", "async receiver"):
        await asyncio.sleep(0)


@receiver(request_finished)
async def finished(**kwargs: Any) -> None:
    async with journey.step("request_finished", "async receiver"):
        await asyncio.sleep(0)
    journey.current.get().finished = True
