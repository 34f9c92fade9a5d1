"""One event loop for each request, or for a whole worker, of a Django project on a WSGI server."""

from .background import create_background_task
from .context import EventLoopContext
from .handler import WSGIHandler, get_wsgi_application
from .resources import PerLoop

__all__ = ["EventLoopContext", "PerLoop", "WSGIHandler", "create_background_task", "get_wsgi_application"]
__version__ = "0.1.0"
