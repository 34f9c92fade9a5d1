"""What is measured: the requests, what they need, and how often they are made. Knows no handler and no server."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

REDIS_URL = os.environ.get("WSGI_LOOP_TEST_REDIS_URL", "redis://127.0.0.1:6379/9")
POSTGRES_URL = os.environ.get("WSGI_LOOP_TEST_POSTGRES_URL", "postgresql://postgres@127.0.0.1:5432/postgres")

CHUNK_SIZE = 64 * 1024
STREAM_SIZE = 50 * 1024 * 1024

#: Children are forked from a process that has no threads and has imported what they have in common.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "benchmarks.handler",
        "django.contrib.auth.hashers",
        "django.core.handlers.asgi",
        "django.core.handlers.wsgi",
        "django.db.models",
        "django.middleware.csrf",
        "httpx",
        "psycopg",
        "redis.asyncio",
        "uvloop",
    ]
)


@dataclass(frozen=True, slots=True)
class Workload:
    """One request, made many times.

    path: of its URL. body: what the answer begins with. size: of the answer's body, in bytes; that of `body` if it is
    not given. middleware: "none", "default" (what `startproject` writes) or "stack".
    database: "sqlite" or "postgresql". needs: the services that have to run, "redis" and "postgresql".
    rounds, quick_rounds: how many turns each contender has, in a full and in a quick run. In each turn `cold` requests
    are made and not counted, and then `counted` ones.
    over_http: whether servers are loaded with it where nobody asks for it by name.
    """

    name: str
    title: str
    path: str
    body: bytes
    rounds: int
    quick_rounds: int
    size: int = -1
    middleware: str = "none"
    database: str = "sqlite"
    needs: tuple[str, ...] = ()
    cold: int = 1
    counted: int = 1
    over_http: bool = True

    @property
    def expected_size(self) -> int:
        return len(self.body) if self.size < 0 else self.size


_ALL = (
    Workload("sync_bare", "sync view, no middleware", "/sync/", b"plain", 2000, 100),
    Workload("sync_default", "sync view, default middleware", "/sync/", b"plain", 1000, 50, middleware="default"),
    Workload("async_view", "async view", "/async/", b"plain", 1000, 60),
    Workload(
        "stack",
        "3 async middlewares, 2 + 2 async receivers, async view",
        "/async/",
        b"plain",
        600,
        30,
        middleware="stack",
    ),
    Workload(
        "async_to_sync",
        "3 async_to_sync calls in a sync view",
        "/async-to-sync/",
        b"plain",
        600,
        30,
        over_http=False,
    ),
    Workload("calls", "5 awaited sync_to_async calls that do nothing", "/calls/", b"5", 600, 30),
    Workload("orm_sqlite", "5 awaited queries, SQLite", "/orm/", b"20", 500, 30),
    Workload(
        "orm_sync_sqlite",
        "the same 5 queries in a sync view, SQLite",
        "/orm-sync/",
        b"20",
        500,
        30,
        over_http=False,
    ),
    Workload(
        "orm_postgresql",
        "5 awaited queries, PostgreSQL",
        "/orm/",
        b"20",
        400,
        20,
        database="postgresql",
        needs=("postgresql",),
    ),
    # It takes 0.1 s, beside which what others leave in the processor's caches is nothing.
    Workload(
        "gather",
        "a sync call of 0.1 s beside ten waits of 10 ms",
        "/gather/",
        b"plain",
        8,
        1,
        counted=2,
        over_http=False,
    ),
    Workload("fanout", "10 concurrent HTTP calls of 20 ms", "/fanout/", b"10", 30, 2),
    Workload("redis", "5 gets from Redis", "/redis/", b"value" * 5, 300, 20, needs=("redis",)),
    Workload("stream", "async stream of 50 MB", "/stream/", b"." * 64, 15, 2, size=STREAM_SIZE),
    Workload("growth", "3,000 requests of aiterator() on one thread", "/growth/", b"10", 300, 30, cold=0, counted=10),
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}


def missing(workload: Workload) -> str:
    """Say which service that the workload needs does not answer, and where it was looked for; "" if all do."""
    if "redis" in workload.needs:
        import redis

        try:
            with redis.Redis.from_url(REDIS_URL) as client:
                client.ping()
        except redis.RedisError as exc:
            return f"no Redis at {REDIS_URL} (WSGI_LOOP_TEST_REDIS_URL): {exc}"
    if "postgresql" in workload.needs:
        import psycopg

        try:
            psycopg.connect(POSTGRES_URL).close()
        except psycopg.Error as exc:
            return f"no PostgreSQL at {POSTGRES_URL} (WSGI_LOOP_TEST_POSTGRES_URL): {exc}"
    return ""


def environment(workload: Workload, contender: str) -> dict[str, str]:
    """The environment variables by which `benchmarks.settings` learns what it is for."""
    return {
        "DJANGO_SETTINGS_MODULE": "benchmarks.settings",
        "BENCHMARKS_WORKLOAD": workload.name,
        "BENCHMARKS_CONTENDER": contender,
    }


@contextlib.contextmanager
def prepared(workloads: Iterable[Workload]) -> Iterator[dict[str, str]]:
    """Have all there that the workloads need, until the end of the block: data and the slow server.

    Gives environment variables that every process which serves them has to have, beside those of `environment`.
    """
    workloads = list(workloads)
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wsgi-loop-benchmarks-")))
        # Names of its own, for runs may be made at the same time.
        run = str(os.getpid())
        environ = {"BENCHMARKS_RUN": run, "BENCHMARKS_SQLITE": str(directory / "database.sqlite3")}
        if any(workload.name == "fanout" for workload in workloads):
            environ["BENCHMARKS_SLOW_URL"] = stack.enter_context(_slow_server())
        for database in sorted({workload.database for workload in workloads}):
            workload = next(workload for workload in workloads if workload.database == database)
            variables = environ | environment(workload, "stock")
            if not _in_process("make_data", variables):
                raise RuntimeError(f"The data in {database} could not be made: the error is above.")
            # If that fails, what has been measured is not lost: the error is printed there.
            stack.callback(_in_process, "remove_data", variables)
        if any("redis" in workload.needs for workload in workloads):
            import redis

            client = stack.enter_context(redis.Redis.from_url(REDIS_URL))
            keys = redis_keys(run)
            client.mset(dict.fromkeys(keys, "value"))
            stack.callback(client.delete, *keys)
        yield environ


def _in_process(function: str, environ: dict[str, str]) -> bool:
    """Call a function of the site in a process of its own, and return whether it succeeded."""
    process = processes.Process(target=_call, args=(function, environ))
    process.start()
    process.join()
    return process.exitcode == 0


def _call(function: str, environ: dict[str, str]) -> None:
    os.environ.update(environ)
    import django

    django.setup()
    from . import site

    getattr(site, function)()


@contextlib.contextmanager
def _slow_server() -> Iterator[str]:
    """A server in a process of its own that answers each HTTP request after 20 ms."""
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_run_slow_server, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/"
    finally:
        process.terminate()
        process.join()
        ours.close()


def _run_slow_server(connection: Connection) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(0.02)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                await writer.drain()
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
        connection.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def redis_keys(run: str) -> list[str]:
    return [f"wsgi-loop-benchmarks:{run}:{number}" for number in range(5)]


def postgres_settings(run: str) -> dict[str, object]:
    """Django's settings of the server at `POSTGRES_URL`, with a database of the run's own."""
    url = urlsplit(POSTGRES_URL)
    name = f"wsgi_loop_benchmarks_{run}"
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": url.username or "",
        "PASSWORD": url.password or "",
        "HOST": url.hostname or "",
        "PORT": str(url.port or ""),
        "TEST": {"NAME": name},
    }
