"""Each system check fires on a project that deserves it, and on no other."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asgiref
import pytest
from django.core.checks import run_checks

from wsgi_loop.bridge import shape

ROOT = Path(__file__).parents[1]

STOCK = "from django.core.wsgi import get_wsgi_application\n"
OURS = "from wsgi_loop import get_wsgi_application\n"
MAKE = "application = get_wsgi_application()\n"

#: What people put around an application.
WRAPPERS = {
    "nothing": MAKE,
    "whitenoise": "from whitenoise import WhiteNoise\napplication = WhiteNoise(get_wsgi_application())\n",
    "sentry": (
        "from sentry_sdk.integrations.wsgi import SentryWsgiMiddleware\n"
        "application = SentryWsgiMiddleware(get_wsgi_application())\n"
    ),
    "opentelemetry": (
        "from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware\n"
        "application = OpenTelemetryMiddleware(get_wsgi_application())\n"
    ),
    "static files": (
        "from django.contrib.staticfiles.handlers import StaticFilesHandler\n"
        "application = StaticFilesHandler(get_wsgi_application())\n"
    ),
    "two layers": (
        "from whitenoise import WhiteNoise\nfrom sentry_sdk.integrations.wsgi import SentryWsgiMiddleware\n"
        "application = SentryWsgiMiddleware(WhiteNoise(get_wsgi_application()))\n"
    ),
    "a function that uses a global": (
        "_django = get_wsgi_application()\n"
        "def application(environ, start_response):\n    return _django(environ, start_response)\n"
    ),
    "a decorator": (
        "import functools\n"
        "def logged(app):\n"
        "    @functools.wraps(app, updated=())\n"
        "    def call(environ, start_response):\n        return app(environ, start_response)\n"
        "    return call\n"
        "application = logged(get_wsgi_application())\n"
    ),
    "slots": (
        "class Prefix:\n"
        "    __slots__ = ('app',)\n"
        "    def __init__(self, app):\n        self.app = app\n"
        "    def __call__(self, environ, start_response):\n        return self.app(environ, start_response)\n"
        "application = Prefix(get_wsgi_application())\n"
    ),
    "mounts": (
        "class Dispatch:\n"
        "    def __init__(self, mounts):\n        self.mounts = mounts\n"
        "    def __call__(self, environ, start_response):\n        return self.mounts['/'](environ, start_response)\n"
        "application = Dispatch({'/metrics': print, '/': get_wsgi_application()})\n"
    ),
    "made by the first request": (
        "app = None\n"
        "def application(environ, start_response):\n"
        "    global app\n    app = app or get_wsgi_application()\n    return app(environ, start_response)\n"
    ),
    "partial": (
        "import functools\n"
        "def serve(app, environ, start_response):\n    return app(environ, start_response)\n"
        "application = functools.partial(serve, get_wsgi_application())\n"
    ),
}


@pytest.fixture(autouse=True)
def _asgiref_was_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the checks tell of nothing else where the tests are run with a newer one."""
    monkeypatch.setattr(asgiref, "__version__", shape.NEWEST)


def told() -> list[str]:
    """The ids of our messages."""
    return [message.id for message in ours()]


def ours() -> list[Any]:
    return [message for message in run_checks() if (message.id or "").startswith("wsgi_loop.")]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any) -> Iterator[Callable[[str], None]]:
    """Make a project with this wsgi.py; further files by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(wsgi: str | None, **files: str) -> None:
        package = tmp_path / "checked_site"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "urls.py").write_text("urlpatterns = []\n")
        if wsgi is not None:
            (package / "wsgi.py").write_text(wsgi)
        importlib.invalidate_caches()
        settings.ROOT_URLCONF = "checked_site.urls"
        settings.WSGI_APPLICATION = "checked_site.wsgi.application"

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "checked_site"]:
        del sys.modules[name]


def test_nothing_is_told_of_a_right_project() -> None:
    assert told() == []


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_djangos_handler_is_found_in_what_is_around_it(project: Any, wrapper: str) -> None:
    project(STOCK + WRAPPERS[wrapper])
    (message,) = ours()
    assert message.id == "wsgi_loop.W002"
    assert "checked_site.wsgi.application" in message.msg
    assert "wsgi_loop" in message.hint


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ours_is_found_in_what_is_around_it(project: Any, wrapper: str) -> None:
    project(OURS + WRAPPERS[wrapper])
    assert told() == []


def test_a_middleware_that_knows_our_handler_does_not_make_djangos_ours(project: Any, settings: Any) -> None:
    project(
        "from wsgi_loop import WSGIHandler\n"
        "def middleware(get_response):\n"
        "    def call(request):\n        return get_response(request), WSGIHandler\n"
        "    return call\n" + STOCK + MAKE
    )
    settings.MIDDLEWARE = ["checked_site.wsgi.middleware"]
    assert told() == ["wsgi_loop.W002"]


def test_no_application_is_djangos_own(settings: Any) -> None:
    settings.WSGI_APPLICATION = None
    (message,) = ours()
    assert message.id == "wsgi_loop.W001"
    assert "WSGI_APPLICATION" in message.hint


@pytest.mark.parametrize(
    "wsgi",
    [
        "raise RuntimeError('no key')\n",
        "import no_such_module\n",
        "raise SystemExit('no key')\n",
        "application = \n",
        "",
        None,
    ],
)
def test_what_can_not_be_imported_is_not_known(project: Any, wsgi: str | None) -> None:
    project(wsgi)
    (message,) = ours()
    assert message.id == "wsgi_loop.I001"
    assert "can't be imported" in message.msg
    assert not message.is_serious()


@pytest.mark.parametrize(
    "wsgi",
    [
        "import itertools\napplication = itertools.cycle([1]).__next__\n",
        "def application(environ, start_response):\n    return []\n",
        "class Broken:\n    @property\n    def __wrapped__(self):\n        raise OSError\napplication = Broken()\n",
    ],
)
def test_what_can_not_be_looked_into_is_not_known(project: Any, wsgi: str) -> None:
    project(wsgi)
    (message,) = ours()
    assert message.id == "wsgi_loop.I001"
    assert "neither" in message.msg


def test_a_wsgi_module_that_no_setting_names(project: Any, settings: Any) -> None:
    project(STOCK + "raise AssertionError('nobody asked for it to be run')\n" + MAKE)
    settings.WSGI_APPLICATION = "wsgi_loop.wsgi.application"
    (message,) = ours()
    assert message.id == "wsgi_loop.W003"
    assert "checked_site.wsgi:application" in message.msg


@pytest.mark.parametrize("wsgi", [OURS + MAKE, "application = 1\n", "not python\n", None])
def test_another_wsgi_module_is_nobodys_business(project: Any, settings: Any, wsgi: str | None) -> None:
    project(wsgi)
    settings.WSGI_APPLICATION = "wsgi_loop.wsgi.application"
    assert told() == []


@pytest.mark.parametrize("version", ["3.12.0", "3.9.2", "2.0"])
def test_an_old_asgiref(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(asgiref, "__version__", version)
    (message,) = ours()
    assert message.id == "wsgi_loop.E002"
    assert version in message.msg
    assert "pip install 'asgiref>=3.12.1'" in message.hint


@pytest.mark.parametrize("version", [shape.LOWEST, "3.12.2", shape.NEWEST])
def test_an_asgiref_that_was_tested(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(asgiref, "__version__", version)
    assert told() == []


@pytest.mark.parametrize("version", ["3.13.1", "4.0", "3.100.0"])
def test_a_new_asgiref(monkeypatch: pytest.MonkeyPatch, settings: Any, version: str) -> None:
    monkeypatch.setattr(asgiref, "__version__", version)
    (message,) = ours()
    assert message.id == "wsgi_loop.W006"
    assert {version, shape.NEWEST} <= set(message.msg.split())
    assert f"pip install 'asgiref<={shape.NEWEST}'" in message.hint
    settings.SILENCED_SYSTEM_CHECKS = ["wsgi_loop.W006"]
    assert message.is_silenced()


@pytest.mark.parametrize(
    "worker", ["gevent", "eventlet", "gunicorn.workers.ggevent.GeventWorker", "egg:gunicorn#gevent"]
)
@pytest.mark.parametrize("scope", ["request", "process"])
def test_a_worker_class_with_greenlets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, worker: str, scope: str
) -> None:
    settings.WSGI_LOOP = {"SCOPE": scope}
    monkeypatch.chdir(tmp_path)
    Path("gunicorn.conf.py").write_text(f"raise_on_run = no_such_name\nworker_class = {worker!r}\n")
    (message,) = ours()
    assert message.id == "wsgi_loop.W004"
    assert worker in message.msg
    assert "gthread" in message.hint


@pytest.mark.parametrize(
    "configuration",
    [
        "worker_class = 'gthread'",
        "worker_class = 'gevent'\nworker_class = 'sync'",
        "workers = 3",
        "worker_class = choose('gevent')",
        "# worker_class = 'gevent'",
        "not python",
    ],
)
def test_another_worker_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configuration: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gunicorn.conf.py").write_text(configuration)
    assert told() == []


def check(code: str, *settings: str) -> str:
    """Run the checks in a process of their own, after `code`. Returns what `manage.py check` writes."""
    program = "\n".join(
        [
            code,
            "from django.conf import settings",
            # The tests may be run with an asgiref that is newer than any that was.
            "settings.SILENCED_SYSTEM_CHECKS = ['wsgi_loop.W006']",
            *settings,
            "from django.core.management import execute_from_command_line as run",
            "run(['manage.py', 'check'])",
        ]
    )
    environment = os.environ | {"DJANGO_SETTINGS_MODULE": "tests.settings", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=ROOT,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("application", ["wsgi_loop.wsgi.application", "no.such.application"])
def test_patched_threads(application: str) -> None:
    output = check(
        "from gevent import monkey; monkey.patch_all()",
        "settings.WSGI_LOOP = {'SCOPE': 'process'}",
        f"settings.WSGI_APPLICATION = {application!r}",
    )
    assert output.count("(wsgi_loop.") == 1, output
    assert "(wsgi_loop.E003)" in output
    assert "gthread" in output


def test_gevent_that_patches_no_threads() -> None:
    assert "wsgi_loop." not in check("from gevent import monkey; monkey.patch_socket()")


def test_daphne_shadows_runserver() -> None:
    output = check("", "settings.INSTALLED_APPS = ['daphne', *settings.INSTALLED_APPS, 'django.contrib.staticfiles']")
    assert output.count("(wsgi_loop.") == 1, output
    assert "(wsgi_loop.W005)" in output
    assert "--noasgi" in output


@pytest.mark.parametrize(
    "apps",
    [
        "['django.contrib.staticfiles', *settings.INSTALLED_APPS]",
        # Then it is the other one's runserver.
        "['django.contrib.staticfiles', 'daphne', *settings.INSTALLED_APPS]",
    ],
)
def test_another_runserver(apps: str) -> None:
    output = check("", f"settings.INSTALLED_APPS = {apps}")
    assert "wsgi_loop." not in output


def test_the_tag_selects_them(settings: Any) -> None:
    settings.WSGI_APPLICATION = None
    assert [message.id for message in run_checks(tags=["wsgi_loop"])] == ["wsgi_loop.W001"]


def test_all_are_in_the_reference() -> None:
    source = "".join((ROOT / "wsgi_loop" / "tools" / name).read_text() for name in ("checks.py", "panel.py"))
    page = (ROOT / "docs" / "checks.md").read_text()
    ids = set(re.findall(r'id="(wsgi_loop\.[EWI]\d{3})"', source))
    assert ids == set(re.findall(r"^## `(wsgi_loop\.[EWI]\d{3})`", page, re.MULTILINE))
