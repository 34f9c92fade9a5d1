"""A template tag that needs async code."""

from asgiref.sync import async_to_sync
from django import template

from .. import journey
from ..models import Book

register = template.Library()


@register.simple_tag
def book_count() -> int:
    return async_to_sync(count_books)()


async def count_books() -> int:
    async with journey.step("template tag", "ORM, acount()"):
        return await Book.objects.acount()
