"""The example site, served by real processes: each request on one loop, from first to last step."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from .support import ROOT, copy_of_example, eventually, free_port, opener, running, takes_connections

PROBES = ["/probe/", "/probe/sync/"]
CLIENTS = 8
PLACES = {"request_started", "middleware", "view", "nested", "template tag", "body", "request_finished"}
MIDDLEWARES = {"journey_header, in", "server_timing, in", "server_timing, out", "journey_header, out"}

GUNICORN = [sys.executable, "-m", "gunicorn", "--workers", "1", "--bind"]
SYNC = ["--worker-class", "sync"]
GTHREAD = ["--worker-class", "gthread", "--threads", str(CLIENTS)]
OURS = "wsgi_loop.wsgi:application"
STOCK = "django.core.wsgi:get_wsgi_application()"
JOURNEY = 'data-journey="'

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "DJANGO_SETTINGS_MODULE": "example_site.settings",
    "PYTHONUNBUFFERED": "1",
}


@dataclass
class Site:
    """A running server of the example site."""

    port: int
    directory: Path

    def get(self, path: str) -> tuple[Any, bytes]:
        """Return the headers and the body of a 200 response. Raises OSError for any other."""
        with opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            return response.headers, response.read()

    def probe(self, path: str) -> dict[str, Any]:
        """Send a probe, and return all that was recorded of it once it was over."""
        headers, body = self.get(path)
        streamed = [json.loads(line) for line in body.splitlines()]
        journey: dict[str, Any] = json.loads(self.get(f"/journey/{headers['Journey-Id']}/")[1])
        assert journey["finished"]
        told = {(step["what"], step["loop"], step["thread"], step["task"]) for step in streamed}
        recorded = {(step["what"], step["loop"], step["thread"], step["task"]) for step in journey["steps"][:-1]}
        assert told == recorded
        return journey


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example site with its database."""
    return copy_of_example(tmp_path_factory.mktemp("site"), lambda _: ENVIRONMENT)


@contextmanager
def served(directory: Path, make_command: Callable[[str], list[str]]) -> Iterator[Site]:
    port = free_port()
    output = directory.parent / f"output-{port}.txt"
    command = make_command(f"127.0.0.1:{port}")
    with running(command, directory, output, ENVIRONMENT, lambda: takes_connections(port)):
        yield Site(port, directory)


def gunicorn(*options: str, application: str = OURS) -> Callable[[str], list[str]]:
    return lambda address: [*GUNICORN, address, *options, application]


def runserver(address: str) -> list[str]:
    return [sys.executable, "manage.py", "runserver", address]


def probe_often(site: Site) -> list[dict[str, Any]]:
    """Send each probe alone, and then both of them from several clients at once."""
    alone = [site.probe(path) for path in PROBES]
    with ThreadPoolExecutor(CLIENTS) as clients:
        return alone + list(clients.map(site.probe, PROBES * CLIENTS))


def assert_one_loop_each(journeys: list[dict[str, Any]]) -> None:
    for journey in journeys:
        steps = journey["steps"]
        assert {step["place"] for step in steps} == PLACES
        assert {step["what"] for step in steps if step["place"] == "middleware"} == MIDDLEWARES
        assert sum(step["place"] == "body" for step in steps) > 3
        assert len({step["loop"] for step in steps}) == 1, steps
        # The request thread. The async view gathers a query and a wait: from there on it is a thread of the loop's own.
        threads = [(thread, list(there)) for thread, there in groupby(steps, lambda step: step["thread"])]
        promoted = [step for step in steps if step["what"].startswith("gather")]
        thread, by_hand = threads[0]
        assert thread == journey["request_thread"]
        assert len(threads) == (2 if promoted else 1), steps
        if promoted:
            assert {step["place"] for step in by_hand} == {"request_started", "middleware", "view"}
            assert promoted[0] in by_hand
        # What the request thread calls outside of other calls: one task, as under ASGI.
        assert len({step["task"] for step in steps if step["place"] in ("middleware", "body")}) == 1, steps
        assert journey["handler"] == "wsgi_loop.handler.WSGIHandler"
    # A server may reuse its threads. Loops and tasks belong to one request.
    loops = {(journey["process"], journey["steps"][0]["loop"]) for journey in journeys}
    assert len(loops) == len(journeys)


@pytest.mark.parametrize(
    "options", [SYNC, GTHREAD, [*GTHREAD, "--preload"]], ids=["sync", "gthread", "gthread preloaded"]
)
def test_gunicorn_serves_each_request_on_one_loop(example: Path, options: list[str]) -> None:
    with served(example, gunicorn(*options)) as site:
        assert_one_loop_each(probe_often(site))


def test_runserver_serves_each_request_on_one_loop(example: Path) -> None:
    with served(example, runserver) as site:
        assert_one_loop_each(probe_often(site))


@pytest.mark.parametrize("options", [SYNC, GTHREAD], ids=["sync", "gthread"])
def test_the_probe_tells_djangos_own_handler_apart(example: Path, options: list[str]) -> None:
    with served(example, gunicorn(*options, application=STOCK)) as site:
        for journey in probe_often(site):
            steps = journey["steps"]
            assert journey["handler"] == "django.core.handlers.wsgi.WSGIHandler"
            assert {step["place"] for step in steps} == PLACES
            # The signals, the chain of middlewares, and each loop call of the body.
            assert len({step["loop"] for step in steps}) >= 5
            with pytest.raises(AssertionError):
                assert_one_loop_each([journey])


def test_runserver_serves_static_files(example: Path) -> None:
    with served(example, runserver) as site:
        for name, content_type in (("site.css", "text/css"), ("icon.svg", "image/svg+xml")):
            headers, body = site.get(f"/static/example_site/{name}")
            assert headers["Content-Type"] == content_type
            assert body == (example / "example_site/static/example_site" / name).read_bytes()
            assert "Journey-Id" not in headers
        with pytest.raises(urllib.error.HTTPError) as error:
            site.get("/static/example_site/missing.css")
        assert error.value.code == 404
        error.value.close()


def test_runserver_reloads_changed_code(example: Path, tmp_path: Path) -> None:
    directory = tmp_path / "example"
    shutil.copytree(example, directory)
    views = directory / "example_site/views.py"
    with served(directory, runserver) as site:
        before = site.probe("/probe/")
        views.write_text(views.read_text().replace('"application/jsonl"', '"application/x-changed"'))

        def is_changed() -> bool:
            try:
                headers, _ = site.get("/probe/")
            except OSError:  # between the old process and the new one
                return False
            if headers["Content-Type"] == "application/x-changed":
                return True
            # The reloader takes what changed before its first look at the files for unchanged.
            views.touch()
            return False

        eventually(is_changed)
        after = site.probe("/probe/")
        assert before["process"] != after["process"]
        assert_one_loop_each([before, after])


@pytest.mark.parametrize("path", ["/", "/sync/"])
@pytest.mark.parametrize("application", [OURS, STOCK])
def test_the_front_page_sends_its_request_through_both_handlers(example: Path, application: str, path: str) -> None:
    with served(example, gunicorn(*GTHREAD, application=application)) as site:
        headers, body = site.get(path)
        sides = [side.split("</article>")[0] for side in body.decode().split("<article")[1:]]
        journeys = [json.loads(site.get(f"/journey/{side.split(JOURNEY)[1][:32]}/")[1]) for side in sides]
        (stock_side, our_side), (stock, ours) = sides, journeys
        assert headers["Journey-Id"] not in {stock["id"], ours["id"]}
        assert_one_loop_each([ours])
        assert stock["handler"] == "django.core.handlers.wsgi.WSGIHandler"
        assert [step["what"] for step in ours["steps"]] == [step["what"] for step in stock["steps"]]
        loops = len({step["loop"] for step in stock["steps"]})
        assert loops >= 5
        assert f"<b>{loops}</b> event loops" in stock_side
        assert "<b>1</b> event loop<" in our_side
        # The loop of the async view has got a thread of its own.
        assert ("<b>2</b> threads<" if path == "/" else "<b>1</b> thread<") in our_side
        assert "request_finished" in our_side
        # Neither has served the other one meanwhile.
        first, second = (journey["steps"] for journey in journeys)
        assert not {step["loop"] for step in first} & {step["loop"] for step in second}
