"""Under gevent threads are greenlets: a real gunicorn refuses, and says what to use in its place."""

from __future__ import annotations

import os
import re
import sys
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .support import ROOT, ServerProcess, eventually, opener

PROJECT = """
from asgiref.sync import async_to_sync
from django.http import HttpResponse
from django.urls import path

from tests.settings import *

ROOT_URLCONF = "project"
# Django's default shows errors on the console only with DEBUG.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"]},
}


def sync(request):
    return HttpResponse("sync")


async def asynchronous(request):
    return HttpResponse("async")


def below_sync(request):
    return async_to_sync(asynchronous)(request)


urlpatterns = [path("sync", sync), path("async", asynchronous), path("below_sync", below_sync)]
"""

REFUSAL = re.compile(r"wsgi-loop needs real threads, and gevent has replaced them .* \(--worker-class gthread\)")


class Gunicorn(ServerProcess):
    def __init__(self, folder: Path, *arguments: str) -> None:
        (folder / "project.py").write_text(PROJECT)
        environment = {
            "DJANGO_SETTINGS_MODULE": "project",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
            # Newer ones put a socket there.
            "HOME": str(folder),
        }
        command = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--workers", "1", *arguments]
        super().__init__([*command, "wsgi_loop.wsgi:application"], folder, folder / "log", environment)

    def wait_for(self, pattern: str) -> str:
        eventually(lambda: re.search(pattern, self.log()) or self.has_ended(), 60)
        found = re.search(pattern, self.log())
        assert found, self.log()
        return found[1]

    def get(self, path: str) -> int:
        """The status that a request for `path` is answered with."""
        address = self.wait_for(r"Listening at: (http://127.0.0.1:\d+)")
        self.wait_for(r"(Booting worker)")
        try:
            with opener.open(f"{address}/{path}", timeout=60) as response:
                return int(response.status)
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Gunicorn]]:
    started: list[Gunicorn] = []

    def start_gunicorn(*arguments: str) -> Gunicorn:
        started.append(Gunicorn(tmp_path, *arguments))
        return started[-1]

    yield start_gunicorn
    for gunicorn in started:
        gunicorn.end()


def test_a_gevent_worker_does_not_start(start: Callable[..., Gunicorn]) -> None:
    gunicorn = start("--worker-class", "gevent")
    eventually(gunicorn.has_ended)
    assert gunicorn.process.returncode == 3, gunicorn.log()
    log = gunicorn.log()
    assert REFUSAL.search(log), log
    assert "ImproperlyConfigured" in log


@pytest.mark.parametrize("path", ["async", "below_sync"])
def test_a_preloaded_application_refuses_its_first_loop_call(start: Callable[..., Gunicorn], path: str) -> None:
    # gunicorn imports it before gevent patches anything, so that the start can not tell.
    gunicorn = start("--worker-class", "gevent", "--preload")
    assert gunicorn.get(path) == 500
    log = gunicorn.log()
    assert REFUSAL.search(log), log
    assert f"Internal Server Error: /{path}" in log
    # Nothing half-made is left behind for the next request.
    assert gunicorn.get(path) == 500
    gunicorn.end()
    log = gunicorn.log()
    assert len(REFUSAL.findall(log)) == 2
    # Each refusal ends the one traceback there is: nothing else failed because of it, as in response.close().
    assert log.count("Traceback") == 2, log


def test_a_thread_worker_is_served(start: Callable[..., Gunicorn]) -> None:
    # What the refusal recommends.
    assert start("--worker-class", "gthread").get("async") == 200
