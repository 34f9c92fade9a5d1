"""`manage.py wsgi_loop`: what wsgi-loop makes of a project's requests, beside Django's own handler."""

from __future__ import annotations

import contextlib
import json
import platform
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from typing import Any

import asgiref
import django
from django.apps import apps
from django.conf import settings
from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY, get_user_model
from django.core.exceptions import ImproperlyConfigured, ObjectDoesNotExist
from django.core.management.base import BaseCommand, CommandError, CommandParser, DjangoHelpFormatter
from django.utils.crypto import get_random_string
from django.utils.module_loading import import_string

import wsgi_loop
from wsgi_loop.conf import DEFAULTS
from wsgi_loop.tools.report import Comparison, Request, Side, WorkerEnded, is_worse

SAFE = ("GET", "HEAD", "OPTIONS")
REPEAT = 20
TITLES = ("Django's own handler", "wsgi-loop")
BAR = 30
_PLAIN = (str, int, float, type(None))


class _Formatter(RawDescriptionHelpFormatter, DjangoHelpFormatter):
    pass


class Command(BaseCommand):
    help = (
        "Sends a request to each path through Django's own handler and through wsgi-loop, each in a process of its\n"
        "own, and shows side by side what each made of it. The exit code is 1 if wsgi-loop answers worse.\n\n"
        "The requests are really executed, with the database of the settings: once through each handler to count,\n"
        "and --repeat times more to take the time. That holds for --method POST and other unsafe methods too,\n"
        "whatever they do, so --repeat is 1 for these unless it is given."
    )

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        return super().create_parser(prog_name, subcommand, **{"formatter_class": _Formatter} | kwargs)

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("paths", nargs="*", metavar="path", help="such as /books/?page=2; the default is /")
        parser.add_argument("--method", default="GET", help="the default is GET; unsafe ones are really executed")
        parser.add_argument(
            "--header", action="append", default=[], metavar="'NAME: VALUE'", help="may be given several times"
        )
        parser.add_argument("--data", default="", help="the body, form encoded unless a Content-Type is given")
        parser.add_argument(
            "--user", help="the user name to be logged in with; makes a session, and deletes it at the end"
        )
        parser.add_argument(
            "--repeat", type=int, help=f"how many requests to time for each handler; the default is {REPEAT}, or 1"
        )
        parser.add_argument(
            "--in-process",
            action="store_true",
            help="serve in this process, for a debugger or inside a test: both handlers then share its modules",
        )
        parser.add_argument("--json", action="store_true", dest="as_json", help="write JSON, for machines")
        parser.add_argument(
            "--fail-if-not-one-loop",
            action="store_true",
            help="exit with 1 if any request made loop calls on more than one loop of wsgi-loop, or on another one",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        method = options["method"].upper()
        repeat = options["repeat"]
        if repeat is None:
            repeat = REPEAT if method in SAFE else 1
        if repeat < 1:
            raise CommandError(f"--repeat is {repeat}. It has to be 1 or more.")
        if not method.isalpha():
            raise CommandError(f"--method is {options['method']!r}. Give one such as GET or POST.")
        if options["data"] and method in SAFE:
            raise CommandError(f"--data is for methods that have a body, and this is {method}. Give --method POST.")
        paths = options["paths"] or ["/"]
        for path in paths:
            if not path.startswith("/"):
                raise CommandError(
                    f"The path {path!r} does not begin with a slash. Give it as in a URL: {'/' + path!r}."
                )
        headers = _headers(options["header"], method, bool(options["data"]))
        results: list[tuple[str, tuple[Side, Side]]] = []
        with _session_of(options["user"], headers), _comparison(options["in_process"]) as comparison:
            step = self._progress(2 * (1 + repeat) * len(paths), quiet=options["verbosity"] < 1)
            try:
                for path in paths:
                    request = Request(method, path, headers, options["data"].encode())
                    results.append((path, comparison.compare(request, repeat, lambda path=path: step(path))))  # type: ignore[misc]
            finally:
                step(None)
        if options["as_json"]:
            self.stdout.write(json.dumps(_as_json(method, repeat, results), indent=2))
        else:
            self.stdout.write("\n".join(_as_table(method, path, sides) for path, sides in results))
            where = "both handlers in this process" if options["in_process"] else "each handler in a process of its own"
            self.stdout.write(
                f"\nTime: the median of {repeat}, by turns, {where}, with no server. Python "
                f"{platform.python_version()}, Django {django.__version__}, asgiref {asgiref.__version__}, wsgi-loop "
                f"{wsgi_loop.__version__}.\nWSGI_LOOP: {_setting()!r}"
            )
        wrong = []
        if worse := [path for path, sides in results if is_worse(*sides)]:
            wrong.append(f"wsgi-loop answered otherwise than Django's own handler: {', '.join(worse)}")
        if broken := [path for path, (_, ours) in results if ours.of_another_loop]:
            wrong.append(f"Something belongs to the event loop of an earlier request: {', '.join(broken)}")
        odd = [path for path, (_, ours) in results if not ours.one_loop]
        if odd and options["fail_if_not_one_loop"]:
            wrong.append(f"Not on one event loop of wsgi-loop: {', '.join(odd)}")
        if wrong:
            raise CommandError("\n".join(wrong), returncode=1)

    def _progress(self, total: int, quiet: bool) -> Callable[[str | None], None]:
        """Return what draws a bar, on a terminal, after each request; and takes it away, called with None."""
        if quiet or not self.stderr.isatty():
            return lambda path: None
        done = 0

        def step(path: str | None) -> None:
            nonlocal done
            done += 1
            filled = BAR * done // total
            line = f"[{'#' * filled}{'.' * (BAR - filled)}] {done} of {total} requests, {path}"
            self.stderr.write("\r\x1b[K" + (line[:110] if path is not None else ""), ending="")
            self.stderr.flush()

        return step


def _headers(given: list[str], method: str, has_data: bool) -> dict[str, str]:
    secure = settings.SECURE_SSL_REDIRECT
    headers = {"HTTP_HOST": _host(), "wsgi.url_scheme": "https" if secure else "http"}
    if has_data:
        headers["CONTENT_TYPE"] = "application/x-www-form-urlencoded"
    for line in given:
        name, colon, value = line.partition(":")
        if not colon or not name.strip():
            raise CommandError(f"--header is {line!r}. Give a name, a colon and a value: 'Accept-Language: de'.")
        key = name.strip().upper().replace("-", "_")
        headers[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value.strip()
    if method not in SAFE:
        # As a browser that has got the form: without, each answer would be CsrfViewMiddleware's.
        token = get_random_string(32)
        headers.setdefault(settings.CSRF_HEADER_NAME, token)
        headers.setdefault("HTTP_REFERER", f"{headers['wsgi.url_scheme']}://{headers['HTTP_HOST']}/")
        _add_cookie(headers, settings.CSRF_COOKIE_NAME, token)
    return headers


def _host() -> str:
    """The first host that the settings allow."""
    for host in settings.ALLOWED_HOSTS:
        if host != "*":
            return str(host).removeprefix(".")
    return "localhost"


def _add_cookie(headers: dict[str, str], name: str, value: str) -> None:
    found = headers.get("HTTP_COOKIE")
    headers["HTTP_COOKIE"] = f"{found}; {name}={value}" if found else f"{name}={value}"


@contextlib.contextmanager
def _comparison(in_process: bool) -> Iterator[Comparison]:
    try:
        with Comparison(in_process) as comparison:
            yield comparison
    except (ImproperlyConfigured, WorkerEnded) as exc:
        raise CommandError(str(exc)) from exc


def _setting() -> dict[str, Any]:
    """The options that the handler runs with. Those that are given in a wsgi.py are the server's alone."""
    return DEFAULTS | getattr(settings, "WSGI_LOOP", {})


@contextlib.contextmanager
def _session_of(username: str | None, headers: dict[str, str]) -> Iterator[None]:
    """Log a user in, with nobody told, and so without a new last_login."""
    if username is None:
        yield
        return
    for app in ("django.contrib.auth", "django.contrib.sessions"):
        if not apps.is_installed(app):
            raise CommandError(f"--user needs {app} in INSTALLED_APPS. Give --header with what your login needs.")
    model = get_user_model()
    try:
        user: Any = model._default_manager.get_by_natural_key(username)
    except ObjectDoesNotExist:
        raise CommandError(
            f"There is no user with the {model.USERNAME_FIELD} {username!r} in the database "
            f"{settings.DATABASES['default'].get('NAME')!s}. Make one with manage.py createsuperuser, or name another."
        ) from None
    session = import_string(f"{settings.SESSION_ENGINE}.SessionStore")()
    session[SESSION_KEY] = user._meta.pk.value_to_string(user)
    session[BACKEND_SESSION_KEY] = settings.AUTHENTICATION_BACKENDS[0]
    session[HASH_SESSION_KEY] = user.get_session_auth_hash()
    session.set_expiry(3600)
    session.save()
    _add_cookie(headers, settings.SESSION_COOKIE_NAME, session.session_key)
    try:
        yield
    finally:
        session.delete()


def _rows(sides: tuple[Side, Side]) -> list[tuple[str, list[str]]]:
    return [
        ("answer", [side.status or "none" for side in sides]),
        ("loop calls", [str(side.loop_calls) for side in sides]),
        ("event loops", [str(side.loops) for side in sides]),
        ("threads", [str(side.threads) for side in sides]),
        ("tasks", [str(side.tasks) for side in sides]),
        ("left-over tasks", [str(len(side.left_over)) for side in sides]),
        ("contextvars left on the thread", [f"{side.leaked:.3g}" for side in sides]),
        ("time, ms", [f"{side.median:.1f}" for side in sides]),
    ]


def _as_table(method: str, path: str, sides: tuple[Side, Side]) -> str:
    rows = [(f"{method} {path}", list(TITLES)), *_rows(sides)]
    first = max(len(name) for name, _ in rows)
    widths = [max(len(values[number]) for _, values in rows) for number in (0, 1)]
    lines = [
        "  ".join([name.ljust(first), *(value.rjust(width) for value, width in zip(values, widths, strict=True))])
        for name, values in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    stock, ours = sides
    if len(stock.statuses | ours.statuses) > 1:
        for title, side in zip(TITLES, sides, strict=True):
            told = ", ".join(f"{number} x {status or 'none'}" for status, number in side.statuses.most_common())
            lines.append(f"All answers with {title}: {told}")
        if is_worse(stock, ours):
            lines.append("The answers differ. If a request changes what the next one finds, that may be all.")
    for title, side in zip(TITLES, sides, strict=True):
        if side.of_another_loop:
            lines.append(f"Bound to another event loop, with {title}: {side.of_another_loop}")
    if ours.of_another_loop:
        lines.append(_remedy())
    if stock.is_read_first:
        lines.append("Django's own handler reads the async body to its end before it sends the first byte.")
    for title, side in zip(TITLES, sides, strict=True):
        if side.left_over:
            lines.append(f"Left over with {title}: {', '.join(side.left_over)}")
    if not any(side.loop_calls for side in sides):
        lines.append("This request makes no loop call, so there is nothing to put on one loop.")
    return "\n".join(lines) + "\n"


def _remedy() -> str:
    if _setting()["SCOPE"] == "process":
        return (
            "What raises this was opened on a loop other than the process loop, such as by asyncio.run() when its "
            "module was imported. Open it in async code of a request, or in the LIFESPAN."
        )
    return (
        "What raises this is kept in a module, perhaps a client or a pool, and bound to an earlier request's loop. "
        "Keep a PerLoop in its place, or serve with WSGI_LOOP = {'SCOPE': 'process'}."
    )


def _as_json(method: str, repeat: int, results: list[tuple[str, tuple[Side, Side]]]) -> dict[str, Any]:
    return {
        "versions": {
            "python": platform.python_version(),
            "django": django.__version__,
            "asgiref": asgiref.__version__,
            "wsgi_loop": wsgi_loop.__version__,
        },
        "options": {key: value if isinstance(value, _PLAIN) else repr(value) for key, value in _setting().items()},
        "repeat": repeat,
        "requests": [
            {
                "method": method,
                "path": path,
                "worse": is_worse(stock, ours),
                "django": _side_as_json(stock),
                "wsgi_loop": _side_as_json(ours),
            }
            for path, (stock, ours) in results
        ],
    }


def _side_as_json(side: Side) -> dict[str, Any]:
    return {
        "status": side.status,
        "answers": dict(side.statuses),
        "of_another_loop": side.of_another_loop,
        "is_read_first": side.is_read_first,
        "loop_calls": side.loop_calls,
        "loops": side.loops,
        "threads": side.threads,
        "tasks": side.tasks,
        "one_loop": side.one_loop,
        "left_over_tasks": side.left_over,
        "contextvars_leaked": side.leaked,
        "median_ms": round(side.median, 3),
    }
