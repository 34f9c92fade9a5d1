"""The pytest plugin: the test client and the live server of `wsgi_loop.testing`, and recorded loop calls, as fixtures.

Knows pytest, and of pytest-django what its fixtures are called. Works without it, but then the database is left to the
project. Imports Django only when a fixture is used.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .recording import LoopCalls
    from .testing import Client

SERVE = "wsgi_loop_serve"


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "Let pytest-django's client, admin_client and live_server serve each request on one event loop."
    parser.addini(SERVE, help, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_WithPytestDjango() if _has_pytest_django(config) else _WithoutPytestDjango())
    if config.getini(SERVE):
        config.pluginmanager.register(_Serve())


def _has_pytest_django(config: pytest.Config) -> bool:
    return any(config.pluginmanager.hasplugin(name) for name in ("django", "pytest_django", "pytest_django.plugin"))


@pytest.fixture
def wsgi_loop_client(_wsgi_loop_django: None) -> Client:
    """Django's test client, serving each request on one event loop."""
    from .testing import Client

    return Client()


@pytest.fixture
def loop_calls() -> Iterator[LoopCalls]:
    """The loop calls of the test, as they are made: `loop_calls.assert_one_loop()`."""
    from .recording import record_loop_calls

    with record_loop_calls() as calls:
        yield calls


@pytest.fixture
def inline_background_tasks(_wsgi_loop_django: None) -> Iterator[None]:
    """Background tasks run to their end where they are started, in the connection and the transaction of the test."""
    from . import testing

    with testing.inline_background_tasks():
        yield


@pytest.fixture
def wait_for_background_tasks(_wsgi_loop_database: None) -> Iterator[Callable[..., None]]:
    """A function that waits until no background task is in flight. The end of the test waits as well."""
    from . import testing

    yield testing.wait_for_background_tasks
    testing.wait_for_background_tasks()


class LiveServer:
    """What `wsgi_loop_live_server` gives: its URL, as `url` or `str()`, or with a path added to it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __str__(self) -> str:
        return self.url

    def __add__(self, path: str) -> str:
        return self.url + path

    def __repr__(self) -> str:
        return f"<LiveServer listening at {self.url}>"


@pytest.fixture(scope="session")
def _wsgi_loop_django(request: pytest.FixtureRequest) -> Iterator[None]:
    """Django is set up, as pytest-django does it."""
    if _has_pytest_django(request.config):
        yield
        return
    import django
    from django.test import utils

    django.setup()
    if hasattr(utils._TestState, "saved_data"):
        # The project does it in its conftest.py.
        yield
        return
    utils.setup_test_environment()
    yield
    utils.teardown_test_environment()


@pytest.fixture(scope="session")
def _wsgi_loop_live_server(request: pytest.FixtureRequest, _wsgi_loop_django: None) -> Iterator[LiveServer]:
    from django.conf import settings

    from . import testing

    if _has_pytest_django(request.config):
        # The server's threads share a database that is in memory.
        request.getfixturevalue("django_db_setup")
    static = "django.contrib.staticfiles" in settings.INSTALLED_APPS
    base: Any = testing.StaticLiveServerTestCase if static else testing.LiveServerTestCase
    # Of the test case what starts and stops the server, and no more: the tests are pytest's.
    case: Any = type("LiveServer", (base,), {})
    case._start_server_thread()
    try:
        yield LiveServer(case.live_server_url)
    finally:
        case.doClassCleanups()


@pytest.fixture
def wsgi_loop_live_server(_wsgi_loop_database: None, _wsgi_loop_live_server: LiveServer) -> Iterator[LiveServer]:
    """A running server, which serves each request on one event loop. With pytest-django, the test's data are saved."""
    from django.test.utils import modify_settings

    from .testing import LiveServerTestCase

    with modify_settings(ALLOWED_HOSTS={"append": LiveServerTestCase.allowed_host}):
        yield _wsgi_loop_live_server


class _WithPytestDjango:
    # Named here, as it looks at what a test asks for before it sets the database up.
    @pytest.fixture
    def _wsgi_loop_database(self, transactional_db: None) -> None:
        pass


class _WithoutPytestDjango:
    @pytest.fixture
    def _wsgi_loop_database(self) -> None:
        pass


class _Serve:
    """The ini option."""

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        name = fixturedef.argname
        if name == "live_server":
            from django.test import testcases

            from .testing import LiveServerThread

            # pytest-django looks for it there, and nobody else does so meanwhile.
            found, testcases.LiveServerThread = testcases.LiveServerThread, LiveServerThread  # type: ignore[misc]
            try:
                return (yield)
            finally:
                testcases.LiveServerThread = found  # type: ignore[misc]
        value = yield
        if name in ("client", "admin_client"):
            from django.test import Client

            from .testing import serve_client

            if isinstance(value, Client):
                serve_client(value)
        return value
