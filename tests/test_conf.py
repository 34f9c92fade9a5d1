"""The WSGI_LOOP setting: what is wrong with it is told at start-up, by key, value and accepted values."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpResponse

from wsgi_loop import EventLoopContext, WSGIHandler, get_wsgi_application, process
from wsgi_loop.conf import DEFAULTS, GivenOptions, get_options

from .support import call_here, serve


async def coroutine_function() -> None:
    """Something callable that returns no loop."""


def failing_factory() -> Any:
    raise OSError("too many open files")


def no_loop() -> str:
    return "not a loop"


async def async_generator_function() -> Any:
    yield


@contextmanager
def sync_lifespan() -> Any:
    yield


class NoContextManager:
    """Something callable that returns none."""


WRONG = [
    ({"SCOOPE": "request"}, ["SCOOPE", "request", "SHUTDOWN_TIMEOUT"]),
    ({"SCOPE": "thread"}, ["SCOPE", "'thread'", "'request' or 'process'"]),
    ({"LOOP_FACTORY": "no.such.factory"}, ["LOOP_FACTORY", "no.such.factory", "imported"]),
    ({"LOOP_FACTORY": "tests.test_conf.nothing"}, ["LOOP_FACTORY", "tests.test_conf.nothing", "imported"]),
    ({"LOOP_FACTORY": "tests.test_conf.no_loop"}, ["LOOP_FACTORY", "tests.test_conf.no_loop", "'not a loop'"]),
    ({"LOOP_FACTORY": coroutine_function}, ["LOOP_FACTORY", "coroutine_function", "returned"]),
    ({"LOOP_FACTORY": failing_factory}, ["LOOP_FACTORY", "failing_factory", "too many open files"]),
    ({"LOOP_FACTORY": 3}, ["LOOP_FACTORY", "3", "callable"]),
    ({"SHUTDOWN_TIMEOUT": -1}, ["SHUTDOWN_TIMEOUT", "-1", "seconds"]),
    ({"SHUTDOWN_TIMEOUT": "5"}, ["SHUTDOWN_TIMEOUT", "'5'", "seconds"]),
    ({"SHUTDOWN_TIMEOUT": None}, ["SHUTDOWN_TIMEOUT", "None", "seconds"]),
    ({"SHUTDOWN_TIMEOUT": float("nan")}, ["SHUTDOWN_TIMEOUT", "nan", "seconds"]),
    ({"SHUTDOWN_TIMEOUT": True}, ["SHUTDOWN_TIMEOUT", "True", "seconds"]),
    ({"SCOPE": "process", "LIFESPAN": "no.such.lifespan"}, ["LIFESPAN", "no.such.lifespan", "imported"]),
    ({"SCOPE": "process", "LIFESPAN": 3}, ["LIFESPAN", "3", "async context manager"]),
    ({"SCOPE": "process", "LIFESPAN": coroutine_function}, ["LIFESPAN", "coroutine_function", "a coroutine"]),
    ({"SCOPE": "process", "LIFESPAN": async_generator_function}, ["LIFESPAN", "asynccontextmanager"]),
    ({"SCOPE": "process", "LIFESPAN": sync_lifespan}, ["LIFESPAN", "sync_lifespan", "async def"]),
    ({"SCOPE": "process", "LIFESPAN": NoContextManager}, ["LIFESPAN", "NoContextManager", "__aenter__"]),
    ({"STARTUP_TIMEOUT": 0}, ["STARTUP_TIMEOUT", "0", "more than 0"]),
    ({"STARTUP_TIMEOUT": "20"}, ["STARTUP_TIMEOUT", "'20'", "seconds"]),
    ({"LIFESPAN": coroutine_function}, ["LIFESPAN", "coroutine_function", "scope 'request'"]),
    ({"MAX_BACKGROUND_TASKS": 0}, ["MAX_BACKGROUND_TASKS", "0", "1 or more"]),
    ({"MAX_BACKGROUND_TASKS": True}, ["MAX_BACKGROUND_TASKS", "True", "1 or more"]),
    ({"BLOCKED_AFTER": 0}, ["BLOCKED_AFTER", "0", "None"]),
    ({"BLOCKED_AFTER": "1"}, ["BLOCKED_AFTER", "'1'", "seconds"]),
    ([("SCOPE", "request")], ["WSGI_LOOP", "dict"]),
    ("request", ["WSGI_LOOP", "'request'", "dict"]),
]


@pytest.mark.parametrize(
    ("value", "words"), WRONG, ids=[re.sub(" at 0x[0-9a-f]+", "", str(value)) for value, _ in WRONG]
)
def test_a_wrong_setting_is_refused_at_start_up_and_by_the_system_check(
    settings: Any, value: Any, words: list[str]
) -> None:
    settings.WSGI_LOOP = value
    with pytest.raises(ImproperlyConfigured) as caught:
        get_wsgi_application()
    for word in words:
        assert word in str(caught.value)
    (error,) = [message for message in run_checks() if (message.id or "").startswith("wsgi_loop.")]
    assert error.id == "wsgi_loop.E001"
    for word in words:
        assert word in error.msg
    assert error.hint


def test_a_right_setting_passes_the_system_check(settings: Any) -> None:
    settings.WSGI_LOOP = {"SCOPE": "request", "LOOP_FACTORY": None, "SHUTDOWN_TIMEOUT": 0}
    assert [message for message in run_checks() if (message.id or "").startswith("wsgi_loop.")] == []


def test_an_option_is_blamed_where_it_was_given(settings: Any) -> None:
    settings.WSGI_LOOP = {"SHUTDOWN_TIMEOUT": -1}
    with pytest.raises(ImproperlyConfigured, match=r"^EventLoopContext\(scope=…\) is 'worker'\. Accepted"):
        EventLoopContext(scope="worker")
    with pytest.raises(ImproperlyConfigured, match=r"^get_wsgi_application\(lifespan=…\) is 3\."):
        get_wsgi_application(scope="process", lifespan=3, shutdown_timeout=1)
    with pytest.raises(ImproperlyConfigured, match=r"^WSGI_LOOP\['SHUTDOWN_TIMEOUT'\] is -1\."):
        EventLoopContext(scope="request")


def test_the_setting_is_optional(settings: Any) -> None:
    assert get_options().shutdown_timeout == 5.0


def test_options_win_over_the_setting(settings: Any) -> None:
    settings.WSGI_LOOP = {"SHUTDOWN_TIMEOUT": 1}
    assert get_options(shutdown_timeout=2).shutdown_timeout == 2
    assert get_options(SHUTDOWN_TIMEOUT=3).shutdown_timeout == 3
    settings.WSGI_LOOP = {"SCOPE": "process", "LIFESPAN": "tests.test_conf.no_loop"}
    assert get_options(scope="request").lifespan is None
    assert get_options().lifespan is no_loop
    with pytest.raises(ImproperlyConfigured, match="get_wsgi_application"):
        WSGIHandler(time_out=1)


@pytest.mark.parametrize("factory", ["uvloop.new_event_loop", asyncio.SelectorEventLoop])
def test_the_loop_comes_from_the_factory(factory: Any) -> None:
    loops: list[Any] = []
    with serve(lambda request: HttpResponse(loops.append(call_here().loop)), loop_factory=factory) as server:
        server.get()
        server.get()
    assert len(set(loops)) == 2
    name = "uvloop" if isinstance(factory, str) else "asyncio"
    assert {type(loop).__module__.split(".")[0] for loop in loops} == {name}


@pytest.mark.parametrize("scope", ["request", "process"])
@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_factory_that_fails_later_fails_the_call_and_not_in_silence(
    error: type[Exception], scope: str, caplog: Any
) -> None:
    made: list[int] = []

    def factory() -> Any:
        made.append(1)
        if len(made) > 1:
            raise error("no more loops")
        return asyncio.new_event_loop()

    process.shut_down()
    with serve(lambda request: HttpResponse(call_here().thread), loop_factory=factory, scope=scope) as server:
        server.get()
    assert server.status.startswith("500")
    assert "no more loops" in caplog.text


def test_manage_py_check_tells_it() -> None:
    code = (
        "import os, sys; os.environ['DJANGO_SETTINGS_MODULE'] = 'tests.settings'\n"
        "from django.conf import settings; settings.WSGI_LOOP = {'SCOPE': 'galaxy'}\n"
        "from django.core.management import execute_from_command_line as run; run(['manage.py', 'check'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "wsgi_loop.E001" in result.stderr
    assert "'galaxy'" in result.stderr


def test_types_know_the_options(tmp_path: Path) -> None:
    assert {key.upper() for key in GivenOptions.__annotations__} == set(DEFAULTS)
    (tmp_path / "options.py").write_text(
        "from wsgi_loop import EventLoopContext, WSGIHandler, get_wsgi_application\n"
        "get_wsgi_application(scope='process', lifespan='mysite.lifespan', blocked_after=None)\n"
        "get_wsgi_application(scpe='process')\n"
        "WSGIHandler(scope='worker')\n"
        "EventLoopContext(shutdown_timeout='5')\n"
        "EventLoopContext(3)\n"
    )
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), str(tmp_path / "options.py")]
    if find_spec("mypy") is None:
        pytest.skip("the extra `lint` is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[1])
    assert re.findall(r"options\.py:(\d+): error", done.stdout) == ["3", "4", "5", "6"], done.stdout
