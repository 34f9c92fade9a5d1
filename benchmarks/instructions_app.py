"""Serve requests in forked children: what `benchmarks.instructions` counts the instructions of.

python -m benchmarks.instructions_app bare|default|async SEED FEW MANY

Prints a line for each child, `PID HANDLER REQUESTS`.
"""

from __future__ import annotations

import gc
import io
import os
import random
import sys
from typing import Any
from wsgiref.util import FileWrapper

import django
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler as DjangoHandler
from django.http import HttpRequest, HttpResponse
from django.urls import path

WARM_UP = 20

#: What `startproject` writes into the settings.
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
APPS = ["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions", "django.contrib.messages"]

BARE = {
    "REQUEST_METHOD": "GET",
    "PATH_INFO": "/",
    "SCRIPT_NAME": "",
    "SERVER_NAME": "testserver",
    "SERVER_PORT": "80",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "HTTP_HOST": "localhost",
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.errors": sys.stderr,
    "wsgi.multiprocess": False,
    "wsgi.multithread": False,
    "wsgi.run_once": False,
}
#: A browser's request, as gunicorn passes it on.
BROWSER = BARE | {
    "QUERY_STRING": "",
    "RAW_URI": "/",
    "REMOTE_ADDR": "127.0.0.1",
    "REMOTE_PORT": "51234",
    "SERVER_SOFTWARE": "gunicorn/23.0.0",
    "wsgi.file_wrapper": FileWrapper,
    "wsgi.input_terminated": True,
    "HTTP_USER_AGENT": "Mozilla/5.0 (X11; Linux x86_64; rv:133.0) Gecko/20100101 Firefox/133.0",
    "HTTP_ACCEPT": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
    "HTTP_ACCEPT_LANGUAGE": "en-US,en;q=0.5",
    "HTTP_ACCEPT_ENCODING": "gzip, deflate, br, zstd",
    "HTTP_CONNECTION": "keep-alive",
    "HTTP_COOKIE": "csrftoken=vQ9xJmY3n2kq8rT5wZ7bL1dF4gH6jKsA; sessionid=k3x9w2m8q7z5v1n4b6c0l2j8h5g3f7d9",
    "HTTP_UPGRADE_INSECURE_REQUESTS": "1",
    "HTTP_SEC_FETCH_DEST": "document",
    "HTTP_SEC_FETCH_MODE": "navigate",
    "HTTP_SEC_FETCH_SITE": "none",
    "HTTP_SEC_FETCH_USER": "?1",
}


def plain(request: HttpRequest) -> HttpResponse:
    return HttpResponse("plain")


async def async_plain(request: HttpRequest) -> HttpResponse:
    return HttpResponse("plain")


urlpatterns = [path("", plain), path("async/", async_plain)]


def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> None:
    assert status == "200 OK", status


def serve(handler: Any, environ: dict[str, Any], requests: int) -> None:
    for _ in range(requests):
        response = handler({**environ, "wsgi.input": io.BytesIO()}, start_response)
        for _chunk in response:
            pass
        response.close()


def subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(subclasses, type.__subclasses__(cls)))


def shuffle_classes(seed: int) -> None:
    """Give every class another place in the cache through which CPython finds attributes.

    Which of them evict each other is chance, and decides over some thousand instructions a request. With the same
    seed it is the same for all handlers.
    """
    classes = sorted(subclasses(object), key=lambda cls: (cls.__module__, cls.__qualname__))
    random.Random(seed).shuffle(classes)
    for cls in classes:
        # A class gets its place when an attribute of it is first looked up.
        getattr(cls, "_not_there", None)


def main(workload: str, seed: int, *counts: int) -> None:
    default = workload == "default"
    settings.configure(
        SECRET_KEY="not a secret",
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        LOGGING_CONFIG=None,
        MIDDLEWARE=MIDDLEWARE if default else [],
        INSTALLED_APPS=APPS if default else [],
    )
    django.setup()
    from wsgi_loop import WSGIHandler

    # All that is imported is imported here, so that the children differ in nothing but what serves.
    handlers = {
        "stock": DjangoHandler(),
        "request": WSGIHandler(),
        "process": WSGIHandler(scope="process"),
    }
    environ = {"bare": BARE, "default": BROWSER, "async": BARE | {"PATH_INFO": "/async/"}}[workload]
    shuffle_classes(seed)
    for which, handler in handlers.items():
        for requests in counts:
            pid = os.fork()
            if not pid:
                serve(handler, environ, WARM_UP)
                gc.collect()
                gc.freeze()
                gc.disable()
                serve(handler, environ, requests)
                # What the interpreter does on its way out depends on what it has seen.
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0, which
            print(pid, which, requests, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
