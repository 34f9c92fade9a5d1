"""Test cases with background tasks that use the ORM, on SQLite and PostgreSQL: the project of docs/testing.md."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from ..support import run_django_tests
from .support import django_database, made_database

ROOT = Path(__file__).parents[2]

TESTS = '''
from urllib.request import urlopen

from django.contrib.auth.models import User
from django.test import TestCase, TransactionTestCase

from wsgi_loop.testing import Client, LiveServerTestCase, inline_background_tasks, wait_for_background_tasks


def names():
    return list(User.objects.values_list("username", "first_name"))


class InATransaction(TestCase):
    client_class = Client

    @classmethod
    def setUpTestData(cls):
        User.objects.create(username="of the class")

    def sign_up(self, name):
        """The first and the second test see nothing of each other."""
        self.assertEqual(names(), [("of the class", "")])
        with inline_background_tasks(), self.captureOnCommitCallbacks(execute=True):
            self.client.post("/sign-up/", {"name": name})
        self.assertEqual(User.objects.get(username=name).first_name, "welcome")

    def test_ada(self):
        self.sign_up("ada")

    def test_grace(self):
        self.sign_up("grace")

    def test_a_task_that_the_view_starts_itself(self):
        for kind in ("sync", "async"):
            response = self.client.get(f"/greet/{kind}/")
            self.assertEqual(response.content, b"greeted soon")
            self.assertEqual(User.objects.get(username="of the class").first_name, f"greeted by {kind}")

    def test_what_a_task_raises(self):
        with self.assertRaisesMessage(LookupError, "nobody to greet"):
            self.client.get("/greet/nobody/")


class Saved(TransactionTestCase):
    client_class = Client

    def test_on_commit(self):
        self.client.post("/sign-up/", {"name": "ada"})
        wait_for_background_tasks()
        self.assertEqual(names(), [("ada", "welcome")])


class OfAServer(LiveServerTestCase):
    def test_on_commit(self):
        urlopen(self.live_server_url + "/sign-up/", b"name=ada").close()
        wait_for_background_tasks()
        self.assertEqual(names(), [("ada", "welcome")])
'''
VIEWS = """
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.urls import path

from wsgi_loop import create_background_task

from .urls import urlpatterns


async def greet(kind):
    if kind == "nobody":
        raise LookupError("nobody to greet")
    await User.objects.aupdate(first_name=f"greeted by {kind}")


def sync_view(request, kind):
    create_background_task(greet(kind))
    return HttpResponse("greeted soon")


async def async_view(request):
    return sync_view(request, "async")


urlpatterns += [path("greet/async/", async_view), path("greet/<kind>/", sync_view)]
"""


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Django's settings of a database, and what tells how many users its test database has."""
    if request.param == "sqlite":
        name = str(tmp_path / "test.sqlite3")

        def count() -> int:
            with closing(sqlite3.connect(name)) as connection:
                return int(connection.execute("SELECT count(*) FROM auth_user").fetchone()[0])

        yield {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3", "TEST": {"NAME": name}}, count
        return
    server = request.getfixturevalue("postgres_server")
    with made_database(server) as url:
        # The test database is this one itself, which Django then neither makes nor drops.
        settings = django_database(url, TEST={"NAME": urlsplit(url).path[1:]})

        def count() -> int:
            with psycopg.connect(url) as connection:
                row = connection.execute("SELECT count(*) FROM auth_user").fetchone()
            assert row is not None
            return int(row[0])

        yield settings, count


@pytest.mark.parametrize("scope", ["request", "process"])
def test_test_cases_with_background_tasks(
    scope: str, database: tuple[dict[str, Any], Callable[[], int]], tmp_path: Path
) -> None:
    settings, count = database
    page = (ROOT / "docs" / "testing.md").read_text()
    for name, code in re.findall(r"^```python\n# (\S+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        if "/test" not in name:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(code)
    folder = tmp_path / "mysite"
    (folder / "__init__.py").touch()
    (folder / "more_urls.py").write_text(VIEWS)
    (folder / "tests_of_tasks.py").write_text(TESTS)
    (folder / "more_settings.py").write_text(
        "from .settings import *\n"
        f"ROOT_URLCONF = 'mysite.more_urls'\nDATABASES = {{'default': {settings!r}}}\n"
        f"WSGI_LOOP = {{'SCOPE': {scope!r}}}\n"
    )
    told = run_django_tests(tmp_path, "mysite.more_settings", "--keepdb", "-p", "tests_of_tasks.py")
    assert "Ran 6 tests" in told
    assert count() == 0
