"""runserver with its reloader, a real edit and a real Ctrl-C: its end takes no longer than needed."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.request import Request

import pytest

from .support import ROOT, eventually, free_port, opener, running, takes_connections

pytestmark = pytest.mark.long

SITE = """
import asyncio
from contextlib import asynccontextmanager

from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path

from wsgi_loop import create_background_task

SECRET_KEY = "not a secret"
DEBUG = True
ROOT_URLCONF = __name__
WSGI_APPLICATION = "wsgi_loop.wsgi.application"
WSGI_LOOP = {OPTIONS}


@asynccontextmanager
async def lifespan():
    yield
    print("lifespan left", flush=True)


async def view(request):
    return HttpResponse("VERSION")


async def stream(request):
    async def chunks():
        yield "first"
        await asyncio.sleep(3600)

    return StreamingHttpResponse(chunks())


async def start(request):
    create_background_task(asyncio.sleep(3600), name="hour")
    return HttpResponse()


urlpatterns = [path("", view), path("stream/", stream), path("start/", start)]
"""


@pytest.mark.parametrize("what", ["stream", "start"])
@pytest.mark.parametrize("scope", ["request", "process"])
def test_an_edit_and_ctrl_c(tmp_path: Path, scope: str, what: str) -> None:
    # So long that who waited for it would be noticed.
    options = {"SCOPE": scope, "SHUTDOWN_TIMEOUT": 600.0}
    if scope == "process":
        options["LIFESPAN"] = "reloaded.lifespan"
    code = SITE.replace("{OPTIONS}", repr(options))
    (tmp_path / "reloaded.py").write_text(code.replace("VERSION", "old"))
    port = free_port()
    command = [sys.executable, "-m", "django", "runserver", f"127.0.0.1:{port}"]
    environment = {
        "DJANGO_SETTINGS_MODULE": "reloaded",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "PYTHONUNBUFFERED": "1",
        # Python takes a file of the same size and the same second for the one that it has compiled.
        "PYTHONDONTWRITEBYTECODE": "1",
    }

    def answer() -> bytes:
        try:
            with opener.open(Request(f"http://127.0.0.1:{port}/"), timeout=10) as response:
                return response.read()  # type: ignore[no-any-return]
        except OSError:
            return b""

    up = lambda: takes_connections(port)  # noqa: E731
    with running(command, tmp_path, tmp_path / "log", environment, up) as server:
        assert eventually(answer) == b"old"
        with closing(HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", f"/{what}/")
            response = connection.getresponse()
            assert what == "start" or response.read(5) == b"first"
            edited = [began := time.monotonic()]
            (tmp_path / "reloaded.py").write_text(code.replace("VERSION", "new"))

            def is_new() -> bool:
                found = answer()
                if found == b"old" and time.monotonic() > edited[-1] + 5:
                    # The reloader may look at the file for the first time after the edit.
                    edited.append(time.monotonic())
                    os.utime(tmp_path / "reloaded.py")
                return found == b"new"

            eventually(is_new, 120)
            print(f"{scope}, {what}: the new code answered after {time.monotonic() - began:.1f} s")
        if what == "start":
            assert "background task hour of GET '/start/'" in server.log()
        assert "gave up" not in server.log()
        if scope == "process":
            assert server.log().count("lifespan left") == 1
        with opener.open(f"http://127.0.0.1:{port}/start/", timeout=60):
            pass
        os.killpg(server.process.pid, signal.SIGINT)
        server.process.wait(120)
        # The reloader kills it a quarter of a second later, which a busy machine may need for other things.
        is_named = server.log().count("background task hour of GET '/start/'") == 1 + (what == "start")
        print(f"Ctrl-C: the task was {'' if is_named else 'not '}named")
