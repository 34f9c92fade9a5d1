"""Background tasks on a real PostgreSQL: they use the ORM, and leave no connection behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.contrib.contenttypes.models import ContentType
from django.db import connections, transaction
from django.db.utils import ConnectionHandler
from django.http import HttpResponse

from wsgi_loop import create_background_task, process

from ..support import eventually, serve
from .support import count_postgres_connections, django_database, made_database

NAME = "wsgi-loop-tests-background"
TASKS = 8


@pytest.fixture
def database(postgres_server: psycopg.Connection[Any]) -> Iterator[str]:
    """The alias of a database with one table."""
    with made_database(postgres_server) as url:
        options = django_database(url, OPTIONS={"application_name": NAME}, CONN_MAX_AGE=None)
        default = connections.settings["default"]
        connections.settings["postgres"] = ConnectionHandler({"default": default, "postgres": options}).settings[
            "postgres"
        ]
        try:
            with connections["postgres"].schema_editor() as editor:
                editor.create_model(ContentType)
            connections["postgres"].close()
            eventually(lambda: count_postgres_connections(postgres_server, NAME) == 0, 30)
            yield "postgres"
        finally:
            connections["postgres"].close()
            del connections["postgres"]
            del connections.settings["postgres"]


@pytest.mark.parametrize("scope", ["request", "process"])
def test_the_orm_works_in_background_tasks_and_no_connection_is_left(
    scope: str, database: str, postgres_server: psycopg.Connection[Any]
) -> None:
    objects = ContentType.objects.using(database)
    all_in = threading.Barrier(TASKS)
    futures: list[Any] = []
    most: list[int] = []

    async def work(number: int) -> str:
        await objects.acreate(app_label="background", model=str(number))
        # All at once, so each has a connection to itself.
        await sync_to_async(all_in.wait)(60)
        most.append(count_postgres_connections(postgres_server, NAME) if number == 0 else 0)
        await sync_to_async(all_in.wait)(60)
        # What the request wrote: it was committed before the task began.
        return (await objects.aget(app_label="request")).model

    def view(request: Any) -> HttpResponse:
        def start() -> None:
            futures.extend(create_background_task(work(number)) for number in range(TASKS))

        with transaction.atomic(using=database):
            objects.create(app_label="request", model="written")
            transaction.on_commit(start, using=database)
        return HttpResponse()

    process.shut_down()
    with serve(view, scope=scope) as server:
        server.get()
        assert server.status == "200 OK"
        assert [future.result(60) for future in futures] == ["written"] * TASKS
    assert objects.filter(app_label="background").count() == TASKS
    connections[database].close()
    # Those of the tasks, and that of the request.
    assert max(most) == TASKS + 1
    eventually(lambda: count_postgres_connections(postgres_server, NAME) == 0, 30)


@pytest.mark.parametrize("how", ["to_thread", "thread_sensitive=False"])
def test_a_database_that_comes_back_is_there_for_other_threads_as_well(
    how: str, database: str, postgres_server: psycopg.Connection[Any]
) -> None:
    def query() -> int:
        return ContentType.objects.using(database).count()

    async def view(request: Any) -> HttpResponse:
        call = asyncio.to_thread(query) if how == "to_thread" else sync_to_async(query, thread_sensitive=False)()
        return HttpResponse(str(await call))

    process.shut_down()
    with serve(view, scope="process") as server:
        assert server.get() == b"0"
        terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
        assert postgres_server.execute(terminate, [NAME]).rowcount == 1
        eventually(lambda: count_postgres_connections(postgres_server, NAME) == 0, 30)
        # The connection is a persistent one, so the first who uses it finds out, as with Django on a server thread.
        server.get()
        assert server.status == "500 Internal Server Error"
        for _ in range(8):
            assert server.get() == b"0"
    process.shut_down()
    eventually(lambda: count_postgres_connections(postgres_server, NAME) == 0, 30)
