"""The contenders over real HTTP: starts their servers, has wrk load them, and counts.

Each turn has a server of its own, as server threads get slower with age under some contenders, and as its memory is
then the turn's. At first as many clients at a time as wrk will play have their answers checked.
"""

from __future__ import annotations

import http.client
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .contenders import CONTENDERS, Contender
from .handler import Failed
from .workloads import WORKLOADS, Workload, environment, prepared

ROOT = Path(__file__).parents[1]
WORKERS, THREADS, CONCURRENCY = 2, 16, 32
#: Seconds that a server may take to come up, and a request to be answered.
PATIENCE = 60
#: Of a body of this size, in bytes, few requests end within a turn, which is therefore so many times as long.
LARGE, LARGE_TURN = 2**20, 3

#: Kept connections stay with the worker that took them, and the first to wake up may take them all: in some runs one of
#: two workers had nothing to do. Each request has a connection of its own, as behind nginx with its defaults.
CLOSING = ("-H", "Connection: close")
#: wrk's histogram of latencies, for it to be read here: what it prints by itself is rounded.
SCRIPT = """
done = function(summary, latency)
  local counts = {}
  for index = 1, #latency do
    local microseconds, count = latency(index)
    counts[index] = string.format("[%d,%d]", microseconds, count)
  end
  local errors = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests":%d,"duration":%d,"bytes":%d,"errors":%d,"latencies":[%s]}\\n',
    summary.requests, summary.duration, summary.bytes,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout, table.concat(counts, ",")
  ))
end
"""


@dataclass(frozen=True, slots=True)
class Server:
    """A server, as it is started for a contender of its interface. `command` follows the interpreter's name."""

    name: str
    interface: str
    command: tuple[str, ...]


def _gunicorn(name: str, interface: str, *options: str) -> Server:
    common = (f"--workers={WORKERS}", "--bind=127.0.0.1:{port}", "--log-level=warning", "--no-control-socket")
    return Server(name, interface, ("-m", "gunicorn", "benchmarks.servers:application()", *common, *options))


def _uvicorn(name: str, loop: str) -> Server:
    common = (f"--workers={WORKERS}", "--port={port}", "--log-level=warning", "--no-access-log", "--lifespan=off")
    return Server(
        name, "asgi", ("-m", "uvicorn", "--factory", "benchmarks.servers:application", *common, f"--loop={loop}")
    )


_ALL = (
    _gunicorn("gunicorn gthread", "wsgi", "--worker-class=gthread", f"--threads={THREADS}"),
    _gunicorn("gunicorn sync", "wsgi", "--worker-class=sync"),
    _gunicorn("gunicorn asgi", "asgi", "--worker-class=asgi", "--asgi-lifespan=off", "--asgi-loop=asyncio"),
    _gunicorn("gunicorn asgi, uvloop", "asgi", "--worker-class=asgi", "--asgi-lifespan=off", "--asgi-loop=uvloop"),
    _uvicorn("uvicorn", "asyncio"),
    _uvicorn("uvicorn, uvloop", "uvloop"),
)
SERVERS: dict[str, Server] = {server.name: server for server in _ALL}
#: What is compared most has a turn in every round, the others in the first one.
FRONT_SERVERS = ("gunicorn gthread", "gunicorn asgi", "uvicorn")
FRONT_CONTENDERS = ("stock", "request", "process", "asgi")
#: A run in which one of these fails is worth nothing. That a rival fails is a result.
OURS = ("request", "process")
#: Those of a quick run.
QUICK_SERVERS = ("gunicorn gthread", "gunicorn asgi")


def application() -> Callable[..., Any]:
    """Make the application that the environment names: what the servers load."""
    return CONTENDERS[os.environ["BENCHMARKS_CONTENDER"]].make()


def missing() -> str:
    """Say what is not there that every server needs; "" if nothing is."""
    if shutil.which("wrk") is None:
        return "there is no wrk to load servers with: install the package wrk"
    return ""


class Turn(NamedTuple):
    """One server's load with one workload."""

    workload: Workload
    server: Server
    contender: Contender

    @property
    def is_in_every_round(self) -> bool:
        return self.server.name in FRONT_SERVERS and self.contender.name in FRONT_CONTENDERS

    def __str__(self) -> str:
        return f"{self.workload.name}: {self.server.name}, {self.contender.name}"


@dataclass(slots=True)
class Load:
    """What wrk saw in a turn, and what it cost. Latencies and CPU time in µs, memory in MB, None where not told."""

    requests: float
    duration: int
    errors: int
    latencies: Counter[int]
    cpu: int | None
    memory: float | None


@dataclass(slots=True)
class _Loads:
    """The turns that are alike, of all rounds, and what one of them failed of."""

    loads: list[Load] = field(default_factory=list)
    failed: str = ""

    def figures(self) -> dict[str, float | None]:
        latencies = sum((load.latencies for load in self.loads), Counter[int]())
        requests = sum(load.requests for load in self.loads)
        cpu = [load.cpu for load in self.loads if load.cpu is not None]
        memory = [load.memory for load in self.loads if load.memory is not None]
        return {
            "rps": statistics.median(self.rates()),
            "p50_us": percentile(latencies, 0.5),
            "p99_us": percentile(latencies, 0.99),
            "cpu_us": sum(cpu) / requests if cpu and requests else None,
            "peak_mb": max(memory, default=None),
            "errors": sum(load.errors for load in self.loads),
        }

    def rates(self) -> list[float]:
        """Requests per second, of each round."""
        return [load.requests / load.duration * 1e6 for load in self.loads]


def turns(contender_names: Iterable[str], workload_names: Iterable[str], servers: Iterable[str]) -> list[Turn]:
    """Every workload on every server, with every contender of the server's interface."""
    return [
        Turn(WORKLOADS[workload], SERVERS[server], CONTENDERS[contender])
        for workload, server, contender in itertools.product(workload_names, servers, contender_names)
        if SERVERS[server].interface == CONTENDERS[contender].interface
    ]


def measure(
    contender_names: Sequence[str],
    workload_names: Sequence[str],
    *,
    rounds: int,
    seconds: int,
    servers: Sequence[str] = tuple(SERVERS),
    progress: Callable[[list[Turn]], Iterable[Turn]] = iter,
) -> list[dict[str, Any]]:
    """Load the servers, and return the records.

    Each round has a turn of so many seconds, and more where answers take long, for every workload, server and contender
    (but for those that only the first has, see above). A workload's turns are next to one another, in an order shuffled
    anew. progress: wraps the list of turns, as tqdm does.

    Raises Failed for a wrong answer of one of OURS. That of another contender is told, in its record too.
    """
    found: defaultdict[Turn, _Loads] = defaultdict(_Loads)
    shuffle = random.Random(0).shuffle
    order: list[Turn] = []
    for number, workload in itertools.product(range(rounds), workload_names):
        of_workload = [
            turn for turn in turns(contender_names, [workload], servers) if number == 0 or turn.is_in_every_round
        ]
        shuffle(of_workload)
        order += of_workload
    with prepared(WORKLOADS[name] for name in workload_names) as variables:
        for turn in progress(order):
            loads = found[turn]
            try:
                loads.loads.append(_load(turn, seconds, variables))
            except Failed as exc:
                if turn.contender.name in OURS:
                    raise
                loads.failed = str(exc).partition("\n")[0]
                print(exc, file=sys.stderr)
    return [
        {
            "where": "server",
            "server": turn.server.name,
            "workload": turn.workload.name,
            "contender": turn.contender.name,
            # Of the rounds in which it did not fail.
            "figures": loads.figures() if loads.loads else {},
            "samples": loads.rates(),
            "failed": loads.failed,
        }
        for turn, loads in found.items()
    ]


def _load(turn: Turn, seconds: int, variables: dict[str, str]) -> Load:
    workload = turn.workload
    large = workload.expected_size >= LARGE
    clients = WORKERS if large else CONCURRENCY
    with _running(turn, variables) as (process, port):
        with ThreadPoolExecutor(clients) as executor:
            for _ in range(2):
                begin = time.monotonic()
                list(executor.map(_check, [turn] * clients, [port] * clients))
                taken = time.monotonic() - begin
        # Time for some answers to each client.
        seconds = max(LARGE_TURN * seconds if large else seconds, math.ceil(3 * taken))
        workers = _children(process.pid)
        before = _cpu(workers)
        seen = _wrk(f"http://127.0.0.1:{port}{workload.path}", seconds)
        after = _cpu(workers)
        memory = _peak_memory(workers)
        _check(turn, port)
    latencies = Counter(dict(seen["latencies"]))
    return Load(
        # Parts count as well: all large answers may be under way when the turn ends.
        requests=seen["bytes"] / workload.expected_size if large else seen["requests"],
        duration=seen["duration"],
        errors=seen["errors"],
        latencies=uncorrected(latencies, seen["requests"], seen["duration"]),
        cpu=None if before is None or after is None else after - before,
        memory=memory,
    )


@contextmanager
def _running(turn: Turn, variables: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The turn's server, in a process group of its own: its process and its port.

    Raises Failed for whatever is raised in the block, with what the server wrote.
    """
    port = _free_port()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *(argument.format(port=port) for argument in turn.server.command)],
            cwd=ROOT,
            env=os.environ | variables | environment(turn.workload, turn.contender.name),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait_for(process, port)
            yield process, port
        except Exception as exc:
            output.seek(0)
            log = output.read().decode(errors="replace")[-8000:]
            raise Failed(f"{turn}: {exc}\nThe server wrote:\n{log}") from exc
        finally:
            _kill(process)


def _free_port() -> int:
    """A port that no other connection is given before the server has taken it: one below those that the system gives.

    Those are from 32768 on under Linux, unless somebody has changed it.
    """
    for port in random.sample(range(20000, 32000), 100):
        with socket.socket() as found, suppress(OSError):
            # As the servers do: what a connection has left on the port does not matter.
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(("127.0.0.1", port))
            return port
    raise Failed("there is no free port for the server: 100 of those from 20000 to 31999 are taken")


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the server takes connections; its workers may still be starting."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Failed(f"the server ended while it started, with status {process.returncode}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise Failed(f"the server took no connection within {PATIENCE} seconds")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the server at once: how servers end is not measured here."""
    workers = _children(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # They hold database connections until they are gone too, and nobody but the system's first process is told of that.
    while any(_is_running(worker) for worker in workers):
        time.sleep(0.01)


def _check(turn: Turn, port: int) -> None:
    """Make one request, and see that the answer is right."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", turn.workload.path, headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    expected = turn.workload.body, turn.workload.expected_size
    if response.status != 200 or (body[: len(expected[0])], len(body)) != expected:
        raise Failed(
            f"the answer to GET {turn.workload.path} has status {response.status} and {len(body)} bytes that "
            f"begin with {body[:80]!r}, where 200 and {expected[1]} that begin with {expected[0]!r} are expected"
        )


def _wrk(url: str, seconds: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(SCRIPT)
        script.flush()
        options = ("-t1", f"-c{CONCURRENCY}", f"-d{seconds}s", f"--timeout={PATIENCE}s", "-s", script.name, *CLOSING)
        ran = subprocess.run(
            ["wrk", *options, url], capture_output=True, text=True, check=True, timeout=seconds + PATIENCE
        )
    result: dict[str, Any] = json.loads(ran.stdout.partition("RESULT ")[2])
    return result


def uncorrected(latencies: Counter[int], requests: int, duration: int) -> Counter[int]:
    """Return the latencies of the requests that were made, out of those that wrk gives.

    wrk adds to each latency of more than two mean ones those of requests that it believes would have been made in the
    meantime. But here a connection is a client that waits for its answer, and what is told is what clients have seen.
    """
    per_connection = requests // CONCURRENCY
    if not per_connection:
        return latencies
    interval = duration // per_connection
    added: Counter[int] = Counter()
    made: Counter[int] = Counter()
    for latency in sorted(latencies, reverse=True):
        made[latency] = count = latencies[latency] - added[latency]
        if latency >= 2 * interval:
            for earlier in range(latency - interval, interval, -interval):
                added[earlier] += count
    if made.total() != requests or min(made.values()) < 0:
        raise Failed(
            f"wrk made {requests} requests, but of its {latencies.total()} latencies {made.total()} are left: "
            "it corrects them in another way than wrk 4.1 does, which is to be used"
        )
    return made


def percentile(latencies: Counter[int], part: float) -> int | None:
    """The latency that so large a part of the requests did not exceed; None if there were none."""
    count = 0
    for latency in sorted(latencies):
        count += latencies[latency]
        if count >= part * latencies.total():
            return latency
    return None


def _children(pid: int) -> list[int]:
    """The server's workers; none where the system does not tell."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def _stat(pid: int) -> list[str]:
    """The process's fields in /proc/[pid]/stat, from its state on, which is the third there."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _is_running(pid: int) -> bool:
    try:
        return _stat(pid)[0] not in "ZX"
    except OSError:
        return False


def _cpu(pids: Sequence[int]) -> int | None:
    """The CPU time that the processes have used, in µs."""
    if not pids:
        return None
    ticks = sum(int(field) for pid in pids for field in _stat(pid)[11:13])
    return ticks * 1_000_000 // os.sysconf("SC_CLK_TCK")


def _peak_memory(pids: Sequence[int]) -> float | None:
    """The most memory that the processes have held, summed up, in MB."""
    peaks = [
        int(line.split()[1])
        for pid in pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    ]
    return sum(peaks) / 1024 if peaks else None
