"""tests/project: a project of its own, with wsgi-loop from the built wheel in an environment of its own.

Its tests use what docs/testing.md describes, and nothing else. They pass as they stand; and those that are about loops
have to fail when Django's own client and live server take the place of ours.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
#: What the environment has besides the wheel, in the versions of this one.
PACKAGES = ("Django", "asgiref", "pytest", "pytest-django", "pytest-xdist", "djangorestframework")

pytestmark = pytest.mark.long


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON", "DJANGO"))}
    environment = kept | {"PYTHONDONTWRITEBYTECODE": "1"} | variables
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def pip(python: str | Path, *arguments: str | Path, cwd: Path) -> None:
    done = run(python, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)
    if done.returncode == 0:
        return
    told = f"pip {' '.join(map(str, arguments))} failed:\n{done.stdout}{done.stderr}"
    if re.search(r"NewConnectionError|Could not find a version|No matching distribution|ConnectTimeout", told):
        reason = f"pip does not reach a package index, which is needed to build the wheel and the environment. {told}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    pytest.fail(told)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has wsgi-loop from its wheel."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    # A copy, as the build leaves files in its source.
    shutil.copytree(ROOT / "wsgi_loop", source / "wsgi_loop", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", directory, source, cwd=directory)
    (wheel,) = directory.glob("*.whl")
    venv.create(directory / "environment", with_pip=True)
    python = directory / "environment" / "bin" / "python"
    pip(python, "install", wheel, *(f"{name}=={version(name)}" for name in PACKAGES), cwd=directory)
    return python


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project, where nothing of this repository can be imported."""
    return shutil.copytree(
        ROOT / "tests" / "project", tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__")
    )


def run_pytest(python: Path, project: Path, *arguments: str) -> tuple[set[str], dict[str, str], str]:
    """Return what passed, what failed and why, and the output."""
    done = run(python, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=report.xml", *arguments, cwd=project)
    passed, failed = set(), {}
    for case in ElementTree.parse(project / "report.xml").iter("testcase"):
        name = f"{case.attrib['classname'].removeprefix('shop.')}.{case.attrib['name']}"
        problems = [problem for kind in ("failure", "error", "skipped") for problem in case.iter(kind)]
        if problems:
            failed[name] = "".join(problem.text or "" for problem in problems)
        else:
            passed.add(name)
    assert (done.returncode == 0) is not failed, done.stdout
    return passed, failed, done.stdout


PATHS = ("/customers/", "/pay/", "/receipt/")
#: Those that go through pytest-django's client and live server.
SWITCHED = {f"tests_pytest.{test}[{path}]" for test in ("test_client", "test_live_server") for path in PATHS} | {
    "tests_pytest.test_admin_client"
}
FIXED = {f"tests_pytest.test_wsgi_loop_{test}[{path}]" for test in ("client", "live_server") for path in PATHS} | {
    "tests_pytest.test_the_view_is_in_the_transaction_of_the_test",
    "tests_pytest.test_the_live_server_sees_the_data_of_the_test",
    "tests_pytest.test_what_a_view_raises",
    "tests.ClientTests.test_customers",
    "tests.ClientTests.test_receipt",
    "tests.LiveServerTests.test_customers",
    "tests_drf.APITests.test_pay",
}


def test_the_wheel_is_what_is_tested(python: Path, project: Path) -> None:
    done = run(python, "-c", "import wsgi_loop; print(wsgi_loop.__file__)", cwd=project)
    assert str(python.parents[1]) in done.stdout, done.stdout + done.stderr


def test_pytest(python: Path, project: Path) -> None:
    passed, failed, output = run_pytest(python, project)
    assert not failed, output
    assert passed == SWITCHED | FIXED


def test_pytest_xdist(python: Path, project: Path) -> None:
    passed, failed, output = run_pytest(python, project, "-n", "4")
    assert not failed, output
    assert passed == SWITCHED | FIXED
    assert "4 workers" in output


def test_with_djangos_own_handler_the_tests_of_loops_fail(python: Path, project: Path) -> None:
    passed, failed, output = run_pytest(python, project, "-o", "wsgi_loop_serve=false")
    assert set(failed) == SWITCHED, output
    assert passed == FIXED
    for test, why in failed.items():
        if "/customers/" in test:
            assert "loop calls ran on 3 event loops, and wsgi-loop did not serve 3 of them" in why
            assert "shop/views.py" in why
        else:
            # Or that Django's client closes a body of async code on its loop, where no async receiver can be called.
            reasons = (
                "attached to a different loop",
                "HTTP Error 500",
                "IncompleteRead",
                "same thread as an async event",
            )
            assert any(reason in why for reason in reasons), why


def test_unittest(python: Path, project: Path) -> None:
    done = run(python, "-W", "error", "manage.py", "test", cwd=project)
    assert done.returncode == 0, done.stderr
    assert "Ran 4 tests" in done.stderr


def test_unittest_with_djangos_own_handler(python: Path, project: Path) -> None:
    for name, ours, stock in (
        ("tests.py", "from wsgi_loop.testing import Client, LiveServerTestCase, ", "from wsgi_loop.testing import "),
        (
            "tests.py",
            "from django.test import TestCase\n",
            "from django.test import Client, LiveServerTestCase, TestCase\n",
        ),
        ("tests_drf.py", "class Client(ClientMixin, APIClient)", "class Client(APIClient)"),
    ):
        path = project / "shop" / name
        code = path.read_text()
        assert ours in code
        path.write_text(code.replace(ours, stock))
    done = run(python, "manage.py", "test", cwd=project)
    assert done.returncode != 0
    assert "Ran 4 tests" in done.stderr
    assert re.search(r"FAILED \(failures=2, errors=2\)", done.stderr), done.stderr
