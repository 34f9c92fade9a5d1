"""Redis and PostgreSQL, as the tests that need them find them; and how many connections of a name they have open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, NoReturn
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
from django.conf import settings


def not_there(reason: str) -> NoReturn:
    """Skip the test, or fail it where everything has to be there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def connected_redis() -> Iterator[redis.Redis]:
    """A client that has its one connection open already, so that it adds nothing to what it counts."""
    try:
        client = redis.Redis.from_url(
            settings.REDIS_URL, single_connection_client=True, socket_connect_timeout=5, decode_responses=True
        )
        client.ping()
    except redis.ConnectionError as exc:
        not_there(
            f"no redis at {settings.REDIS_URL}: install redis-server and start it, or set WSGI_LOOP_TEST_REDIS_URL "
            f"to the URL of another one ({exc})"
        )
    with closing(client):
        yield client


def count_redis_connections(client: redis.Redis, name: str) -> int:
    """Those whose `client_name` is `name`."""
    connections: list[dict[str, Any]] = client.client_list()  # type: ignore[assignment]
    return sum(connection["name"] == name for connection in connections)


@contextmanager
def connected_postgres() -> Iterator[psycopg.Connection[Any]]:
    """A connection that commits each statement."""
    try:
        connection = psycopg.connect(settings.POSTGRES_URL, autocommit=True, connect_timeout=5)
    except psycopg.OperationalError as exc:
        not_there(
            f"no PostgreSQL at {settings.POSTGRES_URL}: install postgresql and start it, or set "
            f"WSGI_LOOP_TEST_POSTGRES_URL to the URL of another one ({exc})"
        )
    with connection:
        yield connection


def count_postgres_connections(connection: psycopg.Connection[Any], name: str) -> int:
    """Those whose `application_name` is `name`."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    row = connection.execute(query, [name]).fetchone()
    assert row is not None
    return int(row[0])


def django_database(url: str, **more: Any) -> dict[str, Any]:
    """Return Django's settings of a database of PostgreSQL, with what else is given."""
    parts = urlsplit(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.path[1:],
        "USER": parts.username or "",
        "PASSWORD": parts.password or "",
        "HOST": parts.hostname or "",
        "PORT": str(parts.port or ""),
        **more,
    }


@contextmanager
def made_database(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """The URL of a new database, of which PostgreSQL's statistics are nobody else's."""
    name = f"wsgi_loop_tests_{os.getpid()}"
    connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    try:
        connection.execute(f"CREATE DATABASE {name}")
    except psycopg.errors.InsufficientPrivilege as exc:
        not_there(f"WSGI_LOOP_TEST_POSTGRES_URL has to name a user who may create databases ({exc})")
    try:
        yield urlsplit(settings.POSTGRES_URL)._replace(path=f"/{name}").geturl()
    finally:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
