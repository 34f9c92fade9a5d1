"""A Django project in one file, that exports a table of 200 columns as CSV: with an async generator, and a sync one.

Served by `test_streaming`, which tells it through the environment variable SITE where everything is. `folder` is where
it leaves files for the test.
"""

from __future__ import annotations

import asyncio
import csv
import functools
import io
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from asgiref.sync import sync_to_async
from django.core.signals import request_finished
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path

SITE: dict[str, Any] = json.loads(os.environ["SITE"])
FOLDER = Path(SITE["folder"])
TABLE = "grid"
COLUMNS = 200
CHUNK = 64 * 1024


def leave_note(name: str, value: object = None) -> None:
    """All at once, so that whoever sees the file can read it."""
    new = FOLDER / f"{name}.new"
    new.write_text(json.dumps(value))
    new.rename(FOLDER / name)


# --- settings ----------------------------------------------------------------------------------------------------

SECRET_KEY = "not a secret"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = __name__
USE_TZ = True
_url = urlsplit(SITE["postgres"])
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _url.path[1:],
        "USER": _url.username or "",
        "PASSWORD": _url.password or "",
        "HOST": _url.hostname or "",
        "PORT": str(_url.port or ""),
        # A cursor that is not closed is to be seen, and not to go with its connection.
        "CONN_MAX_AGE": None,
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
WSGI_LOOP = SITE["wsgi_loop"]
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"]},
}

# --- the table ---------------------------------------------------------------------------------------------------

#: Of PostgreSQL, and what makes the value of column {0} from the row's number.
KINDS = [
    ("integer", "(row * {0}) % 1000003"),
    ("text", "'cell ' || (row + {0}) % 100000"),
    ("double precision", "((row + {0}) % 100000) / 8.0"),
]


def make_table(rows: int) -> str:
    """The SQL that makes it."""
    kinds = [(number, *KINDS[number % len(KINDS)]) for number in range(1, COLUMNS)]
    columns = ", ".join(f"c{number} {kind}" for number, kind, _ in kinds)
    values = ", ".join(value.format(number) for number, _, value in kinds)
    return (
        f"CREATE UNLOGGED TABLE {TABLE} (id bigint PRIMARY KEY, {columns}); "
        f"INSERT INTO {TABLE} SELECT row, {values} FROM generate_series(1, {rows}) AS row; ANALYZE {TABLE}"
    )


@functools.cache
def grid() -> Any:
    """The model. Not made with the module, which holds the settings too."""
    from django.db import models

    meta = type("Meta", (), {"app_label": "streaming", "db_table": TABLE, "managed": False})
    namespace: dict[str, Any] = {"__module__": __name__, "Meta": meta}
    # In the order in which they are made.
    namespace["id"] = models.BigIntegerField(primary_key=True)
    fields = [models.IntegerField, models.TextField, models.FloatField]
    for number in range(1, COLUMNS):
        namespace[f"c{number}"] = fields[number % len(KINDS)]()
    return type("Grid", (models.Model,), namespace)


def open_cursors() -> int:
    """How many server-side cursors the connection of this thread has open."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_cursors WHERE name LIKE '\\_django\\_curs\\_%'")
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])


# --- the exports -------------------------------------------------------------------------------------------------


class Export:
    """What a request asks for: so many rows, fetched so many at a time, in chunks of so many bytes."""

    def __init__(self, request: HttpRequest) -> None:
        self.rows = int(request.GET["rows"])
        self.fetch = int(request.GET.get("fetch", 500))
        self.chunk = int(request.GET.get("chunk", CHUNK))

    def query(self) -> Any:
        # Named: of plain ones, aiterator() would open the cursor in async code, which Django refuses (5.2 to 6.1).
        return grid().objects.filter(id__lte=self.rows).order_by("id").values_list(named=True)


class Lines:
    """Rows as CSV, until they are taken."""

    def __init__(self) -> None:
        self._buffer = io.StringIO()
        self.add = csv.writer(self._buffer).writerow

    def __len__(self) -> int:
        return self._buffer.tell()

    def take(self) -> str:
        taken = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        return taken


def export(request: HttpRequest) -> StreamingHttpResponse:
    """With an async generator."""
    asked = Export(request)

    async def body() -> AsyncIterator[str]:
        lines = Lines()
        async for row in asked.query().aiterator(chunk_size=asked.fetch):
            lines.add(row)
            if len(lines) >= asked.chunk:
                yield lines.take()
        yield lines.take()

    return StreamingHttpResponse(body(), content_type="text/csv")


def export_sync(request: HttpRequest) -> StreamingHttpResponse:
    """With a sync generator."""
    asked = Export(request)

    def body() -> Iterator[str]:
        lines = Lines()
        for row in asked.query().iterator(chunk_size=asked.fetch):
            lines.add(row)
            if len(lines) >= asked.chunk:
                yield lines.take()
        yield lines.take()

    return StreamingHttpResponse(body(), content_type="text/csv")


def export_with_a_gate(request: HttpRequest) -> StreamingHttpResponse:
    """The last chunk is not made before the test says so."""
    asked = Export(request)

    async def body() -> AsyncIterator[str]:
        lines = Lines()
        async for row in asked.query().aiterator(chunk_size=asked.fetch):
            if row[0] == asked.rows:
                leave_note("at-the-gate")
                while not (FOLDER / "open").exists():
                    await asyncio.sleep(0.01)
            lines.add(row)
            if len(lines) >= asked.chunk:
                yield lines.take()
        yield lines.take()

    return StreamingHttpResponse(body(), content_type="text/csv")


def export_until_the_end(request: HttpRequest) -> StreamingHttpResponse:
    """Leaves word of its end, and of the cursors that are open: while it streams, in the finally and after it."""
    asked = Export(request)
    noted: dict[str, Any] = {"made": 0}

    async def body() -> AsyncIterator[str]:
        lines = Lines()
        try:
            async for row in asked.query().aiterator(chunk_size=asked.fetch):
                if not noted["made"]:
                    noted["streaming"] = await sync_to_async(open_cursors)()
                noted["made"] += 1
                lines.add(row)
                if len(lines) >= asked.chunk:
                    yield lines.take()
        finally:
            await asyncio.sleep(0.01)
            await sync_to_async(open_cursors)()
            noted["finally"] = time.monotonic()

    def finished(sender: Any, **kwargs: Any) -> None:
        request_finished.disconnect(finished)
        leave_note("finished", noted | {"cursors": open_cursors()})

    request_finished.connect(finished, weak=False)
    return StreamingHttpResponse(body(), content_type="text/csv")


#: What `leave_a_cursor` leaves.
left: list[Any] = []


def leave_a_cursor(request: HttpRequest) -> HttpResponse:
    rows = grid().objects.values_list().iterator(chunk_size=1)
    next(rows)
    left.append(rows)
    return look(request)


def look(request: HttpRequest) -> HttpResponse:
    from django.db import connection

    cursors = open_cursors()
    backend = connection.connection.info.backend_pid
    return JsonResponse({"process": os.getpid(), "backend": backend, "cursors": cursors})


urlpatterns = [
    path(function.__name__, function)
    for function in (export, export_sync, export_with_a_gate, export_until_the_end, leave_a_cursor, look)
]
