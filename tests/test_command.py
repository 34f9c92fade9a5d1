"""`manage.py wsgi_loop`: both handlers are sent the same requests, and what is shown is what they did."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.core.management import call_command
from django.core.management.base import CommandError
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse

from wsgi_loop.bridge import watching
from wsgi_loop.bridge.storage import scope_here

from .services.support import connected_redis
from .support import eventually, here, serve

ROOT = Path(__file__).parents[1]


class Seen:
    """A view that keeps the requests that it is given."""

    def __init__(self) -> None:
        self.requests: list[HttpRequest] = []

    def __call__(self, request: HttpRequest) -> HttpResponse:
        request.body  # noqa: B018 - read while it can be
        self.requests.append(request)
        return HttpResponse("seen")


def report(*paths: str, **options: Any) -> list[dict[str, Any]]:
    """What it says in JSON, of what this process serves: in processes of their own, see `of_processes`."""
    options = {"in_process": True} | options
    out = io.StringIO()
    call_command("wsgi_loop", *paths, as_json=True, stdout=out, **options)
    requests: list[dict[str, Any]] = json.loads(out.getvalue())["requests"]
    return requests


def shown(*paths: str, **options: Any) -> dict[str, list[str]]:
    """The table's rows, by their names."""
    options = {"in_process": True} | options
    out = io.StringIO()
    call_command("wsgi_loop", *paths, stdout=out, **options)
    rows = [line.split("  ") for line in out.getvalue().splitlines()]
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


def three_calls(request: HttpRequest) -> HttpResponse:
    for _ in range(3):
        async_to_sync(here)()
    return HttpResponse()


def test_it_counts_what_each_handler_does() -> None:
    with serve({"three/": three_calls}):
        (request,) = report("/three/", repeat=2)
    assert (request["method"], request["path"]) == ("GET", "/three/")
    stock, ours = request["django"], request["wsgi_loop"]
    assert stock["status"] == ours["status"] == "200 OK"
    assert [stock[key] for key in ("loop_calls", "loops", "threads", "tasks", "one_loop")] == [3, 3, 3, 3, False]
    assert [ours[key] for key in ("loop_calls", "loops", "threads", "tasks", "one_loop")] == [3, 1, 1, 1, True]
    assert stock["median_ms"] > 0
    assert ours["median_ms"] > 0


def test_calls_in_body_and_signals_count(receive: Any) -> None:
    async def finished(**kwargs: Any) -> None:
        """What Django calls at the very end."""

    def body() -> Iterator[bytes]:
        async_to_sync(here)()
        yield b"chunk"

    receive(finished=finished)
    with serve(lambda request: StreamingHttpResponse(body())):
        (request,) = report(repeat=1)
    assert [request[side]["loop_calls"] for side in ("django", "wsgi_loop")] == [2, 2]
    assert [request[side]["loops"] for side in ("django", "wsgi_loop")] == [2, 1]


def test_calls_of_other_threads_do_not_count() -> None:
    stop, called = threading.Event(), threading.Event()

    def call_on() -> None:
        while not stop.is_set():
            async_to_sync(here)()
            called.set()

    def view(request: HttpRequest) -> HttpResponse:
        called.clear()
        assert called.wait(30)
        return three_calls(request)

    thread = threading.Thread(target=call_on)
    thread.start()
    try:
        with serve(view):
            (request,) = report(repeat=1)
    finally:
        stop.set()
        thread.join(30)
    assert [request[side]["loop_calls"] for side in ("django", "wsgi_loop")] == [3, 3]


@pytest.mark.parametrize("scope", ["request", "process"])
def test_left_over_tasks(scope: str, settings: Any, new_process_loop: None, caplog: Any) -> None:
    caplog.set_level(logging.ERROR, "wsgi_loop")
    settings.WSGI_LOOP = {"SCOPE": scope}
    kept: set[asyncio.Task[None]] = set()

    async def forget() -> None:
        task = asyncio.create_task(asyncio.sleep(60), name="forgotten")
        kept.add(task)
        await asyncio.create_task(asyncio.sleep(0), name="awaited")

    def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse(async_to_sync(forget)())

    with serve(view):
        (request,) = report(repeat=1)
    for side in ("django", "wsgi_loop"):
        assert request[side]["left_over_tasks"] == ["forgotten (sleep)"]
    for task in kept:
        if not task.get_loop().is_closed():
            task.get_loop().call_soon_threadsafe(task.cancel)


def test_contextvars_left_on_the_thread() -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        names = [user.username async for user in User.objects.all().aiterator()]
        return HttpResponse(names)

    with serve(view):
        (request,) = report(repeat=4)
    assert request["django"]["contextvars_leaked"] >= 1
    assert request["wsgi_loop"]["contextvars_leaked"] == 0


def test_a_request_is_sent_as_often_as_it_says() -> None:
    seen = Seen()
    with serve(seen):
        report("/", repeat=3)
        assert len(seen.requests) == 2 * (1 + 3)
        seen.requests.clear()
        report("/")
        assert len(seen.requests) == 2 * (1 + 20)
        seen.requests.clear()
        report("/", method="post")
        assert len(seen.requests) == 2 * (1 + 1)
        assert {request.method for request in seen.requests} == {"POST"}


def test_method_header_and_data_arrive(settings: Any) -> None:
    settings.ALLOWED_HOSTS = [".example.com"]
    seen = Seen()
    with serve(seen, middleware=["django.middleware.common.CommonMiddleware"]):
        report("/fö/?a=1", method="PUT", header=["X-Color: red", "accept: text/plain"], data="b=ü", repeat=1)
        report("/", method="POST", data="c=3", repeat=1)
    first, last = seen.requests[0], seen.requests[-1]
    assert (first.method, first.path, first.GET["a"]) == ("PUT", "/fö/", "1")
    assert (first.headers["X-Color"], first.headers["Accept"]) == ("red", "text/plain")
    assert first.body == "b=ü".encode()
    assert first.get_host() == "example.com"
    assert last.POST["c"] == "3"


@pytest.mark.parametrize("secure", [False, True])
def test_a_form_passes_the_csrf_check(settings: Any, secure: bool) -> None:
    settings.SECURE_SSL_REDIRECT = secure
    seen = Seen()
    middleware = ["django.middleware.security.SecurityMiddleware", "django.middleware.csrf.CsrfViewMiddleware"]
    with serve(seen, middleware=middleware):
        (request,) = report("/", method="POST", repeat=1)
    assert request["wsgi_loop"]["status"] == "200 OK"
    assert {request.is_secure() for request in seen.requests} == {secure}


@pytest.mark.django_db(transaction=True)
def test_a_user_is_logged_in_and_out_again() -> None:
    user = User.objects.create_user("ada")
    users = []

    async def view(request: HttpRequest) -> HttpResponse:
        users.append(await request.auser())
        return HttpResponse(await sync_to_async(lambda: users[-1].username)())

    middleware = [
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ]
    with serve(view, middleware=middleware):
        report("/", user="ada", repeat=1)
    assert users == [user] * 4
    assert not Session.objects.exists()
    user.refresh_from_db()
    assert user.last_login is None


@pytest.mark.django_db
def test_an_unknown_user_names_the_remedy() -> None:
    with pytest.raises(CommandError, match=r"no user with the username 'nobody'.*createsuperuser"):
        report("/", user="nobody")


@pytest.mark.parametrize("app", ["django.contrib.auth", "django.contrib.sessions"])
def test_a_user_without_sessions_names_the_remedy(settings: Any, app: str) -> None:
    settings.INSTALLED_APPS = [installed for installed in settings.INSTALLED_APPS if installed != app]
    with pytest.raises(CommandError, match=f"--user needs {app} in INSTALLED_APPS. Give --header"):
        report("/", user="ada", skip_checks=True)


@pytest.mark.parametrize(
    ("paths", "options", "words"),
    [
        (["books/"], {}, "'books/' does not begin with a slash"),
        (["/"], {"repeat": 0}, "--repeat is 0"),
        (["/"], {"header": ["no colon"]}, "'no colon'.*a name, a colon and a value"),
        (["/"], {"data": "a=1"}, "Give --method POST"),
        (["/"], {"method": "GE T"}, "--method is 'GE T'"),
    ],
)
def test_bad_input_is_told(paths: list[str], options: dict[str, Any], words: str) -> None:
    seen = Seen()
    with serve(seen), pytest.raises(CommandError, match=words):
        report(*paths, **options)
    assert seen.requests == []


def test_a_wrong_setting_is_told(settings: Any) -> None:
    settings.WSGI_LOOP = {"SCOPE": "galaxy"}
    with pytest.raises(CommandError, match="galaxy"):
        report("/", skip_checks=True)


def test_an_unknown_path_is_a_result() -> None:
    with serve({"known/": Seen()}):
        known, unknown = report("/known/", "/unknown/", repeat=1)
    assert known["django"]["status"] == "200 OK"
    assert unknown["wsgi_loop"]["status"] == "404 Not Found"


def test_an_exception_is_a_result(settings: Any) -> None:
    def body() -> Iterator[bytes]:
        yield b"chunk"
        raise OSError("the disk is gone")

    with serve(lambda request: StreamingHttpResponse(body())):
        (request,) = report("/", repeat=1)
    assert request["django"]["status"] == request["wsgi_loop"]["status"] == "OSError: the disk is gone"


def test_errors_are_logged_once_for_each_handler(caplog: Any) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        raise ValueError("broken view")

    with serve(view):
        (request,) = report("/", repeat=5)
    assert request["wsgi_loop"]["status"].startswith("500")
    assert len([record for record in caplog.records if record.name == "django.request"]) == 2
    assert not logging.getLogger("django.request").disabled


def test_it_fails_if_it_is_asked_to_and_only_then() -> None:
    def view(request: HttpRequest) -> HttpResponse:
        async_to_sync(here)()
        async_to_sync(here, force_new_loop=True)()
        return HttpResponse()

    def elsewhere(request: HttpRequest) -> HttpResponse:
        async_to_sync(here, force_new_loop=True)()
        return HttpResponse()

    with serve({"two/": view, "elsewhere/": elsewhere, "one/": three_calls, "none/": Seen()}):
        report("/two/", repeat=1)
        (request,) = report("/elsewhere/", repeat=1)
        assert (request["wsgi_loop"]["loops"], request["wsgi_loop"]["one_loop"]) == (1, False)
        report("/one/", "/none/", repeat=1, fail_if_not_one_loop=True)
        with pytest.raises(CommandError, match=r"Not on one event loop of wsgi-loop: /two/$") as caught:
            report("/one/", "/two/", repeat=1, fail_if_not_one_loop=True)
    assert caught.value.returncode == 1


def test_the_table_shows_it() -> None:
    with serve(three_calls):
        rows = shown("/", repeat=1)
    assert rows["GET /"] == ["Django's own handler", "wsgi-loop"]
    assert rows["loop calls"] == ["3", "3"]
    assert rows["event loops"] == ["3", "1"]
    with serve(Seen()):
        assert any("no loop call" in name for name in shown("/", repeat=1))


def test_it_leaves_nothing_behind(settings: Any) -> None:
    new_event_loop = asyncio.events.new_event_loop
    before = set(threading.enumerate())
    with serve(three_calls):
        report("/", repeat=1)
    assert asyncio.events.new_event_loop is new_event_loop
    # asgiref lets its threads go, and does not wait for their end.
    eventually(lambda: not [t for t in set(threading.enumerate()) - before if not re.match(r"wsgi-loop-\d", t.name)])
    assert watching.watchers == ()


@pytest.fixture
def example(tmp_path: Path) -> dict[str, Any]:
    """Arguments for a process with the settings of the tests."""
    return {
        "cwd": ROOT,
        "env": os.environ | {"DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        "timeout": 120,
    }


def test_a_terminal_gets_a_bar_and_nothing_else_does(example: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "django", "wsgi_loop", "/missing/", "--repeat", "2"]
    plain = subprocess.run(command, capture_output=True, text=True, **example)
    assert plain.returncode == 0, plain.stderr
    assert "[#" not in plain.stderr
    assert "404 Not Found" in plain.stdout
    terminal, end = pty.openpty()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, text=True, **example)
        os.write(end, b"$")
        written = ""
        while not written.endswith("$"):
            written += os.read(terminal, 100_000).decode()
    finally:
        os.close(end)
        os.close(terminal)
    assert done.stdout.count("404 Not Found") == 2
    assert "6 of 6 requests" in written
    # It is gone at the end.
    assert written.endswith("\r\x1b[K$")


PATHS = ("kept-client", "imported", "own-state", "background", "leave", "stream", "worse", "background")
REPEAT = 4


@pytest.fixture(scope="module", params=["request", "process"])
def of_processes(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """The scope, and the processes that reported on the site, in JSON and as a table."""
    with connected_redis():
        done = [run_report(request.param, *PATHS, *options) for options in (["--json"], [])]
    return request.param, *done


def run_report(scope: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    paths = [argument if argument.startswith("-") else f"/{argument}/" for argument in arguments]
    environment = {
        "DJANGO_SETTINGS_MODULE": "tests.report_site",
        "PYTHONPATH": str(ROOT),
        "REPORT_SCOPE": scope,
        "REPORT_PARENT": str(os.getpid()),
    }
    return subprocess.run(
        # What redis says about a client whose loop is gone would be an error here, and not there.
        [sys.executable, "-W", "ignore::ResourceWarning", "-m", "django", "wsgi_loop", *paths, f"--repeat={REPEAT}"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def part(done: subprocess.CompletedProcess[str], path: str) -> str:
    """What the table says of a path."""
    (found, *_) = [part for part in done.stdout.split("\n\n") if part.startswith(f"GET /{path}/")]
    return found


def of_path(done: subprocess.CompletedProcess[str], path: str) -> list[dict[str, Any]]:
    return [request for request in json.loads(done.stdout)["requests"] if request["path"] == f"/{path}/"]


def test_a_client_that_breaks_is_recognised(of_processes: Any) -> None:
    scope, as_json, table = of_processes
    (request,) = of_path(as_json, "kept-client")
    shown = part(table, "kept-client")
    assert request["django"]["of_another_loop"] == "RuntimeError: Event loop is closed"
    assert len(request["django"]["answers"]) == 2
    assert "Bound to another event loop, with Django's own handler: RuntimeError: Event loop is closed" in shown
    if scope == "process":
        assert request["wsgi_loop"]["answers"] == {"200 OK": 1 + REPEAT}
        assert request["wsgi_loop"]["of_another_loop"] == ""
        assert "PerLoop" not in shown
    else:
        assert request["wsgi_loop"]["of_another_loop"] == "RuntimeError: Event loop is closed"
        assert "Keep a PerLoop in its place, or serve with WSGI_LOOP = {'SCOPE': 'process'}." in shown
        assert "Something belongs to the event loop of an earlier request: /kept-client/" in table.stderr


def test_each_scope_has_its_own_remedy(of_processes: Any) -> None:
    scope, _, table = of_processes
    shown = part(table, "imported")
    assert "got Future <Future pending> attached to a different loop" in shown
    assert ("opened on a loop other than the process loop" in shown) == (scope == "process")
    assert ("Keep a PerLoop in its place" in shown) == (scope == "request")


def test_each_handler_is_in_a_process_of_its_own(of_processes: Any) -> None:
    (request,) = of_path(of_processes[1], "own-state")
    for side in ("django", "wsgi_loop"):
        assert request[side]["answers"] == {"200 OK": 1 + REPEAT}


def test_background_tasks_are_not_left_over_and_left_over_ones_are_their_requests_own(of_processes: Any) -> None:
    _, as_json, _ = of_processes
    for request in of_path(as_json, "background"):
        assert request["wsgi_loop"]["left_over_tasks"] == []
    (request,) = of_path(as_json, "leave")
    assert request["django"]["left_over_tasks"] == request["wsgi_loop"]["left_over_tasks"] == ["left (sleep)"]


def test_a_stream_that_django_reads_first_is_told(of_processes: Any) -> None:
    _, as_json, table = of_processes
    (request,) = of_path(as_json, "stream")
    assert [request[side]["is_read_first"] for side in ("django", "wsgi_loop")] == [True, False]
    assert "reads the async body to its end before it sends the first byte" in part(table, "stream")
    assert "StreamingHttpResponse" not in table.stderr


def test_all_answers_count(of_processes: Any) -> None:
    _, as_json, table = of_processes
    (request,) = of_path(as_json, "worse")
    assert (request["worse"], request["wsgi_loop"]["status"]) == (True, "200 OK")
    assert request["django"]["answers"] == {"200 OK": 1 + REPEAT}
    assert request["wsgi_loop"]["answers"] == {"200 OK": 1, "500 Internal Server Error": REPEAT}
    assert "All answers with wsgi-loop: 4 x 500 Internal Server Error, 1 x 200 OK" in part(table, "worse")
    assert as_json.returncode == table.returncode == 1
    assert "wsgi-loop answered otherwise than Django's own handler: /worse/" in table.stderr


def test_the_options_are_told(of_processes: Any) -> None:
    scope, as_json, table = of_processes
    options = json.loads(as_json.stdout)["options"]
    assert (options["SCOPE"], options["SHUTDOWN_TIMEOUT"], options["LIFESPAN"]) == (scope, 0.5, None)
    assert f"WSGI_LOOP: {options}" in table.stdout
    assert "each handler in a process of its own" in table.stdout


def test_what_goes_well_ends_well() -> None:
    done = run_report("request", "own-state", "stream")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_ends_is_told() -> None:
    done = run_report("request", "end")
    assert done.returncode == 1
    assert "wsgi-loop-report-1, which imports the project and serves its requests, has ended" in done.stderr
    assert "exit code 7" in done.stderr


def test_a_project_that_a_process_can_not_begin_with_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # As where settings.configure() was called, of which another process knows nothing.
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE")
    with pytest.raises(CommandError, match=r"could not begin: ImproperlyConfigured: .*DJANGO_SETTINGS_MODULE"):
        report(in_process=False)


@pytest.mark.parametrize(
    ("of_stock", "of_ours", "fails"), [(500, 200, False), (200, 500, True), (200, 302, True), (500, 500, False)]
)
def test_the_exit_code_says_if_wsgi_loop_answers_worse(of_stock: int, of_ours: int, fails: bool) -> None:
    def view(request: HttpRequest) -> HttpResponse:
        async_to_sync(here)()  # from its first loop call on, a scope can be seen
        return HttpResponse(status=of_stock if scope_here() is None else of_ours)

    with serve({"answer/": view}), pytest.raises(CommandError) if fails else contextlib.nullcontext():
        report("/answer/", repeat=1)


def test_the_exit_code_is_for_machines(example: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "django", "wsgi_loop", "books/"]
    done = subprocess.run(command, capture_output=True, text=True, **example)
    assert done.returncode == 1
    assert "CommandError: The path 'books/' does not begin with a slash" in done.stderr
    help_ = subprocess.run([*command, "--help"], capture_output=True, text=True, **example)
    assert "really executed" in help_.stdout
