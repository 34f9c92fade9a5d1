"""The application to name in `WSGI_APPLICATION` and to give to a server: `gunicorn wsgi_loop.wsgi:application`."""

from .handler import get_wsgi_application

application = get_wsgi_application()
