"""Fixtures: real servers. Where one is missing, its tests are skipped and say how to get it; in CI they fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis

from .support import connected_postgres, connected_redis


@pytest.fixture(scope="module")
def redis_server() -> Iterator[redis.Redis]:
    """A client of the redis at `settings.REDIS_URL`, to look at it with."""
    with connected_redis() as client:
        yield client


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[psycopg.Connection[Any]]:
    """A connection to the database at `settings.POSTGRES_URL`, to look at it with."""
    with connected_postgres() as connection:
        yield connection
