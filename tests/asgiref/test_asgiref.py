"""asgiref's own tests of `sync_to_async`, `async_to_sync` and `Local` pass inside a request, on its loop.

Those of the very asgiref that is installed: pip fetches its source distribution. `plugin` says how they run.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from packaging.version import Version

from ..servers.support import ROOT, ServerProcess
from .plugin import ASYNC_TESTS, OPTIONS, USES

VERSION = version("asgiref")
#: Seconds for all runs together, which are made at once.
PATIENCE = 120

SCOPES = ("request", "process")
#: What an async test runs in: a loop call, as an async view does; or a task that knows of no sync caller, for which
#: asgiref's are written. Then the sync ones, to which it makes no difference, are left out.
CALLERS = ("call", "task")
RUNS = {f"{scope}-{caller}": (scope, caller) for scope, caller in itertools.product(SCOPES, CALLERS)}


class Excluded(NamedTuple):
    """A test that fails. since: the first asgiref that has it. why: what it asserts that is not so."""

    test: str
    runs: set[str]
    since: str
    why: str


IN_A_CALL = {"request-call", "process-call"}
EXCLUDED = [
    # Not in a loop call of asgiref's own loop either: all thread-sensitive code below a sync caller runs on its thread.
    Excluded(
        "test_sync_contextvars.test_thread_sensitive_with_context_different",
        IN_A_CALL,
        "3.12.1",
        "two ThreadSensitiveContexts have two threads",
    ),
    Excluded(
        "test_sync_thread_sensitive_context.test_plain_context_allows_calls_after_exit",
        IN_A_CALL,
        "3.13.0",
        "a ThreadSensitiveContext has a thread of its own",
    ),
    # The request thread runs the loop by hand, and thread-sensitive code too.
    Excluded(
        "test_sync.test_thread_sensitive_nested_context",
        {"request-call"},
        "3.12.1",
        "async code is not on the thread of the sync code that it calls in nested ThreadSensitiveContexts",
    ),
    Excluded(
        "test_sync.test_sync_to_async_within_create_task",
        {"request-call"},
        "3.12.1",
        "async code is not on the thread of the sync middleware that it calls",
    ),
    Excluded(
        "test_sync.test_async_single_thread_context_matches",
        {"request-call"},
        "3.12.1",
        "async code is not on the thread of the sync code that calls it in an AsyncSingleThreadContext",
    ),
    Excluded(
        "test_sync.test_async_single_thread_nested_context",
        {"request-call"},
        "3.12.1",
        "async code is not on the thread of the sync code that calls it in nested AsyncSingleThreadContexts",
    ),
    # The task could go on while the request thread is in the sync code: the loop is promoted.
    Excluded(
        "test_local.test_local_critical_no_task_to_thread",
        {"request-task"},
        "3.12.1",
        "async code is on one thread before and after a call of sync code, and sees what it keeps per thread",
    ),
]
#: How many of asgiref 3.12.1's tests use the request's loop. The others need no loop, or make theirs.
ON_THE_LOOP = {"call": 64, "task": 42}


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """asgiref's test files, and no asgiref, lest that one is imported."""
    directory = tmp_path_factory.mktemp("asgiref")
    # Only pip knows where from. It installs nothing.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--retries", "5" if "CI" in os.environ else "1"]
    command += ["--dest", str(directory), "--no-deps", "--no-binary", "asgiref", f"asgiref=={VERSION}"]
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE)
    if pip.returncode:
        reason = f"pip could not fetch the source distribution of asgiref {VERSION}"
        if "CI" in os.environ:
            pytest.fail(f"{reason}:\n{pip.stdout}")
        pytest.skip(f"{reason}: is there a network?")
    with tarfile.open(directory / f"asgiref-{VERSION}.tar.gz") as archive:
        for member in archive:
            if re.fullmatch(r"[^/]+/tests/test_(sync\w*|local)\.py", member.name):
                file = archive.extractfile(member)
                assert file is not None
                (directory / Path(member.name).name).write_bytes(file.read())
    (directory / "pytest.ini").write_text("[pytest]\n")
    return directory


@pytest.fixture(scope="module")
def processes(directory: Path) -> Iterator[dict[str, ServerProcess]]:
    """A pytest for each run, all at the same time, as asgiref's tests spend it sleeping. Each leaves its results."""
    environment = {"DJANGO_SETTINGS_MODULE": "tests.settings", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    started = {}
    try:
        for run, (scope, caller) in RUNS.items():
            command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "-p", "no:cacheprovider"]
            command += ["-p", "tests.asgiref.plugin", OPTIONS, json.dumps({"scope": scope}), ASYNC_TESTS, caller]
            command += [f"--junitxml={run}.xml", "-m", "asyncio" if caller == "task" else ""]
            started[run] = ServerProcess(command, directory, directory / f"{run}.txt", environment)
        yield started
    finally:
        for process in started.values():
            process.end()


@pytest.fixture(scope="module")
def deadline(processes: object) -> float:
    return time.monotonic() + PATIENCE


@pytest.mark.parametrize("run", RUNS)
def test_asgirefs_own_tests_pass_on_a_requests_loop(
    directory: Path, processes: dict[str, ServerProcess], deadline: float, run: str
) -> None:
    _, caller = RUNS[run]
    try:
        processes[run].process.wait(max(0, deadline - time.monotonic()))
        tests = list(ElementTree.parse(directory / f"{run}.xml").iter("testcase"))
        failed = {name_of(test) for test in tests if test.find("failure") is not None or test.find("error") is not None}
        assert failed == {
            excluded.test
            for excluded in EXCLUDED
            if run in excluded.runs and Version(VERSION) >= Version(excluded.since)
        }
        assert sum(uses_of(test) > 0 for test in tests) >= ON_THE_LOOP[caller]
    except Exception as exc:
        exc.add_note(f"Its output:\n{processes[run].log()[-20000:]}")
        raise


def name_of(test: ElementTree.Element) -> str:
    return f"{test.get('classname')}.{test.get('name')}"


def uses_of(test: ElementTree.Element) -> int:
    """How often it has used the request's loop."""
    return sum(int(found.get("value", "")) for found in test.iter("property") if found.get("name") == USES)
