"""The app to put in `INSTALLED_APPS` for the system checks; nothing else needs it."""

from django.apps import AppConfig


class WSGILoopConfig(AppConfig):
    name = "wsgi_loop"
    verbose_name = "wsgi-loop"

    def ready(self) -> None:
        from .tools import checks  # noqa: F401 - they register themselves
