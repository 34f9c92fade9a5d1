"""What the views do: the same things that any project does in async code, each of them a step of the journey."""

import asyncio
from collections.abc import Iterator

from asgiref.sync import async_to_sync, sync_to_async
from django.template.loader import render_to_string

from . import journey
from .models import Book


async def async_work() -> str:
    """Do an async view's work, and return a piece of the page."""
    async with journey.step("view", "ORM, afirst()"):
        await Book.objects.afirst()
    await asyncio.gather(list_books("gather: "), wait("gather: "))
    await sync_to_async(sync_below_async)()
    return await sync_to_async(render_to_string)("example_site/count.html")


def sync_work() -> str:
    """Do a sync view's work, in three calls of async_to_sync, and return a piece of the page."""
    async_to_sync(list_books)()
    async_to_sync(wait)()
    async_to_sync(sync_to_async(sync_below_async))()
    return render_to_string("example_site/count.html")


async def list_books(how: str = "") -> list[Book]:
    async with journey.step("view", f"{how}ORM, async for"):
        return [book async for book in Book.objects.all()]


async def wait(how: str = "") -> None:
    async with journey.step("view", f"{how}sleep()"):
        await asyncio.sleep(0.002)


def sync_below_async() -> None:
    async_to_sync(async_below_sync)()


async def async_below_sync() -> None:
    async with journey.step("nested", "async in sync in async"):
        await asyncio.sleep(0)


def stream_titles() -> Iterator[str]:
    """Read the books one by one, each in a loop call of its own that is made as the body is iterated."""
    position = 0
    try:
        while book := async_to_sync(read_book)(position):
            yield f"{book.title}, {book.year}"
            position += 1
    finally:
        async_to_sync(clean_up)()


async def read_book(position: int) -> Book | None:
    async with journey.step("body", f"ORM, afirst(), book {position + 1}"):
        return await Book.objects.all()[position : position + 1].afirst()


async def clean_up() -> None:
    async with journey.step("body", "finally"):
        await asyncio.sleep(0)
