"""One event loop for each request, or for a whole worker, of a Django project on a WSGI server."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .background import create_background_task
    from .context import EventLoopContext
    from .counters import stats
    from .handler import WSGIHandler, get_wsgi_application
    from .resources import PerLoop

__all__ = ["EventLoopContext", "PerLoop", "WSGIHandler", "create_background_task", "get_wsgi_application", "stats"]
__version__ = "0.1.0"

_MODULES = {
    "EventLoopContext": "context",
    "PerLoop": "resources",
    "WSGIHandler": "handler",
    "create_background_task": "background",
    "get_wsgi_application": "handler",
    "stats": "counters",
}


def __getattr__(name: str) -> Any:
    # pytest imports this package for its plugin in every run, also in those that have nothing to do with Django.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # All of it, as each imports most of the others; and what a request executes depends a little on what is in memory.
    for module in dict.fromkeys(_MODULES.values()):
        import_module(f".{module}", __name__)
    found = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return found
