"""The Celery app that `test_celery` runs a worker of: tasks that use async code through `EventLoopContext`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio
from asgiref.sync import async_to_sync
from celery import Celery
from celery.signals import worker_process_shutdown

from wsgi_loop import EventLoopContext, PerLoop, create_background_task
from wsgi_loop.process import shut_down

URL = os.environ["WSGI_LOOP_TEST_CELERY_URL"]
#: Of all keys, and of the client's connections.
NAME = os.environ["WSGI_LOOP_TEST_CELERY_NAME"]
MAX_CONNECTIONS = 4
#: Seconds that background tasks get at the worker's end.
SHUTDOWN_TIMEOUT = 5

app = Celery("wsgi-loop-tests", broker=URL, backend=URL)
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options={"global_keyprefix": f"{NAME}:"},
    result_backend_transport_options={"global_keyprefix": f"{NAME}:"},
    task_default_queue=NAME,
    # What other Celery workers of the same redis say is none of this one's business.
    worker_enable_remote_control=False,
    worker_hijack_root_logger=False,
)

# Plain clients in a module, made before Celery forks its children.
PATIENCE = {"socket_timeout": 60, "socket_connect_timeout": 60}
client = redis.asyncio.Redis.from_url(URL, client_name=NAME, max_connections=MAX_CONNECTIONS, **PATIENCE)
stock_client = redis.asyncio.Redis.from_url(URL, client_name=f"{NAME}-stock", **PATIENCE)

in_one_loop = EventLoopContext(scope="process", shutdown_timeout=SHUTDOWN_TIMEOUT)


@worker_process_shutdown.connect(weak=False)
def close_process_loop(**kwargs: Any) -> None:
    shut_down()


async def push(what: str, value: object) -> None:
    await client.rpush(f"{NAME}:{what}", str(value))  # type: ignore[misc]


@asynccontextmanager
async def resource() -> AsyncIterator[str]:
    await push("entered", os.getpid())
    try:
        yield "open"
    finally:
        await push("left", os.getpid())


per_worker = PerLoop(resource)


@app.task
@in_one_loop
def work() -> list[int]:
    """Use every connection of the client at once, in one loop call, and one of them in others."""

    async def use() -> int:
        assert await per_worker() == "open"
        await asyncio.gather(*(client.incr(f"{NAME}:total") for _ in range(MAX_CONNECTIONS)))
        return id(asyncio.get_running_loop())

    first = async_to_sync(use)()
    async_to_sync(client.ping)()
    assert async_to_sync(use)() == first
    return [os.getpid(), first]


@app.task
def work_without_it() -> None:
    async_to_sync(stock_client.ping)()
    async_to_sync(stock_client.ping)()


@app.task
@in_one_loop
def start_background_task(seconds: float) -> None:
    async def linger() -> None:
        await asyncio.sleep(seconds)
        await push("lingered", seconds)

    create_background_task(linger(), name=f"{seconds} s")
