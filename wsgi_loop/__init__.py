"""One event loop for each request of a Django project on a WSGI server."""

from .handler import WSGIHandler, get_wsgi_application

__all__ = ["WSGIHandler", "get_wsgi_application"]
__version__ = "0.1.0"
