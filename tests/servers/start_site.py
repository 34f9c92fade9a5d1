"""A Django project in one file whose `LIFESPAN` keeps a journal, and fails if it is told to. Served by `test_start`.

The environment variable FOLDER says where the journal is, and where the files are that tell it to fail or to hang.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from django.http import HttpRequest, HttpResponse
from django.urls import path

FOLDER = Path(os.environ["FOLDER"])

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = __name__
USE_TZ = True
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"]},
}
WSGI_LOOP = {"SCOPE": "process", "LIFESPAN": f"{__name__}.lifespan", "STARTUP_TIMEOUT": 2}


def note(what: str) -> None:
    # One short write that is appended: no process cuts another one's line.
    with (FOLDER / "journal").open("a") as journal:
        journal.write(f"{what} {os.getpid()}\n")


@asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    if (FOLDER / "hang").exists():
        await asyncio.sleep(3600)
    if (FOLDER / "fail").exists():
        raise OSError("password authentication failed")
    note("entered")
    yield
    await asyncio.sleep(0.1)
    note("left")


async def view(request: HttpRequest) -> HttpResponse:
    note("answered")
    return HttpResponse(str(os.getpid()))


async def upload(request: HttpRequest) -> HttpResponse:
    note("reads")
    return HttpResponse(str(len(request.body)))


urlpatterns = [path("", view), path("upload/", upload)]
