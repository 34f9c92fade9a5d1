"""The same requests to each WSGI server, in both scopes: docs/servers.md says which servers, how, and what comes of it.

The site is `matrix_site`. The commands, and what servers differ in, are read from the page's tables.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse, IncompleteRead
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import pytest

from ..support import eventually
from .support import ROOT, ServerProcess, free_port, running, takes_connections

PAGE = ROOT / "docs" / "servers.md"
SERVERS = (
    "runserver",
    "gunicorn sync",
    "gunicorn gthread",
    "waitress",
    "uWSGI",
    "uWSGI with a master",
    "cheroot",
    "granian",
)
FILE = bytes(range(256)) * 2000
#: What the site raises.
OF_THE_VIEW, OF_THE_BODY = "raised by the view", "raised by the body"
OF_ALL_KINDS = [f"ValueError: {message}\n" for message in (OF_THE_VIEW, OF_THE_BODY)]
TRACEBACK = "Traceback (most recent call last)"

SUSPECT = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|Warning\b|Exception ignored|^\w*(Error|Exception)\b")
#: What is not wrong, though the words are the same.
HARMLESS = re.compile(
    r"WARNING: This is a development server"
    r"|you are running uWSGI (as root|without its master process manager)"
    # Its number depends on the machine's cores.
    r"|Configuration allows spawning up to \d+ Python threads"
    r"|WSGI app sent body bytes on a no-body response \(method=HEAD"
    # uWSGI, of a client that has gone away.
    r"|^OSError: write error$"
)
#: cheroot's, with any application: it collects what it could not send to a client that had gone away.
HARMLESS_TRACEBACK = re.compile(
    r"^Exception ignored (?:in:|while calling deallocator) <function IOBase\.__del__ .*\n"
    r"Traceback .*\n(?:  .*\n)+OSError: \[Errno 9\] .*\n",
    re.MULTILINE,
)
#: How Django and the servers tell of what the site raises.
EXPECTED = re.compile(
    rf"^ValueError: {OF_THE_VIEW}$|Internal Server Error: /error$"
    rf"|^ValueError\b.*{OF_THE_BODY}"
    r"|\[ERROR\] (Error handling request|Application callable raised an exception)$"
    r"|ERROR waitress Exception while serving /error_in_stream$"
)


def tables() -> list[dict[str, dict[str, str]]]:
    """The page's tables: for each server, what stands below each heading."""
    found: list[dict[str, dict[str, str]]] = []
    for block in re.findall(r"^\|.*\|$(?:\n^\|.*\|$)+", PAGE.read_text(), re.MULTILINE):
        heading, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        assert all(len(row) == len(heading) for row in rows), block
        found.append({row[0]: dict(zip(heading, row, strict=True)) for row in rows})
    return found


RUN, DIFFERENCES = tables()


class Site:
    """A server that runs, and what the test knows of it."""

    def __init__(self, name: str, scope: str, folder: Path, port: int, server: ServerProcess) -> None:
        self.name = name
        self.scope = scope
        self.folder = folder
        self.server = server
        #: What it has been asked to raise so far.
        self.raised: list[str] = []
        #: What its requests have run on so far.
        self.loops: list[int] = []
        self._port = port
        self._numbers = count()

    def differs(self, heading: str, values: tuple[str, str]) -> bool:
        """Whether the page says the first of two values of this server."""
        value = DIFFERENCES[self.name][heading]
        assert value in values
        return value == values[0]

    def new_key(self) -> str:
        return f"request{next(self._numbers)}"

    @contextmanager
    def ask(self, path: str, key: str = "", method: str = "GET", header: str = "X-Test: 1") -> Iterator[HTTPResponse]:
        """Send a request. Gives its response, with its headers read; the client goes away at the end of the block."""
        with socket.create_connection(("127.0.0.1", self._port), timeout=60) as connection:
            target = f"/{path}?key={key}" if key else f"/{path}"
            lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", header, "", ""]
            connection.sendall("\r\n".join(lines).encode())
            with HTTPResponse(connection, method=method) as response:
                response.begin()
                yield response

    def events(self, key: str) -> list[dict[str, Any]]:
        """What the site has recorded of a request by now."""
        path = self.folder / key
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def names(self, key: str) -> list[str]:
        return [event["event"] for event in self.events(key)]

    def release(self, key: str, *turns: int) -> None:
        for turn in turns:
            (self.folder / f"{key}-{turn}").touch()

    def state(self) -> Any:
        with self.ask("state") as response:
            return json.loads(response.read())

    def finished(self, key: str, *during: str, promoted_at: str = "") -> list[dict[str, Any]]:
        """Wait for the end of a request, and see that it has kept the promises.

        during: what its view and body did. promoted_at: the first event that its loop thread has recorded, if any has.
        """
        eventually(lambda: "request_finished, async" in self.names(key), 60)
        events = self.events(key)
        assert [event["event"] for event in events] == [
            "request_started",
            "request_started, async",
            "before the view",
            *(name for name in during if name == "view"),
            "after the view",
            *(name for name in during if name != "view"),
            "request_finished",
            "request_finished, async",
        ]
        (loop,) = {event["loop"] for event in events}
        (request_thread,) = {event[by] for event in events for by in ("sync_thread", "caller") if by in event}
        by_hand = events if self.scope == "request" else []
        if promoted_at:
            by_hand = list(takewhile(lambda event: event["event"] != promoted_at, by_hand))
        assert {event["thread"] for event in by_hand} <= {request_thread}
        on_loop_thread = {event["thread"] for event in events[len(by_hand) :]}
        assert len(on_loop_thread) == (1 if promoted_at or self.scope == "process" else 0)
        assert request_thread not in on_loop_thread
        # Django gathers async receivers, in tasks of their own.
        assert len({event["task"] for event in events if not event["event"].endswith(", async")}) == 1
        if self.scope == "request":
            assert loop not in self.loops
            eventually(lambda: self.state()["open"] == [], 60)
        else:
            assert {loop, *self.loops} == {loop}
            assert self.state()["open"] == [loop]
        eventually(lambda: self.state()["tasks"] == [], 60)
        self.loops.append(loop)
        return events

    def quiet(self) -> None:
        """See that the server's log tells of what it was asked to raise, each once, and of nothing else."""
        raised = [f"ValueError: {message}\n" for message in self.raised]
        expected = {message: raised.count(message) for message in OF_ALL_KINDS} | {TRACEBACK: len(raised)}

        def is_as_expected() -> bool:
            log = HARMLESS_TRACEBACK.sub("", self.server.log())
            lines = [line for line in log.splitlines() if SUSPECT.search(line)]
            surprises = [line for line in lines if not (HARMLESS.search(line) or EXPECTED.search(line))]
            return not surprises and {message: log.count(message) for message in expected} == expected

        # The server may be in the middle of writing a traceback, which Python does line by line.
        try:
            eventually(is_as_expected, 60)
        except AssertionError as exc:
            exc.add_note(self.server.log())
            raise


@contextmanager
def served(name: str, scope: str, folder: Path) -> Iterator[Site]:
    program, *arguments = shlex.split(RUN[name]["command"].strip("`"))
    port = free_port()
    arguments = [argument.replace("8000", str(port)) for argument in arguments]
    executable = sys.executable if program == "python" else os.path.join(sysconfig.get_path("scripts"), program)
    if not os.path.exists(executable):
        reason = f"{program} is not installed: it comes with pip install -e '.[tests]'"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    (folder / "served").write_bytes(FILE)
    environment = {
        "DJANGO_SETTINGS_MODULE": "tests.servers.matrix_site",
        "SITE": json.dumps({"folder": str(folder), "scope": scope}),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "default",
        # gunicorn puts a socket there.
        "HOME": str(folder),
    }
    command = [executable, *arguments]
    with running(command, folder, folder / "log", environment, lambda: takes_connections(port)) as server:
        yield Site(name, scope, folder, port, server)


@pytest.fixture(
    scope="module",
    params=[(name, scope) for name in SERVERS for scope in ("request", "process")],
    ids=lambda param: "-".join(param).replace(" ", "_"),
)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with served(*request.param, tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture
def key(site: Site) -> str:
    return site.new_key()


def test_the_page_has_what_is_run() -> None:
    assert tuple(RUN) == tuple(DIFFERENCES) == SERVERS


def test_sync_view(site: Site, key: str) -> None:
    with site.ask("plain", key) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert response.headers["Content-Length"] == "5"
        assert response.read() == b"plain"
    site.finished(key)


def test_async_view(site: Site, key: str) -> None:
    with site.ask("asynchronous", key) as response:
        assert response.status == 200
        assert response.headers["Content-Length"] == "12"
        assert response.read() == b"asynchronous"
    site.finished(key, "view")


def test_promoted_request(site: Site, key: str) -> None:
    with site.ask("gathering", key) as response:
        assert response.status == 200
        # The one goes on while the request thread runs the other.
        assert response.read() == b"gathering"
    site.finished(key, "view", promoted_at="after the view")


@pytest.mark.parametrize("path", ["stream", "sync_stream"])
def test_each_chunk_of_a_body_arrives_before_the_next_one_is_made(site: Site, key: str, path: str) -> None:
    with site.ask(path, key) as response:
        assert response.status == 200
        assert "Content-Length" not in response.headers
        chunked = site.differs("a body of unknown length", ("chunked", "until the connection closes"))
        assert response.headers.get("Transfer-Encoding") == ("chunked" if chunked else None)
        for turn, chunk in enumerate([b"one\n", b"two\n", b"three\n"]):
            assert response.readline() == chunk
            # The body can not have gone on, for it waits for its release.
            names = site.names(key)
            assert names.count("chunk") == turn + 1
            assert names[-1] == "chunk"
            site.release(key, turn)
        assert response.read() == b""
    view = ["view"] if path == "stream" else []
    events = site.finished(key, *view, "chunk", "chunk", "chunk", "end of the body")
    assert [event["how"] for event in events if "how" in event] == ["exhausted"]


def test_file(site: Site, key: str) -> None:
    with site.ask("file", key) as response:
        assert response.status == 200
        assert response.headers["Content-Length"] == str(len(FILE))
        assert response.headers["Content-Disposition"] == 'inline; filename="served"'
        assert response.read() == FILE
    started, *_ = site.finished(key)
    assert started["wrapper"] == site.differs("file wrapper", ("yes", "no"))


def test_head(site: Site, key: str) -> None:
    with site.ask("asynchronous", key, "HEAD") as response:
        assert response.status == 200
        assert response.headers["Content-Length"] == "12"
        assert response.fp is not None
        has_none = site.differs("an answer to HEAD", ("has no body", "has the body"))
        assert response.fp.read() == (b"" if has_none else b"asynchronous")
    site.finished(key, "view")


def test_head_of_a_stream(site: Site, key: str) -> None:
    is_read = site.differs("a stream's body for HEAD", ("is read to its end", "is closed early"))
    if is_read:
        site.release(key, 0, 1, 2)
    with site.ask("stream", key, "HEAD") as response:
        assert response.status == 200
        assert "Content-Length" not in response.headers
        assert response.fp is not None
        sent = response.fp.read()
    assert (sent == b"") == site.differs("an answer to HEAD", ("has no body", "has the body"))
    site.release(key, 0, 1, 2)
    eventually(lambda: "end of the body" in site.names(key), 60)
    chunks = site.names(key).count("chunk")
    # On a loop thread, so that the end of a body that is not read to its end can be given up.
    promoted_at = "" if is_read else "end of the body"
    events = site.finished(key, "view", *["chunk"] * chunks, "end of the body", promoted_at=promoted_at)
    assert [event["how"] for event in events if "how" in event] == ["exhausted" if is_read else "GeneratorExit"]


def test_not_modified(site: Site, key: str) -> None:
    with site.ask("asynchronous") as response:
        etag = response.headers["ETag"]
    with site.ask("asynchronous", key, header=f"If-None-Match: {etag}") as response:
        assert response.status == 304
        assert response.headers["ETag"] == etag
        assert response.headers.get("Content-Length", "0") == "0"
        assert response.fp is not None
        assert response.fp.read() == b""
    site.finished(key, "view")


def test_error_in_a_view(site: Site, key: str) -> None:
    site.raised.append(OF_THE_VIEW)
    with site.ask("error", key) as response:
        assert response.status == 500
        assert b"Server Error (500)" in response.read()
    site.finished(key, "view")


def test_error_in_a_stream(site: Site, key: str) -> None:
    site.raised.append(OF_THE_BODY)
    with site.ask("error_in_stream", key) as response:
        assert response.status == 200
        assert response.readline() == b"one\n"
        site.release(key, 0)
        if site.differs("an error in a stream", ("is seen", "looks like the end")):
            with pytest.raises(IncompleteRead):
                response.read()
        else:
            assert response.read() == b""
    events = site.finished(key, "view", "chunk", "chunk", "end of the body")
    assert [event["how"] for event in events if "how" in event] == ["ValueError"]


def test_a_client_goes_away_while_it_is_sent_to(site: Site, key: str) -> None:
    site.release(key, 0)
    with site.ask("endless", key) as response:
        assert len(response.read(100_000)) == 100_000
    goes_away(site, key)


def test_a_client_of_server_sent_events_goes_away_between_two(site: Site, key: str) -> None:
    with site.ask("events", key) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.readline() + response.readline() == b"data: one\n\n"
        assert site.names(key)[-1] == "chunk"
    # Which the server can only notice when it sends something.
    site.release(key, 0)
    goes_away(site, key)


def goes_away(site: Site, key: str) -> None:
    events = site.finished(key, "view", "chunk", "end of the body", promoted_at="end of the body")
    # Its `finally` awaits something before it notes that. Sent to its end it would be more than anybody holds.
    assert [event["how"] for event in events if "how" in event] == ["GeneratorExit"]
    with site.ask("plain") as response:
        assert response.read() == b"plain"


def test_nothing_is_left_over(site: Site) -> None:
    """After all the others, where they are run too."""
    for path in ("asynchronous", "gathering") * 5:
        with site.ask(path) as response:
            assert response.read() == path.encode()
    # The last one may still be closing its loop.
    left = [] if site.scope == "request" else ["wsgi-loop-1"]
    eventually(lambda: site.state()["threads"] == left, 60)
    site.quiet()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("name", SERVERS)
def test_the_end_of_a_worker(name: str, how: str, tmp_path: Path) -> None:
    with served(name, "process", tmp_path) as site:
        key = site.new_key()
        with site.ask("asynchronous", key) as response:
            # Up to the end of the connection, so that nothing of the request is left to be interrupted.
            assert response.fp is not None
            assert response.fp.read() == b"asynchronous"
        eventually(lambda: "request_finished, async" in site.names(key), 60)
        if "uWSGI" in name:
            # With a request it would leave out what Python does at its end, and this is the last that it does for one.
            eventually(lambda: "] GET /asynchronous" in site.server.log(), 60)
        site.server.process.send_signal(getattr(signal, how))
        site.server.process.wait(60)
        ends_well = how in DIFFERENCES[name]["ends well on"].split(", ")
        assert site.names("lifespan") == (["entered", "left"] if ends_well else ["entered"])
        assert not re.search(r"^[A-Z]+ wsgi_loop ", site.server.log(), re.MULTILINE)
