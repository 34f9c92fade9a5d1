"""Run a real server in a process group of its own, and talk to it."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..support import eventually as wait_until

ROOT = Path(__file__).parents[2]

# Whatever proxy the environment names is not for this machine.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerProcess:
    """A command that runs, with what it starts, in a process group of its own. `environment` is added to ours."""

    def __init__(self, command: list[str], directory: Path, output: Path, environment: dict[str, str]) -> None:
        self.command = command
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env=os.environ | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self) -> str:
        return self._output.read_text(errors="replace")

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        """End the process, and what it has started."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(15)


@contextmanager
def running(
    command: list[str], directory: Path, output: Path, environment: dict[str, str], is_up: Callable[[], bool]
) -> Iterator[ServerProcess]:
    """Start a server, wait until it is up, and end it at last; its output goes with a failure."""
    server = ServerProcess(command, directory, output, environment)
    try:
        eventually(lambda: server.has_ended() or is_up())
        assert not server.has_ended(), "the server ended"
        yield server
    except BaseException as exc:
        exc.add_note(f"{' '.join(command)} wrote:\n{server.log()[-8000:]}")
        raise
    finally:
        server.end()


def free_port() -> int:
    """Return one that no connection of another program is given as its own before the server has taken it."""
    # Those are from 32768 on, unless somebody has changed it.
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as found, suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(("127.0.0.1", port))
            return port
    raise AssertionError("100 ports are taken")


def takes_connections(port: int) -> bool:
    """Whether a server is up: without a request, for a server's first one is a test's."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


#: With a pause that leaves the processor to the server.
eventually = functools.partial(wait_until, pause=0.1)


def copy_of_example(folder: Path, environment: Callable[[Path], dict[str, str]]) -> Path:
    """Copy the example site to `folder`, and make its database. environment: is added to ours, of where it is."""
    directory = folder / "example"
    shutil.copytree(ROOT / "example", directory, ignore=shutil.ignore_patterns("*.sqlite3", "__pycache__"))
    command = [sys.executable, "manage.py", "migrate"]
    done = subprocess.run(
        command, cwd=directory, env=os.environ | environment(directory), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory
