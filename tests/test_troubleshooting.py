"""docs/troubleshooting.md: each message on the page, as it is raised; and the pages on locks and on transactions."""

# ruff: noqa: F811 - fixtures that are imported

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.core.signals import got_request_exception
from django.db import connection, transaction
from django.http import HttpResponse, StreamingHttpResponse
from django.test import override_settings

from wsgi_loop import PerLoop, create_background_task, get_wsgi_application, process

from .servers.support import ROOT
from .support import eventually, serve, stock
from .test_docs import ANSWERS, API, SCOPES, Site, api, mysite  # noqa: F401
from .test_documentation import text, write

PAGE = text("troubleshooting.md")
MESSAGES = re.findall(r"^```text\n(.*)\n```$", PAGE, re.MULTILINE)


def told(exc: BaseException | None) -> str:
    return f"{type(exc).__name__}: {exc}"


def raised_in(view: Any, requests: int = 1, scope: str = "request", **settings: Any) -> str:
    """What a view raises at last, served with wsgi-loop."""
    raised: list[str] = []

    def note(**kwargs: Any) -> None:
        raised.append(told(sys.exc_info()[1]))

    got_request_exception.connect(note)
    try:
        with serve(view, scope=scope, **settings) as server:
            for _ in range(requests):
                server.get()
    finally:
        got_request_exception.disconnect(note)
        process.shut_down()
    return raised[-1] if raised else "nothing"


def raised_by(function: Callable[[], Any]) -> str:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the message is what is looked at
        function()
    return told(caught.value)


def closed() -> str:
    writers: list[asyncio.StreamWriter] = []

    async def view(request: Any) -> Any:
        # As a client does that keeps its connection.
        if writers:
            writers[0].close()
        else:
            _, writer = await asyncio.open_connection("127.0.0.1", server.getsockname()[1])
            writers.append(writer)
        return HttpResponse()

    with socket.create_server(("127.0.0.1", 0)) as server:
        found = raised_in(view, 2)
        # Nobody else can close it any more.
        transport: Any = writers[0].transport
        transport._sock.close()
        transport._sock = None
    return found


def attached() -> str:
    kept: list[Any] = []

    async def view(request: Any) -> Any:
        if not kept:
            kept.append(asyncio.get_running_loop().create_future())
            return HttpResponse()
        return await kept[0]

    return raised_in(view, 2)


def bound() -> str:
    lock = asyncio.Lock()

    async def use() -> None:
        async with lock:
            await asyncio.sleep(0)

    async def view(request: Any) -> Any:
        await asyncio.gather(use(), use())
        return HttpResponse()

    return raised_in(view, 2)


def late() -> str:
    raised = []

    @asynccontextmanager
    async def open_last() -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def open_first() -> AsyncIterator[None]:
        yield
        try:
            await last()
        except RuntimeError as exc:
            raised.append(told(exc))

    first, last = PerLoop(open_first), PerLoop(open_last)

    async def view(request: Any) -> Any:
        await first()
        await last()
        return HttpResponse()

    with serve(view) as server:
        server.get()
    return raised[0]


def no_manager() -> str:
    client: Any = PerLoop(lambda: object())  # type: ignore[arg-type, return-value]

    async def view(request: Any) -> Any:
        await client()

    return raised_in(view)


def sync_in_async() -> str:
    async def view(request: Any) -> Any:
        return HttpResponse(str(User.objects.count()))

    return raised_in(view)


def async_to_sync_in_async() -> str:
    async def view(request: Any) -> Any:
        return HttpResponse(async_to_sync(asyncio.sleep)(0))

    return raised_in(view)


def atomic_requests() -> str:
    async def view(request: Any) -> Any:
        """Never called."""

    connection.settings_dict["ATOMIC_REQUESTS"] = True
    try:
        return raised_in(view)
    finally:
        connection.settings_dict["ATOMIC_REQUESTS"] = False


def stream_of_stock() -> str:
    async def body() -> Any:
        yield b"chunk"

    with (
        stock(lambda request: StreamingHttpResponse(body())) as server,
        pytest.warns(Warning, match="must consume") as caught,
    ):
        server.get()
    return f"{Warning.__name__}: {caught[0].message}"


def orm_of_a_task_that_outlives_its_request() -> str:
    is_over, raised, kept = threading.Event(), [], set()

    async def work() -> None:
        await asyncio.to_thread(is_over.wait, 30)
        try:
            await sync_to_async(lambda: None)()
        except RuntimeError as exc:
            raised.append(told(exc))

    async def view(request: Any) -> Any:
        kept.add(asyncio.create_task(work()))
        return HttpResponse()

    with serve(view, scope="process") as server:
        server.get()
        is_over.set()
        eventually(lambda: raised)
        process.shut_down()
    return raised[0]


def too_many_background_tasks() -> str:
    tasks = []

    def view(request: Any) -> Any:
        for _ in range(2):
            tasks.append(create_background_task(asyncio.sleep(600)))

    try:
        return raised_in(view, max_background_tasks=1, shutdown_timeout=0)
    finally:
        for task in tasks:
            with suppress(BaseException):
                task.cancel()


def under_gevent() -> str:
    code = (
        "import gevent.monkey; gevent.monkey.patch_thread(); from wsgi_loop.threads import check_threads; "
        "check_threads()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stderr.splitlines()[-1]


REPRODUCED: dict[str, Callable[[], str]] = {
    "Event loop is closed": closed,
    "attached to a different loop": attached,
    "is bound to a different event loop": bound,
    "had closed it": late,
    "not an async context manager": no_manager,
    "from an async context": sync_in_async,
    "You cannot use AsyncToSync": async_to_sync_in_async,
    "ATOMIC_REQUESTS": atomic_requests,
    "must consume asynchronous iterators": stream_of_stock,
    "is over, and with it": orm_of_a_task_that_outlives_its_request,
    "are in flight in this process": too_many_background_tasks,
    "takes a coroutine": lambda: raised_by(lambda: create_background_task(asyncio.sleep)),  # type: ignore[arg-type]
    "has an unknown key": lambda: raised_by(lambda: with_setting({"COLOUR": "red"})),
    "['SCOPE'] is": lambda: raised_by(lambda: with_setting({"SCOPE": "galaxy"})),
    "needs real threads": under_gevent,
}


def with_setting(value: dict[str, Any]) -> Any:
    with override_settings(WSGI_LOOP=value):
        return get_wsgi_application()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:40])
def test_each_message_is_raised_as_the_page_has_it(message: str, caplog: pytest.LogCaptureFixture) -> None:
    (reproduce,) = [function for words, function in REPRODUCED.items() if words in message]
    assert re.fullmatch(re.escape(message).replace("…", ".+"), reproduce(), re.DOTALL)


def test_each_page_of_messages_is_complete() -> None:
    assert len(MESSAGES) == len(REPRODUCED)
    assert PAGE.count("\nMeans") == PAGE.count("\n### ") - PAGE.partition("## Without a message")[2].count("\n### ")


# --- locks and transactions --------------------------------------------------------------------------------------


@SCOPES
def test_a_semaphore(mysite: Site, api: API, scope: str) -> None:
    limits = write(mysite, "howto/locks.md").module("limits")
    with serve(limits.many, scope=scope) as server:
        for _ in range(3):
            assert json.loads(server.get()) == {"answers": [ANSWERS["/quote"]] * 6}
    process.shut_down()


@pytest.fixture
def atomic() -> Iterator[None]:
    connection.settings_dict["ATOMIC_REQUESTS"] = True
    yield
    connection.settings_dict["ATOMIC_REQUESTS"] = False


@pytest.mark.django_db(transaction=True)
@SCOPES
def test_a_transaction_in_an_async_view(mysite: Site, scope: str, atomic: None) -> None:
    transfer = write(mysite, "howto/transactions.md").module("transfer")
    User.objects.create(username="ada")
    with serve(transfer.rename, scope=scope) as server:
        assert json.loads(server.get(QUERY_STRING="second=grace")) == {"renamed": False}
        assert User.objects.get().username == "ada"
        User.objects.create(username="grace")
        assert json.loads(server.get(QUERY_STRING="second=grace")) == {"renamed": True}
    assert sorted(User.objects.values_list("username", flat=True)) == ["renamed-ada", "renamed-grace"]
    process.shut_down()


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("scope", ["request", "process", None])
def test_an_atomic_block_around_an_async_view_covers_its_orm_calls(scope: str | None) -> None:
    def middleware(get_response: Any) -> Any:
        def call(request: Any) -> Any:
            with transaction.atomic():
                response = get_response(request)
                transaction.set_rollback(True)
            return response

        return call

    async def view(request: Any) -> Any:
        await User.objects.acreate(username="ada")
        return HttpResponse(str(await User.objects.acount()))

    with serve(view, middleware=[middleware], scope=scope) if scope else stock(view, middleware=[middleware]) as server:
        assert server.get() == b"1"
    assert not User.objects.exists()
    process.shut_down()
