"""System checks: what would keep wsgi-loop from starting, or from being what serves the requests.

Told by `manage.py check`, by its tag `wsgi_loop` alone too, and before `runserver` and most other commands. Knows where
Django and gunicorn look for an application; what is wrong with the setting is known to `conf`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import types
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import asgiref
from django.conf import settings
from django.core.checks import CheckMessage, Error, Info, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers import wsgi
from django.core.management import get_commands, load_command_class
from django.core.wsgi import get_wsgi_application as get_stock_application
from django.utils.module_loading import import_string
from django.utils.version import get_version_tuple

from ..conf import get_options
from ..handler import WSGIHandler, get_wsgi_application
from ..threads import check_threads

LOWEST_ASGIREF = (3, 12, 1)
OURS = "wsgi_loop.wsgi.application"
#: Where gunicorn looks for its configuration if it is not told of another file.
GUNICORN_CONFIGURATION = Path("gunicorn.conf.py")
#: Words in the names of gunicorn's worker classes that replace threads by greenlets.
GREENLETS = ("gevent", "eventlet")
#: How many objects are looked at inside an application.
MOST = 2000

_USE_OURS = (
    "Set WSGI_APPLICATION = 'wsgi_loop.wsgi.application', or have your wsgi.py import get_wsgi_application from "
    "wsgi_loop in place of django.core.wsgi."
)


@register("wsgi_loop")
def check_setting(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """wsgi_loop.E001: the `WSGI_LOOP` setting is not accepted."""
    try:
        get_options()
    except ImproperlyConfigured as exc:
        return [
            Error(
                str(exc),
                hint="The page docs/reference/settings.md of wsgi-loop describes each key.",
                id="wsgi_loop.E001",
            )
        ]
    return []


@register("wsgi_loop")
def check_asgiref(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """wsgi_loop.E002: asgiref is too old."""
    if get_version_tuple(asgiref.__version__) >= LOWEST_ASGIREF:
        return []
    lowest = ".".join(map(str, LOWEST_ASGIREF))
    return [
        Error(
            f"asgiref {asgiref.__version__} is installed, and wsgi-loop needs {lowest} or later.",
            hint=f"Install it with: pip install 'asgiref>={lowest}'",
            id="wsgi_loop.E002",
        )
    ]


@register("wsgi_loop")
def check_worker(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """wsgi_loop.E003: threads are greenlets in this process. wsgi_loop.W004: gunicorn's workers are to make them so."""
    try:
        check_threads()
    except RuntimeError as exc:
        hint = "Take the call that patches (such as gevent.monkey.patch_all()) out of what this process imports."
        return [Error(str(exc), hint=hint, id="wsgi_loop.E003")]
    worker = _gunicorn_worker_class()
    if worker is None or not any(word in worker for word in GREENLETS):
        return []
    return [
        Warning(
            f"{GUNICORN_CONFIGURATION} sets worker_class = {worker!r}, whose threads are greenlets: wsgi-loop refuses "
            "to start there, in scope 'process' as in 'request'.",
            hint="Set worker_class = 'gthread', and threads to as many requests as a worker is to serve at a time.",
            id="wsgi_loop.W004",
        )
    ]


@register("wsgi_loop")
def check_application(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """wsgi_loop.W001, W002, W003, I001: Django's own handler is in the place of wsgi-loop's, or may be."""
    path = settings.WSGI_APPLICATION
    if path is None:
        return [
            Warning(
                "The app wsgi_loop is installed, but WSGI_APPLICATION is not set, so that runserver serves with "
                "Django's own handler.",
                hint=_USE_OURS,
                id="wsgi_loop.W001",
            )
        ]
    if path == OURS:
        return _check_unused_modules()
    if check_setting(None) or check_worker(None):
        # The application could not be made, and has been told why.
        return []
    try:
        ours = is_ours(import_string(path))
    except (Exception, SystemExit) as exc:
        return [
            Info(
                f"WSGI_APPLICATION is {path!r}, which can't be imported here ({type(exc).__name__}: {exc}), so that it "
                "is not known if wsgi-loop serves it.",
                hint=f"{_USE_OURS} To make sure where it can be imported, run manage.py check --tag wsgi_loop there.",
                id="wsgi_loop.I001",
            )
        ]
    if ours is None:
        return [
            Info(
                f"WSGI_APPLICATION is {path!r}, in which neither wsgi-loop's handler nor Django's own can be seen, so "
                "that it is not known if wsgi-loop serves it.",
                hint="The sender of the signal request_started is the class that serves: wsgi_loop.WSGIHandler. If it "
                "is, add 'wsgi_loop.I001' to SILENCED_SYSTEM_CHECKS.",
                id="wsgi_loop.I001",
            )
        ]
    if ours:
        return _check_unused_modules()
    return [
        Warning(
            f"The app wsgi_loop is installed, but WSGI_APPLICATION is {path!r}, which serves with Django's own "
            "handler.",
            hint=_USE_OURS,
            id="wsgi_loop.W002",
        )
    ]


@register("wsgi_loop")
def check_runserver(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """wsgi_loop.W005: `runserver` is daphne's, which serves ASGI_APPLICATION."""
    command: Any = get_commands()["runserver"]
    if isinstance(command, str):
        try:
            command = load_command_class(command, "runserver")
        except Exception:  # whoever calls it is told
            return []
    if not any(base.__module__.partition(".")[0] == "daphne" for base in type(command).__mro__):
        return []
    return [
        Warning(
            "runserver is daphne's here, which serves ASGI_APPLICATION, and not with wsgi-loop.",
            hint="Take 'daphne' out of INSTALLED_APPS, or call manage.py runserver --noasgi.",
            id="wsgi_loop.W005",
        )
    ]


def is_ours(application: Any) -> bool | None:
    """Tell whether wsgi-loop's handler is inside an application. None: neither that nor Django's own is seen.

    Looks at what the application holds, as WhiteNoise and Sentry hold what they wrap, and at what a function uses.
    """
    stock = None
    seen: set[int] = set()
    # What is nearest comes first. With what was looked at kept, so that no identity is used again.
    queue: deque[Any] = deque([application])
    kept = []
    while queue and len(seen) < MOST:
        found = queue.popleft()
        if id(found) in seen:
            continue
        seen.add(id(found))
        kept.append(found)
        if found is get_wsgi_application or found is WSGIHandler or isinstance(found, WSGIHandler):
            return True
        if isinstance(found, wsgi.WSGIHandler) or found is get_stock_application or found is wsgi.WSGIHandler:
            stock = False
        with contextlib.suppress(Exception):  # whatever an attribute of somebody's class may raise
            queue.extend(_held_by(found))
    return stock


def _held_by(found: Any) -> Iterator[Any]:
    if found is get_stock_application or isinstance(found, str | bytes | int | float | types.ModuleType):
        return
    if isinstance(found, type):
        return
    if isinstance(found, wsgi.WSGIHandler):
        # Such as the one for static files around another one; but not its middleware.
        yield from (value for name, value in vars(found).items() if not name.startswith("_"))
    elif isinstance(found, types.FunctionType):
        yield from _used_by(found.__code__, found.__globals__)
        for cell in found.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # it is empty
                continue
        yield from found.__defaults__ or ()
        yield from (found.__kwdefaults__ or {}).values()
    elif isinstance(found, types.MethodType):
        yield found.__func__
        yield found.__self__
    elif isinstance(found, functools.partial):
        yield found.func
        yield from found.args
        yield from found.keywords.values()
    elif isinstance(found, Mapping):
        yield from found.values()
    elif isinstance(found, list | tuple | set | frozenset):
        yield from found
    else:
        if callable(found) and isinstance(type(found).__call__, types.FunctionType):
            yield type(found).__call__
        for cls in type(found).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                yield getattr(found, name, None)
    if not isinstance(found, wsgi.WSGIHandler):
        # A wrapper may hide what it holds from all but this name.
        yield getattr(found, "__wrapped__", None)
        yield from getattr(found, "__dict__", {}).values()


def _used_by(code: types.CodeType, names: Mapping[str, Any]) -> Iterator[Any]:
    for name in code.co_names:
        if name in names:
            yield names[name]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _used_by(constant, names)


def _check_unused_modules() -> list[CheckMessage]:
    """runserver serves with wsgi-loop; a server that is given the project's own `wsgi.py` may not."""
    return [
        Warning(
            f"WSGI_APPLICATION serves with wsgi-loop, but {name} builds Django's own handler: that is what a server "
            f"gets which is given {name}:application.",
            hint=f"Import get_wsgi_application from wsgi_loop in {name}, or remove it if no server is given it.",
            id="wsgi_loop.W003",
        )
        for name in _wsgi_modules()
        if _builds_stock_handler(name)
    ]


def _wsgi_modules() -> list[str]:
    """Where `startproject` puts it, and where it stays when the settings become a package."""
    names: dict[str, None] = {}
    for module in (getattr(settings, "SETTINGS_MODULE", None), settings.ROOT_URLCONF):
        package = module if isinstance(module, str) else ""
        while package := package.rpartition(".")[0]:
            names[f"{package}.wsgi"] = None
    return list(names)


def _builds_stock_handler(name: str) -> bool:
    """Read, and not run: nobody has named this module in a setting."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return False
        tree = ast.parse(Path(spec.origin).read_bytes())
    except (ImportError, OSError, SyntaxError, ValueError):
        return False
    return any(
        isinstance(node, ast.ImportFrom)
        and node.module == "django.core.wsgi"
        and any(alias.name == "get_wsgi_application" for alias in node.names)
        for node in ast.walk(tree)
    )


def _gunicorn_worker_class() -> str | None:
    """What gunicorn's configuration in the current folder says, where it can be told without running it."""
    try:
        tree = ast.parse(GUNICORN_CONFIGURATION.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    worker = None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "worker_class" for target in node.targets
        ):
            constant = node.value
            worker = constant.value if isinstance(constant, ast.Constant) and isinstance(constant.value, str) else None
    return worker
