"""The pages of docs/: complete, as the code has it, and their examples run. (docs/scopes.md: see test_docs.)"""

# ruff: noqa: F811 - fixtures that are imported

from __future__ import annotations

import ast
import asyncio
import contextlib
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from asgiref.sync import async_to_sync
from django.core.management import call_command
from django.core.signals import request_finished
from django.utils.module_loading import import_string

import wsgi_loop
from wsgi_loop import EventLoopContext, process
from wsgi_loop.conf import DEFAULTS

from .servers.support import ROOT, ServerProcess, free_port, opener, running, takes_connections
from .services.support import (
    connected_postgres,
    count_postgres_connections,
    count_redis_connections,
    not_there,
)
from .support import eventually, serve
from .test_docs import ANSWERS, API, BLOCK, SCOPES, Site, api, mysite, redis_server  # noqa: F401

DOCS = ROOT / "docs"
SOURCES = sorted((ROOT / "wsgi_loop").rglob("*.py"))
FENCE = re.compile(r"^(`{3,})(.*?)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


def text(name: str) -> str:
    return (DOCS / name).read_text()


def all_pages() -> list[Path]:
    return [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]


# --- the pages as a whole ----------------------------------------------------------------------------------------


def test_each_page_is_in_the_table_of_contents_once() -> None:
    listed = [
        re.sub(r".*<(.+)>", r"\1", line)
        for _, head, body in FENCE.findall(text("index.md"))
        if head == "{toctree}"
        for line in body.splitlines()
        if line and not line.startswith(":")
    ]
    there = [path.relative_to(DOCS).with_suffix("").as_posix() for path in all_pages()]
    assert sorted([*listed, "index"]) == sorted(there)


def anchors(page: Path) -> set[str]:
    """What a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *all_pages()], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    # Those of directives too, but not those in code.
    prose = FENCE.sub(lambda match: match[3] if match[2].startswith("{py:") else "", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_the_readme_and_the_panel_are_set_up_as_they_say() -> None:
    to_wsgi_file, to_settings = BLOCK.findall((ROOT / "README.md").read_text())
    assert type(run_block(to_wsgi_file)["application"]) is wsgi_loop.WSGIHandler
    with serve({}, WSGI_LOOP=run_block(to_settings)["WSGI_LOOP"]) as server:
        assert server.handler._options.scope == "process"
    (to_settings,) = BLOCK.findall(text("panel.md"))
    names: dict[str, Any] = {"INSTALLED_APPS": []}
    exec(to_settings, names)
    assert names["INSTALLED_APPS"] == ["wsgi_loop"]
    assert import_string(names["DEBUG_TOOLBAR_PANELS"][-1]).__name__ == "LoopPanel"


def test_an_index_gets_whole_addresses(tmp_path: Path) -> None:
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "wsgi_loop"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = (
        "from distutils.core import run_setup; print(run_setup('setup.py', stop_after='config').get_long_description())"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import setuptools; {code}"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    links = re.findall(r"\]\(([^)\s]+)\)", done.stdout)
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []
    assert f"/raw/v{wsgi_loop.__version__}/docs/images/front-page.png" in done.stdout
    assert f"/blob/v{wsgi_loop.__version__}/docs/tutorial.md" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("furo") is None, reason="the extra `docs` is not installed")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "api.html").exists()


# --- the reference -----------------------------------------------------------------------------------------------


def nodes(kind: type[Any]) -> Iterator[Any]:
    for path in SOURCES:
        yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind))


LEVELS = {"exception": "ERROR"} | {name: name.upper() for name in ("debug", "info", "warning", "error", "critical")}


def logged() -> set[tuple[str, str, bool]]:
    """Each message of the package, as the page writes it, with its level and whether a traceback comes with it."""
    found = set()
    for call in nodes(ast.Call):
        if not (isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)):
            continue
        if call.func.value.id == "logger" and call.func.attr in {*LEVELS, "log"}:
            message = ast.literal_eval(call.args[0])
            traceback = call.func.attr == "exception" or any(keyword.arg == "exc_info" for keyword in call.keywords)
            found.add((re.sub(r"%[.\d]*[a-z]", "…", message), LEVELS[call.func.attr], traceback))
    return found


def test_each_log_message_is_in_the_reference() -> None:
    page = text("reference/logging.md")
    told = re.findall(r"^```text\n(.*?)\n```\n\nLevel: `(\w+)`(, with a traceback)?$", page, re.DOTALL | re.MULTILINE)
    assert {(message, level, bool(traceback)) for message, level, traceback in told} == logged()
    assert len(told) == page.count("\nMeans: ") == page.count("\nDo: ")


def test_there_is_one_logger() -> None:
    names = {
        ast.unparse(call.args[0])
        for call in nodes(ast.Call)
        if isinstance(call.func, ast.Attribute) and call.func.attr == "getLogger"
    }
    assert names == {"'wsgi_loop'"}


def test_each_remedy_is_in_the_reference() -> None:
    page = " ".join(text("reference/logging.md").replace("\n> ", "\n").split())
    remedies = [
        ast.literal_eval(node.value)
        for node in nodes(ast.Assign)
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "remedy"
    ]
    assert len(remedies) == 3
    for remedy in remedies:
        assert remedy in page


#: Logs one record of each level.
LEVELS_CAME = """
import logging
for level in (10, 20, 30, 40):
    logging.getLogger("wsgi_loop").log(level, "%s came", level)
"""
#: Serves two requests, which leave a task each.
TASKS_LEFT = """
import asyncio
from tests.support import serve

class RedisChannelLayer:
    async def _clean_receive_backup(self):
        await asyncio.sleep(3600)

    async def another(self):
        await asyncio.sleep(3600)

async def view(request):
    layer = RedisChannelLayer()
    task = layer.another() if request.path == "/another/" else layer._clean_receive_backup()
    asyncio.create_task(task)
    return django.http.HttpResponse()

with serve(view) as server:
    server.get("/")
    server.get("/another/")
"""


def log(settings: str, folder: Path, code: str = LEVELS_CAME) -> str:
    """What a site with these settings writes of wsgi_loop's messages. Returns its standard error."""
    (folder / "site_settings.py").write_text(f"SECRET_KEY = 'not a secret'\n{settings}")
    code = f"import django, django.http, wsgi_loop; django.setup()\n{code}"
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "site_settings", "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("debug", [False, True])
def test_by_default_warnings_and_errors_go_to_standard_error(tmp_path: Path, debug: bool) -> None:
    assert log(f"DEBUG = {debug}", tmp_path) == "30 came\n40 came\n"


def test_logging_can_be_set_up_and_silenced(tmp_path: Path) -> None:
    examples = blocks("reference/logging.md")
    shown = log(examples["mysite/settings.py"], tmp_path).splitlines()
    assert [line.partition(",")[2][4:] for line in shown] == ["WARNING wsgi_loop: 30 came", "ERROR wsgi_loop: 40 came"]
    assert log(examples["mysite/quiet_settings.py"], tmp_path) == ""


def test_a_task_of_a_library_can_be_left_out_of_the_log(tmp_path: Path) -> None:
    assert log("", tmp_path, TASKS_LEFT).count("1 of its tasks still ran") == 2
    shown = log(blocks("reference/logging.md")["mysite/filtered_settings.py"], tmp_path, TASKS_LEFT)
    assert shown.count("1 of its tasks still ran") == 1
    assert "RedisChannelLayer.another" in shown
    assert log(blocks("reference/logging.md")["mysite/filtered_settings.py"], tmp_path) == "30 came\n40 came\n"


def test_each_setting_is_in_the_reference() -> None:
    page = text("reference/settings.md")
    told = re.findall(r"^## `(\w+)`\n\nDefault: `(.+?)`\. Accepted", page, re.MULTILINE)
    assert {key: ast.literal_eval(default) for key, default in told} == DEFAULTS
    assert run_block(blocks("reference/settings.md")["mysite/settings.py"])["WSGI_LOOP"] == DEFAULTS


def test_the_api_reference_is_complete_and_right() -> None:
    told = re.findall(r"^`{3,}\{py:(\w+)\} ([\w.]+)(\(.*\))?$", text("reference/api.md"), re.MULTILINE)
    names = [name for _, name, _ in told]
    assert len(set(names)) == len(names)
    assert {f"wsgi_loop.{name}" for name in wsgi_loop.__all__} <= set(names)
    for kind, name, signature in told:
        found = import_string(name)
        assert inspect.isclass(found) == (kind == "class"), name
        if kind != "data":
            parameters = [
                parameter.replace(annotation=inspect.Parameter.empty)
                for parameter in inspect.signature(found).parameters.values()
            ]
            assert str(inspect.Signature(parameters)) == signature, name


# --- the examples ------------------------------------------------------------------------------------------------


def blocks(name: str) -> dict[str, str]:
    """A page's blocks of Python, by the file that the first line of each names."""
    found: dict[str, str] = {}
    for code in BLOCK.findall(text(name)):
        path = file_of(code)
        assert path not in found
        found[path] = code
    return found


def file_of(code: str) -> str:
    first_line = code.partition("\n")[0]
    match = re.fullmatch(r"# ([a-z_/.]+\.py)", first_line)
    assert match, f"{first_line!r} does not say which file this is"
    return match[1]


def run_block(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "block"}
    exec(code, names)
    return names


def write(site: Site, name: str) -> Site:
    """Put a page's files beside those of docs/scopes.md."""
    for path, code in blocks(name).items():
        (site.directory / path).write_text(code)
    return site


def test_every_block_is_used_here() -> None:
    used = {
        "index.md": {"mysite/wsgi.py"},
        "howto/runserver.md": {"mysite/wsgi.py", "mysite/settings.py"},
        "howto/gunicorn.md": {"gunicorn.conf.py"},
        "howto/celery.md": {"mysite/fetching.py", "mysite/management/commands/fetch.py"},
        "howto/redis.md": {"mysite/counters.py"},
        "howto/psycopg.md": {"mysite/connection_views.py"},
        "howto/httpx.md": {"mysite/weather.py"},
        "howto/start.md": {  # see servers/test_start
            "gunicorn.conf.py",
            "gunicorn_hooks.py",
            "mysite/patient.py",
            "mysite/uwsgi_started.py",
            "mysite/started.py",
        },
        "howto/metrics.md": {"mysite/metrics.py", "mysite/telemetry.py"},
        "howto/scaling.md": {"mysite/pgbouncer.py", "mysite/settings.py"},
        # See test_troubleshooting.
        "howto/locks.md": {"mysite/limits.py"},
        "howto/transactions.md": {"mysite/transfer.py"},
        "reference/settings.md": {"mysite/settings.py", "mysite/wsgi.py"},
        "reference/api.md": {"mysite/reports.py", "mysite/blocks.py"},
        "reference/signals.md": {"mysite/receivers.py", "mysite/hooks.py"},
        "reference/logging.md": {
            "mysite/settings.py",
            "mysite/quiet_settings.py",
            "mysite/filtered_settings.py",
        },
    }
    pages = [path.relative_to(DOCS).as_posix() for path in all_pages()]
    mine = [name for name in pages if "/" in name] + ["index.md", "how-it-works.md", "limits.md", "is-this-for-me.md"]
    assert {name: set(blocks(name)) for name in mine if blocks(name)} == used


@pytest.mark.parametrize("name", ["index.md", "howto/runserver.md", "reference/settings.md"])
def test_a_wsgi_file(name: str) -> None:
    # Django is set up already, and stays so.
    application = run_block(blocks(name)["mysite/wsgi.py"])["application"]
    assert type(application) is wsgi_loop.WSGIHandler
    assert application._options.shutdown_timeout == (10 if "shutdown_timeout=10" in text(name) else 5)


def test_settings() -> None:
    named = run_block(blocks("howto/runserver.md")["mysite/settings.py"])["WSGI_APPLICATION"]
    assert type(import_string(named)) is wsgi_loop.WSGIHandler
    databases = run_block(blocks("howto/scaling.md")["mysite/settings.py"])["DATABASES"]
    assert databases["default"]["DISABLE_SERVER_SIDE_CURSORS"] is True


def test_a_gunicorn_file(tmp_path: Path) -> None:
    (tmp_path / "gunicorn.conf.py").write_text(blocks("howto/gunicorn.md")["gunicorn.conf.py"])
    (tmp_path / "mysite").mkdir()
    (tmp_path / "mysite" / "wsgi.py").write_text("from wsgi_loop.wsgi import application\n")
    command = [sys.executable, "-m", "gunicorn", "--print-config"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    config = dict(re.findall(r"^(\w+) += (.+)$", done.stdout, re.MULTILINE))
    timeouts = int(config["graceful_timeout"]), int(config["timeout"])
    assert (config["workers"], config["threads"], *timeouts) == ("4", "4", 60, 30)
    assert min(timeouts) > 2 * DEFAULTS["SHUTDOWN_TIMEOUT"]


UWSGI_SITE = """
from asgiref.sync import async_to_sync
from django.http import JsonResponse
from django.urls import path

from tests.settings import *
from tests.support import here
from wsgi_loop import get_wsgi_application

ROOT_URLCONF = __name__


def loops(request):
    places = [async_to_sync(here)() for _ in range(3)]
    return JsonResponse({"loops": len({place.loop for place in places})})


urlpatterns = [path("", loops)]
"""


def test_the_uwsgi_file(tmp_path: Path) -> None:
    uwsgi = Path(sys.executable).with_name("uwsgi")
    if not uwsgi.exists():
        not_there("no uwsgi beside this Python: pip install pyuwsgi")
    (ini,) = re.findall(r"^```ini\n(.*?)^```$", text("howto/uwsgi.md"), re.DOTALL | re.MULTILINE)
    port = free_port()
    (tmp_path / "uwsgi.ini").write_text(ini.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    (tmp_path / "mysite").mkdir()
    (tmp_path / "mysite" / "settings.py").write_text(UWSGI_SITE)
    (tmp_path / "mysite" / "wsgi.py").write_text("from wsgi_loop.wsgi import application\n")
    environment = {
        "DJANGO_SETTINGS_MODULE": "mysite.settings",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, sys.path)]),
    }
    command = [str(uwsgi), "--ini", "uwsgi.ini"]
    log = tmp_path / "log"
    have_started = lambda: log.read_text().count("spawned uWSGI worker") == 4  # noqa: E731
    with (
        running(command, tmp_path, log, environment, have_started),
        opener.open(f"http://127.0.0.1:{port}/", timeout=60) as response,
    ):
        assert json.load(response) == {"loops": 1}


def test_a_patient_lifespan(mysite: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    async def connect() -> None:
        tries.append("tried")
        if len(tries) < 3:
            raise ConnectionRefusedError

    connections: Any = types.ModuleType("mysite.connections")
    connections.connect = connect
    monkeypatch.setitem(sys.modules, "mysite.connections", connections)
    (mysite.directory / "mysite" / "patient.py").write_text(blocks("howto/start.md")["mysite/patient.py"])
    lifespan = mysite.module("patient").lifespan
    process.shut_down()
    with EventLoopContext(scope="process", lifespan=lifespan):
        async_to_sync(asyncio.sleep)(0)
    process.shut_down()
    assert len(tries) == 3


@SCOPES
def test_httpx(mysite: Site, api: API, scope: str) -> None:
    weather = write(mysite, "howto/httpx.md").module("weather")
    with serve(weather.both, scope=scope) as server:
        for _ in range(3):
            assert json.loads(server.get()) == ANSWERS["/quote"] | ANSWERS["/rates"]
    process.shut_down()


def test_httpx_without_an_answer(mysite: Site, api: API, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_URL", f"http://127.0.0.1:{free_port()}")
    with serve(write(mysite, "howto/httpx.md").module("weather").both) as server:
        assert json.loads(server.get()) == {"error": "no answer"}
        assert server.status.startswith("502")


def test_redis(mysite: Site, redis_server: redis.Redis) -> None:
    counters = write(mysite, "howto/redis.md").module("counters")
    with serve(counters.counters, scope="process") as server:
        answers = [json.loads(server.get()) for _ in range(10)]
    visits = [answer["visits"] for answer in answers]
    assert visits == sorted(set(visits))
    assert {answer["seconds_left"] for answer in answers} == {-1}
    assert count_redis_connections(redis_server, mysite.name) == 1
    with EventLoopContext(scope="process"):
        async_to_sync(counters.client.aclose)()
        async_to_sync(counters.pool.aclose)()


@SCOPES
def test_psycopg(mysite: Site, scope: str) -> None:
    views = write(mysite, "howto/psycopg.md").module("connection_views")
    with connected_postgres() as postgres, serve(views.version, scope=scope) as server:
        for _ in range(3):
            assert json.loads(server.get()) == {"version": postgres.info.server_version}
        assert scope == "request" or count_postgres_connections(postgres, mysite.name) == 1
        process.shut_down()
        eventually(lambda: count_postgres_connections(postgres, mysite.name) == 0, 30)


def test_a_pool_for_pgbouncer(mysite: Site) -> None:
    module = write(mysite, "howto/scaling.md").module("pgbouncer")
    with connected_postgres(), EventLoopContext(scope="request"):
        for _ in range(10):  # psycopg prepares a statement when it comes for the sixth time
            assert async_to_sync(module.answer)() == 42

        async def prepared() -> int:
            async with (await module.pool()).connection() as connection:
                cursor = await connection.execute("SELECT count(*) FROM pg_prepared_statements")
                return int((await cursor.fetchone())[0])

        assert async_to_sync(prepared)() == 0


def test_a_celery_task_and_a_command(mysite: Site, api: API, capsys: pytest.CaptureFixture[str]) -> None:
    from celery import Celery

    fetching = write(mysite, "howto/celery.md").module("fetching")
    made = []
    factory = fetching.api._factory
    fetching.api._factory = lambda: made.append(factory()) or made[-1]
    with Celery("docs", broker="memory://", set_as_current=False) as app:
        app.finalize()
        answers = app.tasks["mysite.fetching.fetch_all"].apply([["/quote", "/rates", "/quote"]]).get()
    assert answers == [ANSWERS["/quote"], ANSWERS["/rates"], ANSWERS["/quote"]]
    assert [client.is_closed for client in made] == [True]
    call_command(mysite.module("management.commands.fetch").Command(), "/quote", "/rates")
    assert capsys.readouterr().out == f"{ANSWERS['/quote']}\n{ANSWERS['/rates']}\n"
    assert [client.is_closed for client in made] == [True, True]


def test_metrics_for_prometheus() -> None:
    from prometheus_client import REGISTRY, generate_latest

    collector = run_block(blocks("howto/metrics.md")["mysite/metrics.py"])["LoopCollector"]
    try:
        with EventLoopContext(scope="request"):
            async_to_sync(asyncio.sleep)(0)
        page = generate_latest().decode()
    finally:
        for registered in [found for found in REGISTRY._names_to_collectors.values() if type(found) is collector]:
            with contextlib.suppress(KeyError):
                REGISTRY.unregister(registered)
    told = dict(re.findall(r"^wsgi_loop_(\w+) ([\d.]+)$", page, re.MULTILINE))
    assert float(told["loops_made_total"]) == wsgi_loop.stats().loops_made > 0
    # And those of the page's table of what to look at, by their names.
    looked_at = re.findall(r"^\| `(\w+)` \|", text("howto/metrics.md"), re.MULTILINE)
    assert looked_at
    assert {name for name in looked_at if name not in told and f"{name}_total" not in told} == set()
    assert len(told) == len(dataclasses.fields(wsgi_loop.stats()))


def test_metrics_for_opentelemetry() -> None:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    run_block(blocks("howto/metrics.md")["mysite/telemetry.py"])["observe"](provider.get_meter("test"))
    data: Any = reader.get_metrics_data()
    told = {
        metric.name: metric.data.data_points[0].value
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    provider.shutdown()
    assert told == {f"wsgi_loop.{name}": value for name, value in dataclasses.asdict(wsgi_loop.stats()).items()}


def test_each_number_is_in_the_reference() -> None:
    page = text("reference/api.md")
    assert [name for name in dataclasses.asdict(wsgi_loop.stats()) if f"`{name}`" not in page] == []


@SCOPES
def test_a_background_task(mysite: Site, scope: str) -> None:
    with serve(write(mysite, "reference/api.md").module("reports").report, scope=scope) as server:
        assert server.get() == b"3"


def test_a_block(mysite: Site) -> None:
    assert write(mysite, "reference/api.md").module("blocks").is_one_loop()


@SCOPES
def test_a_receiver(mysite: Site, scope: str) -> None:
    receivers = write(mysite, "reference/signals.md").module("receivers")
    try:
        with serve(receivers.view, scope=scope) as server:
            server.get()
    finally:
        assert request_finished.disconnect(receivers.note_loop, sender=wsgi_loop.WSGIHandler)
    first, last = receivers.loops
    assert isinstance(first, asyncio.AbstractEventLoop)
    assert first is last


def test_an_after_close_hook(mysite: Site) -> None:
    hooks = write(mysite, "reference/signals.md").module("hooks")
    with serve(hooks.view) as server:
        response = server.open("/hooked")
        assert hooks.done == []
        response.close()
    assert hooks.done == ["/hooked"]


# --- the tutorial ------------------------------------------------------------------------------------------------

#: What the tutorial says that its terminal shows.
FORGOTTEN = "GET '/forget/': ended while 1 of its tasks still ran, which are cancelled: forgotten running"


class Reader:
    """Does what the tutorial says, word by word; its servers on free ports, and restarted when a file has changed.

    What it leaves out: the making of an environment, and the reloader of runserver, which it does not wait for.
    """

    def __init__(self, folder: Path, servers: ExitStack) -> None:
        self.folder = folder
        self.servers = servers
        self.ports = {"8000": str(free_port()), "9000": str(free_port())}
        self.site: ExitStack | None = None
        self.command: list[str] = []
        self.changed = False
        self.output = ""
        self.logs: list[ServerProcess] = []
        bin_folder = Path(sys.executable).parent
        self.environment = {
            "PATH": os.pathsep.join([str(bin_folder), os.environ["PATH"]]),
            "DJANGO_SETTINGS_MODULE": "mysite.settings",
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            "NO_PROXY": "*",
            "no_proxy": "*",
            "HOME": str(folder),
        }

    def start(self, command: list[str], port: str) -> ExitStack:
        stack = self.servers.enter_context(ExitStack())
        output = self.folder / f"log{len(self.logs)}"
        is_up = lambda: takes_connections(int(port))  # noqa: E731
        self.logs.append(stack.enter_context(running(command, self.folder, output, self.environment, is_up)))
        return stack

    def write(self, code: str) -> None:
        path = self.folder / file_of(code)
        path.write_text(path.read_text() + code if path.name == "settings.py" else code)
        self.changed = True

    def run(self, line: str) -> None:
        if line.startswith(("python3 -m venv", ". .venv", "pip install")):
            return
        if line.startswith("python3 -m http.server"):
            self.start([sys.executable, *line.split()[1:]], self.ports["9000"])
        elif line == "python manage.py runserver":
            # It holds the port that the tutorial names, unless it is told another one.
            self.serve([sys.executable, "manage.py", "runserver", "--noreload", f"127.0.0.1:{self.ports['8000']}"])
        elif line.startswith("gunicorn"):
            self.serve(
                [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{self.ports['8000']}", *line.split()[1:]]
            )
        else:
            if self.changed and self.command:
                self.serve(self.command)
            done = subprocess.run(
                ["bash", "-ec", line],
                cwd=self.folder,
                env=os.environ | self.environment,
                stdout=subprocess.PIPE,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, line
            self.output = done.stdout
            if "/forget/" in line:
                # A client has its answer before the server closes the response. To restart it cuts that off.
                eventually(lambda: any(FORGOTTEN in server.log() for server in self.logs), 30)

    def serve(self, command: list[str]) -> None:
        if self.site is not None:
            self.site.close()
        self.site = self.start(command, self.ports["8000"])
        self.command = command
        self.changed = False


@pytest.mark.long
def test_the_tutorial(tmp_path: Path) -> None:
    if not shutil.which("curl"):
        not_there("the tutorial uses curl: install it")
    compared = 0
    with ExitStack() as servers:
        reader = Reader(tmp_path, servers)
        tutorial = re.sub(r"\b[89]000\b", lambda match: reader.ports[match[0]], text("tutorial.md"))
        for _, language, body in FENCE.findall(tutorial):
            if language == "python":
                reader.write(body)
            elif language == "console":
                for line in body.splitlines():
                    reader.run(line)
            else:
                assert reader.output == body
                compared += 1
        logs = [server.log() for server in reader.logs]
    assert compared == 7
    assert any("RuntimeError: Event loop is closed" in log for log in logs)
    assert any(FORGOTTEN in log for log in logs)
