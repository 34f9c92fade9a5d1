"""The process loop starts with the worker, under real servers, as docs/howto/start.md has it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

import pytest

from ..services.support import not_there
from .support import ROOT, ServerProcess, eventually, free_port, opener, running, takes_connections

pytestmark = pytest.mark.long

MODULE = "tests.servers.start_site"
APPLICATION = "wsgi_loop.wsgi:application"
READY_MADE = ("--config", "python:wsgi_loop.gunicorn_conf")
WORKERS = pytest.mark.parametrize("worker", ["sync", "gthread"])
#: Of gunicorn's master, whose worker could not boot.
BOOT_ERROR = 3

PAGE = (ROOT / "docs" / "howto" / "start.md").read_text()


def write_page(folder: Path) -> None:
    """Put the files of docs/howto/start.md into a folder, and the project that they are for."""
    (folder / "mysite").mkdir()
    (folder / "mysite" / "wsgi.py").write_text("from wsgi_loop.wsgi import application\n")
    for name, code in re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        (folder / name).write_text(code)


def environment(folder: Path) -> dict[str, str]:
    return {
        "DJANGO_SETTINGS_MODULE": MODULE,
        "FOLDER": str(folder),
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PYTHONUNBUFFERED": "1",
        # gunicorn may put a socket there.
        "HOME": str(folder),
    }


def journal(folder: Path) -> list[tuple[str, int]]:
    with suppress(FileNotFoundError):
        lines = (folder / "journal").read_text().splitlines()
        return [(what, int(pid)) for what, pid in map(str.split, lines)]
    return []


def gunicorn(port: int, worker: str, *options: str) -> list[str]:
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--worker-class", worker]
    return [*command, *options, APPLICATION]


@dataclass
class Site:
    server: ServerProcess
    port: int
    folder: Path

    def get(self) -> int:
        """Return the process of the worker that has answered."""
        with opener.open(f"http://127.0.0.1:{self.port}/", timeout=60) as response:
            return int(response.read())

    def those_that(self, what: str) -> list[int]:
        return [pid for found, pid in journal(self.folder) if found == what]


@contextmanager
def served(folder: Path, worker: str, *options: str) -> Iterator[Site]:
    port = free_port()
    up = lambda: any(what == "entered" for what, _ in journal(folder))  # noqa: E731
    command = gunicorn(port, worker, *options)
    with running(command, folder, folder / "log", environment(folder), up) as server:
        yield Site(server, port, folder)


@WORKERS
@pytest.mark.parametrize("how", ["fail", "hang"])
def test_a_lifespan_that_fails_is_gunicorns_boot_error(tmp_path: Path, worker: str, how: str) -> None:
    (tmp_path / how).touch()
    port = free_port()
    command = gunicorn(port, worker, *READY_MADE)
    server = ServerProcess(command, tmp_path, tmp_path / "log", environment(tmp_path))
    answers = 0
    try:
        while not server.has_ended() and not answers:
            with suppress(OSError):
                try:
                    opener.open(f"http://127.0.0.1:{port}/", timeout=1).close()
                    answers += 1
                except HTTPError as exc:
                    exc.close()
                    answers += 1
        assert answers == 0
        assert server.process.wait(60) == BOOT_ERROR, server.log()
    finally:
        server.end()
    assert journal(tmp_path) == []
    assert "Worker failed to boot" in server.log()
    expected = {"fail": "password authentication failed", "hang": "(lifespan) was not entered within 2.0 s"}[how]
    assert expected in server.log()


@WORKERS
@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
def test_it_is_open_before_the_first_request_and_closed_after_sigterm(
    tmp_path: Path, worker: str, preload: tuple[str, ...]
) -> None:
    with served(tmp_path, worker, *READY_MADE, *preload, "--workers", "2") as site:
        eventually(lambda: len(site.those_that("entered")) == 2)
        answered = {site.get() for _ in range(10)}
        site.server.process.terminate()
        assert site.server.process.wait(60) == 0
        entered = site.those_that("entered")
        # In the workers alone, and nowhere a second time.
        assert site.server.process.pid not in entered
        assert answered <= set(entered)
        assert sorted(entered) == sorted(site.those_that("left")) == sorted(set(entered))
        assert "Traceback" not in site.server.log()


@WORKERS
def test_a_reload_closes_it_and_opens_another(tmp_path: Path, worker: str) -> None:
    with served(tmp_path, worker, *READY_MADE) as site:
        first = site.get()
        site.server.process.send_signal(signal.SIGHUP)
        eventually(lambda: site.those_that("left") == [first])
        assert eventually(lambda: site.get() != first)
        site.server.process.terminate()
        assert site.server.process.wait(60) == 0
        assert len(site.those_that("entered")) == 2
        assert site.those_that("left") == site.those_that("entered")


@WORKERS
def test_max_requests_close_it(tmp_path: Path, worker: str) -> None:
    with served(tmp_path, worker, *READY_MADE, "--max-requests", "3") as site:
        first = site.get()
        while site.get() == first:
            pass
        eventually(lambda: site.those_that("left")[:1] == [first])
        site.server.process.terminate()
        assert site.server.process.wait(60) == 0
        for pid in site.those_that("entered"):
            lines = [what for what, by in journal(tmp_path) if by == pid]
            assert (lines[0], lines[-1]) == ("entered", "left")


@pytest.mark.parametrize("name", ["gunicorn.conf.py", "gunicorn_hooks.py"])
def test_a_configuration_of_ones_own(tmp_path: Path, name: str) -> None:
    write_page(tmp_path)
    with served(tmp_path, "gthread", "--config", name) as site:
        assert site.those_that("entered") == [site.get()]
        assert "The process loop has started" in site.server.log() or name == "gunicorn.conf.py"


def test_a_server_that_does_not_fork(tmp_path: Path) -> None:
    write_page(tmp_path)
    (line,) = re.findall(r"^(waitress-serve .*)$", PAGE, re.MULTILINE)
    program, *arguments = shlex.split(line)
    port = free_port()
    command = [os.path.join(sysconfig.get_path("scripts"), program), "--listen", f"127.0.0.1:{port}", *arguments]
    up = lambda: takes_connections(port)  # noqa: E731
    with running(command, tmp_path, tmp_path / "log", environment(tmp_path), up) as server:
        assert journal(tmp_path) == [("entered", server.process.pid)]
        (tmp_path / "fail").touch()
        failed = ServerProcess(command, tmp_path, tmp_path / "failed", environment(tmp_path))
        try:
            assert failed.process.wait(60) == 1
        finally:
            failed.end()
        assert "password authentication failed" in failed.log()


@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_uwsgi(tmp_path: Path, lazy: bool, fails: bool) -> None:
    uwsgi = os.path.join(sysconfig.get_path("scripts"), "uwsgi")
    if not shutil.which(uwsgi):
        not_there("no uwsgi beside this Python: pip install pyuwsgi")
    write_page(tmp_path)
    if fails:
        (tmp_path / "fail").touch()
    port = free_port()
    command = [uwsgi, "--master", "--enable-threads", "--die-on-term", "--http-socket", f"127.0.0.1:{port}"]
    command += ["--module", *(["mysite.started", "--lazy-apps", "--need-app"] if lazy else ["mysite.uwsgi_started"])]
    server = ServerProcess(command, tmp_path, tmp_path / "log", environment(tmp_path))
    try:
        if fails:
            # With need-app all of uWSGI ends. Without it, it goes on to start workers.
            eventually(lambda: server.has_ended() if lazy else "respawn" in server.log())
            assert "password authentication failed" in server.log()
            assert journal(tmp_path) == []
        else:
            eventually(lambda: len(journal(tmp_path)) == 1)
            eventually(lambda: takes_connections(port))
            ((what, pid),) = journal(tmp_path)
            assert what == "entered"
            assert Site(server, port, tmp_path).get() == pid
    except BaseException as exc:
        exc.add_note(server.log())
        raise
    finally:
        server.end()


def test_a_slow_upload_holds_up_nobody_else(tmp_path: Path) -> None:
    with (
        served(tmp_path, "gthread", *READY_MADE, "--threads", "4") as site,
        socket.create_connection(("127.0.0.1", site.port), timeout=60) as upload,
    ):
        head = "POST /upload/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\nConnection: close\r\n\r\n"
        upload.sendall(head.encode() + b"x" * 50000)
        # The view has not been called: the rest of the body comes after these answers.
        for _ in range(10):
            site.get()
        assert not site.those_that("reads")
        upload.sendall(b"x" * 50000)
        with upload.makefile("rb") as answer:
            assert b"\r\n100000\r\n" in answer.read()
