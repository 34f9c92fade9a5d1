"""The app to put in `INSTALLED_APPS` for the system checks; nothing else needs it."""

from django.apps import AppConfig
from django.core.checks import register


class WSGILoopConfig(AppConfig):
    name = "wsgi_loop"
    verbose_name = "wsgi-loop"

    def ready(self) -> None:
        from .checks import check_setting

        register(check_setting)
