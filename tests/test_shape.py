"""An asgiref that is not as `wsgi_loop.bridge` knows it is refused, with an error that says what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import asgiref
import pytest
from asgiref.sync import AsyncToSync
from django.utils.version import get_version_tuple

from wsgi_loop.bridge import shape

ROOT = Path(__file__).parents[1]
INSTALL = f"pip install 'asgiref>={shape.LOWEST},<={shape.NEWEST}'"


def check_with(asgiref_: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of Django's, with the asgiref in this folder."""
    return subprocess.run(
        [sys.executable, "-m", "django", "check"],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(asgiref_), str(ROOT)]), "DJANGO_SETTINGS_MODULE": "tests.settings"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of asgiref."""
    shutil.copytree(Path(asgiref.__file__).parent, tmp_path / "asgiref", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_a_copy_as_it_is(copy: Path) -> None:
    done = check_with(copy)
    assert "ImportError" not in done.stderr


SYNC, SUBMIT = "asgiref.sync", "asgiref.current_thread_executor.CurrentThreadExecutor.submit"
RENAMED = {
    "_Storage": "it has no asgiref.local._Storage.__init__",
    "main_wrap": f"{SYNC}.AsyncToSync.__call__ does not use main_wrap",
    "loop_thread_executors": f"it has no {SYNC}.AsyncToSync.loop_thread_executors",
    "deadlock_context": f"it has no {SYNC}.SyncToAsync.deadlock_context",
    "threadlocal": f"{SYNC}.AsyncToSync.__call__ does not use threadlocal",
    "main_event_loop": f"{SYNC}.AsyncToSync.__call__ does not use main_event_loop",
    "run_in_executor": f"{SYNC}.SyncToAsync.__call__ does not use run_in_executor",
    "_work_items": f"{SUBMIT} does not use _work_items",
    "call_result": (
        f"{SYNC}.AsyncToSync.main_wrap takes self, renamed, exc_info, task_context, context, awaitable, and not self, "
        "call_result, exc_info, task_context, context, awaitable"
    ),
}


@pytest.mark.parametrize("name", RENAMED)
def test_one_in_which_a_name_is_another(copy: Path, name: str) -> None:
    for path in (copy / "asgiref").glob("*.py"):
        path.write_text(re.sub(rf"\b{name}\b", "renamed", path.read_text()))
    done = check_with(copy)
    assert done.returncode == 1
    # The one error that is shown.
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: wsgi-loop can't work with the asgiref {asgiref.__version__} that is installed: {RENAMED[name]}. "
        f"The last version that wsgi-loop was tested with is {shape.NEWEST}: {INSTALL}, or a later wsgi-loop."
    )


def test_what_a_tool_has_put_in_the_place_of_asgirefs_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    call, main_wrap = AsyncToSync.__call__, AsyncToSync.main_wrap
    monkeypatch.setattr(AsyncToSync, "__call__", lambda self, *args, **kwargs: call(self, *args, **kwargs))
    monkeypatch.setattr(AsyncToSync, "main_wrap", lambda self, *args: main_wrap(self, *args))
    shape.check()


def test_the_versions_are_those_that_are_installed_and_tested() -> None:
    setup, tox = ConfigParser(), ConfigParser()
    setup.read(ROOT / "setup.cfg")
    tox.read(ROOT / "tox.ini")
    assert f"asgiref>={shape.LOWEST}" in setup["options"]["install_requires"].split()
    assert f"asgirefmin: asgiref=={shape.LOWEST}" in tox["testenv"]["deps"].splitlines()
    if "WSGI_LOOP_TEST_ASGIREF" not in os.environ:
        assert get_version_tuple(asgiref.__version__) <= get_version_tuple(shape.NEWEST)
