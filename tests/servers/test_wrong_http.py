"""Malformed HTTP, sent to a real gunicorn: it is refused or answered, and nothing is left over."""

from __future__ import annotations

import re
import socket
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ..support import eventually
from .test_matrix import served

MALFORMED = [
    b"NONSENSE\r\n\r\n",
    b"\x00\xff\x16\x03\x01 / HTTP/1.1\r\n\r\n",
    b"GET /asynchronous HTTP/9.9\r\nHost: a\r\n\r\n",
    b"GET /asynchronous HTTP/1.1\r\nNo colon here\r\n\r\n",
    b"GET /asynchronous HTTP/1.1\r\nHost: a\r\nX-Null: \x00\r\n\r\n",
    b"GET /asynchronous HTTP/1.1\r\nHost: a\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
    b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /%ff%00%c3\xff?%=%&\xff=1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    b"GET /asynchronous HTTP/1.1\r\nHost: a, b\r\nConnection: close\r\nCookie: =;=\xff\r\n\r\n",
    b"POST /asynchronous HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    b"POST /asynchronous HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /asynchronous HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"POST /asynchronous HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\nzz\r\n",
    # These end in the middle.
    b"GET /asynchronous HTT",
    b"POST /asynchronous HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\nConnection: close\r\n\r\nshort",
]


@pytest.mark.parametrize("scope", ["request", "process"])
def test_malformed_http(scope: str, tmp_path: Path) -> None:
    with served("gunicorn gthread", scope, tmp_path) as site:
        address = re.search(r"--bind (\S+)", " ".join(site.server.command))
        assert address is not None
        parts = urlsplit(f"//{address[1]}")
        statuses = []
        for sent in MALFORMED:
            with closing(socket.create_connection((parts.hostname, parts.port), timeout=60)) as connection:
                answer = b""
                try:
                    connection.sendall(sent)
                    connection.shutdown(socket.SHUT_WR)
                    while received := connection.recv(65536):
                        answer += received
                except OSError:
                    pass  # gunicorn does not read to its end what it refuses
                status = re.match(rb"HTTP/1\.[01] (\d+) ", answer)
                statuses.append(int(status[1]) if status else None)
        assert [status for status in statuses if status is not None and status >= 500] == []
        assert statuses.count(400) >= 5, statuses
        # Some get as far as the view.
        assert 404 in statuses or 200 in statuses, statuses
        key = site.new_key()
        with site.ask("asynchronous", key) as response:
            assert response.status == 200
        eventually(lambda: site.state()["tasks"] == [], 60)
        eventually(lambda: len(site.state()["open"]) == (scope == "process"), 60)
        # Django tells of a host that it does not allow, with a traceback.
        eventually(
            lambda: (log := site.server.log()).count("Traceback") == log.count("Invalid HTTP_HOST header") // 2, 60
        )
