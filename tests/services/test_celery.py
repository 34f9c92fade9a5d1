"""`EventLoopContext` where there is no request: in a real Celery worker, and in a management command."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from django.conf import settings

from ..support import eventually
from .support import count_redis_connections

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
TASKS = 1000
PROCESSES = 2
WORKER = ["-m", "celery", "-A", "tests.services.celery_app", "worker", "--pool", "prefork", "--loglevel", "INFO"]
ALONE = ["--concurrency", str(PROCESSES), "--without-gossip", "--without-mingle", "--without-heartbeat"]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "DJANGO_SETTINGS_MODULE": "tests.settings"} | more


@dataclass
class Worker:
    """A Celery worker, and its app as this process has it."""

    app: Any
    process: subprocess.Popen[bytes]
    redis: redis.Redis
    name: str

    def connections(self) -> int:
        return count_redis_connections(self.redis, self.name)

    def total(self) -> int:
        return int(self.redis.get(f"{self.name}:total") or 0)

    def pushed(self, what: str) -> list[str]:
        return sorted(self.redis.lrange(f"{self.name}:{what}", 0, -1))


@pytest.fixture
def worker(redis_server: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """A worker in a process group of its own, which is ended with it; its output goes with a failure."""
    url = urlsplit(settings.REDIS_URL)._replace(path="/10").geturl()
    name = f"wsgi-loop-tests-{uuid.uuid4().hex}"
    monkeypatch.setenv("WSGI_LOOP_TEST_CELERY_URL", url)
    monkeypatch.setenv("WSGI_LOOP_TEST_CELERY_NAME", name)
    monkeypatch.delitem(sys.modules, "tests.services.celery_app", raising=False)
    app = importlib.import_module("tests.services.celery_app")
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *WORKER, *ALONE],
            cwd=tmp_path,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    client = redis.Redis.from_url(url, decode_responses=True)
    try:
        yield Worker(app, process, client, name)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        sys.stdout.write(output.read_text(errors="replace")[-8000:])
        app.app.close()
        app.app.backend.client.close()
        for key in client.scan_iter(f"{name}*", count=1000):
            client.delete(key)
        client.close()


def test_a_worker(worker: Worker, tmp_path: Path) -> None:
    from celery import group

    app = worker.app
    # In each process, the first tasks would work without it too.
    stock = group(app.work_without_it.s() for _ in range(10 * PROCESSES)).apply_async()
    outcomes = stock.get(timeout=60, propagate=False)
    assert any(isinstance(outcome, RuntimeError) for outcome in outcomes), outcomes

    results = group(app.work.s() for _ in range(TASKS)).apply_async()
    increments = TASKS * 2 * app.MAX_CONNECTIONS
    most = 0
    deadline = time.monotonic() + 120
    while worker.total() < increments:
        assert time.monotonic() < deadline, f"{worker.total()} of {increments}"
        most = max(most, worker.connections())
        time.sleep(0.01)
    places = results.get(timeout=60)
    assert len(places) == TASKS
    processes = {str(process) for process, _ in places}
    assert len(processes) == PROCESSES
    assert len({tuple(place) for place in places}) == PROCESSES, "a process has used more than one loop"
    assert worker.total() == increments
    assert PROCESSES <= most <= PROCESSES * app.MAX_CONNECTIONS
    assert set(worker.pushed("entered")) == processes
    assert worker.pushed("left") == []

    for seconds in (1, 3600):
        app.start_background_task.delay(seconds).get(timeout=60)
    worker.process.terminate()
    assert worker.process.wait(60) == 0
    assert worker.pushed("left") == worker.pushed("entered")
    assert worker.pushed("lingered") == ["1"]
    output = (tmp_path / "output.txt").read_text()
    assert "1 of its tasks still ran, which are cancelled: background task 3600 s of EventLoopContext" in output
    eventually(lambda: worker.connections() == 0, 30)


COMMAND = """
import redis.asyncio
from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.management.base import BaseCommand

from wsgi_loop import EventLoopContext

client = redis.asyncio.Redis.from_url(settings.REDIS_URL)


class Command(BaseCommand):
    def add_arguments(self, parser):
        parser.add_argument("--without", action="store_true")

    def handle(self, *, without, **options):
        if without:
            return self.ping()
        with EventLoopContext():
            self.ping()

    def ping(self):
        for _ in range(20):
            self.stdout.write(str(async_to_sync(client.ping)()))
"""


@pytest.fixture
def command(tmp_path: Path, redis_server: redis.Redis) -> list[str]:
    """The way to call a command of a project that has one."""
    commands = tmp_path / "app_with_a_command" / "management" / "commands"
    commands.mkdir(parents=True)
    for package in (commands, commands.parent, commands.parent.parent):
        (package / "__init__.py").touch()
    (commands / "ping.py").write_text(COMMAND)
    (tmp_path / "command_settings.py").write_text(
        "from tests.settings import *\n\nINSTALLED_APPS = [*INSTALLED_APPS, 'app_with_a_command']\n"
    )
    return [sys.executable, "-m", "django", "ping", "--settings", "command_settings"]


def run(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(directory)])
    return subprocess.run(
        command, cwd=directory, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=120
    )


def test_a_management_command(command: list[str], tmp_path: Path) -> None:
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 20


def test_a_management_command_without_it_fails(command: list[str], tmp_path: Path) -> None:
    done = run([*command, "--without"], tmp_path)
    assert done.returncode != 0
    assert "RuntimeError: Event loop is closed" in done.stderr
