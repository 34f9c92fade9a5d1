"""The examples of the docs, as they stand: served in the scopes that the pages say, against real servers."""

from __future__ import annotations

import asyncio
import csv
import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import types
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import redis
import redis.asyncio
from django.conf import settings
from django.contrib.auth.models import User
from django.core.management import call_command
from psycopg.conninfo import make_conninfo

from wsgi_loop import process

from .services.support import connected_postgres, connected_redis, count_postgres_connections, count_redis_connections
from .support import eventually, serve

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("scopes.md", "streaming.md")]
KEY = "wsgi-loop-docs:visits"
SCOPES = pytest.mark.parametrize("scope", ["request", "process"])

ANSWERS = {"/quote": {"quote": "Simple is better than complex."}, "/rates": {"EUR": 1.0}}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> dict[str, str]:
    """The pages' blocks of code, by the file that the first line of each names."""
    found: dict[str, str] = {}
    for code in [code for page in PAGES for code in BLOCK.findall(page.read_text())]:
        first_line = code.partition("\n")[0]
        match = re.fullmatch(r"# (mysite/[a-z_/]+\.py)", first_line)
        assert match, f"{first_line!r} does not say which file this is"
        assert match[1] not in found
        found[match[1]] = code
    return found


class API(ThreadingHTTPServer):
    """The server of the httpx examples."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.posted: list[Any] = []


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: API

    def do_GET(self) -> None:
        self.answer(ANSWERS.get(self.path))

    def do_POST(self) -> None:
        self.server.posted.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.answer({})

    def answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(404 if value is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[API]:
    with API() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setenv("API_URL", server.url)
        # Whatever proxy the environment names is not for this machine.
        monkeypatch.setenv("NO_PROXY", "*")
        yield server
        server.shutdown()
        thread.join()


class Site:
    """The pages' files, where Python finds them; and what their clients are called by the servers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = f"wsgi-loop-docs-{uuid.uuid4().hex}"

    def module(self, name: str) -> Any:
        return importlib.import_module(f"mysite.{name}")


@pytest.fixture
def mysite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for name, code in blocks().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    for directory in ("", "management", "management/commands"):
        (tmp_path / "mysite" / directory / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    site = Site(tmp_path)
    separator = "&" if "?" in settings.REDIS_URL else "?"
    monkeypatch.setenv("REDIS_URL", f"{settings.REDIS_URL}{separator}client_name={site.name}")
    monkeypatch.setenv("POSTGRES_URL", make_conninfo(settings.POSTGRES_URL, application_name=site.name))
    yield site
    process.shut_down()
    for module in [module for module in sys.modules if module.partition(".")[0] == "mysite"]:
        del sys.modules[module]


@pytest.fixture
def redis_server() -> Iterator[redis.Redis]:
    with connected_redis() as client:
        yield client
        client.delete(KEY)


def test_every_block_is_used_here() -> None:
    assert set(blocks()) == {
        f"mysite/{name}.py"
        for name in (
            "redis_views",
            "database_views",
            "http_views",
            "lifespan",
            "settings",
            "signup",
            "management/commands/count",
            "tasks",
            "export",
            "events",
            "sources",
        )
    }


@SCOPES
def test_redis(mysite: Site, redis_server: redis.Redis, scope: str) -> None:
    with serve(mysite.module("redis_views").visits, scope=scope) as server:
        visits = [json.loads(server.get())["visits"] for _ in range(20)]
        # Another run of this test may count along.
        assert visits == sorted(set(visits))
        if scope == "process":
            assert count_redis_connections(redis_server, mysite.name) == 1
            process.shut_down()
    eventually(lambda: count_redis_connections(redis_server, mysite.name) == 0, 30)


@SCOPES
def test_psycopg(mysite: Site, scope: str) -> None:
    with connected_postgres() as postgres, serve(mysite.module("database_views").answer, scope=scope) as server:
        for _ in range(10):
            assert json.loads(server.get()) == {"answer": 42}
        if scope == "process":
            # Of the pool's max_size.
            assert 1 <= count_postgres_connections(postgres, mysite.name) <= 4
            process.shut_down()
        eventually(lambda: count_postgres_connections(postgres, mysite.name) == 0, 30)


@SCOPES
def test_httpx(mysite: Site, api: API, scope: str) -> None:
    with serve(mysite.module("http_views").quote, scope=scope) as server:
        for _ in range(5):
            assert json.loads(server.get()) == ANSWERS["/quote"]


def test_lifespan(mysite: Site, api: API, caplog: pytest.LogCaptureFixture) -> None:
    lifespan = mysite.module("lifespan")
    with serve(mysite.module("http_views").quote, WSGI_LOOP=mysite.module("settings").WSGI_LOOP) as server:
        assert lifespan.rates == {}
        server.get()
        assert server.status.startswith("200")
        assert lifespan.rates == ANSWERS["/rates"]
        process.shut_down()
    assert not caplog.records, caplog.text


@pytest.mark.django_db(transaction=True)
@SCOPES
def test_a_background_task(mysite: Site, api: API, scope: str, caplog: pytest.LogCaptureFixture) -> None:
    body = urlencode({"name": "ada"}).encode()
    form = {
        "REQUEST_METHOD": "POST",
        "CONTENT_TYPE": "application/x-www-form-urlencoded",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
    }
    with serve(mysite.module("signup").sign_up, scope=scope) as server:
        server.get(**form)
        assert server.status.startswith("201")
    eventually(lambda: api.posted, 30)
    assert api.posted == [("/welcome", {"name": "ada"})]
    assert User.objects.get().username == "ada"
    process.shut_down()
    assert not caplog.records, caplog.text


def test_a_management_command(mysite: Site, redis_server: redis.Redis, api: API) -> None:
    (mysite.directory / "command_settings.py").write_text(
        "from mysite.settings import WSGI_LOOP\nfrom tests.settings import *\n\n"
        "INSTALLED_APPS = [*INSTALLED_APPS, 'mysite']\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "django", "count", "--settings", "command_settings"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(mysite.directory), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    counts = [int(line) for line in done.stdout.split()]
    assert len(counts) == 3
    assert counts == sorted(set(counts))
    eventually(lambda: count_redis_connections(redis_server, mysite.name) == 0, 30)


def test_a_management_command_makes_one_client(mysite: Site, redis_server: redis.Redis, monkeypatch: Any) -> None:
    command = mysite.module("management.commands.count")
    made = []
    factory = command.cache._factory
    monkeypatch.setattr(command.cache, "_factory", lambda: made.append(factory()) or made[-1])
    call_command(command.Command(), stdout=io.StringIO())
    assert len(made) == 1


def test_a_celery_task(mysite: Site, redis_server: redis.Redis) -> None:
    """In this process: a real worker is in tests/services/test_celery.py."""
    from celery import Celery
    from celery.signals import worker_process_shutdown

    tasks = mysite.module("tasks")
    with Celery("docs", broker="memory://", set_as_current=False) as app:
        app.finalize()
        counts = [app.tasks["mysite.tasks.count"].apply().get() for _ in range(20)]
    assert counts == sorted(set(counts))
    assert count_redis_connections(redis_server, mysite.name) == 1
    # What a process of a worker sends at its end.
    worker_process_shutdown.send(sender=None, pid=os.getpid(), exitcode=0)
    worker_process_shutdown.disconnect(tasks.close_process_loop)
    assert process._loop is None
    eventually(lambda: count_redis_connections(redis_server, mysite.name) == 0, 30)


@pytest.mark.django_db(transaction=True)
@SCOPES
def test_a_csv_export(mysite: Site, scope: str) -> None:
    names = [f"{number:0100}" for number in range(1500)]
    User.objects.bulk_create([User(username=name) for name in names])
    with serve(mysite.module("export").export, scope=scope) as server:
        response = server.open()
        chunks = [*response]
        response.close()
    assert len(chunks) == 3
    assert all(len(chunk) < 65 * 1024 for chunk in chunks)
    assert [row[1] for row in csv.reader(io.StringIO(b"".join(chunks).decode()))] == names


@SCOPES
def test_server_sent_events(mysite: Site, redis_server: redis.Redis, scope: str) -> None:
    with serve(mysite.module("events").events, scope=scope) as server:
        response = server.open()
        chunks = iter(response)
        assert next(chunks) == b"retry: 1000\n\n"
        eventually(lambda: redis_server.pubsub_numsub("news")[0][1])
        redis_server.publish("news", mysite.name)
        # Another run of this test may send along.
        assert f"data: {mysite.name}\n\n".encode() in chunks
        # The client goes away.
        response.close()
        process.shut_down()
    eventually(lambda: count_redis_connections(redis_server, mysite.name) == 0, 30)


@SCOPES
def test_the_heartbeat_and_the_end_of_server_sent_events(
    mysite: Site, redis_server: redis.Redis, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = mysite.module("events")
    # In milliseconds, what the page says in seconds.
    shorter = types.SimpleNamespace(timeout=lambda seconds: asyncio.timeout(seconds / 1000))
    get_message = redis.asyncio.client.PubSub.get_message
    monkeypatch.setattr(events, "asyncio", shorter)
    monkeypatch.setattr(
        redis.asyncio.client.PubSub,
        "get_message",
        lambda self, timeout, **options: get_message(self, timeout=timeout / 1000, **options),
    )
    with serve(events.events, scope=scope) as server:
        body = server.get()
    assert b": still here\n\n" in body
    assert body.endswith(b"event: bye\ndata:\n\n")


@SCOPES
def test_several_sources(mysite: Site, api: API, scope: str) -> None:
    with serve(mysite.module("sources").sources, scope=scope) as server:
        answers = [json.loads(line) for line in server.get().splitlines()]
    assert sorted(answers, key=str) == sorted(ANSWERS.values(), key=str)
