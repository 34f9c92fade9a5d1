"""Background tasks in tests: in the test's own connection and transaction, or waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import connections, transaction
from django.http import HttpResponse, StreamingHttpResponse
from django.test import TestCase

from wsgi_loop import create_background_task, process
from wsgi_loop.testing import Client, inline_background_tasks, wait_for_background_tasks

from .services.conftest import postgres_server  # noqa: F401
from .services.test_background import database  # noqa: F401
from .support import serve

SCOPES = pytest.mark.parametrize("scope", ["request", "process"])
USING: list[str] = []


@pytest.fixture(params=["sqlite", "postgres"])
def using(request: pytest.FixtureRequest, django_db_setup: None) -> str:
    """The alias of a database with the table of `ContentType`."""
    USING[:] = ["default" if request.param == "sqlite" else request.getfixturevalue("database")]
    return USING[0]


@contextmanager
def rolled_back(using: str) -> Any:
    """As a `TestCase` has it."""
    with transaction.atomic(using=using):
        yield
        transaction.set_rollback(True, using=using)


def count(using: str) -> int:
    return ContentType.objects.using(using).filter(app_label="tests").count()


async def write(model: str) -> str:
    await asyncio.sleep(0.01)
    await ContentType.objects.using(USING[0]).acreate(app_label="tests", model=model)
    return model


async def asynchronous(request: Any) -> HttpResponse:
    create_background_task(write("first"))
    future = create_background_task(write("second"))
    # Who waits for one does not wait for ever.
    return HttpResponse(await asyncio.wrap_future(future))


def synchronous(request: Any) -> HttpResponse:
    create_background_task(write("first"))
    return HttpResponse(create_background_task(write("second")).result(0))


async def streaming(request: Any) -> StreamingHttpResponse:
    async def chunks() -> AsyncIterator[str]:
        create_background_task(write("first"))
        yield "sec"
        create_background_task(write("second"))
        yield "ond"

    return StreamingHttpResponse(chunks())


@SCOPES
@pytest.mark.parametrize("view", [asynchronous, synchronous, streaming])
def test_tasks_of_a_request_are_in_the_transaction_of_the_test(
    view: Any, scope: str, using: str, settings: Any
) -> None:
    settings.WSGI_LOOP = {"SCOPE": scope}
    with serve(view):
        with rolled_back(using):
            response = Client().get("/")
            assert b"".join(response) == b"second"
            assert count(using) == 2
        assert count(using) == 0


@SCOPES
def test_what_a_task_raises_is_raised_into_the_test(scope: str, settings: Any) -> None:
    settings.WSGI_LOOP = {"SCOPE": scope}

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("in the background")

    async def view(request: Any) -> HttpResponse:
        create_background_task(fail())
        return HttpResponse()

    def sync_view(request: Any) -> HttpResponse:
        create_background_task(fail())
        return HttpResponse()

    for failing in (view, sync_view):
        with serve(failing), pytest.raises(ValueError, match="in the background"):
            Client().get("/")


def test_on_commit(using: str) -> None:
    def view(request: Any) -> HttpResponse:
        with transaction.atomic(using=using):
            ContentType.objects.using(using).create(app_label="tests", model="request")
            transaction.on_commit(lambda: create_background_task(copy("request")), using=using)
        return HttpResponse()

    async def copy(model: str) -> None:
        found = await ContentType.objects.using(using).aget(app_label="tests", model=model)
        await write(f"copy of {found.model}")

    with serve(view):
        with rolled_back(using):
            with inline_background_tasks(), TestCase.captureOnCommitCallbacks(using=using, execute=True):
                Client().get("/")
            assert count(using) == 2
        assert count(using) == 0


def test_async_code_outside_of_a_request_is_refused() -> None:
    async def start() -> None:
        create_background_task(asyncio.sleep(0), name="lost")

    with inline_background_tasks(), pytest.raises(RuntimeError, match="background task lost: is to be run inline"):
        asyncio.run(start())


def test_waiting(using: str) -> None:
    process.shut_down()
    future = create_background_task(write("waited for"), name="writer")
    try:
        wait_for_background_tasks()
        assert future.done()
    finally:
        ContentType.objects.using(using).filter(app_label="tests")._raw_delete(using)  # type: ignore[attr-defined]
        connections[using].close()


def test_waiting_in_vain() -> None:
    future = create_background_task(asyncio.sleep(60), name="sleeper")
    with pytest.raises(TimeoutError, match=r"After 0.05 s these were still running: background task sleeper"):
        wait_for_background_tasks(0.05)
    future.cancel()
    wait_for_background_tasks()


def test_the_fixtures(inline_background_tasks: None) -> None:
    assert create_background_task(asyncio.sleep(0, "ran")).result(0) == "ran"
    assert not list(getattr(process._loop, "_background", []))


@pytest.mark.django_db(transaction=True)
def test_the_fixture_that_waits(wait_for_background_tasks: Any) -> None:
    future = create_background_task(asyncio.sleep(0.1))
    wait_for_background_tasks()
    assert future.done()
